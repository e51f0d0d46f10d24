"""Where a comparison is computed: in a child process, in as many as crashes and memory ask for, or
shared out to the workers of a cluster."""

import os
import warnings
from pathlib import Path

import numpy as np

from .. import logs
from ..backend.cluster import answer
from ..child import Child
from ..errors import (
    CaptureError,
    CompareError,
    LlamaTelemetryError,
    ModelLoadError,
    WorkerCrashedError,
)
from ..files.outputs import split_parts
from ..gpus.cores import physical_cores
from ..gpus.devices import inference_environment, list_gpus
from ..liveness import patience
from ..reading import Source
from . import kept
from .placing import placed
from .worker import STEP


def measure_all(job, progress=False):
    """`measure` for as many candidates at a time as fit into memory beside the reference
    (placing.placed), all ways of a file together."""
    found, files = {}, by_file(job["candidates"], job["ways"])
    # At most: a token is a byte, of which a character has up to four, and some stand around it
    windows = (len(job["text"].encode()) + 3) // job["n_ctx"]
    windows = min(windows, job["max_windows"] or windows)
    rows = windows * (job["n_ctx"] - job["n_ctx"] // 2)
    options = job["gpu_layers"], job["beside"], rows
    for some in placed(job["reference"], list(files), *options):
        where = dict(split=some.reference, seen=[gpu.uuid for gpu in some.gpus])
        where["kept"] = kept.place(job, rows, where)
        where |= dict(own_split=some.own, apart=some.apart)
        where["candidates"] = [key for path in some.candidates for key in files[path]]
        try:
            found |= measure(job | where, progress)
        finally:
            if where["kept"]:  # half of it, where the process that wrote it was ended
                Path(where["kept"] + ".part").unlink(missing_ok=True)
    return found


def by_file(keys, ways):
    """{path: keys of the candidates that are this file}. ways: {key: Way} of those that are no
    plain paths."""
    found = {}
    for key in keys:
        found.setdefault(_file(key, ways), []).append(key)
    return found


def _file(key, ways):
    return ways[key][0] if key in ways else key


def measure(job, progress=False):
    """Run the child process on one job; {candidate: {"columns", "error", "kind", "attempts"}}.

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

    results, job = {}, dict(job)

    def hear(windows=None, of=None, failed=None, why=None, kind=None):
        if failed:
            results[failed] = {"error": _reason(why, child), "kind": kind}
        else:
            meter.total = of
            meter.update(windows - meter.n)

    environment = inference_environment()
    if seen := job.pop("seen", None):
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(seen)
    job.pop("beside", None)
    files = [job["reference"], *by_file(job["candidates"], job["ways"])]
    held = {path: _held(path) for path in files}
    limit = patience(files, STEP, job["n_ctx"], bool(list_gpus()))
    child = Child("llamatelemetry.compare.worker", "llama.cpp", environment, limit=limit)
    with child, tqdm(desc="compare", unit="window", disable=not progress) as meter:
        try:
            found = child.call("compare", hear, **_settings(job), folder=str(child.folder))
            _check_kept(held[job["reference"]])
        except ModelLoadError as error:
            why = f"{_reason(error, child)} It is the reference: download or make it again."
            raise ModelLoadError(why) from None
        except (WorkerCrashedError, CaptureError) as error:  # the latter: what it did not foresee
            return results, str(error)
        for path, file in found["files"].items():
            try:
                _check_kept(held[_file(path, job["ways"])])
            except ModelLoadError as error:
                results[path] = {"error": str(error), "kind": "load"}
                continue
            columns = _load(file)
            columns["piece"] = [_text(found["pieces"][str(i)]) for i in columns["id"]]
            results[path] = {"columns": columns, "error": None, "kind": None}
    return results, None


def _held(path):
    """The parts of a file, open, to know afterwards whether they were written to meanwhile."""
    try:
        return [Source(part) for part in split_parts(path)]
    except LlamaTelemetryError:
        return []  # llama.cpp says what is wrong with it


def _check_kept(parts):
    for part in parts:
        part.check_place(running=True)


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


def distributed(client, job, keys, retries, progress):
    """Every worker gets a share of the candidates: the reference is read once per worker, not once
    per candidate."""
    from tqdm.auto import tqdm

    hosts = [address.rpartition(":")[0] for address in client.nthreads()] or ["none yet"]
    job = job | {"workers_here": max(map(hosts.count, hosts))}
    groups = list(by_file(keys, job["ways"]).values())
    shares = [sum(groups[n :: len(hosts)], []) for n in range(min(len(groups), len(hosts)))]
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
    with tqdm(desc="compare", unit="candidate", total=len(keys), disable=not progress) as meter:
        for share, future in zip(shares, futures):
            try:
                found |= answer(client, future, CompareError)
            except LlamaTelemetryError:
                raise
            except Exception as error:  # a worker that died too often, the scheduler's own trouble
                why = f"{type(error).__name__}: {error}"
                found |= {path: {"error": why, "kind": "crash"} for path in share}
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
