"""How far a quantization's predictions are from its reference's: per token, and summed up.

Definitions are those of llama.cpp's `llama-perplexity --kl-divergence`, without its rounding of the
reference's log probabilities to 16 bits. Everything is in nats and fractions. Pure functions on
arrays."""

from typing import TYPE_CHECKING

import numpy as np

from ..capture.finite import measured
from ..imports import uninterrupted
from ..maths import middle

if TYPE_CHECKING:  # workers import this, and pandas takes them a third of a second
    import pandas as pd

# A row of logits is scanned once, as 64 interleaved blocks, for all of its largest values.
BLOCKS = 64
ROWS = 8  # tokens at a time: their temporaries stay in the cores' caches
# Nats. A mean divergence below this cannot be told from 0: logits are 32-bit floats, whose sums are
# off by about 1e-6.
NOISE = 1e-5
FEW = 30  # blocks: below, what is drawn from them varies less than another text would
SAME = 1e-6  # of a number: what the order of a sum of 32-bit floats changes
PERCENTILES = {
    "max": 1.0,
    "p999": 0.999,
    "p99": 0.99,
    "p95": 0.95,
    "p90": 0.9,
    "median": 0.5,
    "p10": 0.1,
    "p05": 0.05,
    "p01": 0.01,
    "p001": 0.001,
    "min": 0.0,
}


def top_k(logits: np.ndarray, k: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """The k largest of each row, largest first and equal ones by id: values and ids, both (token,
    k).

    logits: (token, vocab) float32. A value among the k largest of a row lies in one of the k blocks
    with the largest maxima, so that one pass over the row finds them all."""
    n, vocab = logits.shape
    k, width = min(k, vocab), vocab // BLOCKS
    if width < k:
        ids = np.tile(np.arange(vocab), (n, 1))
    else:
        maxima = logits[:, : width * BLOCKS].reshape(n, BLOCKS, width).max(axis=1)  # (token, width)
        block = np.argpartition(maxima, width - k, axis=1)[:, width - k :]  # (token, k)
        ids = (block[:, :, None] + width * np.arange(BLOCKS)).reshape(n, -1)  # (token, k * BLOCKS)
        rest = np.arange(width * BLOCKS, vocab)  # what does not fill a block
        ids = np.concatenate([ids, np.tile(rest, (n, 1))], axis=1)
    values = np.take_along_axis(logits, ids, axis=1)
    order = np.lexsort((ids, -values), axis=1)[:, :k]
    return np.take_along_axis(values, order, axis=1), np.take_along_axis(ids, order, axis=1)


class Reference:
    """The reference's predictions for a few tokens, with what every candidate's comparison needs of
    them.

    logits: (token, vocab) float32, kept as a view. targets: (token,) ids that came next.
    """

    def __init__(self, logits: np.ndarray, targets: np.ndarray, k: int = 10):
        self.logits, self.targets, self.k = logits, np.asarray(targets), k
        values, self.top = top_k(logits, k)  # (token, k)
        shifted = logits - values[:, :1]  # (token, vocab)
        self.p = np.exp(shifted)
        # NumPy sums rows pairwise: 1e-7, where a running float32 sum of 50,000 has 1e-4.
        total = self.p.sum(axis=1)
        self.p /= total[:, None]
        self.lse = _lse(values, total)
        self.confidence = 1 / total.astype(np.float64)
        shifted *= self.p
        self.entropy = np.log(total.astype(np.float64)) - shifted.sum(axis=1)
        # llama-perplexity leaves out what the reference gives a log probability of -16 or less.
        self.p *= self.p > np.float32(np.exp(-16))
        self.mass = self.p.sum(axis=1, dtype=np.float64)
        self.logprob = _pick(logits, self.targets) - self.lse

    def compare(self, logits: np.ndarray) -> dict[str, np.ndarray]:
        """Per-token columns of one candidate's logits (token, vocab) for the same tokens: a dict of
        arrays (token,).

        logprob_base, logprob (of the token that came next, nats), entropy_base, confidence_base
        (the reference's probability of what it holds for likeliest), kld (nats), dp
        (difference of that token's probability), same_top, top5, top10 (share of the reference's 5
        or 10 likeliest found among the candidate's), top_base, top (ids)."""
        values, top = top_k(logits, self.k)
        lse = _lse(values, np.exp(logits - values[:, :1]).sum(axis=1))
        logprob = _pick(logits, self.targets) - lse
        # sum p_base (log p_base - log p), the two normalizers taken out of the sum
        difference = self.logits - logits
        difference *= self.p
        kld = difference.sum(axis=1).astype(np.float64) - self.mass * (self.lse - lse)
        found = self.top[:, :, None] == top[:, None, :]  # (token, k, k)
        return {
            "logprob_base": self.logprob,
            "logprob": logprob,
            "entropy_base": self.entropy,
            "confidence_base": self.confidence,
            "kld": kld,
            "dp": np.exp(logprob) - np.exp(self.logprob),
            "same_top": top[:, 0] == self.top[:, 0],
            "top5": found[:, :5, :5].any(axis=2).mean(axis=1),
            "top10": found.any(axis=2).mean(axis=1),
            "top_base": self.top[:, 0],
            "top": top[:, 0],
        }


class Predictions:
    """A reference's predictions of a text, prepared once for many candidates' divergences from
    them. logits: (token, vocab) float32. NotFiniteError where one is no number."""

    def __init__(self, logits: np.ndarray):
        logits = measured(logits)
        nobody = np.zeros(ROWS, int)  # which token came next does not matter to a divergence
        parts = [logits[i : i + ROWS] for i in range(0, len(logits), ROWS)]
        self.parts = [Reference(part, nobody[: len(part)], k=1) for part in parts]

    def divergence(self, logits: np.ndarray) -> np.ndarray:
        """KL divergence of each token's prediction in logits (token, vocab) from the reference's,
        nats (token,): the kld of Reference alone. NotFiniteError where one is no number."""
        logits = measured(logits)
        found = [one.compare(logits[n * ROWS :][:ROWS]) for n, one in enumerate(self.parts)]
        return np.concatenate([each["kld"] for each in found])


def _lse(values, total):
    """Log of the sum of exponentials, float64 (token,). values: (token, k), largest first; total:
    of exp(x - max)."""
    return values[:, 0].astype(np.float64) + np.log(total.astype(np.float64))


def _pick(logits, targets):
    return logits[np.arange(len(targets)), targets].astype(np.float64)


def mean_and_error(values: "np.ndarray | pd.Series") -> tuple[float, float]:
    """Mean and its standard error, as llama-perplexity has them: 0 for the error of ten values or
    fewer."""
    values = np.asarray(values, dtype=np.float64)
    mean = values.mean()
    variance = (values * values).mean() - mean * mean
    error = np.sqrt(variance / (len(values) - 1)) if variance > 0 and len(values) > 10 else 0.0
    return float(mean), float(error)


def summarize(tokens: "pd.DataFrame", seed: int = 0, resamples: int = 1000) -> dict[str, float]:
    """One row of numbers from a per-token table with columns window, logprob_base, logprob, kld,
    dp, same_top, ...

    Means carry their standard error as *_err over tokens, as llama-perplexity prints it; tokens of
    one window are not independent, so *_low and *_high give a 95% interval by whole windows:
    Student's of fewer than FEW, else from resampling them (Efron 1979); NaN for one, and for
    windows that are all the same."""
    nll, nll_base = -tokens["logprob"].to_numpy(), -tokens["logprob_base"].to_numpy()
    n = len(tokens)
    (mean, err), (mean_base, err_base) = mean_and_error(nll), mean_and_error(nll_base)
    covariance = ((nll * nll_base).mean() - mean * mean_base) / (n - 1) if n >= 10 else 0.0
    ratio_err = np.sqrt(max(0.0, err**2 + err_base**2 - 2 * covariance))
    row = {
        "ppl": np.exp(mean),
        "ppl_err": np.exp(mean) * err,
        "ppl_base": np.exp(mean_base),
        "ppl_base_err": np.exp(mean_base) * err_base,
        "ppl_ratio": np.exp(mean - mean_base),
        "ppl_ratio_err": np.exp(mean - mean_base) * ratio_err,
    }
    row["kld_mean"], row["kld_mean_err"] = mean_and_error(tokens["kld"])
    row |= {f"kld_{name}": _quantile(tokens["kld"], q) for name, q in PERCENTILES.items()}
    row["mean_dp"], row["mean_dp_err"] = mean_and_error(tokens["dp"])
    square, square_err = mean_and_error(tokens["dp"].to_numpy() ** 2)
    row["rms_dp"] = np.sqrt(square)
    row["rms_dp_err"] = 0.5 * square_err / row["rms_dp"] if square else 0.0
    row |= {f"dp_{name}": _quantile(tokens["dp"], q) for name, q in PERCENTILES.items()}
    same = row["same_top"] = tokens["same_top"].mean()
    row["same_top_err"] = np.sqrt(same * (1 - same) / (n - 1)) if n > 1 else 0.0
    row |= {name: tokens[name].mean() for name in ("top5", "top10") if name in tokens}
    row |= _intervals(tokens, seed, resamples)
    return {name: float(value) for name, value in row.items()} | {
        "n_tokens": n,
        "n_windows": tokens["window"].nunique(),
    }


def alike(means: np.ndarray) -> bool:
    """Whether windows or blocks have all the same mean, and that is not 0: copies of one text,
    which do not say how another one would do. Sums of floats in another order are the same."""
    size = np.abs(means).max()
    return bool(0 < size and np.ptp(means) <= SAME * size)


def students(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The ends of the 95% interval of a mean by blocks, Student's: (2, ...). sums: (block, ...) of
    each block's items; counts: (block,) of them."""
    with uninterrupted():
        from scipy.special import stdtrit

    n, mean = len(counts), sums.sum(axis=0) / counts.sum()
    apart = sums - np.multiply.outer(counts, mean)  # of each block, weighed by its items
    error = np.sqrt(n / (n - 1) * (apart * apart).sum(axis=0)) / counts.sum()
    return mean + np.multiply.outer(stdtrit(n - 1, [0.025, 0.975]), error)


def _quantile(values, q):
    return float(np.quantile(np.asarray(values, dtype=np.float64), q))


def _intervals(tokens, seed, resamples):
    windows = tokens.assign(log_ratio=tokens["logprob_base"] - tokens["logprob"]).groupby("window")
    names = ["kld_mean", "ppl_ratio", "same_top"]
    # Windows are of equal length: their means count alike.
    means = windows[["kld", "log_ratio", "same_top"]].mean().to_numpy(dtype=np.float64)
    ends = np.full((2, len(names)), np.nan)
    if len(means) < 2 or alike(means[:, 0]):
        pass  # nothing says how another text would do
    elif len(means) < FEW:
        ends = students(means, np.ones(len(means)))
        ends[0, 0] = max(ends[0, 0], min(0.0, means[:, 0].mean()))  # no divergence is below 0
        ends[:, 2] = ends[:, 2].clip(0, 1)
    else:
        draws = np.random.default_rng(seed).integers(len(means), size=(resamples, len(means)))
        ends = middle(means[draws].mean(axis=1))
    ends[:, 1] = np.exp(ends[:, 1])
    return {
        f"{name}_{end}": value
        for end, values in zip(("low", "high"), ends)
        for name, value in zip(names, values)
    }
