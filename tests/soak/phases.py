"""Every fault in every phase."""

import tempfile
from collections import Counter

from .scene import FAULTS, GONE, LIMIT, TIMES, WORKS, applies, can_mount, play

TRIES = 5  # to strike in time, each in a third of the time of the one before
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


def run(soak):
    """The rows of this part: one per fault."""
    from llamatelemetry import resolve_model

    counts = {fault: Counter() for fault in FAULTS}
    todo, plain = pairs(soak.phases or tuple(WORKS), soak.faults or FAULTS), {}
    for number, (phase, fault) in enumerate(todo):
        if soak.over():
            return None
        if phase not in plain:
            plain[phase] = undisturbed(phase, resolve_model())
            for kind, said in plain[phase].findings:
                soak.find(
                    f"{phase}, no fault: {kind}: {said}", f"--parts phases --phases {phase!r}"
                )
        again = f"--parts phases --phases {phase!r} --faults {fault} --seed {soak.seed}"
        verdict, slow = struck(phase, fault, resolve_model(), soak.seed, plain[phase])
        if not (verdict.findings or verdict.struck):
            verdict.find("missed", f"it never struck in {TRIES} tries: nothing was tried")
        for kind, said in verdict.findings:
            soak.find(f"{fault} in {phase}: {kind}: {said}", again)
        counts[fault]["slow"] += slow
        counts[fault]["findings"] += bool(verdict.findings)
        came = verdict.kind if verdict.struck else "missed"
        counts[fault][came] += 1
        soak.progress(number + 1, len(todo), f"{fault} in {phase}: {came} {verdict.said}")
    rows = []
    for fault, found in counts.items():
        if found:
            tried = sum(there == fault for _, there in todo)
            rows.append({"what": fault, "count": tried, **{k: n for k, n in found.items() if n}})
    limits = {"limit_s": LIMIT, "times": TIMES, "gone_s": GONE}
    total = {"what": "all", "count": len(todo), "phases": len(plain), **limits}
    return [total, *rows]
