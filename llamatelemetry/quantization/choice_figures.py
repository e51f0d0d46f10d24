"""Figures of notebook 16 on what to take: tasks, texts, and mixtures of a given size."""

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..views import theme
from ..views.text import plotly
from .figures import KLD, colors, decades

TYPE_COLORS = dict(zip(("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"), theme.CATEGORIES))


def tasks(table: pd.DataFrame, *, title: str) -> go.Figure:
    """Above, the accuracy of each file on each set of tasks with its 95% interval, a dotted line
    for chance; below, which share of the answers turned from right to wrong and from wrong to
    right against the reference.

    table: a TaskComparison, indexed by (tasks, name), the reference first."""
    drawn = table.dropna(subset="accuracy")
    if drawn.empty:
        return theme.nothing(title, "no task was done")
    sets, dotted = (
        list(drawn.index.unique("tasks")),
        dict(dash="dot", color=theme.COLOR["baseline"]),
    )
    figure = make_subplots(
        rows=2, cols=len(sets), shared_xaxes=True, shared_yaxes="rows", vertical_spacing=0.08
    )
    for col, name in enumerate(sets, 1):
        rows = drawn.xs(name, level="tasks")
        files = [plotly(one) for one in rows.index]
        look = colors(rows.index[1:]) | {rows.index[0]: theme.COLOR["reference"]}
        ends = dict(
            array=rows["accuracy_high"] - rows["accuracy"],
            arrayminus=rows["accuracy"] - rows["accuracy_low"],
            color=theme.COLOR["baseline"],
        )
        figure.add_scatter(
            x=files,
            y=rows["accuracy"],
            error_y=ends,
            mode="markers",
            marker=dict(size=10, color=[look[one] for one in rows.index]),
            showlegend=False,
            customdata=rows[["n", "changed"]],
            hovertemplate="%{x}: %{y:.1%} of %{customdata[0]} tasks<br>other answers than the "
            "reference: %{customdata[1]:.1%}<extra></extra>",
            row=1,
            col=col,
        )
        figure.add_hline(rows["chance"].iloc[0], line=dotted, row=1, col=col)
        for column, text, sign, color in (
            ("right_to_wrong", "right to wrong", -1, theme.CATEGORIES[5]),
            ("wrong_to_right", "wrong to right", 1, theme.CATEGORIES[0]),
        ):
            figure.add_bar(
                x=files[1:],
                y=sign * rows[column].iloc[1:],
                name=text,
                marker_color=color,
                legendgroup=text,
                showlegend=col == 1,
                hovertemplate=f"%{{x}}: %{{y:+.1%}} {text}<extra></extra>",
                row=2,
                col=col,
            )
        figure.update_xaxes(title=plotly(name), row=2, col=col)
    figure.update_layout(**theme.titled(title), barmode="relative", height=560)
    figure.update_layout(legend=dict(orientation="h", y=-0.2))
    figure.update_yaxes(title="accuracy", tickformat=".0%", row=1, col=1)
    figure.update_yaxes(title="share of the tasks", tickformat=".0%", row=2, col=1)
    return figure.update_xaxes(type="category")


def by_text(table: pd.DataFrame, *, title: str) -> go.Figure:
    """Mean KL divergence of each file on each text, with its 95% interval: lines that cross are
    files whose order the text decides. table: agreement.by_text."""
    drawn = table.dropna(subset="kld_mean")
    if drawn.empty:
        return theme.nothing(title, "no file was measured")
    figure = go.Figure(layout=dict(**theme.titled(title), xaxis_title="text", yaxis_title=KLD))
    color = colors(drawn.index.unique("name"))
    for name, rows in drawn.groupby(level="name", sort=False):
        mean = rows["kld_mean"]
        figure.add_scatter(
            x=[plotly(text) for text in rows.index.get_level_values("text")],
            y=np.maximum(mean, 1e-9),
            error_y=dict(
                array=(rows["kld_mean_high"] - mean).fillna(0),
                arrayminus=(mean - rows["kld_mean_low"]).fillna(0),
            ),
            mode="lines+markers",
            name=plotly(name),
            line_color=color[name],
            customdata=rows[["rank", "n_tokens"]],
            hovertemplate=f"%{{x}}: %{{y:.4g}} nats, rank %{{customdata[0]}}<br>%{{customdata[1]}} "
            f"tokens<extra>{plotly(name)}</extra>",
        )
    return decades(figure).update_xaxes(type="category")


def group_costs(table: pd.DataFrame, *, title: str) -> go.Figure:
    """What each group of tensors costs at each type, as bars on a log scale, the largest group
    first. table: Costs.table; what does not cost more than Q8_0 has no bar."""
    drawn = table[table["cost"] > 0]
    if drawn.empty:
        return theme.nothing(title, "no group costs more than in Q8_0")
    figure = go.Figure(layout=dict(**theme.titled(title), barmode="group"))
    order = table.groupby("group")["bytes"].max().sort_values(ascending=False).index
    for kind, rows in drawn.groupby("type", sort=True):
        figure.add_bar(
            x=[plotly(group) for group in rows["group"]],
            y=rows["cost"],
            name=plotly(kind),
            marker_color=TYPE_COLORS.get(kind, theme.MISSING),
            customdata=np.stack([rows["inside"], rows["bytes"] / 1e6], axis=1),
            hovertemplate="%{x} in %{customdata[0]}: %{y:.3g} nats<br>%{customdata[1]:.2f} MB"
            "<extra></extra>",
        )
    axis = "nats more than in Q8_0 (log scale)"
    figure.update_xaxes(
        title="group of tensors", categoryorder="array", categoryarray=list(map(plotly, order))
    )
    return decades(figure).update_yaxes(title=axis)


def sizes(
    measured: pd.DataFrame,
    expected: Mapping[int, float],
    *,
    files: Iterable[str] = (),
    title: str,
) -> go.Figure:
    """Mean KL divergence by size of files, measured, and what the best mixture of each size is
    expected to have if costs add up.

    measured: rows of a Comparison, with kld_mean_low and kld_mean_high; expected: {bytes: nats};
    files: names whose colours come first, so that a file has the one it has elsewhere."""
    drawn = measured.dropna(subset="kld_mean")
    if drawn.empty:
        return theme.nothing(title, "no file was measured")
    figure = go.Figure(layout=dict(**theme.titled(title), xaxis_title="size (MB)", yaxis_title=KLD))
    figure.add_scatter(
        x=[size / 1e6 for size in expected],
        y=list(expected.values()),
        mode="lines",
        name="best mixture, expected",
        line=dict(color=theme.COLOR["baseline"], dash="dot", shape="hv"),
        hovertemplate="%{x:.1f} MB: %{y:.4g} nats<extra>expected</extra>",
    )
    color = colors(dict.fromkeys([*files, *drawn.index]))
    for name, row in drawn.iterrows():
        mean, ends = row["kld_mean"], (row["kld_mean_low"], row["kld_mean_high"])
        low, high = (mean if np.isnan(end) else end for end in ends)
        figure.add_scatter(
            x=[row["size_bytes"] / 1e6],
            y=[max(mean, 1e-9)],
            error_y=dict(array=[high - mean], arrayminus=[mean - low]),
            mode="markers",
            name=plotly(name),
            marker=dict(size=11, color=color[name]),
            hovertemplate=f"%{{x:.2f}} MB<br>%{{y:.4g}} nats<extra>{plotly(name)}</extra>",
        )
    return decades(figure)
