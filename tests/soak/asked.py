"""Requests from many threads, with captures beside them: each answer is the one that was given
alone, none is lost, none is somebody else's.

What llama-server promises: with one slot requests wait for one another, and a greedy answer is the
same to the last digit. With several slots their tokens are computed in one batch, whose sums round
differently: where two tokens are nearly as probable, the other one may come, and from there on
another text. TIE says how near they must be for that to be an explanation."""

import itertools
import queue
import random
import threading
import time
from collections import Counter

import numpy as np

COUNT, THREADS, DISTINCT, SLOTS = 1000, 16, 50, (1, 4)
KINDS = ("infer", "stream", "chat", "embed", "tokenize")
TIE = 0.5  # nats between two tokens that rounding may put in the other order
COSINE = 0.99  # of an embedding that was computed in a batch with its own alone
SECONDS = 120  # in which one more answer has come, under whatever load
TOLD = 20  # seconds between two words on how far it is
WORDS = (
    "river stone window apple doctor music winter engine garden letter planet silver bridge "
    "candle forest number story island mirror ocean paper queen road shadow tower"
).split()


def plan(count, seed):
    """[(kind, prompt)], no two prompts alike."""
    draw, made = random.Random(seed), []
    for number, kind in zip(range(count), itertools.cycle(KINDS)):
        made.append((kind, f"{number}. The {' '.join(draw.choices(WORDS, k=6))} and the"))
    return made


def ask(engine, kind, prompt, probs=0):
    """The answer to one request; probs: of a text, its InferResult with so many alternatives."""
    greedy = {"max_tokens": 12, "temperature": 0}
    if kind == "embed":
        return engine.embed(prompt)[0]
    if kind == "tokenize":
        return engine.tokenize(prompt)["id"].tolist()
    if kind == "stream" and not probs:
        return "".join(engine.infer_stream(prompt, **greedy))
    call = engine.chat if kind == "chat" else engine.infer
    answer = call(prompt, n_probs=probs, **greedy)
    return answer if probs else answer.text


def gap(text, table):
    """How much less probable (nats) the first token was in which `text` leaves an answer whose
    probabilities (InferResult's table) are given; None where it leaves it by a token that is not
    among them."""
    before = ""
    for _, rows in table.groupby("position"):
        taken = rows[rows["chosen"]].iloc[0]
        piece = _text(taken["piece"])
        if text.startswith(before + piece):
            before += piece
            continue
        others = [
            taken["logprob"] - row.logprob
            for row in rows.itertuples()
            if not row.chosen and (text + "\0").startswith(before + (_text(row.piece) or "\0"))
        ]
        return min(others, default=None)
    return None


def _text(piece):
    return piece if isinstance(piece, str) else piece.decode("utf-8", "replace")


def judge(number, answer, alone, exact):
    """What an answer is: "same", "tie" (rounding), "crossed" (another request's), "wrong" or
    "lost" (an exception), and a number: the gap of a tie, the cosine of an embedding.

    alone: [(kind, answer, table of probabilities or None)] of all requests."""
    kind, own, table = alone[number]
    if isinstance(answer, BaseException):
        return "lost", f"{type(answer).__name__}: {answer}"
    same = np.array_equal(answer, own) if kind == "embed" else answer == own
    if same:
        return "same", None
    others = [there for at, (what, there, _) in enumerate(alone) if what == kind and at != number]
    if kind == "embed":
        cosine = float(answer @ own)
        if others and max(answer @ other for other in others) > cosine:
            return "crossed", cosine
        return "tie" if not exact and cosine > COSINE else "wrong", cosine
    if answer in others:
        return "crossed", answer
    less = None if table is None or exact else gap(answer, table)
    return (
        ("tie", less) if less is not None and less < TIE else ("wrong", f"{answer!r}, not {own!r}")
    )


def together(ask_one, todo, threads=THREADS, seconds=SECONDS, stop=lambda: False, tell=None):
    """{place in todo: answer or exception} of requests that so many threads ask at once. ask_one:
    of one request. seconds: without any answer, after which those that are missing are late.
    stop(): whether no more are asked; those are not in the answer. tell: told now and then how many
    answers there are."""
    waiting, answers, taken = queue.Queue(), {}, set()
    for each in enumerate(todo):
        waiting.put(each)

    def work():
        while not stop():
            try:
                place, request = waiting.get_nowait()
            except queue.Empty:
                return
            taken.add(place)
            try:
                answers[place] = ask_one(request)
            except BaseException as error:
                answers[place] = error

    workers = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
    [worker.start() for worker in workers]
    count, last, told = 0, time.monotonic(), time.monotonic()
    while any(worker.is_alive() for worker in workers) and time.monotonic() - last < seconds:
        time.sleep(0.05)
        if len(answers) > count:
            count, last = len(answers), time.monotonic()
        if tell and time.monotonic() - told > TOLD:
            told = time.monotonic()
            tell(count)
    late = TimeoutError(f"no answer in {seconds} s")
    there = sorted(taken) if stop() else range(len(todo))
    return {place: answers.get(place, late) for place in there}


class Beside:
    """Captures in a thread of their own, as long as a `with` block lasts: each must be equal, bit
    by bit, to the one made alone."""

    def __init__(self, capture, texts):
        self.capture, self.texts = capture, texts
        self.alone, self.done, self.wrong = [capture(text) for text in texts], 0, []
        self._over = threading.Event()

    def __enter__(self):
        self._thread = threading.Thread(target=self._work)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()

    def _work(self):
        for text, alone in itertools.cycle(list(zip(self.texts, self.alone))):
            if self._over.is_set():
                return
            try:
                found = self.capture(text)
                if not all(np.array_equal(a, b) for a, b in zip(found, alone, strict=True)):
                    self.wrong.append(f"a capture of {text!r} is not the one made alone")
            except BaseException as error:
                self.wrong.append(f"{type(error).__name__}: {error}")
            self.done += 1


def arrays(engine):
    def capture(text):
        captured = engine.capture(text)
        return [captured[stage].values.copy() for stage in captured.stages]

    return capture


def measure(
    model,
    slots,
    count,
    distinct,
    seed,
    threads=THREADS,
    seconds=SECONDS,
    stop=lambda: False,
    tell=lambda *said: None,
):
    """(Counter of what became of each request, findings, the row's numbers) with so many slots;
    None where stop() said so before all were asked. tell(done, said): told how far it is."""
    from llamatelemetry import InferenceEngine

    requests, counts, findings = plan(distinct, seed), Counter(), []
    with InferenceEngine() as engine:
        engine.load_model(model, n_parallel=slots, embeddings=True, silent=True, ctx_size=512)
        alone = []
        for kind, prompt in requests:
            if stop():
                return None
            table = None
            if kind in ("infer", "stream", "chat"):
                table = ask(engine, kind, prompt, probs=8).probabilities
            alone.append((kind, ask(engine, kind, prompt), table))
            if len(alone) % 10 == 0 or len(alone) == distinct:
                tell(0, f"{slots} slots: {len(alone)} of {distinct} were asked alone")
        todo = [number % distinct for number in range(count)]
        random.Random(seed).shuffle(todo)
        with Beside(arrays(engine), [prompt for _, prompt in requests[:5]]) as beside:
            answers = together(
                lambda n: ask(engine, *requests[n]),
                todo,
                threads,
                seconds,
                stop,
                lambda done: tell(done, f"{slots} slots, {beside.done} captures beside"),
            )
    if len(answers) < count:
        return None
    gaps = [0.0]
    for place, answer in answers.items():
        kind, said = judge(todo[place], answer, alone, exact=slots == 1)
        counts[kind] += 1
        if kind == "tie":
            gaps += [said] if requests[todo[place]][0] != "embed" else []
        elif kind != "same":
            findings.append(f"{kind}: {requests[todo[place]]}: {said}")
    findings += beside.wrong
    return counts, findings, {"captures": beside.done, "largest_tie": round(max(gaps), 4)}


def run(soak):
    """The rows of this part: all, and one per number of slots."""
    from llamatelemetry import resolve_model

    rows, total = [], Counter()
    count = (soak.count or COUNT) // len(SLOTS)
    for number, slots in enumerate(SLOTS):

        def tell(done, said, before=number * count):
            soak.progress(before + done, count * len(SLOTS), said)

        distinct = min(DISTINCT, count)
        found = measure(
            resolve_model(), slots, count, distinct, soak.seed, stop=soak.over, tell=tell
        )
        if found is None:
            return None
        counts, findings, facts = found
        for said in findings:
            soak.find(f"{slots} slots: {said}", f"--parts requests --seed {soak.seed}")
        rows.append({"what": f"{slots} slots", "count": count, **counts, **facts})
        total += counts + Counter(captures=facts["captures"])
        tell(count, rows[-1])
    return [{"what": "all", "count": count * len(SLOTS), "threads": THREADS, **total}, *rows]
