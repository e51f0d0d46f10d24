"""Figures of notebook 16 on output quality: how far files are apart, where, and what the cache
costs."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..views import theme
from ..views.text import plotly
from .figures import KLD, axes, colors, decades, draw_floor

SYMBOLS = ["circle", "square", "diamond", "triangle-up", "x", "star"]


def ladder(table: pd.DataFrame, *, floor: float | None = None, title: str) -> go.Figure:
    """Mean KL divergence against real bits per weight, with the 95% interval by window where there
    is one.

    table: a Comparison or DataFrame with bits_per_weight, kld_mean, kld_mean_low, kld_mean_high,
    indexed by file. floor: Comparison.floor, drawn as a line."""
    figure = axes(title, "bits per weight", KLD)
    color, drawn = colors(table.index), table.dropna(subset="kld_mean")
    if drawn.empty:
        return theme.nothing(title, "no file was measured")
    for name, row in drawn.iterrows():
        kld, ends = row["kld_mean"], (row["kld_mean_low"], row["kld_mean_high"])
        low, high = (kld if np.isnan(end) else end for end in ends)
        by_window = "no interval: one window, or copies of one"
        if np.isfinite(ends).all():
            by_window = f"95% by window: {low:.5g} to {high:.5g}"
        figure.add_scatter(
            x=[row["bits_per_weight"]],
            y=[max(kld, 1e-9)],
            name=plotly(name),
            mode="markers+text",
            text=[f"  {plotly(name)}"],
            textposition="middle right",  # beside the interval, not on it
            marker=dict(size=11, color=color[name]),
            showlegend=False,
            error_y=dict(array=[high - kld], arrayminus=[kld - low], type="data"),
            hovertemplate=f"{plotly(name)}<br>%{{x:.3f}} bits per weight<br>KLD %{{y:.5g}} nats"
            f"<br>{by_window}<extra></extra>",
        )
    low, high = drawn["bits_per_weight"].min(), drawn["bits_per_weight"].max()
    step = (high - low or 1) / 20
    ends = [low - step, high + 3 * step]  # room for the last name
    figure.update_xaxes(range=ends).update_layout(legend=dict(orientation="h", y=-0.2))
    return decades(draw_floor(figure, floor, ends))


def percentiles(table: pd.DataFrame, *, title: str) -> go.Figure:
    """Percentiles of the per-token KL divergence, one line per file. table: as for ladder."""
    steps = dict(
        min="min",
        p05="5",
        p10="10",
        median="50",
        p90="90",
        p95="95",
        p99="99",
        p999="99.9",
        max="max",
    )
    axis = "percentile of the scored tokens"
    figure = axes(title, axis, "KL divergence (nats, log scale)")
    color, drawn = colors(table.index), table.dropna(subset="kld_mean")
    if drawn.empty:
        return theme.nothing(title, "no file was measured")
    for name, row in drawn.iterrows():
        values = row[[f"kld_{step}" for step in steps]].to_numpy(float)
        figure.add_scatter(
            x=list(steps.values()),
            y=np.maximum(values, 1e-7),
            name=plotly(name),
            mode="lines+markers",
            line_color=color[name],
            hovertemplate=f"percentile %{{x}}<br>%{{y:.4g}} nats<extra>{plotly(name)}</extra>",
        )
    return decades(figure).update_xaxes(type="category")


def token_kinds(kinds: pd.DataFrame, by: str, *, title: str) -> go.Figure:
    """Mean KLD by kind of token, and below it how often the likeliest token is another. kinds:
    vulnerable_tokens; by: one of its keys ("piece", "position", ...)."""
    if kinds.empty:
        return theme.nothing(title, "no token was scored")
    part = kinds.xs(by, level="by").reset_index()
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.06)
    color = colors(part["candidate"].unique())
    text = (
        "%{x}: KLD %{customdata[0]:.4g} nats, half below %{customdata[1]:.3g}<br>%{customdata[2]} "
    )
    text += (
        "tokens, %{customdata[3]:.0%} of the sum<br>same likeliest %{customdata[4]:.1%}, of the "
    )
    text += (
        "likeliest ten %{customdata[5]:.1%}<br>Δp %{customdata[6]:+.3g}, RMS %{customdata[7]:.3g}"
    )
    shown = "kld median n share_of_kld same_top top10 mean_dp rms_dp".split()
    for name, rows in part.groupby("candidate", sort=False):
        for row, y in enumerate((rows["kld"], 1 - rows["same_top"]), 1):
            figure.add_bar(
                x=theme.axis_values(rows["kind"]),
                y=y,
                row=row,
                col=1,
                name=plotly(name),
                legendgroup=str(name),
                showlegend=row == 1,
                marker_color=color[name],
                customdata=rows[shown],
                hovertemplate=f"{text}<extra>{plotly(name)}</extra>",
            )
    figure.update_layout(**theme.titled(title), barmode="group", height=560)
    figure.update_xaxes(title="kind of token" if by == "piece" else by, row=2)
    figure.update_yaxes(title="mean KLD (nats, log)", row=1)
    figure.update_yaxes(title="another likeliest token", tickformat=".0%", row=2)
    return decades(figure, row=1, col=1)


def cache(
    table: pd.DataFrame, n_tokens: int, *, floor: float | None = None, title: str
) -> go.Figure:
    """Mean KLD against the memory of weights and cache for n_tokens: a line per file of weights,
    a mark per pair of cache types.

    table: a Comparison with cache_types and memory_bytes for n_tokens; floor: its floor."""
    drawn = table.dropna(subset=["kld_mean", "memory_bytes"])
    if drawn.empty:
        return theme.nothing(title, "no file was measured")
    axis = f"weights and cache for {n_tokens:,} tokens (MB)"
    figure = go.Figure(layout=dict(**theme.titled(title), xaxis_title=axis, yaxis_title=KLD))
    color = colors(table["weights"].unique())
    kinds = (drawn["cache_k"] + "/" + drawn["cache_v"]).rename("pair")
    symbol = {pair: SYMBOLS[i % len(SYMBOLS)] for i, pair in enumerate(kinds.unique())}
    for weights, rows in drawn.assign(pair=kinds).groupby("weights", sort=False):
        rows = rows.sort_values("memory_bytes")
        kld = rows["kld_mean"].clip(lower=1e-6)
        figure.add_scatter(
            x=rows["memory_bytes"] / 1e6,
            y=kld,
            mode="lines+markers",
            name=plotly(weights),
            line=dict(color=color[weights], width=1),
            marker=dict(size=10, symbol=rows["pair"].map(symbol).tolist()),
            customdata=rows[["pair", "kld_mean"]],
            hovertemplate=f"{plotly(weights)}, %{{customdata[0]}} cache<br>%{{x:,.1f}} MB<br>"
            "KLD %{customdata[1]:.4g} nats<extra></extra>",
        )
    for pair, mark in symbol.items():  # what the marks mean, in grey
        look = dict(symbol=mark, size=10, color=theme.COLOR["baseline"])
        figure.add_scatter(x=[None], y=[None], mode="markers", marker=look, name=f"{pair} cache")
    ends = drawn["memory_bytes"].min() / 1e6, drawn["memory_bytes"].max() / 1e6
    return decades(draw_floor(figure, floor, ends))
