"""Figures of notebook 16: where inside the model quantization does its damage. Tables in, Plotly
figures out."""

import numpy as np
from plotly.subplots import make_subplots

from ..views import theme
from ..views.text import plotly
from .figures import _figure, colors, decades

PART_COLOR = {"attention": theme.COLOR["attention"], "FFN": theme.COLOR["ffn"]}


def _menu(figure, names):
    """A menu that shows one file's trace at a time; the figure has one trace per name."""
    for i, trace in enumerate(figure.data):
        trace.visible = i == 0
    buttons = [
        dict(
            label=plotly(name),
            method="update",
            args=[{"visible": [i == chosen for i in range(len(names))]}],
        )
        for chosen, name in enumerate(names)
    ]
    menu = dict(buttons=buttons, x=0, xanchor="left", y=1, yanchor="bottom", pad=dict(b=8))
    return figure.update_layout(updatemenus=[menu], margin_t=110)


def _log_colors(values, title):
    """Colour scale over decades, the same for all of values: z is log10. Returns heatmap arguments
    and a function."""
    positive = np.concatenate([np.asarray(v, float).ravel() for v in values])
    positive = positive[positive > 0]
    # A few heads look at one token only and hardly move: without cutting at 2% they would take half
    # of the scale.
    low, high = np.log10(np.quantile(positive, [0.02, 1])) if len(positive) else (-1, 0)
    ticks = np.arange(np.floor(low), np.ceil(high) + 1)
    bar = dict(
        title=dict(text=title, side="right"),
        tickvals=ticks,
        ticktext=[f"{10.0**t:g}" for t in ticks],
    )
    return dict(zmin=low, zmax=high, colorscale=theme.MAGNITUDE, colorbar=bar), lambda v: np.log10(
        np.maximum(v, 10**low)
    )


def weight_errors(errors, model):
    """Relative RMS error of every matrix, layer by group, colour in decades; a menu chooses the
    file.

    errors: {name: weight_errors table}.
    """
    figure = _figure(f"Relative weight error by layer and matrix: {model}", "layer", "matrix")
    arguments, log = _log_colors(
        [table["error"] for table in errors.values()], "||W' - W|| / ||W||"
    )
    for table in errors.values():
        inside = table.dropna(subset="layer")
        grid = inside.pivot_table(index="group", columns="layer", values="error", sort=False)
        kinds = inside.pivot_table(
            index="group", columns="layer", values="type", aggfunc="first", sort=False
        )
        figure.add_heatmap(
            z=log(grid.to_numpy(float)),
            x=[int(c) for c in grid.columns],
            y=list(grid.index),
            text=kinds.to_numpy(),
            customdata=grid.to_numpy(float),
            **arguments,
            hovertemplate="layer %{x}, %{y}: %{text}<br>relative error %{customdata:.4f}<extra></extra>",
        )
    return _menu(figure, list(errors))


def attention_precision(maps, model):
    """Jensen-Shannon divergence of attention by layer and head, colour in decades; a menu chooses
    the file.

    maps: {name: DataArray (layer, head)}.
    """
    figure = _figure(f"How far each head's attention moved: {model}", "head", "layer", height=640)
    arguments, log = _log_colors(
        [m.values for m in maps.values()], "Jensen-Shannon divergence (bits)"
    )
    for m in maps.values():
        figure.add_heatmap(
            z=log(m.values),
            x=list(range(m.shape[1])),
            y=m["layer"].values,
            customdata=m.values,
            hovertemplate="layer %{y}, head %{x}: %{customdata:.5f} bits<extra></extra>",
            **arguments,
        )
    figure.update_yaxes(autorange="reversed", **theme.whole(m["layer"].values))
    figure.update_xaxes(dtick=1 if m.shape[1] <= 32 else 4)
    return _menu(figure, list(maps))


def drift(tables, model):
    """Relative error and 1 - cosine of the residual stream by layer, one line per file; the first
    token dotted."""
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    color = colors(tables)
    for name, table in tables.items():
        for which, dash in (("", "solid"), ("_first", "dot")):
            label = plotly(f"{name}, first token" if which else name)
            for row, y in (
                (1, table["error" + which]),
                (2, np.maximum(1 - table["cosine" + which], 1e-9)),
            ):
                figure.add_scatter(
                    row=row,
                    col=1,
                    x=table.index,
                    y=y,
                    name=label,
                    legendgroup=label,
                    mode="lines",
                    showlegend=row == 1,
                    line=dict(color=color[name], dash=dash),
                    hovertemplate="%{x} layers passed: %{y:.4g}<extra>" + label + "</extra>",
                )
    figure.update_layout(
        template=theme.TEMPLATE, height=640, title=plotly(f"Drift of the residual stream: {model}")
    )
    figure.update_yaxes(title="||h' - h|| / ||h||", row=1).update_yaxes(title="1 - cosine", row=2)
    figure.update_xaxes(**theme.whole(table.index)).update_xaxes(
        title="layers passed (0: the embedding)", row=2
    )
    return decades(decades(figure, row=1, col=1), row=2, col=1)


def embeddings(tables, model):
    """Cosine of each token embedding with its quantized self, and how many of its ten neighbours
    stay, per file."""
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.13)
    color = colors(tables)
    for name, table in tables.items():
        figure.add_box(
            y=table["cosine"],
            name=plotly(name),
            marker_color=color[name],
            boxpoints=False,
            row=1,
            col=1,
            showlegend=False,
        )
        kept = (
            (10 * table["overlap"].dropna())
            .round()
            .astype(int)
            .value_counts(normalize=True)
            .reindex(range(11), fill_value=0)
        )
        figure.add_bar(
            x=kept.index,
            y=kept.to_numpy(),
            name=plotly(name),
            marker_color=color[name],
            row=1,
            col=2,
            hovertemplate="%{x} kept: %{y:.1%} of the tokens<extra>" + plotly(name) + "</extra>",
        )
    figure.update_layout(
        template=theme.TEMPLATE,
        title=plotly(f"Token embeddings after quantization: {model}"),
        barmode="group",
    )
    figure.update_yaxes(title="cosine with itself", col=1).update_yaxes(
        title="share of the tokens", col=2
    )
    return figure.update_xaxes(title="of 10 neighbours kept", dtick=1, col=2)


def together(table, model):
    """Per layer: weight error against the drift that the layer adds; size and colour: its cost.

    table: layer_table. The eight layers that cost most carry their number.
    """
    figure = _figure(
        f"Weight error, drift and cost by layer: {model}",
        "relative weight error of the layer",
        "drift added by the layer (relative error)",
    )
    cost = table["cost"].to_numpy(float)
    top = float(cost.max()) or 1.0
    named = np.where(cost >= np.sort(cost)[-min(8, len(cost))], table.index.astype(str), "")
    figure.add_scatter(
        x=table["weight_error"],
        y=table["drift_added"],
        mode="markers+text",
        text=named,
        textposition="top center",
        customdata=np.stack([cost, table.index], axis=1),
        marker=dict(
            size=8 + 22 * cost / top,
            color=cost,
            colorscale=theme.MAGNITUDE,
            cmin=0,
            cmax=top,
            line=dict(width=1, color="#808080"),
            colorbar=dict(title=dict(text="cost when quantized alone (nats)", side="right")),
        ),
        hovertemplate="layer %{customdata[1]}<br>weight error %{x:.4f}<br>drift added %{y:.4f}"
        "<br>cost %{customdata[0]:.5f} nats<extra></extra>",
    )
    return figure


def part_map(table, column, model, title, axis):
    """One number of every layer's attention and FFN as bars. table: cost_map or fall_map; column:
    "cost" or "fall"."""
    figure = _figure(f"{title}: {model}", "layer", axis, barmode="group")
    for part, name in (("attn_out", "attention"), ("ffn_out", "FFN")):
        rows = table[table["part"] == part]
        figure.add_bar(
            x=rows["layer"],
            y=rows[column],
            name=name,
            marker_color=PART_COLOR[name],
            hovertemplate="layer %{x}: %{y:.5f} nats<extra>" + name + "</extra>",
        )
    return figure.update_xaxes(dtick=2)
