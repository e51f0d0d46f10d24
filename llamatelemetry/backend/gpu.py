"""The GPU half of `backend`: imported once a GPU backend is asked for; of RAPIDS then CuPy alone,
and cuDF, cuML and cuGraph, which take seconds each, where they are first used."""

import importlib.util
import warnings
from functools import cached_property

import numpy as np

from ..errors import GpuError
from ..maths import blocks
from . import layout
from .base import CpuBackend, version
from .nearest import unit_rows

RAPIDS = ("cupy", "cudf", "cuml")
CUGRAPH_FROM = 1000  # nodes of a component
_CLASSIFY = 1 << 20  # values: a fit of fewer takes cuML 31 ms (H100), scikit-learn 9 (one core)
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


def _loaded(name):
    """A module of RAPIDS, or GpuError: a failed import of a CUDA library is as often a RuntimeError
    or an OSError."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise _broken(error) from error


def _broken(error):
    reason = f"RAPIDS does not work here: {type(error).__name__}: {error}"
    return GpuError(f"{reason}. Mend that, or use backend='cpu'")


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
        cupy = _loaded("cupy")
        try:
            device = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()
            cupy.arange(2).sum().item()  # a driver too old for this CuPy shows here
        except Exception as error:
            raise _broken(error) from error
        graphs = "cuGraph" if importlib.util.find_spec("cugraph") else _import_cugraph()[1]
        versions = f"cuML {version('cuml')}, cuDF {version('cudf')}"
        self.line = f"analytics on {device} ({why}): {versions}, layouts by {graphs}"

    @cached_property
    def xp(self):
        return _loaded("cupy")

    @cached_property
    def _cudf(self):
        return _loaded("cudf")

    @cached_property
    def _cugraph(self):
        module, made_by = _import_cugraph()
        if module is None and importlib.util.find_spec("cugraph"):
            warnings.warn(f"Layouts are made by {made_by}.", stacklevel=4)
        return module

    def table(self, frame):
        return self._cudf.from_pandas(frame)

    def to_numpy(self, array):
        if hasattr(array, "to_pandas"):  # cuDF
            return array.to_pandas().to_numpy()
        return self.xp.asnumpy(array)

    def to_device(self, x):
        # By blocks and by `set`: asarray copies the whole into page-locked memory first, and keeps
        # that.
        there = self.xp.empty(x.shape, self.xp.float32)
        for start, block in blocks(x):
            there[start : start + len(block)].set(np.ascontiguousarray(block, dtype=np.float32))
        return there

    def release(self):
        self.xp.get_default_memory_pool().free_all_blocks()  # cuML takes its memory elsewhere
        self.xp.get_default_pinned_memory_pool().free_all_blocks()

    def free_bytes(self):
        self.release()
        return self.xp.cuda.runtime.memGetInfo()[0]

    def _force(self, graph, dims, seed):
        n = graph.vcount()
        # igraph is done before the GPU has started on a few
        if dims != 2 or n < CUGRAPH_FROM or self._cugraph is None:
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
        UMAP = _loaded("cuml.manifold").UMAP

        x = self.to_device(x)
        if metric == "cosine" and not x.any(axis=1).all():
            # cuML divides rows of zeros by their length; umap-learn puts them at 1 from the others
            x = unit_rows(self.xp, x)
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
        PCA = _loaded("cuml.decomposition").PCA

        model = PCA(n_components=n, output_type="numpy")
        scores = model.fit_transform(x)
        return scores, model.components_, model.explained_variance_ratio_

    def _kmeans(self, x, k, seed):
        KMeans = _loaded("cuml.cluster").KMeans

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

    def _classify(self, x, labels, rows, strength):
        if x.size < _CLASSIFY:
            return super()._classify(x, labels, rows, strength)
        LogisticRegression = _loaded("cuml.linear_model").LogisticRegression

        model = LogisticRegression(C=strength, max_iter=1000, output_type="numpy")
        model.fit(x.astype(np.float32), np.asarray(labels, np.float32))
        return [np.asarray(model.predict(part.astype(np.float32))) for part in rows]

    def _hdbscan(self, x, min_cluster_size, min_samples):
        HDBSCAN = _loaded("cuml.cluster").HDBSCAN

        # cuML counts a point's neighbours without the point itself, scikit-learn and the paper with
        # it.
        neighbours = min_samples - 1
        if not 1 <= neighbours <= _CUML_MIN_SAMPLES:
            return super()._hdbscan(x, min_cluster_size, min_samples)
        model = HDBSCAN(
            min_cluster_size=min_cluster_size, min_samples=neighbours, output_type="numpy"
        )
        return np.asarray(model.fit_predict(x))
