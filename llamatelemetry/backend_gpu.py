"""The GPU half of `backend`: imported, and RAPIDS with it, only once a GPU backend is asked for."""

import importlib.util
from functools import cached_property

import numpy as np

from .analysis import layout as graph_layout
from .backend import CpuBackend
from .errors import GpuError

RAPIDS = ("cupy", "cudf", "cuml")
CUGRAPH_FROM = 1000  # nodes of a component


class GpuBackend(CpuBackend):
    """cuDF, CuPy and cuML (25.x and 26.x) on the analytics GPU; cuGraph where it is installed, else igraph."""

    name = "gpu"

    def __init__(self, why):
        missing = [package for package in RAPIDS if importlib.util.find_spec(package) is None]
        if missing:
            raise GpuError(
                f"RAPIDS is incomplete: {', '.join(missing)} not installed. "
                "Install llamatelemetry[rapids] on a machine with an NVIDIA GPU, or use backend='cpu'"
            )
        from . import gpus

        # CUDA_VISIBLE_DEVICES must be set before anything below touches CUDA.
        if gpus.assign_analytics() is None:
            raise GpuError("RAPIDS is installed, but there is no NVIDIA GPU. Turn one on, or use backend='cpu'")
        try:
            import cudf
            import cuml
            import cupy

            device = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()
            cupy.arange(2).sum().item()  # a driver too old for this CuPy shows here
        except Exception as error:  # a failed import of a CUDA library is as often a RuntimeError or an OSError
            reason = f"RAPIDS does not work here: {type(error).__name__}: {error}"
            raise GpuError(f"{reason}. Mend that, or use backend='cpu'") from error
        self._cupy, self._cudf = cupy, cudf
        graphs = "cuGraph" if self._cugraph else "igraph (cuGraph is not installed)"
        versions = f"cuML {cuml.__version__}, cuDF {cudf.__version__}"
        self.line = f"analytics on {device} ({why}): {versions}, layouts by {graphs}"

    @cached_property
    def xp(self):
        return self._cupy

    @cached_property
    def _cugraph(self):
        if importlib.util.find_spec("cugraph") is None:
            return None
        import cugraph

        return cugraph

    def table(self, frame):
        return self._cudf.from_pandas(frame)

    def to_numpy(self, array):
        if hasattr(array, "to_pandas"):  # cuDF
            return array.to_pandas().to_numpy()
        return self._cupy.asnumpy(array)

    def layout(self, edges, n_nodes, weights=None, dims=2, seed=0):
        force = self._force_atlas2 if self._cugraph is not None and dims == 2 else None
        return graph_layout.layout(edges, n_nodes, weights, dims, seed, force)

    def _force_atlas2(self, graph, dims, seed):
        """One component: cuGraph for a large one; a small one is placed before the GPU has started on it."""
        n = graph.vcount()
        if n < CUGRAPH_FROM:
            return graph_layout.igraph_force(graph, dims, seed)
        weights = np.asarray(graph.es["weight"]) if "weight" in graph.es.attributes() else None
        start = graph_layout.start_positions(n, 2, seed).astype(np.float32)
        start = self._cudf.DataFrame({"vertex": np.arange(n, dtype=np.int32), "x": start[:, 0], "y": start[:, 1]})
        whole = self._graph(np.asarray(graph.get_edgelist()), n, weights)
        found = self._cugraph.force_atlas2(whole, max_iter=500, pos_list=start).to_pandas()
        return found.set_index("vertex").loc[np.arange(n), ["x", "y"]].to_numpy(dtype=np.float64)

    def pagerank(self, edges, n_nodes, weights=None, directed=True):
        edges, weights = graph_layout.check_edges(edges, n_nodes, weights)
        if self._cugraph is None or len(edges) == 0:
            return super().pagerank(edges, n_nodes, weights, directed)
        graph = self._graph(edges, n_nodes, weights, directed)
        found = self._cugraph.pagerank(graph, alpha=0.85, tol=1e-9, max_iter=1000).to_pandas()
        return found.set_index("vertex")["pagerank"].reindex(np.arange(n_nodes)).to_numpy()

    def betweenness(self, edges, n_nodes, directed=False):
        edges, _ = graph_layout.check_edges(edges, n_nodes)
        if self._cugraph is None or len(edges) == 0:
            return super().betweenness(edges, n_nodes, directed)
        found = self._cugraph.betweenness_centrality(self._graph(edges, n_nodes, None, directed), normalized=True)
        found = found.to_pandas().set_index("vertex")["betweenness_centrality"]
        return found.reindex(np.arange(n_nodes)).fillna(0).to_numpy()

    def _graph(self, edges, n_nodes, weights=None, directed=False):
        frame = self._cudf.DataFrame({"src": edges[:, 0].astype(np.int32), "dst": edges[:, 1].astype(np.int32)})
        if weights is not None:
            frame["weight"] = weights.astype(np.float32)
        graph = self._cugraph.Graph(directed=directed)
        vertices = self._cudf.Series(np.arange(n_nodes, dtype=np.int32))
        graph.from_cudf_edgelist(
            frame, "src", "dst", edge_attr=None if weights is None else "weight", renumber=True, vertices=vertices
        )
        return graph

    def _umap(self, x, n_components, n_neighbors, min_dist, metric, seed):
        from cuml.manifold import UMAP

        model = UMAP(
            n_components=n_components,
            n_neighbors=n_neighbors,
            min_dist=min_dist,
            metric=metric,
            random_state=seed,
            init="spectral" if len(x) > n_components + 2 else "random",
            output_type="numpy",
        )
        return model.fit_transform(x)

    def _pca(self, x, n):
        from cuml.decomposition import PCA

        model = PCA(n_components=n, output_type="numpy")
        scores = model.fit_transform(x)
        return scores, model.components_, model.explained_variance_ratio_

    def _search(self, x, count):
        from cuml.neighbors import NearestNeighbors

        model = NearestNeighbors(n_neighbors=count, algorithm="brute", metric="euclidean", output_type="cupy")
        model.fit(self._cupy.asarray(x))
        return lambda rows: model.kneighbors(rows, return_distance=False)

    def _kmeans(self, x, k, seed):
        from cuml.cluster import KMeans

        return KMeans(n_clusters=k, n_init=4, random_state=seed, output_type="numpy").fit_predict(x)

    def _hdbscan(self, x, min_cluster_size, min_samples):
        from cuml.cluster import HDBSCAN

        model = HDBSCAN(min_cluster_size=min_cluster_size, min_samples=min_samples, output_type="numpy")
        return np.asarray(model.fit_predict(x))
