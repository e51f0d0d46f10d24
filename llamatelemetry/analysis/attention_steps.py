"""Recompute one layer's attention from captured inputs and compare it with the captured outputs, step by step."""

import numpy as np
import pandas as pd

from ..errors import CaptureError
from . import attention as att
from . import attention_weights as weights

STAGES = ("hidden", "attn_norm", "q_pre", "k_pre", "q", "k", "v", "scores", "attention", "attn_heads", "attn_out")

# Relative differences (L2) that the runtime's own rounding explains. Float operations differ in summation order. The KV
# cache holds keys and values in 16 bits. A matrix product with quantized weights also rounds its input to 8 bits, which
# a product of dequantized weights in NumPy does not: that gap is the runtime's, and it is shown, not hidden.
TOLERANCE = {"float": 1e-5, "16-bit cache": 2e-3, "16-bit weights": 1e-2, "quantized": 5e-2}


def _kernel(gguf, layer, *parts):
    """Which tolerance a matrix product of these tensors has: by the coarsest type among them."""
    names = [f"blk.{layer}.attn_{part}.weight" for part in parts]
    types = {gguf.tensors["type"][name] for name in names if name in gguf.tensors.index}
    return "float" if types == {"F32"} else "16-bit weights" if types <= {"F32", "F16", "BF16"} else "quantized"


def layer_facts(captured, gguf, layer):
    """(scale, softcap, window) of a layer's softmax, as llama.cpp's graph has them; softcap and window None if absent.

    captured: a Capture, whose `layers` table says kind, scale, softcap, sliding. Raises CaptureError for a layer that
    is not softmax attention over q and k alone.
    """
    facts = captured.layers.loc[layer]
    odd = "no softmax attention" if facts["kind"] != "attention" else ""
    odd = odd or ("position biases (ALiBi)" if facts["max_bias"] else "learned sink logits" if facts["sinks"] else "")
    if odd:
        raise CaptureError(
            f"LAYER = {layer} of this {gguf.architecture} model has {odd}: its weights cannot be recomputed from q "
            "and k. "
            "Choose another LAYER, or another MODEL."
        )
    return float(facts["scale"]), float(facts["softcap"]) or None, gguf.sliding_window if facts["sliding"] else None


def check_steps(captured, gguf, layer):
    """Every step of a layer's attention, recomputed from the captured input of that step alone.

    captured: a Capture of the whole prompt with STAGES; gguf: its GGUFFile.
    Returns a DataFrame, one row per step: step, inputs, shape, max_difference, relative_difference (L2), kind (the
    rounding that applies), tolerance, agrees. Nothing is raised: the caller asserts.
    """
    at = {stage: captured[stage].sel(layer=layer) for stage in STAGES}
    scale, softcap, window = layer_facts(captured, gguf, layer)
    rows = []

    def compare(step, inputs, mine, stage, kind):
        theirs = np.asarray(at[stage], dtype=np.float64)
        difference = np.asarray(mine) - theirs
        relative = float(np.linalg.norm(difference) / (np.linalg.norm(theirs) or 1.0))
        shape = " x ".join(map(str, theirs.shape))
        rows.append((step, inputs, shape, float(np.abs(difference).max()), relative, kind, TOLERANCE[kind]))

    if not {"token_embd_norm.weight", "position_embd.weight"} & set(gguf.tensors.index):
        at["embedding"] = captured["hidden"].sel(layer=0)
        embedded = gguf.rows("token_embd.weight", captured.tokens["id"])
        # Gemma scales its embeddings; a factor for all is allowed for, a change of direction is not.
        factor = np.linalg.norm(at["embedding"]) / np.linalg.norm(embedded)
        compare("embedding rows", "token ids", embedded * factor, "embedding", "float")
    compare("norm", "hidden", weights.norm(at["hidden"], gguf, f"blk.{layer}.attn_norm"), "attn_norm", "float")
    parts = weights.project_qkv(at["attn_norm"], gguf, layer)
    for name, stage in (("q", "q_pre"), ("k", "k_pre"), ("v", "v")):
        compare(f"project to {name}", "attn_norm", parts[name], stage, _kernel(gguf, layer, name, "qkv"))
    # YaRN mixes two rotations: not recomputed, no row.
    for name in ("q", "k") if gguf.metadata.get(f"{gguf.architecture}.rope.scaling.type") != "yarn" else ():
        turned = weights.fitted_rope(at[f"{name}_pre"], at[name], gguf)[2]
        compare(f"RoPE on {name}", f"{name}_pre", turned, name, "float" if name == "q" else "16-bit cache")
    steps = att.attend(at["q"], at["k"], at["v"], scale=scale, softcap=softcap, window=window)
    # What lies behind the mask never reaches the softmax: the runtime's scores there are not compared.
    allowed = np.isfinite(steps["masked"].values)
    compare("scores q·k", "q, k", np.where(allowed, steps["scores"], at["scores"]), "scores", "16-bit cache")
    scaled = att.softcapped(np.asarray(at["scores"], dtype=np.float64), softcap) * scale
    compare("scale, mask, softmax", "scores", att.softmax(np.where(allowed, scaled, -np.inf)), "attention", "float")
    compare("q and k to attention", "q, k", steps["attention"], "attention", "16-bit cache")
    group = [att.kv_head(h, gguf.n_head, gguf.n_kv_head) for h in range(gguf.n_head)]
    mixed = np.einsum("hqk,hkd->hqd", at["attention"], np.asarray(at["v"])[group])
    compare("weighted values", "attention, v", mixed, "attn_heads", "16-bit cache")
    out = weights.project_output(at["attn_heads"], gguf, layer)
    compare("output projection", "attn_heads", out, "attn_out", _kernel(gguf, layer, "output"))
    columns = ["step", "inputs", "shape", "max_difference", "relative_difference", "kind", "tolerance"]
    table = pd.DataFrame(rows, columns=columns)
    return table.assign(agrees=table["relative_difference"] <= table["tolerance"])
