"""What is asked of a model at a live page, and its answer: one head's map and the next token, with
and without edits, each run through llama.cpp and timed."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arguments import prompt, whole
from ..capture.edits import ablate_head, add, knock_out
from ..capture.finite import measured
from ..errors import CaptureError
from ..maths import log_softmax

if TYPE_CHECKING:
    from ..engine import InferenceEngine

SHOWN = 10  # next tokens
MOST = 40  # queries whose weights are captured: the last ones of longer prompts


@dataclass(frozen=True)
class Question:
    """prompt: the text. layer, head: whose map is shown. off: (layer, head) of heads that are
    switched off; cut: (layer, head, query, key) of edges that are cut; added: {name of a vector:
    strength}."""

    prompt: str
    layer: int = 0
    head: int = 0
    off: tuple[tuple[int, int], ...] = ()
    cut: tuple[tuple[int, int, int, int], ...] = ()
    added: Mapping[str, float] = field(default_factory=dict)

    @property
    def edited(self) -> bool:
        return bool(self.off or self.cut or any(self.added.values()))

    def switched(self) -> "Question":
        """With the shown head off, or on again."""
        here = (self.layer, self.head)
        off = set(self.off) ^ {here}
        return replace(self, off=tuple(sorted(off)))

    def with_cut(self, query: int, key: int) -> "Question":
        """With an edge of the shown head cut, or whole again."""
        edge = (self.layer, self.head, query, key)
        return replace(self, cut=tuple(sorted(set(self.cut) ^ {edge})))

    def said(self) -> list[str]:
        """Each edit in words."""
        heads = [f"head {head} of layer {layer} off" for layer, head in self.off]
        edges = [f"edge {q} to {k} of layer {layer}, head {h} cut" for layer, h, q, k in self.cut]
        vectors = [f"{strength:+g} x {name}" for name, strength in self.added.items() if strength]
        return heads + edges + vectors


@dataclass(frozen=True)
class Answer:
    """question: what was asked. pieces: of the prompt's tokens. weights: (query, key) of the shown
    head, edits in force, of the last `MOST` queries. table: next tokens (id, piece, before, after:
    probabilities), the best `SHOWN` of both runs. before_s, after_s: seconds of the run without and
    with edits; after_s is None without any. kl: KL(before || after) of the next token, nats."""

    question: Question
    pieces: list
    weights: np.ndarray
    table: list[dict]
    before_s: float
    after_s: float | None = None
    kl: float = 0.0


class Asker:
    """Puts questions to an engine. The run without edits is kept for the last prompt and layer, so
    that an edit costs one run.

    vectors: {name: (layer, (embd,) vector)} that can be added to `hidden`."""

    def __init__(
        self, engine: "InferenceEngine", vectors: Mapping[str, tuple[int, Any]] | None = None
    ) -> None:
        self.engine, self.vectors = engine, dict(vectors or {})
        self._tokens: tuple[str | None, Any] = (None, None)  # of the last prompt
        self._kept: tuple[tuple[str, int], Any, float] | None = None

    def edits(self, question: Question) -> list:
        """A question's edits as `engine.capture` takes them."""
        made: list = [ablate_head(layer, head) for layer, head in question.off]
        made += [knock_out(*edge) for edge in question.cut]
        for name, strength in question.added.items():
            if strength:
                if name not in self.vectors:
                    known = ", ".join(map(str, self.vectors)) or "none"
                    raise CaptureError(f"there is no vector {name!r:.80}; there are: {known}.")
                layer, vector = self.vectors[name]
                made.append(add("hidden", layer, vector, strength))
        return made

    def ask(self, question: Question) -> Answer:
        """The answer. Raises what `engine.capture` raises: an edge that is none, a head that is not
        there, an empty prompt; NotFiniteError where no prediction is left to show."""
        prompt(question.prompt)
        n_head = self.engine._loaded().n_head
        whole("head", question.head, 0, n_head - 1, error=CaptureError)
        key = (question.prompt, question.layer)
        if self._kept is None or self._kept[0] != key:
            self._kept = (key, *self._run(question))
        _, before, before_s = self._kept
        after, after_s = before, None
        if question.edited:
            after, after_s = self._run(question, self.edits(question))
        first, last = (log_softmax(measured(run.logits)[-1:])[0] for run in (before, after))
        best = np.union1d(np.argsort(-first)[:SHOWN], np.argsort(-last)[:SHOWN])
        best = sorted(best, key=lambda token: -max(first[token], last[token]))[:SHOWN]
        assert self.engine.model is not None  # explore() has looked
        pieces = self.engine.model.pieces
        table = [
            {
                "id": int(token),
                "piece": pieces[token],
                "before": float(np.exp(first[token])),
                "after": float(np.exp(last[token])),
            }
            for token in best
        ]
        weights = after.attention.sel(layer=question.layer, head=question.head).values
        apart = float(np.sum(np.exp(first) * (first - last), dtype=np.float64))
        kl = max(apart, 0.0) if after_s else 0.0  # sums of 32-bit floats, also a little below 0
        tokens = after.tokens["piece"].tolist()
        return Answer(question, tokens, weights, table, before_s, after_s, kl)

    def _run(self, question, edits=()):
        started = time.perf_counter()
        if self._tokens[0] != question.prompt:
            self._tokens = question.prompt, self.engine.tokenize(question.prompt)["id"]
        ids = self._tokens[1]
        queries = range(max(0, len(ids) - MOST), len(ids))
        where = dict(layers=question.layer, queries=queries, edits=edits)
        positions = {"logits": len(ids) - 1}
        capture = self.engine.capture(ids, ("attention", "logits"), positions=positions, **where)
        return capture, time.perf_counter() - started
