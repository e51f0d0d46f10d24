"""Do heads look at tokens of similar meaning? Rank correlation of attention with the cosine of
token embeddings, the distance between the tokens regressed out; the baseline gives the embeddings
to other words."""

import numpy as np
import xarray as xr

from ..capture.finite import measured

MIN_KEYS = 8  # keys that a query must have for a rank correlation to mean anything


def sample_rows(n_tokens, count=24, seed=0, first=MIN_KEYS + 1):
    """`count` query positions from `first` on, sorted; all of them where there are no more."""
    rows = np.arange(min(first, n_tokens - 1), n_tokens)
    return np.sort(np.random.default_rng(seed).choice(rows, min(count, len(rows)), replace=False))


def semantic_scores(attention, rows, ids, embeddings, shuffles=20, seed=0):
    """Mean over query rows of the partial Spearman correlation of attention with cosine, given
    distance.

    attention: (layer, head, row, key) captured at query positions `rows`; ids: (n,) token ids;
    embeddings: (n, width) of the same tokens. Keys are those before the query without the first
    token and without the query's own token (a repeated word is a duplicate, not a relative).
    Returns (layer, head) and, with embeddings dealt to other words, (shuffle, layer, head); nan
    where no row has 8 such keys."""
    from scipy.stats import rankdata

    rng, ids = np.random.default_rng(seed), np.asarray(ids)
    unit = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    words, word_of = np.unique(ids, return_inverse=True)
    vectors = unit[[np.flatnonzero(ids == word)[0] for word in words]]
    cosine = vectors @ vectors.T  # (word, word)
    deals = np.stack(
        [np.arange(len(words)), *(rng.permutation(len(words)) for _ in range(shuffles))]
    )
    values = measured(attention)
    shape = values.shape[:2]
    total, count = np.zeros((len(deals), *shape)), 0
    for place, query in enumerate(rows):
        keys = np.flatnonzero(ids[1:query] != ids[query]) + 1
        if len(keys) < MIN_KEYS:
            continue
        against = np.stack(
            [cosine[deal[word_of[query]], deal[word_of[keys]]] for deal in deals]
        )  # (deal, key)
        distance = rankdata(query - keys)
        a = _residual(rankdata(values[:, :, place, keys].reshape(-1, len(keys)), axis=1), distance)
        b = _residual(rankdata(against, axis=1), distance)
        total += (b @ a.T).reshape(len(deals), *shape)
        count += 1
    mean = total / count if count else np.full_like(total, np.nan)
    return mean[0], mean[1:]


def _residual(ranks, distance):
    """Rows of ranks, centred, without what is linear in the distance, of length 1 (0 where nothing
    is left)."""
    centred = ranks - ranks.mean(-1, keepdims=True)
    along = distance - distance.mean()
    along /= np.linalg.norm(along)
    left = centred - (centred @ along)[:, None] * along
    length = np.linalg.norm(left, axis=-1, keepdims=True)
    return left / np.where(length > 1e-9, length, np.inf)


def add_semantic(scores, found):
    """A collected Dataset with "semantic" and its baseline. found: {text name: what semantic_scores
    returned}."""
    shape = (scores.sizes["layer"], scores.sizes["head"])
    n_shuffles = len(next(iter(found.values()))[1])
    empty = np.full(shape, np.nan), np.full((n_shuffles, *shape), np.nan)
    value, null = zip(*[found.get(str(name), empty) for name in scores["text"].values])
    return scores.assign(
        {
            "semantic": xr.DataArray(np.stack(value), dims=("text", "layer", "head")),
            "semantic~": xr.DataArray(np.stack(null), dims=("text", "shuffle", "layer", "head")),
        }
    )
