"""A layer's attention weights out of a GGUF file, and the arithmetic that they do: projections,
RoPE.

Weights come dequantized, float32, rows first: out = input @ weight.T."""

from itertools import product

import numpy as np
from numpy.typing import ArrayLike

from ..files.gguf import GGUFFile
from ..norms import normalized


def _tensor(gguf, name):
    return gguf.tensor(name) if name in gguf.tensors.index else None


def projection(gguf: GGUFFile, layer: int, part: str) -> tuple[np.ndarray, np.ndarray | None]:
    """(weight (out, in), bias or None) of the matrix attn_`part` of a layer."""
    name = f"blk.{layer}.attn_{part}"
    return gguf.tensor(f"{name}.weight"), _tensor(gguf, f"{name}.bias")


def projection_weights(gguf: GGUFFile, layer: int) -> dict:
    """W_Q, W_K, W_V, also from a fused matrix: {"q": (weight (heads * feature, embd), bias or
    None), "k":, "v":}."""
    if f"blk.{layer}.attn_q.weight" in gguf.tensors.index:
        return {part: projection(gguf, layer, part) for part in "qkv"}
    fused, bias = projection(gguf, layer, "qkv")
    n_q, n_k = gguf.n_head * gguf.head_dim, gguf.n_kv_head * gguf.head_dim
    parts = np.split(fused, [n_q, n_q + n_k])
    biases = [None] * 3 if bias is None else np.split(bias, [n_q, n_q + n_k])
    return dict(zip("qkv", zip(parts, biases)))


def output_weight(gguf: GGUFFile, layer: int) -> np.ndarray:
    """W_O of a layer by head: (head, embd, feature_v) float32, so that head h adds output_h @
    W_O[h].T."""
    weight = gguf.tensor(f"blk.{layer}.attn_output.weight")  # (embd, head * feature_v)
    return np.ascontiguousarray(weight.reshape(len(weight), gguf.n_head, -1).transpose(1, 0, 2))


def _normed(x, gguf, name):
    """x through the norm `name` where the model has it (Qwen 3: on q and k; Gemma 3: after)."""
    return normalized(x, gguf, name) if f"{name}.weight" in gguf.tensors.index else x


def project_qkv(normed: ArrayLike, gguf: GGUFFile, layer: int) -> dict[str, np.ndarray]:
    """q, k, v before RoPE out of the normalized input (token, embd): dict of (head or kv_head,
    token, feature) float64, with the biases and the per-head norms that the model has."""
    out, n_head = {}, {"q": gguf.n_head, "k": gguf.n_kv_head, "v": gguf.n_kv_head}
    for name, (weight, bias) in projection_weights(gguf, layer).items():
        x = np.asarray(normed, dtype=np.float64) @ weight.T.astype(np.float64)
        x = x if bias is None else x + bias
        heads = x.reshape(len(x), n_head[name], -1).transpose(1, 0, 2)
        out[name] = _normed(heads, gguf, f"blk.{layer}.attn_{name}_norm")
    return out


def project_output(head_outputs: ArrayLike, gguf: GGUFFile, layer: int) -> np.ndarray:
    """What attention adds to the residual stream: the heads' outputs (head, token, feature) through
    W_O, with bias and post-norm where the model has them. Returns (token, embd) float64."""
    heads = np.asarray(head_outputs, dtype=np.float64)
    out = np.einsum("htd,hed->te", heads, output_weight(gguf, layer))
    bias = _tensor(gguf, f"blk.{layer}.attn_output.bias")
    out = out if bias is None else out + bias
    return _normed(out, gguf, f"blk.{layer}.post_attention_norm")


def rope(
    x: ArrayLike,
    base: float,
    pairing: str,
    factors: ArrayLike = 1.0,
    n_rot: int | None = None,
) -> np.ndarray:
    """Rotary position embedding (Su et al. 2021): pair i of token t turns by t * base^(-2i/n_rot) /
    factors[i].

    x: (head, token, feature), token t at position t; pairing "neighbours" (2i, 2i+1: llama.cpp's
    NORM) or "halves" (i, i + n_rot/2: NEOX). Features beyond n_rot pass unchanged. Returns float64.
    """
    out = np.array(x, dtype=np.float64)
    n_rot, half = n_rot or out.shape[-1], (n_rot or out.shape[-1]) // 2
    speed = base ** (-np.arange(0, n_rot, 2) / n_rot) / np.asarray(
        factors
    )  # (pair,) radians a token
    angle = np.arange(out.shape[1])[:, None] * speed  # (token, pair)
    first, second = slice(0, half), slice(half, n_rot)
    if pairing == "neighbours":
        first, second = slice(0, n_rot, 2), slice(1, n_rot, 2)
    a, b = out[..., first].copy(), out[..., second].copy()
    out[..., first] = a * np.cos(angle) - b * np.sin(angle)
    out[..., second] = a * np.sin(angle) + b * np.cos(angle)
    return out


# Llama 3 and Phi 3 keep one factor per pair of dimensions.
_FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")


def fitted_rope(before: ArrayLike, after: ArrayLike, gguf: GGUFFile) -> tuple:
    """Which RoPE turns `before` into `after` (both (head, token, feature)), of the pairings and
    bases a GGUF can mean.

    Returns (pairing, base, rotated, relative error). Gemma 3's sliding-window layers use base
    10,000 whatever the file says, and the file does not list them: hence the fit. Its queries are
    also scaled after turning: a rotation keeps lengths, so the ratio of lengths is that factor."""
    key = f"{gguf.architecture}.rope"
    linear = float(gguf.metadata.get(f"{key}.scaling.factor") or 1)
    factors = [1.0, linear, *(gguf.tensor(x) for x in _FACTORS if x in gguf.tensors.index)]
    stated = (
        gguf.metadata.get(f"{key}.{name}") or 10000.0 for name in ("freq_base", "freq_base_swa")
    )
    bases = sorted({gguf.rope_freq_base or 10000.0, 10000.0, *stated})
    after = np.asarray(after, dtype=np.float64)
    length = np.linalg.norm(after)
    fits = []
    for base, pairing, factor in product(bases, ("neighbours", "halves"), factors):
        turned = rope(before, base, pairing, factor, gguf.rope_dim)
        turned *= length / np.linalg.norm(before)
        error = float(np.linalg.norm(turned - after) / length)
        fits.append((pairing, base, turned, error))
    return min(fits, key=lambda fit: fit[-1])
