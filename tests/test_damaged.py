"""Damaged files: each ends in an error of ours that names the key or tensor, or works; and a file
that changes while it is open costs nobody the notebook."""

import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
from damage import ARRAY, Structure, Watched, build, parse, run, sound, text
from models import tiny_model

from llamatelemetry import Capture, GGUFFile, InferenceEngine, ModelLoadError, resolve_model
from llamatelemetry.convert import importance
from llamatelemetry.errors import CaptureError, ModelNotFoundError, QuantizeError
from llamatelemetry.files import header
from llamatelemetry.gpus.fit import fit


def number(form, value):
    return struct.pack("<" + form, value)


def numbers(kind, form, *values):
    return struct.pack("<IQ", kind, len(values)) + b"".join(number(form, v) for v in values)


NESTED = struct.pack("<IQ", ARRAY, 1) * 5000 + numbers(4, "I", 7)
INFINITY = number("f", float("inf"))
BAD_KEYS = {
    "llama.attention.head_count": [(6, INFINITY), (5, number("i", -1)), (9, numbers(4, "I", 1, 2))],
    "llama.context_length": [(8, text(b"12")), (9, numbers(4, "I", 3, 3)), (7, b"\1")],
    "llama.attention.key_length": [(6, number("f", float("nan"))), (9, numbers(4, "I", 3, 3))],
    "llama.attention.sliding_window": [(9, numbers(4, "I", 3))],
    "llama.block_count": [(10, number("Q", 2**63)), (4, number("I", 10_000))],
    "llama.rope.freq_base": [(6, INFINITY), (8, text(b"x"))],
    "llama.attention.causal": [(4, number("I", 1))],
    "general.name": [(4, number("I", 1))],
    "general.architecture": [(8, text(b"\xff")), (4, number("I", 1))],
    "general.alignment": [(4, number("I", 0)), (4, number("I", 24)), (7, b"\1")],
    "tokenizer.ggml.tokens": [(9, numbers(4, "I", *range(320))), (8, text(b"a"))],
    "tokenizer.ggml.token_type": [(9, numbers(10, "Q", *[2**63] * 320)), (9, numbers(4, "I", 1))],
    "split.count": [(8, text(b"2"))],
    "anything": [(9, NESTED), (77, b""), (9, struct.pack("<IQ", 4, 2**63))],
}


@pytest.mark.parametrize("key", BAD_KEYS)
def test_a_key_that_is_wrong_is_named(tmp_path, key):
    path = tiny_model("llama", tmp_path)
    for kind, raw in BAD_KEYS[key]:
        model = parse(path)
        model.keys = [each for each in model.keys if each[0] != key.encode()]
        model.keys.append([key.encode(), kind, raw])
        bad = tmp_path / "bad.gguf"
        bad.write_bytes(build(model))
        with pytest.raises(ModelLoadError, match=key):
            GGUFFile(bad)


def test_a_tensor_that_is_wrong_is_named(tmp_path):
    path, bad = tiny_model("llama", tmp_path), tmp_path / "bad.gguf"
    changes = [
        (1, [64] * 5),
        (1, [0, 64]),
        (1, [2**40, 2**40]),
        (2, 5000),
        (3, 2**63),
        (0, b"\xff"),
    ]
    for place, value in changes:
        model = parse(path)
        model.tensors[3][place] = value
        bad.write_bytes(build(model))
        name = "its name is no text" if place == 0 else model.tensors[3][0].decode()
        with pytest.raises(ModelLoadError, match=name):
            GGUFFile(bad)
    for twice in ("keys", "tensors"):
        model = parse(path)
        getattr(model, twice).append(getattr(model, twice)[2])
        bad.write_bytes(build(model))
        with pytest.raises(ModelLoadError, match="is there twice"):
            GGUFFile(bad)


def test_a_layer_that_no_model_has_is_none(tmp_path):
    model = parse(tiny_model("llama", tmp_path))
    model.tensors.append([b"blk.99999999999999999999.attn_q.weight", [32], 0, 0])
    (tmp_path / "bad.gguf").write_bytes(build(model))
    assert GGUFFile(tmp_path / "bad.gguf").tensors.layer.isna().iloc[-1]


def test_a_file_without_tensors_or_layers_has_a_size(tmp_path):
    model = parse(tiny_model("llama", tmp_path))
    model.keys = [key for key in model.keys if key[0] != b"llama.block_count"]
    model.tensors = model.tensors[:1]
    model.tensors[0][1] = []  # a single number
    (tmp_path / "bad.gguf").write_bytes(build(model))
    assert fit(GGUFFile(tmp_path / "bad.gguf"), memory_bytes=1 << 20, gpu=False).need_bytes > 0


@pytest.mark.parametrize("array", [(4, "I"), (0, "B"), (8, "Q")], ids=["numbers", "bytes", "texts"])
def test_a_huge_array_takes_no_memory(tmp_path, array):
    """256 MiB of numbers, or as many empty texts as fit in them: refused before they are read."""
    kind, form = array
    size, path = 1 << 28, tmp_path / "huge.gguf"
    head = struct.pack("<IQ", kind, size // struct.calcsize(form))
    path.write_bytes(build(Structure(keys=[[b"huge", ARRAY, head]])))
    os.truncate(path, size)
    code = (
        "import sys\nfrom llamatelemetry import GGUFFile, ModelLoadError\n"
        "try: GGUFFile(sys.argv[1])\nexcept ModelLoadError as error: assert 'huge' in str(error)\n"
        "else: raise SystemExit('read')\n"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and int(done.stdout) < 300 << 10, done


def test_texts_go_on_behind_the_window(tmp_path, monkeypatch):
    path = tiny_model("llama", tmp_path)
    whole = GGUFFile(path)
    monkeypatch.setattr(header, "_WINDOW", 100)
    again = GGUFFile(path)
    assert again.metadata == whole.metadata and again.tensors.equals(whole.tensors)


def test_a_file_that_is_written_over_is_no_end_of_the_process(tmp_path):
    path = tiny_model("llama", tmp_path)
    for change in (b"shorter", bytes(path.stat().st_size)):
        tiny_model("llama", tmp_path)
        file = GGUFFile(path)
        path.write_bytes(change)
        os.utime(path, (1, 1))
        with pytest.raises(ModelLoadError, match="since it was opened"):
            file.tensor("output.weight")


def test_a_file_that_is_replaced_is_read_on_but_not_run(tmp_path):
    path, other = tiny_model("llama", tmp_path), tiny_model("llama", tmp_path, seed=1)
    with InferenceEngine() as engine:
        engine.load_model(path, auto_start=False, silent=True)
        before = engine.model.tensor("output.weight")
        os.replace(other, path)
        assert np.array_equal(engine.model.tensor("output.weight"), before)
        with pytest.raises(ModelLoadError, match="since it was opened"):
            engine.capture([1, 2])
        path.unlink()
        with pytest.raises(ModelLoadError, match="since it was opened"):
            engine.capture([1, 2])


@pytest.mark.slow
def test_a_running_model_that_is_written_over_gives_no_answer(tmp_path, llama_server):
    """llama.cpp maps its file: what is written there is computed with, and nothing crashes."""
    path = tiny_model("llama", tmp_path)
    other = tiny_model("llama", tmp_path, seed=1).read_bytes()
    with InferenceEngine(llama_server) as engine:
        engine.load_model(path, silent=True)
        engine.capture([1, 2]), engine.infer([1, 2], max_tokens=2)
        with open(path, "r+b") as file:
            file.write(other)
        for call in (
            lambda: engine.capture([1, 2]),
            lambda: engine.infer([1, 2], max_tokens=2),
            lambda: list(engine.infer_stream([1, 2], max_tokens=2)),
            lambda: engine.head_statistics([1, 2]),
        ):
            with pytest.raises(ModelLoadError, match="was written to since it was opened"):
                call()
        engine.load_model(path, silent=True)
        assert engine.infer([1, 2], max_tokens=2).tokens_generated == 2


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ModelLoadError, match="device or a pipe"):
        GGUFFile(tmp_path / "pipe.gguf")
    (tmp_path / "folder.gguf").mkdir()
    for wrong in (tmp_path / "none.gguf", tmp_path / "folder.gguf", tmp_path / "pipe.gguf"):
        with pytest.raises(QuantizeError, match="importance matrix"):
            importance.entries(wrong)


@pytest.mark.parametrize(
    "name",
    ["a/b:../../x.gguf", "a/b:/x.gguf", "a" * 5000, "a/b:" + "x" * 5000 + ".gguf", "a\\b:c.gguf"],
)
def test_a_name_that_none_can_have_is_no_model(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNotFoundError):
        resolve_model(name)


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts.pop("ids"),
        lambda facts: facts.update(ids=[1, 2]),
        lambda facts: facts.update(ids=[1, 2, 1e400]),
        lambda facts: facts.update(model=[1]),
        lambda facts: facts.update(model={}),
        lambda facts: facts.update(layers=5),
        lambda facts: facts["pieces"].__setitem__(0, {"hex": "zz"}),
        lambda facts: facts["pieces"].__setitem__(0, "\ud83d"),
        lambda facts: facts["parts"].update(nothing=[None, None]),
        lambda facts: facts["parts"].update(hidden=[[0], None]),
        lambda facts: facts["parts"].update(hidden=[None, None]),
        lambda facts: facts["parts"].update(attention=[[0], [99]]),
        lambda facts: facts["parts"].update(logits=7),
    ],
)
def test_a_saved_capture_with_odd_facts_is_refused(tmp_path, change):
    path = sound(tmp_path)["capture"][1]
    raw = path.read_bytes()
    (size,) = struct.unpack_from("<Q", raw)
    head = json.loads(raw[8 : 8 + size])
    facts = json.loads(head["__metadata__"]["llamatelemetry"])
    change(facts)
    head["__metadata__"]["llamatelemetry"] = json.dumps(facts)
    new = json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + size :])
    with pytest.raises(CaptureError, match="not a capture saved by llamatelemetry"):
        Capture.load(path)


@pytest.mark.slow
def test_the_files_that_are_damaged_are_sound(tmp_path):
    watched = Watched()
    try:
        for name, (what, path) in sound(tmp_path).items():
            if name != "split 1":
                assert watched.open(what, path) == ["works", ""], name
    finally:
        watched.close()


@pytest.mark.slow
def test_a_hundred_damaged_files(tmp_path):
    counts, findings = run(100, seed=0, kept=tmp_path)
    assert not findings and sum(counts.values()) == 100, (counts, findings)
