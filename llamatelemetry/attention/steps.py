"""Recompute one layer's attention from captured inputs and compare it with the captured outputs,
step by step."""

import numpy as np
import pandas as pd

from ..capture import rounding
from ..errors import CaptureError
from . import patterns, weights

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
# that gap is the runtime's, and it is shown, not hidden. A GPU multiplies 32-bit floats as TF32,
# whose fractions have 10 bits as those of 16-bit floats have.
TOLERANCE = {"float": 1e-5, "16-bit cache": 2e-3, "16-bit weights": 1e-2, "TF32": 1e-2}


def _projection(gguf, layer, part, x, weight, bias, gpu):
    """(kind of rounding, tolerance) of a layer's projection `part`, one of q, k, v, output.

    x: (token, in), what it multiplies. For a quantized matrix the tolerance is twice the relative
    difference that rounding x to 8 bits gives (see `rounding`), + 1e-3 because the steps are kept
    in 16 bits."""
    prefix, types = f"blk.{layer}.", gguf.tensors["type"]
    name = f"{prefix}attn_{part}.weight"
    file_type = types[name if name in types.index else f"{prefix}attn_qkv.weight"]
    floats = {"F32": "TF32" if gpu else "float", "F16": "16-bit weights", "BF16": "16-bit weights"}
    kind = floats.get(file_type, "quantized")
    if kind != "quantized":
        return kind, TOLERANCE[kind]
    exact = x @ weight.T.astype(np.float64) + (0.0 if bias is None else bias)
    off = rounding.deviation(x, weight, file_type, gpu)
    norm, size = (
        ("post_attention_norm", len(weight))
        if part == "output"
        else (f"attn_{part}_norm", gguf.head_dim)
    )
    if (
        f"{prefix}{norm}.weight" in types.index
    ):  # a norm after the product scales rows, and with them their errors
        rows = exact.reshape(-1, size)
        factor = gguf.tensor(f"{prefix}{norm}.weight") / np.sqrt(
            np.mean(rows**2, axis=1, keepdims=True)
        )
        off, exact = off.reshape(-1, size) * factor, rows * factor
    return kind, 2 * float(np.linalg.norm(off) / np.linalg.norm(exact)) + 1e-3


def layer_facts(captured, gguf, layer):
    """(scale, softcap, window) of a layer's softmax, as llama.cpp's graph has them; softcap and
    window None if absent.

    captured: a Capture, whose `layers` table says kind, scale, softcap, sliding. Raises
    CaptureError for a layer that is not softmax attention over q and k alone."""
    facts = captured.layers.loc[layer]
    odd = "no softmax attention" if facts["kind"] != "attention" else ""
    odd = odd or (
        "position biases (ALiBi)"
        if facts["max_bias"]
        else "learned sink logits"
        if facts["sinks"]
        else ""
    )
    if odd:
        raise CaptureError(
            f"LAYER = {layer} of this {gguf.architecture} model has {odd}: its weights cannot be recomputed from q "
            "and k. "
            "Choose another LAYER, or another MODEL."
        )
    return (
        float(facts["scale"]),
        float(facts["softcap"]) or None,
        gguf.sliding_window if facts["sliding"] else None,
    )


def check_steps(captured, gguf, layer):
    """Every step of a layer's attention, recomputed from the captured input of that step alone.

    captured: a Capture of the whole prompt with STAGES; gguf: its GGUFFile. Returns a DataFrame,
    one row per step: step, inputs, shape, max_difference, relative_difference (L2), kind (the
    rounding that applies), tolerance, agrees. Nothing is raised: the caller asserts."""
    at = {stage: captured[stage].sel(layer=layer) for stage in STAGES}
    scale, softcap, window = layer_facts(captured, gguf, layer)
    rows = []

    def compare(step, inputs, mine, stage, kind, tolerance=None):
        theirs = np.asarray(at[stage], dtype=np.float64)
        difference = np.asarray(mine) - theirs
        relative = float(np.linalg.norm(difference) / (np.linalg.norm(theirs) or 1.0))
        shape = " x ".join(map(str, theirs.shape))
        rows.append(
            (
                step,
                inputs,
                shape,
                float(np.abs(difference).max()),
                relative,
                kind,
                TOLERANCE[kind] if tolerance is None else tolerance,
            )
        )

    if not {"token_embd_norm.weight", "position_embd.weight"} & set(gguf.tensors.index):
        at["embedding"] = captured["hidden"].sel(layer=0)
        embedded = gguf.rows("token_embd.weight", captured.tokens["id"])
        # Gemma scales its embeddings; a factor for all is allowed for, a change of direction is
        # not.
        factor = np.linalg.norm(at["embedding"]) / np.linalg.norm(embedded)
        compare("embedding rows", "token ids", embedded * factor, "embedding", "float")
    compare(
        "norm",
        "hidden",
        weights.norm(at["hidden"], gguf, f"blk.{layer}.attn_norm"),
        "attn_norm",
        "float",
    )
    matrices, gpu = weights.projection_weights(gguf, layer), captured.model.gpu
    parts, normed = (
        weights.project_qkv(at["attn_norm"], gguf, layer),
        np.asarray(at["attn_norm"], dtype=np.float64),
    )
    for name, stage in (("q", "q_pre"), ("k", "k_pre"), ("v", "v")):
        rounds = _projection(gguf, layer, name, normed, *matrices[name], gpu)
        compare(f"project to {name}", "attn_norm", parts[name], stage, *rounds)
    # YaRN mixes two rotations: not recomputed, no row.
    for name in (
        ("q", "k") if gguf.metadata.get(f"{gguf.architecture}.rope.scaling.type") != "yarn" else ()
    ):
        turned = weights.fitted_rope(at[f"{name}_pre"], at[name], gguf)[2]
        compare(
            f"RoPE on {name}",
            f"{name}_pre",
            turned,
            name,
            "float" if name == "q" else "16-bit cache",
        )
    steps = patterns.attend(at["q"], at["k"], at["v"], scale=scale, softcap=softcap, window=window)
    # What lies behind the mask never reaches the softmax: the runtime's scores there are not
    # compared.
    allowed = np.isfinite(steps["masked"].values)
    compare(
        "scores q·k",
        "q, k",
        np.where(allowed, steps["scores"], at["scores"]),
        "scores",
        "16-bit cache",
    )
    scaled = patterns.softcapped(np.asarray(at["scores"], dtype=np.float64), softcap) * scale
    compare(
        "scale, mask, softmax",
        "scores",
        patterns.softmax(np.where(allowed, scaled, -np.inf)),
        "attention",
        "float",
    )
    compare("q and k to attention", "q, k", steps["attention"], "attention", "16-bit cache")
    group = [patterns.kv_head(h, gguf.n_head, gguf.n_kv_head) for h in range(gguf.n_head)]
    mixed = np.einsum("hqk,hkd->hqd", at["attention"], np.asarray(at["v"])[group])
    compare("weighted values", "attention, v", mixed, "attn_heads", "16-bit cache")
    heads = np.asarray(at["attn_heads"], dtype=np.float64)
    joined = heads.transpose(1, 0, 2).reshape(heads.shape[1], -1)  # (token, head * feature)
    rounds = _projection(
        gguf, layer, "output", joined, *weights.projection(gguf, layer, "output"), gpu
    )
    compare(
        "output projection",
        "attn_heads",
        weights.project_output(heads, gguf, layer),
        "attn_out",
        *rounds,
    )
    columns = [
        "step",
        "inputs",
        "shape",
        "max_difference",
        "relative_difference",
        "kind",
        "tolerance",
    ]
    table = pd.DataFrame(rows, columns=columns)
    return table.assign(agrees=table["relative_difference"] <= table["tolerance"])
