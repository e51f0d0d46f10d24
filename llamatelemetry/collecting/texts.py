"""Texts to collect states of, one by one, whatever holds them: a list, a generator, a table, a
file."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pandas as pd

from ..arguments import prompt
from ..errors import CollectError, shown
from ..files.outputs import path_of
from ..imports import uninterrupted

READ = 1024  # rows of a Parquet file in memory at a time
OURS = ("tokens", "pieces", "cut")  # columns of a store besides the text and the stages


def count(texts: Any) -> int | None:
    """How many texts there are, where that is known before they are read."""
    return None if isinstance(texts, str) or not hasattr(texts, "__len__") else len(texts)


def rows(texts: Any, labels: Iterable | None = None) -> Iterator[dict[str, Any]]:
    """{"text": a text or token ids, a value per further column} of every text.

    texts: texts, lists of token ids or mappings with a "text"; a DataFrame with that column; or a
    path of a Parquet, JSONL or text file (one per line). labels: one per text, the column "label".
    CollectError, with the text's number, where one is empty or none."""
    labels, columns = None if labels is None else iter(labels), None
    for number, given in enumerate(_given(texts)):
        row = dict(given) if isinstance(given, Mapping) else {"text": given}
        if "text" not in row:
            raise CollectError(
                f"Text {number} has no 'text' among {', '.join(map(str, row))[:80]}."
            )
        try:
            row["text"] = prompt(row["text"], CollectError)
        except CollectError as error:
            raise CollectError(f"Text {number}: {error}") from None
        if labels is not None:
            try:
                row["label"] = next(labels)
            except StopIteration:
                raise CollectError(f"There are {number} labels and more texts.") from None
        if columns is None:
            columns = row.keys()
            _check(columns)
        if row.keys() != columns:
            raise CollectError(f"Text {number} has columns {[*row]}, the first {[*columns]}.")
        yield row
    if labels is not None and next(labels, labels) is not labels:
        raise CollectError("There are more labels than texts.")


def _check(columns):
    from ..capture.names import STAGES

    for name in columns:
        if not isinstance(name, str) or name in OURS or name.split(".")[0] in STAGES:
            raise CollectError(
                f"A column {name!r} would be taken for what is collected: give it another name."
            )


def _given(texts):
    if isinstance(texts, pd.DataFrame):
        return (dict(zip(texts, row)) for row in texts.itertuples(index=False, name=None))
    if not isinstance(texts, (str, os.PathLike)):
        return texts
    path = path_of(texts, CollectError)
    if not path.is_file():
        raise CollectError(
            f"There is no file {shown(path)[:200]}: texts is a list of texts, or a file's path."
        )
    if path.suffix == ".parquet":
        return _parquet(path)
    return _lines(path, path.suffix in (".jsonl", ".json"))


def _parquet(path):
    with uninterrupted():
        from pyarrow import lib, parquet

    try:
        for batch in parquet.ParquetFile(path).iter_batches(READ):
            yield from batch.to_pylist()
    except lib.ArrowException as error:
        raise CollectError(f"{shown(path)} cannot be read as Parquet: {error}") from error


def _lines(path, as_json):
    with open(path, encoding="utf-8-sig") as file:
        number = 1
        try:
            for line in file:
                if line := line.rstrip("\n"):
                    yield json.loads(line) if as_json else line
                number += 1
        except ValueError as error:  # not JSON, not UTF-8
            raise CollectError(f"{shown(path)}, line {number}: {error}") from error


def blocks(
    texts: Iterable[dict], most: int, size: int
) -> Iterator[tuple[list[dict[str, Any]], bool]]:
    """(rows, whether they are the last) of at most `most` texts or about `size` bytes of text."""
    some: list[dict[str, Any]] = []
    used, following = 0, iter(texts)
    while row := next(following, None):
        if some and (len(some) == most or used >= size):
            yield some, False
            some, used = [], 0
        some.append(row)
        used += len(row["text"]) * (1 if isinstance(row["text"], str) else 4)
    if some:
        yield some, True
