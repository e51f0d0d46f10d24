"""A graph as one self-contained page on a canvas: zoom, pan, hover, search, filters by kind and by
edge weight.

The script is graph_page.js and graph_page_ui.js; `window.graph` in the page is its state, for tests
and for whoever opens the console."""

from collections.abc import Iterable

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from .packing import pack
from .page import Page
from .text import seen


def is_numbers(values: pd.Series) -> bool:
    """Whether a column is drawn on a scale: numbers, but not truth values."""
    return pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)


def categories(values: ArrayLike) -> tuple[list[str], NDArray[np.int32]]:
    """(names, codes): the categories of a column, most frequent first or in the order of an ordered
    categorical, and each row's number, -1 where empty."""
    values = pd.Series(values).reset_index(drop=True)
    text = values.astype(object).map(str, na_action="ignore")
    counts = text.value_counts(sort=False)
    names = sorted(counts.index, key=lambda name: (-counts[name], name))
    if isinstance(values.dtype, pd.CategoricalDtype) and values.dtype.ordered:
        names = [name for name in map(str, values.dtype.categories) if name in counts]
    return names, pd.Index(names).get_indexer(text).astype(np.int32)


def _encode(values: pd.Series | None) -> dict | None:
    """A column as the page's script wants it: numbers in 0 to 1 with their range, or categories
    with their names."""
    if values is None:
        return None
    values = pd.Series(values)
    if is_numbers(values):
        numbers = values.to_numpy(dtype=np.float64, na_value=np.nan)
        numbers = np.where(np.isfinite(numbers), numbers, np.nan)
        known = numbers[~np.isnan(numbers)]
        low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 0.0)
        share = (numbers - low) / ((high - low) or 1.0)
        return {
            "name": str(values.name),
            "range": [low, high],
            "share": pack(np.nan_to_num(share, nan=-1.0)),
        }
    names, codes = categories(values)
    return {"name": str(values.name), "names": [seen(name) for name in names], "codes": pack(codes)}


def _as_kind(values: pd.Series) -> pd.Series:
    """A column as categories whatever it holds; an ordered categorical keeps its order."""
    if isinstance(values.dtype, pd.CategoricalDtype):
        return values
    return values.astype(object).map(str, na_action="ignore")


def _cell(value: object) -> str | None:
    if value is None or value is pd.NA or value != value:
        return None
    return f"{value:.6g}" if isinstance(value, float) else seen(str(value))


def size_of(columns: list) -> int:
    """Bytes of columns in the page, about: texts as UTF-8 in quotes, numbers packed."""
    total = 0
    for column in columns:
        if isinstance(column, str):
            total += len(column.encode(errors="replace")) + 3
        elif isinstance(column, pd.Series):
            total += 6 * len(column)
        else:
            total += 5 if column is None else size_of(list(column))
    return total


def graph_page(
    positions: ArrayLike,
    pairs: ArrayLike,
    *,
    title: str,
    labels: Iterable[str],
    color: pd.Series | None = None,
    size: pd.Series | None = None,
    kind: pd.Series | None = None,
    weight: pd.Series | None = None,
    edge_color: pd.Series | None = None,
    edge_labels: Iterable | None = None,
    details: pd.DataFrame | None = None,
    note: str = "",
    height: int = 720,
    max_bytes: float = 4.8e6,
) -> Page:
    """The page of one graph.

    positions: (n, 2); pairs: (m, 2) row numbers; labels: n texts. color, kind (n,), edge_color
    (m,): named Series, numbers on the ramp, anything else as categories, the 7 most frequent with a
    colour each. size: (n,) numbers, as area. weight: (m,) numbers, the filter and the edges'
    opacity. edge_labels: (m,) texts, in the list of a clicked node's neighbours. details: DataFrame
    of n rows for the hover box. Of edges that do not fit into max_bytes the strongest
    are on the page, and its note says so; then details are left out, the last columns first."""
    positions = np.asarray(positions, dtype=np.float32).reshape(-1, 2)
    pairs = np.asarray(pairs, dtype=np.int32).reshape(-1, 2)
    strength = np.ones(len(pairs)) if weight is None else np.asarray(weight, dtype=np.float64)
    order = np.argsort(-strength, kind="stable")  # the strongest first, as the page's filter wants
    if edge_color is not None:
        edge_color = pd.Series(edge_color).reset_index(drop=True).iloc[order]
    if edge_labels is not None:
        edge_labels = [_cell(text) for text in np.asarray(edge_labels, object)[order]]
    details = pd.DataFrame() if details is None else details
    cells = {str(name): [_cell(value) for value in details[name].tolist()] for name in details}
    labels = [seen(text) for text in labels]
    room = max_bytes - size_of([labels, *(x for x in (color, kind, size) if x is not None)])
    while cells and size_of(list(cells.values())) > room / 2:
        note += f"; {cells.popitem()[0]} is left out to keep the page small"
    room -= size_of(list(cells.values()))
    each = 22 + (0 if edge_labels is None else size_of(edge_labels) / max(1, len(edge_labels)))
    if len(order) > (count := int(max(0, room) // each)):
        note += (
            f"; the {count:,} strongest of {len(order):,} edges are here, to keep the page small"
        )
        order = order[:count]
        edge_color = None if edge_color is None else edge_color.iloc[:count]
        edge_labels = None if edge_labels is None else edge_labels[:count]
    data = {
        "x": pack(positions[:, 0]),
        "y": pack(positions[:, 1]),
        "source": pack(pairs[order, 0]),
        "target": pack(pairs[order, 1]),
        "weight": None if weight is None else pack(strength[order]),
        "weightName": str(getattr(weight, "name", None) or "weight"),
        "labels": labels,
        "color": _encode(color),
        "kind": None if kind is None else _encode(_as_kind(kind)),
        "size": _encode(size),
        "edgeColor": _encode(edge_color),
        "edgeLabels": edge_labels,
        "details": cells,
    }
    scripts = ("graph_page", "graph_page_ui")
    return Page.of(
        __package__, "graph_page", data, title=title, about=note, scripts=scripts, height=height
    )
