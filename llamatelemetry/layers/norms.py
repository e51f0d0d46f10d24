"""What the norm before each block does to the stream: scale, direction, and the gain of every
dimension."""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from ..capture.data import Capture
from ..capture.finite import measured
from ..files.gguf import GGUFFile
from ..norms import gain_and_bias, normalized

# The norm's weights under the name that the file gives them: gpt-oss calls its second norm after
# what it follows.
NAMES = {"attention": ("attn_norm",), "ffn": ("ffn_norm", "post_attention_norm", "attn_norm")}
SILENCED = 0.1  # of the median gain
AGREES = 1e-3


def norm_impact(captured: Capture, gguf: GGUFFile) -> pd.DataFrame:
    """Before and after the norm of every block: DataFrame (part, layer), medians over the tokens
    after the first.

    captured: hidden, attn_out, ffn_out and attn_norm and / or ffn_norm. scale: length after over
    length before; cosine: of the state before and after; first_scale: scale of the first token;
    gain_median, gain_max: of the magnitude of the file's weights; silenced: share of dimensions
    whose gain is below a tenth of the median gain; error: relative difference between the norm
    recomputed with those weights and the captured one. NaN in the gains where no tensor of the file
    reproduces the capture."""
    rows = []
    for part, stage in (("attention", "attn_norm"), ("ffn", "ffn_norm")):
        if stage in captured.stages:
            pairs = _pairs(captured, part, stage, gguf)
            rows += [_impact(gguf, part, *one) for one in pairs]
    return pd.DataFrame(rows).set_index(["part", "layer"])


def norm_gain(
    before: np.ndarray, after: np.ndarray, gguf: GGUFFile, part: str, layer: int
) -> tuple[np.ndarray | None, float]:
    """(gain (embd,), relative error) of the tensor that turns `before` into `after`; (None, nan)
    where none does.

    before, after: (token, embd)."""
    best: tuple[np.ndarray | None, float] = (None, np.nan)
    for name in (f"blk.{layer}.{name}" for name in NAMES[part]):
        if f"{name}.weight" not in gguf.tensors.index:
            continue
        mine = normalized(before, gguf, name)
        error = float(np.linalg.norm(mine - after) / np.linalg.norm(after))
        if error < AGREES and not error >= best[1]:
            best = (np.asarray(gain_and_bias(gguf, name)[0]), error)
    return best


def _pairs(captured, part, stage, gguf):
    hidden = captured["hidden"]
    added = captured["attn_out"]
    attention = dict(zip(added["layer"].values.tolist(), measured(added)))
    for i, layer in enumerate(captured[stage]["layer"].values):
        entering = measured(hidden[layer], np.float64)
        after = measured(captured[stage][i], np.float64)
        middle = entering + attention.get(int(layer), 0.0)
        # Parallel blocks norm what enters the layer for the FFN, too.
        if part == "attention" or norm_gain(middle, after, gguf, part, layer)[0] is None:
            yield int(layer), entering, after
        else:
            yield int(layer), middle, after


def _impact(gguf, part, layer, before, after):
    length, now = np.linalg.norm(before, axis=-1), np.linalg.norm(after, axis=-1)
    cosine = (before * after).sum(-1) / np.maximum(length * now, 1e-300)
    gain, error = norm_gain(before, after, gguf, part, layer)
    size = np.full(1, np.nan) if gain is None else np.abs(gain)
    return {
        "part": part,
        "layer": layer,
        "scale": np.median((now / length)[1:]),
        "first_scale": now[0] / length[0],
        "cosine": np.median(cosine[1:]),
        "gain_median": np.median(size),
        "gain_max": size.max(),
        "silenced": np.nan if gain is None else (size < SILENCED * np.median(size)).mean(),
        "error": error,
    }


def dimension_gains(gguf: GGUFFile, layers: Iterable[int], dims: Sequence[int]) -> pd.DataFrame:
    """Gain of chosen dimensions in the first norm of each layer over that norm's median: (layer,
    dim) DataFrame; layers without such a tensor are left out."""
    rows = {}
    for layer in layers:
        name = f"blk.{layer}.attn_norm.weight"
        if name in gguf.tensors.index:
            gain = np.abs(gguf.tensor(name))
            rows[int(layer)] = gain[list(dims)] / np.median(gain)
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(dims)).rename_axis("layer")
