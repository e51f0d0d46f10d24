"""The ways in which one file is computed with: types of its key and value cache, and other orders
of the same sums. Each is a candidate of a comparison: a file's path and settings of its context.

llama.cpp turns keys and values by a Hadamard matrix before it quantizes them, unless
LLAMA_ATTN_ROT_DISABLE=1 is set, and has quantized values with fused attention only."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from gguf import GGMLQuantizationType

from ..arguments import whole
from ..errors import CompareError, LlamaTelemetryError
from ..files.gguf import GGUFFile
from ..files.types import tensor_type
from ..gpus.fit import kv_bytes

# What llama.cpp takes for -ctk and -ctv
TYPES = {
    name: tensor_type(GGMLQuantizationType[name.upper()].value)
    for name in ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
}
Pair = tuple[str, str]
PLAIN: Pair = ("f16", "f16")  # llama.cpp's own choice
NOISE_TOKENS = 256  # and the rest of a window, are read to measure noise
LARGE = 2 << 30  # bytes of a file that is not read a second time on the CPU to measure noise


class Way(NamedTuple):
    """A candidate. path: of its file; settings: of its context, as llama.cpp names them, and
    gpu_layers where they differ; windows: the first so many, where it does not read all."""

    path: str
    settings: dict[str, Any]


def pairs(cache_types: Iterable[Pair | str] | None) -> list[Pair]:
    """Pairs of types for keys and values, each once, in order: ("q8_0", "q4_0") or "q8_0/q4_0".
    CompareError for what is none."""
    found: list[Pair] = []
    for given in [PLAIN] if cache_types is None else cache_types:
        pair = given.split("/") if isinstance(given, str) else given
        pair = pair if isinstance(pair, (list, tuple)) else ()
        if len(pair) != 2 or not all(kind in TYPES for kind in pair):
            raise CompareError(
                f"cache_types holds {given!r}: give pairs such as ('q8_0', 'q4_0'), for keys and values, of "
                f"{', '.join(TYPES)}."
            )
        if tuple(pair) not in found:
            found.append((pair[0], pair[1]))
    if not found:
        raise CompareError("cache_types is empty: None is llama.cpp's own f16 for both.")
    return found


def named(name: str, pair: Pair) -> str:
    """A row's name: the file's, and its cache where that is not llama.cpp's own."""
    return name if pair == PLAIN else f"{name}, {'/'.join(pair)} cache"


def with_cache(path: str, pair: Pair) -> Way:
    """A file with a cache of these types."""
    kinds = dict(zip(("type_k", "type_v"), (TYPES[kind].number for kind in pair)))
    return Way(path, kinds if pair != PLAIN else {})


def no_cache(path: str | Path, pair: Pair) -> str | None:
    """Why llama.cpp makes no cache of these types for a file: a type's block does not divide the
    head size. None where it does, or where llama.cpp has to say what is wrong with the file."""
    try:
        file = GGUFFile(path)
    except LlamaTelemetryError:
        return None
    for what, kind, size in zip(("keys", "values"), pair, (file.head_dim, file.head_dim_v)):
        if size % (block := TYPES[kind].block):
            return f"a {kind} cache holds blocks of {block} numbers, and {file.name} has {what} of {size} per head"
    return None


def cache_bytes(file: GGUFFile, n_tokens: int, pair: Pair = PLAIN) -> int:
    """Bytes of the cache of one text of n_tokens, as llama.cpp makes it: in steps of 256 tokens,
    layers with a sliding window no longer than that and a batch."""
    n = whole("n_tokens", n_tokens, 1, error=CompareError)
    k, v = (TYPES[kind].size / TYPES[kind].block for kind in pair)
    return kv_bytes(file, n, bytes_k=k, bytes_v=v)


def token_bytes(file: GGUFFile, pair: Pair = PLAIN) -> float:
    """Bytes by which the cache grows per token, once the text is longer than any window."""
    long = 256 * (-(-((file.sliding_window or 0) + 512) // 256) + 1)
    return (cache_bytes(file, long + 256, pair) - cache_bytes(file, long, pair)) / 256


def beside_bytes(n_ctx: int, ways: Iterable[Way]) -> dict[str, int]:
    """{path: bytes} that the contexts of each file need beyond the first: the logits of a step
    twice, and the largest cache there is."""
    counts = Counter(way.path for way in ways)
    found = {}
    for path, count in counts.items():
        try:
            file = GGUFFile(path)
        except LlamaTelemetryError:
            continue  # llama.cpp says what is wrong with it
        cache = kv_bytes(file, max(n_ctx, 512), bytes_k=4, bytes_v=4)
        found[path] = (count - 1) * (8 * 512 * file.n_vocab + cache)
    return found


def noise_ways(path: str | Path, gpu: bool, n_ctx: int = 512) -> dict[str, Way]:
    """Other orders of the same sums, by name: what a file's own noise is measured with, on as many
    windows of n_ctx tokens as hold NOISE_TOKENS.

    gpu: whether GPUs compute it: they have other kernels for a few tokens at a time, and the CPU is
    another way of a file up to LARGE. The number of threads is none: it changes no sum."""
    path, some = str(path), {"windows": -(-NOISE_TOKENS // n_ctx)}
    found = {
        "attention not fused": {"flash_attn_type": 0},
        "batches of 64 tokens": {"n_ubatch": 64},
    }
    if gpu:
        found["batches of 8 tokens"] = {"n_ubatch": 8}
        if GGUFFile(path).size_bytes <= LARGE:
            # Without layers on it a GPU would still be lent the large products.
            alone = {"gpu_layers": 0, "op_offload": False, "offload_kqv": False}
            found["on the CPU"] = alone
    return {name: Way(path, settings | some) for name, settings in found.items()}
