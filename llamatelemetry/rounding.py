"""How far llama.cpp's matrix products lie from those of the dequantized matrix: it rounds what the
matrix multiplies.

With a quantized matrix the input is rounded to 8 bits, blocks of 32 (on a CPU 256 for k-quants and
i-quants) with one step each, the block's largest value / 127. Rounding to steps s has variance s^2
/ 12 (Widrow and Kollar 2008, "Quantization Noise"), so a sum over w_i x_i is off by about
sqrt(sum_i w_i^2 s_i^2 / 12).

In some types a weight is scale * code + minimum, with codes from 0 up. llama.cpp's CUDA kernels
multiply the minimum by the sum of the inputs before they are rounded, its CPU kernels by the sum
after it: on a GPU the rounding error meets scale * code, which is larger than a weight around 0
(measured: tests/benchmarks/bench_rounding_cause.py)."""

import numpy as np

# Relative step of an input. TF32 is how a GPU multiplies 32-bit floats: it rounds the weights, too.
_FLOATS = {
    "F32": 2.0**-23,
    "F64": 2.0**-23,
    "F16": 2.0**-11,
    "BF16": 2.0**-8,
    "TF32": 2.0**-11 * 2**0.5,
}
# Weights that share a minimum, by type (ggml-cuda: mmq.cuh, vecdotq.cuh; Q5_0 only for texts of up
# to 8 tokens).
_CODES_FROM_ZERO = {
    "Q4_0": 32,
    "Q4_1": 32,
    "Q5_0": 32,
    "Q5_1": 32,
    "Q4_K": 32,
    "Q5_K": 32,
    "IQ1_S": 32,
    "Q2_K": 16,
}


def deviation(x, weight, kind, gpu):
    """Standard deviation of the runtime's x @ weight.T around the exact one. (token, out) float64

    x: (token, in); weight: (out, in), dequantized; kind: its type in the file, as "Q4_K"; gpu:
    whether a GPU may have multiplied: then the larger of both processors' deviations."""
    x, weight = np.asarray(x, dtype=np.float64), np.asarray(weight, dtype=np.float64)
    kind = "TF32" if gpu and kind == "F32" else kind
    if kind in _FLOATS:
        return np.sqrt((_FLOATS[kind] * x) ** 2 / 3 @ (weight**2).T)
    wide = "_K" in kind or (kind.startswith(("IQ", "TQ")) and kind != "IQ4_NL")
    variance = _variance(x, 256 if wide else 32) @ (weight**2).T
    if gpu and kind in _CODES_FROM_ZERO:
        width = 64 if kind == "Q2_K" else 32
        variance = np.maximum(variance, _variance(x, width) @ (_codes(weight, kind) ** 2).T)
    return np.sqrt(variance)


def logit_tolerance(x, weight, kind, gpu, largest):
    """What rounding can do to logits: six standard deviations, plus 1e-4 of the largest logit (1e-3
    for a 16-bit matrix, whose sums a GPU may keep in 16 bits, and for TF32). Arguments as for
    `deviation`. (token, out)"""
    coarse = kind in ("F16", "BF16") or (gpu and kind == "F32")
    return 6 * deviation(x, weight, kind, gpu) + (1e-3 if coarse else 1e-4) * largest


def _variance(x, width):
    """Of the rounding of every input, in blocks of `width`. (token, in)"""
    padded = np.pad(np.abs(x), ((0, 0), (0, -x.shape[1] % width)))
    step = padded.reshape(len(x), -1, width).max(-1) / 127
    return np.repeat(step, width, axis=1)[:, : x.shape[1]] ** 2 / 12


def _codes(weight, kind):
    """scale * code of every weight: its distance from the block's weight of code 0. (out, in)"""
    blocks = weight.reshape(len(weight), -1, _CODES_FROM_ZERO[kind])
    # A file's quantizer gives code 0 to the weight of the largest size where scale and minimum are
    # tied, else to the smallest, or to 0 where a k-quant's block has positive weights alone.
    at = np.abs(blocks).argmax(-1) if kind in ("Q4_0", "Q5_0") else blocks.argmin(-1)
    zero = np.take_along_axis(blocks, at[..., None], -1)
    zero = np.minimum(zero, 0) if "_K" in kind else zero
    return (blocks - zero).reshape(weight.shape)
