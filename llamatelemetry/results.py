"""What a notebook leaves behind: tables, arrays and texts, each whole or not there at all."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .files.outputs import written

if TYPE_CHECKING:
    import pandas as pd


def save(
    path: str | os.PathLike,
    value: "pd.DataFrame | Mapping[str, np.ndarray] | str",
    index: bool | None = None,
) -> Path:
    """Write a table as Parquet, arrays by name as a compressed .npz, or a text; returns the path.

    index: whether a table's index is a column, None as pandas has it. Raises OutputError where the
    disk refuses it, or where a model is in its place; no half of it is left."""
    with written(path) as temporary:
        if isinstance(value, str):
            temporary.write_text(value, encoding="utf-8", errors="backslashreplace")
        elif isinstance(value, Mapping):
            with open(temporary, "wb") as file:
                np.savez_compressed(file, **value)
        else:
            value.to_parquet(temporary, index=index)
    return Path(path)
