"""`make soak`: the long part of the tests, two parts at a time, each in a process of its own. Each
finding is printed at once with how to repeat it; a part that was whole is stored at once in
tests/benchmarks/results/soak.json, the others stay as they were. Ctrl-C leaves nothing running, and
--resume goes on from there.

    python tests/soak [--parts files phases ...] [--minutes 60] [--seed 0] [--resume]"""

import argparse
import importlib
import json
import signal
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[0] = str(TESTS)
sys.path[1:1] = [str(TESTS / "benchmarks"), str(TESTS.parent)]
# {part: its module}, the order in which they are stored
PARTS = {
    "files": "damaged",
    "phases": "phases",
    "requests": "asked",
    "cycles": "cycles",
    "templates": "spells",
}
# The longest first. No part's counts are times: one that waits for another is not another result.
FIRST = ("phases", "requests", "files", "templates", "cycles")
LANES = 2
DONE = "parts.txt"  # of those stored since a soak began, for one that goes on


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


def alone(part, options):
    """What one part finds, in this process: its rows (None where it was not whole), how many
    findings, the seconds that it took."""
    soak = Soak(part, options, 60 * options.minutes)
    rows = importlib.import_module(f"soak.{PARTS[part]}").run(soak)
    seconds = round(time.monotonic() - soak.started)
    return {"rows": rows, "findings": len(soak.findings), "seconds": seconds}


def keep(part, found, options):
    """Say and store what a part found. Returns how many findings it has, one where it ended before
    it could tell."""
    from common import report

    if found is None:
        print(f"FINDING ({part}): it ended in the middle\n  again: --parts {part}", flush=True)
        return 1
    seconds, findings, rows = found["seconds"], found["findings"], found["rows"]
    if rows is None:
        print(f"{part} was not whole after {seconds} s: not stored (--minutes)", flush=True)
    elif not (options.count or options.phases or options.faults):
        rows[0] |= {"findings": findings, "seconds": seconds, "seed": options.seed}
        report("soak", merged(stored(options.results), part, rows), options.results)
        with open(options.kept / DONE, "a") as file:
            file.write(part + "\n")
    print(f"{part}: {findings} findings in {seconds} s", flush=True)
    return findings


def beside(parts, options, arguments, run):
    """How many findings some parts have, LANES of them beside one another. run(part, arguments): an
    Apart."""
    waiting, running, findings = [part for part in FIRST if part in parts], [], 0
    started = time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < LANES:
                left = options.minutes - (time.monotonic() - started) / 60
                running.append(run(waiting.pop(0), [*arguments, "--minutes", f"{left:.3f}"]))
            for one in [one for one in running if one.over()]:
                found = one.found()
                running.remove(one)
                one.close()
                findings += keep(one.part, found, options)
            time.sleep(0.2)
    finally:
        for one in running:
            one.close()
    return findings


def main(arguments=None, run=None):
    from common import RESULTS

    from soak.apart import Apart, ends_with_the_soak

    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=60, help="for all parts together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--count", type=int, help="fewer, in the part's own measure; stores nothing"
    )
    parser.add_argument("--phases", nargs="+", help="only these; stores nothing")
    parser.add_argument("--faults", nargs="+", help="only these; stores nothing")
    parser.add_argument("--kept", type=Path, default=Path("outputs/soak"), help="of damaged files")
    parser.add_argument("--resume", action="store_true", help="go on where a soak was cut")
    parser.add_argument("--results", type=Path, default=RESULTS / "soak.json")
    parser.add_argument("--said", type=Path, help=argparse.SUPPRESS)  # in a part's own process
    options = parser.parse_args(arguments)
    if options.said:
        watching, half = ends_with_the_soak(), options.said.with_suffix(".half")
        half.write_text(json.dumps(alone(*options.parts, options)))
        half.rename(options.said)
        return watching.join()  # until it is heard: then it is ended
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options.kept.mkdir(parents=True, exist_ok=True)
    if not options.resume:
        (options.kept / DONE).unlink(missing_ok=True)
    (done := options.kept / DONE).touch()
    there = done.read_text().split()
    parts = [part for part in options.parts if part not in there]
    try:
        return int(beside(parts, options, arguments, run or Apart) > 0)
    except KeyboardInterrupt:
        print("stopped: --resume goes on from here", flush=True)
        return 130


if __name__ == "__main__":
    sys.exit(main())
