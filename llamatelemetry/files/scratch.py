"""Intermediate files: one folder per process where nothing is kept, gone when the process is."""

import atexit
import contextlib
import os
import re
import shutil
import tempfile
from pathlib import Path

from ..errors import OutputError, shown
from ..liveness import kill, stopped
from .places import free_bytes, temp_dir

ANNOUNCED = 10**9  # bytes: a larger file is announced
_PREFIX = "llamatelemetry-scratch-"
_mine: tuple[int, Path] | None = None  # pid and folder: a fork is a process of its own


def maker() -> str:
    """This process as a part of a name, pid-start-namespace, that no later process has."""
    return f"{os.getpid()}-{_start(os.getpid())}-{_namespace()}"


def gone(name: str) -> bool:
    """Whether the process that put its `maker()` into this name has ended. False where nothing can
    be known: no such part, or a container of its own."""
    found = re.search(r"(\d+)-(\d+)-(\d+)", name)
    if not found or found[3] != _namespace():
        return False
    return _start(int(found[1])) != found[2]


def _start(pid):
    """When a process began, in ticks since the machine did; "0" where none runs (any more)."""
    with contextlib.suppress(OSError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[18] if state not in "ZX" else "0"
    return "0"


def _namespace():
    with contextlib.suppress(OSError):
        return str(os.stat("/proc/self/ns/pid").st_ino)
    return "0"


def marked() -> str:
    """What the name of a temporary folder of this process begins with, so that a later one may
    remove it once this one is gone. What those have left is removed now."""
    sweep()
    return f"{_PREFIX}{maker()}-"


def sweep() -> None:
    """Remove what processes of ours that are gone left in scratch, the unfinished outputs that
    links in it lead to, and children of theirs that are stopped."""
    places = {temp_dir(), Path(tempfile.gettempdir()), Path("/dev/shm")}
    for folder in [folder for place in places for folder in place.glob(f"{_PREFIX}*")]:
        with contextlib.suppress(OSError):
            if gone(folder.name) and folder.stat().st_uid == os.getuid():
                for link in folder.glob("*.partial"):
                    if link.is_symlink() and os.readlink(link).endswith(link.name):
                        Path(os.readlink(link)).unlink(missing_ok=True)
                shutil.rmtree(folder, ignore_errors=True)
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        # One of ours goes when its parent does, but not while a signal has stopped it.
        with contextlib.suppress(OSError):
            of, pid = (
                re.search(f"{_PREFIX}[\\d-]+".encode(), process.read_bytes()),
                process.parent.name,
            )
            if of and gone(of[0].decode()) and stopped(int(pid)):
                kill(int(pid))


def scratch() -> Path:
    """This process's folder for intermediate files (in places.temp_dir(): $TMPDIR, or on Kaggle
    what is not kept). It is removed when the process ends, and at the next start if that was
    killed."""
    global _mine
    if _mine is None or _mine[0] != os.getpid() or not _mine[1].is_dir():
        try:
            made = tempfile.mkdtemp(prefix=marked(), dir=temp_dir())
        except OSError as trouble:
            raise OutputError(
                f"No scratch folder could be made in {temp_dir()}: {trouble.strerror}. Set TMPDIR to a "
                "folder that can be written to."
            ) from None
        _mine = os.getpid(), Path(made)
        atexit.register(_leave, *_mine)
    return _mine[1]


def _leave(pid, folder):
    if pid == os.getpid():
        shutil.rmtree(folder, ignore_errors=True)


class ScratchFile(os.PathLike):
    """A path in scratch for one intermediate file, until `remove()` or the end of a `with` block.

    name: the file's; size_bytes: about how large it will be: over 1 GB that is said, with the
    place, and OutputError is raised at once where the disk has less room. The same name again
    takes the former's place: a cell run again needs no room for two."""

    def __init__(self, name: str, size_bytes: int = 0) -> None:
        self.path = scratch() / Path(name).name
        self.remove()
        free = free_bytes(self.path.parent)
        if size_bytes > free:
            raise OutputError(
                f"{shown(name)} needs {size_bytes / 1e9:.1f} GB of scratch, and {self.path.parent} has "
                f"{free / 1e9:.1f} GB free: make room there, or set TMPDIR to a folder with more."
            )
        if size_bytes > ANNOUNCED:
            print(
                f"{shown(name)}: {size_bytes / 1e9:.1f} GB in {self.path.parent} (scratch: not kept, "
                "removed when used up)"
            )

    def __fspath__(self) -> str:
        return str(self.path)

    def remove(self) -> None:
        """Remove the file if it is there."""
        with contextlib.suppress(OSError):
            self.path.unlink()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.remove()
