"""A measured profile of every attention head: scores over texts, bootstrap intervals, shuffled
baselines, labels."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from ..maths import middle, rank_correlation
from .behaviours import LABELS, Text, collect
from .semantic import sample_rows, semantic_scores
from .similarity import divergence_sums


def measure(
    engine: Any,
    texts: Sequence[Text],
    *,
    distances: bool = True,
    backend: Any = None,
    seed: int = 0,
) -> tuple[xr.Dataset, np.ndarray, np.ndarray]:
    """Every head on every text: behaviours.collect's Dataset of scores, and for the natural texts
    the sums (text, head, head) of divergences between heads and how many query rows (text,) each is
    over.

    engine: an InferenceEngine, or a capture session. distances: False leaves the sums empty.
    backend: computes the divergences on its device. Memory is bounded by the attention of 24 rows
    of one text."""
    from tqdm.auto import tqdm

    statistics = [
        engine.head_statistics(text.ids, patterns=text.patterns)
        for text in tqdm(texts, desc="texts")
    ]
    natural = [text for text in texts if text.natural]
    semantic, sums, n_rows = {}, [], []
    for text in tqdm(natural, desc="rows"):
        rows = sample_rows(len(text.ids), seed=seed)
        attention = engine.capture(text.ids, stages=("attention",), queries=rows).attention
        vectors = engine.model.rows("token_embd.weight", text.ids)
        semantic[text.name] = semantic_scores(attention, rows, text.ids, vectors, seed=seed)
        n_rows.append(len(rows))
        if distances:
            sums.append(divergence_sums(attention, rows, backend))
    return collect(texts, statistics, semantic), np.array(sums), np.array(n_rows)


def profile(scores: xr.Dataset, n_boot: int = 500, seed: int = 0) -> xr.Dataset:
    """Value, interval and baseline of every measure: Dataset (measure, layer, head).

    value: mean over the texts that have the measure; low, high: 95% percentile bootstrap over those
    texts, NaN for one text, which resampling gives back as it is; baseline, baseline_high: mean and
    largest of the shuffled versions' means over texts (NaN without a baseline); n_texts."""
    rng, parts = np.random.default_rng(seed), []
    for name, array in ((str(name), array) for name, array in scores.data_vars.items()):
        if "text" not in array.dims or name.endswith("~"):
            continue
        have = np.flatnonzero(np.isfinite(array.values).any(axis=(1, 2)))
        if not len(have):
            continue  # no text had it: a measure that was not made
        values = array.values[have]  # (text, layer, head)
        low, high = _interval(values, n_boot, rng)
        baseline = baseline_high = np.full(values.shape[1:], np.nan)
        if f"{name}~" in scores:
            shuffled = scores[f"{name}~"].values[have].mean(0)  # (shuffle, layer, head)
            baseline, baseline_high = shuffled.mean(0), shuffled.max(0)
        row = dict(value=values.mean(0), low=low, high=high)
        row |= dict(baseline=baseline, baseline_high=baseline_high)
        part = xr.Dataset({key: (("layer", "head"), value) for key, value in row.items()})
        parts.append(part.assign(n_texts=len(have)).expand_dims(measure=[name]))
    out = xr.concat(parts, "measure", join="exact")
    return out.assign_coords(layer=scores["layer"].values, head=scores["head"].values)


def _interval(values, n_boot, rng):
    """The 95% interval of the mean over texts, resampled. (text, ...) -> two (...)"""
    n = len(values)
    draws = rng.integers(0, n, (n_boot, n))
    weights = np.stack([np.bincount(draw, minlength=n) for draw in draws]) / n  # (boot, text)
    low, high = middle(np.tensordot(weights, values, 1))
    return (low, high) if n > 1 else (low * np.nan, high * np.nan)


def labels(profiled: xr.Dataset, margin: float = 0.1) -> xr.DataArray:
    """Which labels a head earns: bool DataArray (label, layer, head).

    A score clears its baseline when the low end of its interval lies above the largest shuffled
    score, and the score exceeds the mean of the shuffled ones by `margin` (a share of attention; a
    correlation for "semantic")."""
    part = profiled.sel(measure=labelled(profiled))
    cleared = (part["low"] > part["baseline_high"]) & (part["value"] - part["baseline"] >= margin)
    return cleared.rename(measure="label").rename("label").transpose("label", "layer", "head")


def labelled(profiled: xr.Dataset) -> list[str]:
    """The measures of a profile that a label can be earned by, in LABELS' order; without those that
    no head has a score of."""
    there = profiled["measure"].values[profiled["value"].notnull().any(("layer", "head")).values]
    return [name for name in LABELS if name in there]


def head_table(profiled: xr.Dataset, earned: xr.DataArray) -> pd.DataFrame:
    """One row per head that the model has: layer, head, every measure, and `labels` as text ("none"
    where nothing cleared)."""
    frame = profiled["value"].to_series().unstack("measure")[list(profiled["measure"].values)]
    frame = frame[frame.notna().any(axis=1)]
    names = earned["label"].values
    grid = pd.MultiIndex.from_product([earned["layer"].values, earned["head"].values])
    picked = earned.transpose("label", "layer", "head").values.reshape(len(names), len(grid)).T
    picked = picked[grid.get_indexer(frame.index)]  # (head, label)
    frame["labels"] = [", ".join(names[row]) or "none" for row in picked]
    return frame.reset_index().rename_axis(columns=None)


def places(table: pd.DataFrame) -> list[tuple[int, int]]:
    """(layer, head) of each row of a table."""
    return list(zip(table["layer"].astype(int).tolist(), table["head"].astype(int).tolist()))


def highest(value: xr.DataArray) -> tuple[int, int]:
    """(layer, head) of the largest of values (layer, head), NaN left out."""
    layer, head = np.unravel_index(np.nanargmax(value.values), value.shape)
    return int(value["layer"][layer]), int(value["head"][head])


def label_counts(earned: xr.DataArray, profiled: xr.Dataset) -> pd.DataFrame:
    """Per label: how many heads earn it and their share, the head with the best score, that score
    with its interval and the largest shuffled one, and the number of texts."""
    rows = {}
    for name in earned["label"].values:
        one = profiled.sel(measure=name)
        layer, head = highest(one["value"])
        best = one.sel(layer=layer, head=head)
        mask = earned.sel(label=name)
        row = {"heads": int(mask.sum()), "share": float(mask.mean()), "best": f"L{layer}H{head}"}
        keys = {"score": "value", "low": "low", "high": "high", "baseline": "baseline_high"}
        row |= {column: float(best[key]) for column, key in keys.items()}
        rows[name] = row | {"texts": int(best["n_texts"])}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("label")


def label_heads(profiled: xr.Dataset, earned: xr.DataArray) -> dict[tuple[int, int], str]:
    """Of every label that some head earns, the head with the highest score among those that do:
    {(layer, head): its labels as text}."""
    found: dict[tuple[int, int], list[str]] = {}
    for name in earned["label"].values:
        mask = earned.sel(label=name)
        if mask.any():
            best = highest(profiled["value"].sel(measure=name).where(mask))
            found.setdefault(best, []).append(str(name))
    return {place: ", ".join(names) for place, names in found.items()}


def by_depth(profiled: xr.Dataset) -> pd.DataFrame:
    """How each measure changes over the layers: mean in the first, middle and last third of the
    layers, the layer with the highest mean, and Spearman's correlation of a head's score with its
    layer."""
    rows = {}
    for name in profiled["measure"].values:
        value = profiled["value"].sel(measure=name)
        if name == "mass" or value.isnull().all():
            continue
        mean = value.mean("head")
        depth = np.repeat(value["layer"].values, value.sizes["head"])
        thirds = [pd.Series(part).mean() for part in np.array_split(mean.values, 3)]
        rows[str(name)] = dict(zip(("first third", "middle third", "last third"), thirds)) | {
            "peak layer": int(mean["layer"][int(np.nanargmax(mean.values))]),
            "spearman with layer": rank_correlation(depth, value.values.reshape(-1)),
        }
    columns = ["first third", "middle third", "last third", "peak layer", "spearman with layer"]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns, dtype=float)
    return table.rename_axis("measure")


def typical_texts(
    scores: xr.Dataset, layer: int, head: int, measures: Sequence[str]
) -> pd.DataFrame:
    """For one head and each measure, the text where the score is highest: DataFrame (measure) of
    text, score, mean over texts."""
    rows = {}
    for name in measures:
        values = scores[name].sel(layer=layer, head=head).dropna("text")
        if values.size:
            best = values.isel(text=int(values.argmax("text")))
            rows[name] = str(best["text"].values), float(best), float(values.mean())
    columns = ["text", "score", "mean over texts"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("measure")


def compare(
    one: xr.Dataset, other: xr.Dataset, earned: xr.DataArray, other_earned: xr.DataArray
) -> pd.DataFrame:
    """The profile of the same heads in two precisions of a model: DataFrame (measure) of spearman,
    mean_change, largest_change, head, inside, labels, kept, lost, gained.

    one, other: profiles over the same texts; earned, other_earned: their labels. spearman: of the
    heads' scores; mean_change: mean absolute difference; head: the one that moved most; inside:
    share of heads whose other score lies in the first one's interval; labels: heads that have it in
    the first profile."""
    rows = {}
    for name in one["measure"].values:
        if name == "mass" or name not in other["measure"].values:
            continue
        first, second = one.sel(measure=name), other["value"].sel(measure=name)
        change = abs(first["value"] - second)
        if change.isnull().all():
            continue
        layer, head = highest(change)
        within = (second >= first["low"]) & (second <= first["high"])
        row = {
            "spearman": rank_correlation(first["value"].values.ravel(), second.values.ravel()),
            "mean_change": float(change.mean()),
            "largest_change": float(change.max()),
            "head": f"L{layer}H{head}",
            "inside": float(within.where(change.notnull() & first["low"].notnull()).mean()),
        }
        if name in earned["label"] and name in other_earned["label"]:
            had, has = earned.sel(label=name), other_earned.sel(label=name)
            found = {"labels": had, "kept": had & has, "lost": had & ~has, "gained": ~had & has}
            row |= {column: int(mask.sum()) for column, mask in found.items()}
        rows[str(name)] = row
    columns = ["spearman", "mean_change", "largest_change", "head", "inside"]
    columns += ["labels", "kept", "lost", "gained"]
    table = pd.DataFrame.from_dict(rows, orient="index").reindex(columns=columns)
    return table.rename_axis("measure")
