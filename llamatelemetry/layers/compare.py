"""Two runs side by side: which positions belong together, where the streams part, what a patch
restores."""

from difflib import SequenceMatcher

import numpy as np
import pandas as pd
import xarray as xr

from ..capture.finite import measured
from ..maths import log_softmax, ratio

NOISE = 0.05  # logits; whoever has the file and the capture knows better: twice lens.logit_error's tolerance


def align(ids, other, by="position"):
    """Pairs of positions of two token sequences: (n, 2) int array.

    by: "position" pairs equal positions (up to the shorter text), "token" the longest common runs
    of equal tokens."""
    if by == "position":
        return np.repeat(np.arange(min(len(ids), len(other)))[:, None], 2, axis=1)
    if by != "token":
        raise ValueError(f'by is "position" or "token", not {by!r}')
    blocks = SequenceMatcher(None, list(ids), list(other), autojunk=False).get_matching_blocks()
    pairs = [(a + i, b + i) for a, b, size in blocks for i in range(size)]
    return np.array(pairs, dtype=int).reshape(-1, 2)


def divergence(hidden, other, pairs):
    """How far two streams are apart: Dataset of (layer, pair): distance, |a - b| over the root of
    |a| |b|, and cosine.

    hidden, other: (layer, token, embd) of equal layers and width; ValueError otherwise: use cka_map
    for models of different shape."""
    if hidden.shape[0] != other.shape[0] or hidden.shape[2] != other.shape[2]:
        raise ValueError(
            f"streams of {hidden.shape[0]} layers x {hidden.shape[2]} and {other.shape[0]} x "
            f"{other.shape[2]} share no space: compare them with cka_map"
        )
    a = measured(hidden, np.float64)[:, pairs[:, 0]]
    b = measured(other, np.float64)[:, pairs[:, 1]]
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    dims = ("layer", "pair")
    return xr.Dataset(
        {
            "distance": (
                dims,
                np.linalg.norm(a - b, axis=-1) / np.sqrt(np.maximum(lengths, 1e-300)),
            ),
            "cosine": (dims, (a * b).sum(-1) / np.maximum(lengths, 1e-300)),
        },
        coords={"layer": np.arange(len(a)), "position": ("pair", pairs[:, 0])},
    )


def output_change(logits, other, pairs):
    """How the predictions of two runs differ: DataFrame per pair: kl, KL(first || second) in nats,
    and same_top."""
    p, q = log_softmax(measured(logits)[pairs[:, 0]]), log_softmax(measured(other)[pairs[:, 1]])
    kl = (np.exp(p) * (p - q)).sum(-1, dtype=np.float64)
    return pd.DataFrame(
        {"position": pairs[:, 0], "kl": np.maximum(kl, 0), "same_top": p.argmax(-1) == q.argmax(-1)}
    )


def answer_difference(logits, answers, position=-1):
    """logit[first answer] - logit[second answer] at a position. logits: (token, vocab); answers:
    two ids."""
    row = measured(logits)[position]
    return float(row[answers[0]]) - float(row[answers[1]])


def answers(logits, other, position=-1):
    """Two token ids to tell two runs' answers apart: the first run's best token, and the second's
    best other one."""
    first = int(measured(logits)[position].argmax())
    return first, int(next(i for i in np.argsort(-measured(other)[position]) if i != first))


def restored(difference, patched_run, source_run, noise=NOISE):
    """Share of the source's answer that a patch brings back: 0 as the run without a patch, 1 as the
    source.

    All three are answer differences (logits). noise: what rounding can do to the difference of the
    two runs; where they are no farther apart there is nothing to bring back, and every share is
    NaN."""
    return ratio(
        np.asarray(difference, dtype=np.float64) - patched_run, source_run - patched_run, noise
    )


def changed_positions(hidden, other, limit=None):
    """Positions whose states differ in some layer: elsewhere a patch between two runs cannot do
    anything.

    limit: at most so many, spread evenly, the first and the last among them.
    """
    changed = np.flatnonzero((measured(hidden) != measured(other)).any(axis=(0, 2)))
    if limit is None or len(changed) <= limit:
        return changed
    return changed[np.unique(np.linspace(0, len(changed) - 1, limit).round().astype(int))]


def generation_table(tokens, logits, lens_data, settled_layers):
    """One row per generated token, from the position that predicted it: position, piece,
    probability that the model gave it, entropy (nats) of the model's output, settled (layer from
    which on the lens names the output's best token).

    tokens: Capture.tokens; logits: (token, vocab); lens_data: lens() of all positions;
    settled_layers: (token,)."""
    new = tokens.index[tokens["generated"]].to_numpy()
    before = new - 1
    logp = log_softmax(measured(logits)[before])
    chosen = logp[np.arange(len(new)), tokens["id"].to_numpy()[new]]
    return pd.DataFrame(
        {
            "position": new,
            "piece": tokens["piece"].to_numpy()[new],
            "probability": np.exp(chosen),
            "entropy": -(np.exp(logp) * logp).sum(-1, dtype=np.float64),
            "settled": np.asarray(settled_layers)[before],
            "lens_entropy": lens_data["entropy"].isel(token=before).mean("layer").values,
        }
    )
