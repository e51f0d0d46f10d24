"""Attention through all layers: rollout and flow (Abnar and Zuidema 2020), and token graphs of
single heads."""

import numpy as np
import pandas as pd
import xarray as xr

from ..backend.base import CpuBackend
from ..capture.finite import measured


def with_residual(attention: xr.DataArray) -> np.ndarray:
    """Mean over heads, half of it replaced by the identity for the residual connection: rows still
    sum to 1.

    attention: (layer, head, query, key) with as many queries as keys; returns (layer, query, key)
    float64."""
    a = measured(attention.transpose("layer", "head", "query", "key"), np.float64).mean(axis=1)
    if a.shape[1] != a.shape[2]:
        raise ValueError(
            f"rollout and flow need every query: {a.shape[1]} queries for {a.shape[2]} keys were captured"
        )
    mixed = 0.5 * a + 0.5 * np.eye(a.shape[1])
    return mixed / mixed.sum(-1, keepdims=True)


def rollout(attention: xr.DataArray) -> xr.DataArray:
    """Attention rollout (Abnar and Zuidema 2020, section 3): the product of the layers'
    head-averaged attention.

    Returns (layer, query, key): entry l is how much of key's input reaches query after layer l.
    Rows sum to 1."""
    mixed = with_residual(attention)
    product, out = np.eye(mixed.shape[1]), []
    for layer in mixed:
        product = layer @ product
        out.append(product)
    coords = {d: attention.coords[d] for d in ("layer", "query", "key") if d in attention.coords}
    return xr.DataArray(np.stack(out), dims=("layer", "query", "key"), coords=coords)


def flow(attention: xr.DataArray, *, query: int = -1, progress: bool = False) -> xr.DataArray:
    """Attention flow (Abnar and Zuidema 2020): the maximum flow from one query after the last layer
    to each input token, with attention as capacities. One max-flow per token: seconds for 30 layers
    and 32 tokens.

    Returns (key,), scaled to sum to 1 as the paper's code does; keys after the query get 0.
    """
    import igraph
    from tqdm.auto import tqdm

    mixed = with_residual(attention)
    n_layer, n_token, _ = mixed.shape
    query = query % n_token
    node = np.arange((n_layer + 1) * n_token).reshape(n_layer + 1, n_token)  # row 0: input tokens
    layer, upper, lower = np.nonzero(mixed[:, : query + 1, : query + 1])
    edges = np.column_stack([node[layer + 1, upper], node[layer, lower]]).tolist()
    graph = igraph.Graph(n=node.size, edges=edges, directed=True)
    capacity = mixed[layer, upper, lower].tolist()
    values = np.zeros(n_token)
    source, sinks = int(node[n_layer, query]), node[0, : query + 1].tolist()
    bar = tqdm(sinks, desc="attention flow", unit="token", disable=not progress, leave=False)
    for key, sink in enumerate(bar):
        values[key] = graph.maxflow_value(source, sink, capacity=capacity)
    coords = {"key": attention.coords["key"]} if "key" in attention.coords else {}
    return xr.DataArray(values / values.sum(), dims=("key",), coords=coords)


def head_edges(attention: xr.DataArray, threshold: float = 0.2) -> pd.DataFrame:
    """Every weight above threshold between two different tokens, as edges query -> key.

    DataFrame: src, dst (positions), layer, head, weight, kind "head". The weight of a token on
    itself is no edge."""
    a = attention.transpose("layer", "head", "query", "key")
    layer, head, query, key = np.nonzero(measured(a) > threshold)
    keep = query != key
    layer, head, query, key = layer[keep], head[keep], query[keep], key[keep]
    return pd.DataFrame(
        {
            "src": query,
            "dst": key,
            "layer": a["layer"].values[layer] if "layer" in a.coords else layer,
            "head": a["head"].values[head] if "head" in a.coords else head,
            "weight": np.asarray(a)[layer, head, query, key],
            "kind": "head",
        }
    )


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
    graph of edges query -> key whose mean weight is above 1 / n_token, more than an even share.

    attention: (layer, head, query, key) of all tokens; backend: backend.get_backend(...). Sources:
    PageRank, Page et al. 1999; betweenness, Freeman 1977."""
    mean = measured(attention, np.float64).mean((0, 1))  # (query, key)
    n = len(mean)
    edges = np.argwhere(np.tril(mean, -1) > 1 / n)  # (edge, 2)
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
