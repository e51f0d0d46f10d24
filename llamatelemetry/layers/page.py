"""The interactive map of notebook 14: state x token, and beside it the chosen state, dimension by
dimension."""

from collections.abc import Sequence

import numpy as np
import xarray as xr

from ..files.vocabulary import named
from ..views.packing import ends, pack, pack_vectors
from ..views.page import Page
from ..views.text import token_text

STATES = 4  # whose values are on the page of however long a text


def states(
    hidden: xr.DataArray,
    lens_data: xr.Dataset,
    pieces: Sequence,
    vocabulary: Sequence,
    *,
    model: str,
    max_bytes: float = 4.5e6,
) -> Page:
    """A self-contained page: a map of (state, token), and the chosen state's values.

    hidden: (layer 0..n, token, embd); lens_data: lens.lens of it; pieces: of its tokens;
    vocabulary: token id -> piece. Values are stored in 32, 16 or 8 bits, as precisely as max_bytes
    allows, at worst of every n-th state, and the page says how."""
    n_state, n_all, width = hidden.shape
    read = lens_data["position"].values  # the tokens that the lens has read
    # A state of a token also has four measures, and what the lens says of it: about 40 bytes. Of
    # a long text fewer tokens, so that a few states' values are there, in 8 bits.
    each = 40 * n_state + min(n_state, STATES) * width * 8 / 6
    chosen = ends(len(read), max(2, int(max_bytes / each)))
    shown, lens_data = read[chosen], lens_data.isel(token=chosen)
    hidden = np.asarray(hidden)[:, shown]
    hidden = hidden.astype(np.float32)
    n_token = len(shown)
    max_bytes -= 40 * n_state * n_token
    bits = next((bits for bits in (32, 16) if hidden.size * bits / 6 <= max_bytes), 8)
    room = max(1, int(max_bytes / (hidden[0].size * bits / 6)))  # states that fit
    every = -(-n_state // room)
    kept = [
        state for state in range(n_state) if (n_state - 1 - state) % every == 0
    ]  # with the last
    exact = {32: "exactly (float32)", 16: "within 1/65534", 8: "within 1/254"}[bits]
    which = "" if every == 1 else f" of every {every}{ {2: 'nd', 3: 'rd'}.get(every, 'th') } state"
    of = "" if bits == 32 else " of each state's largest value"
    about = f"Captured from llama.cpp's own kernels; the values{which} are stored {exact}{of}."
    if n_token < n_all:
        about += f" Of {n_all:,} tokens the first and the last {n_token - 1} are on this page."
    title = f"Residual stream of {model}: {n_state} states, {n_all} tokens, {width} dimensions"
    measures = {
        "length (L2 norm)": np.linalg.norm(hidden, axis=-1),
        "largest magnitude": np.abs(hidden).max(-1),
        "entropy of the lens (nats)": lens_data["entropy"],
        "probability of the answer": lens_data["probability"],
    }
    best = lens_data[["top", "top_probability"]].isel(best=0)
    said = [named(vocabulary, row) for row in best["top"].values]
    data = {
        "tokens": [token_text(pieces[position]) for position in shown],
        "positions": shown.tolist(),
        "states": n_state,
        "measures": {name: _packed(values) for name, values in measures.items()},
        "vectors": pack_vectors(hidden[:, None], bits, kept),
        "says": [[token_text(piece) for piece in row] for row in said],
        "probability": _packed(best["top_probability"]),
    }
    return Page.of(__package__, "page", data, title=title, about=about, height=690)


def _packed(values):
    return pack(np.asarray(values, dtype=np.float32))
