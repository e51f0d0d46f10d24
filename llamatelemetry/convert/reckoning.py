"""How long it takes to make files on this machine, reckoned before it is begun, and the ladder of
quantizations that can be made within minutes."""

import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from gguf import GGMLQuantizationType

from ..files.gguf import GGUFFile
from ..files.places import free_bytes, temp_dir
from ..files.registry import TYPES
from ..files.scratch import ANNOUNCED
from ..files.types import engine_library, tensor_type
from ..gpus.cores import physical_cores
from ..gpus.fit import as_type
from .chunks import chunk
from .expand import quantized_types, reference_type
from .quantize import dry_run, dry_size, targets, wants_imatrix

# Weights that a core turns into each type per second, by ggml_quantize_chunk on an AMD EPYC of
# 2025; where a type is missing, the slowest is taken. speed() says how this machine compares.
PER_CORE = {
    "Q8_0": 248e6,
    "Q4_0": 767e6,
    "Q4_1": 849e6,
    "Q5_0": 415e6,
    "Q5_1": 499e6,
    "Q2_K": 17.7e6,
    "Q3_K": 86e6,
    "Q4_K": 15.4e6,
    "Q5_K": 18e6,
    "Q6_K": 35e6,
    "IQ4_NL": 5.7e6,
    "IQ4_XS": 5.5e6,
    "IQ3_S": 2.9e6,
    "IQ3_XXS": 2e6,
    "F16": 1e9,
    "F32": 1e9,
}
NOISE_PER_CORE = 128e6  # weights of a stand-in: dequantized, noise added, rounded to F16
PASS = 1.15  # what all threads of a pass take, against a kernel alone: buffers, shared caches
FLOW = 1.5e9  # bytes per second that one process reads and writes, in the page cache
LADDER = ("Q8_0", "Q5_K_M", "Q4_K_M", "IQ3_XS")  # where its making is a matter of minutes
# Where it is not: types of the same bits that are quantized 5 to 30 times as fast (llama.cpp's own
# second choice for Q5_K, Q3_K), the most telling first.
SWIFT = ("Q8_0", "Q3_K_S", "Q5_1", "Q4_0")
RUNGS = 4
SLOWEST = min(PER_CORE.values())


class Ladder(NamedTuple):
    """wanted: types to make and files to take, as quantizations() has them, largest first.
    seconds: {what is made: reckoned}, "stand-in" among them where one is. left: {type of LADDER
    that is not made: reckoned seconds}. own: MODEL's own file among `wanted`, or None."""

    wanted: list[str]
    seconds: dict[str, float]
    left: dict[str, float]
    own: str | None = None


def ladder(
    file: GGUFFile,
    given: Iterable[str | Path] | None = None,
    stand_in: bool = True,
    seconds: float = 180,
) -> Ladder:
    """What to compare of a model, and how long its making takes here.

    given: the reader's choice, which is taken. None: LADDER (Q3_K_M for IQ3_XS where that needs an
    importance matrix), if it is reckoned to be made within `seconds` and scratch has room for it.
    Else as many: of SWIFT what can be made in two thirds of that time, and `file` itself where it
    is quantized, which costs nothing. stand_in: whether one is made where `file` is
    quantized; then all come out of one pass over it (together.reference_for)."""
    before, apart = {}, True
    if stand_in and quantized_types(file):
        before, apart = {"stand-in": stand_in_seconds(file)}, False
    if given is not None:
        wanted = [str(each) for each in given]
        types = {kind: dry_run(file.path, kind) for kind in wanted if kind.upper() in TYPES}
        return Ladder(wanted, before | _costs(file, types, apart), {})
    words = {kind: dry_run(file.path, kind) for kind in LADDER}
    if wants_imatrix(words[LADDER[-1]]):
        del words[LADDER[-1]]
        words["Q3_K_M"] = dry_run(file.path, "Q3_K_M")
    cost = _costs(file, words, apart)
    if sum(cost.values()) <= seconds and _fit(
        file, map(dry_size, words.values()), dry_size(words["Q4_K_M"])
    ):
        return Ladder(list(cost), before | cost, {})
    own = str(file.path) if quantized_types(file) else None
    words = {kind: dry_run(file.path, kind) for kind in SWIFT if kind != file.file_type}
    swift = {kind: making_seconds(file, kind, words[kind], apart) for kind in words}
    size = {kind: dry_size(words[kind]) for kind in words}
    chosen = _within(swift, seconds * 2 / 3, RUNGS - bool(own))
    while len(chosen) > 2 and not _fit(file, [size[kind] for kind in chosen], file.size_bytes):
        chosen.pop()
    sizes = {kind: size[kind] for kind in chosen} | ({own: file.size_bytes} if own else {})
    wanted = sorted(sizes, key=sizes.__getitem__, reverse=True)
    left = {kind: cost[kind] for kind in cost if kind not in chosen and kind != file.file_type}
    return Ladder(wanted, before | {kind: swift[kind] for kind in chosen}, left, own)


def _costs(file, words, apart):
    """{type: making_seconds} of dry runs; what files of one pass have alike is made once."""
    made = None if apart else set()
    return {kind: making_seconds(file, kind, words[kind], apart, made) for kind in words}


def _within(cost, seconds, count):
    """So many, first those whose costs sum up to `seconds`, taken in their order, then the cheapest
    of the others."""
    chosen, used = [], 0.0
    for kind in cost:
        if used + cost[kind] <= seconds:
            chosen, used = [*chosen, kind], used + cost[kind]
    rest = sorted(cost.keys() - set(chosen), key=cost.__getitem__)
    return [*chosen, *rest][:count]


def _fit(file, sizes, mixture):
    """Whether scratch has room for files of these sizes, the stand-in, and two mixtures."""
    stand_in = as_type(file, reference_type(file)).size_bytes
    every = [stand_in, *sizes, mixture, mixture]
    return sum(size for size in every if size > ANNOUNCED) <= free_bytes(temp_dir())


def making_seconds(
    file: GGUFFile,
    kind: str,
    words: str | None = None,
    apart: bool = True,
    made: set[tuple[str, str]] | None = None,
) -> float:
    """Reckoned seconds of making a type ("Q4_K_M"), by every tensor's own type as a dry run of
    llama-quantize says (`words`). apart: from an F16 file of the model, which has to be read. made:
    tensors that the same pass has made of a type, which cost nothing more; those of this one are
    added."""
    words = words or dry_run(file.path, kind)
    matrices = file.tensors[file.tensors["shape"].map(len) > 1]["n_elements"]
    work, kinds = 0.0, targets(words)
    made = set() if made is None else made
    for name, weights in matrices.items():
        own = kinds.get(name, "")
        if (name, own) not in made:
            work += float(weights) / PER_CORE.get(own, SLOWEST)
            made.add((name, own))
    moved = dry_size(words) + (2 * float(matrices.sum()) if apart else 0)
    return PASS * work / (physical_cores() * speed()) + moved / FLOW


def stand_in_seconds(file: GGUFFile) -> float:
    """Reckoned seconds of make_reference."""
    weights, size = file.tensors["n_elements"].sum(), as_type(file, reference_type(file)).size_bytes
    work = float(weights) / NOISE_PER_CORE
    return PASS * work / (physical_cores() * speed()) + size / FLOW


@cache
def speed() -> float:
    """How fast a core of this machine quantizes, all of them at work, as a share of PER_CORE:
    half a million weights per core are quantized for it, in the threads' own time, which other
    processes do not change. 1 without an engine."""
    if engine_library() is None:
        return 1.0
    kind = tensor_type(GGMLQuantizationType.Q4_K.value)
    values = np.random.default_rng(0).standard_normal((64, 4096), np.float32)

    def rate(_):
        started = time.thread_time()
        chunk(values, kind)
        return values.size / (time.thread_time() - started)

    with ThreadPoolExecutor(physical_cores()) as pool:
        rates = list(pool.map(rate, range(2 * physical_cores())))
    return float(np.median(rates)) / PER_CORE["Q4_K"]
