"""One scene: a process of the package in one phase of its work, one fault that strikes it, and what
must be true afterwards: a typed error or the right result within a limit, the next call right, no
process, no scratch and no half output left."""

import json
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from .actor import digest
from .marked import Marked

HERE = Path(__file__).parent
SERVER, WORKER = "llama-server", ".worker"  # ends of a program's or a module's name
# Whose work a phase is, as its command line says; None: the process's own.
WORKS = {
    "load": SERVER,
    "infer": SERVER,
    "stream": SERVER,
    "embed": SERVER,
    "capture start": WORKER,
    "capture running": WORKER,
    "head statistics": WORKER,
    "collect": WORKER,
    "cut edges": WORKER,
    "quantize": "llama-quantize",
    "expand": None,
    "imatrix": "llama-imatrix",
    "compare": WORKER,
    "make_reference": None,
}
GUARDED = (SERVER, "llama-quantize", "llama-imatrix")
# Faults of what works for the process; of the disk and the file; of the process itself.
OTHERS = ("kill", "stop", "guard")
FILES = ("overwritten", "truncated", "removed")
OWN = ("full", "interrupt", "parent", "fork")
FAULTS = (*OTHERS, *FILES, *OWN)
LIMIT, TIMES = 30, 5  # an answer may take LIMIT s and TIMES what it takes undisturbed
GONE = 8  # seconds in which nothing runs any more
SHIFT = 20 * 4096  # bytes: whole blocks of Q4_1
ROOM = "700m"  # of the temporary folder that gets full


def applies(phase, fault):
    """Whether there is such a pair: who works alone has nobody else to be killed."""
    if fault == "guard":
        return WORKS[phase] in GUARDED
    return fault not in OTHERS or WORKS[phase] is not None


@dataclass
class Verdict:
    """findings: what is wrong, each (kind, what was said); struck: whether the fault came in
    time."""

    phase: str
    fault: str
    findings: list = field(default_factory=list)
    struck: bool = False
    kind: str = ""
    said: str = ""
    seconds: float = 0.0
    digest: str = ""

    def find(self, kind, said):
        self.findings.append((kind, str(said)[-600:]))


class Play:
    """The process of a scene, as its director has it."""

    def __init__(self, phase, model, folder, fault, actor=HERE / "actor.py"):
        self.folder, self.marked, self.answers = folder, Marked(), queue.Queue()
        temp, out = folder / "tmp", folder / "out"
        temp.mkdir()
        out.mkdir()
        command = [sys.executable, str(actor), phase, str(model)]
        if fault == "full":
            # A small disk of its own for all that is temporary, and for what is made
            command = [*command, str(temp / "out")]
            mount = (
                f"mount -t tmpfs -o size={ROOM} tmpfs {temp}; mount -t tmpfs -o size=1m x /dev/shm"
            )
            shell = f'{mount}; mkdir {temp}/out; exec "$@"'
            command = ["unshare", namespace(), "sh", "-ec", shell, "sh", *command]
        else:
            command = [*command, str(out)]
        env = os.environ | self.marked.environment
        paths = [str(HERE.parents[1]), env.get("PYTHONPATH", "")]
        env |= {"TMPDIR": str(temp), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        env |= {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(folder / "stderr", "wb"),
            text=True,
            env=env,
            start_new_session=True,
        )
        threading.Thread(target=self._hear, daemon=True).start()

    def _hear(self):
        for line in self.process.stdout:
            self.answers.put(json.loads(line))
        self.answers.put(None)

    def tell(self, command):
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def answer(self, seconds):
        """What the process says next; None where it ended, raises queue.Empty where it says
        nothing."""
        return self.answers.get(timeout=seconds)

    def words(self):
        return (self.folder / "stderr").read_text(errors="replace")[-600:]

    def close(self):
        for process in self.marked.all():
            try:
                process.kill()
            except psutil.Error:
                pass
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()


def namespace():
    """unshare's option for mounts of one's own."""
    return "-m" if os.getuid() == 0 else "-rm"


def can_mount():
    """Whether a small disk can be made here; else nothing can be filled."""
    try:
        command = ["unshare", namespace(), "mount", "-t", "tmpfs", "x", "/dev/shm"]
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def prepared(fault, model):
    """What a fault needs that takes time to get: bytes of weights that come at another place."""
    return model.read_bytes()[-(model.stat().st_size // 2) :] if fault == "overwritten" else b""


def strike(play, fault, phase, model, raw):
    """Let the fault happen. False where there was nothing to strike."""
    if fault in OTHERS:
        find = play.marked.guard if fault == "guard" else lambda: play.marked.working(WORKS[phase])
        deadline = time.monotonic() + LIMIT
        while not (found := find()):
            if not play.answers.empty() or time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        found.send_signal(signal.SIGSTOP if fault == "stop" else signal.SIGKILL)
    elif fault == "overwritten":
        # Weights of one place at another: nothing crashes, and nothing is right
        with open(model, "r+b") as file:
            file.seek(-len(raw), os.SEEK_END)
            file.write(raw[SHIFT:])
    elif fault == "truncated":
        os.truncate(model, model.stat().st_size // 3)
    elif fault == "removed":
        model.unlink()
    elif fault == "full":
        play.tell("fill")
    elif fault == "interrupt":
        os.killpg(play.process.pid, signal.SIGINT)  # as a notebook's server does
    else:
        os.kill(play.process.pid, signal.SIGKILL)
    return True


def play(phase, fault, model, folder, *, seed=0, usual=1.0, right=None, times=1, **given):
    """The Verdict of one scene. model: copied into `folder`, which is empty; usual: seconds of the
    undisturbed call; right: its digest; times: by which limits are longer. fault None: none."""
    verdict, folder = Verdict(phase, fault or "none"), Path(folder)
    mine = Path(shutil.copy(model, folder / "model.gguf"))
    limit = times * (LIMIT + TIMES * usual)
    stage = Play(phase, mine, folder, fault, **given)
    try:
        _play(
            verdict,
            stage,
            mine,
            model,
            limit,
            random.Random(seed).uniform(0.02, 0.8) * usual,
            right,
        )
    finally:
        stage.close()
    return verdict


def _play(verdict, stage, mine, model, limit, delay, right):
    fault, phase = verdict.fault, verdict.phase
    try:
        if stage.answer(4 * limit) is None:
            return verdict.find("crash", f"it did not get ready: {stage.words()}")
        fork, there = None, False
        if fault == "fork":
            stage.tell("fork")
            fork = stage.answer(limit)["fork"]
        raw = prepared(fault, mine)
        stage.tell("go")
        if fault != "none":
            time.sleep(delay)
            there = strike(stage, fault, phase, mine, raw)
            verdict.struck = there and stage.answers.empty()
        if fault in ("parent", "fork"):
            return _after_its_end(verdict, stage, fork, right)
        answer = stage.answer(limit)
        if answer is None:
            return verdict.find("crash", f"{stage.process.wait()}: {stage.words()}")
        verdict.kind, verdict.said, verdict.seconds = (
            answer["kind"],
            answer["said"],
            answer["seconds"],
        )
        _judge(verdict, answer, right, first=True)
        if fault == "full":
            stage.tell("room")
        elif fault in FILES:
            os.replace(shutil.copy(model, f"{mine}.new"), mine)
        if fault != "none":
            stage.tell("again anew" if fault in FILES else "again")
            answer = stage.answer(limit)
            if answer is None:
                return verdict.find("crash", f"at the next call: {stage.words()}")
            late = there and fault in OTHERS and not verdict.struck  # it meets the next call
            _judge(verdict, answer, right, first=late)
        stage.tell("end")
        answer = stage.answer(limit)
        if answer is None:
            return verdict.find("crash", f"at its end: {stage.words()}")
        if answer["left"]:
            verdict.find("file", answer["left"])
        stage.process.wait(limit)
    except queue.Empty:
        return verdict.find("hang", f"nothing within {limit:.0f} s")
    except subprocess.TimeoutExpired:
        return verdict.find("hang", "it does not end")
    if left := stage.marked.left(GONE):
        verdict.find("process", left)
    _files(verdict, stage, right)


def _judge(verdict, answer, right, first):
    """Whether an answer is one that may be given."""
    kind, said = answer["kind"], answer["said"]
    when = "" if first else "at the next call: "
    if kind == "works":
        verdict.digest = said
        if right and said != right:
            verdict.find("wrong", f"{when}{said} is not {right}")
    elif kind == "interrupted" and first and verdict.fault == "interrupt":
        return
    elif not first or verdict.fault == "none":
        verdict.find("next call" if not first else kind, f"{when}{said}")
    elif kind != "typed":
        verdict.find(kind, said)


def _after_its_end(verdict, stage, fork, right):
    verdict.kind = "killed"
    if left := stage.marked.left(GONE, but=[fork]):
        verdict.find("process", left)
    if fork:
        os.kill(fork, signal.SIGKILL)
    _next_start(stage.folder)
    _files(verdict, stage, right)


def _next_start(folder):
    """What the next process of ours does."""
    code = "from llamatelemetry.files.scratch import sweep; sweep()"
    env = os.environ | {"TMPDIR": str(folder / "tmp")}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, cwd=HERE.parents[1])


def _files(verdict, stage, right):
    """What is left in scratch, and outputs that are not whole."""
    left = [path for path in (stage.folder / "tmp").rglob("*") if not path.is_dir()]
    mark = f"llamatelemetry-scratch-{stage.process.pid}-"
    for place in (Path("/dev/shm"), stage.folder / "tmp"):
        left += place.glob(f"{mark}*")
    left += (stage.folder / "out").rglob(".*")
    if left:
        verdict.find("file", sorted(map(str, left))[:5])
        for path in left:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
    for path in (stage.folder / "out").glob("[!.]*"):
        # The call's digest is that of its file, but for an importance matrix, which names its text
        if path.is_dir():
            whole = _collected(path)
        else:
            whole = verdict.phase == "imatrix" or not right or digest(path) == right
        if not whole:
            verdict.find("half", path.name)


def _collected(folder):
    """Whether all that lies in a store of states can be read."""
    from llamatelemetry import CollectError, open_states

    try:
        return not any(folder.iterdir()) or open_states(folder).sizes["text"] > 0
    except CollectError:
        return False
