"""Figures of what heads do, how alike they are and what survives in another precision. Those of one
topic only lie beside its measures: importance.py has importance_figures.py."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from ..views import theme
from ..views.sentences import some
from ..views.text import plotly

GRID = 300  # rows of a distance matrix that are drawn; larger ones are averaged in blocks
MEASURE_COLOR = {  # ten: two of Paul Tol's muted colours beside the eight of the theme
    "sink": theme.CATEGORIES[7],
    "local": theme.CATEGORIES[0],
    "global": theme.CATEGORIES[4],
    "delimiter": theme.CATEGORIES[6],
    "positional": theme.CATEGORIES[2],
    "previous token": "#117733",
    "duplicate": theme.CATEGORIES[3],
    "induction": theme.CATEGORIES[5],
    "syntactic": theme.CATEGORIES[1],
    "semantic": "#882255",
}
HOVER = "%{text}<extra></extra>"
BASELINE = dict(color=theme.COLOR["key"], width=2)


def finished(figure: go.Figure, title: str, x: str = "", y: str = "", **layout: Any) -> go.Figure:
    """A figure with its title, plain text, and the titles of its axes."""
    figure.update_xaxes(title_text=x or None).update_yaxes(title_text=y or None)
    return figure.update_layout(**theme.titled(title), **layout)


def band(x: Sequence, low: Sequence, high: Sequence, color: str) -> go.Scatter:
    """What lies between two lines, filled."""
    outline = dict(x=[*x, *x[::-1]], y=[*low, *high[::-1]], mode="lines", line=dict(width=0))
    fill = dict(fill="toself", fillcolor=color, opacity=0.3)
    return go.Scatter(**outline, **fill, hoverinfo="skip", showlegend=False)


def _panels(titles, columns, gap, **options):
    """A figure of subplots and the place of each, by row."""
    rows = -(-len(titles) // columns)
    spacing = dict(vertical_spacing=gap / rows, subplot_titles=titles)
    figure = make_subplots(rows, columns, **spacing, **options)
    return figure, [(i // columns + 1, i % columns + 1) for i in range(len(titles))], rows


def _color_axis(title, low, high, **place):
    scale = theme.SIGNED if low < 0 else theme.MAGNITUDE
    return dict(colorscale=scale, cmin=low, cmax=high, colorbar=_bar(title, **place))


def _bar(title, **place):
    return dict(title=title, title_side="right", **place)


def measures(profiled: xr.Dataset, names: Sequence[str], *, title: str) -> go.Figure:
    """Small maps, one per measure: layer across, head down; shares on one scale, "semantic" around
    zero. Hover: value, interval, highest shuffled score."""
    if not len(names):
        return theme.nothing(title, "no measure to show")
    figure, cells, rows = _panels(list(names), 2, 0.28, horizontal_spacing=0.07)
    layers, heads = profiled["layer"].values.tolist(), profiled["head"].values.tolist()
    for name, (row, column) in zip(names, cells):
        part = profiled.sel(measure=name).transpose("head", "layer")
        heat = dict(z=np.round(part["value"].values, 4), x=layers, y=heads, hovertemplate=HOVER)
        axis = "coloraxis2" if name == "semantic" else "coloraxis"
        figure.add_heatmap(**heat, text=_scores(part, name), coloraxis=axis, row=row, col=column)
    axes = dict(coloraxis=_color_axis("share of attention", 0, 1, len=0.45, y=0.77, x=1.02))
    if "semantic" in names:
        limit = float(np.nanmax(np.abs(profiled["value"].sel(measure="semantic")))) or 1.0
        place = dict(len=0.45, y=0.23, x=1.02)
        axes["coloraxis2"] = _color_axis("rank correlation", -limit, limit, **place)
    finished(figure, title, height=170 * rows + 90, margin=dict(l=60, r=90, t=80, b=50), **axes)
    figure.update_xaxes(**theme.whole(layers)).update_xaxes(title_text="layer", row=rows)
    figure.update_yaxes(autorange="reversed", title_text="head", **theme.whole(heads))
    return figure.update_xaxes(title_standoff=2).update_yaxes(title_standoff=2)


def _scores(part, name):
    """Hover texts of one measure (head, layer)."""
    heads = [f"L{layer}H{head}" for head in part["head"].values for layer in part["layer"].values]
    columns = [part[key].values.ravel() for key in ("value", "low", "high", "baseline_high")]
    said = []
    for head, value, low, high, chance in zip(heads, *columns):
        interval = some(low, f"95% interval {{:.3f}} to {high:.3f}", "one text")
        said.append(f"{head}<br>{name} {value:.4f}<br>{interval}<br>highest shuffled {chance:.3f}")
    return np.reshape(said, part["value"].shape)


def baselines(profiled: xr.Dataset, earned: xr.DataArray, *, title: str) -> go.Figure:
    """Each head's score per label beside the largest shuffled score of any head; filled: the label
    is earned."""
    figure, rng = go.Figure(), np.random.default_rng(0)
    labels = earned["label"].values
    if not len(labels):
        return theme.nothing(title, "no label was measured")
    heads = profiled["value"].isel(measure=0).to_series().index
    for place, name in enumerate(labels):
        part = profiled.sel(measure=name)
        points = pd.DataFrame({"score": part["value"].values.ravel()})
        points["x"] = place + rng.uniform(-0.3, 0.3, len(points))
        points["earned"] = earned.sel(label=name).values.ravel()
        points["head"] = [f"L{layer}H{head}" for layer, head in heads]
        for has, some_points in points.dropna(subset="score").groupby("earned"):
            color = MEASURE_COLOR[name] if has else theme.COLOR["baseline"]
            marker = dict(size=5, color=color, symbol="circle" if has else "circle-open")
            said = f"{name} %{{y:.4f}}<br>{'earned' if has else 'not earned'}"
            figure.add_scatter(
                x=some_points["x"],
                y=some_points["score"],
                text=some_points["head"],
                mode="markers",
                marker=marker,
                opacity=0.8 if has else 0.35,
                showlegend=False,
                hovertemplate=f"%{{text}}<br>{said}<extra></extra>",
            )
        top = float(np.nanmax(part["baseline_high"].values))
        ends = dict(x0=place - 0.4, x1=place + 0.4, y0=top, y1=top)
        figure.add_shape(type="line", line=BASELINE, **ends)
    key = dict(x=[None], y=[None])  # the legend's entries
    for name, symbol, color in (
        ("label earned", "circle", theme.COLOR["attention"]),
        ("not earned", "circle-open", theme.COLOR["baseline"]),
    ):
        figure.add_scatter(
            **key, mode="markers", name=name, marker=dict(symbol=symbol, color=color)
        )
    name = "largest shuffled score of any head"
    figure.add_scatter(**key, mode="lines", name=name, line=BASELINE)
    y = "share of attention (semantic: correlation)"
    finished(figure, title, "behaviour", y, height=480, **theme.LEGEND_ABOVE)
    ticks = dict(tickvals=list(range(len(labels))), ticktext=list(labels), tickangle=-30)
    return figure.update_xaxes(**ticks, zeroline=False, range=[-0.6, len(labels) - 0.4])


def clusters(
    table: pd.DataFrame, coordinates: Mapping[str, np.ndarray], *, title: str
) -> go.Figure:
    """Heads as points, maps side by side. table: layer, head, cluster, labels; coordinates: {map
    name: (head, 2)}."""
    if table.empty or not coordinates:
        return theme.nothing(title, "no head to show")
    figure, cells, _ = _panels(list(coordinates), len(coordinates), 0, horizontal_spacing=0.08)
    for (row, column), xy in zip(cells, coordinates.values()):
        points = table.assign(x=xy[:, 0], y=xy[:, 1])
        for cluster, part in points.groupby("cluster"):
            color = theme.CATEGORIES[cluster % 8] if cluster >= 0 else theme.COLOR["baseline"]
            marker = dict(size=7, color=color, symbol=int(max(cluster, 0) // 8), opacity=0.85)
            figure.add_scatter(
                x=part["x"],
                y=part["y"],
                text=[f"L{head.layer}H{head.head}<br>{head.labels}" for head in part.itertuples()],
                mode="markers",
                marker=marker,
                name=f"cluster {cluster}" if cluster >= 0 else "no cluster",
                legendgroup=int(cluster),
                showlegend=column == 1,
                hovertemplate=HOVER,
                row=row,
                col=column,
            )
    finished(figure, title, "first coordinate", "second coordinate", height=500)
    figure.update_xaxes(showticklabels=False).update_yaxes(showticklabels=False, title_standoff=4)
    return figure.update_layout(legend=dict(orientation="h", y=-0.15))


def distances(
    distance: np.ndarray, order: Sequence[int], names: Sequence[str], *, title: str
) -> go.Figure:
    """All distances (head, head), heads in the given order, that of the dendrogram's leaves; more
    than GRID heads are averaged in blocks. names: of the heads as they are in the matrix."""
    order = np.asarray(order, int)
    if not len(order):
        return theme.nothing(title, "no head to compare")
    values, labels = distance[np.ix_(order, order)], [names[i] for i in order]
    step = -(-len(order) // GRID)
    if step > 1:
        size = len(order) // step * step
        values = values[:size, :size].reshape(size // step, step, size // step, step).mean((1, 3))
        labels = [f"{labels[i]} to {labels[i + step - 1]}" for i in range(0, size, step)]
    heat = go.Heatmap(
        z=np.round(values, 3),
        x=labels,
        y=labels,
        colorscale=theme.MAGNITUDE,
        zmin=0,
        zmax=float(values.max()) or 1,
        colorbar=_bar("distance"),
        hovertemplate="%{y}, %{x}<br>distance %{z}<extra></extra>",
    )
    ticks = [labels[i] for i in np.linspace(0, len(values) - 1, min(12, len(values))).astype(int)]
    axis = "head, by dendrogram"
    figure = finished(go.Figure(heat), title, axis, axis, height=620, width=760)
    figure.update_xaxes(type="category", tickvals=ticks, tickangle=-45)
    return figure.update_yaxes(type="category", tickvals=ticks, autorange="reversed")


def cover(curve: pd.DataFrame, n_heads: int, *, title: str) -> go.Figure:
    """How many heads are needed so that every head has one of them within a distance."""
    hover = "distance %{x:.2f}<br>%{y} heads<extra></extra>"
    line = dict(mode="lines+markers", line_color=theme.COLOR["attention"], hovertemplate=hover)
    figure = go.Figure(go.Scatter(x=curve["radius"], y=curve["heads"], **line))
    x = "distance within which a head counts as covered (0 to 1)"
    finished(figure, title, x, f"heads needed, of {n_heads}", height=380)
    return figure.update_yaxes(rangemode="tozero")


def depth(profiled: xr.Dataset, names: Sequence[str], *, title: str) -> go.Figure:
    """One panel per behaviour, layers across: the mean over a layer's heads, the middle half of
    them as a band, the largest dotted."""
    if not len(names):
        return theme.nothing(title, "no measure to show")
    options = dict(horizontal_spacing=0.1, shared_xaxes=True)
    figure, cells, rows = _panels(list(names), 2, 0.3, **options)
    finished(figure, title, "", "share", height=150 * rows + 110)
    layers = profiled["layer"].values.tolist()
    mode = "lines" if len(layers) > 1 else "markers"
    for name, (row, column) in zip(names, cells):
        value = profiled["value"].sel(measure=name).values  # (layer, head)
        color = MEASURE_COLOR.get(name, theme.COLOR["attention"])
        low, high = np.nanquantile(value, [0.25, 0.75], axis=1)
        figure.add_trace(band(layers, low, high, color), row, column)
        for what, y, line in (
            ("largest", np.nanmax(value, 1), dict(width=1, dash="dot")),
            ("mean", np.nanmean(value, 1), dict(width=2)),
        ):
            hover = f"{name}<br>layer %{{x}}<br>{what} %{{y:.3f}}<extra></extra>"
            drawn = dict(mode=mode, showlegend=False, line=line, line_color=color)
            points = go.Scatter(x=layers, y=y, marker_color=color, hovertemplate=hover, **drawn)
            figure.add_trace(points, row, column)
        if name == "semantic":
            figure.update_yaxes(title_text="correlation", row=row, col=column)
    figure.update_xaxes(**theme.whole(layers)).update_yaxes(title_standoff=4)
    return figure.update_xaxes(title_text="layer", row=rows)


def side_by_side(
    attention: xr.DataArray,
    shown: Mapping[tuple[int, int], str],
    pieces: Sequence[str | bytes],
    *,
    title: str,
) -> go.Figure:
    """The attention matrices of chosen heads. attention: (layer, head, query, key); shown: {(layer,
    head): what is said above its matrix, or ""}."""
    if not shown:
        return theme.nothing(title, "no head to show")
    notes = [f"L{layer}H{head}: {note}".rstrip(": ") for (layer, head), note in shown.items()]
    notes = [plotly(theme.shorten(note, 33)) for note in notes]
    figure, cells, rows = _panels(notes, min(3, len(notes)), 0.16, horizontal_spacing=0.04)
    labels = theme.axis_values(theme.token_labels(pieces))
    seen = np.tri(len(labels), dtype=bool)
    hover = "query %{y}<br>key %{x}<br>weight %{z:.5f}<extra></extra>"
    for (layer, head), (row, column) in zip(shown, cells):
        weights = np.where(seen, attention.sel(layer=layer, head=head), np.nan)
        heat = dict(z=np.round(weights, 5), x=labels, y=labels, hoverongaps=False)
        figure.add_heatmap(**heat, coloraxis="coloraxis", hovertemplate=hover, row=row, col=column)
    axis = _color_axis("attention weight", 0, 1)
    finished(figure, title, height=270 * rows + 110, coloraxis=axis)
    plain = dict(type="category", showticklabels=False, showgrid=False, zeroline=False, ticks="")
    figure.update_xaxes(**plain).update_yaxes(**plain, autorange="reversed")
    figure.update_yaxes(title_text="query", col=1)
    return figure.update_xaxes(title_text="key", row=rows)


def survival(comparison: pd.DataFrame, one: str, other: str, *, title: str) -> go.Figure:
    """Per behaviour: how many heads keep, lose and gain the label from one precision to the other.
    one, other: names of the files."""
    order = {name: place for place, name in enumerate(MEASURE_COLOR)}
    part, figure = comparison.dropna(subset=["labels"]), go.Figure()
    part = part.sort_index(key=lambda names: names.map(lambda name: order.get(name, len(order))))
    if part.empty:
        return theme.nothing(title, "no label was measured in both")
    if not part[["kept", "lost", "gained"]].to_numpy().any():
        return theme.nothing(title, "no head earns a label in either")
    for column, color, name in (
        ("kept", theme.CATEGORIES[2], "in both"),
        ("lost", theme.CATEGORIES[5], plotly(f"only in {one}")),
        ("gained", theme.CATEGORIES[4], plotly(f"only in {other}")),
    ):
        hover = "%{x}<br>%{y} heads<extra>" + name + "</extra>"
        bar = dict(name=name, marker_color=color, hovertemplate=hover)
        figure.add_bar(x=part.index, y=part[column], **bar)
    layout = dict(barmode="stack", height=420, **theme.LEGEND_ABOVE)
    finished(figure, title, "behaviour", "heads with the label", **layout)
    return figure.update_xaxes(tickangle=-30)
