"""Does a quantization show in tasks: accuracy on multiple choice, and which answers changed against
the reference."""

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from ..arguments import whole
from ..child import Child
from ..errors import (
    CaptureError,
    CompareError,
    ModelLoadError,
    WorkerCrashedError,
    shown,
)
from ..gpus.cores import physical_cores
from ..gpus.devices import inference_environment, list_gpus, plan
from ..imports import uninterrupted
from ..liveness import patience
from .comparison import named_files, resolved
from .own_tasks import own_tasks
from .paired import paired
from .placing import split_for
from .tasks import WINOGRANDE, TaskSet, check, load_tasks
from .worker import STEP

REFERENCE = "reference"
COLUMNS = "right_to_wrong wrong_to_right changed difference low high mcnemar verdict".split()


class TaskComparison(pd.DataFrame):
    """The result of compare_tasks: a DataFrame, and `.answers`: one row per set, file and task:
    tasks, name, task, answer, chosen, right, margin (the right choice's score less the best of the
    others, nats per token)."""

    _metadata = ["answers"]


def compare_tasks(
    reference: str | Path,
    candidates: str | Path | Iterable[str | Path] | Mapping[str, str | Path],
    tasks: str | Path | TaskSet | list | Mapping[str, str | Path | TaskSet | list] | None = None,
    *,
    limit: int | None = None,
    gpu_layers: int | None = None,
    threads: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> TaskComparison:
    """Accuracy on multiple choice of quantized files beside their reference, and the answers that
    changed.

    reference, candidates: as compare_quantizations takes them. tasks: a file or a name as
    load_tasks takes it, a TaskSet, a list of Task, {name: one of these}, or None for this package's
    own two sets (own_tasks.py). limit: as many of each set as llama-perplexity would choose (its
    --hellaswag-tasks, ...). Scores are llama-perplexity's (task_worker.reading).

    Returns a TaskComparison, one row per set and file, the reference first, indexed by (tasks,
    name): n, accuracy and its 95% interval (Wilson 1927, as llama-perplexity prints it), chance,
    and against the reference: right_to_wrong, wrong_to_right and changed (shares of the tasks;
    changed: another choice, right or not), difference of accuracy with a paired 95% interval (low,
    high: paired.paired), mcnemar (exact p of McNemar 1947: that flips go both ways alike) and
    verdict ("less" or "more" accurate where the interval leaves out 0 and p is below 0.05, else
    "cannot be told"). A candidate that cannot be read has its
    reason in `error` and NaN elsewhere. Raises ModelLoadError for such a reference, CompareError
    for tasks that are none."""
    whole("gpu_layers", gpu_layers, -1, error=CompareError, none=True)
    whole("threads", threads, 1, error=CompareError, none=True)
    files = {REFERENCE: resolved(reference), **_others(candidates)}
    sets = _sets(tasks, limit)
    found, errors = {}, {}
    with Scoring(files.values(), threads, gpu_layers, progress) as scoring:
        for name, path in files.items():
            try:
                found[name] = scoring(path, sets)
            except (CaptureError, ModelLoadError, WorkerCrashedError) as error:
                if name == REFERENCE:
                    raise ModelLoadError(f"The reference does no tasks: {error}") from error
                warnings.warn(f"{shown(path)} was left out: {error}", stacklevel=2)
                errors[name] = str(error)
    answers = pd.concat([_answers(found[name], sets).assign(name=name) for name in found])
    rows = [
        {"tasks": which, "name": name, "file": shown(path), "error": errors.get(name)}
        | (_row(answers, which, name, sets[which], seed) if name in found else {})
        for which in sets
        for name, path in files.items()
    ]
    result = TaskComparison(pd.DataFrame(rows).set_index(["tasks", "name"]))
    result["error"] = result.pop("error")
    result["file"] = result.pop("file")
    object.__setattr__(result, "answers", answers.reset_index(drop=True))
    return result


def _others(candidates):
    named = named_files(candidates)
    if REFERENCE in named:
        raise CompareError(f"No candidate can be called {REFERENCE!r}: that row is there already.")
    return named


def _sets(tasks, limit):
    """{name: TaskSet}."""
    if tasks is None:
        return own_tasks(limit)
    if isinstance(tasks, Mapping) and not tasks:
        raise CompareError("There are no sets of tasks: give one, or None for this package's own.")
    if isinstance(tasks, list):
        tasks = check(tasks)
    if not isinstance(tasks, Mapping):
        name = tasks.kind if isinstance(tasks, TaskSet) else Path(tasks).stem
        tasks = {name: tasks}
    return {
        name: check(given if isinstance(given, (TaskSet, list)) else load_tasks(given, limit))
        for name, given in tasks.items()
    }


def score_tasks(
    path: str | Path,
    sets: Mapping[str, TaskSet],
    *,
    threads: int | None = None,
    gpu_layers: int | None = None,
    progress: bool = True,
) -> dict[str, np.ndarray]:
    """The scores of each choice, {name: (task, choice)}: mean log probability in nats per token,
    NaN where a task has fewer choices. A process of its own reads all sets. Raises ModelLoadError,
    CaptureError or WorkerCrashedError."""
    with Scoring([path], threads, gpu_layers, progress) as scoring:
        return scoring(path, sets)


class Scoring:
    """score_tasks for several files, one after the other in one process, another one where the
    devices are others or the last has ended. Also a context manager."""

    def __init__(self, paths, threads=None, gpu_layers=None, progress=True):
        self.limit = patience(list(paths), STEP, STEP, bool(list_gpus()))
        self.layers, self.progress = gpu_layers, progress
        self.how = dict(threads=threads or physical_cores())
        self.how["gpu_layers"] = 999 if gpu_layers is None else gpu_layers
        self._child, self._environment = None, None

    def __call__(self, path: str | Path, sets: Mapping[str, TaskSet]) -> dict[str, np.ndarray]:
        """As score_tasks."""
        from tqdm.auto import tqdm

        from ..files.gguf import GGUFFile

        split = None if self.layers is not None else split_for(GGUFFile(path), capture=False)
        where = plan(split)
        how = self.how | dict(tensor_split=where.shares if split else None, path=str(path))
        child = self._started(inference_environment() | where.inference_env())
        total, done, found = sum(len(one.tasks) for one in sets.values()), 0, {}
        bar = tqdm(desc=Path(path).stem, unit="task", total=total, disable=not self.progress)
        with bar:
            for name, (kind, tasks) in sets.items():
                hear = lambda tasks, done=done: bar.update(done + tasks - bar.n)  # noqa: E731
                asked = dict(kind=kind, tasks=tasks, folder=str(child.folder))
                with np.load(child.call("score", hear, **asked, **how)) as file:
                    found[name] = file["scores"]
                done += len(tasks)
        return found

    def _started(self, environment):
        """A process with this environment that runs."""
        if self._child and not (self._child.alive and environment == self._environment):
            self.close()
        if not self._child:
            name = "llamatelemetry.compare.task_worker"
            self._child = Child(name, "llama.cpp", environment, limit=self.limit)
            self._environment = environment
        return self._child

    def close(self):
        """End the process. Safe to call twice."""
        child, self._child = self._child, None
        if child:
            child.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def picked(kind: str, scores: np.ndarray) -> np.ndarray:
    """The choice of each task (task,) from scores (task, choice): the best, the first of equal ones
    (Winogrande: the second), as llama-perplexity has it."""
    if kind == WINOGRANDE:
        return np.where(scores[:, 0] > scores[:, 1], 0, 1)
    return np.nanargmax(scores, axis=1)


def _answers(scores, sets):
    parts = []
    for name, (kind, tasks) in sets.items():
        answer, chosen = np.array([task.answer for task in tasks]), picked(kind, scores[name])
        others = scores[name].copy()
        right = others[np.arange(len(tasks)), answer]
        others[np.arange(len(tasks)), answer] = np.nan
        columns = dict(task=range(len(tasks)), answer=answer, chosen=chosen)
        columns |= dict(right=chosen == answer, margin=right - np.nanmax(others, axis=1))
        parts.append(pd.DataFrame(columns).assign(tasks=name))
    return pd.concat(parts)


def _row(answers, which, name, tasks, seed):
    mine = answers[answers["tasks"] == which]
    own, base = (mine[mine["name"] == one].set_index("task") for one in (name, REFERENCE))
    n, accuracy = len(own), float(own["right"].mean())
    low, high = wilson(accuracy, n)
    chance = np.mean([1 / len(task.choices) for task in tasks.tasks])
    row = dict(n=n, accuracy=accuracy, accuracy_low=low, accuracy_high=high, chance=float(chance))
    return row | (flips(own, base, seed) if name != REFERENCE else {})


def flips(own: pd.DataFrame, base: pd.DataFrame, seed: int = 0) -> dict:
    """What changed from a reference's answers to a file's: COLUMNS. own, base: right and chosen of
    the same tasks."""
    with uninterrupted():
        from scipy.stats import binomtest

    right, before = own["right"].to_numpy(), base["right"].to_numpy()
    lost, won = int((before & ~right).sum()), int((~before & right).sum())
    found = paired(right, before, seed=seed)
    p = binomtest(lost, lost + won).pvalue if lost + won else 1.0
    changed = float((own["chosen"].to_numpy() != base["chosen"].to_numpy()).mean())
    # Four flips one way are resampled to an interval without 0, and are one case of eight
    verdict = found.verdict if p < 0.05 else "cannot be told"
    values = lost / len(own), won / len(own), changed, *found[:3], float(p), verdict
    return dict(zip(COLUMNS, values))


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95% interval of a share of n (Wilson 1927)."""
    z = 1.95996398454**2 / n
    middle, width = share + z / 2, np.sqrt(z * (share * (1 - share) + z / 4))
    return float((middle - width) / (1 + z)), float((middle + width) / (1 + z))
