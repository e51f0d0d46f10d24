"""Speed, load time and memory of a model file: llama-bench's definitions, and the driver's word for
memory."""

import contextlib
import json
import re
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from ..errors import ModelLoadError, QuantizeError, shown
from ..files.gguf import GGUFFile
from ..files.outputs import labels, once, split_parts
from ..files.programs import tool
from ..gpus.cores import physical_cores
from ..gpus.devices import inference_environment, list_gpus, plan, visible_gpus
from ..liveness import patience
from ..running import run_tool
from .placing import split_for


def bench(
    path: str | Path,
    n_prompt: int = 256,
    n_gen: int = 32,
    repetitions: int = 3,
    gpu_layers: int | None = None,
    threads: int | None = None,
) -> dict[str, float]:
    """Tokens per second of a prompt of n_prompt tokens and of n_gen generated ones, by llama-bench.

    Dict: prompt_tps, prompt_tps_err, generation_tps, generation_tps_err (means and standard
    deviations over the repetitions, after one warm-up), load_s (seconds to load the weights and
    make a context, the file in the page cache), resident_bytes (largest resident set of the
    process, the mapped file included) and gpu_bytes (largest, by NVML: 0 without a GPU, NaN where
    it does not say). Raises ModelLoadError for a file that llama.cpp does not load."""
    options = {"-m": path, "-p": n_prompt, "-n": n_gen, "-r": repetitions, "-o": "jsonl"}
    options |= {"-t": threads or physical_cores(), "-ngl": _on_gpu(gpu_layers)}
    command = [
        tool("llama-bench"),
        "--progress",
        *(str(part) for pair in options.items() for part in pair),
    ]
    environment, shares = _where(path, gpu_layers)
    if shares:
        command += ["-ts", "/".join(f"{share:g}" for share in shares)]
    memory = _Memory()
    words = _run(command, path, environment, n_prompt, max(n_prompt, n_gen), memory.watch)
    runs = [json.loads(line) for line in words.splitlines() if line.startswith("{")]
    return speeds(runs) | {
        "load_s": load_time(path, gpu_layers),
        "resident_bytes": memory.resident,
        "gpu_bytes": memory.gpu,
    }


def _run(command, path, environment, tokens, context, seen=None):
    """What a tool says that runs a model; ModelLoadError where it does not to its end."""
    limit = patience(split_parts(path), tokens, context, bool(visible_gpus()))
    try:
        return run_tool(
            command, f"time {shown(path)}", limit=limit, env=dict(environment), seen=seen
        )
    except QuantizeError as error:
        raise ModelLoadError(str(error)) from None


def speeds(runs: list[dict]) -> dict[str, float]:
    """llama-bench's JSON, parsed -> prompt_tps, generation_tps and their *_err."""
    row: dict[str, float] = {}
    for run in runs:
        name = "prompt_tps" if run["n_gen"] == 0 else "generation_tps"
        row |= {name: run["avg_ts"], f"{name}_err": run["stddev_ts"]}
    return row


def bench_all(
    paths: Iterable[str | Path] | Mapping[str, Path],
    n_prompt: int = 256,
    n_gen: int = 32,
    repetitions: int = 3,
    gpu_layers: int | None = None,
    threads: int | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """bench() of several files: DataFrame indexed by their names, those of {name: path} or
    files.labels. A file that comes twice is one row."""
    from tqdm.auto import tqdm

    if not isinstance(paths, Mapping):
        paths = list(map(Path, paths))
        paths = dict(zip(labels(paths), paths))
    paths = once(paths)
    rows = [
        bench(path, n_prompt, n_gen, repetitions, gpu_layers, threads)
        for path in tqdm(paths.values(), desc="llama-bench", disable=not progress)
    ]
    return pd.DataFrame(rows, index=pd.Index(list(paths), name="name"))


_LOAD = """
import json, sys, time
from llamatelemetry.compare.worker import open_model
import llama_cpp
start = time.perf_counter()
open_model(sys.argv[1], 512, 1, int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4]))
print("load_s =", time.perf_counter() - start, flush=True)
"""


def load_time(path: str | Path, gpu_layers: int | None = None) -> float:
    """Seconds from nothing to a context of 512 tokens, in a process of its own; its imports are not
    counted."""
    environment, shares = _where(path, gpu_layers)
    command = [sys.executable, "-c", _LOAD, str(path), str(physical_cores()), _on_gpu(gpu_layers)]
    command += [json.dumps(shares)]
    words = _run(command, path, environment, 1, 512)
    return float(re.findall(r"load_s = ([\d.e-]+)", words)[-1])


def _where(path, gpu_layers):
    """(environment, shares or None): on the inference GPU, or over all where it is too small."""
    alone = gpu_layers is not None or len(visible_gpus()) < 2
    split = None if alone else split_for(GGUFFile(path), capture=False)
    chosen = plan(split)
    return inference_environment() | chosen.inference_env(), chosen.shares if split else None


def _on_gpu(layers):
    return "999" if layers is None else str(layers)


class _Memory:
    """Largest resident set and GPU memory of a process until it ends, in bytes."""

    def __init__(self):
        self.resident, self.gpu = 0, float("nan") if list_gpus() else 0.0

    def watch(self, pid):
        """Look at it from now on, in a thread of its own."""
        threading.Thread(target=self._look, args=(pid,), daemon=True).start()

    def _look(self, pid):
        wait = 0.002  # of a small model all is over in a moment
        while resident := _largest(pid):
            self.resident = max(resident, self.resident)
            # NaN is of a moment before or after it is on a GPU, or of a driver that never says
            self.gpu = float(np.fmax(self.gpu, _gpu_bytes(pid)))
            time.sleep(wait)
            wait = min(1.5 * wait, 0.05)


def _largest(pid):
    """Bytes of the largest resident set that a process has had; 0 where it ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def _gpu_bytes(pid):
    """Bytes on GPUs as NVML reports them: 0 without a GPU, NaN where the driver keeps it to
    itself."""
    from ..gpus.placement import placement

    memory = placement({"bench": pid})["memory_mib"] if list_gpus() else pd.Series(0.0)
    return float(memory.astype("float64").sum(min_count=1)) * 2**20
