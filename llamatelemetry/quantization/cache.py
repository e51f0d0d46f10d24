"""What a smaller cache costs beside smaller weights, at the memory that both need for a context.
All but with_smaller are pure functions on the rows of a Comparison with cache_types."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from ..compare.comparison import compare_quantizations
from ..compare.ways import PLAIN as FULL
from ..compare.ways import Pair, cache_bytes, pairs
from ..errors import ModelLoadError, WorkerCrashedError
from ..files.gguf import GGUFFile

LONGEST = 32_768  # tokens of context that memory is reckoned for, unless the reader says


def context(file: GGUFFile, asked: int | None, at_least: int) -> int:
    """Tokens that memory is reckoned for: as asked, else as trained, up to LONGEST."""
    return asked or max(at_least, min(file.n_ctx_train or at_least, LONGEST))


def some_files(table: pd.DataFrame, focus: str) -> list[str]:
    """Names of three files to try smaller caches on: the largest, the focus and the smallest."""
    sizes = table["size_bytes"].sort_values(ascending=False)
    return list(dict.fromkeys([sizes.index[0], focus, sizes.index[-1]]))


def with_smaller(
    table: pd.DataFrame,
    reference: str | Path,
    candidates: Mapping[str, str | Path],
    cache_types: Iterable[Pair | str],
    text: str,
    n_ctx: int,
    *,
    max_windows: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """A Comparison's rows with a full cache, and the candidates' with smaller ones, measured now on
    the same windows; a full one among cache_types is there already. attrs["why"]: why there are
    none, where llama.cpp has none of these caches for this model; else ""."""
    wanted, rows, why = [pair for pair in pairs(cache_types) if pair != FULL], [table], ""
    try:
        if wanted:
            found = compare_quantizations(
                reference,
                candidates,
                text,
                n_ctx,
                cache_types=wanted,
                max_windows=max_windows,
                seed=seed,
            )
            rows.append(found)
    except (ModelLoadError, WorkerCrashedError) as error:
        why = str(error)
    joined = pd.concat(map(pd.DataFrame, rows))
    joined.attrs["why"] = why
    return joined


def at_context(table: pd.DataFrame, files: Mapping[str, GGUFFile], n_tokens: int) -> pd.DataFrame:
    """The rows with cache_bytes and memory_bytes (weights and cache) for another context. table: a
    Comparison; files: {weights: GGUFFile}."""
    rows = zip(table["weights"], table["cache_k"], table["cache_v"])
    sizes = [cache_bytes(files[name], n_tokens, (k, v)) for name, k, v in rows]
    return table.assign(cache_bytes=sizes, memory_bytes=table["size_bytes"] + sizes)


def is_full(table: pd.DataFrame) -> pd.Series:
    """Whether a row's cache is llama.cpp's own, f16 for keys and values."""
    return (table["cache_k"] == FULL[0]) & (table["cache_v"] == FULL[1])


def smaller(table: pd.DataFrame) -> pd.Series:
    """Whether a row's cache is smaller than that."""
    full = table[is_full(table)].set_index("weights")["token_bytes"]
    return table["token_bytes"] < table["weights"].map(full).astype(float)


def crossover(table: pd.DataFrame, floor: float = 0.0, loss: str = "kld_mean") -> pd.DataFrame:
    """At each total memory, which way to save it loses less: smaller weights with a full cache, or
    a smaller cache.

    table: a Comparison with memory_bytes for one context (memory_ctx, or at_context). DataFrame by
    memory_bytes, a step for every row that comes within reach: smaller_weights and smaller_cache
    (names of the best rows that fit; None for none), weights_loss, cache_loss (NaN), and better:
    "smaller cache", "smaller weights", or "equal" where they are no more than `floor`, or their
    standard errors where the table has them, apart."""
    known = table.dropna(subset=[loss, "memory_bytes"])
    ways = {"weights": known[is_full(known)], "cache": known[smaller(known)]}
    steps: list[dict] = []
    has_errors = f"{loss}_err" in known
    for budget in sorted(known["memory_bytes"].unique()):
        best = {}
        for way, rows in ways.items():
            fits = rows[rows["memory_bytes"] <= budget][loss]
            best[way] = (fits.idxmin(), fits.min()) if len(fits) else (None, np.nan)
        (weights, of_weights), (cache, of_cache) = best["weights"], best["cache"]
        names = {"smaller_weights": weights, "smaller_cache": cache}
        losses = {"weights_loss": of_weights, "cache_loss": of_cache}
        errors = [known[f"{loss}_err"][name] for name in names.values() if name and has_errors]
        verdict = _better(of_weights, of_cache, max([floor, float(np.hypot.reduce([0, *errors]))]))
        if weights is None and cache is None:
            continue  # what fits is neither
        if not steps or any(steps[-1][way] != name for way, name in names.items()):
            steps.append({"memory_bytes": budget, **names, **losses, "better": verdict})
    columns = "memory_bytes smaller_weights smaller_cache weights_loss cache_loss better".split()
    return pd.DataFrame(steps, columns=columns).set_index("memory_bytes")


def _better(weights, cache, floor):
    if np.isnan(weights) or np.isnan(cache):
        return "smaller weights" if np.isnan(cache) else "smaller cache"
    if abs(weights - cache) <= floor:
        return "equal"
    return "smaller cache" if cache < weights else "smaller weights"


def turning(table: pd.DataFrame, floor: float = 0.0, loss: str = "kld_mean") -> pd.DataFrame:
    """From which context on larger weights with a smaller cache beat smaller weights with a full
    one in both, memory and loss.

    DataFrame: keep (the row with the larger weights), instead_of, tokens (of context from which
    keep takes no more memory), gain (nats, more than `floor`), by tokens. Caches are taken to grow
    evenly: exact where no layer has a sliding window, else late by its cells."""
    known = table.dropna(subset=[loss, "token_bytes"])
    full, small = known[is_full(known)], known[smaller(known)]
    rows = []
    for a in small.itertuples():
        for b in full.itertuples():
            gain = getattr(b, loss) - getattr(a, loss)
            if a.size_bytes > b.size_bytes and gain > floor and a.token_bytes < b.token_bytes:
                tokens = (a.size_bytes - b.size_bytes) / (b.token_bytes - a.token_bytes)
                rows.append((a.Index, b.Index, int(np.ceil(tokens)), gain))
    found = pd.DataFrame(rows, columns=["keep", "instead_of", "tokens", "gain"])
    return found.sort_values("tokens", kind="stable").reset_index(drop=True)
