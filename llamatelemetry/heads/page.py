"""The dashboard of notebook 15: every head on one self-contained page, linked to its matrix,
profile and neighbours."""

import json
from collections.abc import Sequence

import numpy as np
import pandas as pd
import xarray as xr

from ..views import theme
from ..views.packing import ends, pack, said_ends
from ..views.page import Page

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
    max_bytes: float = 4.8e6,
) -> Page:
    """Map of all heads (layer across, head down) coloured by a chosen measure; click for a head's
    matrix, its profile with intervals and baselines, and its nearest heads.

    profiled: (measure, layer, head) with value, low, high, baseline_high; table: a row per head
    that is there, with layer, head, labels and, where there is one, cluster; attention: (layer,
    head, query, key) of one text, pieces: its tokens; distance: (head, head) as the table's rows;
    losses: table of layer, head, loss_change; head: (layer, head) that is shown first. Weights are
    on the page as float32 where max_bytes has room for that, else in steps of 1/65535 or 1/255, at
    worst of fewer tokens, the first and the last, and it says which."""
    grid = pd.MultiIndex.from_product([profiled["layer"].values, profiled["head"].values])
    layers, n_head = profiled["layer"].values.tolist(), profiled.sizes["head"]
    rows = table.set_index(["layer", "head"])
    number = grid.get_indexer(rows.index)  # of each row's head, layer by layer
    near, near_distance = _nearest(distance, number, len(grid))
    clusters = rows["cluster"].reindex(grid, fill_value=-1).tolist() if "cluster" in rows else None
    data = {
        "layers": layers,
        "n_head": n_head,
        "measures": _measures(profiled, losses, grid),
        "first": int(grid.get_loc(head or grid[0])),
        "labels": rows["labels"].reindex(grid, fill_value="").tolist(),
        "clusters": clusters,
        "near": pack(near),
        "near_distance": pack(near_distance),
    }
    room = max_bytes - len(json.dumps(data)) - 40 * len(pieces)
    shown, data["weights"], data["unit"], precision = _weights(np.asarray(attention), room)
    data["tokens"] = [theme.token_text(pieces[position]) for position in shown]
    data["positions"] = shown.tolist()
    about = (
        "Map: layer across, head down; click, or arrow keys. Scores: means over the set of texts, "
        "bars 95% intervals, the mark the highest shuffled score. Matrices: query down, key across, "
        f"one text of {len(pieces):,} tokens{said_ends(len(pieces), shown)}, each with its own scale, "
        f"{precision}."
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


def _weights(values, room):
    """(positions of the tokens that are shown, lower triangles of (layer, head, query, key) packed
    into `room` bytes, the unit of a step, how to say so)."""
    n_head, n_token = values.shape[0] * values.shape[1], values.shape[-1]
    bits = next((bits for bits in (32, 16, 8) if _size(n_head, n_token, bits) <= room), 8)
    count = n_token
    while count > 2 and _size(n_head, count, bits) > room:
        count -= 1
    shown = ends(n_token, count)
    rows, columns = np.tril_indices(len(shown))
    lower = values[..., shown[rows], shown[columns]].reshape(-1, len(rows)).astype(np.float32)
    if bits == 32:
        return shown, pack(lower), 1.0, "weights exact to float32"
    steps, kind = (65535, np.uint16) if bits == 16 else (255, np.uint8)
    packed = pack(np.rint(lower * steps).astype(kind))
    return shown, packed, 1 / steps, f"weights in steps of 1/{steps}"


def _size(n_head, n_token, bits):
    """Bytes of lower triangles in base64."""
    return n_head * n_token * (n_token + 1) / 2 * bits / 6
