"""Linear probes: what can be read off the states of every layer, on words that no probe has seen,
beside what shuffled labels give.

A probe is L2-regularized logistic regression on standardized states. Its accuracy says that the
label can be read, not that the model uses it; the control (Hewitt and Liang 2019,
arXiv:1909.03368) says how much a probe of this size finds in labels that mean nothing."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from ..arguments import finite, whole
from ..backend import get_backend
from ..capture.finite import measured
from ..errors import ProbeError
from ..imports import uninterrupted
from ..maths import middle

if TYPE_CHECKING:
    import xarray as xr

DRAWS = 1000  # of the groups, for intervals


def by_layer(
    states: "xr.DataArray",
    labels: ArrayLike,
    groups: ArrayLike | None = None,
    *,
    folds: int = 5,
    shuffles: int = 3,
    strength: float = 0.1,
    backend: Any = None,
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """How well a probe of every layer tells the labels of texts that it was not made from.

    states: (text, layer, embd), as engine.collect gives them; labels: (text,), two or more kinds;
    groups: (text,), never split between making and testing a probe (None: every text is its own,
    equal ones are one). folds: parts, each tested once with a probe of the others. shuffles:
    controls, whose labels are shuffled: inside their groups where all have the same shares of
    labels, as whole groups where each has one, else over all texts. strength: C, the inverse of the
    penalty. backend: get_backend's, for cuML.

    -> DataFrame by layer: accuracy (share of texts), low, high (95% percentile bootstrap over
    groups), shuffled, shuffled_high (mean and largest of the controls), majority (share of the
    commonest label). attrs: n, groups, labels. ProbeError where groups or labels are too few, or
    equal texts are in several groups, NotFiniteError where a state is no number."""
    finite("strength", strength, 1e-12, error=ProbeError)
    shuffles = whole("shuffles", shuffles, 0, error=ProbeError)
    task = Task(labels, groups, folds, seed, _texts(states))
    task.check(states)
    wrong = [task.shuffled() for _ in range(shuffles)]
    rows = []
    for layer, values in _layers(states, progress):
        [right] = task.tested(values, task.codes, strength, backend)
        rows.append(dict(layer=layer, accuracy=right.mean(), **task.interval(right)))
        controls = [task.tested(values, codes, strength, backend)[0].mean() for codes in wrong]
        rows[-1] |= dict(
            shuffled=np.mean(controls or np.nan), shuffled_high=max(controls or [np.nan])
        )
    return task.table(rows)


def across(
    states: Mapping[str, "xr.DataArray"],
    labels: ArrayLike,
    groups: ArrayLike | None = None,
    *,
    folds: int = 5,
    strength: float = 0.1,
    backend: Any = None,
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """The same probes on the same texts in several files of a model: {name: states}, the first one
    the reference.

    -> DataFrame by (file, layer): accuracy of the file's own probe, with low and high; moved, the
    accuracy of the reference's probe on this file's states: what a reader of the reference still
    reads; lost, the reference's accuracy minus the file's own, with lost_low and lost_high (paired,
    bootstrap over groups). Arguments and errors as `by_layer`."""
    finite("strength", strength, 1e-12, error=ProbeError)
    if not isinstance(states, Mapping):
        raise ProbeError(f"States of files are {{name: states}}, not {type(states).__name__}.")
    names, parts = list(states), list(states.values())
    if not parts:
        raise ProbeError("There are no states: give those of one file at least, {name: states}.")
    task = Task(labels, groups, folds, seed, _texts(parts[0]))
    for part in parts:
        task.check(part)
        if list(part.layer.values) != list(parts[0].layer.values):
            raise ProbeError("The files' states are not of the same layers.")
        if dict(part.sizes) != dict(parts[0].sizes):
            raise ProbeError(
                f"The files' states are {dict(parts[0].sizes)} and {dict(part.sizes)}: they are not of one model."
            )
    rows = []
    for layer, values in _layers(parts[0], progress):
        others = [_values(part.sel(layer=layer)) for part in parts[1:]]
        first, *moved = task.tested(values, task.codes, strength, backend, others)
        for name, own, there in zip(names, [values, *others], [first, *moved]):
            right = first if own is values else task.tested(own, task.codes, strength, backend)[0]
            lost = first.astype(float) - right
            row = dict(file=name, layer=layer, accuracy=right.mean(), **task.interval(right))
            row |= dict(moved=there.mean(), lost=lost.mean())
            rows.append(row | {f"lost_{end}": v for end, v in task.interval(lost).items()})
    return task.table(rows)


def _layers(states, progress):
    from tqdm.auto import tqdm

    for layer in tqdm(states.layer.values.tolist(), desc="probes", disable=not progress):
        yield layer, _values(states.sel(layer=layer))


def _texts(states):
    """The texts that states are of, where they say so: None else. ProbeError for no states."""
    if type(states).__name__ != "DataArray":
        raise ProbeError(
            f"States are a DataArray (text, layer, embd), not {type(states).__name__}: collect(...).hidden."
        )
    return states["text"].values if "text" in states.coords else None


def _values(states):
    return measured(states.transpose("text", ...), np.float64).reshape(states.sizes["text"], -1)


def _coded(what, values, sort=False):
    """(codes, -1 for what is missing; names) of one value per text."""
    values = np.asarray(values)
    if values.ndim != 1:
        raise ProbeError(f"{what} are one value per text, (text,), not {values.shape}.")
    return pd.factorize(values, sort=sort)


class Task:
    """Labels, their groups, and how texts are parted for testing."""

    def __init__(self, labels, groups, folds, seed, texts=None):
        with uninterrupted():
            from sklearn.model_selection import StratifiedGroupKFold

        whole("folds", folds, 2, error=ProbeError)
        seed = whole("seed", seed, 0, error=ProbeError)
        self.codes, self.names = _coded("labels", labels, sort=True)
        n = len(self.codes)
        texts = texts if texts is not None and len(texts) == n else np.arange(n)
        self.groups = _coded("groups", texts if groups is None else groups)[0]
        if len(self.groups) != n:
            raise ProbeError(f"There are {n} labels and {len(self.groups)} groups.")
        if (self.groups < 0).any():
            raise ProbeError(f"The group of text {np.argmin(self.groups)} is missing.")
        split = pd.Series(self.groups).groupby(_coded("texts", texts)[0]).transform("nunique") > 1
        if split.any():
            raise ProbeError(
                f"Text {split.argmax()} is there again in another group, and a probe would be tested on what "
                "it was made from: leave duplicates out, or give equal texts one group."
            )
        if len(self.names) < 2 or (self.codes < 0).any():
            raise ProbeError(
                f"A probe needs two kinds of labels, and none missing: {self.names!r:.80}."
            )
        each = [len(set(self.groups[self.codes == code])) for code in range(len(self.names))]
        if min(each) < folds:
            raise ProbeError(
                f"{folds} folds need that many groups of every label: {self.names[np.argmin(each)]!s:.80} has "
                f"{min(each)}. Give more texts, or fewer folds (two or more)."
            )
        self._rng = np.random.default_rng(seed)
        parts = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        split = parts.split(self.codes, self.codes, self.groups)
        self.parts = [(made, tested) for made, tested in split if len(tested)]
        draws = self._rng.integers(0, self.groups.max() + 1, (DRAWS, self.groups.max() + 1))
        self._draws = np.stack([np.bincount(d, minlength=draws.shape[1]) for d in draws])

    def check(self, states):
        there = states.sizes.get("layer") and states.sizes.get("text") == len(self.codes)
        if not there:
            raise ProbeError(
                f"States are (text, layer, embd) of {len(self.codes)} texts, not {dict(states.sizes)}: "
                "collect them with pool='last', 'mean' or 'max'."
            )

    def shuffled(self):
        """Codes without meaning: each group's own shuffled where no group tells anything of them,
        or one per group where that is all."""
        counts = pd.crosstab(self.groups, self.codes).to_numpy()  # (group, code)
        if ((counts > 0).sum(axis=1) == 1).all():
            return self._rng.permutation(counts.argmax(axis=1))[self.groups]
        if not (counts * len(self.codes) == np.outer(counts.sum(1), counts.sum(0))).all():
            return self._rng.permutation(self.codes)
        codes = self.codes.copy()
        for group in range(len(counts)):
            here = np.flatnonzero(self.groups == group)
            codes[here] = self._rng.permutation(codes[here])
        return codes

    def tested(self, values, codes, strength, backend, others=()):
        """Whether each text was told right, (text,), of these values and of others, by the probes
        of these values."""
        backend = backend or get_backend("cpu")
        right = [np.zeros(len(codes), bool) for _ in (values, *others)]
        for made, tested in self.parts:
            if len(set(codes[made])) < 2:  # shuffled into one kind
                told = [np.full(len(tested), codes[made][0])] * len(right)
            else:
                rows = [part[tested] for part in (values, *others)]
                told = backend.classify(values[made], codes[made], rows, strength)
            for found, guess in zip(right, told):
                found[tested] = guess == codes[tested]
        return right

    def interval(self, values):
        """{low, high}: 95% percentile bootstrap of the mean over texts, groups drawn whole."""
        sums, sizes = np.bincount(self.groups, values), np.bincount(self.groups)
        means = (self._draws @ sums) / (self._draws @ sizes)
        low, high = middle(means)
        return {"low": low, "high": high}

    def table(self, rows):
        keys = [key for key in ("file", "layer") if key in rows[0]]
        table = pd.DataFrame(rows).set_index(keys)
        table["majority"] = np.bincount(self.codes).max() / len(self.codes)
        groups = int(self.groups.max()) + 1
        table.attrs |= {
            "n": len(self.codes),
            "groups": groups,
            "labels": list(map(str, self.names)),
        }
        return table
