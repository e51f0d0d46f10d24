"""Is A better than B: yes, no, or cannot be told. Both were measured on the same items, so that it
is their differences that vary, and not what makes an item hard for both."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..errors import CompareError

RESAMPLES = 2000


class Paired(NamedTuple):
    """difference: mean of a - b; low, high: its 95% interval (NaN for one block); verdict: "less",
    "more" (a than b) or "cannot be told"."""

    difference: float
    low: float
    high: float
    verdict: str


def paired(
    a: ArrayLike, b: ArrayLike, blocks: ArrayLike | None = None, seed: int = 0, floor: float = 0.0
) -> Paired:
    """The mean difference a - b of two measures of the same items, with an interval from resampling
    whole blocks (percentile bootstrap, Efron 1979).

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
    if len(counts) < 2:
        return Paired(difference, np.nan, np.nan, "cannot be told")
    rng = np.random.default_rng(seed)
    shares = np.full(len(counts), 1 / len(counts))
    drawn = rng.multinomial(len(counts), shares, size=RESAMPLES)  # (resample, block)
    low, high = np.quantile((drawn @ sums) / (drawn @ counts), [0.025, 0.975])
    verdict = "less" if high < 0 else "more" if low > 0 else "cannot be told"
    if abs(difference) <= floor:
        verdict = "cannot be told"
    return Paired(difference, float(low), float(high), verdict)
