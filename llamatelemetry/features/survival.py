"""What of each feature is left in another file: its activation in both, token by token."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from ..errors import FeatureError
from ..maths import ratio
from .encoder import Features

MIN_ACTIVE = 10  # rows: a correlation of fewer says nothing
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
    of the reference or more are kept. Returns one row per feature, by number: active (rows of the
    reference), mean (its activation there), one column of correlations per file, and CONTROL where
    it is given; NaN where the other file never activates the feature, or always alike. Raises
    FeatureError for rows that do not match."""
    reference = np.asarray(reference, np.float32)
    runs = dict(others) | ({} if control is None else {CONTROL: control})
    for name, states in runs.items():
        if np.shape(states) != reference.shape:
            raise FeatureError(
                f"The states of {name} are {np.shape(states)} and the reference's {reference.shape}: "
                "they must be of the same tokens."
            )
    count, total, squares = _sums(features, reference, None, backend)[:3]
    kept = np.flatnonzero(count >= min_active)
    table = pd.DataFrame({"active": count[kept], "mean": total[kept] / np.maximum(count[kept], 1)})
    table.index = pd.Index(kept, name="feature")
    table.attrs["control"] = CONTROL
    rows = len(reference)
    for name, states in runs.items():
        _, other, other_squares, products = _sums(features, reference, np.asarray(states), backend)
        covariance = products - total * other / rows
        spread = np.maximum(squares - total**2 / rows, 0) * np.maximum(
            other_squares - other**2 / rows, 0
        )
        noise = 1e-10 * np.sqrt(squares * other_squares)  # sums of that size cancel to this
        table[name] = np.clip(ratio(covariance, np.sqrt(spread), noise), -1, 1)[kept]
    return table


def _sums(features, reference, other, backend):
    """Per feature: rows where it is active, sum and sum of squares of one run, sum of products with
    the reference's. The run is `other`, or the reference itself (then without products)."""
    n = features.n_features
    count, total, squares, products = (np.zeros(n) for _ in range(4))
    run = features.encoded(reference if other is None else other, backend)
    for start, active in run:
        active = active.astype(np.float64)
        count += (active > 0).sum(0)
        total += active.sum(0)
        squares += (active**2).sum(0)
        if other is not None:
            first = np.concatenate(
                [
                    block
                    for _, block in features.encoded(
                        reference[start : start + len(active)], backend
                    )
                ]
            )
            products += (active * first).sum(0)
    return count, total, squares, products
