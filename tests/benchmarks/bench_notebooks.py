"""Every notebook from top to bottom with its own parameters: time, and the peak memory of all its processes together.

    python tests/benchmarks/bench_notebooks.py [12 13 ...] [--out FOLDER]

One after the other, as `make run` does; the executed notebooks are kept in --out.
"""

import argparse
import os
import threading
import time
from pathlib import Path

from common import memory_of, report

FOLDER = Path(__file__).parents[2] / "notebooks"


class Peak:
    """The largest sum of the resident memory of this process's descendants, in MiB, sampled every quarter second."""

    def __enter__(self):
        self.mib, self._stop = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self):
        own = memory_of(os.getpid())
        while not self._stop.wait(0.25):
            try:
                self.mib = max(self.mib, memory_of(os.getpid()) - own)
            except Exception:  # a process ended between being listed and being asked
                pass

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()


def main():
    from llamatelemetry.notebooks import find, run_notebook

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--out", type=Path, default=Path("executed"))
    options = parser.parse_args()
    rows = []
    for path in find(FOLDER, options.names):
        with Peak() as peak:
            started = time.perf_counter()
            executed = run_notebook(path, options.out, progress=False)
            seconds = time.perf_counter() - started
        rows.append({"what": path.stem, "seconds": round(seconds, 1), "peak_mib": round(peak.mib),
                     "html_mb": round(executed.with_suffix(".html").stat().st_size / 1e6, 1)})
    rows.append({"what": "all", "seconds": round(sum(row["seconds"] for row in rows), 1),
                 "peak_mib": max(row["peak_mib"] for row in rows)})
    report("notebooks" if not options.names else "notebooks-partial", rows)


if __name__ == "__main__":
    main()
