"""Notebook 16 from end to end: what it exports is what was measured, and every figure has a
sentence."""

import re
from pathlib import Path

import models
import nbformat
import numpy as np
import pandas as pd
import pytest
from notebook_checks import figures_with_sentences, printed

from llamatelemetry.compare.texts import load_text
from llamatelemetry.features.survival import CONTROL
from llamatelemetry.files.gguf import GGUFFile
from llamatelemetry.tools.notebooks import run_notebook

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "16-gguf-quantization-impact-analyzer.ipynb"


@pytest.fixture(scope="module")
def run(tmp_path_factory, smollm2):
    """Two quantizations that are quick to make; the reference is the stand-in that the notebook
    makes itself."""
    folder = tmp_path_factory.mktemp("notebook16")
    parameters = {
        "MODEL": str(smollm2),
        "OUTPUT_DIR": str(folder / "out"),
        "QUANTIZATIONS": ["Q8_0", "Q4_K_M"],
        "WINDOWS": 2,
        "N_CTX": 256,
        "WORKERS": 1,
        "N_TASKS": 12,
        "COST_SECONDS": 100_000,
        "FEATURES": str(models.features(folder / "features", 576, "blocks.14.hook_resid_post")),
    }
    executed = run_notebook(NOTEBOOK, folder, parameters, progress=False)
    return nbformat.read(executed, 4), folder / "out"


@pytest.mark.slow
def test_exports_are_what_was_measured(run):
    notebook, out = run
    tables = {path.stem: pd.read_parquet(path) for path in out.glob("*.parquet")}
    quality, tokens = tables["quality"], tables["tokens"]
    assert list(quality.index) == ["Q8_0", "Q4_K_M", "SmolLM2-135M-Instruct.Q4_1"]
    assert 0 < quality.loc["Q8_0", "kld_mean"] < quality.loc["Q4_K_M", "kld_mean"] < 1
    means = tokens.groupby("candidate")["kld"].mean()
    assert (
        means["Q8_0"] == pytest.approx(quality.loc["Q8_0", "kld_mean"])
        and (tokens["position"] > 128).all()
    )
    assert all(
        piece.replace("␣", " ") in load_text()
        for piece in tokens["piece"]
        if piece.strip("␣").isalpha()
    )
    assert quality.loc["Q8_0", "bits_per_weight"] == GGUFFile(out / "Q8_0.gguf").bits_per_weight
    assert (
        len(tables["costs"]) == len(tables["falls"]) == 60 and (tables["costs"]["cost"] > 0).all()
    )
    kept = tables["recommendation"]
    mixture, plain = GGUFFile(out / "mixture.gguf").tensors, GGUFFile(out / "Q4_K_M.gguf").tensors
    changed = mixture.index[mixture["type"] != plain["type"]]
    for pattern in kept["pattern"]:
        assert set(mixture[mixture.index.str.fullmatch(pattern)]["type"]) == {"Q8_0"}
    assert (
        all(any(re.fullmatch(pattern, name) for pattern in kept["pattern"]) for name in changed)
        and len(changed) > 8
    )
    added = GGUFFile(out / "mixture.gguf").size_bytes - GGUFFile(out / "Q4_K_M.gguf").size_bytes
    assert added == pytest.approx(kept["bytes_added"].sum(), rel=0.01)
    assert np.isfinite(tables["summary"].to_numpy(float)).all()
    assert {"graph.html", "answers.html"} <= {path.name for path in out.iterdir()}


@pytest.mark.slow
def test_tasks_texts_and_a_mixture_of_a_size(run):
    notebook, out = run
    tasks = pd.read_parquet(out / "tasks.parquet").set_index(["tasks", "name"])
    names = ["reference", "Q8_0", "Q4_K_M"]
    assert list(tasks.index) == [(kind, name) for kind in ("endings", "gaps") for name in names]
    assert (tasks["n"] == 12).all() and (tasks["accuracy"] > tasks["chance"]).all()
    kinds = [line.split("=") for line in (out / "mixture-of-size.txt").read_text().splitlines()]
    assert len(kinds) == 211 and {kind for _, kind in kinds} <= set(
        "q8_0 q6_k q5_k q4_k q5_1 q5_0".split()
    )
    mixture, focus = (GGUFFile(out / f"{name}.gguf") for name in ("mixture-of-size", "Q4_K_M"))
    assert 0.97 * focus.size_bytes < mixture.size_bytes <= focus.size_bytes
    said = printed(notebook)
    assert "Kendall's tau between two texts" in said and "Expected were" in said
    assert "cheapest" in said and "The mixture " in said and " with the matrix " in said


@pytest.mark.slow
def test_noise_and_caches_are_exported_as_measured(run):
    _, out = run
    quality, noise, cache = (
        pd.read_parquet(out / f"{name}.parquet") for name in ("quality", "noise", "cache")
    )
    assert set(noise.index) >= {"attention not fused", "batches of 64 tokens"}
    assert 0 <= noise["kld_mean"].max() < quality["kld_mean"].min()
    full, small = cache[cache["cache_k"] == "f16"], cache[cache["cache_k"] != "f16"]
    assert (full["kld_mean"] == quality.loc[full.index, "kld_mean"]).all()
    assert set(small["cache_v"]) == {"q8_0", "q4_0"} and len(small) == 4
    for name, row in small.iterrows():
        whole = full.loc[row["weights"]]
        assert row["memory_bytes"] < whole["memory_bytes"] and pd.isna(row["error"]), name
        assert row["cache_bytes"] == pytest.approx(8192 * row["token_bytes"])
    worst = small[small["cache_k"] == "q4_0"]["kld_mean"].to_numpy()
    assert (worst > small[small["cache_k"] == "q8_0"]["kld_mean"].to_numpy()).all()


def test_questions_are_asked_in_their_order():
    headings = [
        line
        for cell in nbformat.read(NOTEBOOK, 4).cells
        if cell.cell_type == "markdown"
        for line in cell.source.splitlines()
        if line.startswith("## ")
    ]
    asked = ["The files", "How far apart", "Where?", "the cache cost?", "Does it show?"]
    asked += ["for my memory?", "Can a mixture do better?"]
    places = [next(n for n, line in enumerate(headings) if part in line) for part in asked]
    assert places == sorted(places) == list(range(places[0], places[0] + len(asked)))
    numbers = [line.split(". ")[0].removeprefix("## ") for line in headings if ". " in line]
    assert numbers == [str(n + 1) for n in range(len(numbers))]


@pytest.mark.slow
def test_it_says_that_the_reference_is_a_stand_in(run):
    notebook, _ = run
    said = printed(notebook)
    assert "not the original" in said and "166 matrices meant for Q4_K became Q5_0" in said.replace(
        "\n", " "
    )
    assert "The same numbers with 1 worker" in said


@pytest.mark.slow
def test_every_figure_has_a_sentence(run):
    assert figures_with_sentences(run[0]) >= 10


@pytest.mark.slow
def test_of_published_features_less_survives_in_the_smaller_file(run):
    notebook, out = run
    table = pd.read_parquet(out / "features.parquet").set_index("feature")
    medians = table[["Q8_0", "Q4_K_M", CONTROL]].fillna(0).median()
    assert medians["Q4_K_M"] < medians["Q8_0"] < medians[CONTROL] + 1e-3 <= 1.001
