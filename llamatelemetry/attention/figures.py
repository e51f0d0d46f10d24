"""Figures of attention: maps of one head and of all heads, depth profiles, comparisons, what the
last token draws on. `pieces` are the tokens' texts, plain."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import ArrayLike
from plotly.subplots import make_subplots

from ..views import theme
from ..views.packing import ends, said_ends
from ..views.text import plotly, shorten, token_labels, token_text

MOST = 200  # tokens on an axis of a map; beyond, the first and the last are drawn


def _visible(values, queries, keys):
    """Keys after the query are not zero but absent: nan, so that they stay blank. queries, keys:
    their positions."""
    values = np.array(values, dtype=np.float32)
    later = np.asarray(keys)[None, :] > np.asarray(queries)[:, None]
    return np.where(later, np.nan, values)


def token_map(
    values: ArrayLike,
    pieces: list,
    *,
    title: str,
    unit: str,
    queries: ArrayLike | None = None,
    zmax: float = 1.0,
) -> go.Figure:
    """A (query, key) map with tokens on both axes. queries: positions of the rows where they are
    not all tokens. Of more than MOST tokens the first and the last, as the title then says."""
    n, values = len(pieces), np.asarray(values)
    queries = np.arange(n - len(values), n) if queries is None else np.asarray(queries)
    shown = ends(n, MOST)
    drawn = np.flatnonzero(np.isin(queries, shown))
    values, queries = values[drawn][:, shown], queries[drawn]
    title += said_ends(n, shown)
    columns, labels = token_labels(pieces, shown), token_labels(pieces)
    rows = [labels[q] for q in queries]
    # Upright labels take their pixels from the rows.
    below = 8 * min(theme.TICK, max(map(len, columns)))
    part = max(320, below + min(760, 120 + 18 * len(rows)))
    look: dict[str, Any] = dict(unit=unit, zmax=zmax)
    look |= dict(title=title, x_title="key token", y_title="query token")
    look["height"] = 720 if len(rows) == len(columns) else part
    figure = theme.heatmap(_visible(values, queries, shown), columns, rows, **look)
    figure.update_xaxes(tickangle=-90)
    return theme.label_ticks(theme.label_ticks(figure, columns, "x"), rows, "y")


def layer_head_map(
    values: ArrayLike,
    *,
    title: str,
    unit: str,
    zmax: float | None = None,
    mark: float | None = None,
) -> go.Figure:
    """One value per head: (layer, head) drawn with layers to the right and heads downwards; what is
    above `mark` carries a dot."""
    values = np.asarray(values).T  # (head, layer)
    n_head, n_layer = values.shape
    look: dict[str, Any] = dict(title=title, x_title="layer", y_title="head", unit=unit, zmax=zmax)
    height = max(320, 150 + 18 * n_head)
    figure = theme.heatmap(values, range(n_layer), range(n_head), height=height, **look)
    if mark is not None:
        dots = np.where(values > mark, "•", "")
        figure.update_traces(text=dots, texttemplate="%{text}", textfont_size=9)
    figure.update_xaxes(dtick=max(1, n_layer // 16))
    return figure.update_yaxes(dtick=max(1, n_head // 16))


def depth_profile(table: pd.DataFrame, *, title: str) -> go.Figure:
    """Entropy and distance of all heads by layer, a panel each; the line is the mean. table:
    attention.patterns.head_table."""
    panels = {
        "entropy_normalised": "normalized entropy (0 to 1)",
        "distance": "mean distance (tokens)",
    }
    figure = make_subplots(rows=1, cols=len(panels), horizontal_spacing=0.1)
    for col, (column, name) in enumerate(panels.items(), start=1):
        place = dict(row=1, col=col)
        mean = table.groupby("layer")[column].mean()
        dots = dict(mode="markers", marker=dict(color=theme.CATEGORIES[4], size=5), name="one head")
        dots["hovertemplate"] = "layer %{x}, head %{customdata}: %{y:.4f}<extra></extra>"
        line = dict(mode="lines", line=dict(color=theme.COLOR["attention"], width=3))
        line["hovertemplate"] = "layer %{x}, mean: %{y:.4f}<extra></extra>"
        shown = place | dict(showlegend=col == 1)
        values, heads = table[column], table["head"]
        figure.add_scatter(x=table["layer"], y=values, customdata=heads, **dots, **shown)
        figure.add_scatter(x=mean.index, y=mean, name="mean of heads", **line, **shown)
        figure.update_yaxes(title=name, rangemode="tozero", **place)
        figure.update_xaxes(title="layer", **theme.whole(mean.index), **place)
    return figure.update_layout(**theme.titled(title), height=400, **theme.LEGEND_ABOVE)


def maps_side_by_side(
    maps: dict[str, ArrayLike],
    pieces: list,
    *,
    title: str,
    unit: str,
    own_scale: str | None = None,
) -> go.Figure:
    """Several (query, key) maps in one row on one scale, 0 to 1. maps: {panel title: values};
    own_scale: the title of the last panel where it has a scale of its own, from 0 to its largest
    value."""
    n, rows = len(pieces), np.shape(next(iter(maps.values())))[0]
    shown, unit = ends(n, MOST // 2), plotly(unit)
    queries = shown[shown >= n - rows]  # rows are those of the last queries
    maps = {name: np.asarray(x)[queries - (n - rows)][:, shown] for name, x in maps.items()}
    title += said_ends(n, shown)
    labels, below = token_labels(pieces, shown), token_labels(pieces, queries)
    tokens = theme.axis_values(labels)
    titles = theme.axis_values(maps)
    figure = make_subplots(
        rows=1, cols=len(maps), subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.03
    )
    for col, (name, values) in enumerate(maps.items(), start=1):
        figure.add_heatmap(
            z=_visible(values, queries, shown),
            x=tokens,
            y=theme.axis_values(below),
            coloraxis="coloraxis2" if name == own_scale else "coloraxis",
            hovertemplate=f"query: %{{y}}<br>key: %{{x}}<br>{unit}: %{{z:.5f}}<extra></extra>",
            row=1,
            col=col,
        )
        figure.update_xaxes(title="key token", tickangle=-90, tickfont_size=10, row=1, col=col)
    theme.label_ticks(figure, labels, "x", most=48 // len(maps))
    theme.label_ticks(figure, below, "y", most=36)
    figure.update_yaxes(autorange="reversed", tickfont_size=10)
    figure.update_yaxes(title="query token", col=1)
    scales = {"coloraxis": _scale(unit, 1.0, 1.02)}
    if own_scale:
        largest = float(np.nanmax(maps[own_scale])) or 1.0
        scales["coloraxis2"] = _scale(plotly(own_scale), largest, 1.14)
    return figure.update_layout(**theme.titled(title), height=620, margin=dict(t=90), **scales)


def _scale(unit, largest, x):
    bar = dict(title=dict(text=unit, side="right"), x=x, thickness=16)
    return dict(colorscale=theme.MAGNITUDE, cmin=0, cmax=largest, colorbar=bar)


def rollout(rolled: ArrayLike, pieces: list, *, title: str) -> go.Figure:
    """Rollout of one query after every layer: (layer, key)."""
    labels = token_labels(pieces)
    rolled = np.asarray(rolled)
    look: dict[str, Any] = dict(x_title="input token", y_title="after layer", unit="rollout")
    layers = range(len(rolled))
    figure = theme.heatmap(rolled, labels, layers, title=title, zmax=1.0, height=440, **look)
    figure.update_xaxes(tickangle=-90)
    return theme.label_ticks(figure, labels, "x")


def token_bars(flow: ArrayLike, mean: ArrayLike, pieces: list, *, title: str) -> go.Figure:
    """What the last token draws on: flow, and mean attention, (token,) each, side by side."""
    table = pd.DataFrame({"flow": np.asarray(flow), "mean attention": np.asarray(mean)})
    figure = _bars(table, "token", "share", title, token_labels(pieces))
    return figure.update_layout(barmode="group").update_xaxes(tickangle=-90)


def generated(split: pd.DataFrame, pieces: list, *, title: str) -> go.Figure:
    """Where each generated token looks. split: attention.patterns.generated_split; pieces: of the
    whole text."""
    labels = token_labels(pieces)
    shown = [labels[position] for position in split.index]
    return _bars(split, "generated token", "share of attention", title, shown)


def residual(shares: pd.DataFrame, *, title: str) -> go.Figure:
    """Who writes the final residual stream of a token. shares: layers.states.projection."""
    return _bars(shares[["attention", "ffn"]], "layer", "share of the final stream", title)


def _bars(table, x_title, unit, title, labels=None):
    """Columns of a DataFrame stacked over its index, one colour per column. labels: texts in the
    index's place."""
    figure = go.Figure(layout=dict(**theme.titled(title), barmode="relative", height=420))
    for i, (name, values) in enumerate(table.items()):
        figure.add_bar(
            x=theme.axis_values(labels or table.index),
            y=values,
            name=name,
            marker_color=theme.COLOR.get(name, theme.CATEGORIES[i % 8]),
            hovertemplate=f"{x_title} %{{x}}<br>{name}: %{{y:.4f}}<extra></extra>",
        )
    if labels:
        theme.label_ticks(figure, labels, "x", most=64)
    figure.update_xaxes(title=x_title).update_yaxes(title=unit)
    return figure.update_layout(**theme.LEGEND_ABOVE)


def logit_build_up(leads: list[pd.DataFrame], pieces: list, *, title: str) -> go.Figure:
    """How one token's lead over others comes about: the running sum of every block's addition, the
    embedding's first and the rest (biases, what else the stream holds) last.

    leads: of layers.lens.logit_attribution, one per rival; pieces: the rivals'."""
    figure = go.Figure(layout=dict(**theme.titled(title), height=440))
    for i, (lead, piece) in enumerate(zip(leads, pieces)):
        sums = lead.groupby("component")["value"].sum()
        blocks = lead[lead["layer"] >= 0].sort_values(["layer", "component"])  # attention, ffn
        steps = [sums["embedding"], *blocks["value"], sums["other"] + sums["bias"]]
        names = [f"layer {row.layer} {row.component}" for row in blocks.itertuples()]
        places = blocks["layer"] + np.where(blocks["component"] == "ffn", 0.5, 0.0)
        figure.add_scatter(
            x=[-0.5, *places, places.max() + 0.5],
            y=np.cumsum(steps),
            mode="lines",
            name=plotly(f"over {token_text(piece)}"),
            text=["embedding", *names, "the rest"],
            line=dict(color=theme.CATEGORIES[i % 8], width=2),
            hovertemplate="after %{text}: %{y:.3f}<extra>%{fullData.name}</extra>",
        )
    axis = theme.whole(sorted({*leads[0]["layer"]} - {-1}))
    figure.update_xaxes(title="layer (attention, then feed-forward)", **axis)
    return figure.update_yaxes(title="lead in logit so far", zeroline=True)


def centrality(table: pd.DataFrame, *, title: str) -> go.Figure:
    """PageRank and betweenness of token positions against the attention that they receive. table:
    attention.flow.token_nodes."""
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.12)
    labels = token_labels(table["piece"])
    names, short = theme.axis_values(labels), [plotly(shorten(x, theme.TICK)) for x in labels]
    bar = dict(title=dict(text="position", side="right"))
    for col, column in enumerate(("pagerank", "betweenness"), start=1):
        place = dict(row=1, col=col)
        largest = table[column].rank(ascending=False) <= 3
        marker = dict(color=table["position"], colorscale=theme.MAGNITUDE, size=9, colorbar=bar)
        figure.add_scatter(
            x=table["received"],
            y=table[column],
            mode="markers+text",
            showlegend=False,
            text=[name if big else "" for name, big in zip(short, largest)],
            textposition="middle right",
            customdata=names,
            marker=dict(showscale=col == 2, **marker),
            hovertemplate=(
                f"%{{customdata}}<br>received: %{{x:.4f}}<br>{column}: %{{y:.4f}}<extra></extra>"
            ),
            **place,
        )
        # Room for the labels.
        room = [-0.03, 1.25 * table["received"].max()]
        figure.update_xaxes(title="attention received, mean over heads", range=room, **place)
        figure.update_yaxes(title=f"{column} (share)", **place)
    return figure.update_layout(**theme.titled(title), height=440)
