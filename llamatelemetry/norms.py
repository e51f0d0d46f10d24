"""The norms of a model as its file defines them: RMS norm (Zhang and Sennrich 2019) or layer norm
(Ba et al. 2016), with the file's gain, bias and epsilon."""

import numpy as np
from numpy.typing import ArrayLike

from .files.gguf import GGUFFile


def is_layer_norm(gguf: GGUFFile) -> bool:
    """Whether the model's norms take the mean away first: layer norms, not RMS norms. A model has
    one kind, and its file gives that kind's epsilon."""
    key = f"{gguf.architecture}.attention.layer_norm"
    return f"{key}_epsilon" in gguf.metadata and f"{key}_rms_epsilon" not in gguf.metadata


def gain_and_bias(gguf: GGUFFile, name: str) -> tuple[np.ndarray | float, np.ndarray | float]:
    """The tensors `name`.weight and `name`.bias, float64; 1 and 0 where the file has none."""
    weight, bias = f"{name}.weight", f"{name}.bias"
    known = gguf.tensors.index
    return (
        gguf.tensor(weight).astype(np.float64) if weight in known else 1.0,
        gguf.tensor(bias).astype(np.float64) if bias in known else 0.0,
    )


def centred(x: ArrayLike, gguf: GGUFFile) -> np.ndarray:
    """x (.., width) as the norm sees it, float64: without its mean for a layer norm."""
    x = np.asarray(x, dtype=np.float64)
    return x - x.mean(-1, keepdims=True) if is_layer_norm(gguf) else x


def divisor(x: ArrayLike, gguf: GGUFFile) -> np.ndarray:
    """What the norm divides a state by: its root mean square, or its standard deviation. (..,
    width) -> (.., 1) float64"""
    x = centred(x, gguf)
    return np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + (gguf.norm_eps or 0.0))


def normalized(x: ArrayLike, gguf: GGUFFile, name: str) -> np.ndarray:
    """x through the norm whose weights the file keeps under `name` ("blk.3.attn_norm"). (.., width)
    -> (.., width) float64"""
    gain, bias = gain_and_bias(gguf, name)
    return centred(x, gguf) / divisor(x, gguf) * gain + bias
