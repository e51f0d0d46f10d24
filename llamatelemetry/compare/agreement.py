"""Does the order of files depend on the text: the same files compared on several texts. Pure
functions on Comparisons."""

from collections.abc import Mapping
from itertools import combinations

import numpy as np
import pandas as pd

from ..imports import uninterrupted
from .comparison import Comparison
from .paired import paired


def by_text(found: Mapping[str, Comparison]) -> pd.DataFrame:
    """{text: Comparison} as one table, indexed by (text, name): n_tokens, ppl_base, kld_mean,
    kld_mean_low, kld_mean_high, same_top, rank (1 diverges least). Only files measured on all
    texts."""
    columns = ["n_tokens", "ppl_base", "kld_mean", "kld_mean_low", "kld_mean_high", "same_top"]
    names = _everywhere(found)
    parts = {text: pd.DataFrame(one)[columns].loc[names] for text, one in found.items()}
    ranks = {text: part["kld_mean"].rank(method="min") for text, part in parts.items()}
    parts = {text: part.assign(rank=ranks[text]) for text, part in parts.items()}
    return pd.concat(parts, names=["text", "name"])


def _everywhere(found):
    """Files with a number on every text, in the order of the first."""
    first = next(iter(found.values()))["kld_mean"].dropna().index
    return [
        name
        for name in first
        if all(np.isfinite(one["kld_mean"].get(name, np.nan)) for one in found.values())
    ]


def order(found: Mapping[str, Comparison], floor: float = 0.0, seed: int = 0) -> pd.DataFrame:
    """For each pair of files, which diverges less on each text: DataFrame indexed by (less, more),
    one column per text of paired's verdict on the first against the second ("less", "more", "cannot
    be told"), and `depends`: whether one text says "less" and another "more". The pair is written
    in the order of the first text.

    Only files measured on all texts. floor: a difference in mean KLD of at most that is noise."""
    texts = list(found)
    means = found[texts[0]]["kld_mean"]
    names = sorted(_everywhere(found), key=lambda name: means[name])
    tokens = {
        text: {name: part for name, part in one.tokens.groupby("candidate", sort=False)}
        for text, one in found.items()
    }
    rows = []
    for less, more in combinations(names, 2):
        row = {"less": less, "more": more}
        for text, parts in tokens.items():
            a, b = parts[less], parts[more]
            row[text] = paired(a["kld"], b["kld"], a["window"], seed, floor).verdict
        said = {row[text] for text in texts}
        rows.append(row | {"depends": {"less", "more"} <= said})
    columns = ["less", "more", *texts, "depends"]
    return pd.DataFrame(rows, columns=columns).set_index(["less", "more"])


def rank_agreement(found: Mapping[str, Comparison]) -> pd.DataFrame:
    """Kendall's tau-b of the files' mean KLD between each two texts, DataFrame (text, text): 1 is
    the same order, -1 the opposite one; NaN for fewer than two files."""
    with uninterrupted():
        from scipy.stats import kendalltau

    means = pd.DataFrame({text: one["kld_mean"] for text, one in found.items()}).dropna()
    taus = [[kendalltau(means[a], means[b]).statistic for b in means] for a in means]
    return pd.DataFrame(taus, index=means.columns, columns=means.columns)
