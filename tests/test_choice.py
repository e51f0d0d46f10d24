"""Figures and sentences on what to take: tasks, texts and mixtures, on hand-built tables."""

import numpy as np
import pandas as pd
import pytest

from llamatelemetry.compare.paired import Paired
from llamatelemetry.convert.mixture import Costs
from llamatelemetry.quantization import choice_figures, choice_say
from llamatelemetry.quantization import figures as quantization_figures


def flat(text):
    return " ".join(text.split())


def done(verdict):
    rows = [("ends", "reference"), ("ends", "a"), ("ends", "b")]
    table = pd.DataFrame(
        {
            "n": 40,
            "accuracy": [0.8, 0.7, np.nan],
            "accuracy_low": [0.6, 0.5, np.nan],
            "accuracy_high": [0.9, 0.8, np.nan],
            "chance": 0.25,
            "right_to_wrong": [np.nan, 0.2, np.nan],
            "wrong_to_right": [np.nan, 0.1, np.nan],
            "changed": [np.nan, 0.35, np.nan],
            "difference": [np.nan, -0.1, np.nan],
            "low": [np.nan, -0.2, np.nan],
            "high": [np.nan, -0.01, np.nan],
            "verdict": [None, verdict, None],
        },
        index=pd.MultiIndex.from_tuples(rows, names=["tasks", "name"]),
    )
    return table


def test_tasks():
    figure = choice_figures.tasks(done("less"), title="t")
    dots, lost, won = figure.data
    assert list(dots.x) == ["reference", "a"] and list(dots.y) == [0.8, 0.7]
    assert dots.error_y.array.tolist() == pytest.approx([0.1, 0.1])
    assert list(lost.y) == [-0.2] and list(won.y) == [0.1]
    assert figure.layout.shapes[0].y0 == 0.25  # chance
    said = flat(choice_say.tasks(done("less")))
    assert "told apart from the reference: a on ends (-10.0%, -20.0% to -1.0%)" in said
    assert "most answers change in a on ends (35% of 40)" in said
    assert "on no set is a file's accuracy told apart" in flat(
        choice_say.tasks(done("cannot be told"))
    )
    assert flat(choice_say.tasks(done("less").assign(changed=0.0))).endswith("no answer changes.")
    none = done("less").iloc[:0]
    assert choice_figures.tasks(none, title="t").layout.annotations[0].text.startswith("no ")
    assert "nothing to say" in choice_say.tasks(none)


def test_texts():
    index = pd.MultiIndex.from_product([["x", "y"], ["a", "b"]], names=["text", "name"])
    table = pd.DataFrame({"kld_mean": [0.1, 0.2, 0.4, 0.3], "rank": [1, 2, 2, 1]}, index=index)
    table = table.assign(kld_mean_low=np.nan, kld_mean_high=np.nan, n_tokens=8)
    figure = choice_figures.by_text(table, title="t")
    assert [list(line.y) for line in figure.data] == [[0.1, 0.4], [0.2, 0.3]]
    assert [list(line.x) for line in figure.data] == [["x", "y"]] * 2
    one = pd.MultiIndex.from_tuples([("a", "b")], names=["less", "more"])
    pairs = pd.DataFrame({"x": ["less"], "y": ["more"], "depends": [True]}, index=one)
    tau = pd.DataFrame([[1.0, -1.0], [-1.0, 1.0]], ["x", "y"], ["x", "y"])
    said = flat(choice_say.by_text(pairs, tau))
    assert "is -1.00, 1 of 1 pair told apart" in said and "for a and b" in said
    same = pairs.assign(y="less", depends=False)
    assert "no pair is told to lie" in flat(choice_say.by_text(same, tau * np.nan))
    assert "no order" in choice_say.by_text(pairs.iloc[:0], tau)


def costs():
    return pd.DataFrame(
        {
            "group": ["q", "q", "k", "k"],
            "type": ["Q4_K", "Q8_0"] * 2,
            "inside": ["Q5_0", "Q8_0", "Q4_K", "Q8_0"],
            "bytes": np.array([1, 3, 1, 2]) * 2**20,
            "cost": [0.4, 0, 0.1, 0],
        }
    )


def test_groups():
    figure = choice_figures.group_costs(costs(), title="t")
    assert list(figure.data[0].y) == [0.4, 0.1] and figure.layout.yaxis.type == "log"
    assert list(figure.layout.xaxis.categoryarray) == ["q", "k"]  # the largest first
    said = flat(choice_say.group_costs(costs()))
    assert said == (
        "Dearest is q in Q5_0 (0.2 nats per MiB saved), cheapest k in Q4_K (0.1 nats per MiB saved)."
    )
    base = costs()[costs()["type"] == "Q8_0"]
    assert choice_figures.group_costs(base, title="t").layout.annotations[0].text.startswith("no ")
    assert "nothing to choose" in choice_say.group_costs(base)
    assert "no two different costs to compare (q in Q5_0: 0.2" in choice_say.group_costs(
        costs().iloc[:2]
    )
    equal = costs().assign(cost=[0.4, 0, 0.2, 0])
    assert "no two different costs" in choice_say.group_costs(equal)
    told = Costs(costs(), "x", 0.1, 12.3, {"Q3_K": 40.0})
    assert flat(choice_say.reckoned(told)) == (
        "2 files in which one group is not Q8_0, reckoned to take 12 s. "
        "Left out for want of time: Q3_K (40 s)."
    )


def test_sizes():
    found = pd.DataFrame(
        {"size_bytes": [9e6, 8e6], "kld_mean": [0.1, 0.2], "kld_mean_low": np.nan},
        index=["mixture", "random"],
    ).assign(kld_mean_high=[0.12, np.nan])
    figure = choice_figures.sizes(found, {8_000_000: 0.3, 9_000_000: 0.09}, title="t")
    line, mixture, other = figure.data
    assert list(line.x) == [8, 9] and list(mixture.x) == [9] and list(other.y) == [0.2]
    assert mixture.error_y.array == pytest.approx([0.02]) and other.error_y.array == (0,)
    shown = choice_figures.sizes(found, {}, files=["Q8_0", "random"], title="t").data[1:]
    first = quantization_figures.colors(["Q8_0", "random", "mixture"])
    assert {mark.name: mark.marker.color for mark in shown}.items() <= first.items()
    verdicts = {
        "random": Paired(-0.1, -0.2, -0.05, "less"),
        "Q4_K_M": Paired(0.01, -0.1, 0.1, "cannot be told"),
    }
    said = flat(choice_say.sizes(found, 0.09, verdicts))
    assert "Expected were 0.09 nats if costs add up, measured on another text 0.1." in said
    assert "closer than random (-0.1 nats, -0.2 to -0.05)" in said
    assert "cannot be told apart from Q4_K_M" in said
    one = {"random": Paired(-0.1, np.nan, np.nan, "cannot be told")}  # of a single window
    said = flat(choice_say.sizes(found, 0.09, one))
    assert said.endswith("apart from random (-0.1 nats, of one window, without an interval).")
    assert "no other file" in choice_say.sizes(found, 0.09, {})
    none = choice_figures.sizes(found.iloc[:0], {}, title="t")
    assert none.layout.annotations[0].text.startswith("no ")


def test_importance():
    held = pd.DataFrame({"tensor": ["up", "down", "up"], "entropy_share": [0.9, 0.2, 0.7]})
    said = flat(choice_say.importance(held, Paired(-0.1, -0.2, -0.05, "less"), "Q4_0"))
    assert "least evenly over the columns of down (20%) and most over those of up (80%)" in said
    even = flat(choice_say.importance(held.assign(entropy_share=1.0), Paired(0, 0, 0, "less"), "x"))
    assert "evenly" not in even
    assert "Q4_0 with the matrix is closer than Q4_0 without (-0.1 nats, -0.2 to -0.05)" in said
