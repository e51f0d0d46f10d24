"""The header of one GGUF file: metadata and where each tensor lies, read in one pass over its
bytes.

gguf.GGUFReader makes a NumPy view of every token of the vocabulary (measured: 7 s for SmolLM2's
49,152 tokens, 30 s for Gemma 3's 262,144), so only the kinds of values are taken from the gguf
package, and the types from `types`. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

A header that no model has is refused before it is read: with the limits below what is kept of one
stays under 1 GiB, whatever a file states."""

import math
import struct

import numpy as np
from gguf import GGUFValueType

from ..errors import ModelLoadError, shown
from ..metadata import check
from ..reading import Source
from .types import tensor_type

MAX_BYTES = 1 << 27  # of a header; Gemma's, with 262,144 tokens and as many merges again, has 2^25
MAX_VALUES = 1 << 22  # keys and values of arrays together; Gemma has 2^20
MAX_TENSORS = 1 << 16
MAX_DIMS = 4  # as llama.cpp
_WINDOW = 1 << 20  # bytes read at a time
# The kinds of single values, as struct and NumPy call them.
SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
_U64 = struct.Struct("<Q").unpack_from


class Header:
    """The header of one file: metadata and the kinds of its values, tensors as {name: (TensorType,
    shape, offset, bytes)}, the start of the data, the bytes. Of a type that nobody here knows, the
    bytes are those up to the next."""

    def __init__(self, path):
        self.path, self.source = path, Source(path)
        self.size = self.source.size
        self._check_head(self.source.read(0, min(256, self.size)))
        # Of the header the part that lies in memory, its place in the file, and how far it is read
        self._window, self._start, self._at = b"", 0, 8
        self._left, self._reading = MAX_VALUES, "the counts"
        try:
            self._read_header()
        except (struct.error, ValueError) as error:
            raise ModelLoadError(
                f"{shown(path)}: the GGUF header ends early or is damaged ({self._reading}: {error}). "
                f"The file has {self.size:,} bytes: fetch it again."
            ) from error
        finally:
            del self._window
        ends = {self.data + offset + n: name for name, (*_, offset, n) in self.tensors.items()}
        end = max(ends, default=0)
        if end > self.size:
            raise ModelLoadError(
                f"{shown(path)} is truncated: {self.size:,} bytes are there, its tensors need {end:,} "
                f"(up to {ends[end][:80]!r}). Fetch it again; a download that was interrupted looks "
                "like this."
            )

    def _check_head(self, head):
        if head[:4] == b"GGUF" and len(head) >= 24:
            version = struct.unpack_from("<I", head, 4)[0]
            if version in (2, 3):
                return
            why = (
                "is big-endian"
                if version & 0xFFFF == 0
                else f"is GGUF version {version}; versions 2 and 3 are read"
            )
            raise ModelLoadError(
                f"{shown(self.path)} {why}. Convert the model again with a current llama.cpp."
            )
        if head[:4] == b"GGUF":
            raise ModelLoadError(
                f"{self.path} is truncated: only {self.size} bytes are there. Fetch it again."
            )
        what = "is empty" if not head else "is not a GGUF file"
        if head.startswith(b"version https://git-lfs"):
            what = "is a Git LFS pointer, not the model itself"
        elif head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"<":
            what = "is a web page, not a model; the download was probably refused"
        elif head and all(32 <= byte or byte in b"\t\r\n" for byte in head):
            what = f"is a text file, not a GGUF file (it starts with {head[:24].decode(errors='replace')!r})"
        raise ModelLoadError(
            f"{shown(self.path)} {what}. A model file starts with the four bytes 'GGUF': fetch it again."
        )

    def _read_header(self):
        n_tensors, n_keys = self._unpack("QQ")
        # kinds: key -> its GGUFValueType, or (ARRAY, that of the values)
        self.metadata, self.kinds = {}, {}
        for number in range(n_keys):
            key = self._name("key", number)
            if key in self.metadata:
                raise ValueError("it is there twice")
            self._count(1)
            kind = GGUFValueType(*self._unpack("I"))
            if kind == GGUFValueType.ARRAY:
                kind = kind, GGUFValueType(*self._unpack("I"))
            self.kinds[key], self.metadata[key] = kind, self._value(kind)
        self._reading = "the metadata"
        check(self.metadata)
        self._reading = "the tensors"
        if n_tensors > MAX_TENSORS:
            raise ValueError(f"{n_tensors:,} of them; up to {MAX_TENSORS:,} are read")
        infos = {}
        for number in range(n_tensors):
            name = self._name("tensor", number)
            if name in infos:
                raise ValueError("it is there twice")
            infos[name] = self._info()
        align = self.metadata.get("general.alignment", 32)
        self.data = -(-self._at // align) * align
        starts = sorted({offset for _, _, offset in infos.values()} | {self.size - self.data})
        following = dict(zip(starts, starts[1:]))

        def n_bytes(kind, shape, offset):
            known = math.prod(shape) // kind.block * kind.size if kind.block else None
            return following.get(offset, offset) - offset if known is None else known

        self.tensors = {name: (*info, n_bytes(*info)) for name, info in infos.items()}

    def _info(self):
        (n_dims,) = self._unpack("I")
        if n_dims > MAX_DIMS:
            raise ValueError(f"{n_dims} dimensions")
        *dims, kind, offset = self._unpack(f"{n_dims}QIQ")
        kind = tensor_type(kind)
        n_weights = math.prod(dims)
        if not 0 < n_weights < 1 << 62 or (dims or [1])[0] % (kind.block or 1):
            raise ValueError(f"dimensions {dims} of type {kind.name}")
        return kind, tuple(reversed(dims)), offset

    def _take(self, count):
        """The next bytes of the header: where in the window they begin. They are all in it."""
        at, self._at = self._at, self._at + count
        if self._at > min(self.size, MAX_BYTES):
            raise ValueError(f"{count:,} bytes at byte {at:,}")
        if self._at > self._start + len(self._window):
            self._start = at
            self._window = self.source.read(at, min(max(count, _WINDOW), self.size - at))
        return at - self._start

    def _unpack(self, form):
        form = "<" + form
        at = self._take(struct.calcsize(form))
        return struct.unpack_from(form, self._window, at)

    def _count(self, n):
        self._left -= n
        if self._left < 0:
            raise ValueError(f"more than {MAX_VALUES:,} values in the metadata: no model has them")

    def _name(self, what, number):
        self._reading = f"{what} {number}"
        name = self._string()
        self._reading = f"{what} {name[:80]!r}"
        if isinstance(name, bytes):
            raise ValueError("its name is no text")
        return name

    def _string(self):
        (length,) = self._unpack("Q")
        at = self._take(length)
        return _text(self._window[at : at + length])

    def _value(self, kind):
        if kind == GGUFValueType.STRING:
            return self._string()
        if not isinstance(kind, tuple):
            return self._unpack(SCALARS[kind])[0]
        (count,), kind = self._unpack("Q"), kind[1]
        self._count(count)
        if kind == GGUFValueType.STRING:
            return self._strings(count)
        if kind == GGUFValueType.ARRAY:
            raise ValueError("arrays of arrays, which llama.cpp does not read")
        dtype = np.dtype(f"<{SCALARS[kind]}")
        at = self._take(count * dtype.itemsize)
        return np.frombuffer(self._window, dtype, count, at).tolist()

    def _strings(self, count):
        # The hot loop: a vocabulary with its merges has up to a million of these.
        values, window, at = [], self._window, self._at - self._start
        size = len(window) - 8
        for _ in range(count):
            start = at + 8
            end = start + _U64(window, at)[0] if at <= size else -1
            if start <= end <= size:
                values.append(_text(window[start:end]))
                at = end
                continue
            self._at = self._start + at  # it goes on behind the window
            values.append(self._string())
            window, at = self._window, self._at - self._start
            size = len(window) - 8
        self._at = self._start + at
        return values


def _text(raw):
    try:
        return raw.decode()
    except UnicodeDecodeError:  # some vocabularies hold raw bytes
        return raw
