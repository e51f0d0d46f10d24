"""Contextual embeddings: the same word in different sentences, and whole sentences, layer by
layer."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import ArrayLike

from ..capture.data import Capture
from ..errors import EmbeddingError
from ..imports import uninterrupted
from ..maths import unit
from .vectors import word_table

_OF_TOKENS = ["token", "token_id", "token_text", "token_position"]


def occurrences(
    senses: Mapping[str, Mapping[str, Sequence[str]]], pieces: Sequence[str | bytes]
) -> pd.DataFrame:
    """The sentences of the words that are one token of a vocabulary: DataFrame (word, sense, text).

    senses: {word: {sense: [sentence, ...]}}. EmbeddingError where no word is one token."""
    known = set(word_table(pieces, {"": list(senses)}).word)
    rows = [
        (word, sense, text)
        for word in senses
        if word in known
        for sense, texts in senses[word].items()
        for text in texts
    ]
    return pd.DataFrame(rows, columns=["word", "sense", "text"])


def topics(sentences: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """Sentences by topic, {topic: [sentence, ...]}, as a DataFrame (topic, label, text); a label is
    the topic and a number."""
    rows = [
        (topic, f"{topic} {number}", text)
        for topic, texts in sentences.items()
        for number, text in enumerate(texts, 1)
    ]
    return pd.DataFrame(rows, columns=["topic", "label", "text"])


def word_position(tokens: pd.DataFrame, word: str) -> int:
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
        raise EmbeddingError(
            f"{word!r} is no single token in {list(tokens.piece)}. Choose a word that this vocabulary "
            "keeps whole (word_table tells), and sentences that have it."
        )
    return int(at[-1])


def word_states(states: xr.Dataset, words: Sequence[str]) -> xr.Dataset:
    """The residual stream at one word of each text and at the token before it.

    states: of engine.collect(texts, "hidden", pool=None); words: one per text. -> at_word, before:
    (layer, occurrence, embd); id: (occurrence,), the word's token. Only these rows are read."""
    at = []
    for first, count, word in zip(states.start.values, states.n_tokens.values, words):
        pieces = states.token.values[first : first + count]
        tokens = pd.DataFrame({"position": range(count), "piece": pieces})
        at.append((first + word_position(tokens, word), first))
    here, first = np.array(at).T
    rows = {"at_word": here, "before": np.maximum(here - 1, first)}
    found = {
        name: states.hidden.isel(token=place).drop_vars(_OF_TOKENS) for name, place in rows.items()
    }
    found["id"] = states.token_id.isel(token=here).drop_vars(_OF_TOKENS)
    return xr.Dataset(found).rename(token="occurrence").transpose("layer", ...).load()


def sentence_states(captures: Iterable[Capture]) -> xr.Dataset:
    """Means over the tokens of each capture (stages "hidden", "final_norm").

    -> hidden: (layer, sentence, embd), each token's state first scaled to length 1, since one
    token's can be far longer than the others' together; final_norm: (sentence, embd), as it is."""
    found = []
    for capture in captures:
        hidden = capture.hidden.copy(data=unit(capture.hidden)).mean("token")
        rows = {"hidden": hidden, "final_norm": capture["final_norm"].mean("token")}
        found.append(xr.Dataset(rows))
    return xr.concat(found, dim="sentence").transpose("layer", ...)


def same_direction(first: ArrayLike, second: ArrayLike) -> np.ndarray:
    """Cosine of each row with the other table's. (n, width), (n, width) -> (n,) float32"""
    return (unit(first) * unit(second)).sum(axis=1)


def centred_cosines(vectors: ArrayLike) -> np.ndarray:
    """Cosines of all pairs of rows minus their mean row, so that a direction that all share does
    not count. (n, width) -> (n, n) float64"""
    vectors = np.asarray(vectors, np.float64)
    rows = unit(vectors - vectors.mean(axis=0)).astype(np.float64)
    return rows @ rows.T


def separation_by_layer(
    layers: ArrayLike,
    labels: ArrayLike,
    groups: ArrayLike | None = None,
    rounds: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """How far labels lie apart at every layer, beside what labels shuffled inside each group give.

    Separation: mean cosine of pairs with the same label minus mean cosine of pairs with different
    labels, after the mean row is subtracted; 0: labels tell nothing; at most 2. Agreement: share of
    rows whose nearest row has their label; ties count by their share. layers: (layer, n, embd);
    labels: (n,); groups: (n,), only rows of one group are compared (one word's senses), each group
    with the same weight.

    -> DataFrame indexed by layer: separation, shuffled (mean), shuffled_p95, agreement,
    agreement_shuffled (mean)."""
    states, codes = np.asarray(layers), pd.factorize(np.asarray(labels))[0]
    n = len(codes)
    if states.ndim != 3 or states.shape[1] != n:
        raise EmbeddingError(
            f"layers must be (layer, {n}, embd), one row per label, not {states.shape}."
        )
    if not np.isfinite(states).all():
        raise EmbeddingError(
            "The hidden states hold NaN or infinity: capture them again, or check the model file."
        )
    members, rng = _members(groups, n), np.random.default_rng(seed)
    trials = [_shuffle(codes, members, rng) for _ in range(rounds)]
    rows = []
    for layer in states:
        cosine = centred_cosines(layer)
        base = [_separation(cosine, trial, members) for trial in trials]
        near = [_agreement(cosine, trial, members) for trial in trials]
        value, agreement = (of(cosine, codes, members) for of in (_separation, _agreement))
        rows.append((value, np.mean(base), np.quantile(base, 0.95), agreement, np.mean(near)))
    columns = ["separation", "shuffled", "shuffled_p95", "agreement", "agreement_shuffled"]
    return pd.DataFrame(rows, pd.RangeIndex(len(states), name="layer"), columns)


def _members(groups, n):
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


def planes(
    states: xr.DataArray, occurrences: pd.DataFrame, word: str, panels: int = 6
) -> pd.DataFrame:
    """One word's occurrences in the plane of largest variance, at layer 0 and at layers spread
    evenly over the rest.

    states: (layer, occurrence, embd); occurrences: DataFrame (word, sense, text). -> DataFrame, one
    row per layer and occurrence: layer, sense, text, x, y, variance (share that the plane holds; 0,
    as x and y are, where all are one point), apart (distance of the first two senses' means over
    their own spread). EmbeddingError where the word has no occurrence."""
    one = (occurrences.word == word).to_numpy()
    if not one.any():
        known = ", ".join(sorted(set(occurrences.word)))
        raise EmbeddingError(f"No sentences with {word!r} as one token: choose one of {known}.")
    places = np.linspace(1, states.sizes["layer"] - 1, panels - 1).round().astype(int)
    tables = []
    for layer in states.layer.to_numpy()[np.unique([0, *places])]:
        scores, variance = principal_plane(states.sel(layer=layer).to_numpy()[one])
        table = occurrences.loc[one, ["sense", "text"]].assign(x=scores[:, 0], y=scores[:, 1])
        tables.append(table.assign(layer=int(layer), variance=variance, apart=_apart(table)))
    return pd.concat(tables, ignore_index=True)


def _apart(points):
    """Distance of the means of the first two senses, over the spread inside them; 0 for one sense
    and for one point."""
    senses = points.groupby("sense", sort=False)[["x", "y"]]
    means, spread = senses.mean().to_numpy(), senses.var(ddof=0).sum(axis=1)[:2].mean() ** 0.5
    return float(np.linalg.norm(means[0] - means[1]) / spread) if len(means) > 1 and spread else 0.0


def principal_plane(vectors: ArrayLike) -> tuple[np.ndarray, float]:
    """The two directions of largest variance: (n, embd) -> (scores (n, 2), the share of the
    variance that they hold); zeros where all rows are equal."""
    with uninterrupted():
        from sklearn.decomposition import PCA

    vectors = np.asarray(vectors, np.float64)
    centred = vectors - vectors.mean(axis=0)
    if not np.abs(centred).max() > 1e-6 * max(np.abs(vectors).max(), 1e-30):
        return np.zeros((len(vectors), 2)), 0.0
    plane = PCA(2, svd_solver="full")
    return plane.fit_transform(vectors), float(plane.explained_variance_ratio_.sum())
