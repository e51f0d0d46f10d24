"""Attention through all layers: rollout and flow (Abnar and Zuidema 2020), and token graphs of
single heads."""

import numpy as np
import pandas as pd
import xarray as xr

from ..backend.base import CpuBackend
from ..capture.finite import measured
from ..imports import uninterrupted
from .patterns import query_positions

FLOW_SECONDS = 30.0  # beyond, tokens are grouped
STRONGEST = 64  # edges per query of the graph of token positions
_LARGE = 1 << 20  # weights of one product; larger ones are kept in 32 bits


def with_residual(attention: xr.DataArray) -> np.ndarray:
    """Mean over heads, half of it replaced by the identity for the residual connection: rows still
    sum to 1.

    attention: (layer, head, query, key), or (layer, query, key) averaged already, with as many
    queries as keys; returns (layer, query, key) float64."""
    a = _mean(attention)
    if a.shape[1] != a.shape[2]:
        raise ValueError(
            f"rollout and flow need every query: {a.shape[1]} queries for {a.shape[2]} keys were captured"
        )
    mixed = 0.5 * a + 0.5 * np.eye(a.shape[1])
    return mixed / mixed.sum(-1, keepdims=True)


def _mean(attention):
    """(layer, query, key) float64: the mean over heads, unless it is that."""
    if "head" not in attention.dims:
        return measured(attention.transpose("layer", "query", "key"), np.float64)
    whole = attention.transpose("layer", "head", "query", "key")
    return np.stack([measured(one, np.float64).mean(axis=0) for one in whole])


def rollout(attention: xr.DataArray) -> xr.DataArray:
    """Attention rollout (Abnar and Zuidema 2020, section 3): the product of the layers'
    head-averaged attention.

    Returns (layer, query, key): entry l is how much of key's input reaches query after layer l.
    Rows sum to 1. Of a long text all layers' products are gigabytes: `last_rollout` has one
    query's."""
    product, out = np.eye(attention.sizes["key"]), []
    for layer in attention["layer"].values:
        product = with_residual(attention.sel(layer=[layer]))[0] @ product
        out.append(product.astype(np.float32) if product.size > _LARGE else product)
    coords = {d: attention.coords[d] for d in ("layer", "query", "key") if d in attention.coords}
    return xr.DataArray(np.stack(out), dims=("layer", "query", "key"), coords=coords)


def last_rollout(attention: xr.DataArray) -> xr.DataArray:
    """Rollout of the last query after every layer, (layer, key): the same numbers as `rollout`'s
    last rows, as products of a vector with matrices, without those of all queries."""
    n_layer, n = attention.sizes["layer"], attention.sizes["key"]
    rows = np.zeros((n_layer, n))
    rows[:, -1] = 1
    for layer in reversed(range(n_layer)):  # rows from `layer` on have this matrix to their right
        rows[layer:] = rows[layer:] @ with_residual(attention.isel(layer=[layer]))[0]
    coords = {d: attention.coords[d] for d in ("layer", "key") if d in attention.coords}
    return xr.DataArray(rows, dims=("layer", "key"), coords=coords)


def groups(n_token: int, n_layer: int, seconds: float = FLOW_SECONDS) -> np.ndarray:
    """(token,) number of the group that a token is in for `flow`: each its own while the flow is
    reckoned to take at most `seconds`; else the first token and the last 16 are, and what lies
    between is cut into runs of equal length."""
    most = next(n for n in range(n_token, 0, -1) if n <= 20 or reckoned(n, n_layer) <= seconds)
    if most == n_token:
        return np.arange(n_token)
    own = min(16, most // 2)
    middle = np.arange(n_token - 1 - own) * (most - 1 - own) // (n_token - 1 - own)
    last = np.arange(own) + middle[-1] + 2
    return np.concatenate([[0], middle + 1, last])


def reckoned(n_token: int, n_layer: int) -> float:
    """Seconds that `flow` of so many tokens takes, about: one max-flow per token, in a graph of
    layers x tokens^2 edges. Measured: 30 layers and 96 tokens in 8 s on one core."""
    return 8.0 * (n_layer / 30) ** 1.4 * (n_token / 96) ** 3.3


def flow(
    attention: xr.DataArray,
    *,
    query: int = -1,
    progress: bool = False,
    seconds: float = FLOW_SECONDS,
) -> xr.DataArray:
    """Attention flow (Abnar and Zuidema 2020): the maximum flow from one query after the last layer
    to each input token, with attention as capacities. One max-flow per token.

    Where that is `reckoned` to take longer than `seconds`, tokens are taken together in `groups`
    (progress: which is said): inside a group what flows may move freely, so the flow to a group is
    an upper bound of the flow to its tokens, and each token gets an equal part of it. Returns
    (key,), scaled to sum to 1 as the paper's code does; keys after the query get 0; coordinate
    `group`."""
    with uninterrupted():
        import igraph
        from tqdm.auto import tqdm

    n_layer, n_token = attention.sizes["layer"], attention.sizes["key"]
    query = query % n_token
    group = groups(query + 1, n_layer, seconds)
    n = int(group[-1]) + 1
    if progress and n <= query:
        print(_grouped(query + 1, n, n_layer))
    mixed = _together(attention, group, query)
    node = np.arange((n_layer + 1) * n).reshape(n_layer + 1, n)  # row 0: input tokens
    layer, upper, lower = np.nonzero(mixed)
    edges = np.column_stack([node[layer + 1, upper], node[layer, lower]]).tolist()
    graph = igraph.Graph(n=node.size, edges=edges, directed=True)
    capacity = mixed[layer, upper, lower].tolist()
    found, source = np.zeros(n), int(node[n_layer, -1])
    sinks = tqdm(range(n), desc="attention flow", unit="token", disable=not progress, leave=False)
    for sink in sinks:
        found[sink] = graph.maxflow_value(source, int(node[0, sink]), capacity=capacity)
    values, number = np.zeros(n_token), np.full(n_token, -1)
    values[: query + 1], number[: query + 1] = (found / np.bincount(group))[group], group
    coords = {"key": attention.coords["key"]} if "key" in attention.coords else {}
    coords["group"] = ("key", number)
    return xr.DataArray(values / values.sum(), dims=("key",), coords=coords)


def _grouped(n_token, n, n_layer):
    return (
        f"Flow to each of {n_token:,} tokens would take about {reckoned(n_token, n_layer):,.0f} s: "
        f"they are taken together in {n} groups (the first and the last tokens alone), about "
        f"{reckoned(n, n_layer):.0f} s. The flow to a group is an upper bound of that to its tokens."
    )


def _together(attention, group, query):
    """Capacities between groups: (layer, group, group), the sum over their tokens."""
    starts, end = np.flatnonzero(np.diff(group, prepend=-1)), query + 1
    out = []
    for layer in range(attention.sizes["layer"]):
        one = with_residual(attention.isel(layer=[layer]))[0, :end, :end]
        out.append(np.add.reduceat(np.add.reduceat(one, starts, axis=0), starts, axis=1))
    return np.stack(out)


def head_edges(attention: xr.DataArray, threshold: float = 0.2, most: int = 20_000) -> pd.DataFrame:
    """Every weight above threshold between two different tokens, as edges query -> key, of the
    queries that are there; of more than `most` the strongest.

    DataFrame: src, dst (positions), layer, head, weight, kind "head"; attrs["of"]: how many there
    were. The weight of a token on itself is no edge."""
    a = attention.transpose("layer", "head", "query", "key")
    layer, head, query, key = np.nonzero(measured(a) > threshold)
    weight, at = np.asarray(a)[layer, head, query, key], query_positions(a)
    keep = np.flatnonzero(at[query] != key)
    n_edge = len(keep)
    if n_edge > most:
        keep = np.sort(keep[np.argsort(-weight[keep], kind="stable")[:most]])
    layer, head, query, key = layer[keep], head[keep], query[keep], key[keep]
    table = pd.DataFrame(
        {
            "src": at[query],
            "dst": key,
            "layer": a["layer"].values[layer] if "layer" in a.coords else layer,
            "head": a["head"].values[head] if "head" in a.coords else head,
            "weight": weight[keep],
            "kind": "head",
        }
    )
    table.attrs["of"] = n_edge
    return table


def rollout_edges(rolled: xr.DataArray, threshold: float = 0.05) -> pd.DataFrame:
    """Rollout after the last layer given, above threshold, as edges query -> key: columns as
    head_edges, kind "rollout", head -1. In a causal model the last of many layers has little but
    the first token: take earlier ones."""
    last = np.asarray(rolled.isel(layer=-1))
    query, key = np.nonzero((last > threshold) & ~np.eye(len(last), dtype=bool))
    return pd.DataFrame(
        {
            "src": query,
            "dst": key,
            "layer": len(rolled) - 1,
            "head": -1,
            "weight": last[query, key],
            "kind": "rollout",
        }
    )


def token_nodes(attention: xr.DataArray, pieces: list, backend: CpuBackend) -> pd.DataFrame:
    """One row per token position, for graphs: position, piece, received (mean weight from the later
    tokens that may see it, over all heads), pagerank (weighted) and betweenness of the directed
    graph of edges query -> key whose mean weight is above 1 / n_token, more than an even share, at
    most each query's STRONGEST: betweenness takes tokens x edges steps.

    attention: (layer, head, query, key) of all tokens, or averaged over heads; backend:
    backend.get_backend(...). Sources: PageRank, Page et al. 1999; betweenness, Freeman 1977."""
    over = [dim for dim in ("layer", "head") if dim in attention.dims]
    mean = measured(attention).mean(tuple(map(attention.dims.index, over)), dtype=np.float64)
    n = len(mean)
    earlier = np.tril(mean, -1)
    least = np.full((n, 1), 1 / n)
    if n > STRONGEST:
        strong = np.partition(earlier, -STRONGEST - 1, axis=1)[:, -STRONGEST - 1, None]
        least = np.maximum(least, strong)
    edges = np.argwhere(earlier > least)  # (edge, 2)
    later = np.tril(np.ones((n, n)), -1)
    return pd.DataFrame(
        {
            "position": range(n),
            "piece": pieces,
            "received": (mean * later).sum(0) / np.maximum(later.sum(0), 1),
            "pagerank": backend.pagerank(edges, n, mean[tuple(edges.T)]),
            "betweenness": backend.betweenness(edges, n, directed=True),
        }
    )
