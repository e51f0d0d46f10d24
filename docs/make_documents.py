"""Fills the measured parts of the documents from the stored measurements; nothing in them is typed
in.

    python docs/make_documents.py [--check]

A part lies between `<!-- measured: NAME -->` and `<!-- end -->`. Measurements are
tests/benchmarks/results/*.json and docs/figures/captions.json; what was not measured is shown as
"not measured". --check: write nothing, exit 1 where a document differs from the measurements."""

import json
import re
import sys
from pathlib import Path

from llamatelemetry.files.outputs import written
from llamatelemetry.views.text import markdown

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "tests" / "benchmarks" / "results"
DOCUMENTS = ("README.md", "SUMMARY.md", "notebooks/README.md")
NOT_MEASURED = "not measured"
PART = re.compile(r"(<!-- measured: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _results(pattern):
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(pattern))]


def _row(benchmark, what):
    """The first stored row whose `what` begins so, with its benchmark's hardware; None where there
    is none."""
    for stored in _results(f"{benchmark}.json"):
        for row in stored["rows"]:
            if row["what"].startswith(what):
                return row | {"hardware": stored["hardware"]}
    return None


def _value(benchmark, what, field, form):
    row = _row(benchmark, what)
    return form.format(row[field]) if row and field in row else NOT_MEASURED


def _against_transformers():
    """How much faster than transformers, with its version and what it does with the file."""
    said, row = (
        _value("capture", "times faster", "value", "{:.1f} x"),
        _row("capture", "transformers ("),
    )
    found = row and re.match(r"transformers \(torch, transformers (\S+) (\S+)\)", row["what"])
    if not found:
        return said
    return f"{said} (transformers {found[2]}, torch {found[1]}, which on a CPU dequantizes the file as it loads it)"


def _compare_time():
    rows = [
        row for stored in _results("compare.json") for row in stored["rows"] if "seconds" in row
    ]
    ours = [row["seconds"] for row in rows if row["what"].startswith("compare_quantizations")]
    theirs = [row["seconds"] for row in rows if row["what"].startswith("llama-perplexity")]
    if not ours or not theirs:
        return NOT_MEASURED
    return (
        f"{min(ours) / min(theirs):.2f} x its time ({min(ours):.1f} s against {min(theirs):.1f} s)"
    )


def _compare_difference():
    pairs = [
        (row["ours"], row["theirs"])
        for stored in _results("compare.json")
        for row in stored["rows"]
        if row["what"].startswith("mean KLD")
    ]
    if not pairs:
        return NOT_MEASURED
    return f"at most {max(abs(ours - theirs) for ours, theirs in pairs):.1e} nats apart ({len(pairs)} files)"


def _rounding():
    """Rows of how far CUDA's quantized kernels are from the CPU's, and both from exact arithmetic;
    how far the model in NumPy is from it with CUDA's way of rounding."""
    rows = []
    for kind in ("Q8_0", "Q4_1"):
        found = {
            stage: _row("gpu_rounding", f"{kind}, {stage}") for stage in ("attention", "hidden")
        }
        said = "; ".join(
            f"{stage} {row['gpu_cpu']:.1%} (from exact arithmetic: GPU {row['gpu_exact']:.1%}, "
            f"its way of rounding in NumPy {_value('rounding_cause', row['what'], 'before_exact', '{:.1%}')}, "
            f"CPU {row['cpu_exact']:.1%})"
            for stage, row in found.items()
            if row
        )
        rows.append(
            (
                f"Captures on a GPU against the CPU's, {kind}, root mean square",
                "2%",
                said or NOT_MEASURED,
            )
        )
    return rows


def _attention():
    """Rows of what llama-server's ways of summing change against those of captures."""
    said = {"smollm2-135m-Q4_1": "SmolLM2 Q4_1", "gemma-3-270m-Q4_K_M": "Gemma 3 270M Q4_K_M"}

    def nats(form, *whats):
        found = []
        for file, name in said.items():
            rows = [_row("attention", file + what) for what in whats]
            if all(rows):
                found.append(f"{name}: {form.format(*(row['kld_mean'] for row in rows))}")
        return "; ".join(found) or NOT_MEASURED

    exact = "{:.1e} nats, the same weights as F32 {:.1e}"
    return [
        (
            "Attention fused (llama-server's default) and not (captures), CPU, mean KL divergence",
            "measured",
            nats(exact, ", fused", " as F32, fused"),
        ),
        (
            "A cache of the sliding window's size (llama-server's default) and a full one (captures), "
            "1,536 tokens, CPU, mean KL divergence",
            "measured",
            nats(exact, ", a cache", " as F32, a cache"),
        ),
        (
            "Mean KL divergence of a file from its own weights as F32, CPU, with fused attention and without",
            "measured",
            nats("{:.1e} and {:.1e} nats", " against its F32, both", " against its F32, neither"),
        ),
    ]


def _given_back():
    row = _row("gpu_placement", "of server and worker")
    return f"{row['freed']:,} MiB; together they held {row['held']:,}" if row else NOT_MEASURED


def _rapids():
    """(task, how much faster on the GPU) of every stored task that ran on both."""
    rows = []
    for stored in _results("rapids_gpu_*.json"):
        shape = " x ".join(f"{size:,}" for size in stored["shape"])
        rows += [
            (
                f"{task}, {shape}, GPU (RAPIDS) against CPU",
                "measured",
                f"{row['ratio']:.1f} x ({row['cpu']:.1f} s against {row['gpu']:.1f} s)",
            )
            for task, row in stored["tasks"].items()
            if "ratio" in row
        ]
    if not any("umap" in task.lower() for task, *_ in rows):
        rows.append(("UMAP on a GPU (cuML) against umap-learn", "measured", NOT_MEASURED))
    return rows


def _at_once(count):
    """Time of inference and analytics together on `count` GPUs, over that of one after the
    other."""
    row = _row("two_gpus", f"inference beside analytics, {count} GPU(s)")
    return f"{row['all, together, s'] / row['all, alone, s']:.2f} x" if row else NOT_MEASURED


def _two_gpus():
    """Rows of what a second GPU gives."""

    def row(what):
        return _row("two_gpus", what)

    two, apart = (
        row("inference beside analytics, 2 GPU(s)"),
        row("both GPUs: largest difference of a captured value"),
    )
    before, after = (
        row(f"compare_quantizations, 4 files, 24 windows of 512, {how}")
        for how in ("one GPU", "a worker")
    )
    beside = lost = spread = compared = NOT_MEASURED
    if two:
        beside = (
            f"{_at_once(2)} ({two['all, together, s']:.1f} s against {two['all, alone, s']:.1f} s); "
            f"on one GPU {_at_once(1)}"
        )
        lost = "; ".join(
            f"{name} {two[f'{part}, together, s'] / two[f'{part}, alone, s'] - 1:+.1%}"
            for name, part in (("inference", "infer"), ("analytics", "analyse"))
        )
    if apart:
        stages = {name: value for name, value in apart.items() if isinstance(value, float)}
        spread = f"{max(stages.values()):g} ({', '.join(stages)})"
    if before and after:
        compared = (
            f"{after['s'] / before['s']:.2f} x ({after['s']:.1f} s against {before['s']:.1f} s)"
        )
    return [
        (
            "Inference and analytics at once on two GPUs, against one after the other",
            "measured",
            beside,
        ),
        ("What either takes longer beside the other there", "at most 5%", lost),
        (
            "8B shape spread over two GPUs: largest difference of a captured value from one GPU's",
            "none",
            spread,
        ),
        (
            "`compare_quantizations`, four files, a worker per GPU against one GPU",
            "measured",
            compared,
        ),
    ]


def _collect():
    """Rows of how the states of many texts are collected."""
    text = "Hidden states of {} short texts collected into a store, SmolLM2, CPU"
    stored = [
        row
        for found in _results("collect.json")
        for row in found["rows"]
        if row["what"].startswith("a store")
    ]
    ratios = ", ".join(f"{row['ratio']:.2f} x" for row in stored) or NOT_MEASURED
    counts = ", ".join(f"{row['texts']:,}" for row in stored) or "100, 1,000, 5,000"
    slope = _row("collect", "slope")
    grows = slope and "{:.2f} MiB, in the capture worker {:.2f} MiB".format(
        *(slope[f"{whose}_mib_per_1000_texts"] for whose in ("here", "worker"))
    )
    return [
        (text.format(counts) + ", against the plain decode", "at most 1.25 x", ratios),
        (
            "Memory that 1,000 texts more take there",
            "flat",
            grows or NOT_MEASURED,
        ),
    ]


def targets():
    """The table of what was to be reached and what was measured."""
    rows = [
        (
            "Capture of attention, q, k, v and hidden, 256 tokens, SmolLM2, CPU, against the same decode without",
            "at most 1.25 x",
            _value("capture", "capture / plain", "value", "{:.2f} x"),
        ),
        (
            "Import to first capture, SmolLM2, CPU, against transformers on the same GGUF",
            "at least 10 x faster",
            _against_transformers(),
        ),
        (
            "Peak memory of all our processes in that run, against transformers",
            "under 0.5 x",
            _value("capture", "share of its memory", "value", "{:.2f} x"),
        ),
        (
            "`head_statistics`, 4,096 tokens, 32 x 32 heads (8B shape), GPU, against the plain decode",
            "at most 1.3 x",
            _value("gpu", "head_statistics, 8B shape", "ratio", "{:.2f} x"),
        ),
        (
            "Host memory that it adds to the model there",
            "under 2,048 MiB",
            _value("gpu", "head_statistics, 8B shape", "mb", "{:,.0f} MB"),
        ),
        (
            "The same of SmolLM2 on the CPU, 2,048 tokens",
            "under 2,048 MiB",
            _value("heads", "head_statistics", "added_mib", "{:,} MiB"),
        ),
        (
            "Its time there, against the plain decode",
            "measured",
            _value("heads", "head_statistics", "times_plain", "{:.2f} x"),
        ),
        (
            "Capture to the host on a GPU, 8B shape, 512 tokens, against plain decode + bytes / copy bandwidth",
            "at most 1.3 x",
            _value("gpu", "capture, 8B shape", "ratio", "{:.2f} x"),
        ),
        (
            "64 tokens of the 1B shape through `infer`, GPU, median of 20",
            "under 1,000 ms",
            _value("gpu", "64 tokens through infer", "ours_ms", "{:.0f} ms"),
        ),
        (
            "First token of the 1B shape through `infer_stream`, GPU, median of 20",
            "measured",
            _value("gpu", "first token through infer_stream", "ours_ms", "{:.1f} ms"),
        ),
        (
            "What `infer` adds to llama-server's own time, GPU, median of 20",
            "under 5 ms",
            _value("gpu", "infer beyond llama-server's own time", "ours_ms", "{:.1f} ms"),
        ),
        (
            "KL divergence of `compare_quantizations` against llama-perplexity's, both from the stand-in (below)",
            "its 16-bit rounding",
            _compare_difference(),
        ),
        (
            "Time of `compare_quantizations` against llama-perplexity's, model loading included",
            "no more",
            _compare_time(),
        ),
        *_attention(),
        *_rounding(),
        (
            "GPU memory that server and capture worker give back when they are closed",
            "all",
            _given_back(),
        ),
        *_two_gpus(),
        *_rapids(),
        (
            "All five notebooks, SmolLM2, CPU, no network",
            "under 720 s",
            _value("notebooks", "all", "seconds", "{:,.0f} s"),
        ),
        (
            "Notebook 16 of them, the making of its files included",
            "under 180 s",
            _value("notebooks", "16", "seconds", "{:,.0f} s"),
        ),
        *_collect(),
    ]
    lines = ["| what | to reach | measured |", "|---|---|---|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def _machine(stored):
    """On what something was measured; stored: a row of _row, a stored benchmark, or None."""
    if stored is None:
        return NOT_MEASURED
    facts = stored["hardware"]
    cores = f", {facts['cores']} cores" if "cores" in facts else ""
    gpu = "" if facts.get("gpu", "none") == "none" else f", {facts['gpu']}"
    gpu = re.sub(r", (?=\d+\.\d+)", ", driver ", gpu)
    return f"{facts.get('cpu', '')}{cores}{gpu}, {facts.get('date', '')}"


def speed():
    """What a user waits for, in one paragraph for the README."""
    cpu, gpu = (
        f"{_value(name, 'all', 'seconds', '{:,.0f} s')} ({_machine(_row(name, 'all'))})"
        for name in ("notebooks", "gpu_notebooks")
    )
    statistics = _value("gpu", "head_statistics, 8B shape", "ratio", "{:.2f} x")
    return (
        f"All five run in {cpu} or {gpu} with that model and the parameters as they are. On the CPU a "
        f"capture of attention, q, k, v and hidden states takes "
        f"{_value('capture', 'capture / plain', 'value', '{:.2f} x')} the time of the decode alone. On the GPU the "
        f"statistics of 1,024 heads at 4,096 tokens take {statistics} the decode of a model with the "
        f"shape of Llama 3.1 8B, and 64 tokens of one with that of Llama 3.2 1B come after "
        f"{_value('gpu', '64 tokens through infer', 'ours_ms', '{:.0f} ms')}. Inference and analytics at once take "
        f"{_at_once(2)} the time of one after the other on two GPUs, {_at_once(1)} on one "
        f"({_machine(_row('two_gpus', 'inference beside'))}). [SUMMARY.md](SUMMARY.md) has every figure."
    )


def hardware():
    """One line per stored benchmark: on what it was measured."""
    return "\n".join(
        f"- `{path.name}`: {_machine(json.loads(path.read_text()))}"
        for path in sorted(RESULTS.glob("*.json"))
    )


def notebooks():
    """Time and memory of each notebook."""
    lines = [
        "| notebook | time, CPU | peak memory of all its processes | as one HTML file | time, GPU |",
        "|---|---|---|---|---|",
    ]
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        row = _row("notebooks", path.stem)
        cells = (
            [f"{row['seconds']:,.0f} s", f"{row['peak_mib']:,} MiB", f"{row['html_mb']} MB"]
            if row
            else [NOT_MEASURED] * 3
        )
        cells.append(_value("gpu_notebooks", path.stem, "seconds", "{:,.0f} s"))
        lines.append(f"| {path.stem[:2]} | {' | '.join(cells)} |")
    machines = [
        f"{kind}: {_machine(row)}"
        for kind, name in (("CPU", "notebooks"), ("GPU", "gpu_notebooks"))
        if (row := _row(name, "all"))
    ]
    if machines:
        lines += ["", "; ".join(machines) + "."]
    return "\n".join(lines)


def t4():
    """What the rehearsal on the T4's kernels gave, in one paragraph."""
    stored = next(iter(_results("t4_kernels.json")), None)
    if stored is None:
        return f"The rehearsal on the T4's own kernels: {NOT_MEASURED}."
    parts = [_t4_tests(stored), *_t4_notebooks(stored), _t4_wheel(stored)]
    return " ".join(
        [
            f"On the T4's own kernels ({_machine(stored)}; ggml-cuda built for compute capability 7.5 alone, run "
            "from its PTX):",
            *filter(None, parts),
            "This shows kernels and memory, not a T4's speed.",
        ]
    )


def _t4_rows(stored, part):
    return [row for row in stored["rows"] if row["part"] == part]


def _t4_tests(stored):
    for row in _t4_rows(stored, "tests"):
        total = sum(row.get(kind, 0) for kind in ("passed", "failed", "error"))
        held = (
            f"each GPU's free memory held to {max(row['left_mib']):,} MiB and {row['cores']} cores"
        )
        return f"with {held}, {row.get('passed', 0)} of {total} tests of `tests/test_gpu.py` pass."
    return ""


def _t4_notebooks(stored):
    rows = {}
    for row in _t4_rows(stored, "notebooks"):
        rows.setdefault(row["what"].rpartition(", ")[2], []).append(row)
    for model, runs in rows.items():
        good = [row for row in runs if "failed" not in row]
        what = f"{len(good)} of {len(runs)} notebooks with {model} run to their end"
        if good:
            gpu_mib = max(max(row["gpu_mib"]) for row in good)
            what += (
                f", in {sum(row['seconds'] for row in good):,.0f} s together, with at most "
                f"{max(row['peak_mib'] for row in good):,} MiB of memory and {gpu_mib:,} MiB of a GPU"
            )
        yield what + "."


def _t4_wheel(stored):
    for row in _t4_rows(stored, "wheel"):
        if "failed" not in row:
            return (
                f"`engine build --cuda 75 --portable` takes {row['seconds'] / 60:.0f} minutes on {row['cores']} cores "
                "there, with no driver in CMake's sight."
            )
    return ""


def scale():
    """The notebooks with models of the promised sizes, a row per notebook."""
    stored = next(iter(_results("scale.json")), None)
    if stored is None:
        return "Not measured yet: `tests/benchmarks/bench_scale.py` on a GPU host."
    rows = {row["what"]: row for row in stored["rows"]}
    models = list(dict.fromkeys(what.partition(", ")[2] for what in rows))
    said = {"8b": "8B shape", "1b": "1B shape", "smollm2": "SmolLM2"}
    head = " | ".join(said.get(model, model) for model in models)
    key = "A cell: time, time to the first figure, memory, memory of each GPU, scratch."
    key += " `-`: not measured, because other work ran on that GPU."
    lines = [key, "", f"| notebook | {head} |", "|---" * (len(models) + 1) + "|"]
    for number in sorted({what[:2] for what in rows}):
        cells = [_scale_cell(rows.get(f"{number}, {model}")) for model in models]
        lines.append(f"| {number} | {' | '.join(cells)} |")
    cores = stored["rows"][0]["cores"]
    where = f"{_machine(stored)}; {cores} of its cores, 14,913 MiB left on each GPU."
    shapes = " and ".join(said[model] for model in models if model in ("1b", "8b"))
    made = f" {shapes}: random weights in the shape of Llama 3." if shapes else ""
    return "\n".join([*lines, "", where + made])


def _scale_cell(row):
    if row is None:
        return "not run"
    if "failed" in row:
        return f"stopped after {row['seconds']:,.0f} s"
    first = "-" if row["first_figure_s"] is None else f"{row['first_figure_s']:.0f} s"
    # None: other work ran on that GPU
    gpus = " and ".join("-" if mib is None else f"{mib / 1024:.1f}" for mib in row["gpu_mib"])
    return (
        f"{row['seconds']:,.0f} s, {first}, {row['peak_mib'] / 1024:.1f} GiB, {gpus} GiB, "
        f"{row['scratch_gb']:.1f} GB"
    )


def reliability():
    """What `make soak` counted, a row per part."""
    stored = next(iter(_results("soak.json")), None)
    if stored is None:
        return f"`make soak`: {NOT_MEASURED}."
    lines = ["| what | tried | what came of it | findings |", "|---|---|---|---|"]
    for part, said in SOAK.items():
        rows = [row for row in stored["rows"] if row["part"] == part]
        what, told = said
        cells = [NOT_MEASURED] * 3
        if rows:
            cells = [f"{rows[0]['count']:,}", told(rows[0], rows[1:]), f"{rows[0]['findings']}"]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"{_machine(stored)}."])


def _soak_files(row, _):
    return (
        f"{row.get('typed', 0):,} end in a typed error, {row.get('works', 0):,} work; each within "
        f"{row['limit_s']} s and {row['limit_mib']:,} MiB"
    )


def _soak_phases(row, faults):
    kinds = {"typed": "a typed error", "works": "the right result", "interrupted": "interrupted"}
    kinds |= {"killed": "killed, and all of its own gone", "missed": "over before the fault"}
    sums = {said: sum(fault.get(kind, 0) for fault in faults) for kind, said in kinds.items()}
    came = "; ".join(f"{said}: {count}" for said, count in sums.items() if count)
    names = ", ".join(fault["what"] for fault in faults)
    slow = sum(fault.get("slow", 0) for fault in faults)
    late = f"; beyond the limit at first, within it when played again: {slow}" if slow else ""
    return f"{row['phases']} phases, faults {names}. {came}{late}"


def _soak_requests(row, slots):
    said = []
    for part in slots:
        tie = part.get("tie", 0)
        near = f", {tie} by a tie of rounding (at most {part['largest_tie']} nats)" if tie else ""
        same = f"{part.get('same', 0)} of {part['count']} equal to the answer given alone{near}"
        said.append(f"{part['what']}: {same}")
    return f"{'; '.join(said)}; {row['captures']} captures beside them, each equal bit by bit"


def _soak_cycles(row, _):
    return (
        f"{row['dropped']} of the engines dropped, not closed; memory changes by "
        f"{row['mib_per_cycle']:+.3f} MiB per cycle; {row['descriptors']} descriptors at the end"
    )


# {part of soak.json: (what it is, what its rows say)}
SOAK = {
    "files": ("Damaged files: models, splits, importance matrices, captures", _soak_files),
    "phases": ("Faults in the middle of each phase", _soak_phases),
    "requests": ("Greedy requests from 16 threads, captures beside them", _soak_requests),
    "cycles": ("Loads and closes in one process", _soak_cycles),
    "templates": ("Chat templates written to do harm", _soak_files),
}


def pictures():
    """The pictures with what their cells printed."""
    path = ROOT / "docs" / "figures" / "captions.json"
    captions = json.loads(path.read_text()) if path.is_file() else {}
    parts = []
    for name, fact in captions.items():
        said = f" *{markdown(fact['printed'])}*" if fact["printed"] else ""
        title = markdown(fact["title"])
        heading = f"{title} (notebook {fact['notebook']})."
        parts += [f"![{title}](docs/figures/{name}.png)", heading + said]
    return "\n\n".join(parts)


PARTS = {
    "targets": targets,
    "hardware": hardware,
    "notebooks": notebooks,
    "pictures": pictures,
    "speed": speed,
    "t4": t4,
    "scale": scale,
    "reliability": reliability,
}


def fill(text):
    """A document with its measured parts filled in."""
    return PART.sub(lambda match: f"{match[1]}{PARTS[match[2]]()}\n{match[3]}", text)


def main(check=False):
    stale = []
    for name in DOCUMENTS:
        path = ROOT / name
        text = path.read_text()
        if (filled := fill(text)) != text:
            stale.append(name)
            if not check:
                with written(path) as temporary:
                    temporary.write_text(filled)
    if stale:
        print(f"{'differ from the measurements' if check else 'written'}: {', '.join(stale)}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
