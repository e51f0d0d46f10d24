"""What attention weights say, and the arithmetic from query and key to a head's output.

Functions take xarray.DataArrays whose last two dims are (query, key), with any of (layer, head)
before them, as `engine.capture` returns them, and keep every other dim. Token positions are counted
from 0."""

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import ArrayLike

from .. import maths
from ..capture.finite import measured
from ..maths import ratio, softmax

# Gu et al. (2024), "When Attention Sink Emerges in Language Models", their epsilon
SINK_THRESHOLD = 0.3


def kv_head(head: int, n_head: int, n_kv_head: int) -> int:
    """The key/value head that a query head reads: consecutive groups (grouped-query attention,
    Ainslie et al. 2023)."""
    return head // (n_head // n_kv_head)


def head_groups(n_head: int, n_kv_head: int) -> pd.DataFrame:
    """Which query heads each key/value head serves: DataFrame with columns kv_head, heads (text),
    n_heads."""
    heads = pd.Series(map(str, range(n_head)), name="heads")
    groups = heads.groupby([kv_head(h, n_head, n_kv_head) for h in range(n_head)])
    table = groups.agg(heads=", ".join, n_heads="size")
    return table.rename_axis("kv_head").reset_index()


def query_positions(attention: xr.DataArray) -> np.ndarray:
    """Position of each query: the coordinate query_position where there is one, else the last
    n_query. int (query,)"""
    if "query_position" in attention.coords:
        return attention["query_position"].values
    n_query, n_key = attention.sizes["query"], attention.sizes["key"]
    return np.arange(n_key - n_query, n_key)


def allowed_keys(queries: ArrayLike, n_key: int, window: int | None = None) -> np.ndarray:
    """Causal mask, bool (query, key): key <= query, and with a sliding window query - key <
    window."""
    distance = np.asarray(queries)[:, None] - np.arange(n_key)[None, :]  # (query, key)
    return (distance >= 0) if not window else (distance >= 0) & (distance < window)


def softcapped(scores: np.ndarray, softcap: float | None) -> np.ndarray:
    """softcap * tanh(scores / softcap), which llama.cpp applies before the scale (Gemma 2); no
    softcap: unchanged."""
    return scores if not softcap else softcap * np.tanh(scores / softcap)


def attend(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    queries: ArrayLike | None = None,
) -> xr.Dataset:
    """Scaled dot-product attention step by step (Vaswani et al. 2017), for one layer.

    q: (head, token, feature), k and v: (kv_head, token, feature), after RoPE; queries: only these
    positions, None for all. Returns a Dataset, float64: scores, scaled, masked, attention: (head,
    query, key); head_output: (head, token, feature) of these queries."""
    rows, keys, values = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
    n_head, n_token, _ = rows.shape
    positions = np.arange(n_token) if queries is None else np.asarray(queries)
    rows = rows[:, positions]
    group = [kv_head(h, n_head, len(keys)) for h in range(n_head)]
    scores = rows @ keys[group].transpose(0, 2, 1)
    scaled = softcapped(scores, softcap) * scale
    masked = np.where(allowed_keys(positions, n_token, window), scaled, -np.inf)
    weights = softmax(masked)
    output = weights @ values[group]
    maps = {"scores": scores, "scaled": scaled, "masked": masked, "attention": weights}
    data = {name: (("head", "query", "key"), values) for name, values in maps.items()}
    return xr.Dataset(data | {"head_output": (("head", "token", "feature"), output)})


def per_head(
    attention: xr.DataArray, values: np.ndarray, drop: tuple[str, ...] = ("key",)
) -> xr.DataArray:
    """Wrap values as a DataArray with attention's dims and coordinates, less those in drop."""
    dims = [d for d in attention.dims if d not in drop]
    coords = {name: c for name, c in attention.coords.items() if set(c.dims) <= set(dims)}
    return xr.DataArray(values, dims=dims, coords=coords)


def entropy(attention: xr.DataArray, normalised: bool = False) -> xr.DataArray:
    """Shannon entropy of each query's weights, nats; normalised: divided by log(keys it may see), 0
    to 1.

    Returns attention's dims without key. A query that sees one key has entropy 0, and nan when
    normalised."""
    nats = maths.entropy(measured(attention, np.float64))
    if normalised:
        keys = np.minimum(query_positions(attention) + 1, attention.sizes["key"])
        nats = ratio(nats, np.log(keys))
    return per_head(attention, nats)


def mean_distance(attention: xr.DataArray) -> xr.DataArray:
    """Mean distance looked back, sum over keys of weight * (query - key), in tokens. attention's
    dims without key."""
    distance = query_positions(attention)[:, None] - np.arange(attention.sizes["key"])[None, :]
    back = measured(attention, np.float64) * np.maximum(distance, 0)
    return per_head(attention, back.sum(axis=-1))


def sink_mass(attention: xr.DataArray, n_sink: int = 1) -> xr.DataArray:
    """Weight that goes to the first n_sink tokens, mean over the queries after them (Xiao et al.
    2023). Dims without query and key; nan when no query comes after them."""
    later = query_positions(attention) >= n_sink
    a = measured(attention, np.float64)[..., later, :n_sink].sum(-1)
    mass = a.mean(-1) if later.any() else np.full(a.shape[:-1], np.nan)
    return per_head(attention, mass, drop=("query", "key"))


def key_importance(attention: xr.DataArray) -> xr.DataArray:
    """Mean weight that each key receives from the queries that may see it, itself included (Gu et
    al. 2024, their alpha_k). Dims without query."""
    seen = allowed_keys(query_positions(attention), attention.sizes["key"])  # (query, key)
    received = np.sum(measured(attention, np.float64) * seen, axis=-2)
    return per_head(attention, ratio(received, seen.sum(0)), drop=("query",))


def is_sink_head(attention: xr.DataArray, threshold: float = SINK_THRESHOLD) -> xr.DataArray:
    """Whether a head's first token receives more than threshold (Gu et al. 2024). bool, dims
    without query and key; its mean over layers and heads is their sink rate."""
    return key_importance(attention).isel(key=0, drop=True) > threshold


def head_table(attention: xr.DataArray) -> pd.DataFrame:
    """One row per layer and head: entropy (nats), entropy_normalised, distance (tokens), each the
    mean over queries that see two keys or more; sink_mass, key0_importance, sink (bool)."""
    many = np.flatnonzero(query_positions(attention) >= 1)
    by_query = {
        "entropy": entropy(attention),
        "entropy_normalised": entropy(attention, normalised=True),
        "distance": mean_distance(attention),
    }
    means = {name: values.isel(query=many).mean("query") for name, values in by_query.items()}
    by_head = {
        "sink_mass": sink_mass(attention),
        "key0_importance": key_importance(attention).isel(key=0, drop=True),
        "sink": is_sink_head(attention),
    }
    table = xr.Dataset(means | by_head)
    return table.to_dataframe()[list(table.data_vars)].reset_index()


def generated_split(attention: xr.DataArray, n_prompt: int) -> pd.DataFrame:
    """Attention of each generated token, mean over layers and heads, by target: DataFrame indexed
    by position with columns first token, rest of prompt, generated (before it), itself; rows sum to
    1. n_prompt: the prompt's tokens."""
    positions = query_positions(attention)
    new = np.flatnonzero(positions >= n_prompt)
    rows = measured(attention)[..., new, :]
    mean = rows.mean(tuple(range(rows.ndim - 2)), dtype=np.float64)  # (query, key)
    table = {
        position: {
            "first token": row[0],
            "rest of prompt": row[1:n_prompt].sum(),
            "generated": row[n_prompt:position].sum(),
            "itself": row[position],
        }
        for row, position in zip(mean, positions[new])
    }
    return pd.DataFrame.from_dict(table, orient="index").rename_axis("position")
