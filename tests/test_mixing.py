"""Mixtures from what is there: the same tensors, to the byte, as llama-quantize would make."""

import threading

import gguf
import numpy as np
import pandas as pd
import pytest
from models import tiny_model

from llamatelemetry import quantize
from llamatelemetry.convert import writing
from llamatelemetry.convert.chunks import chunk
from llamatelemetry.convert.expand import make_reference
from llamatelemetry.convert.mixing import mix
from llamatelemetry.convert.quantize import quantizations
from llamatelemetry.convert.together import reference_for
from llamatelemetry.errors import QuantizeError
from llamatelemetry.files.gguf import GGUFFile
from llamatelemetry.files.outputs import folder_of
from llamatelemetry.files.types import tensor_type
from llamatelemetry.quantization.decision import explicit_types

pytest.importorskip("llama_cpp")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A reference whose rows are 256 wide, and its Q4_K_M."""
    folder = tmp_path_factory.mktemp("mixing")
    reference = tiny_model("llama", folder, n_embd=256, n_ff=512, head_dim=64)
    return reference, quantize(reference, folder / "Q4_K_M.gguf", "Q4_K_M", progress=False)


def tensors(path):
    """{name: (type, bytes)}"""
    file = GGUFFile(path)
    return {
        name: (file.raw(name)[1], file.raw(name)[0][:].tobytes()) for name in file.tensors.index
    }


def chosen(path, patterns, kind):
    """explicit_types where these parts get another type."""
    rows = pd.DataFrame({"pattern": patterns, "type": kind})
    return explicit_types(GGUFFile(path).tensors, rows)


@pytest.mark.parametrize("kind", ["Q8_0", "F16", "Q6_K", "Q5_1", "Q3_K"])
def test_a_mixture_is_what_llama_quantize_makes(kind, made, tmp_path):
    reference, focus = made
    types = chosen(focus, [r"blk\.1\.ffn_(up|gate|down)\.weight", r"blk\.0\.attn_q\.weight"], kind)
    ours = mix(focus, reference, tmp_path / "ours.gguf", types, progress=False)
    theirs = tmp_path / "theirs.gguf"
    quantize(reference, theirs, "Q4_K_M", tensor_types=types, progress=False)
    own, wanted = tensors(ours), tensors(theirs)
    assert own == wanted and list(own) == list(tensors(focus))
    changed = {name for name in own if own[name][0] != tensors(focus)[name][0]}
    assert len(changed) == 4 and {own[name][0].name for name in changed} == {kind}
    assert GGUFFile(ours).metadata == GGUFFile(theirs).metadata


def test_nothing_given_is_a_copy(made, tmp_path):
    reference, focus = made
    assert tensors(mix(focus, reference, tmp_path / "x.gguf", {}, progress=False)) == tensors(focus)


def test_what_cannot_be_mixed_is_said(made, tmp_path):
    reference, focus = made
    dst = tmp_path / "x.gguf"

    def refused(types, match, source=reference, **options):
        with pytest.raises(QuantizeError, match=match):
            mix(focus, source, dst, types, progress=False, **options)

    refused({"attn_q": "Q9"}, "'Q9' is no type")
    for kind in ("I8", "F64", "Q8_K"):  # ggml would end the process
        refused({"attn_q": kind}, f"'{kind}' is no type")
        with pytest.raises(QuantizeError, match="no weights of type"):
            chunk(np.ones((1, 256), np.float32), tensor_type(gguf.GGMLQuantizationType[kind].value))
    refused({"(": "Q4_0"}, "no regular expression")
    refused({"attn_q": "IQ2_XXS"}, "attn_q.weight cannot be made IQ2_XXS: .*importance matrix")
    refused({"attn_q": "Q5_K"}, "an importance matrix changes Q5_K", imatrix="x.gguf")
    refused({"attn_norm": "Q8_0"}, "vectors stay")
    other = tiny_model("llama", tmp_path, n_embd=256, n_ff=256, head_dim=64)
    refused({"ffn_up": "Q8_0"}, "no such tensor of the shape", source=other)
    narrow = tiny_model("llama", tmp_path, seed=2, n_embd=96, n_ff=96, head_dim=48)
    with pytest.raises(QuantizeError, match="Q4_K packs 256 weights of a row, and 96"):
        mix(narrow, narrow, dst, {"attn_q": "Q4_K"}, progress=False)
    with pytest.raises(QuantizeError, match="would destroy"):
        mix(focus, reference, reference, {}, progress=False)
    assert not dst.exists() and not list(tmp_path.glob(".*partial"))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1"])
def test_the_engine_quantizes_as_the_gguf_package_does(kind):
    number = gguf.GGMLQuantizationType[kind]
    values = np.random.default_rng(0).standard_normal((5, 96)).astype(np.float32)
    expected = gguf.quants.quantize(values, number).ravel()
    np.testing.assert_array_equal(chunk(values, tensor_type(number.value)), expected)


@pytest.mark.slow
def test_a_mixture_of_a_real_model(smollm2, tmp_path):
    """Rows of 576: fallbacks, a tied output, many blocks of one tensor."""
    reference = make_reference(smollm2, tmp_path / "f32.gguf", progress=False)
    focus = quantize(reference, tmp_path / "focus.gguf", "Q4_K_M", progress=False)
    types = chosen(focus, [r"blk\.3\.ffn_(up|gate|down)\.weight", "^token_embd"], "Q4_1")
    ours = mix(focus, reference, tmp_path / "ours.gguf", types, progress=False)
    theirs = tmp_path / "theirs.gguf"
    quantize(reference, theirs, "Q4_K_M", tensor_types=types, progress=False)
    assert tensors(ours) == tensors(theirs)


@pytest.mark.parametrize("kind, width", [("Q4_0", 256), ("Q8_0", 256), ("Q8_0", 96)])
def test_a_stand_in_and_its_quantizations_come_out_of_one_pass(kind, width, tmp_path):
    """The same tensors as llama-quantize makes of the stand-in, also by fallbacks (96)."""
    whole = tiny_model("llama", tmp_path, n_embd=width, n_ff=2 * width, head_dim=width // 4)
    file = GGUFFile(quantize(whole, tmp_path / "m.gguf", kind, progress=False))
    types = ["Q8_0", "Q5_K_M", "q4_k_m", "Q3_K_S", "Q5_1", "IQ3_XS", "mine.gguf"]
    reference = reference_for(file, tmp_path, seed=3, types=types)
    alone = reference_for(file, folder_of(tmp_path / "alone"), seed=3)
    assert reference.path.read_bytes() == alone.path.read_bytes()
    made = [path for path in tmp_path.glob("*.gguf") if path.stem in types]
    assert len(made) == (6 if width == 96 else 5)  # IQ3_XS of wide rows needs an importance matrix
    for path in made:
        before, theirs = path.stat().st_mtime_ns, tmp_path / "theirs.gguf"
        quantize(alone.path, theirs, path.stem, progress=False)
        assert tensors(path) == {name: tensors(theirs)[name] for name in tensors(path)}
        assert GGUFFile(path).metadata == GGUFFile(theirs).metadata
        found = quantizations(reference.path, [path.stem], tmp_path, progress=False)
        assert list(found.values()) == [path] and path.stat().st_mtime_ns == before


def test_what_several_quantizations_have_alike_is_made_once(tmp_path, monkeypatch):
    """Q4_K_M and Q5_K_M keep the same matrices in Q6_K."""
    whole = tiny_model("llama", tmp_path, n_embd=256, n_ff=512, head_dim=64)
    file = GGUFFile(quantize(whole, tmp_path / "m.gguf", "Q8_0", progress=False))
    calls = []

    def counted(values, kind):
        calls.append((kind.name, values.size))
        return chunk(values, kind)

    monkeypatch.setattr("llamatelemetry.convert.expand.chunk", counted)
    reference_for(file, tmp_path, types=["Q5_K_M", "Q4_K_M", "Q8_0"])
    files = [GGUFFile(tmp_path / f"{kind}.gguf").tensors for kind in ("Q5_K_M", "Q4_K_M", "Q8_0")]
    both = pd.concat(files).query("type != 'F32'").reset_index()
    alike = both.drop_duplicates(["name", "type"]).groupby("type")["n_elements"].sum()
    made = pd.DataFrame(calls, columns=["type", "weights"]).groupby("type")["weights"].sum()
    assert made.to_dict() == alike.to_dict()
    assert both.groupby("type")["n_elements"].sum()["Q6_K"] > made["Q6_K"] > 0


def test_threads_do_not_wait_for_one_another_over_a_layer_of_copies(monkeypatch):
    """A layer has about nine tensors: two of them that take long are nine jobs apart."""
    monkeypatch.setattr(writing, "physical_cores", lambda: 2)
    both = threading.Barrier(2, timeout=10)
    slow = lambda: both.wait() >= 0
    jobs = [("slow", slow), *[("copied", lambda: True)] * 9, ("slow", slow)]
    assert list(writing._in_order(jobs)) == [(name, True) for name, _ in jobs]


@pytest.mark.parametrize(
    "kind, values",
    [
        ("STRING", ["", "a", "ä€😀", b"\xff\xfe"]),
        ("UINT8", [0, 255]),
        ("INT8", [-128, 127]),
        ("UINT16", [65535]),
        ("INT16", [-32768, 1]),
        ("UINT32", [2**32 - 1]),
        ("INT32", [-(2**31)]),
        ("FLOAT32", [1.5, float("nan"), 3.4e38]),
        ("BOOL", [True, False]),
        ("UINT64", [2**64 - 1]),
        ("INT64", [-(2**63)]),
        ("FLOAT64", [1e300]),
    ],
)
def test_arrays_of_metadata_are_packed_as_by_gguf(tmp_path, kind, values):
    made = []
    for writer in (writing.Writer, gguf.GGUFWriter):
        one = writer(tmp_path / "one.gguf", "llama")
        array, inner = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType[kind]
        one.add_key_value("some.values", values, array, sub_type=inner)
        one.add_key_value("one.value", values[0], inner)
        one.write_header_to_file()
        one.write_kv_data_to_file()
        one.close()
        made.append((tmp_path / "one.gguf").read_bytes())
    assert made[0] == made[1]
