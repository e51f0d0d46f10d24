"""What is given to a model and arrives as it was meant: texts, start tokens, templates, patches,
names of files."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import gguf
import models
import numpy as np
import pandas as pd
import pytest
from models import tiny_model

from llamatelemetry import (
    Capture,
    CaptureError,
    InferenceEngine,
    LlamaTelemetryError,
    ModelLoadError,
    logs,
    patch,
)
from llamatelemetry.arguments import prompt
from llamatelemetry.capture.edits import EDITABLE
from llamatelemetry.capture.session import CaptureSession
from llamatelemetry.capture.tokenizer import NO_TOKENIZER, token_ids, token_piece
from llamatelemetry.compare.comparison import compare_quantizations
from llamatelemetry.compare.texts import load_text
from llamatelemetry.convert.importance import imatrix
from llamatelemetry.convert.quantize import quantize
from llamatelemetry.errors import TemplateError
from llamatelemetry.files.gguf import GGUFFile
from llamatelemetry.files.models import list_models, resolve_model
from llamatelemetry.graphs import Graph
from llamatelemetry.server.completion import request_body

pytest.importorskip("llama_cpp")


@pytest.fixture
def header(monkeypatch):
    """header(key=value) changes the metadata of the tiny models that are made afterwards; None
    leaves a key out."""
    changes, metadata, tokenizer = {}, models.metadata, models.tokenizer

    def changed(made):
        return {key: value for key, value in (made | changes).items() if value is not None}

    monkeypatch.setattr(models, "metadata", lambda *args: changed(metadata(*args)))
    monkeypatch.setattr(
        models,
        "tokenizer",
        lambda *args: {key: value for key, value in tokenizer(*args).items() if key not in changes},
    )

    def change(**keys):
        changes.update({key.replace("__", "."): value for key, value in keys.items()})

    return change


# Tokens


class Vocabulary:
    """An api whose tokenizer makes n tokens of any text and whose pieces are n bytes long."""

    def __init__(self, n, kind=2):
        self.n, self.kind, self.asked = n, kind, []

    def llama_vocab_type(self, vocab):
        return self.kind

    def llama_tokenize(self, vocab, data, size, ids, room, *_):
        self.asked.append(room)
        if self.n < 0 or room < self.n:
            return -abs(self.n)
        ids[: self.n] = range(self.n)
        return self.n

    def llama_token_to_piece(self, vocab, token, piece, room, *_):
        self.asked.append(room)
        if room < self.n:
            return -self.n
        piece[: self.n] = b"x" * self.n
        return self.n


def test_a_tokenizer_that_needs_more_room_gets_it():
    many = Vocabulary(100)
    assert token_ids(many, None, "abc") == list(range(100)) and many.asked == [19, 100]
    assert (
        token_piece(Vocabulary(1000), None, 5) == b"x" * 1000
        and token_piece(Vocabulary(0), None, 5) == b""
    )
    with pytest.raises(CaptureError, match="could not tokenize a text of 3 bytes"):
        token_ids(Vocabulary(-(2**31)), None, "abc")
    with pytest.raises(CaptureError, match="holds no tokenizer: pass token ids"):
        token_ids(Vocabulary(3, NO_TOKENIZER), None, "abc")


def test_a_file_without_a_tokenizer_takes_ids(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "tokenizer", lambda n: {"tokenizer.ggml.model": "no_vocab"})
    with CaptureSession(tiny_model("llama", tmp_path), threads=1) as session:
        with pytest.raises(CaptureError, match="holds no tokenizer: pass token ids"):
            session.capture("The cat")
        assert session.capture([1, 2, 3]).attention.sizes["query"] == 3  # the worker lives


def test_two_start_tokens_are_said(tmp_path, header):
    header(
        tokenizer__chat_template="{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with InferenceEngine() as engine:
        engine.load_model(tiny_model("llama", tmp_path), silent=True, threads=1)
        twice, once = "<|begin|>The cat", "The cat"
        for call in (
            engine.tokenize,
            engine.capture,
            engine.score,
            engine.head_statistics,
            lambda text: engine.sweep(text, {"a": []}, progress=False),
            lambda text: engine.capture(text, generate=1),
            lambda text: engine.infer(text, max_tokens=1),
            lambda text: list(engine.infer_stream(text, max_tokens=1)),
            engine.embed,
        ):
            with pytest.warns(
                UserWarning, match="begins with '<|begin|>'.*two start tokens"
            ) as said:
                call(twice)
            assert len(said) == 1
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                call(once)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            engine.chat(once, max_tokens=1)  # llama.cpp takes the template's own away
            engine.capture([0, 0, 5])
            assert engine.tokenize(twice, add_special=False)["id"].tolist()[0] == 0


@pytest.mark.parametrize(
    "given, why",
    [
        *[
            (given, "a text, or one sequence of token ids")
            for given in (
                b"bytes",
                None,
                3.5,
                5,
                np.int64(5),
                [1.0, 2.0],
                [True, 5],
                np.array([True]),
                [[1, 2]],
                [[1], [2, 3]],
                {1, 2},
                ["a", "b"],
                [float("nan")],
                [2**70],
                (one for one in (1, 2)),
            )
        ],
        (Path("prompt.txt"), "is a path, and a prompt is a text"),
        ("", "empty"),
        ([], "empty"),
        ("a\ud83d", "half a character"),
    ],
)
def test_a_prompt_is_a_text_or_ids(given, why):
    """The same for captures and for llama-server, before either is asked."""
    for ask in (prompt, lambda given: request_body(given, 1, 0, 1, 1, 0, None, 0, {})):
        with pytest.raises(LlamaTelemetryError, match=why):
            ask(given)


@pytest.mark.parametrize(
    "given, ids",
    [
        ([3, 5], [3, 5]),
        ((3, 5), [3, 5]),
        (range(3), [0, 1, 2]),
        (np.array([3, 5], np.uint8), [3, 5]),
        (pd.Series([3, 5], index=[7, 9]), [3, 5]),
        (" \n", " \n"),
        ("zero \0 byte", "zero \0 byte"),
        ("\ufeffa\r\n", "\ufeffa\r\n"),
    ],
)
def test_what_a_prompt_may_be(given, ids):
    assert prompt(given) == ids == request_body(given, 1, 0, 1, 1, 0, None, 0, {})["prompt"]


@pytest.mark.parametrize("wrong", [b"a", None, 5, Path("a.txt"), "\ud83d"])
def test_only_a_text_is_tokenized_and_embedded(wrong, tmp_path):
    with InferenceEngine() as engine:
        engine.load_model(tiny_model("llama", tmp_path), auto_start=False, silent=True)
        for ask in (engine.tokenize, engine.embed):
            with pytest.raises(LlamaTelemetryError, match="A text is a str|half a character"):
                ask(wrong)


def test_ids_beyond_the_vocabulary_are_said(tmp_path):
    with CaptureSession(tiny_model("llama", tmp_path), threads=1) as session:
        for wrong in (-1, models.N_VOCAB, 2**31):
            with pytest.raises(
                CaptureError, match=f"token id {wrong} is not in this model's vocabulary of 320"
            ):
                session.capture([5, wrong])


def test_a_file_stays_itself_when_the_folder_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model("llama", tmp_path).rename("-m.gguf")
    file = GGUFFile("-m.gguf")
    assert quantize("-m.gguf", "-q.gguf", "Q8_0", progress=False) == tmp_path / "-q.gguf"
    monkeypatch.chdir("/")
    with CaptureSession(file, threads=1) as session:
        assert len(session.capture([1, 2]).tokens) == 2


@pytest.mark.parametrize(
    "name",
    [
        "y" * 300 + ".gguf",
        "y/" * 3000,
        "zero\0.gguf",
        "half\ud83d.gguf",
        "~nobody/x.gguf",
        "C:/m.gguf",
        5,
    ],
)
def test_what_names_no_file_is_said(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_model("llama", tmp_path)
    for ask in (
        resolve_model,
        GGUFFile,
        lambda name: quantize(name, "out.gguf", "Q8_0"),
        lambda name: load_text(Path(str(name))),
    ):
        with pytest.raises(
            LlamaTelemetryError, match="no name of a file|There is no file|No text at"
        ):
            ask(name)
    if "/" not in str(name):
        with pytest.raises(LlamaTelemetryError, match="no name of a file"):
            quantize(model, name, "Q8_0", progress=False)


@pytest.mark.parametrize(
    "architecture, keys, tensor, what",
    [
        (
            "llama",
            {"general.type": "adapter"},
            "blk.0.attn_q.weight.lora_a",
            "an adapter, not a model.*lora=",
        ),
        (
            "clip",
            {"general.type": "mmproj"},
            "v.patch_embd.weight",
            r"a part beside a model \(mmproj\)",
        ),
        ("controlvector", {}, "direction.1", "a control vector, not a model.*control_vector="),
        ("llama", {"tokenizer.ggml.model": "gpt2"}, None, "a vocabulary without weights"),
    ],
)
def test_what_is_no_model_is_said_and_leaves_the_one_that_is_loaded(
    architecture, keys, tensor, what, tmp_path
):
    model, other = tiny_model("llama", tmp_path), tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(str(other), architecture)
    for key, value in keys.items():
        writer.add_string(key, value)
    if tensor:
        writer.add_tensor(tensor, np.ones((4, 64), np.float32))
    (
        writer.write_header_to_file(),
        writer.write_kv_data_to_file(),
        writer.write_tensors_to_file(),
        writer.close(),
    )
    with InferenceEngine() as engine:
        engine.load_model(model, auto_start=False, silent=True)
        with pytest.raises(ModelLoadError, match=f"other.gguf is {what}"):
            engine.load_model(other, silent=True)
        assert engine.model.path == model


def test_a_tilde_of_nobody_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model("llama", tmp_path).rename("~x.gguf")
    assert resolve_model("~x.gguf") == tmp_path / "~x.gguf"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/~x.gguf") == tmp_path / "~x.gguf"


# Templates


@pytest.mark.parametrize(
    "template",
    [
        "{{ if .System }}{{ .System }}{{ end }}{{ .Prompt }}",
        "{% for m in messages %}{{ m.content }",
        "{{ raise_exception('no') }}",
    ],
)
def test_a_template_that_is_none_leaves_infer(template, tmp_path, header, llama_server):
    header(tokenizer__chat_template=template)
    path = tiny_model("llama", tmp_path)
    with InferenceEngine(llama_server) as engine:
        with pytest.warns(
            UserWarning, match='cannot parse the chat template of .*chat_template="chatml"'
        ):
            engine.load_model(path, silent=True, threads=1)
        text = engine.infer("The cat", max_tokens=3).text
        with pytest.raises(TemplateError, match='chat_template="chatml"'):
            engine.chat("The cat")
        engine.load_model(path, silent=True, threads=1, chat_template="chatml")
        assert engine.infer(
            "The cat", max_tokens=3
        ).text == text and "im_start" in engine.apply_template("The cat")
        with pytest.raises(TemplateError, match='template that was given.*chat_template="chatml"'):
            engine.load_model(path, silent=True, threads=1, chat_template="{% for m in messages %}")


# Patches


@pytest.mark.parametrize(
    "family, length",
    [
        ("llama", 1),
        ("llama", 28),
        ("llama", 513),
        pytest.param("llama", 1100, marks=pytest.mark.slow),
        ("gemma3", 28),
        pytest.param("gemma3", 560, marks=pytest.mark.slow),
        pytest.param("gpt-oss", 560, marks=pytest.mark.slow),
    ],
)
def test_a_run_patched_with_itself_is_itself(family, length, tmp_path):
    """Batches of 512 tokens; gemma3 and gpt-oss have windows of 8 tokens."""
    ids = [0, *np.random.default_rng(0).integers(3, 300, length - 1).tolist()]
    with CaptureSession(tiny_model(family, tmp_path, n_ctx=2048), threads=1) as session:
        run = session.capture(ids, stages=("logits", *EDITABLE), layers=[0, 1])
        for stage in EDITABLE:
            for layer in (0, 1):
                again = session.capture(
                    ids, stages=("logits", stage), edits=[patch(stage, layer, run)]
                )
                np.testing.assert_array_equal(again.logits, run.logits)
                np.testing.assert_array_equal(again[stage].sel(layer=[0, 1]), run[stage])


def test_a_patch_moves_what_it_should_in_the_second_batch(tmp_path):
    ids = np.random.default_rng(0).integers(3, 300, 560).tolist()
    with CaptureSession(tiny_model("llama", tmp_path, n_ctx=1024), threads=1) as session:
        run = session.capture(ids, stages=("logits", "attention"))
        uniform = run.attention.sel(layer=1).values.copy()
        uniform[:, 530, :531] = 1 / 531
        edited = session.capture(
            ids, stages=("logits", "attention"), edits=[patch("attention", 1, uniform)]
        )
        np.testing.assert_array_equal(edited.attention.sel(layer=1), uniform)
        moved = (edited.logits.values != run.logits.values).any(-1)
        assert moved[530] and not moved[:530].any()
        uniform[:, 3, 540] = 0.5  # a key of the second batch, for a query of the first
        with pytest.raises(CaptureError, match="keys after position 511"):
            session.capture(ids, edits=[patch("attention", 1, uniform)])


# What llama.cpp says

GDB = """[New LWP 12]
warning: could not find '.gnu_debugaltlink' file
#0  0x00007f in __GI___wait4 (pid=1) at ../sysdeps/unix/sysv/linux/wait4.c:30
30\t../sysdeps/unix/sysv/linux/wait4.c: No such file or directory.
[Inferior 1 (process 18454) detached]
"""
ABORT = "/build/ggml/src/ggml.c:3217: GGML_ASSERT(a->ne[2] == b->ne[0]) failed"


@pytest.mark.parametrize(
    "log, sentence",
    [
        (f"load: ok\nan error: earlier\n{ABORT}\n{GDB}", ABORT),
        (
            "a\nterminate called after throwing an instance of 'std::runtime_error'\n  what():  no such thing\n",
            "what():  no such thing",
        ),
        (
            "x\nllama_model_load: error loading model: no 'a'\nllama_model_load_from_file_impl: failed to load model\n",
            "llama_model_load: error loading model: no 'a'",
        ),
        (
            "0.00.1.2 I fine\n0.00.011.261 E srv  load: cannot do it\n0.00.2.3 I ended\n",
            "srv  load: cannot do it",
        ),
        (
            "main: failed to quantize: no such type\nmain: failed to quantize model from 'a'\n",
            "main: failed to quantize: no such type",
        ),
        ("ggml_cuda_init: failed to initialize CUDA\n" + "print_info: fine\n" * 20, ""),
    ],
)
def test_the_reason_is_llama_cpps_sentence(log, sentence):
    assert logs.reason(log) == sentence
    ended = (
        "GGML_ASSERT" in sentence or "what()" in sentence
    )  # what a process that was killed had lived through
    assert logs.reason(log, killed=True) == (sentence if ended else "")
    assert sentence in logs.last_words(log) and "wait4" not in logs.last_words(log)


def test_a_crash_says_the_assertion_not_the_debuggers_frames(tmp_path):
    with CaptureSession(tiny_model("llama", tmp_path), threads=1) as session:
        assert b"GGML_NO_BACKTRACE=1" in Path(f"/proc/{session.pid}/environ").read_bytes()
        with open(session.child.log_path, "a") as log:
            log.write(f"{ABORT}\n{GDB}")
        session.child.process.kill()
        session.child.process.wait()
        with pytest.raises(
            LlamaTelemetryError, match=r"SIGKILL: /build/ggml.* GGML_ASSERT"
        ) as crashed:
            session.capture([1, 2])
        assert "wait4" not in str(crashed.value)


def test_a_file_that_llama_cpp_refuses_has_its_reason(tmp_path):
    path = tiny_model("llama", tmp_path)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"blk.1.attn_q.weight", b"blk.1.attn_x.weight"))
    with pytest.raises(
        ModelLoadError, match="It says: .*error loading model: .*blk.1.attn_q.weight"
    ):
        CaptureSession(path, threads=1)


# Names


def test_a_path_that_is_not_utf_8_works_to_the_end(
    tmp_path, header, llama_server, monkeypatch, capsys
):
    header(general__name=None)  # the model is then called after its file
    folder = tmp_path / os.fsdecode(b"d\xe9")
    folder.mkdir()
    path = folder / os.fsdecode(b"m\xff.gguf")
    tiny_model("llama", tmp_path).rename(path)
    with InferenceEngine(llama_server) as engine:
        engine.load_model(path, threads=1, timeout=60)  # it prints its name
        assert engine.infer("The cat", max_tokens=2).tokens_generated == 2
        run = engine.capture("The cat", stages=("hidden",))
        again = engine.capture("The cat", stages=("hidden",), edits=[patch("hidden", 1, run)])
        np.testing.assert_array_equal(again.hidden, run.hidden)
    assert r"m\xff.gguf on http" in capsys.readouterr().out
    saved = Capture.load(run.save(folder / "c.safetensors"))
    assert saved.model.name == run.model.name == r"m\xff" and json.dumps(vars(saved.model)).encode()
    weights = imatrix(
        path, load_text()[:4000], folder / "i.gguf", n_ctx=64, chunks=2, progress=False
    )
    quantized = quantize(
        path, folder / os.fsdecode(b"q\xfe.gguf"), "Q8_0", imatrix=weights, progress=False
    )
    table = compare_quantizations(
        path, [quantized], load_text()[:3000], n_ctx=64, max_windows=1, progress=False
    )
    assert (
        list(table.index) == [r"q\xfe"]
        and table.to_csv().encode()
        and 0 < table.kld_mean.iloc[0] < 1
    )
    nodes, edges = pd.DataFrame({"id": [1, 2]}), pd.DataFrame({"source": [1], "target": [2]})
    parts = Graph(
        nodes, edges, node="id", source="source", target="target", title=run.model.name
    ).save(folder)
    assert all(part.stat().st_size for part in parts.values())
    monkeypatch.setenv("LLAMATELEMETRY_KAGGLE_INPUT", str(folder))
    assert r"m\xff" in set(list_models()["name"]) and resolve_model(r"m\xff") == path
    with pytest.raises(LlamaTelemetryError) as missing:
        resolve_model(folder / "none.gguf")
    assert str(missing.value).encode() and r"d\xe9" in str(missing.value)


@pytest.mark.slow
def test_commands_take_and_print_such_paths(tmp_path, monkeypatch, llama_server):
    path, out = tmp_path / os.fsdecode(b"m\xff.gguf"), tmp_path / os.fsdecode(b"c\xfe.safetensors")
    tiny_model("llama", tmp_path).rename(path)
    monkeypatch.setenv("LLAMATELEMETRY_KAGGLE_INPUT", str(tmp_path))
    for command in (["models", "--here"], ["doctor"], ["capture", path, "The cat", "--out", out]):
        done = subprocess.run(
            [sys.executable, "-m", "llamatelemetry.cli", *command], capture_output=True
        )
        assert done.returncode == 0, done.stderr
    assert (
        out.stat().st_size
        and rb"m\xff"
        in subprocess.run(
            [sys.executable, "-m", "llamatelemetry.cli", "models"], capture_output=True
        ).stdout
    )
