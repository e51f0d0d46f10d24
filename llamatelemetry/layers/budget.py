"""What of a sweep over layers a stated time allows, and of logits a stated memory, reckoned
before it is begun."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from ..files.gguf import GGUFFile

SWEEP_SECONDS = 120.0  # that the ablations of all layers may take together
FEW = 48  # tokens that are read whatever they take; beyond, tokens give way before layers do
LOGITS_BYTES = 1e8  # of every token, where only the last one's are read
Edits = TypeVar("Edits")


def last_logits(
    model: GGUFFile, n_token: int, max_bytes: float = LOGITS_BYTES
) -> dict[str, list[int]]:
    """positions= of engine.capture for logits of which the last token's are read: {}, all, while
    they take at most max_bytes, else the last position, which is printed."""
    whole = 4 * n_token * model.n_vocab
    if whole <= max_bytes:
        return {}
    print(
        f"Logits of all {n_token:,} tokens would take {whole / 1e9:.1f} GB: where only the last "
        "token's are read, only those are captured."
    )
    return {"logits": [n_token - 1]}


def sweepable(
    sweep: Callable[..., object],
    ids: Sequence[int],
    variants: Mapping[str, Edits],
    seconds: float = SWEEP_SECONDS,
) -> tuple[list[int], dict[str, Edits]]:
    """(ids, variants) of a sweep that fits into so many seconds: all, or the first of the tokens,
    FEW at least, and where that is not enough fewer layers, spread evenly, the first and the last
    among them. What was reckoned, and what is left out, is printed.

    sweep: InferenceEngine.sweep, with which the time of one run is measured here, of FEW tokens and
    of all; variants: states.ablations of them."""
    tokens, n, runs = list(ids), len(ids), len(variants) + 1
    few = min(n, FEW)
    short = min(_seconds(sweep, tokens[:few]) for _ in range(2))  # the first wakes the worker
    whole = _seconds(sweep, tokens) if n > few else short
    if runs * whole <= seconds:
        return tokens, dict(variants)
    # Between the two it grows no faster than on a straight line, whole and short its ends
    share = (seconds / runs - short) / (whole - short) if whole > short else 0.0
    kept = few + int(np.clip(share, 0, 1) * (n - few))
    each = short + (whole - short) * (kept - few) / max(1, n - few)
    layers = sorted({_layer(name) for name in variants})
    tried = layers
    if layers and runs * each > seconds * 1.001:
        most = (seconds / each - 1) * len(layers) / len(variants)
        places = np.linspace(0, len(layers) - 1, max(2, min(len(layers), int(most))))
        tried = [layers[place] for place in sorted(set(places.round().astype(int)))]
    chosen = {name: edits for name, edits in variants.items() if _layer(name) in tried}
    listed = "all layers" if tried == layers else f"layers {', '.join(map(str, tried))}"
    print(
        f"{runs} runs of {n:,} tokens would take about {runs * whole:,.0f} s: {listed} are tried on "
        f"{'all' if kept == n else f'the first {kept:,}'} tokens, about {(len(chosen) + 1) * each:,.0f} s."
    )
    return tokens[:kept], chosen


def _seconds(sweep, ids):
    started = time.perf_counter()
    sweep(ids, {}, progress=False)
    return time.perf_counter() - started


def _layer(name):
    return int(name.split()[1])
