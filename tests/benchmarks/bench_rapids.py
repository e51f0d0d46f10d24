"""Whole-vocabulary UMAP, neighbours, clusters, layouts: RAPIDS against scikit-learn, umap-learn,
igraph on one host.

    python tests/benchmarks/bench_rapids.py              # the embedded model
    python tests/benchmarks/bench_rapids.py --gguf FILE  # its token embedding, dequantized
    python tests/benchmarks/bench_rapids.py --npy matrix.npy --rows 50000 --out results/

Each library is warmed on a few rows first (imports, compilers, CUDA start), and that time is
printed by itself. Then every task runs once per backend on the same rows. Prints a table with
hardware and versions and writes it as JSON."""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from common import hardware, same_machine

sys.path.insert(0, str(Path(__file__).parents[2]))
from llamatelemetry.backend import get_backend  # noqa: E402
from llamatelemetry.errors import GpuError  # noqa: E402
from llamatelemetry.results import save  # noqa: E402

K, CLUSTERS, SAMPLE, GRAPH_NODES = 10, 50, 5000, 5000


def matrix(args):
    """The rows to work on, float32, and what they are."""
    if args.npy:
        return np.load(args.npy).astype(np.float32)[: args.rows], Path(args.npy).name
    from llamatelemetry.files.gguf import GGUFFile
    from llamatelemetry.files.models import resolve_model

    file = GGUFFile(args.gguf or resolve_model("smollm2-135m-Q4_1"))
    return file.rows(
        "token_embd.weight", slice(0, args.rows or file.n_vocab)
    ), f"{file.name}, token_embd.weight"


def knn_edges(indices, n_nodes):
    """The k-nearest-neighbour graph's edges among the first rows. (n, k) -> (m, 2), each once"""
    head = indices[:n_nodes]
    edges = np.column_stack([np.repeat(np.arange(len(head)), head.shape[1]), head.ravel()])
    edges = edges[edges[:, 1] < len(head)]
    return np.unique(np.sort(edges, axis=1), axis=0)


def tasks(x, given):
    """{task: function of a backend}; what earlier tasks of the CPU left is in `given`, so that both
    get the same."""
    sizes = sorted({min(GRAPH_NODES, len(x)), len(x)})
    return {
        f"{K} nearest neighbours, exact": lambda b: b.neighbors(x, K)[1],
        "UMAP 3-D, seed 0": lambda b: b.umap(x, 3, seed=0),
        "UMAP 3-D, no seed": lambda b: b.umap(x, 3, seed=None),
        "PCA 50": lambda b: b.pca(x, min(50, *x.shape))[0],
        f"k-means {CLUSTERS}": lambda b: b.kmeans(x, CLUSTERS),
        "HDBSCAN of the UMAP map": lambda b: b.hdbscan(given["UMAP 3-D, seed 0"], 30),
    } | {
        f"layout of the neighbour graph, {size} nodes": lambda b, size=size: b.layout(
            knn_edges(given[f"{K} nearest neighbours, exact"], size), size
        )
        for size in sizes
    }


def edge_length(positions, edges):
    """Median length of an edge as a share of the median distance of random pairs: how well a layout
    keeps neighbours."""
    pairs = np.random.default_rng(0).integers(0, len(positions), (100_000, 2))
    lengths = [
        np.median(np.linalg.norm(positions[p[:, 0]] - positions[p[:, 1]], axis=1))
        for p in (edges, pairs)
    ]
    return lengths[0] / lengths[1]


def agreement(task, x, cpu, gpu, given):
    """How far the two results say the same, as a sentence."""
    from sklearn.manifold import trustworthiness
    from sklearn.metrics import adjusted_rand_score

    pick = np.random.default_rng(0).choice(len(x), min(SAMPLE, len(x)), replace=False)
    if "neighbours, exact" in task:
        return f"{(cpu == gpu).mean():.6f} of the neighbours equal"
    if task.startswith("UMAP"):
        scores = [
            trustworthiness(x[pick], found[pick], n_neighbors=15, metric="cosine")
            for found in (cpu, gpu)
        ]
        return f"trustworthiness {scores[0]:.4f} (CPU), {scores[1]:.4f} (GPU)"
    if task.startswith("PCA"):
        return f"largest difference {np.abs(cpu - gpu).max() / np.abs(cpu).max():.1e} of the largest score"
    if task.startswith("k-means"):
        inertia = [
            sum(((x[found == c] - x[found == c].mean(axis=0)) ** 2).sum() for c in np.unique(found))
            for found in (cpu, gpu)
        ]
        return f"sum of squares {inertia[0]:.5g} (CPU), {inertia[1]:.5g} (GPU)"
    if task.startswith("HDBSCAN"):
        return f"adjusted Rand {adjusted_rand_score(cpu, gpu):.3f}"
    edges = knn_edges(given[f"{K} nearest neighbours, exact"], len(cpu))
    lengths = [edge_length(found, edges) for found in (cpu, gpu)]
    return f"median edge {lengths[0]:.3f} (CPU), {lengths[1]:.3f} (GPU) of a random pair's distance"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--gguf", help="model file")
    source.add_argument("--npy", help="matrix saved by numpy")
    parser.add_argument("--rows", type=int, help="only the first rows")
    parser.add_argument(
        "--tasks",
        default="",
        help="only tasks whose name contains one of these, comma-separated; "
        "what the result file holds of the others stays",
    )
    parser.add_argument("--out", default=Path(__file__).parent / "results", type=Path)
    args = parser.parse_args()

    backends, missing = [get_backend("cpu")], ""
    try:
        backends.append(get_backend("gpu"))
    except GpuError as error:
        missing = str(error)
    if missing and args.rows is None:
        args.rows = 10_000  # no ratio without a GPU: only to show that the CPU half runs
    x, what = matrix(args)
    report = {
        "matrix": what,
        "shape": x.shape,
        "hardware": hardware(),
        "no_gpu": missing,
        "backends": {b.name: b.line for b in backends},
        "tasks": {},
    }
    print(f"{what}: {x.shape[0]} x {x.shape[1]}\n" + "\n".join(b.line for b in backends))
    print(", ".join(f"{name} {value}" for name, value in report["hardware"].items()))
    print(f"no GPU half: {missing}" if missing else "")
    for b in backends:
        start = time.perf_counter()
        small = x[:2000]
        (
            b.neighbors(small, K),
            b.umap(small, 3),
            b.umap(small, 3, seed=None),
            b.pca(small, 5),
            b.kmeans(small, 5),
        )
        (
            b.hdbscan(small[:, :3], 30),
            b.layout(knn_edges(b.neighbors(small, K)[1], len(small)), len(small)),
        )
        report[f"warm_up_{b.name}_s"] = time.perf_counter() - start
        print(f"warm-up {b.name}: {report[f'warm_up_{b.name}_s']:.1f} s")
    args.out.mkdir(parents=True, exist_ok=True)
    path = (
        args.out / f"rapids_{'gpu' if len(backends) == 2 else 'cpu'}_{x.shape[0]}x{x.shape[1]}.json"
    )
    if args.tasks and path.is_file():
        stored = json.loads(path.read_text())
        if same_machine(stored["hardware"]):
            report["tasks"] = stored[
                "tasks"
            ]  # those that do not run now stay as they were measured on this hardware
    given, wanted = {}, [part for part in args.tasks.split(",") if part]
    print(f"\n{'task':44} {'CPU s':>9} {'GPU s':>9} {'ratio':>7}  agreement")
    for task, run in tasks(x, given).items():
        if wanted and not any(part in task for part in wanted):
            continue
        row, found = {}, []
        for b in backends:
            start = time.perf_counter()
            try:
                found.append(run(b))
            except (
                Exception
            ) as error:  # the other tasks are still worth their time on a host that is hard to get
                row["failed"] = f"{b.name}: {type(error).__name__}: {error}"
                break
            row[b.name] = time.perf_counter() - start
        if found:
            given[task] = found[0]
        if len(found) == 2:
            row["ratio"], row["agreement"] = (
                row["cpu"] / row["gpu"],
                agreement(task, x, *found, given),
            )
        report["tasks"][task] = row
        cells = [f"{row[name]:.2f}" if name in row else "-" for name in ("cpu", "gpu", "ratio")]
        said = row.get("failed", row.get("agreement", ""))
        print(f"{task:44} {cells[0]:>9} {cells[1]:>9} {cells[2]:>7}  {said}", flush=True)
        save(
            path, json.dumps(report, indent=1)
        )  # after every task: a run that is cut off keeps what it has
    print(f"\nwritten to {path.name}")
    failed = [task for task, row in report["tasks"].items() if "failed" in row]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
