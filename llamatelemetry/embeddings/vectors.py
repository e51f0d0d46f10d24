"""A token embedding matrix: words, norms, anisotropy, spectrum, centrality, unused tokens,
analogies.

Everything here takes the matrix as (vocabulary, width) float32, one row per token id, and works in
blocks of rows."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from .. import maths
from ..backend.base import CpuBackend
from ..errors import EmbeddingError
from ..files.gguf import GGUFFile
from ..maths import blocks, check_rows, unit

EMBEDDING = "token_embd.weight"
KINDS = ("word start", "word part", "number", "symbol", "space", "other script", "byte", "special")


def token_embedding(gguf: GGUFFile) -> np.ndarray:
    """The token embeddings of a file, (vocabulary, width) float32, dequantized in blocks of rows
    with a progress bar. EmbeddingError where a row holds NaN or infinity (ids named)."""
    from tqdm.auto import tqdm

    matrix = np.empty(gguf.tensors.loc[EMBEDDING, "shape"], np.float32)
    steps = -(-len(matrix) // 4096)
    for start, block in tqdm(gguf.iter_rows(EMBEDDING, 4096), total=steps, desc="dequantizing"):
        matrix[start : start + len(block)] = block
    return check_rows(matrix)


class StoredRows:
    """The token embeddings of a file as `token_embedding` gives them, dequantized when they are
    taken, rows[4:9] or rows[ids]: of a second file there need not be a whole matrix in memory.
    shape: (vocabulary, width)."""

    def __init__(self, gguf: GGUFFile) -> None:
        """EmbeddingError where a row holds NaN or infinity (ids named)."""
        self._gguf = gguf
        self.shape: tuple[int, int] = gguf.tensors.loc[EMBEDDING, "shape"]
        self.ndim = len(self.shape)
        check_rows(self)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, ids: slice | np.ndarray) -> np.ndarray:
        """Rows of a slice, or of ids of any shape: (*ids.shape, width) float32."""
        if isinstance(ids, slice):
            return self._gguf.rows(EMBEDDING, ids)
        rows = self._gguf.rows(EMBEDDING, np.ravel(ids))
        return rows.reshape(*np.shape(ids), self.shape[1])


def stored_as(gguf: GGUFFile) -> str:
    """The precision of the token embeddings in a file: "Q8_0 (8.50 bits)"."""
    row = gguf.tensors.loc[EMBEDDING]
    return f"{row['type']} ({row['bits_per_weight']:.2f} bits)"


def token_table(
    matrix: np.ndarray, pieces: Sequence[str | bytes], types: ArrayLike
) -> pd.DataFrame:
    """What is known of every token, a DataFrame indexed by id: piece, type (as in the file), kind
    (one of KINDS), norm (as stored), mean_cosine (to all other tokens, exact), copies (tokens that
    have the same row to the last bit, itself included).

    pieces: texts, bytes where not UTF-8; types: (n,) ints, 1 normal, 6 byte, others special."""
    norm, total = _unit_sum(matrix)
    along = np.concatenate([block @ total.astype(np.float32) for _, block in blocks(matrix)])
    mean_cosine = along / np.where(norm == 0, 1, norm)
    rows = pd.Series([hash(row.tobytes()) for row in matrix])
    table = pd.DataFrame({"piece": pd.Series(pieces, dtype=object), "type": np.asarray(types)})
    table["kind"] = [_kind(piece, kind) for piece, kind in zip(pieces, table.type)]
    table["norm"] = norm
    table["mean_cosine"] = (mean_cosine - (norm > 0)) / (len(matrix) - 1)
    table["copies"] = rows.map(rows.value_counts())
    return table.rename_axis("id")


def _unit_sum(matrix):
    """(lengths of the rows, (n,); the sum of the rows scaled to length 1, (width,)), float64."""
    norm, total = np.empty(len(matrix)), np.zeros(matrix.shape[1])
    for start, block in blocks(matrix):
        length = np.linalg.norm(block.astype(np.float64), axis=1)
        norm[start : start + len(block)] = length
        scale = (length > 0) / np.where(length == 0, 1, length)
        total += scale.astype(np.float32) @ block
    return norm, total


def _kind(piece, kind):
    if isinstance(piece, bytes) or kind == 6:
        return "byte"
    if kind != 1:
        return "special"
    text = piece.strip()
    if not text:
        return "space"
    letters = [char for char in text if char.isalpha()]
    if not letters:
        return "number" if any(char.isdigit() for char in text) else "symbol"
    if any(ord(char) > 0x24F for char in letters):  # beyond Latin Extended-B
        return "other script"
    return "word start" if piece[0] == " " else "word part"


def word_table(
    pieces: Sequence[str | bytes],
    categories: Mapping[str, Sequence[str]],
    only: Collection[str] | None = None,
) -> pd.DataFrame:
    """The tokens that are whole words of a list, first as they stand inside a text (' cat'), else
    bare ('cat').

    categories: {category: [word, ...]}; only: names of the categories wanted, None for all. ->
    DataFrame (word, category, id, piece), one row per word; `.attrs["skipped"]` lists the words
    that this vocabulary splits into several tokens. EmbeddingError for an unknown category, and
    where no word at all is one token."""
    wanted = list(categories) if only is None else list(only)
    unknown = [name for name in wanted if name not in categories]
    if unknown:
        raise EmbeddingError(
            f"No category {', '.join(map(repr, unknown))}. Known: {', '.join(categories)}."
        )
    where: dict[str | bytes, int] = {}
    for number, piece in enumerate(pieces):
        where.setdefault(piece, number)
    rows: list[tuple] = []
    skipped: list[str] = []
    for category in wanted:
        for word in categories[category]:
            found = next((text for text in (f" {word}", word) if text in where), None)
            if found is None:
                skipped.append(word)
            else:
                rows.append((word, category, where[found], found))
    if not rows:
        raise EmbeddingError(
            f"Not one token in this vocabulary: {', '.join(skipped[:20])}"
            f"{' and more' if len(skipped) > 20 else ''}. Choose other words."
        )
    table = pd.DataFrame(rows, columns=["word", "category", "id", "piece"])
    table = table.drop_duplicates("id", ignore_index=True)
    table.attrs["skipped"] = skipped
    return table


def anisotropy(matrix: np.ndarray) -> float:
    """Mean cosine of two different random rows (Ethayarajh 2019, arXiv:1909.00512), exactly, over
    all pairs: (|sum of unit rows|^2 - n) / (n (n - 1)). 0: directions spread evenly; 1: all rows
    point one way."""
    norm, total = _unit_sum(matrix)
    count = int((norm > 0).sum())  # a row of zeros has no direction
    if count < 2:
        raise EmbeddingError("Anisotropy needs two rows that are not zero.")
    return float((total @ total - count) / (count * (count - 1)))


def random_cosines(
    matrix: np.ndarray, pairs: int = 20000, center: bool = False, seed: int = 0
) -> np.ndarray:
    """Cosines of `pairs` random pairs of different rows, float32 (pairs,); center: after
    subtracting the mean row."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, len(matrix), pairs)
    second = (first + rng.integers(1, len(matrix), pairs)) % len(matrix)  # never the row itself
    mean = _mean_row(matrix) if center else np.float32(0)
    out = np.empty(pairs, np.float32)
    step = max(1, maths.BLOCK // 16)
    for start in range(0, pairs, step):
        part = slice(start, start + step)
        a, b = unit(matrix[first[part]] - mean), unit(matrix[second[part]] - mean)
        out[part] = (a * b).sum(axis=1)
    return out


def _mean_row(matrix):
    return np.mean(matrix, axis=0, dtype=np.float64).astype(np.float32)


def spectra(matrix: np.ndarray, backend: CpuBackend) -> dict[str, np.ndarray]:
    """Singular values, largest first, float64 (width,): {"as stored": of the matrix, "minus the
    mean row": of it less that}, from width x width Gram matrices, so that the vocabulary's length
    costs no memory. Products are taken on the backend's device in single precision after the mean
    row, which is often the largest direction, is subtracted, and summed in double precision; values
    below 1e-4 of the second largest are not resolved."""
    xp, width = backend.xp, matrix.shape[1]
    mean = _mean_row(matrix)
    there, gram, rest = xp.asarray(mean), xp.zeros((width, width)), xp.zeros(width)
    for _, block in blocks(matrix, maths.BLOCK):
        rows = backend.to_device(block) - there
        gram += rows.T @ rows
        rest += rows.sum(axis=0, dtype=xp.float64)  # what rounding left in the mean
    centred = gram - xp.outer(rest, rest) / len(matrix)
    mean = there.astype(xp.float64)
    across = xp.outer(rest, mean)
    stored = gram + across + across.T + len(matrix) * xp.outer(mean, mean)
    return {
        name: np.sqrt(np.maximum(backend.to_numpy(xp.linalg.eigvalsh(each))[::-1], 0))
        for name, each in (("as stored", stored), ("minus the mean row", centred))
    }


def effective_rank(singular_values: ArrayLike) -> float:
    """exp of the entropy of the singular values' shares (Roy and Vetterli 2007, "The effective
    rank"): n for n equal values, 1 for one value that is not zero."""
    values = np.asarray(singular_values, np.float64)
    if not values.sum() > 0:
        raise EmbeddingError("All singular values are zero: the matrix has no rank.")
    return float(np.exp(maths.entropy(values / values.sum())))


def random_spectrum(n: int, width: int) -> np.ndarray:
    """Singular values of an n x width matrix of independent Gaussian entries, mean square 1, as
    expected for large n (Marchenko and Pastur 1967): what a spectrum without any structure looks
    like. float64 (min(n, width),)"""
    ratio = min(n, width) / max(n, width)
    low, high = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2
    at = np.linspace(max(low, 1e-9), high, 20001)
    share = np.cumsum(np.sqrt(np.maximum((high - at) * (at - low), 0)) / at)
    middle = (np.arange(min(n, width)) + 0.5) / min(n, width)
    return np.sqrt(np.interp(middle, share / share[-1], at) * max(n, width))[::-1]


def unused_tokens(matrix: np.ndarray, tokens: pd.DataFrame, at_least: float = 0.95) -> pd.DataFrame:
    """Tokens that training seems never to have touched (Land and Bartolo 2024, arXiv:2405.05417).

    tokens: `token_table`. Known ones first: the file marks them unused (type 5), their row is zero,
    or equal to another token's to the last bit (training would have moved the two apart), or they
    are bytes that UTF-8 never has. Then every token whose cosine to the mean of the known ones,
    both after subtracting the mean row, is `at_least` (their score). -> DataFrame (id, piece, why,
    score, norm), known ones first, best score first; empty where nothing is known, because there
    is then nothing to compare with."""
    why = np.full(len(matrix), "", dtype=object)
    why[tokens.piece.map(_impossible_byte)] = "byte that UTF-8 never has"
    why[tokens.copies > 1] = "same row as another token"
    why[tokens.norm == 0] = "row of zeros"
    why[tokens.type == 5] = "marked unused in the file"
    known = np.flatnonzero(why != "")
    score = np.zeros(len(matrix), np.float32)
    if len(known):
        mean = _mean_row(matrix)
        parts = (unit(matrix[ids] - mean).sum(axis=0) for _, ids in blocks(known))
        center = unit(sum(parts)[None])[0]
        score = np.concatenate([unit(block - mean) @ center for _, block in blocks(matrix)])
        why[(why == "") & (score >= at_least)] = "as close to those"
    ids = np.flatnonzero(why != "")
    ids = ids[np.lexsort((-score[ids], why[ids] == "as close to those"))]
    found = tokens.loc[ids, ["piece", "norm"]].assign(why=why[ids], score=score[ids])
    return found.reset_index()[["id", "piece", "why", "score", "norm"]]


def _impossible_byte(piece):
    never = (0xC0, 0xC1, *range(0xF5, 0x100))
    return isinstance(piece, bytes) and len(piece) == 1 and piece[0] in never


def analogies(
    matrix: np.ndarray,
    pieces: Sequence[str | bytes],
    questions: Sequence[tuple[str, str, str, str]],
) -> pd.DataFrame:
    """ "a is to b as c is to d" by 3CosAdd (Mikolov et al. 2013): tokens by cosine to b - a + c,
    without a, b and c themselves, in whatever case and spacing the vocabulary has them.

    questions: [(a, b, c, d), ...] of words. -> DataFrame (a, b, c, d, answer, rank, rank_without):
    the top token, d's rank among all tokens (1 is the best), and d's rank by cosine to c alone,
    which a useful offset must beat (Linzen 2016). Questions with a word that is not one token are
    left out and listed in `.attrs["skipped"]`."""
    words = word_table(pieces, {"": sorted({word for question in questions for word in question})})
    ids = dict(zip(words.word, words.id))
    asked = [question for question in questions if all(word in ids for word in question)]
    if not asked:
        raise EmbeddingError(
            "No analogy has four words that are one token each. Choose other words."
        )
    variants: dict[str, list[int]] = {}
    for number, piece in enumerate(pieces):
        if isinstance(piece, str):
            variants.setdefault(piece.strip().lower(), []).append(number)
    abcd = np.array([[ids[word] for word in question] for question in asked])  # (questions, 4)
    a, b, c, _ = (unit(matrix[column]) for column in abcd.T)
    targets = np.concatenate([unit(b - a + c), c])
    cosines = np.concatenate([unit(block) @ targets.T for _, block in blocks(matrix)])
    score, alone = cosines.T[: len(asked)], cosines.T[len(asked) :]  # (questions, vocabulary)
    for row, question in enumerate(asked):
        same = [i for word in question[:3] for i in variants[word.strip().lower()]]
        left_out = [i for i in same if i != abcd[row, 3]]
        score[row, left_out] = alone[row, left_out] = -np.inf
    table = pd.DataFrame(asked, columns=["a", "b", "c", "d"])
    table["answer"] = [pieces[i] for i in score.argmax(axis=1)]
    for column, values in (("rank", score), ("rank_without", alone)):
        expected = np.take_along_axis(values, abcd[:, 3:], axis=1)
        table[column] = 1 + (values > expected).sum(axis=1)
    table.attrs["skipped"] = [question for question in questions if question not in asked]
    return table
