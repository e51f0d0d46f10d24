"""What a quantization costs in output quality, measured against its reference in step, with no file
of logits."""

import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

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
from ..files.outputs import labels, once
from .jobs import distributed, measure_all
from .quality import summarize
from .texts import load_text

if TYPE_CHECKING:
    from distributed import Client

COLUMNS = (  # of Comparison.tokens
    "candidate window position id piece logprob_base logprob entropy_base kld dp same_top top5 "
    "top10 top_base top".split()
)


class Comparison(pd.DataFrame):
    """The result of compare_quantizations: a DataFrame with one row per candidate, and `.tokens`.

    tokens: one row per candidate and scored token: candidate, window, position (in the window), id,
    piece, logprob_base, logprob (nats), entropy_base, kld (nats), dp, same_top, top5, top10,
    top_base and top (ids). attempts: for each candidate, how often it was started (more than 1
    where a worker died)."""

    _metadata = ["tokens", "attempts"]


def compare_quantizations(
    reference: str | Path,
    candidates: str | Path | Iterable[str | Path],
    text: str | Path | None = None,
    n_ctx: int = 512,
    client: "Client | None" = None,
    *,
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
    load_text takes it, or None for the public-domain text of this package (compare/text.md). n_ctx:
    tokens per window; the second half of each is scored, and a text that ends within a window loses
    that remainder. max_windows: use only the first so many. gpu_layers: None puts all layers on the
    visible GPUs if the engine can use them: with two, the reference sits on one and the candidate
    on the other, or both are spread over them, or the reference's logits are kept in scratch where
    it has to go before a candidate comes (jobs.placed; the same numbers). client: a
    dask.distributed Client (for one worker per GPU: cluster.local_cluster); then the candidates are
    shared out to its workers, and those of a worker that dies are started again, up to `retries`
    times.

    Definitions are llama-perplexity's (--kl-divergence), in nats and fractions. Returns a
    Comparison, one row per candidate in the order given, indexed by name (of the file as it was
    given, see files.labels): file, size_bytes, bits_per_weight, ppl, ppl_base, ppl_ratio, kld_mean,
    kld_median and other percentiles, mean_dp, rms_dp, same_top, top5, top10, each mean with its
    *_err, and intervals by window (*_low, *_high). A candidate that llama.cpp cannot load, or that
    crashes it, has its reason in the column `error` and NaN elsewhere; the others are kept. Raises
    CompareError for another vocabulary or architecture, a reference that predicts nothing or no
    numbers, or too short a text, ModelNotFoundError for a file that is not there, ModelLoadError if
    the reference or every candidate cannot be loaded."""
    reference, named = _path(reference), _named(candidates)
    for name, value, least in (
        ("max_windows", max_windows, 1),
        ("threads", threads, 1),
        ("gpu_layers", gpu_layers, -1),
    ):
        whole(name, value, least, error=CompareError, none=True)
    whole("retries", retries, 0, error=CompareError)
    if whole("n_ctx", n_ctx, error=CompareError) < 4:
        raise CompareError(
            f"n_ctx={n_ctx}: a window needs at least 4 tokens; llama-perplexity's default is 512."
        )
    _check_window(reference, n_ctx)
    job = {
        "reference": str(reference),
        "text": load_text(text),
        "n_ctx": int(n_ctx),
        "max_windows": max_windows and int(max_windows),
        "gpu_layers": gpu_layers,
        "threads": threads,
    }
    unique = list(map(str, named.values()))
    if client is None:
        found = measure_all(job | {"candidates": unique}, progress)
        attempts = {p: f["attempts"] for p, f in found.items()}
    else:
        found, attempts = distributed(client, job, unique, retries, progress)
    return _result(found, attempts, dict(zip(named, unique)), seed)


def _named(candidates):
    """{name of a row: path}, each file once, by the first of its names."""
    if isinstance(candidates, Mapping):
        paths = {str(name): _path(given) for name, given in candidates.items()}
    else:
        alone = isinstance(candidates, str | Path)
        paths = list(map(_path, [candidates] if alone else candidates))
        paths = dict(zip(labels(paths), paths))
    if not paths:
        raise CompareError("No candidates were given: pass at least one path or name.")
    return once(paths)


def _check_window(path, n_ctx):
    """Warn of a window longer than what the model was trained for; CompareError where it has no
    positions there."""
    from ..files.gguf import GGUFFile

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


def _path(name):
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


def _result(found, attempts, named, seed):
    for f in found.values():
        if not f["error"]:
            f["error"] = _lost(f)
    other = [f"{p}: {f['error']}" for p, f in found.items() if f["kind"] == "other"]
    if other:
        raise CompareError("Not a quantization of the reference's model: " + "; ".join(other))
    if all(f["error"] for f in found.values()):
        crashed = any(f["kind"] == "crash" for f in found.values())
        error = WorkerCrashedError if crashed else ModelLoadError
        whys = "; ".join(f"{p}: {f['error']}" for p, f in found.items())
        raise error(f"No candidate could be measured: {whys}")
    rows, tables = [], []
    for name, path in named.items():
        row = {"name": name, "file": shown(path), **_size(path), "error": found[path]["error"]}
        if found[path]["error"] is None:
            table = pd.DataFrame(found[path]["columns"])
            row |= summarize(table, seed=seed)
            tables.append(table.assign(candidate=row["name"]))
        else:
            warnings.warn(f"{path} was left out: {found[path]['error']}", stacklevel=3)
        rows.append(row)
    result = Comparison(pd.DataFrame(rows).set_index("name"))
    result["error"] = result.pop("error")
    object.__setattr__(result, "tokens", pd.concat(tables, ignore_index=True)[COLUMNS])
    object.__setattr__(result, "attempts", {name: attempts[p] for name, p in named.items()})
    return result


def _size(path):
    """Size and real bits per weight; the latter unknown for a file that cannot be read: its row
    says so in `error`."""
    from ..files.gguf import GGUFFile

    try:
        file = GGUFFile(path)
        return {"size_bytes": file.size_bytes, "bits_per_weight": file.bits_per_weight}
    except LlamaTelemetryError:
        return {
            "size_bytes": os.path.getsize(path) if os.path.isfile(path) else None,
            "bits_per_weight": float("nan"),
        }
