"""Quotients and correlations that are given only where they say something: NaN else, and the sentence says why."""

import numpy as np


def ratio(part, whole, noise=0.0):
    """part / whole where the whole stands out of its noise, |whole| > noise; NaN elsewhere. Arrays broadcast."""
    part, whole = np.broadcast_arrays(np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64))
    out = np.full(whole.shape, np.nan)
    np.divide(part, whole, out=out, where=np.abs(whole) > noise)
    return out if out.ndim else float(out)


def rank_correlation(a, b):
    """Spearman's rho of two columns, pairs with a NaN left out; NaN for fewer than three pairs or a constant column:
    two points always lie on a line, and a constant has no order."""
    from scipy.stats import spearmanr

    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    known = np.isfinite(a) & np.isfinite(b)
    a, b = a[known], b[known]
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(spearmanr(a, b)[0])


def some(value, text, otherwise="not to be had"):
    """`text` formatted with a value that is a number, else what is said instead: some(0.5, "{:.0%}")."""
    return text.format(value) if np.isfinite(value) else otherwise
