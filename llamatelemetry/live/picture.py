"""An answer as one still picture, HTML and SVG without a script: it is there in a saved notebook,
too."""

from html import escape

import numpy as np
from plotly.colors import sample_colorscale

from ..views import theme
from ..views.text import shorten, token_text
from .question import Answer

CELLS, LABEL = (14, 28), 88  # pixels: a square of the map, least and most; room for tokens' texts
SIDE = 320  # pixels: the map of a short prompt
_SHADES = 64
_RAMP = sample_colorscale(theme.MAGNITUDE, np.linspace(0, 1, _SHADES))
BEFORE, AFTER = theme.COLOR["baseline"], theme.COLOR["attention"]
_TEXT = "font: 12px system-ui, 'DejaVu Sans', sans-serif; color: #808080"


def picture(answer: Answer, model: str) -> str:
    """The map of the chosen head beside the next tokens, what was asked in words above. Readable on
    white and on black."""
    question = answer.question
    edits = "; ".join(question.said()) or "no edits"
    took = f"{1000 * answer.before_s:.0f} ms" + (
        "" if answer.after_s is None else f", with edits {1000 * answer.after_s:.0f} ms"
    )
    changed = "" if answer.after_s is None else f" KL to the run without: {answer.kl:.3g} nats."
    return f"""<div class="llt-live mathjax_ignore tex2jax_ignore" style="{_TEXT}; max-width: 900px">
<div style="font-size: 15px">Layer {question.layer}, head {question.head}, {escape(model)}</div>
<div>{escape(_short(question.prompt))}</div>
<div><b>{escape(edits)}</b>. llama.cpp took {took} for {len(answer.pieces)} tokens.{changed}</div>
<div style="display: flex; flex-wrap: wrap; gap: 16px; align-items: flex-start">
{_map(answer)}{_bars(answer)}</div></div>"""


def trouble(message: str) -> str:
    """What could not be done, in the picture's place."""
    return f'<div class="llt-live" style="{_TEXT}; max-width: 900px">{escape(message)}</div>'


def _short(prompt):
    return prompt if len(prompt) <= 240 else f"... {prompt[-236:]}"


def _map(answer):
    """SVG of the weights, a square a pair, its exact value on hover; cut edges are crossed."""
    n = len(answer.weights)
    first = len(answer.pieces) - n
    weights = answer.weights[:, first:]
    most = float(np.nan_to_num(weights).max())
    top, bright = most or 1.0, f"brightest {most:.3f}" if most else "no weight"
    names = [escape(shorten(token_text(piece), 10)) for piece in answer.pieces[first:]]
    cell = min(max(SIDE // n, CELLS[0]), CELLS[1])
    size, parts = LABEL + n * cell, []
    for row in range(n):
        y, name = LABEL + row * cell, f"{first + row} {names[row]}"
        middle = y + cell / 2 + 4
        parts.append(f'<text x="{LABEL - 4}" y="{middle:.0f}" text-anchor="end">{name}</text>')
        turned = f"translate({middle:.0f},{LABEL - 4}) rotate(-90)"
        parts.append(f'<text transform="{turned}">{name}</text>')
        for column in range(row + 1):
            value = float(weights[row, column])
            shade = (
                _RAMP[round(value / top * (_SHADES - 1))] if np.isfinite(value) else theme.MISSING
            )
            parts.append(
                f'<rect x="{LABEL + column * cell}" y="{y}" width="{cell}" height="{cell}" fill="{shade}">'
                f"<title>{first + row} {names[row]} to {first + column} {names[column]}: {value:.5f}</title></rect>"
            )
    parts += _crosses(answer, first, cell)
    more = f"the last {n} of {len(answer.pieces)} tokens; " if first else ""
    return (
        f'<svg width="{max(size, 360)}" height="{size + 18}" style="fill: #808080; font-size: 11px" role="img" '
        f'aria-label="attention map">{"".join(parts)}<text x="{LABEL}" y="{size + 13}">{more}rows: query, '
        f"columns: key; {bright}</text></svg>"
    )


def _crosses(answer, first, cell):
    question = answer.question
    for layer, head, query, key in question.cut:
        if (layer, head) == (question.layer, question.head) and min(query, key) >= first:
            x, y = (LABEL + (at - first) * cell for at in (key, query))
            ends = f"M{x + 3},{y + 3}l{cell - 6},{cell - 6}m0,{6 - cell}l{6 - cell},{cell - 6}"
            yield f'<path d="{ends}" stroke="#D55E00" stroke-width="2" fill="none"/>'


def _bars(answer):
    """Probabilities of the next token: grey before the edits, blue with them."""
    top = max(max(row["before"], row["after"]) for row in answer.table) or 1.0
    runs = (
        [("before", BEFORE), ("after", AFTER)]
        if answer.after_s is not None
        else [("before", AFTER)]
    )
    cells = []
    for row in answer.table:
        name = escape(shorten(token_text(row["piece"]), 18))
        bars = "".join(_bar(row[run], 150 * row[run] / top, run, color) for run, color in runs)
        cells.append(f'<div style="text-align: right">{name}</div><div>{bars}</div>')
    key = "grey: without edits, blue: with them" if len(runs) == 2 else "probability"
    return (
        f'<div class="llt-next" style="display: grid; grid-template-columns: auto 220px; gap: 3px 8px; '
        f'align-items: center"><div style="grid-column: span 2">Next token ({key})</div>{"".join(cells)}</div>'
    )


def _bar(value, width, run, color):
    bar = f'<div style="height: 8px; background: {color}; width: {width:.1f}px"></div>'
    return (
        f'<div style="display: flex; align-items: center; gap: 6px">{bar}'
        f'<span class="llt-{run}">{value:.2%}</span></div>'
    )
