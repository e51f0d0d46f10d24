"""The dashboard of notebook 15: every head on one self-contained page, linked to its matrix,
profile and neighbours."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import xarray as xr

from ..views import theme
from ..views.packing import pack
from ..views.page import Page

EXACT, FINE = 4_000_000, 2_500_000  # bytes of float32 weights, of 16-bit weights; beyond: 8 bits
COLUMNS = ("value", "low", "high", "baseline_high")
MISSING = -99  # what page.js takes for no value


def dashboard(
    profiled: xr.Dataset,
    table: pd.DataFrame,
    attention: xr.DataArray,
    pieces: Sequence[str | bytes],
    distance: np.ndarray,
    *,
    model: str,
    losses: pd.DataFrame | None = None,
    head: tuple[int, int] | None = None,
) -> Page:
    """Map of all heads (layer across, head down) coloured by a chosen measure; click for a head's
    matrix, its profile with intervals and baselines, and its nearest heads.

    profiled: (measure, layer, head) with value, low, high, baseline_high; table: a row per head
    that is there, with layer, head, labels and, where there is one, cluster; attention: (layer,
    head, query, key) of one text, pieces: its tokens; distance: (head, head) as the table's rows;
    losses: table of layer, head, loss_change; head: (layer, head) that is shown first. Weights are
    on the page as float32 where that is at most 4 MB, else in steps of 1/65535 or 1/255, and it
    says which."""
    grid = pd.MultiIndex.from_product([profiled["layer"].values, profiled["head"].values])
    layers, n_head = profiled["layer"].values.tolist(), profiled.sizes["head"]
    rows = table.set_index(["layer", "head"])
    number = grid.get_indexer(rows.index)  # of each row's head, layer by layer
    near, near_distance = _nearest(distance, number, len(grid))
    weights, unit, precision = _weights(np.asarray(attention, np.float32))
    clusters = rows["cluster"].reindex(grid, fill_value=-1).tolist() if "cluster" in rows else None
    data = {
        "tokens": [theme.token_text(piece) for piece in pieces],
        "layers": layers,
        "n_head": n_head,
        "measures": _measures(profiled, losses, grid),
        "weights": weights,
        "unit": unit,
        "first": int(grid.get_loc(head or grid[0])),
        "labels": rows["labels"].reindex(grid, fill_value="").tolist(),
        "clusters": clusters,
        "near": pack(near),
        "near_distance": pack(near_distance),
    }
    about = (
        "Map: layer across, head down; click, or arrow keys. Scores: means over the set of texts, "
        "bars 95 % intervals, the mark the highest shuffled score. Matrices: query down, key across, "
        f"one text of {len(pieces)} tokens, each with its own scale, {precision}."
    )
    title = f"The heads of {model}: {len(grid)}"
    return Page.of(__package__, "page", data, title=title, about=about, height=1120)


def _measures(profiled, losses, grid):
    found = []
    for name in profiled["measure"].values:
        part = profiled.sel(measure=name)
        packed = {key: _packed(part[key].values) for key in COLUMNS}
        found.append({"name": str(name), "signed": name == "semantic", **packed})
    if losses is not None:
        change = losses.set_index(["layer", "head"])["loss_change"].reindex(grid)
        packed = _packed(change.to_numpy().reshape(profiled["value"].shape[1:]))
        found.append({"name": "loss change", "signed": True, "value": packed})
    return found


def _packed(values):
    return pack(np.nan_to_num(values.astype(np.float32), nan=MISSING))


def _nearest(distance, number, n_head):
    """The six nearest other heads of each, as numbers on the map, and their distances: two (head,
    <= 6)."""
    others = np.where(np.eye(len(distance), dtype=bool), np.inf, distance)
    order = np.argsort(others, axis=1, kind="stable")[:, : min(6, len(distance) - 1)]
    near = np.zeros((n_head, order.shape[1]), np.int32)
    near_distance = np.full(near.shape, MISSING, np.float32)
    near[number], near_distance[number] = number[order], np.take_along_axis(distance, order, 1)
    return near, near_distance


def _weights(values):
    """Lower triangles of (layer, head, query, key) packed, the unit of a step, and how to say
    so."""
    rows, columns = np.tril_indices(values.shape[-1])
    lower = values[..., rows, columns].reshape(-1, len(rows))
    if lower.nbytes <= EXACT:
        return pack(lower), 1.0, "weights exact to float32"
    steps, kind = (65535, np.uint16) if lower.size * 2 <= FINE else (255, np.uint8)
    packed = pack(np.rint(lower * steps).astype(kind))
    return packed, 1 / steps, f"weights in steps of 1/{steps}"
