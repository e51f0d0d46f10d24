"""How alike heads are: Jensen-Shannon distances between their attention, maps, clusters and
redundancy."""

import numpy as np
import pandas as pd

from ..capture.finite import measured
from ..maths import ratio

BLOCK = 2**22  # attention weights of a temporary


def js_sums(attention, rows, backend=None, progress=None):
    """Sum over query rows of the Jensen-Shannon divergence between every two heads' rows, nats:
    (head, head), float64.

    attention: (layer, head, row, key) captured at query positions `rows`; heads are numbered layer
    by layer. Each row is cut to the keys that its query sees and scaled to sum to 1 (a head with an
    attention sink leaves some out). backend: computes on its device; memory is bounded by BLOCK
    beside the rows themselves."""
    xp = np if backend is None else backend.xp
    values = measured(attention)
    n_head = values.shape[0] * values.shape[1]
    out = np.zeros((n_head, n_head))
    for place, query in enumerate(rows):
        p = xp.asarray(values[:, :, place, : query + 1].reshape(n_head, -1))  # (head, key)
        p = p / xp.maximum(p.sum(1, keepdims=True), 1e-30)
        negative = _plogp(xp, p).sum(1)  # (head,) minus entropy
        step = max(1, BLOCK // (n_head * p.shape[1]))
        for start in range(0, n_head, step):
            stop = min(start + step, n_head)
            mixed = (p[start:stop, None] + p[None, start:]) / 2  # (block, head, key)
            js = (negative[start:stop, None] + negative[None, start:]) / 2 - _plogp(xp, mixed).sum(
                2
            )
            js = np.asarray(js if backend is None else backend.to_numpy(js))
            out[start:stop, start:] += np.maximum(js, 0)
        if progress:
            progress()
    upper = np.triu(out, 1)
    return upper + upper.T


def _plogp(xp, p):
    return p * xp.log(xp.maximum(p, 1e-30))


def distances(sums, n_rows):
    """Distance between heads from sums of divergences: square root of the mean divergence in bits,
    0 to 1.

    sums: (text, head, head) of js_sums; n_rows: (text,) rows that each sum is over. The root is a
    metric that has an exact Euclidean picture (Fuglede and Topsoe 2004), so maps and clusters can
    use coordinates."""
    return np.sqrt(np.sum(sums, 0) / np.sum(n_rows) / np.log(2))


def classical_mds(distance, n=2):
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


def cluster(distance, n_clusters=None, largest=12):
    """Average-linkage clusters (Sokal and Michener 1958): labels (head,) from 0, largest cluster
    first, and silhouette.

    n_clusters: None takes the count from 2 to `largest` with the best mean silhouette (Rousseeuw
    1987). A silhouette needs from 2 clusters to one less than there are heads: more are cut to
    that, and where there are no such counts (one head, two, all alike) all heads are one cluster,
    silhouette NaN."""
    from scipy.cluster.hierarchy import fcluster
    from sklearn.metrics import silhouette_score

    if len(distance) < 3:
        return np.zeros(len(distance), int), float("nan")
    tree, most = linkage_of(distance), len(distance) - 1
    counts = range(2, min(largest, most) + 1) if n_clusters is None else [min(n_clusters, most)]
    found = {}
    for count in counts:
        labels = fcluster(tree, count, "maxclust")
        if 1 < len(np.unique(labels)) < len(labels):
            found[count] = (silhouette_score(distance, labels, metric="precomputed"), labels)
    if not found:
        return np.zeros(len(distance), int), float("nan")
    score, labels = max(found.values(), key=lambda pair: pair[0])
    return by_size(labels), float(score)


def linkage_of(distance):
    """scipy's linkage matrix of average linkage on a distance matrix; (0, 4) for a single head."""
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import squareform

    if len(distance) < 2:
        return np.empty((0, 4))
    return linkage(
        squareform(distance, checks=False), "average", optimal_ordering=len(distance) <= 600
    )


def by_size(labels):
    """Labels renumbered from 0, the largest cluster first; -1 (noise) stays."""
    names, counts = np.unique(labels[labels >= 0], return_counts=True)
    order = {name: place for place, name in enumerate(names[np.argsort(-counts, kind="stable")])}
    return np.array([order.get(label, -1) for label in labels])


def stability(sums, n_rows, labels, n_boot=30, seed=0):
    """Clusters again from resampled texts: the adjusted Rand index of each repeat, and per cluster
    the mean best Jaccard overlap (Hennig 2007). Returns (array (n_boot,), Series by cluster): nan
    where nothing can differ, for one text, which resampling gives back as it is, and for one
    cluster."""
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform
    from sklearn.metrics import adjusted_rand_score

    rng = np.random.default_rng(seed)
    sums, n_rows = np.asarray(sums), np.asarray(n_rows)
    names = np.unique(labels)
    if len(sums) < 2 or len(names) < 2:
        return np.full(n_boot, np.nan), pd.Series(
            np.nan, index=pd.Index(names, name="cluster"), name="jaccard"
        )
    rand, overlap = np.zeros(n_boot), np.zeros((n_boot, len(names)))
    for repeat in range(n_boot):
        draw = rng.integers(0, len(sums), len(sums))
        tree = linkage(squareform(distances(sums[draw], n_rows[draw]), checks=False), "average")
        again = fcluster(tree, len(names), "maxclust")
        rand[repeat] = adjusted_rand_score(labels, again)
        for place, name in enumerate(names):
            inside = labels == name
            overlap[repeat, place] = max(
                (inside & (again == other)).sum() / (inside | (again == other)).sum()
                for other in np.unique(again[inside])
            )
    return rand, pd.Series(overlap.mean(0), index=pd.Index(names, name="cluster"), name="jaccard")


def closest_pairs(distance, names, count=10):
    """The closest pairs of heads: DataFrame (a, b, distance, same_layer). names: list of (layer,
    head)."""
    rows, columns = np.triu_indices(len(distance), 1)
    order = np.argsort(distance[rows, columns], kind="stable")[:count]
    return pd.DataFrame(
        {
            "a": [head_name(names[i]) for i in rows[order]],
            "b": [head_name(names[j]) for j in columns[order]],
            "distance": distance[rows[order], columns[order]],
            "same_layer": [names[i][0] == names[j][0] for i, j in zip(rows[order], columns[order])],
        }
    )


def head_name(place):
    """(3, 2) -> 'L3H2'."""
    return f"L{place[0]}H{place[1]}"


def cover(distance, radius):
    """Heads such that every head has one of them within `radius`, by greedy set cover: list of
    indices."""
    near, left, chosen = distance <= radius, np.ones(len(distance), bool), []
    while left.any():
        chosen.append(int((near & left).sum(1).argmax()))
        left &= ~near[chosen[-1]]
    return chosen


def cover_curve(distance, radii):
    """How many heads cover the rest at each radius: DataFrame (radius, heads, share)."""
    sizes = [len(cover(distance, radius)) for radius in radii]
    return pd.DataFrame({"radius": radii, "heads": sizes, "share": np.array(sizes) / len(distance)})


def order_of(distance):
    """Heads in the order of the leaves of average linkage: (head,) int."""
    from scipy.cluster.hierarchy import leaves_list

    return leaves_list(linkage_of(distance)) if len(distance) > 1 else np.zeros(len(distance), int)


def dense_groups(backend, coordinates):
    """HDBSCAN's labels (-1: left out) of heads by their coordinates; all are left out where there
    are too few."""
    least = max(3, len(coordinates) // 50)
    return (
        backend.hdbscan(coordinates, min_cluster_size=least)
        if len(coordinates) > least
        else np.full(len(coordinates), -1)
    )


def uniqueness(distance):
    """Distance of every head to its nearest other one: (head,); NaN for a single head."""
    others = np.where(np.eye(len(distance), dtype=bool), np.inf, distance).min(axis=1)
    return np.where(np.isfinite(others), others, np.nan)


def layer_distances(distance, names):
    """Mean distance of two heads of one layer, and of different layers; NaN where there are no such
    pairs."""
    layer = np.array([name[0] for name in names])
    rows, columns = np.triu_indices(len(names), 1)
    same, values = layer[rows] == layer[columns], distance[rows, columns]
    return tuple(
        float(part.mean()) if part.size else float("nan") for part in (values[same], values[~same])
    )


def group_agreement(distance, names, n_head, n_kv_head, n_shuffle=200, seed=0):
    """Are heads that share a kv head more alike than other heads of the layer?

    Returns a dict: inside, outside (mean distance of pairs in one layer within and across groups),
    other_layers, and p, the share of shuffles of heads within their layers whose difference is as
    large; None where there are no groups."""
    size = n_head // max(1, n_kv_head)
    if size < 2 or n_kv_head < 2:
        return None
    layer, head = np.array(names).T
    rows, columns = np.triu_indices(len(names), 1)
    same = layer[rows] == layer[columns]
    between = float(distance[rows[~same], columns[~same]].mean()) if (~same).any() else float("nan")
    rows, columns = rows[same], columns[same]
    values = distance[rows, columns]

    def difference(order):
        inside = order[rows] // size == order[columns] // size
        return (
            values[~inside].mean() - values[inside].mean(),
            values[inside].mean(),
            values[~inside].mean(),
        )

    observed, inside, outside = difference(head)
    rng = np.random.default_rng(seed)
    null = [difference(_within(head, layer, rng))[0] for _ in range(n_shuffle)]
    p = (1 + sum(value >= observed for value in null)) / (1 + n_shuffle)
    return {"inside": inside, "outside": outside, "other_layers": between, "p": p, "group": size}


def _within(head, layer, rng):
    """Heads permuted inside each layer."""
    out = head.copy()
    for one in np.unique(layer):
        out[layer == one] = rng.permutation(head[layer == one])
    return out


def nearest(distance, k=3):
    """Each head's k nearest others: edges (source, target, distance) as a DataFrame of row numbers,
    each pair once."""
    pairs = {}
    for i, row in enumerate(distance):
        for j in [j for j in np.argsort(row, kind="stable") if j != i][:k]:
            pairs[min(i, j), max(i, j)] = float(row[j])
    table = pd.DataFrame(
        [(i, j, d) for (i, j), d in pairs.items()], columns=["source", "target", "distance"]
    )
    return table.astype(
        {"source": int, "target": int, "distance": float}
    )  # a single head has no pair to tell by


def nearest_heads(distance, names, name, k=3):
    """The k heads nearest to `name`: [("L3H2", distance), ...]."""
    row = distance[names.index(name)]
    order = [i for i in np.argsort(row, kind="stable") if names[i] != name][:k]
    return [(head_name(names[i]), float(row[i])) for i in order]
