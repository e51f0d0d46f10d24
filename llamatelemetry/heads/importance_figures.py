"""Figures of what the model loses without its heads."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from ..views import theme
from .figures import band, finished

ORDERS = {
    "least important": theme.CATEGORIES[0],
    "random": theme.CATEGORIES[7],
    "most important": theme.CATEGORIES[5],
}


def importance(table: pd.DataFrame, *, title: str) -> go.Figure:
    """Loss change of each head's ablation, layer across and head down; signed around zero, clipped
    at the 99th percentile so that one head does not hide the others (the hover has the value)."""
    if table["loss_change"].isna().all():
        return theme.nothing(title, "no head was ablated")
    said = [
        f"L{one.layer}H{one.head}<br>loss {one.loss_change:+.4f} ± {one.error:.4f} nats per token"
        f"<br>KL {one.kl:.4f} nats"
        for one in table.itertuples()
    ]
    place = dict(index="head", columns="layer")
    change = table.pivot(**place, values="loss_change")
    hover = table.assign(said=said).pivot(**place, values="said").to_numpy()
    figure = theme.heatmap(
        change.to_numpy(),
        change.columns.tolist(),
        change.index.tolist(),
        title=title,
        x_title="layer",
        y_title="head",
        unit="nats per token",
        signed=True,
        zmax=float(np.nanquantile(np.abs(change.to_numpy()), 0.99)) or 1.0,
        hover=hover,
    )
    return figure.update_layout(height=max(300, 22 * len(change) + 150))


def relations(relations: pd.DataFrame, target: str, *, title: str) -> go.Figure:
    """Rank correlation of importance with each measure, with its bootstrap interval over heads;
    grey where the interval holds 0. target: what importance is."""
    part = relations.sort_values("rho")
    if part["rho"].isna().all():
        return theme.nothing(title, "no correlation to be had: too few heads, or nothing varies")
    clear = (part["low"] > 0) | (part["high"] < 0)
    colors = np.where(clear, theme.COLOR["attention"], theme.COLOR["baseline"])
    sides = dict(array=part["high"] - part["rho"], arrayminus=part["rho"] - part["low"])
    bars = go.Bar(
        x=part["rho"],
        y=part.index,
        orientation="h",
        marker_color=colors,
        error_x=dict(type="data", symmetric=False, color="#808080", **sides),
        hovertemplate="%{y}<br>Spearman %{x:.3f}<extra></extra>",
    )
    x = f"Spearman correlation with {target} over heads (whisker: 95%)"
    figure = finished(go.Figure(bars), title, x, "measure", height=26 * len(part) + 150)
    return figure.update_xaxes(range=[-1, 1]).update_yaxes(title_standoff=16)


def both_ways(table: pd.DataFrame, *, title: str) -> go.Figure:
    """Loss change under zero and under mean ablation of the same heads. table: layer, head, zero,
    mean."""
    changes = table[["zero", "mean"]].dropna().to_numpy()
    if not len(changes):
        return theme.nothing(title, "no head was ablated both ways")
    ends = [float(changes.min()), float(changes.max())]
    dotted = dict(color=theme.COLOR["baseline"], dash="dot")
    figure = go.Figure()
    figure.add_scatter(x=ends, y=ends, mode="lines", name="equal", hoverinfo="skip", line=dotted)
    figure.add_scatter(
        x=table["zero"],
        y=table["mean"],
        text=[f"L{head.layer}H{head.head}" for head in table.itertuples()],
        mode="markers",
        name="one head",
        marker=dict(color=theme.COLOR["attention"], size=7),
        hovertemplate="%{text}<br>zero %{x:+.4f}<br>mean %{y:+.4f}<extra></extra>",
    )
    x = "loss change with the output zeroed (nats per token)"
    y = "with the output at its mean (nats per token)"
    return finished(figure, title, x, y, height=440, **theme.LEGEND_ABOVE)


def pruning(table: pd.DataFrame, n_heads: int, *, title: str) -> go.Figure:
    """Loss change against the number of removed heads, by order; the band of the random order spans
    its repeats."""
    figure = go.Figure()
    if table.empty:
        return theme.nothing(title, "no head was removed")
    hover = "%{x} heads removed<br>loss %{y:+.3f} nats per token<extra></extra>"
    for order, color in ORDERS.items():
        groups = table[table["order"] == order].groupby("removed")["loss_change"]
        mean, low, high = groups.mean(), groups.min(), groups.max()
        if (high > low).any():
            figure.add_trace(band(mean.index, low, high, color))
        name = "random order" if order == "random" else f"{order} first"
        line = dict(mode="lines+markers", line_color=color, hovertemplate=hover)
        figure.add_scatter(x=mean.index, y=mean, name=name, **line)
    x, y = f"heads removed, of the {n_heads} that were ablated", "loss change (nats per token)"
    return finished(figure, title, x, y, height=430, **theme.LEGEND_ABOVE)
