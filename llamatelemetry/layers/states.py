"""The residual stream layer by layer: magnitudes, outliers, sparsity, what each block adds, which
layers matter.

hidden is (layer 0..n, token, embd), 0 what enters the first layer; attn_out and ffn_out are (layer,
token, embd). The first token is kept apart: its state is often hundreds of times longer than the
others' (Sun et al. 2024)."""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import xarray as xr

from ..capture.edits import Edit, ablate_layer
from ..capture.finite import measured
from ..maths import rank_correlation, ratio

MASSIVE_VALUE, MASSIVE_RATIO = 100.0, 1000.0  # Sun et al. 2024, arXiv:2402.17762
CKA_ELEMENTS = 1 << 24  # of products that are held at once


def _stream(hidden):
    """hidden, checked; ValueError for fewer than two tokens, because the first is kept apart. Who
    needs double precision takes it state by state: a long text's states are gigabytes."""
    h = measured(hidden)
    if h.ndim != 3 or h.shape[1] < 2:
        raise ValueError(
            f"hidden must be (layer, token, embd) with at least two tokens, not of shape {h.shape}"
        )
    return h


def _lengths(states):
    """Lengths of states, float64: (layer, token, embd) -> (layer, token)."""
    return np.stack([np.linalg.norm(one.astype(np.float64), axis=-1) for one in states])


def norm_table(hidden: xr.DataArray) -> pd.DataFrame:
    """Length of the stream: DataFrame indexed by layer (0..n): first (the first token's), and low,
    median, high (10th, 50th and 90th percentile) over the other tokens."""
    norms = _lengths(_stream(hidden))
    low, median, high = np.quantile(norms[:, 1:], [0.1, 0.5, 0.9], axis=1)
    columns = {"first": norms[:, 0], "low": low, "median": median, "high": high}
    return pd.DataFrame(columns).rename_axis("layer")


def massive_activations(hidden: xr.DataArray, pieces: Sequence) -> pd.DataFrame:
    """Values larger than 100 and at least 1,000 times the median magnitude of their layer (Sun et
    al. 2024).

    DataFrame, the largest first: layer, position, piece, dim, value, ratio (to the median).
    """
    parts = []
    for layer, one in enumerate(_stream(hidden)):
        size = np.abs(one)
        median = float(np.median(size))
        token, dim = np.nonzero((size > MASSIVE_VALUE) & (size >= MASSIVE_RATIO * median))
        part = pd.DataFrame({"layer": np.full(len(token), layer), "position": token})
        part["piece"] = pd.Series([pieces[int(t)] for t in token], dtype=object)
        part["dim"] = dim
        part["value"] = one[token, dim].astype(np.float64)
        parts.append(part.assign(ratio=part["value"].abs() / median))
    table = pd.concat(parts, ignore_index=True)
    return table.sort_values("ratio", ascending=False, ignore_index=True)


def magnitude_quantiles(
    hidden: xr.DataArray, quantiles: Sequence[float] = (0.5, 0.9, 0.99, 0.999, 1.0)
) -> pd.DataFrame:
    """Quantiles of the magnitude of the stream's values: DataFrame indexed by layer, one column per
    quantile, over the tokens after the first; first: the largest of the first token."""
    h = _stream(hidden)
    values = [np.quantile(np.abs(one[1:]).astype(np.float64), quantiles) for one in h]
    table = pd.DataFrame(values, columns=list(quantiles))
    return table.assign(first=np.abs(h[:, 0]).max(-1)).rename_axis("layer")


def ffn_sparsity(
    ffn_act: xr.DataArray,
    widths: Sequence[int] | None = None,
    energy: float = 0.9,
    small: float = 0.01,
) -> pd.DataFrame:
    """How few neurons of the feed-forward blocks are active: DataFrame indexed by layer, means over
    the tokens.

    ffn_act: (layer, token, neuron), what the down projection multiplies; widths: neurons of each
    layer where they differ. zero: share exactly 0; small: share below 1% of the token's largest;
    needed: share of the neurons that hold 90% of the sum of squares; largest: share of the sum of
    squares held by the largest neuron."""
    rows = []
    for i, layer in enumerate(ffn_act["layer"].values):
        a = np.abs(measured(ffn_act.isel(layer=i), np.float64))  # (token, neuron)
        a = a if widths is None else a[:, : widths[layer]]
        power = -np.sort(-(a**2), axis=1)
        total = np.maximum(power.sum(1, keepdims=True), 1e-300)
        needed = 1 + (np.cumsum(power, axis=1) < energy * total).sum(1)
        below = (a < small * a.max(1, keepdims=True)).mean()
        largest = (power[:, :1] / total).mean()
        rows.append((layer, (a == 0).mean(), below, needed.mean() / a.shape[1], largest))
    columns = ["layer", "zero", "small", "needed", "largest"]
    return pd.DataFrame(rows, columns=columns).set_index("layer")


def additions(
    hidden: xr.DataArray, attn_out: xr.DataArray, ffn_out: xr.DataArray
) -> list[np.ndarray]:
    """What the blocks of every layer add, float64 (layer, token, embd) each; zeros where a layer
    has no such block."""
    n = len(hidden) - 1
    parts = []
    for stage in (attn_out, ffn_out):
        part = np.zeros((n, *hidden.shape[1:]))
        part[stage["layer"].values] = measured(stage)
        parts.append(part)
    return parts


def sum_error(hidden: xr.DataArray, attn_out: xr.DataArray, ffn_out: xr.DataArray) -> pd.DataFrame:
    """How far embedding + all additions up to a layer is from the captured stream: DataFrame
    indexed by layer (1..n): error, the largest difference; relative, to the largest value of the
    layer. Float32 rounding gives about 1e-6."""
    h, parts = measured(hidden), _parts(attn_out, ffn_out)
    summed, rows = h[0].astype(np.float64), []
    for layer in range(len(h) - 1):
        for part in parts:
            summed += part.get(layer, 0.0)
        error, largest = np.abs(summed - h[layer + 1]).max(), np.abs(h[layer + 1]).max()
        rows.append((error, error / max(float(largest), 1e-30)))
    table = pd.DataFrame(rows, columns=["error", "relative"])
    return table.set_axis(pd.RangeIndex(1, len(h), name="layer"))


def _parts(*stages):
    """[{layer: (token, embd)}] of what blocks add, as captured: a long text in double precision is
    gigabytes."""
    return [dict(zip(stage["layer"].values.tolist(), measured(stage))) for stage in stages]


def contributions(
    hidden: xr.DataArray, attn_out: xr.DataArray, ffn_out: xr.DataArray
) -> xr.Dataset:
    """What attention and FFN add, against the stream they add to: Dataset of (part, layer, token).

    norm: length of the addition; relative: over the length of the stream before it; cosine: of
    addition and stream. NaN where a layer has no such block."""
    h, parts, rows = measured(hidden), _parts(attn_out, ffn_out), []
    for layer in range(len(h) - 1):  # one layer at a time in double precision
        before = h[layer].astype(np.float64)
        for part in parts:
            added = np.zeros_like(before) + part.get(layer, 0.0)
            lengths = np.linalg.norm(added, axis=-1), np.linalg.norm(before, axis=-1)
            rows.append((*lengths, (added * before).sum(-1)))
            before = before + added
    shape = (len(h) - 1, 2, 3, h.shape[1])
    norm, length, product = np.reshape(rows, shape).transpose(2, 1, 0, 3)  # (part, layer, token)
    norm[norm == 0] = np.nan
    dims = ("part", "layer", "token")
    data = {
        "norm": norm,
        "relative": ratio(norm, length),
        "cosine": ratio(product, norm * length),
    }
    return xr.Dataset(
        {name: (dims, values) for name, values in data.items()},
        coords={"part": ["attention", "ffn"], "layer": np.arange(len(h) - 1)},
    )


def projection(
    hidden: xr.DataArray, attn_out: xr.DataArray, ffn_out: xr.DataArray, position: int = -1
) -> pd.DataFrame:
    """Which layers write the final state of one token: x . final / |final|^2 of every addition.

    DataFrame indexed by layer: attention, ffn, cumulative (embedding and everything up to the
    layer); attrs: embedding. The last cumulative value is 1 where nothing else writes the stream.
    """
    h = measured(hidden)[:, position].astype(np.float64)
    final = ratio(h[-1], h[-1] @ h[-1])
    one = (x.isel(token=[position]) for x in (hidden, attn_out, ffn_out))
    attention, ffn = (part[:, 0] @ final for part in additions(*one))
    table = pd.DataFrame({"attention": attention, "ffn": ffn}).rename_axis("layer")
    table["cumulative"] = h[0] @ final + (table["attention"] + table["ffn"]).cumsum()
    table.attrs["embedding"] = float(h[0] @ final)
    return table


def block_influence(hidden: xr.DataArray) -> pd.DataFrame:
    """1 - cosine of what enters and what leaves a layer, mean over tokens: Block Influence (Men et
    al. 2024, arXiv:2403.03853). DataFrame indexed by layer: influence, over the tokens after the
    first; first: of that one."""
    h = _stream(hidden)
    lengths = np.maximum(_lengths(h), 1e-300)
    products = [(a.astype(np.float64) * b).sum(-1) for a, b in zip(h[:-1], h[1:])]
    change = 1 - np.stack(products) / lengths[:-1] / lengths[1:]  # (layer, token)
    table = pd.DataFrame({"influence": change[:, 1:].mean(1), "first": change[:, 0]})
    return table.rename_axis("layer")


def cka_map(
    hidden: xr.DataArray, other: xr.DataArray | None = None, seed: int = 0
) -> tuple[np.ndarray, float]:
    """Linear centred kernel alignment (Kornblith et al. 2019), 0 to 1, between all layers, without
    the first token: (map (layer, layer of other), chance).

    other: states of the same tokens in another run or model (None: of the same). chance: the mean
    over layers of the CKA of a layer with itself after its tokens were shuffled. With fewer tokens
    than dimensions it is far from 0. NaN where all tokens after the first have one state: what does
    not vary is like nothing."""

    a = _stream(hidden)[:, 1:]
    b = a if other is None else _stream(other)[:, 1:]
    order = np.random.default_rng(seed).permutation(a.shape[1])
    products, own, theirs, shuffled = 0.0, 0.0, 0.0, 0.0
    # Of a long text (token, token) matrices of all layers are gigabytes: some of their rows at a
    # time, whose products add up.
    step = max(1, CKA_ELEMENTS // ((len(a) + len(b)) * a.shape[1]))
    for start in range(0, a.shape[1], step):
        rows = slice(start, start + step)
        first = _gram_rows(a, rows)  # (layer, row, token)
        second = first if other is None else _gram_rows(b, rows)
        products += np.einsum("ist,jst->ij", first, second, optimize=True)
        own += (first**2).sum(axis=(1, 2))
        theirs += (second**2).sum(axis=(1, 2))
        shuffled += (first * _gram_rows(a[:, order], rows)).sum(axis=(1, 2))
    similarity = ratio(products, np.sqrt(np.outer(own, theirs)))
    return similarity, float(ratio(shuffled, own).mean())


def _gram_rows(states, rows):
    """Rows of the centred (token, token) products of every layer, float64: (layer, row, token)."""
    found = []
    for one in states:
        one = one - one.mean(axis=0, dtype=np.float64)
        found.append(one[rows] @ one.T)
    return np.stack(found)


def ablations(attention: Iterable[int], ffn: Iterable[int]) -> dict[str, list[Edit]]:
    """What engine.sweep tries to see which layers matter: {"attention 3": edits, "ffn 3": ..}, and
    "both 3", for the layers that have that block."""
    edits = {f"attention {layer}": ablate_layer(layer, "attention") for layer in attention}
    edits |= {f"ffn {layer}": ablate_layer(layer, "ffn") for layer in ffn}
    layers = sorted({int(name.split()[1]) for name in edits})
    both = {
        layer: [edits[name] for name in (f"attention {layer}", f"ffn {layer}") if name in edits]
        for layer in layers
    }
    return edits | {f"both {layer}": sum(parts, []) for layer, parts in both.items()}


def layer_importance(hidden: xr.DataArray, sweep: pd.DataFrame) -> pd.DataFrame:
    """Block Influence beside what ablation does: DataFrame indexed by layer: influence, and the
    rise of the loss (nats per token) without the layer's attention, ffn and both.

    sweep: DataFrame of engine.sweep with the `ablations`. attrs["spearman"]: rank correlations of
    influence with each of the three."""
    table, correlations = block_influence(hidden)[["influence"]], {}
    for part in ("attention", "ffn", "both"):
        named = sweep["loss_change"].items()
        rows = {int(name.split()[1]): value for name, value in named if name.startswith(f"{part} ")}
        table[part] = pd.Series(rows, dtype=float)
        correlations[part] = rank_correlation(table["influence"], table[part])
    table.attrs["spearman"] = correlations
    return table
