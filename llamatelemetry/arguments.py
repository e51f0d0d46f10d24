"""What is asked for, checked where it is asked: a wrong value would be rounded, cut or ignored farther inside."""

import math

import numpy as np

from .errors import OptionError


def whole(name, value, least=None, most=None, *, error=OptionError, none=False):
    """`value` as an int; `error`, a class, where it is no whole number from `least` to `most`. none: or None."""
    if none and value is None:
        return None
    number = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if number and (least is None or value >= least) and (most is None or value <= most):
        return int(value)
    ends = "" if least is None else f", {least} or more" if most is None else f" from {least:,} to {most:,}"
    raise error(f"{name}={value!r}: it is {'None or ' if none else ''}a whole number{ends}.")


def finite(name, value, least=-math.inf, *, error=OptionError):
    """`value` as a float; `error` where it is no number, not finite, or less than `least`."""
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if number and math.isfinite(value) and value >= least:
        return float(value)
    raise error(f"{name}={value!r}: it is a finite number{f', {least:g} or more' if math.isfinite(least) else ''}.")


def one_sequence(ids, error):
    """A list of token ids from a list or an array of them; `error` where they are not one sequence of whole numbers."""
    try:
        array = np.asarray(ids)
    except ValueError:  # lists of different lengths
        array = np.empty((0, 0))
    if array.ndim != 1 or array.size and array.dtype.kind not in "iu" or any(isinstance(one, bool) for one in ids):
        raise error(f"a prompt is a text, or one sequence of token ids (whole numbers); not {ids!r:.80}.")
    return array.tolist()
