"""Notebook 15 from end to end: its tables are what the model did, figures have sentences, bad
parameters stop it."""

import re
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from notebook_checks import figures_with_sentences, printed

from llamatelemetry import ablate_head
from llamatelemetry.heads import texts
from llamatelemetry.tools.notebooks import NotebookError, run_notebook

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "15-gguf-multi-head-attention-comparator.ipynb"


@pytest.fixture(scope="module")
def run(tmp_path_factory, smollm2, llama_server):
    folder = tmp_path_factory.mktemp("notebook15")
    parameters = {"MODEL": str(smollm2), "OUTPUT_DIR": str(folder / "out"), "ABLATION_SECONDS": 5}
    executed = run_notebook(NOTEBOOK, folder, parameters, progress=False)
    return nbformat.read(executed, 4), folder / "out"


@pytest.mark.slow
def test_exports_are_what_the_model_did(run, engine):
    _, out = run
    table = pd.read_parquet(out / "heads.parquet")
    assert len(table) == 270 and set(table["layer"]) == set(range(30))
    importance = pd.read_parquet(out / "importance.parquet")
    assert 20 <= len(importance) <= 270
    row = importance.iloc[0]
    place = int(row["layer"]), int(row["head"])
    again = engine.sweep(texts.held_out()[0], {"one": [ablate_head(*place)]}, progress=False)
    assert row["loss_change"] == pytest.approx(again.loc["one", "loss_change"], abs=1e-6)
    text = texts.load_texts()["prose"][0]
    ids = engine.tokenize(text)["id"].tolist()[:96]
    assert np.isfinite(engine.head_statistics(ids)["sink"]).all()
    stored = np.load(out / "distances.npz")["distance"]
    assert stored.shape == (270, 270) and stored.max() <= 1 and np.allclose(np.diag(stored), 0)
    pairs = pd.read_parquet(out / "pairs.parquet")
    assert pairs["distance"][0] == pytest.approx(stored[np.triu_indices(270, 1)].min())
    profile = pd.read_parquet(out / "profile.parquet")
    assert (profile["low"] <= profile["high"] + 1e-12).all()
    for page in ("dashboard", "graph"):
        assert 10_000 < (out / f"{page}.html").stat().st_size < 6_000_000


@pytest.mark.slow
def test_the_strongest_edges_are_set_beside_the_heads(run):
    said = printed(run[0])
    assert re.search(r"moves the predictions by \d+% of what zeroing the head does", said)


@pytest.mark.slow
def test_the_known_induction_head_is_found(run):
    """L18H6 of SmolLM2 puts most of its attention on what followed the token's earlier
    occurrence."""
    table = pd.read_parquet(run[1] / "heads.parquet").set_index(["layer", "head"])
    assert "induction" in table.loc[(18, 6), "labels"] and table.loc[(18, 6), "induction"] > 0.5
    assert "previous token" in table.loc[(11, 1), "labels"]


@pytest.mark.slow
def test_every_figure_has_a_sentence(run):
    assert figures_with_sentences(run[0]) >= 10


@pytest.mark.slow
@pytest.mark.parametrize(
    "parameters, message",
    [
        ({"LAYER": 30}, r"LAYER = 30: the model has 30 layers, 0 to 29"),
        ({"HEAD": -1}, r"HEAD = -1: the model has 9 heads, 0 to 8"),
        ({"PROMPT": "Hello"}, r"PROMPT is 1 token\(s\) long"),
    ],
)
def test_bad_parameters_stop_the_notebook_by_name(tmp_path, smollm2, parameters, message):
    with pytest.raises(NotebookError, match=message):
        run_notebook(NOTEBOOK, tmp_path, {"MODEL": str(smollm2), **parameters}, progress=False)
