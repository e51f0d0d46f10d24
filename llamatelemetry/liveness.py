"""Whether a process that somebody waits for still gets on, told from what it does, not from how
long it takes."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

STOPPED = 5  # seconds in which it is stopped (SIGSTOP), and nobody lets it go on
SILENT = 60  # seconds asleep: no CPU time, nothing read, no sign of progress
LOOP = 60  # seconds of computing without a sign, besides what the work may take
COMPILING = 900  # instead of LOOP where there is a GPU: its driver may compile every kernel first
LOADED, COMPUTED = 20e6, 2e9  # bytes and operations per second, slower than any machine is
ASKED = 5  # seconds after which a process that can be asked is asked whether it gets on
TICK = 0.5
_TICKS = os.sysconf("SC_CLK_TCK")


def patience(files: Iterable[str | os.PathLike], tokens: int, context: int, gpu: bool) -> float:
    """Seconds of computing that one step of a working process may take without a sign: to load
    these files, or to decode `tokens` at once with `context` before them. Two operations per weight
    and token, a weight being half a byte at least, and attention besides."""
    size = size_of(files)
    work = 4 * size * tokens * (1 + context / 3000)
    return (COMPILING if gpu else LOOP) + size / LOADED + work / COMPUTED


def size_of(files: Iterable[str | os.PathLike]) -> int:
    """Bytes of some files, of which one may have gone in this moment."""
    size = 0
    for file in files:
        with contextlib.suppress(OSError):
            size += os.stat(file).st_size
    return size


class Watch:
    """Ends a process that stalls while a `with` block waits for it.

    It has stalled where it is stopped for STOPPED seconds, asleep for SILENT, or computes for
    `limit` seconds (see patience; seconds in which it has the CPU) without a sign of progress;
    limit=None: of one that works for as long as it likes, only where it is stopped. A
    sign: beat() is called, or ask() returns, which then waits for the process in a thread of its
    own. end(why) is called once, from another thread, and ends the process: why is a clause.
    """

    def __init__(
        self,
        pid: int,
        end: Callable[[str], object],
        limit: float | None = LOOP,
        ask: Callable[[], object] | None = None,
    ) -> None:
        self._pid, self._end, self._limit, self._ask = pid, end, limit, ask
        self._over, self._beats = threading.Event(), 0

    def beat(self, *_: object) -> None:
        """Say that the process got on."""
        self._beats += 1

    def __enter__(self) -> Watch:
        threading.Thread(target=self._look, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _look(self):
        stopped = asleep = busy = waited = 0.0
        beats, before = 0, _read(self._pid)
        while before and not self._over.wait(TICK):
            now = _read(self._pid)
            if now is None:
                return
            state, cpu, done = now
            used = cpu - before[1]
            stopped = stopped + TICK if state == "T" else 0
            idle = state == "S" and used < TICK / 50 and done == before[2] and _sleeps(self._pid)
            asleep = asleep + TICK if idle else 0
            busy += min(used, TICK)
            if self._beats != beats:
                beats, asleep, busy = self._beats, 0, 0
            before, waited = now, waited + TICK
            if why := self._stalled(stopped, asleep, busy):
                if not self._over.is_set():
                    self._end(why)
                return
            if self._ask and waited == ASKED:
                threading.Thread(target=self._questions, daemon=True).start()

    def _stalled(self, stopped, asleep, busy):
        if stopped >= STOPPED:
            return f"is stopped by a signal, for {STOPPED} s now"
        if self._limit is None:
            return None
        if asleep >= SILENT:
            return f"has neither computed nor answered for {SILENT} s"
        if busy >= self._limit:
            return f"has computed for {self._limit:.0f} s without getting on, in an endless loop"
        return None

    def _questions(self):
        with contextlib.suppress(Exception):  # it ended, or was ended
            while not self._over.is_set():
                self._ask()
                self.beat()
                self._over.wait(ASKED)


def stopped(pid: int) -> bool:
    """Whether a signal has stopped a process."""
    found = _read(pid)
    return found is not None and found[0] == "T"


def kill(pid: int) -> None:
    """End a process at once, if it is still there."""
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)


def _sleeps(pid):
    """Whether all threads of a process do, not only its first: one that is ready and gets no CPU on
    a busy machine waits for nobody else."""
    try:
        threads = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    except OSError:  # one has just ended
        return False
    return all(said.rpartition(")")[2].split()[0] == "S" for said in threads)


def _read(pid):
    """(state, seconds of CPU time, pages and bytes that it waited for) of a process; None where it
    has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    done = [int(fields[9])]  # page faults that read from a disk
    with contextlib.suppress(OSError):  # not everywhere can it be read
        done.append(Path(f"/proc/{pid}/io").read_text().split("write_bytes")[0])
    state, cpu = fields[0], (int(fields[11]) + int(fields[12])) / _TICKS
    return None if state in "ZX" else (state, cpu, done)
