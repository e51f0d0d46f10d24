"""The five notebooks with models of the sizes that are promised, on what Kaggle gives: two T4s'
memory, four cores.

    python tests/benchmarks/bench_scale.py --vocab VOCAB.gguf [--models smollm2 1b 8b] [--names
    12,13] [--missing]

1b and 8b are shapes with random weights (make_shapes.py), made in --work where they are not there
yet. Every GPU is left what a T4 has (rehearse_t4.py), every process gets --cores. A row per
notebook and model: seconds, seconds until the first figure stands, memory of all processes, of each
GPU, what was kept and the most that lay in scratch, the page, the cells that took longest. Without
a GPU the memory alone is bounded. Stored after every notebook in results/scale.json; --missing goes
on with those that are not there yet of this commit, where a call may take only so long."""

import argparse
import contextlib
import json
import os
import re
import sys
import time
from datetime import datetime
from pathlib import Path

from bench_notebooks import FOLDER
from common import RESULTS
from rehearse_t4 import (
    OURS,
    T4_MIB,
    PeakOfEach,
    cores_of,
    failed,
    like_a_t4,
    pinned,
    run,
    store,
)

SHAPES = ("1b", "8b")
SLOW_S = 5  # a cell that takes longer is named


class Scale(PeakOfEach):
    """PeakOfEach, and the most bytes in a scratch folder."""

    def __init__(self, scratch):
        self.scratch, self.scratch_bytes = scratch, 0

    def sample(self):
        super().sample()
        self.scratch_bytes = max(self.scratch_bytes, size_of(self.scratch))


def size_of(folder):
    """Bytes on the disk of the files below a folder, those that vanish meanwhile left out."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(root, name)).st_blocks * 512
    return total


def cells(executed):
    """(seconds until the first figure stands or None, {first line: seconds} of slow cells, where
    the analytics ran or None) of an executed notebook."""
    code = [
        cell for cell in json.loads(executed.read_text())["cells"] if cell["cell_type"] == "code"
    ]
    code = [(cell, cell["metadata"].get("papermill", {})) for cell in code]
    started = next((_when(ran["start_time"]) for _, ran in code if ran.get("start_time")), None)
    first = next(
        (_when(ran["end_time"]) for cell, ran in code if ran.get("end_time") and _draws(cell)), None
    )
    slow = {
        next(filter(None, map(str.strip, cell["source"])))[:60]: round(ran["duration"])
        for cell, ran in code
        if (ran.get("duration") or 0) > SLOW_S
    }
    said = "".join("".join(each.get("text", "")) for cell, _ in code for each in cell["outputs"])
    where = re.search(r"^analytics on [^:]*", said, re.MULTILINE)
    seconds = round((first - started).total_seconds(), 1) if first and started else None
    return seconds, slow, where and where[0]


def _when(text):
    return datetime.fromisoformat(text)


def _draws(cell):
    pages = ("".join(output.get("data", {}).get("text/html", "")) for output in cell["outputs"])
    return any("plotly-graph-div" in page or "<iframe srcdoc" in page for page in pages)


def model_file(name, options):
    """The GGUF file of a model of --models; a shape is made where it is not there."""
    from llamatelemetry import resolve_model

    if name not in SHAPES:
        return resolve_model("smollm2-135m-Q4_1" if name == "smollm2" else name)
    path = options.work / f"llama-{name}-Q4_K.gguf"
    if not path.is_file():
        if options.vocab is None:
            raise SystemExit(
                f"--vocab: {path} is made with the tokenizer of a GGUF file, which one?"
            )
        script = Path(__file__).with_name("make_shapes.py")
        status, seconds, tail = run(
            [sys.executable, script, name, options.vocab, path],
            options.work / "shapes.log",
            options,
        )
        if status:
            raise RuntimeError(f"the shape {name} could not be made: {tail[-500:]}")
        print(f"{path.name}: made in {seconds:.0f} s", flush=True)
    return path


def called(path, model):
    """What a row says that it is of."""
    return f"{path.stem[:2]}, {Path(model).stem}"


def done(results):
    """What is stored and ran to its end."""
    stored = json.loads(results.read_text())["rows"] if results.is_file() else []
    return {row["what"] for row in stored if "failed" not in row}


def one(path, model, options):
    """Run a notebook with a model; its row."""
    from llamatelemetry.gpus.devices import list_gpus

    what = called(path, model)
    out, scratch = options.work / "out" / what.replace(", ", "-"), options.work / "scratch"
    for folder in (out, scratch):
        folder.mkdir(parents=True, exist_ok=True)
    gpus, given = bool(list_gpus()), {"MODEL": str(model_file(model, options))}
    given |= {"BACKEND": "cpu"} if not gpus else {}
    given |= dict(pair.split("=", 1) for pair in options.parameter)
    parameters = [part for pair in given.items() for part in ("-p", *pair)]
    command = [*OURS, "notebooks", path.stem, "--folder", FOLDER, "--out", out, *parameters]
    kept = size_of(out)
    with like_a_t4(options) if gpus else pinned(options), Scale(scratch) as peak:
        status, seconds, tail = run(
            command, options.work / f"{what}.log", options, {"TMPDIR": str(scratch)}, cwd=out
        )
    executed, page = out / f"{path.stem}.ipynb", out / f"{path.stem}.html"
    first, slow, where = cells(executed) if executed.is_file() else (None, {}, None)
    row = {
        "what": what,
        "seconds": round(seconds, 1),
        "first_figure_s": first,
        "peak_mib": round(peak.mib),
        "gpu_mib": peak.each,
        "kept_gb": round((size_of(out) - kept) / 1e9, 2),
        "scratch_gb": round(peak.scratch_bytes / 1e9, 2),
        "left_gb": round(size_of(scratch) / 1e9, 2),
        "html_mb": round(page.stat().st_size / 1e6, 1) if page.is_file() else None,
        "cores": len(options.cores),
        "slow": slow,
        "analytics": where,
    }
    return failed(status, tail, row)


def main():
    from llamatelemetry.tools.notebooks import find

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["smollm2", *SHAPES], help="or a GGUF file")
    parser.add_argument("--names", default="", help="only these notebooks: 12,13")
    parser.add_argument("--missing", action="store_true", help="only what is not stored yet")
    parser.add_argument("--vocab", type=Path, help="a GGUF file whose tokenizer the shapes get")
    parser.add_argument(
        "-p", "--parameter", action="append", default=[], help="NAME=VALUE, for all"
    )
    parser.add_argument("--cores", default="0-3", type=cores_of)
    parser.add_argument("--keep", type=int, default=T4_MIB, help="MiB left on each GPU")
    parser.add_argument(
        "--until", type=float, default=60, help="minutes; then nothing runs any more"
    )
    parser.add_argument("--work", type=Path, default=Path("/tmp/scale"))
    parser.add_argument("--results", type=Path, default=RESULTS / "scale.json")
    options = parser.parse_args()
    options.deadline = time.monotonic() + 60 * options.until
    options.work = options.work.resolve()
    options.cores &= os.sched_getaffinity(0)
    broken, names = False, [name for name in options.names.split(",") if name]
    there = done(options.results) if options.missing else set()
    for model in options.models:
        for path in find(FOLDER, names):
            if called(path, model) in there:
                continue
            if time.monotonic() > options.deadline:
                print(f"{path.stem[:2]}, {model}: not run: --until is over", flush=True)
                continue
            row = one(path, model, options)
            store("scale", row, options.results, benchmark="scale")
            broken |= "failed" in row
    raise SystemExit(broken)


if __name__ == "__main__":
    main()
