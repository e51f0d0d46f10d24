"""Rows of a file are those that were asked for, in that order, read in runs and each once."""

import os

import numpy as np
import pytest

from llamatelemetry import ModelLoadError, reading
from llamatelemetry.reading import Rows, Source

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies
N, WIDTH, START = 40, 6, 11


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "file"
    values = np.random.default_rng(0).integers(0, 256, (N, WIDTH), np.uint8)
    path.write_bytes(bytes(START) + values.tobytes() + b"behind")
    return Rows(Source(path), START, (N, WIDTH)), values, path


@hypothesis.settings(deadline=None, derandomize=True)
@hypothesis.given(
    st.one_of(
        st.lists(st.integers(-N, N - 1)).map(lambda ids: np.array(ids, int)),
        st.slices(N),
        st.permutations(range(N)).map(np.array),
    )
)
def test_any_rows(rows, ids):
    found, values, _ = rows
    for gap, block in ((0, 1 << 20), (1 << 14, 1 << 20), (10, 3 * WIDTH)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reading, "GAP", gap)
            patch.setattr(reading, "BLOCK", block)
            np.testing.assert_array_equal(found[ids], values[ids])


@pytest.mark.parametrize(
    "ids, reads",
    [
        (slice(3, 9), 1),
        (np.arange(N)[::-1], 1),
        ([5, 6, 7, 20, 21, 5, 5], 2),  # more than GAP between
        ([1, 3, 5], 1),
        (slice(0, 0), 0),
        ([], 0),
    ],
)
def test_reads_are_runs(rows, ids, reads, monkeypatch):
    found, values, _ = rows
    asked, preadv = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: asked.append(1) or preadv(*args))
    monkeypatch.setattr(reading, "GAP", 10 * WIDTH)
    ids = ids if isinstance(ids, slice) else np.array(ids, int)
    np.testing.assert_array_equal(found[ids], values[ids])
    assert len(asked) == reads


def test_a_file_cut_short_is_an_error_whatever_is_read(tmp_path, rows):
    path = tmp_path / "file"
    path.write_bytes(rows[2].read_bytes())
    found = Rows(Source(path), START, (N, WIDTH))
    os.truncate(path, START + 3 * WIDTH)
    for ids in (slice(0, N), np.arange(N)[::-1], np.array([1, 30])):
        with pytest.raises(ModelLoadError, match="since it was opened"):
            found[ids]
