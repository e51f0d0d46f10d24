"""Which attention edges carry an answer: the last token's edges cut one by one or in groups (Geva
et al. 2023 knock out edges in windows of layers), beside attention weights and rollout."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

from ..arguments import whole
from ..capture.edits import Edit, ablate_head, knock_out
from ..capture.finite import measured
from ..errors import CaptureError
from ..maths import rank_correlation
from ..views.sentences import span

if TYPE_CHECKING:
    from ..engine import InferenceEngine

SECONDS = 8.0  # that cutting may take: fewer, larger groups where a run is slow
LEAST, LEAST_KEYS = 6, 12  # groups of layers or heads, and keys, however slow a run is
TRIED = 4  # runs that are timed first


@dataclass(frozen=True)
class Group:
    """Heads of layers whose edges are cut together. name: "layers 3 to 5", "head 4"."""

    name: str
    layers: Sequence[int]
    heads: Sequence[int] | None = None  # None: all


def grouped(numbers: Sequence[int], size: int) -> list[list[int]]:
    """Consecutive numbers in groups of `size`, the last one perhaps smaller."""
    whole("size", size, 1, error=CaptureError)
    return [list(numbers[start : start + size]) for start in range(0, len(numbers), size)]


def layer_groups(attention: xr.DataArray, size: int = 1) -> list[Group]:
    """All heads of consecutive layers. attention: captured, (layer, head, query, key)."""
    return [
        Group(span("layer", some), some) for some in grouped(_numbers(attention, "layer"), size)
    ]


def head_groups(attention: xr.DataArray, layer: int, size: int = 1) -> list[Group]:
    """Consecutive heads of one layer."""
    heads = list(range(_of(attention, layer).sizes["head"]))
    return [Group(span("head", some), [layer], some) for some in grouped(heads, size)]


def cut(
    engine: "InferenceEngine",
    tokens: Sequence[int],
    attention: xr.DataArray,
    answers: Sequence[int],
    groups: Sequence[Group],
    keys: Sequence[int] | None = None,
    progress: bool = True,
) -> xr.Dataset:
    """What the next token's prediction loses when the last token no longer sees a key in a group of
    heads: (group, key).

    tokens: ids of the text; attention: captured of them, (layer, head, query, key), with the last
    query. answers: two token ids. keys: positions, None for all. change: of log P(first answer) -
    log P(second) (nats, the difference of their logits), negative where the edge carried the first;
    kl: KL(uncut || cut) in nats; weight: what the edges weighed in the uncut run, mean over the
    group. NaN where the model's mask hides the key from all of the group, or nothing would be left
    to see. attrs["lead"]: the uncut difference. One token is read per cut: the others are kept."""
    last, (first, second) = len(tokens) - 1, _two(answers)
    row = attention.isel(query=-1)  # (layer, head, key)
    measured(row)
    if row["query_position"].item() != last:
        raise CaptureError("the capture's last query is not the text's last token.")
    keys = [
        whole("a key", key, 0, last, error=CaptureError)
        for key in (range(last + 1) if keys is None else keys)
    ]
    size = (len(groups), len(keys))
    change, kl, weight = (np.full(size, np.nan) for _ in range(3))
    variants = {}
    for place in np.ndindex(*size):
        group, key = groups[place[0]], keys[place[1]]
        heads = slice(None) if group.heads is None else group.heads
        weights = _of(row, group.layers).isel(head=heads)
        others = weights.sum("key") - weights.isel(key=key)
        # a layer without a key to leave, or whose window ended before
        open_ = (weights.isel(key=key) > 0).any("head") & (others > 0).all("head")
        if layers := open_["layer"].values[open_.values].tolist():
            variants[place] = [knock_out(layers, group.heads, last, key)]
            weight[place] = float(weights.sel(layer=layers).isel(key=key).mean())
    lead = np.nan
    if variants:
        said = engine.predict(tokens, variants, [first, second], progress=progress)
        leads = [said[name][:, 0] - said[name][:, 1] for name in ("logprob", "before")]
        lead = float(leads[1][0])
        where = tuple(np.transpose(list(variants)))
        change[where], kl[where] = (leads[0] - leads[1]).values, np.maximum(said["kl"].values, 0)
    dims = ("group", "key")
    data = {"change": (dims, change), "kl": (dims, kl), "weight": (dims, weight)}
    coords = {"group": [group.name for group in groups], "key": keys}
    return xr.Dataset(data, coords, {"lead": lead, "layers": [group.layers for group in groups]})


def cut_map(
    engine: "InferenceEngine",
    tokens: Sequence[int],
    attention: xr.DataArray,
    answers: Sequence[int],
    layer: int | None = None,
    *,
    seconds: float = SECONDS,
    progress: bool = True,
) -> xr.Dataset:
    """`cut` of the last token's edges over all layers, all heads of each together, or, with
    `layer`, over that layer's heads.

    As finely as fits into about `seconds`, by the time that a few cuts take: layers (or heads) are
    grouped, in LEAST groups at least, then the keys of the largest weight are cut, LEAST_KEYS at
    least: of an 8B model that takes 1 s per token, 72 cuts in 72 s.
    What was reckoned and is left out is printed."""
    make = layer_groups if layer is None else lambda some, size: head_groups(some, layer, size)
    finest = make(attention, 1)
    keys = np.arange(len(tokens))
    per_run = _seconds(engine, tokens, attention, answers, finest[-1:], keys[:TRIED])
    most = seconds / per_run
    size = max(1, int(np.ceil(len(finest) * len(keys) / most)))
    groups = make(attention, min(size, max(1, len(finest) // LEAST)))
    if len(groups) * len(keys) > most:
        strong = attention.isel(query=-1).mean(("layer", "head")).values
        keys = np.sort(np.argsort(-strong)[: max(LEAST_KEYS, int(most / len(groups)))])
    if progress and (len(groups), len(keys)) != (len(finest), len(tokens)):
        what = "layers" if layer is None else f"heads of layer {layer}"
        whole = per_run * len(finest) * len(tokens)
        print(
            f"Each of {len(finest)} {what} and {len(tokens)} keys cut by itself would take about "
            f"{whole:,.0f} s: {len(groups)} groups and {len(keys)} keys are tried, about "
            f"{per_run * len(groups) * len(keys):,.0f} s."
        )
    return cut(engine, tokens, attention, answers, groups, keys.tolist(), progress)


def _seconds(engine, tokens, attention, answers, groups, keys):
    """Seconds of one cut; the first one starts what has to be started."""
    cut(engine, tokens, attention, answers, groups, keys[:1], False)
    started = time.perf_counter()
    cut(engine, tokens, attention, answers, groups, keys, False)
    return (time.perf_counter() - started) / (len(keys) + 1)  # and one without


def whole_tokens(
    engine: "InferenceEngine",
    tokens: Sequence[int],
    attention: xr.DataArray,
    answers: Sequence[int],
    keys: Sequence[int],
    rollout: xr.DataArray,
    progress: bool = True,
) -> pd.DataFrame:
    """Keys cut from the last token in every layer and head at once, beside what is usually read as
    their importance: a row per key with change, kl, attention (mean weight of the last token over
    layers and heads) and rollout.

    rollout: of the last token after the last layer, (key,). attrs: Spearman's correlation of kl
    with each, without and with the first token (which is often a sink)."""
    everything = [Group("all", _numbers(attention, "layer"))]
    cuts = cut(engine, tokens, attention, answers, everything, keys, progress)
    mean = attention.isel(query=-1).mean(("layer", "head")).values
    table = pd.DataFrame(
        {
            "key": list(keys),
            "change": cuts["change"].values[0],
            "kl": cuts["kl"].values[0],
            "attention": mean[list(keys)],
            "rollout": np.asarray(rollout)[list(keys)],
        }
    )
    later = table[table["key"] > 0]
    for name in ("attention", "rollout"):
        table.attrs[name] = rank_correlation(later["kl"], later[name])
        table.attrs[f"{name}, first token included"] = rank_correlation(table["kl"], table[name])
    return table


def strongest_edges(attention: xr.DataArray, layer: int, head: int) -> list[Edit]:
    """Edits that cut, for every query that sees two keys or more, the key that a head gives the
    most weight. attention: captured, all queries."""
    whole("head", head, 0, attention.sizes["head"] - 1, error=CaptureError)
    weights = _of(attention, layer).isel(head=head).values  # (query, key)
    if weights.shape[0] != weights.shape[1]:
        raise CaptureError("the strongest edges are of all queries: capture without queries=.")
    best, several = weights.argmax(-1), (weights > 0).sum(-1) > 1
    return [
        knock_out(layer, head, np.flatnonzero(several & (best == key)), int(key))
        for key in np.unique(best[several])
    ]


def head_or_edge(
    engine: "InferenceEngine",
    tokens: Sequence[int],
    attention: xr.DataArray,
    heads: Sequence[tuple[int, int]],
    progress: bool = True,
) -> pd.DataFrame:
    """A head ablated (zero) against its strongest edge of every query cut, on a text: a row per
    head with kl and loss_change (nats per token) of each, `_head` and `_edge`, and weight, the mean
    weight of the edges that are cut.

    Without its strongest edge a head still gives what its other keys have, renormalized; without
    its output, nothing."""
    variants: dict[Any, list[Edit]] = {}
    for layer, head in heads:
        edges = strongest_edges(attention, layer, head)
        # The last query predicts no token of the text
        if any(edge.first < len(tokens) - 1 for edge in edges):
            variants["head", layer, head] = [ablate_head(layer, head)]
            variants["edge", layer, head] = edges
    columns = "layer head kl_head kl_edge loss_change_head loss_change_edge weight".split()
    if not variants:
        return pd.DataFrame(columns=columns)
    swept = engine.sweep(tokens, variants, progress=progress)
    rows = []
    for _, layer, head in [name for name in variants if name[0] == "head"]:
        top = attention.sel(layer=layer).isel(head=head).max("key").values[1:]
        one, other = (swept.loc[[(kind, layer, head)]].iloc[0] for kind in ("head", "edge"))
        values = [max(run[name], 0.0) if name == "kl" else run[name]
                  for name in ("kl", "loss_change") for run in (one, other)]  # fmt: skip
        rows.append((layer, head, *values, float(top.mean())))
    return pd.DataFrame(rows, columns=columns)


def _two(answers):
    ids = [whole("an answer", token, 0, error=CaptureError) for token in answers]
    if len(ids) != 2 or ids[0] == ids[1]:
        raise CaptureError(f"answers are the ids of two different tokens, not {ids}.")
    return ids


def _of(attention, layers):
    """Some layers of captured attention; CaptureError where they are not there."""
    there = _numbers(attention, "layer")
    if missing := [layer for layer in np.atleast_1d(layers).tolist() if layer not in there]:
        raise CaptureError(
            f"the captured attention has no layer {missing[0]}: it has {', '.join(map(str, there))}."
        )
    return attention.sel(layer=layers)


def _numbers(array, dim):
    return array[dim].values.tolist()
