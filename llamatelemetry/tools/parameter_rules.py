"""What a notebook's parameter may be.

A rule takes (value, model, values of the notebook) and returns None, or what is expected in place
of the value."""

import math
import numbers
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import LlamaTelemetryError
from ..files.gguf import GGUFFile
from ..files.models import resolve_model
from ..files.registry import TYPES

Rule = Callable[[Any, GGUFFile | None, Mapping[str, Any]], str | None]
# umap-learn's and cuML's, of floats
METRICS = ("cosine", "correlation", "euclidean", "manhattan", "chebyshev", "canberra")
VOCABULARY = ("n_vocab", "pieces")
SHAPE = ("architecture", "n_layer", "n_head", "n_kv_head", "n_embd")


def _rule(fits: Callable[[Any], Any], expected: str) -> Rule:
    return lambda value, model, values: None if fits(value) else expected


def _is_text(value):
    return isinstance(value, str) and value.strip()


def _is_file(value):
    return isinstance(value, str | os.PathLike) and os.fspath(value).strip()


text = _rule(_is_text, "a text that is not empty is expected")
file = _rule(_is_file, "the name or the file of a model is expected")
place = _rule(_is_file, "a folder, or OWNER/NAME/FOLDER on the hub, is expected")
flag = _rule(lambda value: isinstance(value, bool), "True or False is expected")


def passage(value, model, values):
    """A text that is not empty, or where it lies, as texts.load_text takes it."""
    return None if isinstance(value, os.PathLike) else text(value, model, values)


def optional(rule: Rule) -> Rule:
    """None, or what `rule` allows."""

    def check(value, model, values):
        wrong = None if value is None else rule(value, model, values)
        return wrong and f"{wrong.rstrip('.')} (or None)"

    return check


def whole(least: int, most: int | str | None = None) -> Rule:
    """A whole number from `least` to `most`: a number, the name of a fact of the model, or None for
    no limit."""

    def check(value, model, values):
        last = getattr(model, most) or None if isinstance(most, str) else most
        fits = _is(value, numbers.Integral) and least <= value <= (last or math.inf)
        of_model = f" ({most} of the model)" if isinstance(most, str) else ""
        return None if fits else f"a whole number {_range(least, last)}{of_model} is expected"

    return check


def number(least: float, most: float | None = None) -> Rule:
    """A finite number from `least` to `most`."""

    def fits(value):
        top = math.inf if most is None else most
        return _is(value, numbers.Real) and least <= value <= top and value < math.inf

    return _rule(fits, f"a number {_range(least, most)} is expected")


def index(count: str, what: str) -> Rule:
    """A layer or head of the model. count: name of the model's fact; what: the plural."""

    def check(value, model, values):
        n = getattr(model, count)
        if _is(value, numbers.Integral) and 0 <= value < n:
            return None
        return f"the model has {n} {what}, 0 to {n - 1}"

    return check


def one_of(choices: Sequence[str]) -> Rule:
    """One of these texts."""
    expected = f"one of {', '.join(map(repr, choices))} is expected"
    return _rule(lambda value: isinstance(value, str) and value in choices, expected)


def some_of(choices: Sequence[str]) -> Rule:
    """A list of one or more of these texts, none of them twice."""
    one, no_list = one_of(choices), f"a list with one of {', '.join(map(repr, choices))} or more"

    def check(value, model, values):
        if not isinstance(value, list | tuple) or not value:
            return f"{no_list} is expected"
        for item in value:
            if wrong := one(item, model, values):
                return f"{wrong} in place of {item!r}"
        return _no_twins(value)

    return check


def texts(reserved: Sequence[str] = ()) -> Rule:
    """A dict of lists of texts, none of them empty. reserved: names that its keys must not have."""

    def check(value, model, values):
        if not isinstance(value, dict) or not value:
            return "a dict {kind: [text, ...]} is expected"
        for kind, group in value.items():
            if not isinstance(kind, str) or kind in reserved:
                return f"{kind!r} cannot be the name of a kind (reserved: {', '.join(reserved)})"
            if not isinstance(group, list | tuple) or not group or not all(map(_is_text, group)):
                return f"a list of one or more texts, none of them empty, is expected for {kind!r}"
        return None

    return check


def quantization(value, model, values):
    """A type that llama-quantize makes."""
    kind = str(value).upper()
    if kind not in TYPES:
        return f"a type that llama-quantize makes is expected: {', '.join(TYPES)}"
    if kind.startswith(("IQ1", "IQ2", "IQ3", "Q2_K_S")) and not values.get("IMATRIX"):
        from ..convert.quantize import needs_imatrix

        if needs_imatrix(model.path, kind):
            return (
                f"{kind} of this model needs an importance matrix (IMATRIX = True in notebook 16)"
            )
    return None


def same_model(value, model, values, facts=SHAPE + VOCABULARY):
    """A file of the same model in another precision: its vocabulary, architecture and shape are
    MODEL's."""
    if wrong := file(value, model, values):
        return wrong
    try:
        other = GGUFFile(resolve_model(value))
    except LlamaTelemetryError as error:
        return str(error)
    return differences(model, other, facts)


def same_vocabulary(value, model, values):
    """A file that reads the same tokens: MODEL's vocabulary, whatever its shape."""
    return same_model(value, model, values, VOCABULARY)


def differences(
    model: GGUFFile, other: GGUFFile, facts: Sequence[str] = SHAPE + VOCABULARY
) -> str | None:
    """Why `other` is not comparable with `model` (two GGUFFiles), None where it is.

    facts: what must be equal. VOCABULARY where predictions over the same tokens are compared, SHAPE
    too where states, heads or matrices are."""
    own, others = ({fact: getattr(file, fact) for fact in facts} for file in (model, other))
    apart = [fact for fact in facts if fact != "pieces" and own[fact] != others[fact]]
    if apart:
        said = ", ".join(f"{fact} {others[fact]} instead of {own[fact]}" for fact in apart)
        what = "is not another precision of MODEL"
        if apart == ["n_vocab"]:
            what = "has another vocabulary than MODEL"
        return f"{other.path.name} {what}: {said}"
    if "pieces" in facts and list(model.pieces) != list(other.pieces):
        pairs = enumerate(zip(model.pieces, other.pieces))
        odd = (f" (token {i} is {b!r} instead of {a!r})" for i, (a, b) in pairs if a != b)
        return (
            f"{other.path.name} has another vocabulary than MODEL: the same text would be other "
            f"tokens{next(odd, '')}"
        )
    return None


def candidates(value, model, values):
    """A list of types to make, and of files and names of the same model."""
    if not isinstance(value, list | tuple) or not value:
        return "a list of one or more types or files is expected"
    for item in value:
        if str(item).upper() in TYPES:
            wrong = quantization(item, model, values)
        elif wrong := same_model(item, model, values):
            wrong = f"{item!r} is no type of llama-quantize, and as a file: {wrong}"
        if wrong:
            return wrong
    return _no_twins(value)


def cache_types(value, model, values):
    """A list of pairs of types for keys and values: "q8_0/q4_0"."""
    from ..compare.ways import pairs

    if not isinstance(value, list | tuple) or not all(isinstance(pair, str) for pair in value):
        return 'a list of pairs such as "q8_0/q4_0" is expected'
    try:
        pairs(value)
    except LlamaTelemetryError as error:
        return str(error)
    return _no_twins(value)


def start_of_candidate(value, model, values):
    """The beginning of the name of one of QUANTIZATIONS, or of those that None stands for."""
    from ..convert.reckoning import LADDER

    given = LADDER if values["QUANTIZATIONS"] is None else values["QUANTIZATIONS"]
    names = [name for item in given for name in (str(item), Path(str(item)).stem)]
    if isinstance(value, str) and value and any(name.startswith(value) for name in names):
        return None
    return f"none of QUANTIZATIONS begins so: {', '.join(map(str, given))}"


def backend(value, model, values):
    """Where the analytics run; "gpu" insists on RAPIDS and a GPU."""
    wrong = one_of(("auto", "gpu", "cpu"))(value, model, values)
    if wrong or value != "gpu":
        return wrong
    from ..backend import get_backend

    try:
        get_backend("gpu")
    except LlamaTelemetryError as error:
        return str(error)
    return None


def folder(value, model, values):
    """A folder to write to, which need not exist yet."""
    if not isinstance(value, str | os.PathLike) or not str(value).strip():
        return "the name of a folder is expected"
    path = Path(value).absolute()
    try:
        there = next(place for place in (path, *path.parents) if place.exists())
    except OSError as error:  # a name that is too long, a folder that must not be looked into
        return str(error)
    if not there.is_dir():
        return f"a folder is expected, and {there} is a file"
    return None if os.access(there, os.W_OK | os.X_OK) else f"nothing can be written in {there}"


def _is(value, kind):
    return isinstance(value, kind) and not isinstance(value, bool)


def _range(least, most):
    return f"from {least} to {most}" if most is not None else f"of {least} or more"


def _no_twins(value):
    return None if len(set(value)) == len(value) else "a list that names none twice is expected"
