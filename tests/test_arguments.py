"""What is asked for is checked where it is asked: a wrong value is neither rounded, cut nor
ignored."""

import numpy as np
import pytest
from models import tiny_model, with_value

from llamatelemetry import InferenceEngine
from llamatelemetry.arguments import finite, one_sequence, whole
from llamatelemetry.compare.comparison import compare_quantizations
from llamatelemetry.errors import (
    CaptureError,
    CompareError,
    LlamaTelemetryError,
    NotFiniteError,
    OptionError,
    ServerError,
)
from llamatelemetry.files.gguf import GGUFFile
from llamatelemetry.server.completion import OFF, OPTIONS, REFUSED, request_body
from llamatelemetry.server.loading import settle
from llamatelemetry.server.probabilities import watched

ARGUMENTS = dict(
    max_tokens=1, temperature=0.7, top_p=0.9, top_k=40, seed=0, stop_sequences=None, n_probs=0
)


def body(prompt="x", options=(), **changes):
    return request_body(prompt, *(ARGUMENTS | changes).values(), dict(options))


@pytest.mark.parametrize("value", [True, 1.0, "1", None, float("nan"), -1, 8])
def test_a_whole_number_is_one(value):
    assert whole("n", np.int64(7), 0, 7) == 7 and whole("n", None, none=True) is None
    with pytest.raises(OptionError, match="n=.*whole number from 0 to 7"):
        whole("n", value, 0, 7)


@pytest.mark.parametrize("value", [True, "1", None, float("nan"), float("inf"), -0.5])
def test_a_finite_number_is_one(value):
    assert finite("t", np.float32(0.5), 0) == 0.5
    with pytest.raises(OptionError, match="t=.*finite number, 0 or more"):
        finite("t", value, 0)


@pytest.mark.parametrize(
    "ids", [[1.5, 2], [True, False], ["the cat"], [[1, 2], [3]], np.ones((2, 3), int), 5, None]
)
def test_token_ids_are_one_sequence_in_answers_as_in_captures(ids):
    assert (
        one_sequence(np.array([3, 4]), CaptureError) == [3, 4]
        and one_sequence([], CaptureError) == []
    )
    with pytest.raises(CaptureError, match="one sequence"):
        one_sequence(ids, CaptureError)
    with pytest.raises(ServerError, match="one sequence"):
        body(ids)


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": "a"}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"n_probs": -1}, "n_probs"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"stop_sequences": [None]}, "stop_sequences"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32 - 1}, "seed"),
    ],
)
def test_a_request_says_what_is_wrong_with_a_value(changes, name):
    with pytest.raises(ServerError, match=name):
        body(**changes)


def test_a_request_takes_what_llama_server_reads_and_nothing_else():
    assert OFF.keys() <= OPTIONS and not OPTIONS & REFUSED.keys()
    assert (
        body(options={"top_n_sigma": 1.0})["top_n_sigma"] == 1.0
        and body(max_tokens=-1)["n_predict"] == -1
    )
    with pytest.raises(ServerError, match="no 'temprature'.*'temperature'"):
        body(options={"temprature": 0})
    with pytest.raises(ServerError, match="'n_predict': max_tokens"):
        body(options={"n_predict": 5})


@pytest.mark.parametrize(
    "changes",
    [
        {"n_ctx": "64"},
        {"n_ctx": 64.0},
        {"n_ctx": 3},
        {"max_windows": 0},
        {"max_windows": -1},
        {"max_windows": 1.5},
        {"threads": -2},
        {"retries": -1},
        {"gpu_layers": -5},
    ],
)
def test_a_comparison_says_what_is_wrong_with_a_value(changes, tmp_path):
    path = tiny_model("llama", tmp_path)
    with pytest.raises(CompareError, match=next(iter(changes))):
        compare_quantizations(path, [path], text="x", progress=False, **changes)


@pytest.mark.parametrize(
    "options",
    [
        {"threads": 0},
        {"threads": -3},
        {"port": 99999},
        {"port": "x"},
        {"timeout": -1},
        {"gpu_layers": "x"},
        {"gpu_layers": -2},
        {"n_parallel": 0},
        {"ctx_size": 0},
        {"ctx_size": "512"},
    ],
)
def test_load_model_says_what_is_wrong_with_a_value(options, tmp_path):
    with InferenceEngine() as engine, pytest.raises(OptionError, match=next(iter(options))):
        engine.load_model(tiny_model("llama", tmp_path), auto_start=False, silent=True, **options)


@pytest.mark.parametrize(
    "asked, trained, held",
    [
        (100, 512, 256),
        (256, 512, 256),
        (300, 512, 512),
        (300, 400, 400),
        (700, 512, 700),
        (None, 512, 512),
    ],
)
def test_a_context_holds_what_llama_server_lets_a_request_have(asked, trained, held, tmp_path):
    assert (
        settle(GGUFFile(tiny_model("llama", tmp_path, n_ctx=trained)), asked, {}).ctx_size == held
    )


def accepts(ask):
    try:
        ask()
    except LlamaTelemetryError:
        return False
    return True


@pytest.mark.parametrize("asked", [100, 300])
def test_answers_and_captures_end_at_the_same_token(asked, tmp_path, llama_server):
    held, ids = -(-asked // 256) * 256, [50, 60, 70, 80] * 200
    with InferenceEngine(llama_server) as engine:
        engine.load_model(
            tiny_model("llama", tmp_path, n_ctx=1024), ctx_size=asked, silent=True, threads=1
        )
        for n in (asked + 1, held - 1, held + 1):
            answered = accepts(lambda: engine.infer(ids[:n], max_tokens=1, temperature=0))
            assert (
                answered == accepts(lambda: engine.capture(ids[:n], stages="logits")) == (n < held)
            )


def test_an_embedding_of_zeros_has_no_direction(tmp_path, llama_server):
    path = tiny_model("llama", tmp_path)
    zeros = with_value(path, "output_norm.weight", 0, tmp_path / "zeros.gguf", at=slice(None))
    with InferenceEngine(llama_server) as engine:
        engine.load_model(zeros, auto_start=False, silent=True, threads=1)
        with pytest.raises(NotFiniteError, match="'the cat'.*all zeros"):
            engine.embed("the cat")
        assert not engine.embed("the cat", normalize=False).any()


@pytest.mark.parametrize("ids, absent", [([5], {"normalized_entropy"}), ([5, 6], set())])
def test_attention_to_pairs_that_a_text_does_not_have_is_not_measured(ids, absent, tmp_path):
    with InferenceEngine() as engine:
        engine.load_model(tiny_model("llama", tmp_path), auto_start=False, silent=True, threads=1)
        found = engine.head_statistics(ids, patterns={"mine": [(0, 0)], "none": []})
    assert {str(name) for name in found if np.isnan(found[name]).all()} == absent | {"none"}
    assert all(np.isfinite(found[name]).all() for name in set(found) - absent - {"none"})


def test_what_is_generated_is_told_from_the_prompt_in_a_context_that_is_full(tmp_path):
    with InferenceEngine() as engine:
        engine.load_model(tiny_model("llama", tmp_path), auto_start=False, silent=True, threads=1)
        with pytest.raises(
            CaptureError, match="the prompt has 510 tokens and 3 are to be generated.*holds 512"
        ):
            engine.capture([50, 60] * 255, stages="hidden", generate=3)
        with pytest.raises(CaptureError, match="variants are {name: edits}, not list"):
            engine.sweep([5, 6], [])
        for text in (5, b"x", None, ["a", 5], [""]):
            with pytest.raises(ServerError, match="embed takes texts|A text is a str"):
                engine.embed(text)


def test_a_window_beyond_training_is_said(tmp_path):
    text = "the cat sat on the mat and " * 60
    with pytest.warns(UserWarning, match="n_ctx=128: tiny llama was trained for 64 tokens"):
        path = tiny_model("llama", tmp_path, n_ctx=64)
        compare_quantizations(path, [path], text=text, n_ctx=128, max_windows=1, progress=False)
    with pytest.raises(CompareError, match="n_ctx=128: tiny gpt2 was trained for 64 tokens.*table"):
        path = tiny_model("gpt2", tmp_path, n_ctx=64)
        compare_quantizations(path, [path], text=text, n_ctx=128, max_windows=1, progress=False)


def test_a_loss_beyond_any_perplexity_leaves_a_candidate_out(tmp_path):
    path = tiny_model("llama", tmp_path)
    huge = with_value(path, "output_norm.weight", 1e30, tmp_path / "huge.gguf", at=slice(None))
    text = "the cat sat on the mat and " * 60
    with pytest.warns(UserWarning, match="beyond any perplexity"):
        found = compare_quantizations(
            path, [huge, path], text=text, n_ctx=64, max_windows=1, progress=False
        )
    assert "nats per token" in found["error"].iloc[0] and np.isnan(found["ppl"].iloc[0])
    assert (
        found["kld_mean"].iloc[1] == 0 and found["ppl_ratio"].iloc[1] == 1
    )  # the reference itself
    with pytest.raises(LlamaTelemetryError, match="beyond any perplexity"):
        compare_quantizations(path, [huge], text=text, n_ctx=64, max_windows=1, progress=False)


def test_an_answer_stops_at_logits_that_are_no_numbers_also_after_answers_that_were(
    tmp_path, llama_server
):
    """The row of one token is NaN: prompts without it are answered, one with it was a text of
    made-up tokens."""
    path = with_value(
        tiny_model("llama", tmp_path),
        "token_embd.weight",
        np.nan,
        tmp_path / "row.gguf",
        at=250 * 64,
    )
    with InferenceEngine(llama_server) as engine:
        engine.load_model(path, silent=True, threads=1)
        whole = engine.infer([5, 6, 7], max_tokens=4, temperature=0.7)
        assert whole.probabilities is None and whole.tokens_generated == 4
        assert "".join(engine.infer_stream([5, 6, 7], max_tokens=4, temperature=0.7)) == whole.text
        for top_k, temperature in ((40, 0), (0, 0), (40, 0.7), (0, 0.7)):
            with pytest.raises(NotFiniteError, match="no numbers"):
                engine.infer([5, 250, 7], max_tokens=3, top_k=top_k, temperature=temperature)
        with pytest.raises(NotFiniteError, match="no numbers"):
            list(engine.infer_stream([5, 250, 7], max_tokens=3))
        assert engine.infer([5, 6, 7], max_tokens=4, temperature=0.7).text == whole.text


@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"top_k": 0}])
def test_one_row_of_the_output_matrix_that_is_no_number_stops_every_answer(
    options, tmp_path, llama_server
):
    """Sampling leaves that token out, so that what is drawn from are numbers: the vocabulary's sum
    is not."""
    path = with_value(
        tiny_model("llama", tmp_path), "output.weight", np.nan, tmp_path / "row.gguf", at=200 * 64
    )
    with InferenceEngine(llama_server) as engine:
        engine.load_model(path, silent=True, threads=1)
        with pytest.raises(NotFiniteError, match="no numbers"):
            engine.infer([5, 6, 7], max_tokens=2, **options)


def test_watching_an_answer_does_not_change_it(tmp_path, llama_server):
    with InferenceEngine(llama_server) as engine:
        engine.load_model(tiny_model("llama", tmp_path), silent=True, threads=1)
        for options, changes in (
            ((), {"temperature": 0}),
            ((), {}),
            ((), {"top_k": 0, "top_p": 1.0}),
            ({"min_p": 0.2}, {"temperature": 2.0}),
        ):
            request = body([5, 6, 7] * 9, options, max_tokens=24, **changes)
            plain = engine.server.post("/completion", request)["content"]
            assert plain == engine.server.post("/completion", watched(request))["content"]
