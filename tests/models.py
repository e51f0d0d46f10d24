"""Tiny GGUF models with random weights in the layout of their families.

`tiny_model("gemma3", folder)` writes a file of about 0.5 MB that llama.cpp loads, decodes and
tokenizes with. The scale of the weights is chosen so that attention is neither uniform nor one-hot,
and every number that a family's graph depends on (windows, soft-caps, norms, biases, rotary widths)
is small enough to matter within `IDS`."""

import zlib
from pathlib import Path

import gguf
import numpy as np

from llamatelemetry.capture.names import STAGES

# 28 token ids, longer than every sliding window below; the run of six from position 4 comes again
# at position 16.
IDS = [
    0,
    77,
    130,
    9,
    201,
    45,
    262,
    300,
    88,
    17,
    230,
    61,
    5,
    77,
    310,
    150,
    201,
    45,
    262,
    300,
    88,
    17,
    3,
    99,
    288,
    31,
    174,
    12,
]
WINDOW = 8
DENSE = [name for name, stage in STAGES.items() if not {"expert", "slot"} & set(stage.dims)]
N_VOCAB = 320

# What differs from the llama family's layout, per architecture. Sizes not named here are in
# `tiny_model`.
FAMILIES = {
    "llama": {},
    "qwen2": {"qkv_bias": True, "tied": True},
    "qwen3": {"qk_norm": True, "head_dim": 32, "tied": True},
    "gemma2": {
        "gelu": True,
        "post_norm": True,
        "head_dim": 32,
        "tied": True,
        "n_layer": 4,
        "embd_scale": 0.06,
        "keys": {
            "attention.sliding_window": WINDOW,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    },
    "gemma3": {
        "gelu": True,
        "post_norm": True,
        "qk_norm": True,
        "head_dim": 32,
        "tied": True,
        "n_layer": 4,
        # Every third layer is global and rotates with this base; the local ones keep 10000.
        "embd_scale": 0.06,
        "rope_base": 1000000.0,
        "keys": {"attention.sliding_window": WINDOW, "attention.sliding_window_pattern": 3},
    },
    "phi3": {"fused_qkv": True, "fused_gate": True, "n_rot": 12},
    # The six above are the families of the suite's own models; the ones below each bring a graph of
    # another kind.
    "gpt2": {
        "gelu": True,
        "embd_scale": 0.15,
        "layer_norm": True,
        "gate": False,
        "bias": True,
        "fused_qkv": True,
        "n_kv_head": 4,
        "positions": True,
        "tied": True,
    },
    "bloom": {
        "gelu": True,
        "embd_scale": 0.15,
        "layer_norm": True,
        "gate": False,
        "bias": True,
        "fused_qkv": True,
        "n_kv_head": 4,
        "embd_norm": True,
        "n_ff": 256,
        "tied": True,
    },  # ALiBi
    "falcon": {
        "gelu": True,
        "embd_scale": 0.15,
        "layer_norm": True,
        "gate": False,
        "fused_qkv": True,
        "n_kv_head": 1,
        "parallel": True,
        "n_ff": 256,
        "tied": True,
    },  # attention and FFN side by side on one norm, one key head
    "stablelm": {"layer_norm": True, "qkv_bias": True, "n_rot": 4},
    "starcoder2": {
        "gelu": True,
        "embd_scale": 0.15,
        "layer_norm": True,
        "gate": False,
        "bias": True,
        "qkv_bias": True,
        "tied": True,
    },
    "nemotron": {"layer_norm": True, "gate": False, "n_rot": 8},  # squared ReLU
    "qwen2moe": {
        "qkv_bias": True,
        "experts": True,
        "keys": {
            "expert_count": 4,
            "expert_used_count": 2,
            "expert_feed_forward_length": 32,
            "expert_shared_feed_forward_length": 64,
        },
    },
    "qwen3moe": {
        "qk_norm": True,
        "head_dim": 32,
        "experts": True,
        "keys": {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32},
    },
    "gpt-oss": {
        "qkv_bias": True,
        "out_bias": True,
        "experts": True,
        "sinks": True,
        "n_layer": 4,
        "rope_base": 150000.0,
        "norm2": "post_attention_norm",
        "keys": {
            "expert_count": 4,
            "expert_used_count": 2,
            "expert_feed_forward_length": 32,
            "attention.sliding_window": WINDOW,
        },
    },
    "lfm2": {
        "qk_norm": True,
        "tied": True,
        "n_layer": 4,
        "conv_layers": (0, 2),
        "keys": {"shortconv.l_cache": 3},
    },
}


def tiny_model(architecture, folder, seed=0, vocabulary=None, **changes):
    """Write `folder/tiny-<architecture>-<seed>.gguf` (F32) and return its path.

    vocabulary: a GGUFFile whose tokenizer is taken over, for what needs whole words; None makes a
    small one. changes: sizes or switches of `FAMILIES` to override, e.g. `n_layer=2`,
    `n_vocab=512`, `n_ctx=4096`."""
    tokens = {}
    if vocabulary is not None:
        tokens = {
            key: value for key, value in vocabulary.metadata.items() if key.startswith("tokenizer.")
        }
        changes = {"n_vocab": vocabulary.n_vocab} | changes
    size = (
        {
            "n_embd": 64,
            "n_layer": 3,
            "n_head": 4,
            "n_kv_head": 2,
            "head_dim": 16,
            "n_ff": 128,
            "n_ctx": 512,
            "n_vocab": N_VOCAB,
            "rope_base": 10000.0,
            "embd_scale": 0.5,
            "gate": True,
            "norm2": "ffn_norm",
            "keys": {},
        }
        | FAMILIES[architecture]
        | changes
    )
    path = Path(folder) / f"tiny-{architecture}-{seed}.gguf"
    writer = gguf.GGUFWriter(str(path), architecture)
    for key, value in metadata(architecture, size).items():
        put(writer, key, value)
    for key, value in (tokens or tokenizer(size["n_vocab"])).items():
        put(writer, key, value)
    for name, shape, mean, std in layout(architecture, size):
        # Each tensor has its own stream: a new tensor changes no other. RandomState's numbers never
        # change with NumPy.
        stream = np.random.RandomState(zlib.crc32(f"{seed} {name}".encode()))
        writer.add_tensor(name, (mean + std * stream.standard_normal(shape)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def metadata(architecture, size):
    """Keys and values of the header, without the tokenizer's."""
    norm_key = (
        "attention.layer_norm_epsilon"
        if size.get("layer_norm")
        else "attention.layer_norm_rms_epsilon"
    )
    conv = size.get("conv_layers", ())
    kv = (
        [0 if i in conv else size["n_kv_head"] for i in range(size["n_layer"])]
        if conv
        else size["n_kv_head"]
    )
    keys = {
        "context_length": size["n_ctx"],
        "embedding_length": size["n_embd"],
        "block_count": size["n_layer"],
        "feed_forward_length": size["n_ff"],
        "attention.head_count": size["n_head"],
        "attention.head_count_kv": kv,
        "attention.key_length": size["head_dim"],
        "attention.value_length": size["head_dim"],
        norm_key: 1e-5,
        "vocab_size": size["n_vocab"],
    }
    if architecture not in ("gpt2", "bloom"):  # no rotation there
        keys |= {
            "rope.freq_base": size["rope_base"],
            "rope.dimension_count": size.get("n_rot", size["head_dim"]),
        }
    name = f"tiny {architecture}".replace(
        "phi3", "phi 3"
    )  # llama.cpp wants Microsoft's special tokens of a "phi3"
    return {
        "general.name": name,
        "general.file_type": 0,
        **{f"{architecture}.{key}": value for key, value in (keys | size["keys"]).items()},
    }


def layout(architecture, size):
    """(name, shape with rows first, mean, standard deviation) of every tensor."""
    embd, ff, head_dim = size["n_embd"], size["n_ff"], size["head_dim"]
    q_width, kv_width = size["n_head"] * head_dim, size["n_kv_head"] * head_dim
    bias = size.get("bias", False)
    tensors = []

    def weight(name, *shape, mean=0.0, std=None, with_bias=False):
        tensors.append((f"{name}.weight", shape, mean, std or 1.2 / np.sqrt(shape[-1])))
        if with_bias:
            tensors.append((f"{name}.bias", shape[:-1], 0.0, 0.2))

    def norm(name, width=embd, with_bias=size.get("layer_norm", False), mean=1.0, std=0.1):
        tensors.append((f"{name}.weight", (width,), mean, std))
        if with_bias:
            tensors.append((f"{name}.bias", (width,), 0.0, 0.1))

    weight("token_embd", size["n_vocab"], embd, std=size["embd_scale"])
    if size.get("positions"):
        weight("position_embd", size["n_ctx"], embd, std=0.3)
    if size.get("embd_norm"):
        norm("token_embd_norm")
    norm("token_embd_norm" if architecture == "lfm2" else "output_norm")
    if not size.get("tied"):
        weight("output", size["n_vocab"], embd, std=0.3)
    for i in range(size["n_layer"]):
        blk = f"blk.{i}"
        norm(f"{blk}.attn_norm")
        if i in size.get("conv_layers", ()):
            weight(f"{blk}.shortconv.conv", embd, size["keys"]["shortconv.l_cache"], std=0.6)
            weight(f"{blk}.shortconv.in_proj", 3 * embd, embd)
            weight(f"{blk}.shortconv.out_proj", embd, embd)
        else:
            if size.get("fused_qkv"):
                weight(f"{blk}.attn_qkv", q_width + 2 * kv_width, embd, with_bias=bias)
            else:
                for part, width in (("q", q_width), ("k", kv_width), ("v", kv_width)):
                    weight(f"{blk}.attn_{part}", width, embd, with_bias=size.get("qkv_bias", False))
            if size.get("qk_norm"):
                norm(f"{blk}.attn_q_norm", head_dim, with_bias=False, mean=1.2)
                norm(f"{blk}.attn_k_norm", head_dim, with_bias=False, mean=1.2)
            if size.get("sinks"):
                tensors.append((f"{blk}.attn_sinks.weight", (size["n_head"],), 0.5, 1.0))
            weight(
                f"{blk}.attn_output", embd, q_width, with_bias=bias or size.get("out_bias", False)
            )
        if size.get("post_norm"):
            norm(f"{blk}.post_attention_norm")
            norm(f"{blk}.post_ffw_norm", mean=0.1, std=0.02)
        if not size.get("parallel"):
            norm(f"{blk}.{size['norm2']}")
        if size.get("experts"):
            experts(blk, size, weight, tensors)
            continue
        # llama.cpp's CPU kernel takes GELU from a table in half precision: small inputs make its
        # steps small.
        std = 0.3 / np.sqrt(embd) if size.get("gelu") else None
        if size["gate"] and not size.get("fused_gate"):
            weight(f"{blk}.ffn_gate", ff, embd, std=std)
        weight(
            f"{blk}.ffn_up", 2 * ff if size.get("fused_gate") else ff, embd, std=std, with_bias=bias
        )
        weight(f"{blk}.ffn_down", embd, ff, with_bias=bias)
    return tensors


def experts(blk, size, weight, tensors):
    """Tensors of a mixture of experts: router, experts, and the family's shared expert or
    biases."""
    embd, count, ff = (
        size["n_embd"],
        size["keys"]["expert_count"],
        size["keys"]["expert_feed_forward_length"],
    )
    gpt_oss = size.get("sinks", False)
    weight(f"{blk}.ffn_gate_inp", count, embd, with_bias=gpt_oss)
    for name, rows, columns in (("gate", ff, embd), ("up", ff, embd), ("down", embd, ff)):
        weight(f"{blk}.ffn_{name}_exps", count, rows, columns)
        if gpt_oss:
            tensors.append((f"{blk}.ffn_{name}_exps.bias", (count, rows), 0.0, 0.2))
    shared = size["keys"].get("expert_shared_feed_forward_length")
    if shared:
        tensors.append((f"{blk}.ffn_gate_inp_shexp.weight", (embd,), 0.0, 0.1))
        weight(f"{blk}.ffn_gate_shexp", shared, embd)
        weight(f"{blk}.ffn_up_shexp", shared, embd)
        weight(f"{blk}.ffn_down_shexp", embd, shared)


def tokenizer(n_vocab=N_VOCAB):
    """Header keys of a byte-level BPE: three control tokens, 256 bytes, and merges learned from
    `TEXT`."""
    visible = [
        *range(33, 127),
        *range(161, 173),
        *range(174, 256),
    ]  # GPT-2's printable stand-ins for bytes
    letters = {b: chr(b) for b in visible}
    letters |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in letters)}
    words = [[letters[b] for b in word.encode()] for word in TEXT.replace(" ", "\n ").split("\n")]
    tokens = ["<|begin|>", "<|end|>", "<|unknown|>", *(letters[b] for b in range(256))]
    merges = []
    while len(tokens) < n_vocab:
        counts = {}
        for word in words:
            for pair in zip(word, word[1:]):
                counts[pair] = counts.get(pair, 0) + 1
        if counts:
            best = max(counts, key=lambda pair: (counts[pair], pair))
            merges.append(" ".join(best))
            tokens.append("".join(best))
            words = [merge(word, best) for word in words]
        else:  # the text is used up: names that no text encodes to
            tokens.append(f"<|spare{len(tokens)}|>")
    control = [t.startswith("<|") for t in tokens]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if c else 1 for c in control],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }


def merge(word, pair):
    """The word with every occurrence of the pair joined."""
    joined, i = [], 0
    while i < len(word):
        if tuple(word[i : i + 2]) == pair:
            joined.append(word[i] + word[i + 1])
            i += 2
        else:
            joined.append(word[i])
            i += 1
    return joined


TEXT = """The cat sat on the mat and the dog sat on the log. When the cat saw the dog, the dog ran to the house and the
cat ran to the tree. In the morning the sun came over the hill, and there was a letter for the old man at the door."""


def put(writer, key, value):
    """Add one header value, of the GGUF type that llama.cpp reads there."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def tiny_encoder(folder, architecture="bert", n_embd=32, n_layer=2, n_head=2, n_ff=64, n_ctx=1024):
    """Write `folder/tiny-<architecture>.gguf`, an encoder with random weights, and return its path.

    "bert" has a vocabulary of words and pools by their mean; "t5" is an encoder-decoder without a
    tokenizer."""
    path, stream = Path(folder) / f"tiny-{architecture}.gguf", np.random.RandomState(0)
    writer = gguf.GGUFWriter(str(path), architecture)
    put(writer, "general.name", f"tiny {architecture}")
    keys = {
        "context_length": n_ctx,
        "embedding_length": n_embd,
        "block_count": n_layer,
        "feed_forward_length": n_ff,
        "attention.head_count": n_head,
        "attention.layer_norm_epsilon": 1e-6,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.key_length": n_embd // n_head,
        "attention.value_length": n_embd // n_head,
    }
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *(f"\u2581{w}" for w in sorted(set(TEXT.lower().split()))),
    ]
    if architecture == "bert":
        keys |= {"attention.causal": False, "pooling_type": 1}
        tokens = {
            "model": "bert",
            "tokens": words,
            "token_type": [3] * 5 + [1] * (len(words) - 5),
            "bos_token_id": 2,
            "eos_token_id": 3,
            "seperator_token_id": 3,
            "padding_token_id": 0,
            "unknown_token_id": 1,
            "cls_token_id": 2,
            "mask_token_id": 4,
            "token_type_count": 2,
        }
    else:
        keys |= {
            "attention.relative_buckets_count": 32,
            "decoder_start_token_id": 0,
            "vocab_size": len(words),
        }
        tokens = {"model": "no_vocab"}
    for prefix, values in ((architecture, keys), ("tokenizer.ggml", tokens)):
        for key, value in values.items():
            put(writer, f"{prefix}.{key}", value)

    def add(name, *shape, mean=0.0, std=None):
        std = std or 1.2 / np.sqrt(shape[-1])
        writer.add_tensor(name, (mean + std * stream.standard_normal(shape)).astype(np.float32))

    def norm(name):
        add(f"{name}.weight", n_embd, mean=1.0, std=0.1)
        if architecture == "bert":
            add(f"{name}.bias", n_embd, std=0.1)

    add("token_embd.weight", len(words), n_embd, std=0.5)
    if architecture == "bert":
        add("position_embd.weight", n_ctx, n_embd, std=0.5)
        add("token_types.weight", 2, n_embd, std=0.1)
        norm("token_embd_norm")
    else:
        add("output.weight", len(words), n_embd)
    for side in ("",) if architecture == "bert" else ("enc.", "dec."):
        if side:
            norm(f"{side}output_norm")
        for i in range(n_layer):
            blk, output = f"{side}blk.{i}.", "attn_o" if side else "attn_output"
            parts = [f"attn_{p}" for p in "qkv"] + [output]
            parts += (
                [part.replace("attn", "cross_attn") for part in parts] if side == "dec." else []
            )
            for part in parts:
                add(f"{blk}{part}.weight", n_embd, n_embd)
            norms = ("attn_norm", "ffn_norm") if side else ("attn_output_norm", "layer_output_norm")
            for name in (*norms, *(("cross_attn_norm",) if side == "dec." else ())):
                norm(blk + name)
            if side:
                add(f"{blk}attn_rel_b.weight", 32, n_head)
            add(f"{blk}ffn_up.weight", n_ff, n_embd)
            add(f"{blk}ffn_down.weight", n_embd, n_ff)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def with_value(path, tensor, value, target, at=7):
    """A copy of an F32 model in which one weight of a tensor, or a slice of them, is `value`;
    returns its path."""
    data = bytearray(Path(path).read_bytes())
    found = next(t for t in gguf.GGUFReader(str(path)).tensors if t.name == tensor)
    np.frombuffer(data, np.float32, found.n_elements, found.data_offset)[at] = value
    Path(target).write_bytes(data)
    return Path(target)


def features(folder, width, hook, n_features=64):
    """A folder of published features as SAELens saves them: a top-4 autoencoder with seeded random
    directions."""
    import json

    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    directions = np.random.default_rng(0).normal(size=(width, n_features)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=0)
    weights = {
        "W_enc": directions,
        "W_dec": np.ascontiguousarray(directions.T),
        "b_enc": np.zeros(n_features, np.float32),
        "b_dec": np.zeros(width, np.float32),
    }
    save_file(weights, folder / "sae_weights.safetensors")
    about = {"architecture": "topk", "k": 4, "metadata": {"hook_name": hook}}
    (folder / "cfg.json").write_text(json.dumps(about | {"d_in": width, "d_sae": n_features}))
    return folder
