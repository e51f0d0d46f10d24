"""Make the arrays that `tests/test_references.py` compares with: Hugging Face transformers runs the
same GGUF.

    python tests/references/make_references.py [ARCHITECTURE ...] [--smollm2 FILE.gguf] [--gemma
    FILE.gguf]

needs torch, transformers (made with 5.23), accelerate and gguf; the tests themselves need none of
them. Models run eagerly in float32 on the CPU, weights come through transformers' own GGUF loader.

What the loader leaves out or takes wrong is set from the file's header by `complete`; gpt-oss
experts, which the loader looks for under names that no file has, are filled in by
`gpt_oss_weights`. Two facts about llama.cpp's CPU kernels are followed, so that 1e-4 means
something: GELU is the tanh form (Falcon's own is the error function's), and it comes from a table
in half precision (rounding its input and its output moves the tiny models' logits by up to 1e-3).
"""

import argparse
import hashlib
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from models import FAMILIES, IDS, tiny_model  # noqa: E402

# Of "The quick brown fox jumps over the lazy dog. The quick brown" in each vocabulary, as llama.cpp
# tokenizes it.
SMOLLM2_IDS = [504, 2365, 6354, 16438, 27003, 690, 260, 23790, 2767, 30, 378, 2365, 6354]
GEMMA_IDS = [2, 818, 3823, 8864, 37423, 38167, 1024, 506, 31770, 4799, 236761, 669, 3823, 8864]
ABLATED = {"layer": 1, "head": 2}  # the head and the layer's FFN that are zeroed


def header(path):
    """Header values of a GGUF, without the architecture's prefix."""
    fields = gguf.GGUFReader(str(path)).fields
    architecture = fields["general.architecture"].contents()
    values = {
        name.removeprefix(f"{architecture}."): field.contents()
        for name, field in fields.items()
        if not name.startswith(("GGUF.", "tokenizer."))
    }
    return architecture, values


def width(values):
    """Features per head."""
    return values.get(
        "attention.key_length", values["embedding_length"] // values["attention.head_count"]
    )


def complete(config, architecture, values):
    """Set on the transformers config what its GGUF loader does not read from this architecture's
    header."""
    head_dim = width(values)
    for name in ("head_dim", "query_pre_attn_scalar"):
        if hasattr(config, name) and architecture != "falcon":
            setattr(config, name, head_dim)
    for name in (
        "rms_norm_eps",
        "norm_eps",
        "norm_epsilon",
        "layer_norm_eps",
        "layer_norm_epsilon",
    ):
        if hasattr(config, name):
            setattr(
                config,
                name,
                values.get(
                    "attention.layer_norm_rms_epsilon", values.get("attention.layer_norm_epsilon")
                ),
            )
    if "rope.freq_base" in values:
        rope = {"rope_type": "default", "rope_theta": values["rope.freq_base"]}
        if values.get("rope.dimension_count", head_dim) != head_dim:
            rope["partial_rotary_factor"] = values["rope.dimension_count"] / head_dim
        if architecture == "gemma3":  # local layers rotate with their own base
            rope = {"full_attention": rope, "sliding_attention": rope | {"rope_theta": 10000.0}}
        config.rope_parameters = rope
    if architecture == "gemma2":
        config.attn_logit_softcapping = values["attn_logit_softcapping"]
        config.final_logit_softcapping = values["final_logit_softcapping"]
    if architecture == "gemma3":
        period = values.get("attention.sliding_window_pattern", 6)
        config.layer_types = [
            "full_attention" if (i + 1) % period == 0 else "sliding_attention"
            for i in range(config.num_hidden_layers)
        ]
    if architecture == "gpt-oss":
        config.layer_types = [
            "full_attention" if i % 2 else "sliding_attention"
            for i in range(config.num_hidden_layers)
        ]
        config.sliding_window = values["attention.sliding_window"]
        config.intermediate_size = values["expert_feed_forward_length"]
    if architecture in ("qwen2moe", "qwen3moe"):
        config.moe_intermediate_size = values["expert_feed_forward_length"]
        config.shared_expert_intermediate_size = values.get("expert_shared_feed_forward_length")
    if architecture == "phi3":
        config.pad_token_id = None  # the class's default lies beyond a small vocabulary
    if architecture == "gpt2":
        config.n_positions = values["context_length"]
        config.n_inner = values["feed_forward_length"]
    if architecture == "falcon":
        config.num_kv_heads = values["attention.head_count_kv"]
        config.ffn_hidden_size = values["feed_forward_length"]
        config.activation = "gelu_pytorch_tanh"
    return config


def load(path, half_gelu=True):
    """The transformers model of a GGUF: eager, float32, every parameter filled from the file."""
    architecture, values = header(path)
    where = {"gguf_file": path.name}
    config = complete(AutoConfig.from_pretrained(path.parent, **where), architecture, values)
    model, info = AutoModelForCausalLM.from_pretrained(
        path.parent,
        config=config,
        attn_implementation="eager",
        dtype=torch.float32,
        output_loading_info=True,
        **where,
    )
    missing = set(info["missing_keys"]) - {"lm_head.weight"}
    if architecture == "gpt-oss":
        missing -= gpt_oss_weights(model, path)
    if missing or info["mismatched_keys"]:
        raise SystemExit(
            f"{path.name}: not filled from the file: {sorted(missing)}, {info['mismatched_keys']}"
        )
    if half_gelu:
        for module in model.modules():
            if "gelu" in type(module).__name__.lower():
                module.forward = gelu_table
    return model.eval(), architecture


def gpt_oss_weights(model, path):
    """Fill the parameters of gpt-oss that the loader does not find; returns their names."""
    tensors = {
        t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type))
        for t in gguf.GGUFReader(path).tensors
    }
    filled = {}
    for i in range(model.config.num_hidden_layers):
        blk, layer = f"blk.{i}", f"model.layers.{i}"
        gate_up = [
            tensors[f"{blk}.ffn_{part}_exps.weight"].transpose(1, 2) for part in ("gate", "up")
        ]
        gate_up_bias = [tensors[f"{blk}.ffn_{part}_exps.bias"] for part in ("gate", "up")]
        filled |= {  # gate and up alternate in the last axis
            f"{layer}.mlp.experts.gate_up_proj": torch.stack(gate_up, -1).flatten(-2),
            f"{layer}.mlp.experts.gate_up_proj_bias": torch.stack(gate_up_bias, -1).flatten(-2),
            f"{layer}.mlp.experts.down_proj": tensors[f"{blk}.ffn_down_exps.weight"].transpose(
                1, 2
            ),
            f"{layer}.mlp.experts.down_proj_bias": tensors[f"{blk}.ffn_down_exps.bias"],
            f"{layer}.mlp.router.weight": tensors[f"{blk}.ffn_gate_inp.weight"],
            f"{layer}.mlp.router.bias": tensors[f"{blk}.ffn_gate_inp.bias"],
            f"{layer}.self_attn.sinks": tensors[f"{blk}.attn_sinks.weight"],
            f"{layer}.post_attention_layernorm.weight": tensors[
                f"{blk}.post_attention_norm.weight"
            ],
        }
    own = dict(model.named_parameters())
    for name, value in filled.items():
        own[name].data.copy_(value)
    return set(filled)


def gelu_table(x):
    """GELU as ggml's CPU kernel has it: tanh form, input and output rounded to half precision
    within +-10."""
    y = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
    return torch.where(x <= -10, torch.zeros_like(x), torch.where(x >= 10, x, y))


def parts(model):
    """Per layer (output projection of attention or convolution, module whose output is zeroed for
    "no FFN", post-norm of attention or None), and the final norm."""
    base = model.base_model
    layers = base.layers if hasattr(base, "layers") else base.h
    found = []
    for layer in layers:
        block = next(
            getattr(layer, n)
            for n in ("self_attn", "self_attention", "attn", "conv")
            if hasattr(layer, n)
        )
        out = next(
            getattr(block, n)
            for n in ("o_proj", "out_proj", "dense", "c_proj")
            if hasattr(block, n)
        )
        ffn = next(getattr(layer, n) for n in ("mlp", "feed_forward") if hasattr(layer, n))
        if hasattr(ffn, "dense_4h_to_h"):
            ffn = (
                ffn.dense_4h_to_h
            )  # BLOOM's block returns its output with the residual already added
        post = (
            layer.post_attention_layernorm if hasattr(layer, "post_feedforward_layernorm") else None
        )
        found.append((out, ffn, post))
    norm = next(
        getattr(base, n)
        for n in ("norm", "final_layernorm", "embedding_norm", "ln_f")
        if hasattr(base, n)
    )
    return found, norm


def run(model, ids, zero_head=None, zero_ffn=None, head_dim=None):
    """One forward pass: dict of NumPy arrays, batch removed; see `store` for shapes."""
    blocks, norm = parts(model)
    kept, hooks = {"attn_out": {}}, []

    def keep(i):
        return lambda module, inputs, output: kept["attn_out"].__setitem__(i, output[0])

    def zeroed(module, inputs):
        x = inputs[0].clone()
        x[..., zero_head[1] * head_dim : (zero_head[1] + 1) * head_dim] = 0
        return (x,)

    def nothing(module, inputs, output):
        return (
            tuple(torch.zeros_like(o) if k == 0 else o for k, o in enumerate(output))
            if isinstance(output, tuple)
            else torch.zeros_like(output)
        )

    for i, (out, ffn, post) in enumerate(blocks):
        hooks.append((post or out).register_forward_hook(keep(i)))
        if zero_head and zero_head[0] == i:
            hooks.append(out.register_forward_pre_hook(zeroed))
        if zero_ffn == i:
            hooks.append(ffn.register_forward_hook(nothing))
    hooks.append(
        norm.register_forward_hook(
            lambda module, inputs, output: kept.update(
                last_hidden=inputs[0][0], final_norm=output[0]
            )
        )
    )
    with torch.no_grad():
        out = model(
            torch.tensor([list(ids)]),
            output_attentions=True,
            output_hidden_states=True,
            use_cache=False,
        )
    for hook in hooks:
        hook.remove()
    return {
        "attention": np.stack([a[0].numpy() for a in out.attentions if a is not None]),
        "hidden": np.stack(
            [h[0].numpy() for h in out.hidden_states[: len(blocks)]] + [kept["last_hidden"].numpy()]
        ),
        "attn_out": np.stack([kept["attn_out"][i].numpy() for i in range(len(blocks))]),
        "final_norm": kept["final_norm"].numpy(),
        "logits": out.logits[0].numpy(),
    }


def tiny(architecture, folder):
    """Reference arrays of a tiny model, all positions: attention (layer, head, query, key), hidden
    (0..n, token, embd), attn_out (layer, token, embd), final_norm (token, embd), logits (token,
    vocab); `no_head`, `no_ffn`: logits of the last 8 tokens without the head or the FFN of
    `ABLATED`."""
    path = tiny_model(architecture, folder)
    model, _ = load(path)
    layer, head = ABLATED["layer"], ABLATED["head"]
    arrays = run(model, IDS)
    arrays["no_head"] = run(model, IDS, zero_head=(layer, head), head_dim=width(header(path)[1]))[
        "logits"
    ][-8:]
    arrays["no_ffn"] = run(model, IDS, zero_ffn=layer)["logits"][-8:]
    if architecture == "lfm2":
        arrays["attention_layers"] = np.array(
            [i for i, t in enumerate(model.config.layer_types) if "attention" in t]
        )
    exact = run(load(path, half_gelu=False)[0], IDS)["logits"]
    logits, strongest = arrays["logits"], arrays["attention"][..., 9:, :].max(-1)
    no_head, no_ffn = (np.abs(arrays[k] - logits[-8:]).max() for k in ("no_head", "no_ffn"))
    print(
        f"{architecture:11} logits std {logits.std():.2f}; strongest key of a query: median {np.median(strongest):.2f},"
        f" max {strongest.max():.2f}; logits moved by the head {no_head:.2f}, the FFN {no_ffn:.2f},"
        f" the GELU table {np.abs(exact - logits).max():.1e}"
    )
    arrays["sha256"] = np.array(hashlib.sha256(path.read_bytes()).hexdigest())
    return arrays


def real(path, ids, layers, heads):
    """Subset for a real file: attention of some layers and heads, hidden norms of all and rows of a
    few tokens, the 20 highest logits of each token, and the same without one head."""
    model, _ = load(path)
    full = run(model, ids)
    cut = run(model, ids, zero_head=(layers[1], heads[1]), head_dim=width(header(path)[1]))
    top = np.argsort(-full["logits"], axis=-1)[:, :20]
    return {
        "ids": np.array(ids),
        "layers": np.array(layers),
        "heads": np.array(heads),
        "attention": full["attention"][np.ix_(layers, heads)],
        "hidden_norm": np.linalg.norm(full["hidden"], axis=-1),
        "hidden": full["hidden"][
            np.ix_([0, *(l + 1 for l in layers)], [0, 1, len(ids) // 2, len(ids) - 1])
        ],
        "hidden_tokens": np.array([0, 1, len(ids) // 2, len(ids) - 1]),
        "attn_out": full["attn_out"][np.ix_(layers, [0, len(ids) - 1])],
        "final_norm": full["final_norm"][-2:],
        "top_id": top,
        "top_logit": np.take_along_axis(full["logits"], top, -1),
        "no_head_logits": np.take_along_axis(cut["logits"], top, -1),
    }


def save(name, arrays):
    arrays = {k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in arrays.items()}
    np.savez_compressed(HERE / f"{name}.npz", **arrays)
    print(f"{name}.npz: {(HERE / f'{name}.npz').stat().st_size / 1024:.0f} KiB")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "architectures", nargs="*", help="tiny models to run; all of them if none is named"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("/tmp"), help="where tiny models are written"
    )
    parser.add_argument("--smollm2", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--gemma", type=Path, help="gemma-3-270m-q4_k_m.gguf")
    options = parser.parse_args()
    torch.manual_seed(0)
    for architecture in options.architectures or (
        [] if options.smollm2 or options.gemma else FAMILIES
    ):
        save(architecture, tiny(architecture, options.folder))
    if options.smollm2:
        save("smollm2", real(options.smollm2, SMOLLM2_IDS, [0, 7, 15, 29], [0, 3, 8]))
    if options.gemma:
        save("gemma-3-270m", real(options.gemma, GEMMA_IDS, [0, 5, 11, 17], [0, 1, 3]))


if __name__ == "__main__":
    main()
