"""Where in a model published features were trained: TransformerLens' and Hugging Face's names of
hook points, as stages of a capture."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import FeatureError
from ..norms import centred, divisor

if TYPE_CHECKING:
    import xarray as xr

    from ..capture.data import Capture
    from ..files.gguf import GGUFFile

# Name without its layer -> (stages whose sum it is, their layers after the name's, what is done).
# TransformerLens' `hook_normalized` is the normalized stream without the norm's gain, and its
# `hook_mlp_in` the stream before the norm; Hugging Face's output of a norm has the gain.
_STREAM_AFTER, _STREAM_MID = ("hidden", 1), ("hidden", 0)
_LENS = {
    "hook_embed": ((_STREAM_MID,), None),
    "hook_resid_pre": ((_STREAM_MID,), None),
    "hook_resid_post": ((_STREAM_AFTER,), None),
    "hook_resid_mid": ((_STREAM_MID, ("attn_out", 0)), None),
    "hook_mlp_in": ((_STREAM_MID, ("attn_out", 0)), None),
    "ln1.hook_normalized": ((_STREAM_MID,), "norm"),
    "ln2.hook_normalized": ((_STREAM_MID, ("attn_out", 0)), "norm"),
    "mlp.hook_in": ((("ffn_norm", 0),), None),
    "hook_attn_out": ((("attn_out", 0),), None),
    "hook_mlp_out": ((("ffn_out", 0),), None),
    "attn.hook_z": ((("attn_heads", 0),), "flat"),
}
_TRANSFORMERS = {
    "output": _LENS["hook_resid_post"],
    "self_attn.o_proj.input": _LENS["attn.hook_z"],
    "pre_feedforward_layernorm.output": _LENS["mlp.hook_in"],
    "post_feedforward_layernorm.output": _LENS["hook_mlp_out"],
}
_NAMES = (
    (re.compile(r"blocks\.(\d+)\.(.+)"), _LENS),
    (re.compile(r"()(hook_embed)"), _LENS),
    (re.compile(r"(?:model\.)?layers\.(\d+)\.(.+)"), _TRANSFORMERS),
)


@dataclass(frozen=True)
class Hook:
    """A hook point: its published name, the stages of a capture whose sum it is, each with its
    layer, and what is then done with them: "norm" (divided by the model's norm, without its gain),
    "flat" (heads side by side) or None."""

    name: str
    parts: tuple[tuple[str, int], ...]
    change: str | None = None

    @property
    def stages(self) -> list[str]:
        """What a capture must hold."""
        return [stage for stage, _ in self.parts]

    @property
    def layers(self) -> list[int]:
        """Layer coordinates that a capture must hold."""
        return sorted({layer for _, layer in self.parts})


def parse(name: str) -> Hook:
    """The hook point of a name: "blocks.12.hook_resid_post" (TransformerLens) or
    "model.layers.12.output" (Hugging Face). Raises FeatureError for one that no stage of a capture
    is."""
    for pattern, known in _NAMES:
        found = pattern.fullmatch(str(name))
        if found and found[2] in known:
            parts, change = known[found[2]]
            layer = int(found[1] or 0)
            return Hook(name, tuple((stage, layer + after) for stage, after in parts), change)
    raise FeatureError(
        f"No stage of a capture is the hook point {name!r}. Known are blocks.L. with "
        f"{', '.join(key for key in _LENS if key != 'hook_embed')}, hook_embed, and model.layers.L. "
        f"with {', '.join(_TRANSFORMERS)}: give one as hook=."
    )


def width(hook: Hook, gguf: "GGUFFile") -> int:
    """Values per token that this model has there."""
    return gguf.head_dim_v * gguf.n_head if hook.change == "flat" else gguf.n_embd


def states(captured: "Capture", gguf: "GGUFFile", hook: Hook) -> "xr.DataArray":
    """What a capture holds at a hook point, as the features were trained on it: (token, embd)
    float32. Raises FeatureError naming the stage or layer that the capture lacks."""
    total = sum(_part(captured, *part) for part in hook.parts)
    if hook.change == "norm":
        values = (centred(total.values, gguf) / divisor(total.values, gguf)).astype(np.float32)
        total = total.copy(data=values)
    return total.drop_vars("layer").rename("state").assign_attrs(hook=hook.name)


def _part(captured, stage, layer):
    if stage not in captured.stages or layer not in captured[stage].layer.values:
        raise FeatureError(
            f"The features need {stage!r} at layer {layer}, which this capture does not hold: "
            "capture it with stages=features.hook.stages."
        )
    values = captured[stage].sel(layer=layer)
    if "head" not in values.dims:
        return values
    flat = values.transpose("token", "head", "feature").values
    stream = values.isel(head=0, feature=0, drop=True)
    return stream.expand_dims(embd=flat[0].size, axis=1).copy(data=flat.reshape(len(flat), -1))
