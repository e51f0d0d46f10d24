"""What every benchmark prints beside its figures, and where it stores them."""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from importlib import metadata
from pathlib import Path

import psutil

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "llama-cpp-python",
    "numpy",
    "pandas",
    "scikit-learn",
    "umap-learn",
    "igraph",
    "transformers",
    "torch",
    "cupy-cuda13x",
    "cupy-cuda12x",
    "cuml-cu13",
    "cuml-cu12",
    "cudf-cu13",
    "cudf-cu12",
    "cugraph-cu13",
    "cugraph-cu12",
)


def hardware():
    """Processor, memory, GPU and versions of this run."""
    facts = {
        "date": date.today().isoformat(),
        "cpu": _cpu(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            pass
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        names = (
            subprocess.run(query, capture_output=True, text=True, check=True)
            .stdout.strip()
            .splitlines()
        )
        facts["gpu"] = "; ".join(
            f"{n} x {name}" if (n := names.count(name)) > 1 else name
            for name in dict.fromkeys(names)
        )
    except (OSError, subprocess.CalledProcessError):
        facts["gpu"] = "none"
    return facts


def _cpu():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def same_machine(facts):
    """Whether stored facts of `hardware` are of a processor and GPU like those here: such figures
    may stand together."""
    here = hardware()
    return all(facts.get(part) == here[part] for part in ("cpu", "cores", "gpu"))


def gpu_used():
    """MiB in use on each GPU, by everybody; [] without GPUs."""
    from llamatelemetry.gpus.devices import list_gpus

    return [round(gpu.used_bytes / 2**20) for gpu in list_gpus()]


def report(name, rows, out=None):
    """Print rows (list of dicts) as a table under the hardware, and store both as JSON."""
    import pandas as pd

    from llamatelemetry.results import save

    facts = hardware()
    print("\n".join(f"{key}: {value}" for key, value in facts.items()), file=sys.stderr)
    if (
        len({key for row in rows for key in row}) > 12
    ):  # rows that say different things are no table
        for row in rows:
            print(
                "; ".join(
                    f"{key}: {value}" if key != "what" else value for key, value in row.items()
                )
            )
    else:
        print(pd.DataFrame(rows).to_string(index=False))
    path = Path(out) if out else RESULTS / f"{name}.json"
    stored = {"benchmark": name, "hardware": facts, "rows": rows}
    save(path, json.dumps(stored, indent=1) + "\n")
    print(f"stored in {path}", file=sys.stderr)


def memory_of(pid):
    """Resident memory in MiB of a process and its children, now (shared pages counted once, by PSS,
    where possible)."""
    total = 0
    root = psutil.Process(pid)
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except (psutil.AccessDenied, psutil.NoSuchProcess, AttributeError):
            pass
    return total / 2**20


def perplexity(model, text, base, n_ctx, windows, *options):
    """What llama-perplexity prints; `base` gets the logits, or with --kl-divergence has them."""
    from llamatelemetry.files.programs import tool

    sizes = ["-c", str(n_ctx), "-b", str(max(512, n_ctx)), "--chunks", str(windows)]
    files = ["-m", model, "-f", text, "--kl-divergence-base", base]
    command = [tool("llama-perplexity"), *files, *sizes, *options]
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
    ).stdout


def rounding(name, description, errors, types):
    """The command of the two benchmarks of rounding: errors(F32 file, type, folder) -> rows."""
    from llamatelemetry import resolve_model
    from llamatelemetry.convert.expand import expand

    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", nargs="+", default=types)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "F32.gguf"
        expand(resolve_model("smollm2-135m-Q4_1"), source, progress=False)
        rows = [row for kind in options.types for row in errors(source, kind, Path(folder))]
    report(name, rows, options.results)
