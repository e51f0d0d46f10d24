"""Statistics of every head streamed inside the worker, against a full capture of the attention and
the plain decode.

    python tests/benchmarks/bench_heads.py [--model NAME] [--tokens 2048] [--skip-full]

Added memory: the worker's and this process's largest resident memory during the call (shared pages
once), less what they had before it. Each way runs in a worker of its own, after a short warm-up, so
none inherits another's buffers."""

import argparse
import threading
import time

from common import memory_of, report

TEXT = "The cat sat on the mat because it was tired of chasing the small grey mouse around the old house. "


def watched(work):
    """(result, seconds, added MiB of this process and its children) of work()."""
    import os

    before, peak, done = memory_of(os.getpid()), [0.0], threading.Event()

    def watch():
        while not done.wait(0.05):
            peak[0] = max(peak[0], memory_of(os.getpid()))

    thread = threading.Thread(target=watch)
    thread.start()
    started = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - started
    peak[0] = max(peak[0], memory_of(os.getpid()))
    done.set()
    thread.join()
    return result, seconds, peak[0] - before


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-Q4_1")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument(
        "--skip-full", action="store_true", help="the full capture needs heads x tokens^2 x 4 bytes"
    )
    parser.add_argument("--out")
    options = parser.parse_args()

    import numpy as np

    from llamatelemetry import resolve_model
    from llamatelemetry.capture.session import CaptureSession
    from llamatelemetry.heads import behaviours, texts

    path = resolve_model(options.model)
    rows, found = [], {}

    def measure(what, work):
        with CaptureSession(path) as session:
            tokens = (session.tokenize(TEXT) * (options.tokens // 8))[: options.tokens]
            pieces = [session.model.pieces[i] for i in tokens]
            text = texts.Text("bench", "prose", tokens, pieces)
            behaviours.add_pairs(text, 20, np.random.default_rng(0))
            session.time_decode(tokens[:8], 1, False)
            found[what], seconds, memory = watched(lambda: work(session, tokens, text))
            n_pairs = sum(map(len, text.patterns.values()))
        rows.append({"what": what, "seconds": round(seconds, 2), "added_mib": round(memory)})
        return n_pairs

    measure("plain decode", lambda session, tokens, text: session.time_decode(tokens, 1, False))
    measure("head_statistics", lambda session, tokens, text: session.head_statistics(tokens))
    n_pairs = measure(
        "the notebook's profile",
        lambda session, tokens, text: session.head_statistics(tokens, patterns=text.patterns),
    )
    some = np.linspace(9, options.tokens - 1, 24).astype(int)
    measure(
        "24 rows for distances",
        lambda session, tokens, text: session.capture(tokens, ("attention",), queries=some),
    )
    if not options.skip_full:

        def full(session, tokens, text):
            attention = session.capture(tokens, ("attention",)).attention.values
            return {"sink": attention[..., 0].mean(-1), "top": attention.max(-1).mean(-1)}

        measure("full capture, sink and top computed from it", full)
        worst = max(
            float(np.abs(found["head_statistics"][name].values - values).max())
            for name, values in found["full capture, sink and top computed from it"].items()
        )
        rows.append({"what": f"largest difference streamed to full: {worst:.1e}"})
    for row in rows[1:4]:
        row["times_plain"] = round(row["seconds"] / rows[0]["seconds"], 2)
    rows.append(
        {"what": f"{options.tokens} tokens, {n_pairs} (query, key) pairs in the profile's patterns"}
    )
    report("heads", rows, options.out)


if __name__ == "__main__":
    main()
