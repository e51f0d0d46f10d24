"""Figures of token embeddings: projections, spectra, clusters, analogies, senses by layer, two
precisions."""

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..views.text import plotly, token_text
from ..views.theme import (
    CATEGORIES,
    COLOR,
    MAGNITUDE,
    axis_values,
    decades,
    titled,
    whole,
)

_SYMBOLS = (
    "circle",
    "diamond",
    "square",
    "cross",
    "x",
)  # 3-D markers; colours repeat after len(CATEGORIES) groups


def piece_labels(pieces):
    """Token texts for Plotly: spaces and newlines visible, escaped."""
    return [plotly(token_text(piece)) for piece in pieces]


def projection_figure(
    views, groups, pieces, ids, norms, *, title, extra=None, size=3.5, height=560
):
    """The same tokens in one or two 3-D projections, side by side.

    views: {"UMAP": (n, 3), "PCA": (n, 3)}; groups: (n,) names that give the colour; ids, norms:
    (n,) for the hover box; extra: {name: (n,) values} for it too."""
    labels, groups = np.array(piece_labels(pieces)), np.asarray(groups)
    columns = {
        "id": np.asarray(ids),
        "norm": np.round(np.asarray(norms, float), 3),
        **(extra or {}),
    }
    names = sorted(set(groups.tolist()), key=lambda name: (-(groups == name).sum(), str(name)))
    figure = make_subplots(
        1,
        len(views),
        specs=[[{"type": "scene"}] * len(views)],
        subplot_titles=axis_values(views),
        horizontal_spacing=0.02,
    )
    template = (
        "<b>%{text}</b><br>%{meta}<br>"
        + "<br>".join(f"{name} %{{customdata[{number}]}}" for number, name in enumerate(columns))
        + "<extra></extra>"
    )
    for column, (_, xyz) in enumerate(views.items(), 1):
        xyz = np.asarray(xyz, np.float32)
        for number, name in enumerate(names):
            here = groups == name
            figure.add_scatter3d(
                x=xyz[here, 0],
                y=xyz[here, 1],
                z=xyz[here, 2],
                mode="markers",
                text=labels[here],
                meta=plotly(name),
                customdata=np.stack(
                    [np.asarray(values)[here] for values in columns.values()], axis=1
                ),
                hovertemplate=template,
                name=plotly(f"{name} ({here.sum():,})"),
                legendgroup=str(name),
                showlegend=column == 1,
                marker=dict(
                    size=size,
                    opacity=float(
                        np.clip(1500 / here.sum(), 0.12, 0.8)
                    ),  # else 10,000 hide the rest
                    color=CATEGORIES[number % len(CATEGORIES)],
                    symbol=_SYMBOLS[number // len(CATEGORIES) % len(_SYMBOLS)],
                ),
                row=1,
                col=column,
            )
    for view, scene in zip(views, ("scene", "scene2")):
        axes = {
            f"{axis}axis": dict(
                title=f"{view} {number}",
                showticklabels=False,
                showspikes=False,
                backgroundcolor="rgba(0,0,0,0)",
                gridcolor="rgba(128,128,128,0.35)",
            )
            for number, axis in enumerate("xyz", 1)
        }
        figure.update_layout(
            {scene: dict(**axes, aspectmode="cube", camera=dict(eye=dict(x=1.4, y=1.4, z=0.85)))}
        )
    return figure.update_layout(
        **titled(title),
        height=height,
        margin=dict(l=0, r=0, t=80, b=0),
        legend=dict(orientation="h", y=-0.02, itemsizing="constant"),
    )


def norm_figure(norms, kinds, *, title):
    """Box per kind of token (quartiles, whiskers at the 1st and 99th percentile), computed here so
    that the figure holds no more than it shows. norms: (n,); kinds: (n,) names."""
    norms, kinds = np.asarray(norms, float), np.asarray(kinds)
    figure = go.Figure(
        layout=dict(
            **titled(title),
            xaxis_title="norm of the embedding row (Euclidean)",
            yaxis_title="kind of token",
            height=420,
            showlegend=False,
        )
    )
    for kind in sorted(
        set(kinds.tolist()), key=lambda name: float(np.median(norms[kinds == name]))
    ):
        low, q1, median, q3, high = np.percentile(norms[kinds == kind], [1, 25, 50, 75, 99])
        label = plotly(f"{kind} ({(kinds == kind).sum():,})")
        figure.add_box(
            y=[label],
            q1=[q1],
            median=[median],
            q3=[q3],
            lowerfence=[low],
            upperfence=[high],
            orientation="h",
            name=plotly(kind),
            line_color=COLOR["embedding"],
        )
    return figure


def spectrum_figure(values, centred, random, *, title):
    """Singular values as a share of their sum: as stored, centred, and of a random matrix of the
    same shape."""
    figure = go.Figure(
        layout=dict(
            **titled(title),
            xaxis_title="singular value (largest first)",
            yaxis_title="share of the sum of singular values",
            height=420,
            legend=dict(x=0.98, y=0.98, xanchor="right"),
        )
    )
    for name, line, color, dash in (
        ("as stored", values, COLOR["embedding"], "solid"),
        ("minus the mean row", centred, CATEGORIES[0], "solid"),
        ("random Gaussian matrix", random, COLOR["baseline"], "dash"),
    ):
        line = np.asarray(line)[np.asarray(line) > 0]
        figure.add_scatter(
            x=np.arange(1, len(line) + 1),
            y=line / line.sum(),
            mode="lines",
            name=name,
            line=dict(color=color, dash=dash),
            hovertemplate="number %{x}: %{y:.5f}<extra></extra>",
        )
    return decades(decades(figure, "x"), "y")


def cosine_figure(series, *, title, x_title="cosine of a random pair of tokens"):
    """Histograms of cosines over one another. series: {name: values}"""
    edges = np.linspace(-1, 1, 101)
    colors = (COLOR["embedding"], CATEGORIES[0], COLOR["baseline"])
    figure = go.Figure(
        layout=dict(
            **titled(title),
            xaxis_title=plotly(x_title),
            yaxis_title="share of pairs",
            height=380,
            barmode="overlay",
            bargap=0,
            legend=dict(x=0.02, y=0.98),
        )
    )
    for (name, values), color in zip(series.items(), colors):
        name = plotly(name)
        count = np.histogram(values, edges)[0]
        figure.add_bar(
            x=(edges[:-1] + edges[1:]) / 2,
            y=count / count.sum(),
            name=name,
            opacity=0.65,
            marker_color=color,
            hovertemplate="cosine %{x:.2f}: %{y:.4f}<extra>" + name + "</extra>",
        )
    return figure


def agreement_figure(table, *, title):
    """Bars of `cluster_agreement`, with the 95th percentile of shuffled labels as a mark."""
    labels = [plotly(f"{grouping}: {measure}") for grouping, measure in table.index]
    figure = go.Figure(
        layout=dict(
            **titled(title),
            height=340,
            legend=dict(orientation="h", y=1.0, yanchor="bottom", x=1, xanchor="right"),
            xaxis_title="value (1 is the best; 0 is no structure, for purity see the mark)",
        )
    )
    figure.add_bar(
        x=table.value,
        y=labels,
        orientation="h",
        name="measured",
        marker_color=COLOR["embedding"],
        text=table.value.map("{:.2f}".format),
        hovertemplate="%{y}: %{x:.4f}<extra></extra>",
    )
    figure.add_scatter(
        x=table.shuffled_p95,
        y=labels,
        mode="markers",
        name="95th percentile of shuffled labels",
        marker=dict(symbol="line-ns", size=16, line=dict(width=3, color=COLOR["baseline"])),
        hovertemplate="%{y}: %{x:.4f}<extra>shuffled</extra>",
    )
    return figure.update_yaxes(autorange="reversed")


def contingency_figure(tables, *, title):
    """Category x cluster counts, one heatmap per clustering. tables: {name: DataFrame of
    `contingency`}"""
    figure = make_subplots(
        1,
        len(tables),
        subplot_titles=axis_values(tables),
        shared_yaxes=True,
        horizontal_spacing=0.03,
    )
    for column, table in enumerate(tables.values(), 1):
        names = ["noise" if cluster < 0 else str(cluster) for cluster in table.columns]
        figure.add_heatmap(
            z=table.to_numpy(),
            x=names,
            y=axis_values(table.index),
            text=table.to_numpy(),
            row=1,
            col=column,
            texttemplate="%{text}",
            coloraxis="coloraxis",
            hovertemplate="%{y}, cluster %{x}: %{z} words<extra></extra>",
        )
    figure.update_xaxes(title="cluster", type="category").update_yaxes(autorange="reversed")
    return figure.update_layout(
        **titled(title),
        height=420,
        coloraxis=dict(colorscale=MAGNITUDE, colorbar=dict(title=dict(text="words"))),
    )


def analogy_figure(table, *, title):
    """Rank of each expected answer with the offset (b - a + c) and by cosine to c alone, on a
    logarithmic scale."""
    labels = [plotly(f"{q.a} : {q.b} = {q.c} : {q.d}") for q in table.itertuples()]
    figure = go.Figure(
        layout=dict(
            **titled(title),
            height=180 + 22 * len(table),
            xaxis_title="rank of the expected token in the whole vocabulary (1 is the best)",
            legend=dict(orientation="h", y=1.0, yanchor="bottom", x=1, xanchor="right"),
        )
    )
    for label, row in zip(labels, table.itertuples()):
        figure.add_scatter(
            x=[row.rank, row.rank_without],
            y=[label] * 2,
            mode="lines",
            showlegend=False,
            line=dict(color=COLOR["baseline"], width=1),
            hoverinfo="skip",
        )
    for name, column, color in (
        ("without the offset", "rank_without", COLOR["baseline"]),
        ("with the offset", "rank", COLOR["embedding"]),
    ):
        figure.add_scatter(
            x=table[column],
            y=labels,
            mode="markers",
            name=name,
            marker=dict(color=color, size=9),
            text=piece_labels(table.answer),
            hovertemplate="%{y}<br>rank %{x}, first with the offset: %{text}<extra></extra>",
        )
    return decades(figure, "x").update_yaxes(autorange="reversed", tickfont=dict(size=11))


def separation_figure(tables, *, title, points=None):
    """Separation and nearest-neighbour agreement by layer, with what shuffled labels give.

    tables: {name: DataFrame of `separation_by_layer`}; points: {name: (layer, separation,
    agreement)}, single measurements drawn as stars."""
    figure = make_subplots(
        1, 2, subplot_titles=("separation", "nearest has the same label"), horizontal_spacing=0.12
    )
    for number, (name, table) in enumerate(tables.items()):
        color, name = CATEGORIES[number % len(CATEGORIES)], plotly(name)
        for column, value in ((1, "separation"), (2, "agreement")):
            figure.add_scatter(
                x=table.index,
                y=table[value],
                mode="lines+markers",
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                marker=dict(size=5),
                line=dict(color=color),
                row=1,
                col=column,
                hovertemplate="layer %{x}: %{y:.3f}<extra>" + name + "</extra>",
            )
    first = next(iter(tables.values()))
    for column, value, name in (
        (1, "shuffled_p95", "shuffled, 95th percentile"),
        (2, "agreement_shuffled", "shuffled, mean"),
    ):
        figure.add_scatter(
            x=first.index,
            y=first[value],
            mode="lines",
            name=name,
            row=1,
            col=column,
            line=dict(color=COLOR["baseline"], dash="dash" if column == 1 else "dot"),
            hovertemplate="layer %{x}: %{y:.3f}<extra>shuffled</extra>",
        )
    for name, (layer, *values) in (points or {}).items():
        name = plotly(name)
        for column, value in enumerate(values, 1):
            figure.add_scatter(
                x=[layer],
                y=[value],
                mode="markers",
                name=name,
                showlegend=column == 1,
                row=1,
                col=column,
                legendgroup=name,
                marker=dict(symbol="star", size=13, color=CATEGORIES[5]),
                hovertemplate="%{y:.3f}<extra>" + name + "</extra>",
            )
    figure.update_xaxes(title="layer (0 is the embedding)", **whole(first.index))
    figure.update_yaxes(title="same minus different label (cosine)", row=1, col=1)
    figure.update_yaxes(title="share", range=[0, 1.03], row=1, col=2)
    return figure.update_layout(**titled(title), height=420, legend=dict(orientation="h", y=-0.25))


def sense_figure(planes, senses, texts, *, title):
    """One word's occurrences in the plane of largest variance, one panel per layer.

    planes: {layer: (scores (n, 2), variance shares (2,))} from `principal_plane`; senses, texts:
    (n,)."""
    titles = [
        f"layer {layer}: {shares.sum():.0%} of the variance"
        if shares.any()
        else f"layer {layer}: one point"
        for layer, (_, shares) in planes.items()
    ]
    columns = min(len(planes), 3)
    rows = -(-len(planes) // columns)
    figure = make_subplots(
        rows, columns, subplot_titles=titles, horizontal_spacing=0.06, vertical_spacing=0.2
    )
    senses, texts = np.asarray(senses), np.array([plotly(text) for text in texts])
    for place, (scores, _) in enumerate(planes.values()):
        for number, sense in enumerate(dict.fromkeys(senses.tolist())):
            here = senses == sense
            figure.add_scatter(
                x=scores[here, 0],
                y=scores[here, 1],
                mode="markers",
                name=plotly(sense),
                legendgroup=sense,
                showlegend=place == 0,
                text=texts[here],
                row=place // columns + 1,
                col=place % columns + 1,
                marker=dict(
                    size=10, color=CATEGORIES[number], symbol=("circle", "diamond")[number % 2]
                ),
                hovertemplate="%{text}<extra>" + plotly(sense) + "</extra>",
            )
    figure.update_xaxes(showticklabels=False, title=dict(text="PC 1", standoff=2)).update_yaxes(
        showticklabels=False
    )
    figure.update_yaxes(title=dict(text="PC 2", standoff=2), col=1)
    return figure.update_layout(
        **titled(title), height=80 + 290 * rows, margin_t=90, legend=dict(orientation="h", y=-0.1)
    )


def precision_figure(table, *, title, other):
    """Histograms over tokens: cosine to the reference row, and neighbours kept. table: DataFrame of
    `precision`."""
    figure = make_subplots(
        1,
        2,
        horizontal_spacing=0.12,
        subplot_titles=(
            "cosine to the reference row",
            plotly(f"neighbours also nearest in {other}"),
        ),
    )
    low = float(table.cosine.min())
    edges = np.linspace(low, 1, 51) if 1 - low > 1e-9 else np.array([1 - 1e-9, 1 + 1e-9])
    count = np.histogram(table.cosine.clip(edges[0], edges[-1]), edges)[0]
    figure.add_bar(
        x=(edges[:-1] + edges[1:]) / 2,
        y=count,
        width=np.diff(edges),
        row=1,
        col=1,
        marker_color=COLOR["embedding"],
        hovertemplate="cosine %{x:.5f}: %{y} tokens<extra></extra>",
    )
    kept, tokens = np.unique(table.overlap.round(4), return_counts=True)
    step = np.diff(
        np.union1d([0, 1], kept)
    ).min()  # one neighbour, where any two of the shares differ by one
    figure.add_bar(
        x=kept,
        y=tokens,
        width=0.8 * step,
        marker_color=CATEGORIES[0],
        row=1,
        col=2,
        hovertemplate="%{x:.0%} kept: %{y} tokens<extra></extra>",
    )
    figure.update_xaxes(title="cosine", row=1, col=1).update_yaxes(title="tokens")
    figure.update_xaxes(
        title="share of a token's nearest neighbours",
        range=[-0.05, 1.07],
        tickformat=".0%",
        row=1,
        col=2,
    )
    return figure.update_layout(**titled(title), height=380, showlegend=False, bargap=0)
