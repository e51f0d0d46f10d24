"""A measured profile of every attention head: scores over texts, bootstrap intervals, shuffled
baselines, labels."""

import numpy as np
import pandas as pd
import xarray as xr

from ..maths import rank_correlation
from .texts import OFFSETS

# What a label says. All but the last are shares of a head's attention, mean over query rows that
# have such a key.
LABELS = {
    "sink": "on the first token (Xiao et al. 2023), natural texts",
    "local": "on the token itself and the three before it, natural texts",
    "global": "on tokens 16 or more back, the first left out, natural texts",
    "delimiter": "on punctuation and line breaks, natural texts",
    "positional": "at its favourite one of the offsets 0 to 8 (Voita et al. 2019), random tokens",
    "previous token": "on the token before, random tokens (Olsson et al. 2022)",
    "duplicate": "on earlier occurrences of the token, repeated random tokens",
    "induction": "on what followed earlier occurrences, repeated random tokens (Olsson et al. 2022)",
    "syntactic": "from verb to subject, noun to determiner, closing to opening bracket; templates, less the "
    "same distances",
    "semantic": "rank correlation with the cosine of token embeddings at equal distance, natural texts",
}
PLAIN = (
    "entropy",
    "normalized_entropy",
    "distance",
    "top",
)  # measured on natural texts, no label of their own


def collect(texts, statistics):
    """Scores of every head in every text, from `head_statistics` of each text with its patterns.

    statistics: list of Datasets (layer, head). Returns a Dataset (text, layer, head) of the
    measures, and for each pattern `name` the shuffled `name~` (text, shuffle, layer, head); nan
    where a text does not have a measure."""
    first = statistics[0]
    columns = {}
    for place, (text, stats) in enumerate(zip(texts, statistics)):
        total = stats["mass"].values * len(text.ids)  # attention of a head over all rows
        for name in stats.data_vars:
            base, mark, shuffle = name.removeprefix("@").partition("~")
            if name in PLAIN or name == "mass":
                values = stats[name].values
                values = values if text.natural else np.full_like(values, np.nan)
            elif name.startswith("@"):
                values = stats[name].values * total / text.rows[base + mark]
            else:
                continue
            columns.setdefault((base, shuffle), {})[place] = values
    empty = np.full((first.sizes["layer"], first.sizes["head"]), np.nan)

    def stack(key):
        return np.stack([columns[key].get(place, empty) for place in range(len(texts))])

    data = {}
    for base in dict.fromkeys(base for base, _ in columns):
        if (base, "") in columns:
            data[base] = (("text", "layer", "head"), stack((base, "")))
        shuffles = sorted(
            (shuffle for known, shuffle in columns if known == base and shuffle), key=int
        )
        if shuffles:
            data[f"{base}~"] = (
                ("text", "shuffle", "layer", "head"),
                np.stack([stack((base, s)) for s in shuffles], 1),
            )
    coords = {
        "text": [text.name for text in texts],
        "kind": ("text", [text.kind for text in texts]),
        "layer": first["layer"].values,
        "head": np.arange(first.sizes["head"]),
    }
    return _finish(xr.Dataset(data, coords))


def _finish(data):
    """Positional: the best offset, chosen on the mean over texts, for the baseline as well.
    Syntactic: less its own."""
    if "offset 0" in data:
        for end, dims in (("", []), ("~", ["shuffle"])):
            names = [f"offset {d}{end}" for d in range(OFFSETS) if f"offset {d}{end}" in data]
            if not names:
                continue
            stacked = xr.concat([data[name] for name in names], "offset", join="exact")
            mean = stacked.mean("text").fillna(0)
            best = mean.isel(offset=0, drop=True).copy(
                data=mean.values.argmax(mean.get_axis_num("offset"))
            )
            data[f"positional{end}"] = stacked.isel(offset=best).transpose(
                "text", *dims, "layer", "head"
            )
            if not end:
                data["best_offset"] = best
        data = data.drop_vars([name for name in data.data_vars if name.startswith("offset ")])
    if "syntactic~" in data:
        matched = data["syntactic~"].mean("shuffle")
        data = data.assign(
            {"syntactic": data["syntactic"] - matched, "syntactic~": data["syntactic~"] - matched}
        )
    return data


def profile(scores, n_boot=500, seed=0):
    """Value, interval and baseline of every measure: Dataset (measure, layer, head).

    value: mean over the texts that have the measure; low, high: 95% percentile bootstrap over those
    texts, nan for one text, which resampling gives back as it is; baseline, baseline_high: mean and
    largest of the shuffled versions' means over texts (nan without a baseline); n_texts."""
    rng = np.random.default_rng(seed)
    parts = []
    for name in [n for n in scores.data_vars if "text" in scores[n].dims and not n.endswith("~")]:
        array = scores[name]
        have = np.flatnonzero(np.isfinite(array.values).any(axis=(1, 2)))
        if not len(have):
            continue  # no text had it: a measure that was not made
        values = array.values[have]  # (text, layer, head)
        draws = rng.integers(0, len(have), (n_boot, len(have)))
        weights = np.stack([np.bincount(draw, minlength=len(have)) for draw in draws]) / len(
            have
        )  # (boot, text)
        boot = np.tensordot(weights, values, 1)
        low, high = np.quantile(boot, [0.025, 0.975], axis=0)
        if len(have) < 2:
            low, high = low * np.nan, high * np.nan
        row = {"value": values.mean(0), "low": low, "high": high}
        if f"{name}~" in scores:
            null = scores[f"{name}~"].values[have].mean(0)  # (shuffle, layer, head)
            row |= {"baseline": null.mean(0), "baseline_high": null.max(0)}
        else:
            row |= dict.fromkeys(("baseline", "baseline_high"), np.full(values.shape[1:], np.nan))
        part = xr.Dataset({key: (("layer", "head"), value) for key, value in row.items()})
        parts.append(part.assign(n_texts=len(have)).expand_dims(measure=[name]))
    out = xr.concat(parts, "measure", join="exact")
    return out.assign_coords(layer=scores["layer"].values, head=scores["head"].values)


def labels(profiled, margin=0.1):
    """Which labels a head earns: bool DataArray (label, layer, head).

    A score clears its baseline when the low end of its interval lies above the largest shuffled
    score, and the score exceeds the mean of the shuffled ones by `margin` (a share of attention; a
    correlation for "semantic")."""
    known = [name for name in LABELS if name in profiled["measure"].values]
    part = profiled.sel(measure=known)
    cleared = (part["low"] > part["baseline_high"]) & (part["value"] - part["baseline"] >= margin)
    return cleared.rename(measure="label").rename("label").transpose("label", "layer", "head")


def head_table(profiled, earned):
    """One row per head: layer, head, every measure, and `labels` as text ("none" where nothing
    cleared)."""
    frame = profiled["value"].to_series().unstack("measure")[list(profiled["measure"].values)]
    frame = frame[frame.notna().any(axis=1)]
    names = earned["label"].values
    picked = earned.stack(place=("layer", "head")).transpose("place", "label").to_pandas()
    frame["labels"] = [
        ", ".join(names[row]) or "none" for row in picked.loc[frame.index].to_numpy(bool)
    ]
    return frame.reset_index().rename_axis(columns=None)


def label_counts(earned, profiled):
    """Per label: how many heads earn it, the layers where they are, the best head and its score.
    DataFrame."""
    rows = []
    for name in earned["label"].values:
        mask, value = earned.sel(label=name), profiled["value"].sel(measure=name)
        layer, head = np.unravel_index(np.nanargmax(value.values), value.shape)
        best = profiled.sel(measure=name).isel(layer=layer, head=head)
        rows.append(
            {
                "label": name,
                "heads": int(mask.sum()),
                "share": float(mask.mean()),
                "best": f"L{int(best['layer'])}H{int(best['head'])}",
                "score": float(best["value"]),
                "low": float(best["low"]),
                "high": float(best["high"]),
                "baseline": float(best["baseline_high"]),
                "texts": int(best["n_texts"]),
            }
        )
    return pd.DataFrame(rows).set_index("label")


def by_depth(profiled, measures=None):
    """How each measure changes over the layers: DataFrame (measure) of mean in the first, middle
    and last third of the layers, the layer with the highest mean, and Spearman's correlation of a
    head's score with its layer."""
    rows = {}
    for name in measures or [name for name in profiled["measure"].values if name != "mass"]:
        value = profiled["value"].sel(measure=name)
        mean = value.mean("head")
        thirds = [
            float(np.nanmean(part)) if np.isfinite(part).any() else np.nan
            for part in np.array_split(mean.values, 3)
        ]
        depth = np.repeat(value["layer"].values, value.sizes["head"])
        flat = value.values.reshape(-1)
        rows[str(name)] = {
            "first third": thirds[0],
            "middle third": thirds[1],
            "last third": thirds[2],
            "peak layer": int(mean["layer"][int(np.nanargmax(mean.values))]),
            "spearman with layer": rank_correlation(depth, flat),
        }
    return pd.DataFrame(rows).T.rename_axis("measure")


def typical_texts(scores, layer, head, measures):
    """For one head and each measure, the text where the score is highest: DataFrame (measure, text,
    score, mean)."""
    rows = []
    for name in measures:
        values = scores[name].sel(layer=layer, head=head)
        values = values[np.isfinite(values.values)]
        if values.size:
            rows.append(
                {
                    "measure": name,
                    "text": str(values.text.values[int(np.argmax(values.values))]),
                    "score": float(values.max()),
                    "mean over texts": float(values.mean()),
                }
            )
    return pd.DataFrame(rows, columns=["measure", "text", "score", "mean over texts"]).set_index(
        "measure"
    )
