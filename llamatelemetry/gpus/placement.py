"""Proof of where each process sits, as the driver reports it."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..imports import uninterrupted
from .devices import list_gpus, processes_on

if TYPE_CHECKING:
    import pandas as pd


def placement(processes: Mapping[str, int | None]) -> "pd.DataFrame":
    """Where processes sit, as the driver reports it.

    processes: {name: pid}. One row per process and GPU: process, pid, gpu (index), gpu_name,
    memory_mib (both NA where the process is on no GPU, or the driver does not say), note (what the
    driver left out, and why)."""
    with uninterrupted():
        import pandas as pd

    reported = [(gpu, *processes_on(gpu)) for gpu in list_gpus()]
    absent = _why_absent(reported)
    rows: list[tuple] = []
    for name, pid in processes.items():
        here = [(gpu, found[pid]) for gpu, found, _ in reported if pid in found]
        for gpu, memory in here:
            mib = None if memory is None else memory / 2**20
            note = "the driver does not report memory per process" if memory is None else ""
            rows.append((name, pid, gpu.index, gpu.name, mib, note))
        if not here:
            rows.append((name, pid, None, None, None, absent))
    table = pd.DataFrame(rows, columns=["process", "pid", "gpu", "gpu_name", "memory_mib", "note"])
    return table.astype({"pid": "Int64", "gpu": "Int64", "memory_mib": "Float64"})


_NOT_THERE = "no context on a GPU"


def _why_absent(reported):
    """What it means that the driver does not list a process. reported: (gpu, processes, note)."""
    if not reported:
        return "no GPU: on the CPU"
    if notes := [note for *_, note in reported if note]:
        return notes[0]
    # In a container the driver may count processes of another namespace: its numbers then exist
    # nowhere here.
    pids = [pid for _, found, _ in reported for pid in found]
    strangers = [str(pid) for pid in pids if not os.path.exists(f"/proc/{pid}")]
    if strangers:
        return (
            f"not proven: the driver reports processes {', '.join(strangers[:4])} that this "
            "container cannot see, so this one may be among them"
        )
    return _NOT_THERE


def proof(processes: Mapping[str, int | None]) -> str:
    """Where things are now, as the driver reports it, in one sentence: memory in use per GPU, and
    each process's GPU where the driver lists it (in a container, as on Kaggle, it may not).
    processes: {name: pid}. "" without GPUs."""
    gpus = list_gpus()
    if not gpus:
        return ""
    table = placement(processes)
    used = "; ".join(f"GPU {gpu.index} {gpu.used_bytes / 2**20:,.0f} MiB in use" for gpu in gpus)
    known = table.dropna(subset=["gpu"])
    where = "".join(f"; {row.process} on GPU {row.gpu}" for row in known.itertuples())
    silent = table["process"][table["gpu"].isna() & (table["note"] != _NOT_THERE)]
    where += f"; where {', '.join(silent)} sits it does not say" if len(silent) else ""
    return f"The driver reports: {used}{where}."
