"""What a quantization costs in output quality, measured against its reference in step, with no file
of logits."""

import os
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from .. import logs
from ..arguments import whole
from ..child import Child
from ..errors import (
    CaptureError,
    CompareError,
    LlamaTelemetryError,
    ModelLoadError,
    WorkerCrashedError,
    shown,
)
from ..files import hub
from ..files.outputs import labels
from ..gpus.cores import physical_cores
from ..gpus.devices import inference_environment
from .quality import summarize
from .texts import load_text

BUFFERS = (
    640 << 20
)  # bytes beside the weights: two copies of 256 rows of logits for a vocabulary of 262,144, KV cache


class Comparison(pd.DataFrame):
    """The result of compare_quantizations: a DataFrame with one row per candidate, and `.tokens`.

    tokens: one row per candidate and scored token: candidate, window, position (in the window), id,
    piece, logprob_base, logprob (nats), entropy_base, kld (nats), dp, same_top, top5, top10,
    top_base and top (ids). attempts: for each candidate, how often it was started (more than 1
    where a worker died)."""

    _metadata = ["tokens", "attempts"]


def compare_quantizations(
    reference,
    candidates,
    text=None,
    n_ctx=512,
    client=None,
    *,
    max_windows=None,
    gpu_layers=None,
    threads=None,
    seed=0,
    retries=2,
    progress=True,
):
    """Perplexity, KL divergence and top-token agreement of quantized files against a reference, on
    a text.

    reference, candidates: paths or registry names. text: the text or a path to one, as load_text
    takes it, or None for the public-domain text of this package (compare/text.md). n_ctx: tokens
    per window; the second half of each is scored, and a text that ends within a window loses that
    remainder. max_windows: use only the first so many. gpu_layers: None puts all layers on the
    visible GPU if the engine can use one. client: a dask.distributed Client (for one worker per
    GPU: cluster.local_cluster); then the candidates are shared out to its workers, and those of a
    worker that dies are started again, up to `retries` times.

    Definitions are llama-perplexity's (--kl-divergence), in nats and fractions. Returns a
    Comparison, one row per candidate in the order given, indexed by name (of the file as it was
    given, see files.labels): file, size_bytes, bits_per_weight, ppl, ppl_base, ppl_ratio, kld_mean,
    kld_median and other percentiles, mean_dp, rms_dp, same_top, top5, top10, each mean with its
    *_err, and intervals by window (*_low, *_high). A candidate that llama.cpp cannot load, or that
    crashes it, has its reason in the column `error` and NaN elsewhere; the others are kept. Raises
    CompareError for another vocabulary or architecture, a reference that predicts nothing or no
    numbers, or too short a text, ModelNotFoundError for a file that is not there, ModelLoadError if
    the reference or every candidate cannot be loaded."""
    candidates = [candidates] if isinstance(candidates, str | Path) else list(candidates)
    reference, paths = _path(reference), [_path(candidate) for candidate in candidates]
    if not paths:
        raise CompareError("No candidates were given: pass at least one path or name.")
    for name, value, least in (
        ("max_windows", max_windows, 1),
        ("threads", threads, 1),
        ("gpu_layers", gpu_layers, -1),
    ):
        whole(name, value, least, error=CompareError, none=True)
    whole("retries", retries, 0, error=CompareError)
    if whole("n_ctx", n_ctx, error=CompareError) < 4:
        raise CompareError(
            f"n_ctx={n_ctx}: a window needs at least 4 tokens; llama-perplexity's default is 512."
        )
    _check_window(reference, n_ctx)
    job = {
        "reference": str(reference),
        "text": load_text(text),
        "n_ctx": int(n_ctx),
        "max_windows": max_windows and int(max_windows),
        "gpu_layers": gpu_layers,
        "threads": threads,
    }
    unique = list(dict.fromkeys(str(p) for p in paths))
    if client is None:
        found = measure_all(job | {"candidates": unique}, progress)
        attempts = {p: f["attempts"] for p, f in found.items()}
    else:
        found, attempts = _distributed(client, job, unique, retries, progress)
    return _result(found, attempts, [str(p) for p in paths], seed)


def _check_window(path, n_ctx):
    """Warn of a window longer than what the model was trained for; CompareError where it has no
    positions there."""
    from ..files.gguf import GGUFFile

    try:
        model = GGUFFile(path)
    except LlamaTelemetryError:
        return  # llama.cpp says what is wrong with it
    if not model.n_ctx_train or n_ctx <= model.n_ctx_train:
        return
    says = f"n_ctx={n_ctx:,}: {model.name} was trained for {model.n_ctx_train:,} tokens"
    if model.has_tensor("position_embd.weight"):
        raise CompareError(
            f"{says}, and its positions are a table of that length. Pass a smaller n_ctx."
        )
    warnings.warn(f"{says}. What comes after those it has never learned.", stacklevel=3)


def measure_all(job, progress=False):
    """`measure` for as many candidates at a time as fit into memory beside the reference."""
    found = {}
    for some in _groups(job["reference"], job["candidates"]):
        found |= measure(job | {"candidates": some}, progress)
    return found


def measure(job, progress=False):
    """Run the child process on one job; {path: {"columns", "error", "kind", "attempts",
    "seconds"}}.

    If llama.cpp takes the process down, every unfinished candidate gets a process of its own, so
    that only the one that does it is lost."""
    results, crash = _child(job, progress)
    for path in job["candidates"]:
        if path in results:
            results[path]["attempts"] = 1
        elif len(job["candidates"]) == 1:
            results[path] = {"error": crash, "kind": "crash", "attempts": 1}
        else:
            results |= measure(job | {"candidates": [path]}, progress)
            results[path]["attempts"] += 1
    return results


def _child(job, progress):
    """({path: result} of the candidates that are done with, why the process ended or None)."""
    from tqdm.auto import tqdm

    results = {}

    def hear(windows=None, of=None, failed=None, why=None, kind=None):
        if failed:
            results[failed] = {"error": _reason(why, child), "kind": kind}
        else:
            meter.total = of
            meter.update(windows - meter.n)

    child = Child("llamatelemetry.compare.worker", "llama.cpp", inference_environment())
    with child, tqdm(desc="compare", unit="window", disable=not progress) as meter:
        try:
            found = child.call("compare", hear, **_settings(job), folder=str(child.folder))
        except ModelLoadError as error:
            why = f"{_reason(error, child)} It is the reference: download or make it again."
            raise ModelLoadError(why) from None
        except (WorkerCrashedError, CaptureError) as error:  # the latter: what it did not foresee
            return results, str(error)
        for path, file in found["files"].items():
            columns = _load(file)
            columns["piece"] = [_text(found["pieces"][str(i)]) for i in columns["id"]]
            results[path] = {"columns": columns, "error": None, "kind": None}
    return results, None


def _settings(job):
    threads = job["threads"] or max(1, physical_cores() // job.get("workers_here", 1))
    return job | {
        "threads": threads,
        "gpu_layers": 999 if job["gpu_layers"] is None else job["gpu_layers"],
    }


def _reason(why, child):
    """The worker's reason with what llama.cpp logged last about it."""
    words = logs.reason(child.log())
    return f"{why} It says: {words}" if words else str(why)


def _load(path):
    with np.load(path) as columns:
        return {name: columns[name] for name in columns}


def _text(piece):
    """A piece's bytes, in hexadecimal, as text; as bytes where they are none."""
    piece = bytes.fromhex(piece)
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return piece


def _path(name):
    """The file's path as it was given, links and all: what they lead to has another name and no
    parts beside it."""
    from ..files.models import resolve_model

    if name is None:
        raise CompareError("None is no file to compare: give a path or a name.")
    return Path(resolve_model(name))


def _groups(reference, paths):
    """Candidates that fit into memory beside the reference at once; the reference is decoded once
    per group."""
    import psutil

    from ..gpus.devices import plan

    free = [gpu.free_bytes for gpu in plan().inference] or [psutil.virtual_memory().available]
    room = 0.8 * sum(free) - hub.size_of(reference) - BUFFERS
    groups, used = [[]], 0
    for path in paths:
        size = hub.size_of(path) + BUFFERS
        if groups[-1] and used + size > room:
            groups.append([])
            used = 0
        groups[-1].append(path)
        used += size
    return groups


def _distributed(client, job, paths, retries, progress):
    """Every worker gets a share of the candidates: the reference is read once per worker, not once
    per candidate."""
    from tqdm.auto import tqdm

    hosts = [address.rpartition(":")[0] for address in client.nthreads()] or ["none yet"]
    job = job | {"workers_here": max(map(hosts.count, hosts))}
    shares = [paths[number :: len(hosts)] for number in range(min(len(paths), len(hosts)))]
    futures = [
        client.submit(
            measure_all,
            job | {"candidates": share},
            retries=retries,
            pure=False,
            key=f"compare-{number}-{os.urandom(4).hex()}",
        )
        for number, share in enumerate(shares)
    ]
    found, attempts = {}, {}
    with tqdm(desc="compare", unit="file", total=len(paths), disable=not progress) as meter:
        for share, future in zip(shares, futures):
            try:
                found |= future.result()
            except LlamaTelemetryError:
                raise
            except (
                Exception
            ) as error:  # a worker that died too often, or the scheduler's own trouble
                found |= {
                    p: {"error": f"{type(error).__name__}: {error}", "kind": "crash"} for p in share
                }
            died = client.run_on_scheduler(_suspicious, key=future.key)
            attempts |= {p: died + found[p].get("attempts", 1) for p in share}
            if died:
                warnings.warn(
                    f"{', '.join(share)}: the worker died {died} time(s); it was started again elsewhere.",
                    stacklevel=3,
                )
            meter.update(len(share))
    return found, attempts


def _suspicious(dask_scheduler, key):
    task = dask_scheduler.tasks.get(key)
    return int(task.suspicious) if task else 0


def _lost(result):
    """The reason to leave out a candidate whose logits are numbers, but whose perplexity is none;
    else None."""
    with np.errstate(over="ignore"):
        loss = -float(np.mean(result["columns"]["logprob"]))
        return (
            None
            if np.isfinite(np.exp(loss))
            else f"its loss of {loss:.3g} nats per token is beyond any perplexity"
        )


def _result(found, attempts, order, seed):
    for f in found.values():
        if not f["error"]:
            f["error"] = _lost(f)
    other = [f"{p}: {f['error']}" for p, f in found.items() if f["kind"] == "other"]
    if other:
        raise CompareError("Not a quantization of the reference's model: " + "; ".join(other))
    if all(f["error"] for f in found.values()):
        crashed = any(f["kind"] == "crash" for f in found.values())
        error = WorkerCrashedError if crashed else ModelLoadError
        raise error(
            "No candidate could be measured: "
            + "; ".join(f"{p}: {f['error']}" for p, f in found.items())
        )
    rows, tables = [], []
    names = labels(order)
    for name, path in zip(names, order):
        row = {"name": name, "file": shown(path), **_size(path), "error": found[path]["error"]}
        if found[path]["error"] is None:
            table = pd.DataFrame(found[path]["columns"])
            row |= summarize(table, seed=seed)
            tables.append(table.assign(candidate=row["name"]))
        else:
            warnings.warn(f"{path} was left out: {found[path]['error']}", stacklevel=3)
        rows.append(row)
    result = Comparison(pd.DataFrame(rows).set_index("name"))
    result["error"] = result.pop("error")
    columns = [
        "candidate",
        "window",
        "position",
        "id",
        "piece",
        "logprob_base",
        "logprob",
        "entropy_base",
        "kld",
        "dp",
        "same_top",
        "top5",
        "top10",
        "top_base",
        "top",
    ]
    object.__setattr__(result, "tokens", pd.concat(tables, ignore_index=True)[columns])
    object.__setattr__(result, "attempts", {name: attempts[p] for name, p in zip(names, order)})
    return result


def _size(path):
    """Size and real bits per weight; the latter unknown for a file that cannot be read: its row
    says so in `error`."""
    from ..files.gguf import GGUFFile

    try:
        file = GGUFFile(path)
        return {"size_bytes": file.size_bytes, "bits_per_weight": file.bits_per_weight}
    except LlamaTelemetryError:
        return {
            "size_bytes": os.path.getsize(path) if os.path.isfile(path) else None,
            "bits_per_weight": float("nan"),
        }
