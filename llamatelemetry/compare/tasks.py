"""Multiple choice as llama-perplexity reads it: HellaSwag's lines, Winogrande's comma-separated
values and the binary format of --multiple-choice."""

import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..arguments import whole, writable
from ..errors import CompareError, shown
from ..files.outputs import path_of, written

HELLASWAG, WINOGRANDE, MULTIPLE = "hellaswag", "winogrande", "multiple-choice"
# Where the real ones are, in these formats: a repository of data sets and a file in it.
HUB = {
    "hellaswag": ("ikawrakow/validation-datasets-for-llama.cpp", "hellaswag-validation.bin"),
    "arc-easy": ("ikawrakow/validation-datasets-for-llama.cpp", "arc-easy-validation.bin"),
    "arc-challenge": (
        "ikawrakow/validation-datasets-for-llama.cpp",
        "arc-challenge-validation.bin",
    ),
    "mmlu": ("ikawrakow/validation-datasets-for-llama.cpp", "mmlu-validation.bin"),
    "truthful-qa": ("ikawrakow/validation-datasets-for-llama.cpp", "truthful-qa-validation.bin"),
    "winogrande": ("ikawrakow/winogrande-eval-for-llama.cpp", "winogrande-debiased-eval.csv"),
}


class Task(NamedTuple):
    """context: what stands before a choice; choices; answer: index of the right one; after: what
    stands behind a choice (Winogrande's rest of the sentence, which is what is scored there)."""

    context: str
    choices: tuple[str, ...]
    answer: int
    after: str = ""


class TaskSet(NamedTuple):
    """kind: "hellaswag", "winogrande" or "multiple-choice", which says how it is scored; tasks."""

    kind: str
    tasks: list[Task]


def load_tasks(source: str | Path, limit: int | None = None) -> TaskSet:
    """Tasks from a file in one of llama-perplexity's formats, told apart by what is in it, or from
    the hub by a name of HUB ("hellaswag", "winogrande", "arc-easy", "mmlu", ...: a download).

    limit: as many as `--hellaswag-tasks N` and its like choose, and the same ones. CompareError for
    a file that is none of them, or not there."""
    whole("limit", limit, 1, error=CompareError, none=True)
    path = _download(source) if str(source) in HUB else path_of(source, CompareError)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CompareError(
            f"No tasks at {shown(path)}: {error}. Give a file, or one of {', '.join(HUB)}."
        ) from error
    found = _read(data, path)
    return found if limit is None else TaskSet(found.kind, chosen(found, limit))


def _read(data, path):
    if data[:4].count(0) > 1:  # a count in four bytes: no text has these
        return TaskSet(MULTIPLE, read_multiple(data))
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CompareError(f"{shown(path)} holds no tasks: it is not UTF-8 ({error}).") from error
    lines = text.removesuffix("\n").split("\n")
    if len(lines) % 6 == 0 and all(re.fullmatch(r"[0-3]\s*", line) for line in lines[1::6]):
        return TaskSet(HELLASWAG, read_hellaswag(text))
    tasks = read_winogrande(text)
    if not tasks:
        raise CompareError(
            f"{shown(path)} holds no tasks: neither six lines for each (context, index of the right "
            "ending, four endings), nor lines of index,sentence with _,choice,choice,1 or 2."
        )
    return TaskSet(WINOGRANDE, tasks)


def read_hellaswag(text: str) -> list[Task]:
    """Six lines a task: context, index of the right ending, four endings."""
    lines = text.removesuffix("\n").split("\n")
    if len(lines) % 6:
        raise CompareError(f"{len(lines)} lines are no HellaSwag file: it has six for each task.")
    return [
        Task(lines[at], tuple(lines[at + 2 : at + 6]), int(lines[at + 1]))
        for at in range(0, len(lines), 6)
    ]


def read_winogrande(text: str) -> list[Task]:
    """One line a task: index,sentence,choice,choice,answer (1 or 2), the sentence with a _ where
    the choice goes and in quotes where it has commas. Lines that are none are passed over, and so
    is the last one unless an empty line follows: llama-perplexity never sees it."""
    tasks: list[Task] = []
    for line in text.removesuffix("\n").split("\n")[:-1]:
        commas, quoted = [], False
        for place, sign in enumerate(line):
            if sign == '"':
                quoted = not quoted
            elif sign == "," and not quoted:
                commas.append(place)
        if len(commas) < 4:
            continue
        first, second, third, fourth = commas[:4]
        bare = line[first + 1] != '"'
        sentence = line[first + 1 : second] if bare else line[first + 2 : second - 1]
        found = re.match(r"\s*[+]?0*([12])(?!\d)", line[fourth + 1 :])
        before, there, after = sentence.partition("_")
        if there and found:
            choices = line[second + 1 : third], line[third + 1 : fourth]
            tasks.append(Task(before, choices, int(found[1]) - 1, after))
    return tasks


def read_multiple(data: bytes) -> list[Task]:
    """uint32 count and places; of each task: question, its answers and their labels, one of which
    is 1, and the same for several right answers, which is passed over. Texts by their length."""
    at = 0

    def number():
        nonlocal at
        (value,) = struct.unpack_from("<I", data, at)
        at += 4
        return value

    def string():
        nonlocal at
        length = number()
        if at + length > len(data):
            raise ValueError(f"a text of {length:,} bytes goes beyond the end")
        at += length
        return data[at - length : at].decode("utf-8", "replace")

    def answers():
        count = number()
        if count > 100:
            raise ValueError(f"{count:,} answers")
        return [string() for _ in range(count)], [number() for _ in range(count)]

    tasks: list[Task] = []
    try:
        count = number()
        at += 4 * count
        for _ in range(count):
            question, (choices, labels), _ = string(), answers(), answers()
            if not question or not all(choices) or 1 not in labels:
                raise ValueError(f"task {len(tasks)} has no question, or no right answer")
            tasks.append(Task(question, tuple(choices), labels.index(1)))
    except (struct.error, ValueError) as error:
        raise CompareError(f"This is no file of multiple-choice tasks: {error}.") from error
    return tasks


def write_tasks(tasks: TaskSet, dst: str | Path) -> Path:
    """A file that llama-perplexity reads (-f, -bf for multiple choice), and load_tasks. Returns its
    path. CompareError for a text that the format cannot hold."""
    dst = path_of(dst, CompareError)
    if tasks.kind == MULTIPLE:
        content = _binary(tasks.tasks)
    else:
        lines = {HELLASWAG: _lines, WINOGRANDE: _values}[tasks.kind]
        content = "".join(line for task in enumerate(tasks.tasks) for line in lines(*task)).encode()
        content += b"\n" if tasks.kind == WINOGRANDE else b""  # else its last task is not read
    again = {HELLASWAG: read_hellaswag, WINOGRANDE: read_winogrande}.get(tasks.kind)
    if (again(content.decode()) if again else read_multiple(content)) != tasks.tasks:
        raise CompareError(
            f"A task has what the {tasks.kind} format cannot hold: a line end, or a comma in a choice."
        )
    with written(dst, need=len(content), error=CompareError) as temporary:
        Path(temporary).write_bytes(content)
    return dst


def _lines(_, task):
    return (f"{line}\n" for line in (task.context, task.answer, *task.choices))


def _values(index, task):
    sentence = f"{task.context}_{task.after}"
    sentence = f'"{sentence}"' if "," in sentence else sentence
    return [f"{index},{sentence},{','.join(task.choices)},{task.answer + 1}\n"]


def _binary(tasks):
    def string(text):
        return struct.pack("<I", len(text.encode())) + text.encode()

    bodies = []
    for task in tasks:
        labels = [int(n == task.answer) for n in range(len(task.choices))]
        own = struct.pack("<I", len(labels)) + b"".join(map(string, task.choices))
        own += struct.pack(f"<{len(labels)}I", *labels)
        bodies.append(string(task.context) + own + struct.pack("<I", 0))
    places = 4 + 4 * len(tasks) + np.cumsum([0, *map(len, bodies)])[:-1]
    return struct.pack(f"<{1 + len(tasks)}I", len(tasks), *places) + b"".join(bodies)


def chosen(tasks: TaskSet, limit: int) -> list[Task]:
    """The tasks that llama-perplexity chooses for a number of them, in its order: of HellaSwag in a
    drawn order whatever the number, of the others only where there are more."""
    draw = np.random.RandomState(1).randint  # its Mersenne Twister is std::mt19937's

    def word():
        return int(draw(0, 1 << 32, dtype=np.uint64))

    left, limit = list(tasks.tasks), min(limit, len(tasks.tasks))
    if tasks.kind == HELLASWAG:
        return [left.pop(_uniform(word, len(left))) for _ in range(limit)]
    if limit == len(left):
        return left
    found = []
    for _ in range(limit):
        place = int(_scaled(word()) * np.float32(len(left)))
        found.append(left[place])
        left[place] = left[-1]
        left.pop()
    return found


def _scaled(word):
    """In 32-bit floats, as it is computed there."""
    return np.float32(1 / np.float32(2**32)) * np.float32(word)


def _uniform(word, n):
    """std::uniform_int_distribution of libstdc++ over n values (Lemire 2019)."""
    product = word() * n
    if product & 0xFFFFFFFF < n:
        while product & 0xFFFFFFFF < (1 << 32) % n:
            product = word() * n
    return product >> 32


def _download(name):
    from huggingface_hub import hf_hub_download

    repository, file = HUB[str(name)]
    try:
        return Path(hf_hub_download(repository, file, repo_type="dataset"))
    except Exception as error:  # offline, refused, gone: the client has a different one for each
        raise CompareError(
            f"{name} could not be downloaded ({error}): pass a file, or None for this package's own."
        ) from error


def check(tasks: Sequence[Task] | TaskSet) -> TaskSet:
    """A TaskSet from one, or from a list of Task scored as multiple choice. CompareError for
    anything else: a choice without text, or the right one among the wrong ones once more, says
    nothing of a model."""
    if not isinstance(tasks, TaskSet):
        tasks = TaskSet(MULTIPLE, list(tasks))
    if tasks.kind not in (HELLASWAG, WINOGRANDE, MULTIPLE):
        raise CompareError(
            f"A set of tasks is {HELLASWAG}, {WINOGRANDE} or {MULTIPLE}, not {tasks.kind!r:.80}."
        )
    for number, task in enumerate(tasks.tasks):
        if not isinstance(task, Task):
            raise CompareError(f"Task {number} is no Task(context, choices, answer): {task!r:.80}")
        whole(f"answer of task {number}", task.answer, error=CompareError)
        for text in (task.context, *task.choices, task.after):
            writable(text, CompareError)
        if len(task.choices) < 2 or not 0 <= task.answer < len(task.choices):
            raise CompareError(f"Task {number} has fewer than two choices, or no right one: {task}")
        if task.choices.count(task.choices[task.answer]) != 1 or not all(task.choices):
            raise CompareError(
                f"Task {number} has no right choice that is told apart from all others: {task}"
            )
        if tasks.kind == WINOGRANDE and len(task.choices) != 2:
            raise CompareError(f"Task {number} of a Winogrande set has not two choices: {task}")
    if not tasks.tasks:
        raise CompareError("There are no tasks: give at least one.")
    return tasks
