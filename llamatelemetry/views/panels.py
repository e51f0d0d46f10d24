"""What figures of several lines and panels are made of: the panels, their axes, lines, bars, and
ticks that are tokens."""

from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from . import theme
from .text import plotly


def panels(title: str, height: int = 440, rows: int = 1, cols: int = 1, **grid) -> go.Figure:
    """An empty figure in the theme, with room for its legend above. grid: as make_subplots'."""
    legend = dict(orientation="h", y=1.02, yanchor="bottom", x=1, xanchor="right")
    figure = make_subplots(rows=rows, cols=cols, **grid)
    look = dict(height=height, legend=legend, margin=dict(t=90))
    return figure.update_layout(**theme.titled(title), **look)


def name_axes(figure, x_title, y_title, depth=(), row=1, col=1, **y_axis) -> go.Figure:
    """Title both axes of a panel. depth: the layers or states that its horizontal axis counts;
    y_axis: more about the vertical one."""
    figure.update_xaxes(title=x_title, **theme.whole(depth), row=row, col=col)
    return figure.update_yaxes(title=y_title, **y_axis, row=row, col=col)


def add_line(figure, x, y, name, color, dash=None, unit=".4g", row=1, col=1, **more) -> None:
    """Add a line with a dot at every value. unit: how the hover writes a value, as d3 formats."""
    name = plotly(name)
    look = dict(mode="lines+markers", line=dict(color=color, width=2, dash=dash))
    hover = f"%{{x}}: %{{y:{unit}}}<extra>{name}</extra>"
    more |= dict(marker=dict(size=4), hovertemplate=hover, **look)
    figure.add_scatter(x=x, y=y, name=name, row=row, col=col, **more)


def add_bars(figure, x, y, name, color, hover=None, row=1, col=1, **more) -> None:
    """Add bars of one colour. hover: Plotly's template of a value, None for its own."""
    name = plotly(name)
    more |= dict(hovertemplate=hover and f"{hover}<extra>{name}</extra>")
    figure.add_bar(x=x, y=y, name=name, marker_color=color, row=row, col=col, **more)


def name_tokens(
    figure: go.Figure, labels: Sequence[str], title: str, angle: int, most: int = 48, **where
) -> go.Figure:
    """Labels of tokens on a horizontal axis, at most so many of them. where: row, col."""
    return theme.label_ticks(figure, labels, "x", most=most, title=title, tickangle=angle, **where)
