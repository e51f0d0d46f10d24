"""Do heads look at tokens of similar meaning? Rank correlation of attention with the cosine of
token embeddings, the distance between the tokens regressed out; the baseline gives the embeddings
to other words."""

from collections.abc import Sequence

import numpy as np
import xarray as xr

from ..capture.finite import measured
from ..imports import uninterrupted
from ..maths import unit

MIN_KEYS = 8  # keys that a query must have for a rank correlation to mean anything


def sample_rows(n_tokens: int, count: int = 24, seed: int = 0) -> np.ndarray:
    """`count` query positions that have MIN_KEYS keys beside the first one, sorted; all of them
    where there are no more."""
    rows = np.arange(min(MIN_KEYS + 1, n_tokens - 1), n_tokens)
    return np.sort(np.random.default_rng(seed).choice(rows, min(count, len(rows)), replace=False))


def semantic_scores(
    attention: xr.DataArray | np.ndarray,
    rows: Sequence[int] | np.ndarray,
    ids: Sequence[int],
    embeddings: np.ndarray,
    shuffles: int = 20,
    seed: int = 0,
) -> np.ndarray:
    """Mean over query rows of the partial Spearman correlation of attention with cosine, given
    distance: (1 + shuffles, layer, head); after the first, embeddings are dealt to other words.

    attention: (layer, head, row, key) captured at query positions `rows`; ids: (n,) token ids;
    embeddings: (n, width) of the same tokens. Keys are those before the query without the first
    token and without the query's own token (a repeated word is a duplicate, not a relative). NaN
    where no row has 8 such keys."""
    with uninterrupted():
        from scipy.stats import rankdata

    rng, ids = np.random.default_rng(seed), np.asarray(ids)
    words, first, word_of = np.unique(ids, return_index=True, return_inverse=True)
    vectors = unit(embeddings[first]).astype(embeddings.dtype)
    cosine = vectors @ vectors.T  # (word, word)
    others = [rng.permutation(len(words)) for _ in range(shuffles)]
    deals = np.stack([np.arange(len(words)), *others])
    values = measured(attention)
    shape = values.shape[:2]
    total, count = np.zeros((len(deals), *shape)), 0
    for place, query in enumerate(rows):
        keys = np.flatnonzero(ids[1:query] != ids[query]) + 1
        if len(keys) < MIN_KEYS:
            continue
        against = cosine[deals[:, word_of[query], None], deals[:, word_of[keys]]]  # (deal, key)
        distance = rankdata(query - keys)
        a = _residual(rankdata(values[:, :, place, keys].reshape(-1, len(keys)), axis=1), distance)
        b = _residual(rankdata(against, axis=1), distance)
        total += (b @ a.T).reshape(len(deals), *shape)
        count += 1
    return total / count if count else np.full_like(total, np.nan)


def _residual(ranks, distance):
    """Rows of ranks, centred, without what is linear in the distance, of length 1 (0 where nothing
    is left)."""
    centred = ranks - ranks.mean(-1, keepdims=True)
    along = distance - distance.mean()
    along /= np.linalg.norm(along)
    left = centred - (centred @ along)[:, None] * along
    length = np.linalg.norm(left, axis=-1, keepdims=True)
    return left / np.where(length > 1e-9, length, np.inf)
