"""What the model loses without a head: tables from ablations, relations to what heads do, and
pruning orders."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from ..capture.edits import Edit, ablate_head
from ..imports import uninterrupted
from ..maths import middle

Heads = Sequence[tuple[int, int]]  # (layer, head)


def one_by_one(heads: Heads, mode: str = "zero") -> dict[tuple[int, int], list[Edit]]:
    """Variants for a sweep, each without one head: {(layer, head): edits}. mode: as
    ablate_head's."""
    return {head: [ablate_head(*head, mode)] for head in heads}


def importance_table(sweep: pd.DataFrame) -> pd.DataFrame:
    """Importance of each head from engine.sweep's DataFrame of `one_by_one` over a held-out text.

    DataFrame (layer, head, loss_change, error, kl): nats per token, and the standard error of the
    loss change over tokens."""
    table = pd.DataFrame(list(sweep.index), columns=["layer", "head"])
    columns = {"loss_change": "loss_change", "error": "loss_change_err", "kl": "kl"}
    return table.assign(**{name: sweep[given].to_numpy() for name, given in columns.items()})


def both_ways(zero: pd.DataFrame, mean: pd.DataFrame) -> pd.DataFrame:
    """The heads of two importance tables, of zero and of mean ablation, that are in both: the
    second table, its loss change as `mean` and the first one's as `zero`."""
    zero = zero.rename(columns={"loss_change": "zero"})[["layer", "head", "zero"]]
    return mean.rename(columns={"loss_change": "mean"}).merge(zero, on=["layer", "head"])


def sample_heads(heads: Heads, count: int, seed: int = 0) -> list[tuple[int, int]]:
    """At most `count` of the heads: as many from every layer as can be, drawn at random."""
    if count >= len(heads):
        return list(heads)
    rng, seen, keyed = np.random.default_rng(seed), dict[int, int](), []
    for layer, head in (heads[i] for i in rng.permutation(len(heads))):
        seen[layer] = seen.get(layer, 0) + 1
        keyed.append((seen[layer], rng.random(), (layer, head)))
    return sorted(head for _, _, head in sorted(keyed)[:count])


def top_and_sample(
    table: pd.DataFrame, top: int = 12, more: int = 18, seed: int = 0
) -> list[tuple[int, int]]:
    """The `top` most important heads of a table by their KL divergence, and a sample of the
    rest."""
    ranked = table.sort_values("kl", ascending=False)
    heads = list(zip(ranked["layer"].tolist(), ranked["head"].tolist()))
    return heads[:top] + sample_heads(heads[top:], more, seed)


def population(
    values: Sequence[float],
    n_heads: int,
    threshold: float = 0.01,
    n_boot: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """What a sample of heads says about all of them: "mean" loss change and the "share" above
    `threshold` nats, each (value, low, high) with its 95% bootstrap interval, narrowed for a sample
    that is a good part of the whole (finite population); "sampled", "of": numbers of heads."""
    values, rng = np.asarray(values, float), np.random.default_rng(seed)
    draws = values[rng.integers(0, len(values), (n_boot, len(values)))]
    narrow = np.sqrt(max(0.0, 1 - len(values) / n_heads))
    found: dict[str, Any] = {"sampled": len(values), "of": n_heads}
    for name, all_of, drawn in (
        ("mean", values, draws),
        ("share", values > threshold, draws > threshold),
    ):
        value, ends = all_of.mean(), middle(drawn.mean(1))
        found[name] = float(value), *(value + (ends - value) * narrow).tolist()
    return found


def relations(
    table: pd.DataFrame, columns: Sequence[str], n_boot: int = 500, seed: int = 0
) -> pd.DataFrame:
    """Spearman's correlation of the KL divergence of a head's ablation with other things measured:
    DataFrame (measure) of rho, low, high, p, heads.

    low, high: 95% bootstrap over heads. table: one row per head, with kl and the columns."""
    with uninterrupted():
        from scipy.stats import rankdata, spearmanr

    rng, rows = np.random.default_rng(seed), {}
    for name in columns:
        pair = table[[name, "kl"]].dropna().to_numpy(float)
        rows[name] = dict.fromkeys(("rho", "low", "high", "p"), np.nan) | {"heads": len(pair)}
        # A column without an order, or so few heads that chance orders them (of 4, one order in 12
        # agrees wholly).
        if len(pair) < 5 or (np.ptp(pair, axis=0) == 0).any():
            continue
        rho, p = spearmanr(pair[:, 0], pair[:, 1])
        ranks = rankdata(pair[rng.integers(0, len(pair), (n_boot, len(pair)))], axis=1)
        a, b = np.moveaxis(ranks - ranks.mean(1, keepdims=True), 2, 0)  # (boot, head) each
        boot = (a * b).sum(1) / np.maximum(np.sqrt((a**2).sum(1) * (b**2).sum(1)), 1e-12)
        low, high = middle(boot)
        rows[name] |= {"rho": rho, "low": low, "high": high, "p": p}
    columns = ["rho", "low", "high", "p", "heads"]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns, dtype=float)
    return table.rename_axis("measure")


def pruning_sets(
    table: pd.DataFrame, repeats: int = 2, seed: int = 0, counts: Sequence[int] | None = None
) -> dict[tuple[str, int, int], list[Edit]]:
    """Variants for a sweep, each without several heads: {(order, repeat, count): edits}, the least
    important by KL divergence first, the most important first, and `repeats` random orders.

    counts: None for 2, 5, 10, 20, 35 and 50% of the table's heads."""
    if counts is None:
        shares = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5)
        counts = sorted({max(1, round(len(table) * share)) for share in shares})
    edits = list(map(ablate_head, table["layer"].tolist(), table["head"].tolist()))
    rank = np.argsort(table["kl"].to_numpy(), kind="stable")
    rng = np.random.default_rng(seed)
    orders = {("least important", 0): rank, ("most important", 0): rank[::-1]}
    orders |= {("random", repeat): rng.permutation(len(edits)) for repeat in range(repeats)}
    return {
        (*name, count): [edits[i] for i in order[:count]]
        for name, order in orders.items()
        for count in counts
    }


def pruning_table(sweep: pd.DataFrame) -> pd.DataFrame:
    """engine.sweep's DataFrame of `pruning_sets` as rows (order, repeat, removed, loss,
    loss_change, kl, top1_agreement)."""
    named = pd.DataFrame(list(sweep.index), columns=["order", "repeat", "removed"])
    kept = sweep[["loss", "loss_change", "kl", "top1_agreement"]].reset_index(drop=True)
    return pd.concat([named, kept], axis=1)


def tolerated(table: pd.DataFrame, limit: float = 0.1) -> pd.Series:
    """How many heads can be removed in each order before the loss rises by more than `limit` nats
    per token: the largest measured count below it (mean over repeats). Series by order."""
    mean = table.groupby(["order", "removed"])["loss_change"].mean().unstack()  # counts ascend
    within = (mean <= limit).cummin(axis=1)
    return (within * mean.columns).max(axis=1).rename("removed")
