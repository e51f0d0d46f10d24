"""InferenceEngine with the real server and the embedded model; what is wrong is said before either
is needed."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest

from llamatelemetry import (
    InferenceEngine,
    LlamaTelemetryError,
    ModelLoadError,
    ModelNotFoundError,
    ServerError,
    WorkerCrashedError,
)
from llamatelemetry import engine as module
from llamatelemetry.server import completion
from llamatelemetry.server.probabilities import probability_table

PROMPT = "The capital of France is"


@pytest.mark.parametrize(
    "call",
    [
        lambda e: e.infer("x"),
        lambda e: e.infer_stream("x"),
        lambda e: e.chat("x"),
        lambda e: e.embed("x"),
        lambda e: e.tokenize("x"),
        lambda e: e.capture("x"),
        lambda e: e.fit(),
    ],
)
def test_nothing_is_loaded(call):
    with pytest.raises(LlamaTelemetryError, match="load_model"):
        call(InferenceEngine())


def test_result_is_its_text():
    answer = {
        "content": "ab",
        "tokens_predicted": 3,
        "tokens_evaluated": 5,
        "stop_type": "eos",
        "timings": {"predicted_ms": 100.0, "prompt_ms": 50.0, "prompt_n": 5},
    }
    result = completion.as_result(answer, 170.0)
    assert str(result) == result.text == "ab" and result.latency_ms == 170.0
    assert (
        result.tokens_per_sec == 20
    )  # the first of three tokens comes out of the prompt: two decodes in 0.1 s
    assert result.prompt_tokens_per_sec == 100
    assert np.isnan(completion.as_result(answer | {"tokens_predicted": 1}, 1.0).tokens_per_sec)


def test_probabilities_keep_the_sampled_token():
    """A token sampled from below the n_probs most probable is there too, without a rank."""

    def token(i, logprob, raw):
        return {"id": i, "logprob": logprob, "bytes": list(raw)}

    table = probability_table(
        [token(7, -3.0, b" z") | {"top_logprobs": [token(1, -0.5, b"\xf0\x9f")]}]
    )
    assert table["id"].tolist() == [1, 7] and table["chosen"].tolist() == [False, True]
    assert table["piece"].tolist() == [b"\xf0\x9f", " z"]
    assert table["prob"].tolist() == pytest.approx(np.exp([-0.5, -3.0]))
    assert table["rank"].isna().tolist() == [False, True]


def test_zero_is_a_seed():
    body = completion.request_body("x", 1, 0.7, 0.9, 40, 0, None, 0, {})
    assert (
        body["seed"] == 0
        and completion.request_body("x", 1, 0.7, 0.9, 40, None, None, 0, {})["seed"] == -1
    )
    other = completion.request_body("x", 1, 0.7, 0.9, 40, 0, "END", 0, {"min_p": 0.1})
    assert other == body | {"stop": ["END"], "min_p": 0.1}


class Session:
    """A capture session that crashes when told to."""

    made = []

    def __init__(self, path, **kwargs):
        self.kwargs, self.closed, self.pid = kwargs, False, os.getpid()
        self.made.append(self)

    def tokenize(self, text, add_special=True):
        return [len(text)]

    def capture(self, text, **kwargs):
        raise WorkerCrashedError("boom")

    def close(self):
        self.closed = True


@pytest.mark.slow
def test_a_crashed_worker_is_replaced(smollm2, monkeypatch):
    import llamatelemetry.collecting.session as session

    monkeypatch.setattr(session, "CollectSession", Session)
    monkeypatch.setattr(Session, "made", [])
    with InferenceEngine() as engine:
        engine.load_model(smollm2, auto_start=False, silent=True, threads=1)
        assert not Session.made  # the worker starts at the first capture
        with pytest.raises(WorkerCrashedError):
            engine.capture("x")
        assert Session.made[0].closed and Session.made[0].kwargs["threads"] == 1
        assert engine.tokenize("xyz")["id"].tolist() == [3]
        assert len(Session.made) == 2 and engine.placement()["process"].tolist() == [
            "notebook",
            "capture worker",
        ]
    assert Session.made[1].closed


# Loading


def bad_files(folder, good):
    (folder / "text.gguf").write_text("not a model at all\n" * 100)
    (folder / "empty.gguf").write_bytes(b"")
    (folder / "short.gguf").write_bytes(good.read_bytes()[:3_000_000])
    return [
        ("none.gguf", ModelNotFoundError),
        (".", ModelLoadError),
        ("text.gguf", ModelLoadError),
        ("empty.gguf", ModelLoadError),
        ("short.gguf", ModelLoadError),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("auto_start", [True, False])
def test_bad_files(smollm2, llama_server, tmp_path, auto_start):
    with InferenceEngine(llama_server) as engine:
        for name, error in bad_files(tmp_path, smollm2):
            started = time.monotonic()
            with pytest.raises((error, ModelNotFoundError) if name == "." else error):
                engine.load_model(tmp_path / name, auto_start=auto_start, silent=True)
            assert time.monotonic() - started < 30
            assert engine.model is None and not engine.server.is_running()
        engine.load_model(smollm2, ctx_size=512, silent=True)
        assert engine.infer(PROMPT, max_tokens=1, temperature=0).text == " Paris"


@pytest.mark.slow
def test_unknown_architecture(llama_server, tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "nosuchthing")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with (
        InferenceEngine(llama_server) as engine,
        pytest.raises(ModelLoadError, match="nosuchthing"),
    ):
        engine.load_model(tmp_path / "odd.gguf", silent=True)


@pytest.mark.slow
def test_no_server_is_said_before_anything_is_started(smollm2, monkeypatch):
    def nowhere():
        raise ServerError("No llama-server: run `llamatelemetry engine build`")

    monkeypatch.setattr(module, "find_server", nowhere)
    monkeypatch.setattr("llamatelemetry.server.process.find_server", nowhere)
    with InferenceEngine() as engine:
        with pytest.raises(ServerError, match="engine build"):
            engine.load_model(smollm2, silent=True)
        engine.load_model(smollm2, auto_start=False, silent=True)  # captures need none
        assert engine.model.n_layer == 30
        with pytest.raises(ServerError, match="engine build"):
            engine.infer("x")


@pytest.mark.slow
def test_load_prints_two_lines_and_loading_again_closes(smollm2, llama_server, capsys):
    with InferenceEngine(llama_server) as engine:
        engine.load_model(smollm2, ctx_size=512, auto_start=False)
        engine.infer(PROMPT, max_tokens=1)  # starts the server
        pid, lines = engine.server.pid, capsys.readouterr().out.splitlines()
        assert len(lines) == 2 and lines[0].startswith("GPU") and "llama-server" in lines[1]
        engine.load_model(smollm2, ctx_size=512, silent=True)
        assert (
            not psutil.pid_exists(pid)
            and engine.server.pid != pid
            and capsys.readouterr().out == ""
        )
        pid = engine.server.pid
    assert not psutil.pid_exists(pid) and engine.model is None


# Text


@pytest.mark.slow
def test_a_seed_is_a_seed(served):
    ask = dict(max_tokens=12, temperature=1.0, top_p=1.0, top_k=0)
    first = served.infer(PROMPT, seed=0, **ask)
    served.infer("Something else in between.", max_tokens=3)
    assert served.infer(PROMPT, seed=0, **ask).text == first.text
    assert served.infer(PROMPT, seed=1, **ask).text != first.text
    assert len({served.infer(PROMPT, seed=None, **ask).text for _ in range(3)}) > 1
    assert (
        first.tokens_generated == 12 and first.stop_reason == "limit" and str(first) == first.text
    )


@pytest.mark.slow
def test_speed_is_of_decoding(served):
    """A long prompt lengthens the request, and leaves the decode speed what it is."""
    short = served.infer("Hi", max_tokens=16, temperature=0, ignore_eos=True)
    long = served.infer("word " * 400, max_tokens=16, temperature=0, ignore_eos=True)
    assert long.prompt_tokens > 300 and short.prompt_tokens < 5
    for result in (short, long):
        spent = 1000 * (result.tokens_generated - 1) / result.tokens_per_sec
        spent += 1000 * result.prompt_tokens / result.prompt_tokens_per_sec
        assert (
            0 < spent <= 1.05 * result.latency_ms
        )  # prompt and decode together are within what the clock saw
    assert np.isnan(served.infer("Hi", max_tokens=1).tokens_per_sec)


@pytest.mark.slow
def test_stop_sequences(served):
    whole = served.infer("1, 2, 3, 4,", max_tokens=24, temperature=0)
    assert " 7" in whole.text
    cut = served.infer("1, 2, 3, 4,", max_tokens=24, temperature=0, stop_sequences=[" 7"])
    assert cut.text == whole.text[: whole.text.index(" 7")]
    assert (cut.stop_reason, cut.stop_word) == ("word", " 7")
    assert (
        "".join(
            served.infer_stream("1, 2, 3, 4,", max_tokens=24, temperature=0, stop_sequences=" 7")
        )
        == cut.text
    )


@pytest.mark.slow
def test_streaming(served):
    ask = dict(max_tokens=20, seed=3)
    pieces = list(served.infer_stream("Once upon a time", **ask))
    assert len(pieces) > 10  # as they come, not at the end
    assert "".join(pieces) == served.infer("Once upon a time", **ask).text


@pytest.mark.slow
def test_streaming_never_splits_a_character(served):
    text = "🦙é漢字🇫🇷ß𝒳"  # the tokenizer spells most of these byte by byte
    ask = dict(max_tokens=60, temperature=0, grammar=f'root ::= "{text}"')
    pieces = list(served.infer_stream("Say:", **ask))
    assert "".join(pieces) == text == served.infer("Say:", **ask).text
    tokens = served.infer("Say:", n_probs=1, **ask).probabilities
    assert (
        tokens["piece"].map(type).eq(bytes).any()
    )  # so there were tokens that are no whole characters


@pytest.mark.slow
def test_closing_the_stream_ends_the_generation(served):
    stream = served.infer_stream("Once upon a time", max_tokens=1500, ignore_eos=True)
    assert next(stream)
    stream.close()
    started = time.perf_counter()
    served.infer("Hi", max_tokens=1)  # one slot: it would wait for the rest of 1,500 tokens
    deadline = time.monotonic() + 10
    while served.server._session.get(served.server.url + "/slots").json()[0]["is_processing"]:
        assert time.monotonic() < deadline, (
            f"still generating after {time.perf_counter() - started:.1f} s"
        )
        time.sleep(0.05)


@pytest.mark.slow
def test_probabilities(served):
    result = served.infer(PROMPT, max_tokens=4, temperature=0, n_probs=5)
    table = result.probabilities
    assert table.groupby("position").size().tolist() == [5] * 4
    assert table.query("position == 0 and rank == 0")["piece"].item() == " Paris"
    assert (
        "".join(table[table["chosen"]]["piece"]) == result.text
    )  # greedy: the chosen ones are those of rank 0
    assert table.loc[table["chosen"], "rank"].eq(0).all()
    assert (
        np.allclose(np.exp(table["logprob"]), table["prob"])
        and table.groupby("position")["prob"].sum().le(1).all()
    )
    assert served.infer(PROMPT, max_tokens=1).probabilities is None
    # Before temperature: a hot sampler sees the same probabilities.
    hot = served.infer(PROMPT, max_tokens=1, temperature=5.0, n_probs=5).probabilities
    assert np.allclose(hot["prob"][:5], table["prob"][:5])


@pytest.mark.slow
def test_chat_uses_the_models_template(served):
    text = served.apply_template([{"role": "user", "content": "Say hello."}])
    assert (
        text.endswith("<|im_start|>assistant\n")
        and "<|im_start|>user\nSay hello.<|im_end|>" in text
    )
    result = served.chat("Say hello.", max_tokens=40, temperature=0)
    assert (
        result.text == served.infer(text, max_tokens=40, temperature=0).text
        and "ello" in result.text
    )


@pytest.mark.slow
def test_chat_without_a_template(served, monkeypatch):
    monkeypatch.delitem(served.model.metadata, "tokenizer.chat_template")
    with pytest.raises(ServerError, match="no chat template"):
        served.chat("hi")


@pytest.mark.slow
@pytest.mark.parametrize(
    "call, match",
    [
        (lambda e: e.infer(""), "empty"),
        (lambda e: e.infer([]), "empty"),
        (lambda e: e.infer("word " * 3000), "longer than the context.*2048.*ctx_size"),
        (lambda e: list(e.infer_stream("word " * 3000)), "longer than the context"),
        (lambda e: e.infer("x", grammar="root ::= ("), "refused"),
        (lambda e: e.embed([""]), "not empty"),
    ],
)
def test_refused_and_then_right(served, call, match):
    with pytest.raises(ServerError, match=match):
        call(served)
    assert served.infer(PROMPT, max_tokens=1, temperature=0).text == " Paris"


@pytest.mark.slow
def test_tokenize_agrees_with_the_server(served):
    for text in ("The cat sat.", " a\n\tb", "🦙 漢字", "<|im_start|>user"):
        table = served.tokenize(text)
        body = {"content": text, "add_special": True, "with_pieces": True}
        theirs = served.server.post("/tokenize", body)["tokens"]
        assert table["id"].tolist() == [token["id"] for token in theirs]
        whole = b"".join(
            piece if isinstance(piece, bytes) else piece.encode() for piece in table["piece"]
        )
        assert whole.decode() == text


# A server of its own for what breaks it


@pytest.fixture
def own(smollm2, llama_server):
    with InferenceEngine(llama_server) as engine:
        yield engine.load_model(smollm2, ctx_size=1024, silent=True)


@pytest.mark.slow
def test_embed_and_infer_in_one_server(own):
    text = own.infer(PROMPT, max_tokens=8, temperature=0).text
    rows = own.embed(
        ["A cat sat on the mat.", "The kitten sat on a rug.", "Interest rates rose by two percent."]
    )
    pid = own.server.pid
    assert rows.shape == (3, own.model.n_embd) and rows.dtype == np.float32
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert rows[0] @ rows[1] > rows[0] @ rows[2]
    assert np.array_equal(own.embed("A cat sat on the mat."), rows[:1])
    raw = own.embed("A cat sat on the mat.", normalize=False)
    assert np.allclose(raw / np.linalg.norm(raw), rows[0], atol=1e-5) and np.linalg.norm(raw) > 1.1
    assert (
        own.infer(PROMPT, max_tokens=8, temperature=0).text == text
    )  # the same server, the same text
    assert own.server.pid == pid
    with pytest.raises(ServerError, match="ubatch_size"):
        own.embed("word " * 600)


@pytest.mark.slow
def test_texts_beside_one_another_have_the_embeddings_of_each_alone(own, smollm2, llama_server):
    """Also with several slots, whose texts of different lengths llama.cpp would cut and pool by
    parts: the last part's vector came (cosine 0.7 to 0.98)."""
    texts = ["A cat", "Two words", "The kitten sat on a rug and looked at the rain outside. " * 3]
    alone = np.concatenate([own.embed(text) for text in texts])
    with InferenceEngine(llama_server) as engine:
        engine.load_model(smollm2, n_parallel=4, embeddings=True, ctx_size=512, silent=True)
        found = [engine.embed(texts)]
        with ThreadPoolExecutor(8) as pool:
            found += [np.concatenate(list(pool.map(engine.embed, texts))) for _ in range(4)]
    for rows in found:
        assert np.allclose((rows * alone).sum(1), 1, atol=1e-5)


@pytest.mark.slow
def test_two_engines(own, served):
    assert own.server.pid != served.server.pid and own.server.port != served.server.port
    answers = {}

    def ask(name, engine):
        answers[name] = engine.infer("Once upon a time", max_tokens=24, temperature=0).text

    threads = [
        threading.Thread(target=ask, args=pair) for pair in (("own", own), ("served", served))
    ]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert answers["own"] == answers["served"] and answers["own"]
    own.close()
    assert served.infer(PROMPT, max_tokens=1, temperature=0).text == " Paris"


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_server_dies_in_mid_request(own, streaming):
    pid = own.server.pid
    if not streaming:
        threading.Timer(0.5, os.kill, (pid, signal.SIGKILL)).start()
    started = time.monotonic()
    with pytest.raises(ServerError, match="died during the request .*SIGKILL"):
        if streaming:
            for piece, _ in enumerate(
                own.infer_stream("Once upon a time", max_tokens=900, ignore_eos=True)
            ):
                if piece == 0:
                    os.kill(pid, signal.SIGKILL)
        else:
            own.infer("Once upon a time", max_tokens=900, ignore_eos=True)
    assert time.monotonic() - started < 10
    assert own.infer(PROMPT, max_tokens=1, temperature=0).text == " Paris"  # a new server answers
    assert own.server.pid != pid
