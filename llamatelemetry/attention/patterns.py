"""What attention weights say, and the arithmetic from query and key to a head's output.

Functions take xarray.DataArrays whose last two dims are (query, key), with any of (layer, head)
before them, as `engine.capture` returns them, and keep every other dim. Token positions are counted
from 0."""

import numpy as np
import pandas as pd
import xarray as xr

from ..capture.finite import measured
from ..maths import softmax

SINK_THRESHOLD = (
    0.3  # Gu et al. (2024), "When Attention Sink Emerges in Language Models", their epsilon
)


def kv_head(head, n_head, n_kv_head):
    """The key/value head that a query head reads: consecutive groups (grouped-query attention,
    Ainslie et al. 2023)."""
    return head // (n_head // n_kv_head)


def head_groups(n_head, n_kv_head):
    """Which query heads each key/value head serves: DataFrame with columns kv_head, heads (text),
    n_heads."""
    groups = [
        [h for h in range(n_head) if kv_head(h, n_head, n_kv_head) == g] for g in range(n_kv_head)
    ]
    return pd.DataFrame(
        {
            "kv_head": range(n_kv_head),
            "heads": [", ".join(map(str, g)) for g in groups],
            "n_heads": map(len, groups),
        }
    )


def query_positions(attention):
    """Position of each query: the coordinate query_position where there is one, else the last
    n_query. int (query,)"""
    if "query_position" in attention.coords:
        return attention["query_position"].values
    n_query, n_key = attention.sizes["query"], attention.sizes["key"]
    return np.arange(n_key - n_query, n_key)


def allowed_keys(queries, n_key, window=None):
    """Causal mask, bool (query, key): key <= query, and with a sliding window query - key <
    window."""
    distance = np.asarray(queries)[:, None] - np.arange(n_key)[None, :]  # (query, key)
    return (distance >= 0) if not window else (distance >= 0) & (distance < window)


def softcapped(scores, softcap):
    """softcap * tanh(scores / softcap), which llama.cpp applies before the scale (Gemma 2); no
    softcap: unchanged."""
    return scores if not softcap else softcap * np.tanh(scores / softcap)


def attend(q, k, v, *, scale, softcap=None, window=None):
    """Scaled dot-product attention step by step (Vaswani et al. 2017), for one layer.

    q: (head, token, feature), k and v: (kv_head, token, feature), after RoPE. Returns a Dataset,
    float64: scores, scaled, masked, attention: (head, query, key); head_output: (head, token,
    feature)."""
    queries, keys, values = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
    n_head, n_token, _ = queries.shape
    group = [kv_head(h, n_head, len(keys)) for h in range(n_head)]
    scores = np.einsum("hqd,hkd->hqk", queries, keys[group])
    scaled = softcapped(scores, softcap) * scale
    masked = np.where(allowed_keys(np.arange(n_token), n_token, window), scaled, -np.inf)
    weights = softmax(masked)
    maps = ("head", "query", "key")
    return xr.Dataset(
        {
            "scores": (maps, scores),
            "scaled": (maps, scaled),
            "masked": (maps, masked),
            "attention": (maps, weights),
            "head_output": (
                ("head", "token", "feature"),
                np.einsum("hqk,hkd->hqd", weights, values[group]),
            ),
        }
    )


def per_head(attention, values, drop=("key",)):
    """Wrap values as a DataArray with attention's dims and coordinates, less those in drop."""
    dims = [d for d in attention.dims if d not in drop]
    coords = {name: c for name, c in attention.coords.items() if set(c.dims) <= set(dims)}
    return xr.DataArray(values, dims=dims, coords=coords)


def entropy(attention, normalised=False):
    """Shannon entropy of each query's weights, nats; normalised: divided by log(keys it may see), 0
    to 1.

    Returns attention's dims without key. A query that sees one key has entropy 0, and nan when
    normalised."""
    a = measured(attention, np.float64)
    nats = -np.sum(np.where(a > 0, a * np.log(np.where(a > 0, a, 1)), 0), axis=-1)
    if normalised:
        keys = np.minimum(query_positions(attention) + 1, attention.sizes["key"]).astype(float)
        many = np.broadcast_to(keys > 1, nats.shape)
        nats = np.divide(nats, np.log(keys), out=np.full_like(nats, np.nan), where=many)
    return per_head(attention, nats)


def mean_distance(attention):
    """Mean distance looked back, sum over keys of weight * (query - key), in tokens. attention's
    dims without key."""
    distance = query_positions(attention)[:, None] - np.arange(attention.sizes["key"])[None, :]
    return per_head(
        attention, np.sum(measured(attention, np.float64) * np.maximum(distance, 0), axis=-1)
    )


def sink_mass(attention, n_sink=1):
    """Weight that goes to the first n_sink tokens, mean over the queries after them (Xiao et al.
    2023). Dims without query and key; nan when no query comes after them."""
    later = query_positions(attention) >= n_sink
    a = measured(attention, np.float64)[..., later, :n_sink].sum(-1)
    mass = a.mean(-1) if later.any() else np.full(a.shape[:-1], np.nan)
    return per_head(attention, mass, drop=("query", "key"))


def key_importance(attention):
    """Mean weight that each key receives from the queries that may see it, itself included (Gu et
    al. 2024, their alpha_k). Dims without query."""
    seen = allowed_keys(query_positions(attention), attention.sizes["key"])  # (query, key)
    received = np.sum(measured(attention, np.float64) * seen, axis=-2)
    mean = np.divide(
        received, seen.sum(0), out=np.full_like(received, np.nan), where=seen.sum(0) > 0
    )
    return per_head(attention, mean, drop=("query",))


def is_sink_head(attention, threshold=SINK_THRESHOLD):
    """Whether a head's first token receives more than threshold (Gu et al. 2024). bool, dims
    without query and key; its mean over layers and heads is their sink rate."""
    return key_importance(attention).isel(key=0, drop=True) > threshold


def head_table(attention):
    """One row per layer and head: entropy (nats), entropy_normalised, distance (tokens), each the
    mean over queries that see two keys or more; sink_mass, key0_importance, sink (bool)."""
    many = np.flatnonzero(query_positions(attention) >= 1)
    table = xr.Dataset(
        {
            "entropy": entropy(attention).isel(query=many).mean("query"),
            "entropy_normalised": entropy(attention, normalised=True)
            .isel(query=many)
            .mean("query"),
            "distance": mean_distance(attention).isel(query=many).mean("query"),
            "sink_mass": sink_mass(attention),
            "key0_importance": key_importance(attention).isel(key=0, drop=True),
            "sink": is_sink_head(attention),
        }
    )
    return table.to_dataframe()[list(table.data_vars)].reset_index()


def generated_split(attention, n_prompt):
    """Attention of each generated token, mean over layers and heads, by target: DataFrame indexed
    by position with columns first token, rest of prompt, generated (before it), itself; rows sum to
    1. n_prompt: the prompt's tokens."""
    positions = query_positions(attention)
    mean = measured(attention, np.float64).mean(tuple(range(attention.ndim - 2)))  # (query, key)
    rows = {}
    for row, position in zip(mean, positions):
        if position >= n_prompt:
            rows[position] = (
                row[0],
                row[1:n_prompt].sum(),
                row[n_prompt:position].sum(),
                row[position],
            )
    names = ["first token", "rest of prompt", "generated", "itself"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=names).rename_axis("position")
