"""What the sentences under figures are made of: lists, spans, counts, quoted pieces, and what to
say where there is not enough to say."""

import functools
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ParamSpec

import numpy as np

from .text import counted, quoted, shorten

__all__ = ["counted", "listed", "quoted", "sentence", "sentence_by_name", "shorten", "some", "span"]

Arguments = ParamSpec("Arguments")
WIDTH = 100  # no viewer then breaks a line within a word or a number


def sentence(function: Callable[Arguments, str]) -> Callable[Arguments, str]:
    """Wrap what a function says at 100 columns; blanks at its seams become one."""

    @functools.wraps(function)
    def said(*args: Arguments.args, **kwargs: Arguments.kwargs) -> str:
        text = " ".join(function(*args, **kwargs).split())
        return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)

    return said


def sentence_by_name(function: Callable[..., str]) -> Callable[[Mapping], str]:
    """Of a function that says something of one table, one that says it of each: "a: ...; b: ..."
    from {name: table}."""

    @sentence
    @functools.wraps(function)
    def said(tables: Mapping) -> str:
        return "; ".join(f"{name}: {function(table)}" for name, table in tables.items()) + "."

    return said


def listed(words: Iterable, most: int | None = None) -> str:
    """ "a, b and c"; "none" for nothing; with `most`, "a, b and 3 more"."""
    words = [str(word) for word in words]
    if most is not None and len(words) > most:
        words = [*words[:most], f"{len(words) - most} more"]
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]])) or "none"


def span(name: str, numbers: Sequence[int]) -> str:
    """The first and the last of some numbers: "layer 3", "layers 3 to 5"."""
    low, high = min(numbers), max(numbers)
    return f"{name} {low}" if low == high else f"{name}s {low} to {high}"


def some(value: float, text: str, otherwise: str = "not to be had") -> str:
    """`text` formatted with a value that is a number, else what is said instead:
    some(0.5, "{:.0%}")."""
    return text.format(value) if np.isfinite(value) else otherwise
