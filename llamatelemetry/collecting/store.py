"""A store of collected states: a folder of Arrow files, each a block of texts, whole or not there.

Arrow, because pyarrow is there already, and the hub's `datasets` reads such a folder as it is (a
row per text) and maps its files into memory, as is done here. A column is one layer of one stage:
whoever reads a layer reads nothing else. xarray opens it lazily, as an array of its backends' kind.
A block appears by being renamed when it is whole: after any interruption the others are good."""

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..capture.names import STAGES
from ..errors import CollectError, shown
from ..files.outputs import folder_of, path_of, split_parts, written
from ..imports import uninterrupted
from .lazy import make_lazy
from .many import POOLS
from .texts import OURS

if TYPE_CHECKING:
    import xarray as xr

VERSION = 1
KEY = b"llamatelemetry"
SAMPLES, SAMPLE = 64, 1 << 16
_ODD = (ValueError, KeyError, TypeError, AttributeError, RecursionError)  # of facts in odd forms


def fingerprint(path: str | os.PathLike) -> str:
    """A digest of a model's files: their sizes, their headers and 64 places of their weights."""
    digest = hashlib.sha256()
    for part in split_parts(path):
        size = part.stat().st_size
        digest.update(str(size).encode())
        with open(part, "rb") as file:
            for start in np.linspace(0, max(size - SAMPLE, 0), SAMPLES, dtype=np.int64):
                file.seek(int(start))
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()


class Store:
    """What is in a folder. facts: of the request and the model, the same in every block."""

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = path_of(folder, CollectError)
        self.paths = sorted(self.folder.glob("block-*.arrow"))
        names = [self._path(number) for number in range(len(self.paths))]
        if names != self.paths:
            missing = next(name for name in names if name not in self.paths)
            raise CollectError(
                f"{shown(missing)} is missing among the blocks after it: remove those, or take another folder."
            )
        self.facts: dict[str, Any] = read_facts(self.paths[0]) if self.paths else {}
        self._kinds: Any = None  # of the user's columns, in all blocks

    def _path(self, number):
        return self.folder / f"block-{number:06d}.arrow"

    def rows(self, number: int) -> list[dict[str, Any]]:
        """The texts and further columns of a block, as they were given."""
        table = block(self.paths[number])
        names = [name for name in table.column_names if is_given(name)]
        facts = read_facts(self.paths[number])
        found = table.select(names).to_pylist()
        for at in facts["ids"]:  # given as token ids
            found[at]["text"] = table["tokens"][at].as_py()
        return found

    def same(self, number: int, stored: list[dict[str, Any]], rows: list[dict[str, Any]]) -> bool:
        """Whether a block, whose rows are stored, begins with these rows, or these with it."""
        stored, rows = stored[: len(rows)], rows[: len(stored)]
        if rows[0].keys() != stored[0].keys():
            return False
        schema = block(self.paths[number]).schema
        try:
            for name in rows[0]:
                values = [row[name] for row in rows]
                if name != "text":
                    values = given_column(name, values, schema.field(name).type).to_pylist()
                if values != [row[name] for row in stored]:
                    return False
        except CollectError:  # no values of this type
            return False
        return True

    def check(self, rows: list[dict[str, Any]]) -> None:
        """CollectError, with its name, for a column of new rows that cannot be stored, or is of
        another type than in the blocks before."""
        with uninterrupted():
            import pyarrow as pa

        names = [name for name in rows[0] if name != "text"]
        if self._kinds is None:
            parts = [block(path) for path in self.paths]
            there = [[name for name in names if name in part.column_names] for part in parts]
            schemas = [part.select(some).schema for part, some in zip(parts, there)]
            self._kinds = [schema.remove_metadata() for schema in schemas]
        kinds = [(name, given_column(name, [row[name] for row in rows]).type) for name in names]
        try:
            schemas = [*self._kinds, pa.schema(kinds)]
            self._kinds = [pa.unify_schemas(schemas, promote_options="permissive")]
        except pa.ArrowException as error:
            raise CollectError(
                f"A column has another type than before: {error!s:.200}. Give its values one type "
                "(str(...))."
            ) from error

    def write(
        self,
        number: int,
        rows: list[dict[str, Any]],
        tokens: list[list[int]],
        pieces: list[list[str | bytes]],
        cut: list[bool],
        arrays: dict[str, np.ndarray],
        facts: dict[str, Any],
        last: bool,
    ) -> None:
        """A block of texts. arrays: {stage: (layer, row, ...)}, a row per text or per token."""
        with uninterrupted():
            import pyarrow as pa

        ids = [at for at, row in enumerate(rows) if not isinstance(row["text"], str)]
        raw = [[p if isinstance(p, bytes) else p.encode() for p in some] for some in pieces]
        columns = {}
        for name in rows[0]:
            values = [row[name] for row in rows]
            if name == "text":
                for at in ids:
                    values[at] = b"".join(raw[at]).decode("utf-8", "replace")
            columns[name] = given_column(name, values)
        columns["tokens"] = pa.array(tokens, pa.list_(pa.int32()))
        columns["pieces"] = pa.array(raw, pa.list_(pa.binary()))
        columns["cut"] = pa.array(cut)
        offsets = None if facts["pool"] else columns["tokens"].offsets
        for stage, array in arrays.items():
            layers = facts["layout"][stage]["layers"]
            for layer, values in zip(layers or [None], array):
                width = int(np.prod(values.shape[1:]))
                column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), width)
                if offsets is not None:
                    column = pa.ListArray.from_arrays(offsets, column)
                columns[column_name(stage, layer)] = column
        said = json.dumps(facts | {"version": VERSION, "ids": ids, "last": last})
        table = pa.table(columns).replace_schema_metadata({KEY: said.encode()})
        path = self._path(number)
        with written(path, need=table.nbytes, error=CollectError) as temporary:
            with (
                pa.OSFile(str(temporary), "wb") as file,
                pa.ipc.new_stream(file, table.schema) as to,
            ):
                to.write_table(table)
        if path not in self.paths:
            self.paths.append(path)


def given_column(name: str, values: list, kind: Any = None) -> Any:
    """Values as a column of a store, what is missing as null; CollectError where they are none."""
    import pyarrow as pa

    plain = [value.tolist() if isinstance(value, np.ndarray) else value for value in values]
    try:
        return pa.array(plain, kind, from_pandas=True)
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise CollectError(
            f"Column {name!r} cannot be stored: {error!s:.200}. Give its values one type (str(...))."
        ) from error


@contextmanager
def make(folder: str | os.PathLike) -> Iterator[Store]:
    """The Store in a folder, which is made where it is not there, for this run alone: two would
    take each other's blocks for their own. CollectError where another one has it."""
    path = folder_of(folder, CollectError)
    held = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CollectError(
                f"Another run collects into {shown(path)} now: wait for its end, or give another folder."
            ) from None
        except OSError:
            pass  # a file system without locks
        yield Store(path)
    finally:
        os.close(held)


def column_name(stage, layer):
    return stage if layer is None else f"{stage}.{layer}"


def is_given(name):
    """Whether a column is the user's own."""
    return name not in OURS and name.split(".")[0] not in STAGES


def block(path):
    """A block's table, its columns where they lie in the file."""
    return _opened(path)[0]


def _opened(path):
    try:
        status = path.stat()
    except OSError as error:
        raise CollectError(f"{shown(path)} is not there any more: {error.strerror}.") from error
    return _mapped(path, status.st_mtime_ns, status.st_size)


@lru_cache(32)
def _mapped(path, *_):
    with uninterrupted():
        import pyarrow as pa

    try:
        table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        table.validate(full=True)  # of states only where they lie, not what they are
        facts = json.loads((table.schema.metadata or {}).get(KEY, b"{}"))
        if facts.get("version") == VERSION:
            _check(table, facts)
        return table, facts
    except (pa.ArrowException, OSError, *_ODD) as error:
        raise CollectError(
            f"{shown(path)} is no block of collected states: {error!s:.200}. If it was one, remove it "
            "and collect again: the others stay."
        ) from error


def _check(table, facts):
    """That a block has what its facts say; an error of _ODD where not."""
    import pyarrow as pa

    names = ("request", "digest", "variant", "pool", "model", "layout", "ids", "last")
    if missing := [name for name in names if name not in facts]:
        raise ValueError(f"it does not say {missing[0]}")
    if facts["pool"] not in POOLS or not isinstance(facts["layout"], dict):
        raise ValueError("its layout is none")
    for name in ("name", "file"):
        if not isinstance(facts["model"][name], str):
            raise ValueError("its model has no name")
    if not all(at in range(len(table)) for at in facts["ids"]):
        raise ValueError("its token ids are not there")
    kinds = {"tokens": pa.list_(pa.int32()), "pieces": pa.list_(pa.binary()), "cut": pa.bool_()}
    for stage, part in facts["layout"].items():
        number, width = pa.from_numpy_dtype(np.dtype(part["dtype"])), math.prod(part["shape"])
        kind = pa.list_(number, width) if facts["pool"] else pa.list_(pa.list_(number, width))
        layers = [None] if part["layers"] is None else part["layers"]
        kinds |= {column_name(stage, layer): kind for layer in layers}
        if len(part["shape"]) != len(STAGES[stage].dims) - 1 or len(layers) != len(set(layers)):
            raise ValueError(f"its {stage} have another form")
    for name, kind in kinds.items():
        if table.schema.field(name).type != kind or table[name].null_count:
            raise ValueError(f"its column {name} is none of {kind}")
    if "text" not in table.column_names or not len(table):
        raise ValueError("it has no texts")


def read_facts(path):
    facts = _opened(path)[1]
    if not isinstance(facts, dict) or facts.get("version") != VERSION:
        raise CollectError(f"{shown(path)} is no block of states that this version has collected.")
    return facts


def open_states(where: str | os.PathLike) -> "xr.Dataset":
    """The states that InferenceEngine.collect stored in a folder, a Dataset that reads what is
    looked at.

    A variable per stage: pooled, (text, layer, embd), or (text, layer, head, feature), without
    layer where a stage has none; unpooled, (token, layer, ...), the tokens of all texts one after
    another. Coordinates along text: text, n_tokens, cut, last_token (its piece), unpooled also
    start (its first token), and what was given beside the texts (label); along token: token (its
    piece), token_id, token_position, token_text (its text's number). A stage that lacks a layer
    that another has is NaN there. attrs: pool, model, file, where, complete. CollectError for a
    folder without states."""
    with uninterrupted():
        import xarray as xr
        from xarray.core import indexing

    store = Store(where)
    if not store.paths:
        raise CollectError(f"There are no collected states in {shown(store.folder)}.")
    facts, along = store.facts, "text" if store.facts["pool"] else "token"
    coords, sizes, n_tokens = _coordinates(store, along)
    starts = np.cumsum([0, *(sizes if along == "text" else n_tokens)])
    layers = sorted({layer for part in facts["layout"].values() for layer in part["layers"] or ()})
    variables: dict[str, Any] = {}
    widths: dict[str, int] = {}
    for stage, part in facts["layout"].items():
        dims = [dim for dim in STAGES[stage].dims if dim != "token"]
        for number, (dim, size) in enumerate(zip(dims, part["shape"])):
            if widths.setdefault(dim, size) != size:
                dims[number] = f"{dim}_{stage}"
        per_layer = part["layers"] is not None
        read = partial(_column, store.paths, stage)
        array = make_lazy(read, starts, part, layers if per_layer else None)
        dims = [along, *(["layer"] if per_layer else []), *dims]
        variables[stage] = xr.Variable(dims, indexing.LazilyIndexedArray(array))
    if layers:
        coords["layer"] = layers
    attrs = {"pool": facts["pool"] or "none", "where": str(store.folder)}
    attrs |= {"model": facts["model"]["name"], "file": facts["model"]["file"]}
    attrs["complete"] = bool(read_facts(store.paths[-1])["last"])
    return xr.Dataset(variables, coords, attrs)


def _coordinates(store, along):
    """(coordinates, texts of each block, tokens of each block)."""
    with uninterrupted():
        import pyarrow as pa

    names = [name for name in block(store.paths[0]).column_names if is_given(name)]
    given = pa.concat_tables(
        [block(path).select(names).replace_schema_metadata() for path in store.paths],
        promote_options="permissive",
    )
    frame = given.to_pandas()
    lengths = [_lengths(block(path)["tokens"]) for path in store.paths]
    each = np.concatenate(lengths)
    coords = {name: ("text", _plain(frame[name])) for name in names}
    coords["n_tokens"] = ("text", each)
    coords["cut"] = (
        "text",
        np.concatenate([block(path)["cut"].to_numpy() for path in store.paths]),
    )
    held = [block(path)["pieces"].combine_chunks() for path in store.paths]
    last = [one.values.take(pa.array(one.offsets.to_numpy()[1:] - 1)) for one in held]
    coords["last_token"] = ("text", _pieces(last))
    if along == "token":
        ids = [block(path)["tokens"].combine_chunks().values.to_numpy() for path in store.paths]
        start = np.cumsum(each) - each
        coords["start"] = ("text", start)
        coords["token"] = ("token", _pieces([one.values for one in held]))
        coords["token_id"] = ("token", np.concatenate(ids))
        coords["token_text"] = ("token", np.repeat(np.arange(len(each)), each))
        coords["token_position"] = ("token", np.arange(each.sum()) - np.repeat(start, each))
    return coords, [len(some) for some in lengths], [int(some.sum()) for some in lengths]


def _lengths(column):
    return np.diff(column.combine_chunks().offsets.to_numpy())


def _pieces(columns):
    """Bytes of all blocks as an array of texts; bytes where they are none."""

    def text(piece):
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return piece

    return _objects([text(piece) for column in columns for piece in column.to_pylist()])


def _objects(values):
    array = np.empty(len(values), object)
    array[:] = values
    return array


def _plain(column: pd.Series):
    """A column as NumPy has it: numbers and truths as they are, all else as objects."""
    return column.to_numpy() if column.dtype.kind in "biufM" else _objects(list(column))


def _column(paths, stage, number, layer):
    """A column's numbers in a block, one after another, where they lie in the file."""
    column = block(paths[number])[column_name(stage, layer)].combine_chunks()
    while hasattr(column, "values"):
        column = column.values
    return column.to_numpy()
