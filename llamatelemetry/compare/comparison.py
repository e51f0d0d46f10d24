"""What a quantization costs in output quality, measured against its reference on a text."""

import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from ..arguments import whole
from ..errors import (
    CompareError,
    LlamaTelemetryError,
    ModelLoadError,
    WorkerCrashedError,
    shown,
)
from ..files.gguf import GGUFFile
from ..files.outputs import labels, once
from ..gpus import devices
from . import ways
from .chats import Conversation, Special, chat_text
from .jobs import distributed, measure_all
from .quality import NOISE, summarize
from .texts import load_text
from .ways import PLAIN, Way, pairs, with_cache

if TYPE_CHECKING:
    from distributed import Client

COLUMNS = (  # of Comparison.tokens
    "candidate window position id piece logprob_base logprob entropy_base confidence_base kld dp "
    "same_top top5 top10 top_base top".split()
)


class Comparison(pd.DataFrame):
    """The result of compare_quantizations: a DataFrame with one row per candidate, `.tokens` and
    `.noise`.

    tokens: one row per candidate and scored token: candidate, window, position (in the window), id,
    piece, logprob_base, logprob (nats), entropy_base, confidence_base (the reference's probability
    of what it holds for likeliest), kld (nats), dp, same_top, top5, top10, top_base and top (ids).
    attempts: for each candidate, how often it was started (more than 1 where a worker died). noise:
    of the reference against itself, one row per way (see noise_floor); None where it was not asked
    for."""

    _metadata = ["tokens", "attempts", "noise"]

    @property
    def floor(self) -> float:
        """The largest mean divergence of the reference from itself, nats; NOISE at least, which is
        what 32-bit sums are off by."""
        measured = [] if self.noise is None else self.noise["kld_mean"].dropna()
        return float(max([NOISE, *measured]))


def compare_quantizations(
    reference: str | Path,
    candidates: str | Path | Iterable[str | Path] | Mapping[str, str | Path],
    text: str | Path | list[Conversation] | tuple[Conversation, ...] | None = None,
    n_ctx: int = 512,
    client: "Client | None" = None,
    *,
    cache_types: Iterable[tuple[str, str] | str] | None = None,
    noise: bool = False,
    memory_ctx: int | None = None,
    max_windows: int | None = None,
    gpu_layers: int | None = None,
    threads: int | None = None,
    seed: int = 0,
    retries: int = 2,
    progress: bool = True,
) -> Comparison:
    """Perplexity, KL divergence and top-token agreement of quantized files against a reference, on
    a text.

    reference, candidates: paths or registry names; of candidates also {name: path}, which names the
    rows. A file that comes twice, by whatever path, is one row. text: the text or a path to one, as
    load_text takes it, or None for the public-domain text of this package (compare/text.md);
    conversations, which the reference's own template renders, and what chats.written_by returns are
    read with their special tokens (chats.Special), any other text has none. n_ctx:
    tokens per window; the second half of each is scored, and a text that ends within a window loses
    that remainder. Memory does not grow with it but for the caches: at most 512 tokens are decoded
    and scored at a time. The reference's logits lie in scratch until the process ends, for the next
    comparison on this text (kept.place: at most 512 MiB, and 1 GiB of all).
    cache_types: pairs of types for keys and values, of ways.TYPES, such as ("q8_0", "q4_0") or
    "q8_0/q4_0": every file is a row with each of them, named "Q4_K_M, q8_0/q4_0 cache", as
    llama-perplexity -ctk -ctv has it; None: f16 for both, as the reference has. The
    reference among the candidates shows what a smaller cache alone costs. noise: measure the
    reference against itself, too (noise_floor). memory_ctx: tokens for which memory is reckoned
    (default: n_ctx). max_windows: use only the first so many. gpu_layers: None puts all layers on
    the visible GPUs if the engine can use them: with two, the reference sits on one and the
    candidate on the other, or both are spread over them, or the reference's logits are kept in
    scratch where it has to go before a candidate comes (jobs.placed; the same numbers). client: a
    dask.distributed Client (for one worker per GPU: cluster.local_cluster); then the candidates are
    shared out to its workers, and those of a worker that dies are started again, up to `retries`
    times.

    Definitions are llama-perplexity's (--kl-divergence), in nats and fractions. Returns a
    Comparison, one row per candidate and cache in the order given, indexed by name (of the file as
    it was given, see files.labels): file, weights (the file's name), cache_k, cache_v, size_bytes,
    bits_per_weight, token_bytes (by which the cache grows per token), cache_bytes and memory_bytes
    (the cache for memory_ctx tokens, and with it the file), ppl, ppl_base, ppl_ratio, kld_mean,
    kld_median and other percentiles, mean_dp, rms_dp, same_top, top5, top10, each mean with its
    *_err, and intervals by window (*_low, *_high). A candidate that llama.cpp cannot load, a pair
    that it has no cache or no kernel for, or what crashes it, has its reason in the column `error`
    and NaN elsewhere; the others are kept. Raises CompareError for another vocabulary or
    architecture, a reference that predicts nothing or no numbers, or too short a text,
    ModelNotFoundError for a file that is not there, ModelLoadError if the reference or every
    candidate cannot be loaded."""
    reference, named, kinds = resolved(reference), named_files(candidates), pairs(cache_types)
    for name, value, least in (
        ("max_windows", max_windows, 1),
        ("threads", threads, 1),
        ("gpu_layers", gpu_layers, -1),
        ("memory_ctx", memory_ctx, 1),
    ):
        whole(name, value, least, error=CompareError, none=True)
    whole("retries", retries, 0, error=CompareError)
    if whole("n_ctx", n_ctx, error=CompareError) < 4:
        raise CompareError(
            f"n_ctx={n_ctx}: a window needs at least 4 tokens; llama-perplexity's default is 512."
        )
    _check_window(reference, n_ctx)
    if isinstance(text, (list, tuple)):
        text = chat_text(reference, text, gpu_layers)
    text = load_text(text)
    rows = [
        Row(ways.named(name, pair), name, with_cache(str(path), pair), pair)
        for name, path in named.items()
        for pair in kinds
    ]
    none = {row.key: why for row in rows if (why := ways.no_cache(row.way.path, row.pair))}
    if len(none) == len(rows):
        raise ModelLoadError(
            f"No candidate has such a cache: {'; '.join(dict.fromkeys(none.values()))}."
        )
    other = _noise(reference, gpu_layers, n_ctx) if noise else []
    job = {
        "reference": str(reference),
        "text": text,
        "special": isinstance(text, Special),
        "n_ctx": int(n_ctx),
        "max_windows": max_windows and int(max_windows),
        "gpu_layers": gpu_layers,
        "threads": threads,
        "ways": {row.key: row.way for row in (*rows, *other) if row.key != row.way.path},
    }
    job["beside"] = ways.beside_bytes(n_ctx, [row.way for row in (*rows, *other)])
    unique = [row.key for row in (*rows, *other) if row.key not in none]
    if client is None:
        found = measure_all(job | {"candidates": unique}, progress)
        attempts = {key: f["attempts"] for key, f in found.items()}
    else:
        found, attempts = distributed(client, job, unique, retries, progress)
    found |= {key: {"error": why, "kind": "load"} for key, why in none.items()}
    result = _result(found, attempts, rows, seed, memory_ctx or n_ctx)
    if noise:
        object.__setattr__(result, "noise", _table(found, other, seed)[0])
    return result


def noise_floor(
    reference: str | Path,
    text: str | Path | None = None,
    n_ctx: int = 512,
    *,
    max_windows: int | None = None,
    gpu_layers: int | None = None,
    threads: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """How far a file is from itself, computed another way: what no comparison with it can tell from
    nothing.

    Arguments as for compare_quantizations. The ways (ways.noise_ways): attention not fused, the
    window read in batches of 64 tokens, and where GPUs compute, in batches of 8 and on the CPU (a
    file not over 2 GiB); each on the first windows that hold 256 tokens. DataFrame by way: the
    numbers of a Comparison, and `error` for a way that this model does not have. Raises as
    compare_quantizations does."""
    found = compare_quantizations(
        reference,
        reference,
        text,
        n_ctx,
        noise=True,
        max_windows=max_windows,
        gpu_layers=gpu_layers,
        threads=threads,
        seed=seed,
        progress=progress,
    )
    return found.noise


class Row(NamedTuple):
    """A row that is asked for. name: of the row; weights: of its file; way, pair: how it is
    computed; key: of its result, the path or what tells it from others of that file."""

    name: str
    weights: str
    way: Way
    pair: tuple[str, str] = PLAIN

    @property
    def key(self) -> str:
        own = self.name.removeprefix(self.weights).strip(", ")
        return f"{self.way.path} ({own})" if self.way.settings else self.way.path


def _noise(reference, gpu_layers, n_ctx):
    """The rows of the reference against itself."""
    gpu = gpu_layers != 0 and bool(devices.visible_gpus())
    found = ways.noise_ways(reference, gpu, n_ctx)
    return [Row(name, "", way) for name, way in found.items()]


def named_files(candidates):
    """{name of a row: path}, each file once, by the first of its names."""
    if isinstance(candidates, Mapping):
        paths = {str(name): resolved(given) for name, given in candidates.items()}
    else:
        alone = isinstance(candidates, str | Path)
        paths = list(map(resolved, [candidates] if alone else candidates))
        paths = dict(zip(labels(paths), paths))
    if not paths:
        raise CompareError("No candidates were given: pass at least one path or name.")
    return once(paths)


def _check_window(path, n_ctx):
    """Warn of a window longer than what the model was trained for; CompareError where it has no
    positions there."""
    try:
        model = GGUFFile(path)
    except LlamaTelemetryError:
        return  # llama.cpp says what is wrong with it
    if not model.n_ctx_train or n_ctx <= model.n_ctx_train:
        return
    says = f"n_ctx={n_ctx:,}: {model.name} was trained for {model.n_ctx_train:,} tokens"
    if model.has_tensor("position_embd.weight"):
        raise CompareError(
            f"{says}, and its positions are a table of that length. Pass a smaller n_ctx."
        )
    warnings.warn(f"{says}. What comes after those it has never learned.", stacklevel=3)


def resolved(name):
    """The file's path as it was given, links and all: what they lead to has another name and no
    parts beside it."""
    from ..files.models import resolve_model

    if name is None:
        raise CompareError("None is no file to compare: give a path or a name.")
    return Path(resolve_model(name))


def _lost(result):
    """The reason to leave out a candidate whose logits are numbers, but whose perplexity is none;
    else None."""
    with np.errstate(over="ignore"):
        loss = -float(np.mean(result["columns"]["logprob"]))
        if np.isfinite(np.exp(loss)):
            return None
    return f"its loss of {loss:.3g} nats per token is beyond any perplexity"


def _result(found, attempts, rows, seed, n_ctx):
    asked = {row.key: found[row.key] for row in rows}
    for one in found.values():
        one["error"] = one["error"] or _lost(one)
    other = [f"{key}: {f['error']}" for key, f in asked.items() if f["kind"] == "other"]
    if other:
        raise CompareError("Not a quantization of the reference's model: " + "; ".join(other))
    if all(f["error"] for f in asked.values()):
        crashed = any(f["kind"] == "crash" for f in asked.values())
        error = WorkerCrashedError if crashed else ModelLoadError
        whys = "; ".join(f"{key}: {f['error']}" for key, f in asked.items())
        raise error(f"No candidate could be measured: {whys}")
    table, tokens = _table(found, rows, seed)
    facts = [_facts(row, n_ctx) for row in rows]
    result = Comparison(pd.DataFrame(facts, index=table.index).join(table))
    object.__setattr__(result, "tokens", tokens)
    object.__setattr__(result, "attempts", {row.name: attempts.get(row.key, 0) for row in rows})
    object.__setattr__(result, "noise", None)
    return result


def _table(found, rows, seed):
    """(DataFrame by row of what was measured, `error` last; the rows' tokens)."""
    made, tables = [], []
    for row in rows:
        one = found[row.key]
        if (why := one["error"]) is None:
            table = pd.DataFrame(one["columns"])
            made.append({"name": row.name, **summarize(table, seed=seed)})
            tables.append(table.assign(candidate=row.name))
        else:
            made.append({"name": row.name})
            warnings.warn(f"{row.key} was left out: {why}", stacklevel=4)
    table = pd.DataFrame(made).set_index("name")
    table["error"] = [found[row.key]["error"] for row in rows]
    return table, pd.concat(tables, ignore_index=True)[COLUMNS] if tables else None


def _facts(row, n_ctx):
    """What a row has before anything is measured: bits and bytes unknown for a file that cannot be
    read, whose row says so in `error`."""
    path = row.way.path
    told = {"file": shown(path), "weights": row.weights, "cache_k": row.pair[0]}
    told["cache_v"] = row.pair[1]
    try:
        file = GGUFFile(path)
        cache = ways.cache_bytes(file, n_ctx, row.pair)
        sizes = [file.size_bytes, file.bits_per_weight, ways.token_bytes(file, row.pair), cache]
        sizes.append(file.size_bytes + cache)
    except LlamaTelemetryError:
        sizes = [os.path.getsize(path) if os.path.isfile(path) else None, *[float("nan")] * 4]
    names = "size_bytes", "bits_per_weight", "token_bytes", "cache_bytes", "memory_bytes"
    return told | dict(zip(names, sizes))
