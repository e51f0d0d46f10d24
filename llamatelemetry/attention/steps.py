"""Recompute one layer's attention from captured inputs and compare it with the captured outputs,
step by step."""

from typing import NamedTuple

import numpy as np
import pandas as pd

from .. import rounding
from ..capture.data import Capture
from ..errors import CaptureError
from ..files.gguf import GGUFFile
from ..maths import softmax
from ..norms import normalized
from . import patterns, weights
from .cached import as_cached

STAGES = (
    "hidden",
    "attn_norm",
    "q_pre",
    "k_pre",
    "q",
    "k",
    "v",
    "scores",
    "attention",
    "attn_heads",
    "attn_out",
)

# Relative differences (L2) that the runtime's own rounding explains. Float operations differ in
# summation order. The KV cache holds keys and values in 16 bits. A matrix product with quantized
# weights also rounds its input to 8 bits, which a product of dequantized weights in NumPy does not:
# that gap is the runtime's, and it is shown, not hidden. So does a product with quantized keys,
# which are recomputed as the cache has them, and the softmax carries it on. A GPU multiplies 32-bit
# floats as TF32, whose fractions have 10 bits as those of 16-bit floats have.
TOLERANCE = {"float": 1e-5, "16-bit cache": 2e-3, "16-bit weights": 1e-2, "TF32": 1e-2}
TOLERANCE["quantized keys"] = 2e-2


class Softmax(NamedTuple):
    """What a layer's softmax does to q·k, as llama.cpp's graph has it; None where there is no such
    thing."""

    scale: float
    softcap: float | None
    window: int | None


class Step(NamedTuple):
    """One step, recomputed: `mine` is compared with the captured `stage`."""

    name: str
    inputs: str
    mine: np.ndarray
    stage: str
    kind: str
    tolerance: float | None = None  # None: of the kind


def layer_facts(captured: Capture, gguf: GGUFFile, layer: int) -> Softmax:
    """Scale, soft-cap and window of a layer's softmax.

    captured: a Capture, whose `layers` table says kind, scale, softcap, sliding. Raises
    CaptureError for a layer that is not softmax attention over q and k alone."""
    facts = captured.layers.loc[layer]
    found = {
        "no softmax attention": facts["kind"] != "attention",
        "position biases (ALiBi)": facts["max_bias"],
        "learned sink logits": facts["sinks"],
    }
    odd = next((name for name, there in found.items() if there), None)
    if odd:
        raise CaptureError(
            f"LAYER = {layer} of this {gguf.architecture} model has {odd}: its weights cannot be recomputed from q "
            "and k. Choose another LAYER, or another MODEL."
        )
    window = gguf.sliding_window if facts["sliding"] else None
    return Softmax(float(facts["scale"]), float(facts["softcap"]) or None, window)


def check_steps(captured: Capture, gguf: GGUFFile, layer: int) -> pd.DataFrame:
    """Every step of a layer's attention, recomputed from the captured input of that step alone.

    captured: a Capture of the whole prompt with STAGES; scores and attention may be of some rows:
    those of scores are recomputed, and attention has them.
    Returns a DataFrame, one row per step: step, inputs, shape, max_difference, relative_difference
    (L2), kind (the rounding that applies), tolerance, agrees. Nothing is raised: the caller
    asserts."""
    at = {stage: np.asarray(captured[stage].sel(layer=layer)) for stage in STAGES}
    at["embedding"] = np.asarray(captured["hidden"].sel(layer=0))
    rows = patterns.query_positions(captured["scores"])
    there = np.isin(patterns.query_positions(captured["attention"]), rows)
    at["attention"] = at["attention"][:, there]
    at["rows"], at["attn_heads of rows"] = rows, at["attn_heads"][:, rows]
    at["cache"] = captured.layers.loc[layer].reindex(["key_type", "key_turn"]).fillna(0)
    gpu, facts = captured.model.gpu, layer_facts(captured, gguf, layer)
    steps = [
        *_inputs(at, captured.tokens["id"], gguf, layer),
        *_projections(at, gguf, layer, gpu),
        *_rotations(at, gguf),
        *_weights(at, facts),
        *_outputs(at, gguf, layer, gpu),
    ]
    return pd.DataFrame([_compared(step, at[step.stage]) for step in steps])


def _compared(step, theirs):
    theirs = theirs.astype(np.float64)
    difference = np.asarray(step.mine) - theirs
    relative = float(np.linalg.norm(difference) / (np.linalg.norm(theirs) or 1.0))
    tolerance = TOLERANCE[step.kind] if step.tolerance is None else step.tolerance
    return {
        "step": step.name,
        "inputs": step.inputs,
        "shape": " x ".join(map(str, theirs.shape)),
        "max_difference": float(np.abs(difference).max()),
        "relative_difference": relative,
        "kind": step.kind,
        "tolerance": tolerance,
        "agrees": relative <= tolerance,
    }


def _inputs(at, ids, gguf, layer):
    if not {"token_embd_norm.weight", "position_embd.weight"} & set(gguf.tensors.index):
        rows = gguf.rows("token_embd.weight", ids)
        # Gemma scales its embeddings; a factor for all is allowed for, a change of direction is
        # not.
        rows = rows * (np.linalg.norm(at["embedding"]) / np.linalg.norm(rows))
        yield Step("embedding rows", "token ids", rows, "embedding", "float")
    normed = normalized(at["hidden"], gguf, f"blk.{layer}.attn_norm")
    yield Step("norm", "hidden", normed, "attn_norm", "float")


def _projections(at, gguf, layer, gpu):
    matrices = weights.projection_weights(gguf, layer)
    normed = at["attn_norm"].astype(np.float64)
    parts = weights.project_qkv(normed, gguf, layer)
    for name, stage in (("q", "q_pre"), ("k", "k_pre"), ("v", "v")):
        rounds = _rounding(gguf, layer, name, normed, *matrices[name], gpu)
        yield Step(f"project to {name}", "attn_norm", parts[name], stage, *rounds)


def _rotations(at, gguf):
    if gguf.metadata.get(f"{gguf.architecture}.rope.scaling.type") == "yarn":
        return  # it mixes two rotations: not recomputed, no row
    for name, kind in (("q", "float"), ("k", "16-bit cache")):
        turned = weights.fitted_rope(at[f"{name}_pre"], at[name], gguf)[2]
        # Positions are radians: an angle of so many has 24 bits in the runtime.
        far = turned.shape[1] * 2.0**-24
        yield Step(f"RoPE on {name}", f"{name}_pre", turned, name, kind, TOLERANCE[kind] + far)


def _weights(at, facts):
    keys = as_cached(at["k"], *at["cache"])
    steps = patterns.attend(at["q"], keys, at["v"], queries=at["rows"], **facts._asdict())
    # What lies behind the mask never reaches the softmax: the runtime's scores there are not
    # compared.
    allowed = np.isfinite(steps["masked"].values)
    scores = np.where(allowed, steps["scores"], at["scores"])
    kind = "16-bit cache" if at["cache"].iloc[0] in ("f16", "f32", 0) else "quantized keys"
    yield Step("scores q·k", "q, k", scores, "scores", kind)
    scaled = patterns.softcapped(at["scores"].astype(np.float64), facts.softcap) * facts.scale
    mine = softmax(np.where(allowed, scaled, -np.inf))
    yield Step("scale, mask, softmax", "scores", mine, "attention", "float")
    yield Step("q and k to attention", "q, k", steps["attention"], "attention", kind)


def _outputs(at, gguf, layer, gpu):
    group = [patterns.kv_head(h, gguf.n_head, gguf.n_kv_head) for h in range(gguf.n_head)]
    mixed = at["attention"] @ at["v"][group]
    yield Step("weighted values", "attention, v", mixed, "attn_heads of rows", "16-bit cache")
    heads = at["attn_heads"].astype(np.float64)
    joined = heads.transpose(1, 0, 2).reshape(heads.shape[1], -1)  # (token, head * feature)
    output = weights.project_output(heads, gguf, layer)
    matrix = weights.projection(gguf, layer, "output")
    rounds = _rounding(gguf, layer, "output", joined, *matrix, gpu)
    yield Step("output projection", "attn_heads", output, "attn_out", *rounds)


def _rounding(gguf, layer, part, x, weight, bias, gpu):
    """(kind of rounding, tolerance) of a layer's projection `part`, one of q, k, v, output.

    x: (token, in), what it multiplies. For a quantized matrix the tolerance is twice the relative
    difference that rounding x to 8 bits gives (see `rounding`), + 1e-3 because the steps are kept
    in 16 bits."""
    prefix, types = f"blk.{layer}.", gguf.tensors["type"]
    name = f"{prefix}attn_{part}.weight"
    file_type = types[name if name in types.index else f"{prefix}attn_qkv.weight"]
    floats = {"F32": "TF32" if gpu else "float", "F16": "16-bit weights", "BF16": "16-bit weights"}
    if file_type in floats:
        return floats[file_type], TOLERANCE[floats[file_type]]
    exact = x @ weight.T.astype(np.float64) + (0.0 if bias is None else bias)
    off = rounding.deviation(x, weight, file_type, gpu)
    norm, size = f"attn_{part}_norm", gguf.head_dim
    if part == "output":
        norm, size = "post_attention_norm", len(weight)
    # A norm after the product scales rows, and with them their errors.
    if f"{prefix}{norm}.weight" in types.index:
        rows = exact.reshape(-1, size)
        length = np.sqrt(np.mean(rows**2, axis=1, keepdims=True))
        factor = gguf.tensor(f"{prefix}{norm}.weight") / length
        off, exact = off.reshape(-1, size) * factor, rows * factor
    return "quantized", 2 * float(np.linalg.norm(off) / np.linalg.norm(exact)) + 1e-3
