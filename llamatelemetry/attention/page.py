"""Self-contained pages of attention: every head in three views, one token's steps through one
head, the next token, the prompt as a graph."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import xarray as xr

from ..views.packing import ends, pack, pack_roots, pack_vectors
from ..views.page import Page
from ..views.text import counted, token_text

SIZE = 4.8e6  # bytes of a page's arrays: with its text it stays under 5 MB


def pack_attention(attention, bits):
    """Lower triangles of (layer, head, query, key), row by row: float32, 16 bits in steps of
    1/65535, or 8 bits of the square root."""
    attention = np.asarray(attention, dtype=np.float32)
    rows, columns = np.tril_indices(attention.shape[-1])
    lower = attention[..., rows, columns]
    if bits == 8:
        return pack_roots(lower)
    return pack(lower if bits == 32 else np.rint(lower * 65535).astype(np.uint16))


def _around(layer, room, n_layer):
    """As many layers around one as there is room for, at least that one."""
    count = int(np.clip(room, 1, n_layer))
    first = int(np.clip(layer - count // 2, 0, n_layer - count))
    return list(range(first, first + count))


def _precision(n_weights, n_vector, n_layer, layer, max_bytes):
    """How many bits weights and vectors get, and which layers' vectors, so that base64 of all stays
    under max_bytes; None where not even weights of 8 bits and the vectors of one layer do."""
    for weight_bits, vector_bits in ((32, 32), (32, 16), (16, 16), (16, 8)):
        if (n_weights * weight_bits + n_vector * vector_bits) / 6 <= max_bytes:
            return weight_bits, vector_bits, list(range(n_layer))
    for weight_bits in (16, 8):
        left = max_bytes - n_weights * weight_bits / 6
        one = n_vector / n_layer * 16 / 6  # bytes of a layer's vectors
        if left >= one:
            count = left // one if n_vector else n_layer
            return weight_bits, 16, _around(layer, count, n_layer)
    return None


def _room(attention, q, k, layer, max_bytes):
    """(token positions, precision) of as many tokens as max_bytes holds: all, or the first and the
    last, of which there are rows."""
    n_layer, n_head, n_query, n_token = attention.shape
    most = n_token if n_query == n_token else min(n_token, n_query + 1)

    def precision(count):
        n_weights = n_layer * n_head * count * (count + 1) // 2
        n_vector = 0 if q is None or k is None else (q.size + k.size) // n_token * count
        return _precision(n_weights, n_vector, n_layer, layer, max_bytes)

    counts = range(most, 0, -1)
    count = next((count for count in counts if precision(count)), 1)
    return ends(n_token, count), precision(count) or (8, 16, [layer])


def _among(attention, shown):
    """(layer, head, token, token) of the shown tokens as queries and keys, from rows that are all
    of a text or its last; the first token sees only itself."""
    n_query, n_token = attention.shape[-2:]
    rows = shown - (n_token - n_query)
    values = np.asarray(attention)[:, :, np.maximum(rows, 0)][..., shown]
    values[:, :, rows < 0] = 0
    values[:, :, rows < 0, 0] = 1
    return values


# How precisely vectors are stored, by their bits.
_EXACT = {
    32: "exactly",
    16: "within 1/65534 of each vector's largest value",
    8: "within 1/254 of each vector's largest value",
}


def views(
    attention: xr.DataArray,
    pieces: Sequence,
    facts: Sequence,
    *,
    model: str,
    q: xr.DataArray | None = None,
    k: xr.DataArray | None = None,
    layer: int = 0,
    head: int = 0,
    max_bytes: float = SIZE,
) -> Page:
    """Three linked views: every head as a thumbnail, one head as lines and map, q·k of one query
    per dimension.

    attention: (layer, head, query, key) of the whole prompt, or of its last queries; facts: (scale,
    soft-cap, window) of every layer's softmax, as steps.layer_facts gives them; q: (layer, head,
    token, feature) and k: (layer, kv_head, token, feature), after RoPE, without which the page has
    two views; layer, head: what is selected first. Weights, q and k are stored as precisely as
    max_bytes allows, at worst of fewer tokens, the first and the last, and the page says how."""
    n_layer, n_head, _, n_token = attention.shape
    shown, precision = _room(attention, q, k, layer, max_bytes)
    weight_bits, vector_bits, layers = precision
    whole = len(shown) == n_token
    weights = np.asarray(attention) if whole else _among(attention, shown)
    if not whole:
        q, k = (None if x is None else np.asarray(x)[:, :, shown] for x in (q, k))
    scales, softcaps, _ = zip(*facts)
    data = {
        "tokens": [token_text(pieces[position]) for position in shown],
        "positions": shown.tolist(),
        "n_layer": n_layer,
        "n_head": n_head,
        "n_kv_head": n_head if k is None else k.shape[1],
        "layer": int(layer),
        "head": int(head),
        "scales": scales,
        "softcap": softcaps[layer],
        "attention": pack_attention(weights, weight_bits),
        "q": None if q is None else pack_vectors(q, vector_bits, layers),
        "k": None if k is None else pack_vectors(k, vector_bits, layers),
    }
    sizes = {"layer": n_layer, "head": n_head, "token": n_token}
    sizes = ", ".join(counted(n, name) for name, n in sizes.items())
    stored = {32: "exactly (float32)", 16: "in steps of 1/65535", 8: "within 1/250"}[weight_bits]
    about = f"Captured from llama.cpp's own kernels. Weights are stored {stored}"
    if q is not None:
        only = f" and for layers {layers[0]} to {layers[-1]} only" if len(layers) < n_layer else ""
        about += f", q and k {_EXACT[vector_bits]}{only}"
    if not whole:
        lost = 1 - float(weights[:, :, 1:].sum(-1).mean())
        about += (
            f". To stay small the page has the first and the last {len(shown) - 1} of {n_token:,} tokens; "
            f"their queries give {lost:.0%} of their weight to tokens that are not here"
        )
    title, scripts = f"Attention of {model}: {sizes}", ("views", "dims")
    return Page.of(
        __package__, "views", data, title=title, about=f"{about}.", scripts=scripts, height=900
    )


# What of a stage the steps need: the token's own vectors, or those of every key that it sees.
_OWN = ("hidden", "attn_norm", "attn_out", "q_pre", "k_pre", "q", "attn_heads")
_KEYS = ("k", "v")
_MAPS = ("scores", "attention")


def steps(
    captured: Mapping,
    written: xr.Dataset,
    tokens: pd.DataFrame,
    facts: Sequence,
    *,
    model: str,
    position: int = -1,
    layer: int = 0,
    head: int = 0,
    max_bytes: float = SIZE,
) -> Page:
    """One token's way through one head of one layer, with selectors for both and the real numbers
    of every step.

    captured: maps hidden, attn_norm, q_pre, k_pre, q, k, v, scores, attention, attn_heads, attn_out
    to DataArrays; written: attention.output.head_writes at the same position; tokens: DataFrame
    with id and piece; facts: (scale, soft-cap, window) of every layer's softmax, as
    steps.layer_facts gives them. All numbers are float32 as captured; layers that do not fit in
    max_bytes are left out, the farthest first."""
    n_layer, n_head = captured["attention"].shape[:2]
    here = range(len(tokens))[position]
    seen = slice(0, here + 1)
    # (layer, embd) or (layer, head, feature); (layer, kv_head, key, feature); (layer, head, key)
    arrays = {name: np.asarray(captured[name])[:n_layer, ..., here, :] for name in _OWN}
    arrays |= {name: np.asarray(captured[name])[..., seen, :] for name in _KEYS}
    row = here - len(tokens)  # from the end: there may be rows of the last queries alone
    arrays |= {name: np.asarray(captured[name])[..., row, seen] for name in _MAPS}
    arrays["written"] = np.asarray(written["written"])  # (layer, head, embd)
    shown = _fewer_keys(arrays, n_layer, here, len(tokens), max_bytes)
    per_layer = sum(a.size for a in arrays.values()) * 4 * 4 / 3 / n_layer
    layers = _around(layer, max_bytes // per_layer, n_layer)
    scales, softcaps, windows = zip(*(facts[i] for i in layers))
    differences, types = (np.asarray(written[x])[layers].tolist() for x in ("difference", "type"))
    data = {
        "tokens": [token_text(tokens["piece"].iloc[at]) for at in shown],
        "positions": shown.tolist(),
        "ids": tokens["id"].iloc[shown].tolist(),
        "position": int(np.flatnonzero(shown == here)[0]),
        "layers": layers,
        "n_head": n_head,
        "n_kv_head": captured["k"].shape[1],
        "layer": int(layer),
        "head": int(head),
        "scales": scales,
        "softcap": softcaps[0],
        "windows": windows,
        "projection_difference": differences,
        "kernels": [f"W_O is {kind} in the file" for kind in types],
        "arrays": {name: pack(a[layers]) for name, a in arrays.items()},
    }
    data["arrays"]["embedding"] = pack(arrays["hidden"][0])
    title = f"Token {here} {token_text(tokens['piece'].iloc[here])} through one head of {model}"
    about = "Every number was captured from llama.cpp, float32. Strips: blue negative, red positive, hover for values."
    if len(layers) < n_layer:
        about += f" Layers {layers[0]} to {layers[-1]} are on this page."
    if len(shown) < len(tokens):
        about += (
            f" Of {len(tokens):,} tokens the first and the last {len(shown) - 1} are: sums over keys "
            "that the page makes itself lack the others."
        )
    return Page.of(__package__, "steps", data, title=title, about=about, height=900)


def _fewer_keys(arrays, n_layer, here, n_token, max_bytes):
    """Positions of the tokens that are shown: all, where one layer's keys then fit in max_bytes,
    else the first and the last ones up to `here`, to which `arrays` are cut."""
    size = {name: a.size * 16 / 3 / n_layer for name, a in arrays.items()}
    by_key = sum(size[name] for name in (*_KEYS, *_MAPS)) / (here + 1)
    room = max_bytes - sum(size.values()) + by_key * (here + 1)
    shown = ends(here + 1, max(2, int(room // by_key)))
    if len(shown) <= here:
        arrays |= {name: arrays[name][:, :, shown] for name in (*_KEYS, *_MAPS)}
        return shown
    return np.arange(n_token)


def next_token(logits: np.ndarray, vocabulary: Sequence, *, model: str, context: str = "") -> Page:
    """Next-token probabilities with live temperature, top-k, top-p and min-p, in the order of
    llama.cpp's chain, from its default settings.

    logits: (vocab,) captured at one position; vocabulary: the model's pieces; context: the text
    before, for the title. Probabilities are computed in the page from all logits, as
    attention.output.sampled_probabilities does."""
    logits = np.asarray(logits, dtype=np.float32)
    order = np.argsort(-logits, kind="stable")
    shown = order[:200].tolist()
    data = {
        "logits": pack(logits[order]),
        "shown": [token_text(vocabulary[i]) for i in shown],
        "ids": shown,
        "settings": {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05},
        "tokens": [],
    }
    title = f"Next token of {model}" + (f" after '{context}'" if context else "")
    about = (
        "The bar is what llama.cpp would draw from with these settings, recomputed here from the captured logits: "
        "top-k, then top-p and min-p on what is left, then temperature. The mark is the model's own probability. "
        "llama.cpp's penalties, DRY, XTC, typical-p and top-n-sigma come before or between; by default they change "
        "nothing."
    )
    return Page.of(__package__, "next", data, title=title, about=about, height=720)


def arcs(
    nodes: pd.DataFrame,
    edges: pd.DataFrame,
    *,
    model: str,
    n_layer: int,
    n_head: int,
    max_bytes: float = SIZE,
) -> Page:
    """Tokens in order on a line, edges of heads above it and rollout edges below, with filters for
    layer, head and weight.

    nodes: one row per position, with columns piece, received (colour), pagerank (size) and more
    numbers for the hover text; edges: columns src, dst, layer, head, weight, kind ("head" or
    "rollout"). attention.flow makes both. Of edges that do not fit in max_bytes the strongest of
    each kind are on the page, and it says so."""
    room = max(0, max_bytes - 250 * len(nodes)) / 2  # of each kind
    parts = [edges[edges["kind"] == kind] for kind in ("head", "rollout")]
    most = int(room // 40)  # bytes of an edge
    heads, rolled = (x if len(x) <= most else x.nlargest(most, "weight") for x in parts)
    columns = {name: heads[name].to_numpy() for name in ("src", "dst", "layer", "head", "weight")}
    numbers = nodes.select_dtypes("floating")
    pieces = [token_text(piece) for piece in nodes["piece"]]
    shares = numbers / numbers.max().replace(0, 1)
    details = [
        ", ".join([f"{i} {piece}", *(f"{name} {value:.4f}" for name, value in row.items())])
        for i, (piece, row) in enumerate(zip(pieces, numbers.to_dict("records")))
    ]
    threshold = float(np.floor(heads["weight"].min() * 100) / 100) if len(heads) else 0.0
    data = {
        "tokens": pieces,
        "n_layer": n_layer,
        "n_head": n_head,
        "threshold": threshold,
        "edges": {name: pack(values) for name, values in columns.items()},
        "rollout": [[int(r.src), int(r.dst), float(r.weight)] for r in rolled.itertuples()],
        "rollout_layer": int(rolled["layer"].max()) if len(rolled) else 0,
        "color": shares["received"].round(4).tolist(),
        "size": shares["pagerank"].round(4).tolist(),
        "details": details,
    }
    title = f"Attention of {model} as a graph of tokens"
    about = (
        f"An edge runs from a query to an earlier key that some head gives at least {threshold:.2f}; stronger lines "
        "have more weight in total. Node colour: received, size: pagerank. Hover a token for its edges alone."
    )
    if len(heads) + len(rolled) < len(edges):
        kept = f"{len(heads):,} of heads and {len(rolled):,} of rollout"
        about += f" To stay small the page has the strongest of {len(edges):,} edges: {kept}."
    return Page.of(__package__, "arcs", data, title=title, about=about, height=760)
