"""A tokenizer without its model: what llama.cpp makes of a text, with no weights and no GPU."""

import os
from pathlib import Path

import models
import pandas as pd
import pytest

from llamatelemetry import CaptureError, GGUFFile, ModelLoadError, ParameterError
from llamatelemetry.tools import parameters
from llamatelemetry.tools.vocabulary import Vocabulary

TEXT = "The whaler Essex <|im_start|>\u00e9\U0001f917\n 1819"


@pytest.mark.slow
def test_tokens_are_those_of_the_loaded_model(engine, smollm2):
    with Vocabulary(GGUFFile(smollm2)) as vocabulary:
        pd.testing.assert_frame_equal(vocabulary.tokenize(TEXT), engine.tokenize(TEXT))
        assert len(vocabulary.tokenize("")) == len(engine.tokenize(""))
        with pytest.raises(CaptureError, match="half a character"):
            vocabulary.tokenize("\ud83e")


@pytest.mark.slow
def test_no_weights_and_no_gpu(smollm2):
    with Vocabulary(GGUFFile(smollm2)) as vocabulary:
        process = Path("/proc") / str(vocabulary._child.pid)
        assert "vocab only - skipping tensors" in vocabulary._child.log()
        assert b"\0CUDA_VISIBLE_DEVICES=\0" in b"\0" + (process / "environ").read_bytes()
    assert not process.exists() and "CUDA_VISIBLE_DEVICES" not in os.environ


@pytest.mark.slow
def test_what_has_no_tokenizer_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "tokenizer", lambda n: {"tokenizer.ggml.model": "no_vocab"})
    file = GGUFFile(models.tiny_model("llama", tmp_path))
    with Vocabulary(file) as vocabulary, pytest.raises(CaptureError, match="holds no tokenizer"):
        vocabulary.tokenize("a")


@pytest.mark.slow
def test_what_llama_cpp_cannot_read_is_said(tmp_path, smollm2):
    """A kind of tokenizer that this llama.cpp has not got."""
    data = Path(smollm2).read_bytes().replace(b"\4\0\0\0\0\0\0\0gpt2", b"\4\0\0\0\0\0\0\0gptx", 1)
    path = tmp_path / "odd.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelLoadError, match="llama.cpp cannot load .*It says: .*gptx"):
        Vocabulary(GGUFFile(path))


@pytest.mark.slow
def test_texts_are_checked_by_the_file_alone(smollm2):
    file, values = GGUFFile(smollm2), {"PROMPT": "a b c", "TEXT": "a b c", "N_CTX": 4}
    with pytest.raises(ParameterError, match=r"TEXT = .*: it is 3 token\(s\) long, 4 are needed"):
        parameters.check_texts(values, file, room=8)
    assert len(parameters.check_texts(values | {"N_CTX": 3}, file, room=8)["PROMPT"]) == 3
