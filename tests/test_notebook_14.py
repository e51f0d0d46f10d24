"""Notebook 14 from end to end, its page in a browser, and a mixture of experts through the same
cells."""

import re
from pathlib import Path

import models
import nbformat
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from notebook_checks import figures_with_sentences, printed

from llamatelemetry import Capture, ControlVector, Features, load_text
from llamatelemetry.layers import page as layers_page
from llamatelemetry.tools.notebooks import NotebookError, run_notebook

NOTEBOOK = (
    Path(__file__).parents[1] / "notebooks" / "14-gguf-layer-by-layer-inference-tracker.ipynb"
)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, smollm2):
    folder = tmp_path_factory.mktemp("notebook14")
    parameters = {
        "MODEL": str(smollm2),
        "OUTPUT_DIR": str(folder / "out"),
        "TEXT_TOKENS": 12,
        "PATCH_EVERY": 10,
        "PROBE_TEXTS": 40,
        "FEATURES": str(models.features(folder / "features", 576, "blocks.14.hook_resid_post")),
    }
    return nbformat.read(
        run_notebook(NOTEBOOK, folder, parameters, progress=False), 4
    ), folder / "out"


@pytest.mark.slow
def test_exports_are_the_capture(run, engine):
    _, out = run
    saved = Capture.load(out / "prompt.safetensors")
    again = engine.capture(saved.tokens["id"].tolist(), stages=("hidden", "logits"))
    np.testing.assert_array_equal(saved.hidden, again.hidden)
    norms = pd.read_parquet(out / "norms.parquet")
    np.testing.assert_allclose(
        norms["first"], np.linalg.norm(again.hidden.values[:, 0], axis=-1), rtol=1e-5
    )
    lens = pd.read_parquet(out / "lens.parquet")
    assert len(lens) == again.hidden.shape[0] * again.hidden.shape[1]
    logits = again.logits.values[-1].astype(float)
    last = lens.query("layer == 30 and position == 13").iloc[0]
    assert last["probability"] == pytest.approx(
        np.exp(logits.max()) / np.exp(logits).sum(), abs=0.05
    )
    parts = pd.read_parquet(out / "attribution.parquet")
    best, second = np.argsort(-logits)[:2]
    assert parts["value"].sum() == pytest.approx(logits[best] - logits[second], abs=0.5)
    assert len(pd.read_parquet(out / "importance.parquet")) == 30
    assert ControlVector.load(out / "direction.gguf").layers == [19]
    nodes = pd.read_parquet(out / "graph.nodes.parquet")
    assert len(nodes) > 1000 and nodes["id"].is_unique


@pytest.mark.slow
def test_probes_are_of_collected_states(run, engine, tmp_path):
    """The exported accuracies of three states, from a collection of our own."""
    from llamatelemetry.probing import probes, sets

    table = pd.read_parquet(run[1] / "probes.parquet").set_index(["set", "layer"])
    assert set(table.index.get_level_values("set")) == {"number", "tense"}
    assert len(table) == 62
    made = sets.labelled("tense", 40)
    many = engine.collect(made, "hidden", layers=[0, 12, 30], where=tmp_path, progress=False)
    again = probes.by_layer(many.hidden, many.label, many.group, shuffles=2)
    for column in ("accuracy", "low", "high", "shuffled"):
        stored = table.loc["tense"].loc[[0, 12, 30], column]
        np.testing.assert_allclose(stored, again[column], atol=1e-9)


@pytest.mark.slow
def test_every_figure_has_a_sentence(run):
    assert figures_with_sentences(run[0]) >= 13


@pytest.mark.slow
def test_the_answer_moves_from_the_name_to_the_last_token(run):
    """What the model does with the default prompts; another model would say something else."""
    assert "position 9 '␣John': states 0 to" in printed(run[0])
    assert "position 13 '␣to': state 30." in printed(run[0])


@pytest.mark.slow
def test_the_direction_turns_the_answer_in_both_files(run):
    """With the default words: up where it is added, down where it is taken away, in either file."""
    text = printed(run[0])
    found = re.search(
        r"changes by (-[\d.]+) nats at strength -4 and \+([\d.]+) nats at strength 4;", text
    )
    assert found and float(found[2]) > 2
    across = re.search(r"by ([+-][\d.]+) against ([+-][\d.]+) nats per unit of strength", text)
    assert min(map(float, across.groups())) > 0.3
    assert float(re.search(r"have a cosine of at least ([\d.]+)", text)[1]) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture, says", [("qwen3moe", "The busiest expert"), ("lfm2", "has no experts")]
)
def test_other_architectures_pass_the_same_cells(architecture, says, tmp_path):
    """Experts; layers without attention. The weights are random: only that the cells hold is
    tested."""
    parameters = {
        "MODEL": str(models.tiny_model(architecture, tmp_path)),
        "TEXT_TOKENS": 12,
        "PATCH_EVERY": 2,
        "PROBE_TEXTS": 40,
        "GENERATE": 4,
        "PROMPT": "The cat",
        "SECOND_PROMPT": "The dog",
        "QUANTIZATION": "Q8_0",
        "CONTEXT": 128,
    }
    notebook = nbformat.read(run_notebook(NOTEBOOK, tmp_path, parameters, progress=False), 4)
    assert says in printed(notebook)


@pytest.mark.slow
@pytest.mark.parametrize(
    "parameters, message",
    [
        ({"PROMPT": "x" * 400}, r"PROMPT is \d+ token\(s\) long; 2 to 104 fit"),
        ({"MODEL": "no-such-model"}, "no-such-model"),
    ],
)
def test_bad_parameters_stop_the_notebook_by_name(parameters, message, tmp_path):
    tiny = {"MODEL": str(models.tiny_model("llama", tmp_path)), "CONTEXT": 128}
    with pytest.raises(NotebookError, match=message):
        run_notebook(NOTEBOOK, tmp_path, {**tiny, **parameters}, progress=False)


def lens_of(hidden):
    """A lens that is a quarter sure of token t at position t."""
    dims, shape = ("layer", "token"), hidden.shape[:2]
    share, top = np.full(shape, 0.25), np.broadcast_to(np.arange(shape[1]), shape)
    data = {"probability": (dims, share), "entropy": (dims, share)}
    data |= {
        "top": ((*dims, "best"), top[..., None]),
        "top_probability": ((*dims, "best"), share[..., None]),
    }
    return xr.Dataset(data, {"position": ("token", np.arange(shape[1]))})


@pytest.mark.slow
def test_page_shows_the_chosen_state(page, tmp_path):
    hidden = np.zeros((3, 4, 8), np.float32)
    hidden[2, 1, 5] = -12.5
    hidden[..., 0] += 1
    pieces, vocabulary = [" a", "<b>", "\n", b"\xff"], ["x", "</script>", "y", "z"]
    shown = layers_page.states(hidden, lens_of(hidden), pieces, vocabulary, model="<m>")
    path = shown.save(tmp_path / "p.html")
    errors, requests = [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    box = page.locator("#map").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 1.5 / 4, box["y"] + box["height"] * 2.5 / 3)
    assert page.locator("#chosen").inner_text() == "state 2, token 1 <b>"
    cells = page.locator("#facts td").all_inner_texts()
    assert cells[:2] == ["5", "-12.5000"]
    assert "lens: </script> (0.250)" in page.locator("#facts").inner_text()
    page.locator("#map").press("ArrowUp")
    assert page.locator("#chosen").inner_text() == "state 1, token 1 <b>"
    page.mouse.move(box["x"] + box["width"] * 1.5 / 4, box["y"] + box["height"] * 2.5 / 3)
    assert page.locator("#under").inner_text() == f"state 2, 1 <b>: {np.hypot(12.5, 1):.3f}"
    page.locator("#map").press("ArrowUp")
    assert page.locator("#chosen").inner_text() == "state 0, token 1 <b>"
    assert errors == [] and requests == [path.as_uri()]


@pytest.mark.parametrize(
    "states, tokens, words",
    [
        (4, 4, "exactly"),
        (4, 600, "within 1/65534"),
        (4, 2000, "within 1/254"),
        (8, 1200, "of every 2nd state"),
        (4, 2600, "Of 2,600 tokens the first and the last"),  # a few states are always there
    ],
)
def test_page_says_how_precise_it_is(states, tokens, words):
    hidden, pieces = np.ones((states, tokens, 500)), ["a"] * tokens
    shown = layers_page.states(hidden, lens_of(hidden), pieces, pieces, model="m")
    assert words in shown.html and len(shown.html) < 5.2e6


@pytest.mark.slow
def test_a_long_prompt_ends_in_bounded_pages(tmp_path, smollm2):
    prompt = load_text(None)[:2000]
    parameters = {"MODEL": str(smollm2), "PROMPT": prompt, "OUTPUT_DIR": str(tmp_path / "out")}
    parameters["SECOND_PROMPT"] = prompt.replace("almost all men", "almost all cats")
    parameters |= {"TEXT_TOKENS": 8, "PATCH_POSITIONS": 2, "PATCH_EVERY": 15}
    run_notebook(NOTEBOOK, tmp_path, parameters, progress=False)
    out = tmp_path / "out"
    saved = Capture.load(out / "prompt.safetensors")
    n_token = len(saved.tokens)
    assert n_token > 400 and saved.hidden.shape == (31, n_token, 576)
    read = pd.read_parquet(out / "lens.parquet")
    at = read["position"].unique()
    assert at[0] == 0 and at[-1] == n_token - 1 and len(read) == 31 * len(at)
    nodes = pd.read_parquet(out / "graph.nodes.parquet")
    assert len(nodes) <= 4000 and nodes["position"].max() == n_token + 23
    for page in out.glob("*.html"):
        assert page.stat().st_size < 5_000_000, page.name


@pytest.mark.slow
def test_published_features_are_read_at_their_hook(run, engine):
    _, out = run
    saved = Capture.load(out / "prompt.safetensors")
    features = Features.load(out.parent / "features")
    active = features.encode(saved.hidden.sel(layer=15).values)
    top = pd.read_parquet(out / "features.parquet")
    assert len(top) == 10 and top["largest"].is_monotonic_decreasing
    for row in top.itertuples():
        assert active[row.position, row.feature] == pytest.approx(row.largest, rel=1e-3)
    assert active[1:].max() == pytest.approx(top["largest"][0], rel=1e-3)
    assert "features are active per token on average" in printed(run[0])
