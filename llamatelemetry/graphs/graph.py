"""Node and edge tables as one graph: on Graphistry, or as an offline page, with the same layout,
colours and labels.

What leaves the machine: nothing, unless Graphistry credentials were given for it (Kaggle secrets or
environment, see `graphistry_credentials`) or `show(upload=True)` says so. `show(upload=False)`
never uploads. Before an upload one line says what goes where, and both tables and the page are
written to disk first."""

import io
import re
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from ..backend import get_backend
from ..files.outputs import written
from ..views.graph_page import graph_page, is_numbers
from ..views.text import token_text
from .upload import graphistry_credentials, upload_graph


class Graph:
    """A graph of two tables, pandas or cuDF DataFrames.

    node: column of nodes with unique ids; source, target: columns of edges with such ids. color,
    size, label, kind: columns of nodes (color: numbers on a scale, anything else as categories;
    kind: what the page filters by, and the colour if there is no other). weight, edge_color,
    edge_label: columns of edges (weight: positive where the layout is computed). position: two
    columns of nodes, or None to compute the layout by force from the edges with `seed`. ValueError
    for tables that do not fit together; a graph without edges is one."""

    def __init__(
        self,
        nodes,
        edges,
        node="id",
        source="src",
        target="dst",
        *,
        title="graph",
        color=None,
        size=None,
        label=None,
        kind=None,
        weight=None,
        edge_color=None,
        edge_label=None,
        position=None,
        seed=0,
    ):
        self.title, self.seed = title, seed
        self._given = None if position is None else tuple(map(str, position))
        of_nodes = [_named(name) for name in (node, kind, size, color or kind, label or node)]
        of_edges = [_named(name) for name in (source, target, weight, edge_color, edge_label)]
        self.node, self.kind, self.size, self.color, self.label = of_nodes
        self.source, self.target, self.weight, self.edge_color, self.edge_label = of_edges
        self.nodes = _plain(nodes, "nodes", [*of_nodes, *(self._given or ())])
        self.edges = _plain(edges, "edges", of_edges)
        self._check()
        self._check_numbers()

    def _check(self):
        ids = self.nodes[self.node]
        if len(ids) == 0:
            raise ValueError("the node table is empty: a graph needs at least one node")
        for table, column in (("nodes", self.node), ("edges", self.source), ("edges", self.target)):
            missing = getattr(self, table)[column].isna().sum()
            if missing:
                raise ValueError(
                    f"{missing} row(s) of {table}[{column!r}] are empty: every one needs an id"
                )
        if ids.duplicated().any():
            again = ids[ids.duplicated()]
            raise ValueError(
                f"nodes[{self.node!r}] has {len(again)} repeated id(s), the first {again.iloc[0]!r}"
            )
        for column in (self.source, self.target):
            _same_numbers(ids, self.edges[column], f"nodes[{self.node!r}]", f"edges[{column!r}]")
        index = pd.Index(ids)
        pairs = [index.get_indexer(self.edges[column]) for column in (self.source, self.target)]
        self.pairs = np.column_stack(pairs).astype(np.int64)  # (m, 2) row numbers of nodes
        unknown = (self.pairs < 0).any(axis=1)
        if unknown.any():
            first = self.edges.loc[unknown, [self.source, self.target]].iloc[0].tolist()
            raise ValueError(
                f"{unknown.sum()} of {len(self.edges)} edges name an id that is not in nodes[{self.node!r}] (type "
                f"{ids.dtype}), the first {first}: add those nodes or drop those edges"
            )

    def _check_numbers(self):
        positions = [("nodes", column) for column in self._given or ()]
        for table, column in [("nodes", self.size), ("edges", self.weight), *positions]:
            if column is not None and not is_numbers(getattr(self, table)[column]):
                raise ValueError(
                    f"{table}[{column!r}] must be numbers, not {getattr(self, table)[column].dtype}"
                )
        if self.weight is not None and not _finite(self.edges[self.weight]):
            raise ValueError(f"edges[{self.weight!r}] holds NaN or infinity: drop those edges")
        if self._given is not None:
            if len(self._given) != 2:
                raise ValueError(f"position is two columns of nodes, not {self._given!r}")
            if not _finite(self.nodes[list(self._given)]):
                raise ValueError(
                    f"nodes{list(self._given)} hold NaN or infinity: every node needs a position"
                )

    def layout(self, backend=None):
        """Positions (n_nodes, 2), float32: the columns of `position`, or computed by force once and
        kept.

        backend: a `get_backend` object or name; None: the one chosen for this machine.
        """
        if "positions" not in self.__dict__ and backend is not None:
            self._backend = get_backend(backend) if isinstance(backend, str) else backend
        return self.positions

    @cached_property
    def positions(self):
        if self._given is not None:
            return self.nodes[list(self._given)].to_numpy(dtype=np.float32)
        backend = getattr(self, "_backend", None) or get_backend("auto")
        weights = None if self.weight is None else self.edges[self.weight].to_numpy(np.float64)
        return backend.layout(self.pairs, len(self.nodes), weights, 2, self.seed)

    @cached_property
    def tables(self):
        """(nodes, edges, (x column, y column)): what is saved and uploaded, computed positions
        included."""
        if self._given is not None:
            return self.nodes, self.edges, tuple(self._given)
        numbered = (f"layout_{number}_" for number in range(2, len(self.nodes.columns) + 3))
        pairs = ((f"{prefix}x", f"{prefix}y") for prefix in ("", "layout_", *numbered))
        names = next(pair for pair in pairs if not set(pair) & set(self.nodes.columns))
        return self.nodes.assign(**dict(zip(names, self.positions.T))), self.edges, names

    def page(self, height=720):
        """The offline page: zoom, pan, hover, search, filters; one self-contained HTML document."""
        names, ids = self.nodes[self.label].astype(object), self.nodes[self.node].astype(object)
        given = self._given and "positions given by columns " + ", ".join(self._given)
        of_nodes = {"color": self.color, "size": self.size, "kind": self.kind}
        of_edges = {
            "weight": self.weight,
            "edge_color": self.edge_color,
            "edge_labels": self.edge_label,
        }
        return graph_page(
            self.positions,
            self.pairs,
            title=self.title,
            labels=names.where(names.notna(), ids).map(str),
            **{key: self.nodes[column] for key, column in of_nodes.items() if column is not None},
            **{key: self.edges[column] for key, column in of_edges.items() if column is not None},
            details=self.nodes.drop(columns=[*{self.label, self.node}]),
            note=given or "layout computed by force",
            height=height,
        )

    def save(self, folder, name="graph"):
        """Write name.nodes.parquet, name.edges.parquet and name.html; returns {"nodes", "edges",
        "page": path}."""
        if not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"name must be letters, digits, '.', '_' or '-', not {name!r}")
        folder = Path(folder)
        nodes, edges, _ = self.tables
        paths = {part: folder / f"{name}.{part}.parquet" for part in ("nodes", "edges")}
        for what, table in (("nodes", nodes), ("edges", edges)):
            # Arrow's own paths are UTF-8: it gets an open file.
            with written(paths[what]) as temporary, open(temporary, "wb") as file:
                _write(table, what, file)
        return {**paths, "page": self.page().save(folder / f"{name}.html")}

    def show(
        self,
        backend=None,
        *,
        upload=None,
        privacy="private",
        server=None,
        protocol=None,
        folder="outputs",
        name="graph",
        height=720,
    ):
        """The graph on Graphistry (a GraphistryPlot with `.url`) or the offline Page.

        upload: None uploads where Graphistry credentials are there, True insists on it, False never
        does. privacy: "private", "organization" or "public". server, protocol: of a private
        Graphistry server, else the client's own setting (GRAPHISTRY_HOSTNAME, GRAPHISTRY_PROTOCOL)
        or the public hub. backend: computes the layout. GraphistryError for missing or wrong
        credentials and for no network: the tables and the page are then in `folder`, and the
        message says where."""
        self.layout(backend)
        credentials = None if upload is False else graphistry_credentials()
        if credentials is None and not upload:
            return self.page(height)
        saved = self.save(folder, name)
        return upload_graph(self, credentials, privacy, server, protocol, saved, height)


def _named(column):
    """A column's name as the tables have it: text; None stays None."""
    return None if column is None else str(column)


def _finite(values):
    return np.isfinite(values.to_numpy(dtype=float, na_value=np.nan)).all()


def _plain(frame, what, columns):
    """A pandas copy with a fresh index, the named columns there, and cells that Arrow can hold."""
    frame = frame.to_pandas() if hasattr(frame, "to_pandas") else frame
    if not isinstance(frame, pd.DataFrame):
        raise ValueError(f"{what} must be a DataFrame, not {type(frame).__name__}")
    frame = frame.reset_index(drop=True).copy()
    frame.columns = frame.columns.map(str)
    missing = [
        column
        for column in dict.fromkeys(columns)
        if column is not None and column not in frame.columns
    ]
    if missing:
        raise ValueError(
            f"{what} has no column {', '.join(map(repr, missing))}; it has {list(frame.columns)}"
        )
    if frame.columns.duplicated().any():
        raise ValueError(
            f"{what} has the column {frame.columns[frame.columns.duplicated()][0]!r} twice: rename one"
        )
    for column, values in frame.items():
        if not pd.api.types.is_object_dtype(values):
            continue
        if not values.map(lambda v: isinstance(v, str) or v is None).all():
            # Pieces that are bytes, mixed types, lists: as text, one way for Parquet, Arrow and the
            # page.
            mixed = values.map(type).nunique() > 1 or not isinstance(
                values.iloc[0], (int, float, bool)
            )
            if mixed:
                frame[column] = values.map(_text)
    return frame


def _text(value):
    """A cell of a column of texts: bytes as token text, missing ones stay missing."""
    if (
        value is None
        or value is pd.NA
        or value is pd.NaT
        or (isinstance(value, float) and value != value)
    ):
        return None
    return token_text(value) if isinstance(value, bytes) else str(value)


def _same_numbers(ids, values, ids_name, values_name):
    """ValueError where integers would be compared with floats that cannot tell neighbouring
    integers apart."""
    kinds = {ids.dtype.kind: ids, values.dtype.kind: values}
    if "f" not in kinds or not {"i", "u"} & set(kinds):
        return
    if len(values) and max(ids.abs().max(), values.abs().max()) > 2**53:
        raise ValueError(
            f"{ids_name} is {ids.dtype} and {values_name} is {values.dtype}: above 2**53 floats do not tell integers "
            "apart. Drop rows without an id, then convert both to 'int64'"
        )


def _write(frame, what, file):
    """To Parquet; ValueError names the column that Parquet has no type for."""
    try:
        frame.to_parquet(file, index=False)
    except (pa.ArrowException, TypeError) as error:
        for column in frame.columns:
            try:
                frame[[column]].to_parquet(io.BytesIO(), index=False)
            except (pa.ArrowException, TypeError) as reason:
                raise ValueError(
                    f"{what}[{column!r}] ({frame[column].dtype}) has no type in a Parquet file ({reason}): convert it, "
                    "for example with .astype(str)"
                ) from error
        raise
