"""What an importance matrix says of a model's activations: the numbers that llama-imatrix
--show-statistics prints."""

import re
from pathlib import Path

import numpy as np
import pandas as pd

from ..errors import QuantizeError, shown
from ..maths import ratio
from .importance import SUMS, entries

COUNTS = ".counts"
SMALL = 1e-5  # a mean squared activation of at most that counts as not active


def statistics(path: str | Path) -> pd.DataFrame:
    """DataFrame by tensor of an importance matrix (GGUF): layer (NA outside the layers), tensor,
    and of its mean squared activations, one per input column (and expert): sum, min, max, mean,
    std, active (share above 1e-5), n, entropy (bits) of their shares and entropy_share (of the
    largest that n can have), zd (share more than one standard deviation above the mean), cosine
    with the same tensor of the layer before (0 where there is none).

    A high entropy_share says that all columns matter alike, and the matrix changes little; a low
    one that few columns carry most; NaN where there is no activation to share. By tensor, largest
    sum first, as llama-imatrix has it. Raises QuantizeError for what is no such file, also of the
    former format, and for one made from no text or with values that are no numbers."""
    import gguf

    entries(path)  # says what it is not
    try:
        tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    except ValueError as error:
        raise QuantizeError(
            f"{shown(path)} is an importance matrix of the former format, without counts: make one with "
            "imatrix(model, text, dst)."
        ) from error
    sums, rows = {}, []
    for name, values in tensors.items():
        if not name.endswith(SUMS):
            continue
        name = name.removesuffix(SUMS)
        counts = np.rint(np.ravel(tensors[name + COUNTS])).astype(float)  # (matrix,)
        sums[name] = values = np.reshape(values, (len(counts), -1)).astype(float)
        if not np.isfinite(values).all():
            raise QuantizeError(
                f"{shown(path)}: {name} holds values that are no numbers: make the matrix again with "
                "imatrix(model, text, dst)."
            )
        seen = values[counts > 0] / counts[counts > 0, None]
        if seen.size:
            layer = re.search(r"blk\.(\d+)\.", name)
            part = re.search(r"([^.]+)\.weight", name)
            row = dict(name=name, layer=int(layer[1]) if layer else None)
            rows.append(row | dict(tensor=part[1] if part else name, **_of(seen.ravel())))
    if not rows:
        raise QuantizeError(
            f"{shown(path)} was made from no text: make one with imatrix(model, text, dst)."
        )
    table = pd.DataFrame(rows).set_index("name").astype({"layer": "Int64"})
    table["cosine"] = [_cosine(name, sums) for name in table.index]
    return table.sort_values(["tensor", "sum"], ascending=[True, False])


def _of(values):
    total, mean = values.sum(), values.mean()
    std = np.sqrt(max(0.0, (values**2).mean() - mean**2))
    shares = values[values > 0] / total if total > 0 else values[:0]
    entropy = float((shares * -np.log2(shares)).sum())
    return dict(
        sum=total,
        min=values.min(),
        max=values.max(),
        mean=mean,
        std=std,
        active=float((np.abs(values) > SMALL).mean()),
        n=len(values),
        entropy=entropy,
        entropy_share=entropy / np.log2(len(values)) if len(values) > 1 and total > 0 else np.nan,
        zd=float((values > mean + std).mean()) if std > 0 else 0.0,
    )


def _cosine(name, sums):
    found = re.search(r"blk\.(\d+)\.", name)
    before = found and f"{name[: found.start(1)]}{int(found[1]) - 1}{name[found.end(1) :]}"
    if before not in sums:
        return 0.0
    one, other = sums[name].ravel(), sums[before].ravel()
    return float(ratio(one @ other, np.linalg.norm(one) * np.linalg.norm(other)))


def by_layer(table: pd.DataFrame) -> pd.DataFrame:
    """The same as means over each layer's tensors, weighted by their columns: DataFrame by layer:
    sum, zd, cosine. table: of statistics."""
    inside = table.dropna(subset="layer")
    weights = inside[["sum", "zd", "cosine"]].mul(inside["n"], axis=0).groupby(inside["layer"])
    return weights.sum().div(inside.groupby("layer")["n"].sum(), axis=0)
