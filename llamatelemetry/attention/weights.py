"""A layer's attention weights out of a GGUF file, and the arithmetic that they do: norms,
projections, RoPE.

`gguf` is a llamatelemetry.files.gguf.GGUFFile; weights come dequantized, float32, rows first: out =
input @ weight.T."""

from itertools import product

import numpy as np


def _bias(gguf, name):
    return gguf.tensor(name) if name in gguf.tensors.index else None


def projection(gguf, layer, part):
    """(weight (out, in), bias or None) of the matrix attn_`part` of a layer."""
    return gguf.tensor(f"blk.{layer}.attn_{part}.weight"), _bias(
        gguf, f"blk.{layer}.attn_{part}.bias"
    )


def projection_weights(gguf, layer):
    """W_Q, W_K, W_V, also from a fused matrix: {"q": (weight (heads * feature, embd), bias or
    None), "k":, "v":}."""
    if f"blk.{layer}.attn_q.weight" in gguf.tensors.index:
        return {part: projection(gguf, layer, part) for part in "qkv"}
    fused, bias = projection(gguf, layer, "qkv")
    n_q, n_k = gguf.n_head * gguf.head_dim, gguf.n_kv_head * gguf.head_dim
    parts = np.split(fused, [n_q, n_q + n_k])
    biases = [None] * 3 if bias is None else np.split(bias, [n_q, n_q + n_k])
    return dict(zip("qkv", zip(parts, biases)))


def output_weight(gguf, layer):
    """W_O of a layer by head: (head, embd, feature_v) float32, so that head h adds output_h @
    W_O[h].T."""
    weight = gguf.tensor(f"blk.{layer}.attn_output.weight")  # (embd, head * feature_v)
    return np.ascontiguousarray(weight.reshape(len(weight), gguf.n_head, -1).transpose(1, 0, 2))


def rms_norm(x, weight, eps):
    """x / sqrt(mean x^2 + eps) * weight over the last axis (Zhang and Sennrich 2019), float64."""
    x = np.asarray(x, dtype=np.float64)
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def norm(x, gguf, name):
    """The norm that the tensor `name`.weight belongs to: LayerNorm (Ba et al. 2016) where the file
    gives its epsilon, else RMSNorm. x: (..., embd); returns float64."""
    weight, bias = gguf.tensor(f"{name}.weight"), _bias(gguf, f"{name}.bias")
    if f"{gguf.architecture}.attention.layer_norm_rms_epsilon" not in gguf.metadata:
        x = np.asarray(x, dtype=np.float64)
        x = x - x.mean(-1, keepdims=True)
    x = rms_norm(x, weight, gguf.norm_eps)
    return x if bias is None else x + bias


def split_heads(x, n_head):
    """(token, head * feature) -> (head, token, feature)."""
    return np.asarray(x).reshape(len(x), n_head, -1).transpose(1, 0, 2)


def project_qkv(normed, gguf, layer):
    """q, k, v before RoPE out of the normalized input (token, embd): dict of (head or kv_head,
    token, feature).

    Applies biases, and the per-head norm of q and k where the model has one (Qwen 3, Gemma 3).
    """
    out = {}
    for name, (weight, bias) in projection_weights(gguf, layer).items():
        x = np.asarray(normed, dtype=np.float64) @ weight.T.astype(np.float64)
        heads = split_heads(
            x if bias is None else x + bias, gguf.n_head if name == "q" else gguf.n_kv_head
        )
        norm = f"blk.{layer}.attn_{name}_norm.weight"
        if norm in gguf.tensors.index:
            heads = rms_norm(heads, gguf.tensor(norm), gguf.norm_eps)
        out[name] = heads
    return out


def project_output(head_outputs, gguf, layer):
    """What attention adds to the residual stream: the heads' outputs (head, token, feature) through
    W_O, with bias and post-norm where the model has them. Returns (token, embd) float64."""
    heads = np.asarray(head_outputs, dtype=np.float64)
    out = np.einsum("htd,hed->te", heads, output_weight(gguf, layer))
    bias = _bias(gguf, f"blk.{layer}.attn_output.bias")
    out = out if bias is None else out + bias
    post = _bias(gguf, f"blk.{layer}.post_attention_norm.weight")
    return out if post is None else rms_norm(out, post, gguf.norm_eps)


def rope(x, base, pairing, factors=1.0, n_rot=None):
    """Rotary position embedding (Su et al. 2021): pair i of token t turns by t * base^(-2i/n_rot) /
    factors[i].

    x: (head, token, feature), token t at position t; pairing "neighbours" (2i, 2i+1: llama.cpp's
    NORM) or "halves" (i, i + n_rot/2: NEOX). Features beyond n_rot pass unchanged. Returns float64.
    """
    out = np.array(x, dtype=np.float64)
    n_rot = n_rot or out.shape[-1]
    angle = (
        np.arange(out.shape[1])[:, None] * base ** (-np.arange(0, n_rot, 2) / n_rot)[None, :]
    )  # (token, pair)
    angle = angle / factors
    first, second = (
        (slice(0, n_rot, 2), slice(1, n_rot, 2))
        if pairing == "neighbours"
        else (slice(0, n_rot // 2), slice(n_rot // 2, n_rot))
    )
    a, b = out[..., first].copy(), out[..., second].copy()
    out[..., first] = a * np.cos(angle) - b * np.sin(angle)
    out[..., second] = a * np.sin(angle) + b * np.cos(angle)
    return out


def fitted_rope(before, after, gguf):
    """Which RoPE turns `before` into `after` (both (head, token, feature)), of the pairings and
    bases a GGUF can mean.

    Returns (pairing, base, rotated, relative error). Gemma 3's sliding-window layers use base
    10,000 whatever the file says, and the file does not list them: hence the fit. Its queries are
    also scaled after turning: a rotation keeps lengths, so the ratio of lengths is that factor."""
    names = (
        "rope_freqs.weight",
        "rope_factors_short.weight",
        "rope_factors_long.weight",
    )  # Llama 3, Phi 3
    stretched = float(
        gguf.metadata.get(f"{gguf.architecture}.rope.scaling.factor") or 1
    )  # linear scaling
    all_factors = [
        1.0,
        stretched,
        *(gguf.tensor(name) for name in names if name in gguf.tensors.index),
    ]
    known = {gguf.rope_freq_base or 10000.0, 10000.0}
    known |= {
        float(v)
        for k, v in gguf.metadata.items()
        if k.startswith(f"{gguf.architecture}.rope.freq_base")
    }
    after = np.asarray(after, dtype=np.float64)
    factor = np.linalg.norm(after) / np.linalg.norm(before)
    best = None
    for base in sorted(known):
        for pairing, factors in product(("neighbours", "halves"), all_factors):
            turned = rope(before, base, pairing, factors, gguf.rope_dim) * factor
            error = float(np.linalg.norm(turned - after) / np.linalg.norm(after))
            if best is None or error < best[3]:
                best = (pairing, base, turned, error)
    return best
