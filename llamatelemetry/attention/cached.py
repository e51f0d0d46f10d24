"""Keys as attention reads them from a quantized cache."""

import gguf
import numpy as np

from ..imports import uninterrupted


def as_cached(keys: np.ndarray, kind: str, turn: int = 0) -> np.ndarray:
    """Keys (..., feature) out of a cache of this type: turned, rounded to blocks of 32, and turned
    back. float32

    kind: as Capture.layers has it in key_type ("q8_0"; floats and what gguf cannot round come back
    as they are); turn: its key_turn, features that one Hadamard matrix turns together (0: none).
    Turning spreads large values over all of a block: llama.cpp does it unless
    LLAMA_ATTN_ROT_DISABLE=1."""
    keys = np.asarray(keys, dtype=np.float32)
    if kind not in ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0"):
        return keys
    turned = _turn(keys, turn)
    number = gguf.GGMLQuantizationType[kind.upper()]
    blocks = gguf.quants.quantize(turned.reshape(-1, 32), number)
    return _turn(gguf.quants.dequantize(blocks, number).reshape(keys.shape), turn)


def _turn(values, width):
    """Times a symmetric orthonormal Hadamard matrix: done twice, it is as before."""
    if not width:
        return values
    with uninterrupted():
        from scipy.linalg import hadamard

    matrix = hadamard(width).astype(np.float32) / np.float32(np.sqrt(width))
    return (values.reshape(-1, width) @ matrix).reshape(values.shape)
