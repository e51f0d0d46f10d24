"""The header of one GGUF file: metadata and where each tensor lies, read in one pass over its
bytes.

gguf.GGUFReader makes a NumPy view of every token of the vocabulary (measured: 7 s for SmolLM2's
49,152 tokens, 30 s for Gemma 3's 262,144), so only the kinds of values are taken from the gguf
package, and the types from ggml_types. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md"""

import math
import mmap
import struct

import numpy as np
from gguf import GGUFValueType

from ..errors import ModelLoadError, ModelNotFoundError
from .types import tensor_type

_SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}
_U64 = struct.Struct("<Q").unpack_from


class Header:
    """The header of one file: metadata and the kinds of its values, tensors as {name: (TensorType,
    shape, offset, bytes)}, the start of the data, the bytes. Of a type that nobody here knows, the
    bytes are those up to the next."""

    def __init__(self, path):
        self.path = path
        if path.is_dir():
            raise ModelLoadError(
                f"{path} is a directory, not a GGUF file. Give the .gguf file in it."
            )
        if not path.exists():
            raise ModelNotFoundError(
                f"There is no file {path}. Check the path, or give a name that "
                "llamatelemetry.list_models() shows."
            )
        self.size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(256)
            self._check_head(head)
            self.buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self._read_header()
        except (struct.error, ValueError) as error:
            raise ModelLoadError(
                f"{path}: the GGUF header ends early or is damaged ({error}). The file has "
                f"{self.size:,} bytes: fetch it again."
            ) from error
        ends = [self.data + offset + size for _, _, offset, size in self.tensors.values()]
        end = max(ends, default=0)
        if end > self.size:
            raise ModelLoadError(
                f"{path} is truncated: {self.size:,} bytes are there, its tensors need {end:,}. "
                "Fetch it again; a download that was interrupted looks like this."
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
                f"{self.path} {why}. Convert the model again with a current llama.cpp."
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
            f"{self.path} {what}. A model file starts with the four bytes 'GGUF': fetch it again."
        )

    def _read_header(self):
        n_tensors, n_keys = struct.unpack_from("<QQ", self.buffer, 8)
        at = 24
        # kinds: key -> its GGUFValueType, or (ARRAY, that of the values)
        self.metadata, self.kinds = ({}, {})
        for _ in range(n_keys):
            key, at = self._name(at)
            kind, at = self._u32(at)
            self.kinds[key] = kind = GGUFValueType(kind)
            if kind == GGUFValueType.ARRAY:
                self.kinds[key] = kind, GGUFValueType(self._u32(at)[0])
            self.metadata[key], at = self._value(kind, at)
        infos = {}
        for _ in range(n_tensors):
            name, at = self._name(at)
            n_dims, at = self._u32(at)
            if n_dims > 8:
                raise ValueError(f"tensor {name!r} with {n_dims} dimensions")
            *dims, kind, offset = struct.unpack_from(f"<{n_dims}QIQ", self.buffer, at)
            at += 8 * n_dims + 12
            kind = tensor_type(kind)
            if math.prod(dims) == 0 or (dims or [1])[0] % (kind.block or 1):
                raise ValueError(f"tensor {name!r} of type {kind.name} with dimensions {dims}")
            infos[name] = kind, tuple(reversed(dims)), offset
        align = self.metadata.get("general.alignment", 32)
        if not isinstance(align, int) or align < 1:
            raise ValueError(f"an alignment of {align!r}")
        self.data = -(-at // align) * align
        starts = sorted({offset for _, _, offset in infos.values()} | {self.size - self.data})
        following = dict(zip(starts, starts[1:]))

        def n_bytes(kind, shape, offset):
            known = math.prod(shape) // kind.block * kind.size if kind.block else None
            return following.get(offset, offset) - offset if known is None else known

        self.tensors = {name: (*info, n_bytes(*info)) for name, info in infos.items()}

    def _u32(self, at):
        return struct.unpack_from("<I", self.buffer, at)[0], at + 4

    def _name(self, at):
        raw, at = self._string(at)
        if isinstance(raw, bytes):
            raise ValueError(f"a name that is no text: {raw[:40]!r}")
        return raw, at

    def _string(self, at):
        length = _U64(self.buffer, at)[0]
        at += 8
        if length > self.size - at:
            raise ValueError(f"a text of {length:,} bytes at byte {at:,}")
        return _text(self.buffer[at : at + length]), at + length

    def _value(self, kind, at):
        if kind == GGUFValueType.STRING:
            return self._string(at)
        if kind != GGUFValueType.ARRAY:
            dtype = np.dtype(_SCALARS[kind])
            return np.frombuffer(self.buffer, dtype, 1, at)[0].item(), at + dtype.itemsize
        kind, at = self._u32(at)
        kind = GGUFValueType(kind)
        count, at = _U64(self.buffer, at)[0], at + 8
        if count > self.size - at:
            raise ValueError(f"an array of {count:,} at byte {at:,}")
        if kind in _SCALARS:
            dtype = np.dtype(_SCALARS[kind])
            return np.frombuffer(
                self.buffer, dtype, count, at
            ).tolist(), at + count * dtype.itemsize
        if kind == GGUFValueType.STRING:
            return self._strings(count, at)
        values = []
        for _ in range(count):
            value, at = self._value(kind, at)
            values.append(value)
        return values, at

    def _strings(self, count, at):
        # The hot loop: a vocabulary with its merges has up to a million of these.
        buffer, size, values = self.buffer, self.size, []
        for _ in range(count):
            start = at + 8
            at = start + _U64(buffer, at)[0]
            if at > size:
                raise ValueError(f"a text that ends at byte {at:,}")
            values.append(_text(buffer[start:at]))
        return values, at


def _text(raw):
    try:
        return raw.decode()
    except UnicodeDecodeError:  # some vocabularies hold raw bytes
        return raw
