"""What a model needs before it is loaded, computed from its file: weights, KV cache, compute
buffers, per process."""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..errors import OptionError
from ..imports import uninterrupted
from . import devices

if TYPE_CHECKING:
    import pandas as pd

    from ..files.gguf import GGUFFile

MIB = 2**20
# CUDA's own share per process (context, kernels, cuBLAS workspace) is not in the file: 589 MiB for
# llama-server and 586 MiB for the worker by NVML on an H200, weights, cache and buffers subtracted.
# Older GPUs take less.
CONTEXT_BYTES = 600 * MIB
# Bits per weight of whole files, about: what is named when a model does not fit.
FLOATS = {"F32": 32, "F16": 16, "BF16": 16}
SMALLER = {"Q8_0": 8.5, "Q6_K": 6.6, "Q5_K_M": 5.7, "Q4_K_M": 4.9, "Q3_K_M": 3.9, "Q2_K": 3.0}
# Period of the layers that see everything, where the file does not say (llama.cpp, src/models);
# True: it leads.
_PERIOD = {
    "gemma2": (2, False),
    "gemma3": (6, False),
    "gemma3n": (5, False),
    "gpt-oss": (2, False),
    "cohere2": (4, False),
    "olmo2": (4, False),
    "exaone4": (4, False),
    "plamo3": (8, False),
    "smallthinker": (4, True),
}


def sliding_layers(gguf: "GGUFFile") -> list[bool]:
    """One bool per layer: does it keep only a sliding window of keys and values?"""
    # llama.cpp runs Phi 3 without its window
    if not gguf.sliding_window or gguf.architecture == "phi3":
        return [False] * gguf.n_layer
    pattern = gguf.metadata.get(f"{gguf.architecture}.attention.sliding_window_pattern")
    if isinstance(pattern, list):
        return [bool(value) for value in pattern[: gguf.n_layer]]
    period, leads = _PERIOD.get(gguf.architecture, (0, False))
    period = pattern if isinstance(pattern, int) else period
    if not period:  # unknown: the full size is the safe answer
        return [False] * gguf.n_layer
    full = 0 if leads else period - 1
    return [layer % period != full for layer in range(gguf.n_layer)]


def kv_bytes(
    gguf: "GGUFFile",
    ctx_size: int,
    n_parallel: int = 1,
    n_ubatch: int = 512,
    swa_full: bool = False,
    bytes_k: float = 2.0,
    bytes_v: float = 2.0,
) -> int:
    """Bytes of the key and value cache for n_parallel requests of ctx_size tokens, at 16 bit or
    with bytes_k and bytes_v per number (compare.ways.cache_bytes)."""

    cells, window = (-(-n // 256) * 256 for n in (ctx_size, (gguf.sliding_window or 0) + n_ubatch))
    window = cells if swa_full else min(cells, window)
    told = {name.partition(".")[2]: value for name, value in gguf.metadata.items()}
    # Recurrent layers keep a state of one size, and latent attention reads values out of keys
    every, layers = told.get("full_attention_interval") or 1, range(1, gguf.n_layer + 1)
    states = told.get("attention.recurrent_layers") or [layer % every for layer in layers]
    values = bytes_v * gguf.head_dim_v * ("attention.key_length_mla" not in told)
    per_head = bytes_k * gguf.head_dim + values
    heads = getattr(gguf, "n_kv_head_per_layer", [gguf.n_kv_head] * gguf.n_layer)
    cached = zip(heads, sliding_layers(gguf), states)
    rows = sum(n_kv * (window if slides else cells) for n_kv, slides, state in cached if not state)
    return int(n_parallel * per_head * rows)


def as_type(gguf: "GGUFFile", kind: str) -> "GGUFFile":
    """The file that expanding or quantizing `gguf` to `kind` would make, to be reckoned with before
    it is there: its tensors' sizes, size_bytes and bits_per_weight. Exact for F32, F16 and BF16
    (whose vectors are F32), for others about, by the bits per weight of such files."""
    bits = FLOATS.get(kind) or SMALLER.get(kind)
    if not bits:  # a mixture takes a little more than its digit says
        if not (digit := re.search(r"\d", kind)):
            raise OptionError(f"{kind!r} is no type of a GGUF file: F16, Q8_0, Q4_K_M, ...")
        bits = int(digit[0]) + 1
    other, table = copy.copy(gguf), gguf.tensors.copy()
    wide = table["shape"].map(len).gt(1).map({True: bits, False: 32})
    table["size_bytes"] = (table["n_elements"] * wide / 8).astype(int)
    before, size = (int(each["size_bytes"].sum()) for each in (gguf.tensors, table))
    other.called, other.file_type = f"{gguf.called} as {kind}", kind
    other.size_bytes = gguf.size_bytes - before + size
    other.bits_per_weight = 8 * size / max(1, int(table["n_elements"].sum()))
    other.tensors = table
    return other


def weight_bytes(gguf, gpu=True, share=1.0, output=True):
    """Bytes of weights that a process holds: on a GPU without the token embedding, which stays in
    the machine's memory unless it also makes the logits. share, output: of the layers, and whether
    the output is there (`spread`)."""
    sizes = gguf.tensors["size_bytes"]
    total, last = int(sizes.sum()), int(sizes.get(gguf.output_name, 0))
    if gpu and gguf.output_name != "token_embd.weight":
        total -= int(sizes.get("token_embd.weight", 0))
    return int((total - last) * share) + last * output


def spread(n_layer: int, shares: Sequence[float]) -> list[tuple[float, bool]]:
    """[(share of the layers, whether it has the output)] of each GPU when the weights are split by
    `shares`: whole layers, as llama.cpp deals them out, the output after the last."""
    ends = [sum(shares[: number + 1]) / sum(shares) for number in range(len(shares))]
    owner = [sum(end <= layer / (n_layer + 1) for end in ends[:-1]) for layer in range(n_layer + 1)]
    return [
        (owner[:-1].count(number) / max(n_layer, 1), owner[-1] == number)
        for number in range(len(shares))
    ]


def compute_bytes(gguf, ctx_size, n_ubatch=512, n_outputs=1, flash=True):
    """Bytes of the buffers for one batch: the mask, and the larger of what a layer needs
    (activations, and scores where attention is not fused) and what the end needs (logits): the
    allocator gives the same memory to both."""
    batch = min(n_ubatch, ctx_size)
    n_ff = max(gguf.n_ff, gguf.n_embd)
    activations = 4 * batch * (4 * gguf.n_embd + 3 * n_ff)
    mask = (6 if flash else 4) * batch * ctx_size  # 32 bit, and a 16-bit copy for fused attention
    scores = 0 if flash else 2 * 4 * batch * ctx_size * gguf.n_head
    logits = 4 * n_outputs * gguf.n_vocab + 8 * batch * gguf.n_embd
    return mask + max(activations + scores, logits)


@dataclass(frozen=True)
class Fit:
    """What fit() found. table: DataFrame of process, weights, kv_cache, compute, context and total
    in MiB; need_bytes, memory_bytes; fits; sentence: that, and what would fit if it does not (also
    str())."""

    table: "pd.DataFrame"
    need_bytes: int
    memory_bytes: int
    fits: bool
    sentence: str

    def __str__(self) -> str:
        return self.sentence


@dataclass(frozen=True)
class Asked:
    """What is to fit: a model as two processes, on a GPU with `share` of the layers (and the
    output) or in the machine's memory. scale: of the weights, for another quantization."""

    gguf: "GGUFFile"
    ctx_size: int
    n_parallel: int
    server: bool
    capture: bool
    gpu: bool
    share: float
    output: bool
    scale: float = 1.0

    def needs(self):
        """{process: (weights, kv, compute, context)} in bytes."""
        gguf, ctx_size = self.gguf, self.ctx_size
        context = CONTEXT_BYTES if self.gpu else 0
        weights = int(weight_bytes(gguf, self.gpu, self.share, self.output) * self.scale)
        found = {}
        if self.server:
            cache = int(kv_bytes(gguf, ctx_size, n_parallel=self.n_parallel) * self.share)
            found["llama-server"] = weights, cache, compute_bytes(gguf, ctx_size), context
        if self.capture:
            # Without a GPU both processes map the same pages of the file: one copy.
            weights = 0 if self.server and not self.gpu else weights
            cache = int(kv_bytes(gguf, ctx_size, swa_full=True) * self.share)
            n_outputs = min(512, ctx_size) * self.output
            compute = compute_bytes(gguf, ctx_size, n_outputs=n_outputs, flash=False)
            found["capture worker"] = weights, cache, compute, context
        return found

    def total(self, **changes):
        """Bytes of all processes together, with these fields changed."""
        return sum(map(sum, replace(self, **changes).needs().values()))

    def part(self, count, output):
        """Bytes on a GPU that gets `count` of the layers and the output (one more)."""
        share = (count - output) / max(1, self.gguf.n_layer)
        return self.total(share=share, output=output) if count else 0


def fit(
    gguf: "GGUFFile",
    ctx_size: int = 4096,
    n_parallel: int = 1,
    memory_bytes: int | None = None,
    capture: bool = True,
    server: bool = True,
    gpu: bool | None = None,
    share: float = 1.0,
    output: bool = True,
) -> Fit:
    """Does the model of `gguf` (a GGUFFile) fit, as llama-server and capture worker together?

    ctx_size: tokens per request; memory_bytes: what there is, None: free on the inference GPU, or
    of the machine without one. gpu: count for a GPU (each process its own weights and CUDA context)
    or for the machine's memory. share, output: what of the layers is on that GPU, and whether the
    output is, where tensor_split spreads them (`spread`). Returns a Fit. Weights and KV cache are
    exact for layers of one size; compute buffers are llama.cpp's within some tens of MiB, and
    CUDA's own share per process is an allowance."""
    with uninterrupted():
        import pandas as pd

    chosen = devices.plan().inference if memory_bytes is None or gpu is None else ()
    gpu = bool(chosen) if gpu is None else gpu
    if memory_bytes is None:
        import psutil

        memory_bytes = psutil.virtual_memory().available
        if gpu and chosen:
            memory_bytes = min(each.free_bytes for each in chosen)
    asked = Asked(gguf, ctx_size, n_parallel, server, capture, gpu, share, output)
    needs, need = asked.needs(), asked.total()
    rows = [(name, *parts, sum(parts)) for name, parts in needs.items()]
    columns = ["process", "weights", "kv_cache", "compute", "context", "total"]
    table = pd.DataFrame(rows, columns=columns).set_index("process").div(MIB).reset_index()
    part = "" if share == 1 else f" on the GPU with {share:.0%} of the layers"
    have = (
        f"{need / MIB:,.0f} MiB needed by {' and '.join(needs)} at {ctx_size:,} tokens{part}, "
        f"{memory_bytes / MIB:,.0f} MiB there"
    )
    if need <= memory_bytes:
        return Fit(table, need, memory_bytes, True, f"{gguf.called} fits: {have}.")
    ways = [*ways_out(asked, lambda other: other.total() <= memory_bytes)]
    ways += _together(asked, memory_bytes)
    return Fit(
        table, need, memory_bytes, False, f"{gguf.called} does not fit: {have}. {mend(ways)}"
    )


def mend(ways):
    told = f"What would fit: {'; '.join(ways)}."
    return told if ways else "Nothing smaller of this model would: choose a smaller one."


def ways_out(asked, fits):
    """What of the same model would fit, as parts of a sentence. fits(another Asked) -> bool."""
    shorter = asked.ctx_size // 2
    while shorter >= 256 and not fits(replace(asked, ctx_size=shorter)):
        shorter //= 2
    if shorter >= 256:
        yield f"a context of {shorter:,} tokens (ctx_size={shorter})"
    if asked.server and asked.capture and fits(alone := replace(asked, server=False)):
        yield f"captures without the server, {alone.total() / MIB:,.0f} MiB (auto_start=False)"
    here = asked.gguf.bits_per_weight
    for name, bits in SMALLER.items():
        smaller = replace(asked, scale=bits / max(here, bits))
        if bits < here and fits(smaller):
            yield f"the {name} quantization, about {smaller.total() / MIB:,.0f} MiB"
            break


def _together(asked, memory_bytes):
    """The way over all GPUs, where each has as much memory: a list of it, or of nothing."""
    count = len(devices.visible_gpus()) if asked.gpu and asked.share == 1 else 0
    parts = spread(asked.gguf.n_layer, [1] * count) if count > 1 else []
    needs = [asked.total(share=share, output=last) for share, last in parts]
    if not needs or max(needs) > memory_bytes:
        return []
    return [f'{count} GPUs together (tensor_split="{",".join([f"{1 / count:g}"] * count)}")']
