"""Figures of notebook 16: what quantization costs, where in the model, and what it saves.

Arrays and tables in, Plotly figures out. Tables come by the file's name; title: plain text."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from ..views import theme
from ..views.text import plotly

Tables = Mapping[str, pd.DataFrame]
KLD = "mean KL divergence (nats, log scale)"
FLOOR = "noise floor"
PARTS = {
    "attn_out": ("attention", theme.COLOR["attention"]),
    "ffn_out": ("FFN", theme.COLOR["ffn"]),
}
# What a file may cost: column -> axis title, and factor from the column's unit.
COSTS = {
    "size_bytes": ("size (MB)", 1e-6),
    "seconds_per_token": ("generation (ms per token)", 1e3),
    "memory_bytes": ("memory (MB)", 1e-6),
}


def colors(names) -> dict[str, str]:
    """The same colour for the same file in every figure: by its place in the list of files."""
    return {name: theme.CATEGORIES[i % len(theme.CATEGORIES)] for i, name in enumerate(names)}


def decades(figure: go.Figure, **where) -> go.Figure:
    """theme.decades with a faint grid between the powers of ten."""
    minor = dict(showgrid=True, gridcolor="rgba(128,128,128,0.1)")
    return theme.decades(figure, **where).update_yaxes(minor=minor, **where)


def axes(title, x, y, **layout) -> go.Figure:
    """An empty figure with its titles."""
    return go.Figure(layout=dict(**theme.titled(title), xaxis_title=x, yaxis_title=y, **layout))


def draw_floor(figure: go.Figure, floor: float | None, ends, **where) -> go.Figure:
    """The noise floor as a dotted line between two places of the x axis; None draws nothing."""
    if floor is None:
        return figure
    line = dict(color=theme.COLOR["baseline"], dash="dash", width=1)
    text = (
        f"noise: the reference from itself, computed another way<br>{floor:.3g} nats<extra></extra>"
    )
    first = not any(trace.name == FLOOR for trace in figure.data)
    look = dict(mode="lines", line=line, name=FLOOR, showlegend=first, legendgroup=FLOOR)
    return figure.add_scatter(x=list(ends), y=[floor] * 2, hovertemplate=text, **look, **where)


def weight_errors(errors: Tables, shown: str, *, title: str) -> go.Figure:
    """Relative RMS error of every matrix, layer by group, colour in decades; a menu chooses the
    file, `shown` at first. errors: weight_errors tables."""
    if all(table.dropna(subset=["layer", "error"]).empty for table in errors.values()):
        return theme.nothing(title, "no matrix of a layer was compared")
    scale = _Decades([table["error"] for table in errors.values()], "||W' - W|| / ||W||")
    figure = axes(title, "layer", "matrix")
    for table in errors.values():
        inside = table.dropna(subset="layer")
        place = dict(index="group", columns="layer", sort=False)
        grid = inside.pivot_table(values="error", **place)
        kinds = inside.pivot_table(values="type", aggfunc="first", **place)
        text = "layer %{x}, %{y}: %{text}<br>relative error %{customdata:.4f}<extra></extra>"
        scale.draw(figure, grid, text=kinds.to_numpy(), hovertemplate=text)
    return _menu(figure, list(errors), shown)


def attention(maps: Mapping[str, xr.DataArray], shown: str, *, title: str) -> go.Figure:
    """Jensen-Shannon divergence of attention, layer across and head down, colour in decades; a menu
    chooses the file, `shown` at first. maps: attention_divergence, (layer, head)."""
    if not any(bits.notnull().any() for bits in maps.values()):
        return theme.nothing(title, "no head was compared")
    scale = _Decades([bits.values for bits in maps.values()], "JS divergence (bits)")
    n_head = max(bits.sizes["head"] for bits in maps.values())
    figure = axes(title, "layer", "head", height=max(360, 190 + 18 * n_head))
    for bits in maps.values():
        text = "layer %{x}, head %{y}: %{customdata:.5f} bits<extra></extra>"
        scale.draw(figure, bits.transpose("head", "layer").to_pandas(), hovertemplate=text)
    figure.update_xaxes(**theme.whole(bits["layer"].values.tolist()))
    figure.update_yaxes(autorange="reversed", dtick=max(1, n_head // 16))
    return _menu(figure, list(maps), shown)


class _Decades:
    """One colour scale over decades for all of the values: what is drawn is log10."""

    def __init__(self, values, title):
        positive = np.concatenate([np.asarray(v, float).ravel() for v in values])
        positive = positive[positive > 0]
        # A few heads look at one token only and hardly move: without cutting at 2% they would take
        # half of the scale.
        ends = np.log10(np.quantile(positive, [0.02, 1])) if len(positive) else (-1, 0)
        ticks = np.arange(np.floor(ends[0]), np.ceil(ends[1]) + 1)
        self.low, self.look = ends[0], dict(zmin=ends[0], zmax=ends[1], colorscale=theme.MAGNITUDE)
        self.look["colorbar"] = dict(
            title=dict(text=title, side="right"),
            tickvals=ticks,
            ticktext=[f"{10.0**tick:g}" for tick in ticks],
        )

    def draw(self, figure, grid, **more):
        """Add a table (y, x) of values to the figure, the values themselves as customdata."""
        values = grid.to_numpy(float)
        z = np.log10(np.maximum(values, 10**self.low))
        x, y = [int(column) for column in grid.columns], list(grid.index)
        figure.add_heatmap(z=z, x=x, y=y, customdata=values, **self.look, **more)


def _menu(figure, names, shown):
    """A menu that shows one file's trace at a time; the figure has one trace per name."""
    buttons = []
    for name, trace in zip(names, figure.data):
        trace.visible = name == shown
        visible = {"visible": [name == other for other in names]}
        buttons.append(dict(label=plotly(name), method="update", args=[visible]))
    menu = dict(buttons=buttons, x=0, xanchor="left", y=1, yanchor="bottom", pad=dict(b=8))
    menu["active"] = names.index(shown)
    above = dict(y=1, yanchor="top", pad_t=14)  # over the menu, also in two lines
    return figure.update_layout(updatemenus=[menu], margin_t=110, title=above)


def drift(tables: Tables, *, title: str) -> go.Figure:
    """Relative error and 1 - cosine of the residual stream by layer, one line per file; the first
    token dotted. tables: hidden_drift."""
    if not tables:
        return theme.nothing(title, "no file was measured")
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    color = colors(tables)
    for name, table in tables.items():
        for which, dash in (("", "solid"), ("_first", "dot")):
            label = plotly(f"{name}, first token" if which else name)
            lines = table["error" + which], np.maximum(1 - table["cosine" + which], 1e-9)
            for row, y in enumerate(lines, 1):
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
                    hovertemplate=f"%{{x}} layers passed: %{{y:.4g}}<extra>{label}</extra>",
                )
    figure.update_layout(**theme.titled(title), height=640)
    figure.update_yaxes(title="||h' - h|| / ||h||", row=1).update_yaxes(title="1 - cosine", row=2)
    figure.update_xaxes(**theme.whole(table.index))
    figure.update_xaxes(title="layers passed (0: the embedding)", row=2)
    return decades(decades(figure, row=1, col=1), row=2, col=1)


def embeddings(tables: Tables, *, title: str) -> go.Figure:
    """Cosine of each token embedding with its quantized self, and how many of its ten neighbours
    stay, per file. tables: embedding_preservation."""
    if not tables:
        return theme.nothing(title, "no file was measured")
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.13)
    color = colors(tables)
    for name, table in tables.items():
        look = dict(name=plotly(name), marker_color=color[name], row=1)
        figure.add_box(y=table["cosine"], boxpoints=False, col=1, showlegend=False, **look)
        kept = (10 * table["overlap"].dropna()).round().astype(int)
        share = kept.value_counts(normalize=True).reindex(range(11), fill_value=0)
        text = f"%{{x}} kept: %{{y:.1%}} of the tokens<extra>{plotly(name)}</extra>"
        figure.add_bar(x=share.index, y=share.to_numpy(), col=2, hovertemplate=text, **look)
    figure.update_layout(**theme.titled(title), barmode="group")
    figure.update_yaxes(title="cosine with itself", col=1)
    figure.update_yaxes(title="share of the tokens", col=2)
    return figure.update_xaxes(title="of 10 neighbours kept", dtick=1, col=2)


def costs(table: pd.DataFrame, *, title: str) -> go.Figure:
    """What every layer's attention and FFN cost when quantized alone, as bars. table: cost_map."""
    return _parts(table, "cost", title, "mean KLD from the reference (nats)")


def falls(table: pd.DataFrame, *, title: str) -> go.Figure:
    """What giving back every layer's attention and FFN removes, as bars. table: fall_map."""
    axis = f"fall of the mean KLD (nats, of {table.attrs['kld']:.4g})"
    return _parts(table, "fall", title, axis)


def _parts(table, column, title, axis):
    if table.empty:
        return theme.nothing(title, "no part was measured")
    figure = axes(title, "layer", axis, barmode="group")
    for part, (name, color) in PARTS.items():
        rows = table[table["part"] == part]
        text = f"layer %{{x}}: %{{y:.5f}} nats<extra>{name}</extra>"
        bars = dict(name=name, marker_color=color, hovertemplate=text)
        figure.add_bar(x=rows["layer"], y=rows[column], **bars)
    return figure.update_xaxes(dtick=2)


def together(table: pd.DataFrame, *, title: str) -> go.Figure:
    """Per layer: weight error against the drift that the layer adds; size and colour: its cost.

    table: layer_table. The eight layers that cost most carry their number.
    """
    x, y = "relative weight error of the layer", "drift added by the layer (relative error)"
    if table.empty:
        return theme.nothing(title, "no layer was measured")
    figure = axes(title, x, y)
    cost = table["cost"].to_numpy(float)
    top = float(cost.max()) or 1.0
    bar = dict(title=dict(text="cost when quantized alone (nats)", side="right"))
    figure.add_scatter(
        x=table["weight_error"],
        y=table["drift_added"],
        mode="markers+text",
        text=np.where(cost >= np.sort(cost)[-min(8, len(cost))], table.index.astype(str), ""),
        textposition="top center",
        customdata=np.stack([cost, table.index], axis=1),
        marker=dict(
            size=8 + 22 * cost / top,
            color=cost,
            colorscale=theme.MAGNITUDE,
            cmin=0,
            cmax=top,
            line=dict(width=1, color="#808080"),
            colorbar=bar,
        ),
        hovertemplate="layer %{customdata[1]}<br>weight error %{x:.4f}<br>drift added %{y:.4f}"
        "<br>cost %{customdata[0]:.5f} nats<extra></extra>",
    )
    return figure


def pareto(
    table: pd.DataFrame,
    fronts: Mapping[str, pd.Series],
    *,
    floor: float | None = None,
    title: str,
) -> go.Figure:
    """Divergence against size, speed and memory, the Pareto front drawn through the files that no
    other beats.

    table: with_costs; fronts: {column of COSTS: boolean Series}; floor: Comparison.floor.
    """
    if table["kld_mean"].isna().all() or not fronts:
        return theme.nothing(title, "no file was measured")
    figure = make_subplots(rows=1, cols=len(fronts), shared_yaxes=True, horizontal_spacing=0.04)
    color = colors(table.index)
    for col, (column, front) in enumerate(fronts.items(), 1):
        (axis, factor), line = COSTS[column], table[front].sort_values(column)
        figure.add_scatter(
            x=line[column] * factor,
            y=line["kld_mean"],
            mode="lines",
            row=1,
            col=col,
            hoverinfo="skip",
            line=dict(color=theme.COLOR["baseline"], dash="dot"),
            name="Pareto front",
            showlegend=col == 1,
        )
        for name, row in table.iterrows():
            symbol = "circle" if front[name] else "x"
            figure.add_scatter(
                x=[row[column] * factor],
                y=[row["kld_mean"]],
                row=1,
                col=col,
                mode="markers",
                name=plotly(name),
                legendgroup=str(name),
                showlegend=col == 1,
                marker=dict(size=12, color=color[name], symbol=symbol),
                hovertemplate=f"%{{x:.4g}} {axis}<br>%{{y:.4g}} nats<extra>{plotly(name)}</extra>",
            )
        ends = table[column].min() * factor, table[column].max() * factor
        draw_floor(figure, floor, ends, row=1, col=col).update_xaxes(title=axis, row=1, col=col)
    figure.update_layout(**theme.titled(title), legend=dict(orientation="h", y=-0.25))
    return decades(figure).update_yaxes(title=KLD, col=1)
