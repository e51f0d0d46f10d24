"""The engine's own quantizing of a few rows: what llama-quantize does with each of its slabs."""

import ctypes
from functools import cache

import numpy as np

from ..errors import QuantizeError
from ..files.types import TensorType, engine_library

# Types that hold no weights, or only in the middle of a product: ggml ends the process over them.
NEVER = frozenset("F64 I8 I16 I32 I64 Q8_1 Q8_K".split())
PART = 1 << 17  # weights that a thread has in hand: they stay in its core's cache


def chunk(values: np.ndarray, kind: TensorType) -> np.ndarray:
    """values (rows, width) float32 as the engine quantizes them, bytes (uint8,). QuantizeError for
    a type that weights never have."""
    if kind.name in NEVER:
        raise QuantizeError(
            f"The engine makes no weights of type {kind.name}: Q8_0, Q4_K, F16, ..."
        )
    assert kind.block and kind.size and values.shape[1] % kind.block == 0, kind
    n, width = values.shape
    out = np.empty(n * width // kind.block * kind.size, np.uint8)
    _quantizer().ggml_quantize_chunk(
        kind.number, values.ctypes.data, out.ctypes.data, 0, n, width, None
    )
    return out


def needs_weights(kind: TensorType) -> bool:
    """Whether a type is quantized only with an importance matrix."""
    return _quantizer().ggml_quantize_requires_imatrix(kind.number)


@cache
def _quantizer():
    """The engine's libggml-base, its functions that quantize declared, or QuantizeError."""
    library = engine_library()
    if library is None:
        raise QuantizeError(
            "The engine's libggml-base, which quantizes, is not here: `llamatelemetry engine build` "
            "makes one."
        )
    counts = [ctypes.c_int64] * 3
    pointer, run = ctypes.c_void_p, library.ggml_quantize_chunk
    run.argtypes = [ctypes.c_int, pointer, pointer, *counts, pointer]
    run.restype = ctypes.c_size_t
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    return library
