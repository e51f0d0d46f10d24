"""The dashboard of notebook 15: every head on one self-contained page, linked to its matrix,
profile and neighbours."""

import numpy as np

from ..views import theme
from ..views.packing import pack
from ..views.page import Page

EXACT, FINE = 4_000_000, 2_500_000  # bytes of float32 weights, of 16-bit weights; beyond: 8 bits
SIGNED = ("semantic", "loss change")


def heads_page(
    profiled, labels, attention, pieces, distance, *, model, extra=None, clusters=None, head=0
):
    """Map of all heads (layer across, head down) coloured by a chosen measure; click for a head's
    matrix, its profile with intervals and baselines, and its nearest heads.

    profiled: heads.profile's Dataset (measure, layer, head); labels: {(layer, head): text};
    attention: (layer, head, query, key) of one text; pieces: its tokens; distance: (head, head)
    with heads numbered layer by layer; extra: {name: (layer, head) array} of more measures without
    baselines, e.g. "loss change"; clusters: (head,) or None. Weights are on the page as float32
    where that is at most 4 MB, else in steps of 1/65535 or 1/255, and it says which."""
    layers, n_head = profiled["layer"].values.tolist(), profiled.sizes["head"]
    measures = []
    for name in profiled["measure"].values:
        part = profiled.sel(measure=name)
        columns = {
            key: pack(np.nan_to_num(part[key].values.astype(np.float32), nan=-99))
            for key in ("value", "low", "high", "baseline_high")
        }
        measures.append({"name": str(name), "signed": name in SIGNED, **columns})
    for name, values in (extra or {}).items():
        packed = pack(np.nan_to_num(np.asarray(values, np.float32), nan=-99))
        measures.append({"name": name, "signed": name in SIGNED, "value": packed})
    values = np.asarray(attention, np.float32)
    weights, unit, precision = _weights(values)
    others = np.where(np.eye(len(distance), dtype=bool), np.inf, distance)
    order = np.argsort(others, axis=1, kind="stable")[:, : min(6, len(distance) - 1)]
    data = {
        "tokens": [theme.token_text(piece) for piece in pieces],
        "layers": layers,
        "n_head": n_head,
        "measures": measures,
        "weights": weights,
        "unit": unit,
        "first": int(head),
        "labels": [labels.get((layer, i), "") for layer in layers for i in range(n_head)],
        "clusters": None if clusters is None else [int(c) for c in clusters],
        "near": pack(order.astype(np.int32)),
        "near_distance": pack(np.take_along_axis(distance, order, 1)),
    }
    title = f"The heads of {model}: {len(layers) * n_head}"
    about = (
        "Map: layer across, head down; click, or arrow keys. Scores: means over the set of texts, bars 95 "
        "% intervals, the "
        f"mark the highest shuffled score. Matrices: query down, key across, one text of {len(pieces)} "
        f"tokens, each with its "
        f"own scale, {precision}."
    )
    return Page.of(__package__, "page", data, title=title, about=about, height=1120)


def _weights(values):
    """Lower triangles of (layer, head, query, key) packed, the unit of a step, and how to say
    so."""
    rows, columns = np.tril_indices(values.shape[-1])
    lower = values[..., rows, columns].reshape(-1, len(rows))
    if lower.nbytes <= EXACT:
        return pack(lower), 1.0, "weights exact to float32"
    if lower.size * 2 <= FINE:
        return (
            pack(np.rint(lower * 65535).astype(np.uint16)),
            1 / 65535,
            "weights in steps of 1/65535",
        )
    return pack(np.rint(lower * 255).astype(np.uint8)), 1 / 255, "weights in steps of 1/255"
