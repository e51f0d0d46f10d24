"""What figures of several lines and panels are made of: the panels, their axes, lines, bars, and
ticks that are tokens."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from . import theme
from .text import plotly

Values: TypeAlias = Sequence | np.ndarray | pd.Series | pd.Index  # of one axis


def panels(title: str, height: int = 440, rows: int = 1, cols: int = 1, **grid: Any) -> go.Figure:
    """An empty figure in the theme, with room for its legend above. grid: as make_subplots'."""
    figure = make_subplots(rows=rows, cols=cols, **grid)
    return figure.update_layout(**theme.titled(title), height=height, **theme.LEGEND_ABOVE)


def name_axes(
    figure: go.Figure,
    x_title: str | None,
    y_title: str | dict | None,
    depth: Values = (),
    row: int = 1,
    col: int = 1,
    **y_axis: Any,
) -> go.Figure:
    """Title both axes of a panel. depth: the layers or states that its horizontal axis counts;
    y_axis: more about the vertical one."""
    figure.update_xaxes(title=x_title, **theme.whole(depth), row=row, col=col)
    return figure.update_yaxes(title=y_title, **y_axis, row=row, col=col)


def add_line(
    figure: go.Figure,
    x: Values,
    y: Values,
    name: str,
    color: str,
    dash: str | None = None,
    unit: str = ".4g",
    row: int = 1,
    col: int = 1,
    **more: Any,
) -> None:
    """Add a line with a dot at every value. unit: how the hover writes a value, as d3 formats."""
    name = plotly(name)
    look = dict(mode="lines+markers", line=dict(color=color, width=2, dash=dash))
    hover = f"%{{x}}: %{{y:{unit}}}<extra>{name}</extra>"
    more |= dict(marker=dict(size=4), hovertemplate=hover, **look)
    figure.add_scatter(x=x, y=y, name=name, row=row, col=col, **more)


def add_bars(
    figure: go.Figure,
    x: Values,
    y: Values,
    name: str,
    color: str,
    hover: str | None = None,
    row: int = 1,
    col: int = 1,
    **more: Any,
) -> None:
    """Add bars of one colour. hover: Plotly's template of a value, None for its own."""
    name = plotly(name)
    more |= dict(hovertemplate=hover and f"{hover}<extra>{name}</extra>")
    figure.add_bar(x=x, y=y, name=name, marker_color=color, row=row, col=col, **more)


def name_tokens(
    figure: go.Figure, labels: Sequence[str], title: str, angle: int, most: int = 48, **where: int
) -> go.Figure:
    """Labels of tokens on a horizontal axis, at most so many of them. where: row, col."""
    figure.update_xaxes(title=title, tickangle=angle, **where)
    return theme.label_ticks(figure, labels, "x", most=most, **where)
