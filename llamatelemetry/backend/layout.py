"""Graph layout and centrality with igraph: edges as an integer array (m, 2), results per node as
NumPy arrays."""

import random

import numpy as np

from ..imports import uninterrupted


def check_edges(edges, n_nodes, weights=None):
    """edges as int64 (m, 2) and weights as float64 (m,) or None; ValueError for ids outside 0 to
    n_nodes-1, and for weights that are not positive and finite."""
    edges = np.asarray(edges, dtype=np.int64).reshape(-1, 2)
    if len(edges) and not 0 <= edges.min() <= edges.max() < n_nodes:
        raise ValueError(
            f"edges name node {edges.min()} to {edges.max()}, but there are nodes 0 to {n_nodes - 1}"
        )
    if weights is not None:
        weights = np.asarray(weights, dtype=np.float64)
        if weights.shape != (len(edges),):
            raise ValueError(f"{len(edges)} edges need as many weights, not {weights.shape}")
        if not (np.isfinite(weights) & (weights > 0)).all():
            raise ValueError(
                "edge weights must be positive and finite; drop the other edges or shift the weights"
            )
    return edges, weights


def start_positions(n_nodes, dims, seed):
    """Where forces find the nodes: (n_nodes, dims) float64, evenly in a box whose area grows with
    the nodes."""
    return np.random.default_rng(seed).uniform(-1, 1, (n_nodes, dims)) * np.sqrt(n_nodes)


def igraph_force(graph, dims, seed):
    """Positions (n, dims) of one connected component, an igraph.Graph whose edges may have
    "weight"."""
    n = graph.vcount()
    weights = "weight" if "weight" in graph.es.attributes() else None
    start = start_positions(n, dims, seed).tolist()
    return np.asarray(
        graph.layout_fruchterman_reingold(weights=weights, dim=dims, seed=start).coords
    )


def layout(edges, n_nodes, weights=None, dims=2, seed=0, force=igraph_force):
    """Node positions by force (see backend.layout), each connected component by itself, then packed
    side by side: forces alone would drive unconnected parts away from each other without end.

    force: what places one component, called like igraph_force
    -> (n_nodes, dims) float32, in the unit disc or ball
    """
    with uninterrupted():
        import igraph

    edges, weights = check_edges(edges, n_nodes, weights)
    if dims not in (2, 3):
        raise ValueError(f"a layout has 2 or 3 dimensions, not {dims}")
    if n_nodes == 0:
        return np.zeros((0, dims), dtype=np.float32)
    graph = igraph.Graph(n_nodes, edges)
    if weights is not None and len(weights):
        graph.es["weight"] = weights / weights.mean()
    parts = sorted(graph.connected_components(), key=len, reverse=True)
    radii = np.sqrt([len(part) for part in parts])
    centres = pack_discs(radii, dims, seed)
    positions = np.zeros((n_nodes, dims))
    igraph.set_random_number_generator(random.Random(seed))
    try:
        for part, radius, centre in zip(parts, radii, centres):
            inside = _into_disc(force(graph.subgraph(part), dims, seed)) if len(part) > 1 else 0.0
            positions[part] = centre + 0.9 * radius * inside
    finally:
        igraph.set_random_number_generator(random)
    return to_unit(positions)


def _into_disc(positions):
    """Positions in the unit disc by their 95th percentile; the few farther out are drawn in, so
    that a stray chain does not shrink all the rest. (n, dims) -> (n, dims), at most 1.1 from the
    centre."""
    positions = positions - positions.mean(axis=0)
    distance = np.linalg.norm(positions, axis=1, keepdims=True)
    distance, scale = np.maximum(distance, 1e-12), np.percentile(distance, 95) or 1.0
    share = distance / scale
    drawn = np.where(share > 1, 1 + 0.1 * np.tanh((share - 1) / 0.5), share)
    return positions / distance * drawn


def pack_discs(radii, dims=2, seed=0):
    """Centres of discs (balls) that do not overlap, the first in the middle, the others around it
    in the order given.

    radii: (n,), descending -> (n, dims). Each tries points on growing circles, about as far out as
    the area of those before it needs; the many small ones at the end are spread evenly instead,
    without trying."""
    radii = np.asarray(radii, dtype=np.float64)
    n, rng = len(radii), np.random.default_rng(seed)
    centres = np.zeros((n, dims))
    turns = rng.normal(size=(64, dims))
    turns /= np.linalg.norm(turns, axis=1, keepdims=True)  # 64 directions
    if dims == 2:
        angle = np.arange(64) * 2.399963229728653  # the golden angle
        turns = np.column_stack([np.cos(angle), np.sin(angle)])
    tail = next((i for i in range(1, n) if radii[i] <= radii[-1] and n - i > 50), n)
    for i in range(1, tail):
        distance = radii[0] + radii[i]
        while True:
            tried = turns * distance  # (64, dims)
            gap = np.linalg.norm(tried[:, None] - centres[None, :i], axis=2) - radii[:i] - radii[i]
            free = np.flatnonzero((gap >= -1e-9).all(axis=1))
            if len(free):
                centres[i] = tried[free[0]]
                break
            distance += radii[i]
    if tail < n:  # a disc of equal ones, beginning outside what is placed
        inner = (np.linalg.norm(centres[:tail], axis=1) + radii[:tail]).max()
        order = np.arange(n - tail)
        reach = (
            inner**dims + 1.6 * (order + 1) * radii[-1] ** dims * (2.0 if dims == 3 else 1.3)
        ) ** (1 / dims)
        if dims == 2:
            angle = order * 2.399963229728653
            spread = np.column_stack([np.cos(angle), np.sin(angle)])
        else:
            spread = rng.normal(size=(n - tail, dims))
            spread /= np.linalg.norm(spread, axis=1, keepdims=True)
        centres[tail:] = spread * (reach + radii[-1])[:, None]
    return centres


def to_unit(positions):
    """Positions centred, the largest distance from the centre 1. (n, dims) -> float32"""
    positions = positions - positions.mean(axis=0)
    return (positions / (np.linalg.norm(positions, axis=1).max() or 1.0)).astype(np.float32)


def pagerank(edges, n_nodes, weights=None, directed=True):
    """PageRank with damping 0.85 (Page et al. 1999). -> (n_nodes,) float64 that sums to 1."""
    with uninterrupted():
        import igraph

    edges, weights = check_edges(edges, n_nodes, weights)
    weights = (
        None if weights is None else weights.tolist()
    )  # igraph takes an array for the name of an attribute
    return np.asarray(
        igraph.Graph(n_nodes, edges, directed=directed).pagerank(weights=weights, damping=0.85)
    )


def betweenness(edges, n_nodes, directed=False):
    """Betweenness (Freeman 1977): the share of all pairs with shortest paths through a node. ->
    (n_nodes,)"""
    with uninterrupted():
        import igraph

    edges, _ = check_edges(edges, n_nodes)
    pairs = (n_nodes - 1) * (n_nodes - 2) / (1 if directed else 2)
    return np.asarray(
        igraph.Graph(n_nodes, edges, directed=directed).betweenness(directed=directed)
    ) / max(pairs, 1)
