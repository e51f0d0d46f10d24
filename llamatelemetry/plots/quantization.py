"""Figures of notebook 16: what quantization costs, where, and what it saves. Arrays and tables in, Plotly out."""

import html

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from . import theme
from .page import Page

PART_COLOR = {"attention": theme.COLOR["attention"], "FFN": theme.COLOR["ffn"]}


def colors(names):
    """The same colour for the same file in every figure: by its place in the list of files."""
    return {name: theme.CATEGORIES[i % len(theme.CATEGORIES)] for i, name in enumerate(names)}


def _figure(title, x, y, **layout):
    return go.Figure(layout=dict(template=theme.TEMPLATE, title=title, xaxis_title=x, yaxis_title=y, **layout))


def ladder(table, model):
    """Mean KL divergence against real bits per weight, with the 95 % interval by window where there is one.

    table: a Comparison or DataFrame with bits_per_weight, kld_mean, kld_mean_low, kld_mean_high, indexed by file.
    """
    figure = _figure(f"Divergence from the reference by real bits per weight: {model}", "bits per weight",
                     "mean KL divergence (nats, log scale)")
    color = colors(table.index)
    for name, row in table.dropna(subset="kld_mean").iterrows():
        low, high = (row["kld_mean"] if np.isnan(row[f"kld_mean_{end}"]) else row[f"kld_mean_{end}"] for end in ("low", "high"))
        figure.add_scatter(
            x=[row["bits_per_weight"]], y=[max(row["kld_mean"], 1e-9)], name=name, mode="markers+text", text=[name],
            textposition="top center", marker=dict(size=11, color=color[name]), showlegend=False,
            error_y=dict(array=[high - row["kld_mean"]], arrayminus=[row["kld_mean"] - low], type="data"),
            hovertemplate=f"{html.escape(str(name))}<br>%{{x:.3f}} bits per weight<br>KLD %{{y:.5g}} nats"
                          f"<br>95 % by window: {low:.5g} to {high:.5g}<extra></extra>")
    figure.update_yaxes(type="log")
    return figure


def percentiles(table, model):
    """Percentiles of the per-token KL divergence, one line per file."""
    steps = {"min": "min", "p05": "5", "p10": "10", "median": "50", "p90": "90", "p95": "95", "p99": "99",
             "p999": "99.9", "max": "max"}
    figure = _figure(f"KL divergence per token, by percentile: {model}", "percentile of the scored tokens",
                     "KL divergence (nats, log scale)")
    color = colors(table.index)
    for name, row in table.dropna(subset="kld_mean").iterrows():
        values = np.maximum(row[[f"kld_{key}" for key in steps]].to_numpy(float), 1e-7)
        figure.add_scatter(x=list(steps.values()), y=values, name=name, mode="lines+markers", line_color=color[name],
                           hovertemplate="percentile %{x}<br>%{y:.4g} nats<extra>" + html.escape(str(name)) + "</extra>")
    figure.update_yaxes(type="log", exponentformat="power").update_xaxes(type="category")
    return figure


def token_kinds(kinds, by, model):
    """Mean KLD by kind of token, grouped by file. kinds: vulnerable_tokens; by: "piece" or "reference's probability"."""
    part = kinds.xs(by, level="by").reset_index()
    figure = _figure(f"Mean KL divergence by {by} of the next token: {model}", by, "mean KL divergence (nats, log scale)",
                     barmode="group")
    color = colors(part["candidate"].unique())
    for name, rows in part.groupby("candidate", sort=False):
        figure.add_bar(x=rows["kind"], y=rows["kld"], name=name, marker_color=color[name],
                       customdata=rows[["n", "share_of_kld"]],
                       hovertemplate="%{x}: %{y:.4g} nats<br>%{customdata[0]} tokens, %{customdata[1]:.0%} of the sum"
                                     "<extra>" + html.escape(str(name)) + "</extra>")
    figure.update_yaxes(type="log")
    return figure


def _choices(figure, names, per_name=1):
    """A menu that shows one file's traces at a time."""
    n = len(names)
    buttons = [dict(label=name, method="update",
                    args=[{"visible": [i // per_name == chosen for i in range(n * per_name)]}])
               for chosen, name in enumerate(names)]
    figure.update_layout(updatemenus=[dict(buttons=buttons, x=1, xanchor="right", y=1.16, yanchor="top")])
    for i, trace in enumerate(figure.data):
        trace.visible = i // per_name == 0
    return figure


def weight_errors(errors, model):
    """Relative RMS error of every matrix, layer by group; a menu chooses the file. errors: {name: weight_errors table}."""
    names = list(errors)
    top = max(float(table["error"].max()) for table in errors.values())
    figure = _figure(f"Relative weight error by layer and matrix: {model}", "layer", "matrix")
    for table in errors.values():
        inside = table.dropna(subset="layer")
        grid = inside.pivot_table(index="group", columns="layer", values="error", sort=False)
        kinds = inside.pivot_table(index="group", columns="layer", values="type", aggfunc="first", sort=False)
        figure.add_heatmap(z=grid.to_numpy(float), x=[int(c) for c in grid.columns], y=list(grid.index), zmin=0, zmax=top,
                           text=kinds.to_numpy(), colorscale=theme.MAGNITUDE,
                           colorbar=dict(title=dict(text="||W' - W|| / ||W||", side="right")),
                           hovertemplate="layer %{x}, %{y}: %{text}<br>relative error %{z:.4f}<extra></extra>")
    return _choices(figure, names)


def attention_precision(maps, model):
    """Jensen-Shannon divergence of attention by layer and head; a menu chooses the file. maps: {name: (layer, head)}."""
    top = max(float(m.max()) for m in maps.values()) or 1.0
    figure = _figure(f"How far each head's attention moved: {model}", "head", "layer", height=640)
    for m in maps.values():
        figure.add_heatmap(z=m.values, x=list(range(m.shape[1])), y=m["layer"].values, zmin=0, zmax=top,
                           colorscale=theme.MAGNITUDE, colorbar=dict(title=dict(text="Jensen-Shannon (bits)", side="right")),
                           hovertemplate="layer %{y}, head %{x}: %{z:.5f} bits<extra></extra>")
    figure.update_yaxes(autorange="reversed").update_xaxes(dtick=1)
    return _choices(figure, list(maps))


def drift(tables, model):
    """Relative error and cosine of the residual stream by layer, one line per file; the first token dotted."""
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    color = colors(tables)
    for name, table in tables.items():
        for row, column in ((1, "error"), (2, "cosine")):
            for which, dash in (("", "solid"), ("_first", "dot")):
                label = name if not which else f"{name}, first token"
                figure.add_scatter(row=row, col=1, x=table.index, y=table[column + which], name=label, legendgroup=label,
                                   showlegend=row == 1, line=dict(color=color[name], dash=dash), mode="lines",
                                   hovertemplate="after layer %{x}: %{y:.5f}<extra>" + html.escape(label) + "</extra>")
    figure.update_layout(template=theme.TEMPLATE, height=640, title=f"Drift of the residual stream: {model}")
    figure.update_yaxes(title="||h' - h|| / ||h||", type="log", row=1).update_yaxes(title="cosine", row=2)
    figure.update_xaxes(title="layers passed (0: the embedding)", row=2)
    return figure


def embeddings(tables, model):
    """Cosine of each token embedding with its quantized self, and overlap of ten nearest neighbours, per file."""
    figure = make_subplots(rows=1, cols=2, subplot_titles=("cosine with itself", "share of 10 neighbours kept"))
    color = colors(tables)
    for name, table in tables.items():
        for col, column in ((1, "cosine"), (2, "overlap")):
            figure.add_box(y=table[column].dropna(), name=name, marker_color=color[name], boxpoints=False, row=1, col=col,
                           showlegend=False)
    figure.update_layout(template=theme.TEMPLATE, title=f"Token embeddings after quantization: {model}")
    return figure.update_yaxes(title="cosine", col=1).update_yaxes(title="share", col=2, range=[0, 1.02])


def together(table, model):
    """Per layer: weight error against the drift that the layer adds; size and colour: its cost. table: layer_table."""
    figure = _figure(f"Weight error, drift and cost by layer: {model}", "relative weight error of the layer",
                     "drift added by the layer (relative error)")
    cost = table["cost"].to_numpy(float)
    top = float(cost.max()) or 1.0
    figure.add_scatter(x=table["weight_error"], y=table["drift_added"], mode="markers+text", text=table.index,
                       textposition="top center", customdata=cost,
                       marker=dict(size=8 + 22 * cost / top, color=cost, colorscale=theme.MAGNITUDE, cmin=0, cmax=top,
                                   line=dict(width=1, color="#808080"),
                                   colorbar=dict(title=dict(text="cost when quantized alone (nats)", side="right"))),
                       hovertemplate="layer %{text}<br>weight error %{x:.4f}<br>drift added %{y:.4f}"
                                     "<br>cost %{customdata:.5f} nats<extra></extra>")
    return figure


def part_map(table, column, model, title, axis):
    """One number of every layer's attention and FFN as bars. table: cost_map or fall_map; column: "cost" or "fall"."""
    figure = _figure(f"{title}: {model}", "layer", axis, barmode="group")
    for part, name in (("attn_out", "attention"), ("ffn_out", "FFN")):
        rows = table[table["part"] == part]
        figure.add_bar(x=rows["layer"], y=rows[column], name=name, marker_color=PART_COLOR[name],
                       hovertemplate="layer %{x}: %{y:.5f} nats<extra>" + name + "</extra>")
    return figure.update_xaxes(dtick=2)


def pareto(table, fronts, costs, model):
    """Divergence against size, speed and memory, the Pareto front drawn through the files that no other beats.

    fronts: {column: boolean Series}; costs: {column: (axis title, factor from the column's unit)}.
    """
    figure = make_subplots(rows=1, cols=len(costs), shared_yaxes=True, horizontal_spacing=0.04)
    color = colors(table.index)
    for col, (column, (title, factor)) in enumerate(costs.items(), 1):
        front = table[fronts[column]].sort_values(column)
        figure.add_scatter(x=front[column] * factor, y=front["kld_mean"], mode="lines", row=1, col=col, hoverinfo="skip",
                           line=dict(color=theme.COLOR["baseline"], dash="dot"), name="Pareto front", showlegend=col == 1)
        for name, row in table.iterrows():
            figure.add_scatter(x=[row[column] * factor], y=[row["kld_mean"]], row=1, col=col, mode="markers", name=name,
                               legendgroup=name, showlegend=col == 1, marker=dict(
                                   size=12, color=color[name], symbol="circle" if fronts[column][name] else "x"),
                               hovertemplate=f"%{{x:.4g}} {title}<br>%{{y:.4g}} nats<extra>{html.escape(str(name))}</extra>")
        figure.update_xaxes(title=title, row=1, col=col)
    figure.update_layout(template=theme.TEMPLATE, title=f"Divergence against what it costs (x: beaten by another file): {model}",
                         legend=dict(orientation="h", y=-0.25))
    return figure.update_yaxes(title="mean KL divergence (nats, log scale)", type="log", col=1).update_yaxes(type="log")


def answers(rows, model):
    """Generated answers beside the reference's, the first token that differs marked, as a Page.

    rows: [{"prompt", "answers": {name: (pieces, index of the first difference or None)}}], the reference first.
    """
    body = [f"<h1>Greedy answers of each quantization: {html.escape(model)}</h1>"
            "<p class='note'>Marked: the first token that is not the reference's.</p>"]
    for row in rows:
        body.append(f"<h2 class='mono'>{html.escape(row['prompt'])}</h2><table>")
        for name, (pieces, first) in row["answers"].items():
            said = [html.escape(piece if isinstance(piece, str) else theme.token_text(piece)) for piece in pieces]
            if first is not None:
                said[first] = f"<mark>{said[first] or '&#8203;'}</mark>"
            place = "same as the reference" if first is None else f"differs at token {first + 1}"
            body.append(f"<tr><th>{html.escape(name)}</th><td class='a'>{''.join(said)}</td><td>{place}</td></tr>")
        body.append("</table>")
    style = "td.a{text-align:left;white-space:pre-wrap;width:100%} mark{background:var(--c1);color:#000} th{text-align:left}"
    return Page(f"Answers: {model}", "".join(body), "", {}, style=style, height=min(900, 140 + 210 * len(rows)))
