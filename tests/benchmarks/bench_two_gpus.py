"""What a second GPU gives: who sits where while notebooks run, inference beside analytics, a model
spread over both, quantizations compared on both.

    python tests/benchmarks/bench_two_gpus.py [--shape1b FILE] [--shape8b FILE] [--parts PART ...]
    [--results FILE]

The shapes are make_shapes.py's. Parts: notebooks, overlap, spread, compare. What ran is stored
after every part, and beside it the samples of the notebooks' memory and use. Parts that do not run
now stay as measured on this hardware."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from common import RESULTS, gpu_used, report, same_machine
from watch import Watch

FOLDER = Path(__file__).parents[2] / "notebooks"
MODEL = "smollm2-135m-Q4_1"
TEXT = "The capital of France is Paris, and the capital of Italy is Rome. " * 8
SETTLE_S = 10  # the driver takes a moment to return a dead process's memory


def settled(before):
    """MiB in use on each GPU once none holds more than before, or after SETTLE_S."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        after = gpu_used()
        if all(now <= was + 1 for now, was in zip(after, before)) or time.monotonic() > deadline:
            return after
        time.sleep(0.2)


def notebooks(options):
    """Notebooks 12 and 13 with RAPIDS: the peak memory of each process on each GPU."""
    from llamatelemetry.results import save
    from llamatelemetry.tools.notebooks import find, run_notebook

    rows = []
    for path in find(FOLDER, ["12", "13"]):
        before = gpu_used()
        with Watch() as watch:
            started = time.perf_counter()
            run_notebook(path, options.out, {"BACKEND": "gpu"}, progress=False)
            seconds = time.perf_counter() - started
        peaks = {
            f"{kind} on GPU {gpu}, MiB": mib
            for kind, on in sorted(watch.peaks().items())
            for gpu, mib in sorted(on.items())
        }
        rows.append(
            {
                "what": f"notebook {path.stem[:2]}",
                "seconds": round(seconds, 1),
                **peaks,
                "before, MiB": before,
                "after, MiB": settled(before),
            }
        )
        name = f"two_gpus_{path.stem[:2]}.json"
        save(
            options.results.parent / name,
            json.dumps(watch.samples).replace("}, ", "},\n") + "\n",
        )
    return rows


def overlap(options):
    """Inference and analytics one after the other and at the same time, medians of 5: on two GPUs,
    then on one."""
    rows = []
    for shown in ("0,1", "0"):
        command = [sys.executable, __file__, "--overlap", options.shape1b or MODEL]
        env = os.environ | {"CUDA_VISIBLE_DEVICES": shown}
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        rows.append({"what": f"inference beside analytics, {len(shown.split(','))} GPU(s)"} | found)
    return rows


def overlapped(model):
    """One process's part of `overlap`: seconds of either alone and of both together."""
    from llamatelemetry import GGUFFile, InferenceEngine, resolve_model
    from llamatelemetry.backend import get_backend

    backend, file = get_backend("gpu"), GGUFFile(resolve_model(MODEL))
    matrix = file.rows("token_embd.weight", slice(0, file.n_vocab))

    with InferenceEngine() as engine:
        engine.load_model(model, silent=True)

        def infer():
            for _ in range(30):
                engine.infer(TEXT, max_tokens=64, ignore_eos=True)

        def analyse():
            backend.umap(matrix, 3, seed=None)
            backend.kmeans(matrix, 50)
            backend.neighbors(matrix, 10)

        def timed(*works):
            """Seconds of each of some works that begin together, and of all."""
            ends = {}

            def work(one):
                one()
                ends[one.__name__] = time.perf_counter() - started

            threads = [threading.Thread(target=work, args=(one,)) for one in works]
            started = time.perf_counter()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return ends | {"all": max(ends.values())}

        infer(), analyse()
        runs = [(timed(infer), timed(analyse), timed(infer, analyse)) for _ in range(5)]
    alone = [
        {"infer": a["infer"], "analyse": b["analyse"], "all": a["all"] + b["all"]}
        for a, b, _ in runs
    ]

    def median(found, part):
        return statistics.median(run[part] for run in found)

    together = [both for *_, both in runs]
    print(
        json.dumps(
            {
                f"{part}, {how}, s": round(median(found, part), 3)
                for part in ("infer", "analyse", "all")
                for how, found in (("alone", alone), ("together", together))
            }
        )
    )


HOLD = """
import cupy, sys
blocks = []
for number, keep in enumerate(map(int, sys.argv[1:])):
    with cupy.cuda.Device(number):
        free = cupy.cuda.runtime.memGetInfo()[0]
        blocks.append(cupy.cuda.alloc(max(0, free - keep)))
print("holding", flush=True)
sys.stdin.read()
"""


def spread(options):
    """A model of the 8B shape where neither GPU has room for it, spread over both: what is said and
    what captured."""
    from llamatelemetry import InferenceEngine
    from llamatelemetry.capture.session import CaptureSession
    from llamatelemetry.gpus.devices import list_gpus

    path, rows, stages = options.shape8b, [], ("attention", "q", "k", "v", "hidden", "logits")
    tokens = list(range(100, 612))
    before = gpu_used()
    with CaptureSession(path, env={"CUDA_VISIBLE_DEVICES": list_gpus()[0].uuid}) as one:
        alone, statistics_alone = one.capture(tokens, stages), one.head_statistics(tokens)
        one.time_decode(tokens, 2)
        seconds = statistics.median(one.time_decode(tokens, 9))
        rows.append({"what": "one GPU: decode of 512 tokens", "ms": 1e3 * seconds})
    room = [
        8 * 2**30
    ] * 2  # server and worker hold 4.9 GB of weights each: too much for one, enough for two halves
    ballast = subprocess.Popen(
        [sys.executable, "-c", HOLD, *map(str, room)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        ballast.stdout.readline()
        held = gpu_used()
        with InferenceEngine() as engine:
            engine.load_model(path, ctx_size=2048, auto_start=False, silent=True)
            rows.append({"what": "one GPU: what fit() says", "said": str(engine.fit())})
            engine.load_model(path, ctx_size=2048, tensor_split="0.5,0.5", silent=True)
            rows.append({"what": "both GPUs: what fit() says", "said": str(engine.fit())})
            text = engine.infer("The", max_tokens=16, ignore_eos=True)
            rows.append({"what": "both GPUs: generation", "tokens_per_s": text.tokens_per_sec})
            cap = engine.capture(tokens, stages=stages)
            apart = {
                stage: float(np.abs(cap[stage].values - alone[stage].values).max())
                for stage in stages
            }
            rows.append(
                {
                    "what": "both GPUs: largest difference of a captured value from one GPU's",
                    **apart,
                }
            )
            apart = np.abs(engine.head_statistics(tokens) - statistics_alone).max()
            rows.append(
                {
                    "what": "both GPUs: largest difference of a head's statistics from one GPU's",
                    **{name: float(value) for name, value in apart.items()},
                }
            )
            seconds = statistics.median(engine._call("time_decode", tokens, repeat=9))
            rows.append({"what": "both GPUs: decode of 512 tokens", "ms": 1e3 * seconds})
            held_by = {
                f"{row.process} on GPU {row.gpu}": round(row.memory_mib)
                for row in engine.placement().dropna(subset=["gpu", "memory_mib"]).itertuples()
            }
            rows.append({"what": "both GPUs: MiB of each process", **held_by})
        after = settled(held)
        rows.append(
            {
                "what": "both GPUs: MiB in use before loading, after close()",
                "before": held,
                "after": after,
            }
        )
    finally:
        ballast.communicate()
    rows.append(
        {"what": "MiB in use at first, in the end", "before": before, "after": settled(before)}
    )
    return rows


def compare(options):
    """Four quantizations against their reference: one after the other on one GPU, and by a worker
    per GPU."""
    from distributed import Client

    from llamatelemetry import resolve_model
    from llamatelemetry.backend.cluster import local_cluster
    from llamatelemetry.compare.comparison import compare_quantizations
    from llamatelemetry.convert.expand import make_reference
    from llamatelemetry.convert.quantize import quantize

    with tempfile.TemporaryDirectory() as folder:
        reference = make_reference(
            resolve_model(MODEL), Path(folder) / "reference.gguf", progress=False
        )
        files = [
            quantize(reference, Path(folder) / f"{kind}.gguf", kind, progress=False)
            for kind in ("Q8_0", "Q5_K_M", "Q4_K_M", "Q4_0")
        ]
        settings = dict(n_ctx=512, max_windows=24, progress=False)
        before, runs, tables = gpu_used(), {"one GPU": [], "a worker per GPU": []}, {}
        compare_quantizations(reference, files[:1], **settings)
        with local_cluster() as cluster, Client(cluster) as client, Watch() as watch:
            for _ in range(3):
                for how, given in (("one GPU", None), ("a worker per GPU", client)):
                    started = time.perf_counter()
                    tables[how] = compare_quantizations(reference, files, client=given, **settings)
                    runs[how].append(time.perf_counter() - started)
        one, two = tables.values()
    numbers, peaks = one.select_dtypes("number").columns, watch.peaks()["compare worker"]
    what = f"compare_quantizations, {len(files)} files, 24 windows of 512"
    return [
        {"what": f"{what}, {how}", "s": round(statistics.median(found), 2)}
        for how, found in runs.items()
    ] + [
        {
            "what": "compare_quantizations, both ways",
            "equal": bool(one[numbers].equals(two[numbers])),
            **{f"compare worker on GPU {gpu}, MiB": mib for gpu, mib in sorted(peaks.items())},
            "before": before,
            "after": settled(before),
        }
    ]


PARTS = {"notebooks": notebooks, "overlap": overlap, "spread": spread, "compare": compare}


def main():
    from llamatelemetry.gpus.devices import list_gpus

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape1b")
    parser.add_argument("--shape8b")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--out", type=Path, default=Path("executed"))
    parser.add_argument("--results", type=Path, default=RESULTS / "two_gpus.json")
    parser.add_argument("--overlap", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.overlap:
        return overlapped(options.overlap)
    if len(list_gpus()) < 2:
        return print("bench_two_gpus: needs two NVIDIA GPUs: not run")
    rows = []
    if options.results.is_file():
        stored = json.loads(options.results.read_text())
        if same_machine(stored["hardware"]):
            rows = [row for row in stored["rows"] if row["part"] not in options.parts]
    for part in options.parts:
        if part == "spread" and not options.shape8b:
            print("bench_two_gpus: spread needs --shape8b (make_shapes.py): not run")
            continue
        try:
            found = PARTS[part](options)
        except (
            Exception
        ) as error:  # the other parts are still worth their time on a host that is hard to get
            found = [{"what": part, "failed": f"{type(error).__name__}: {error}"}]
        rows += [{"part": part, **row} for row in found]
        report("two_gpus", rows, options.results)
    if any("failed" in row for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
