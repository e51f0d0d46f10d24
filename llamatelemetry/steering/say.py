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
    facts = [
        _by_state(share.where(np.isfinite(share)), "the direction is {:.0%} as long as the stream"),
        _by_state(explained.to_series(), "{:.0%} of the pairs' squared differences lie along it"),
    ]
    said = "; ".join(filter(None, facts)) or "there is no length to compare"
    return f"{said[0].upper()}{said[1:]}."


def _by_state(shares, text):
    """The largest share and where it is, "" for none."""
    known = shares.dropna()
    if known.empty:
        return ""
    said, states = text.format(known.max()), known.index.tolist()
    if len(states) == 1:
        return f"{said} in state {states[0]}"
    if np.ptp(known) < 0.005:  # the same as it is printed
        return f"{said} in each of {len(states)} states"
    return f"{said} in state {known.idxmax()}, the most of {len(states)} states"


@sentence
def dose(response: pd.DataFrame, price: pd.DataFrame, more: Sequence, less: Sequence) -> str:
    moved = response[response["strength"] != 0]  # strength 0 is no edit
    if moved.empty:
        return "Only strength 0 was tried, which changes nothing."
    means = moved.pivot(index="strength", columns="direction", values="mean")
    ends = list(dict.fromkeys([means.index.min(), means.index.max()]))
    at = listed(f"{means['found'][end]:+.2f} nats at strength {end:g}" for end in ends)
    facts = [f"The lead of {_words(more)} over {_words(less)} changes by {at}"]
    if "random" in means:
        beside = listed(f"{means['random'][end]:+.2f}" for end in ends)
        facts.append(f"with random directions of its length by {beside}")
        known = moved.loc[moved["direction"] == "found", "low"].notna().all()
        apart = f"the two intervals part at {_outside(moved)} of {counted(len(means), 'strength')}"
        facts.append(apart if known else "one prompt alone has no interval")
    cost = price[price["direction"] == "found"].set_index("strength")["mean"]
    side = listed(f"{cost[end]:.2f}" for end in ends)
    return f"{'; '.join(facts)}. The neutral text's perplexity is then {side} times as large."


def _words(words):
    return listed(quoted(word) for word in words) if len(words) else "everything else"


def _outside(response):
    """Strengths at which the direction's interval and the random ones' have nothing in common."""
    wide = response.pivot(index="strength", columns="direction")
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
        f"way round {back}. The two directions have a cosine of at least {low:.3f} in every state."
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
        f"edges to {at} {quoted(pieces[at])} in {where}."
        if lost < 0
        else "No edge's cut lowers the answer's lead."
    )
    n = counted(int(np.isfinite(kl).sum()), "cut")
    agree = "the rank correlation of what a cut costs (KL) with what the edges weigh is"
    none = f"{n}: too few, or too alike, for a rank correlation."
    return f"{fact} {some(rho, f'Over {n} {agree} {{:.2f}}.', none)}"


@sentence
def importance(table: pd.DataFrame, pieces: Sequence) -> str:
    known = table[table["key"] > 0].dropna(subset="kl")  # those that the figure shows
    if known.empty:
        return "No token after the first could be cut out."
    if not known["kl"].max() > 0:
        return f"Cutting out any of {counted(len(known), 'token')} after the first changes nothing."
    top = known.sort_values("kl", ascending=False).iloc[0]
    heavy = known.sort_values("attention", ascending=False).iloc[0]
    rho = {name: table.attrs[name] for name in ("attention", "rollout")}
    said = listed(
        some(value, f"{name} {{:.2f}}", f"{name} not to be had") for name, value in rho.items()
    )
    named = [f"{int(one['key'])} {quoted(pieces[int(one['key'])])}" for one in (top, heavy)]
    same = "the same" if named[0] == named[1] else named[1]
    return (
        f"Of the tokens after the first, cutting out {named[0]} changes the prediction most "
        f"(KL {top['kl']:.2f} nats); the heaviest in attention is {same}. Rank correlation of the "
        f"cuts with {said}."
    )


@sentence
def head_or_edge(table: pd.DataFrame) -> str:
    if table.empty:
        return "No head has two keys to choose from: nothing to cut."
    moving = table[table["kl_head"] > 0]
    if moving.empty:
        return f"Zeroing any of {counted(len(table), 'head')} changes nothing: nothing to compare with."
    median = (moving["kl_edge"] / moving["kl_head"]).median()
    rho = rank_correlation(table["kl_head"], table["kl_edge"])
    more = int((table["kl_edge"] > table["kl_head"]).sum())
    return (
        f"Cutting a head's strongest edges moves the predictions by {median:.0%} of what zeroing the head "
        f"does (median of {counted(len(moving), 'head')}), and by more in {more}; the rank correlation "
        f"of the two is {some(rho, '{:.2f}')}."
    )
