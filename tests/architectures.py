"""Every architecture that llama.cpp's own generator of tiny random models makes: what capture
finds, what holds.

`make architectures` builds the generator (`tests/test-llama-archs.cpp` of the pinned llama.cpp)
against the engine's libraries, makes the models and writes the coverage table for the guide. Each
model is checked in a process of its own."""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
CACHE = (
    Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    / "llamatelemetry"
    / "architectures"
)
N_TOKENS = 9
TOLERANCE = 1e-4
STAGES_SHOWN = (
    "attention",
    "q",
    "k",
    "v",
    "attn_heads",
    "attn_out",
    "ffn_out",
    "hidden",
    "final_norm",
    "logits",
    "router",
)


def build_generator(folder):
    """Compile the generator of the pinned llama.cpp against the installed engine's libraries;
    returns its path."""
    import llama_cpp

    folder.mkdir(parents=True, exist_ok=True)
    program = folder / f"test-llama-archs-{llama_cpp.__version__}"
    if program.exists():
        return program
    with tempfile.TemporaryDirectory() as work:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--no-binary",
            "llama-cpp-python",
            "-d",
            work,
        ]
        subprocess.run([*pip, f"llama-cpp-python=={llama_cpp.__version__}"], check=True)
        with tarfile.open(next(Path(work).glob("*.tar.gz"))) as archive:
            archive.extractall(work, filter="data")
        source = next(Path(work).glob("*/vendor/llama.cpp"))
        libraries = Path(llama_cpp.__file__).parent / "lib"
        includes = [
            f"-I{source / name}" for name in ("include", "ggml/include", "src", "common", "vendor")
        ]
        linked = [
            f"-l{name}" for name in ("llama", "llama-common", "ggml", "ggml-base", "ggml-cpu")
        ]
        command = [
            "g++",
            "-O1",
            "-std=c++17",
            *includes,
            str(source / "tests" / "test-llama-archs.cpp"),
            f"-L{libraries}",
            *linked,
            f"-Wl,-rpath,{libraries}",
            "-o",
            f"{program}.new",
        ]
        subprocess.run(command, check=True)
    os.replace(f"{program}.new", program)
    return program


def make_models(program, folder, seed=0):
    """The generator's models; returns their paths."""
    if models := sorted(folder.glob("*.gguf")):
        return models
    folder.mkdir(parents=True, exist_ok=True)
    log = subprocess.run(
        [str(program), "-s", str(seed), "-o", f"{folder}/"], capture_output=True, text=True
    )
    models = sorted(folder.glob("*.gguf"))
    if not models:
        raise SystemExit(f"the generator made no models:\n{log.stdout[-2000:]}{log.stderr[-2000:]}")
    return models


def check(path):
    """Capture everything of one model and compare it with what its own graph implies."""
    from llamatelemetry.capture.names import STAGES
    from llamatelemetry.capture.runs import Runs
    from llamatelemetry.capture.runtime import Runtime
    from llamatelemetry.files.gguf import GGUFFile

    facts = GGUFFile(path)
    runtime = Runtime(str(path), threads=1, cache_type="f32")
    runs = Runs(runtime, facts.architecture)
    tokens = np.random.default_rng(1).integers(0, runtime.n_vocab, N_TOKENS).tolist()
    plain = _plain_logits(runtime, tokens)
    plan = runs.plan(tokens)
    stages = [stage for stage in STAGES if plan.taps.get(stage)]
    memory = {}

    def arena(n_bytes):
        memory["bytes"] = np.zeros(n_bytes, np.uint8)
        return memory["bytes"]

    _, layout, layers = runs.capture(tokens, stages, arena, {})
    arrays = {
        stage: np.ndarray(part["shape"], part["dtype"], memory["bytes"], part["offset"])
        for stage, part in layout.items()
    }
    have = {stage: part["layers"] for stage, part in layout.items()}
    result = {
        "model": Path(path).stem,
        "architecture": facts.architecture,
        "n_layer": runtime.n_layer,
        "kinds": [layer["kind"] for layer in layers],
        "missing": {stage: plan.missing(stage) for stage in STAGES_SHOWN},
        "predicts": vars(runtime.predicts),
        "why_not": plan.why_not,
        "sum": [bool(layer.get("sum")) for layer in layers],
        "invariants": {},
    }
    holds = result["invariants"]
    if plain is not None and "logits" in arrays:
        holds["logits identical"] = (
            0.0
            if np.array_equal(plain, arrays["logits"])
            else float(np.abs(plain - arrays["logits"]).max())
        )
    holds["residual sums"] = _residual(arrays, have, layers)
    holds["softmax rows"] = _rows(arrays, have, layers)
    holds["scores = q.k"] = _scores(arrays, have)
    holds["heads = attention.v"] = _heads(arrays, have)
    even = [
        a for s, a in arrays.items() if s != "mask" and not layout[s]["uneven"]
    ]  # uneven layers are padded
    holds["finite"] = 0.0 if all(np.isfinite(a).all() for a in even) else 1.0
    holds["statistics"] = _statistics(runs, tokens, arrays, have)
    result["edits"] = _edits_work(runs, tokens, have)
    holds["output weights"] = _output(arrays, facts, plan.output)
    return result


def _plain_logits(runtime, tokens):
    runtime.open(len(tokens))
    runtime.decode(tokens)
    return runtime.logits(len(tokens)).copy() if runtime.predicts.logits else None


def _relative(difference, like):
    return float(np.abs(difference).max() / max(1e-6, np.abs(like).max()))


def _residual(arrays, have, layers):
    """max |hidden[l+1] - hidden[l] - attn_out[l] - ffn_out[l]| over max |hidden|, where the graph
    has that sum."""
    worst = None
    for layer, facts in enumerate(layers):
        added = [
            arrays[s][have[s].index(layer)]
            for s in ("attn_out", "ffn_out")
            if layer in have.get(s, ())
        ]
        if (
            not added
            or not facts.get("sum")
            or layer not in have["hidden"]
            or layer + 1 not in have["hidden"]
        ):
            continue
        before, after = (
            arrays["hidden"][have["hidden"].index(number)] for number in (layer, layer + 1)
        )
        worst = max(worst or 0.0, _relative(after - before - sum(added), after))
    return worst


def _rows(arrays, have, layers):
    """Rows of attention sum to 1 (to at most 1 with an attention sink) and are 0 where the mask
    forbids."""
    if "attention" not in arrays:
        return None
    worst = 0.0
    for place, layer in enumerate(have["attention"]):
        p = arrays["attention"][place]
        error = p.sum(-1) - 1
        worst = max(
            worst,
            float((np.maximum(error, 0) if layers[layer].get("sinks") else np.abs(error)).max()),
        )
        if layer in have.get("mask", ()):
            mask = arrays["mask"][have["mask"].index(layer)]
            worst = max(worst, float(np.abs(p[:, np.isneginf(mask)]).max(initial=0)))
    return worst


def _grouped(arrays, have, stage, layer, heads):
    values = arrays[stage][have[stage].index(layer)]
    return np.repeat(values, heads // len(values), 0) if heads % len(values) == 0 else None


def _scores(arrays, have):
    worst = None
    for place, layer in enumerate(have.get("scores", ())):
        if layer in have.get("q", ()) and layer in have.get("k", ()):
            q = arrays["q"][have["q"].index(layer)]
            k = _grouped(arrays, have, "k", layer, len(q))
            if k is not None and k.shape[-1] == q.shape[-1]:
                ours = np.einsum("hqf,hkf->hqk", q, k)
                allowed = arrays["attention"][have["attention"].index(layer)] > 0
                theirs = arrays["scores"][place]
                worst = max(worst or 0.0, _relative((ours - theirs)[allowed], theirs[allowed]))
    return worst


def _heads(arrays, have):
    worst = None
    for place, layer in enumerate(have.get("attn_heads", ())):
        if layer in have.get("v", ()):
            p, theirs = (
                arrays["attention"][have["attention"].index(layer)],
                arrays["attn_heads"][place],
            )
            v = _grouped(arrays, have, "v", layer, len(p))
            if v is not None and v.shape[-1] == theirs.shape[-1]:
                worst = max(worst or 0.0, _relative(p @ v - theirs, theirs))
    return worst


def _statistics(runs, tokens, arrays, have):
    """Streamed head statistics against the captured attention: sink mass and row sums."""
    if "attention" not in have:
        return None
    from llamatelemetry.capture.measures import HeadStatistics

    reducer = HeadStatistics(tokens, {})

    def setup(recorder, plan):
        for layer in have["attention"]:
            for tap in runs.taps(plan, "attention", layer):
                recorder.on(tap, reducer.action(layer))

    runs.run(tokens, setup, all_logits=False)
    table, _ = reducer.table()
    p = arrays["attention"]
    return max(
        _relative(table["sink"] - p[..., 0].mean(-1), p),
        _relative(table["mass"] - p.sum(-1).mean(-1), p),
    )


def _edits_work(runs, tokens, have):
    """{stage: whether zeroing it in its first layer changes the predictions}."""
    from llamatelemetry.capture.edits import ablate_head, scale

    if "logits" not in have:
        return {}
    memory = {}

    def arena(n_bytes):
        memory["bytes"] = np.zeros(n_bytes, np.uint8)
        return memory["bytes"]

    def logits(*edits):
        _, layout, _ = runs.capture(tokens, ["logits"], arena, {}, edits=edits)
        return np.ndarray(layout["logits"]["shape"], np.float32, memory["bytes"])

    base = logits()
    edits = {
        "attn_heads": lambda layer: ablate_head(layer, 0),
        "attn_out": lambda layer: scale("attn_out", layer, 0),
        "ffn_out": lambda layer: scale("ffn_out", layer, 0),
        "hidden": lambda layer: scale("hidden", layer, 0.5),
    }
    return {
        stage: bool((logits(edit(have[stage][-1 if stage != "hidden" else 0])) != base).any())
        for stage, edit in edits.items()
        if have.get(stage)
    }


def _output(arrays, facts, output):
    """final_norm times the output matrix equals the logits, up to the file's own scale and
    soft-cap."""
    if "final_norm" not in arrays or "logits" not in arrays:
        return None
    ours = arrays["final_norm"] @ facts.tensor(facts.output_name).T
    if output["bias"]:
        ours += facts.tensor("output.bias")
    theirs = arrays["logits"]
    cap = output["softcap"]
    if cap:
        theirs = cap * np.arctanh(np.clip(theirs / cap, -0.999999, 0.999999))
    if ours.shape != theirs.shape:
        return None
    scale = float(
        (ours * theirs).sum() / max(1e-12, (ours * ours).sum())
    )  # a logit scale is one number
    return _relative(ours * scale - theirs, theirs)


def check_apart(path):
    """`check` in a process of its own: a crash of llama.cpp is a row of the table, not the end of
    the run."""
    run = subprocess.run(
        [sys.executable, __file__, "--one", str(path)],
        capture_output=True,
        text=True,
        timeout=300,
        env=None,
    )
    last = run.stdout.strip().splitlines()[-1:] or [""]
    if run.returncode == 0 and last[0].startswith("{"):
        return json.loads(last[0])
    return {
        "model": Path(path).stem,
        "error": (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1],
    }


HELD = (
    "logits identical",
    "residual sums",
    "softmax rows",
    "scores = q.k",
    "heads = attention.v",
    "statistics",
    "output weights",
)


def holds(result):
    """Whether a model was captured and every invariant that its graph has holds."""
    if "error" in result or not all(result["edits"].values()):
        return False
    return max(worst or 0 for worst in result["invariants"].values()) <= TOLERANCE


def row_of(result):
    """One line of the coverage table."""
    name = result["model"].rsplit("-", 1)[0] + (
        " (MoE)" if result["model"].endswith("-moe") else ""
    )
    if "error" in result:
        return f"| {name} | not captured: {result['error']} |" + " |" * (len(HELD) + 1)
    kinds = ", ".join(
        f"{result['kinds'].count(kind)} {kind}" for kind in dict.fromkeys(result["kinds"])
    )
    cells = [name, kinds]
    for held in HELD:
        worst = result["invariants"].get(held)
        cells.append("-" if worst is None else "yes" if worst == 0 else f"{worst:.0e}")
    return "| " + " | ".join([*cells, note(result)]) + " |"


def note(result):
    """Why a stage or an invariant is not there, from what the graph implies."""
    notes = [
        f"{stage}: {reason}" for stage, reason in result["why_not"].items() if stage == "attn_out"
    ]
    if not notes and not all(result["sum"]):
        notes.append(
            "the stream is normalized, scaled, or begins anew between blocks: no plain sum"
        )
    kinds = set(result["kinds"])
    if result["invariants"].get("heads = attention.v") is None and "attention" in kinds:
        notes.append("latent attention: values are decompressed after they are weighted")
    if kinds & {"recurrent", "attention+recurrent"}:
        notes.append("recurrent layers have no attention weights")
    return "; ".join(notes)


def markdown(rows, seed):
    """The coverage table for the guide."""
    held = sum("error" not in row for row in rows)
    lines = [
        "# Architectures",
        "",
        f"Made by `make architectures` (seed {seed}) from the tiny random models of llama.cpp's own generator: "
        f"{held} of {len(rows)} captured. A number is the largest error, relative to the largest value; "
        "`yes` means the same bits; `-` means that the graph has no such thing. Random weights show "
        "that the arrays are the right ones, not what they mean; `tests/test_references.py` "
        "compares sixteen families with transformers.",
        "",
        "| architecture | layers | " + " | ".join(HELD) + " | note |",
        "|---" * (len(HELD) + 3) + "|",
    ]
    return "\n".join([*lines, *map(row_of, rows)]) + "\n"


def main():
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one")
    parser.add_argument(
        "--work", type=Path, default=CACHE, help="where the generator and its models are kept"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path, default=ROOT / "notebooks" / "ARCHITECTURES.md")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(check(options.one)))
        return
    models = make_models(
        build_generator(options.work), options.work / f"models-{options.seed}", options.seed
    )
    models = [path for path in models if options.only in path.stem]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = list(tqdm(pool.map(check_apart, models), total=len(models)))
    options.out.write_text(markdown(rows, options.seed))
    bad = [row["model"] for row in rows if not holds(row)]
    print(
        f"{len(rows) - len(bad)} of {len(rows)} captured with every invariant within {TOLERANCE:.0e}; see {options.out}"
    )
    sys.exit(f"not so: {', '.join(bad)}" if bad else 0)


if __name__ == "__main__":
    main()
