"""Mathematics that several subjects share. Quotients and correlations are given only where they say
something: NaN else, and the sentence says why."""

import math
from collections.abc import Iterator
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import EmbeddingError
from .imports import uninterrupted


def ratio(part: ArrayLike, whole: ArrayLike, noise: ArrayLike = 0.0) -> NDArray[np.float64]:
    """part / whole where the whole stands out of its noise, |whole| > noise; NaN elsewhere. Arrays
    broadcast; of two numbers the quotient has no dims."""
    part, whole = np.broadcast_arrays(
        np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    )
    out = np.full(whole.shape, np.nan)
    np.divide(part, whole, out=out, where=np.abs(whole) > noise)
    return out


def rank_correlation(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's rho of two columns, pairs with a NaN left out; NaN for fewer than three pairs or a
    constant column: two points always lie on a line, and a constant has no order."""
    with uninterrupted():
        from scipy.stats import spearmanr

    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    known = np.isfinite(a) & np.isfinite(b)
    a, b = a[known], b[known]
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(spearmanr(a, b)[0])


def middle(drawn: ArrayLike) -> NDArray[np.float64]:
    """The ends of what 95% of resamples hold, (resample, ...) -> (2, ...): the percentile interval
    of a bootstrap (Efron 1979). What is drawn, texts, heads or windows, is the caller's to know."""
    return np.quantile(np.asarray(drawn), [0.025, 0.975], axis=0)


def jensen_shannon(p: ArrayLike, q: ArrayLike) -> NDArray[np.floating]:
    """Jensen-Shannon divergence of distributions along the last axis, in bits: 0 for the same, 1
    for disjoint ones (Lin 1991). Arrays (..., n) that broadcast, NumPy's or CuPy's, -> (...)
    float64; rows need not have been normalized to the last bit."""
    p, q = _float64(p), _float64(q)
    nats = entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2
    return (nats / math.log(2)).clip(0, 1)


def _float64(x: ArrayLike) -> NDArray[np.float64]:
    """An array of float64: NumPy's, or CuPy's where it was one."""
    if not hasattr(x, "__cuda_array_interface__"):
        return np.asarray(x, dtype=np.float64)
    return x.astype(np.float64, copy=False)  # type: ignore[union-attr]  # CuPy's


def softmax(x: ArrayLike, axis: int = -1) -> NDArray[np.float64]:
    """exp(x) / sum exp(x) in float64; -inf gives exactly 0."""
    x = np.asarray(x, dtype=np.float64)
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def log_softmax(logits: ArrayLike) -> NDArray[np.float32]:
    """(row, vocab) natural log-probabilities, float32."""
    logits = np.asarray(logits, dtype=np.float32)
    shifted = logits - logits.max(-1, keepdims=True)
    total = np.exp(shifted).sum(-1, keepdims=True, dtype=np.float64)
    return shifted - np.log(total).astype(np.float32)


def unit(rows: ArrayLike) -> NDArray[np.float32]:
    """Rows scaled to length 1; a row of zeros stays zero. (n, width) -> (n, width) float32"""
    rows = np.asarray(rows)
    length = np.linalg.norm(rows.astype(np.float64), axis=-1, keepdims=True)
    return (rows / np.where(length == 0, 1, length)).astype(np.float32)


BLOCK = 8192  # rows per temporary, of wide rows fewer:
_ELEMENTS = 1 << 22  # 32 MiB of float64: larger ones are fresh pages each time, which cost more


class Matrix(Protocol):
    """An array (n, width), or what gives its rows by slices and ids."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, rows: Any, /) -> Any: ...


Some = TypeVar("Some", bound=Matrix)


def check_rows(matrix: Some) -> Some:
    """The matrix itself, or EmbeddingError: not two-dimensional, fewer than two rows, NaN or
    infinity (ids named)."""
    if len(matrix.shape) != 2 or len(matrix) < 2:
        raise EmbeddingError(
            f"Embeddings are (vocabulary, width) with two rows or more, not {matrix.shape}."
        )
    for start, block in blocks(matrix):
        bad = start + np.flatnonzero(~np.isfinite(block).all(axis=1))
        if len(bad):
            raise EmbeddingError(
                f"NaN or infinity in the row of token {', '.join(map(str, bad[:8]))}"
                f"{' and more' if len(bad) > 8 else ''}: the file is damaged, or its type is read "
                "wrongly. Fetch it again, or leave those rows out."
            )
    return matrix


def blocks(matrix: Matrix, size: int | None = None) -> Iterator[tuple[int, NDArray]]:
    """Yields (first row, (<= size, width) rows)."""
    width = math.prod(matrix.shape[1:])
    size = size or max(1, min(BLOCK, _ELEMENTS // max(1, width)))
    for start in range(0, len(matrix), size):
        yield start, matrix[start : start + size]


def entropy(p: ArrayLike, axis: int = -1) -> NDArray[np.float64]:
    """Shannon entropy of distributions along an axis, in nats; 0 log 0 is 0. (..., n) -> (...)
    float64. A CuPy array is worked on where it lies."""
    p = _float64(p)
    if isinstance(p, np.ndarray):
        with uninterrupted():
            from scipy.special import entr
    else:
        from cupyx.scipy.special import entr
    return entr(p).sum(axis=axis)
