"""GGUFFile on hand-built files with known answers, and on the two real models."""

import gguf
import numpy as np
import pytest

from llamatelemetry.errors import ModelLoadError, ModelNotFoundError
from llamatelemetry.files.gguf import GGUFFile
from llamatelemetry.files.vocabulary import decode_pieces

TOKENS = ["<|end|>", "Ġthe", "Ċ", "Ã©", "Ã", "hello"]
EMBEDDING = np.arange(6 * 64, dtype=np.float32).reshape(6, 64) / 8 - 20


def write(
    path,
    *,
    tokens=TOKENS,
    types=(3, 1, 1, 1, 1, 1),
    model="gpt2",
    keys=None,
    tensors=None,
    architecture="llama",
    split=None,
):
    """A small GGUF: 2 layers, 4 heads, 64 wide unless `keys` says otherwise."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    defaults = {
        "block_count": 2,
        "embedding_length": 64,
        "context_length": 128,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "feed_forward_length": 96,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }
    for key, value in {**defaults, **(keys or {})}.items():
        name = f"{architecture}.{key}"
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_uint32(name, value)
    if tokens:
        writer.add_tokenizer_model(model)
        writer.add_token_list(tokens)
        writer.add_token_types(list(types))
    if split:
        number, count, total = split
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", total)
    for name, array, kind in (
        tensors if tensors is not None else [("token_embd.weight", EMBEDDING, None)]
    ):
        quantized = gguf.quants.quantize(array, kind) if kind is not None else array
        writer.add_tensor(name, quantized, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_facts(tmp_path):
    g = GGUFFile(write(tmp_path / "a.gguf", keys={"rope.freq_base": 5000.0}))
    assert (g.architecture, g.name) == ("llama", "tiny")
    assert (g.n_layer, g.n_head, g.n_kv_head, g.n_embd, g.n_ff, g.n_vocab) == (2, 4, 2, 64, 96, 6)
    assert (g.head_dim, g.head_dim_v, g.n_ctx_train, g.rope_freq_base) == (16, 16, 128, 5000.0)
    assert g.norm_eps == pytest.approx(1e-5)
    assert (g.sliding_window, g.final_logit_softcap, g.attn_logit_softcap) == (None, None, None)
    assert (g.n_expert, g.n_expert_used) == (0, 0)
    assert g.n_kv_head_per_layer == [2, 2]
    assert g.output_name == "token_embd.weight"


def test_facts_of_the_gemma_kind(tmp_path):
    keys = {
        "attention.key_length": 32,
        "attention.value_length": 24,
        "attention.sliding_window": 512,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
        "expert_count": 8,
        "expert_used_count": 2,
    }
    g = GGUFFile(write(tmp_path / "a.gguf", architecture="gemma2", keys=keys))
    assert (g.head_dim, g.head_dim_v, g.sliding_window) == (32, 24, 512)
    assert (g.final_logit_softcap, g.attn_logit_softcap, g.n_expert, g.n_expert_used) == (
        30.0,
        50.0,
        8,
        2,
    )


def test_layers_that_differ(tmp_path):
    g = GGUFFile(
        write(
            tmp_path / "a.gguf",
            keys={"attention.head_count_kv": [1, 4], "feed_forward_length": [96, 32]},
        )
    )
    assert (g.n_kv_head, g.n_kv_head_per_layer) == (4, [1, 4])
    assert (g.n_ff, g.n_ff_per_layer) == (96, [96, 32])


def test_pieces_of_byte_level_bpe(tmp_path):
    g = GGUFFile(write(tmp_path / "a.gguf"))
    assert g.pieces == ["<|end|>", " the", "\n", "é", b"\xc3", "hello"]
    assert g.token_types.tolist() == [3, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "model, token, kind, piece",
    [
        ("llama", "▁the", 1, " the"),
        ("llama", "<0x0A>", 6, "\n"),
        ("llama", "<0xE2>", 6, b"\xe2"),
        ("llama", "<0x0A>", 1, "<0x0A>"),
        ("llama", "<bos>", 3, "<bos>"),
        ("llama", "a▁b", 4, "a▁b"),
        ("gpt2", "Ġ", 4, "Ġ"),
        ("gpt2", "日本", 1, "日本"),
        ("gpt2", "æĹ¥", 1, "日"),
        ("gpt2", "Ń", 1, b"\xad"),
        ("gpt2", "", 1, ""),
        ("gemma4", "▁the", 1, " the"),
        ("plamo2", "▁the", 1, "▁the"),
    ],
)
def test_piece(model, token, kind, piece):
    assert decode_pieces(model, [token], [kind]) == [piece]


def test_every_byte_has_its_character():
    """GPT-2's table is a bijection: 256 one-character tokens give the 256 bytes back."""
    from llamatelemetry.files.vocabulary import _BYTE_OF

    pieces = decode_pieces("gpt2", list(_BYTE_OF), [1] * 256)
    raw = [piece if isinstance(piece, bytes) else piece.encode() for piece in pieces]
    assert sorted(raw) == [bytes([byte]) for byte in range(256)]


def test_tensor_table(tmp_path):
    rng = np.random.default_rng(0)
    tensors = [
        ("token_embd.weight", EMBEDDING, gguf.GGMLQuantizationType.Q8_0),
        (
            "blk.1.attn_q.weight",
            rng.normal(size=(64, 64)).astype(np.float32),
            gguf.GGMLQuantizationType.Q4_1,
        ),
        ("blk.1.attn_norm.weight", np.ones(64, np.float32), None),
        (
            "blk.0.ffn_gate_exps.weight",
            rng.normal(size=(3, 8, 64)).astype(np.float32),
            gguf.GGMLQuantizationType.Q8_0,
        ),
        ("output.weight", EMBEDDING, gguf.GGMLQuantizationType.F16),
        ("rope_freqs.weight", np.ones(8, np.float32), None),
    ]
    g = GGUFFile(write(tmp_path / "a.gguf", tensors=tensors))
    t = g.tensors
    row = t.loc["blk.1.attn_q.weight"]
    assert (row.type, row["shape"], row.n_elements, row.size_bytes) == (
        "Q4_1",
        (64, 64),
        4096,
        2560,
    )
    assert (row.bits_per_weight, row.layer) == (5.0, 1)
    assert t.loc["blk.0.ffn_gate_exps.weight", "shape"] == (3, 8, 64)
    assert t["group"].to_dict() == {
        "token_embd.weight": "embedding",
        "blk.1.attn_q.weight": "attn_q",
        "blk.1.attn_norm.weight": "norm",
        "blk.0.ffn_gate_exps.weight": "experts",
        "output.weight": "output",
        "rope_freqs.weight": "other",
    }
    assert t[t.layer == 1].index.tolist() == ["blk.1.attn_q.weight", "blk.1.attn_norm.weight"]
    assert t.layer.isna().sum() == 3
    assert g.bits_per_weight == pytest.approx(8 * t.size_bytes.sum() / t.n_elements.sum())
    assert g.output_name == "output.weight"
    assert g.size_bytes == (tmp_path / "a.gguf").stat().st_size


@pytest.mark.parametrize(
    "name, group",
    [
        ("blk.0.attn_q.bias", "attn_q"),
        ("blk.0.attn_qkv.weight", "attn_qkv"),
        ("blk.0.attn_q_norm.weight", "norm"),
        ("blk.0.post_attention_norm.weight", "norm"),
        ("output_norm.weight", "norm"),
        ("blk.12.ffn_down.weight", "ffn_down"),
        ("blk.0.attn_output.weight", "attn_output"),
        ("blk.0.ffn_gate_inp.weight", "other"),
        ("blk.0.ffn_up.3.weight", "experts"),
        ("blk.0.ssm_in.weight", "other"),
        ("output.bias", "output"),
        ("position_embd.weight", "embedding"),
    ],
)
def test_group(name, group):
    from llamatelemetry.files.gguf import _group

    assert _group(name) == group


KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_the_whole_tensors_rows(tmp_path, kind):
    """Any choice of rows equals what gguf gives for the whole tensor, to the bit."""
    kind = gguf.GGMLQuantizationType[kind]
    weight = np.random.default_rng(1).normal(size=(96, 64)).astype(np.float32)
    g = GGUFFile(write(tmp_path / "a.gguf", tensors=[("w.weight", weight, kind)]))
    expected = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
    assert np.array_equal(g.tensor("w.weight"), expected)
    for ids in ([5], [95, 0, 7, 7], slice(3, 90, 2), slice(0, 0), -1, []):
        rows = g.rows("w.weight", ids)
        assert rows.dtype == np.float32 and rows.flags.writeable
        assert np.array_equal(
            rows, expected[[ids] if isinstance(ids, int) else ids].reshape(-1, 64)
        )
    blocks = list(g.iter_rows("w.weight", block=40))
    assert [start for start, _ in blocks] == [0, 40, 80]
    assert np.array_equal(np.concatenate([block for _, block in blocks]), expected)


def test_three_dimensions(tmp_path):
    weight = np.random.default_rng(2).normal(size=(3, 5, 32)).astype(np.float32)
    g = GGUFFile(write(tmp_path / "a.gguf", tensors=[("blk.0.ffn_up_exps.weight", weight, None)]))
    assert np.array_equal(g.tensor("blk.0.ffn_up_exps.weight"), weight)
    assert np.array_equal(g.rows("blk.0.ffn_up_exps.weight", [7])[0], weight[1, 2])


def test_rows_that_are_not_there(tmp_path):
    g = GGUFFile(write(tmp_path / "a.gguf"))
    with pytest.raises(IndexError, match="rows 0 to 5"):
        g.rows("token_embd.weight", [6])
    with pytest.raises(ModelLoadError, match="nearest: token_embd.weight"):
        g.rows("token_embed.weight", [0])


def test_split(tmp_path):
    write(tmp_path / "m-00001-of-00002.gguf", split=(0, 2, 2))
    extra = np.full((4, 64), 3.0, np.float32)
    write(
        tmp_path / "m-00002-of-00002.gguf",
        split=(1, 2, 2),
        tokens=None,
        tensors=[("output.weight", extra, None)],
    )
    g = GGUFFile(tmp_path / "m-00001-of-00002.gguf")
    assert np.array_equal(g.rows("output.weight", [1]), extra[:1])
    assert np.array_equal(g.tensor("token_embd.weight"), EMBEDDING)
    assert g.size_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    with pytest.raises(ModelLoadError, match="Open the first: m-00001-of-00002.gguf"):
        GGUFFile(tmp_path / "m-00002-of-00002.gguf")
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(ModelLoadError, match="missing beside it: m-00002-of-00002.gguf"):
        GGUFFile(tmp_path / "m-00001-of-00002.gguf")


def test_split_with_another_models_part(tmp_path):
    write(tmp_path / "m-00001-of-00002.gguf", split=(0, 2, 3))
    write(tmp_path / "m-00002-of-00002.gguf", split=(1, 2, 3), tokens=None)
    with pytest.raises(ModelLoadError, match="3 expected"):
        GGUFFile(tmp_path / "m-00001-of-00002.gguf")


def test_split_renamed(tmp_path):
    write(tmp_path / "model.gguf", split=(0, 2, 1))
    with pytest.raises(ModelLoadError, match="NAME-00001-of-00002.gguf"):
        GGUFFile(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (b"I am a poem,\nnot a model.\n", "is a text file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"\n<!doctype html><html>", "is a web page"),
        (b"\x80\x04\x95" * 50, "is not a GGUF file"),
        (b"GGUF\x03\x00", "is truncated"),
        (b"GGUF" + b"\x00\x00\x00\x03" + bytes(32), "big-endian"),
        (b"GGUF" + b"\x01\x00\x00\x00" + bytes(32), "version 1"),
        (b"GGUF" + b"\x03\x00\x00\x00" + b"\xff" * 32, "damaged"),
    ],
)
def test_files_that_are_no_models(tmp_path, content, message):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelLoadError, match=message) as error:
        GGUFFile(path)
    assert str(path) in str(error.value)


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(ModelNotFoundError, match="There is no file"):
        GGUFFile(tmp_path / "none.gguf")
    with pytest.raises(ModelLoadError, match="is a directory"):
        GGUFFile(tmp_path)


def test_truncated_anywhere(tmp_path):
    """Cut at any length, a file is refused with a typed error: in the header, in a key, in the
    tensor data."""
    whole = write(tmp_path / "whole.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in range(1, len(whole) - 32, 17):
        cut.write_bytes(whole[:length])
        with pytest.raises(ModelLoadError):
            GGUFFile(cut)


def test_flipped_bytes_never_crash(tmp_path):
    """A damaged header gives a typed error, or is still a readable file; nothing else."""
    whole = bytearray(write(tmp_path / "whole.gguf").read_bytes())
    rng = np.random.default_rng(3)
    path = tmp_path / "flipped.gguf"
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[rng.integers(4, 700)] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            g = GGUFFile(path)
            g.tensors, g.pieces, g.bits_per_weight
        except ModelLoadError:
            refused += 1
    assert refused > 20


def test_no_architecture(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.kv_data[0].clear()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelLoadError, match="names no architecture"):
        GGUFFile(tmp_path / "a.gguf")


def test_no_tokenizer(tmp_path):
    g = GGUFFile(write(tmp_path / "a.gguf", tokens=None))
    assert g.pieces == [] and len(g.token_types) == 0
    assert g.n_vocab == 6  # rows of the embedding


@pytest.fixture(scope="module", params=["smollm2-135m-Q4_1", "gemma-3-270m-Q4_K_M"])
def real(request, tmp_path_factory):
    from llamatelemetry.files.models import resolve_model
    from llamatelemetry.files.packages import package_parts
    from llamatelemetry.files.registry import REGISTRY

    if not package_parts(REGISTRY[request.param])[0]:
        pytest.skip(f"the package of {request.param} is not installed")
    return GGUFFile(resolve_model(request.param, progress=False))


@pytest.mark.slow
def test_real_models(real):
    expected = {
        "llama": (30, 9, 3, 576, 1536, 49152, 64, None, "Q4_1", 5.7437),
        "gemma3": (18, 4, 1, 640, 2048, 262144, 256, 512, "Q4_K_M", 7.3581),
    }[real.architecture]
    assert (
        real.n_layer,
        real.n_head,
        real.n_kv_head,
        real.n_embd,
        real.n_ff,
        real.n_vocab,
        real.head_dim,
        real.sliding_window,
        real.file_type,
    ) == expected[:-1]
    assert real.bits_per_weight == pytest.approx(expected[-1], abs=1e-4)
    assert real.output_name == "token_embd.weight"
    assert len(real.pieces) == real.n_vocab and {" the", "\n"} <= set(real.pieces)
    assert real.tensors.size_bytes.sum() < real.size_bytes
    rows = real.rows("token_embd.weight", [0, real.n_vocab - 1])
    assert rows.shape == (2, real.n_embd) and np.isfinite(rows).all() and rows.std() > 0


@pytest.mark.slow
def test_real_rows_of_every_type(real):
    """One tensor of each type (Q4_K and Q6_K among Gemma's): chosen rows equal the gguf package's,
    row by row."""
    for kind, name in real.tensors.reset_index().groupby("type").name.first().items():
        raw, _, shape = real.raw(name)
        ids = [len(raw) - 1, 0]
        expected = [
            gguf.quants.dequantize(raw[i : i + 1].copy(), gguf.GGMLQuantizationType[kind])[0]
            for i in ids
        ]
        assert np.array_equal(real.rows(name, ids), expected)
        assert np.array_equal(real.rows(name, slice(0, 64))[:1], expected[1:])


@pytest.mark.slow
def test_real_models_as_the_gguf_package_reads_them(real):
    """Metadata, tensor table and bytes equal those of gguf.GGUFReader (which takes half a minute
    for Gemma 3)."""
    if real.architecture != "llama":
        pytest.skip("half a minute for 262,144 tokens; the same code reads both")
    reader = gguf.GGUFReader(real.path)
    fields = {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    assert fields == real.metadata
    assert [t.name for t in reader.tensors] == real.tensors.index.tolist()
    for tensor in reader.tensors[:12]:
        assert tensor.tensor_type.name == real.tensors.type[tensor.name]
        assert np.array_equal(
            gguf.quants.dequantize(tensor.data, tensor.tensor_type), real.tensor(tensor.name)
        )


@pytest.mark.slow
def test_real_pieces_as_llama_cpp_writes_them(real):
    import ctypes

    llama_cpp = pytest.importorskip("llama_cpp", reason="the engine is not installed")
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(real.path).encode(), params)
    vocab = llama_cpp.llama_model_get_vocab(model)
    assert llama_cpp.llama_vocab_n_tokens(vocab) == real.n_vocab
    buffer = ctypes.create_string_buffer(1024)
    for token, piece in enumerate(real.pieces):
        length = llama_cpp.llama_token_to_piece(vocab, token, buffer, len(buffer), 0, True)
        assert buffer.raw[:length] == (piece if isinstance(piece, bytes) else piece.encode()), token
    llama_cpp.llama_model_free(model)
