"""Making files: expanded, stand-in, quantized; and what is left behind when that fails."""

import os
import shutil
import struct
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
from models import IDS, tiny_model

from llamatelemetry import GGUFFile, ModelLoadError, ModelNotFoundError
from llamatelemetry.capture.session import CaptureSession
from llamatelemetry.compare.texts import load_text
from llamatelemetry.convert import expand as module
from llamatelemetry.convert import importance, writing
from llamatelemetry.convert.expand import excerpt, expand, make_reference
from llamatelemetry.convert.importance import imatrix
from llamatelemetry.convert.quantize import fallbacks, quantizations, quantize
from llamatelemetry.convert.together import reference_for
from llamatelemetry.errors import QuantizeError
from llamatelemetry.files import types
from llamatelemetry.files.outputs import folder_of
from llamatelemetry.files.programs import tool

KINDS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


def write(path, kinds, width=64, file_type=None, extra=()):
    """A small GGUF with one matrix of each type, a vector, and metadata of several kinds."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.name", "Tiny")
    writer.add_array("tokenizer.ggml.tokens", ["a", "é", "<0x0A>"])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0, 2.0])
    writer.add_float32("llama.rope.freq_base", 1e5)
    if file_type is not None:
        writer.add_uint32("general.file_type", int(file_type))
    for key, value in extra:
        writer.add_uint16(key, value)
    rng = np.random.default_rng(0)
    for i, kind in enumerate(kinds):
        values = rng.normal(size=(6, width)).astype(np.float32)
        qtype = gguf.GGMLQuantizationType[kind]
        data = gguf.quants.quantize(values, qtype)
        writer.add_tensor(
            f"blk.{i}.attn_q.weight", data, raw_dtype=None if kind == "F32" else qtype
        )
    writer.add_tensor("output_norm.weight", np.arange(width, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def weights(path):
    return {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors
    }


@pytest.mark.parametrize("kind, tolerance", [("F32", 0), ("F16", 2**-11), ("BF16", 2**-8)])
def test_expand_keeps_weights_and_metadata(tmp_path, kind, tolerance):
    source = write(tmp_path / "in.gguf", KINDS, file_type=gguf.LlamaFileType.MOSTLY_Q4_1)
    result = expand(source, tmp_path / "new" / "out.gguf", kind, progress=False)
    before, after = gguf.GGUFReader(source), gguf.GGUFReader(result)
    for key, field in before.fields.items():
        if not key.startswith("GGUF.") and key != "general.file_type":
            assert (
                after.fields[key].contents() == field.contents()
                and after.fields[key].types == field.types
            ), key
    assert after.fields["general.file_type"].contents() == {"F32": 0, "F16": 1, "BF16": 32}[kind]
    assert {t.tensor_type.name for t in after.tensors if len(t.shape) > 1} == {kind}
    assert (
        next(t for t in after.tensors if t.name == "output_norm.weight").tensor_type.name == "F32"
    )
    for name, values in weights(source).items():
        np.testing.assert_allclose(weights(result)[name], values, rtol=tolerance, atol=0)
    assert [p.name for p in result.parent.iterdir()] == ["out.gguf"]


def test_expand_goes_block_by_block(tmp_path, monkeypatch):
    source = write(tmp_path / "in.gguf", ["Q4_1", "Q8_0"])
    whole = expand(source, tmp_path / "whole.gguf", progress=False).read_bytes()
    noisy = make_reference(source, tmp_path / "noisy.gguf", progress=False).read_bytes()
    monkeypatch.setattr(writing, "JOB", 2 * 64)  # the noise is the same wherever a job begins
    assert make_reference(source, tmp_path / "b.gguf", progress=False).read_bytes() == noisy
    monkeypatch.setattr(module, "ROWS", 4)  # 6 rows: a full block and a part
    assert expand(source, tmp_path / "blocks.gguf", progress=False).read_bytes() == whole


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_the_step_of_k_quants_is_their_grid(kind):
    """gguf-py reads k-quants and does not write them: random blocks, with a scale of 0.5 for all of
    them."""
    qtype = gguf.GGMLQuantizationType[kind]
    raw = (
        np.random.default_rng(1)
        .integers(0, 256, (6, gguf.GGML_QUANT_SIZES[qtype][1]))
        .astype(np.uint8)
    )
    half = np.array([0.5], np.float16).view(np.uint8)
    if kind == "Q6_K":
        raw[:, -2:] = half
    else:
        raw[:, :4] = np.tile(half, 2)
    values = gguf.quants.dequantize(raw, qtype)
    steps = module._steps(SimpleNamespace(name="x", data=raw, tensor_type=qtype), 0, 6)
    block = 16 if kind == "Q6_K" else 32
    values, steps = values.reshape(-1, block), steps.reshape(-1, 1)
    used = steps[:, 0] > 0
    gaps = np.diff(np.sort(values[used], axis=1), axis=1) / steps[used]
    np.testing.assert_allclose(gaps, np.round(gaps), atol=2e-3)
    assert np.round(gaps[gaps > 0.5]).min() == 1  # and on no coarser one


def test_an_excerpt_is_those_tensors_and_all_metadata(tmp_path):
    source, names = (
        write(tmp_path / "in.gguf", KINDS),
        ["blk.3.attn_q.weight", "blk.0.attn_q.weight"],
    )
    found = GGUFFile(excerpt(source, tmp_path / "out.gguf", names))
    whole = GGUFFile(source)
    assert list(found.tensors.index) == names and found.metadata == whole.metadata
    for name in names:
        assert found.raw(name)[1:] == whole.raw(name)[1:]
        np.testing.assert_array_equal(found.raw(name)[0][:], whole.raw(name)[0][:])
    with pytest.raises(ModelLoadError, match="no tensor"):
        excerpt(source, tmp_path / "out.gguf", ["blk.9"])
    with pytest.raises(QuantizeError):
        excerpt(source, source, names)


@pytest.mark.slow
@pytest.mark.parametrize("kind, becomes", [("Q4_0", "Q4_0"), ("Q4_K_M", "Q5_0")])
def test_an_excerpt_is_quantized_as_the_whole_is(tmp_path, smollm2, kind, becomes):
    """Notebook 13 needs the token embedding alone: not minutes and gigabytes of a whole model."""
    name = "token_embd.weight"
    part = excerpt(smollm2, tmp_path / "part.gguf", [name])
    with pytest.warns(UserWarning, match="quantized already"):
        found = GGUFFile(quantize(part, tmp_path / "a.gguf", kind, pure=True, progress=False))
        asked = {name: becomes}
        whole = quantize(smollm2, tmp_path / "b.gguf", "Q4_0", tensor_types=asked, progress=False)
    assert found.tensors.loc[name, "type"] == becomes
    np.testing.assert_array_equal(found.raw(name)[0][:], GGUFFile(whole).raw(name)[0][:])


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_one_step_wide(tmp_path, kind):
    source, name = write(tmp_path / "in.gguf", [kind]), "blk.0.attn_q.weight"
    result = make_reference(source, tmp_path / "out.gguf", seed=3, progress=False)
    step = module._steps(gguf.GGUFReader(source).tensors[0], 0, 6)
    gaps = np.diff(np.sort(weights(source)[name][0, :32])) / step[0, 0]
    np.testing.assert_allclose(
        gaps, np.round(gaps), atol=2e-3
    )  # the step is the grid that the weights lie on
    share = (weights(result)[name] - weights(source)[name]) / np.repeat(step, 32, axis=1)
    assert np.abs(share).max() <= 0.5001 and share.std() == pytest.approx(1 / np.sqrt(12), rel=0.15)
    np.testing.assert_array_equal(
        weights(result)["output_norm.weight"], weights(source)["output_norm.weight"]
    )
    assert gguf.GGUFReader(result).fields["general.name"].contents().endswith("not the original")
    again = make_reference(source, tmp_path / "again.gguf", seed=3, progress=False)
    other = make_reference(source, tmp_path / "other.gguf", seed=4, progress=False)
    assert (
        again.read_bytes() == result.read_bytes()
        and (weights(other)[name] != weights(result)[name]).any()
    )


def test_what_cannot_be_expanded(tmp_path):
    source = write(tmp_path / "in.gguf", KINDS)
    with pytest.raises(QuantizeError, match="use quantize"):
        expand(source, tmp_path / "out.gguf", "Q8_0")
    with pytest.raises(ModelNotFoundError, match="list_models"):
        expand(tmp_path / "none.gguf", tmp_path / "out.gguf")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(source.read_bytes()[:200])
    with pytest.raises(ModelLoadError, match="not a readable GGUF"):
        expand(broken, tmp_path / "out.gguf")
    part = write(tmp_path / "part.gguf", ["F32"], extra=[("split.count", 2)])
    with pytest.raises(ModelLoadError, match="split in 2"):
        expand(part, tmp_path / "out.gguf")
    unknown = tmp_path / "tq.gguf"
    write(unknown, ["TQ2_0"], width=256)
    with pytest.raises(QuantizeError, match="TQ2_0: make_reference.. knows"):
        make_reference(unknown, tmp_path / "out.gguf", progress=False)
    assert not (tmp_path / "out.gguf").exists() and not list(tmp_path.glob(".*partial"))


def test_a_full_disk_is_seen_beforehand(tmp_path, monkeypatch):
    source = write(tmp_path / "in.gguf", KINDS)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000)
    )
    with pytest.raises(QuantizeError, match="0.00 GB free"):
        expand(source, tmp_path / "out.gguf", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["in.gguf"]


def test_a_disk_that_fills_up_while_writing_leaves_nothing(tmp_path):
    """A file size limit stands in for the full disk: writing fails half way, in a process of its
    own."""
    source = write(tmp_path / "in.gguf", ["Q8_0"] * 40, width=4096)
    script = (
        "import resource, signal, sys\n"
        "from llamatelemetry.convert.expand import QuantizeError, expand\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
        "try:\n    expand(sys.argv[1], sys.argv[2], progress=False)\n"
        "except QuantizeError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, source, tmp_path / "out.gguf"],
        capture_output=True,
        text=True,
    )
    assert "Could not write" in done.stdout and "Nothing was left behind" in done.stdout, (
        done.stderr
    )
    assert [p.name for p in tmp_path.iterdir()] == ["in.gguf"]


def test_a_reference_is_no_quantization_of_itself(tmp_path):
    reference = write(tmp_path / "Q8_0.gguf", ["F32"])
    before = reference.read_bytes()
    with pytest.raises(QuantizeError, match="would destroy"):
        quantizations(reference, ["Q8_0"], tmp_path, progress=False)
    assert reference.read_bytes() == before


@pytest.mark.parametrize("type", ["Q9", None, ""])
def test_an_unknown_type_is_said(type, tmp_path):
    with pytest.raises(QuantizeError, match="Could not quantize"):
        quantize(write(tmp_path / "in.gguf", ["F32"]), tmp_path / "out.gguf", type, progress=False)


def test_fallbacks_are_named(tmp_path):
    narrow = write(
        tmp_path / "narrow.gguf",
        ["Q5_0", "Q8_0", "F32"],
        width=96,
        file_type=gguf.LlamaFileType.MOSTLY_Q4_K_M,
    )
    table = fallbacks(narrow)
    assert table[["type", "instead_of", "row_width"]].values.tolist() == [
        ["Q5_0", "Q4_K", 96],
        ["Q8_0", "Q6_K", 96],
    ]
    wide = write(
        tmp_path / "wide.gguf", ["Q5_0"], width=256, file_type=gguf.LlamaFileType.MOSTLY_Q4_K_M
    )
    plain = write(
        tmp_path / "plain.gguf", ["Q8_0"], width=96, file_type=gguf.LlamaFileType.MOSTLY_Q8_0
    )
    assert len(fallbacks(wide)) == len(fallbacks(plain)) == 0


def test_the_reference_is_the_file_itself_or_its_stand_in(tmp_path):
    quantized = GGUFFile(write(tmp_path / "in.gguf", ["Q4_0", "Q8_0"]))
    stand_in = reference_for(quantized, tmp_path, seed=3)
    assert stand_in.path == tmp_path / "in-noise-3-F32.gguf" and "not the original" in stand_in.name
    made = stand_in.path.stat().st_mtime_ns
    assert reference_for(quantized, tmp_path, seed=3).path.stat().st_mtime_ns == made
    assert reference_for(stand_in, tmp_path) is stand_in


@pytest.mark.parametrize("newer", [True, False])
def test_a_stand_in_of_another_file_of_that_name_is_not_used(newer, tmp_path):
    """A model that was written anew, and one of another folder that is older than the stand-in."""
    path = tmp_path / "in.gguf"
    write(path, ["Q4_0", "Q8_0"])
    first = reference_for(GGUFFile(path), tmp_path).path
    before = first.read_bytes()
    if newer:
        other = write(path, ["Q8_0", "Q8_0"])
        later = first.stat().st_mtime_ns + 10**6
        os.utime(other, ns=(later, later))
    else:
        other = write(folder_of(tmp_path / "other") / path.name, ["Q8_0"], width=96)
        os.utime(other, (0, 0))
    again = reference_for(GGUFFile(other), tmp_path).path
    alone = reference_for(GGUFFile(other), folder_of(tmp_path / "alone")).path
    assert again == first and again.read_bytes() == alone.read_bytes() != before


def test_a_missing_tool_is_explained(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(QuantizeError, match="llama-nonsense is not on this machine.*engine build"):
        tool("llama-nonsense")


@pytest.mark.slow
def test_llama_quantize(smollm2, tmp_path):
    reference = make_reference(smollm2, tmp_path / "reference.gguf", progress=False)
    files = quantizations(reference, ["Q8_0", "Q4_K_M"], tmp_path, progress=False)
    assert len(fallbacks(files["Q4_K_M"])) == 181 and len(fallbacks(files["Q8_0"])) == 0
    assert (fallbacks(files["Q4_K_M"])["type"] == "Q5_0").sum() == 166
    before = files["Q8_0"].stat().st_mtime_ns
    assert (
        quantizations(reference, ["Q8_0"], tmp_path, progress=False)["Q8_0"].stat().st_mtime_ns
        == before
    )
    mixed = quantize(
        reference,
        tmp_path / "mixed.gguf",
        "Q4_0",
        progress=False,
        tensor_types={r"blk\.3\.ffn_(up|gate|down)\.weight": "Q8_0"},
    )
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(mixed).tensors}
    assert kinds["blk.3.ffn_up.weight"] == "Q8_0" and kinds["blk.4.ffn_up.weight"] == "Q4_0"
    with pytest.raises(QuantizeError, match="importance matrix"):
        quantize(reference, tmp_path / "no.gguf", "IQ2_XXS", progress=False)
    with pytest.raises(QuantizeError, match="invalid ftype|Could not quantize"):
        quantize(reference, tmp_path / "no.gguf", "Q3_NONSENSE", progress=False)
    with pytest.warns(UserWarning, match="quantized already"):
        quantize(smollm2, tmp_path / "again.gguf", "Q8_0", progress=False)
    assert not (tmp_path / "no.gguf").exists() and not list(tmp_path.glob(".*partial"))


@pytest.mark.slow
def test_importance_matrix(smollm2, tmp_path):
    made = imatrix(
        smollm2, load_text()[:4000], tmp_path / "imatrix.gguf", n_ctx=128, chunks=2, progress=False
    )
    names = {t.name for t in gguf.GGUFReader(made).tensors}
    assert any("blk.0.attn_q.weight" in name for name in names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = quantize(smollm2, tmp_path / "plain.gguf", "Q4_0", progress=False)
        weighed = quantize(smollm2, tmp_path / "weighed.gguf", "Q4_0", imatrix=made, progress=False)
    assert (
        plain.stat().st_size < weighed.stat().st_size + 10_000
        and plain.read_bytes() != weighed.read_bytes()
    )
    with pytest.raises(QuantizeError, match="at least"):
        imatrix(smollm2, "Call me Ishmael.", tmp_path / "short.gguf", progress=False)
    with pytest.raises(ModelNotFoundError, match="imatrix"):
        quantize(
            smollm2, tmp_path / "no.gguf", "Q4_0", imatrix=tmp_path / "none.gguf", progress=False
        )
    assert not (tmp_path / "short.gguf").exists()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A llama whose rows are 256 wide, as k-quants and Q2_0 want them."""
    pytest.importorskip("llama_cpp")
    return tiny_model("llama", tmp_path_factory.mktemp("tiny"), n_embd=256, n_ff=256, head_dim=64)


def test_a_type_that_the_gguf_package_lacks_is_the_engines(tiny, tmp_path):
    """Q2_0 is number 42; gguf 0.19 ends at 41. llama.cpp makes, names, reads and runs it."""
    made = quantizations(tiny, ["Q2_0"], tmp_path, progress=False)["Q2_0"]
    file = GGUFFile(made)
    row = file.tensors.loc["blk.0.attn_q.weight"]
    assert row["type"] == "Q2_0" and row["bits_per_weight"] == 2.25 and row["shape"] == (256, 256)
    original, read = (
        GGUFFile(tiny).tensor("blk.0.attn_q.weight"),
        file.tensor("blk.0.attn_q.weight"),
    )
    assert np.corrcoef(original.ravel(), read.ravel())[0, 1] > 0.7
    blocks = read.reshape(-1, 64)
    assert max(len(np.unique(block)) for block in blocks) <= 4  # two bits
    np.testing.assert_array_equal(file.rows("blk.0.attn_q.weight", [3, 0]), read[[3, 0]])
    floats = GGUFFile(expand(made, tmp_path / "floats.gguf", progress=False))
    np.testing.assert_array_equal(floats.tensor("blk.0.attn_q.weight"), read)
    with CaptureSession(made, threads=1) as session:
        assert session.capture(IDS, stages=("hidden",)).hidden.shape == (4, len(IDS), 256)
    with pytest.warns(UserWarning, match="quantized already .*Q2_0"):
        quantize(made, tmp_path / "again.gguf", "Q8_0", progress=False)


def test_a_quantization_is_used_again_where_it_was_made_from_this_reference(tiny, tmp_path):
    def made(reference, **options):
        path = quantizations(reference, ["Q8_0"], tmp_path, progress=False, **options)["Q8_0"]
        return path.stat().st_ino

    first = made(tiny)
    assert made(tiny) == first
    other = tiny_model("llama", tmp_path, n_embd=256, n_ff=512, head_dim=64)
    os.utime(other, (0, 0))  # older than what is there, and another model
    second = made(other)
    assert second != first and made(other) == second
    (tmp_path / "Q8_0.gguf").write_bytes(b"GGUF half")
    assert made(other) and GGUFFile(tmp_path / "Q8_0.gguf").n_ff == 512


def test_a_type_that_nobody_knows_is_read_as_far_as_it_can_be(tiny, tmp_path):
    raw, name = tiny.read_bytes(), b"blk.0.attn_q.weight"
    at = raw.index(name) + len(name)
    assert (
        raw[at : at + 4] == b"\x02\0\0\0" and raw[at + 20 : at + 24] == b"\0" * 4
    )  # two dims, then the type: F32
    strange = tmp_path / "strange.gguf"
    strange.write_bytes(raw[: at + 20] + b"\x63\0\0\0" + raw[at + 24 :])
    file = GGUFFile(strange)
    row = file.tensors.loc["blk.0.attn_q.weight"]
    assert (row["type"], row["shape"], row["size_bytes"]) == ("type 99", (256, 256), 4 * 256 * 256)
    np.testing.assert_array_equal(
        file.tensor("blk.0.attn_k.weight"), GGUFFile(tiny).tensor("blk.0.attn_k.weight")
    )
    with pytest.raises(ModelLoadError, match="blk.0.attn_q.weight is type 99, which neither"):
        file.tensor("blk.0.attn_q.weight")
    with pytest.raises(ModelLoadError, match="type 99"):
        expand(strange, tmp_path / "out.gguf", progress=False)
    with pytest.raises(ModelLoadError, match="invalid ggml type 99"):  # llama.cpp's word
        CaptureSession(strange, threads=1)
    strange.write_bytes(raw[: at + 20] + b"\xff\xff\0\0" + raw[at + 24 :])
    with pytest.raises(ModelLoadError, match="damaged"):
        GGUFFile(strange)


@pytest.mark.parametrize(
    "number", [2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 16, 17, 18, 19, 20, 21, 22, 23, 29, 34, 35, 39]
)
def test_the_engine_reads_blocks_as_the_gguf_package_does(number, monkeypatch):
    pytest.importorskip("llama_cpp")
    kind = types.tensor_type(number)
    raw = np.random.default_rng(number).integers(0, 100, (5, 2 * kind.size)).astype(np.uint8)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(number))
    monkeypatch.setattr(types, "_PART", 1)  # a thread for every row
    ours = types.dequantize(raw, kind)
    assert ours.shape == (5, 2 * kind.block) and ours.flags.writeable
    np.testing.assert_array_equal(ours, expected)
    monkeypatch.setattr(types, "_traits", lambda number: None)  # no engine here
    np.testing.assert_array_equal(types.dequantize(raw, kind), expected)


def test_all_parts_of_a_split_model_are_expanded(tiny, tmp_path):
    split = [
        tool("llama-gguf-split"),
        "--split",
        "--split-max-tensors",
        "12",
        tiny,
        tmp_path / "part",
    ]
    subprocess.run(split, check=True, capture_output=True)
    first, *others = sorted(tmp_path.glob("part-*"))
    assert len(others) == 2
    whole = expand(first, tmp_path / "whole.gguf", progress=False)
    expected, found = weights(tiny), weights(whole)
    assert expected.keys() == found.keys() and not [
        key for key in GGUFFile(whole).metadata if key.startswith("split.")
    ]
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)
    for part in (first, *others):
        with pytest.raises(QuantizeError, match="would destroy"):
            quantize(first, part, "Q8_0", progress=False)


def test_an_importance_matrix_says_what_it_fits(tiny, tmp_path):
    text = load_text()[:4000]
    own = imatrix(tiny, text, tmp_path / "own.gguf", n_ctx=64, chunks=3, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it fits wholly: not a word
        quantize(tiny, tmp_path / "q.gguf", "Q4_K_M", imatrix=own, progress=False)
    other = tiny_model("gpt2", tmp_path, n_embd=256, n_ff=256, head_dim=64)
    foreign = imatrix(other, text, tmp_path / "foreign.gguf", n_ctx=64, chunks=3, progress=False)
    with pytest.warns(
        UserWarning,
        match=r"12 entries: 9 of the 21 matrices .* blk.0.attn_k.weight.* blk.0.attn_qkv",
    ):
        quantize(tiny, tmp_path / "q.gguf", "Q4_K_M", imatrix=foreign, progress=False)
    deeper = tiny_model("llama", tmp_path, seed=5, n_embd=256, n_ff=256, head_dim=64, n_layer=4)
    with pytest.warns(UserWarning, match=r"21 entries: 21 of the 28 matrices"):
        quantize(deeper, tmp_path / "q.gguf", "Q4_K_M", imatrix=own, progress=False)
    narrow = tiny_model("llama", tmp_path, seed=6)
    with pytest.raises(QuantizeError, match="another width.*64 wide.*256 in it.*another model"):
        quantize(narrow, tmp_path / "no.gguf", "Q4_0", imatrix=own, progress=False)
    for wrong in (tiny, tmp_path / "notes"):
        (tmp_path / "notes").write_text("no matrix")
        with pytest.raises(QuantizeError, match="no importance matrix"):
            quantize(tiny, tmp_path / "no.gguf", "Q4_0", imatrix=wrong, progress=False)
    assert not (tmp_path / "no.gguf").exists()


def test_the_former_format_of_importance_matrices(tmp_path):
    entry = (
        struct.pack("<i", 3) + b"a.b" + struct.pack("<2i", 7, 2) + np.ones(2, np.float32).tobytes()
    )
    old = tmp_path / "old.dat"
    old.write_bytes(struct.pack("<i", 1) + entry + struct.pack("<i", 7))
    assert importance.entries(old) == {"a.b": 2}
    old.write_bytes(struct.pack("<i", 2) + entry)
    with pytest.raises(QuantizeError, match="no importance matrix"):
        importance.entries(old)


def test_a_large_file_that_is_made_lies_in_scratch(tmp_path, monkeypatch, capsys):
    from llamatelemetry.files import scratch

    assert (
        module.output("a.gguf", 10, tmp_path) == tmp_path / "a.gguf" and not capsys.readouterr().out
    )
    monkeypatch.setattr(module, "ANNOUNCED", 1000)
    monkeypatch.setattr(scratch, "ANNOUNCED", 1000)
    path = module.output("a.gguf", 2000, tmp_path)
    assert path.parent == scratch.scratch() and "a.gguf: 0.0 GB" in capsys.readouterr().out
    path.write_bytes(b"x")
    kept = tmp_path / "b.gguf"
    kept.write_bytes(b"x")
    assert module.output("a.gguf", 2000, tmp_path, there=lambda _: True).is_file()
    module.used_up([path, kept])
    assert kept.is_file() and not path.is_file()


@pytest.mark.parametrize("type", ["F16", "BF16"])
def test_a_stand_in_of_half_the_size_is_the_same_but_for_rounding(type, tmp_path, smollm2):
    one = GGUFFile(make_reference(smollm2, tmp_path / "f32.gguf", progress=False))
    half = GGUFFile(make_reference(smollm2, tmp_path / "half.gguf", progress=False, type=type))
    assert half.size_bytes < 0.6 * one.size_bytes and half.name == one.name
    name = "blk.3.ffn_up.weight"
    whole, rounded = one.rows(name, [0, 7]), half.rows(name, [0, 7])
    step = 2.0 ** (-10 if type == "F16" else -7)
    np.testing.assert_allclose(rounded, whole, rtol=step, atol=1e-6)
    with pytest.raises(QuantizeError, match="make_reference"):
        make_reference(smollm2, tmp_path / "x.gguf", type="Q8_0")


@pytest.mark.parametrize("kept", [0, 100, -40])
def test_half_an_importance_matrix_is_none(tmp_path, monkeypatch, kept):
    """llama-imatrix ends in order on a full disk, with an empty file or a part of one."""
    from damage import sound

    whole = sound(tmp_path)["matrix"][1].read_bytes()

    def leaves_half(command, *_, **__):
        Path(command[command.index("-o") + 1]).write_bytes(whole[:kept])
        return ""

    monkeypatch.setattr(importance, "run_tool", leaves_half)
    monkeypatch.setattr(importance, "tool", str)
    with pytest.raises(QuantizeError, match="no whole file"):
        imatrix(tiny_model("llama", tmp_path), "a text", tmp_path / "made.gguf")
    assert not (tmp_path / "made.gguf").exists()
