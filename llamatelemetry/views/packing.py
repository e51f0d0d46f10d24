"""Arrays as they lie in a page: base64 of their bytes, as precisely as the page's size allows."""

import base64
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


def pack(array: ArrayLike) -> dict:
    """An array as base64 for a page: float32, uint8, uint16, int32 or int8, any shape,
    row-major."""
    array = np.ascontiguousarray(array)
    if array.dtype.kind == "f":
        array = array.astype(np.float32)
    elif array.dtype == np.int64:
        array = array.astype(np.int32)
    return {
        "dtype": str(array.dtype),
        "shape": list(array.shape),
        "b64": base64.b64encode(array.tobytes()).decode("ascii"),
    }


def ends(n: int, most: int) -> np.ndarray:
    """Positions of tokens that are shown of n: all, or the first (where attention has its sink) and
    the last, `most` together."""
    if n <= most:
        return np.arange(n)
    return np.concatenate([[0], np.arange(n - max(1, most - 1), n)])


def said_ends(n: int, shown: Sequence[int] | np.ndarray) -> str:
    """Which of n tokens are shown, for a title; "" where all are."""
    count = len(shown)
    return "" if count == n else f" (the first and the last {count - 1} of {n:,} tokens)"


def pack_roots(x: ArrayLike) -> dict:
    """Numbers from 0 to 1 in 8 bits of their square root: off by at most 1/250, small ones by
    less."""
    return pack(np.rint(np.sqrt(np.asarray(x, dtype=np.float32)) * 255).astype(np.uint8))


def pack_vectors(x: ArrayLike, bits: int, layers: Sequence[int]) -> dict:
    """Vectors (layer, head, token, feature) of the given layers for a page: 32 bits as they are; 16
    or 8 bits as integers with one float scale per vector, off by at most 1/65534 or 1/254 of the
    vector's largest value."""
    x = np.asarray(x, dtype=np.float32)[list(layers)]
    layers = [int(layer) for layer in layers]
    if bits == 32:
        return {"layers": layers, "values": pack(x)}
    steps = 32767 if bits == 16 else 127
    scale = np.abs(x).max(axis=-1) / steps
    integers = np.rint(x / np.where(scale > 0, scale, 1)[..., None]).astype(np.int32)
    integers = (integers + 32768).astype(np.uint16) if bits == 16 else integers.astype(np.int8)
    return {"layers": layers, "values": pack(integers), "scales": pack(scale)}
