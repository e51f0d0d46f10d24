"""The interactive map of notebook 14: layer x token, and beside it the chosen state, dimension by
dimension."""

import numpy as np

from ..views import theme
from ..views.packing import pack, pack_vectors
from ..views.page import Page


def _nth(n):
    return f"{n}{ {2: 'nd', 3: 'rd'}.get(n, 'th') }"


def layers_page(hidden, pieces, measures, *, model, says=None, probability=None, max_bytes=4.5e6):
    """A self-contained page: a map of (state, token), and the chosen state's values.

    hidden: (layer 0..n, token, embd); measures: {name with unit: (layer, token) array}, the first
    is shown first; says, probability: (layer, token) texts and numbers, the lens's best token.
    Values are stored in 32, 16 or 8 bits, as precisely as max_bytes allows, at worst of every n-th
    state, and the page says how. Returns a Page."""
    hidden = np.asarray(hidden, dtype=np.float32)
    bits = next((bits for bits in (32, 16) if hidden.size * bits / 6 <= max_bytes), 8)
    room = max(1, int(max_bytes / (hidden[0].size * bits / 6)))  # states that fit
    every = -(-len(hidden) // room)
    kept = [
        layer for layer in range(len(hidden)) if (len(hidden) - 1 - layer) % every == 0
    ]  # the last one always
    exact = {32: "exactly (float32)", 16: "within 1/65534", 8: "within 1/254"}[bits]
    about = "Captured from llama.cpp's own kernels; the values"
    about += "" if every == 1 else f" of every {_nth(every)} state"
    about += f" are stored {exact}" + ("." if bits == 32 else " of each state's largest value.")
    states, tokens, width = hidden.shape
    title = f"Residual stream of {model}: {states} states, {tokens} tokens, {width} dimensions"
    data = {
        "tokens": [theme.token_text(piece) for piece in pieces],
        "states": len(hidden),
        "measures": {
            name: pack(np.asarray(values, dtype=np.float32)) for name, values in measures.items()
        },
        "vectors": pack_vectors(hidden[:, None], bits, kept),
        "says": None
        if says is None
        else [[theme.token_text(piece) for piece in row] for row in says],
        "probability": None
        if probability is None
        else pack(np.asarray(probability, dtype=np.float32)),
    }
    return Page.of(__package__, "page", data, title=title, about=about, height=690)
