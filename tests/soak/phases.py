"""Every fault in every phase."""

import json
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

from .scene import FAULTS, GONE, LIMIT, TIMES, WORKS, applies, can_mount, play

TRIES = 5  # to strike in time, each in a third of the time of the one before
WORKERS = 2
SLOW = 10  # times the limit, on a machine that may be busy


def pairs(phases=tuple(WORKS), faults=FAULTS):
    """(phase, fault) of all that there are here."""
    there = [fault for fault in faults if fault != "full" or can_mount()]
    return [(phase, fault) for phase in phases for fault in there if applies(phase, fault)]


def undisturbed(phase, model):
    """The Verdict of a phase without a fault: its digest is right, its seconds are usual."""
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        return play(phase, None, model, folder, times=SLOW)


def struck(phase, fault, model, seed, plain):
    """The Verdict of a scene in which the fault came in time, if it can be brought to that; one
    that is late is played again with SLOW times the limit."""
    verdict, slow, usual = None, False, plain.seconds
    for number in range(TRIES):
        with tempfile.TemporaryDirectory(prefix="soak-") as folder:
            verdict = play(
                phase,
                fault,
                model,
                folder,
                seed=f"{seed} {phase} {fault} {number}",
                usual=usual,
                right=plain.digest,
                times=SLOW if slow else 1,
            )
        late = {kind for kind, _ in verdict.findings} == {"hang"}
        if late and not slow:
            slow = True
        elif verdict.findings or verdict.struck:
            break
        else:
            usual /= 3
    return verdict, slow and not verdict.findings


def remembered(path, seed):
    """{(phase, fault): what came of it} of a former run that was cut off, but findings, and the
    seconds that it took. path: its journal, a JSON line per pair."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    rows = [row for row in rows if row["seed"] == seed]
    there = {(row["phase"], row["fault"]): row for row in rows}
    there = {pair: row for pair, row in there.items() if not row["findings"]}
    return there, max((row["at"] for row in rows), default=0)


def run(soak):
    """The rows of this part: one per fault. Two pairs are played at a time: much of a scene is
    waiting."""
    todo, journal = pairs(soak.phases or tuple(WORKS), soak.faults or FAULTS), soak.journal
    done, spent = remembered(journal, soak.seed) if soak.resume else ({}, 0)
    soak.started -= spent
    journal.parent.mkdir(parents=True, exist_ok=True)
    if not soak.resume:
        journal.unlink(missing_ok=True)
    plain, locks, turn = {}, {phase: Lock() for phase, _ in todo}, Lock()

    def one(pair):
        if pair in done or soak.over():
            return
        with locks[pair[0]]:
            if pair[0] not in plain:
                plain[pair[0]] = _plain(soak, pair[0])
        row = _struck(soak, *pair, plain[pair[0]])
        with turn:
            done[pair] = row
            row["at"] = time.monotonic() - soak.started
            with open(journal, "a") as file:
                file.write(json.dumps(row) + "\n")
            phase, fault, came = pair[0], pair[1], row["came"]
            soak.progress(len(done), len(todo), f"{fault} in {phase}: {came} {row['said']}")

    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(one, todo))
    if len(done) < len(todo):
        return None
    return [_total(todo), *_by_fault(done)]


def _plain(soak, phase):
    from llamatelemetry import resolve_model

    verdict = undisturbed(phase, resolve_model())
    for kind, said in verdict.findings:
        soak.find(f"{phase}, no fault: {kind}: {said}", f"--parts phases --phases {phase!r}")
    return verdict


def _struck(soak, phase, fault, plain):
    """What came of a pair, as a line of the journal has it."""
    from llamatelemetry import resolve_model

    verdict, slow = struck(phase, fault, resolve_model(), soak.seed, plain)
    if not (verdict.findings or verdict.struck):
        verdict.find("missed", f"it never struck in {TRIES} tries: nothing was tried")
    again = f"--parts phases --phases {phase!r} --faults {fault} --seed {soak.seed}"
    for kind, said in verdict.findings:
        soak.find(f"{fault} in {phase}: {kind}: {said}", again)
    came, said = verdict.kind if verdict.struck else "missed", verdict.said[:150]
    row = {"phase": phase, "fault": fault, "seed": soak.seed, "came": came, "said": said}
    return row | {"slow": int(slow), "findings": len(verdict.findings)}


def _total(todo):
    limits = {"limit_s": LIMIT, "times": TIMES, "gone_s": GONE}
    return {"what": "all", "count": len(todo), "phases": len({pair[0] for pair in todo}), **limits}


def _by_fault(done):
    rows = []
    for fault in FAULTS:
        there = [row for row in done.values() if row["fault"] == fault]
        counts = Counter(row["came"] for row in there)
        counts["slow"] = sum(row["slow"] for row in there)
        counts["findings"] = sum(bool(row["findings"]) for row in there)
        if there:
            told = {kind: count for kind, count in counts.items() if count}
            rows.append({"what": fault, "count": len(there), **told})
    return rows
