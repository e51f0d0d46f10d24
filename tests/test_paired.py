"""Paired intervals: against scipy's bootstrap, and on differences of known size."""

import numpy as np
import pytest

from llamatelemetry.compare.paired import paired
from llamatelemetry.errors import CompareError


def test_the_interval_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    a = rng.normal(1.0, 2.0, 60)
    b = a - rng.normal(0.3, 0.5, 60)
    found = paired(a, b)
    theirs = stats.bootstrap((a - b,), np.mean, method="percentile", n_resamples=20_000, rng=1)
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert found.difference == pytest.approx((a - b).mean())
    assert found.low == pytest.approx(theirs.confidence_interval.low, abs=0.05 * width)
    assert found.high == pytest.approx(theirs.confidence_interval.high, abs=0.05 * width)
    assert found.verdict == "more" and paired(b, a).verdict == "less"


def test_what_both_share_does_not_blur_the_difference():
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 100, 50)  # far larger than what is between them
    assert paired(hard + rng.normal(1, 0.1, 50), hard).verdict == "more"
    assert paired(hard, hard).verdict == "cannot be told"
    assert paired(hard + 1, hard, floor=2).verdict == "cannot be told"


def test_items_of_one_block_are_no_evidence_of_their_own():
    """Ten windows of a hundred alike tokens: the interval is that of ten values."""
    windows = np.repeat(np.arange(10), 100)
    value = np.random.default_rng(0).normal(0.4, 1.0, 10)
    blocked = paired(value[windows], np.zeros(1000), windows)
    alone = paired(value[windows], np.zeros(1000))
    ten = paired(value, np.zeros(10))
    assert blocked[:3] == pytest.approx(ten[:3])
    assert blocked.high - blocked.low > 5 * (alone.high - alone.low)
    one = paired(np.ones(5), np.zeros(5), np.zeros(5))
    assert one.verdict == "cannot be told" and np.isnan(one.low)


def test_what_does_not_pair_is_refused():
    with pytest.raises(CompareError, match="do not pair"):
        paired([1, 2], [1])
    with pytest.raises(CompareError, match="no number"):
        paired([1, np.nan], [1, 2])
