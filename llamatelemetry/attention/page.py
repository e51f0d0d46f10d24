"""Self-contained attention pages: three views of all heads, one token's steps through one head, and
the next token."""

import numpy as np

from ..views import theme
from ..views.packing import pack, pack_vectors
from ..views.page import Page
from ..views.text import counted


def pack_attention(attention, bits):
    """Lower triangles of (layer, head, query, key), row by row: float32, or 16 bits in steps of
    1/65535."""
    attention = np.asarray(attention, dtype=np.float32)
    rows, columns = np.tril_indices(attention.shape[-1])
    lower = attention[..., rows, columns]
    return pack(lower if bits == 32 else np.rint(lower * 65535).astype(np.uint16))


def _precision(n_weights, n_vector, n_layer, layer, max_bytes):
    """How many bits weights and vectors get, and which layers' vectors, so that base64 of all stays
    under max_bytes."""
    for weight_bits, vector_bits in ((32, 32), (32, 16), (16, 16), (16, 8)):
        if (n_weights * weight_bits + n_vector * vector_bits) / 6 <= max_bytes:
            return weight_bits, vector_bits, list(range(n_layer))
    if not n_vector:
        return 16, 16, list(range(n_layer))
    room = max_bytes - n_weights * 16 / 6
    count = int(np.clip(room // (n_vector / n_layer * 16 / 6), 1, n_layer))
    first = int(np.clip(layer - count // 2, 0, n_layer - count))
    return 16, 16, list(range(first, first + count))


def attention_page(
    attention,
    pieces,
    *,
    model,
    scales,
    q=None,
    k=None,
    softcap=None,
    layer=0,
    head=0,
    max_bytes=4.8e6,
):
    """Three linked views: every head as a thumbnail, one head as lines and map, q·k of one query
    per dimension.

    attention: (layer, head, query, key) of the whole prompt; pieces: token texts; model: name for
    the title; scales: (layer,) softmax scales; q: (layer, head, token, feature) and k: (layer,
    kv_head, token, feature), after RoPE; layer, head: what is selected first. Weights, q and k are
    stored as precisely as max_bytes allows, and the page says how. A page of 32 x 32 heads at 64
    tokens is larger than max_bytes, with q and k of one layer. Without q and k the page has two
    views. Returns a Page."""
    n_layer, n_head, n_token, _ = attention.shape
    n_weights = n_layer * n_head * n_token * (n_token + 1) // 2
    n_vector = 0 if q is None else q.size + k.size
    weight_bits, vector_bits, layers = _precision(n_weights, n_vector, n_layer, layer, max_bytes)
    about = "Captured from llama.cpp's own kernels. Weights are stored " + (
        "exactly (float32)" if weight_bits == 32 else "in steps of 1/65535"
    )
    if q is not None:
        exact = {32: "exactly", 16: "within 1/65534 of each vector's largest value"}
        about += ", q and k " + exact.get(
            vector_bits, "within 1/254 of each vector's largest value"
        )
        about += (
            "" if len(layers) == n_layer else f" and for layers {layers[0]} to {layers[-1]} only"
        )
    data = {
        "tokens": [theme.token_text(piece) for piece in pieces],
        "n_layer": n_layer,
        "n_head": n_head,
        "n_kv_head": n_head if k is None else k.shape[1],
        "layer": int(layer),
        "head": int(head),
        "scales": [float(s) for s in np.broadcast_to(scales, n_layer)],
        "softcap": softcap,
        "attention": pack_attention(attention, weight_bits),
        "q": None if q is None else pack_vectors(q, vector_bits, layers),
        "k": None if k is None else pack_vectors(k, vector_bits, layers),
    }
    sizes = {"layer": n_layer, "head": n_head, "token": n_token}
    sizes = ", ".join(counted(n, name) for name, n in sizes.items())
    title = f"Attention of {model}: {sizes}"
    return Page.of(
        __package__,
        "views",
        data,
        title=title,
        about=about + ".",
        scripts=("views", "dims"),
        height=900,
    )


def steps_page(
    captured,
    written,
    tokens,
    *,
    model,
    position,
    scales,
    softcap=None,
    windows=None,
    layer=0,
    head=0,
    kernels="",
    max_bytes=4.8e6,
):
    """One token's way through one head of one layer, with selectors for both and the real numbers
    of every step.

    captured: maps hidden, attn_norm, q_pre, k_pre, q, k, v, scores, attention, attn_heads, attn_out
    to DataArrays; written: attention.output.head_writes at the same position; tokens: DataFrame
    with id and piece; scales: (layer,) softmax scales; windows: (layer,) sliding window or None;
    kernels: why the projection differs, by layer. All numbers are float32 as captured; layers that
    do not fit in max_bytes are left out, the farthest first."""
    n_layer, n_head = captured["attention"].shape[:2]
    position = range(len(tokens))[position]
    seen, here = slice(0, position + 1), position
    arrays = {
        "hidden": np.asarray(captured["hidden"])[:n_layer, here],  # (layer, embd)
        "attn_norm": np.asarray(captured["attn_norm"])[:, here],
        "attn_out": np.asarray(captured["attn_out"])[:, here],
        "q_pre": np.asarray(captured["q_pre"])[:, :, here],  # (layer, head, feature)
        "k_pre": np.asarray(captured["k_pre"])[:, :, here],
        "q": np.asarray(captured["q"])[:, :, here],
        "k": np.asarray(captured["k"])[:, :, seen],  # (layer, kv_head, key, feature)
        "v": np.asarray(captured["v"])[:, :, seen],
        "scores": np.asarray(captured["scores"])[:, :, here, seen],  # (layer, head, key)
        "attention": np.asarray(captured["attention"])[:, :, here, seen],
        "attn_heads": np.asarray(captured["attn_heads"])[:, :, here],
        "written": np.asarray(written["written"]),  # (layer, head, embd)
    }
    per_layer = sum(a.size for a in arrays.values()) * 4 * 4 / 3 / n_layer
    count = int(np.clip(max_bytes // per_layer, 1, n_layer))
    first = int(np.clip(layer - count // 2, 0, n_layer - count))
    layers = list(range(first, first + count))
    data = {
        "tokens": [theme.token_text(piece) for piece in tokens["piece"]],
        "ids": [int(i) for i in tokens["id"]],
        "position": position,
        "layers": layers,
        "n_head": n_head,
        "n_kv_head": captured["k"].shape[1],
        "layer": int(layer),
        "head": int(head),
        "scales": [float(s) for s in np.broadcast_to(scales, n_layer)[layers]],
        "softcap": softcap,
        "windows": [None if windows is None else windows[i] for i in layers],
        "projection_difference": [float(d) for d in np.asarray(written["difference"])[layers]],
        "kernels": [kernels if isinstance(kernels, str) else kernels[i] for i in layers],
        "arrays": {name: pack(a[layers]) for name, a in arrays.items()},
    }
    data["arrays"]["embedding"] = pack(arrays["hidden"][0])
    piece = theme.token_text(tokens["piece"].iloc[position])
    title = f"Token {position} {piece} through one head of {model}"
    about = "Every number was captured from llama.cpp, float32. Strips: blue negative, red positive, hover for values."
    if count < n_layer:
        about += f" Layers {layers[0]} to {layers[-1]} are on this page."
    return Page.of(__package__, "steps", data, title=title, about=about, height=900)


def next_token_page(
    logits, vocabulary, *, model, context="", temperature=0.8, top_k=40, top_p=0.95, min_p=0.05
):
    """Next-token probabilities with live temperature, top-k, top-p and min-p, in the order of
    llama.cpp's chain.

    logits: (vocab,) captured at one position; vocabulary: the model's pieces; context: the text
    before, for the title. Probabilities are computed in the page from all logits, as
    attention.output.sampled_probabilities does."""
    logits = np.asarray(logits, dtype=np.float32)
    order = np.argsort(-logits, kind="stable")
    shown = order[:200]
    data = {
        "logits": pack(logits[order]),
        "shown": [theme.token_text(vocabulary[i]) for i in shown],
        "ids": [int(i) for i in shown],
        "settings": {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p},
        "tokens": [],
    }
    title = f"Next token of {model}" + (f" after '{context}'" if context else "")
    about = (
        "The bar is what llama.cpp would draw from with these settings, recomputed here from the captured logits: "
        "top-k, then top-p and min-p on what is left, then temperature. The mark is the model's own probability. "
        "llama.cpp's "
        "penalties, DRY, XTC, typical-p and top-n-sigma come before or between; by default they change nothing."
    )
    return Page.of(__package__, "next", data, title=title, about=about, height=720)
