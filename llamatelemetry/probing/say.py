"""Sentences under the figures of probes, computed."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from ..views.sentences import listed, sentence


def _one(name, table):
    best = table["accuracy"].idxmax()
    row = table.loc[best]
    said = (
        f"{name} is read best at layer {best}: {row.accuracy:.0%} ({row.low:.0%} to {row.high:.0%})"
    )
    if not np.isfinite(row.shuffled_high):
        return said
    clear = table.index[table["low"] > table["shuffled_high"]]
    said += f", with shuffled labels at most {row.shuffled_high:.0%}"
    if not len(clear):
        return f"{said}; at no layer is the interval above those"
    return f"{said}; the interval is above those at {len(clear)} of {len(table)} layers, first at layer {clear[0]}"


@sentence
def probes(tables: Mapping[str, pd.DataFrame]) -> str:
    sizes = [(table.attrs["n"], table.attrs["groups"]) for table in tables.values()]
    counts = listed(f"{n} texts in {groups} groups" for n, groups in dict.fromkeys(sizes))
    return f"On {counts}: {'. '.join(_one(*pair) for pair in tables.items())}."


@sentence
def across(table: pd.DataFrame) -> str:
    files = table.index.get_level_values("file").unique()
    best = table.loc[files[0], "accuracy"].idxmax()
    said = (
        f"{files[0]} is read best at layer {best}, {table.loc[(files[0], best), 'accuracy']:.0%}."
    )
    facts = []
    for name in files[1:]:
        row = table.loc[(name, best)]
        ends = f"{100 * row.lost_low:+.1f} to {100 * row.lost_high:+.1f}"
        sure = "" if row.lost_low > 0 or row.lost_high < 0 else ", which 0 lies in"
        facts.append(
            f"There {name} has {row.accuracy:.0%} ({100 * row.lost:+.1f} points lost, {ends}{sure}); the probe of "
            f"{files[0]} reads {row.moved:.0%} of it."
        )
    return " ".join([said, *facts])
