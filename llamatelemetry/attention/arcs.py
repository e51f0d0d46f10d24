"""The graph of a prompt as arcs between its tokens, filtered by layer, head and weight in the
page."""

import numpy as np

from ..views import theme
from ..views.packing import pack
from ..views.page import Page


def arcs_page(nodes, edges, *, model, n_layer, n_head, color="received", size="pagerank"):
    """Tokens in order on a line, edges of heads above it and rollout edges below, with filters for
    layer and head.

    nodes: one row per position, with columns piece, color, size and more for the hover text; edges:
    columns src, dst, layer, head, weight, kind ("head" or "rollout"), as attention.flow makes them.
    Returns a Page."""
    heads, rolled = edges[edges["kind"] == "head"], edges[edges["kind"] == "rollout"]
    numbers = [c for c in nodes.columns if nodes[c].dtype.kind == "f"]
    scaled = {c: (nodes[c] / (nodes[c].max() or 1)).round(4).tolist() for c in (color, size)}
    labels = [f"{i} {theme.token_text(piece)}" for i, piece in enumerate(nodes["piece"])]
    data = {
        "tokens": [theme.token_text(piece) for piece in nodes["piece"]],
        "n_layer": n_layer,
        "n_head": n_head,
        "threshold": float(np.floor(heads["weight"].min() * 100) / 100) if len(heads) else 0.0,
        "edges": {
            c: pack(heads[c].to_numpy().astype(np.int32)) for c in ("src", "dst", "layer", "head")
        }
        | {"weight": pack(heads["weight"].to_numpy())},
        "rollout": [[int(r.src), int(r.dst), float(r.weight)] for r in rolled.itertuples()],
        "rollout_layer": int(rolled["layer"].max()) if len(rolled) else 0,
        "color": scaled[color],
        "size": scaled[size],
        "details": [
            ", ".join([labels[i], *(f"{c} {row[c]:.4f}" for c in numbers)])
            for i, row in enumerate(nodes.to_dict("records"))
        ],
    }
    title = f"Attention of {model} as a graph of tokens"
    about = (
        f"An edge runs from a query to an earlier key that some head gives at least {data['threshold']:.2f}; stronger "
        f"lines have more weight in total. Node colour: {color}, size: {size}. Hover a token for its edges alone."
    )
    return Page.of(__package__, "arcs", data, title=title, about=about, height=760)
