"""How long a change on the live page takes to answer: the run with the edits, the picture, and both
together.

    python tests/benchmarks/bench_live.py [--model FILE] [--repeat 20]

One row: medians over the repeats, in milliseconds, for a prompt of 32 tokens. Stored in
results/live.json."""

import argparse
import statistics
import time

from common import report

from llamatelemetry import InferenceEngine, resolve_model
from llamatelemetry.live.picture import picture
from llamatelemetry.live.question import Asker, Question

PROMPT = (
    "When Mary and John went to the store, John gave a bag of apples to Mary. "
    "When Anna and Tom went to the park, Tom gave a ball to"
)


def measure(model, repeat):
    with InferenceEngine() as engine:
        engine.load_model(model, auto_start=False, silent=True)
        asker = Asker(engine)
        question = Question(PROMPT, engine.model.n_layer // 2)
        n = len(asker.ask(question).pieces)  # starts the worker
        runs, drawn = [], []
        for i in range(repeat):
            started = time.perf_counter()
            answer = asker.ask(question.with_cut(n - 1, i % (n - 1)).switched())
            runs.append(time.perf_counter() - started)
            picture(answer, "model")
            drawn.append(time.perf_counter() - started)
        name = engine.model.path.stem
    return {
        "part": "live",
        "what": name,
        "tokens": n,
        "answer_ms": round(1000 * statistics.median(runs), 1),
        "with_picture_ms": round(1000 * statistics.median(drawn), 1),
        "slowest_ms": round(1000 * max(drawn), 1),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-Q4_1")
    parser.add_argument("--repeat", type=int, default=20)
    options = parser.parse_args()
    report("live", [measure(resolve_model(options.model), options.repeat)])
