"""What sits on which GPU while a notebook works: memory per process and per GPU as NVML reports it,
step by step.

    python tests/benchmarks/bench_placement.py [--model smollm2-135m-Q4_1] [--results FILE]

Server, capture worker and this process, which stands for the notebook and runs RAPIDS. What the
analytics hold is theirs until their process ends; server and worker must have given back all of
theirs after close()."""

import argparse
import time
from pathlib import Path

from common import gpu_used, report

SETTLE_S = 10  # the driver takes a moment to return a dead process's memory


def step(what, engine=None):
    """One row: MiB in use on each GPU, and of each of the engine's processes."""
    row = {"what": what} | {f"GPU {index}, MiB": mib for index, mib in enumerate(gpu_used())}
    for held in (
        engine.placement().dropna(subset=["gpu", "memory_mib"]).itertuples() if engine else ()
    ):
        row[f"{held.process} on GPU {held.gpu}, MiB"] = round(held.memory_mib)
    return row


def main():
    from llamatelemetry import InferenceEngine
    from llamatelemetry.backend import get_backend
    from llamatelemetry.gpus.devices import list_gpus

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-Q4_1")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    if not list_gpus():
        print("bench_placement: needs an NVIDIA GPU: not run")
        return
    rows = [step("before")]
    with InferenceEngine() as engine:
        engine.load_model(options.model, silent=True)
        engine.infer("The capital of France is", max_tokens=8)
        rows.append(step("llama-server answered", engine))
        engine.capture("The capital of France is", stages=("attention", "hidden"))
        rows.append(step("capture worker captured", engine))
        file = engine.model
        get_backend("gpu").umap(file.rows("token_embd.weight", slice(0, file.n_vocab)), 3)
        rows.append(step("analytics mapped the whole vocabulary (UMAP)", engine))
        held = rows[-1]
    ours = [key for key in held if key.startswith(("llama-server", "capture worker"))]
    of_engine = sum(held[key] for key in ours)
    deadline = time.monotonic() + SETTLE_S
    while True:
        after = step("engine closed; the analytics are still there")
        freed = sum(held[key] - after[key] for key in after if key.startswith("GPU"))
        if time.monotonic() > deadline or (ours and freed >= of_engine - 1):
            break
        time.sleep(0.2)
    rows.append(after)
    rows.append(
        {
            "what": "of server and worker, MiB: held before, freed after close()",
            "held": of_engine,
            "freed": freed,
        }
    )
    report("gpu_placement", rows, options.results)


if __name__ == "__main__":
    main()
