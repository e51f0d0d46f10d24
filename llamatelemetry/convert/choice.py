"""The mixture of least divergence within a size: which type each group of tensors gets. Pure
functions on tables."""

import re
from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf import GGUF_DEFAULT_ALIGNMENT as ALIGNED

from ..errors import QuantizeError
from ..imports import uninterrupted
from .chunks import NEVER

BASE = "Q8_0"  # the type that all others are measured from; it fits every row of 32
# A k-quant packs 256 weights of a row. Where a row is no multiple of that, what llama-quantize
# takes in its place.
INSTEAD = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
TYPES = ("Q4_K", "Q5_K", "Q6_K", "Q3_K")  # what is left out first comes last
OUTPUTS = ("embedding", "output")  # one group: often the same matrix


def groups(tensors: pd.DataFrame) -> pd.Series:
    """The group of each matrix that could have another type: Series by tensor name. The embedding
    and the output are one.

    tensors: GGUFFile.tensors of a file that is all BASE; what is not of BASE there, stays."""
    mine = tensors[(tensors["type"] == BASE) & (tensors["shape"].map(len) > 1)]
    return mine["group"].where(~mine["group"].isin(OUTPUTS), "embedding, output")


def fitting(kind: str, width: int) -> str:
    """The type that rows of so many weights can have: `kind`, or what stands for it."""
    return kind if width % block(kind)[0] == 0 else INSTEAD.get(kind, BASE)


def block(kind: str) -> tuple[int, int]:
    """Weights and bytes of a block of a type. QuantizeError for a name that is none."""
    if kind not in GGMLQuantizationType.__members__ or kind in NEVER:
        raise QuantizeError(f"{kind!r} is no type of a tensor: {', '.join(TYPES)}, {BASE}, ...")
    return GGML_QUANT_SIZES[GGMLQuantizationType[kind]]


def options(tensors: pd.DataFrame, types: Iterable[str] = TYPES) -> pd.DataFrame:
    """What each group could be: DataFrame of group, type (as asked), inside (the types that its
    matrices get: "Q4_0", or several), bytes, tensors ({name: type}). BASE is always among them; one
    that comes out as another that is there is left out."""
    rows, own = [], groups(tensors)
    for group in own.unique():
        names, seen = own.index[own == group], []
        for kind in dict.fromkeys([*types, BASE]):
            given = {name: fitting(kind, tensors["shape"][name][-1]) for name in names}
            # Another type only by its name, or one that is no smaller than BASE
            size = sum(_bytes(tensors["n_elements"][name], one) for name, one in given.items())
            if given in seen or kind != BASE and set(given.values()) == {BASE}:
                continue
            seen.append(given)
            inside = ", ".join(sorted(set(given.values())))
            rows.append((group, kind, inside, size, given))
    return pd.DataFrame(rows, columns=["group", "type", "inside", "bytes", "tensors"])


def _bytes(n, kind):
    """Of a tensor in a file, where the next one begins at a multiple of GGUF's alignment."""
    weights, size = block(kind)
    return -(-(int(n) // weights * size) // ALIGNED) * ALIGNED


def least(costs: pd.DataFrame, budget: float) -> pd.DataFrame:
    """The rows, one for each group, whose sum of `cost` is least with a sum of `bytes` of at most
    `budget`: an integer program, solved exactly (HiGHS, by scipy.optimize.milp).

    costs: options() with a column cost. QuantizeError where even the smallest types are larger."""
    with uninterrupted():
        from scipy.optimize import Bounds, LinearConstraint, milp

    if not np.isfinite(costs["cost"]).all():
        raise QuantizeError("A cost is no number: leave its row out, it was not measured.")
    smallest = costs.groupby("group")["bytes"].min().sum()
    if smallest > budget:
        raise QuantizeError(
            f"The matrices have {smallest:,} bytes at the smallest of these types, and {budget:,.0f} are left "
            "for them: give more bytes, or smaller types."
        )
    member = pd.get_dummies(costs["group"]).to_numpy(float).T  # (group, row)
    size, worth = costs["bytes"].to_numpy(float), costs["cost"].to_numpy(float)
    for most in (budget, budget * (1 - 1e-5)):  # the solver's tolerance is 1e-6 of the largest
        found = milp(
            worth / max(np.abs(worth).max(), 1e-300),
            integrality=np.ones(len(costs)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(member, 1, 1),
                LinearConstraint(size[None] / size.max(), -np.inf, most / size.max()),
            ],
            options={"mip_rel_gap": 0},
        )
        if not found.success:
            raise QuantizeError(f"No mixture was found: {found.message}")
        rows = costs[np.round(found.x).astype(bool)]
        if rows["bytes"].sum() <= budget:
            break
    return rows


def at_random(
    costs: pd.DataFrame, budget: float, unlike: pd.DataFrame, seed: int = 0, draws: int = 4000
) -> pd.DataFrame:
    """A mixture that was drawn, of at most `budget` bytes and of those draws the one nearest to the
    size of `unlike`, which it is not: what a recommendation of that size must beat. `unlike` itself
    where there is no other."""
    rng, places = np.random.default_rng(seed), np.arange(len(costs))
    parts = costs.groupby("group", sort=False).indices.values()
    drawn = np.stack([rng.choice(places[part], draws) for part in parts], axis=1)  # (draw, group)
    sizes = costs["bytes"].to_numpy()[drawn].sum(axis=1)
    same = np.isin(drawn, np.flatnonzero(costs.index.isin(unlike.index))).all(axis=1)
    far = np.where(same | (sizes > budget), np.inf, abs(sizes - float(unlike["bytes"].sum())))
    return unlike if np.isinf(far).all() else costs.iloc[drawn[far.argmin()]]


def tensor_types(chosen: pd.DataFrame) -> dict[str, str]:
    """{regular expression: type} of every matrix of a choice, as quantize() takes it."""
    return {f"^{re.escape(name)}$": kind for own in chosen["tensors"] for name, kind in own.items()}


def type_file(types: Mapping[str, str]) -> str:
    """The same as llama-quantize --tensor-type-file reads it: a pattern and a type on each line."""
    return "".join(f"{pattern}={kind.lower()}\n" for pattern, kind in types.items())
