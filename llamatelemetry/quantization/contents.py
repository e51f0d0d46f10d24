"""What is inside each file: sizes, types, and whether its weights lie on a grid.

Pure functions on objects with the interface of GGUFFile."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from ..convert.expand import quantized_types
from ..files.gguf import GGUFFile
from ..gpus.fit import as_type
from ..views.sentences import listed


def is_stand_in(file: GGUFFile) -> bool:
    """Whether a file is what make_reference makes: it writes so into the file's own name."""
    return "uniform noise" in str(file.name)


def reference_name(file: GGUFFile, grid: float) -> str:
    """What figures and sentences call the reference: its file's name, and what it is, by the types
    of its matrices: trained weights, or others in their place. grid: its grid_share."""
    what = {
        "quantized": f"itself {listed(matrix_types(file), most=2)}",
        "expanded": "expanded from a quantized file",
        "stand-in": "a stand-in: quantized, with noise",
        "precise": listed(matrix_types(file), most=2),
    }
    return f"{file.path.stem} ({what[reference_kind(file, grid)]})"


def matrix_types(file: GGUFFile) -> list[str]:
    """Types of a file's matrices, most frequent first."""
    return list(file.tensors[file.tensors["shape"].map(len) > 1]["type"].value_counts().index)


def reference_kind(file: GGUFFile, grid: float) -> str:
    """What a reference is: "quantized", "expanded" (its floats lie on a grid), "stand-in" or
    "precise". grid: its grid_share."""
    if quantized_types(file):
        return "quantized"
    return "expanded" if grid > 0.2 else "stand-in" if is_stand_in(file) else "precise"


def looked_into(files: Mapping[str, GGUFFile], start: str) -> str:
    """The file whose name begins with `start`, else the one whose bits per weight are nearest to
    those of a file of that type: where a ladder was cut to what can be made in minutes."""
    if named := [name for name in files if name.startswith(start)]:
        return named[0]
    wanted = as_type(next(iter(files.values())), start).bits_per_weight
    return min(files, key=lambda name: abs(files[name].bits_per_weight - wanted))


def is_light(reference: GGUFFile) -> bool:
    """Whether a reference is read in about a second on any machine: up to 2 GB."""
    return reference.size_bytes <= 2 * 10**9


def sizes(files: Mapping[str, GGUFFile]) -> pd.DataFrame:
    """DataFrame by file: MB, bits per weight."""
    rows = {name: (file.size_bytes / 1e6, file.bits_per_weight) for name, file in files.items()}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["MB", "bits per weight"])


def type_table(files: Mapping[str, GGUFFile]) -> pd.DataFrame:
    """What is inside each file: DataFrame (group, name) of texts such as "Q5_0 x45, Q8_0 x15".

    Only matrices; groups as in GGUFFile.tensors.
    """

    def describe(types):
        return ", ".join(f"{kind} x{n}" for kind, n in types.value_counts().items())

    columns = {}
    for name, file in files.items():
        matrices = file.tensors[file.tensors["shape"].map(len) > 1]
        columns[name] = matrices.groupby("group", sort=False)["type"].agg(describe)
    return pd.DataFrame(columns).rename_axis("group")


def grid_share(file: GGUFFile, matrices: int = 8, rows: int = 32, seed: int = 0) -> float:
    """Share of blocks of 16 weights that lie on an even grid of at most 256 levels, in a file of
    floats; NaN for a quantized one.

    Near 1 for a file that was expanded from a quantized one (Q4_0 to Q5_1 and k-quants; Q8_0 where
    it was kept in F32; not the uneven grids of the i-quants), near 0 for weights that were trained.
    Some rows of some matrices of the layers are looked at."""
    if quantized_types(file):
        return float("nan")
    inside = file.tensors[(file.tensors["shape"].map(len) == 2) & file.tensors["layer"].notna()]
    names = inside.index[some_of(len(inside), matrices, seed)]
    blocks = []
    for name in names:
        values = file.rows(name, some_of(inside["shape"][name][0], rows, seed))
        width = values.shape[1] // 16 * 16
        blocks.append(values[:, :width].reshape(-1, 16).astype(np.float64))
    blocks = np.sort(np.concatenate(blocks), axis=1)
    gaps, span = np.diff(blocks, axis=1), np.ptp(blocks, axis=1, keepdims=True)
    # Two weights of one level differ only by rounding: a step is the smallest gap above 1/1000 of
    # the block's span.
    step = np.where(gaps > span / 1000, gaps, np.inf).min(axis=1, keepdims=True)  # (block, 1)
    with np.errstate(invalid="ignore"):
        gaps, levels = gaps / step, span / step
    even = (np.abs(gaps - np.round(gaps)) < 0.1).all(axis=1) & (levels[:, 0] < 256)
    varied = span[:, 0] > 0
    return float(even[varied].mean()) if varied.any() else 1.0  # constant weights lie on any grid


def some_of(n: int, count: int, seed: int) -> list[int]:
    """`count` of the numbers below n, or all of them, drawn without repetition, in order."""
    chosen = np.random.default_rng(seed).choice(n, min(count, n), replace=False)
    return np.sort(chosen).tolist()
