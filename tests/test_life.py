"""The life of processes: none is left by what is dropped, replaced or called from several
threads."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
from models import IDS, tiny_model
from processes import alive, gone

from llamatelemetry import InferenceEngine, LlamaTelemetryError, ServerManager, guard, templates
from llamatelemetry.child import Child
from llamatelemetry.errors import QuantizeError, TemplateError
from llamatelemetry.liveness import stopped
from llamatelemetry.running import run_tool


@pytest.fixture
def standing(tmp_path, monkeypatch):
    """A ServerManager of a program that sleeps, and is taken for ready."""
    program = tmp_path / "llama-server"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)

    def ready(server, *_):
        time.sleep(0.05)
        server.url = "http://127.0.0.1:9"

    monkeypatch.setattr(ServerManager, "_wait_until_ready", ready)
    monkeypatch.setenv("LLAMA_SERVER_PATH", str(program))
    return program


@pytest.fixture
def model(tmp_path):
    return tiny_model("llama", tmp_path)


def started(monkeypatch):
    """The ids of all servers that are started from now on."""
    pids, popen = [], guard.popen

    def watched(*args, **kwargs):
        process, pid = popen(*args, **kwargs)
        pids.append(pid)
        return process, pid

    monkeypatch.setattr(guard, "popen", watched)
    return pids


def test_a_dropped_or_replaced_engine_ends_its_server(standing, model, monkeypatch):
    pids = started(monkeypatch)
    for _ in range(2):  # a cell that is run again
        engine = InferenceEngine()
        engine.load_model(model, silent=True)
    gc.collect()
    assert len(pids) == 2 and gone(pids[0]) and alive(pids[1])
    folder = engine.server.log.parent
    del engine
    gc.collect()
    assert gone(pids[1]) and not folder.exists()


def test_a_dropped_child_ends(tmp_path):
    child = Child("llamatelemetry.capture.worker", "worker", dict(os.environ))
    pid, folder = child.pid, child.folder
    del child
    gc.collect()
    assert gone(pid) and not folder.exists()


def test_a_fork_that_ends_leaves_its_parents_processes(standing, model):
    script = (
        "import os, sys, time\nfrom llamatelemetry import ServerManager\n"
        "ServerManager._wait_until_ready = lambda *_: None\n"
        f"server = ServerManager().start_server({str(model)!r}, silent=True)\n"
        "if os.fork() == 0:\n    sys.exit()\n"
        "os.wait()\nos.kill(server.pid, 0)\nprint(server.log.exists(), server.pid)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    there, pid = done.stdout.split()
    assert there == "True" and gone(int(pid))  # at the parent's end it is ended


def test_loads_from_several_threads_leave_one_server(standing, model, monkeypatch):
    pids, engine, wrong = started(monkeypatch), InferenceEngine(), []

    def attempt(call):
        try:
            call()
        except LlamaTelemetryError:
            pass
        except BaseException as error:
            wrong.append(error)

    calls = [
        lambda: engine.load_model(model, silent=True),
        lambda: engine.infer("a", max_tokens=1),
        lambda: engine.embed("a"),
        engine.placement,
        engine.close,
    ]
    threads = [threading.Thread(target=attempt, args=(call,)) for call in calls * 4]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    engine.close()
    assert not wrong and all(gone(pid) for pid in pids)


@pytest.mark.slow
def test_close_ends_a_call_of_another_thread(model):
    said = []
    with InferenceEngine() as engine:
        engine.load_model(model, silent=True)
        engine.capture(IDS)

        def run(call):
            try:
                while True:
                    call()
            except LlamaTelemetryError as error:
                said.append(type(error).__name__)

        calls = [lambda: engine.capture(IDS), lambda: engine.infer(IDS[:2], max_tokens=50)]
        threads = [threading.Thread(target=run, args=(call,)) for call in calls]
        [thread.start() for thread in threads]
        time.sleep(0.5)
        engine.close()
        [thread.join(20) for thread in threads]
        assert len(said) == 2


@pytest.mark.parametrize("fork", ["", "if os.fork() == 0: time.sleep(8); os._exit(0)\n"])
def test_a_worker_whose_parent_was_killed_goes(fork):
    """Also where a fork of the parent holds its pipe."""
    script = (
        "import os, time\nfrom llamatelemetry.child import Child\n"
        "child = Child('llamatelemetry.capture.worker', 'worker', dict(os.environ))\n"
        f"{fork}print(child.pid, child.folder, flush=True)\ntime.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    pid, folder = parent.stdout.readline().split()
    parent.kill()
    parent.wait()
    assert gone(int(pid), 7) and not os.path.exists(folder)


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_stopped_worker_whose_parent_was_killed_goes(goes_on):
    """Once it is continued, or at the next start."""
    from llamatelemetry.files.scratch import sweep

    script = (
        "import os, time\nfrom llamatelemetry.child import Child\n"
        "child = Child('llamatelemetry.capture.worker', 'worker', dict(os.environ))\n"
        "print(child.pid, child.folder, flush=True)\ntime.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    pid, folder = parent.stdout.readline().split()
    time.sleep(2)  # until it serves
    os.kill(int(pid), signal.SIGSTOP)
    while not stopped(int(pid)):  # it may not run at this moment
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    if goes_on:
        os.kill(int(pid), signal.SIGCONT)
    else:
        sweep()
    assert gone(int(pid), 7) and not os.path.exists(folder)


@pytest.mark.parametrize("heard", [True, False])
def test_a_guard_whose_parent_went_before_it_was_up_ends(heard):
    """Also when a fork of the parent holds the pipe open, or nobody hears the guard any more."""
    before = subprocess.Popen(["true"])
    before.wait()
    read, write = os.pipe()
    if not heard:
        os.close(read)
    command = [str(before.pid), "0", "/bin/sleep", "60"]
    late = subprocess.Popen(
        [sys.executable, "-I", "-S", guard.__file__, *command], stdin=subprocess.PIPE, stdout=write
    )
    os.close(write)
    try:
        assert late.wait(10) == 0
        if heard:
            said = os.read(read, 99).split()
            os.close(read)
            assert said[0] == b"pid" and gone(int(said[1]), 2)
    finally:
        late.kill()
        late.stdin.close()


def test_half_an_output_of_a_killed_process_is_removed_at_the_next_start(tmp_path):
    script = (
        "import os, signal\nfrom llamatelemetry.files import scratch\n"
        "from llamatelemetry.files.outputs import written\nscratch._AFTER = ''  # its shell was ended\n"
        f"with written({str(tmp_path / 'x.gguf')!r}, need=1, model=True) as path:\n"
        "    path.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", script])
    assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
    from llamatelemetry.files.scratch import sweep

    sweep()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "template, ends",
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", True),
        ("{{ no end", True),  # llama-server says it
        ("{% for i in range(1000000000) %}{% endfor %}", False),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", False),
        ("{{ 'x' * 4000000000 }}", False),
    ],
)
def test_a_chat_template_is_tried_within_limits(template, ends, monkeypatch, tmp_path):
    """And only once where it ends."""
    runs, run = [], templates.subprocess.run
    monkeypatch.setattr(templates.subprocess, "run", lambda *a, **k: runs.append(1) or run(*a, **k))
    monkeypatch.setattr(templates, "SECONDS", 1)
    monkeypatch.setenv("LLAMATELEMETRY_CACHE", str(tmp_path))
    if ends:
        for _ in range(3):
            templates.check(template, "model.gguf")
        templates.check(template + " ", "model.gguf")
        assert len(runs) == 2
        return
    with pytest.raises(TemplateError, match="model.gguf"):
        templates.check(template, "model.gguf")


def test_an_interrupt_while_a_guard_starts_leaves_no_command(tmp_path, monkeypatch):
    """It would write after what it writes was removed."""
    popen, guards = subprocess.Popen, []

    def interrupted(*args, **kwargs):
        guards.append(popen(*args, **kwargs))
        signal.raise_signal(signal.SIGINT)
        return guards[-1]

    monkeypatch.setattr(guard.subprocess, "Popen", interrupted)
    with open(tmp_path / "log", "wb") as log, pytest.raises(KeyboardInterrupt):
        guard.popen(["/bin/sh", "-c", "while :; do sleep 0.01; done"], log)
    assert guards[0].returncode is not None


def test_a_tool_is_gone_when_its_run_is_interrupted():
    pids = []

    def seen(pid):
        pids.append(pid)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_tool(["/bin/sh", "-c", "while :; do :; done"], "try", seen=seen)
    assert gone(pids[0])


WRAPPER = "#!/bin/sh\nsleep 600 &\necho $!\nwait\n"  # its own command goes on where it is ended


@pytest.mark.parametrize("end", ["interrupt", "stall", "itself"])
def test_what_a_tool_has_started_goes_with_it(end, tmp_path, monkeypatch):
    """It would hold the tool's log, to whose end a run is waited for, and write on."""
    wrapper = tmp_path / "llama-quantize"
    wrapper.write_text(WRAPPER if end != "itself" else WRAPPER.replace("wait", "exit 0"))
    wrapper.chmod(0o755)
    monkeypatch.setenv("OF_TEST", str(tmp_path))
    monkeypatch.setattr("llamatelemetry.liveness.SILENT", 2)

    def seen(pid):
        time.sleep(0.5)
        if end == "interrupt":
            raise KeyboardInterrupt

    started = time.monotonic()
    expected = {"interrupt": KeyboardInterrupt, "stall": QuantizeError}.get(end)
    with pytest.raises(expected) if expected else contextlib.nullcontext():
        run_tool([str(wrapper)], "try", seen=seen)
    assert time.monotonic() - started < 30 and not sleeping(wrapper.parent)


def test_a_server_that_a_script_starts_goes_with_its_engine(standing, model, monkeypatch):
    standing.write_text(WRAPPER)
    monkeypatch.setenv("OF_TEST", str(standing.parent))
    with InferenceEngine() as engine:
        engine.load_model(model, silent=True)
        deadline = time.monotonic() + 10
        while not sleeping(standing.parent) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert sleeping(standing.parent)
    assert not sleeping(standing.parent)


def sleeping(folder):
    """Processes `sleep 600` of this test, told by a variable."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            mine = process.environ().get("OF_TEST") == str(folder)
            if mine and process.cmdline() == ["sleep", "600"] and process.status() != "zombie":
                found.append(process.pid)
    return found


def test_a_cell_that_shows_the_engine_keeps_none_when_it_runs_again():
    """IPython keeps the last value of every cell."""
    script = (
        "import gc, weakref\nfrom IPython.core.interactiveshell import InteractiveShell\n"
        "from llamatelemetry.history import forget\n"
        "class Thing: pass\n"
        "shell, refs = InteractiveShell.instance(), []\n"
        "shell.push(dict(Thing=Thing, forget=forget, refs=refs, weakref=weakref))\n"
        "cell = 't = Thing(); refs.append(weakref.ref(t)); forget(Thing, t)\\nt'\n"
        "for _ in range(3):\n    shell.run_cell(cell, store_history=True)\n"
        "gc.collect(); print([ref() is not None for ref in refs])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[False, False, True]", done.stderr
