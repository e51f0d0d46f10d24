"""Two captures of one text: how far apart their attention is, head by head."""

import numpy as np
import pandas as pd
import xarray as xr

from ..capture.finite import measured
from ..maths import jensen_shannon, ratio
from .patterns import per_head, query_positions


def js_distance(a: xr.DataArray, b: xr.DataArray) -> xr.DataArray:
    """Jensen-Shannon distance between the weights of two captures: square root of the divergence in
    bits, 0 to 1 (Endres and Schindelin 2003).

    a, b: (..., query, key); returns their dims without key. ValueError for different shapes."""
    p, q = measured(a), measured(b.transpose(*a.dims))
    if p.shape != q.shape:
        raise ValueError(
            f"two captures of different shape: {p.shape} and {q.shape}; capture the same text twice"
        )
    if p.ndim < 3:
        return per_head(a, np.sqrt(jensen_shannon(p, q)))
    # Part by part: in double precision all maps of a long text are gigabytes.
    return per_head(a, np.sqrt(np.stack([jensen_shannon(*pair) for pair in zip(p, q)])))


def compare_heads(a: xr.DataArray, b: xr.DataArray) -> pd.DataFrame:
    """One row per layer and head: js_distance (mean over queries), max_difference (of single
    weights), top_moved (the fraction of queries whose most attended key changed), top_shift (mean
    positions that such keys moved, nan if none).

    Queries that see a single key are left out: they cannot differ. Sorted by js_distance, largest
    first. ValueError where no other query is there, or the shapes differ."""
    queries = np.flatnonzero(query_positions(a) >= 1)
    if not len(queries):
        raise ValueError("a prompt of one token has nothing to compare: its only weight is 1")
    a, b = (x.isel(query=slice(queries[0], None)) for x in (a, b))  # no copies
    distance = js_distance(a, b).mean("query")
    first, second = np.asarray(a), np.asarray(b.transpose(*a.dims))
    shift = np.abs(first.argmax(-1) - second.argmax(-1))  # (layer, head, query)
    largest = np.stack([np.abs(x - y).max((-2, -1)) for x, y in zip(first, second)])
    moved = shift > 0
    measures = {
        "js_distance": distance,
        "max_difference": (distance.dims, largest),
        "top_moved": (distance.dims, moved.mean(-1)),
        "top_shift": (distance.dims, ratio(shift.sum(-1), moved.sum(-1))),
    }
    table = xr.Dataset(measures).to_dataframe()[list(measures)].reset_index()
    return table.sort_values("js_distance", ascending=False, ignore_index=True)


def moved_targets(
    a: xr.DataArray, b: xr.DataArray, pieces: list, heads: pd.DataFrame
) -> pd.DataFrame:
    """The queries of some heads whose most attended key changed. a, b: (layer, head, query, key);
    heads: rows with layer and head.

    DataFrame: query, piece, from_key, from_piece, to_key, to_piece, weight_before and weight_after
    of the new key, layer, head."""
    tables = []
    for layer, head in heads[["layer", "head"]].to_numpy():
        first, second = (measured(x.sel(layer=layer, head=head)) for x in (a, b))
        before, after = first.argmax(-1), second.argmax(-1)
        rows = np.flatnonzero(before != after)
        query, old, new = query_positions(a)[rows], before[rows], after[rows]
        columns = {
            "query": query,
            "piece": [pieces[i] for i in query],
            "from_key": old,
            "from_piece": [pieces[i] for i in old],
            "to_key": new,
            "to_piece": [pieces[i] for i in new],
            "weight_before": first[rows, new],
            "weight_after": second[rows, new],
        }
        tables.append(pd.DataFrame(columns).assign(layer=layer, head=head))
    return pd.concat(tables, ignore_index=True)


def head_maps(
    a: xr.DataArray, b: xr.DataArray, layer: int, head: int, name: str
) -> dict[str, xr.DataArray]:
    """One head as llama.cpp runs it (a), in another file (b, under its name), and their difference:
    {panel title: (query, key)}. a, b: (layer, head, query, key)."""
    ours, theirs = (x.sel(layer=layer, head=head) for x in (a, b))
    return {"as llama.cpp runs it": ours, name: theirs, "difference": abs(ours - theirs.values)}
