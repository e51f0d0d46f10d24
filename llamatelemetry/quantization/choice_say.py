"""What the numbers of notebook 16 say on what to take: `choice_say.x` explains
`choice_figures.x`, from the same tables."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from ..compare.paired import Paired
from ..convert.mixture import Costs
from ..files.gguf import GGUFFile
from ..views.sentences import counted, listed, sentence

WORDS = {
    "less": "is closer than",
    "more": "is farther than",
    "cannot be told": "cannot be told apart from",
}


@sentence
def tasks(table: pd.DataFrame) -> str:
    """table: a TaskComparison."""
    rows = table.drop("reference", level="name").dropna(subset="accuracy")
    if rows.empty:
        return "No file beside the reference did a task: there is nothing to say."
    told = rows[rows["verdict"] != "cannot be told"]
    most = rows["changed"].idxmax()
    share = f"{rows['changed'].max():.0%} of {rows.loc[most, 'n']:.0f}"
    changed = f"most answers change in {most[1]} on {most[0]} ({share})"
    if not rows["changed"].max() > 0:
        changed = "no answer changes"
    if told.empty:
        apart = "on no set is a file's accuracy told apart from the reference's"
    else:
        names = [
            f"{name} on {which} ({row.difference:+.1%}, {row.low:+.1%} to {row.high:+.1%})"
            for (which, name), row in told.iterrows()
        ]
        apart = f"told apart from the reference: {listed(names)}"
    return f"By paired intervals and McNemar's test {apart}; {changed}."


@sentence
def by_text(pairs: pd.DataFrame, tau: pd.DataFrame) -> str:
    """pairs: agreement.order; tau: agreement.rank_agreement."""
    if pairs.empty:
        return "One file alone has no order."
    values = tau.to_numpy()[np.triu_indices(len(tau), 1)]
    known = values[np.isfinite(values)]
    ends = (
        list(dict.fromkeys(f"{end:.2f}" for end in (known.min(), known.max())))
        if len(known)
        else []
    )
    span = " to ".join(ends) or "not to be had"
    texts = [name for name in pairs if name != "depends"]
    told = int((pairs[texts] != "cannot be told").all(axis=1).sum())
    turned = [f"{a} and {b}" for (a, b), row in pairs.iterrows() if row["depends"]]
    apart = f"{told} of {counted(len(pairs), 'pair')} told apart on every text"
    whole = f"Kendall's tau between two texts is {span}, {apart}"
    if turned:
        return f"{whole}. The order depends on the text for {listed(turned)}."
    return f"{whole}, and no pair is told to lie one way on one text and the other way on another."


@sentence
def group_costs(table: pd.DataFrame) -> str:
    """table: Costs.table."""
    base = table[table["type"] == "Q8_0"].set_index("group")["bytes"]
    rows = table[table["type"] != "Q8_0"]
    if rows.empty:
        return "Nothing but Q8_0 fits these rows: there is nothing to choose."
    saved = rows["group"].map(base) - rows["bytes"]
    rate = (rows["cost"] / saved * 2**20).where(saved > 0)
    rows = rows.assign(rate=rate).dropna(subset="rate")
    if len(rows) < 2 or np.ptp(rows["rate"]) == 0:
        each = (f"{row.group} in {row.inside}" for row in rows.itertuples())
        rates = f": {rows['rate'].iloc[0]:.3g} nats per MiB saved" if len(rows) else ""
        return f"There are no two different costs to compare ({listed(each)}{rates})."
    most, least = (rows.loc[pick()] for pick in (rows["rate"].idxmax, rows["rate"].idxmin))
    ends = (
        f"{row.group} in {row.inside} ({row.rate:.3g} nats per MiB saved)" for row in (most, least)
    )
    return f"Dearest is {next(ends)}, cheapest {next(ends)}."


@sentence
def left_out(reference: GGUFFile, instead: str) -> str:
    """Why a section measures nothing with the parameters as they are."""
    return f"The reference has {reference.size_bytes / 1e9:.2g} GB: {instead}"


@sentence
def reckoned(costs: Costs) -> str:
    rows = costs.table[costs.table["type"] != "Q8_0"]
    n = counted(len(rows), "file")
    left = listed(f"{kind} ({need:.0f} s)" for kind, need in costs.left.items())
    more = f" Left out for want of time: {left}." if costs.left else ""
    return f"{n} in which one group is not Q8_0, reckoned to take {costs.seconds:.0f} s.{more}"


@sentence
def no_costs(why: object) -> str:
    return (
        f"{why} In the notebook COST_SECONDS allows it, and LONGER = True for a reference over 2 GB. "
        "Without it the layers above are what is known of which parts to keep."
    )


@sentence
def sizes(found: pd.DataFrame, expected: float, verdicts: Mapping[str, Paired]) -> str:
    """found: rows of a Comparison, "mixture" among them; expected: its mean KLD if costs add up;
    verdicts: of mixture.verdicts for it."""
    mean = found.loc["mixture", "kld_mean"]
    against = [f"{WORDS[one.verdict]} {name} ({_apart(one)})" for name, one in verdicts.items()]
    adds = f"Expected were {expected:.4g} nats if costs add up, measured on another text {mean:.4g}"
    if not against:
        return f"{adds}. There is no other file of this size to compare."
    return f"{adds}. The mixture {listed(against)}."


def _apart(one):
    """A difference with its interval, where there is one: not of a single window."""
    if not np.isfinite(one.low):
        return f"{one.difference:+.3g} nats, of one window, without an interval"
    return f"{one.difference:+.3g} nats, {one.low:+.3g} to {one.high:+.3g}"


@sentence
def importance(table: pd.DataFrame, verdict: Paired, name: str) -> str:
    """table: of convert.statistics; verdict: of the file with the matrix against that without."""
    kinds = table.groupby("tensor")["entropy_share"].mean().dropna().sort_values()
    even = ""
    if len(kinds) > 1 and np.ptp(kinds) > 0:
        ends = [f"{kind} ({share:.0%})" for kind, share in kinds.iloc[[0, -1]].items()]
        even = f"Activations are spread least evenly over the columns of {ends[0]} and most over those of {ends[1]}. "
    return (
        f"{even}{name} with the matrix {WORDS[verdict.verdict]} {name} without ({_apart(verdict)})."
    )
