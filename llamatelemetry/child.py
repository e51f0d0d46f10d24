"""One way to have a child process of ours: Python that speaks JSON lines, whose death costs its
parent nothing, and which dies with its parent, whatever ends that.

The parent makes a Child of a module that runs `serve`. The child's stdin is a pipe that only the
parent holds; where it ends, so does the child, in the middle of a computation too. What anything
in the child prints goes to a log. Files cross in the child's folder, which goes when it ends."""

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

from . import errors, logs
from .errors import CaptureError, LlamaTelemetryError, WorkerCrashedError
from .files.scratch import Folder
from .liveness import LOOP, Watch

WATCHING: list[int] = []  # in a child: threads that only look whether the parent is there
NODES = [0]  # in a child: nodes of graphs that were computed, as far as anybody looked


class Child:
    """A process of `python -m module`. Attributes: pid, folder, process. Also a context manager."""

    def __init__(self, module, name, env, then="", limit=LOOP):
        """name: what errors call it; env: its whole environment; then: a sentence for the error of
        its death. limit: seconds that it may compute without a sign of progress (liveness.py: what
        Watch does with one that stalls)."""
        self.name, self._then, self._limit = name, then, limit
        folder = Folder(_roomy_folder())
        self.folder = folder.path
        self.log_path = self.folder / "worker.log"
        package = str(Path(__file__).resolve().parents[1])
        paths = [package, env["PYTHONPATH"]] if env.get("PYTHONPATH") else [package]
        try:
            with open(self.log_path, "wb") as log:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", module, str(self.folder), str(os.getpid())],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=env | {"PYTHONPATH": os.pathsep.join(paths)},
                    start_new_session=True,  # Ctrl-C is ours to handle
                )
        except BaseException:
            folder.remove()
            raise
        self.pid, self._why = self.process.pid, ""
        self._end = weakref.finalize(self, _ended, self.process, folder)

    @property
    def alive(self):
        """Whether it runs."""
        return self.process.poll() is None

    def call(self, command, hear=None, **arguments):
        """The child's answer to a command, a method of what it serves.

        hear(**said): called with what it tells before it answers. Raises the error that the method
        raised, by the name of its class; WorkerCrashedError, with the tail of its log, where the
        child has ended, or stalled and was ended for it."""
        if not self.alive:
            raise self._crashed()
        try:
            with Watch(self.pid, self.kill, self._limit) as watch:
                # One that is stopped takes no more than its pipe holds
                self.process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
                self.process.stdin.flush()
                while line := self.process.stdout.readline():
                    watch.beat()
                    answer = json.loads(line)
                    if "ok" in answer or "error" in answer:
                        break
                    if hear and "said" in answer:
                        hear(**answer["said"])
                else:
                    raise self._crashed()
        except (BrokenPipeError, ValueError) as error:
            raise self._crashed() from error
        except BaseException:
            self.kill()  # its answer must not be taken for the next command's
            raise
        if "error" in answer:
            raise getattr(errors, answer["error"], CaptureError)(answer["message"])
        return answer["ok"]

    def log(self):
        try:
            return self.log_path.read_text(errors="replace")
        except OSError:
            return "(no log)"

    def kill(self, why=""):
        """End the process now. why: what the error of a call that waits for it says."""
        self._why = self._why or why
        self.process.kill()
        self.process.wait()

    def close(self):
        """End the process and remove its folder; so does dropping this object. Safe to call
        twice."""
        self._end()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _crashed(self):
        try:
            self.process.wait(timeout=2)
        except subprocess.TimeoutExpired:  # it answered what no child says
            self.kill()
        code, log = self.process.returncode, self.log()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        why = logs.reason(log, killed=code < 0)
        if self._why:
            how = self._why
        message = f"{self.name} ended ({how}{why and f': {why}'}).{self._then and f' {self._then}'}"
        return WorkerCrashedError(f"{message} End of its log:\n{logs.last_words(log)}")


def _ended(process, folder):
    if folder.owner != os.getpid():
        return  # a fork does not end its parent's child
    if process.poll() is None:
        try:
            process.stdin.close()
            process.wait(timeout=3)
        except (OSError, subprocess.TimeoutExpired):
            process.kill()
            process.wait()
    process.stdout.close()
    folder.remove()


def _roomy_folder():
    """Shared memory where it has at least 4 GiB (containers often give 64 MiB), else the temporary
    folder."""
    shared = "/dev/shm"
    writable = os.path.isdir(shared) and os.access(shared, os.W_OK)
    return shared if writable and shutil.disk_usage(shared).free >= 4 * 2**30 else None


def serve(make):
    """The child's side, to its end: commands from stdin become calls of methods of make(tell).

    tell(**said): what the parent's `hear` gets before the answer."""
    out, turn, working = os.fdopen(os.dup(1), "w"), threading.Lock(), threading.Event()
    os.dup2(2, 1)  # whatever a library prints goes to the log, not between the answers

    def answer(**message):
        if "said" not in message and "alive" not in message:
            working.clear()
        with turn:
            out.write(json.dumps(message) + "\n")
            out.flush()

    threading.Thread(target=_beat, args=(answer, working), daemon=True).start()
    lines = _listen(sys.stdin, *sys.argv[1:3])  # before what takes a while to be imported
    worker = make(lambda **said: answer(said=said))
    while True:
        command = json.loads(lines.get())
        working.set()
        try:
            answer(ok=getattr(worker, command.pop("command"))(**command))
        except LlamaTelemetryError as error:
            answer(error=type(error).__name__, message=str(error))
        except Exception as error:
            import traceback

            traceback.print_exc()
            answer(error="CaptureError", message=f"{type(error).__name__}: {error}")


def _beat(answer, working):
    """Tell the parent each second whether anything has moved since the last: the nodes of the graph
    that were computed, or the line of Python that a thread is at."""
    before, me = None, threading.get_ident()
    while working.wait():
        frames = sys._current_frames().items()
        threads = [(at, id(one), one.f_lasti) for at, one in frames if at not in (me, *WATCHING)]
        if (now := (NODES[0], threads)) != before:
            answer(alive=True)
        before, frames = now, None
        time.sleep(1)


def _listen(pipe, folder, parent):
    """A queue of the lines of stdin, through a thread, so that the parent's end is noticed during a
    long computation too; then the folder goes as well: it may lie in memory."""
    lines = queue.Queue()

    def leave():
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(0)

    def read():
        for line in pipe:
            lines.put(line)
        leave()

    def look():
        WATCHING.append(threading.get_ident())
        while os.getppid() == int(parent):  # a fork of the parent may hold the pipe open
            time.sleep(0.5)
        leave()

    threading.Thread(target=read, daemon=True).start()
    threading.Thread(target=look, daemon=True).start()
    return lines
