"""The child process of compare_tasks: one model reads tasks and gives each choice the score that
llama-perplexity gives it."""

import os
from typing import NamedTuple

import numpy as np

from ..capture.runtime import ERROR, WARNING, Runtime, log_levels
from ..child import serve
from ..errors import CaptureError
from .tasks import WINOGRANDE, Task
from .worker import STEP, why_not

# Choices that are read at once, as llama-perplexity has it: in another batch the rounding of
# activations falls otherwise, and 64 at once are no faster on a CPU.
SEQUENCES = 4
LOGITS = 1 << 25  # numbers: 128 MiB of rows at once, of any vocabulary
TRAILING = 3  # tokens behind Winogrande's choice from which on the choice itself is not scored


class Reading(NamedTuple):
    """How a task is read. prefix: the tokens that all choices share, read once; rests: what each
    choice has after them; wanted: of each choice, (row, token) of what is scored: rows are those of
    the task's outputs, the first one of the prefix's last token."""

    prefix: list[int]
    rests: list[list[int]]
    outputs: list[list[bool]]
    wanted: list[list[tuple[int, int]]]

    @property
    def n_tokens(self):
        return len(self.prefix) + sum(map(len, self.rests))

    @property
    def n_outputs(self):
        return bool(self.prefix) + sum(map(sum, self.outputs))


def reading(kind: str, ids: list[list[int]], bases: list[int]) -> Reading:
    """How one task is read. ids: tokens of each choice with its context; bases: of Winogrande, how
    many of them stand up to the end of the choice.

    HellaSwag and multiple choice: the mean log probability of what the choices do not share.
    Winogrande: of what follows the choice without the last token (a full stop), or, where fewer
    than four tokens follow, of the choice, too; then llama-perplexity takes the prediction of the
    second choice's first token from the end of the first (as its source says), and so does this.
    Where it would read beyond a choice that is the beginning of another, the shared part ends
    sooner."""
    shortest = min(map(len, ids))
    shared = [len({one[k] for one in ids}) == 1 for k in range(shortest)]
    prefix = min([k for k, same in enumerate(shared) if not same] + [shortest - 1])
    last = kind != WINOGRANDE  # no output of a choice's last token is needed
    outputs, rows, n_rows = [], {}, int(prefix > 0)
    for choice, own in enumerate(ids):
        for place in range(prefix, len(own) - last):
            rows[choice, place] = n_rows
            n_rows += 1
        outputs.append([place < len(own) - last for place in range(prefix, len(own))])
    behind = kind == WINOGRANDE and all(len(own) - prefix > TRAILING for own in ids)
    wanted = []
    for choice, own in enumerate(ids):
        begin = max(min(bases[choice], len(own) - 1) if behind else prefix, 1)
        end = len(own) - (kind == WINOGRANDE and len(own) - begin > 1)
        places = [(rows.get((choice, place - 1), 0), own[place]) for place in range(begin, end)]
        if kind == WINOGRANDE and choice and begin == prefix:
            places[0] = (rows[0, len(ids[0]) - 1], own[prefix])
        wanted.append(places)
    return Reading(ids[0][:prefix], [own[prefix:] for own in ids], outputs, wanted)


def texts(kind: str, task: Task) -> tuple[list[str], list[str]]:
    """What is read of each choice, and how it begins up to the choice's end."""
    if kind == WINOGRANDE:
        begins = [task.context + choice for choice in task.choices]
        return [begin + task.after for begin in begins], begins
    return [f"{task.context} {choice}" for choice in task.choices], []


def groups(readings: list[Reading], tokens: int, outputs: int) -> list[list[int]]:
    """Indices of what is read at once: at most so many tokens, outputs and SEQUENCES."""
    found: list[list[int]] = [[]]
    used = np.zeros(3, int)
    for number, one in enumerate(readings):
        need = np.array([one.n_tokens, one.n_outputs, len(one.rests)])
        if found[-1] and (used + need > [tokens, outputs, SEQUENCES]).any():
            found.append([])
            used[:] = 0
        found[-1].append(number)
        used += need
    return found


class Worker:
    """What compare_tasks asks of its child process."""

    def __init__(self, tell):
        import llama_cpp

        self.tell, self._model = tell, None
        log_levels(llama_cpp, lambda level: level in (WARNING, ERROR))

    def score(self, path, kind, tasks, folder, **how):
        """A .npz file of scores (task, choice), NaN where a task has fewer choices; tells how many
        tasks are done. how: threads, gpu_layers and tensor_split of a Runtime. Raises
        ModelLoadError, and CaptureError where the model predicts nothing or a task is longer than
        its context."""
        model = self._loaded(path, how)
        if why := why_not(model):
            raise CaptureError(why)
        readings = [_reading(model, kind, Task(*task)) for task in tasks]
        longest = max(one.n_tokens for one in readings)
        model.check_length(longest)
        room = max(STEP, longest)
        rows = max(min(room, LOGITS // model.n_vocab), max(one.n_outputs for one in readings))
        settings = dict(kv_unified=True, swa_full=False, n_outputs_max=rows)
        settings["n_seq_max"] = max(SEQUENCES, *(len(one.rests) for one in readings))
        model.make_context(n_ctx=room, n_batch=room, n_ubatch=room, **settings)
        scores = np.full((len(tasks), max(len(one.rests) for one in readings)), np.nan)
        for group in groups(readings, room, rows):
            found = _scores(model, [readings[number] for number in group])
            for number, own in zip(group, found):
                scores[number, : len(own)] = own
            self.tell(tasks=group[-1] + 1)
        np.savez(os.path.join(folder, "scores.npz"), scores=scores)
        return os.path.join(folder, "scores.npz")

    def _loaded(self, path, how):
        """The file's Runtime, in place of the one before unless that is it."""
        if self._model is None or self._model.path != path:
            if self._model is not None:
                self._model.close()
                self._model = None
            self._model = Runtime(path, **how)
        return self._model


def _reading(model, kind, task):
    whole, begins = texts(kind, task)
    ids = [model.tokenize(text, parse_special=False) for text in whole]
    bases = [len(model.tokenize(text, parse_special=False)) for text in begins]
    return reading(kind, ids, bases)


def _scores(model, readings):
    """Of each reading, the mean log probability of each choice."""
    model.clear()
    logits = _decode(model, readings)  # (output, vocab)
    scores, first = [], 0
    for one in readings:
        own = logits[first : first + one.n_outputs]
        # NumPy sums pairwise: off by 1e-7, where llama-perplexity's running sum has 1e-4.
        peak = own.max(axis=1, keepdims=True)
        norm = peak[:, 0] + np.log(np.exp(own - peak).sum(axis=1))
        chances = [[own[row, token] - norm[row] for row, token in some] for some in one.wanted]
        scores.append([float(np.mean(some)) for some in chances])
        first += one.n_outputs
    return scores


def _decode(model, readings):
    """Logits of all outputs: a prefix once, for all the choices that share it."""
    n_tokens, widest = (
        sum(one.n_tokens for one in readings),
        max(len(one.rests) for one in readings),
    )
    batch, at, sequence = model.api.llama_batch_init(n_tokens, 0, widest), 0, 0

    def add(token, place, sequences, output):
        nonlocal at
        batch.token[at], batch.pos[at], batch.logits[at] = int(token), place, output
        batch.n_seq_id[at] = len(sequences)
        for n, number in enumerate(sequences):
            batch.seq_id[at][n] = number
        at += 1

    try:
        batch.n_tokens = n_tokens
        for one in readings:
            everyone = range(sequence, sequence + len(one.rests))
            for place, token in enumerate(one.prefix):
                add(token, place, everyone, place == len(one.prefix) - 1)
            for number, rest, outputs in zip(everyone, one.rests, one.outputs):
                for place, (token, output) in enumerate(zip(rest, outputs), len(one.prefix)):
                    add(token, place, [number], output)
            sequence += len(one.rests)
        if status := model.api.llama_decode(model.context, batch):
            raise CaptureError(f"llama.cpp stopped while decoding {model.name} (status {status}).")
    finally:
        model.api.llama_batch_free(batch)
    return model.logits(sum(one.n_outputs for one in readings))


if __name__ == "__main__":
    serve(Worker)
