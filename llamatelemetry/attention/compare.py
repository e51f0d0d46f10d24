"""Two captures of one text: how far apart their attention is, head by head."""

import numpy as np
import pandas as pd
import xarray as xr

from ..capture.finite import measured
from ..maths import jensen_shannon
from .patterns import per_head, query_positions


def js_distance(a, b):
    """Jensen-Shannon distance between the weights of two captures: square root of the divergence in
    bits, 0 to 1 (Endres and Schindelin 2003). a, b: (..., query, key); returns their dims without
    key."""
    p, q = measured(a, np.float64), measured(b.transpose(*a.dims), np.float64)
    if p.shape != q.shape:
        raise ValueError(
            f"two captures of different shape: {p.shape} and {q.shape}; capture the same text twice"
        )
    return per_head(a, np.sqrt(jensen_shannon(p, q)))


def compare_heads(a, b):
    """One row per layer and head: js_distance (mean over queries), max_difference (of single
    weights), top_moved (the fraction of queries whose most attended key changed), top_shift (mean
    positions that such keys moved, nan if none).

    Queries that see a single key are left out: they cannot differ. Sorted by js_distance, largest
    first."""
    queries = np.flatnonzero(query_positions(a) >= 1)
    if not len(queries):
        raise ValueError("a prompt of one token has nothing to compare: its only weight is 1")
    a, b = a.isel(query=queries), b.isel(query=queries)
    distance = js_distance(a, b).mean("query")
    first, second = np.asarray(a), np.asarray(b.transpose(*a.dims))
    shift = np.abs(first.argmax(-1) - second.argmax(-1))  # (layer, head, query)
    moved = (shift > 0).sum(-1)
    table = xr.Dataset(
        {
            "js_distance": distance,
            "max_difference": (distance.dims, np.abs(first - second).max((-2, -1))),
            "top_moved": (distance.dims, (shift > 0).mean(-1)),
            "top_shift": (
                distance.dims,
                np.where(moved > 0, shift.sum(-1) / np.maximum(moved, 1), np.nan),
            ),
        }
    )
    table = table.to_dataframe()[list(table.data_vars)].reset_index()
    return table.sort_values("js_distance", ascending=False, ignore_index=True)


def moved_targets(a, b, pieces):
    """The queries of one head whose most attended key changed. a, b: (query, key).

    DataFrame: query, piece, from_key, from_piece, to_key, to_piece, weight_before and weight_after
    of the new key."""
    first, second = measured(a), measured(b)
    before, after = first.argmax(-1), second.argmax(-1)
    rows = np.flatnonzero(before != after)
    positions = query_positions(a)[rows]
    return pd.DataFrame(
        {
            "query": positions,
            "piece": [pieces[i] for i in positions],
            "from_key": before[rows],
            "from_piece": [pieces[i] for i in before[rows]],
            "to_key": after[rows],
            "to_piece": [pieces[i] for i in after[rows]],
            "weight_before": first[rows, after[rows]],
            "weight_after": second[rows, after[rows]],
        }
    )
