"""The nearest rows of a matrix, exact and in bounded memory: candidates in single precision, ranked
again in double, so that CPU and GPU agree."""

import numpy as np

from ..maths import blocks

_EXTRA = 8  # candidates beyond k that are ranked again in double precision
_BLOCK = 1 << 24  # elements of the largest temporary
_QUERIES = 2048  # rows that are searched at once


def search(backend, x, queries, k, own, cosine, progress):
    """The k nearest rows of x to each query; own: a query is a row of x of the same index, which is
    none of its nearest. backend: whose arrays compute it.

    x: (n, width), queries: (m, width), float32 and checked.
    -> (squared euclidean distances float64, of unit rows for cosines; indices int64), both (m, k)
    """
    from tqdm.auto import tqdm

    xp, count = backend.xp, min(len(x), k + own + _EXTRA)
    on_device = backend.to_device(x)  # the one copy there is, on a GPU
    scaled = _scales(xp, on_device) if cosine else None
    distances = np.empty((len(queries), k))
    indices = np.empty((len(queries), k), dtype=np.int64)
    steps = range(0, len(queries), _QUERIES)
    block = max(1, _BLOCK // (x.shape[1] * count))
    for start in tqdm(steps, disable=not progress, desc="neighbours"):
        rows = xp.asarray(queries[start : start + _QUERIES])
        candidates = _candidates(xp, on_device, rows, count, scaled)
        for first in range(0, len(rows), block):
            part = slice(first, first + block)
            among, numbers = candidates[part], xp.arange(start + first, start + len(rows))
            exact = _squared(xp, on_device[among], rows[part, None], cosine)
            if own:
                exact[among == numbers[: len(among), None]] = xp.inf
            order = xp.argsort(exact, axis=1, kind="stable")[:, :k]
            out = slice(start + first, start + first + len(among))
            distances[out] = backend.to_numpy(xp.take_along_axis(exact, order, axis=1))
            indices[out] = backend.to_numpy(xp.take_along_axis(among, order, axis=1))
    return distances, indices


def unit_rows(xp, x):
    """Rows of length 1 with one column more, which only rows of zeros have: they are at cosine
    distance 1 from every row that is not zero and at 0 from each other (umap-learn's convention).
    (n, width) -> (n, width + 1)"""
    found = xp.empty((len(x), x.shape[1] + 1), xp.float32)
    for start, block in blocks(x):
        length = xp.linalg.norm(block.astype(xp.float64), axis=1, keepdims=True)
        zero = length == 0
        found[start : start + len(block)] = xp.hstack([block / xp.where(zero, 1, length), zero])
    return found


def _lengths(xp, x):
    """Lengths of rows, in double precision. (..., width) -> (...)"""
    return xp.sqrt((x.astype(xp.float64) ** 2).sum(axis=-1))


def _scales(xp, x):
    """(1 / length, 0 for a row of zeros) and (is it zeros), both (n,) float32, by blocks."""
    length = xp.concatenate([_lengths(xp, block) for _, block in blocks(x)])
    zero = length == 0
    return (~zero / xp.where(zero, 1, length)).astype(xp.float32), zero.astype(xp.float32)


def _candidates(xp, x, rows, count, scaled):
    """About the nearest `count` rows of x to each of some rows, by index: (m, width) -> (m, count).

    Single precision is enough for cosines; squared distances lose their digits in it, and are taken
    from the middle in double precision."""
    kind = xp.float64 if scaled is None else xp.float32
    middle = x.mean(axis=0, dtype=kind) if scaled is None else 0
    rows = rows.astype(kind) - middle
    if scaled:
        scale, zero = _scales(xp, rows)
        rows = rows * scale[:, None]
    best = indices = None
    for start, block in blocks(x, max(count, min(len(x), _BLOCK // max(rows.shape)))):
        part = slice(start, start + len(block))
        if scaled:
            near = (rows @ block.T) * scaled[0][part] + zero[:, None] * scaled[1][part]
        else:
            block = block.astype(kind) - middle
            near = 2 * (rows @ block.T) - (block**2).sum(axis=1)
        numbers = xp.broadcast_to(xp.arange(start, start + len(block)), near.shape)
        if best is not None:
            near, numbers = xp.hstack([best, near]), xp.hstack([indices, numbers])
        kept = xp.argpartition(-near, count - 1, axis=1)[:, :count]
        best = xp.take_along_axis(near, kept, axis=1)
        indices = xp.take_along_axis(numbers, kept, axis=1)
    return xp.sort(indices, axis=1)  # so that a stable sort breaks ties


def _squared(xp, x, rows, cosine):
    """Squared distances in double precision: (m, c, width), (m, 1, width) -> (m, c). Of unit rows
    for cosines, with the column of `unit_rows` that tells rows of zeros."""
    if not cosine:
        return ((x.astype(xp.float64) - rows.astype(xp.float64)) ** 2).sum(axis=2)
    units, apart = [], []
    for each in (x, rows):
        length = _lengths(xp, each)
        apart.append(length == 0)
        length = xp.where(length == 0, 1, length)
        units.append((each / length[..., None]).astype(xp.float32))
    return _squared(xp, *units, cosine=False) + (apart[0] != apart[1])
