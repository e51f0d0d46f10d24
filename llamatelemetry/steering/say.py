"""What the figures of this room show, from the same numbers: `say.x` explains `figures.x`."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import xarray as xr

from ..maths import rank_correlation
from ..views.sentences import counted, listed, quoted, sentence, some


@sentence
def direction(norms: xr.DataArray, explained: xr.DataArray, stream: pd.Series) -> str:
    share = pd.Series(norms.values, norms["layer"].values) / stream.loc[norms["layer"].values]
    most, best = share.idxmax(), int(explained.idxmax())
    return (
        f"The direction is longest against the stream in state {most}, {float(share.max()):.0%} of "
        f"its length; it is most of what the pairs differ by in state {best}, where "
        f"{float(explained.max()):.0%} of their squared differences lie along it."
    )


@sentence
def dose(response: pd.DataFrame, price: pd.DataFrame, more: Sequence, less: Sequence) -> str:
    means = response.pivot(index="strength", columns="direction", values="mean")
    ends = [means.index.min(), means.index.max()]
    low, high = means["found"].loc[ends]
    facts = [
        f"At strength {ends[0]:g} the lead of {_words(more)} over {_words(less)} changes by "
        f"{low:+.2f} nats, at {ends[1]:g} by {high:+.2f}"
    ]
    if "random" in means:
        random = means["random"].loc[ends]
        facts.append(
            f"with random directions of its length by {random.iloc[0]:+.2f} and {random.iloc[1]:+.2f}"
        )
        outside = _outside(response)
        facts.append(f"the two intervals part at {outside} of {len(means) - 1} strengths")
    cost = price[price["direction"] == "found"].set_index("strength")["mean"]
    side = f"{cost.loc[cost.index.min()]:.2f} and {cost.loc[cost.index.max()]:.2f}"
    return (
        f"{', '.join(facts)}. The neutral text's perplexity is {side} times as large at the ends."
    )


def _words(words):
    return listed(quoted(word) for word in words) if len(words) else "everything else"


def _outside(response):
    """Strengths at which the direction's interval and the random ones' have nothing in common."""
    wide = response[response["strength"] != 0].pivot(index="strength", columns="direction")
    apart = (wide["low", "found"] > wide["high", "random"]) | (
        wide["high", "found"] < wide["low", "random"]
    )
    return int(apart.sum())


@sentence
def across(slopes: pd.DataFrame, cosine: xr.DataArray, names: Sequence[str]) -> str:
    """slopes: dose.response of every pair, with found_in and steered; cosine: of the two directions
    by layer; names: the two files."""
    mean = slopes.groupby(["found_in", "steered"])["slope"].mean()
    own, other = names
    steers = f"{mean[own, other]:+.3f} against {mean[other, other]:+.3f} nats per unit of strength"
    back = f"{mean[other, own]:+.3f} against {mean[own, own]:+.3f}"
    low = float(cosine.min())
    return (
        f"In {other} the direction found in {own} moves the lead by {steers} of its own; the other "
        f"way round {back}. The two directions have a cosine of {low:.3f} or more in every layer."
        if np.isfinite(low)
        else f"In {other} the direction found in {own} moves the lead by {steers} of its own."
    )


@sentence
def cuts(cuts: xr.Dataset, pieces: Sequence) -> str:
    change, kl = cuts["change"].values, cuts["kl"].values
    if not np.isfinite(change).any():
        return "No edge could be cut: the last token sees itself alone."
    group, key = np.unravel_index(np.nanargmin(change), change.shape)
    rho = rank_correlation(kl, cuts["weight"].values)
    where, at = cuts["group"].values[group], int(cuts["key"].values[key])
    lost = change[group, key]
    fact = (
        f"The answer's lead of {cuts.attrs['lead']:+.2f} nats loses most, {-lost:.2f}, without the "
        f"edges of {where} to {at} {quoted(pieces[at])}."
        if lost < 0
        else "No edge's cut lowers the answer's lead."
    )
    agree = some(
        rho, "the rank correlation of what a cut costs (KL) with what the edges weigh is {:.2f}"
    )
    return f"{fact} Over {counted(int(np.isfinite(kl).sum()), 'cut')} {agree}."


@sentence
def importance(table: pd.DataFrame, pieces: Sequence) -> str:
    known = table.dropna(subset="kl")
    if known.empty:
        return "No token could be cut out."
    top = known.sort_values("kl", ascending=False).iloc[0]
    heavy = known.sort_values("attention", ascending=False).iloc[0]
    rho = {name: table.attrs[name] for name in ("attention", "rollout")}
    said = listed(
        some(value, f"{name} {{:.2f}}", f"{name} not to be had") for name, value in rho.items()
    )
    named = [f"{int(one['key'])} {quoted(pieces[int(one['key'])])}" for one in (top, heavy)]
    same = "the same" if named[0] == named[1] else named[1]
    return (
        f"Cutting out {named[0]} changes the prediction most (KL {top['kl']:.2f} nats); the heaviest in "
        f"attention is {same}. Rank correlation of the cuts, the first token apart, with {said}."
    )


@sentence
def head_or_edge(table: pd.DataFrame) -> str:
    if table.empty:
        return "No head has two keys to choose from: nothing to cut."
    ratio = (table["kl_edge"] / table["kl_head"].where(table["kl_head"] > 0)).median()
    rho = rank_correlation(table["kl_head"], table["kl_edge"])
    more = int((table["kl_edge"] > table["kl_head"]).sum())
    median = some(ratio, "{:.0%}")
    return (
        f"Cutting a head's strongest edges moves the predictions by {median} of what zeroing the head "
        f"does (median of {counted(len(table), 'head')}), and by more in {more}; the rank correlation "
        f"of the two is {some(rho, '{:.2f}')}."
    )
