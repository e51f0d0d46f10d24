"""The stages of a capture: what each is, its dims, whether it can be edited; and the few names the
graph cannot do without."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    dims: tuple  # after `layer`, which leads where per_layer
    per_layer: bool = True
    editable: bool = False
    dtype: str = "float32"


STAGES = {
    "attn_norm": Stage(("token", "embd")),
    "ffn_norm": Stage(("token", "embd")),
    "q": Stage(("head", "token", "feature"), editable=True),
    "k": Stage(("kv_head", "token", "feature")),
    "v": Stage(("kv_head", "token", "feature")),
    "q_pre": Stage(("head", "token", "feature")),
    "k_pre": Stage(("kv_head", "token", "feature")),
    "scores": Stage(("head", "query", "key")),
    "attention": Stage(("head", "query", "key"), editable=True),
    "mask": Stage(("query", "key")),
    "attn_heads": Stage(("head", "token", "feature"), editable=True),
    "attn_out": Stage(("token", "embd"), editable=True),
    "ffn_out": Stage(("token", "embd"), editable=True),
    "ffn_act": Stage(("token", "neuron")),
    "hidden": Stage(("token", "embd"), editable=True),
    "router": Stage(("token", "expert")),
    "experts": Stage(("token", "slot"), dtype="int32"),
    "expert_weights": Stage(("token", "slot")),
    "final_norm": Stage(("token", "embd"), per_layer=False),
    "logits": Stage(("token", "vocab"), per_layer=False),
}
GRIDS = {name for name, stage in STAGES.items() if "key" in stage.dims}

# Operations that mix positions other than by softmax attention: convolutions over time, state-space
# scans, linear attention. A layer whose block holds one of these and no softmax is recurrent.
RECURRENT = {
    "SSM_CONV",
    "SSM_SCAN",
    "RWKV_WKV6",
    "RWKV_WKV7",
    "GATED_LINEAR_ATTN",
    "GATED_DELTA_NET",
    "SOLVE_TRI",
    "CUMSUM",
}
# The residual stream leaves a layer under this name wherever the graph has bypasses (per-layer
# embeddings, several streams) that hide it from the paths.
LAYER_OUTPUT = "l_out"
NORMED, STATES, OUTPUT = (
    "result_norm",
    "result_embd",
    "result_output",
)  # the final norm, an encoder's states, logits
OUTPUT_MATRICES = ("output.weight", "token_embd.weight")
