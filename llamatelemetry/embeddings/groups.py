"""Groups of embeddings: projections, clusters against categories, neighbourhoods, k-NN networks,
two precisions of the same rows.

Neighbour indices come from `backend.neighbors`; every agreement is shown beside what shuffled
labels give."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from ..backend.base import CpuBackend
from ..errors import EmbeddingError
from ..imports import uninterrupted
from ..maths import Matrix, unit


class Projections(NamedTuple):
    """The same rows in three dimensions, by one or two methods."""

    views: dict[str, np.ndarray]  # {"UMAP": (n, 3), "PCA": (n, 3)}
    kept: dict[str, float]  # of each row's k nearest neighbours, the share that a view keeps, mean
    k: int
    seconds: float  # that UMAP took
    variance: float = np.nan  # share that the three principal components hold
    ids: np.ndarray | None = None  # of the rows, where they are some of a matrix


def nearest(
    matrix: Matrix,
    ids: ArrayLike,
    k: int,
    backend: CpuBackend,
    *,
    metric: str = "cosine",
    progress: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest rows of the whole matrix to each of some of its rows, itself left out.

    matrix: (vocabulary, width), for cosines also vectors.StoredRows; ids: (n,) of its rows.
    -> (distances, ids), both (n, k)"""
    queries = matrix[np.asarray(ids)]
    options = dict(metric=metric, queries=queries, progress=progress)
    distances, neighbors = backend.neighbors(matrix, k + 1, **options)
    return drop_self(distances, neighbors, ids)


def drop_self(
    distances: ArrayLike, neighbors: ArrayLike, own: ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours of rows that were themselves among the rows searched: each row's own index taken
    out, or the last neighbour where it is not there. (n, k + 1) twice, own: (n,) -> (n, k) twice"""
    mine = np.asarray(neighbors) == np.asarray(own)[:, None]
    mine[~mine.any(axis=1), -1] = True
    left, ids = (
        np.asarray(table)[~mine].reshape(len(mine), -1) for table in (distances, neighbors)
    )
    return left, ids


def neighbor_overlap(first: ArrayLike, second: ArrayLike) -> np.ndarray:
    """Share of each row's neighbours that two tables of indices have in common. (n, k), (n, k) ->
    (n,) in 0 to 1"""
    first, second = np.asarray(first), np.asarray(second)
    if first.shape != second.shape:
        raise EmbeddingError(
            f"Neighbours of the same rows are needed, not {first.shape} and {second.shape}."
        )
    return (first[:, :, None] == second[:, None, :]).any(axis=2).mean(axis=1)


def neighborhood_purity(neighbors: ArrayLike, labels: ArrayLike) -> float:
    """Mean share of each row's neighbours that carry its own label. neighbors: (n, k) indices;
    labels: (n,)"""
    labels = np.asarray(labels)
    return float((labels[np.asarray(neighbors)] == labels[:, None]).mean())


def projections(
    points: np.ndarray,
    neighbors: np.ndarray,
    backend: CpuBackend,
    *,
    n_neighbors: int = 15,
    min_dist: float = 0.1,
    metric: str = "cosine",
    seed: int = 0,
) -> Projections:
    """Rows in three dimensions by UMAP (McInnes et al. 2018) and by PCA. points: (n, width);
    neighbors: (n, k) indices of each row's nearest ones there; n_neighbors, min_dist, metric:
    UMAP's."""
    started = time.perf_counter()
    umap = backend.umap(points, 3, n_neighbors, min_dist, metric, seed)
    seconds = time.perf_counter() - started
    pca, variance = backend.pca(points, 3)
    views, kept, k = {"UMAP": umap, "PCA": pca}, {}, neighbors.shape[1]
    for name, view in views.items():
        low = backend.neighbors(view, k, metric="euclidean")[1]
        kept[name] = float(neighbor_overlap(neighbors, low).mean())
    return Projections(views, kept, k, seconds, float(variance.sum()))


def vocabulary_map(
    matrix: np.ndarray,
    sample: np.ndarray,
    neighbors: np.ndarray,
    backend: CpuBackend,
    *,
    n_neighbors: int = 15,
    min_dist: float = 0.1,
    metric: str = "cosine",
    seed: int = 0,
) -> Projections:
    """UMAP of every row, or of as many at random (and the sample) as `affordable` says; which is
    printed before. sample, neighbors: ids (n,) of some rows and (n, k) of their nearest in the
    matrix, for what the map keeps."""
    count, said = affordable(len(matrix), matrix.shape[1], backend)
    print(said)
    ids, k = np.arange(len(matrix)), neighbors.shape[1]
    if count < len(matrix):
        ids = np.random.default_rng(seed).choice(len(matrix), count, replace=False)
        ids = np.union1d(ids, sample)
        matrix = matrix[ids]
        sample = np.searchsorted(ids, sample)
        neighbors = nearest(matrix, sample, k, backend, progress=False)[1]
    started = time.perf_counter()
    umap = backend.umap(matrix, 3, n_neighbors, min_dist, metric, seed)
    seconds = time.perf_counter() - started
    low = nearest(umap, sample, k, backend, metric="euclidean", progress=False)[1]
    kept = float(neighbor_overlap(neighbors, low).mean())
    return Projections({"UMAP": umap}, {"UMAP": kept}, k, seconds, ids=ids)


def drawn(whole: Projections, most: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """At most so many rows of a map, at random, for a figure: (their ids, their UMAP (n, 3))."""
    assert whole.ids is not None  # vocabulary_map's
    count = len(whole.ids)
    chosen = np.sort(rng.choice(count, min(most, count), replace=False))
    return whole.ids[chosen], whole.views["UMAP"][chosen]


def affordable(
    n: int, width: int, backend: CpuBackend, seconds: float = 600, copies: int = 4
) -> tuple[int, str]:
    """How many of n rows UMAP can take within so many seconds and the device's memory, and a
    sentence with the figures.

    Reckoned as twice the products of all pairs of rows, by this device's speed at such products
    (measured here, some milliseconds), and as `copies` of the rows in memory."""
    rate, free = _products_per_second(width, backend), backend.free_bytes()
    need, reckoned = copies * 4 * n * width, 4 * n * n * width / rate
    count = int(min(n, (seconds * rate / (4 * width)) ** 0.5, free / (copies * 4 * width)))
    said = (
        f"UMAP of {n:,} rows of {width:,}: about {max(1, reckoned):,.0f} s and {need / 1e9:.1f} GB by "
        f"reckoning, {free / 1e9:.1f} GB free"
    )
    if count == n:
        return n, f"{said}."
    return count, f"{said}: more than {seconds:.0f} s or than there is, so {count:,} at random."


def _products_per_second(width, backend):
    """Multiplications and additions per second of a product in single precision."""
    xp = backend.xp
    one, other = xp.ones((512, width), xp.float32), xp.ones((4096, width), xp.float32)
    best = np.inf
    for _ in range(3):  # the first starts libraries
        started = time.perf_counter()
        float((one @ other.T)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * one.shape[0] * other.shape[0] * width / best


def cluster_agreement(
    points: np.ndarray,
    clusterings: Mapping[str, ArrayLike],
    categories: ArrayLike,
    neighbors: np.ndarray,
    rounds: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """How well groups found without the categories agree with them.

    points: (n, width), the space of the silhouette (cosine; Rousseeuw 1987); clusterings: {name:
    (n,) labels, -1 is noise}; categories: (n,) names; neighbors: (n, k) indices in the same space.
    -> DataFrame indexed by (grouping, measure): value, shuffled (mean), shuffled_p95. Groupings:
    "categories" (silhouette and neighbourhood purity of the categories themselves) and each
    clustering (silhouette of its own clusters, adjusted Rand index against the categories, Hubert
    and Arabie 1985; both without noise rows), with its number of clusters and share of noise as
    columns."""
    with uninterrupted():
        from sklearn.metrics import adjusted_rand_score, pairwise_distances, silhouette_score

    codes = pd.factorize(np.asarray(categories))[0]
    distance = np.maximum(pairwise_distances(unit(points), metric="cosine"), 0)
    np.fill_diagonal(distance, 0)
    silhouette = partial(silhouette_score, metric="precomputed")
    purity = partial(neighborhood_purity, neighbors)
    rows = {
        ("categories", "silhouette"): _row(partial(silhouette, distance), codes, rounds, seed),
        ("categories", "purity"): _row(purity, codes, rounds, seed),
    }
    for name, labels in clusterings.items():
        clusters = np.asarray(labels)
        kept = clusters >= 0
        found, noise = clusters[kept], float(1 - kept.mean())
        tight = partial(silhouette, distance[np.ix_(kept, kept)])
        agree = partial(adjusted_rand_score, codes[kept])
        rows[name, "silhouette"] = _row(tight, found, rounds, seed, noise)
        rows[name, "adjusted Rand"] = _row(agree, found, rounds, seed, noise)
    index = pd.MultiIndex.from_tuples(rows, names=["grouping", "measure"])
    return pd.DataFrame(list(rows.values()), index=index)


def _row(measure: Callable, labels, rounds, seed, noise=0.0):
    """A measure of labels beside that of shuffled ones; NaN where one group, or one for each row,
    says nothing."""
    clusters, rng = len(np.unique(labels)), np.random.default_rng(seed)
    value, base = np.nan, [np.nan]
    if 1 < clusters < len(labels):
        base = [measure(rng.permutation(labels)) for _ in range(rounds)]
        value = measure(labels)
    chance = dict(shuffled=np.mean(base), shuffled_p95=np.quantile(base, 0.95))
    return dict(value=value, **chance, clusters=clusters, noise=noise)


def contingency(labels: ArrayLike, categories: ArrayLike) -> pd.DataFrame:
    """How many words of each category are in each cluster: (category x cluster), clusters ordered
    by the category they hold most of, noise last."""
    rows = pd.Series(np.asarray(categories), name="category")
    table = pd.crosstab(rows, pd.Series(labels, name="cluster"))
    most = table.to_numpy().argmax(axis=0)
    order = np.lexsort((-table.max(), most, table.columns < 0))
    return table.iloc[:, order]


def surroundings(words: pd.DataFrame, distances: ArrayLike, neighbors: ArrayLike) -> pd.Series:
    """The words and their nearest neighbours in the vocabulary, each with the category of the word
    it is nearest to.

    words: `word_table`; distances, neighbors: (words, k) from the vocabulary, neighbours as token
    ids. -> categories indexed by token id, ascending: in the order of the words' own, the largest
    first, so that a category has one colour in all figures."""
    category = np.repeat(words.category.to_numpy(), np.shape(neighbors)[1])
    near = {"id": np.ravel(neighbors), "distance": np.ravel(distances), "category": category}
    own = {"id": words.id, "distance": -1.0, "category": words.category}  # a word keeps its own
    every = pd.concat([pd.DataFrame(own), pd.DataFrame(near)])
    every = every.sort_values(["id", "distance"], kind="stable").drop_duplicates("id")
    counts = words.category.value_counts()
    order = sorted(counts.index, key=lambda name: (-counts[name], name))
    return every.set_index("id").category.astype(pd.CategoricalDtype(order, ordered=True))


def network(
    matrix: np.ndarray, categories: pd.Series, k: int, threshold: float, backend: CpuBackend
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The k-NN network of some tokens. categories: of each, indexed by token id (`surroundings`).

    -> nodes (category, named: how many have it among their k nearest, part: number of its
    connected part, 0 the largest), indexed by token id, and edges (`neighbor_edges`)."""
    ids = categories.index.to_numpy()
    distances, near = backend.neighbors(matrix[ids], k)
    edges = neighbor_edges(distances, near, ids, threshold)
    named = np.bincount(near.ravel(), minlength=len(ids))
    nodes = pd.DataFrame({"category": categories, "named": named, "part": components(edges, ids)})
    return nodes, edges


def neighbor_edges(
    distances: ArrayLike, neighbors: ArrayLike, ids: ArrayLike, threshold: float = 0.0
) -> pd.DataFrame:
    """A k-NN network: one undirected edge where either end has the other among its k nearest and
    their cosine is at least `threshold`.

    distances, neighbors: (n, k) from `backend.neighbors(metric="cosine")`; ids: (n,) token ids.
    -> DataFrame (src, dst, cosine, mutual): mutual where each is among the other's k nearest."""
    n, k = np.shape(neighbors)
    ends = np.stack([np.repeat(np.arange(n), k), np.ravel(neighbors)])
    cosine = 1 - np.asarray(distances, np.float64).ravel()
    edges = pd.DataFrame({"src": ends.min(axis=0), "dst": ends.max(axis=0), "cosine": cosine})
    pairs = edges[edges.cosine >= threshold].groupby(["src", "dst"], as_index=False)
    edges = pairs.agg(cosine=("cosine", "max"), mutual=("cosine", "size"))
    ids = np.asarray(ids)
    return edges.assign(src=ids[edges.src], dst=ids[edges.dst], mutual=edges.mutual > 1)


def components(edges: pd.DataFrame, ids: np.ndarray) -> np.ndarray:
    """Connected parts of a network: the number of each node's part, largest part 0. -> (n,)
    int64"""
    with uninterrupted():
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components

    place = pd.Series(np.arange(len(ids)), index=ids)
    ends = (place[edges.src].to_numpy(), place[edges.dst].to_numpy())
    graph = coo_matrix((np.ones(len(edges)), ends), (len(ids), len(ids)))
    labels = connected_components(graph, directed=False)[1]
    order = np.argsort(-np.bincount(labels), kind="stable")
    return np.argsort(order)[labels].astype(np.int64)


def isolated(
    tokens: pd.DataFrame, sample: np.ndarray, distances: np.ndarray, neighbors: np.ndarray
) -> pd.DataFrame:
    """Sampled tokens by the cosine to their nearest neighbour in the vocabulary, the most isolated
    first.

    tokens: `token_table`; sample: (n,) ids; distances, neighbors: (n, k) from `nearest`. ->
    DataFrame (id, piece, nearest_piece, cosine, kind)"""
    cosine = 1 - distances[:, 0]
    found = tokens.loc[sample, ["piece", "kind"]].reset_index()
    found.insert(2, "nearest_piece", tokens.piece[neighbors[:, 0]].to_numpy())
    found.insert(3, "cosine", cosine)
    return found.iloc[np.argsort(cosine)].reset_index(drop=True)


def precision(
    reference: ArrayLike,
    other: ArrayLike,
    reference_neighbors: ArrayLike,
    other_neighbors: ArrayLike,
) -> pd.DataFrame:
    """The same rows from two files. reference, other: (n, width); neighbours: (n, k) indices, each
    in its own file.

    -> DataFrame, one row per token: cosine (of the two rows), relative_error (|difference| /
    |reference|), overlap (share of the k nearest neighbours that stayed)."""
    reference, other = np.asarray(reference), np.asarray(other)
    if reference.shape != other.shape:
        raise EmbeddingError(
            f"Two quantizations of one model have rows of one shape, not {reference.shape} and "
            f"{other.shape}: the files are of different models."
        )
    cosine = (unit(reference).astype(np.float64) * unit(other)).sum(axis=1)
    length = np.linalg.norm(reference, axis=1)
    error = np.linalg.norm(reference - other, axis=1) / np.where(length == 0, 1, length)
    overlap = neighbor_overlap(reference_neighbors, other_neighbors)
    return pd.DataFrame({"cosine": cosine, "relative_error": error, "overlap": overlap})
