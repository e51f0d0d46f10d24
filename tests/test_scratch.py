"""Scratch: a folder per process, gone with it; what is announced, refused and removed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from llamatelemetry.errors import OutputError
from llamatelemetry.files import places, scratch
from llamatelemetry.files.outputs import written

MAKES = """
import os, sys, time
from llamatelemetry.files.scratch import ScratchFile, scratch
(scratch() / "half.gguf").write_bytes(b"x")
print(scratch(), flush=True)
"""


@pytest.fixture
def temp(tmp_path, monkeypatch):
    monkeypatch.setattr(scratch, "temp_dir", lambda: tmp_path)
    monkeypatch.setattr(scratch, "_mine", None)
    yield tmp_path
    if scratch._mine:
        scratch._mine.remove()


def start(temp, then=""):
    env = os.environ | {"TMPDIR": str(temp)}
    process = subprocess.Popen(
        [sys.executable, "-c", MAKES + then], env=env, stdout=subprocess.PIPE, text=True
    )
    return process, Path(process.stdout.readline().strip())


def test_a_folder_goes_with_its_process(temp):
    process, folder = start(temp)
    assert process.wait() == 0 and folder.parent == temp and not folder.exists()
    process, folder = start(temp, "raise SystemExit(3)")
    assert process.wait() == 3 and not folder.exists()


def test_a_folder_of_a_killed_process_goes_at_the_next_start(temp):
    process, folder = start(temp, "time.sleep(60)")
    try:
        scratch.sweep()
        assert (folder / "half.gguf").is_file()  # its maker is there
        for after in psutil.Process(process.pid).children():
            after.kill()  # as where a whole machine ends
    finally:
        process.kill()
    time.sleep(0.1)  # not waited for: a zombie is gone, too
    assert (folder / "half.gguf").is_file()
    mine = scratch.scratch()
    assert not folder.exists() and mine.is_dir() and scratch.scratch() == mine
    process.wait()
    (other := temp / "llamatelemetry-scratch-1-1-1-container").mkdir()
    (foreign := temp / "llamatelemetry-scratch-of-somebody").mkdir()
    scratch.sweep()
    assert other.is_dir() and foreign.is_dir() and mine.is_dir()


# Moments at which a process is killed: no folder yet, an empty one, a half in it, a link in it. The
# shell that removes them is not up by then, as on a busy machine.
MOMENTS = {
    "before the folder": "scratch.Path.mkdir = end",
    "after the folder": "mkdir = Path.mkdir\nscratch.Path.mkdir = lambda *a: (mkdir(*a), end())",
    "in a file": "path = scratch.scratch() / 'half'\npath.write_bytes(b'x')\nend()",
    "in an output": "stack = written('whole', need=1)\nstack.__enter__().write_bytes(b'x')\nend()",
    "in a child's folder": "from llamatelemetry import child\nchild.open = end\n"
    "child.Child('llamatelemetry.capture.worker', 'worker', {})",
}
ENDS = r"""
import os, signal, subprocess, tempfile, time
from pathlib import Path
from llamatelemetry.files import scratch
from llamatelemetry.files.outputs import written
scratch._AFTER = "sleep 0.5\n" + scratch._AFTER
def end(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", MOMENTS)
def test_nothing_is_left_by_a_process_that_is_killed_at(moment, tmp_path):
    (temp := tmp_path / "temp").mkdir()
    (out := tmp_path / "out").mkdir()
    shared = set(Path("/dev/shm").glob("llamatelemetry-scratch-*"))
    env = os.environ | {"TMPDIR": str(temp), "PYTHONPATH": str(Path(__file__).parents[1])}
    act = MOMENTS[moment] + "\nscratch.scratch()"
    command = [sys.executable, "-c", ENDS + act]
    done = subprocess.run(command, env=env, cwd=out)
    assert done.returncode == -signal.SIGKILL

    def left():
        new = set(Path("/dev/shm").glob("llamatelemetry-scratch-*")) - shared
        return [*temp.iterdir(), *out.iterdir(), *(one for one in new if scratch.gone(one.name))]

    deadline = time.monotonic() + 20
    while left() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left()


def test_what_is_borrowed_goes_with_the_last_borrower(temp):
    """And with it the shell: an idle process has none."""
    children = psutil.Process().children
    before = set(children())
    with scratch.borrowed() as folder:
        with scratch.borrowed() as again:
            assert again == folder
        assert folder.is_dir() and len(set(children()) - before) == 1
    assert not folder.exists() and set(children()) <= before
    with scratch.borrowed() as folder:
        assert scratch.scratch() == folder
    assert folder.is_dir()  # kept until the process ends
    scratch._mine.remove()
    assert not folder.exists() and set(children()) <= before


def test_a_fork_has_a_folder_of_its_own(temp):
    mine = scratch.scratch()
    if not (child := os.fork()):
        theirs = scratch.scratch()
        scratch._mine.remove()
        os._exit(theirs == mine or theirs.exists() or not mine.exists())
    assert os.waitpid(child, 0)[1] == 0 and mine.is_dir()


def test_who_made_a_name():
    assert not scratch.gone(f".{scratch.maker()}.partial")
    pid, start, namespace = scratch.maker().split("-")
    assert scratch.gone(f".{pid}-{int(start) + 1}-{namespace}.partial")
    assert not scratch.gone("notes.partial")


def test_a_large_file_is_announced_and_removed(temp, capsys):
    with scratch.ScratchFile("small.gguf", 10**6) as path:
        path.write_bytes(b"x")
        assert capsys.readouterr().out == ""
    assert not path.exists()
    file = scratch.ScratchFile("F16.gguf", 2 * 10**9)
    said = capsys.readouterr().out
    assert "F16.gguf: 2.0 GB in " in said and str(temp) in said
    Path(file).write_bytes(b"x")
    again = scratch.ScratchFile("F16.gguf")  # a cell run again
    assert again.path == file.path and not again.path.exists()
    again.remove()


def test_no_room_is_said_beforehand(temp, monkeypatch):
    with pytest.raises(OutputError, match=r"big.gguf needs 1000000.0 GB of scratch.*TMPDIR"):
        scratch.ScratchFile("big.gguf", 10**15)
    monkeypatch.setattr(scratch, "temp_dir", lambda: temp / "nowhere")
    scratch._mine.remove()
    with pytest.raises(OutputError, match="No scratch folder"):
        scratch.scratch()


def test_on_kaggle_scratch_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    monkeypatch.setenv("LLAMATELEMETRY_KAGGLE_TEMP", str(tmp_path / "temp"))
    monkeypatch.setattr(scratch, "_mine", None)
    assert scratch.scratch().parent == places.temp_dir() == tmp_path / "temp"
    scratch._mine.remove()


def test_a_large_output_may_lie_in_scratch(temp):
    """Elsewhere a link in scratch tells the next process of the half that a killed one left; here
    it would be a link to itself."""
    folder = scratch.scratch()
    with written(folder / "whole.bin", need=1) as half:
        half.write_bytes(b"x")
    assert [path.name for path in folder.iterdir()] == ["whole.bin"]
    with written(temp / "whole.bin", need=1) as half:
        assert (folder / half.name).is_symlink()
        half.write_bytes(b"x")
    assert [path.name for path in folder.iterdir()] == ["whole.bin"]
    (temp / "way").symlink_to(folder)
    with written(temp / "way" / "whole.bin", need=1) as half:  # scratch by another name
        half.write_bytes(b"x")
    assert [path.name for path in folder.iterdir()] == ["whole.bin"]
