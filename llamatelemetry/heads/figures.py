"""Figures of notebook 15: maps of all heads, scores against baselines, similarity, importance,
depth, precision."""

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..views import theme
from ..views.sentences import some
from ..views.text import plotly

GRID = 300  # rows of a distance matrix that are drawn; larger ones are averaged in blocks
MEASURE_COLOR = dict(
    zip(
        (
            "sink",
            "local",
            "global",
            "delimiter",
            "positional",
            "previous token",
            "duplicate",
            "induction",
            "syntactic",
            "semantic",
        ),
        (
            "#7F7F7F",
            "#0072B2",
            "#56B4E9",
            "#F0E442",
            "#009E73",
            "#117733",
            "#CC79A7",
            "#D55E00",
            "#E69F00",
            "#882255",
        ),
    )
)


def _figure(figure, title, **layout):
    return figure.update_layout(**theme.titled(title), **layout)


def measure_maps(profiled, measures, model):
    """Small maps, one per measure: layer across, head down; shares on one scale, "semantic" around
    zero."""
    rows = -(-len(measures) // 2)
    figure = make_subplots(
        rows,
        2,
        subplot_titles=list(measures),
        horizontal_spacing=0.07,
        vertical_spacing=0.28 / rows,
    )
    layers, heads = profiled["layer"].values, profiled["head"].values
    for place, name in enumerate(measures):
        part = profiled.sel(measure=name)
        signed = name == "semantic"
        sides = [
            part[key].values.T for key in ("value", "low", "high", "baseline_high")
        ]  # (head, layer) each
        text = [
            [
                f"L{layer}H{head}<br>{name} {v:.4f}<br>{some(lo, f'95% interval {{:.3f}} to {hi:.3f}', 'one text')}"
                f"<br>highest shuffled {b:.3f}"
                for layer, v, lo, hi, b in zip(layers, *columns)
            ]
            for head, *columns in zip(heads, *sides)
        ]
        figure.add_trace(
            go.Heatmap(
                z=np.round(part["value"].values.T, 4),
                x=layers,
                y=heads,
                text=text,
                coloraxis="coloraxis2" if signed else "coloraxis",
                hovertemplate="%{text}<extra></extra>",
            ),
            place // 2 + 1,
            place % 2 + 1,
        )
    figure.update_xaxes(**theme.whole(layers)).update_yaxes(**theme.whole(heads))
    figure.update_yaxes(autorange="reversed", title_text="head", title_standoff=2)
    figure.update_xaxes(title_text="layer", title_standoff=2, row=rows)
    limit = (
        float(np.nanmax(np.abs(profiled["value"].sel(measure="semantic"))))
        if "semantic" in measures
        else 1
    )
    axes = dict(
        coloraxis=dict(
            colorscale=theme.MAGNITUDE,
            cmin=0,
            cmax=1,
            colorbar=dict(title="share of attention", len=0.45, y=0.77, x=1.02, title_side="right"),
        )
    )
    if "semantic" in measures:
        axes["coloraxis2"] = dict(
            colorscale=theme.SIGNED,
            cmin=-limit,
            cmax=limit,
            colorbar=dict(title="rank correlation", len=0.45, y=0.23, x=1.02, title_side="right"),
        )
    return _figure(
        figure,
        f"Every head of {model}: what its attention goes to",
        height=170 * rows + 90,
        margin=dict(l=60, r=90, t=80, b=50),
        **axes,
    )


def scores_against_baselines(profiled, earned, model):
    """Each head's score per label beside the largest shuffled score of any head; filled: the label
    is earned."""
    figure = go.Figure()
    rng = np.random.default_rng(0)
    for place, name in enumerate(earned["label"].values):
        part = profiled.sel(measure=name)
        value, mask = part["value"].values.reshape(-1), earned.sel(label=name).values.reshape(-1)
        names = [
            f"L{layer}H{head}"
            for layer in profiled["layer"].values
            for head in profiled["head"].values
        ]
        jitter = place + rng.uniform(-0.3, 0.3, len(value))
        for wanted, opacity, symbol in ((False, 0.35, "circle-open"), (True, 0.8, "circle")):
            keep = np.flatnonzero((mask == wanted) & np.isfinite(value))
            figure.add_trace(
                go.Scatter(
                    x=jitter[keep],
                    y=value[keep],
                    mode="markers",
                    showlegend=False,
                    opacity=opacity,
                    marker=dict(
                        size=5,
                        symbol=symbol,
                        color=MEASURE_COLOR[name] if wanted else theme.COLOR["baseline"],
                    ),
                    text=[
                        f"{names[i]}<br>{name} {value[i]:.4f}<br>{'earned' if wanted else 'not earned'}"
                        for i in keep
                    ],
                    hovertemplate="%{text}<extra></extra>",
                )
            )
        top = float(np.nanmax(part["baseline_high"].values))
        figure.add_shape(
            type="line",
            x0=place - 0.4,
            x1=place + 0.4,
            y0=top,
            y1=top,
            line=dict(color=theme.COLOR["key"], width=2),
        )
    for label, symbol, color in (
        ("label earned", "circle", theme.COLOR["attention"]),
        ("not earned", "circle-open", theme.COLOR["baseline"]),
    ):
        figure.add_trace(
            go.Scatter(
                x=[None],
                y=[None],
                mode="markers",
                name=label,
                marker=dict(symbol=symbol, color=color),
            )
        )
    figure.add_trace(
        go.Scatter(
            x=[None],
            y=[None],
            mode="lines",
            name="largest shuffled score of any head",
            line=dict(color=theme.COLOR["key"], width=2),
        )
    )
    figure.update_xaxes(
        tickvals=list(range(earned.sizes["label"])),
        ticktext=list(earned["label"].values),
        tickangle=-30,
        zeroline=False,
        title_text="behaviour",
        range=[-0.6, earned.sizes["label"] - 0.4],
    )
    figure.update_yaxes(title_text="share of attention (semantic: correlation)")
    return _figure(
        figure,
        f"Scores of {model}'s heads and what shuffling gives",
        height=480,
        legend=dict(orientation="h", y=1.08, x=0),
    )


def head_maps(table, coordinates, model):
    """Heads as points, maps side by side. table: layer, head, cluster, labels; coordinates: {map
    name: (head, 2)}."""
    figure = make_subplots(
        1, len(coordinates), subplot_titles=list(coordinates), horizontal_spacing=0.08
    )
    for column, xy in enumerate(coordinates.values(), 1):
        for cluster in sorted(table["cluster"].unique()):
            keep = (table["cluster"] == cluster).to_numpy()
            part = table[keep]
            color = theme.CATEGORIES[cluster % 8] if cluster >= 0 else theme.COLOR["baseline"]
            figure.add_trace(
                go.Scatter(
                    x=xy[keep, 0],
                    y=xy[keep, 1],
                    mode="markers",
                    name=f"cluster {cluster}" if cluster >= 0 else "no cluster",
                    legendgroup=int(cluster),
                    showlegend=column == 1,
                    marker=dict(
                        size=7, color=color, symbol=int(max(cluster, 0) // 8), opacity=0.85
                    ),
                    text=[f"L{r.layer}H{r.head}<br>{r.labels}" for r in part.itertuples()],
                    hovertemplate="%{text}<extra></extra>",
                ),
                1,
                column,
            )
    figure.update_xaxes(showticklabels=False, title_text="first coordinate")
    figure.update_yaxes(showticklabels=False, title_text="second coordinate", title_standoff=4)
    return _figure(
        figure,
        f"Heads of {model} by the Jensen-Shannon distance of their attention",
        height=500,
        legend=dict(orientation="h", y=-0.15),
    )


def distance_matrix(distance, order, names, model):
    """All distances, heads in the order of the dendrogram's leaves; more than GRID heads are
    averaged in blocks."""
    order = np.asarray(order)
    values, labels = distance[np.ix_(order, order)], [names[i] for i in order]
    step = -(-len(order) // GRID)
    if step > 1:
        size = len(order) // step * step
        values = values[:size, :size].reshape(size // step, step, size // step, step).mean((1, 3))
        labels = [f"{labels[i]} to {labels[i + step - 1]}" for i in range(0, size, step)]
    figure = go.Figure(
        go.Heatmap(
            z=np.round(values, 3),
            x=labels,
            y=labels,
            colorscale=theme.MAGNITUDE,
            zmin=0,
            zmax=float(values.max()) or 1,
            colorbar=dict(title="distance", title_side="right"),
            hovertemplate="%{y}, %{x}<br>distance %{z}<extra></extra>",
        )
    )
    ticks = [labels[i] for i in np.linspace(0, len(values) - 1, min(12, len(values))).astype(int)]
    figure.update_xaxes(
        type="category", tickvals=ticks, tickangle=-45, title_text="head, by dendrogram"
    )
    figure.update_yaxes(
        type="category", tickvals=ticks, autorange="reversed", title_text="head, by dendrogram"
    )
    return _figure(
        figure,
        f"Jensen-Shannon distance between the heads of {model}, 0 to 1",
        height=620,
        width=760,
    )


def cover_curve(curve, n_heads, model):
    """How many heads are needed so that every head has one of them within a distance."""
    figure = go.Figure(
        go.Scatter(
            x=curve["radius"],
            y=curve["heads"],
            mode="lines+markers",
            line=dict(color=theme.COLOR["attention"]),
            hovertemplate="distance %{x:.2f}<br>%{y} heads<extra></extra>",
        )
    )
    figure.update_xaxes(title_text="distance within which a head counts as covered (0 to 1)")
    figure.update_yaxes(title_text=f"heads needed, of {n_heads}", rangemode="tozero")
    return _figure(figure, f"How many heads of {model} stand for all", height=380)


def depth_lines(profiled, measures, model):
    """Mean over the heads of each layer, one line per behaviour; the band holds the middle half of
    the heads."""
    figure = make_subplots(
        -(-len(measures) // 2),
        2,
        subplot_titles=list(measures),
        horizontal_spacing=0.1,
        vertical_spacing=0.3 / -(-len(measures) // 2),
        shared_xaxes=True,
    )
    layers = profiled["layer"].values
    for place, name in enumerate(measures):
        value = profiled["value"].sel(measure=name).values
        low, mid, high = (
            np.nanquantile(value, 0.25, 1),
            np.nanmean(value, 1),
            np.nanquantile(value, 0.75, 1),
        )
        row, column = place // 2 + 1, place % 2 + 1
        color = MEASURE_COLOR.get(name, theme.COLOR["attention"])
        band = go.Scatter(
            x=[*layers, *layers[::-1]],
            y=[*low, *high[::-1]],
            fill="toself",
            line=dict(width=0),
            opacity=0.3,
            fillcolor=color,
            hoverinfo="skip",
            mode="lines",
            showlegend=False,
        )
        mode = "lines" if len(layers) > 1 else "markers"
        top = go.Scatter(
            x=layers,
            y=np.nanmax(value, 1),
            mode=mode,
            line=dict(color=color, width=1, dash="dot"),
            showlegend=False,
            hovertemplate=f"{name}<br>layer %{{x}}<br>largest %{{y:.3f}}<extra></extra>",
        )
        line = go.Scatter(
            x=layers,
            y=mid,
            mode=mode,
            marker_color=color,
            line=dict(color=color, width=2),
            showlegend=False,
            hovertemplate=f"{name}<br>layer %{{x}}<br>mean %{{y:.3f}}<extra></extra>",
        )
        for trace in (band, top, line):
            figure.add_trace(trace, row, column)
    figure.update_xaxes(**theme.whole(layers)).update_xaxes(
        title_text="layer", row=-(-len(measures) // 2)
    )
    figure.update_yaxes(title_text="share", title_standoff=4)
    if "semantic" in measures:
        place = measures.index("semantic")
        figure.update_yaxes(title_text="correlation", row=place // 2 + 1, col=place % 2 + 1)
    return _figure(
        figure,
        f"Behaviours of {model} over its layers: mean, middle half (band), largest (dotted)",
        height=150 * -(-len(measures) // 2) + 110,
    )


def side_by_side(attention, places, pieces, model, notes=None):
    """The attention matrices of chosen heads. attention: {(layer, head): (query, key)}; notes:
    {place: text}."""
    if not places:
        return _figure(
            go.Figure().add_annotation(text="no head to show", showarrow=False),
            f"Heads of {model}",
            height=200,
            xaxis_visible=False,
            yaxis_visible=False,
        )
    columns = min(3, len(places))
    rows = -(-len(places) // columns)
    titles = [
        f"L{layer}H{head}" + (f": {notes[layer, head]}" if notes else "") for layer, head in places
    ]
    titles = [title if len(title) < 34 else title[:32] + "…" for title in titles]
    figure = make_subplots(
        rows, columns, subplot_titles=titles, horizontal_spacing=0.04, vertical_spacing=0.16 / rows
    )
    labels, n = theme.axis_values(theme.token_labels(pieces)), len(pieces)
    for place, name in enumerate(places):
        values = np.where(np.tri(n, dtype=bool), np.asarray(attention[name]), np.nan)
        figure.add_trace(
            go.Heatmap(
                z=np.round(values, 5),
                x=list(range(n)),
                y=list(range(n)),
                coloraxis="coloraxis",
                hoverongaps=False,
                text=[
                    [
                        f"query {labels[q]}<br>key {labels[k]}<br>weight {values[q, k]:.5f}"
                        if k <= q
                        else ""
                        for k in range(n)
                    ]
                    for q in range(n)
                ],
                hovertemplate="%{text}<extra></extra>",
            ),
            place // columns + 1,
            place % columns + 1,
        )
    figure.update_yaxes(
        autorange="reversed", showticklabels=False, showgrid=False, zeroline=False, ticks=""
    )
    figure.update_xaxes(showticklabels=False, showgrid=False, zeroline=False, ticks="")
    figure.update_yaxes(title_text="query", col=1)
    figure.update_xaxes(title_text="key", row=rows)
    return _figure(
        figure,
        f"Heads of {model} on one text of {n} tokens",
        height=270 * rows + 110,
        coloraxis=dict(
            colorscale=theme.MAGNITUDE,
            cmin=0,
            cmax=1,
            colorbar=dict(title="attention weight", title_side="right"),
        ),
    )


def survival(comparison, one, other):
    """Per behaviour: how many heads keep, lose and gain the label from one precision to the
    other."""
    part = comparison.dropna(subset=["labels"])
    figure = go.Figure()
    for column, color, name in (
        ("kept", theme.CATEGORIES[2], "in both"),
        ("lost", theme.CATEGORIES[5], plotly(f"only in {one}")),
        ("gained", theme.CATEGORIES[4], plotly(f"only in {other}")),
    ):
        figure.add_trace(
            go.Bar(
                x=part.index,
                y=part[column],
                name=name,
                marker_color=color,
                hovertemplate="%{x}<br>%{y} heads<extra>" + name + "</extra>",
            )
        )
    figure.update_xaxes(title_text="behaviour", tickangle=-30)
    figure.update_yaxes(title_text="heads with the label")
    return _figure(
        figure,
        f"Labels in {one} and in {other}",
        barmode="stack",
        height=420,
        legend=dict(orientation="h", y=1.1, x=0),
    )
