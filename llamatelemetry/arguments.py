"""What is asked for, checked where it is asked: a wrong value would be rounded, cut or ignored
farther inside."""

import math
import os
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from .errors import CaptureError, OptionError, brief, shown

Error = type[Exception]


def whole(
    name: str,
    value: Any,
    least: int | None = None,
    most: int | None = None,
    *,
    error: Error = OptionError,
    none: bool = False,
) -> Any:
    """`value` as an int; `error`, a class, where it is no whole number from `least` to `most`.
    none: or None."""
    if none and value is None:
        return None
    number = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if number and (least is None or value >= least) and (most is None or value <= most):
        return int(value)
    ends = (
        ""
        if least is None
        else f", {least} or more"
        if most is None
        else f" from {least:,} to {most:,}"
    )
    raise error(f"{name}={value!r}: it is {'None or ' if none else ''}a whole number{ends}.")


def finite(name: str, value: Any, least: float = -math.inf, *, error: Error = OptionError) -> float:
    """`value` as a float; `error` where it is no number, not finite, or less than `least`."""
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if number and math.isfinite(value) and value >= least:
        return float(value)
    raise error(
        f"{name}={value!r}: it is a finite number{f', {least:g} or more' if math.isfinite(least) else ''}."
    )


def one_sequence(ids: Any, error: Error) -> list[int]:
    """A list of token ids from a list or an array of them; `error` where they are not one sequence
    of whole numbers."""
    try:
        array = np.asarray(ids)
    except ValueError:  # lists of different lengths
        array = np.empty((0, 0))
    if (
        array.ndim != 1
        or array.size
        and array.dtype.kind not in "iu"
        or any(isinstance(one, bool) for one in ids)
    ):
        raise error(
            f"a prompt is a text, or one sequence of token ids (whole numbers); not {brief(ids)}."
        )
    return [int(token) for token in array]


def writable(text: object, error: Error = CaptureError) -> str:
    """`text`, a str that UTF-8 can hold; `error` where it is none: half a character, as of a cut
    emoji, is no text."""
    if not isinstance(text, str):
        raise error(f"A text is a str, not {brief(text)}: read or decode it first.")
    try:
        text.encode()
    except UnicodeEncodeError as wrong:
        raise error(
            f"The text has half a character at position {wrong.start}, or a byte that is no UTF-8 "
            f"({text[wrong.start]!r}), which no model reads: take it out."
        ) from None
    return text


def prompt(given: Any, error: Error = CaptureError) -> str | list[int]:
    """A prompt as both processes take it: a str, or a list of token ids. Raises `error` for
    anything else, or none.

    given: a text, or one sequence of whole numbers (a list, an array, a column of engine.tokenize).
    """
    if isinstance(given, os.PathLike):
        raise error(
            f"{shown(given)!r} is a path, and a prompt is a text (str) or token ids: read the file "
            "(llamatelemetry.compare.texts.load_text does), or give the text as a str."
        )
    if isinstance(given, str):
        ids = writable(given, error)
    else:
        ids = one_sequence(given, error)
    if not ids:  # with a start token put before it, it would not look empty any more
        raise error("The prompt is empty: give a text, or at least one token.")
    return ids


def say_two_starts(ids: Sequence[int], start: int, piece: str) -> None:
    """Warn where a text's ids begin with the start token twice: written out in the text, and put
    there by the model."""
    if len(ids) > 1 and ids[0] == ids[1] == start:
        warnings.warn(
            f"The text begins with {piece!r}, and the model puts one before every text: it reads two start tokens. "
            "Leave it out of the text (a chat template may have written it), or give token ids.",
            stacklevel=4,
        )
