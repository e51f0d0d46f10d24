"""Is A better than B: yes, no, or cannot be told. Both were measured on the same items, so that it
is their differences that vary, and not what makes an item hard for both."""

from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from ..errors import CompareError
from ..maths import middle
from .quality import FEW, SAME, alike, students

RESAMPLES = 2000
BLOCK = 32  # scored tokens in a row that count as one observation


class Paired(NamedTuple):
    """difference: mean of a - b; low, high: its 95% interval (NaN for one block, or blocks that are
    all the same); verdict: "less", "more" (a than b) or "cannot be told"."""

    difference: float
    low: float
    high: float
    verdict: str


def paired(
    a: ArrayLike, b: ArrayLike, blocks: ArrayLike | None = None, seed: int = 0, floor: float = 0.0
) -> Paired:
    """The mean difference a - b of two measures of the same items, with an interval from resampling
    whole blocks (percentile bootstrap, Efron 1979), of fewer than FEW blocks Student's of their
    means: of three alike files' windows all lie on one side in one case of four.

    a, b: (item,) numbers. blocks: (item,) labels of what is not independent inside (the windows of
    a text); None: each item is one. Blocks count by their items, as the mean does. floor: a
    difference of at most that is noise whatever the interval says. Raises CompareError where the
    items do not pair or a value is no number."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise CompareError(f"{a.shape} and {b.shape} values do not pair: measure the same items.")
    values = a - b
    if not np.isfinite(values).all():
        raise CompareError("A value is no number: it cannot be paired. Leave its item out of both.")
    labels = np.arange(len(values)) if blocks is None else np.asarray(blocks)
    _, block = np.unique(labels, return_inverse=True)
    sums, counts = np.bincount(block, values), np.bincount(block)  # (block,)
    difference = float(values.mean())
    if len(counts) < 2 or blocks is not None and alike(sums / counts):
        return Paired(difference, np.nan, np.nan, "cannot be told")
    few = len(counts) < FEW
    low, high = students(sums, counts) if few else _drawn(sums, counts, seed)
    verdict = "less" if high < 0 else "more" if low > 0 else "cannot be told"
    if abs(difference) <= floor:
        verdict = "cannot be told"
    return Paired(difference, float(low), float(high), verdict)


def _drawn(sums, counts, seed):
    shares = np.full(len(counts), 1 / len(counts))
    drawn = np.random.default_rng(seed).multinomial(len(counts), shares, size=RESAMPLES)
    return middle((drawn @ sums) / (drawn @ counts))  # drawn: (resample, block)


def better(tokens: pd.DataFrame, floor: float = 0.0, block: int = BLOCK) -> pd.DataFrame:
    """Of every two candidates, whether the first is closer to the reference: DataFrame by (a, b):
    difference (of the mean KLD, a's less b's, nats), low, high (its 95% interval), better.

    tokens: Comparison.tokens. Neighbours have a text in common: about `block` scored tokens in a
    row, all of one window, are one observation, and the interval is Student's of their means (a
    bootstrap's is too narrow for a dozen). floor: Comparison.floor. better: "yes" or "no" where the
    interval is on one side of 0, "equal" where the difference is no more than the floor, else
    "cannot be told". A window that is the copy of another is no further observation: of a text that
    is one block again and again, low and high are NaN. Raises CompareError for files that were
    measured on other texts or windows."""
    places = ["window", "position"]
    wide = tokens.pivot(index=places, columns="candidate", values="kld")
    if wide.isna().any(axis=None) or (tokens.groupby(places)["id"].nunique() > 1).any():
        raise CompareError(
            "These files were measured on other texts or windows, and their tokens do not pair: compare "
            "them with one text, n_ctx and max_windows."
        )
    some = wide.drop(index=_copies(wide.groupby("window").mean()), level="window")
    windows = some.groupby("window")
    sizes = windows[wide.columns[0]].transform("size")
    parts = np.maximum(1, np.round(sizes / block))
    means = some.groupby(["window", np.floor(windows.cumcount() * parts / sizes)]).mean()
    rows = {}
    for a, b in combinations(tokens["candidate"].unique(), 2):
        apart = (means[a] - means[b]).to_numpy()  # (block,)
        low = high = np.nan
        if len(apart) > 1 and not alike(apart):
            low, high = students(apart, np.ones(len(apart)))
        difference = float((wide[a] - wide[b]).mean())
        verdict = "yes" if high < 0 else "no" if low > 0 else "cannot be told"
        rows[a, b] = (difference, low, high, "equal" if abs(difference) <= floor else verdict)
    index = pd.MultiIndex.from_tuples(list(rows), names=["a", "b"]) if rows else None
    return pd.DataFrame(rows.values(), index, ["difference", "low", "high", "better"])


def _copies(means):
    """Windows that have the means of an earlier one, in every column."""
    values = means.to_numpy()  # (window, candidate)
    apart = np.abs(values[:, None] - values)  # (window, window, candidate)
    same = (apart <= SAME * np.abs(values)).all(axis=2)
    return means.index[np.tril(same, -1).any(axis=1)]
