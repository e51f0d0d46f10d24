"""What a file holds by its header, as notebooks show it first: hand-built tables with known
answers, and the notebooks' own order of cells."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from llamatelemetry.views import stored

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("1[2456]-*.ipynb"))


def tensors(*rows):
    """GGUFFile.tensors of (type, shape, bits per weight, layer or None, group)."""
    columns = ["type", "shape", "bits_per_weight", "layer", "group"]
    table = pd.DataFrame(rows, columns=columns).astype({"layer": "Int64"})
    table["n_elements"] = table["shape"].map(np.prod)
    table["size_bytes"] = (table["n_elements"] * table["bits_per_weight"] / 8).astype(int)
    return table


TABLE = tensors(
    ("Q8_0", (1000, 32), 8.5, None, "embedding"),
    ("Q6_K", (256, 256), 6.5, 0, "attn_v"),
    ("Q4_K", (256, 256), 4.5, 1, "attn_v"),
    ("Q4_K", (256, 256), 4.5, 0, "experts"),
    ("Q8_0", (256, 256), 8.5, 0, "experts"),  # two of a kind in one layer
    ("Q4_K", (512, 256), 4.5, 1, "experts"),
    ("F32", (256,), 32, 0, "norm"),
    ("F32", (256,), 32, None, "norm"),
)


def test_bits_by_group_and_layer():
    found = stored.bits(TABLE)
    assert list(found.index) == ["embedding", "attn_v", "experts"]  # norms are no matrices
    assert list(found.columns) == [0, 1]
    assert found.loc["embedding"].isna().all()
    assert found.loc["attn_v"].tolist() == [6.5, 4.5]
    assert found.loc["experts"].tolist() == [6.5, 4.5]  # (4.5 + 8.5) / 2 of two of one size


def test_the_figure_has_every_byte_of_the_matrices():
    figure = stored.figure(TABLE, title="A file")
    grid, *bars = figure.data
    assert grid.text.tolist() == [["", ""], ["Q6_K", "Q4_K"], ["Q4_K, Q8_0", "Q4_K"]]
    drawn = {bar.name: dict(zip(bar.y, bar.x)) for bar in bars}
    assert set(drawn) == {"Q8_0", "Q6_K", "Q4_K"}
    assert drawn["Q4_K"]["attn_v"] == 256 * 256 * 4.5 / 8 / 1e6
    total = sum(np.nansum(bar.x) for bar in bars)
    held = TABLE[TABLE["group"] != "norm"]["size_bytes"].sum()
    assert total == pytest.approx(held / 1e6)


def test_what_is_said_of_it():
    said = " ".join(stored.said(TABLE).split())
    weights = 1000 * 32 + 6 * 256 * 256
    assert said.startswith(f"6 matrices of {weights / 1e6:,.1f} million weights take 0.3 MB")
    assert "attn_v and experts have more bits in some layers than in others" in said
    alike = stored.said(TABLE[TABLE["layer"].eq(1) | TABLE["group"].eq("embedding")])
    assert "every layer is stored alike" in " ".join(alike.split())


@pytest.mark.parametrize(
    "table, bars",
    [
        (TABLE.iloc[:1], 1),  # nothing in layers
        (TABLE.iloc[1:2], 1),  # one matrix
        (TABLE.iloc[-2:], 0),  # norms alone
        (TABLE.iloc[:0], 0),
    ],
    ids=["outside layers", "one", "norms", "none"],
)
def test_odd_files_are_drawn_too(table, bars):
    figure = stored.figure(table, title="A file")
    assert len([trace for trace in figure.data if trace.type == "bar"]) == bars
    assert ("no matrix" in stored.said(table)) == (bars == 0)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem[:2])
def test_notebooks_show_the_file_before_anything_is_loaded_or_made(path):
    """The first figure needs the header alone: of 8B the load takes seconds, the ladder minutes."""
    cells = json.loads(path.read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    first = next(at for at, source in enumerate(sources) if ".show()" in source)
    assert "stored.figure(" in sources[first]
    slow = ("load_model(", "check_texts(", "reference_for(", "get_backend(")
    assert not [name for source in sources[: first + 1] for name in slow if name in source]
