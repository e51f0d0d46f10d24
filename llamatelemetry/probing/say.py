"""Sentences under the figures of probes, computed."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from ..views.sentences import counted, listed, sentence


def _best(name, accuracy):
    """(the first state of the largest accuracy, "NAME is read ...")."""
    states = accuracy.index[accuracy == accuracy.max()].tolist()
    if len(accuracy) == 1:
        return states[0], f"{name} is read at state {states[0]}"
    if len(states) == 1:
        return states[0], f"{name} is read best at state {states[0]}"
    if len(states) == len(accuracy):
        return states[0], f"{name} is read alike at all {len(states)} states"
    return states[0], f"{name} is read best at {len(states)} states, first at state {states[0]}"


def _one(name, table):
    best, said = _best(name, table["accuracy"])
    row = table.loc[best]
    said = f"{said}: {row.accuracy:.0%} ({row.low:.0%} to {row.high:.0%})"
    above, controls = table["majority"], f"the commonest label alone is {row.majority:.0%}"
    if np.isfinite(row.shuffled_high):
        above = table[["majority", "shuffled_high"]].max(axis=1)
        controls = f"with shuffled labels at most {row.shuffled_high:.0%}, {controls}"
    clear = table.index[table["low"] > above]
    if not len(clear):
        return f"{said}, {controls}; at no state is the interval above these"
    return (
        f"{said}, {controls}; the interval is above these at {len(clear)} of "
        f"{counted(len(table), 'state')}, first at state {clear[0]}"
    )


@sentence
def probes(tables: Mapping[str, pd.DataFrame]) -> str:
    sizes = [(table.attrs["n"], table.attrs["groups"]) for table in tables.values()]
    counts = listed(f"{n} texts in {groups} groups" for n, groups in dict.fromkeys(sizes))
    return f"On {counts}: {'. '.join(_one(*pair) for pair in tables.items())}."


@sentence
def across(table: pd.DataFrame) -> str:
    files = table.index.get_level_values("file").unique()
    best, said = _best(files[0], table.loc[files[0], "accuracy"])
    row = table.loc[(files[0], best)]
    said = f"{said}, {row.accuracy:.0%}."
    if row.low <= row.majority:
        said += (
            f" Its interval, {row.low:.0%} to {row.high:.0%}, is not above the {row.majority:.0%} that the commonest "
            "label alone gives: there is nothing that a file could lose."
        )
        return said
    facts = []
    for name in files[1:]:
        row = table.loc[(name, best)]
        ends = f"{100 * row.lost_low:+.1f} to {100 * row.lost_high:+.1f}"
        sure = "" if row.lost_low > 0 or row.lost_high < 0 else ", not told from 0"
        facts.append(
            f"At state {best} a probe of {name} has {row.accuracy:.0%} ({100 * row.lost:+.1f} points lost, "
            f"{ends}{sure}); "
            f"that of {files[0]} has {row.moved:.0%} on the states of {name}."
        )
    return " ".join([said, *facts])
