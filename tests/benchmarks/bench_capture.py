"""Capture against the plain decode, and from import to first capture against transformers, in one
run.

    python tests/benchmarks/bench_capture.py [--model NAME] [--tokens 256] [--torch-python PYTHON]

Plain and captured decodes alternate, so that a change of the machine's speed meets both.
transformers runs in a process of its own: in this Python where torch is installed, in
--torch-python, or not at all (said so)."""

import argparse
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec

from common import report

STAGES = ("attention", "q", "k", "v", "hidden")
TEXT = "The cat sat on the mat because it was tired of chasing the small grey mouse around the old house. "

FIRST = """
import time; started = time.perf_counter()
from llamatelemetry import InferenceEngine
engine = InferenceEngine()
engine.load_model({model!r}, auto_start=False, silent=True)
cap = engine.capture({text!r}, stages=("attention", "hidden"))
float(cap.attention[0, 0, 0, 0])
print(time.perf_counter() - started)
engine.close()
"""
TRANSFORMERS = """
import time; started = time.perf_counter()
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, name = {folder!r}, {file!r}
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, attn_implementation="eager")
with torch.no_grad():
    out = model(**tokenizer({text!r}, return_tensors="pt"), output_attentions=True, output_hidden_states=True)
float(out.attentions[0][0, 0, 0, 0])
print(time.perf_counter() - started)
"""


def watched(python, code):
    """(seconds that the code printed, peak MiB of all its processes)."""
    from common import memory_of

    process = subprocess.Popen(
        [python, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    peak = 0.0
    while process.poll() is None:
        try:
            peak = max(peak, memory_of(process.pid))
        except Exception:
            pass
        time.sleep(0.05)
    out, err = process.communicate()
    if process.returncode:
        raise SystemExit(err[-2000:])
    return float(out.strip().splitlines()[-1]), peak


def capture_against_decode(model, n_tokens, repeat):
    from llamatelemetry import resolve_model
    from llamatelemetry.capture.session import CaptureSession

    with CaptureSession(resolve_model(model)) as session:
        tokens = (session.tokenize(TEXT) * (n_tokens // 8))[:n_tokens]
        session.capture(tokens, STAGES)
        session.time_decode(tokens, 1)
        plain, captured = [], []
        for _ in range(repeat):
            plain += session.time_decode(tokens, 1)
            started = time.perf_counter()
            session.capture(tokens, STAGES)
            captured.append(time.perf_counter() - started)
    return statistics.median(plain), statistics.median(captured), min(plain), min(captured)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-Q4_1")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--torch-python")
    options = parser.parse_args()
    plain, captured, best_plain, best_captured = capture_against_decode(
        options.model, options.tokens, options.repeat
    )
    rows = [
        {
            "what": f"plain decode, {options.tokens} tokens, median (best), s",
            "value": round(plain, 3),
            "best": round(best_plain, 3),
        },
        {
            "what": "capture of " + ", ".join(STAGES) + ", s",
            "value": round(captured, 3),
            "best": round(best_captured, 3),
        },
        {
            "what": "capture / plain",
            "value": round(captured / plain, 3),
            "best": round(best_captured / best_plain, 3),
        },
    ]
    seconds, memory = zip(
        *[watched(sys.executable, FIRST.format(model=options.model, text=TEXT)) for _ in range(3)]
    )
    ours, our_memory = statistics.median(seconds), max(memory)
    rows.append(
        {
            "what": "import to first capture, s (median of 3)",
            "value": round(ours, 2),
            "best": round(min(seconds), 2),
        }
    )
    rows.append({"what": "peak memory of all our processes, MiB", "value": round(our_memory)})
    python = options.torch_python or (
        sys.executable if find_spec("torch") and find_spec("transformers") else None
    )
    if python is None:
        print(
            "transformers not compared: no torch here; name a Python that has it with --torch-python",
            file=sys.stderr,
        )
    else:
        from llamatelemetry import resolve_model

        path = resolve_model(options.model)
        code = TRANSFORMERS.format(folder=str(path.parent), file=path.name, text=TEXT)
        theirs, their_memory = watched(python, code)
        versions = subprocess.run(
            [python, "-c", "import torch,transformers as t;print(torch.__version__,t.__version__)"],
            capture_output=True,
            text=True,
        ).stdout.strip()
        rows += [
            {
                "what": f"transformers (torch, transformers {versions}), s",
                "value": round(theirs, 2),
            },
            {"what": "transformers, peak MiB", "value": round(their_memory)},
            {"what": "times faster", "value": round(theirs / ours, 1)},
            {"what": "share of its memory", "value": round(our_memory / their_memory, 2)},
        ]
    report("capture", rows)


if __name__ == "__main__":
    main()
