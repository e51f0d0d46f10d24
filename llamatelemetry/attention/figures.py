"""Figures of notebook 12: maps of one head and of all heads, depth profiles, comparisons. All
return Plotly figures."""

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..views import theme
from ..views.text import plotly


def _visible(values, queries):
    """Keys after the query are not zero but absent: nan, so that they stay blank. queries: their
    positions."""
    values = np.array(values, dtype=float)
    return np.where(
        np.arange(values.shape[1])[None, :] > np.asarray(queries)[:, None], np.nan, values
    )


def token_map(values, pieces, *, title, unit, query_pieces=None, queries=None, zmax=1.0):
    """A (query, key) map with tokens on both axes. queries: positions of the rows where they are
    not all tokens."""
    queries = np.arange(len(values)) if queries is None else np.asarray(queries)
    columns = theme.token_labels(pieces)
    rows = [columns[q] for q in queries]
    below = 8 * min(
        theme.TICK, max(map(len, columns))
    )  # pixels of the upright labels, which are taken from the rows
    figure = theme.heatmap(
        _visible(values, queries),
        columns,
        rows,
        title=title,
        x_title="key token",
        y_title="query token",
        unit=unit,
        zmax=zmax,
        height=max(
            320, 720 if queries.size == len(columns) else below + min(760, 120 + 18 * len(rows))
        ),
    )
    figure.update_xaxes(tickangle=-90)
    return theme.label_ticks(theme.label_ticks(figure, columns, "x"), rows, "y")


def layer_head_map(values, *, title, unit, signed=False, zmax=None):
    """One value per head: (layer, head) drawn with layers to the right and heads downwards."""
    values = np.asarray(values).T  # (head, layer)
    figure = theme.heatmap(
        values,
        list(range(values.shape[1])),
        list(range(values.shape[0])),
        title=title,
        x_title="layer",
        y_title="head",
        unit=unit,
        signed=signed,
        zmax=zmax,
        height=max(320, 150 + 18 * len(values)),
    )
    figure.update_xaxes(dtick=max(1, values.shape[1] // 16))
    return figure.update_yaxes(dtick=max(1, values.shape[0] // 16))


def depth_profile(table, columns, *, title):
    """Values of all heads by layer, one panel per column of attention.patterns.head_table; the line
    is the mean.

    columns: {column: axis title with unit}.
    """
    figure = make_subplots(rows=1, cols=len(columns), horizontal_spacing=0.1)
    for i, (column, name) in enumerate(columns.items(), start=1):
        figure.add_scatter(
            x=table["layer"],
            y=table[column],
            mode="markers",
            marker=dict(color=theme.CATEGORIES[4], size=5),
            name="one head",
            showlegend=i == 1,
            customdata=table["head"],
            row=1,
            col=i,
            hovertemplate="layer %{x}, head %{customdata}: %{y:.4f}<extra></extra>",
        )
        mean = table.groupby("layer")[column].mean()
        figure.add_scatter(
            x=mean.index,
            y=mean,
            mode="lines",
            line=dict(color=theme.COLOR["attention"], width=3),
            name="mean of heads",
            showlegend=i == 1,
            row=1,
            col=i,
            hovertemplate="layer %{x}, mean: %{y:.4f}<extra></extra>",
        )
        figure.update_yaxes(title=plotly(name), rangemode="tozero", row=1, col=i)
        figure.update_xaxes(title="layer", **theme.whole(mean.index), row=1, col=i)
    legend = dict(orientation="h", y=1.12, x=1, xanchor="right")
    return figure.update_layout(**theme.titled(title), height=400, legend=legend)


def maps_side_by_side(maps, pieces, *, title, unit, zmax=1.0, own_scale=None):
    """Several (query, key) maps in one row on one scale. maps: {panel title: (query, key) values};
    own_scale: the title of the last panel where it has a scale of its own, from 0 to its largest
    value."""
    labels, unit = theme.token_labels(pieces), plotly(unit)
    values_of_axis = theme.axis_values(labels)
    figure = make_subplots(
        rows=1,
        cols=len(maps),
        subplot_titles=theme.axis_values(maps),
        shared_yaxes=True,
        horizontal_spacing=0.03,
    )
    for i, (name, values) in enumerate(maps.items(), start=1):
        figure.add_heatmap(
            z=_visible(values, np.arange(len(labels))),
            x=values_of_axis,
            y=values_of_axis,
            row=1,
            col=i,
            coloraxis="coloraxis2" if name == own_scale else "coloraxis",
            hovertemplate=f"query: %{{y}}<br>key: %{{x}}<br>{unit}: %{{z:.5f}}<extra></extra>",
        )
        figure.update_xaxes(title="key token", tickangle=-90, tickfont=dict(size=10), row=1, col=i)
    theme.label_ticks(figure, labels, "x", most=48 // len(maps))
    theme.label_ticks(figure, labels, "y", most=36)
    figure.update_yaxes(autorange="reversed", tickfont=dict(size=10))
    figure.update_yaxes(title="query token", col=1)
    scales = {"coloraxis": _scale(unit, zmax, 1.02)}
    if own_scale:
        scales["coloraxis2"] = _scale(
            plotly(own_scale), float(np.nanmax(maps[own_scale])) or 1.0, 1.14
        )
    return figure.update_layout(**theme.titled(title), height=620, margin=dict(t=90), **scales)


def _scale(unit, largest, x):
    bar = dict(title=dict(text=unit, side="right"), x=x, thickness=16)
    return dict(colorscale=theme.MAGNITUDE, cmin=0, cmax=largest, colorbar=bar)


def rollout_map(rolled, pieces, *, title):
    """Rollout of one query after every layer: (layer, key)."""
    labels = theme.token_labels(pieces)
    figure = theme.heatmap(
        np.asarray(rolled),
        labels,
        list(range(len(rolled))),
        title=title,
        x_title="input token",
        y_title="after layer",
        unit="rollout",
        zmax=1.0,
        height=440,
    )
    figure.update_xaxes(tickangle=-90)
    return theme.label_ticks(figure, labels, "x")


def token_bars(series, pieces, *, title, unit, colors=theme.CATEGORIES):
    """Several measures of every token as grouped bars. series: {name: (token,) values}."""
    figure = go.Figure(layout=dict(**theme.titled(title), barmode="group", height=420))
    labels = theme.token_labels(pieces)
    for (name, values), color in zip(series.items(), colors):
        name = plotly(name)
        figure.add_bar(
            x=theme.axis_values(labels),
            y=np.asarray(values, dtype=float),
            name=name,
            marker_color=color,
            hovertemplate=f"%{{x}}<br>{name}: %{{y:.4f}}<extra></extra>",
        )
    figure.update_xaxes(title="token", tickangle=-90)
    figure.update_yaxes(title=plotly(unit))
    return theme.label_ticks(figure, labels, "x", most=64).update_layout(
        legend=dict(orientation="h", y=1.08, x=1, xanchor="right")
    )


def stacked_bars(table, *, title, x_title, unit, labels=None):
    """Columns of a DataFrame stacked over its index, one colour per column. labels: texts in the
    index's place."""
    figure = go.Figure(layout=dict(**theme.titled(title), barmode="relative", height=420))
    for i, column in enumerate(table.columns):
        color = theme.COLOR.get(str(column), theme.CATEGORIES[i % 8])
        x, name = theme.axis_values(labels or table.index), plotly(column)
        figure.add_bar(
            x=x,
            y=table[column],
            name=name,
            marker_color=color,
            hovertemplate=f"{plotly(x_title)} %{{x}}<br>{name}: %{{y:.4f}}<extra></extra>",
        )
    if labels:
        theme.label_ticks(figure, labels, "x", most=64)
    figure.update_xaxes(title=plotly(x_title))
    figure.update_yaxes(title=plotly(unit))
    return figure.update_layout(legend=dict(orientation="h", y=1.08, x=1, xanchor="right"))


def logit_build_up(parts, pieces, *, title):
    """How the logits of chosen tokens come about: running sum of attention.output.logit_parts by
    layer."""
    figure = go.Figure(layout=dict(**theme.titled(title), height=440))
    for i, (row, piece) in enumerate(zip(parts.itertuples(), pieces)):
        steps = np.concatenate(
            [[row.embedding], np.asarray(row.by_layer).ravel()]
        )  # embedding, then attention, ffn
        where = np.concatenate([[-0.5], np.arange(len(steps) - 1) / 2])
        what = ["embedding"] + [
            f"layer {n // 2} {'ffn' if n % 2 else 'attention'}" for n in range(len(steps) - 1)
        ]
        figure.add_scatter(
            x=where,
            y=np.cumsum(steps),
            mode="lines",
            name=plotly(theme.token_text(piece)),
            text=what,
            line=dict(color=theme.CATEGORIES[i % 8], width=2),
            hovertemplate="after %{text}: %{y:.3f}<extra>%{fullData.name}</extra>",
        )
    figure.update_xaxes(
        title="layer (attention, then feed-forward)", **theme.whole(range((len(steps) - 1) // 2))
    )
    figure.update_yaxes(title="logit so far")
    return figure


def centrality_scatter(table, *, title):
    """PageRank and betweenness of token positions against the attention that they receive.

    table: columns position, piece, received (mean weight from later tokens), pagerank, betweenness.
    """
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.12)
    labels = theme.token_labels(table["piece"])
    names, short = (
        theme.axis_values(labels),
        [plotly(theme.shorten(label, theme.TICK)) for label in labels],
    )
    for i, column in enumerate(("pagerank", "betweenness"), start=1):
        largest = table[column].rank(ascending=False) <= 3
        figure.add_scatter(
            x=table["received"],
            y=table[column],
            mode="markers+text",
            row=1,
            col=i,
            showlegend=False,
            text=[name if big else "" for name, big in zip(short, largest)],
            textposition="middle right",
            customdata=names,
            marker=dict(
                color=table["position"],
                colorscale=theme.MAGNITUDE,
                size=9,
                showscale=i == 2,
                colorbar=dict(title=dict(text="position", side="right")),
            ),
            hovertemplate="%{customdata}<br>received: %{x:.4f}<br>"
            + column
            + ": %{y:.4f}<extra></extra>",
        )
        figure.update_xaxes(title="attention received, mean over heads", row=1, col=i)
        figure.update_xaxes(
            range=[-0.03, 1.25 * table["received"].max()], row=1, col=i
        )  # room for the labels
        figure.update_yaxes(title=f"{column} (share)", row=1, col=i)
    return figure.update_layout(**theme.titled(title), height=440)
