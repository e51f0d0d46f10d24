"""Figures of directions, doses and cut edges."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from ..views import theme
from ..views.text import plotly, token_labels

LOOK = {"found": theme.CATEGORIES[0], "random": theme.CATEGORIES[7]}
NAMES = {"found": "the direction", "random": "random directions of its length"}
STRENGTH = "strength (1: what the texts differ by)"


def _band(figure, table, name, color, said, **place):
    """A line with what lies between its low and high filled."""
    table = table.sort_values("strength")
    x, low, high = table["strength"].tolist(), table["low"].tolist(), table["high"].tolist()
    outline = dict(x=[*x, *x[::-1]], y=[*low, *high[::-1]], mode="lines", line_width=0)
    fill = dict(fill="toself", fillcolor=color, opacity=0.25, hoverinfo="skip", showlegend=False)
    figure.add_scatter(**outline, **fill, **place)
    bounds = np.column_stack([low, high])
    line = dict(mode="lines+markers", line_color=color, customdata=bounds)
    hover = f"strength %{{x}}<br>{said} %{{y:.3f}}"
    if np.isfinite(bounds).all():
        hover += " (%{customdata[0]:.3f} to %{customdata[1]:.3f})"
    figure.add_scatter(
        x=x, y=table["mean"], name=plotly(name), hovertemplate=f"{hover}<extra></extra>",
        **line, **place,
    )  # fmt: skip


def dose(response: pd.DataFrame, price: pd.DataFrame, *, measured: str, title: str) -> go.Figure:
    """What a direction does above, and what it costs below. response: dose.summary; price:
    dose.price; measured: what the response is, with its unit. Bands: of the direction 95% over
    prompts (above) and over tokens (below), of the random ones from the least to the largest."""
    figure = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.08)
    cost = price.groupby(["direction", "strength"], as_index=False).agg(
        mean=("mean", "mean"), low=("low", "min"), high=("high", "max")
    )
    for row, (table, said) in enumerate(((response, "mean"), (cost, "factor")), 1):
        for kind, part in table.groupby("direction"):
            _band(figure, part, NAMES[kind], LOOK[kind], said, row=row, col=1)
            figure.data[-1].update(showlegend=row == 1)
    figure.add_hline(y=1, line=dict(color=theme.MISSING, dash="dot"), row=2, col=1)
    figure.update_yaxes(title_text=plotly(measured), row=1, col=1)
    figure.update_yaxes(title_text="perplexity, factor", row=2, col=1)
    figure.update_xaxes(title_text=STRENGTH, row=2, col=1)
    return figure.update_layout(**theme.titled(title), height=620, **theme.LEGEND_ABOVE)


def across(tables: pd.DataFrame, *, measured: str, title: str) -> go.Figure:
    """Directions of several files in several files: a panel per file that is steered, a line per
    file that a direction was found in. tables: dose.summary's columns with found_in and steered."""
    steered = list(dict.fromkeys(tables["steered"]))
    names = [plotly(f"steered: {name}") for name in steered]
    figure = make_subplots(1, len(steered), shared_yaxes=True, subplot_titles=names)
    for column, name in enumerate(steered, 1):
        for color, (origin, part) in zip(
            theme.CATEGORIES, tables[tables["steered"] == name].groupby("found_in", sort=False)
        ):
            _band(figure, part, f"found in {origin}", color, "mean", row=1, col=column)
            figure.data[-1].update(showlegend=column == 1)
    figure.update_xaxes(title_text="strength").update_yaxes(title_text=plotly(measured), col=1)
    figure.update_layout(**theme.titled(title), height=480, **theme.LEGEND_ABOVE)
    return figure.update_layout(legend_y=1.1, margin_t=125)  # above the panels' titles


def direction(
    norms: xr.DataArray, explained: xr.DataArray, stream: pd.Series, *, title: str
) -> go.Figure:
    """How much of the stream a direction is, and how much of the pairs' differences it is, by layer
    of hidden. norms, explained: a ControlVector's; stream: length of the state itself, by layer."""
    layers = norms["layer"].values
    figure = go.Figure()
    length = stream.loc[layers]
    share = (norms.values / length.where(length > 0)).to_numpy()
    for name, values, color in (
        ("length over the state's", share, theme.COLOR["residual"]),
        ("share of the pairs' differences along it", explained.values, theme.CATEGORIES[0]),
    ):
        figure.add_scatter(
            x=layers, y=values, name=name, mode="lines+markers", line_color=color,
            hovertemplate=f"state %{{x}}<br>{name}: %{{y:.3f}}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title_text="state", **theme.whole(layers))
    figure.update_yaxes(title_text="share", rangemode="tozero")
    return figure.update_layout(**theme.titled(title), height=380, **theme.LEGEND_ABOVE)


def cuts(cuts: xr.Dataset, pieces: Sequence, *, title: str) -> go.Figure:
    """What cutting the last token's edges to each key changes in a lead. cuts: knockout.cut;
    pieces: of the whole text."""
    change = cuts["change"].values
    if not np.isfinite(change).any():
        return theme.nothing(title, "no edge could be cut: each query needs one key that is left")
    keys, groups = cuts["key"].values, cuts["group"].values.tolist()
    labels = token_labels(pieces, keys)
    hover = [
        [
            f"{plotly(group)}<br>to {plotly(label)}<br>lead {one:+.3f} nats<br>"
            f"KL {far:.4f} nats<br>mean weight {heavy:.4f}"
            if np.isfinite(one)
            else f"{plotly(group)}<br>to {plotly(label)}<br>no edge"
            for label, one, far, heavy in zip(labels, *rows)
        ]
        for group, *rows in zip(groups, change, cuts["kl"].values, cuts["weight"].values)
    ]
    figure = theme.heatmap(
        change,
        labels,
        groups,
        title=title,
        x_title="key that the last token no longer sees",
        y_title="",
        unit="change of the lead (nats)",
        signed=True,
        hover=hover,
        height=max(340, 22 * len(groups) + 190),
    )
    theme.label_ticks(figure, labels, "x", most=48)
    return figure.update_xaxes(tickangle=-60)


def importance(table: pd.DataFrame, pieces: Sequence, *, title: str) -> go.Figure:
    """Each token's share of three things: what cutting it out costs, attention, rollout; of the
    tokens after the first, which would hide the others. table: knockout.whole_tokens; pieces: of
    the whole text."""
    shown = table[table["key"] > 0]
    if shown.empty or not shown["kl"].sum() > 0:
        return theme.nothing(title, "no token after the first could be cut out")
    labels, figure = token_labels(pieces, shown["key"].to_numpy()), go.Figure()
    for name, color, said in (
        ("kl", theme.CATEGORIES[5], "KL of cutting it out"),
        ("attention", theme.COLOR["attention"], "attention"),
        ("rollout", theme.CATEGORIES[4], "rollout"),
    ):
        hover = f"%{{x}}<br>{said}: %{{y:.1%}}<extra></extra>"
        share, x = shown[name] / shown[name].sum(), theme.axis_values(labels)
        figure.add_bar(x=x, y=share, name=said, marker_color=color, hovertemplate=hover)
    theme.label_ticks(figure, labels, "x", most=48)
    figure.update_xaxes(title_text="key", tickangle=-60)
    figure.update_yaxes(title_text="share of the tokens after the first", tickformat=".0%")
    look = dict(barmode="group", height=440, **theme.LEGEND_ABOVE)
    return figure.update_layout(**theme.titled(title), **look)


def head_or_edge(table: pd.DataFrame, *, title: str) -> go.Figure:
    """KL without a head against KL without its strongest edges. table: knockout.head_or_edge."""
    shown = table[(table[["kl_head", "kl_edge"]] > 0).all(axis=1)]
    if shown.empty:
        return theme.nothing(title, "no head could be compared")
    ends = [
        float(shown[["kl_head", "kl_edge"]].min().min()),
        float(shown[["kl_head", "kl_edge"]].max().max()),
    ]
    figure = go.Figure()
    dotted = dict(color=theme.COLOR["baseline"], dash="dot")
    figure.add_scatter(x=ends, y=ends, mode="lines", name="equal", line=dotted, hoverinfo="skip")
    figure.add_scatter(
        x=shown["kl_head"], y=shown["kl_edge"], mode="markers", name="one head",
        text=[f"L{one.layer}H{one.head}, mean weight of the edges {one.weight:.2f}" for one in shown.itertuples()],
        marker=dict(size=9, color=shown["weight"], colorscale=theme.MAGNITUDE, cmin=0, cmax=1,
                    colorbar=dict(title=dict(text="mean weight of the edges", side="right"))),
        hovertemplate="%{text}<br>without it %{x:.5f}<br>edges cut %{y:.5f}<extra></extra>",
    )  # fmt: skip
    theme.decades(theme.decades(figure, "x"), "y")
    figure.update_xaxes(title_text="KL with the head zeroed (nats per token)")
    figure.update_yaxes(title_text="KL with its strongest edges cut (nats per token)")
    return figure.update_layout(**theme.titled(title), height=460, **theme.LEGEND_ABOVE)
