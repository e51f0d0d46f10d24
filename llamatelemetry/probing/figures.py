"""Figures of probes: accuracy over layers with intervals and control, one file or several."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from ..views.panels import add_line, name_axes, panels
from ..views.text import plotly
from ..views.theme import CATEGORIES, COLOR

STATE = "state (0: embedding, l: after layer l - 1)"


def _band(figure, table, name, color, col=1):
    """Interval behind a line."""
    x = [*table.index, *table.index[::-1]]
    look = dict(fill="toself", line_width=0, opacity=0.25, hoverinfo="skip", showlegend=False)
    y = [*table["high"], *table["low"][::-1]]
    figure.add_scatter(
        x=x, y=y, fillcolor=color, mode="lines", legendgroup=plotly(name), row=1, col=col, **look
    )


def probes(tables: Mapping[str, pd.DataFrame], *, title: str) -> go.Figure:
    """Accuracy of the probes of every layer, with 95% intervals, beside what shuffled labels give.

    tables: {what is probed: DataFrame of `probes.by_layer`}. Dotted: the largest of the shuffled
    controls, in the colour of the labels that were shuffled."""
    figure = panels(title)
    for (name, table), color in zip(tables.items(), CATEGORIES):
        _band(figure, table, name, color)
        shared: dict[str, Any] = dict(color=color, unit=".1%", legendgroup=plotly(name))
        add_line(figure, table.index, table["accuracy"], name, **shared)
        called = f"{name}, labels shuffled"
        add_line(figure, table.index, table["shuffled_high"], called, dash="dot", **shared)
    name_axes(figure, STATE, "accuracy on unseen groups", table.index, tickformat=".0%")
    return figure


def across(
    table: pd.DataFrame, *, title: str, colors: Mapping[str, str] | None = None
) -> go.Figure:
    """Left, accuracy of each file's own probes with their intervals; right, of the first file's
    probes on every file's states. table: DataFrame of `probes.across`; colors: of the files, None
    for colours by place. Dotted: the share of the commonest label."""
    files = table.index.unique("file")
    colors = dict(zip(files, CATEGORIES)) if colors is None else colors
    titles = ("a probe of each file", plotly(f"the probe of {files[0]} on all"))
    figure = panels(
        title, cols=2, subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.06
    )
    for name, part in table.groupby(level="file", sort=False):
        part, color = part.droplevel("file"), colors[name]
        _band(figure, part, name, color)
        shared: dict[str, Any] = dict(color=color, unit=".1%", legendgroup=plotly(name))
        add_line(figure, part.index, part["accuracy"], name, **shared)
        add_line(figure, part.index, part["moved"], name, col=2, showlegend=False, **shared)
    for col in (1, 2):
        figure.add_hline(
            y=table["majority"].iloc[0],
            line=dict(color=COLOR["baseline"], dash="dot"),
            row=1,
            col=col,
        )
        y_title = "accuracy on unseen groups" if col == 1 else None
        name_axes(figure, STATE, y_title, part.index, col=col, tickformat=".0%")
    below = dict(orientation="h", x=0, xanchor="left", y=-0.25, yanchor="top")
    return figure.update_layout(
        legend=below, margin_t=110
    )  # room for two lines and the panels' titles
