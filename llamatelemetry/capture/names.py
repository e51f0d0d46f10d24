"""The stages of a capture: all that the package must know of each. A new one is an entry here and
what finds its node, in `stages` or `residual`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """dims: of one layer's values.

    embedding: there is one layer more than the model has: 0 is what enters layer 0, l + 1 what
    leaves layer l. late: computed after attention, where the last layer goes on only with the
    positions whose logits were asked for. cached: kept in the KV cache, in whose number format
    attention sees it. masked: what the mask hides may be anything, also no number. mean: over the
    heads, so small that it has every query also where `queries` are chosen for the others."""

    dims: tuple
    per_layer: bool = True
    embedding: bool = False
    late: bool = False
    editable: bool = False
    cached: bool = False
    masked: bool = False
    mean: bool = False
    dtype: str = "float32"

    @property
    def grid(self):
        """Whether its values are a grid of positions, (..., query, key)."""
        return "key" in self.dims

    @property
    def place(self):
        """Which of its dims is the position in the text, of which some can be chosen."""
        return "query" if self.grid else "token"

    @property
    def by_head(self):
        return self.dims[0] in ("head", "kv_head")

    @property
    def all_dims(self):
        """Of a captured array: `layer` leads wherever there is one."""
        return ("layer", *self.dims) if self.per_layer else self.dims

    def layers(self, n_layer):
        """The layers that it has where it is everywhere; [None] for a stage without layers."""
        return list(range(n_layer + self.embedding)) if self.per_layer else [None]


_STREAM, _HEADS = ("token", "embd"), ("head", "token", "feature")
_KV_HEADS, _GRID = ("kv_head", "token", "feature"), ("head", "query", "key")
STAGES = {
    "attn_norm": Stage(_STREAM),
    "ffn_norm": Stage(_STREAM, late=True),
    "q": Stage(_HEADS, editable=True),
    "k": Stage(_KV_HEADS, cached=True, editable=True),
    "v": Stage(_KV_HEADS, cached=True, editable=True),
    "q_pre": Stage(_HEADS),
    "k_pre": Stage(_KV_HEADS),
    "scores": Stage(_GRID, masked=True, editable=True),
    "attention": Stage(_GRID, editable=True),
    "attention_mean": Stage(("query", "key"), mean=True),
    "mask": Stage(("query", "key"), masked=True),
    "attn_heads": Stage(_HEADS, editable=True),
    "attn_out": Stage(_STREAM, late=True, editable=True),
    "ffn_out": Stage(_STREAM, late=True, editable=True),
    "ffn_act": Stage(("token", "neuron"), late=True),
    "hidden": Stage(_STREAM, embedding=True, late=True, editable=True),
    "router": Stage(("token", "expert"), late=True),
    "experts": Stage(("token", "slot"), late=True, dtype="int32"),
    "expert_weights": Stage(("token", "slot"), late=True),
    "final_norm": Stage(_STREAM, per_layer=False, late=True),
    "logits": Stage(("token", "vocab"), per_layer=False, late=True),
}
EDITABLE = tuple(name for name, stage in STAGES.items() if stage.editable)
