"""The run as a graph: one node per layer and token, edges along the residual stream and along
attention."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import xarray as xr

from ..capture.data import Capture
from ..capture.finite import measured
from ..files.vocabulary import named
from ..views.text import token_text
from .lens import positions_of

MOST = 4000  # nodes


def drawn(captured: Capture, most: int = MOST) -> np.ndarray:
    """Positions of the tokens that stream_graph draws, and of those that predicted the generated
    ones: all, or the last of a long text."""
    n_layer, n_token = captured["hidden"].shape[:2]
    return np.arange(min(_first(n_layer, n_token, most), captured.n_prompt - 1), n_token)


def needed(
    stages: Sequence[str], n_layer: int, n_prompt: int, generate: int, most: int = MOST
) -> dict[str, list[int]]:
    """positions= of engine.capture for a text that goes on after a prompt: of its logits and mean
    attention those from the first on that may be `drawn`, which is printed; {} where that is all.
    stages: what is captured; n_layer: of the model; generate: tokens, at most."""
    first = min(_first(n_layer + 1, n_prompt, most), n_prompt - 1)
    if first == 0:
        return {}
    print(
        f"The last {n_prompt - first} of the prompt's {n_prompt:,} tokens, and what is written after "
        "them, are drawn: logits and mean attention are captured from there on."
    )
    wanted = list(range(first, n_prompt + generate))
    return {stage: wanted for stage in ("logits", "attention_mean") if stage in stages}


def _first(n_layer, n_token, most):
    return max(0, n_token - max(2, most // n_layer))


def stream_graph(
    captured: Capture,
    lens_data: xr.Dataset,
    vocabulary: Sequence,
    per_query: int = 1,
    least: float = 0.05,
    most: int = MOST,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(nodes, edges) DataFrames of one run.

    captured: a Capture with hidden, and attention_mean where the model has it; lens_data: lens.lens
    of it, at least of the tokens that are `drawn`; vocabulary: token id -> piece. Nodes: id, layer,
    position, piece, generated, norm, log_norm (base 10), says (top token of the lens), probability,
    label (piece and what the lens says), x, y. Edges: src, dst, weight, kind: "stream" from a layer
    to the next, weight the cosine of the two states (at least 0.001), and "attention" from the
    key's node that enters the layer to the query's node that leaves it, weight the mean over heads,
    for the `per_query` strongest keys of each query other than itself and the first token (the sink
    would hide the rest), where the weight is at least `least`. Of a text with more than `most`
    nodes the last tokens are there, the first among nodes.attrs["from"]."""
    n_layer, n_token = captured["hidden"].shape[:2]
    first = _first(n_layer, n_token, most)
    h, tokens = measured(captured["hidden"][:, first:]).astype(np.float64), captured.tokens
    lens_data = lens_data.isel(token=slice(first - n_token, None))
    norm = np.linalg.norm(h, axis=-1)
    layer, position = (x.ravel() for x in np.indices(h.shape[:2]))
    position = position + first
    top = lens_data["top"].isel(best=0).values.ravel()
    nodes = pd.DataFrame(
        {
            "id": [f"{a}:{b}" for a, b in zip(layer, position)],
            "layer": layer,
            "position": position,
            "piece": tokens["piece"].to_numpy()[position],
            "generated": tokens["generated"].to_numpy()[position],
            "norm": norm.ravel(),
            "log_norm": np.log10(np.maximum(norm.ravel(), 1e-12)),
            "says": named(vocabulary, top),
            "probability": lens_data["top_probability"].isel(best=0).values.ravel(),
            "x": position * 1.4,
            "y": layer.astype(float),
        }
    )
    said = zip(nodes["piece"], nodes["says"])
    nodes["label"] = [f"{token_text(piece)} → {token_text(says)}" for piece, says in said]
    cosine = (h[:-1] * h[1:]).sum(-1) / np.maximum(norm[:-1] * norm[1:], 1e-300)
    rows = [
        (f"{a}:{b}", f"{a + 1}:{b}", max(cosine[a, b - first], 1e-3), "stream")
        for a in range(n_layer - 1)
        for b in range(first, n_token)
    ]
    if "attention_mean" in captured:
        rows += _attention_edges(captured["attention_mean"], per_query, least, first)
    nodes.attrs["from"] = first
    return nodes, pd.DataFrame(rows, columns=["src", "dst", "weight", "kind"])


def _attention_edges(attention, per_query, least, first):
    rows, queries = [], positions_of(attention, "query")
    for a, layer in enumerate(attention["layer"].values):
        mean = measured(attention.isel(layer=a))  # (query, key), over heads
        low = max(1, first)
        for query, row in zip(queries[queries > low], mean[queries > low]):
            keys = low + np.argsort(-row[low:query], kind="stable")[:per_query]
            rows += [
                (f"{layer}:{key}", f"{layer + 1}:{query}", float(row[key]), "attention")
                for key in keys
                if row[key] >= least
            ]
    return rows
