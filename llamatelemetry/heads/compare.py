"""The profile of the same heads in two precisions of a model: which behaviours survive."""

import numpy as np
import pandas as pd

from ..maths import rank_correlation
from .profile import LABELS


def compare_profiles(one, other, earned, other_earned):
    """Per measure: DataFrame (spearman, mean_change, largest_change, head, inside, labels, kept,
    lost, gained).

    one, other: profiles (measure, layer, head) over the same texts; earned, other_earned: their
    labels. spearman: of the heads' scores; mean_change: mean absolute difference; head: the one
    that moved most; inside: share of heads whose other score lies in the first one's interval;
    labels: heads that have it in the first profile."""
    rows = {}
    for name in [
        name for name in one["measure"].values if name in other["measure"].values and name != "mass"
    ]:
        a, b = (part["value"].sel(measure=name).values.reshape(-1) for part in (one, other))
        keep = np.isfinite(a) & np.isfinite(b)
        if not keep.any():
            continue
        change = np.where(keep, np.abs(a - b), -1)
        layer, head = np.unravel_index(change.argmax(), (one.sizes["layer"], one.sizes["head"]))
        low, high = (
            one[side].sel(measure=name).values.reshape(-1)[keep] for side in ("low", "high")
        )
        row = {
            "spearman": rank_correlation(a, b),
            "mean_change": float(change[keep].mean()),
            "largest_change": float(change.max()),
            "head": f"L{int(one['layer'][layer])}H{head}",
            "inside": float(((b[keep] >= low) & (b[keep] <= high)).mean())
            if np.isfinite(low).all()
            else np.nan,
        }
        if (
            name in LABELS
            and name in earned["label"].values
            and name in other_earned["label"].values
        ):
            had, has = earned.sel(label=name).values, other_earned.sel(label=name).values
            row |= {
                "labels": int(had.sum()),
                "kept": int((had & has).sum()),
                "lost": int((had & ~has).sum()),
                "gained": int((~had & has).sum()),
            }
        rows[str(name)] = row
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("measure")
