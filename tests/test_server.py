"""llama-server's life: found, started, watched, stopped. A script stands in for it where its work
is not needed."""

import http.server
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest
from processes import alive, gone

from llamatelemetry import (
    ModelLoadError,
    ModelNotFoundError,
    ServerError,
    ServerManager,
    guard,
)
from llamatelemetry.files import programs
from llamatelemetry.files.programs import find_server
from llamatelemetry.gpus.cores import physical_cores


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Log folders are made in here, so that a test can see what is left."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


@pytest.fixture
def model_file(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    return tmp_path / "model.gguf"


def stand_in(tmp_path, script):
    """An executable that is started as llama-server would be and does what `script` (sh) says."""
    path = tmp_path / "llama-server"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


# Finding it


def test_nowhere_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "find_spec", lambda name: None)
    monkeypatch.setattr(programs.sys, "prefix", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LLAMA_SERVER_PATH", raising=False)
    with pytest.raises(ServerError, match="llamatelemetry engine build.*LLAMA_SERVER_PATH"):
        find_server()


def test_a_wrong_path_is_not_passed_over(tmp_path, monkeypatch):
    with pytest.raises(ServerError, match="server_path says"):
        ServerManager(tmp_path / "none")
    (tmp_path / "llama-server").write_text("not executable")
    monkeypatch.setenv("LLAMA_SERVER_PATH", str(tmp_path / "llama-server"))
    with pytest.raises(ServerError, match="LLAMA_SERVER_PATH says"):
        find_server()


def test_found_in_order(tmp_path, monkeypatch):
    for name in ("given", "environment", "path"):
        (tmp_path / name).mkdir()
        stand_in(tmp_path / name, "")
    monkeypatch.setattr(programs, "find_spec", lambda name: None)
    monkeypatch.setattr(programs.sys, "prefix", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.delenv("LLAMA_SERVER_PATH", raising=False)
    assert find_server() == tmp_path / "path" / "llama-server"
    monkeypatch.setenv("LLAMA_SERVER_PATH", str(tmp_path / "environment" / "llama-server"))
    assert find_server() == tmp_path / "environment" / "llama-server"
    assert (
        find_server(tmp_path / "given") == tmp_path / "given" / "llama-server"
    )  # its folder will do


def test_physical_cores():
    assert 1 <= physical_cores() <= os.cpu_count()


# Starting it


def test_no_model(tmp_path):
    with pytest.raises(ModelNotFoundError):
        ServerManager().start_server(tmp_path / "none.gguf")
    with pytest.raises(ModelLoadError, match="folder"):
        ServerManager().start_server(tmp_path)


@pytest.mark.parametrize("option", ["SO_REUSEADDR", "SO_REUSEPORT"])
def test_port_in_use(tmp_path, model_file, scratch, option):
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, getattr(socket, option), 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        manager = ServerManager(stand_in(tmp_path, "sleep 60"))
        with pytest.raises(ServerError, match=f"Port {port} .* in use"):
            manager.start_server(model_file, port=port, silent=True)
    assert manager.pid is None and not list(scratch.iterdir())


@pytest.mark.parametrize(
    "says, error, match",
    [
        ("something broke", ServerError, "exit code 3(.|\n)*something broke"),
        ("unknown model architecture: 'mamba9'", ModelLoadError, "mamba9"),
        ("cudaMalloc failed: out of memory", ModelLoadError, "does not fit.*smaller"),
        (
            "error loading model: tensor data is not within the file bounds",
            ModelLoadError,
            "cannot load",
        ),
        ("couldn't bind HTTP server socket, hostname: 1.2.3.4", ServerError, "cannot listen"),
    ],
)
def test_it_ends_at_once(tmp_path, model_file, scratch, says, error, match):
    manager = ServerManager(stand_in(tmp_path, f'echo "{says}" >&2; exit 3'))
    with pytest.raises(error, match=match):
        manager.start_server(model_file, silent=True)
    assert not manager.is_running() and not list(scratch.iterdir())
    assert says in manager.log_tail()


def test_it_is_killed_while_loading(tmp_path, model_file, scratch):
    manager = ServerManager(stand_in(tmp_path, "kill -KILL $$"))
    with pytest.raises(ServerError, match="SIGKILL"):
        manager.start_server(model_file, silent=True)


def test_it_never_answers(tmp_path, model_file, scratch):
    manager = ServerManager(
        stand_in(tmp_path, f"echo $$ > {tmp_path}/pid; echo still loading; exec sleep 60")
    )
    with pytest.raises(ServerError, match="did not answer within 0.5 s(.|\n)*still loading"):
        manager.start_server(model_file, timeout=0.5, silent=True)
    assert gone(int((tmp_path / "pid").read_text())) and not list(scratch.iterdir())


def test_not_a_program(tmp_path, model_file, scratch):
    path = tmp_path / "llama-server"
    path.write_bytes(b"\x7fELF nonsense")
    path.chmod(0o755)
    with pytest.raises(ServerError, match="cannot be executed"):
        ServerManager(path).start_server(model_file, silent=True)
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("status", [200, 401])
def test_somebody_elses_server_is_not_ours(tmp_path, model_file, scratch, status):
    """A healthy server, with or without a key of its own, on the very port that ours claims."""

    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever).start()
        say = f"echo listening on http://127.0.0.1:{other.server_port}; exec sleep 60"
        manager = ServerManager(stand_in(tmp_path, say))
        with pytest.raises(ServerError, match="did not answer"):
            manager.start_server(model_file, timeout=1, silent=True)
        other.shutdown()
    assert not manager.check_server_health()


def test_the_key_is_not_on_the_command_line(tmp_path, model_file, scratch):
    script = f'echo "$@" > {tmp_path}/arguments; echo "$LLAMA_API_KEY" > {tmp_path}/key; exit 1'
    with pytest.raises(ServerError):
        ServerManager(stand_in(tmp_path, script)).start_server(
            model_file, silent=True, flash_attn="on", gpu_layers=-1
        )
    key, arguments = ((tmp_path / name).read_text().strip() for name in ("key", "arguments"))
    assert len(key) >= 32 and key not in arguments
    assert "--flash-attn on" in arguments and "--n-gpu-layers all" in arguments


def test_requests_without_a_server():
    with pytest.raises(ServerError, match="load_model"):
        ServerManager().post("/completion", {})
    assert ServerManager().stop_server() is False and ServerManager().check_server_health() is False


# It dies with its parent


def guarded(tmp_path, after="time.sleep(60)"):
    """A process that runs `sleep` under a guard, and the ids of guard and sleep."""
    script = (
        "import os, time\nfrom llamatelemetry import guard\n"
        f"log = open({str(tmp_path / 'log')!r}, 'wb')\n"
        "g, pid = guard.popen(['/bin/sleep', '60'], log)\n"
        f"print(g.pid, pid, flush=True)\n{after}"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    return parent, *map(int, parent.stdout.readline().split())


# A fork of the parent holds the pipe open; only the change of parent then tells the guard.
@pytest.mark.parametrize(
    "after", ["time.sleep(60)", "if os.fork() == 0: time.sleep(3); os._exit(0)\ntime.sleep(60)"]
)
def test_parent_killed(tmp_path, after):
    parent, guard_pid, pid = guarded(tmp_path, after)
    assert alive(pid)
    time.sleep(0.2)
    parent.kill()
    parent.wait()
    assert gone(pid, 2.5) and gone(guard_pid)


def test_guard_killed(tmp_path):
    parent, guard_pid, pid = guarded(tmp_path)
    os.kill(guard_pid, signal.SIGKILL)
    assert gone(pid)
    parent.kill()
    parent.wait()


def test_lives_on_when_the_thread_that_started_it_ends(tmp_path):
    found = []
    with open(tmp_path / "log", "wb") as log:
        thread = threading.Thread(
            target=lambda: found.append(guard.popen(["/bin/sleep", "60"], log))
        )
        thread.start()
        thread.join()
    started, pid = found[0]
    time.sleep(0.3)
    assert alive(pid)
    guard.stop(started)
    assert gone(pid)


def test_one_that_ignores_a_polite_stop(tmp_path):
    with open(tmp_path / "log", "wb") as log:
        started, pid = guard.popen(
            ["/bin/sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"], log, grace=0.3
        )
    time.sleep(0.2)
    guard.stop(started)
    assert gone(pid)


def test_cannot_execute(tmp_path):
    with open(tmp_path / "log", "wb") as log, pytest.raises(FileNotFoundError):
        guard.popen([tmp_path / "none"], log)


# The real one


@pytest.mark.slow
def test_start_and_stop(smollm2, llama_server, scratch, capsys):
    with ServerManager(llama_server) as manager:
        manager.start_server(smollm2, ctx_size=512)
        said = capsys.readouterr().out
        assert manager.url in said and str(manager.pid) in said
        assert manager.check_server_health()
        assert Path(psutil.Process(manager.pid).exe()).name == "llama-server"
        assert (
            manager.post("/completion", {"prompt": "One, two,", "n_predict": 4})["tokens_predicted"]
            == 4
        )
        # The same port asked for by a second server: refused, and the first one is unharmed.
        with pytest.raises(ServerError, match="in use"):
            ServerManager(llama_server).start_server(smollm2, port=manager.port, silent=True)
        assert manager.check_server_health()
        pid, port = manager.pid, manager.port
        assert manager.stop_server() is True
        assert gone(pid) and not manager.check_server_health() and not list(scratch.iterdir())
        manager.start_server(
            smollm2, ctx_size=512, port=port, silent=True
        )  # its port is free again
        assert manager.port == port and capsys.readouterr().out == ""
    assert not list(scratch.iterdir())


@pytest.mark.slow
def test_kernel_killed(smollm2, llama_server):
    """What a user's kernel restart does at its worst: SIGKILL, no clean-up of any kind."""
    script = (
        "import sys, time\nfrom llamatelemetry import ServerManager\nm = ServerManager(sys.argv[1])\n"
        "m.start_server(sys.argv[2], ctx_size=512, silent=True)\n"
        "print(m.pid, m.log.parent, flush=True)\ntime.sleep(60)"
    )
    kernel = subprocess.Popen(
        [sys.executable, "-c", script, llama_server, smollm2], stdout=subprocess.PIPE, text=True
    )
    pid, folder = kernel.stdout.readline().split()
    assert alive(int(pid)) and Path(folder).exists()
    kernel.kill()
    kernel.wait()
    assert gone(int(pid))
    deadline = time.monotonic() + 5
    while Path(folder).exists() and time.monotonic() < deadline:
        time.sleep(0.02)  # its shell removes it
    assert not Path(folder).exists()
