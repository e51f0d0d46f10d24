"""`make soak`: the long part of the tests. Each finding is printed at once with how to repeat it; a
part that was whole is stored in tests/benchmarks/results/soak.json, the others stay as they were.

    python tests/soak [--parts files phases ...] [--minutes 60] [--seed 0] [--resume]"""

import argparse
import importlib
import json
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[0] = str(TESTS)
sys.path[1:1] = [str(TESTS / "benchmarks"), str(TESTS.parent)]
# {part: (its module, its share of the time)}
PARTS = {
    "files": ("damaged", 0.25),
    "phases": ("phases", 0.45),
    "requests": ("asked", 0.1),
    "cycles": ("cycles", 0.1),
    "templates": ("spells", 0.1),
}


class Soak:
    """One part's run: its options, its time, what it found."""

    def __init__(self, part, options, seconds):
        self.part, self.findings = part, []
        self.seed, self.count, self.kept = options.seed, options.count, options.kept
        self.phases, self.faults = options.phases, options.faults
        self.resume, self.journal = options.resume, self.kept / f"{part}.jsonl"
        self.started, self._until = time.monotonic(), time.monotonic() + seconds

    def over(self):
        """Whether the part's time is over."""
        return time.monotonic() > self._until

    def find(self, said, again):
        self.findings.append(said)
        print(f"FINDING ({self.part}): {said}\n  again: {again}", flush=True)

    def progress(self, done, of, said=""):
        spent = time.monotonic() - self.started
        print(
            f"{self.part} {done}/{of}, {spent:.0f} s: {str(said):.150}".replace("\n", " "),
            flush=True,
        )


def stored(path):
    """The rows of a former run on a machine like this one."""
    from common import same_machine

    if not path.is_file():
        return []
    former = json.loads(path.read_text())
    return former["rows"] if same_machine(former["hardware"]) else []


def merged(rows, part, new):
    """Rows with those of one part replaced, in the order of the parts."""
    kept = [row for row in rows if row["part"] != part] + [{"part": part, **row} for row in new]
    return sorted(kept, key=lambda row: list(PARTS).index(row["part"]))


def main(arguments=None):
    from common import RESULTS, report

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=60, help="for all parts of a whole soak")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--count", type=int, help="fewer, in the part's own measure; stores nothing"
    )
    parser.add_argument("--phases", nargs="+", help="only these; stores nothing")
    parser.add_argument("--faults", nargs="+", help="only these; stores nothing")
    parser.add_argument("--kept", type=Path, default=Path("outputs/soak"), help="of damaged files")
    parser.add_argument("--resume", action="store_true", help="go on where a soak was cut")
    parser.add_argument("--results", type=Path, default=RESULTS / "soak.json")
    options = parser.parse_args(arguments)
    found = 0
    for part in options.parts:
        name, share = PARTS[part]
        if options.resume and any(row["part"] == part for row in stored(options.results)):
            continue
        soak = Soak(part, options, 60 * options.minutes * share)
        rows = importlib.import_module(f"soak.{name}").run(soak)
        found += len(soak.findings)
        seconds = round(time.monotonic() - soak.started)
        if rows is None:
            print(f"{part} was not whole after {seconds} s: not stored (--minutes)", flush=True)
        elif not (options.count or options.phases or options.faults):
            rows[0] |= {"findings": len(soak.findings), "seconds": seconds, "seed": options.seed}
            report("soak", merged(stored(options.results), part, rows), options.results)
        print(f"{part}: {len(soak.findings)} findings in {seconds} s", flush=True)
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
