"""Reading a file that somebody may write to at the same time: by pread, not through a memory map,
whose pages kill the process once the file is cut short."""

import os
import stat
import weakref
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from .errors import ModelLoadError, ModelNotFoundError, shown

GAP = 1 << 14  # bytes between two rows that are quicker read than left out
BLOCK = 1 << 20  # bytes that are read together at most


class Source:
    """An open file. path; size: in bytes. Every read is of the file as it was when it was opened,
    or a ModelLoadError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # Not blocking: of a pipe that nobody writes to, opening would wait for somebody.
            self._file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError):
            raise ModelNotFoundError(
                f"There is no file {shown(path)}. Check the path, or give a name that "
                "llamatelemetry.list_models() shows."
            ) from None
        except OSError as why:
            raise ModelLoadError(f"{shown(path)} cannot be read: {why.strerror}.") from None
        weakref.finalize(self, os.close, self._file)
        mode = os.fstat(self._file).st_mode
        if stat.S_ISDIR(mode):
            raise ModelLoadError(
                f"{shown(path)} is a directory, not a GGUF file. Give the .gguf file in it."
            )
        if not stat.S_ISREG(mode):
            raise ModelLoadError(f"{shown(path)} is a device or a pipe. Give the name of a file.")
        self._state = _state(self._file)
        self.size = self._state[0]

    def read(self, at: int, count: int) -> bytes:
        """`count` bytes from byte `at` on."""
        data = bytearray(count)
        self.read_into([(at, memoryview(data))])
        return bytes(data)

    def read_into(self, wanted: Iterable[tuple[int, memoryview]]) -> None:
        """Fill each buffer of bytes of [(first byte, buffer)]."""
        try:
            for at, buffer in wanted:
                while buffer.nbytes:
                    count = os.preadv(self._file, (buffer,), at)
                    if not count:
                        raise self._changed("is shorter")
                    at, buffer = at + count, buffer[count:]
        except OSError as why:
            if isinstance(why, ModelLoadError):
                raise
            raise ModelLoadError(f"{shown(self.path)} cannot be read: {why.strerror}.") from None
        if _state(self._file) != self._state:
            raise self._changed("was written to")

    def check_place(self, running: bool = False) -> None:
        """ModelLoadError where the file was written to; not `running`: also where another lies
        under this name by now, which who opens it again (a process of ours) would have."""
        try:
            same = _state(self._file) == self._state
            same = same and (running or _state(self.path) == self._state)
        except OSError:
            same = False
        if not same:
            raise self._changed("was written to" if running else "is another, or gone,")

    def _changed(self, how):
        return ModelLoadError(
            f"{shown(self.path)} {how} since it was opened: what was read of it is no longer true. "
            "Load it again."
        )


def _state(file):
    now = os.stat(file)
    return now.st_size, now.st_mtime_ns, now.st_ino, now.st_dev


class Rows:
    """The rows of a tensor as they lie in a file, read when they are taken, each once and those
    that lie near each other together: rows[4:9] and rows[[7, 0]] are (n, bytes of a row) uint8,
    part(4, 9) is Rows. shape: (rows, bytes of a row)."""

    def __init__(self, source: Source, start: int, shape: tuple[int, int]) -> None:
        self._source, self._start, self.shape = source, start, shape

    def __len__(self) -> int:
        return self.shape[0]

    def part(self, start: int, stop: int) -> "Rows":
        """Rows from start on, before stop."""
        start, stop, _ = slice(start, stop).indices(len(self))
        width = self.shape[1]
        return Rows(self._source, self._start + start * width, (max(0, stop - start), width))

    def __getitem__(self, ids: slice | np.ndarray) -> np.ndarray:
        n, width = self.shape
        if isinstance(ids, slice) and ids.step in (None, 1):
            part = self.part(ids.start, ids.stop)
            out = np.empty(part.shape, np.uint8)
            self._source.read_into([(part._start, out.reshape(-1).data)])
            return out
        # Also of negative ones; each is read once
        numbers, order = np.unique(np.arange(n)[ids], return_inverse=True)
        out = np.empty((len(numbers), width), np.uint8)
        self._source.read_into(self._blocks(numbers, out))
        return out[order]

    def _blocks(self, numbers, out):
        """(first byte, buffer) of each block of rows that are read together; once it is full, and
        the next is asked for, its rows are put into `out`."""
        width = self.shape[1]
        at = numbers * width
        new = (np.diff(at, prepend=-GAP - 2 * width) > GAP + width) | (
            np.diff(at // BLOCK, prepend=-1) != 0
        )
        begins = np.flatnonzero(new).tolist()
        for some in map(slice, begins, [*begins[1:], len(out)]):
            rows = numbers[some] - numbers[some.start]
            block = np.empty((rows[-1] + 1, width), np.uint8)
            yield int(self._start + at[some.start]), block.reshape(-1).data
            out[some] = block[rows]
