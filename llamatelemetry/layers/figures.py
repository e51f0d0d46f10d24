"""Figures of notebook 14: profiles over depth, maps of layer and token. All return Plotly
figures."""

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..files.vocabulary import named
from ..views import theme
from ..views.text import plotly

STATE = "state (0: embedding, l: after layer l - 1)"
ROWS = "state"  # the same on a vertical axis, where there is less room
_LEGEND = dict(orientation="h", y=1.02, yanchor="bottom", x=1, xanchor="right")
PARTS = {
    "attention": theme.COLOR["attention"],
    "ffn": theme.COLOR["ffn"],
    "both": theme.COLOR["residual"],
    "embedding": theme.COLOR["embedding"],
}


def _lines(title, x_title, y_title, count=(), *, height=440, **axes):
    figure = go.Figure(layout=dict(**theme.titled(title), height=height, legend=_LEGEND))
    figure.update_xaxes(title=x_title, **theme.whole(count))
    figure.update_yaxes(title=y_title, **axes)
    return figure.update_layout(margin=dict(t=90))


def _line(figure, x, y, name, color, *, dash=None, place={}, unit=".4g", **more):
    name = plotly(name)
    figure.add_scatter(
        x=x,
        y=y,
        name=name,
        mode="lines+markers",
        line=dict(color=color, width=2, dash=dash),
        marker=dict(size=4),
        hovertemplate=f"%{{x}}: %{{y:{unit}}}<extra>{name}</extra>",
        **place,
        **more,
    )


def norm_profile(table, *, title):
    """Length of the stream by state. table: layers.states.norm_table."""
    figure = _lines(title, STATE, "length (L2 norm, log scale)", table.index)
    band = dict(mode="lines", line=dict(width=0), hoverinfo="skip")
    figure.add_scatter(x=table.index, y=table["low"], showlegend=False, **band)
    figure.add_scatter(
        x=table.index,
        y=table["high"],
        fill="tonexty",
        fillcolor="rgba(0,158,115,0.2)",
        name="other tokens, 10 to 90%",
        **band,
    )
    _line(figure, table.index, table["median"], "other tokens, median", theme.COLOR["residual"])
    _line(figure, table.index, table["first"], "first token", theme.CATEGORIES[5], dash="dash")
    return theme.decades(figure)


def magnitude_profile(table, *, title):
    """Quantiles of the magnitudes by state. table: layers.states.magnitude_quantiles."""
    figure = _lines(title, STATE, "magnitude of one value (log scale)", table.index)
    columns = [column for column in table.columns if column != "first"]
    names = {0.5: "median", 1.0: "largest"}
    for column, color in zip(columns, ("#9E9E9E", *theme.CATEGORIES[2:5], theme.CATEGORIES[0])):
        _line(figure, table.index, table[column], names.get(column, f"{100 * column:g}%"), color)
    _line(
        figure,
        table.index,
        table["first"],
        "largest of the first token",
        theme.CATEGORIES[5],
        dash="dash",
    )
    return theme.decades(figure)


def sparsity_profile(table, *, title):
    """How few neurons are active. table: layers.states.ffn_sparsity."""
    figure = _lines(
        title,
        "layer",
        "share (of the neurons, or of the energy)",
        table.index,
        rangemode="tozero",
        tickformat=".0%",
    )
    names = {
        "small": "below 1% of the token's largest",
        "needed": "hold 90% of the sum of squares",
        "largest": "sum of squares in one neuron",
    }
    for (column, name), color in zip(names.items(), theme.CATEGORIES):
        _line(figure, table.index, table[column], name, color, unit=".2%")
    return figure


def contribution_profile(data, *, title):
    """What each block adds: relative length and cosine with the stream, median of the tokens after
    the first."""
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.13)
    for part in data["part"].values:
        for col, name in ((1, "relative"), (2, "cosine")):
            values = data[name].sel(part=part).values  # (layer, token)
            place, color = dict(row=1, col=col), PARTS[part]
            _line(
                figure,
                data["layer"].values,
                np.median(values[:, 1:], axis=1),
                str(part),
                color,
                place=place,
                showlegend=col == 1,
            )
            _line(
                figure,
                data["layer"].values,
                values[:, 0],
                f"{part}, first token",
                color,
                dash="dot",
                place=place,
                showlegend=col == 1,
                opacity=0.6,
            )
    theme.decades(figure, row=1, col=1).update_yaxes(
        title="length added / length before", row=1, col=1
    )
    figure.update_yaxes(title="cosine with the stream", zeroline=True, row=1, col=2)
    figure.update_xaxes(title="layer", **theme.whole(data["layer"].values))
    return figure.update_layout(
        **theme.titled(title), height=430, legend=_LEGEND, margin=dict(t=90)
    )


def projection_bars(table, *, title):
    """Shares of the final state by layer, with their running sum. table:
    layers.states.projection."""
    figure = _lines(
        title, "layer (-1: embedding)", "share of the final state", table.index, tickformat=".0%"
    )
    figure.add_bar(
        x=[-1], y=[table.attrs["embedding"]], name="embedding", marker_color=PARTS["embedding"]
    )
    for part in ("attention", "ffn"):
        figure.add_bar(
            x=table.index,
            y=table[part],
            name=part,
            marker_color=PARTS[part],
            hovertemplate="layer %{x}: %{y:.2%}<extra>" + part + "</extra>",
        )
    _line(
        figure,
        table.index,
        table["cumulative"],
        "sum up to here",
        theme.COLOR["residual"],
        unit=".2%",
    )
    return figure.update_layout(barmode="relative")


def norm_impact(table, *, title):
    """What the norms do: change of direction, scale, and silenced dimensions. table:
    layers.norms."""
    columns = {
        "cosine": "cosine before / after",
        "scale": "length after / before (log)",
        "silenced": "silenced dimensions",
    }
    figure = make_subplots(rows=1, cols=3, horizontal_spacing=0.1)
    for col, (column, name) in enumerate(columns.items(), start=1):
        for part, rows in table.groupby(level="part"):
            rows = rows.droplevel("part")
            _line(
                figure,
                rows.index,
                rows[column],
                f"before {part}",
                PARTS[part],
                place=dict(row=1, col=col),
                showlegend=col == 1,
            )
        figure.update_yaxes(title=dict(text=name, standoff=4), row=1, col=col)
    theme.decades(figure, row=1, col=2)
    figure.update_yaxes(tickformat=".0%", rangemode="tozero", row=1, col=3)
    figure.update_xaxes(title="layer", **theme.whole(table.index.unique("layer")))
    return figure.update_layout(
        **theme.titled(title), height=400, legend=_LEGEND, margin=dict(t=90)
    )


def lens_profile(data, position, *, title):
    """Rank and probability of the answer, entropy, and KL to the output, by state. data:
    layers.lens.lens."""
    one = data.isel(token=position)
    panels = {
        "rank": "rank (0: best)",
        "probability": "probability",
        "entropy": "entropy (nats)",
        "kl": "KL to output (nats)",
    }
    figure = make_subplots(
        rows=2, cols=2, horizontal_spacing=0.12, vertical_spacing=0.1, shared_xaxes=True
    )
    for i, (name, label) in enumerate(panels.items()):
        place = dict(row=1 + i // 2, col=1 + i % 2)
        values = one[name].values + (
            name == "rank"
        )  # a log axis has no 0: rank counts from 1 there
        _line(
            figure,
            one["layer"].values,
            values,
            label,
            theme.CATEGORIES[i],
            place=place,
            showlegend=False,
        )
        figure.update_yaxes(
            title=label if name != "rank" else "rank + 1 (log)", rangemode="tozero", **place
        )
    theme.decades(figure, row=1, col=1)
    figure.update_xaxes(**theme.whole(one["layer"].values)).update_xaxes(title=STATE, row=2)
    return figure.update_layout(**theme.titled(title), height=520)


def _short(piece, length=9):
    return plotly(theme.shorten(theme.token_text(piece), length))


def lens_table(data, pieces, vocabulary, *, title, last=12, every=1):
    """The lens's best token per state and position, coloured by its probability; hover has the five
    best.

    last: so many positions from the end; every: only each so-manieth state, and the last.
    """
    tokens, states = np.arange(data.sizes["token"])[-last:], data["layer"].values
    kept = [i for i in range(len(states)) if (len(states) - 1 - i) % every == 0]
    part = data.isel(token=tokens, layer=kept)
    ids, p = part["top"].values, part["top_probability"].values  # (layer, token, best)

    text = [[_short(piece) for piece in named(vocabulary, row[:, 0])] for row in ids]

    def best(tokens, shares):
        return "<br>".join(
            f"{plotly(theme.token_text(piece))}  {q:.4f}"
            for piece, q in zip(named(vocabulary, tokens), shares)
        )

    hover = [[best(*cell) for cell in zip(*row)] for row in zip(ids, p)]
    labels = [f"{t} {theme.token_text(pieces[t])}" for t in tokens]
    figure = go.Figure(
        go.Heatmap(
            z=p[..., 0],
            x=theme.axis_values(labels),
            y=[str(s) for s in states[kept]],
            text=text,
            texttemplate="%{text}",
            textfont=dict(size=10),
            customdata=hover,
            zmin=0,
            zmax=1,
            colorscale=theme.MAGNITUDE,
            xgap=1,
            ygap=1,
            colorbar=dict(title=dict(text="probability", side="right")),
            hovertemplate="position %{x}, state %{y}<br>%{customdata}<extra></extra>",
        ),
        layout=dict(**theme.titled(title), height=140 + 19 * len(kept)),
    )
    theme.label_ticks(figure, labels, "x", title="token that is read", tickangle=-45)
    return figure.update_yaxes(title=ROWS, type="category")


def settled_bars(layers, pieces, *, title):
    """State at which the prediction after each token settles. layers: layers.lens.settled."""
    figure = _lines(title, "token that is read", "settles at state", height=380)
    labels = theme.token_labels(pieces)
    figure.add_bar(
        x=theme.axis_values(labels),
        y=layers,
        marker_color=theme.COLOR["residual"],
        hovertemplate="%{x}: state %{y}<extra></extra>",
    )
    theme.label_ticks(figure, labels, "x", most=48, tickangle=-90)
    figure.update_yaxes(**theme.whole(range(int(max(layers)) + 1)))
    return figure.update_layout(margin=dict(t=60))


def attribution_bars(table, *, title):
    """Direct logit attribution by layer, with the running sum. table:
    layers.lens.logit_attribution."""
    figure = _lines(
        title, "layer (-1: embedding and the rest)", "logit difference", table["layer"].unique()
    )
    rest = table[table["layer"] < 0]
    figure.add_bar(
        x=[-1], y=[rest["value"].sum()], name="embedding, bias", marker_color=PARTS["embedding"]
    )
    for part in ("attention", "ffn"):
        rows = table[table["component"] == part]
        figure.add_bar(
            x=rows["layer"],
            y=rows["value"],
            name=part,
            marker_color=PARTS[part],
            hovertemplate="layer %{x}: %{y:+.3f}<extra>" + part + "</extra>",
        )
    total = (
        rest["value"].sum() + table[table["layer"] >= 0].groupby("layer")["value"].sum().cumsum()
    )
    _line(figure, total.index, total, "sum up to here", theme.COLOR["residual"])
    return figure.update_layout(barmode="relative")


def importance_profile(table, *, title):
    """Block Influence above, rise of the loss under ablation below. table:
    layers.states.layer_importance."""
    figure = make_subplots(
        rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08, row_heights=[0.4, 0.6]
    )
    figure.add_bar(
        x=table.index,
        y=table["influence"],
        name="Block Influence",
        marker_color=theme.CATEGORIES[7],
        row=1,
        col=1,
    )
    for part in ("attention", "ffn", "both"):
        _line(
            figure,
            table.index,
            table[part],
            f"without {part}",
            PARTS[part],
            place=dict(row=2, col=1),
            unit="+.4f",
        )
    figure.update_yaxes(title="1 - cosine", row=1)
    figure.update_yaxes(title="rise of the loss (nats per token)", row=2)
    figure.update_xaxes(**theme.whole(table.index)).update_xaxes(title="layer", row=2)
    return figure.update_layout(
        **theme.titled(title), height=560, legend=_LEGEND, margin=dict(t=90)
    )


def state_map(values, *, title, unit, x_title=STATE, y_title=ROWS, zmax=1.0):
    """A square map over states, such as CKA."""
    values = np.asarray(values)
    figure = theme.heatmap(
        values,
        list(range(values.shape[1])),
        list(range(values.shape[0])),
        title=title,
        x_title=x_title,
        y_title=y_title,
        unit=unit,
        zmax=zmax,
        height=620,
    )
    return figure.update_yaxes(scaleanchor="x", constrain="domain").update_xaxes(constrain="domain")


def position_map(values, positions, states, pieces, *, title, unit, signed=False, zmax=None):
    """A map of (state, position): distance of two runs, or what a patch restores. pieces: of all
    positions."""
    labels = [f"{p} {theme.token_text(pieces[p])}" for p in positions]
    figure = theme.heatmap(
        values,
        labels,
        [str(s) for s in states],
        title=title,
        x_title="token",
        y_title=ROWS,
        unit=unit,
        signed=signed,
        zmax=zmax,
        height=max(380, min(720, 150 + 16 * len(states))),
    )
    theme.label_ticks(figure, labels, "x", most=48, tickangle=-60)
    return figure.update_yaxes(type="category")


def drift_profile(data, change, pieces, *, title):
    """Two files on one text: distance of the streams by state, KL of the predictions by token."""
    figure = make_subplots(rows=2, cols=1, vertical_spacing=0.2)
    place = dict(row=1, col=1)
    values = data["distance"].values  # (layer, pair)
    for quantile, color, name in (
        (0.9, theme.CATEGORIES[4], "90th percentile"),
        (0.5, theme.CATEGORIES[0], "median"),
    ):
        _line(
            figure,
            data["layer"].values,
            np.quantile(values[:, 1:], quantile, axis=1),
            f"other tokens, {name}",
            color,
            place=place,
        )
    _line(
        figure,
        data["layer"].values,
        values[:, 0],
        "first token",
        theme.CATEGORIES[5],
        dash="dash",
        place=place,
    )
    labels = [f"{p} {theme.token_text(pieces[p])}" for p in change["position"]]
    figure.add_bar(
        x=theme.axis_values(labels),
        y=change["kl"],
        marker_color=theme.CATEGORIES[0],
        showlegend=False,
        row=2,
        col=1,
        hovertemplate="%{x}: %{y:.5f} nats<extra></extra>",
    )
    figure.update_xaxes(title=STATE, **theme.whole(data["layer"].values), row=1)
    theme.label_ticks(
        figure, labels, "x", most=48, title="token that is read", tickangle=-60, row=2
    )
    figure.update_yaxes(title="relative distance", rangemode="tozero", row=1)
    figure.update_yaxes(title="KL of predictions (nats)", row=2)
    return figure.update_layout(
        **theme.titled(title), height=640, legend=_LEGEND, margin=dict(t=90)
    )


def generation_map(table, lens_data, *, title):
    """Each generated token: entropy and probability above, the lens's entropy by state below.

    table: layers.compare.generation_table; lens_data: lens of all positions.
    """
    labels = [
        f"{p} {theme.token_text(piece)}" for p, piece in zip(table["position"], table["piece"])
    ]
    x = theme.axis_values(labels)
    figure = make_subplots(
        rows=2,
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.06,
        row_heights=[0.35, 0.65],
        specs=[[{"secondary_y": True}], [{}]],
    )
    figure.add_bar(
        x=x,
        y=table["entropy"],
        name="entropy (nats)",
        marker_color=theme.CATEGORIES[0],
        row=1,
        col=1,
    )
    figure.add_scatter(
        x=x,
        y=table["probability"],
        name="probability of the token",
        mode="lines+markers",
        line=dict(color=theme.CATEGORIES[1]),
        row=1,
        col=1,
        secondary_y=True,
    )
    values = lens_data["entropy"].isel(token=table["position"].to_numpy() - 1)
    figure.add_heatmap(
        x=x,
        y=values["layer"].values,
        z=values.values,
        colorscale=theme.MAGNITUDE,
        row=2,
        col=1,
        colorbar=dict(title=dict(text="entropy of the lens (nats)", side="right"), len=0.6, y=0.3),
        hovertemplate="%{x}, state %{y}: %{z:.3f} nats<extra></extra>",
    )
    figure.add_scatter(
        x=x,
        y=table["settled"],
        name="settles here",
        mode="markers",
        row=2,
        col=1,
        marker=dict(color="white", symbol="diamond", size=7, line=dict(color="black", width=1)),
    )
    figure.update_yaxes(title="entropy", row=1, secondary_y=False)
    figure.update_yaxes(
        title="probability",
        range=[0, 1.05],
        tickvals=[0, 0.5, 1],
        showgrid=False,
        row=1,
        secondary_y=True,
    )
    figure.update_yaxes(title=ROWS, **theme.whole(values["layer"].values), row=2)
    theme.label_ticks(figure, labels, "x", most=64, title="generated token", tickangle=-60, row=2)
    return figure.update_layout(
        **theme.titled(title), height=720, legend=_LEGEND, margin=dict(t=90)
    )


def routing_maps(load, entropy, *, title):
    """Share of the choices per expert, and the router's entropy by layer."""
    figure = make_subplots(rows=1, cols=2, column_widths=[0.68, 0.32], horizontal_spacing=0.2)
    figure.add_heatmap(
        z=load.values,
        y=load["layer"].values,
        colorscale=theme.MAGNITUDE,
        zmin=0,
        row=1,
        col=1,
        colorbar=dict(title=dict(text="share of choices", side="right"), x=0.6),
        hovertemplate="layer %{y}, expert %{x}: %{z:.2%}<extra></extra>",
    )
    _line(
        figure,
        entropy.mean("token").values,
        entropy["layer"].values,
        "entropy",
        theme.CATEGORIES[0],
        place=dict(row=1, col=2),
        showlegend=False,
    )
    figure.update_xaxes(title="expert", row=1, col=1)
    figure.update_xaxes(title="entropy of the router (nats)", rangemode="tozero", row=1, col=2)
    figure.update_yaxes(title="layer", row=1, col=1)
    return figure.update_layout(**theme.titled(title), height=480)


def kind_map(table, *, title):
    """Share of each kind of token's choices by expert. table: layers.routing.experts_by_kind."""
    figure = theme.heatmap(
        table.to_numpy(),
        [str(e) for e in table.columns],
        list(table.index),
        title=title,
        x_title="expert",
        y_title="kind of token",
        unit="share of choices",
        zmax=float(table.to_numpy().max()),
        height=200 + 36 * len(table),
    )
    return figure.update_xaxes(type="category")
