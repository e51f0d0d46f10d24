"""Sentences under the figures of notebook 15, computed from the same numbers."""

import numpy as np

from ..maths import rank_correlation
from ..views.sentences import some
from ..views.text import counted
from .profile import LABELS
from .similarity import head_name


def _list(words):
    words = list(words)
    return (
        words[0]
        if len(words) == 1
        else ", ".join(words[:-1]) + " and " + words[-1]
        if words
        else "none"
    )


def texts_sentence(texts):
    """How many texts and tokens of each kind."""
    kinds = {}
    for text in texts:
        kinds.setdefault(text.kind, []).append(len(text.ids))
    return (
        "Measured on " + _list(f"{len(v)} of {k} ({sum(v)} tokens)" for k, v in kinds.items()) + "."
    )


def map_sentence(profiled, measures):
    """Which of the measures takes most of the attention, and which head is most of one kind."""
    shares = [name for name in measures if name != "semantic"]
    means = {name: float(profiled["value"].sel(measure=name).mean()) for name in shares}
    top = max(means, key=means.get)
    value = profiled["value"].sel(measure=top)
    over_half = int((value > 0.5).sum())
    text = (
        f"Averaged over heads, the largest of these shares is {top}: {means[top]:.0%} of attention, more "
        f"than half in "
    )
    text += f"{over_half} of {counted(int(value.notnull().sum()), 'head')}."
    rest = [name for name in shares if name != top]
    if rest:
        peak = max(rest, key=lambda name: float(profiled["value"].sel(measure=name).max()))
        best = profiled["value"].sel(measure=peak)
        layer, head = np.unravel_index(np.nanargmax(best.values), best.shape)
        text += (
            f" The highest score of the others is {peak} {float(best.max()):.2f} in "
            f"L{int(best['layer'][layer])}H{head}."
        )
    return text


def label_sentence(counts, earned, table, margin):
    """How many heads earn each label, several, or none."""
    ranked = counts["heads"].sort_values(ascending=False, kind="stable")
    earn = [f"{name} {int(n)}" for name, n in ranked.items() if n]
    empty = [name for name, n in ranked.items() if n == 0]
    per_head = earned.sum("label").values.reshape(-1)
    none = int((table["labels"] == "none").sum())
    text = f"Of {counted(len(table), 'head')} these clear their baseline by {margin:g} or more: {_list(earn)}."
    one = [name for name in empty if counts.loc[name, "texts"] < 2]
    if rest := [name for name in empty if name not in one]:
        text += f" No head is {_list(rest)} in that sense."
    if one:
        text += f" One text gives no interval, and a score without one no label: {_list(one)}."
    return text + f" {int((per_head > 1).sum())} carry several labels, {none} none."


def depth_sentence(depth, earned):
    """Where behaviours sit: the strongest drift with depth, and the layers of those that peak early
    and late."""
    known = depth.loc[[name for name in depth.index if name in LABELS]]
    rho = known["spearman with layer"].dropna()
    if rho.empty:
        return "No score rises or falls with depth: there are too few heads or layers, or the scores are constant."
    peaks = known["peak layer"].astype(int)
    text = (
        f"With depth {rho.idxmax()} rises most (Spearman {rho.max():+.2f} with the layer) and "
        f"{rho.idxmin()} falls most "
        f"({rho.min():+.2f})."
    )
    with_heads = [
        name
        for name in peaks.index
        if name in earned["label"].values and bool(earned.sel(label=name).any())
    ]
    if with_heads:
        ordered = peaks[with_heads].sort_values(kind="stable")
        text += (
            " Layer of the highest mean: "
            + _list(f"{name} {layer}" for name, layer in ordered.items())
            + "."
        )
    return text


def cluster_sentence(labels, silhouette, rand, jaccard, mds_share):
    """Sizes of the clusters, how separate they are, whether they come again, and how faithful the
    map is."""
    sizes = np.bincount(labels[labels >= 0])
    stable = int((jaccard >= 0.75).sum())
    if not np.isfinite(silhouette):
        return (
            f"No clusters: {len(labels)} head{'s' if len(labels) > 1 else ''} cannot be told apart in groups "
            "(a silhouette needs two clusters and more heads than clusters)."
        )
    grades = (0.5, "well separated"), (0.25, "weakly separated"), (-2, "not separated by gaps")
    split = next(name for limit, name in grades if silhouette > limit)
    again = some(
        rand.mean(),
        f"Resampling the texts gives an adjusted Rand index of {{:.2f}} ({rand.min():.2f} to "
        f"{rand.max():.2f}); {stable} of {len(jaccard)} clusters come again with a Jaccard overlap of 0.75 or "
        "more.",
        "One text cannot say whether they come again.",
    )
    return (
        f"{len(sizes)} clusters of {_list(map(str, sizes))} heads, {split} (silhouette {silhouette:.2f}). {again} "
        f"Two coordinates of classical scaling hold {some(mds_share, '{:.0%}', 'none')} of the squared distances."
    )


def hdbscan_sentence(labels, other):
    """What a density-based clustering says of the same heads, against the hierarchical one."""
    from sklearn.metrics import adjusted_rand_score

    noise, count = float((labels < 0).mean()), len(set(labels[labels >= 0].tolist()))
    text = (
        f"HDBSCAN, which may leave heads out, finds {count} dense group{'s' if count != 1 else ''} and "
        f"leaves {noise:.0%} out"
    )
    if count == 0:
        return text + ": no region of the map is denser than the rest by its measure."
    inside = labels >= 0
    rand = adjusted_rand_score(labels[inside], other[inside])
    return (
        text
        + f"; on the heads it keeps, it agrees with the clusters above by {rand:.2f} (adjusted Rand index)."
    )


def apart_sentence(same, other):
    """Mean distances of heads of one layer and of different layers: similarity.layer_distances."""
    said = [
        some(same, "two heads of one layer are {:.3f} apart on average", ""),
        some(other, "two of different layers {:.3f}", ""),
    ]
    said = ", ".join(filter(None, said))
    return f"{said[0].upper()}{said[1:]}." if said else "There is one head: no distance to another."


def nearest_sentence(name, near):
    """near: similarity.nearest_heads of the head called `name`."""
    if not near:
        return f"There is no head beside {name}."
    return (
        f"Nearest to {name}: " + ", ".join(f"{other} at {apart:.3f}" for other, apart in near) + "."
    )


def links_sentence(edges):
    """edges: DataFrame (source, target) of head names, each head linked to its nearest."""
    if edges.empty:
        return "No links: there is one head."
    across = edges["source"].str.split("H").str[0] != edges["target"].str.split("H").str[0]
    return f"{len(edges)} links; {across.mean():.0%} of them join heads of different layers."


def redundancy_sentence(pairs, curve, n_heads, groups):
    """The closest pair, what half of the heads can stand for, and whether shared keys make heads
    alike."""
    if pairs.empty:
        return "There is one head: nothing that could be redundant."
    first = pairs.iloc[0]
    half = curve[curve["heads"] <= n_heads / 2]
    text = (
        f"The closest pair is {first['a']} and {first['b']} at {first['distance']:.3f}; "
        f"{int(pairs['same_layer'].sum())} of the "
    )
    text += f"{len(pairs)} closest pairs share a layer."
    if len(half):
        row = half.iloc[0]
        text += f" {int(row['heads'])} heads cover all {n_heads} within {row['radius']:.2f}."
    else:
        text += (
            f" Within {curve['radius'].max():.2f}, {int(curve['heads'].iloc[-1])} of {n_heads} heads are "
            "needed to cover all."
        )
    if groups is None:
        return (
            text
            + " No query heads share a kv head while others do not, so there is nothing to compare."
        )
    closer = groups["inside"] < groups["outside"] and groups["p"] < 0.05
    verdict = (
        "closer to each other than to the layer's other heads"
        if closer
        else "as close as chance makes them"
    )
    verdict += f" (p = {groups['p']:.3f} by shuffling)"
    return text + (
        f" Heads that share a kv head are {verdict}: mean distance {groups['inside']:.3f} inside groups, "
        f"{groups['outside']:.3f} between groups of a layer"
        f"{some(groups['other_layers'], ', {:.3f} between layers', '')}."
    )


def importance_sentence(table, base_loss, n_heads):
    """The head that costs most, how concentrated the damage is, and how many changes stand out of
    their error."""
    worst = table.loc[table["loss_change"].idxmax()]
    clear = int((table["loss_change"] > 2 * table["error"]).sum())
    better = int((table["loss_change"] < -2 * table["error"]).sum())
    positive = table["loss_change"].clip(lower=0).sort_values(ascending=False)
    share = positive.head(10).sum() / max(positive.sum(), 1e-12)
    held = (
        f" The ten costliest heads hold {share:.0%} of all increases."
        if len(table) > 10 and positive.any()
        else ""
    )
    scope = "" if len(table) == n_heads else f" (a sample of {len(table)} of {n_heads})"
    name = head_name((int(worst["layer"]), int(worst["head"])))
    change = (
        f"Without {name} the loss of {base_loss:.2f} nats per token rises most, by"
        if worst["loss_change"] > 0
        else f"No head costs anything: the loss of {base_loss:.2f} nats per token changes most upwards without "
        f"{name}, by"
    )
    return (
        f"{change} {worst['loss_change']:.3f}{some(worst['error'], ' ± {:.3f}', '')}.{held} "
        f"{counted(clear, 'head raises', 'heads raise')} and {counted(better, 'lowers', 'lower')} it by more than "
        f"two standard errors{scope}; with {counted(len(table), 'head')} tested, about "
        f"{0.046 * len(table) / 2:.0f} of either sign would by chance alone."
    )


def population_sentence(found):
    """What a sample says of all heads, with its error."""
    mean, low, high = found["mean"]
    share, share_low, share_high = found["share"]
    if found["sampled"] == found["of"]:
        return (
            f"{counted(found['of'], 'head was', 'heads were')} ablated, which is all: the mean loss change is "
            f"{mean:+.4f} nats per token, and {share:.0%} of heads cost more than 0.01."
        )
    return (
        f"From {found['sampled']} of {found['of']} heads: the mean loss change is {mean:+.4f} nats per "
        f"token (95% interval "
        f"{low:+.4f} to {high:+.4f}), and {share:.0%} of heads cost more than 0.01 ({share_low:.0%} to "
        f"{share_high:.0%})."
    )


def relation_sentence(relations):
    """Which measures go with importance, which do not."""
    clear = relations[(relations["low"] > 0) | (relations["high"] < 0)].sort_values(
        "rho", key=abs, ascending=False
    )
    if clear.empty:
        if relations["rho"].isna().all():
            few = counted(int(relations["heads"].max()), "head is", "heads are")
            return f"No relation can be seen: {few} too few, or nothing varies."
        return "No measure is related to importance: every interval that there is holds 0."
    said = [f"{name} {row['rho']:+.2f}" for name, row in clear.head(4).iterrows()]
    rest = [name for name in relations.index if name not in clear.index]
    text = (
        f"Important heads differ in {_list(said)} (Spearman; the strongest of {len(clear)} whose intervals "
        f"leave out 0)."
    )
    return text + (f" No relation is seen to {_list(rest)}." if rest else "")


def mode_sentence(both):
    """Zero against mean ablation of the same heads."""
    rho = rank_correlation(both["zero"], both["mean"])
    smaller = float((both["mean"].abs() < both["zero"].abs()).mean())
    if len(both) == 1:
        return (
            f"The only head's zero ablation changes the loss by {both['zero'].iloc[0]:+.4f} nats per token, its "
            f"mean ablation by {both['mean'].iloc[0]:+.4f}."
        )
    ranks = some(
        rho,
        "the two ways rank heads with a Spearman correlation of {:.2f}",
        "too few differ to be ranked",
    )
    return (
        f"Over {len(both)} heads {ranks}; the mean "
        f"ablation changes "
        f"the loss less in {smaller:.0%} of them (on average {both['mean'].abs().mean():.4f} against "
        f"{both['zero'].abs().mean():.4f} nats per token)."
    )


def pruning_sentence(table, kept, n_heads, limit):
    """How many heads each order can lose, and what the largest cut costs."""
    most = table["removed"].max()
    cost = table[table["removed"] == most].groupby("order")["loss_change"].mean()
    said = [
        f"{int(kept[order])} ({'random order' if order == 'random' else order + ' first'})"
        for order in ("least important", "random", "most important")
        if order in kept.index
    ]
    return (
        f"Of the {counted(n_heads, 'head')} ablated so many can go for at most {limit:g} nats per token: "
        f"{_list(said)}; these are the largest counts measured. "
        f"Removing {most} costs {cost['least important']:.2f} nats by importance and {cost['random']:.2f} "
        f"at random."
    )


def matrix_sentence(profiled, places, notes):
    """The heads shown side by side, and why."""
    if not places:
        return "No head earns a label: there is none to show."
    return (
        "Shown are "
        + _list(f"L{layer}H{head} ({notes[layer, head]})" for layer, head in places)
        + "."
    )


def precision_sentence(comparison, one, other):
    """Which behaviours survive in the other precision."""
    part = comparison.dropna(subset=["labels"])
    had, kept = int(part["labels"].sum()), int(part["kept"].sum())
    ranks = part["spearman"].dropna()
    shares = comparison.loc[[name for name in comparison.index if name in LABELS]]
    moved = shares["largest_change"].idxmax()
    row = shares.loc[moved]
    text = (
        f"Of {had} labels in {one}, {kept} ({kept / had:.0%}) hold in {other}"
        if had
        else f"No head has a label in {one} that could hold in {other}"
    )
    text += f", where {int(part['gained'].sum())} are new. "
    if len(ranks):
        text += (
            f"Rank correlations of the scores run from {ranks.min():.3f} ({ranks.idxmin()}) to "
            f"{ranks.max():.3f}. "
        )
    return (
        text
        + f"The score that moved most is {moved} of {row['head']}, by {row['largest_change']:.3f}."
    )


def type_sentence(name, tensors):
    """What a file is made of: its matrices by type."""
    counts = tensors[tensors["shape"].map(len) > 1]["type"].value_counts()
    said = [
        f"{count} {'matrix' if count == 1 else 'matrices'} of {kind}"
        for kind, count in counts.items()
    ]
    return f"{name} holds {_list(said)}."
