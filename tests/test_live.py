"""The live page without a browser: what is asked, what is drawn, what the controls do."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from models import tiny_model

from llamatelemetry import InferenceEngine
from llamatelemetry.errors import CaptureError, NotFiniteError
from llamatelemetry.live import explorer, picture
from llamatelemetry.live.question import MOST, Answer, Asker, Question

HOSTILE = '<img src=x onerror="alert(1)">'


def answer(question, n=4, after_s=0.02):
    weights = np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None]
    table = [
        {"id": 1, "piece": HOSTILE, "before": 0.7, "after": 0.2},
        {"id": 2, "piece": b"\xff", "before": 0.1, "after": 0.5},
    ]
    return Answer(question, [HOSTILE, " a", b"\xff", "\n"][:n], weights, table, 0.01, after_s, 0.3)


def test_edits_are_switched_and_said():
    question = Question("a b", 3, 2).switched().with_cut(4, 1)
    assert question.off == ((3, 2),) and question.cut == ((3, 2, 4, 1),) and question.edited
    assert question.said() == [
        "head 2 of layer 3 off",
        "edge 4 to 1 of layer 3, head 2 cut",
    ]
    assert not question.switched().with_cut(4, 1).edited
    steered = Question("a", added={"calm": -2.0, "none": 0.0})
    assert steered.edited and steered.said() == ["-2 x calm"]


def test_a_question_becomes_the_engines_edits():
    asker = Asker(SimpleNamespace(), {"calm": (7, np.ones(4))})
    question = Question("a", 1, 0, ((1, 0),), ((1, 0, 2, 1),), {"calm": 0.5})
    head, edge, vector = asker.edits(question)
    assert (head.stage, edge.stage, edge.cut) == ("attn_heads", "scores", True)
    assert vector.stage == "hidden" and vector.values.tolist() == [0.5] * 4
    assert not asker.edits(Question("a", added={"calm": 0.0}))


def test_what_cannot_be_asked_is_named(tmp_path):
    """A vector that nobody gave, a head that is not there, no text, and an edit after which there
    is no prediction (16 bits, or a norm, that overflow)."""
    pytest.importorskip("llama_cpp", reason="the engine is not built")
    with InferenceEngine() as engine:
        path = tiny_model("gpt2", tmp_path)
        engine.load_model(path, auto_start=False, silent=True, threads=1)
        asker = Asker(engine, {"huge": (1, np.full(engine.model.n_embd, 1e38))})
        for question, says in (
            (Question("The cat", added={"calm": 1.0}), "no vector 'calm'; there are: huge"),
            (Question("The cat", 0, 99), "head=99"),
            (Question("The cat", 99), "layer 99"),
            (Question(""), "empty"),
        ):
            with pytest.raises(CaptureError, match=says):
                asker.ask(question)
        with pytest.raises(NotFiniteError, match="'logits'"):
            asker.ask(Question("The cat", added={"huge": 3.0}))
        assert asker.ask(Question("The cat")).kl == 0


def test_a_head_that_a_layer_lacks_has_no_brightest_weight():
    lacking = replace(answer(Question("a")), weights=np.full((4, 4), np.nan))
    assert "columns: key; no weight<" in picture.picture(lacking, "m")


def test_a_picture_has_every_number_and_no_markup_of_the_texts():
    drawn = picture.picture(answer(Question(HOSTILE, 3, 2).with_cut(2, 1)), HOSTILE)
    assert "<img" not in drawn and "<script" not in drawn
    assert drawn.count("<rect") == 10 and drawn.count("<path") == 1
    for text in ("70.00%", "20.00%", "10 ms, with edits 20 ms", "0.3 nats", "0.33333"):
        assert text in drawn
    plain = picture.picture(answer(Question("a"), after_s=None), "m")
    assert "no edits" in plain and "llt-after" not in plain and "with edits" not in plain
    assert "<img" not in picture.trouble(HOSTILE)


@pytest.mark.parametrize("n", [1, MOST + 5])
def test_a_map_of_any_length_is_bounded(n):
    weights, pieces = np.tril(np.full((n, n), 1 / n)), [" x"] * n
    weights[-1, 0] = math.nan
    table = [{"id": 0, "piece": "x", "before": 0.0, "after": 0.0}]
    drawn = picture.picture(Answer(Question("x"), pieces, weights[-MOST:], table, 0.1), "m")
    shown = min(n, MOST)
    assert drawn.count("<rect") == shown * (shown + 1) // 2 and len(drawn) < 300_000
    assert ("the last 40 of 45 tokens" in drawn) == (n > MOST)


class Told(Asker):
    """Answers without a model; refuses what a test says."""

    def __init__(self):
        path = SimpleNamespace(stem="model")
        model = SimpleNamespace(n_layer=8, n_head=4, path=path)
        super().__init__(SimpleNamespace(model=model), {"calm": (2, np.ones(4))})
        self.asked, self.refuse = [], None

    def ask(self, question):
        if self.refuse:
            raise CaptureError(self.refuse)
        self.asked.append(question)
        return answer(question)


@pytest.fixture
def shown():
    asker = Told()
    found = explorer.Explorer(asker, Question("one two"), "model")
    found.ask(found.question)
    return found, asker


def test_each_control_asks_once(shown):
    found, asker = shown
    found.layer.value = 3
    found.head.value = 2
    found.switch.click()
    found.key.value = 1
    found.cut.click()
    found.strength.value = 4.0
    assert len(asker.asked) == 6
    last = asker.asked[-1]
    assert (last.layer, last.head, last.off) == (3, 2, ((3, 2),))
    assert last.cut == ((3, 2, 3, 1),) and last.added == {"calm": 4.0}
    assert found.switch.description == "Switch head on"
    found.clear.click()
    assert not asker.asked[-1].edited and found.strength.value == 0


def test_another_prompt_has_other_edges(shown):
    found, asker = shown
    found.cut.click()
    found.switch.click()
    found.prompt.value = "three"
    assert asker.asked[-1] == Question("three", off=((0, 0),))


def test_a_query_offers_the_keys_that_it_sees(shown):
    found, _ = shown
    assert [value for _, value in found.key.options] == [0, 1, 2, 3]
    found.key.value, found.query.value = 3, 1
    assert [value for _, value in found.key.options] == [0, 1] and found.key.value == 0


def test_what_cannot_be_done_is_said_and_nothing_is_lost(shown):
    found, asker = shown
    before = found.answer
    asker.refuse = f"no such edge {HOSTILE}"
    found.cut.click()
    assert "no such edge" in found.status.value and "<img" not in found.status.value
    assert found.answer is before and not found.question.cut
    found.prompt.value = " "
    assert "empty" in found.status.value and found.prompt.value == "one two"


@pytest.mark.parametrize("where", [dict(layer=8), dict(head=-1), dict(layer="3"), dict(head=4)])
def test_a_layer_that_is_not_there_is_named_at_once(where):
    with pytest.raises(CaptureError, match="is 0 to"):
        explorer.explore(Told().engine, **where)


def test_without_a_model_it_says_so():
    with pytest.raises(CaptureError, match="load_model"):
        explorer.explore(SimpleNamespace(model=None))


@pytest.mark.slow
def test_answers_are_the_engines_own(engine):
    asker, prompt = Asker(engine), "The capital of France is"
    question = Question(prompt, 3, 2)
    first = asker.ask(question)
    logits = engine.capture(prompt, "logits").logits.values[-1].astype(float)
    shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    for row in first.table:
        assert row["before"] == pytest.approx(shares[row["id"]], rel=1e-4)
    cut = asker.ask(question.with_cut(4, 1))
    assert cut.weights[4, 1] == 0 and cut.weights[4].sum() == pytest.approx(1, abs=1e-4)
    assert cut.kl > 0 and cut.after_s > 0 and cut.before_s == first.before_s
    with pytest.raises(CaptureError):
        asker.ask(question.with_cut(1, 4))
    long = asker.ask(Question("one two three " * 40, 3, 2))
    assert long.weights.shape == (MOST, len(long.pieces))
    assert long.weights[-1].sum() == pytest.approx(1, abs=1e-4)
