"""How alike heads are: Jensen-Shannon distances between their attention, maps, clusters and
redundancy. Heads are numbered as the rows of profile.head_table: layer by layer, those that are
there; `names` are their (layer, head)."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from ..capture.finite import measured
from ..imports import uninterrupted
from ..maths import jensen_shannon, ratio

BLOCK = 2**18  # attention weights of a temporary: few fit a processor's cache
Names = Sequence[tuple[int, int]]


def divergence_sums(
    attention: xr.DataArray | np.ndarray, rows: Sequence[int] | np.ndarray, backend: Any = None
) -> np.ndarray:
    """Sum over query rows of the Jensen-Shannon divergence between every two heads' rows, bits:
    (head, head) float64.

    attention: (layer, head, row, key) captured at query positions `rows`. Each row is cut to the
    keys that its query sees and scaled to sum to 1 (a head with an attention sink leaves some out).
    backend: computes on its device. Memory beside the rows is bounded by BLOCK (32 of them on a
    GPU, which wants large calls)."""
    values = measured(attention)
    values = values.reshape(-1, *values.shape[2:])  # (head, row, key)
    values = values[np.isfinite(values[:, 0, 0])]  # without the padding of layers with fewer heads
    xp, n_head = np if backend is None else backend.xp, len(values)
    block = BLOCK if xp is np else 32 * BLOCK
    out = np.zeros((n_head, n_head))
    for place, query in enumerate(rows):
        p = xp.asarray(values[:, place, : query + 1])
        p = p / p.sum(1, keepdims=True).clip(1e-30)
        step = max(1, block // p.size)
        for start in range(0, n_head, step):
            stop = min(start + step, n_head)
            apart = jensen_shannon(p[start:stop, None], p[None, start:])
            out[start:stop, start:] += apart if backend is None else backend.to_numpy(apart)
    upper = np.triu(out, 1)
    return upper + upper.T


def distances(sums: np.ndarray, n_rows: np.ndarray) -> np.ndarray:
    """Distance between heads, (head, head): square root of the mean divergence, 0 to 1.

    sums: (text, head, head) of divergence_sums; n_rows: (text,) rows that each sum is over. The
    root is a metric that has an exact Euclidean picture (Fuglede and Topsoe 2004), so maps and
    clusters can use coordinates."""
    return np.sqrt(np.sum(sums, 0) / np.sum(n_rows))


def classical_mds(distance: np.ndarray, n: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Classical scaling (Torgerson 1952): coordinates (head, n) and the share of the distances'
    variance in each: NaN where all distances are 0. Fewer heads than coordinates leave the last
    ones 0."""
    n_head = len(distance)
    centre = np.eye(n_head) - 1 / n_head
    values, vectors = np.linalg.eigh(-centre @ (distance**2) @ centre / 2)
    order = np.argsort(-values)[:n]
    kept = np.maximum(values[order], 0)
    scores = vectors[:, order] * np.sqrt(kept)
    sign = np.sign(scores[np.abs(scores).argmax(0), np.arange(scores.shape[1])])
    scores, shares = scores * np.where(sign == 0, 1, sign), ratio(kept, np.maximum(values, 0).sum())
    return np.pad(scores, ((0, 0), (0, n - scores.shape[1]))), np.pad(shares, (0, n - len(shares)))


def maps(
    distance: np.ndarray, backend: Any, seed: int = 0
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Coordinates of classical scaling (head, <= 10), and heads in the plane, {name of the map:
    (head, 2)}: the first two of them, and UMAP of all where there are more than 16 heads."""
    coordinates, shares = classical_mds(distance, min(10, max(2, len(distance) - 1)))
    held = f"classical scaling, {np.nansum(shares[:2]):.0%} of squared distances"
    found = {held: coordinates[:, :2]}
    if len(distance) > 16:
        found["UMAP"] = backend.umap(coordinates, metric="euclidean", seed=seed)
    return coordinates, found


def linkage_of(distance: np.ndarray, ordered: bool = True) -> np.ndarray:
    """scipy's linkage matrix of average linkage (Sokal and Michener 1958); ordered: neighbouring
    leaves as alike as can be, of 600 heads at most."""
    with uninterrupted():
        from scipy.cluster.hierarchy import linkage
        from scipy.spatial.distance import squareform

    ordered = ordered and len(distance) <= 600  # it takes the square of their number
    return linkage(squareform(distance, checks=False), "average", optimal_ordering=ordered)


def cluster(
    distance: np.ndarray, n_clusters: int | None = None, largest: int = 12
) -> tuple[np.ndarray, float]:
    """Average-linkage clusters: labels (head,) from 0, largest cluster first, and silhouette.

    n_clusters: None takes the count from 2 to `largest` with the best mean silhouette (Rousseeuw
    1987). A silhouette needs from 2 clusters to one less than there are heads: more are cut to
    that, and where there are no such counts (one head, two, all alike) all heads are one cluster,
    silhouette NaN."""
    with uninterrupted():
        from scipy.cluster.hierarchy import fcluster
        from sklearn.metrics import silhouette_score

    found, most = [(np.nan, np.zeros(len(distance), int))], len(distance) - 1
    counts = range(2, min(largest, most) + 1) if n_clusters is None else [min(n_clusters, most)]
    tree = linkage_of(distance) if most > 1 else None
    for count in counts if most > 1 else []:
        labels = fcluster(tree, count, "maxclust")
        if 1 < len(np.unique(labels)) < len(labels):
            found.append((silhouette_score(distance, labels, metric="precomputed"), labels))
    score, labels = max(found[1:] or found, key=lambda pair: pair[0])
    sizes = pd.Series(labels).value_counts()  # largest first, equal ones by their label
    order = sizes.sort_index().sort_values(ascending=False, kind="stable").index
    return order.get_indexer(labels), float(score)


def stability(
    sums: np.ndarray, n_rows: np.ndarray, labels: np.ndarray, n_boot: int = 30, seed: int = 0
) -> tuple[np.ndarray, pd.Series]:
    """Clusters again from resampled texts: the adjusted Rand index of each repeat (n_boot,), and
    per cluster the mean best Jaccard overlap (Hennig 2007). NaN where nothing can differ: for one
    text, which resampling gives back as it is, and for one cluster."""
    with uninterrupted():
        from scipy.cluster.hierarchy import fcluster
        from sklearn.metrics import adjusted_rand_score

    rng = np.random.default_rng(seed)
    sums, n_rows, names = np.asarray(sums), np.asarray(n_rows), np.unique(labels)
    rand, overlap = np.full(n_boot, np.nan), np.full((n_boot, len(names)), np.nan)
    for repeat in range(n_boot if len(sums) > 1 and len(names) > 1 else 0):
        draw = rng.integers(0, len(sums), len(sums))
        tree = linkage_of(distances(sums[draw], n_rows[draw]), ordered=False)
        again = fcluster(tree, len(names), "maxclust")
        rand[repeat] = adjusted_rand_score(labels, again)
        counts = pd.crosstab(labels, again).to_numpy()  # (cluster, cluster again)
        either = counts.sum(1, keepdims=True) + counts.sum(0) - counts
        overlap[repeat] = (counts / either).max(1)
    return rand, pd.Series(overlap.mean(0), pd.Index(names, name="cluster"), name="jaccard")


def dense_groups(backend: Any, coordinates: np.ndarray) -> np.ndarray:
    """HDBSCAN's labels (-1: left out) of heads by their coordinates; all are left out where there
    are too few."""
    least = max(3, len(coordinates) // 50)
    if len(coordinates) <= least:
        return np.full(len(coordinates), -1)
    return backend.hdbscan(coordinates, min_cluster_size=least)


def describe_clusters(table: pd.DataFrame) -> pd.DataFrame:
    """Of each cluster of a head table: heads, layers, the share that is in a dense group, mean
    sink, local and entropy, and the commonest labels."""
    groups = table.groupby("cluster")
    return groups.agg(
        heads=("head", "size"),
        layers=(
            "layer",
            lambda layer: " to ".join(sorted({str(layer.min()), str(layer.max())}, key=int)),
        ),
        dense=("dense", lambda group: (group >= 0).mean()),
        sink=("sink", "mean"),
        local=("local", "mean"),
        entropy=("entropy", "mean"),
        most=("labels", lambda labels: labels.value_counts().index[0]),
    )


def order_of(distance: np.ndarray) -> np.ndarray:
    """Heads in the order of the leaves of average linkage: (head,) int."""
    with uninterrupted():
        from scipy.cluster.hierarchy import leaves_list

    n_head = len(distance)
    return leaves_list(linkage_of(distance)) if n_head > 1 else np.zeros(1, int)


def layer_distances(distance: np.ndarray, names: Names) -> tuple[float, float]:
    """Mean distance of two heads of one layer, and of different layers; NaN where there are no such
    pairs."""
    rows, columns = np.triu_indices(len(names), 1)
    layer, values = np.array(names)[:, 0], pd.Series(distance[rows, columns])
    same = layer[rows] == layer[columns]
    return float(values[same].mean()), float(values[~same].mean())


def closest_pairs(distance: np.ndarray, names: Names, count: int = 10) -> pd.DataFrame:
    """The closest pairs of heads: DataFrame (a, b, distance, same_layer)."""
    rows, columns = np.triu_indices(len(distance), 1)
    order = np.argsort(distance[rows, columns], kind="stable")[:count]
    one, other = ([names[i] for i in side[order]] for side in (rows, columns))
    return pd.DataFrame(
        {
            "a": head_names(one),
            "b": head_names(other),
            "distance": distance[rows[order], columns[order]],
            "same_layer": [a[0] == b[0] for a, b in zip(one, other)],
        }
    )


def head_names(names: Iterable[tuple[int, int]]) -> list[str]:
    """[(3, 2), ...] -> ["L3H2", ...]"""
    return [f"L{layer}H{head}" for layer, head in names]


def cover(distance: np.ndarray, radius: float) -> list[int]:
    """Heads such that every head has one of them within `radius`, by greedy set cover."""
    near, left, chosen = distance <= radius, np.ones(len(distance), bool), []
    while left.any():
        chosen.append(int((near & left).sum(1).argmax()))
        left &= ~near[chosen[-1]]
    return chosen


def cover_curve(distance: np.ndarray, radii: Sequence[float] | None = None) -> pd.DataFrame:
    """How many heads cover the rest at each radius: DataFrame (radius, heads, share). radii: None
    for twelve up to the mean distance, and to 0.6 at least."""
    if radii is None:
        radii = np.round(np.linspace(0.05, max(0.6, distance.mean()), 12), 2)
    sizes = [len(cover(distance, radius)) for radius in radii]
    return pd.DataFrame({"radius": radii, "heads": sizes, "share": np.array(sizes) / len(distance)})


def uniqueness(distance: np.ndarray) -> np.ndarray:
    """Distance of every head to its nearest other one: (head,); NaN for a single head."""
    others = np.where(np.eye(len(distance), dtype=bool), np.inf, distance).min(axis=1)
    return np.where(np.isfinite(others), others, np.nan)


def group_agreement(
    distance: np.ndarray,
    names: Names,
    n_head: int,
    n_kv_head: int,
    n_shuffle: int = 200,
    seed: int = 0,
) -> dict[str, float] | None:
    """Are heads that share a kv head more alike than other heads of the layer?

    inside, outside: mean distance of pairs in one layer within and across groups; other_layers; p:
    the share of shuffles of heads within their layers whose difference is as large. None where
    there are no groups."""
    size = n_head // max(1, n_kv_head)
    if size < 2 or n_kv_head < 2:
        return None
    layer, head = np.array(names).T
    rows, columns = np.triu_indices(len(names), 1)
    same = layer[rows] == layer[columns]
    rows, columns = rows[same], columns[same]
    values = distance[rows, columns]

    def means(heads):
        inside = heads[rows] // size == heads[columns] // size
        return values[inside].mean(), values[~inside].mean()

    def shuffled(heads):
        heads = heads.copy()
        for one in np.unique(layer):
            heads[layer == one] = rng.permutation(heads[layer == one])
        return heads

    rng = np.random.default_rng(seed)
    inside, outside = means(head)
    chance = [np.subtract(*means(shuffled(head))) for _ in range(n_shuffle)]
    p = (1 + np.sum(chance <= inside - outside)) / (1 + n_shuffle)
    across = layer_distances(distance, names)[1]
    return {"inside": inside, "outside": outside, "other_layers": across, "p": p}


def links(
    table: pd.DataFrame, losses: pd.DataFrame, distance: np.ndarray, k: int = 3
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Heads as the nodes of a graph (the head table with id, group, its cluster, and loss_change of
    importance_table), and as its edges each head's k nearest: DataFrame (source, target, distance,
    similarity), each pair once."""
    labels = head_names(zip(table["layer"], table["head"]))
    nodes = table.merge(losses[["layer", "head", "loss_change"]], "left", ["layer", "head"])
    nodes = nodes.assign(id=labels, group=table["cluster"].map("cluster {}".format))
    pairs = {}
    for i, row in enumerate(distance):
        for j in [j for j in np.argsort(row, kind="stable") if j != i][:k]:
            pairs[min(i, j), max(i, j)] = float(row[j])
    rows = [(labels[i], labels[j], apart, 1 - apart) for (i, j), apart in pairs.items()]
    edges = pd.DataFrame(rows, columns=["source", "target", "distance", "similarity"])
    return nodes, edges.astype(
        {"source": str, "target": str, "distance": float, "similarity": float}
    )
