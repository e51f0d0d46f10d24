"""Figures of notebook 16: what quantization costs, where, and what it saves. Arrays and tables in,
Plotly out."""

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..views import theme
from ..views.page import Page
from ..views.text import html, plotly, text_of, whole_characters


def colors(names):
    """The same colour for the same file in every figure: by its place in the list of files."""
    return {name: theme.CATEGORIES[i % len(theme.CATEGORIES)] for i, name in enumerate(names)}


def decades(figure, **where):
    """theme.decades with a faint grid between the powers of ten."""
    minor = dict(showgrid=True, gridcolor="rgba(128,128,128,0.1)")
    return theme.decades(figure, **where).update_yaxes(minor=minor, **where)


def _figure(title, x, y, **layout):
    return go.Figure(layout=dict(**theme.titled(title), xaxis_title=x, yaxis_title=y, **layout))


def ladder(table, model):
    """Mean KL divergence against real bits per weight, with the 95% interval by window where there
    is one.

    table: a Comparison or DataFrame with bits_per_weight, kld_mean, kld_mean_low, kld_mean_high,
    indexed by file."""
    figure = _figure(
        f"Divergence from the reference by real bits per weight: {model}",
        "bits per weight",
        "mean KL divergence (nats, log scale)",
    )
    color, measured = colors(table.index), table.dropna(subset="kld_mean")
    for name, row in measured.iterrows():
        low, high = (
            row["kld_mean"] if np.isnan(row[f"kld_mean_{end}"]) else row[f"kld_mean_{end}"]
            for end in ("low", "high")
        )
        figure.add_scatter(
            x=[row["bits_per_weight"]],
            y=[max(row["kld_mean"], 1e-9)],
            name=plotly(name),
            mode="markers+text",
            text=[f"  {plotly(name)}"],
            textposition="middle right",  # beside the interval, not on it
            marker=dict(size=11, color=color[name]),
            showlegend=False,
            error_y=dict(
                array=[high - row["kld_mean"]], arrayminus=[row["kld_mean"] - low], type="data"
            ),
            hovertemplate=f"{plotly(name)}<br>%{{x:.3f}} bits per weight<br>KLD %{{y:.5g}} nats"
            f"<br>95% by window: {low:.5g} to {high:.5g}<extra></extra>",
        )
    bits = measured["bits_per_weight"]
    if len(bits):
        step = (bits.max() - bits.min() or 1) / 20
        figure.update_xaxes(
            range=[bits.min() - step, bits.max() + 3 * step]
        )  # room for the last name
    return decades(figure)


def percentiles(table, model):
    """Percentiles of the per-token KL divergence, one line per file."""
    steps = {
        "min": "min",
        "p05": "5",
        "p10": "10",
        "median": "50",
        "p90": "90",
        "p95": "95",
        "p99": "99",
        "p999": "99.9",
        "max": "max",
    }
    figure = _figure(
        f"KL divergence per token, by percentile: {model}",
        "percentile of the scored tokens",
        "KL divergence (nats, log scale)",
    )
    color = colors(table.index)
    for name, row in table.dropna(subset="kld_mean").iterrows():
        values = np.maximum(row[[f"kld_{key}" for key in steps]].to_numpy(float), 1e-7)
        figure.add_scatter(
            x=list(steps.values()),
            y=values,
            name=plotly(name),
            mode="lines+markers",
            line_color=color[name],
            hovertemplate="percentile %{x}<br>%{y:.4g} nats<extra>" + plotly(name) + "</extra>",
        )
    return decades(figure).update_xaxes(type="category")


def token_kinds(kinds, by, model):
    """Mean KLD by kind of token. kinds: vulnerable_tokens; by: "piece" or "reference's
    probability"."""
    part = kinds.xs(by, level="by").reset_index()
    axis = "kind of token" if by == "piece" else by
    figure = _figure(
        f"Mean KL divergence by {axis}: {model}",
        axis,
        "mean KL divergence (nats, log scale)",
        barmode="group",
    )
    color = colors(part["candidate"].unique())
    for name, rows in part.groupby("candidate", sort=False):
        figure.add_bar(
            x=theme.axis_values(rows["kind"]),
            y=rows["kld"],
            name=plotly(name),
            marker_color=color[name],
            customdata=rows[["n", "share_of_kld"]],
            hovertemplate="%{x}: %{y:.4g} nats<br>%{customdata[0]} tokens, %{customdata[1]:.0%} of the sum"
            "<extra>" + plotly(name) + "</extra>",
        )
    return decades(figure)


def pareto(table, fronts, costs, model):
    """Divergence against size, speed and memory, the Pareto front drawn through the files that no
    other beats.

    fronts: {column: boolean Series}; costs: {column: (axis title, factor from the column's unit)}.
    """
    figure = make_subplots(rows=1, cols=len(costs), shared_yaxes=True, horizontal_spacing=0.04)
    color = colors(table.index)
    for col, (column, (title, factor)) in enumerate(costs.items(), 1):
        front = table[fronts[column]].sort_values(column)
        figure.add_scatter(
            x=front[column] * factor,
            y=front["kld_mean"],
            mode="lines",
            row=1,
            col=col,
            hoverinfo="skip",
            line=dict(color=theme.COLOR["baseline"], dash="dot"),
            name="Pareto front",
            showlegend=col == 1,
        )
        for name, row in table.iterrows():
            figure.add_scatter(
                x=[row[column] * factor],
                y=[row["kld_mean"]],
                row=1,
                col=col,
                mode="markers",
                name=plotly(name),
                legendgroup=str(name),
                showlegend=col == 1,
                marker=dict(
                    size=12, color=color[name], symbol="circle" if fronts[column][name] else "x"
                ),
                hovertemplate=f"%{{x:.4g}} {title}<br>%{{y:.4g}} nats<extra>{plotly(name)}</extra>",
            )
        figure.update_xaxes(title=title, row=1, col=col)
    figure.update_layout(
        template=theme.TEMPLATE,
        title=plotly(f"Divergence against what it costs (x: beaten by another file): {model}"),
        legend=dict(orientation="h", y=-0.25),
    )
    return decades(figure).update_yaxes(title="mean KL divergence (nats, log scale)", col=1)


def answers(rows, model):
    """Generated answers beside the reference's, the first token that differs marked, as a Page.

    rows: [{"prompt", "answers": {name: (pieces, index of the first difference or None)}}], the
    reference first."""
    body = [
        f"<h1>Greedy answers of each quantization: {html(model)}</h1>"
        "<p class='note'>Marked: the first token that is not the reference's.</p>"
    ]
    for row in rows:
        body.append(f"<h2 class='mono'>{html(row['prompt'])}</h2><table>")
        for name, (pieces, first) in row["answers"].items():
            said = html(text_of(pieces)) if first is None else _marked(pieces, first)
            place = (
                ""
                if name == "reference"
                else "the same"
                if first is None
                else f"differs at token {first + 1}"
            )
            body.append(
                f"<tr><th>{html(name)}</th><td class='a'>{said}</td><td class='p'>{place}</td></tr>"
            )
        body.append("</table>")
    style = (
        "td.a{text-align:left;white-space:pre-wrap;width:100%} mark{background:var(--c1);color:#000} "
        "th{text-align:left} td.p{white-space:nowrap}"
    )
    return Page(
        f"Answers: {model}",
        "".join(body),
        "",
        {},
        style=style,
        height=min(1000, 110 + sum(60 + 34 * len(row["answers"]) for row in rows)),
    )


def _marked(pieces, first):
    """The text of pieces as HTML; marked: the characters that the token `first` is a part of."""
    parts, stop = [], 0
    for count, text in whole_characters(pieces):
        start, stop = stop, stop + count
        parts.append(
            f"<mark>{html(text) or '&#8203;'}</mark>" if start <= first < stop else html(text)
        )
    return "".join(parts)
