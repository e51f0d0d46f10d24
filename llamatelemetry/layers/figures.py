"""Figures of notebook 14: profiles over depth, maps of state and token. All return Plotly
figures."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr

from ..files.vocabulary import named
from ..views import theme
from ..views.panels import add_bars, add_line, name_axes, name_tokens, panels
from ..views.text import plotly, shorten, token_labels, token_text

STATE = "state (0: embedding, l: after layer l - 1)"
ROWS = "state"  # the same on a vertical axis, where there is less room
PARTS = theme.COLOR | {"both": theme.COLOR["residual"]}
BLUE, ORANGE, FIRST, GREY = (theme.CATEGORIES[i] for i in (0, 1, 5, 7))  # FIRST: the first token


def lengths(table: pd.DataFrame, *, title: str) -> go.Figure:
    """Length of the stream by state. table: states.norm_table."""
    figure, x = panels(title), table.index
    band = dict(mode="lines", line=dict(width=0), hoverinfo="skip")
    figure.add_scatter(x=x, y=table["low"], showlegend=False, **band)
    band |= dict(fill="tonexty", fillcolor="rgba(0,158,115,0.2)", name="other tokens, 10 to 90%")
    figure.add_scatter(x=x, y=table["high"], **band)
    add_line(figure, x, table["median"], "other tokens, median", theme.COLOR["residual"])
    add_line(figure, x, table["first"], "first token", FIRST, dash="dash")
    return theme.decades(name_axes(figure, STATE, "length (L2 norm, log scale)", x))


def magnitudes(table: pd.DataFrame, *, title: str) -> go.Figure:
    """Quantiles of the magnitudes by state. table: states.magnitude_quantiles."""
    figure, x = panels(title), table.index
    names = {0.5: "median", 1.0: "largest"}
    colors = ("#9E9E9E", *theme.CATEGORIES[2:5], BLUE)
    for column, color in zip(table.columns.drop("first"), colors):
        add_line(figure, x, table[column], names.get(column, f"{100 * column:g}%"), color)
    add_line(figure, x, table["first"], "largest of the first token", FIRST, dash="dash")
    return theme.decades(name_axes(figure, STATE, "magnitude of one value (log scale)", x))


def sparsity(table: pd.DataFrame, *, title: str) -> go.Figure:
    """How few neurons are active. table: states.ffn_sparsity."""
    names = {
        "small": "below 1% of the token's largest",
        "needed": "hold 90% of the sum of squares",
        "largest": "sum of squares in one neuron",
    }
    figure = panels(title)
    for (column, name), color in zip(names.items(), theme.CATEGORIES):
        add_line(figure, table.index, table[column], name, color, unit=".2%")
    share = "share of neurons, or of squares"
    return name_axes(figure, "layer", share, table.index, rangemode="tozero", tickformat=".0%")


def contributions(data: xr.Dataset, *, title: str) -> go.Figure:
    """What each block adds: its length against the stream's, and its cosine with it. Median of the
    tokens after the first, and the first. data: states.contributions."""
    figure, layers = panels(title, 430, cols=2, horizontal_spacing=0.13), data["layer"].values
    for part in data["part"].values:
        for col, name in ((1, "relative"), (2, "cosine")):
            values = data[name].sel(part=part).values  # (layer, token)
            later = np.median(values[:, 1:], axis=1)
            where: dict[str, Any] = dict(col=col, showlegend=col == 1)
            add_line(figure, layers, later, str(part), PARTS[part], **where)
            where |= dict(dash="dot", opacity=0.6)
            add_line(figure, layers, values[:, 0], f"{part}, first token", PARTS[part], **where)
    name_axes(figure, "layer", "length added / length before", layers)
    name_axes(figure, "layer", "cosine with the stream", layers, col=2, zeroline=True)
    return theme.decades(figure, row=1, col=1)


def projection(table: pd.DataFrame, *, title: str) -> go.Figure:
    """Shares of the final state by layer, with their running sum. table: states.projection."""
    figure = panels(title).update_layout(barmode="relative")
    add_bars(figure, [-1], [table.attrs["embedding"]], "embedding", PARTS["embedding"])
    for part in ("attention", "ffn"):
        add_bars(figure, table.index, table[part], part, PARTS[part], "layer %{x}: %{y:.2%}")
    color = theme.COLOR["residual"]
    add_line(figure, table.index, table["cumulative"], "sum up to here", color, unit=".2%")
    share = "share of the final state"
    return name_axes(figure, "layer (-1: embedding)", share, table.index, tickformat=".0%")


def norms(table: pd.DataFrame, *, title: str) -> go.Figure:
    """What the norms do: change of direction, scale, and silenced dimensions. table:
    norms.norm_impact."""
    columns = {
        "cosine": "cosine before / after",
        "scale": "length after / before (log)",
        "silenced": "silenced dimensions",
    }
    figure = panels(title, 400, cols=3, horizontal_spacing=0.1)
    layers = table.index.unique("layer")
    for col, (column, name) in enumerate(columns.items(), start=1):
        for part, values in table[column].groupby(level="part"):
            x = values.index.get_level_values("layer")
            where: dict[str, Any] = dict(col=col, showlegend=col == 1)
            add_line(figure, x, values, f"before {part}", PARTS[part], **where)
        name_axes(figure, "layer", dict(text=name, standoff=4), layers, col=col)
    figure.update_yaxes(tickformat=".0%", rangemode="tozero", row=1, col=3)
    return theme.decades(figure, row=1, col=2)


def lens(data: xr.Dataset, position: int, *, title: str) -> go.Figure:
    """Rank and probability of the answer, entropy, and KL to the output, by state. data:
    lens.lens."""
    labels = {
        "rank": "rank (1: best, log)",  # counted from 1: a log axis has no 0
        "probability": "probability",
        "entropy": "entropy (nats)",
        "kl": "KL to output (nats)",
    }
    spacing = dict(horizontal_spacing=0.12, vertical_spacing=0.1, shared_xaxes=True)
    figure, one = panels(title, 520, 2, 2, **spacing), data.isel(token=position)
    depth = one["layer"].values
    for i, (name, label) in enumerate(labels.items()):
        where: dict[str, Any] = dict(row=1 + i // 2, col=1 + i % 2)
        values = one[name].values + (name == "rank")
        add_line(figure, depth, values, label, theme.CATEGORIES[i], showlegend=False, **where)
        name_axes(figure, STATE if i > 1 else None, label, depth, rangemode="tozero", **where)
    return theme.decades(figure, row=1, col=1)


def best_tokens(
    data: xr.Dataset, pieces: Sequence, vocabulary: Sequence, *, title: str, last: int = 12
) -> go.Figure:
    """The lens's best token per state and position, coloured by its probability; hover has the five
    best.

    data: lens.lens; pieces: of the tokens read; vocabulary: token id -> piece; last: so many
    positions from the end. Of more than 36 states every second, third, .. is shown."""
    every, positions = -(-data.sizes["layer"] // 36), data["position"].values[-last:]
    states = data["layer"].values[::-1][::every][::-1]  # the last one always
    shown = data.sel(layer=states).isel(token=slice(-last, None))
    names = [[named(vocabulary, best) for best in row] for row in shown["top"].values]
    shares = shown["top_probability"].values  # (layer, token, best)

    def ranking(best, share):
        lines = zip(best, share)
        return "<br>".join(f"{plotly(token_text(piece))}  {p:.4f}" for piece, p in lines)

    hover = [[ranking(*cell) for cell in zip(*row)] for row in zip(names, shares)]
    labels = token_labels(pieces, positions)
    axis, height = "token that is read", 140 + 19 * len(names)
    axis += f" (the last {last} of {data.sizes['token']})" if data.sizes["token"] > last else ""
    look: dict[str, Any] = dict(x_title=axis, y_title=ROWS, unit="probability", zmax=1)
    depth = list(map(str, states))
    figure = theme.heatmap(shares[..., 0], labels, depth, title=title, height=height, **look)
    text = [[plotly(shorten(token_text(best[0]), 9)) for best in row] for row in names]
    figure.update_traces(
        text=text, texttemplate="%{text}", textfont=dict(size=10), customdata=hover
    )
    more = "position %{x}, state %{y}<br>%{customdata}<extra></extra>"
    figure.update_traces(hovertemplate=more, xgap=1, ygap=1).update_yaxes(type="category")
    return name_tokens(figure, labels, axis, -45, most=32)


def settled(
    layers: Sequence[int], pieces: Sequence, *, title: str, positions: Sequence[int] | None = None
) -> go.Figure:
    """State at which the prediction after each token settles. layers: (token,) of lens.settled;
    positions: of those tokens, None for all pieces."""
    figure, labels = panels(title, 380), token_labels(pieces, positions)
    x, hover = theme.axis_values(labels), "%{x}: state %{y}"
    add_bars(figure, x, layers, "", theme.COLOR["residual"], hover)
    depth = range(int(max(layers)) + 1)
    figure.update_yaxes(title="settles at state", **theme.whole(depth))
    return name_tokens(figure, labels, "token that is read", -90).update_layout(margin_t=60)


def attribution(table: pd.DataFrame, *, title: str) -> go.Figure:
    """Direct logit attribution by layer, with the running sum. table: lens.logit_attribution."""
    figure = panels(title).update_layout(barmode="relative")
    inside = table["layer"] >= 0
    rest = table["value"][~inside].sum()
    add_bars(figure, [-1], [rest], "embedding, bias", PARTS["embedding"])
    for part in ("attention", "ffn"):
        rows = table[table["component"] == part]
        add_bars(figure, rows["layer"], rows["value"], part, PARTS[part], "layer %{x}: %{y:+.3f}")
    total = rest + table[inside].groupby("layer")["value"].sum().cumsum()
    add_line(figure, total.index, total, "sum up to here", theme.COLOR["residual"])
    depth = "layer (-1: embedding and the rest)"
    return name_axes(figure, depth, "logit difference", table["layer"].unique())


def importance(table: pd.DataFrame, *, title: str) -> go.Figure:
    """Block Influence above, rise of the loss under ablation below. table:
    states.layer_importance."""
    spacing: dict[str, Any] = dict(shared_xaxes=True, vertical_spacing=0.08, row_heights=[0.4, 0.6])
    figure, layers = panels(title, 560, 2, **spacing), table.index
    add_bars(figure, layers, table["influence"], "Block Influence", GREY)
    for part in ("attention", "ffn", "both"):
        add_line(figure, layers, table[part], f"without {part}", PARTS[part], unit="+.4f", row=2)
    name_axes(figure, None, "influence (1 - cosine)", layers)
    return name_axes(figure, "layer", "rise of the loss (nats per token)", layers, row=2)


def similarity(
    values: np.ndarray, *, title: str, x_title: str = STATE, y_title: str = ROWS
) -> go.Figure:
    """Similarity of all pairs of states. values: the map of states.cka_map."""
    rows, columns = (list(range(n)) for n in np.shape(values))
    texts: dict[str, Any] = dict(title=title, x_title=x_title, y_title=y_title, unit="CKA (0 to 1)")
    figure = theme.heatmap(values, columns, rows, zmax=1.0, height=620, **texts)
    return figure.update_yaxes(scaleanchor="x", constrain="domain").update_xaxes(constrain="domain")


def _position_map(values, positions, pieces, **options):
    # values: DataArray (layer, position or pair)
    states = list(map(str, values["layer"].values))
    labels = token_labels(pieces, positions)
    height = max(380, min(720, 150 + 16 * len(states)))
    options |= dict(x_title="token", y_title=ROWS, height=height)
    figure = theme.heatmap(values.values, labels, states, **options)
    return name_tokens(figure, labels, "token", -60).update_yaxes(type="category")


def divergence(data: xr.Dataset, pieces: Sequence, *, title: str) -> go.Figure:
    """Distance of two runs by state and token. data: compare.divergence; pieces: of the first."""
    positions = data["position"].values
    return _position_map(data["distance"], positions, pieces, title=title, unit="relative distance")


def patches(shares: xr.DataArray, pieces: Sequence, *, title: str) -> go.Figure:
    """What one patched state restores. shares: compare.patch_map; pieces: of the whole prompt."""
    options = dict(unit="answer restored (1: all)", signed=True, zmax=1)
    return _position_map(shares, shares["position"].values, pieces, title=title, **options)


def drift(data: xr.Dataset, change: pd.DataFrame, pieces: Sequence, *, title: str) -> go.Figure:
    """Two files on one text: distance of the streams by state, KL of the predictions by token.
    data: compare.divergence; change: compare.output_change; pieces: of the text."""
    figure = panels(title, 640, 2, vertical_spacing=0.2)
    depth, values = data["layer"].values, data["distance"].values  # (layer, pair)
    high, median = np.quantile(values[:, 1:], (0.9, 0.5), axis=1)
    add_line(figure, depth, high, "other tokens, 90th percentile", theme.CATEGORIES[4])
    add_line(figure, depth, median, "other tokens, median", BLUE)
    add_line(figure, depth, values[:, 0], "first token", FIRST, dash="dash")
    labels = token_labels(pieces, change["position"])
    x, hover = theme.axis_values(labels), "%{x}: %{y:.5f} nats"
    add_bars(figure, x, change["kl"], "", BLUE, hover, row=2, showlegend=False)
    name_axes(figure, STATE, "relative distance", depth, rangemode="tozero")
    name_axes(figure, None, "KL of predictions (nats)", row=2)
    return name_tokens(figure, labels, "token that is read", -60, row=2)


def generation(table: pd.DataFrame, lens_data: xr.Dataset, *, title: str) -> go.Figure:
    """Each generated token: entropy and probability above, the lens's entropy by state below.
    table: compare.generation_table; lens_data: lens.lens of theirs."""
    spacing: dict[str, Any] = dict(
        shared_xaxes=True, vertical_spacing=0.06, row_heights=[0.35, 0.65]
    )
    spacing |= dict(specs=[[{"secondary_y": True}], [{}]])
    figure, pieces = panels(title, 720, 2, **spacing), table.set_index("position")["piece"]
    labels = token_labels(pieces, pieces.index)
    x = theme.axis_values(labels)
    add_bars(figure, x, table["entropy"], "entropy (nats)", BLUE)
    line = dict(mode="lines+markers", line=dict(color=ORANGE), secondary_y=True)
    share = dict(y=table["probability"], name="probability of the token", **line)
    figure.add_scatter(x=x, row=1, col=1, **share)
    at = np.searchsorted(lens_data["position"].values, table["position"].to_numpy() - 1)
    entropy = lens_data["entropy"].isel(token=at)
    bar = dict(title=dict(text="entropy of the lens (nats)", side="right"), len=0.6, y=0.3)
    hover = "%{x}, state %{y}: %{z:.3f} nats<extra></extra>"
    look = dict(colorscale=theme.MAGNITUDE, colorbar=bar, hovertemplate=hover)
    depth = entropy["layer"].values
    figure.add_heatmap(x=x, y=depth, z=entropy.values, row=2, col=1, **look)
    mark = dict(color="white", symbol="diamond", size=7, line=dict(color="black", width=1))
    look = dict(name="settles here", mode="markers", marker=mark)
    figure.add_scatter(x=x, y=table["settled"], row=2, col=1, **look)
    figure.update_yaxes(title="entropy", row=1, secondary_y=False)
    right = dict(title="probability", range=[0, 1.05], tickvals=[0, 0.5, 1], showgrid=False)
    figure.update_yaxes(**right, row=1, secondary_y=True)
    figure.update_yaxes(title=ROWS, autorange="reversed", **theme.whole(depth), row=2)
    return name_tokens(figure, labels, "generated token", -60, most=64, row=2)


def routing(load: xr.DataArray, entropy: xr.DataArray, *, title: str) -> go.Figure:
    """Share of the choices per expert, and the router's entropy by layer. load:
    routing.expert_load; entropy: routing.routing_entropy."""
    spacing: dict[str, Any] = dict(column_widths=[0.68, 0.32], horizontal_spacing=0.2)
    figure, layers = panels(title, 480, cols=2, **spacing), load["layer"].values
    bar = dict(title=dict(text="share of choices", side="right"), x=0.6)
    hover = "layer %{y}, expert %{x}: %{z:.2%}<extra></extra>"
    look = dict(colorscale=theme.MAGNITUDE, zmin=0, colorbar=bar, hovertemplate=hover)
    figure.add_heatmap(z=load.values, y=layers, row=1, col=1, **look)
    mean = entropy.mean("token")
    depth = mean["layer"].values
    add_line(figure, mean.values, depth, "entropy", BLUE, col=2, showlegend=False)
    name_axes(figure, "expert", "layer")
    name_axes(figure, "entropy of the router (nats)", None, col=2)
    figure.update_xaxes(rangemode="tozero", col=2)
    return figure.update_yaxes(autorange="reversed")


def kinds(table: pd.DataFrame, *, title: str) -> go.Figure:
    """Which experts each kind of token goes to. table: of routing.experts_by_kind."""
    values, experts = table.to_numpy(), list(map(str, table.columns))
    look: dict[str, Any] = dict(x_title="expert", y_title="kind of token", unit="share of choices")
    look |= dict(title=title, zmax=float(values.max()), height=200 + 36 * len(table))
    figure = theme.heatmap(values, experts, list(table.index), **look)
    return figure.update_xaxes(type="category")
