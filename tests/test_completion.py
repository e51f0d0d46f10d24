"""What llama-server's answers leave out is asked for again; what nobody asked for is off."""

import models
import numpy as np
import pytest
from models import IDS, N_VOCAB, tiny_model

from llamatelemetry import InferenceEngine, ServerError
from llamatelemetry.server.completion import OFF, request_body
from llamatelemetry.server.probabilities import _held_back, every_token

EXACT = {"flash_attn": "off", "cache_type_k": "f32", "cache_type_v": "f32"}


class Bytes:
    """A vocabulary of single bytes, and a control token behind them."""

    pieces = [bytes([i]) if i > 127 else chr(i) for i in range(256)] + ["<|end|>"]
    token_types, n_vocab = [1] * 256 + [3], 257


@pytest.mark.parametrize(
    "text, held",
    [
        ("ab", "--"),
        ("é", "x-"),
        ("a漢b", "-xx--"),
        ("🦙", "xxx-"),
        ("🀀🀀", "xxx-xxx-"),  # the last: F0 9F 80 80
    ],
)
def test_held_back(text, held):
    assert "".join("x" if h else "-" for h in _held_back(list(text.encode()), Bytes)) == held


def test_held_back_on_odd_bytes():
    for raw, held in ((b"\x80\x80", "--"), (b"\xf0a", "xx"), (b"\xf0abc", "xxx-"), (b"\xc3", "x")):
        assert "".join("x" if h else "-" for h in _held_back(list(raw), Bytes)) == held
    assert _held_back([0xC3, 256, 65], Bytes) == [
        True,
        True,
        False,
    ]  # a control token writes nothing


def test_a_token_that_the_server_gives_no_row_of_is_an_error_of_ours():
    """Logits of 1e30 are beyond any bias: the token that was to be chosen is not, and half a
    character has no row."""
    with pytest.raises(ServerError, match="no probability of its own token 240"):
        every_token(
            {"tokens": [0xF0]}, {"n_probs": 2, "prompt": [1]}, lambda *_: {"content": ""}, Bytes
        )


def test_what_nobody_asked_for_is_off():
    body = request_body("x", 1, 0.7, 0.9, 40, 0, None, 0, {})
    assert OFF.items() <= body.items()
    assert (
        request_body("x", 1, 0.7, 0.9, 40, 0, None, 0, {"repeat_penalty": 1.3})["repeat_penalty"]
        == 1.3
    )


@pytest.mark.parametrize(
    "name", ["stream", "lora", "post_sampling_probs", "response_fields", "n_cache_reuse"]
)
def test_a_request_does_not_take(name):
    with pytest.raises(ServerError, match=name):
        request_body("x", 1, 0.7, 0.9, 40, 0, None, 3, {name: 1})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, llama_server):
    """A tiny model whose tokens are bytes, computed by llama-server as by captures."""
    with InferenceEngine(llama_server) as engine:
        yield engine.load_model(
            tiny_model("llama", tmp_path_factory.mktemp("models")), silent=True, threads=1, **EXACT
        )


def check(engine, prompt, result, n_probs):
    """Rows for every generated token, and they are those of a capture of all the tokens."""
    table = result.probabilities
    chosen = table[table["chosen"]]
    assert chosen["position"].tolist() == list(range(result.tokens_generated))
    assert table[table["rank"].notna()].groupby("position").size().eq(n_probs).all()
    ids = [*prompt, *chosen["id"]]
    logits = engine.capture(ids, stages="logits").logits.values.astype(np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    logp = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    wanted = logp[len(prompt) - 1 + table["position"], table["id"]]
    assert np.abs(table["logprob"] - wanted).max() < 1e-4
    assert table.loc[table["chosen"], "piece"].tolist() == [
        engine.model.pieces[i] for i in chosen["id"]
    ]
    return chosen


@pytest.mark.slow
@pytest.mark.parametrize("text", ["🦙é漢字", "a🀀🀀b", "🀀"])
@pytest.mark.parametrize("n_probs, temperature", [(2, 0.0), (2, 2.0), (N_VOCAB, 0.0)])
def test_a_row_set_for_every_token(tiny, text, n_probs, temperature):
    """Also where a character spans several tokens, whether the chosen ones are probable or not."""
    for prompt in (IDS, "The cat sat"):
        result = tiny.infer(
            prompt,
            max_tokens=40,
            temperature=temperature,
            n_probs=n_probs,
            grammar=f'root ::= "{text}"',
        )
        assert result.text == text
        ids = prompt if prompt is IDS else tiny.tokenize(prompt)["id"].tolist()
        chosen = check(tiny, ids, result, n_probs)
        pieces = [p.encode() if isinstance(p, str) else p for p in chosen["piece"]]
        assert b"".join(pieces).decode().startswith(text) and bytes in map(type, chosen["piece"])


@pytest.mark.slow
def test_a_text_that_ends_within_a_character(tiny):
    result = tiny.infer(IDS, max_tokens=3, temperature=0, n_probs=3, grammar='root ::= "a🦙"')
    assert result.tokens_generated == 3
    check(tiny, IDS, result, 3)


@pytest.mark.slow
def test_the_tokens_of_a_stop_sequence_have_rows(tiny):
    result = tiny.infer(
        IDS,
        max_tokens=20,
        temperature=0,
        n_probs=3,
        stop_sequences=["cat"],
        grammar='root ::= "the cat sat"',
    )
    assert (result.text, result.stop_word) == ("the ", "cat")
    assert "".join(check(tiny, IDS, result, 3)["piece"]).startswith("the ")


@pytest.mark.slow
def test_the_stream_is_the_same_text(tiny):
    ask = dict(max_tokens=40, temperature=0, grammar='root ::= "a🦙漢b"')
    assert list(tiny.infer_stream(IDS, **ask)) == ["a", "🦙", "漢", "b"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "says",
    [
        {"general.sampling.penalty_repeat": 9.0},
        {"general.sampling.mirostat": 2},
        {"general.sampling.sequence": "top_k"},
    ],
)
def test_sampling_defaults_of_the_file_are_off(tmp_path, llama_server, monkeypatch, says):
    ask = dict(max_tokens=24, temperature=0.5, top_p=1.0, top_k=0, seed=1, ignore_eos=True)
    plain, texts = models.metadata, []
    for more in ({}, says):
        monkeypatch.setattr(models, "metadata", lambda *size, more=more: plain(*size) | more)
        with InferenceEngine(llama_server) as engine:
            engine.load_model(tiny_model("llama", tmp_path), silent=True, threads=1)
            texts.append(engine.infer(IDS, **ask).text)
    assert texts[0] == texts[1]
