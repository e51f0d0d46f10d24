"""Mixture of experts: who is chosen, how decided the router is, whether kinds of tokens have their
own experts."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import xarray as xr

from ..capture.finite import measured
from ..maths import entropy, softmax
from ..views.text import piece_kind


def expert_load(experts: xr.DataArray, n_expert: int) -> xr.DataArray:
    """Share of all choices that fell on each expert: (layer, expert), rows sum to 1. experts:
    (layer, token, slot) ids.

    Even load is 1 / n_expert."""
    ids = np.asarray(experts, dtype=np.int64).reshape(len(experts), -1)
    counts = np.stack([np.bincount(row, minlength=n_expert) for row in ids])
    return xr.DataArray(
        counts / ids.shape[1], dims=("layer", "expert"), coords={"layer": experts["layer"].values}
    )


def routing_entropy(router: xr.DataArray, kinds: str | Sequence[str] = "softmax") -> xr.DataArray:
    """Entropy of the router over the experts in nats: (layer, token); log n_expert is undecided.

    router: (layer, token, expert) as captured; kinds: what it holds, one for all layers or one
    each: "softmax" (probabilities), "sigmoid" (one probability per expert: divided by their sum),
    "logits" (softmax is taken)."""
    values = measured(router, np.float64)
    kinds = [kinds] * len(values) if isinstance(kinds, str) else list(kinds)
    shares = [
        softmax(x) if kind == "logits" else x / x.sum(-1, keepdims=True)
        for x, kind in zip(values, kinds)
    ]
    coords = {"layer": router["layer"].values}
    return xr.DataArray(entropy(np.stack(shares)), dims=("layer", "token"), coords=coords)


def experts_by_kind(
    experts: xr.DataArray, pieces: Sequence, n_expert: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Do kinds of tokens (number, word, part, punctuation, ...) go to experts of their own?

    (table, distance): table: DataFrame (kind, expert), share of the kind's choices over all layers;
    distance: DataFrame (kind: n tokens, distance), mean over layers of the total variation distance
    between the kind's load and that of all tokens, 0 (the same) to 1; expected: the same for as
    many tokens drawn at random from the text (mean of 20 draws)."""
    ids = np.asarray(experts, dtype=np.int64)  # (layer, token, slot)
    kinds = np.array([piece_kind(piece) for piece in pieces])
    hot = np.stack([(ids == e).mean(-1) for e in range(n_expert)], -1)  # (layer, token, expert)
    every, random = hot.mean(1), np.random.default_rng(0)

    def far(members):
        return float(np.abs(hot[:, members].mean(1) - every).sum(-1).mean() / 2)

    rows, table = {}, {}
    for kind in sorted(set(kinds)):
        members = np.flatnonzero(kinds == kind)
        draws = [far(random.choice(len(kinds), len(members), replace=False)) for _ in range(20)]
        rows[kind] = (len(members), far(members), float(np.mean(draws)))
        table[kind] = hot[:, members].mean((0, 1))
    distance = pd.DataFrame.from_dict(rows, orient="index", columns=["n", "distance", "expected"])
    return pd.DataFrame(table).T.rename_axis("kind"), distance.rename_axis("kind")


def same_experts(experts: xr.DataArray, other: xr.DataArray) -> xr.DataArray:
    """Share of a token's experts that another run (another quantization) chose, too: (layer,) mean
    over tokens."""
    a, b = np.asarray(experts), np.asarray(other)  # (layer, token, slot)
    shared = (a[..., :, None] == b[..., None, :]).any(-1).mean((1, 2))
    return xr.DataArray(shared, dims="layer", coords={"layer": experts["layer"].values})
