"""Long prompts: which maps are captured whole, and what heads do where only some rows are."""

import numpy as np
import pandas as pd
import xarray as xr

from ..files.gguf import GGUFFile
from .patterns import SINK_THRESHOLD

MAPS_BYTES = 5e8  # of attention and scores together, all layers and heads
AGAIN = 16  # queries whose maps are looked at a second time: recomputed, captured while writing


def captured_queries(model: GGUFFile, n_token: int, max_bytes: float = MAPS_BYTES) -> list | None:
    """Query positions whose maps are captured for every layer and head: None, all of them, while
    attention and scores take at most max_bytes; else the last ones, as many as do."""
    row = 2 * 4 * model.n_layer * model.n_head * n_token  # bytes of one query
    count = max(2, int(max_bytes // row))
    return None if count >= n_token else list(range(n_token - count, n_token))


def said(model: GGUFFile, n_token: int, queries: list | None) -> str:
    """What is captured, in a sentence."""
    whole = 4 * model.n_layer * model.n_head * n_token**2 / 1e9
    if queries is None:
        return f"Attention of every query is captured whole ({whole:.2g} GB)."
    few = len(repeated(queries))
    return (
        f"Attention of all {n_token:,} queries would take {whole:.1f} GB: the maps of all heads are "
        f"captured for the last {len(queries)} queries, q·k and the maps while writing for the last "
        f"{few}, the mean over heads for every query, and the statistics of heads are summed over "
        "every query while the model runs."
    )


def repeated(queries: list) -> list:
    """The last AGAIN of chosen queries."""
    return queries[-AGAIN:]


def head_table(statistics: xr.Dataset) -> pd.DataFrame:
    """patterns.head_table out of engine.head_statistics, whose means are over all queries: those
    that see one key have entropy and distance 0, and give the first token all they give."""
    n = statistics.attrs["n_tokens"]
    many, first = n / max(1, n - 1), statistics["sink"]
    table = xr.Dataset(
        {
            "entropy": statistics["entropy"] * many,
            "entropy_normalised": statistics["normalized_entropy"] * many,
            "distance": statistics["distance"] * many,
            "sink_mass": (first * n - 1) / max(1, n - 1),
            "key0_importance": first,
            "sink": first > SINK_THRESHOLD,
        }
    )
    frame = table.assign_coords(head=np.arange(table.sizes["head"])).to_dataframe()
    return frame[list(table.data_vars)].dropna().reset_index()
