"""Figures of what the model loses without its heads."""

import numpy as np
import plotly.graph_objects as go

from ..views import theme
from .figures import _figure

ORDERS = {
    "least important": theme.CATEGORIES[0],
    "random": theme.CATEGORIES[7],
    "most important": theme.CATEGORIES[5],
}


def importance_map(table, model, mode, column="loss_change"):
    """Loss change of each head's ablation, layer across and head down; signed around zero, clipped
    at the 99th percentile so that one head does not hide the others (the hover has the value)."""
    layers, heads = sorted(table["layer"].unique()), sorted(table["head"].unique())
    grid = table.pivot(index="head", columns="layer", values=column).reindex(
        index=heads, columns=layers
    )
    error = table.pivot(index="head", columns="layer", values="error").reindex(
        index=heads, columns=layers
    )
    kl = table.pivot(index="head", columns="layer", values="kl").reindex(
        index=heads, columns=layers
    )
    limit = float(np.nanquantile(np.abs(grid.to_numpy()), 0.99)) or 1.0
    hover = [
        [
            f"L{layer}H{head}<br>loss {grid.loc[head, layer]:+.4f} ± {error.loc[head, layer]:.4f} nats per token"
            f"<br>KL {kl.loc[head, layer]:.4f} nats"
            for layer in layers
        ]
        for head in heads
    ]
    figure = theme.heatmap(
        grid.to_numpy(),
        layers,
        heads,
        title=f"Loss change of {model} when one head is {mode}",
        x_title="layer",
        y_title="head",
        unit="nats per token",
        signed=True,
        zmax=limit,
        hover=hover,
    )
    return figure.update_layout(height=max(300, 22 * len(heads) + 150))


def relation_bars(relations, model, target):
    """Rank correlation of importance with each measure, with its bootstrap interval over heads."""
    part = relations.sort_values("rho")
    clear = (part["low"] > 0) | (part["high"] < 0)
    figure = go.Figure(
        go.Bar(
            x=part["rho"],
            y=part.index,
            orientation="h",
            marker_color=np.where(clear, theme.COLOR["attention"], theme.COLOR["baseline"]),
            error_x=dict(
                type="data",
                symmetric=False,
                array=part["high"] - part["rho"],
                arrayminus=part["rho"] - part["low"],
                color="#808080",
            ),
            hovertemplate="%{y}<br>Spearman %{x:.3f}<extra></extra>",
        )
    )
    figure.update_xaxes(
        title_text=f"Spearman correlation with {target} over heads (bar: 95% interval)",
        range=[-1, 1],
    )
    figure.update_yaxes(title_text="measure", title_standoff=16)
    return _figure(
        figure,
        f"What important heads of {model} have in common (grey: the interval holds 0)",
        height=26 * len(part) + 150,
    )


def zero_against_mean(table, model):
    """Loss change under zero and under mean ablation of the same heads. table: layer, head, zero,
    mean."""
    both = table[["zero", "mean"]].to_numpy()
    low, high = float(both.min()), float(both.max())
    figure = go.Figure(
        [
            go.Scatter(
                x=[low, high],
                y=[low, high],
                mode="lines",
                name="equal",
                hoverinfo="skip",
                line=dict(color=theme.COLOR["baseline"], dash="dot"),
            ),
            go.Scatter(
                x=table["zero"],
                y=table["mean"],
                mode="markers",
                name="one head",
                marker=dict(color=theme.COLOR["attention"], size=7),
                text=[f"L{r.layer}H{r.head}" for r in table.itertuples()],
                hovertemplate="%{text}<br>zero %{x:+.4f}<br>mean %{y:+.4f}<extra></extra>",
            ),
        ]
    )
    figure.update_xaxes(title_text="loss change with the output zeroed (nats per token)")
    figure.update_yaxes(title_text="with the output at its mean (nats per token)")
    return _figure(
        figure,
        f"Two ways to remove a head of {model}",
        height=440,
        legend=dict(orientation="h", y=1.1, x=0),
    )


def pruning_curve(table, n_heads, model):
    """Loss against the number of removed heads, by order; the band of the random order spans its
    repeats."""
    figure = go.Figure()
    for order, color in ORDERS.items():
        groups = table[table["order"] == order].groupby("removed")["loss_change"]
        mean, low, high = groups.mean(), groups.min(), groups.max()
        if (high > low).any():
            figure.add_trace(
                go.Scatter(
                    x=[*mean.index, *mean.index[::-1]],
                    y=[*low, *high[::-1]],
                    fill="toself",
                    fillcolor=color,
                    opacity=0.3,
                    line=dict(width=0),
                    mode="lines",
                    hoverinfo="skip",
                    showlegend=False,
                )
            )
        figure.add_trace(
            go.Scatter(
                x=mean.index,
                y=mean,
                name=f"{order} first" if order != "random" else "random order",
                mode="lines+markers",
                line=dict(color=color),
                hovertemplate="%{x} heads removed<br>loss %{y:+.3f} nats per token<extra></extra>",
            )
        )
    figure.update_xaxes(title_text=f"heads removed, of the {n_heads} that were ablated")
    figure.update_yaxes(title_text="loss change (nats per token)")
    return _figure(
        figure,
        f"Removing heads of {model}: order found on one text, loss measured on another",
        height=430,
        legend=dict(orientation="h", y=1.1, x=0),
    )
