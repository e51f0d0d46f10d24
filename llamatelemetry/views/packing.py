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
