"""Loading and closing again and again, also by dropping the engine: no process, no descriptor, no
thread and no scratch more than before, and a memory that does not grow."""

import gc
import os
import tempfile
import threading
from pathlib import Path

import numpy as np
import psutil

COUNT, SETTLED = 200, 20  # cycles after which a process has all that it keeps
SLOPE = 0.1  # MiB per cycle, above which memory is said to grow
DROPPED = 4  # every so many cycles the engine is dropped, not closed


class Ledger:
    """What this process has, noted once per cycle; processes: beyond those that it had before."""

    def __init__(self):
        self.notes = []
        self._others = set(psutil.Process().children(recursive=True))

    def note(self):
        gc.collect()
        here = psutil.Process()
        children = set(here.children(recursive=True)) - self._others
        children = [each for each in children if each.status() != "zombie"]
        self.notes.append(
            {
                "processes": len(children),
                "descriptors": here.num_fds(),
                "threads": threading.active_count(),
                "scratch": len(scratch()),
                "MiB": here.memory_full_info().uss / 2**20,
            }
        )

    def slope(self, settled=SETTLED):
        """MiB per cycle that memory grows by, of a straight line through the notes after
        `settled`."""
        held = [note["MiB"] for note in self.notes[settled:]]
        return float(np.polyfit(range(len(held)), held, 1)[0]) if len(held) > 1 else 0.0

    def findings(self, settled=SETTLED, slope=SLOPE):
        """What is more at the end than once all had settled."""
        first, last = self.notes[min(settled, len(self.notes) - 1)], self.notes[-1]
        found = [
            f"{last[what]} {what}, {first[what]} after {settled} cycles"
            for what in ("processes", "descriptors", "threads", "scratch")
            if last[what] > first[what]
        ]
        if last["processes"]:
            found.append(f"{last['processes']} processes are left")
        if (grows := self.slope(settled)) > slope:
            found.append(f"memory grows by {grows:.2f} MiB per cycle")
        return found


def scratch():
    """Files and folders of this process in scratch."""
    mark = f"llamatelemetry-scratch-{os.getpid()}-"
    places = {Path(tempfile.gettempdir()), Path("/dev/shm")}
    return [path for place in places for found in place.glob(f"{mark}*") for path in _all(found)]


def _all(folder):
    return [folder, *folder.rglob("*")]


def cycle(model, number):
    """One load, a text, a capture, and the end."""
    from llamatelemetry import InferenceEngine

    engine = InferenceEngine()
    engine.load_model(model, silent=True, ctx_size=256)
    assert engine.infer([1, 2, 3], max_tokens=2, ignore_eos=True).tokens_generated == 2
    assert engine.capture([1, 2, 3]).attention.shape[-1] == 3
    if number % DROPPED:
        engine.close()


def measure(model, count, one=cycle, stop=lambda ledger: False):
    """The Ledger of so many cycles, fewer where stop(ledger) says so after one."""
    ledger = Ledger()
    for number in range(count):
        one(model, number)
        ledger.note()
        if stop(ledger):
            break
    return ledger


def run(soak):
    """The row of this part."""
    from models import tiny_model

    count = soak.count or COUNT

    def stop(ledger):
        if len(ledger.notes) % 10 == 0:
            soak.progress(len(ledger.notes), count, ledger.notes[-1])
        return soak.over()

    with tempfile.TemporaryDirectory() as folder:
        ledger = measure(tiny_model("llama", folder), count, stop=stop)
    if len(ledger.notes) < count:
        return None
    for said in ledger.findings():
        soak.find(said, "--parts cycles")
    row = {"what": "all", "count": count, "dropped": -(-count // DROPPED)}
    last = ledger.notes[-1]
    return [row | {"mib_per_cycle": round(ledger.slope(), 3), "descriptors": last["descriptors"]}]
