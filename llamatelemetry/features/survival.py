"""What of each feature is left in another file: its activation in both, token by token."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from ..errors import FeatureError
from ..maths import ratio
from .encoder import Features

MIN_ACTIVE = 10  # rows: a correlation of fewer says nothing
NOISE = 1e-10  # of sums of squares that cancel
CONTROL = "the reference, computed another way"


def survival(
    features: Features,
    reference: np.ndarray,
    others: Mapping[str, np.ndarray],
    control: np.ndarray | None = None,
    *,
    min_active: int = MIN_ACTIVE,
    backend: Any = None,
) -> pd.DataFrame:
    """Pearson's correlation of each feature's activation between a reference and other files.

    reference: states at the hook, (row, n_in); others: {name: states of the same rows}; control:
    states of the reference computed another way (keys and values kept in 32 bits, other batches):
    what rounding in the runtime alone changes. Only features that are active in `min_active` rows
    of the reference or more, and not always alike, are kept. Returns one row per feature, by
    number: active (rows of the reference), mean (its activation there), one column of correlations
    per file, and CONTROL where it is given; NaN where the other file never activates the feature,
    or always alike. Raises FeatureError for rows that do not match, NotFiniteError for states that
    are no numbers."""
    reference = np.asarray(reference, np.float32)
    runs = dict(others) | ({} if control is None else {CONTROL: control})
    for name, states in runs.items():
        if np.shape(states) != reference.shape:
            raise FeatureError(
                f"The states of {name} are {np.shape(states)} and the reference's {reference.shape}: "
                "they must be of the same tokens."
            )
    names, rows, n = list(runs), len(reference), features.n_features
    count, total = np.zeros(n), np.zeros((len(runs) + 1, n))  # of the reference, and of each run
    squares, products = np.zeros_like(total), np.zeros_like(total)
    for _, blocks in features.encoded([reference, *runs.values()], backend):
        first = blocks[0].astype(np.float64)
        count += (first > 0).sum(0)
        for number, block in enumerate(blocks):
            active = block.astype(np.float64)
            total[number] += active.sum(0)
            squares[number] += (active**2).sum(0)
            products[number] += (active * first).sum(0)
    spread = np.maximum(squares - total**2 / rows, 0)
    kept = np.flatnonzero((count >= min_active) & (spread[0] > NOISE * squares[0]))
    table = pd.DataFrame(
        {"active": count[kept], "mean": total[0, kept] / np.maximum(count[kept], 1)}
    )
    table.index = pd.Index(kept, name="feature")
    table.attrs["control"] = CONTROL
    for number, name in enumerate(names, start=1):
        covariance = products[number] - total[0] * total[number] / rows
        noise = NOISE * np.sqrt(squares[0] * squares[number])  # sums of that size cancel to this
        found = ratio(covariance, np.sqrt(spread[0] * spread[number]), noise)
        table[name] = np.clip(found, -1, 1)[kept]
    return table
