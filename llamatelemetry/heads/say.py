"""What the figures of notebook 15 show, from the same numbers: `say.x` explains `figures.x`."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import xarray as xr

from ..maths import rank_correlation
from ..views.sentences import counted, listed, sentence, some
from .behaviours import LABELS
from .profile import highest
from .texts import Text


@sentence
def texts(texts: Sequence[Text]) -> str:
    if not texts:
        return "There is no text to measure on."
    sizes = pd.DataFrame({"kind": text.kind, "tokens": len(text.ids)} for text in texts)
    kinds = sizes.groupby("kind", sort=False)["tokens"].agg(["size", "sum"])
    said = [f"{size} of {kind} ({total} tokens)" for kind, size, total in kinds.itertuples()]
    return f"Measured on {listed(said)}."


@sentence
def measures(profiled: xr.Dataset, names: Sequence[str]) -> str:
    shares = profiled["value"].sel(measure=[name for name in names if name != "semantic"])
    if not shares.notnull().any():
        return "No share of attention was measured: there is nothing to compare."
    means = shares.mean(("layer", "head")).to_series().sort_values(ascending=False)
    top, rest = shares.sel(measure=means.index[0]), means.index[1:]
    half = f"{int((top > 0.5).sum())} of {counted(int(top.notnull().sum()), 'head')}"
    said = f"The largest of these shares in the mean over heads is {means.index[0]}: {means.iloc[0]:.0%}"
    if not len(rest):
        return f"{said} of attention, more than half in {half}."
    peak = max(rest, key=lambda name: float(shares.sel(measure=name).max()))
    layer, head = highest(shares.sel(measure=peak))
    score = f"{peak} {float(shares.sel(measure=peak).max()):.2f} in L{layer}H{head}"
    return f"{said} of attention, more than half in {half}. The highest of the others is {score}."


@sentence
def baselines(counts: pd.DataFrame, table: pd.DataFrame, margin: float) -> str:
    if counts.empty:
        return f"No label was measured on {counted(len(table), 'head')}: none is earned."
    ranked = counts.sort_values("heads", ascending=False, kind="stable")
    held = listed(f"{name} {count}" for name, count in ranked["heads"].items() if count)
    nobody, unsure = ranked["heads"] == 0, ranked["texts"] < 2
    several, none = table["labels"].str.contains(", ").sum(), (table["labels"] == "none").sum()
    heads = counted(len(table), "head")
    facts = [f"Of {heads} these clear their baseline by {margin:g} or more: {held}."]
    if (nobody & ~unsure).any():
        facts.append(f"No head is {listed(ranked.index[nobody & ~unsure])} in that sense.")
    if (nobody & unsure).any():
        facts.append(f"One text gives no interval: {listed(ranked.index[nobody & unsure])}.")
    return " ".join([*facts, f"{several} carry several labels, {none} none."])


@sentence
def clusters(labels: np.ndarray, silhouette: float, rand: np.ndarray, jaccard: pd.Series) -> str:
    if np.isnan(silhouette):
        return f"No clusters: {counted(len(labels), 'head')} cannot be told apart in groups."
    grades = (0.5, "well separated"), (0.25, "weakly separated"), (-2, "not separated by gaps")
    grade = next(name for limit, name in grades if silhouette > limit)
    found = f"{len(jaccard)} clusters of {listed(np.bincount(labels))} heads, {grade} (silhouette"
    if np.isnan(rand).any():
        return f"{found} {silhouette:.2f}). One text cannot say whether they come again."
    index = f"an adjusted Rand index of {rand.mean():.2f} ({rand.min():.2f} to {rand.max():.2f})"
    stable = f"{(jaccard >= 0.75).sum()} come again with a Jaccard overlap of 0.75 or more"
    return f"{found} {silhouette:.2f}). Resampling the texts gives {index}; {stable}."


@sentence
def distances(same: float, other: float) -> str:
    """Of similarity.layer_distances."""
    if np.isnan([same, other]).all():
        return "There is one head: no distance to another."
    within = some(same, "two heads of one layer are {:.3f} apart", "no layer has two heads")
    across = some(other, "heads of different layers are {:.3f} apart", "there is one layer")
    return f"On average {within}; {across}."


@sentence
def cover(pairs: pd.DataFrame, curve: pd.DataFrame, n_heads: int, groups: dict | None) -> str:
    if pairs.empty:
        return "There is one head: nothing that could be redundant."
    half = curve[curve["heads"] <= n_heads / 2]
    row = (half if len(half) else curve.tail(1)).iloc[0]
    said = f"{row['heads']:.0f} heads cover all {n_heads} within {row['radius']:.2f}."
    if groups is None:
        return f"{said} No query heads share a kv head while others do not: nothing to compare."
    closer = groups["inside"] < groups["outside"] and groups["p"] < 0.05
    verdict = "closer than the layer's other heads" if closer else "as close as chance makes them"
    means = f"{groups['inside']:.3f} against {groups['outside']:.3f}, p = {groups['p']:.3f} by shuffling"
    return f"{said} Heads that share a kv head are {verdict} (mean distance {means})."


@sentence
def importance(table: pd.DataFrame, base_loss: float, everyone: dict) -> str:
    """everyone: of importance.population."""
    change, error = table["loss_change"], table["error"]
    if change.isna().all():
        return "No head was ablated: nothing can be said of what one costs."
    worst = table.loc[change.idxmax()]
    by = f"{worst['loss_change']:+.3f}{some(worst['error'], ' ± {:.3f}', '')}"
    most = f"L{worst['layer']:.0f}H{worst['head']:.0f}, {by} on a loss of {base_loss:.2f} nats per token"
    up, down = (change > 2 * error).sum(), (change < -2 * error).sum()
    clear = f"{counted(up, 'head raises', 'heads raise')} and {counted(down, 'lowers', 'lower')} it by more"
    (mean, *ends), (share, *share_ends) = everyone["mean"], everyone["share"]
    sample = everyone["sampled"] < everyone["of"]  # else there is no interval
    interval = " ({:+.4f} to {:+.4f})".format(*ends) if sample else ""
    share_interval = " ({:.0%} to {:.0%})".format(*share_ends) if sample else ""
    return (
        f"{'Costliest is' if change.max() > 0 else 'No head costs anything; the last is'} {most}. "
        f"{clear} than two standard errors; of {len(table)} tested, about {0.046 * len(table) / 2:.0f} of "
        f"either sign would by chance alone. Of all {counted(everyone['of'], 'head')} the mean change is "
        f"{mean:+.4f}{interval}, and {share:.0%}{share_interval} cost more than 0.01."
    )


@sentence
def relations(found: pd.DataFrame) -> str:
    """Of importance.relations."""
    if found.empty:
        return "No relation can be seen: no measure was given."
    if found["rho"].isna().all():
        few = counted(int(found["heads"].max()), "head is", "heads are")
        return f"No relation can be seen: {few} too few, or nothing varies."
    clear = (found["low"] > 0) | (found["high"] < 0)
    if not clear.any():
        return "No measure is related to importance: every interval that there is holds 0."
    strongest = found["rho"][clear].sort_values(key=abs, ascending=False).head(4)
    said = listed(f"{name} {rho:+.2f}" for name, rho in strongest.items())
    unseen = f" No relation is seen to {listed(found.index[~clear])}." if not clear.all() else ""
    return f"Important heads differ in {said} (Spearman; the strongest of {clear.sum()}).{unseen}"


@sentence
def both_ways(both: pd.DataFrame) -> str:
    zero, mean = both["zero"].abs(), both["mean"].abs()
    if (zero + mean).isna().all():
        return "No head was ablated both ways: there is nothing to compare."
    ranks = "too few differ to be ranked"
    ranks = some(rank_correlation(both["zero"], both["mean"]), "Spearman correlation {:.2f}", ranks)
    less = f"the mean ablation changes the loss less in {(mean < zero).mean():.0%} of them"
    means = f"on average {mean.mean():.4f} against {zero.mean():.4f} nats per token"
    return f"Over {counted(len(both), 'head')} of both kinds: {ranks}; {less} ({means})."


@sentence
def pruning(table: pd.DataFrame, kept: pd.Series, n_heads: int, limit: float) -> str:
    if table.empty:
        return "No head was removed: there is nothing to compare."
    most = table["removed"].max()
    cost = table[table["removed"] == most].groupby("order")["loss_change"].mean()
    first = f"{kept['least important']} from the least important on, {kept['random']} at random"
    return (
        f"Of {counted(n_heads, 'head')} so many can go for at most {limit:g} nats per token: {first}, "
        f"{kept['most important']} from the most important on. Removing {most} costs "
        f"{cost['least important']:.2f} nats by importance and {cost['random']:.2f} at random."
    )


@sentence
def depth(depth: pd.DataFrame, earned: xr.DataArray) -> str:
    known = depth.loc[depth.index.isin(list(LABELS))]
    rho = known["spearman with layer"].dropna()
    if rho.empty:
        return "No score rises or falls with depth: too few heads or layers, or the scores are constant."
    drift = f"{rho.idxmax()} rises most (Spearman {rho.max():+.2f} with the layer)"
    held = [str(name) for name in earned["label"].values if earned.sel(label=name).any()]
    peaks = known["peak layer"].reindex(held).sort_values(kind="stable")
    said = listed(f"{name} {layer:.0f}" for name, layer in peaks.items())
    fall = f"{rho.idxmin()} falls most ({rho.min():+.2f})"
    return f"With depth {drift} and {fall}. Layers of the highest means: {said}."


@sentence
def side_by_side(shown: Mapping[tuple[int, int], str]) -> str:
    said = [f"L{layer}H{head} ({note})" for (layer, head), note in shown.items()]
    return f"Shown are {listed(said)}." if said else "No head earns a label: there is none to show."


@sentence
def typical(profiled: xr.Dataset, found: pd.DataFrame, layer: int, head: int) -> str:
    """Of profile.typical_texts of that head."""
    if found.empty:
        return f"L{layer}H{head} has no score in these texts: there is no typical one."
    one = profiled.sel(layer=layer, head=head, measure=found.index)
    first = (one["value"] - one["baseline"]).to_series().fillna(-1).idxmax()
    text, score, mean = found.loc[first]
    best = f"{first}, highest on {text}: {score:.2f}, against {mean:.2f} on average over its texts"
    return f"The score of L{layer}H{head} farthest above its baseline is {best}."


@sentence
def survival(comparison: pd.DataFrame, one: str, other: str) -> str:
    had, kept, gained = comparison[["labels", "kept", "gained"]].sum().astype(int)
    shares = comparison[comparison.index.isin(list(LABELS))]
    if shares.empty:
        return f"No score was measured in both {one} and {other}: there is nothing to compare."
    most = shares.loc[shares["largest_change"].idxmax()]
    moved = f"{most.name} of {most['head']}, by {most['largest_change']:.3f}"
    found = (
        f"No head earns a label in {one}: there is none to lose in {other}, where {gained} are new."
    )
    if had:
        hold = f"{kept} ({kept / had:.0%}) hold in {other}"
        found = f"Of {counted(had, 'label')} in {one}, {hold}, where {gained} are new."
    return f"{found} The score that moved most is {moved}."


@sentence
def links(edges: pd.DataFrame) -> str:
    """Of similarity.links."""
    one, other = (edges[side].str.split("H").str[0] for side in ("source", "target"))
    across = some((one != other).mean(), "; {:.0%} of them join heads of different layers", "")
    return f"{counted(len(edges), 'link')}{across}."
