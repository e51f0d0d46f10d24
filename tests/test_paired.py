"""Paired intervals: against scipy's bootstrap, and on differences of known size."""

import numpy as np
import pandas as pd
import pytest

from llamatelemetry.compare.paired import better, paired
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
    tokens = three_files(0.02)
    elsewhere = tokens.assign(id=tokens["id"].where(tokens["candidate"] != "b", 8))
    shorter = tokens.drop(tokens.query("candidate == 'b' and window == 1").index)
    for others in (elsewhere, shorter):
        with pytest.raises(CompareError, match="other texts or windows"):
            better(others)


@pytest.mark.parametrize("windows", [2, 3, 4, 10])
def test_a_few_windows_promise_no_more_than_they_hold(windows):
    """Of two files that are alike one in twenty is called closer: a bootstrap of two windows said
    so of one in two."""
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(windows)
    apart = rng.normal(0, 1, (300, windows))
    found = [paired(one, np.zeros(windows)) for one in apart]
    assert np.mean([one.verdict != "cannot be told" for one in found]) < 0.09
    interval = stats.ttest_1samp(apart[0], 0).confidence_interval(0.95)
    assert found[0][1:3] == pytest.approx(interval)
    # A longer window counts for more, as it does in the mean
    labels = np.repeat(np.arange(windows), np.arange(windows) + 5)
    long = paired(apart[0][labels], np.zeros(len(labels)), labels)
    assert long.low < long.difference < long.high
    assert long.difference == pytest.approx(apart[0][labels].mean())


def three_files(noise, seed=0):
    """Two windows of 256 tokens: b is 0.01 nats worse than a, c as good, all with the same hard
    tokens."""
    rng = np.random.default_rng(seed)
    hard = rng.exponential(0.1, 512)
    where = {"window": np.repeat([0, 1], 256), "position": np.tile(np.arange(256, 512), 2), "id": 7}
    files = {"a": 0.0, "b": 0.01, "c": 0.0}
    tables = [
        pd.DataFrame(where | {"candidate": name, "kld": hard + more + rng.normal(0, noise, 512)})
        for name, more in files.items()
    ]
    return pd.concat(tables, ignore_index=True)


def test_of_two_files_one_is_better_or_it_cannot_be_told():
    found = better(three_files(0.02))
    assert list(found.index) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert list(found["better"]) == ["yes", "cannot be told", "no"]
    assert found.loc[("a", "b"), "difference"] == pytest.approx(-0.01, abs=0.003)
    assert list(better(three_files(1.0))["better"]) == ["cannot be told"] * 3
    assert list(better(three_files(0.02), floor=0.02)["better"]) == ["equal"] * 3
    assert better(three_files(0.02).query("candidate == 'a'")).empty
    one = better(three_files(0.02).query("window == 0 and position < 270"))  # a block alone
    assert one["low"].isna().all() and (one["better"] == "cannot be told").all()


@pytest.mark.parametrize("noise", [0.0, 1e-9])
@pytest.mark.parametrize("scored, told", [(32, False), (256, True)])
def test_a_text_that_repeats_itself_is_read_once(scored, told, noise):
    """Every window the same, but for the order of sums: as often as it comes, it is no more
    evidence, and of one block there is no interval at all."""
    once = three_files(0.02).query(f"window == 0 and position < {256 + scored}")
    rng = np.random.default_rng(1)
    copies = [
        once.assign(window=n, kld=once["kld"] + rng.normal(0, noise, len(once))) for n in range(9)
    ]
    alone, found = better(once), better(pd.concat(copies, ignore_index=True))
    pd.testing.assert_frame_equal(found, alone, rtol=1e-4, atol=1e-6)
    assert found["low"].notna().all() == found["high"].notna().all() == told
    assert told or (found["better"] == "cannot be told").all()
    ab = pd.concat(copies).pivot(index=["window", "position"], columns="candidate", values="kld")
    two = paired(ab["a"], ab["b"], ab.index.get_level_values("window"))
    assert np.isnan(two.low) and np.isnan(two.high) and two.verdict == "cannot be told"


def test_the_interval_between_files_is_scipys_and_holds_what_it_promises():
    stats = pytest.importorskip("scipy.stats")
    tokens = three_files(0.05)
    found = better(tokens).loc[("a", "b")]
    wide = tokens.pivot(index=["window", "position"], columns="candidate", values="kld")
    blocks = wide[["a", "b"]].to_numpy().reshape(16, 32, 2).mean(axis=1)
    interval = stats.ttest_rel(*blocks.T).confidence_interval(0.95)
    assert [found["low"], found["high"]] == pytest.approx(interval)
    # Files that are alike: one in twenty is called better or worse, whatever the noise.
    tables = [better(three_files(0.3, seed)) for seed in range(150)]
    told = [table.loc[("a", "c"), "better"] != "cannot be told" for table in tables]
    assert 0.01 < np.mean(told) < 0.1


@pytest.mark.parametrize("scored, blocks", [(255, 8), (63, 2), (40, 1), (33, 1), (7, 1)])
def test_no_block_is_a_remainder(scored, blocks):
    """A window's tokens are shared out evenly over its blocks."""
    stats = pytest.importorskip("scipy.stats")
    where = {"window": np.repeat([0, 1, 2], scored), "position": np.tile(np.arange(scored), 3)}
    where["id"] = 7
    step = np.floor(np.arange(scored) * blocks / scored)
    kld = 1 + np.tile(step % 2, 3) + where["window"]
    tokens = [pd.DataFrame(where | {"candidate": n, "kld": k}) for n, k in (("a", kld), ("b", 0))]
    found = better(pd.concat(tokens, ignore_index=True)).iloc[0]
    means = np.add.outer(np.arange(3), 1 + np.arange(blocks) % 2).ravel()
    interval = stats.ttest_1samp(means, 0).confidence_interval(0.95)
    assert [found["low"], found["high"]] == pytest.approx(interval)
