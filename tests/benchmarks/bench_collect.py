"""States of many texts against the plain decode of the same texts in the same batches, and memory
over the number of texts.

    python tests/benchmarks/bench_collect.py [--model NAME] [--texts 100 1000 5000] [--repeat 3]

Plain decodes and collections alternate, so that a change of the machine's speed meets both. The
plain decode is asked for the logits of every token, or of the last one of each text: states of
every token need the former's graph, but end before the logits. Memory: the largest of the worker,
and of this process, beyond what each had when one block of texts was done (USS: what only it has);
its slope over the number of texts is what "flat" means. Each count in processes of its own."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
from common import report

SUBJECTS = "farmer teacher sailor doctor king child horse bird dog cat lawyer writer".split()
VERBS = "sees follows helps carries watches finds leaves meets paints calls".split()
PLACES = "river house bridge garden market tower school forest station harbour".split()
WAYS = (
    (("hidden",), "last"),
    (("hidden",), "mean"),
    (("hidden",), None),
    (("hidden", "attn_out", "ffn_out"), "mean"),
)


def texts_of(count, seed=0):
    """Short sentences of 8 to 20 tokens or so, as a generator: none is kept."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        one, verb, other, place = (
            rng.choice(words) for words in (SUBJECTS, VERBS, SUBJECTS, PLACES)
        )
        more = " and then goes home because it is late" if number % 3 == 0 else ""
        yield f"The {one} {verb} the {other} near the {place}{more}."


def against_decode(model, count, repeat, **load):
    """A row per way to collect: seconds, and their ratio to the plain decodes beside them."""
    from llamatelemetry import resolve_model
    from llamatelemetry.collecting.session import CollectSession

    texts, found = list(texts_of(count)), []
    with CollectSession(resolve_model(model), **load) as session:
        n_tokens = sum(map(len, session.collect(texts, ["hidden"])[0]))
        for stages, pool in WAYS:
            plain, last, ours = [], [], []
            for _ in range(repeat):
                plain.append(session.time_batches(texts, True))
                last.append(session.time_batches(texts, False))
                started = time.perf_counter()
                session.collect(texts, stages, pool=pool)
                ours.append(time.perf_counter() - started)
            row = {"what": f"{', '.join(stages)}; pool {pool}", "texts": count, "tokens": n_tokens}
            middle = [statistics.median(some) for some in (plain, last, ours)]
            ratios = [
                statistics.median(a / b for a, b in zip(ours, some)) for some in (plain, last)
            ]
            names = ("decode_s", "decode_last_logits_s", "collect_s", "ratio", "ratio_last_logits")
            found.append(row | dict(zip(names, [round(value, 3) for value in (*middle, *ratios)])))
    return found


def stored(model, count, pool):
    """One whole collection into a store, seconds beside the plain decode's, and memory."""
    from llamatelemetry import InferenceEngine

    with InferenceEngine() as engine, tempfile.TemporaryDirectory() as folder:
        engine.load_model(model, auto_start=False, silent=True)
        engine.collect(texts_of(600), pool=pool, where=Path(folder) / "warm", progress=False)
        worker = psutil.Process(engine._session.pid)
        watched = {"here": psutil.Process(), "worker": worker}
        before = {name: process.memory_full_info().uss for name, process in watched.items()}
        peak, done = dict(before), threading.Event()

        def watch():
            while not done.wait(0.05):
                for name, process in watched.items():
                    peak[name] = max(peak[name], process.memory_full_info().uss)

        thread = threading.Thread(target=watch)
        thread.start()
        started = time.perf_counter()
        found = engine.collect(texts_of(count), pool=pool, where=Path(folder) / "s", progress=False)
        seconds = time.perf_counter() - started
        done.set()
        thread.join()
        n_bytes = sum(path.stat().st_size for path in (Path(folder) / "s").iterdir())
        plain = sum(
            engine._session.time_batches(list(texts_of(count))[start : start + 512])
            for start in range(0, count, 512)
        )
        row = {"what": f"a store of hidden, pool {pool}", "texts": count}
        row |= {"tokens": int(found.n_tokens.sum()), "collect_s": round(seconds, 2)}
        row |= {"decode_s": round(plain, 2), "ratio": round(seconds / plain, 3)}
        row |= {f"{name}_mib": round((peak[name] - before[name]) / 2**20, 1) for name in watched}
        return row | {"store_mb": round(n_bytes / 1e6, 1)}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-Q4_1")
    parser.add_argument("--texts", type=int, nargs="+", default=[100, 1000, 5000])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--pool", default="last", choices=["last", "mean", "max", "none"])
    parser.add_argument("--out")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    pool = None if options.pool == "none" else options.pool
    if options.one:
        print(json.dumps(stored(options.model, options.one, pool)))
        return
    rows = against_decode(options.model, min(options.texts), options.repeat)
    for count in options.texts:
        command = [sys.executable, __file__, "--model", options.model, "--pool", options.pool]
        done = subprocess.run(
            [*command, "--one", str(count)], capture_output=True, text=True, env=os.environ
        )
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
    if len(options.texts) > 1:
        slopes = {
            f"{name}_mib_per_1000_texts": round(
                1000
                * float(
                    np.polyfit(options.texts, [row[f"{name}_mib"] for row in rows[len(WAYS) :]], 1)[
                        0
                    ]
                ),
                2,
            )
            for name in ("here", "worker")
        }
        rows.append({"what": "slope of memory"} | slopes)
    report("collect", rows, options.out)


if __name__ == "__main__":
    main()
