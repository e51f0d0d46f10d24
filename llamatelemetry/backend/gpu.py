"""The GPU half of `backend`: imported, and RAPIDS with it, only once a GPU backend is asked for."""

import importlib.util
from functools import cached_property

import numpy as np

from ..errors import GpuError
from . import layout
from .base import CpuBackend, _unit_rows

RAPIDS = ("cupy", "cudf", "cuml")
CUGRAPH_FROM = 1000  # nodes of a component
_CUML_MIN_SAMPLES = 1023  # the most that cuML's HDBSCAN takes; the least is 1


def _import_cugraph():
    """(the module or None, what the layouts are made by): the rest of RAPIDS is worth having
    without it."""
    if importlib.util.find_spec("cugraph") is None:
        return None, "igraph (cuGraph is not installed)"
    try:
        import cugraph
    except (
        Exception
    ) as error:  # it brings communication libraries of its own that may not load: OSError
        return None, f"igraph (cuGraph does not load: {type(error).__name__}: {error})"
    return cugraph, "cuGraph"


class GpuBackend(CpuBackend):
    """cuDF, CuPy and cuML (25.x and 26.x) on the analytics GPU; cuGraph where it is installed, else
    igraph."""

    name = "gpu"

    def __init__(self, why):
        missing = [package for package in RAPIDS if importlib.util.find_spec(package) is None]
        if missing:
            raise GpuError(
                f"RAPIDS is incomplete: {', '.join(missing)} not installed. "
                "Install llamatelemetry[rapids] on a machine with an NVIDIA GPU, or use backend='cpu'"
            )
        from ..gpus import devices

        # CUDA_VISIBLE_DEVICES must be set before anything below touches CUDA.
        if devices.assign_analytics() is None:
            raise GpuError(
                "RAPIDS is installed, but there is no NVIDIA GPU. Turn one on, or use backend='cpu'"
            )
        try:
            import cudf
            import cuml
            import cupy

            device = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()
            cupy.arange(2).sum().item()  # a driver too old for this CuPy shows here
        except (
            Exception
        ) as error:  # a failed import of a CUDA library is as often a RuntimeError or an OSError
            reason = f"RAPIDS does not work here: {type(error).__name__}: {error}"
            raise GpuError(f"{reason}. Mend that, or use backend='cpu'") from error
        self._cupy, self._cudf = cupy, cudf
        self._cugraph, graphs = _import_cugraph()
        versions = f"cuML {cuml.__version__}, cuDF {cudf.__version__}"
        self.line = f"analytics on {device} ({why}): {versions}, layouts by {graphs}"

    @cached_property
    def xp(self):
        return self._cupy

    def table(self, frame):
        return self._cudf.from_pandas(frame)

    def to_numpy(self, array):
        if hasattr(array, "to_pandas"):  # cuDF
            return array.to_pandas().to_numpy()
        return self._cupy.asnumpy(array)

    def _force(self, graph, dims, seed):
        n = graph.vcount()
        if (
            self._cugraph is None or dims != 2 or n < CUGRAPH_FROM
        ):  # igraph is done before the GPU has started on a few
            return super()._force(graph, dims, seed)
        edges = np.asarray(graph.get_edgelist(), dtype=np.int32)
        frame = {"src": edges[:, 0], "dst": edges[:, 1], "weight": np.ones(len(edges), np.float32)}
        if "weight" in graph.es.attributes():
            frame["weight"] = np.asarray(graph.es["weight"], dtype=np.float32)
        whole = self._cugraph.Graph()
        whole.from_cudf_edgelist(self._cudf.DataFrame(frame), "src", "dst", edge_attr="weight")
        start = layout.start_positions(n, 2, seed).astype(np.float32)
        start = self._cudf.DataFrame(
            {"vertex": np.arange(n, dtype=np.int32), "x": start[:, 0], "y": start[:, 1]}
        )
        found = self._cugraph.force_atlas2(whole, max_iter=500, pos_list=start).to_pandas()
        return found.set_index("vertex").loc[np.arange(n), ["x", "y"]].to_numpy(dtype=np.float64)

    def _umap(self, x, n_components, n_neighbors, min_dist, metric, seed):
        from cuml.manifold import UMAP

        if metric == "cosine" and not x.any(axis=1).all():
            x = _unit_rows(
                x
            )  # cuML divides rows of zeros by their length; umap-learn puts them at 1 from the others
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

        model = NearestNeighbors(
            n_neighbors=count, algorithm="brute", metric="euclidean", output_type="cupy"
        )
        model.fit(self._cupy.asarray(x))
        return lambda rows: model.kneighbors(rows, return_distance=False)

    def _kmeans(self, x, k, seed):
        from cuml.cluster import KMeans

        # cuML's default start is k-means||, k-means++ its case without oversampling; its tolerance
        # is absolute, that of scikit-learn in units of the variance.
        tolerance = float(1e-4 * x.var(axis=0, dtype=np.float64).mean()) or 1e-12
        model = KMeans(
            n_clusters=k,
            n_init=4,
            random_state=seed,
            oversampling_factor=0.0,
            tol=tolerance,
            output_type="numpy",
        )
        return model.fit_predict(x)

    def _hdbscan(self, x, min_cluster_size, min_samples):
        from cuml.cluster import HDBSCAN

        # cuML counts a point's neighbours without the point itself, scikit-learn and the paper with
        # it.
        neighbours = min_samples - 1
        if not 1 <= neighbours <= _CUML_MIN_SAMPLES:
            return super()._hdbscan(x, min_cluster_size, min_samples)
        model = HDBSCAN(
            min_cluster_size=min_cluster_size, min_samples=neighbours, output_type="numpy"
        )
        return np.asarray(model.fit_predict(x))
