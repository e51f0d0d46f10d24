"""A process that stalls is found out and ended; one that works is not, however long it takes."""

import os
import signal
import subprocess
import sys
import threading
import time

import nbformat
import pytest
from models import IDS, tiny_model

from llamatelemetry import (
    InferenceEngine,
    ModelLoadError,
    ServerError,
    WorkerCrashedError,
    child,
    liveness,
    quantize,
)
from llamatelemetry import running as run
from llamatelemetry.compare.bench import bench
from llamatelemetry.convert.importance import imatrix
from llamatelemetry.errors import NotebookError, QuantizeError
from llamatelemetry.liveness import Watch
from llamatelemetry.tools.notebooks import run_notebook

LOOPS = "while :; do :; done"


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Limits of a second or two."""
    limits = {"TICK": 0.1, "STOPPED": 1, "SILENT": 2, "LOOP": 2, "ASKED": 0.5}
    for name, value in limits.items():
        monkeypatch.setattr(liveness, name, value)


def watched(command, *, before=None, beats=False, seconds=5.0):
    """Why a Watch ended a process within so many seconds, or None."""
    process, said = subprocess.Popen(["sh", "-c", command]), []

    def end(why):
        said.append(why)
        process.kill()

    if before:
        os.kill(process.pid, before)
    with Watch(process.pid, end, 1.0) as watch:
        until = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
            if beats:
                watch.beat()
    process.kill()
    process.wait()
    return said[0] if said else None


@pytest.mark.parametrize(
    "command, before, why",
    [
        ("sleep 60; :", signal.SIGSTOP, "stopped by a signal"),
        ("sleep 60; :", None, "neither computed nor answered"),
        (LOOPS, None, "endless loop"),
    ],
)
def test_one_that_stalls(command, before, why):
    assert why in watched(command, before=before, seconds=15)


@pytest.mark.parametrize("command", ["sleep 60; :", LOOPS])
def test_one_that_gives_signs_is_let_be(command):
    assert watched(command, beats=True, seconds=3) is None


@pytest.mark.parametrize(
    "thread, sleeps", [("while True: pass", False), ("threading.Event().wait()", True)]
)
def test_a_process_sleeps_when_all_of_its_threads_do(thread, sleeps):
    """Its first one may wait for another that gets no CPU, on a machine that is busy."""
    script = (
        "import sys, threading, time\nsys.setswitchinterval(1e-6)\n"
        f"def work():\n    {thread}\n"
        "threading.Thread(target=work, daemon=True).start()\nprint('', flush=True)\ntime.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        deadline = time.monotonic() + 20
        while liveness._read(process.pid)[0] != "S" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert liveness._read(process.pid)[0] == "S"  # what is said of the first thread
        assert liveness._sleeps(process.pid) is sleeps
    finally:
        process.kill()
        process.communicate()


def test_a_stopped_process_that_goes_on_is_let_be():
    assert watched("kill -STOP $$ & sleep 0.3; :; kill -CONT $$; exit 0", seconds=1) is None


def test_patience_grows_with_the_work(tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"x")
    with open(large, "wb") as file:
        file.truncate(5 * 10**9)  # an 8B shape
    assert liveness.patience([small], 512, 4096, False) < 3
    assert 3600 < liveness.patience([large], 512, 4096, False)
    assert liveness.patience([small, tmp_path / "none"], 512, 4096, True) > 800


@pytest.mark.parametrize(
    "script, why",
    [
        ("kill -STOP $$", "stopped by a signal"),
        ("exec sleep 60", "neither computed nor answered"),
        (LOOPS, "endless loop"),
    ],
)
def test_a_tool_that_stalls(script, why):
    with pytest.raises(QuantizeError, match=f"Could not try .*{why}.*was ended"):
        run.run_tool(["/bin/sh", "-c", script], "try", limit=1.0)


def test_a_tool_that_says_something_now_and_then_is_let_be():
    script = "for i in 1 2 3 4 5; do echo $i; sleep 0.7; done"
    assert run.run_tool(["/bin/sh", "-c", script], "try", limit=1.0).split() == list("12345")


def test_a_guard_holds_no_log_when_it_is_heard_of(monkeypatch, tmp_path):
    """Where it did for a moment longer, one stopped in that moment was waited for without end."""
    slow = tmp_path / "slow.py"
    slow.write_text(f"""
import os, runpy, time
write = os.write
os.write = lambda *given: (write(*given), time.sleep(1))
runpy.run_path({run.guard.__file__!r}, run_name="__main__")
""")
    monkeypatch.setattr(run.guard, "__file__", str(slow))
    read, write = os.pipe()
    with os.fdopen(read, "rb") as output:
        with os.fdopen(write, "wb") as log:
            process, _ = run.guard.popen(["/bin/sleep", "0.1"], log)
        held = {os.readlink(f"/proc/{process.pid}/fd/{number}") for number in (1, 2)}
        assert held == {os.devnull} and output.read() == b""
        run.guard.stop(process)


def test_a_guard_that_is_stopped_before_it_says_anything(monkeypatch, tmp_path):
    stops = tmp_path / "python"
    stops.write_text("#!/bin/sh\nkill -STOP $$\n")
    stops.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stops))
    with pytest.raises(QuantizeError, match="its guard is stopped by a signal"):
        run.run_tool(["/bin/sh", "-c", "exec sleep 60"], "try")


def test_a_guard_that_is_stopped_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(run, "GUARD_S", 1)

    def stop(pid):
        os.kill(int(open(f"/proc/{pid}/stat").read().split()[3]), signal.SIGSTOP)

    with pytest.raises(QuantizeError, match="does not answer"):
        run.run_tool(["/bin/sh", "-c", "exec sleep 0.5"], "try", seen=stop)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["llama-quantize", "llama-imatrix", "llama-bench"])
def test_every_tool_that_is_stopped_is_found_out(what, tmp_path, monkeypatch):
    """Each is stopped as soon as it runs; no half-written file stays, and the next run works."""
    popen, model = run.guard.popen, tiny_model("llama", tmp_path)

    def stopped(*args, **kwargs):
        guard, pid = popen(*args, **kwargs)
        if "--dry-run" not in args[0]:
            os.kill(pid, signal.SIGSTOP)
        return guard, pid

    ask, error = {
        "llama-quantize": (
            lambda: quantize(model, tmp_path / "q.gguf", "Q8_0", progress=False),
            QuantizeError,
        ),
        "llama-imatrix": (
            lambda: imatrix(model, "The cat. " * 400, tmp_path / "i.gguf", 32, progress=False),
            QuantizeError,
        ),
        "llama-bench": (lambda: bench(model, 16, 4, 1), ModelLoadError),
    }[what]
    with monkeypatch.context() as patch:
        patch.setattr(run.guard, "popen", stopped)
        with pytest.raises(error, match="stopped by a signal"):
            ask()
    assert [path.name for path in tmp_path.iterdir()] == [model.name]
    found = ask()
    if what == "llama-bench":
        assert found["prompt_tps"] > 0 and found["generation_tps"] > 0 and found["load_s"] > 0
        assert found["resident_bytes"] > 10**6
    else:
        assert found.is_file()


@pytest.mark.slow
def test_a_kernel_that_is_stopped_is_found_out(tmp_path):
    """What was executed until then is kept, and the next notebook runs."""
    path, out = tmp_path / "n.ipynb", tmp_path / "out"
    stop = "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)"
    for source in ("1 + 1", stop):
        cells = [nbformat.v4.new_code_cell(source) for source in ("A = 5", source)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
        if source != stop:
            run_notebook(path, out, progress=False)
            continue
        with pytest.raises(
            NotebookError, match=r"In \[2\] \(.*\): the kernel is stopped by a signal"
        ):
            run_notebook(path, out, progress=False)
    assert nbformat.read(out / path.name, 4).cells[0].execution_count == 1


def ropeless(folder):
    """llama.cpp computes for ever with this one: gemma3 with rope.dimension_count=0."""
    import gguf

    path = tiny_model("gemma3", folder)
    reader = gguf.GGUFReader(path, "r+")
    reader.fields["gemma3.rope.dimension_count"].parts[-1][0] = 0
    reader.data.flush()
    return path


@pytest.mark.slow
def test_a_worker_that_loops_or_is_stopped(tmp_path):
    with InferenceEngine() as engine:
        engine.load_model(ropeless(tmp_path), auto_start=False, silent=True)
        with pytest.raises(WorkerCrashedError, match="endless loop"):
            engine.capture([1, 2, 3])
        engine.load_model(tiny_model("llama", tmp_path), auto_start=False, silent=True)
        engine.capture(IDS)
        os.kill(engine._session.pid, signal.SIGSTOP)
        with pytest.raises(WorkerCrashedError, match="stopped by a signal"):
            engine.capture(IDS)
        assert len(engine.capture(IDS).tokens) == len(IDS)


@pytest.mark.parametrize("letters", [1, 10**6])  # a pipe holds 65,536
def test_a_child_that_is_stopped_is_found_out_however_long_its_command_is(letters):
    env = dict(os.environ)
    with child.Child("llamatelemetry.capture.worker", "A worker", env) as one:
        os.kill(one.pid, signal.SIGSTOP)
        with pytest.raises(WorkerCrashedError, match="stopped by a signal"):
            one.call("tokenize", text="a" * letters)


@pytest.mark.slow
def test_a_server_that_loops_or_is_stopped(tmp_path, llama_server):
    with InferenceEngine(llama_server) as engine:
        with pytest.raises(ServerError, match="endless loop"):
            engine.load_model(ropeless(tmp_path), silent=True)
            engine.infer([1, 2, 3], max_tokens=2)
        engine.load_model(tiny_model("llama", tmp_path), silent=True)
        os.kill(engine.server.pid, signal.SIGSTOP)
        with pytest.raises(ServerError, match="stopped by a signal"):
            list(engine.infer_stream(IDS, max_tokens=2))
        assert engine.infer(IDS, max_tokens=2).tokens_generated == 2


@pytest.mark.slow
@pytest.mark.parametrize("stall", [False, True])
def test_after_an_interrupt_only_a_stalled_server_goes(tmp_path, llama_server, stall, monkeypatch):
    monkeypatch.setattr(liveness, "STOPPED", 60)
    with InferenceEngine(llama_server) as engine:
        engine.load_model(tiny_model("llama", tmp_path), silent=True)
        engine.infer(IDS, max_tokens=1)
        pid = engine.server.pid
        if stall:
            os.kill(pid, signal.SIGSTOP)
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            while True:
                engine.infer(IDS, max_tokens=200, ignore_eos=True)
        assert engine.infer(IDS, max_tokens=2).tokens_generated == 2
        assert (engine.server.pid != pid) is stall


@pytest.mark.slow
def test_a_long_call_is_not_cut(smollm2, llama_server):
    with InferenceEngine(llama_server) as engine:
        engine.load_model(smollm2, silent=True, ctx_size=2048)
        engine.server._limit = 1.0  # less than the call takes, more than a token does
        started = time.monotonic()
        answer = engine.infer("Once", max_tokens=200, ignore_eos=True)
        assert answer.tokens_generated == 200 and time.monotonic() - started > 2
        engine._session_args["n_ubatch"] = 64
        engine.tokenize("x")
        engine._session.child._limit = 1.0
        engine.score("The cat sat on the mat. " * 60)
