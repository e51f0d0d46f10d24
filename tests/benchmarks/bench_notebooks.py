"""Every notebook from top to bottom with its own parameters: time, and the peak memory of all its
processes together.

    python tests/benchmarks/bench_notebooks.py [12 13 ...] [--backend gpu] [--out FOLDER] [--results
    FILE]

One after the other, as `make run` does; the executed notebooks are kept in --out. With --backend
gpu the analytics must run on RAPIDS, and the GPU memory that the notebook takes is watched as well.
"""

import argparse
import os
import shutil
import time
from pathlib import Path

from common import gpu_used, memory_of, report
from watch import Sampler

FOLDER = Path(__file__).parents[2] / "notebooks"


class Peak(Sampler):
    """The largest sum of the resident memory of this process's descendants (mib), and the most that
    was in use on all GPUs beyond what was when it began (gpu_mib), both in MiB."""

    def __enter__(self):
        self.mib, self.gpu_mib = 0.0, 0
        self._own, self._before = memory_of(os.getpid()), sum(gpu_used())
        return super().__enter__()

    def sample(self):
        self.gpu_mib = max(self.gpu_mib, sum(gpu_used()) - self._before)
        self.mib = max(self.mib, memory_of(os.getpid()) - self._own)


def main():
    from llamatelemetry.tools.notebooks import find, run_notebook

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*")
    parser.add_argument("--backend", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument("--out", type=Path, default=Path("executed"))
    parser.add_argument(
        "--results", type=Path, help="file for the figures instead of the one in results/"
    )
    options = parser.parse_args()
    name = ("gpu_" if options.backend == "gpu" else "") + (
        "notebooks" if not options.names else "notebooks-partial"
    )
    rows, paths = [], find(FOLDER, options.names)
    for path in paths:
        # As a first run: notebook 16 takes files that an earlier one made.
        shutil.rmtree(options.out / "outputs" / path.stem[:2], ignore_errors=True)
        with Peak() as peak:
            started = time.perf_counter()
            executed = run_notebook(path, options.out, {"BACKEND": options.backend}, progress=False)
            seconds = time.perf_counter() - started
        rows.append(
            {
                "what": path.stem,
                "seconds": round(seconds, 1),
                "peak_mib": round(peak.mib),
                "html_mb": round(executed.with_suffix(".html").stat().st_size / 1e6, 1),
            }
            | ({"gpu_mib": round(peak.gpu_mib)} if options.backend == "gpu" else {})
        )
        whole = {
            "what": "all" if path == paths[-1] else "so far",
            "seconds": round(sum(row["seconds"] for row in rows), 1),
            "peak_mib": max(row["peak_mib"] for row in rows),
        }
        report(
            name, [*rows, whole], options.results
        )  # after each: a run that is cut off keeps what it has


if __name__ == "__main__":
    main()
