"""The CPU half of `backend`, and what both halves check: pandas, NumPy, scikit-learn, umap-learn,
igraph."""

import warnings
from functools import cached_property
from importlib import metadata

import numpy as np

from ..imports import uninterrupted
from ..maths import blocks
from . import layout as graph_layout
from . import nearest


def version(package):
    """The version of a package (also of one built for a CUDA version) without importing it."""
    for name in (package, f"{package}-cu12", f"{package}-cu13", f"{package}-cu11"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "of unknown version"


def _matrix(x, what="x"):
    """x as a C-contiguous float32 matrix (n, width); ValueError where it is not one or holds NaN or
    infinity."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(
            f"{what} must be a matrix (n, width) with at least one row, not of shape {x.shape}"
        )
    whole = [np.isfinite(block).all(axis=1) for _, block in blocks(x)]
    bad = np.flatnonzero(~np.concatenate(whole))
    if len(bad):
        raise ValueError(
            f"{what} has {len(bad)} row(s) with NaN or infinity, the first at {bad[0]}: drop them, for example with "
            f"{what}[np.isfinite({what}).all(axis=1)]"
        )
    return x


def _at_least(n, needed, what):
    if n < needed:
        raise ValueError(
            f"{what} needs at least {needed} rows, but there are {n}: lower it or give more rows"
        )


def _why_alone(x, row, metric):
    """Why UMAP's graph has no edge at a row: umap-learn cuts those of the metric's largest
    distance."""
    if metric in ("cosine", "correlation"):
        x = x - x.mean(axis=1, keepdims=True) if metric == "correlation" else x
        others = nearest.unit_rows(np, x)
        if others[row, -1]:
            return (
                "is all zeros and has no direction"
                if metric == "cosine"
                else "has one value in all columns"
            )
        if np.delete(others @ others[row], row).max() < -0.999:
            return f"is opposite to every other row ({metric} distance 2)"
    return "is as far from every other row as this metric can say"


class CpuBackend:
    """pandas, NumPy, scikit-learn, umap-learn and igraph."""

    name = "cpu"

    def __init__(self, why):
        versions = f"scikit-learn {version('scikit-learn')}, pandas {version('pandas')}"
        self.line = f"analytics on the CPU ({why}): {versions}"

    @cached_property
    def xp(self):
        """The array module: numpy, or cupy on the GPU."""
        return np

    def table(self, frame):
        """A pandas DataFrame as this backend's: itself, or a cuDF DataFrame on the GPU."""
        return frame

    def to_numpy(self, array):
        """A NumPy array from whatever this backend gives."""
        return np.asarray(array)

    def to_device(self, x):
        """A matrix where this backend computes: itself, or a copy of it on the GPU."""
        return x

    def release(self):
        """Give back memory that is kept for the next array: the GPU's, and what of the machine's
        is locked for copies to it."""

    def free_bytes(self):
        """Bytes that an array could take now: of the machine's memory, or of the GPU's."""
        import psutil

        return psutil.virtual_memory().available

    def umap(self, x, n_components=2, n_neighbors=15, min_dist=0.1, metric="cosine", seed=0):
        """UMAP (McInnes, Healy and Melville 2018, arXiv:1802.03426). x: (n, width) -> (n,
        n_components) float32.

        seed=None lets umap-learn use all cores, and the result differs from run to run. ValueError
        if n <= n_neighbors, a row is not finite, or UMAP finds no place for one: it has no edge.
        """
        x = _matrix(x)
        _at_least(len(x), n_neighbors + 1, f"UMAP with n_neighbors={n_neighbors}")
        found = np.asarray(
            self._umap(x, n_components, n_neighbors, min_dist, metric, seed), dtype=np.float32
        )
        lost = np.flatnonzero(~np.isfinite(found).all(axis=1))
        if len(lost):
            raise ValueError(
                f"UMAP with metric={metric!r} has no place for {len(lost)} of {len(x)} rows: "
                + "; ".join(f"row {row} {_why_alone(x, row, metric)}" for row in lost[:5])
                + (f"; and {len(lost) - 5} more" if len(lost) > 5 else "")
                + ". Drop them, or take another metric"
            )
        return found

    def pca(self, x, n):
        """Principal components, each with its largest loading positive.

        x: (m, width) -> (scores (m, n), explained_variance_ratio (n,)), float32.
        """
        x = _matrix(x)
        if not 1 <= n <= min(x.shape):
            raise ValueError(
                f"PCA of a {x.shape[0]} x {x.shape[1]} matrix has 1 to {min(x.shape)} components, not {n}"
            )
        _at_least(len(x), 2, "PCA")
        if not (x != x[0]).any():
            raise ValueError("PCA: all rows are equal, so there is no variance to explain")
        scores, components, ratio = self._pca(x, n)
        sign = np.sign(components[np.arange(n), np.abs(components).argmax(axis=1)])
        return (scores * sign).astype(np.float32), ratio.astype(np.float32)

    def neighbors(self, x, k, metric="cosine", queries=None, progress=False):
        """The k nearest rows of x, exact: candidates from the library, ranked again in double
        precision, so that CPU and GPU agree; equal distances are ordered by index (of more than k +
        8 equal ones, any). Memory is bounded at any n.

        x: (n, width), for cosines also an object with shape, len and rows by slice or ids, all of
        them finite, that is read in blocks; queries: (m, width), or None for the rows of x, each
        without itself.
        metric: "cosine" (1 - cosine; rows of zeros: 1 from all others) or "euclidean".
        -> (distances float32, indices int64), both (m, k)
        """
        if metric not in ("cosine", "euclidean"):
            raise ValueError(f"metric must be 'cosine' or 'euclidean', not {metric!r}")
        own = queries is None
        by_rows = metric == "cosine" and hasattr(x, "shape") and not hasattr(x, "__array__")
        x = x if by_rows else _matrix(x)
        if k < 1:
            raise ValueError(f"k must be at least 1, not {k}")
        _at_least(len(x), k + own, f"{k} nearest neighbours")
        queries = x if own else _matrix(queries, "queries")
        if queries.shape[1] != x.shape[1]:
            raise ValueError(f"queries are {queries.shape[1]} wide, but x is {x.shape[1]} wide")
        found = nearest.search(self, x, queries, k, own, metric == "cosine", progress)
        distances, indices = found  # squared euclidean, double precision
        self.release()
        distances = distances / 2 if metric == "cosine" else np.sqrt(distances)
        return distances.astype(np.float32), indices

    def kmeans(self, x, k, seed=0):
        """k-means, k-means++ start, best of 4 runs. x: (n, width) -> labels (n,) int64, 0 to
        k-1."""
        x = _matrix(x)
        _at_least(len(x), k, f"k-means with k={k}")
        return self._kmeans(x, k, seed).astype(np.int64)

    def classify(self, x, labels, rows, strength=1.0):
        """The labels that logistic regression (L2-regularized, C=strength) made from x gives to
        other rows. Columns are standardized as they are in x; those that do not vary there are
        left out.

        x: (n, width); labels: (n,) whole numbers, two kinds or more; rows: a list of (m, width).
        -> a list of (m,) int64."""
        x = np.asarray(_matrix(x), np.float64)
        spread = x.std(axis=0)
        scale = np.where(spread > 0, spread, np.inf)
        made, *others = ((part - x.mean(axis=0)) / scale for part in (x, *map(_matrix, rows)))
        return [told.astype(np.int64) for told in self._classify(made, labels, others, strength)]

    def hdbscan(self, x, min_cluster_size=15, min_samples=None):
        """HDBSCAN (Campello, Moulavi and Sander 2013), euclidean. x: (n, width) -> labels (n,)
        int64, -1: noise.

        min_samples: a point's core distance is that to its so-manieth nearest point, itself the
        first, as in the paper and in scikit-learn; None: min_cluster_size. Meant for UMAP or PCA
        coordinates: in hundreds of dimensions it takes time with the square of n."""
        x = _matrix(x)
        min_samples = min_cluster_size if min_samples is None else min_samples
        for name, value, least in (
            ("min_cluster_size", min_cluster_size, 2),
            ("min_samples", min_samples, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
            _at_least(len(x), value, f"HDBSCAN with {name}={value}")
        return self._hdbscan(x, min_cluster_size, min_samples).astype(np.int64)

    def layout(self, edges, n_nodes, weights=None, dims=2, seed=0):
        """Node positions by force. edges: (m, 2) ids 0 to n_nodes-1; weights: (m,), larger pulls
        closer.

        -> (n_nodes, dims) float32, centred, the largest distance from the centre 1. igraph:
        Fruchterman and Reingold (1991); cuGraph, where there is one: ForceAtlas2 (Jacomy et al.
        2014), dims=2 and parts of 1,000 nodes or more."""
        return graph_layout.layout(edges, n_nodes, weights, dims, seed, self._force)

    def pagerank(self, edges, n_nodes, weights=None, directed=True):
        """PageRank, damping 0.85. edges: (m, 2), weights: (m,) -> (n_nodes,) float64 that sums to
        1."""
        return graph_layout.pagerank(edges, n_nodes, weights, directed)

    def betweenness(self, edges, n_nodes, directed=False):
        """Betweenness (Freeman 1977) as a share of all pairs, unweighted. edges: (m, 2) ->
        (n_nodes,) in 0 to 1."""
        return graph_layout.betweenness(edges, n_nodes, directed)

    # What differs between the backends: the libraries' calls, on checked float32 matrices.

    def _force(self, graph, dims, seed):
        return graph_layout.igraph_force(graph, dims, seed)

    def _umap(self, x, n_components, n_neighbors, min_dist, metric, seed):
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message=".*tensorflow.*|.*Tensorflow.*", category=ImportWarning
            )
            warnings.filterwarnings(
                "ignore", message=".*vertices were disconnected"
            )  # refused in `umap`
            with uninterrupted():
                from umap import UMAP

            # Below n_components + 2 rows the spectral start has no room.
            return UMAP(
                n_components=n_components,
                n_neighbors=n_neighbors,
                min_dist=min_dist,
                metric=metric,
                random_state=seed,
                n_jobs=-1 if seed is None else 1,
                init="spectral" if len(x) > n_components + 2 else "random",
            ).fit_transform(x)

    def _pca(self, x, n):
        with uninterrupted():
            from sklearn.decomposition import PCA

        model = PCA(n, random_state=0)
        scores = model.fit_transform(x)
        return scores, model.components_, model.explained_variance_ratio_

    def _kmeans(self, x, k, seed):
        with uninterrupted():
            from sklearn.cluster import KMeans

        return KMeans(k, n_init=4, random_state=seed).fit_predict(x)

    def _classify(self, x, labels, rows, strength):
        with uninterrupted():
            from sklearn.linear_model import LogisticRegression
            from threadpoolctl import threadpool_limits  # scikit-learn's

        with threadpool_limits(1, "blas"):  # products this small only wait for their threads
            model = LogisticRegression(C=strength, max_iter=1000).fit(x, labels)
            return [model.predict(part) for part in rows]

    def _hdbscan(self, x, min_cluster_size, min_samples):
        with uninterrupted():
            from sklearn.cluster import HDBSCAN

        return HDBSCAN(
            min_cluster_size=min_cluster_size, min_samples=min_samples, copy=True
        ).fit_predict(x)
