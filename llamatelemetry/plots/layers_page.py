"""The interactive map of notebook 14: layer x token, and beside it the chosen state, dimension by dimension."""

from importlib import resources

import numpy as np

from ..drawn import html
from . import theme
from .attention_page import pack_vectors
from .page import Page, pack

_STYLE = """
body { max-width:900px; }
.two { display:grid; grid-template-columns:minmax(0,1fr) minmax(0,1fr); gap:14px; }
#mapbox { position:relative; overflow-x:auto; }
#map { cursor:pointer; display:block; width:100%; height:420px; border:1px solid var(--line); }
#labels { display:block; width:100%; height:70px; }
#vector { width:100%; height:190px; display:block; border:1px solid var(--line); }
#scale { width:120px; height:10px; vertical-align:middle; }
td:first-child,th:first-child { text-align:left; } table { font-size:12px; }
p { margin:4px 0; }
@media (max-width:640px) { .two { grid-template-columns:1fr; } }
"""
_BODY = """
<h1>{title}</h1>
<div class="controls">
  <label>colour <select id="measure"></select></label>
  <label><input id="log" type="checkbox" checked> log scale</label>
  <span><span id="low" class="mono"></span> <canvas id="scale" width="120" height="10"></canvas>
  <span id="high" class="mono"></span></span>
</div>
<div class="two">
  <div>
    <div id="mapbox"><canvas id="map" tabindex="0" role="img" aria-label="map of states and tokens"></canvas>
    <canvas id="labels" aria-hidden="true"></canvas></div>
    <p class="note">rows: states, 0 the embedding, downwards; columns: tokens. Click, or use the arrow keys.</p>
    <p id="under" class="mono" role="status"></p>
  </div>
  <div>
    <h2 id="chosen"></h2>
    <canvas id="vector" role="img" aria-label="values of the chosen state by dimension"></canvas>
    <p class="note" id="vectornote"></p>
    <div id="facts"></div>
  </div>
</div>
<p class="note">{about}</p>
"""


def _nth(n):
    return f"{n}{ {2: 'nd', 3: 'rd'}.get(n, 'th')}"


def layers_page(hidden, pieces, measures, *, model, says=None, probability=None, max_bytes=4.5e6):
    """A self-contained page: a map of (state, token), and the chosen state's values.

    hidden: (layer 0..n, token, embd); measures: {name with unit: (layer, token) array}, the first is shown first; says,
    probability: (layer, token) texts and numbers, the lens's best token. Values are stored in 32, 16 or 8 bits, as
    precisely as max_bytes allows, at worst of every n-th state, and the page says how. Returns a Page.
    """
    hidden = np.asarray(hidden, dtype=np.float32)
    bits = next((bits for bits in (32, 16) if hidden.size * bits / 6 <= max_bytes), 8)
    room = max(1, int(max_bytes / (hidden[0].size * bits / 6)))  # states that fit
    every = -(-len(hidden) // room)
    kept = [layer for layer in range(len(hidden)) if (len(hidden) - 1 - layer) % every == 0]  # the last one always
    exact = {32: "exactly (float32)", 16: "within 1/65534", 8: "within 1/254"}[bits]
    about = "Captured from llama.cpp's own kernels; the values"
    about += "" if every == 1 else f" of every {_nth(every)} state"
    about += f" are stored {exact}" + ("." if bits == 32 else " of each state's largest value.")
    states, tokens, width = hidden.shape
    title = f"Residual stream of {model}: {states} states, {tokens} tokens, {width} dimensions"
    data = {
        "tokens": [theme.token_text(piece) for piece in pieces],
        "states": len(hidden),
        "measures": {name: pack(np.asarray(values, dtype=np.float32)) for name, values in measures.items()},
        "vectors": pack_vectors(hidden[:, None], bits, kept),
        "says": None if says is None else [[theme.token_text(piece) for piece in row] for row in says],
        "probability": None if probability is None else pack(np.asarray(probability, dtype=np.float32)),
    }
    files = (resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
             for name in ("attention_common.js", "layers_page.js"))
    body = _BODY.format(title=html(title), about=html(about))
    return Page(title, body, "\n".join(files), data, style=_STYLE, height=690)
