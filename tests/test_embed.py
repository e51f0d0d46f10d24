"""embed() pools as the file says, as captures of the same states do, or as it is told."""

import numpy as np
import pytest
from models import tiny_model

from llamatelemetry import GGUFFile, InferenceEngine, OptionError, ServerError
from llamatelemetry.options import pooling_of

EXACT = {"flash_attn": "off", "cache_type_k": "f32", "cache_type_v": "f32"}
TEXTS = ["The cat sat on the mat", "and the dog"]
POOL = {
    "mean": lambda states: states.mean(axis=0),
    "cls": lambda states: states[0],
    "last": lambda states: states[-1],
}


def file_that_says(folder, pooling):
    return tiny_model("llama", folder, keys={} if pooling is None else {"pooling_type": pooling})


def pooled(engine, texts, pooling):
    """The same from captures: (n, n_embd), unit rows."""
    states = [engine.capture(text, stages="final_norm").final_norm.values for text in texts]
    rows = np.array([POOL[pooling](state.astype(np.float64)) for state in states])
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize(
    "said, name", [(None, "mean"), (0, "mean"), (1, "mean"), (2, "cls"), (3, "last")]
)
def test_pooling_of(tmp_path, said, name):
    assert pooling_of(GGUFFile(file_that_says(tmp_path, said))) == name


@pytest.mark.parametrize("said, says", [(4, "reranker"), (7, r"unknown pooling \(7\)")])
def test_a_file_that_gives_no_row(tmp_path, said, says):
    with InferenceEngine() as engine:
        engine.load_model(file_that_says(tmp_path, said), auto_start=False, silent=True, threads=1)
        with pytest.raises(OptionError, match=says):
            engine.embed(TEXTS)
        with pytest.raises(OptionError, match=says):
            engine.load_model(
                engine.model.path, auto_start=False, silent=True, threads=1, embeddings=True
            )


@pytest.mark.parametrize("pooling", ["none", "rank", "max", 3])
def test_poolings_that_give_no_row(tmp_path, pooling):
    with InferenceEngine() as engine:
        engine.load_model(file_that_says(tmp_path, 2), auto_start=False, silent=True, threads=1)
        with pytest.raises(OptionError, match="pooling="):
            engine.embed(TEXTS, pooling=pooling)


@pytest.mark.slow
@pytest.mark.parametrize(
    "said, loaded, default",
    [
        (None, {}, "mean"),
        (2, {}, "cls"),
        (3, {"embeddings": True}, "last"),
        (2, {"pooling": "last"}, "last"),
        (None, {"override_kv": "llama.pooling_type=int:3"}, "last"),
        (3, {"override_kv": "llama.pooling_type=int:2", "embeddings": True}, "cls"),
    ],
)
def test_as_the_file_or_as_told(tmp_path, llama_server, said, loaded, default):
    with InferenceEngine(llama_server) as engine:
        engine.load_model(file_that_says(tmp_path, said), silent=True, threads=1, **EXACT, **loaded)
        for asked in (None, "mean", "cls", "last", None):  # what was asked for once is not kept
            assert (
                np.abs(
                    engine.embed(TEXTS, pooling=asked) - pooled(engine, TEXTS, asked or default)
                ).max()
                < 1e-5
            )


@pytest.mark.slow
def test_long_texts(tmp_path, llama_server):
    """A text longer than a batch is refused with what helps, never cut; with it, all of the text
    counts."""
    texts = ["The cat sat on the mat. " * 100, "The dog ran to the house. " * 90 + "And then?"]
    path = tiny_model("llama", tmp_path, n_ctx=2048)
    with InferenceEngine(llama_server) as engine:
        engine.load_model(path, silent=True, threads=1, **EXACT)
        assert all(600 < len(engine.tokenize(text)) < 1500 for text in texts)
        with pytest.raises(ServerError, match="ubatch_size"):
            engine.embed(texts)
        assert engine.embed(texts, pooling="last").shape == (
            2,
            64,
        )  # this one needs no state but the last
        engine.load_model(path, silent=True, threads=1, ubatch_size=2048, **EXACT)
        for pooling in POOL:
            assert (
                np.abs(engine.embed(texts, pooling=pooling) - pooled(engine, texts, pooling)).max()
                < 1e-5
            )
