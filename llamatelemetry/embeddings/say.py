"""Sentences under the embedding figures: each says what its numbers say, computed, never fixed."""

import numpy as np

from ..maths import ratio
from ..views.sentences import some
from ..views.text import quoted


def _quoted(pieces, limit=6):
    return ", ".join(map(quoted, list(pieces)[:limit]))


def words_sentence(table):
    """table: `word_table`."""
    skipped = table.attrs.get("skipped", [])
    text = f"{len(table)} words in {table.category.nunique()} categories are one token each"
    if not skipped:
        return text + "; none had to be left out."
    return text + f"; left out, because this vocabulary splits them: {', '.join(skipped)}."


def norm_sentence(norms, kinds):
    norms, kinds = np.asarray(norms), np.asarray(kinds)
    names = [name for name in dict.fromkeys(kinds.tolist()) if (kinds == name).sum() >= 5] or list(
        dict.fromkeys(kinds)
    )
    medians = {name: float(np.median(norms[kinds == name])) for name in names}
    low, high = min(medians, key=medians.get), max(medians, key=medians.get)
    text = (
        f"Norms run from {norms.min():.3g} to {norms.max():.3g}, with median {np.median(norms):.3g} and a spread "
        f"(standard deviation over mean) of {some(ratio(norms.std(), norms.mean()), '{:.1%}', 'none')}."
    )
    if low == high:
        return text
    return text + (
        f" Of kinds with five tokens or more, {low!r} has the smallest median ({medians[low]:.3g}), "
        f"{high!r} the largest ({medians[high]:.3g})."
    )


def spectrum_sentence(rank, rank_centred, rank_random, values, width):
    """Effective ranks of the matrix, the centred one and a random one; values: singular values as
    stored."""
    energy = np.asarray(values) ** 2 / np.sum(np.asarray(values) ** 2)
    most = int(np.searchsorted(np.cumsum(energy), 0.9)) + 1
    return (
        f"The effective rank is {rank:.0f} of {width} ({rank_centred:.0f} without the mean row, {rank_random:.0f} "
        f"for a random matrix of this shape). The first direction holds {energy[0]:.1%} of the squared "
        f"norm, and {most} of {width} directions hold 90% of it."
    )


def anisotropy_sentence(value, raw, centred, n):
    """value: exact over all pairs; raw, centred: cosines of random pairs."""
    error = np.std(raw) / np.sqrt(len(raw))
    return (
        f"Two different tokens have a mean cosine of {value:.3f} over all {n * (n - 1) // 2:,} pairs (random "
        f"sample: {np.mean(raw):.3f} ± {error:.3f}); without the mean row it is {np.mean(centred):.3f}. "
        f"{np.mean(np.asarray(raw) > 0):.0%} of random pairs point the same way (cosine above 0), "
        f"{np.mean(np.asarray(centred) > 0):.0%} after centring."
    )


def projection_sentence(kept, k, variance, what):
    """kept: {view: mean share of the k nearest neighbours kept}; variance: share that 3 principal
    components hold."""
    best = max(kept, key=kept.get)
    shares = ", ".join(f"{name} {share:.0%}" for name, share in kept.items())
    return (
        f"Of each token's {k} nearest neighbours among these {what}, the three dimensions keep: {shares}. "
        f"Neighbourhoods are read best in {best}; three principal components hold "
        f"{some(variance, '{:.0%}', 'none')} of the variance."
    )


def clusters_sentence(table):
    """table: `cluster_agreement`."""
    purity = table.loc[("categories", "purity")]
    parts = [
        f"{purity.value:.0%} of a word's nearest neighbours share its category "
        f"(shuffled labels: {purity.shuffled:.0%})."
        if np.isfinite(purity.value)
        else "The words are of one category, or each of its own: there is nothing that clusters could agree with."
    ]
    for name in [
        grouping
        for grouping in dict.fromkeys(table.index.get_level_values(0))
        if grouping != "categories"
    ]:
        row = table.loc[(name, "adjusted Rand")]
        noise = f", {row.noise:.0%} noise" if row.noise else ""
        if np.isnan(row.value) or np.isnan(purity.value):
            parts.append(
                f"{name} finds {row.clusters:.0f} cluster(s){noise}: nothing to compare with the categories."
            )
            continue
        above = "above" if row.value > row.shuffled_p95 else "not above"
        parts.append(
            f"{name} finds {row.clusters:.0f} clusters{noise}, adjusted Rand index {row.value:.2f}, {above} "
            f"95% of shuffles ({row.shuffled_p95:.2f})."
        )
    return " ".join(parts)


def contingency_sentence(table, name):
    """table: `contingency`: which categories one cluster holds nearly alone, and which are spread
    most."""
    found = table[[cluster for cluster in table.columns if cluster >= 0]]
    if not found.shape[1]:
        return f"{name} calls every word noise."
    pure = [
        category
        for category, row in found.iterrows()
        if row.max() >= 0.9 * table.loc[category].sum()
        and row.max() >= 0.9 * found[row.idxmax()].sum()
    ]
    spread = (found.max(axis=1) / table.sum(axis=1)).sort_values()
    named = f" ({', '.join(pure)})" if pure else ""
    return (
        f"{name}: for {len(pure)} of {len(table)} categories{named} one cluster holds nine tenths of its words and "
        f"little else. Spread most is {spread.index[0]!r}: {spread.iloc[0]:.0%} of its words "
        "are in one cluster."
    )


def whole_sentence(kept, k, n, kinds, points, sample):
    """kept: mean share of the k nearest neighbours that the map of all n tokens keeps; points: (n,
    3); sample: ids."""
    kinds, points = np.asarray(kinds), np.asarray(points, np.float64)
    spread = {
        kind: float(
            np.linalg.norm(
                points[kinds == kind] - points[kinds == kind].mean(axis=0), axis=1
            ).mean()
        )
        for kind in sorted(set(kinds.tolist()))
        if (kinds == kind).sum() >= 20
    }
    text = f"The map of {n:,} tokens keeps {kept:.0%} of the {k} nearest neighbours of {len(sample):,} tokens."
    if len(spread) < 2:
        return text
    return text + (
        f" Tokens of kind {min(spread, key=spread.get)!r} lie closest to their own centre, those of kind "
        f"{max(spread, key=spread.get)!r} farthest from it."
    )


def pairs_sentence(cosines, texts, labels):
    """The closest pair of sentences, and the closest of two topics. cosines: (n, n)"""
    labels = np.asarray(labels)
    upper = np.triu(np.ones_like(cosines, bool), 1)
    a, b = np.unravel_index(np.where(upper, cosines, -np.inf).argmax(), cosines.shape)
    across = upper & (labels[:, None] != labels)
    c, d = np.unravel_index(np.where(across, cosines, -np.inf).argmax(), cosines.shape)
    if not across.any():
        return f"Closest: {texts[a]!r} and {texts[b]!r} ({cosines[a, b]:.2f}). There is one topic."
    return (
        f"Closest: {texts[a]!r} and {texts[b]!r} ({cosines[a, b]:.2f}). Closest of two topics: {texts[c]!r} "
        f"({labels[c]}) and {texts[d]!r} ({labels[d]}), {cosines[c, d]:.2f}."
    )


def hubs_sentence(neighbors, pieces):
    """neighbors: (n, k) indices; pieces: (n,). Hubs (Radovanovic et al. 2010): rows that many have
    as a neighbour."""
    named = np.bincount(np.asarray(neighbors).ravel(), minlength=len(pieces))
    order = np.argsort(-named, kind="stable")
    top = max(len(pieces) // 100, 1)
    return (
        f"{named[order[:top]].sum() / named.sum():.0%} of all places in the neighbour lists go to "
        f"{top:,} of {len(pieces):,} tokens, most ({named[order[0]]:,}) to {quoted(pieces[order[0]])}; "
        f"{(named == 0).sum():,} tokens are nobody's neighbour."
    )


def network_sentence(edges, n_nodes, parts, threshold, labels=None):
    """edges: `neighbor_edges`; parts: `components`; labels: Series of names by token id, to count
    edges inside one."""
    if not len(edges):
        return f"No pair reaches a cosine of {threshold:g}: lower the threshold."
    alone = n_nodes - len(set(edges.src) | set(edges.dst))
    text = ""
    if labels is not None:
        inside = (labels[edges.src].to_numpy() == labels[edges.dst].to_numpy()).mean()
        chance = labels.value_counts(normalize=True).pow(2).sum()
        text = f" {inside:.0%} of edges stay inside one category; by chance {chance:.0%}."
    return (
        f"{n_nodes:,} tokens, {len(edges):,} edges of cosine {edges.cosine.min():.2f} to {edges.cosine.max():.2f}; "
        f"{edges.mutual.mean():.0%} are mutual. The largest connected part has "
        f"{np.bincount(parts).max():,} tokens; {alone:,} have no edge at threshold {threshold:g}."
        + text
    )


def central_sentence(statistics, pieces):
    """statistics: `token_statistics`."""
    order = np.argsort(statistics.mean_cosine.to_numpy())
    low, high = order[:5], order[::-1][:5]
    return (
        f"Most central (mean cosine to all others up to {statistics.mean_cosine.max():.3f}): "
        f"{_quoted(pieces[i] for i in high)}. Farthest from the rest (down to {statistics.mean_cosine.min():.3f}): "
        f"{_quoted(pieces[i] for i in low)}."
    )


def isolated_sentence(cosine, pieces, ids):
    """cosine: (n,) of each sampled token to its nearest neighbour in the whole vocabulary."""
    order = np.argsort(cosine)[:5]
    return (
        f"Among {len(ids):,} sampled tokens the nearest neighbour has a median cosine of {np.median(cosine):.2f}; "
        f"most isolated (from {np.min(cosine):.2f}): {_quoted(pieces[ids[i]] for i in order)}."
    )


def unused_sentence(table, norms):
    """table: `unused_tokens`; norms: (vocabulary,)."""
    if not len(table):
        return (
            "Nothing here tells an unused token: none is marked in the file, no two rows are equal, none is zero, "
            "and there is no impossible byte to compare with."
        )
    close = table[table.why == "as close to those"]
    others = np.delete(norms, table.id)
    low, high = np.percentile(others, [1, 99]) if len(others) else (-np.inf, np.inf)
    apart = table.norm.quantile(0.75) < low or table.norm.quantile(0.25) > high
    known = len(table) - len(close)
    text = f"{known:,} tokens are known to be unused by their row, their byte or the file"
    text += (
        f"; {len(close):,} more are as close to those as a cosine of {close.score.min():.2f}, for example "
        f"{_quoted(close.piece)}."
        if len(close)
        else "; no other token is as close to those."
    )
    return text + (
        f" Their norm has median {table.norm.median():.3g}, the vocabulary's {np.median(norms):.3g}: the "
        f"norm alone {'would' if apart else 'would not'} tell them."
    )


def analogy_sentence(table):
    first, without = (table["rank"] == 1).mean(), (table["rank_without"] == 1).mean()
    text = (
        f"Of {len(table)} questions, {first:.0%} have the expected token first (median rank "
        f"{table['rank'].median():.0f}); without the offset, {without:.0%} (median rank "
        f"{table['rank_without'].median():.0f})."
    )
    worse = table[table["rank"] > table["rank_without"]]
    if len(worse):
        text += f" The offset makes {len(worse)} worse, most {worse.loc[worse['rank'].idxmax(), 'd']!r}."
    if table.attrs.get("skipped"):
        text += f" {len(table.attrs['skipped'])} left out: a word is not one token."
    return text


def senses_sentence(table, what="the sense of a word"):
    """table: `separation_by_layer`."""
    best = int(table.separation.idxmax())
    above = table.index[
        table.separation > table.shuffled_p95 + 1e-9
    ]  # equal rows differ by rounding
    if not len(above):
        return f"At no layer does {what} separate better than 95% of shuffled labels do."
    last = (
        f"and is {table.separation.iloc[-1]:.2f} at the last"
        if best != table.index[-1]
        else "the last"
    )
    first = (
        round(table.separation.iloc[0], 2) + 0.0
    )  # no "-0.00": equal rows differ by rounding, of either sign
    return (
        f"Separation by {what} goes from {first:.2f} at layer {table.index[0]} to its largest, "
        f"{table.separation[best]:.2f}, at layer {best}, {last}. It is above 95% of shuffled labels at "
        f"{len(above)} of {len(table)} layers, first at layer {above[0]}. At layer {best}, "
        f"{table.agreement[best]:.0%} of nearest neighbours agree; shuffled, "
        f"{table.agreement_shuffled[best]:.0%}."
    )


def control_sentence(table, control):
    """table, control: `separation_by_layer` at the word and at the token before it."""
    best = int(control.separation.idxmax())
    more = table.index[table.separation > control.separation]
    return (
        f"The token before the word, which carries the sentence but not the word, reaches "
        f"{control.separation[best]:.2f} at layer {best}; the word separates more than that token at "
        f"{len(more)} of {len(table)} layers"
        + (f", first at layer {more[0]}." if len(more) else ".")
    )


def plane_sentence(planes, senses):
    """planes: {layer: (scores, shares)}: in which of the panels the two senses lie farthest apart,
    in units of their own spread."""
    names = list(dict.fromkeys(senses))
    if len(names) < 2:
        return f"All sentences have one sense, {names[0]!r}: there is none to be apart from."
    ratios = {}
    for layer, (scores, _) in planes.items():
        parts = [scores[np.asarray(senses) == name] for name in names[:2]]
        spread = np.sqrt(np.mean([part.var(axis=0).sum() for part in parts]))
        ratios[layer] = (
            float(np.linalg.norm(parts[0].mean(axis=0) - parts[1].mean(axis=0)) / spread)
            if spread
            else 0.0
        )
    best = max(ratios, key=ratios.get)
    return (
        f"Distance of {names[0]!r} from {names[1]!r} in these planes, over their own spread: "
        + ", ".join(f"{ratio:.1f} at layer {layer}" for layer, ratio in ratios.items())
        + (f"; farthest apart at layer {best}." if ratios[best] else ": not apart anywhere.")
    )


def topics_sentence(row, first):
    """row: one row of `separation_by_layer`, for sentence embeddings; first: the same at layer
    0."""
    above = "above" if row.separation > row.shuffled_p95 else "not above"
    return (
        f"llama-server's embeddings: sentences of one topic are closer by {row.separation:.2f} than of different "
        f"ones, {above} 95% of shuffled topics ({row.shuffled_p95:.2f}); bare token embeddings give "
        f"{first.separation:.2f}. {row.agreement:.0%} have their nearest sentence in their own topic "
        f"(shuffled: {row.agreement_shuffled:.0%})."
    )


def precision_sentence(table, k, reference, other):
    """table: `precision`; reference, other: how the two are called."""
    if table.relative_error.max() == 0:
        return f"All {len(table):,} rows are the same in {reference} and {other}: the embedding has one type in both."
    return (
        f"Rows of {other} have a cosine of {table.cosine.mean():.5f} to {reference} on average and of "
        f"{table.cosine.min():.5f} at worst, and differ by {table.relative_error.mean():.2%} of their "
        f"norm. Of each token's {k} nearest neighbours {table.overlap.mean():.0%} stay; "
        f"{(table.overlap == 1).mean():.0%} of tokens keep all {k}."
    )
