"""GGUF files in the layout of real models with random weights, for timing where no real weights can
be had.

    python tests/benchmarks/make_shapes.py 1b VOCAB.gguf OUT.gguf

1b: Llama 3.2 1B; 8b: Llama 3.1 8B; tiny: for a test of this script. Matrices are random Q4_K blocks
(Q6_K for embedding and output, as in Q4_K_M), so that no quantizer has to run. The tokenizer is
VOCAB's, a real one."""

import argparse
import sys
from pathlib import Path

import gguf
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from models import put  # noqa: E402

SHAPES = {
    "tiny": dict(n_layer=2, n_embd=256, n_ff=512, n_head=4, n_kv=2, tied=True, ctx=2048),
    "1b": dict(n_layer=16, n_embd=2048, n_ff=8192, n_head=32, n_kv=8, tied=True, ctx=131072),
    "8b": dict(n_layer=32, n_embd=4096, n_ff=14336, n_head=32, n_kv=8, tied=False, ctx=131072),
}
Q4_K, Q6_K = gguf.GGMLQuantizationType.Q4_K, gguf.GGMLQuantizationType.Q6_K
POOL = 1 << 18  # random blocks that are made; matrices repeat them from different starts


def block_pool(kind, random, scale):
    """Random blocks of 256 weights whose dequantized values have mean about 0 and deviation about
    `scale`."""
    size = {Q4_K: 144, Q6_K: 210}[kind]
    pool = random.integers(0, 256, (POOL, size), dtype=np.uint8)
    if kind == Q4_K:  # w = d * sc * q - dmin * m, q in 0..15, sc and m in 0..63
        pool[:, 0:2] = np.frombuffer(np.float16(scale / 230).tobytes(), np.uint8)
        pool[:, 2:4] = np.frombuffer(np.float16(7.5 * scale / 230).tobytes(), np.uint8)
    else:  # w = d * sc * (q - 32), sc in -128..127
        pool[:, -2:] = np.frombuffer(np.float16(scale / 1370).tobytes(), np.uint8)
    return pool


def matrix(pool, rows, width, start):
    """(rows, bytes per row) of blocks taken from the pool, beginning at `start`."""
    blocks = rows * width // 256
    index = (start + np.arange(blocks)) % POOL
    return pool[index].reshape(rows, -1)


def make(shape, vocab, out, seed=0):
    from llamatelemetry.files.gguf import GGUFFile

    size, random, source = SHAPES[shape], np.random.default_rng(seed), GGUFFile(vocab)
    writer = gguf.GGUFWriter(str(out), "llama", use_temp_file=False)
    writer.add_name(f"random weights in the shape of Llama {shape}")
    for key, value in source.metadata.items():
        if key.startswith("tokenizer."):
            put(writer, key, value)
    head_dim = size["n_embd"] // size["n_head"]
    writer.add_block_count(size["n_layer"])
    writer.add_context_length(size["ctx"])
    writer.add_embedding_length(size["n_embd"])
    writer.add_feed_forward_length(size["n_ff"])
    writer.add_head_count(size["n_head"])
    writer.add_head_count_kv(size["n_kv"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(source.n_vocab)
    writer.add_file_type(15)
    pools = {
        Q4_K: block_pool(Q4_K, random, size["n_embd"] ** -0.5),
        Q6_K: block_pool(Q6_K, random, 0.02),
    }

    def add(name, rows, width, kind=Q4_K):
        data = matrix(pools[kind], rows, width, int(random.integers(POOL)))
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)

    def norm(name):
        writer.add_tensor(f"{name}.weight", np.ones(size["n_embd"], np.float32))

    add("token_embd", source.n_vocab, size["n_embd"], Q6_K)
    if not size["tied"]:
        add("output", source.n_vocab, size["n_embd"], Q6_K)
    norm("output_norm")
    for layer in range(size["n_layer"]):
        blk = f"blk.{layer}"
        norm(f"{blk}.attn_norm")
        norm(f"{blk}.ffn_norm")
        add(f"{blk}.attn_q", size["n_embd"], size["n_embd"])
        add(f"{blk}.attn_k", size["n_kv"] * head_dim, size["n_embd"])
        add(f"{blk}.attn_v", size["n_kv"] * head_dim, size["n_embd"])
        add(f"{blk}.attn_output", size["n_embd"], size["n_embd"])
        add(f"{blk}.ffn_gate", size["n_ff"], size["n_embd"])
        add(f"{blk}.ffn_up", size["n_ff"], size["n_embd"])
        add(f"{blk}.ffn_down", size["n_embd"], size["n_ff"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=sys.stderr.isatty())
    writer.close()
    return Path(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("vocab")
    parser.add_argument("out")
    options = parser.parse_args()
    print(make(options.shape, options.vocab, options.out))
