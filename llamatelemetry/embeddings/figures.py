"""Figures of token embeddings: norms, spectra, projections, clusters, analogies, senses by layer,
two precisions."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import ArrayLike
from plotly.subplots import make_subplots

from ..views import theme
from ..views.text import plotly, shorten, token_text
from ..views.theme import CATEGORIES, COLOR, LEGEND_ABOVE, axis_values, decades, titled, whole

# 3-D markers; colours repeat after len(CATEGORIES) groups
_SYMBOLS = ("circle", "diamond", "square", "cross", "x")
_SERIES = (COLOR["embedding"], CATEGORIES[0], COLOR["baseline"])


def _labels(pieces: Iterable[str | bytes]) -> list[str]:
    """Token texts for Plotly: spaces and newlines visible, escaped."""
    return [plotly(token_text(piece)) for piece in pieces]


def norms(tokens: pd.DataFrame, *, title: str) -> go.Figure:
    """Box per kind of token (quartiles, whiskers at the 1st and 99th percentile), computed here so
    that the figure holds no more than it shows. tokens: `token_table`."""
    kinds = tokens.groupby("kind")["norm"]
    parts = kinds.quantile([0.01, 0.25, 0.5, 0.75, 0.99]).unstack().sort_values(0.5)
    ends = dict(zip(("lowerfence", "q1", "median", "q3", "upperfence"), parts.to_numpy().T))
    labels = [plotly(f"{kind} ({count:,})") for kind, count in kinds.size()[parts.index].items()]
    figure = go.Figure(layout=dict(**titled(title), height=420, yaxis_title="kind of token"))
    figure.add_box(y=labels, **ends, orientation="h", name="", line_color=COLOR["embedding"])
    return figure.update_xaxes(title="norm of the embedding row (Euclidean)")


def cosines(series: Mapping[str, ArrayLike], *, title: str) -> go.Figure:
    """Histograms of cosines over one another. series: {name: (n,) cosines of random pairs}"""
    legend = dict(x=0.02, y=0.98)
    figure = go.Figure(layout=dict(**titled(title), barmode="overlay", bargap=0, legend=legend))
    edges = np.linspace(-1, 1, 101)
    for (name, values), color in zip(series.items(), _SERIES):
        count, name = np.histogram(values, edges)[0], plotly(name)
        hover = f"cosine %{{x:.2f}}: %{{y:.4f}}<extra>{name}</extra>"
        look = dict(name=name, opacity=0.65, marker_color=color, hovertemplate=hover)
        figure.add_bar(x=(edges[:-1] + edges[1:]) / 2, y=count / count.sum(), **look)
    figure.update_xaxes(title="cosine of a random pair of tokens")
    return figure.update_yaxes(title="share of pairs").update_layout(height=380)


def spectrum(spectra: Mapping[str, ArrayLike], *, title: str) -> go.Figure:
    """Singular values as a share of their sum. spectra: {name: (n,) values, largest first}, the
    last one a baseline, drawn dashed."""
    figure = go.Figure(layout=dict(**titled(title), height=420))
    for number, ((name, values), color) in enumerate(zip(spectra.items(), _SERIES), 1):
        values = np.asarray(values)[np.asarray(values) > 0]
        line = dict(color=color, dash="dash" if number == len(spectra) else "solid")
        look = dict(mode="lines", name=plotly(name), line=line)
        hover = "number %{x}: %{y:.5f}<extra></extra>"
        x, y = np.arange(1, len(values) + 1), values / values.sum()
        figure.add_scatter(x=x, y=y, hovertemplate=hover, **look)
    figure.update_xaxes(title="singular value (largest first)")
    figure.update_yaxes(title="share of the sum of singular values")
    figure.update_layout(legend=dict(x=0.98, y=0.98, xanchor="right"))
    return decades(decades(figure, "x"), "y")


def projections(
    views: Mapping[str, np.ndarray],
    tokens: pd.DataFrame,
    groups: ArrayLike,
    *,
    title: str,
    size: float = 3.5,
    height: int = 560,
) -> go.Figure:
    """The same tokens in one or two 3-D projections, side by side.

    views: {"UMAP": (n, 3), "PCA": (n, 3)}; tokens: (n) rows of `token_table`; groups: (n,) names
    that give the colour."""
    groups, labels = np.asarray(groups), np.array(_labels(tokens.piece))
    about = np.column_stack([tokens.index, tokens.norm.round(3)])
    hover = (
        "<b>%{text}</b><br>%{meta}<br>id %{customdata[0]}<br>norm %{customdata[1]}<extra></extra>"
    )
    scenes, names = [[{"type": "scene"}] * len(views)], axis_values(views)
    layout = dict(specs=scenes, subplot_titles=names, horizontal_spacing=0.02)
    figure = make_subplots(1, len(views), **layout)
    largest_first = sorted(
        set(groups.tolist()), key=lambda name: (-(groups == name).sum(), str(name))
    )
    for number, name in enumerate(largest_first):
        here = groups == name
        color = CATEGORIES[number % len(CATEGORIES)]
        symbol = _SYMBOLS[number // len(CATEGORIES) % len(_SYMBOLS)]
        opacity = float(np.clip(1500 / here.sum(), 0.12, 0.8))  # else 10,000 hide the rest
        look: dict[str, Any] = dict(
            marker=dict(size=size, opacity=opacity, color=color, symbol=symbol)
        )
        look |= dict(mode="markers", name=plotly(f"{name} ({here.sum():,})"), legendgroup=str(name))
        look |= dict(text=labels[here], meta=plotly(name), customdata=about[here])
        for column, view in enumerate(views.values(), 1):
            x, y, z = np.asarray(view, np.float32)[here].T
            look |= dict(showlegend=column == 1, hovertemplate=hover)
            figure.add_scatter3d(x=x, y=y, z=z, row=1, col=column, **look)
    plain = dict(showticklabels=False, showspikes=False, backgroundcolor="rgba(0,0,0,0)")
    plain["gridcolor"] = "rgba(128,128,128,0.35)"
    figure.update_scenes(aspectmode="cube", camera_eye=dict(x=1.4, y=1.4, z=0.85))
    for column, method in enumerate(views, 1):
        axes = {
            f"{axis}axis": dict(title=f"{method} {i}", **plain) for i, axis in enumerate("xyz", 1)
        }
        figure.update_scenes(axes, col=column)
    legend = dict(orientation="h", y=-0.02, itemsizing="constant")
    margin = dict(l=0, r=0, t=80, b=0)
    return figure.update_layout(**titled(title), height=height, margin=margin, legend=legend)


def agreement(table: pd.DataFrame, *, title: str) -> go.Figure:
    """Bars of `cluster_agreement`, with the 95th percentile of shuffled labels as a mark."""
    labels = [plotly(f"{grouping}: {measure}") for grouping, measure in table.index]
    figure = go.Figure(layout=dict(**titled(title), height=340, **LEGEND_ABOVE))
    look = dict(orientation="h", name="measured", marker_color=COLOR["embedding"])
    text, hover = table.value.map("{:.2f}".format), "%{y}: %{x:.4f}<extra></extra>"
    figure.add_bar(x=table.value, y=labels, text=text, hovertemplate=hover, **look)
    mark = dict(symbol="line-ns", size=16, line=dict(width=3, color=COLOR["baseline"]))
    shuffled = dict(mode="markers", name="95th percentile of shuffled labels", marker=mark)
    hover = "%{y}: %{x:.4f}<extra>shuffled</extra>"
    figure.add_scatter(x=table.shuffled_p95, y=labels, hovertemplate=hover, **shuffled)
    figure.update_xaxes(title="value (1 is the best; 0 is no structure, for purity see the mark)")
    return figure.update_yaxes(autorange="reversed")


def contingency(tables: Mapping[str, pd.DataFrame], *, title: str) -> go.Figure:
    """Category x cluster counts, one heatmap per clustering. tables: {name: DataFrame of
    `contingency`}"""
    layout = dict(subplot_titles=axis_values(tables), shared_yaxes=True, horizontal_spacing=0.03)
    figure = make_subplots(1, len(tables), **layout)
    hover = "%{y}, cluster %{x}: %{z} words<extra></extra>"
    look = dict(texttemplate="%{text}", coloraxis="coloraxis", hovertemplate=hover)
    for column, table in enumerate(tables.values(), 1):
        names = ["noise" if cluster < 0 else str(cluster) for cluster in table.columns]
        labels, counts = axis_values(table.index), table.to_numpy()
        figure.add_heatmap(z=counts, text=counts, x=names, y=labels, row=1, col=column, **look)
    figure.update_xaxes(title="cluster", type="category").update_yaxes(autorange="reversed")
    colors = dict(colorscale=theme.MAGNITUDE, colorbar=dict(title=dict(text="words")))
    return figure.update_layout(**titled(title), height=420, coloraxis=colors)


def analogies(table: pd.DataFrame, *, title: str) -> go.Figure:
    """Rank of each expected answer with the offset (b - a + c) and by cosine to c alone, on a
    logarithmic scale. table: `analogies`."""
    labels = [plotly(f"{q.a} : {q.b} = {q.c} : {q.d}") for q in table.itertuples()]
    figure = go.Figure(layout=dict(**titled(title), height=180 + 22 * len(table), **LEGEND_ABOVE))
    look = dict(mode="lines", showlegend=False, hoverinfo="skip")
    look["line"] = dict(color=COLOR["baseline"], width=1)
    for label, row in zip(labels, table.itertuples()):
        figure.add_scatter(x=[row.rank, row.rank_without], y=[label] * 2, **look)
    hover = "%{y}<br>rank %{x}, first with the offset: %{text}<extra></extra>"
    look = dict(mode="markers", text=_labels(table.answer), hovertemplate=hover)
    for name, ranks, color in (
        ("without the offset", table["rank_without"], COLOR["baseline"]),
        ("with the offset", table["rank"], COLOR["embedding"]),
    ):
        figure.add_scatter(x=ranks, y=labels, name=name, marker=dict(color=color, size=9), **look)
    figure.update_xaxes(title="rank of the expected token in the whole vocabulary (1 is the best)")
    return decades(figure, "x").update_yaxes(autorange="reversed", tickfont_size=11)


def separation(
    tables: Mapping[str, pd.DataFrame],
    *,
    title: str,
    points: Mapping[str, pd.DataFrame] | None = None,
) -> go.Figure:
    """Separation and nearest-neighbour agreement by layer, with what shuffled labels give.

    tables: {name: DataFrame of `separation_by_layer`}; points: {name: the same, of one row that
    belongs to no layer}, drawn as stars at the last layer."""
    titles = ("separation", "nearest has the same label")
    figure = make_subplots(1, 2, subplot_titles=titles, horizontal_spacing=0.12)
    first = next(iter(tables.values()))

    def draw(column, x, y, name, hover, **look):
        look |= dict(
            name=name, legendgroup=name, hovertemplate=hover + "<extra>" + name + "</extra>"
        )
        figure.add_scatter(x=x, y=y, row=1, col=column, **look)

    for column, value, chance, called, dash in (
        (1, "separation", "shuffled_p95", "shuffled, 95th percentile", "dash"),
        (2, "agreement", "agreement_shuffled", "shuffled, mean", "dot"),
    ):
        shared = dict(showlegend=column == 1)
        for (name, table), color in zip(tables.items(), CATEGORIES):
            look = dict(mode="lines+markers", marker=dict(size=5), line=dict(color=color), **shared)
            draw(column, table.index, table[value], plotly(name), "layer %{x}: %{y:.3f}", **look)
        look = dict(mode="lines", line=dict(color=COLOR["baseline"], dash=dash))
        draw(column, first.index, first[chance], called, "layer %{x}: %{y:.3f}", **look)
        star = dict(symbol="star", size=13, color=CATEGORIES[5])
        for name, table in (points or {}).items():
            look = dict(mode="markers", marker=star, **shared)
            draw(column, first.index[-1:], table[value], plotly(name), "%{y:.3f}", **look)
    figure.update_xaxes(title="layer (0 is the embedding)", **whole(first.index))
    figure.update_yaxes(title="same minus different label (cosine)", row=1, col=1)
    figure.update_yaxes(title="share", range=[0, 1.03], row=1, col=2)
    return figure.update_layout(**titled(title), height=420, legend=dict(orientation="h", y=-0.25))


def planes(table: pd.DataFrame, *, title: str) -> go.Figure:
    """One word's occurrences in the plane of largest variance, one panel per layer. table:
    `context.planes`."""
    panels = table.groupby("layer")
    titles = [
        f"layer {layer}: {share:.0%} of the variance" if share else f"layer {layer}: one point"
        for layer, share in panels.variance.first().items()
    ]
    columns = min(len(titles), 3)
    rows = -(-len(titles) // columns)
    layout = dict(subplot_titles=titles, horizontal_spacing=0.06, vertical_spacing=0.2)
    figure = make_subplots(rows, columns, **layout)
    for place, (_, panel) in enumerate(panels):
        where = dict(row=place // columns + 1, col=place % columns + 1, showlegend=place == 0)
        for number, (sense, here) in enumerate(panel.groupby("sense", sort=False)):
            name, texts = plotly(sense), list(map(plotly, here.text))
            symbol = ("circle", "diamond")[number % 2]
            look = dict(
                marker=dict(size=10, color=CATEGORIES[number], symbol=symbol), mode="markers"
            )
            look |= dict(
                name=name, legendgroup=sense, hovertemplate=f"%{{text}}<extra>{name}</extra>"
            )
            figure.add_scatter(x=here.x, y=here.y, text=texts, **look, **where)
    figure.update_xaxes(showticklabels=False, title=dict(text="PC 1", standoff=2))
    figure.update_yaxes(showticklabels=False).update_yaxes(
        title=dict(text="PC 2", standoff=2), col=1
    )
    legend = dict(orientation="h", y=-0.1)
    return figure.update_layout(**titled(title), height=80 + 290 * rows, margin_t=90, legend=legend)


def sentences(cosines: np.ndarray, topics: pd.DataFrame, *, title: str) -> go.Figure:
    """Cosines of all pairs of sentences, (n, n). topics: `context.topics`."""
    titles = dict(title=title, x_title="sentence", y_title="sentence", unit="cosine")
    y = [f"{label}: {shorten(text, 32)}" for label, text in zip(topics.label, topics.text)]
    return theme.heatmap(
        cosines, topics.label.tolist(), y, **titles, signed=True, zmax=1, height=640
    )


def precision(table: pd.DataFrame, other: str, *, title: str) -> go.Figure:
    """Histograms over tokens: cosine to the reference row, and neighbours kept. table: DataFrame of
    `precision`; other: how the second precision is called."""
    titles = ("cosine to the reference row", plotly(f"neighbours also nearest in {other}"))
    figure = make_subplots(1, 2, horizontal_spacing=0.12, subplot_titles=titles)
    low = float(table.cosine.min())
    edges = np.linspace(low, 1, 51) if 1 - low > 1e-9 else np.array([1 - 1e-9, 1 + 1e-9])
    count = np.histogram(table.cosine.clip(edges[0], edges[-1]), edges)[0]
    look = dict(width=np.diff(edges), marker_color=COLOR["embedding"])
    look["hovertemplate"] = "cosine %{x:.5f}: %{y} tokens<extra></extra>"
    figure.add_bar(x=(edges[:-1] + edges[1:]) / 2, y=count, row=1, col=1, **look)
    kept, tokens = np.unique(table.overlap.round(4), return_counts=True)
    step = np.diff(np.union1d([0, 1], kept)).min()  # one neighbour, where two shares differ by one
    look = dict(width=0.8 * step, marker_color=CATEGORIES[0])
    look["hovertemplate"] = "%{x:.0%} kept: %{y} tokens<extra></extra>"
    figure.add_bar(x=kept, y=tokens, row=1, col=2, **look)
    figure.update_xaxes(title="cosine", col=1).update_yaxes(title="tokens")
    axis = dict(title="share of a token's nearest neighbours", tickformat=".0%")
    figure.update_xaxes(range=[-0.05, 1.07], col=2, **axis)
    return figure.update_layout(**titled(title), height=380, showlegend=False, bargap=0)
