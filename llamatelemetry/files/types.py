"""The types of tensors: name and block by number, and how their weights are read, by the gguf
package or the engine.

The gguf package lags behind llama.cpp. A type that it lacks is asked of the installed engine's
libggml-base, which also turns its blocks into floats; no model is loaded for that and no GPU is
touched."""

import contextlib
import ctypes
import os
import struct
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from ..gpus.cores import physical_cores
from .programs import engine_folder

# Types that are NumPy's own
_PLAIN = {"F32": "<f4", "F64": "<f8", "I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
_PART = 1 << 20  # weights that a thread turns into floats at a time
_CONVERT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
_LIMIT = 1024  # llama.cpp numbers its types without gaps, 43 by now: a larger number is damage


class TensorType(NamedTuple):
    """number: in the file. name: "Q4_K", or "type 99" where nobody here knows it. block: weights
    that are packed together; size: bytes of a block; both None where nobody knows."""

    number: int
    name: str
    block: int | None = None
    size: int | None = None


class _Traits(ctypes.Structure):
    """`struct ggml_type_traits`, checked against types whose values are known."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("size", ctypes.c_size_t),
        ("quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float", ctypes.c_void_p),
    ]


class _GgufParams(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p)]


@cache
def tensor_type(number):
    """The TensorType with this number. Raises ValueError for a number that no type can have."""
    if number in GGMLQuantizationType._value2member_map_:
        kind = GGMLQuantizationType(number)
        return TensorType(number, kind.name, *GGML_QUANT_SIZES[kind])
    if number >= _LIMIT:
        raise ValueError(f"a tensor type {number}")
    traits = _traits(number)
    if traits is None:
        return TensorType(number, f"type {number}")
    return TensorType(number, traits.name.decode().upper(), traits.block, traits.size)


def dequantize(raw, kind):
    """Rows of blocks -> float32. raw: (n, bytes of a row) uint8, an array or reading.Rows; kind: a
    TensorType. Returns (n, width), writable.

    The engine's own code does it where it is installed, on all cores: the same values to the bit as
    the gguf package's, in a fraction of the time. Raises NotImplementedError for a type that
    neither can read."""
    if kind.block is None:
        raise NotImplementedError(kind.name)
    everything = slice(None)
    if kind.name in _PLAIN:
        return np.ascontiguousarray(raw[everything]).view(_PLAIN[kind.name]).astype(np.float32)
    n, width = raw.shape
    out = np.empty((n, width // kind.size * kind.block), np.float32)
    traits = _traits(kind.number)
    if traits is None or not traits.to_float:
        try:
            whole = np.ascontiguousarray(raw[everything])
            return quants.dequantize(whole, GGMLQuantizationType(kind.number)).reshape(out.shape)
        except ValueError:
            raise NotImplementedError(kind.name) from None
    convert = _CONVERT(traits.to_float)

    def part(rows):
        blocks = np.ascontiguousarray(raw[rows])
        convert(blocks.ctypes.data, out[rows].ctypes.data, out[rows].size)

    step = max(1, min(n, _PART // max(1, out.shape[1])))
    parts = [slice(start, start + step) for start in range(0, n, step)]
    if len(parts) < 2:
        part(everything)
    else:  # ctypes releases the interpreter's lock
        with ThreadPoolExecutor(physical_cores()) as pool:
            list(pool.map(part, parts))
    return out


@lru_cache(maxsize=1)
def engine_library():
    """libggml-base of the installed engine, or None: not there, or with other structures than are
    read here."""
    folder = engine_folder()
    if folder is None or not (path := folder / "lib" / "libggml-base.so").is_file():
        return None
    try:
        library = ctypes.CDLL(str(path))
        library.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
        library.gguf_init_from_file.restype = ctypes.c_void_p
        library.gguf_init_from_file.argtypes = [ctypes.c_char_p, _GgufParams]
        library.gguf_free.argtypes = [ctypes.c_void_p]
        library.ggml_log_get.restype = None
        library.ggml_log_set.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    except (OSError, AttributeError):
        return None
    for number in (0, 2, 8):  # F32, Q4_0, Q8_0
        traits, kind = library.ggml_get_type_traits(number).contents, GGMLQuantizationType(number)
        if (traits.block, traits.size) != GGML_QUANT_SIZES[
            kind
        ] or traits.name.decode().upper() != kind.name:
            return None
    return library


@cache
def _traits(number):
    """The engine's _Traits of a type, or None where it does not know that number."""
    library = engine_library()
    known = number in GGMLQuantizationType._value2member_map_  # else the engine may end before it
    if library is None or not (known or _accepted(library, number)):
        return None
    traits = library.ggml_get_type_traits(number).contents
    if known:
        kind = GGMLQuantizationType(number)
        if (traits.block, traits.size) != GGML_QUANT_SIZES[kind]:
            return None  # an engine that numbers its types otherwise
    return traits


def _accepted(library, number):
    """Whether llama.cpp reads a file with a tensor of this type: its own table does not say where
    it ends."""
    name, silence = (
        b"x",
        ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None),
    )
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q", len(name)) + name
    head += struct.pack("<IQIQ", 1, 1 << 16, number, 0)
    log, data, found = ctypes.c_void_p(), ctypes.c_void_p(), None
    # suppress: no room for it, then nobody can say
    with contextlib.suppress(OSError), tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(head.ljust(4096, b"\0"))
        file.flush()
        library.ggml_log_get(ctypes.byref(log), ctypes.byref(data))
        library.ggml_log_set(ctypes.cast(silence, ctypes.c_void_p), None)
        try:
            found = library.gguf_init_from_file(os.fsencode(file.name), _GgufParams(True, None))
        finally:
            library.ggml_log_set(log, data)
    if found:
        library.gguf_free(found)
    return bool(found)
