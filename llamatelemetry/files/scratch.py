"""Intermediate files: one folder per process where nothing is kept, gone when the process is."""

import atexit
import contextlib
import os
import re
import secrets
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from ..errors import OutputError, shown
from ..liveness import kill, stopped
from .places import free_bytes, temp_dir

ANNOUNCED = 10**9  # bytes: a larger file is announced
_PREFIX = "llamatelemetry-scratch-"
_AFTER = """
exec >/dev/null 2>&1
while read -r _; do :; done
for half in "$0"/.*.partial; do [ -L "$half" ] && rm -rf "$(readlink "$half")"; done
rm -rf "$0"; sleep 1; rm -rf "$0"  # others of that process may have been writing still
"""
_mine: "Folder | None" = None
_lifeline, _lock = os.pipe(), threading.RLock()  # the end of that pipe is this process's end


def _in_fork():
    global _lifeline, _lock
    os.close(_lifeline[1])
    _lifeline, _lock = os.pipe(), threading.RLock()


os.register_at_fork(after_in_child=_in_fork)


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


class Folder:
    """A temporary folder of this process, which goes with it, whatever ends it: a shell that is
    there before the folder waits for that, and then removes it and the unfinished outputs that
    links in it lead to. What a former process has left all the same is removed now.

    place: the folder that it is made in. Attributes: path; owner, a process id. Raises OSError."""

    def __init__(self, place: Path | None = None) -> None:
        sweep()
        name = f"{maker()}-{secrets.token_hex(4)}"
        self.path = Path(place or tempfile.gettempdir(), _PREFIX + name)
        self.owner, self.users = os.getpid(), 0
        after = ["/bin/sh", "-c", _AFTER, str(self.path)]
        self._after = subprocess.Popen(after, stdin=_lifeline[0], start_new_session=True)
        try:
            self.path.mkdir(0o700)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Remove the folder and what is in it; a fork does not remove its parent's."""
        if self.owner == os.getpid():
            shutil.rmtree(self.path, ignore_errors=True)
            self._after.kill()
            self._after.wait()


def sweep() -> None:
    """Remove what processes of ours that are gone left in scratch, the unfinished outputs that
    links in it lead to, and children of theirs that are stopped."""
    places = {temp_dir(), Path(tempfile.gettempdir()), Path("/dev/shm")}
    for folder in [folder for place in places for folder in place.glob(f"{_PREFIX}*")]:
        with contextlib.suppress(OSError):
            if gone(folder.name) and folder.stat().st_uid == os.getuid():
                for link in folder.glob("*.partial"):
                    if link.is_symlink() and os.readlink(link).endswith(link.name):
                        half = Path(os.readlink(link))
                        shutil.rmtree(half) if half.is_dir() else half.unlink(missing_ok=True)
                shutil.rmtree(folder, ignore_errors=True)
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        # One of ours goes when its parent does, but not while a signal has stopped it.
        with contextlib.suppress(OSError):
            of = re.search(f"{_PREFIX}[\\d-]+".encode(), process.read_bytes())
            if of and gone(of[0].decode()) and stopped(int(process.parent.name)):
                kill(int(process.parent.name))


def scratch() -> Path:
    """This process's folder for intermediate files (in places.temp_dir(): $TMPDIR, or on Kaggle
    what is not kept). It is removed when the process ends, whatever ends it."""
    return _borrow().path


@contextlib.contextmanager
def borrowed() -> Iterator[Path]:
    """`scratch()` for a `with` block: removed at its end where nobody else has asked for it."""
    folder = _borrow()
    try:
        yield folder.path
    finally:
        with _lock:
            folder.users -= 1
            if not folder.users:
                atexit.unregister(folder.remove)
                folder.remove()


def _borrow():
    """This process's Folder, for one more: a fork is a process of its own."""
    global _mine
    with _lock:
        if _mine is None or _mine.owner != os.getpid() or not _mine.path.is_dir():
            try:
                _mine = Folder(temp_dir())
            except OSError as trouble:
                raise OutputError(
                    f"No scratch folder could be made in {temp_dir()}: {trouble.strerror}. Set TMPDIR "
                    "to a folder that can be written to."
                ) from None
            atexit.register(_mine.remove)
        _mine.users += 1
        return _mine


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
