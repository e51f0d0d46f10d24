"""Notebook 12 from end to end: what it writes is what the model did, and bad parameters stop it by
name."""

import re
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from notebook_checks import figures_with_sentences, printed

from llamatelemetry import Capture, load_text
from llamatelemetry.tools.notebooks import NotebookError, run_notebook

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "12-gguf-attention-mechanism-explorer.ipynb"


@pytest.fixture(scope="module")
def run(tmp_path_factory, smollm2, llama_server):
    folder = tmp_path_factory.mktemp("notebook12")
    parameters = {"MODEL": str(smollm2), "OUTPUT_DIR": str(folder / "out")}
    executed = run_notebook(NOTEBOOK, folder, parameters, progress=False)
    return nbformat.read(executed, 4), folder / "out"


@pytest.mark.slow
def test_exports_are_the_capture(run, engine):
    _, out = run
    saved = Capture.load(out / "prompt.safetensors")
    again = engine.capture(saved.tokens["id"].tolist(), stages=("attention", "logits"))
    np.testing.assert_allclose(saved.attention, again.attention, atol=1e-5)
    np.testing.assert_allclose(saved.logits, again.logits, atol=1e-3)
    generated = Capture.load(out / "generated.safetensors")
    assert generated.tokens["generated"].sum() == 12
    assert generated.attention.shape[-1] == len(saved.tokens) + 12
    heads = pd.read_parquet(out / "heads.parquet")
    assert len(heads) == 270
    last = saved.attention.values[18, 6, 1:, 0].mean()
    assert heads.query("layer == 18 and head == 6")["sink_mass"].item() == pytest.approx(
        last, abs=1e-5
    )
    changes = pd.read_parquet(out / "changes.parquet")
    reference = Capture.load(out / "reference.safetensors")
    difference = np.abs(reference.attention.values - saved.attention.values).max()
    assert changes["max_difference"].max() == pytest.approx(difference, abs=1e-6) and difference > 0
    for page in ("steps", "views", "next-token", "arcs", "graph"):
        assert (out / f"{page}.html").stat().st_size < 5_000_000
    assert pd.read_parquet(out / "steps.parquet")["agrees"].all()


@pytest.mark.slow
def test_the_edge_to_the_name_carries_the_answer(run):
    """Of the default prompt: in the layers where it counts, the last token's edge to " Anna"."""
    said = printed(run[0])
    assert re.search(r"loses most, [\d.]+, without the edges to 19 '␣Anna' in layers? 2\d", said)
    assert "cutting out 19 '␣Anna' changes the prediction most" in said


@pytest.mark.slow
def test_a_long_prompt_ends_in_bounded_pages(tmp_path, smollm2, engine):
    prompt = load_text(None)[:3000]
    parameters = {"MODEL": str(smollm2), "PROMPT": prompt, "OUTPUT_DIR": str(tmp_path / "out")}
    executed = run_notebook(NOTEBOOK, tmp_path, parameters, progress=False)
    said = Path(executed).read_text()
    assert "are taken together in" in said and "maps of all heads are captured for the last" in said
    saved = Capture.load(tmp_path / "out" / "prompt.safetensors")
    assert saved["attention"].sizes["query"] < saved["attention"].sizes["key"] > 600
    assert saved["attention_mean"].sizes["query"] == saved["attention"].sizes["key"]
    assert saved.scores.sizes["query"] == 16 and "while writing for the last 16" in said
    assert saved.logits["token_position"].values.tolist() == [len(saved.tokens) - 1]
    assert "where only the last token's are read, only those are captured" in said
    ids, queries = saved.tokens["id"].tolist(), saved.scores["query_position"].values
    whole = engine.capture(ids, ("scores", "logits"), queries=queries)
    np.testing.assert_allclose(saved.scores, whole.scores, atol=1e-3)
    np.testing.assert_allclose(saved.logits[0], whole.logits[-1], atol=1e-3)
    assert pd.read_parquet(tmp_path / "out" / "steps.parquet")["agrees"].all()
    written = Capture.load(tmp_path / "out" / "generated.safetensors")
    assert written.attention.sizes["query"] == 16 + written.tokens["generated"].sum()
    for page in (tmp_path / "out").glob("*.html"):
        assert page.stat().st_size < 5_000_000, page.name


@pytest.mark.slow
def test_every_figure_has_a_sentence(run):
    assert figures_with_sentences(run[0]) >= 13


@pytest.mark.slow
@pytest.mark.parametrize(
    "parameters, message",
    [
        ({"LAYER": 30}, r"LAYER = 30: the model has 30 layers, 0 to 29"),
        ({"HEAD": -1}, r"HEAD = -1: the model has 9 heads, 0 to 8"),
        ({"PROMPT": "Hello"}, r"PROMPT is 1 token\(s\) long"),
        (
            {"CONTEXT": 32},
            r"PROMPT is 32 token\(s\) long; 2 to 20 fit \(CONTEXT 32 - GENERATE 12\)",
        ),
    ],
)
def test_bad_parameters_stop_the_notebook_by_name(tmp_path, smollm2, parameters, message):
    with pytest.raises(NotebookError, match=message):
        run_notebook(NOTEBOOK, tmp_path, {"MODEL": str(smollm2), **parameters}, progress=False)


@pytest.mark.slow
def test_the_live_page_leaves_its_first_picture(run):
    cell = next(cell for cell in run[0].cells if cell.source.startswith("live = explore("))
    pages = [output.get("data", {}).get("text/html", "") for output in cell.outputs]
    assert sum("llt-next" in page and "Layer 18, head 6" in page for page in pages) == 1
