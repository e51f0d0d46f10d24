"""backend/ : planted clusters and neighbours, numpy's answers, and what is refused."""

import importlib.util
import sys
import types

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import make_blobs
from sklearn.manifold import trustworthiness
from sklearn.metrics import adjusted_rand_score

from llamatelemetry import maths
from llamatelemetry.backend import get_backend, nearest
from llamatelemetry.backend.gpu import GpuBackend, _import_cugraph
from llamatelemetry.backend.layout import layout, pack_discs
from llamatelemetry.errors import GpuError
from llamatelemetry.gpus import devices

RAPIDS_HERE = all(importlib.util.find_spec(name) for name in ("cupy", "cudf", "cuml"))
cpu = get_backend("cpu")


@pytest.fixture
def fresh():
    """get_backend without what earlier tests chose."""
    get_backend.cache_clear()
    yield
    get_backend.cache_clear()


needs_rapids = [
    pytest.mark.gpu,
    pytest.mark.skipif(not RAPIDS_HERE, reason="no RAPIDS on this machine"),
]


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=needs_rapids)])
def backend(request):
    return get_backend(request.param)


def planted(per_cluster=40, clusters=4, width=32, seed=0):
    """Clusters around random directions: (n, width) float32 and the labels."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(clusters), per_cluster)
    centres = rng.normal(size=(clusters, width)) * 4
    return (centres[labels] + rng.normal(size=(len(labels), width))).astype(np.float32), labels


def brute_force(x, queries, k, metric, own):
    """Neighbours by the definition, in double precision; ties by index."""
    x, queries = x.astype(np.float64), queries.astype(np.float64)
    if metric == "cosine":
        unit = lambda a: a / np.linalg.norm(a, axis=1, keepdims=True)  # noqa: E731
        distance = 1 - unit(queries) @ unit(x).T
    else:
        distance = np.linalg.norm(queries[:, None] - x[None], axis=2)
    if own:
        np.fill_diagonal(distance, np.inf)
    order = np.argsort(distance, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distance, order, axis=1), order


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("with_queries", [False, True])
def test_neighbors_are_those_of_the_definition(backend, metric, with_queries):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(150, 24)).astype(np.float32)
    queries = rng.normal(size=(17, 24)).astype(np.float32) if with_queries else None
    distances, indices = backend.neighbors(x, 5, metric=metric, queries=queries)
    expected = brute_force(x, x if queries is None else queries, 5, metric, queries is None)
    np.testing.assert_array_equal(indices, expected[1])
    np.testing.assert_allclose(distances, expected[0], atol=2e-6)
    assert distances.dtype == np.float32 and indices.dtype == np.int64


def test_planted_pairs_find_each_other(backend):
    rng = np.random.default_rng(2)
    first = rng.normal(size=(60, 48))
    x = np.empty((120, 48), dtype=np.float32)
    x[0::2], x[1::2] = (
        first,
        first * 3 + rng.normal(size=first.shape) * 1e-3,
    )  # same direction, other length
    _, indices = backend.neighbors(x, 1)
    np.testing.assert_array_equal(indices[:, 0], np.arange(120) ^ 1)


def test_neighbors_order_ties_by_index_and_leave_out_only_the_row_itself(backend):
    x = np.tile(np.array([[1.0, 0.0]], dtype=np.float32), (30, 1))  # 30 copies: every distance is 0
    distances, indices = backend.neighbors(x, 3)
    assert (distances == 0).all()
    for row, found in enumerate(indices):
        assert row not in found and len(set(found)) == 3


def test_rows_of_zeros_are_far_from_every_row_that_is_not(backend):
    x = np.array([[0, 0], [0, 0], [1, 0], [-1, 0]], dtype=np.float32)
    distances, indices = backend.neighbors(x, 3)
    np.testing.assert_array_equal(indices[0], [1, 2, 3])
    np.testing.assert_allclose(distances[0], [0, 1, 1], atol=1e-6)
    np.testing.assert_array_equal(indices[2], [0, 1, 3])
    np.testing.assert_allclose(distances[2], [1, 1, 2], atol=1e-6)


def test_neighbors_do_not_depend_on_the_block(backend, monkeypatch):
    x, _ = planted()
    whole = backend.neighbors(x, 4)
    monkeypatch.setattr(nearest, "_BLOCK", 7 * 13 * 33)  # 7 rows at a time
    for a, b in zip(whole, backend.neighbors(x, 4)):
        np.testing.assert_array_equal(a, b)


def test_pca_is_that_of_the_covariance(backend):
    rng = np.random.default_rng(3)
    x = (rng.normal(size=(200, 6)) * [5, 3, 2, 1, 0.5, 0.1] + 7).astype(np.float32)
    scores, ratio = backend.pca(x, 3)
    values, vectors = np.linalg.eigh(np.cov(x.T.astype(np.float64)))
    values, vectors = values[::-1], vectors[:, ::-1]
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(6)])
    np.testing.assert_allclose(ratio, values[:3] / values.sum(), rtol=1e-4)
    np.testing.assert_allclose(scores, ((x - x.mean(axis=0)) @ vectors)[:, :3], atol=2e-3)


def test_pca_of_an_orthogonal_matrix_spreads_the_variance_evenly(backend):
    x = np.vstack([np.eye(8), -np.eye(8)]).astype(np.float32)  # centred, every direction alike
    np.testing.assert_allclose(backend.pca(x, 8)[1], np.full(8, 1 / 8), rtol=1e-4)


def test_kmeans_finds_planted_clusters(backend):
    x, labels = planted()
    found = backend.kmeans(x, 4)
    assert adjusted_rand_score(labels, found) == 1.0 and set(found) == set(range(4))


def test_classify_tells_planted_labels_of_rows_that_it_has_not_seen(backend):
    """Also where a column does not vary, and of more than two kinds."""
    x, labels = planted()
    x = np.hstack([x, np.ones((len(x), 1), np.float32)])
    told, same = backend.classify(x[::2], labels[::2], [x[1::2], x[::2]], 0.5)
    np.testing.assert_array_equal(told, labels[1::2])
    np.testing.assert_array_equal(same, labels[::2])
    assert told.dtype == np.int64
    with pytest.raises(ValueError, match="NaN"):
        backend.classify(x[::2], labels[::2], [np.full_like(x, np.nan)])


def test_hdbscan_finds_planted_clusters_and_noise(backend):
    x, labels = make_blobs(
        n_samples=[80, 80, 80], centers=[[0, 0], [10, 0], [0, 10]], cluster_std=0.5, random_state=0
    )
    x = np.vstack([x, [[60, 60], [-60, 50], [50, -70]]])
    found = backend.hdbscan(x, min_cluster_size=10)
    # cuML 26.10 gave one of the three lone points to the nearest cluster (H200, 2026-11-23);
    # scikit-learn none.
    assert (found[-3:] == -1).sum() >= (2 if backend.name == "gpu" else 3)
    kept = found[:-3] >= 0
    assert kept.mean() > 0.9 and adjusted_rand_score(labels[kept], found[:-3][kept]) == 1.0


def test_min_samples_counts_the_point_itself(backend):
    corners = np.array([[0, 0], [1, 0], [0, 1], [10, 10], [11, 10], [10, 11]])
    # Each point has two near ones: three with itself. A fourth is 13 away, and then no triple
    # stands out.
    for min_samples in (None, 2, 3):
        assert backend.hdbscan(corners, 3, min_samples).tolist() in (
            [0, 0, 0, 1, 1, 1],
            [1, 1, 1, 0, 0, 0],
        )
    assert (backend.hdbscan(corners, 3, 4) == -1).all()


@pytest.mark.parametrize(
    "min_samples, given", [(None, 9), (2, 1), (10, 9), (1024, 1023), (1, None), (1025, None)]
)
def test_min_samples_is_translated_for_cuml(monkeypatch, min_samples, given):
    asked = []

    class Model:  # cuML's: counts without the point itself, 1 to 1023
        def __init__(self, min_cluster_size, min_samples, output_type):
            asked.append(min_samples)

        def fit_predict(self, x):
            return np.zeros(len(x), int)

    monkeypatch.setitem(sys.modules, "cuml", types.ModuleType("cuml"))
    monkeypatch.setitem(sys.modules, "cuml.cluster", types.SimpleNamespace(HDBSCAN=Model))
    x, _ = planted(per_cluster=300)
    found = GpuBackend.__new__(GpuBackend).hdbscan(x, 10, min_samples)
    if given is None:  # what cuML has no word for is computed by scikit-learn
        np.testing.assert_array_equal(found, cpu.hdbscan(x, 10, min_samples))
    assert asked == ([] if given is None else [given])


def noisy_clusters():
    rng = np.random.default_rng(0)
    centres = np.array([[0, 0], [6, 0], [0, 7], [9, 9]])
    x = np.vstack(
        [
            centre + rng.normal(size=(60, 2)) * spread
            for centre, spread in zip(centres, (0.5, 0.8, 1.1, 1.4))
        ]
    )
    return np.vstack([x, rng.uniform(-10, 20, size=(40, 2))]).astype(np.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not RAPIDS_HERE, reason="no RAPIDS")
@pytest.mark.parametrize("min_samples", [None, 1, 2, 3, 5, 10, 15, 30])
def test_cpu_and_gpu_cluster_alike_for_one_min_samples(min_samples):
    x = noisy_clusters()
    ours, theirs = cpu.hdbscan(x, 15, min_samples), get_backend("gpu").hdbscan(x, 15, min_samples)
    # Not every point: cuML's tree is not always the least one (0.949 to 1 with cuML 26.10; the next
    # test has an exact one).
    assert set(ours) == set(theirs) and adjusted_rand_score(ours, theirs) > 0.9


@pytest.mark.gpu
@pytest.mark.skipif(not RAPIDS_HERE, reason="no RAPIDS")
def test_cuml_counts_neighbours_without_the_point_itself():
    """Of three translations only one gives scikit-learn's distances in the tree, which no order of
    joining changes."""
    from cuml.cluster import HDBSCAN as Cuml
    from sklearn.cluster import HDBSCAN

    x = noisy_clusters()
    ours = np.sort(
        HDBSCAN(min_cluster_size=15, min_samples=5).fit(x)._single_linkage_tree_["value"]
    )
    apart = []
    for neighbours in (3, 4, 5):
        model = Cuml(min_cluster_size=15, min_samples=neighbours, output_type="numpy").fit(x)
        apart.append(np.abs(np.sort(np.asarray(model._single_linkage_tree)[:, 2]) - ours).max())
    assert apart[1] < 1e-3 and min(apart[0], apart[2]) > 0.1


@pytest.mark.slow
def test_rows_without_a_place_in_umap_are_named_with_the_reason(backend):
    x = np.zeros((41, 8), np.float32)
    x[:, 0] = 1
    x[40] *= -1
    if backend.name == "gpu":
        try:
            assert np.isfinite(backend.umap(x)).all()
            return
        except ValueError as error:
            assert "row 40 is opposite to every other row" in str(error)
            return
    with pytest.raises(
        ValueError,
        match=r"no place for 1 of 41 rows: row 40 is opposite to every other row \(cosine",
    ):
        backend.umap(x)


@pytest.mark.parametrize(
    "metric, change, reason",
    [
        ("cosine", {3: 0.0}, "row 3 is all zeros and has no direction"),
        ("correlation", {3: 2.0}, "row 3 has one value in all columns"),
        ("cosine", {}, "row 3 is as far from every other row as this metric can say"),
        ("jaccard", {}, "row 3 is as far from"),
    ],
)
def test_every_reason_of_umap_is_said(monkeypatch, metric, change, reason):
    x = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
    for row, value in change.items():
        x[row] = value
    lost = np.zeros((20, 2))
    lost[[3, 5, 6, 7, 8, 9]] = np.nan
    monkeypatch.setattr(cpu, "_umap", lambda *arguments: lost)
    with pytest.raises(ValueError, match=f"6 of 20 rows: {reason}.*; and 1 more. Drop them"):
        cpu.umap(x, metric=metric)


@pytest.mark.slow
def test_zeros_have_a_place_in_umap(backend):
    x = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    x[:3] = 0
    assert np.isfinite(backend.umap(x, metric="cosine")).all()


@pytest.mark.slow
@pytest.mark.parametrize("n_components", [2, 3])
def test_umap_keeps_planted_neighbourhoods(backend, n_components):
    x, labels = planted(per_cluster=60)
    found = backend.umap(x, n_components, n_neighbors=10, metric="euclidean", seed=0)
    assert found.shape == (240, n_components) and found.dtype == np.float32
    assert adjusted_rand_score(labels, backend.hdbscan(found, min_cluster_size=20)) == 1.0
    # Points do not keep their order inside a cluster of pure noise; the neighbourhood of its size
    # they do keep.
    assert trustworthiness(x, found, n_neighbors=50) > 0.95


@pytest.mark.slow
def test_umap_with_a_seed_repeats_itself():
    x, _ = planted(per_cluster=15)
    np.testing.assert_array_equal(cpu.umap(x, seed=3), cpu.umap(x, seed=3))
    assert not np.array_equal(cpu.umap(x, seed=3), cpu.umap(x, seed=4))


X = np.ones((10, 4), dtype=np.float32) * np.arange(10)[:, None] + np.eye(10, 4, dtype=np.float32)
BAD = X.copy()
BAD[3, 1] = np.nan


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda b: b.umap(X, n_neighbors=15), "needs at least 16 rows, but there are 10"),
        (lambda b: b.neighbors(X, 10), "needs at least 11 rows"),
        (lambda b: b.neighbors(X, 0), "at least 1"),
        (lambda b: b.neighbors(X, 2, metric="dot"), "'cosine' or 'euclidean'"),
        (lambda b: b.neighbors(X, 2, queries=np.ones((2, 3))), "3 wide, but x is 4 wide"),
        (
            lambda b: b.neighbors(X, 2, queries=BAD),
            r"queries has 1 row\(s\) with NaN or infinity, the first at 3",
        ),
        (lambda b: b.umap(BAD, n_neighbors=3), r"1 row\(s\) with NaN or infinity, the first at 3"),
        (lambda b: b.neighbors(BAD, 2), "NaN"),
        (lambda b: b.pca(BAD, 2), "NaN"),
        (lambda b: b.kmeans(BAD, 2), "NaN"),
        (lambda b: b.hdbscan(BAD, 2), "NaN"),
        (lambda b: b.kmeans(X, 11), "at least 11 rows"),
        (lambda b: b.hdbscan(X, 11), "at least 11 rows"),
        (lambda b: b.hdbscan(X, 3, 11), "min_samples=11 needs at least 11 rows"),
        (lambda b: b.hdbscan(X, 3, 0), "min_samples must be at least 1, not 0"),
        (lambda b: b.hdbscan(X, 1), "min_cluster_size must be at least 2, not 1"),
        (lambda b: b.pca(X, 5), "1 to 4 components, not 5"),
        (lambda b: b.pca(np.ones((5, 3)), 2), "no variance"),
        (lambda b: b.kmeans(np.ones(5), 2), "matrix"),
        (lambda b: b.pca(np.ones((0, 3)), 1), "at least one row"),
    ],
)
def test_bad_input_is_refused_with_the_reason(backend, call, message):
    with pytest.raises(ValueError, match=message):
        call(backend)


# Choosing


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="'auto', 'cpu' or 'gpu'"):
        get_backend("cuda")


def test_the_backend_is_chosen_once():
    assert get_backend("cpu") is get_backend("cpu")


def specs(monkeypatch, here):
    """importlib.util.find_spec that knows only `here` of RAPIDS."""
    real = importlib.util.find_spec
    rapids = {"cupy", "cudf", "cuml", "cugraph"}
    find = lambda name: (name in here or None) if name in rapids else real(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", find)


@pytest.mark.parametrize("here, missing", [((), "cupy, cudf, cuml"), (("cupy", "cudf"), "cuml")])
def test_gpu_without_rapids_names_the_missing_packages(fresh, monkeypatch, here, missing):
    specs(monkeypatch, here)
    with pytest.raises(GpuError, match=f"{missing} not installed.*backend='cpu'"):
        get_backend("gpu")
    chosen = get_backend("auto")
    assert (
        chosen.name == "cpu"
        and f"{missing} not installed" in chosen.line
        and "\n" not in chosen.line
    )


def test_rapids_without_a_gpu_is_said_and_rapids_not_imported(fresh, monkeypatch):
    specs(monkeypatch, ("cupy", "cudf", "cuml"))
    monkeypatch.setattr(devices, "assign_analytics", lambda: None)
    with pytest.raises(GpuError, match="no NVIDIA GPU"):
        get_backend("gpu")
    assert "no NVIDIA GPU" in get_backend("auto").line
    if not RAPIDS_HERE:
        assert not {"cupy", "cudf", "cuml"} & set(sys.modules)


def test_an_import_that_came_too_early_is_explained(fresh, monkeypatch):
    def early():
        raise GpuError(
            "CUDA was started in this process before the GPUs were assigned (imported: torch)"
        )

    specs(monkeypatch, ("cupy", "cudf", "cuml"))
    monkeypatch.setattr(devices, "assign_analytics", early)
    with pytest.raises(GpuError, match="imported: torch"):
        get_backend("gpu")
    assert get_backend("auto").name == "cpu" and "imported: torch" in get_backend("auto").line


def test_rapids_is_imported_after_the_process_has_its_gpu(fresh, monkeypatch, tmp_path):
    """Stand-ins for the three packages write down when they are imported: CuPy alone, which fails
    as a wrong driver would."""
    for name in ("cudf", "cuml", "cupy"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / f"{name}.py").write_text(
            f"import pathlib; open(pathlib.Path(__file__).with_name('order'), 'a').write('{name} ')\n"
            "__version__ = '0'\n"
            + ("raise RuntimeError('driver too old')\n" if name == "cupy" else "")
        )

    def assign():
        (tmp_path / "order").write_text("assigned ")
        return "GPU 1"

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(devices, "assign_analytics", assign)
    with pytest.raises(GpuError, match="does not work here: RuntimeError: driver too old"):
        get_backend("gpu")
    assert (tmp_path / "order").read_text().split() == ["assigned", "cupy"]
    for name in ("cudf", "cuml", "cupy"):
        sys.modules.pop(name, None)


def test_rapids_is_imported_where_it_is_first_used(fresh, monkeypatch):
    """A CuPy that works: cuML and cuDF are not touched, and are an error where they are broken."""
    device = {"name": b"T4"}
    runtime = types.SimpleNamespace(getDeviceProperties=lambda number: device)
    cuda = types.SimpleNamespace(runtime=runtime, Device=lambda: types.SimpleNamespace(id=0))
    fake = types.ModuleType("cupy")
    fake.cuda, fake.arange, fake.asnumpy = cuda, np.arange, np.asarray
    monkeypatch.setitem(sys.modules, "cupy", fake)
    for name in ("cudf", "cuml"):
        monkeypatch.setitem(sys.modules, name, None)  # an import would fail
    specs(monkeypatch, ("cupy", "cudf", "cuml"))
    monkeypatch.setattr(devices, "assign_analytics", lambda: "GPU 1")
    backend = get_backend("gpu")
    assert backend.line.startswith("analytics on T4 (asked for): cuML ")
    assert backend.line.endswith("layouts by igraph (cuGraph is not installed)")
    with pytest.raises(GpuError, match="does not work here: .*backend='cpu'"):
        backend.kmeans(np.eye(4), 2)
    with pytest.raises(GpuError, match="does not work here"):
        backend.table(pd.DataFrame())


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_neighbours_do_not_depend_on_blocks(monkeypatch, metric):
    x = np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32) + 30 * (metric[0] == "e")
    x[[3, 9]] = 0
    whole = cpu.neighbors(x, 5, metric)
    monkeypatch.setattr(nearest, "_BLOCK", 700)
    monkeypatch.setattr(nearest, "_QUERIES", 7)
    monkeypatch.setattr(maths, "BLOCK", 11)
    apart = np.flatnonzero(x.any(axis=1))  # all are equally far from a row of zeros
    for one, other in zip(whole, cpu.neighbors(x, 5, metric)):
        np.testing.assert_array_equal(one[apart], other[apart])
    rows = nearest.unit_rows(np, x) if metric == "cosine" else x
    squared = ((rows[:, None].astype(float) - rows[None]) ** 2).sum(axis=2)
    np.fill_diagonal(squared, np.inf)
    expected = np.argsort(squared, axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(whole[1][apart], expected[apart])
    assert whole[0][3, 0] == 0 and whole[1][3, 0] == 9


@pytest.mark.parametrize(
    "text, by",
    [
        (None, "not installed"),
        ("raise OSError('no libucs')", "OSError: no libucs"),
        ("", "cuGraph"),
    ],
)
def test_rapids_goes_on_without_cugraph(monkeypatch, tmp_path, text, by):
    monkeypatch.delitem(sys.modules, "cugraph", raising=False)
    specs(monkeypatch, () if text is None else ("cugraph",))
    (tmp_path / "cugraph.py").write_text(text or "")
    monkeypatch.syspath_prepend(str(tmp_path))
    module, said = _import_cugraph()
    assert by in said and (module is None) == (by != "cuGraph")
    sys.modules.pop("cugraph", None)


@pytest.mark.gpu
@pytest.mark.skipif(not RAPIDS_HERE, reason="no RAPIDS")
def test_cpu_and_gpu_agree():
    x, _ = planted(per_cluster=500, clusters=8, width=64)
    gpu = get_backend("gpu")
    for a, b in zip(cpu.neighbors(x, 10), gpu.neighbors(x, 10)):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(cpu.pca(x, 3)[1], gpu.pca(x, 3)[1], rtol=1e-4)
    assert adjusted_rand_score(cpu.kmeans(x, 8), gpu.kmeans(x, 8)) == 1.0
    noisy = x + np.random.default_rng(0).normal(size=x.shape, scale=8 * x.std()).astype(x.dtype)
    kinds = np.repeat(np.arange(2), len(x) // 2)
    told, also = (b.classify(noisy[::2], kinds[::2], [noisy[1::2]], 0.1)[0] for b in (cpu, gpu))
    assert (told == also).mean() > 0.99
    ours, theirs = cpu.umap(x, metric="euclidean"), gpu.umap(x, metric="euclidean")
    # Each map shows the neighbourhoods of the data as truly as the other; 5%: the spread between
    # seeds.
    assert trustworthiness(x, theirs, n_neighbors=15) >= 0.95 * trustworthiness(
        x, ours, n_neighbors=15
    )


# Layout and centrality


def clique(nodes):
    return [(a, b) for a in nodes for b in nodes if a < b]


TWO_CLIQUES = np.array(clique(range(8)) + clique(range(8, 16)) + [(0, 8)])


@pytest.mark.parametrize("dims", [2, 3])
def test_layout_separates_two_cliques(backend, dims):
    found = backend.layout(TWO_CLIQUES, 16, dims=dims, seed=0)
    gap = np.linalg.norm(found[:8].mean(axis=0) - found[8:].mean(axis=0))
    spread = max(
        np.linalg.norm(part - part.mean(axis=0), axis=1).mean() for part in (found[:8], found[8:])
    )
    assert found.shape == (16, dims) and found.dtype == np.float32
    assert gap > 2 * spread
    assert np.linalg.norm(found, axis=1).max() == pytest.approx(1, abs=1e-5)


def test_a_large_layout_separates_two_communities(backend):
    random = np.random.default_rng(0)
    inside = np.concatenate(
        [random.integers(0, 700, (7000, 2)), random.integers(700, 1400, (7000, 2))]
    )
    rings = np.column_stack(
        [np.arange(1400), np.r_[1:700, 0, 701:1400, 700]]
    )  # no node of a community is left out
    edges = np.unique(
        np.sort(np.concatenate([inside[inside[:, 0] != inside[:, 1]], rings, [(0, 700)]]), axis=1),
        axis=0,
    )
    found = backend.layout(
        edges, 1403, random.uniform(0.5, 2, len(edges))
    )  # and three nodes without an edge
    parts = found[:700], found[700:1400]
    gap = np.linalg.norm(parts[0].mean(axis=0) - parts[1].mean(axis=0))
    assert found.shape == (1403, 2) and len(np.unique(found, axis=0)) == 1403
    assert gap > 2 * max(np.linalg.norm(part - part.mean(axis=0), axis=1).mean() for part in parts)


def test_layout_is_repeatable_and_leaves_random_alone():
    import random

    random.seed(5)
    before = random.getstate()
    first = layout(TWO_CLIQUES, 16, seed=1)
    assert random.getstate() == before
    np.testing.assert_array_equal(first, layout(TWO_CLIQUES, 16, seed=1))


def test_parts_without_a_connection_stay_side_by_side():
    edges = np.array(clique(range(10)) + clique(range(10, 20)))
    found = layout(edges, 100)  # and 80 nodes without an edge
    parts = [found[:10], found[10:20]]
    radii = [np.linalg.norm(part - part.mean(axis=0), axis=1).max() for part in parts]
    assert np.linalg.norm(parts[0].mean(axis=0) - parts[1].mean(axis=0)) > sum(radii)
    assert min(radii) > 0.1  # not squeezed to a point by what flew away
    assert len(np.unique(found, axis=0)) == 100


def test_layout_weights_pull():
    path = np.array([(0, 1), (1, 2)])
    found = layout(path, 3, weights=[10.0, 0.1])
    assert np.linalg.norm(found[0] - found[1]) < np.linalg.norm(found[1] - found[2])


@pytest.mark.parametrize("n_nodes", [0, 1, 5])
def test_layout_without_edges(n_nodes):
    found = cpu.layout(np.zeros((0, 2)), n_nodes)
    assert found.shape == (n_nodes, 2) and np.isfinite(found).all()


@pytest.mark.parametrize(
    "edges, weights, dims, message",
    [
        ([(0, 3)], None, 2, "nodes 0 to 2"),
        ([(-1, 0)], None, 2, "nodes 0 to 2"),
        ([(0, 1)], [0.0], 2, "positive"),
        ([(0, 1)], [np.nan], 2, "positive and finite"),
        ([(0, 1)], [1.0, 2.0], 2, "as many weights"),
        ([(0, 1)], None, 4, "2 or 3 dimensions"),
    ],
)
def test_layout_refuses(edges, weights, dims, message):
    with pytest.raises(ValueError, match=message):
        cpu.layout(edges, 3, weights, dims=dims)


@pytest.mark.parametrize("dims", [2, 3])
def test_packed_discs_do_not_overlap(dims):
    radii = np.sort(np.random.default_rng(0).uniform(1, 6, 40))[::-1]
    centres = pack_discs(radii, dims)
    gap = np.linalg.norm(centres[:, None] - centres[None], axis=2) - radii[:, None] - radii[None]
    assert gap[~np.eye(40, dtype=bool)].min() > -1e-9


@pytest.mark.parametrize("weights", [None, np.array([1.0, 2.0, 0.5, 1.5, 3.0])])
def test_pagerank_is_the_fixed_point(backend, weights):
    edges = np.array([(0, 1), (1, 2), (2, 0), (3, 0), (0, 3)])
    found = backend.pagerank(edges, 5, weights)  # node 4 has no edges: its rank goes to all
    step = np.zeros((5, 5))
    for (a, b), weight in zip(edges, np.ones(5) if weights is None else weights):
        step[b, a] = weight / (np.ones(5) if weights is None else weights)[edges[:, 0] == a].sum()
    step[:, 4] = 1 / 5
    rank = np.full(5, 0.2)
    for _ in range(200):
        rank = 0.03 + 0.85 * step @ rank
    np.testing.assert_allclose(found, rank, atol=1e-6)


def test_betweenness_of_a_star_and_of_a_path(backend):
    star = np.array([(0, 1), (0, 2), (0, 3), (0, 4)])
    np.testing.assert_allclose(backend.betweenness(star, 5), [1, 0, 0, 0, 0])
    path = np.array([(0, 1), (1, 2), (2, 3)])
    np.testing.assert_allclose(backend.betweenness(path, 4), [0, 2 / 3, 2 / 3, 0], rtol=1e-6)


def test_a_matrix_goes_to_the_gpu_by_blocks(monkeypatch):
    """cupy.asarray copies the whole of it into page-locked memory first, and keeps that: 2.1 GB
    beside a matrix of 128,256 x 4,096."""
    sizes = []

    class There:
        def __init__(self, shape, dtype):
            self.values = np.empty(shape, dtype)

        def __getitem__(self, rows):
            def put(block):
                sizes.append(len(block))
                self.values[rows] = block

            return types.SimpleNamespace(set=put)

    backend = GpuBackend.__new__(GpuBackend)
    backend.__dict__["xp"] = types.SimpleNamespace(empty=There, float32=np.float32)
    monkeypatch.setattr(maths, "BLOCK", 100)
    x = np.random.default_rng(0).normal(size=(250, 3)).astype(np.float32)
    np.testing.assert_array_equal(backend.to_device(x).values, x)
    assert sizes == [100, 100, 50]
