"""The logit lens: residual stream -> logits through the file's own final norm and output matrix.

nostalgebraist (2020), "interpreting GPT: the logit lens". The matrix is dequantized in blocks of
rows, and only sums over the vocabulary are kept: a vocabulary of 262,144 tokens never stands in
memory at full width."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from .. import rounding
from ..capture.data import Capture
from ..capture.finite import measured
from ..errors import CaptureError
from ..files.gguf import GGUFFile
from ..maths import blocks
from ..norms import centred, divisor, gain_and_bias, normalized
from ..views.packing import ends

Ids = Sequence[int] | NDArray[np.integer]  # of tokens
_ELEMENTS = 1 << 24  # logits of one block: rows of the stream x tokens of the vocabulary
LENS_SECONDS = 60.0  # beyond, it reads fewer tokens
ROWS = 4096  # states of tokens that are read without reckoning
NORM_NAMES = ("output_norm", "token_embd_norm")  # LFM2 keeps its final norm under the second name


@dataclass(frozen=True)
class Unembedding:
    """logits = softcap(scale * (W (multiplier * norm(x)) + output_bias)).

    gguf: the file that W and the final norm are read from; norm: the name of that norm in it;
    output_bias: (vocab,) or 0; softcap: None or the c of c tanh(x / c)."""

    gguf: GGUFFile
    norm: str
    multiplier: float = 1.0
    scale: float = 1.0
    softcap: float | None = None
    output_bias: np.ndarray | float = 0.0

    def normalize(self, x: ArrayLike) -> np.ndarray:
        """What the output matrix multiplies, from states of the residual stream. (.., embd) -> (..,
        embd) float64"""
        return self.multiplier * normalized(measured(x), self.gguf, self.norm)

    def rows(self, ids: Ids) -> np.ndarray:
        """Rows of the output matrix W. (n, embd) float64"""
        return self.gguf.rows(self.gguf.output_name, ids).astype(np.float64)

    def offset(self, ids: Ids | slice) -> np.ndarray | float:
        """The output's bias of the tokens `ids`: (n,), or 0 where the file has none."""
        bias = self.output_bias
        return bias[ids] if isinstance(bias, np.ndarray) else bias

    def finish(self, products: np.ndarray, ids: Ids | slice) -> np.ndarray:
        """Products with rows `ids` of W -> logits. (.., n) -> (.., n)"""
        logits = self.scale * (products + self.offset(ids))
        return logits if not self.softcap else self.softcap * np.tanh(logits / self.softcap)

    def uncapped(self, logits: np.ndarray) -> np.ndarray:
        """Logits as they were before the soft-cap."""
        if not self.softcap:
            return logits
        return self.softcap * np.arctanh(np.clip(logits / self.softcap, -1 + 1e-9, 1 - 1e-9))

    def logits(self, x: ArrayLike, ids: Ids) -> np.ndarray:
        """Logits of the tokens `ids` for states x. (.., embd) -> (.., n)"""
        return self.finish(self.normalize(x) @ self.rows(ids).T, ids)


def unembedding(gguf: GGUFFile, captured: Capture) -> Unembedding:
    """The Unembedding of a file, checked against what the runtime computed.

    captured: a Capture with hidden, final_norm and logits (of some positions, at least) of one run
    of that file. A constant
    factor after the norm, and how the file's logit_scale is applied (some architectures multiply,
    some divide), are decided by what reproduces the capture. CaptureError where nothing does: the
    lens would then show another model's answer."""
    state = measured(captured["hidden"].isel(layer=-1), np.float64)  # (token, embd)
    final = measured(captured["final_norm"], np.float64)
    names = (name for name in NORM_NAMES if f"{name}.weight" in gguf.tensors.index)
    norm = next(names, NORM_NAMES[0])
    mine = normalized(state, gguf, norm)
    factor = float((mine * final).sum() / (mine * mine).sum())
    error = np.linalg.norm(factor * mine - final) / np.linalg.norm(final)
    if error > 1e-3:
        raise CaptureError(
            f"final_norm of architecture {gguf.architecture!r} is not the norm of the last state that "
            f"its file describes (relative difference {error:.2g}): no logit lens for it."
        )
    factor = 1.0 if abs(factor - 1) < 1e-3 else factor
    bias = gain_and_bias(gguf, "output")[1]
    head = Unembedding(gguf, norm, factor, 1.0, gguf.final_logit_softcap, bias)
    logits = captured["logits"]
    return _with_scale(head, final[positions_of(logits)], measured(logits))


def positions_of(captured: xr.DataArray, dim: str = "token") -> np.ndarray:
    """Position in the text of each token, or query, of a captured stage, int (dim,): all, or those
    that were captured."""
    known = f"{dim}_position" in getattr(captured, "coords", ())
    return captured[f"{dim}_position"].values if known else np.arange(captured.shape[-2])


def logits_at(logits: xr.DataArray, positions: ArrayLike) -> np.ndarray:
    """Rows of captured logits by their positions in the text, (position, vocab). CaptureError where
    one of them was not captured."""
    there, asked = positions_of(logits), np.asarray(positions)
    if len(missing := np.setdiff1d(asked, there)):
        raise CaptureError(
            f"the capture has no logits of position {missing[0]}: name it in its positions=."
        )
    rows = np.searchsorted(there, asked)
    return measured(logits) if len(rows) == len(there) else measured(logits)[rows]


def _with_scale(head, final, logits):
    # A grid over the vocabulary is enough.
    ids = np.unique(np.linspace(0, logits.shape[1] - 1, 512).astype(int))
    captured = head.uncapped(logits[:, ids].astype(np.float64))
    mine = final @ head.rows(ids).T + head.offset(ids)
    fitted = float((mine * captured).sum() / (mine * mine).sum())
    stated = head.gguf.metadata.get(f"{head.gguf.architecture}.logit_scale") or 1.0
    scale = min((1.0, stated, 1.0 / stated), key=lambda s: abs(s - fitted))
    if abs(scale - fitted) > 0.02 * abs(scale):
        raise CaptureError(
            f"the logits of architecture {head.gguf.architecture!r} are {fitted:.4g} times final_norm "
            f"times {head.gguf.output_name}, and its file does not say so: no logit lens for it."
        )
    return replace(head, scale=scale)


def logit_error(
    head: Unembedding, captured: Capture, positions: np.ndarray | None = None
) -> pd.DataFrame:
    """The lens of the last layer against the captured logits: DataFrame per position (error,
    tolerance, ratio).

    error: the largest difference of a logit; tolerance: what the runtime's rounding can do to that
    logit; ratio: the largest error / tolerance over the vocabulary, above 1 where the lens is not
    the model's. See `rounding`. positions: default at most 8, evenly over those whose logits were
    captured."""
    state = measured(captured["hidden"].isel(layer=-1), np.float64)
    if positions is None:
        there = positions_of(captured["logits"])
        positions = there[np.unique(np.linspace(0, len(there) - 1, 8).astype(int))]
    x = head.normalize(state[positions])
    logits = logits_at(captured["logits"], np.arange(len(state))[positions])
    kind = head.gguf.tensors.loc[head.gguf.output_name, "type"]
    gpu, largest = captured.model.gpu, np.abs(logits).max()
    worst, error, allowed = (np.zeros(len(positions)) for _ in range(3))
    for start, weights in head.gguf.iter_rows(head.gguf.output_name, 4096):
        ids = slice(start, start + len(weights))
        w = weights.astype(np.float64)
        difference = np.abs(head.finish(x @ w.T, ids) - logits[:, ids])
        tolerance = rounding.logit_tolerance(head.scale * x, w, kind, gpu, largest)
        worst = np.maximum(worst, (difference / tolerance).max(1))
        at = difference.argmax(1)
        larger = difference.max(1) > error
        allowed = np.where(larger, tolerance[np.arange(len(at)), at], allowed)
        error = np.maximum(error, difference.max(1))
    index = pd.Index(positions, name="position")
    return pd.DataFrame({"error": error, "tolerance": allowed, "ratio": worst}, index)


def lens(
    head: Unembedding,
    hidden: xr.DataArray,
    targets: ArrayLike | None,
    final_logits: xr.DataArray | None = None,
    k: int = 5,
    positions: ArrayLike | None = None,
    progress: bool = False,
) -> xr.Dataset:
    """The logit lens at every layer and token, or at the tokens of some positions.

    hidden: (layer, token, embd); targets: (token,) ids, one per position, None: what final_logits
    put first; final_logits: (token, vocab), captured, of the positions that are read at least.
    Returns a Dataset of (layer, token): probability, rank (0 is best) and logit of the target,
    entropy (nats), kl: KL(model's output || lens) in nats (with final_logits; Belrose et al. 2023);
    (layer, token, top): top ids and top_probability of the k best; coordinate position."""
    from tqdm.auto import tqdm

    read = np.arange(hidden.shape[1]) if positions is None else np.asarray(positions)
    final = None if final_logits is None else logits_at(final_logits, read)  # (token, vocab)
    if targets is not None:
        targets = np.broadcast_to(np.asarray(targets, dtype=np.int64), hidden.shape[1])[read]
    elif final is not None:
        targets = final.argmax(-1)
    else:
        raise ValueError("the lens takes targets, or final_logits whose best they are")
    hidden = hidden if positions is None else hidden[:, read]
    layers, tokens, _ = hidden.shape
    x = np.concatenate([head.normalize(one).astype(np.float32) for one in hidden])  # (row, embd)
    everyone = np.tile(targets, layers)  # (row,)
    n_vocab = head.gguf.tensors.loc[head.gguf.output_name, "shape"][0]
    size = int(np.clip(_ELEMENTS // len(x), 256, 8192))
    unique, where = np.unique(targets, return_inverse=True)
    own = _products(head, x, unique)[np.arange(len(x)), np.tile(where, layers)]
    state = _Sums(len(x), k)
    cross, minus_entropy = np.zeros(len(x)), None
    if final is not None:
        minus_entropy = np.zeros(tokens)
        total = _log_sum_exp(final)
    blocks = head.gguf.iter_rows(head.gguf.output_name, size)
    shown = dict(desc="logit lens", unit="block", disable=not progress, leave=False)
    for start, weights in tqdm(blocks, total=-(-n_vocab // size), **shown):
        ids = slice(start, start + len(weights))
        logits = head.finish(x @ weights.T, ids).astype(np.float32)
        state.add(logits, start, own, everyone)
        if final is not None and minus_entropy is not None:
            model = (final[:, ids] - total).astype(np.float32)
            p = np.exp(model)
            cross += np.einsum("lts,ts->lt", logits.reshape(layers, tokens, -1), p).ravel()
            minus_entropy += (p * model).sum(-1, dtype=np.float64)
    return _dataset(state, own, cross, minus_entropy, hidden, read)


def readable(head: Unembedding, hidden: xr.DataArray, seconds: float = LENS_SECONDS) -> np.ndarray:
    """Positions that `lens` reads within so many seconds: all, or the first and the last, and then
    what was reckoned is printed. The time grows with states x tokens x vocabulary x width; what a
    part of it takes is measured here. hidden: (layer, token, embd)."""
    n_state, n_token, width = hidden.shape
    if n_state * n_token <= ROWS:
        return np.arange(n_token)
    name, took = head.gguf.output_name, np.inf
    weights, x = head.gguf.rows(name, slice(0, 2048)), np.ones((256, width), np.float32)
    for _ in range(2):  # the first wakes the libraries
        started, nobody = time.perf_counter(), np.zeros(len(x), dtype=np.int64)
        logits = head.finish(x @ weights.T, slice(0, len(weights))).astype(np.float32)
        _Sums(len(x), 5).add(logits, 0, nobody, nobody)
        took = min(took, time.perf_counter() - started)
    n_vocab = head.gguf.tensors.loc[name, "shape"][0]
    each = took / len(x) * n_vocab / len(weights) * n_state  # seconds of a token
    found = ends(n_token, max(2, min(n_token, int(seconds / each))))
    if len(found) < n_token:
        print(
            f"The lens would take about {each * n_token:,.0f} s for {n_token:,} tokens: it reads the "
            f"first and the last {len(found) - 1}, about {each * len(found):.0f} s."
        )
    return found


def _log_sum_exp(logits):
    """(row, vocab) -> (row, 1) float64, some rows at a time."""
    found = []
    for _, part in blocks(logits, 64):
        high = part.max(-1, keepdims=True)
        found.append(high + np.log(np.exp(part - high).sum(-1, keepdims=True, dtype=np.float64)))
    return np.concatenate(found)


def _products(head, x, ids):
    return head.finish(x @ head.gguf.rows(head.gguf.output_name, ids).T, ids).astype(np.float64)


class _Sums:
    """Running sums over the vocabulary for every row: log-sum-exp, entropy, rank of a target, the k
    best."""

    def __init__(self, n, k):
        self.best = np.full(n, -np.inf)
        self.total, self.weighted, self.rank = np.zeros(n), np.zeros(n), np.zeros(n, dtype=np.int64)
        self.top_logit, self.top = np.full((n, k), -np.inf, np.float32), np.zeros((n, k), np.int64)

    def add(self, logits, start, own, targets):
        rows, k = np.arange(len(logits)), self.top.shape[1]
        high = np.maximum(self.best, logits.max(1))
        shrink, e = np.exp(self.best - high), np.exp(logits - high[:, None].astype(np.float32))
        self.total = self.total * shrink + e.sum(1, dtype=np.float64)
        self.weighted = self.weighted * shrink + (e * logits).sum(1, dtype=np.float64)
        self.best = high
        above = logits > own[:, None].astype(np.float32)
        inside = (targets >= start) & (targets < start + logits.shape[1])
        # A token is not above itself: products of another shape round the last bit otherwise.
        above[rows[inside], targets[inside] - start] = False
        self.rank += above.sum(1)
        here = np.argpartition(-logits, min(k, logits.shape[1]) - 1, axis=1)[:, :k]
        values = np.concatenate([self.top_logit, np.take_along_axis(logits, here, 1)], axis=1)
        ids = np.concatenate([self.top, here + start], axis=1)
        order = np.argsort(-values, axis=1, kind="stable")[:, :k]
        self.top_logit = np.take_along_axis(values, order, 1)
        self.top = np.take_along_axis(ids, order, 1)

    @property
    def lse(self):
        return self.best + np.log(self.total)


def _dataset(state, own, cross, minus_entropy, hidden, read):
    dims, shape, layers = ("layer", "token"), hidden.shape[:2], hidden.shape[0]
    data = {
        "probability": np.exp(own - state.lse),
        "rank": state.rank,
        "logit": own,
        "entropy": np.maximum(state.lse - state.weighted / state.total, 0.0),
    }
    if minus_entropy is not None:
        data["kl"] = np.maximum(np.tile(minus_entropy, layers) - cross + state.lse, 0.0)
    result = {name: (dims, values.reshape(shape)) for name, values in data.items()}
    result["top"] = ((*dims, "best"), state.top.reshape(*shape, -1))
    probability = np.exp(state.top_logit - state.lse[:, None])
    result["top_probability"] = ((*dims, "best"), probability.reshape(*shape, -1))
    numbers = getattr(hidden, "coords", {}).get("layer", range(layers))
    coords = {"layer": np.asarray(numbers), "position": ("token", read)}
    return xr.Dataset(result, coords)


def settled(data: xr.Dataset) -> np.ndarray:
    """(token,) layer from which on the lens's best token is the last layer's, without interruption.
    data: of `lens`."""
    best = data["top"].isel(best=0).values
    same = best == best[-1]  # (layer, token)
    since = np.where(same.all(0), 0, len(same) - np.argmin(same[::-1], axis=0))
    return data["layer"].values[since]


def logit_attribution(
    captured: Capture, head: Unembedding, first: int, second: int, position: int = -1
) -> pd.DataFrame:
    """Direct logit attribution: what each component adds to logit[first] - logit[second] at one
    position.

    The final norm's divisor is kept at the value that this position had, so that the logit is
    linear in the components (Elhage et al. 2021, "A mathematical framework for transformer
    circuits"). Before a soft-cap. Returns a DataFrame (component, layer, value): embedding,
    attention and ffn per layer, bias (of norm and output), and other, what the stream holds beyond
    their sum; the values sum to attrs["total"], which is the lens's own logit difference;
    attrs["captured"]: the runtime's, soft-cap undone."""
    stream = measured(captured["hidden"].isel(token=position), np.float64)  # (layer + 1, embd)
    ids, gguf = [first, second], head.gguf
    direction = np.subtract(*head.rows(ids))  # (embd,)
    gain, bias = gain_and_bias(gguf, head.norm)
    # The mean that a layer norm takes away is taken from what reads instead.
    reader = head.scale * head.multiplier * centred(gain * direction, gguf)
    reader = reader / divisor(stream[-1], gguf)
    rows, rest = [("embedding", -1, stream[0] @ reader)], stream[-1] - stream[0]
    for name, stage in (("attention", "attn_out"), ("ffn", "ffn_out")):
        values = measured(captured[stage].isel(token=position), np.float64)
        layers = captured[stage]["layer"].values
        rows += [(name, int(layer), x @ reader) for layer, x in zip(layers, values)]
        rest = rest - values.sum(0)
    offset = np.subtract(*np.broadcast_to(head.offset(ids), 2))
    constant = head.scale * (head.multiplier * (bias * direction).sum() + offset)
    rows += [("other", -1, rest @ reader), ("bias", -1, constant)]
    table = pd.DataFrame(rows, columns=["component", "layer", "value"])
    ends = head.uncapped(measured(captured["logits"].isel(token=position), np.float64)[ids])
    plain = replace(head, softcap=None).logits(stream[-1], ids)
    table.attrs.update(total=float(plain[0] - plain[1]), captured=float(ends[0] - ends[1]))
    return table
