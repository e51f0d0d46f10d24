"""The quick part of `make soak`, and that each of its detectors finds what was planted for it."""

import json
import os
import secrets
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil
import pytest
from damage import Watched
from models import tiny_model
from processes import alive, gone
from soak import __main__ as soak
from soak import asked, cycles, phases, spells
from soak.scene import Verdict, can_mount, play

TESTS = os.path.dirname(__file__)


# What opens damaged files


@pytest.mark.slow
@pytest.mark.parametrize(
    "planted, kind, said",
    [
        ("while True: pass", "hang", "no answer in 3 s"),
        ("time.sleep(60)", "hang", "no answer in 3 s"),
        ("held = b'x' * (300 << 20); time.sleep(60)", "memory", "MiB in python"),
        ("b'x' * (300 << 20)", "memory", "MiB in python"),  # for a moment only
        (
            "subprocess.run([sys.executable, '-c', 'a = b\"x\" * (300 << 20); input()'])",
            "memory",
            "MiB in python",
        ),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "crash", "status -11"),
        ("os._exit(0)", "crash", "status 0"),
        ("raise KeyError('planted')", "untyped", "KeyError: 'planted'"),
        ("raise LlamaTelemetryError('ValueError: of the worker')", "untyped", "of the worker"),
        ("raise LlamaTelemetryError('said')", "typed", "said"),
        ("pass", "works", ""),
    ],
)
def test_what_a_reader_does_is_seen(tmp_path, planted, kind, said):
    script = tmp_path / "reader.py"
    script.write_text(
        f"import os, signal, subprocess, sys, time\nsys.path.insert(0, {TESTS!r})\nimport damage\n"
        "from llamatelemetry import LlamaTelemetryError\n"
        f"def visit(what, path):\n    {planted}\n    return True\n"
        "damage.visit = visit\ndamage.serve()\n"
    )
    watched = Watched(script, seconds=3, limit=250 << 20)
    try:
        found = watched.open("model", tmp_path / "x.gguf")
        assert found[0] == kind and said in found[1]
        # The next file is opened, by a new process where need be
        assert watched.open("model", tmp_path / "x.gguf")[0] == kind
    finally:
        watched.close()


# A scene

PLANTED = {
    "nothing": ("return 'right'", "", None, None),
    "an untyped error": ("raise KeyError('planted')", "", "untyped", "KeyError: 'planted'"),
    "a hang": ("time.sleep(99)", "", "hang", "nothing within"),
    "a wrong answer": ("return 'left'", "", "wrong", "left is not right"),
    "a death": ("os.kill(os.getpid(), signal.SIGSEGV)", "", "crash", "-11"),
    "a process": ("return 'right'", "subprocess.Popen(['sleep', '98'])", "process", "sleep 98"),
    "a daemon": (
        "return 'right'",
        "subprocess.Popen(['sleep', '97'], start_new_session=True)",
        "process",
        "sleep 97",
    ),
    "a file": ("return 'right'", "(tmp / 'left').write_text('x')", "file", "left"),
    "half an output": ("return 'right'", "(scene.folder / 'F16.gguf').touch()", "half", "F16"),
    "half a block": (
        "return 'right'",
        "(block := scene.folder / 's' / 'block-000000.arrow').parent.mkdir(); block.touch()",
        "half",
        "s",
    ),
    "a hidden half": ("return 'right'", "(scene.folder / '.a.partial').touch()", "file", "partial"),
    "a folder": (
        "return 'right'",
        "(tmp / f'llamatelemetry-scratch-{scratch.maker()}-x').mkdir()",
        "file",
        "llamatelemetry-scratch",
    ),
}


def actor(folder, call, leaves, again=""):
    """A script that is an actor whose call does this."""
    script = folder / "actor.py"
    body = textwrap.indent(f"{leaves}\n{call}", "    ")
    script.write_text(
        "import os, pathlib, signal, subprocess, sys, tempfile, time\n"
        f"sys.path.insert(0, {TESTS!r})\nfrom soak import actor\n"
        "from llamatelemetry.files import scratch\n"
        "tmp, calls = pathlib.Path(tempfile.gettempdir()), []\n"
        f"def call(scene):\n    calls.append(1)\n    {again or 'pass'}\n{body}\n"
        "actor.PHASES['expand'] = (None, call)\nactor.main(*sys.argv[1:4])\n"
    )
    return script


# Nobody hears what a killed process answers, and the next start removes its folders
KILLED = ["nothing", "a process", "a daemon", "a file", "half an output", "a hidden half"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault, planted",
    [(None, planted) for planted in PLANTED] + [("parent", planted) for planted in KILLED],
)
def test_what_a_scene_leaves_is_seen(tmp_path, monkeypatch, planted, fault):
    monkeypatch.setattr("soak.scene.LIMIT", 4)
    monkeypatch.setattr("soak.scene.GONE", 1)
    call, leaves, kind, said = PLANTED[planted]
    if fault:
        call = "time.sleep(99)"
    (tmp_path / "model").write_bytes(b"x")
    (folder := tmp_path / "scene").mkdir()
    script, usual = actor(tmp_path, call, leaves), 2 if fault else 0.1
    given = dict(usual=usual, right="right", actor=script)
    verdict = play("expand", fault, tmp_path / "model", folder, **given)
    kinds = {found for found, _ in verdict.findings}
    assert kinds == ({kind} if kind else set()), verdict
    assert not kind or said in verdict.findings[0][1]


@pytest.mark.slow
def test_a_folder_of_a_killed_process_goes_at_the_next_start(tmp_path):
    (tmp_path / "model").write_bytes(b"x")
    (folder := tmp_path / "scene").mkdir()
    script = actor(tmp_path, "time.sleep(99)", PLANTED["a folder"][1])
    verdict = play("expand", "parent", tmp_path / "model", folder, usual=2, actor=script)
    assert verdict.struck and not verdict.findings


@pytest.mark.slow
@pytest.mark.parametrize(
    "again, said",
    [
        ("if len(calls) == 2: raise KeyError('second')", "at the next call: KeyError"),
        ("if len(calls) == 2: return 'left'", "at the next call: left is not right"),
        ("if len(calls) == 2: os._exit(3)", "at the next call"),
    ],
)
def test_the_next_call_is_heard(tmp_path, again, said):
    (tmp_path / "model").write_bytes(b"x")
    (folder := tmp_path / "scene").mkdir()
    script = actor(tmp_path, "return 'right'", "", again)
    verdict = play(
        "expand", "removed", tmp_path / "model", folder, usual=0.1, right="right", actor=script
    )
    assert len(verdict.findings) == 1 and said in verdict.findings[0][1]


def test_every_fault_is_in_every_phase_that_it_can_strike():
    found = phases.pairs()
    assert len(set(found)) == len(found) > 90 and len({phase for phase, _ in found}) == 14
    assert ("expand", "kill") not in found and ("infer", "guard") in found


def test_a_fault_that_never_struck_is_told(monkeypatch, tmp_path):
    found = []
    given = dict(seed=0, phases=["infer"], faults=["kill"], over=lambda: False)
    given |= dict(resume=False, journal=tmp_path / "phases.jsonl", started=0)
    told = SimpleNamespace(find=lambda *said: found.append(said), progress=print, **given)
    monkeypatch.setattr(phases, "undisturbed", lambda *_: Verdict("infer", "none", digest="x"))
    monkeypatch.setattr(phases, "play", lambda *_, **__: Verdict("infer", "kill", kind="works"))
    total, row = phases.run(told)
    assert row == {"what": "kill", "count": 1, "missed": 1, "findings": 1} and total["count"] == 1
    assert len(found) == 1 and "kill in infer: missed" in found[0][0]


def test_a_soak_that_was_cut_goes_on(monkeypatch, tmp_path):
    """With what is not there yet, and what was a finding."""
    played, cut = [], []

    def play(phase, fault, *_, **__):
        played.append(fault)
        verdict = Verdict(phase, fault, struck=True, kind="typed")
        if fault == "stop" and not cut:
            verdict.find("hang", "planted")
        return verdict

    monkeypatch.setattr(phases, "WORKERS", 1)
    monkeypatch.setattr(phases, "TRIES", 1)
    monkeypatch.setattr(phases, "undisturbed", lambda *_: Verdict("infer", "none", digest="x"))
    monkeypatch.setattr(phases, "play", play)
    given = dict(seed=0, phases=["infer"], faults=["kill", "stop", "removed"], started=0)
    given |= dict(find=print, progress=print, journal=tmp_path / "phases.jsonl")
    over = lambda: len(played) > 1  # noqa: E731
    assert phases.run(SimpleNamespace(**given, resume=False, over=over)) is None
    cut.append(True)
    total, *rows = phases.run(SimpleNamespace(**given, resume=True, over=lambda: False))
    assert played == ["kill", "stop", "stop", "removed"] and total["count"] == 3
    assert [row["typed"] for row in rows] == [1, 1, 1] and not any("findings" in r for r in rows)


# Requests


def table(*tokens):
    """Of an answer's tokens: [(piece, logprob), ...] each, the first was chosen."""
    rows = [
        {"position": at, "piece": piece, "logprob": logprob, "chosen": not rank}
        for at, alternatives in enumerate(tokens)
        for rank, (piece, logprob) in enumerate(alternatives)
    ]
    return pd.DataFrame(rows)


SAID = table([("a", -0.1), ("b", -3.0)], [(" c", -1.0), (" d", -1.1)], [("e", -0.1)])
ALONE = [
    ("infer", "a ce", SAID),
    ("infer", "bcd", None),
    ("embed", np.array([1.0, 0.0]), None),
    ("embed", np.array([0.0, 1.0]), None),
    ("tokenize", [1, 2], None),
]


@pytest.mark.parametrize(
    "number, answer, exact, kind",
    [
        (0, "a ce", True, "same"),
        (0, "a dx", False, "tie"),  # 0.1 nats less probable
        (0, "a dx", True, "wrong"),
        (0, "bx", False, "wrong"),  # 2.9 nats
        (0, "a x", False, "wrong"),  # not among what was probable
        (0, "a", False, "wrong"),  # cut short
        (0, "bcd", False, "crossed"),
        (0, TimeoutError("late"), False, "lost"),
        (2, np.array([1.0, 0.0]), True, "same"),
        (2, np.array([0.999, 0.01]), False, "tie"),
        (2, np.array([0.999, 0.01]), True, "wrong"),
        (2, np.array([0.1, 0.9]), False, "crossed"),
        (2, np.array([0.5, 0.4]), False, "wrong"),
        (4, [1, 2], False, "same"),
        (4, [1, 3], False, "wrong"),
    ],
)
def test_an_answer_is_judged(number, answer, exact, kind):
    assert asked.judge(number, answer, ALONE, exact)[0] == kind


def test_no_request_is_lost_without_being_told():
    def ask(number):
        if number == 3:
            raise ValueError("planted")
        if number == 5:
            asked.time.sleep(30)
        return number

    answers = asked.together(ask, range(20), threads=4, seconds=1)
    assert len(answers) == 20 and all(answers[at] == at for at in (0, 1, 2, 4, 19))
    assert isinstance(answers[3], ValueError) and isinstance(answers[5], TimeoutError)


def test_requests_end_when_their_time_is_over():
    over, told = [], []

    def ask(number):
        asked.time.sleep(0.01)
        if number == 10:
            over.append(1)
        return number

    answers = asked.together(ask, range(50), threads=2, stop=lambda: over, tell=told.append)
    assert 10 in answers and len(answers) < 15 and all(answers[at] == at for at in answers)


def test_progress_of_requests_is_told(monkeypatch):
    monkeypatch.setattr(asked, "TOLD", 0.1)
    told = []
    asked.together(lambda n: asked.time.sleep(0.1), range(8), threads=1, tell=told.append)
    assert len(told) > 2 and told == sorted(told) and told[-1] <= 8


def test_a_capture_that_is_another_is_told():
    numbers = iter(range(10**9))

    def capture(text):
        return [np.array([max(3, next(numbers))])]

    with asked.Beside(capture, ["x"]) as beside:
        while beside.done < 6:
            pass
    assert beside.wrong


@pytest.mark.slow
@pytest.mark.parametrize("slots", asked.SLOTS)
def test_requests_of_many_threads(smollm2, llama_server, slots):
    counts, findings, facts = asked.measure(smollm2, slots, 40, 20, seed=1, threads=8)
    assert not findings and sum(counts.values()) == 40 and facts["captures"]


# Cycles


@pytest.mark.parametrize(
    "planted, said",
    [
        ("kept.append(os.open('/dev/null', 0))", "descriptors"),
        ("kept.append(subprocess.Popen(['sleep', '60']))", "processes are left"),
        ("threading.Thread(target=time.sleep, args=(5,)).start()", "threads"),
        ("kept.append(b'x' * (1 << 20))", "memory grows by 1"),
        ("(scratch.scratch() / str(number)).touch()", "scratch"),
        ("pass", ""),
    ],
)
def test_what_a_cycle_leaves_is_seen(tmp_path, planted, said):
    code = (
        "import os, subprocess, sys, threading, time\n"
        "from soak import cycles\nfrom llamatelemetry.files import scratch\nkept = []\n"
        f"def one(model, number):\n    {planted}\n"
        "ledger = cycles.measure(None, 12, one)\nprint(ledger.findings(settled=4))\n"
        "for each in kept:\n    hasattr(each, 'kill') and each.kill()\nos._exit(0)\n"
    )
    env = os.environ | {"TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    env["PYTHONPATH"] = os.pathsep.join([TESTS, os.path.dirname(TESTS)])
    done = said_by(code, env)
    assert said in done and (said or done.strip() == "[]")


def said_by(code, env):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert not done.returncode, done.stderr
    return done.stdout


@pytest.mark.slow
def test_loading_and_closing_leaves_nothing(tmp_path, llama_server):
    ledger = cycles.measure(tiny_model("llama", tmp_path), 12)
    assert not ledger.findings(settled=5, slope=1.0)


# Faults and templates


@pytest.mark.slow
@pytest.mark.parametrize(
    "phase, faults",
    [
        ("load", ["kill"]),
        ("stream", ["overwritten", "interrupt"]),
        ("capture running", ["stop", "full"]),
        ("collect", ["full"]),
        ("quantize", ["overwritten", "fork"]),
    ],
)
def test_a_fault_in_a_phase(smollm2, llama_server, phase, faults):
    there = [fault for _, fault in phases.pairs([phase], faults)]
    plain = phases.undisturbed(phase, smollm2)
    assert not plain.findings and plain.digest
    for fault in there:
        verdict, _ = phases.struck(phase, fault, smollm2, 7, plain)
        assert verdict.struck and not verdict.findings


@pytest.mark.slow
@pytest.mark.parametrize("name", ["text put away", "loop, later", "doubled text, later"])
def test_a_template_that_harms_later_is_bounded(tmp_path, llama_server, name):
    base, path = tiny_model("llama", tmp_path), tmp_path / "spell.gguf"
    spells.write(base, spells.SPELLS[name], path)
    watched = Watched(seconds=spells.SECONDS)
    try:
        kind, said = watched.open("template", path)
    finally:
        watched.close()
    assert kind == "typed" and "takes more than" in said


# The command


class Ended:
    """In the place of an Apart."""

    asked, open = [], 0

    def __init__(self, part, arguments):
        self.part, self.times = part, 2
        Ended.asked.append((part, arguments))
        Ended.open += 1

    def over(self):
        assert Ended.open <= soak.LANES
        self.times -= 1
        return not self.times

    def found(self):
        whole = {"rows": [{"what": "all", "count": 3}], "findings": 0, "seconds": 1}
        cut, planted = {"rows": None}, {"findings": 1}
        return {"requests": whole | cut, "cycles": whole | planted, "phases": None}.get(
            self.part, whole
        )

    def close(self):
        Ended.open -= 1


def test_a_part_that_was_whole_is_stored_beside_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Ended, "asked", [])
    results = tmp_path / "soak.json"

    def run(*given):
        kept = ["--kept", str(tmp_path / "kept")]
        return soak.main(["--results", str(results), *kept, *given], Ended)

    assert run("--parts", "files") == 0  # of a former soak
    assert run("--parts", "requests", "templates") == 0
    assert run("--parts", "cycles", "--resume") == 1
    assert run("--parts", "files", "--count", "1", "--resume") == 0  # stores nothing
    rows = json.loads(results.read_text())["rows"]
    found = {row["part"]: row["findings"] for row in rows}
    assert found == {"files": 0, "cycles": 1, "templates": 0}
    Ended.asked.clear()
    assert run("--minutes", "30", "--resume") == 1  # phases
    assert [part for part, _ in Ended.asked] == ["phases", "requests", "files"]
    minutes = [float(given[-1]) for _, given in Ended.asked]
    assert all(29 < each <= 30 for each in minutes) and not Ended.open
    said = capsys.readouterr().out
    assert "requests was not whole" in said and "FINDING (phases): it ended in the middle" in said


LIVES = """
import os, subprocess, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from soak import apart
def run(given):
    (Path(os.environ["TMPDIR"]) / "half").touch()
    Path("/dev/shm/half-{token}").touch()
    subprocess.Popen(["sleep", "{token}"], start_new_session=True)
    print("there", flush=True)
    {then}
from soak import cycles
cycles.run = run
from soak.__main__ import main
sys.exit(main(["--parts", "cycles", *sys.argv[1:]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["itself", "interrupt", "term", "kill", "its part is killed"])
def test_nothing_is_left_of_a_soak_however_it_ends(tmp_path, end):
    token = f"{secrets.randbelow(10**8)}.5"
    script = tmp_path / "soak.py"
    then = "return None" if end == "itself" else "time.sleep(60)"
    script.write_text(LIVES.format(tests=TESTS, token=token, then=then))
    # The part's process runs the same script, in the place of the folder tests/soak
    start = f"import sys\nsys.path.insert(0, {TESTS!r})\nfrom soak import apart\n"
    start += f"apart.HERE = {str(script)!r}\nsys.argv[0] = {str(script)!r}\n"
    (first := tmp_path / "first.py").write_text(start + f"exec(open({str(script)!r}).read())")
    env = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": os.path.dirname(TESTS)}
    env["PYTHONUNBUFFERED"] = "1"
    results = ["--results", str(tmp_path / "soak.json"), "--kept", str(tmp_path / "kept")]
    process = subprocess.Popen(
        [sys.executable, str(first), *results], env=env, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "there\n"
        if end == "its part is killed":
            (part,) = (each for each in alike("--said") if str(script) in each.cmdline())
            part.kill()
        elif end != "itself":
            ends = {"interrupt": signal.SIGINT, "term": signal.SIGTERM, "kill": signal.SIGKILL}
            process.send_signal(ends[end])
        said, _ = process.communicate(timeout=60)
        code = {"itself": 0, "interrupt": 130, "term": 143, "kill": -9}.get(end, 1)
        assert process.returncode == code, said
    finally:
        process.kill()
    deadline = time.monotonic() + 10
    while (alike(token) or list(tmp_path.glob("soak-*"))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alike(token) and not list(tmp_path.glob("soak-*"))
    assert not can_mount() or not Path(f"/dev/shm/half-{token}").exists()


def alike(word):
    """Processes with this word in their command."""
    found = []
    for process in psutil.process_iter():
        try:
            if word in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            pass
    return found


@pytest.mark.slow
def test_an_actor_ends_with_its_director(tmp_path):
    (folder := tmp_path / "scene").mkdir()
    script = actor(tmp_path, "time.sleep(99)", "print('{}', flush=True)")
    code = (
        f"import sys\nsys.path.insert(0, {TESTS!r})\nfrom pathlib import Path\n"
        "from soak.scene import Play\n"
        f"stage = Play('expand', 'm', Path({str(folder)!r}), None, actor={str(script)!r})\n"
        "stage.answer(60), stage.tell('go'), stage.answer(60)\n"
        "print(stage.process.pid, flush=True)\nsys.stdin.read()\n"
    )
    env = os.environ | {"PYTHONPATH": os.path.dirname(TESTS)}
    director = subprocess.Popen(
        [sys.executable, "-c", code], env=env, stdin=-1, stdout=-1, text=True
    )
    with director:
        pid = int(director.stdout.readline())
        assert alive(pid)
        director.kill()
    assert gone(pid, 10)
