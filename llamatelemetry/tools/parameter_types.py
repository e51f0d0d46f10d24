"""What a notebook's `parameters` cell takes: names and types from its own defaults, and values made
to fit them.

The type of `NAME = default` is the default's, that of `NAME: int | None = None` is the annotation.
Nothing else is guessed: a text stays a text, whatever it looks like."""

import ast
import difflib
import json
import math
import numbers
import os
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from ..compare.tasks import HUB
from ..compare.texts import place
from ..errors import LlamaTelemetryError, ParameterError, brief
from ..files.models import from_here
from ..files.outputs import path_of
from ..files.registry import TYPES
from ..views.light import IRIS, without

FILES = ("MODEL", "REFERENCE_MODEL", "OTHER_MODEL", "QUANTIZATIONS")  # names and files of models
_NAMES = {kind.__name__: kind for kind in (str, int, float, bool, list, dict)}
_WORDS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    list: "a list",
    dict: "a dict",
    type(None): "None",
}
_SEVERAL = {
    str: "texts",
    int: "whole numbers",
    float: "numbers",
    bool: "True or False",
    list: "lists",
    dict: "dicts",
}


def fit(
    notebook: str | os.PathLike, values: Mapping[str, Any] | None, typed: bool = False
) -> dict[str, Any]:
    """`values` as the notebook's parameters: {name: value}, of the types that its `parameters` cell
    declares.

    notebook: path of the .ipynb. typed: the values are texts as typed in a shell, `3`, `true`,
    `["a", "b"]`; else they are Python's. One text where a list of them belongs becomes a list of
    one; `None` is None where that is allowed. Raises ParameterError for a name that the notebook
    has not got (with the nearest), and for a value that does not fit."""
    if not values:
        return {}
    path = Path(notebook)
    try:
        kinds = declared(parameters_cell(path))
    except SyntaxError as error:
        raise ParameterError(
            f"The parameters cell of {path.name} is no plain Python: {error}."
        ) from None
    for name in values:
        if name not in kinds:
            near = difflib.get_close_matches(str(name).upper(), kinds, 1, cutoff=0.5)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ParameterError(
                f"{path.name} has no parameter {name}: {hint}It has {', '.join(kinds) or 'none'}."
            )
    return {
        name: _fitted(name, value, kinds[name], typed, path.name) for name, value in values.items()
    }


def parameters_cell(path: str | os.PathLike) -> str:
    """The source of the cell tagged `parameters`, "" where a notebook has none."""
    with without(IRIS):
        import nbformat

    cells = nbformat.read(path, as_version=4).cells
    return next(
        (cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])), ""
    )


def declared(source: str) -> dict[str, Any]:
    """{name: type} of a parameters cell: str, int, list[str], int | None, ...; None where neither
    an annotation nor the default says it (a bare None, or something computed)."""
    kinds = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            kinds[node.target.id] = _annotated(node.annotation)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    kinds[target.id] = _of(node.value)
                elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = zip(target.elts, node.value.elts)
                    kinds |= {
                        name.id: _of(value) for name, value in pairs if isinstance(name, ast.Name)
                    }
    return kinds


def words(kind, names=_WORDS):
    """A type in words: "a whole number or None", "a dict of lists of texts"."""
    if isinstance(kind, types.UnionType):
        return " or ".join(words(one, names) for one in get_args(kind))
    of = f" of {words(get_args(kind)[-1], _SEVERAL)}" if get_args(kind) else ""
    return names[get_origin(kind) or kind] + of


def _annotated(node):
    try:
        # An expression of type names, no code
        return eval(ast.unparse(node), {"__builtins__": {}}, _NAMES)
    except Exception:  # a name of the notebook's own
        return None


def _of(node):
    """The type of a default, None where it has none of its own."""
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError):
        return None
    inner = (
        {type(item) for item in (value.values() if isinstance(value, dict) else value)}
        if isinstance(value, list | tuple | dict)
        else set()
    )
    if isinstance(value, list | tuple):
        return list[inner.pop()] if inner in ({str}, {int}, {float}, {bool}) else list
    return type(value) if type(value) in _NAMES.values() else None


def _fitted(name, value, kind, typed, notebook):
    if kind is None:
        if typed:
            raise ParameterError(
                f"{name}: its default in {notebook} does not say what it takes. Annotate it in the "
                f"parameters cell, as in `{name}: int | None = None`."
            )
        return value
    said = brief(value)
    try:
        value = _as(value, kind, typed)
        value = _from_here(name, value)
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:  # a file name that is no UTF-8
        raise ParameterError(
            f"{name} = {said}: a notebook is written in UTF-8 and cannot hold this text. Give a link to "
            "that file under another name."
        ) from None
    except LlamaTelemetryError as error:
        raise ParameterError(f"{name} = {said}: {error}") from error
    except (ValueError, OverflowError):
        raise ParameterError(f"{name} = {said}: {words(kind)} is expected by {notebook}.") from None
    return value


def _from_here(name, value):
    """The value of a parameter that names files, relative paths made absolute: a notebook runs in
    another folder."""
    if isinstance(value, list):
        return [_from_here(name, item) for item in value]
    if not isinstance(value, str) or not value.strip() or value.upper() in TYPES:
        return value
    if name in FILES:
        return from_here(value)
    if name == "FEATURES":  # a folder, or where they lie on the hub
        return str(path_of(value)) if path_of(value).is_dir() else value
    if name == "TASKS":  # as load_tasks takes it
        return value if value in HUB else str(place(Path(value)))
    return str(place(value) or value) if name == "TEXT" else value


def _as(value, kind, typed):
    """`value` as `kind`; ValueError where it does not fit. typed: it is a text from a shell."""
    if isinstance(kind, types.UnionType):
        return _as_one_of(value, get_args(kind), typed)
    outer, inner = get_origin(kind) or kind, get_args(kind)
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        value = value.item()  # a NumPy scalar
    if outer is str and isinstance(value, os.PathLike):
        return str(path_of(value))
    if outer is str and isinstance(value, str):
        return value
    if typed:
        value = _read(value, outer)
    if outer is list:
        several = isinstance(value, list | tuple)
        items = list(value) if several else [value]
        return [_as(item, inner[0], typed and not several) for item in items] if inner else items
    if outer is dict and isinstance(value, dict):
        return {key: _as(item, inner[-1], False) for key, item in value.items()} if inner else value
    if outer is bool and isinstance(value, bool):
        return value
    if outer is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if (
        outer is float
        and isinstance(value, numbers.Real)
        and not isinstance(value, bool)
        and math.isfinite(value)
    ):
        return float(value)
    raise ValueError(value)


def _as_one_of(value, kinds, typed):
    if type(None) in kinds and (value is None or (typed and value == "None")):
        return None
    for kind in kinds:
        if kind is not type(None):
            try:
                return _as(value, kind, typed)
            except ValueError:
                pass
    raise ValueError(value)


def _read(text, kind):
    """What a text from a shell says, for a parameter that is no text; the text itself where it says
    nothing of that."""
    text = text.strip()
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if kind is int:
        return int(text) if re.fullmatch(r"[+-]?\d+", text, re.ASCII) else text
    if kind is float:
        return float(text)
    if text.startswith("[" if kind is list else "{"):
        for read in (json.loads, ast.literal_eval):
            try:
                return read(text)
            except (ValueError, SyntaxError):
                pass
        raise ValueError(text)
    return text
