"""Notebook 13 from end to end: what it saves is what the file holds, and bad parameters stop it by
name."""

from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from notebook_checks import figures_with_sentences, printed

from llamatelemetry.tools.notebooks import NotebookError, run_notebook

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "13-gguf-token-embedding-visualizer.ipynb"


@pytest.fixture(scope="module")
def run(tmp_path_factory, smollm2, llama_server):
    """The default form, on the CPU."""
    folder = tmp_path_factory.mktemp("notebook13")
    parameters = {"MODEL": str(smollm2), "OUTPUT_DIR": str(folder / "out"), "BACKEND": "cpu"}
    executed = run_notebook(NOTEBOOK, folder, parameters, progress=False)
    return nbformat.read(executed, 4), folder / "out"


@pytest.mark.slow
def test_the_network_is_of_the_rows_in_the_file(run, smollm2):
    from llamatelemetry import GGUFFile

    _, out = run
    nodes = pd.read_parquet(out / "token_network.nodes.parquet")
    edges = pd.read_parquet(out / "token_network.edges.parquet")
    assert len(nodes) >= 1000 and nodes.id.is_unique
    model = GGUFFile(smollm2)
    some = edges.sample(50, random_state=0)
    a, b = (
        model.rows("token_embd.weight", some[end].to_numpy()).astype(np.float64)
        for end in ("src", "dst")
    )
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(some.cosine, cosine, atol=1e-5)
    assert edges.cosine.min() >= 0.5
    rows = model.rows("token_embd.weight", nodes.id.to_numpy())
    np.testing.assert_allclose(nodes.norm, np.linalg.norm(rows, axis=1), rtol=1e-5)
    assert (out / "token_network.html").stat().st_size < 5_000_000
    assert not list(out.glob("*.gguf")), "the quantization made for the comparison is removed"


@pytest.mark.slow
def test_every_figure_has_a_sentence(run):
    assert figures_with_sentences(run[0]) >= 13


@pytest.mark.slow
def test_sentences_say_what_smollm2_is(run):
    text = printed(run[0])
    assert "Captured layer 0 and the rows in the file: cosine at least 1.00000" in text
    assert "Server and capture: cosine at least 0.99" in text
    assert "is 0.00 at layer 0 and largest" in text, "one row per word: no senses in the matrix"
    assert "To Q8_0 (8.50 bits), rows of Q4_0 (4.50 bits)" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "parameters, message",
    [
        (
            {"CATEGORIES": ["animals", "planets"]},
            "CATEGORIES = .*'animals', .* is expected in place of 'planets'",
        ),
        ({"N_NEIGHBORS": 500}, "N_NEIGHBORS = 500: a whole number from 2 to 218 is expected"),
    ],
)
def test_bad_parameters_stop_the_notebook_by_name(tmp_path, smollm2, parameters, message):
    with pytest.raises(NotebookError, match=message):
        run_notebook(
            NOTEBOOK,
            tmp_path,
            {"MODEL": str(smollm2), "BACKEND": "cpu", **parameters},
            progress=False,
        )
