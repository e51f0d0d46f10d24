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
# What else the Dataset has, besides the dims of the stages.
TAKEN = "n_tokens last_token start token_id token_text token_position layer".split()
PARQUET, JSON = (".parquet", ".pq"), (".jsonl", ".ndjson", ".json")
# Of these a line is no text.
TABLES = tuple(".csv .tsv .xlsx .xls .ods .arrow .feather .gz .bz2 .xz .zst .zip".split())


def count(texts: Any) -> int | None:
    """How many texts there are, where that is known before they are read."""
    return None if isinstance(texts, str) or not hasattr(texts, "__len__") else len(texts)


def rows(texts: Any, labels: Iterable | None = None) -> Iterator[dict[str, Any]]:
    """{"text": a text or token ids, a value per further column} of every text.

    texts: texts, lists of token ids or mappings with a "text"; a DataFrame with that column; or a
    path of a Parquet, JSONL or text file (one per line). labels: one per text, the column "label".
    CollectError, with the text's number, where one is empty or none."""
    if isinstance(labels, (str, bytes)) or labels is not None and not hasattr(labels, "__iter__"):
        raise CollectError(f"labels={labels!r:.80}: they are a list, one value per text.")
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
            if "label" in row:
                raise CollectError(
                    "The texts have a column 'label', and labels= would take its place: give one."
                )
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

    taken = {*OURS, *TAKEN, *(dim for stage in STAGES.values() for dim in stage.dims)}
    for name in columns:
        if not isinstance(name, str) or name in taken or name.split(".")[0] in STAGES:
            raise CollectError(
                f"A column {name!r} would be taken for what is collected: give it another name."
            )


def _given(texts):
    if isinstance(texts, pd.DataFrame):
        if not texts.columns.is_unique:
            twice = texts.columns[texts.columns.duplicated()][0]
            raise CollectError(f"The table has two columns {twice!r}: drop or rename one.")
        return (dict(zip(texts, row)) for row in texts.itertuples(index=False, name=None))
    if isinstance(texts, Mapping) or not hasattr(texts, "__iter__") and not _is_path(texts):
        raise CollectError(
            f"texts is a list of texts, a DataFrame with a column 'text' (pd.DataFrame(...) makes one of "
            f"columns), or a file's path; not {type(texts).__name__}."
        )
    if not _is_path(texts):
        return texts
    path = path_of(texts, CollectError)
    if not path.is_file():
        raise CollectError(
            f"There is no file {shown(path)[:200]}: texts is a list of texts, or a file's path."
        )
    kind = path.suffix.lower()
    if kind in TABLES:
        raise CollectError(
            f"{shown(path)}: a {kind} file is not read line by line. Read it with pandas, and give the "
            "DataFrame, or a Parquet or JSONL file."
        )
    return _parquet(path) if kind in PARQUET else _lines(path, kind in JSON)


def _is_path(texts):
    return isinstance(texts, (str, os.PathLike))


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
        except (ValueError, RecursionError) as error:  # not JSON, not UTF-8
            more = ". A JSONL file has one value in every line." if as_json else ""
            raise CollectError(f"{shown(path)}, line {number}: {error}{more}") from error


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
