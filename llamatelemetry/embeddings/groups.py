"""Groups of embeddings: clusters against categories, neighbourhoods, k-NN networks, two precisions
of the same rows.

Neighbour indices come from `backend.neighbors`; every agreement is shown beside what shuffled
labels give."""

import numpy as np
import pandas as pd

from ..errors import EmbeddingError
from ..maths import unit


def neighborhood_purity(neighbors, labels):
    """Mean share of each row's neighbours that carry its own label. neighbors: (n, k) indices;
    labels: (n,) -> float"""
    labels = np.asarray(labels)
    return float((labels[neighbors] == labels[:, None]).mean())


def neighbor_overlap(first, second):
    """Share of each row's neighbours that two tables of indices have in common. (n, k), (n, k) ->
    (n,) in 0 to 1"""
    first, second = np.asarray(first), np.asarray(second)
    if first.shape != second.shape:
        raise EmbeddingError(
            f"Neighbours of the same rows are needed, not {first.shape} and {second.shape}."
        )
    return (first[:, :, None] == second[:, None, :]).any(axis=2).mean(axis=1)


def drop_self(distances, neighbors, own):
    """Neighbours of rows that were themselves among the rows searched: each row's own index taken
    out, or the last neighbour where it is not there. (n, k + 1) twice, own: (n,) -> (n, k) twice"""
    mine = np.asarray(neighbors) == np.asarray(own)[:, None]
    mine[~mine.any(axis=1), -1] = True
    return tuple(
        np.asarray(values)[~mine].reshape(len(mine), -1) for values in (distances, neighbors)
    )


def shuffled(measure, labels, rounds=200, seed=0):
    """What `measure(labels)` gives for shuffled labels: (rounds,) float64."""
    rng = np.random.default_rng(seed)
    return np.array([measure(rng.permutation(labels)) for _ in range(rounds)])


def cluster_agreement(points, clusterings, categories, neighbors, rounds=200, seed=0):
    """How well groups found without the categories agree with them.

    points: (n, width), the space of the silhouette (cosine; Rousseeuw 1987); clusterings: {name:
    (n,) labels, -1 is noise}; categories: (n,) names; neighbors: (n, k) indices in the same space.
    -> DataFrame indexed by (grouping, measure): value, shuffled (mean), shuffled_p95. Groupings:
    "categories" (silhouette and neighbourhood purity of the categories themselves) and each
    clustering (silhouette of its own clusters, adjusted Rand index against the categories, Hubert
    and Arabie 1985; both without noise rows), with its number of clusters and share of noise as
    columns."""
    from sklearn.metrics import (
        adjusted_rand_score,
        pairwise_distances,
        silhouette_score,
    )

    categories = pd.factorize(np.asarray(categories))[0]
    distance = np.maximum(pairwise_distances(unit(points), metric="cosine"), 0)
    np.fill_diagonal(distance, 0)
    rows = []

    def add(grouping, name, measure, labels, clusters, noise):
        fine = (
            1 < len(np.unique(labels)) < len(labels)
        )  # else neither silhouette nor Rand index says anything
        base = shuffled(measure, labels, rounds, seed) if fine else [np.nan]
        value = measure(labels) if fine else np.nan
        rows.append(
            (grouping, name, value, np.mean(base), np.quantile(base, 0.95), clusters, noise)
        )

    def silhouette(distances):
        return lambda labels: float(silhouette_score(distances, labels, metric="precomputed"))

    count = len(np.unique(categories))
    add("categories", "silhouette", silhouette(distance), categories, count, 0.0)
    add(
        "categories",
        "purity",
        lambda labels: neighborhood_purity(neighbors, labels),
        categories,
        count,
        0.0,
    )
    for name, labels in clusterings.items():
        kept = np.asarray(labels) >= 0
        found, noise = np.asarray(labels)[kept], float(1 - kept.mean())
        count = len(np.unique(found))
        add(name, "silhouette", silhouette(distance[np.ix_(kept, kept)]), found, count, noise)
        add(
            name,
            "adjusted Rand",
            lambda chosen: adjusted_rand_score(categories[kept], chosen),
            found,
            count,
            noise,
        )
    columns = ["grouping", "measure", "value", "shuffled", "shuffled_p95", "clusters", "noise"]
    return pd.DataFrame(rows, columns=columns).set_index(["grouping", "measure"])


def contingency(labels, categories):
    """How many words of each category are in each cluster: DataFrame (category x cluster), clusters
    ordered by the category they hold most of, noise last."""
    table = pd.crosstab(
        pd.Series(np.asarray(categories), name="category"), pd.Series(labels, name="cluster")
    )
    order = sorted(
        table.columns,
        key=lambda c: (c < 0, int(table[c].to_numpy().argmax()), -int(table[c].max())),
    )
    return table[order]


def neighbor_edges(distances, neighbors, ids, threshold=0.0):
    """A k-NN network: one undirected edge where either end has the other among its k nearest and
    their cosine is at least `threshold`.

    distances, neighbors: (n, k) from `backend.neighbors(metric="cosine")`; ids: (n,) token ids.
    -> DataFrame (src, dst, cosine, mutual): mutual where each is among the other's k nearest.
    """
    n, k = np.shape(neighbors)
    src, dst = np.repeat(np.arange(n), k), np.asarray(neighbors).ravel()
    edges = pd.DataFrame(
        {
            "src": np.minimum(src, dst),
            "dst": np.maximum(src, dst),
            "cosine": 1 - np.asarray(distances, np.float64).ravel(),
        }
    )
    edges = edges[edges.cosine >= threshold]
    edges = edges.groupby(["src", "dst"], as_index=False).agg(
        cosine=("cosine", "max"), mutual=("cosine", "size")
    )
    edges["mutual"] = edges.mutual > 1
    ids = np.asarray(ids)
    return edges.assign(src=ids[edges.src], dst=ids[edges.dst])


def surroundings(words, distances, neighbors):
    """The words and their nearest neighbours in the vocabulary, each with the category of the word
    it is nearest to.

    words: `word_table`; distances, neighbors: (words, k) from the vocabulary, neighbours as token
    ids. -> Series of categories indexed by token id, ascending."""
    near = pd.DataFrame(
        {
            "id": np.ravel(neighbors),
            "distance": np.ravel(distances),
            "category": np.repeat(words.category.to_numpy(), np.shape(neighbors)[1]),
        }
    )
    own = pd.DataFrame(
        {"id": words.id, "distance": -1.0, "category": words.category}
    )  # a word keeps its own
    every = (
        pd.concat([own, near]).sort_values(["id", "distance"], kind="stable").drop_duplicates("id")
    )
    return every.set_index("id").category


def components(edges, ids):
    """Connected parts of a network: the number of each node's part, largest part 0. -> (n,)
    int64"""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    place = pd.Series(np.arange(len(ids)), index=np.asarray(ids))
    shape = (len(ids), len(ids))
    graph = coo_matrix(
        (np.ones(len(edges)), (place[edges.src].to_numpy(), place[edges.dst].to_numpy())), shape
    )
    labels = connected_components(graph, directed=False)[1]
    order = np.argsort(-np.bincount(labels), kind="stable")
    return np.argsort(order)[labels].astype(np.int64)


def precision(reference, other, reference_neighbors, other_neighbors):
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
    return pd.DataFrame(
        {
            "cosine": cosine,
            "relative_error": error,
            "overlap": neighbor_overlap(reference_neighbors, other_neighbors),
        }
    )
