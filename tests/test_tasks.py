"""Multiple choice: llama-perplexity's formats, its choice of tasks and its scores, and flips."""

import re
import subprocess
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from models import tiny_model

from llamatelemetry import ModelLoadError
from llamatelemetry.compare import choices, task_worker
from llamatelemetry.compare.own_tasks import N, own_tasks
from llamatelemetry.compare.tasks import (
    HELLASWAG,
    MULTIPLE,
    WINOGRANDE,
    Task,
    TaskSet,
    check,
    chosen,
    load_tasks,
    read_winogrande,
    write_tasks,
)
from llamatelemetry.convert.quantize import quantize
from llamatelemetry.errors import CompareError
from llamatelemetry.files.gguf import GGUFFile
from llamatelemetry.files.programs import tool

OURS = own_tasks()
AS_MULTIPLE = TaskSet(MULTIPLE, OURS["endings"].tasks[:60])
KINDS = {HELLASWAG: OURS["endings"], WINOGRANDE: OURS["gaps"], MULTIPLE: AS_MULTIPLE}


def test_our_tasks_are_sound_and_always_the_same():
    again = own_tasks()
    assert again == OURS != own_tasks(seed=1)
    for tasks in OURS.values():
        assert len(check(tasks).tasks) == N == len(set(tasks.tasks))
        assert all(len(set(task.choices)) == len(task.choices) for task in tasks.tasks)
        right = np.bincount([task.answer for task in tasks.tasks])
        assert right.min() > 0.7 * right.max()  # no place is right more often
    assert len(own_tasks(30)["gaps"].tasks) == 30


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_read_as_it_was_written(kind, tmp_path):
    path = write_tasks(KINDS[kind], tmp_path / "tasks")
    assert load_tasks(path) == KINDS[kind]
    assert load_tasks(path, 7).tasks == chosen(KINDS[kind], 7)
    assert set(load_tasks(path, 7).tasks) <= set(KINDS[kind].tasks)


def test_lines_that_are_no_tasks_are_passed_over():
    lines = (
        '0,"One, two _ go.",a,b,2\n1,no gap,a,b,1\n2,x _ y,a,b,3\n3,_ y,a,b,1\nlast _ one,a,b,1\n'
    )
    assert read_winogrande(lines) == [
        Task("One, two ", ("a", "b"), 1, " go."),
        Task("", ("a", "b"), 0, " y"),
    ]
    assert read_winogrande("0,x _ y,a,b,1\n") == []  # what llama-perplexity makes of one line


def test_what_is_no_file_of_tasks_is_refused(tmp_path):
    for content in (b"Call me Ishmael.\n", b"\x05\0\0\0\xff\xff", b"\xff\xfe\xfd\xfc"):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(CompareError, match="no tasks|no file of"):
            load_tasks(tmp_path / "x")
    with pytest.raises(CompareError, match="No tasks at"):
        load_tasks(tmp_path / "none")
    with pytest.raises(CompareError, match="cannot hold"):
        write_tasks(TaskSet(WINOGRANDE, [Task("a", ("b,c", "d"), 0, "e")]), tmp_path / "y")
    with pytest.raises(CompareError, match="fewer than two"):
        check([Task("a", ("b",), 0)])


@pytest.mark.parametrize(
    "tasks, says",
    [
        ([Task("a", ("b", "b"), 0)], "told apart from all others"),
        ([Task("a", ("", "b"), 1)], "told apart from all others"),
        ([Task("a", ("b", "c"), 0), Task("a", ("b", "c", "b"), 2)], "Task 1 has no right choice"),
        ([Task("a", ("b", "c"), 1.0)], "answer of task 0"),
        ([Task("a", ("b", "c"), -1)], "Task 0"),
        ([Task("a", ("b", "c"), 2)], "Task 0"),
        ([Task("a", ("b",), 0)], "fewer than two choices"),
        ([Task("a", ("b\ud83d", "c"), 0)], "half a character"),
        (["a"], "no Task"),
        ([], "no tasks"),
        (TaskSet("quiz", [Task("a", ("b", "c"), 0)]), "not 'quiz'"),
    ],
)
def test_tasks_that_say_nothing_are_refused(tasks, says):
    with pytest.raises(CompareError, match=says):
        check(tasks)
    assert check([Task("a", ("b", "c", "c"), 0)]).kind == "multiple-choice"


def test_a_limit_is_one_task_or_more():
    for limit in (0, -3, 1.5):
        with pytest.raises(CompareError, match="limit"):
            own_tasks(limit)
    with pytest.raises(CompareError, match="no sets of tasks"):
        choices._sets({}, None)
    one = [Task("a", ("b", "c"), 0)]
    assert (
        choices._sets(one, None)
        == {"multiple-choice": check(one)}
        == choices._sets({"multiple-choice": one}, None)
    )


def test_how_a_task_is_read():
    """By hand: 1 2 are shared; of the first choice 3 4 5, of the second 6 7."""
    ids = [[1, 2, 3, 4, 5], [1, 2, 6, 7]]
    own = task_worker.reading(HELLASWAG, ids, [])
    assert own.prefix == [1, 2] and own.rests == [[3, 4, 5], [6, 7]]
    assert own.outputs == [[True, True, False], [True, False]] and own.n_outputs == 4
    assert own.wanted == [[(0, 3), (1, 4), (2, 5)], [(0, 6), (3, 7)]]
    # Winogrande: behind the choice (3 tokens, 3 tokens) without the last, every rest has outputs
    ids = [[1, 2, 3, 8, 9, 10], [1, 2, 6, 8, 9, 10]]
    own = task_worker.reading(WINOGRANDE, ids, [3, 3])
    assert own.wanted == [[(1, 8), (2, 9)], [(5, 8), (6, 9)]]
    # ... and with fewer behind it the choice, too; the second one's from the end of the first
    own = task_worker.reading(WINOGRANDE, [ids[0][:5], ids[1][:5]], [3, 3])
    assert own.wanted == [[(0, 3), (1, 8)], [(3, 6), (4, 8)]]
    # One that is the beginning of another still has a token to be scored; nothing shared, no row
    own = task_worker.reading(HELLASWAG, [[1, 2], [1, 2, 3]], [])
    assert own.prefix == [1] and own.wanted == [[(0, 2)], [(0, 2), (1, 3)]]
    own = task_worker.reading(HELLASWAG, [[1, 2], [3, 4, 5]], [])
    assert own.prefix == [] and own.wanted == [[(0, 2)], [(1, 4), (2, 5)]]


def test_what_is_read_at_once_is_bounded():
    ones = [task_worker.reading(HELLASWAG, [[1, 2], [1, 3]], [])] * 5
    assert task_worker.groups(ones, 100, 100) == [[0, 1], [2, 3], [4]]  # SEQUENCES
    assert task_worker.groups(ones, 3, 100) == [[0], [1], [2], [3], [4]]
    assert task_worker.groups(ones, 100, 1) == [[0], [1], [2], [3], [4]]


def test_flips_by_hand():
    stats = pytest.importorskip("scipy.stats")
    base = pd.DataFrame({"right": [True] * 8 + [False] * 4, "chosen": [0] * 12})
    own = base.assign(right=[True] * 7 + [False] + [True] * 3 + [False], chosen=[0] * 7 + [1] * 5)
    row = choices.flips(own, base)
    assert (row["right_to_wrong"], row["wrong_to_right"], row["changed"]) == pytest.approx(
        (1 / 12, 3 / 12, 5 / 12)
    )
    assert row["difference"] == pytest.approx(2 / 12) and row["low"] < 2 / 12 < row["high"]
    assert row["mcnemar"] == pytest.approx(2 * stats.binom.cdf(1, 4, 0.5))
    assert row["verdict"] == "cannot be told"
    assert choices.flips(base, base)["mcnemar"] == 1
    for flipped, verdict in ((4, "cannot be told"), (5, "cannot be told"), (6, "less")):
        lost = [False] * flipped + [True] * (30 - flipped)
        one = pd.DataFrame({"right": lost, "chosen": 0})
        row = choices.flips(one, one.assign(right=True))
        assert row["high"] < 0 and row["verdict"] == verdict  # p: 1/8, 1/16, 1/32
    for share, n in ((0.75, 20), (1.0, 3), (0.0, 5)):
        theirs = stats.binomtest(round(share * n), n).proportion_ci(method="wilson")
        assert choices.wilson(share, n) == pytest.approx(theirs)


def test_equal_scores():
    scores = np.array([[-1.0, -1.0], [-2.0, -1.0]])
    assert choices.picked(HELLASWAG, scores).tolist() == [0, 1]
    assert choices.picked(WINOGRANDE, scores).tolist() == [1, 1]
    assert choices.picked(MULTIPLE, np.array([[-3, np.nan, -2]])).tolist() == [2]


@pytest.fixture(scope="module")
def tiny(smollm2, tmp_path_factory):
    pytest.importorskip("llama_cpp")
    folder = tmp_path_factory.mktemp("tasks")
    return tiny_model("llama", folder, vocabulary=GGUFFile(smollm2), n_layer=2, n_ctx=2048)


def printed(model, kind, path, limit):
    """What llama-perplexity prints of each task: running accuracy in percent, and the rest."""
    flag, file = {MULTIPLE: ("multiple-choice", "-bf")}.get(kind, (kind, "-f"))
    command = [tool("llama-perplexity"), "-m", model, file, path, f"--{flag}", "-t", "2"]
    command += [f"--{flag}-tasks", str(limit)]
    done = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    rows = re.findall(r"^(\d+)\t([\d.]+)%?(.*)$", done.stdout, re.MULTILINE)
    assert [int(row[0]) for row in rows] == list(range(1, limit + 1)), done.stdout[-2000:]
    return [float(row[1]) for row in rows], [row[2] for row in rows]


def same(model, kind, tasks, limit, tmp_path):
    path = write_tasks(tasks, tmp_path / "tasks")
    running, more = printed(model, kind, path, limit)
    some = load_tasks(path, limit)
    scores = choices.score_tasks(model, {"x": some}, progress=False)["x"]
    right = choices.picked(kind, scores) == [task.answer for task in some.tasks]
    ours = 100 * np.cumsum(right) / np.arange(1, limit + 1)
    assert ours == pytest.approx(running, abs=1e-4)
    if kind == WINOGRANDE:
        theirs = [[float(one) for one in row.split()[:2]] for row in more]
        assert scores == pytest.approx(np.array(theirs), abs=1e-3)
    if kind == HELLASWAG:
        ends = [float(one) / 100 for one in re.findall(r"[\d.]+", more[-1])]
        assert choices.wilson(right.mean(), limit) == pytest.approx(ends, abs=1e-5)
    return right


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_accuracy_is_llama_perplexitys(kind, tiny, tmp_path):
    tasks = list(KINDS[kind].tasks)
    if kind == WINOGRANDE:  # few tokens behind the gap: the choice is scored, too
        tasks = [
            task._replace(after=" it.") if n % 4 == 0 else task for n, task in enumerate(tasks)
        ]
    same(tiny, kind, TaskSet(kind, tasks), 50, tmp_path)
    same(tiny, kind, TaskSet(kind, tasks[:40]), 40, tmp_path)  # all of them


@pytest.mark.slow
@pytest.mark.parametrize("kind", [HELLASWAG, WINOGRANDE])
def test_smollm2_does_our_tasks_as_in_llama_perplexity(kind, smollm2, tmp_path):
    right = same(smollm2, kind, KINDS[kind], 40, tmp_path)
    chance = 1 / len(KINDS[kind].tasks[0].choices)
    low, high = choices.wilson(right.mean(), 40)
    assert chance < low and high < 0.99, "neither at chance nor at the top"


@pytest.mark.slow
def test_files_beside_their_reference(tiny, tmp_path):
    q8, q2 = (
        quantize(tiny, tmp_path / f"{kind}.gguf", kind, progress=False) for kind in ("Q8_0", "Q2_K")
    )
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(q8.read_bytes()[:9000])
    with pytest.warns(UserWarning, match="cut"):
        found = choices.compare_tasks(tiny, [q8, q2, cut, tiny], limit=40, progress=False)
    assert list(found.index.get_level_values("name").unique()) == [
        "reference",
        "Q8_0",
        "Q2_K",
        "cut",
        tiny.stem,
    ]
    assert list(found.index.get_level_values("tasks").unique()) == ["endings", "gaps"]
    itself = found.xs(tiny.stem, level="name")
    assert (itself["changed"] == 0).all() and (itself["mcnemar"] == 1).all()
    assert (itself["verdict"] == "cannot be told").all()
    assert found.loc[("gaps", "cut"), "error"] and np.isnan(found.loc[("gaps", "cut"), "accuracy"])
    row, answers = found.loc[("endings", "Q2_K")], found.answers
    own, base = (
        answers.query(f"tasks == 'endings' and name == {name!r}").set_index("task")
        for name in ("Q2_K", "reference")
    )
    assert row["changed"] == (own["chosen"] != base["chosen"]).mean() > 0
    assert row["difference"] == pytest.approx(own["right"].mean() - base["right"].mean())
    assert row["right_to_wrong"] == (base["right"] & ~own["right"]).mean()
    assert ((own["margin"] > 0) == own["right"]).all()
    with pytest.raises(ModelLoadError, match="reference"):
        choices.compare_tasks(cut, [q8], limit=4, progress=False)


def test_the_real_ones_are_fetched_only_when_asked_for(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def fetch(repository, file, repo_type):
        asked.append((repository, file, repo_type))
        return str(write_tasks(AS_MULTIPLE, tmp_path / "fetched"))

    monkeypatch.setattr(hub, "hf_hub_download", fetch)
    assert load_tasks("hellaswag", 5).kind == MULTIPLE and len(asked) == 1
    assert asked[0][1] == "hellaswag-validation.bin" and asked[0][2] == "dataset"
    monkeypatch.setattr(
        hub, "hf_hub_download", lambda *_, **__: SimpleNamespace().missing
    )  # as offline
    with pytest.raises(CompareError, match="could not be downloaded"):
        load_tasks("winogrande")
