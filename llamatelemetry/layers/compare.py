"""Two runs side by side: which positions belong together, where the streams part, what a patch
restores."""

from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import ArrayLike

from ..capture.data import Capture
from ..capture.finite import measured
from ..maths import blocks, entropy, log_softmax, ratio
from .lens import logits_at, settled

# Logits. Whoever has the file and the capture knows better: twice lens.logit_error's tolerance.
NOISE = 0.05
PATCH_SECONDS = 120.0  # that the patches of a map may take together


def align(ids: Sequence[int], other: Sequence[int], by: str = "position") -> np.ndarray:
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


def divergence(hidden: xr.DataArray, other: xr.DataArray, pairs: np.ndarray) -> xr.Dataset:
    """How far two streams are apart: Dataset of (layer, pair): distance, |a - b| over the root of
    |a| |b|, and cosine.

    hidden, other: (layer, token, embd) of equal layers and width; ValueError otherwise: use cka_map
    for models of different shape."""
    if hidden.shape[0] != other.shape[0] or hidden.shape[2] != other.shape[2]:
        raise ValueError(
            f"streams of {hidden.shape[0]} layers x {hidden.shape[2]} and {other.shape[0]} x "
            f"{other.shape[2]} share no space: compare them with cka_map"
        )
    dims, rows = ("layer", "pair"), []
    for layer in zip(measured(hidden), measured(other)):  # one at a time in double precision
        a, b = (x[at].astype(np.float64) for x, at in zip(layer, pairs.T))
        lengths = np.maximum(np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1), 1e-300)
        distance = np.linalg.norm(a - b, axis=-1) / np.sqrt(lengths)
        rows.append((distance, (a * b).sum(-1) / lengths))
    distance, cosine = np.stack(rows, axis=1)
    return xr.Dataset(
        {"distance": (dims, distance), "cosine": (dims, cosine)},
        coords={"layer": np.arange(len(rows)), "position": ("pair", pairs[:, 0])},
    )


def output_change(logits: xr.DataArray, other: xr.DataArray, pairs: np.ndarray) -> pd.DataFrame:
    """How the predictions of two runs differ: DataFrame per pair: kl, KL(first || second) in nats,
    and same_top."""
    first, second, kl, same = measured(logits), measured(other), [], []
    for _, some in blocks(pairs, 64):  # whole, a long text's vocabularies are gigabytes
        p, q = log_softmax(first[some[:, 0]]), log_softmax(second[some[:, 1]])
        kl.extend((np.exp(p) * (p - q)).sum(-1, dtype=np.float64))
        same.extend(p.argmax(-1) == q.argmax(-1))
    return pd.DataFrame({"position": pairs[:, 0], "kl": np.maximum(kl, 0), "same_top": same})


def answer_difference(logits: xr.DataArray, answers: Sequence[int], position: int = -1) -> float:
    """logit[first answer] - logit[second answer] at a position. logits: (token, vocab); answers:
    two ids."""
    row = measured(logits)[position]
    return float(row[answers[0]]) - float(row[answers[1]])


def answers(logits: xr.DataArray, other: xr.DataArray, position: int = -1) -> tuple[int, int]:
    """Two token ids to tell two runs' answers apart: the first run's best token, and the second's
    best other one."""
    first = int(measured(logits)[position].argmax())
    return first, int(next(i for i in np.argsort(-measured(other)[position]) if i != first))


def restored(
    difference: ArrayLike, patched_run: float, source_run: float, noise: float = NOISE
) -> np.ndarray:
    """Share of the source's answer that a patch brings back: 0 as the run without a patch, 1 as the
    source.

    All three are answer differences (logits). noise: what rounding can do to the difference of the
    two runs; where they are no farther apart there is nothing to bring back, and every share is
    NaN."""
    return ratio(
        np.asarray(difference, dtype=np.float64) - patched_run, source_run - patched_run, noise
    )


def changed_positions(
    hidden: xr.DataArray, other: xr.DataArray, limit: int | None = None
) -> np.ndarray:
    """Positions whose states differ in some layer: elsewhere a patch between two runs cannot do
    anything. None where the runs are not of one length: their positions do not correspond.

    limit: at most so many, spread evenly, the first and the last among them."""
    if hidden.shape[1] != other.shape[1]:
        return np.empty(0, dtype=int)
    changed = np.flatnonzero((measured(hidden) != measured(other)).any(axis=(0, 2)))
    if limit is None or len(changed) <= limit:
        return changed
    return changed[np.unique(np.linspace(0, len(changed) - 1, limit).round().astype(int))]


def affordable(
    seconds: float, states: Sequence[int], positions: Sequence[int], budget: float = PATCH_SECONDS
) -> tuple[list[int], list[int]]:
    """(states, positions) of the patches that fit into `budget` seconds when one run takes
    `seconds`: all, or fewer of both, spread evenly, the first and the last among them. What was
    reckoned, and what is left out, is printed."""
    states, positions = list(states), list(positions)
    reckoned, n = seconds * len(states) * len(positions), len(states) * len(positions)
    if reckoned <= budget:
        return states, positions
    while seconds * len(states) * len(positions) > budget and len(states) * len(positions) > 4:
        longer = states if len(states) >= len(positions) else positions
        longer[:] = [
            longer[i] for i in np.linspace(0, len(longer) - 1, len(longer) - 1).astype(int)
        ]
    print(
        f"{n} patched runs would take about {reckoned:,.0f} s: {len(states)} states at "
        f"{len(positions)} positions are tried, about {seconds * len(states) * len(positions):,.0f} s."
    )
    return states, positions


def patch_map(
    run: Callable[[int, list[int]], xr.DataArray],
    states: Sequence[int],
    positions: Sequence[int],
    answers: Sequence[int],
    leads: Sequence[float],
    noise: float = NOISE,
    progress: bool = True,
) -> xr.DataArray:
    """Activation patching (the layout of Meng et al. 2022): what every single patch brings back of
    the source's answer. (layer, position) shares, see `restored`.

    run: (state, positions) -> logits (token, vocab) of the run with that state replaced there;
    answers: two token ids; leads: the first's lead over the second in the source's run and in the
    run that is patched (logits)."""
    from tqdm.auto import tqdm

    tries = tqdm(
        [(state, position) for state in states for position in positions],
        desc="patches",
        disable=not progress,
    )
    found = [answer_difference(run(state, [position]), answers) for state, position in tries]
    source, target = leads
    shares = restored(found, target, source, noise).reshape(len(states), len(positions))
    coords = {"layer": list(states), "position": list(positions)}
    return xr.DataArray(shares, coords, dims=("layer", "position"))


def generation_table(captured: Capture, lens_data: xr.Dataset) -> pd.DataFrame:
    """One row per generated token, from the position that predicted it: position, piece,
    probability that the model gave it, entropy (nats) of the model's output, settled (layer from
    which on the lens names the output's best token), lens_entropy (nats, mean over layers).

    captured: a Capture with logits, of generate=; lens_data: lens.lens; both of those positions, at
    least."""
    new = captured.tokens.iloc[captured.n_prompt :]
    before = new.index.to_numpy() - 1
    at = np.searchsorted(lens_data["position"].values, before)
    logp = log_softmax(logits_at(captured["logits"], before))
    return pd.DataFrame(
        {
            "position": new.index,
            "piece": new["piece"].to_numpy(),
            "probability": np.exp(logp[np.arange(len(new)), new["id"]]),
            "entropy": entropy(np.exp(logp)),
            "settled": settled(lens_data)[at],
            "lens_entropy": lens_data["entropy"].isel(token=at).mean("layer").values,
        }
    )
