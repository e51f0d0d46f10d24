"""Contextual embeddings: the same word in different sentences, layer by layer."""

import numpy as np
import pandas as pd

from ..errors import EmbeddingError
from ..maths import unit


def word_position(tokens, word):
    """Position of the last token that is `word` (spaces aside). tokens: DataFrame with position and
    piece.

    EmbeddingError where no token is: the vocabulary splits the word, or the sentence does not have
    it."""
    at = [
        position
        for position, piece in zip(tokens.position, tokens.piece)
        if isinstance(piece, str) and piece.strip() == word
    ]
    if not at:
        pieces = [piece for piece in tokens.piece]
        raise EmbeddingError(
            f"{word!r} is no single token in {pieces}. Choose a word that this vocabulary keeps whole "
            "(word_table tells), and sentences that have it."
        )
    return int(at[-1])


def separation(vectors, labels, groups=None):
    """Mean cosine of pairs with the same label minus mean cosine of pairs with different labels.

    vectors: (n, embd); labels: (n,); groups: (n,), only pairs inside one group count (one word's
    senses), each group with the same weight. 0: labels tell nothing; at most 2. The mean row is
    subtracted first, so that a direction that all share does not count."""
    return _separation(_cosines(vectors), np.asarray(labels), _pairs(groups, len(labels)))


def separation_by_layer(layers, labels, groups=None, rounds=200, seed=0):
    """`separation` at every layer, beside what labels shuffled inside each group give.

    layers: (layer, n, embd). -> DataFrame indexed by layer: separation, shuffled (mean),
    shuffled_p95, agreement (share of rows whose nearest row of the same group has their label; ties
    count by their share), agreement_shuffled (mean)."""
    layers, labels = np.asarray(layers), pd.factorize(np.asarray(labels))[0]
    if layers.ndim != 3 or layers.shape[1] != len(labels):
        raise EmbeddingError(
            f"layers must be (layer, {len(labels)}, embd), one row per label, not {layers.shape}."
        )
    if not np.isfinite(layers).all():
        raise EmbeddingError(
            "The hidden states hold NaN or infinity: capture them again, or check the model file."
        )
    pairs, rng = _pairs(groups, len(labels)), np.random.default_rng(seed)
    trials = [_shuffle(labels, pairs, rng) for _ in range(rounds)]
    rows = []
    for layer in layers:
        cosine = _cosines(layer)  # (n, n)
        base = [_separation(cosine, trial, pairs) for trial in trials]
        near = [_agreement(cosine, trial, pairs) for trial in trials]
        rows.append(
            (
                _separation(cosine, labels, pairs),
                np.mean(base),
                np.quantile(base, 0.95),
                _agreement(cosine, labels, pairs),
                np.mean(near),
            )
        )
    columns = ["separation", "shuffled", "shuffled_p95", "agreement", "agreement_shuffled"]
    return pd.DataFrame(rows, columns=columns, index=pd.RangeIndex(len(layers), name="layer"))


def principal_plane(vectors):
    """The two directions of largest variance: (n, embd) -> (scores (n, 2), share of the variance
    (2,)); zeros where all rows are equal."""
    centred = np.asarray(vectors, np.float64) - np.mean(vectors, axis=0, dtype=np.float64)
    if not np.abs(centred).max() > 1e-6 * max(np.abs(vectors).max(), 1e-30):
        return np.zeros((len(centred), 2)), np.zeros(2)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    return left[:, :2] * values[:2], values[:2] ** 2 / (values**2).sum()


def _cosines(vectors):
    vectors = np.asarray(vectors, np.float64)
    rows = unit(vectors - vectors.mean(axis=0)).astype(np.float64)
    return rows @ rows.T


def _pairs(groups, n):
    """One index array per group."""
    codes = np.zeros(n, int) if groups is None else pd.factorize(np.asarray(groups))[0]
    members = [np.flatnonzero(codes == code) for code in range(codes.max() + 1)]
    if min(map(len, members)) < 3:
        raise EmbeddingError("Each group needs three rows or more: give more sentences per word.")
    return members


def _shuffle(labels, members, rng):
    out = labels.copy()
    for index in members:
        out[index] = rng.permutation(labels[index])
    return out


def _separation(cosine, labels, members):
    values = []
    for index in members:
        inside = cosine[np.ix_(index, index)]
        same = labels[index][:, None] == labels[index]
        apart = ~same
        np.fill_diagonal(same, False)
        if not same.any() or not apart.any():
            raise EmbeddingError(
                "Each group needs two labels, and two rows with one of them: add sentences."
            )
        values.append(inside[same].mean() - inside[apart].mean())
    return float(np.mean(values))


def _agreement(cosine, labels, members):
    values = []
    for index in members:
        inside = cosine[np.ix_(index, index)].copy()
        np.fill_diagonal(inside, -np.inf)
        nearest = inside >= inside.max(axis=1, keepdims=True) - 1e-9
        same = labels[index][:, None] == labels[index]
        values.append(((nearest & same).sum(axis=1) / nearest.sum(axis=1)).mean())
    return float(np.mean(values))
