"""Why the CPU's and the GPU's quantized kernels differ: the model computed in NumPy with either
kind of rounding.

    python tests/benchmarks/bench_rounding_cause.py [--types Q8_0 Q5_0 Q4_0 Q4_1 Q5_1]
        [--results FILE]

Needs no GPU. Both kinds of kernel round the activations of a block of 32 to 8 bits, x ~ d * q. A
quantized weight is scale * code + minimum (Q4_1, Q5_1; Q4_0 on CUDA: code from 0 to 15, minimum -8
* scale), and

    "sum after"   multiplies the minimum by the sum of the rounded activations
                  (ggml-cpu/arch/x86/quants.c)
    "sum before"  multiplies it by their sum before rounding (ggml-cuda/quantize.cu, mmq.cuh)

so that the rounding error meets weights around 0 in the first and codes from 0 up in the second.
Nothing else differs between the two columns. llama.cpp on the CPU is measured beside them,
bench_rounding.py measures the GPU's kernels.

Checked in each run: without rounding the NumPy model equals llama.cpp's on the dequantized file
(1e-5), and the first projection with "sum after" equals that of llama.cpp's CPU kernels (1e-3),
whose inputs are the same numbers. Further on rounding flips by chance: two runs of one scheme that
differ in the last bit end as far apart as column `same_scheme`."""

import numpy as np
from bench_rounding import ON_CPU, STAGES, TEXT, rms
from common import rounding

BLOCK = 32
BYTES = {"Q4_0": 18, "Q4_1": 20, "Q5_1": 24}  # of one block of the types whose codes begin at 0
EXACT, AFTER, BEFORE = "exact", "sum after", "sum before"


def weights(tensor):
    """(matrix [out, in], minimum of each block [out, in / 32] or None) of one tensor of a GGUF
    file, as float32."""
    from gguf.quants import dequantize

    matrix, kind = (
        dequantize(tensor.data, tensor.tensor_type).astype(np.float32),
        tensor.tensor_type.name,
    )
    if kind not in BYTES:
        return matrix, None
    halves = (
        tensor.data.reshape(len(matrix), -1, BYTES[kind])[..., :4]
        .copy()
        .view(np.float16)
        .astype(np.float32)
    )
    return matrix, -8 * halves[..., 0] if kind == "Q4_0" else halves[..., 1]


def half(values):
    return values.astype(np.float16).astype(np.float32)


def product(x, weight, scheme):
    """x [token, in] times a weight's transpose, its activations rounded as `scheme` says."""
    matrix, minimum = weight
    if scheme == EXACT:
        return x @ matrix.T
    blocks = x.reshape(len(x), -1, BLOCK)
    step = np.abs(blocks).max(-1, keepdims=True) / 127
    rounded = (np.round(blocks / np.where(step, step, 1)) * half(step)).reshape(x.shape)
    if scheme == AFTER or minimum is None:
        return rounded @ matrix.T
    codes = (matrix.reshape(*minimum.shape, BLOCK) - minimum[..., None]).reshape(matrix.shape)
    return rounded @ codes.T + half(blocks.sum(-1)) @ minimum.T


def normed(x, gain, epsilon):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * gain


def forward(path, ids, scheme):
    """The stages of a Llama-architecture GGUF file for token ids, shaped as a capture's: dict of
    stage and array."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def fact(key):
        return reader.fields[f"llama.{key}"].contents()

    def linear(x, name):
        return product(x, weights(tensors[f"{name}.weight"]), scheme)

    def norm(x, name):
        return normed(x, tensors[f"{name}.weight"].data, fact("attention.layer_norm_rms_epsilon"))

    heads, key_heads = fact("attention.head_count"), fact("attention.head_count_kv")
    size, count = fact("embedding_length") // heads, len(ids)
    angles = np.arange(count)[:, None] * fact("rope.freq_base") ** (-np.arange(0, size, 2) / size)
    turns = np.exp(1j * angles)[
        :, None
    ]  # rotary embedding: neighbouring dimensions are one complex number

    def split(x, rotated=True):
        x = np.ascontiguousarray(x.reshape(count, -1, size))
        return (
            (x.view(np.complex64) * turns).astype(np.complex64).view(np.float32) if rotated else x
        )

    x, found = weights(tensors["token_embd.weight"])[0][ids], {stage: [] for stage in STAGES}
    found["hidden"].append(x)
    future = np.triu(np.ones((count, count), bool), 1)
    for layer in range(fact("block_count")):
        h = norm(x, f"blk.{layer}.attn_norm")
        q, k, v = (split(linear(h, f"blk.{layer}.attn_{part}"), part != "v") for part in "qkv")
        k, v = (np.repeat(part, heads // key_heads, axis=1) for part in (k, v))
        scores = np.where(future, -np.inf, np.einsum("qhd,khd->hqk", q, k) / np.sqrt(size))
        attention = np.exp(scores - scores.max(-1, keepdims=True))
        attention = (attention / attention.sum(-1, keepdims=True)).astype(np.float32)
        x = x + linear(
            np.einsum("hqk,khd->qhd", attention, v).reshape(count, -1), f"blk.{layer}.attn_output"
        )
        h = norm(x, f"blk.{layer}.ffn_norm")
        gate = linear(h, f"blk.{layer}.ffn_gate")
        x = x + linear(
            gate / (1 + np.exp(-gate)) * linear(h, f"blk.{layer}.ffn_up"), f"blk.{layer}.ffn_down"
        )
        for stage, value in (("attention", attention), ("q", q.swapaxes(0, 1)), ("hidden", x)):
            found[stage].append(value)
    head = "output" if "output.weight" in tensors else "token_embd"
    found = {stage: np.stack(values) for stage, values in found.items() if values}
    return found | {"logits": linear(norm(x, "output_norm"), head)}


def errors(source, kind, folder):
    """One row per stage for one type. source: F32 file; folder: for the files that are made, and
    removed again."""
    from llamatelemetry.capture.session import CaptureSession
    from llamatelemetry.convert.expand import expand
    from llamatelemetry.convert.quantize import quantize

    quantized, dequantized = folder / f"{kind}.gguf", folder / f"{kind}-F32.gguf"
    quantize(source, quantized, kind, progress=False, pure=True)
    expand(quantized, dequantized, progress=False)
    captures = {}
    for name, path in ((EXACT, dequantized), (AFTER, quantized)):
        with CaptureSession(path, **ON_CPU) as session:
            captures[name] = session.capture(TEXT, STAGES)
    ids = captures[EXACT].tokens["id"].to_numpy()
    here = {scheme: forward(quantized, ids, scheme) for scheme in (EXACT, AFTER, BEFORE)}
    quantized.unlink(), dequantized.unlink()
    first = rms(here[AFTER]["q"][0], captures[AFTER]["q"].values[0])
    assert first < 1e-3, (
        f"{kind}: the first projection differs by {first} from llama.cpp's CPU kernel"
    )
    rows = []
    for stage in STAGES:
        exact, cpu = captures[EXACT][stage].values, captures[AFTER][stage].values
        assert rms(here[EXACT][stage], exact) < 1e-5, f"{kind}, {stage}: not llama.cpp's model"
        rows.append(
            {
                "what": f"{kind}, {stage}",
                "type": kind,
                "stage": stage,
                "llama_cpu_exact": rms(cpu, exact),
                "after_exact": rms(here[AFTER][stage], exact),
                "before_exact": rms(here[BEFORE][stage], exact),
                "before_after": rms(here[BEFORE][stage], here[AFTER][stage]),
                "same_scheme": rms(here[AFTER][stage], cpu),
            }
        )
    return rows


if __name__ == "__main__":
    rounding("rounding_cause", __doc__, errors, ["Q8_0", "Q5_0", "Q4_0", "Q4_1", "Q5_1"])
