"""Sentences under the figures of token embeddings: each says what its numbers say, computed, never
fixed. Arguments are what the measures of this room return; `tokens` is `vectors.token_table`."""

import numpy as np
import pandas as pd

from ..views.sentences import counted, listed, quoted, sentence, some
from .groups import Projections
from .vectors import effective_rank


@sentence
def norms(tokens: pd.DataFrame) -> str:
    x, by_kind = tokens["norm"], tokens.groupby("kind")["norm"]
    said = f"Norms run from {x.min():.3g} to {x.max():.3g}, with median {x.median():.3g}."
    medians = by_kind.median()[by_kind.size() >= 5].sort_values()
    if len(medians) < 2:
        return said
    low, high = (f"{medians.index[end]!r} ({medians.iloc[end]:.3g})" for end in (0, -1))
    return f"{said} Of kinds with five or more, {low} has the smallest median, {high} the largest."


@sentence
def cosines(anisotropy: float, raw: np.ndarray, centred: np.ndarray) -> str:
    sample = f"{raw.mean():.3f} ± {raw.std() / len(raw) ** 0.5:.3f} in the sample"
    said = f"The mean cosine of two tokens is {anisotropy:.3f} over all pairs ({sample})."
    without = f"without the mean row {np.mean(centred > 0):.0%} (mean {centred.mean():.3f})"
    return f"{said} {np.mean(raw > 0):.0%} of random pairs have a cosine above 0, {without}."


@sentence
def spectrum(spectra: dict[str, np.ndarray]) -> str:
    ranks = [f"{effective_rank(values):.0f} ({name})" for name, values in spectra.items()]
    energy = next(iter(spectra.values())) ** 2
    share, n = np.cumsum(energy) / energy.sum(), len(energy)
    said = f"Effective ranks, at most {n}: {listed(ranks)}. The first direction holds"
    most = f"{(share < 0.9).sum() + 1} of {n} directions hold 90%"
    return f"{said} {share[0]:.1%} of the squared norm as stored, and {most}."


@sentence
def central(tokens: pd.DataFrame) -> str:
    cosine, pieces = tokens.mean_cosine, tokens.sort_values("mean_cosine").piece.map(quoted)
    said = f"Most central (mean cosine to all others up to {cosine.max():.3f}): {listed(pieces[:-6:-1])}."
    return f"{said} Farthest from the rest (down to {cosine.min():.3f}): {listed(pieces[:5])}."


@sentence
def unused(table: pd.DataFrame, tokens: pd.DataFrame) -> str:
    if not len(table):
        return "Nothing here tells an unused token: no mark in the file, no equal rows, no zeros, no impossible byte."
    close = table.score[table.why == "as close to those"]
    theirs, every = table["norm"], tokens["norm"]
    said = f"{len(table) - len(close):,} tokens are known to be unused by their row, their byte or the file"
    said += f"; {len(close):,} more are as close to those{some(close.min(), ' as a cosine of {:.2f}', '')}."
    rest = every.drop(table.id)
    if not len(rest):
        return f"{said} No token is left that they could be told apart from."
    low, high = rest.quantile([0.01, 0.99])
    would = "would" if theirs.quantile(0.75) < low or theirs.quantile(0.25) > high else "would not"
    medians = f"median {theirs.median():.3g}, the vocabulary's {every.median():.3g}"
    return f"{said} Their norms ({medians}) {would} tell them apart from the rest."


@sentence
def words(table: pd.DataFrame) -> str:
    split = f"this vocabulary splits {listed(table.attrs['skipped'])}"
    return f"{len(table)} words of {table.category.nunique()} categories are one token; {split}."


@sentence
def projections(maps: Projections, what: str) -> str:
    kept = listed(f"{name} {share:.0%}" for name, share in maps.kept.items())
    said = f"Of each token's {maps.k} nearest neighbours among these {what}, three dimensions keep: {kept}."
    variance = some(maps.variance, "Three principal components hold {:.0%} of the variance.", "")
    return f"{said} {variance}"


@sentence
def agreement(table: pd.DataFrame) -> str:
    purity = table.loc[("categories", "purity")]
    if np.isnan(purity.value):
        return "The words are of one category, or each of its own: there is nothing that clusters could agree with."
    said = f"{purity.value:.0%} of a word's nearest neighbours share its category; shuffled, {purity.shuffled:.0%}."
    for name, row in table.xs("adjusted Rand", level="measure").iterrows():
        index = some(row.value, "adjusted Rand index {:.2f}", "nothing to compare")
        chance = some(row.shuffled_p95, " (95% of shuffles: at most {:.2f})", "")
        clusters = counted(int(row.clusters), "cluster")
        said += f" {name}: {clusters}, {row.noise:.0%} noise, {index}{chance}."
    return said


@sentence
def contingency(table: pd.DataFrame, name: str) -> str:
    found = table.loc[:, table.columns >= 0]
    most = (found.div(table.sum(axis=1), axis=0) >= 0.9) & (found.div(found.sum()) >= 0.9)
    pure = table.index[most.any(axis=1)]
    said = f"{name}: one cluster holds nine tenths of the words and little else"
    return f"{said} for {len(pure)} of {len(table)} categories: {listed(pure)}."


@sentence
def isolated(table: pd.DataFrame) -> str:
    said = f"Cosine of {len(table):,} sampled tokens to their nearest neighbours"
    return f"{said}: median {table.cosine.median():.2f}, least {table.cosine.min():.2f}."


@sentence
def network(nodes: pd.DataFrame, edges: pd.DataFrame, tokens: pd.DataFrame, least: float) -> str:
    if not len(edges):
        return f"No pair reaches a cosine of {least:g}: lower the threshold."
    alone = len(nodes) - len(np.union1d(edges.src, edges.dst))
    inside = np.equal(*(nodes.category[edges[end]].to_numpy() for end in ("src", "dst"))).mean()
    chance = nodes.category.value_counts(normalize=True).pow(2).sum()
    said = f"{alone:,} of {len(nodes):,} tokens have no edge of cosine {least:g} or more. Of {len(edges):,}"
    said += f" edges, {inside:.0%} stay inside one category; by chance {chance:.0%}."
    hub = f"{quoted(tokens.piece[nodes.named.idxmax()])} is a near neighbour of {nodes.named.max():,} others"
    return f"{said} {hub}, the most; {(nodes.named == 0).sum():,} are near neighbours of no other."


@sentence
def analogies(table: pd.DataFrame) -> str:
    ranks, without = table["rank"], table["rank_without"]
    first, alone = f"{(ranks == 1).mean():.0%}", f"{(without == 1).mean():.0%} without the offset"
    said = f"The expected token comes first in {first} of {len(table)} questions, in {alone}."
    return f"{said} The offset worsens the rank of {listed(map(repr, table.d[ranks > without]))}."


@sentence
def separation(table: pd.DataFrame, what: str) -> str:
    best = table.loc[table.separation.idxmax()]
    first = round(table.separation.iloc[0], 2) + 0.0  # no "-0.00"
    clear = table.shuffled_p95 + 1e-9  # equal rows differ by rounding
    above = table.index[table.separation > clear]
    if not len(above):
        return f"At no layer does {what} separate better than 95% of shuffled labels do."
    said = f"Separation by {what} is {first:.2f} at layer 0 and largest, {best.separation:.2f}, at layer {best.name};"
    said += f" it is above 95% of shuffled labels at {len(above)} of {len(table)} layers, first at layer {above[0]}."
    near, chance = best.agreement, best.agreement_shuffled
    return f"{said} There the nearest other one has the same label for {near:.0%}; shuffled, {chance:.0%}."


@sentence
def control(table: pd.DataFrame, before: pd.DataFrame) -> str:
    best, more = int(before.separation.idxmax()), table.index[table.separation > before.separation]
    said = f"The token before the word reaches {before.separation[best]:.2f} at layer {best}"
    return f"{said}; the word separates more at {len(more)} of {len(table)} layers."


@sentence
def planes(table: pd.DataFrame) -> str:
    senses, apart = table.sense.unique(), table.groupby("layer").apart.first()
    if len(senses) < 2:
        return f"All sentences have one sense, {senses[0]!r}: there is none to be apart from."
    values = listed(f"{value:.1f} at layer {layer}" for layer, value in apart.items())
    return f"Distance of {senses[0]!r} from {senses[1]!r} over their own spread: {values}."


@sentence
def server(row: pd.Series, first: pd.Series) -> str:
    said = f"llama-server's embeddings separate topics by {row.separation:.2f}, bare token embeddings by"
    said += f" {first.separation:.2f}; 95% of shuffles by at most {row.shuffled_p95:.2f}. {row.agreement:.0%}"
    return f"{said} have their nearest in their own topic; shuffled, {row.agreement_shuffled:.0%}."


@sentence
def sentences(cosines: np.ndarray, topics: pd.DataFrame) -> str:
    topic, upper = topics.topic.to_numpy(), np.triu(np.ones_like(cosines, bool), 1)
    closest = []
    for pairs in (upper, upper & (topic[:, None] != topic)):
        a, b = np.unravel_index(np.where(pairs, cosines, -np.inf).argmax(), cosines.shape)
        named = f"{topics.text[a]!r} and {topics.text[b]!r}, {cosines[a, b]:.2f}"
        closest.append(named if pairs.any() else "none")
    return f"Closest: {closest[0]}. Closest of two topics: {closest[1]}."


@sentence
def precision(table: pd.DataFrame, k: int, reference: str, other: str) -> str:
    cosine, error, kept = table.cosine, table.relative_error.mean(), table.overlap
    said = f"To {reference}, rows of {other} have a cosine of {cosine.mean():.5f} on average and {cosine.min():.5f} at"
    said += f" worst, and differ by {error:.2%} of their norm. Of each token's {k} nearest neighbours {kept.mean():.0%}"
    return f"{said} stay; {(kept == 1).mean():.0%} of tokens keep all {k}."
