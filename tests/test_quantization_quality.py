import numpy as np
import pandas as pd
import pytest

from llamatelemetry.compare.quality import Reference, mean_and_error, summarize, top_k


@pytest.mark.parametrize("vocab", [7, 640, 1000, 5003])
def test_top_k_is_a_stable_sort(vocab):
    logits = np.random.default_rng(vocab).normal(size=(5, vocab)).astype(np.float32)
    logits[0, [1, 4]] = 9  # a tie: the lower id first
    values, ids = top_k(logits, 10)
    expected = np.argsort(-logits, axis=1, kind="stable")[:, :10]
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(logits, expected, axis=1))


def naive(base, logits, targets):
    """The definitions in float64, one token at a time."""
    rows = []
    for a, b, t in zip(base.astype(np.float64), logits.astype(np.float64), targets):
        log_p, log_q = (x - x.max() - np.log(np.exp(x - x.max()).sum()) for x in (a, b))
        heard = log_p > -16
        rows.append(
            {
                "logprob_base": log_p[t],
                "logprob": log_q[t],
                "dp": np.exp(log_q[t]) - np.exp(log_p[t]),
                "kld": (np.exp(log_p) * (log_p - log_q))[heard].sum(),
                "same_top": a.argmax() == b.argmax(),
                "entropy_base": -(np.exp(log_p) * log_p).sum(),
                "top5": len(set(np.argsort(-a)[:5]) & set(np.argsort(-b)[:5])) / 5,
                "top10": len(set(np.argsort(-a)[:10]) & set(np.argsort(-b)[:10])) / 10,
            }
        )
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    "scale, noise, shift", [(3, 0.1, 0), (3, 2, 0), (8, 1, 40), (0.1, 0.01, -40)]
)
def test_compare_against_the_definitions(scale, noise, shift):
    rng = np.random.default_rng(1)
    base = rng.normal(size=(20, 3000), scale=scale).astype(np.float32)
    logits = (base + rng.normal(size=base.shape, scale=noise) + shift).astype(np.float32)
    targets = rng.integers(3000, size=20)
    found = pd.DataFrame(Reference(base, targets).compare(logits))
    expected = naive(base, logits, targets)
    for name in expected:
        np.testing.assert_allclose(
            found[name].astype(float),
            expected[name].astype(float),
            rtol=1e-5,
            atol=2e-5,
            err_msg=name,
        )


def test_a_model_against_itself_is_exactly_nothing():
    logits = np.random.default_rng(2).normal(size=(12, 999), scale=4).astype(np.float32)
    found = Reference(logits, np.arange(12)).compare(logits.copy())
    assert (found["kld"] == 0).all() and (found["dp"] == 0).all()
    assert found["same_top"].all() and (found["top5"] == 1).all() and (found["top10"] == 1).all()


def test_what_the_reference_holds_for_impossible_is_left_out():
    base = np.array([[0, 0, -20]], np.float32)
    logits = np.array([[0, 0, -30]], np.float32)  # a full sum would add exp(-20.7) * 10
    assert abs(Reference(base, [0], k=2).compare(logits)["kld"][0]) < 1e-9


def test_summary_of_known_numbers():
    n = 40
    tokens = pd.DataFrame(
        {
            "window": np.repeat([0, 1], n // 2),
            "logprob_base": np.full(n, -1.0),
            "logprob": np.tile([-1.0, -2.0], n // 2),
            "kld": np.arange(n) / 10,
            "dp": np.tile([0.3, -0.3], n // 2),
            "same_top": np.tile([True, True, True, False], n // 4),
            "top5": 0.8,
            "top10": 0.9,
        }
    )
    row = summarize(tokens)
    assert row["ppl_base"] == pytest.approx(np.e) and row["ppl_base_err"] == 0
    assert row["ppl"] == pytest.approx(np.exp(1.5)) and row["ppl_ratio"] == pytest.approx(
        np.exp(0.5)
    )
    assert row["ppl_err"] == pytest.approx(np.exp(1.5) * 0.5 / np.sqrt(n - 1))
    assert row["ppl_ratio_err"] == pytest.approx(np.exp(0.5) * 0.5 / np.sqrt(n - 1))
    assert (row["kld_min"], row["kld_median"], row["kld_max"]) == pytest.approx((0, 1.95, 3.9))
    assert row["kld_p90"] == pytest.approx(3.51) and row["mean_dp"] == pytest.approx(0)
    assert row["rms_dp"] == pytest.approx(0.3) and row["rms_dp_err"] == pytest.approx(0, abs=1e-9)
    assert row["same_top"] == 0.75 and row["same_top_err"] == pytest.approx(
        np.sqrt(0.75 * 0.25 / (n - 1))
    )
    # two windows with means 0.95 and 2.95: 12.7 standard errors of 1, and no divergence is below 0
    assert (row["kld_mean_low"], row["kld_mean_high"]) == pytest.approx(
        (0, 1.95 + 12.706), rel=1e-4
    )
    assert summarize(tokens[tokens["window"] == 0])["n_windows"] == 1
    assert np.isnan(summarize(tokens[tokens["window"] == 0])["kld_mean_low"])


@pytest.mark.parametrize("windows", [3, 10, 40])
def test_an_interval_by_windows_holds_what_it_promises(windows):
    """Resampling three windows gave intervals that held the mean in three cases of four."""
    rng, held = np.random.default_rng(0), []
    for _ in range(200):
        kld = 1 + rng.normal(0, 0.1, windows).repeat(2)
        tokens = pd.DataFrame({"window": np.arange(windows).repeat(2), "kld": kld, "dp": 0.0})
        tokens = tokens.assign(logprob=-1.0, logprob_base=-1.0, same_top=True)
        row = summarize(tokens, resamples=300)
        held.append(row["kld_mean_low"] <= 1 <= row["kld_mean_high"])
        assert row["same_top_high"] == row["ppl_ratio_low"] == 1
    assert 0.9 <= np.mean(held) <= 0.99


@pytest.mark.parametrize(
    "values, expected",
    [([1.0] * 20, (1, 0)), ([0.0, 2.0] * 10, (1, 1 / np.sqrt(19))), ([0, 2], (1, 0))],
)
def test_mean_and_error(values, expected):
    assert mean_and_error(values) == pytest.approx(expected)
