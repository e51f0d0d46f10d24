"""Graph layout and centrality with igraph: edges as an integer array (m, 2), results per node as NumPy arrays."""

import random

import numpy as np

DRL_ABOVE = 20_000  # nodes: Fruchterman-Reingold takes minutes from here on, DrL seconds


def check_edges(edges, n_nodes, weights=None):
    """edges as int64 (m, 2) and weights as float64 (m,) or None; ValueError for ids outside 0 to n_nodes-1, and for
    weights that are not positive and finite."""
    edges = np.asarray(edges, dtype=np.int64).reshape(-1, 2)
    if len(edges) and not 0 <= edges.min() <= edges.max() < n_nodes:
        raise ValueError(f"edges name node {edges.min()} to {edges.max()}, but there are nodes 0 to {n_nodes - 1}")
    if weights is not None:
        weights = np.asarray(weights, dtype=np.float64)
        if weights.shape != (len(edges),):
            raise ValueError(f"{len(edges)} edges need as many weights, not {weights.shape}")
        if not (np.isfinite(weights) & (weights > 0)).all():
            raise ValueError("edge weights must be positive and finite; drop the other edges or shift the weights")
    return edges, weights


def layout(edges, n_nodes, weights=None, dims=2, seed=0):
    """Node positions by force (see backend.layout). -> (n_nodes, dims) float32, in the unit disc or ball."""
    import igraph

    edges, weights = check_edges(edges, n_nodes, weights)
    if dims not in (2, 3):
        raise ValueError(f"a layout has 2 or 3 dimensions, not {dims}")
    if n_nodes == 0:
        return np.zeros((0, dims), dtype=np.float32)
    start = np.random.default_rng(seed).uniform(-1, 1, (n_nodes, dims)) * np.sqrt(n_nodes)
    graph = igraph.Graph(n_nodes, edges)
    weights = None if weights is None else weights / weights.mean()
    igraph.set_random_number_generator(random.Random(seed))
    try:
        if n_nodes > DRL_ABOVE:
            found = graph.layout_drl(weights=weights, dim=dims, seed=start.tolist())
        else:
            found = graph.layout_fruchterman_reingold(weights=weights, dim=dims, seed=start.tolist())
    finally:
        igraph.set_random_number_generator(random)
    return to_unit(np.asarray(found.coords))


def to_unit(positions):
    """Positions centred, the largest distance from the centre 1. (n, dims) -> float32"""
    positions = positions - positions.mean(axis=0)
    return (positions / (np.linalg.norm(positions, axis=1).max() or 1.0)).astype(np.float32)


def pagerank(edges, n_nodes, weights=None, directed=True):
    """PageRank with damping 0.85 (Page et al. 1999). -> (n_nodes,) float64 that sums to 1."""
    import igraph

    edges, weights = check_edges(edges, n_nodes, weights)
    return np.asarray(igraph.Graph(n_nodes, edges, directed=directed).pagerank(weights=weights, damping=0.85))


def betweenness(edges, n_nodes, directed=False):
    """Betweenness (Freeman 1977): the share of all pairs with shortest paths through a node. -> (n_nodes,)"""
    import igraph

    edges, _ = check_edges(edges, n_nodes)
    pairs = (n_nodes - 1) * (n_nodes - 2) / (1 if directed else 2)
    return np.asarray(igraph.Graph(n_nodes, edges, directed=directed).betweenness(directed=directed)) / max(pairs, 1)
