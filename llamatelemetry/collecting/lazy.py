"""Collected states as an array that is read where it is looked at."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ..capture.finite import MISSING
from ..imports import uninterrupted


def make_lazy(
    column: Callable[[int, int | None], np.ndarray], starts: np.ndarray, part: dict, layers
) -> Any:
    """One stage of all blocks as xarray's backends give an array: it reads what is asked for.

    column(block, layer) gives a block's numbers, one after another; starts: the first row of each
    block, and the end; part: the stage's layers, a row's shape and dtype."""
    with uninterrupted():
        from xarray.backends import BackendArray
        from xarray.core import indexing

    class Blocks(BackendArray):
        dtype = np.dtype(part["dtype"])
        shape = (int(starts[-1]), *([len(layers)] if layers is not None else []), *part["shape"])

        def __getitem__(self, key):
            outer = indexing.IndexingSupport.OUTER
            return indexing.explicit_indexing_adapter(key, self.shape, outer, self.read)

        def read(self, key):
            numbers = np.atleast_1d(np.arange(self.shape[0])[key[0]])
            axes = 1 if layers is None else 2
            wanted = [None] if layers is None else np.atleast_1d(np.array(layers)[key[1]])
            empty = MISSING if self.dtype.kind == "f" else -1
            out = np.full((len(numbers), len(wanted), *part["shape"]), empty, self.dtype)
            at = np.searchsorted(starts, numbers, "right") - 1
            for number in np.unique(at):
                rows = at == number
                inside = numbers[rows] - starts[number]
                for place, layer in enumerate(wanted):
                    if layer is None or layer in part["layers"]:
                        values = column(number, layer)
                        out[rows, place] = values.reshape(-1, *part["shape"])[inside]
            for axis, some in enumerate(key[axes:], 2):
                out = out[(*[slice(None)] * axis, np.atleast_1d(np.arange(out.shape[axis])[some]))]
            single = [np.ndim(some) == 0 and not isinstance(some, slice) for some in key]
            single = [single[0], layers is None or single[1], *single[axes:]]
            return out[tuple(0 if one else slice(None) for one in single)]

    return Blocks()
