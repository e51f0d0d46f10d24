"""What a head may be seen to do. A behaviour is a set of (query, key) pairs in a text, and its
score is the attention on them: the pairs, the score and what chance gives (the pairs shuffled) are
all here."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import xarray as xr

# What a label says. All but the last are shares of a head's attention, mean over the query rows
# that have such a key (over the pairs for "syntactic": a verb has one subject).
LABELS = {
    "sink": "on the first token (Xiao et al. 2023), natural texts",
    "local": "on the token itself and the three before it, natural texts",
    "global": "on tokens 16 or more back, the first left out, natural texts",
    "delimiter": "on punctuation and line breaks, natural texts",
    "positional": "at its favourite one of the offsets 0 to 8 (Voita et al. 2019), random tokens",
    "previous token": "on the token before, random tokens (Olsson et al. 2022)",
    "duplicate": "on earlier occurrences of the token, repeated random tokens",
    "induction": "on what followed earlier occurrences, repeated random tokens (Olsson et al. 2022)",
    "syntactic": "from verb to subject, noun to determiner, closing to opening bracket; templates, less the "
    "same distances",
    "semantic": "rank correlation with the cosine of token embeddings at equal distance, natural texts",
}
PLAIN = ("mass", "entropy", "normalized_entropy", "distance", "top")  # natural texts, no label
LOCAL, FAR, OFFSETS = 4, 16, 9
# Queries that are looked at in a text, and in a shuffled version: long texts stay cheap.
ROWS, SHUFFLE_ROWS = 128, 24
DELIMITERS = set(".,;:!?()[]{}<>\"'`|-\n\t")
MADE = ("random", "templates")  # kinds that are generated; every other kind is natural


@dataclass
class Text:
    """One text: token ids, the pieces to show, and `pairs`, {behaviour: [(pair, 2) query and key
    positions, and shuffled versions of them]}."""

    name: str
    kind: str
    ids: list[int]
    pieces: list[str | bytes]
    pairs: dict[str, list[np.ndarray]] = field(default_factory=dict)

    @property
    def natural(self) -> bool:
        return self.kind not in MADE

    @property
    def patterns(self) -> dict[str, np.ndarray]:
        """The pairs as head_statistics takes them: "induction~0", "induction~1" the first shuffled
        version."""
        return {
            f"{name}~{number}": pairs
            for name, versions in self.pairs.items()
            for number, pairs in enumerate(versions)
        }


def natural_pairs(pieces: Sequence[str | bytes], queries: np.ndarray) -> dict[str, np.ndarray]:
    """Pairs of sink, local, global and delimiter attention of these query positions:
    {behaviour: (pair, 2)}, query and key."""
    marks = np.array([is_delimiter(piece) for piece in pieces])
    keys = np.arange(len(pieces))
    distance = queries[:, None] - keys  # (query, key)
    masks = {
        "local": (distance >= 0) & (distance < LOCAL),
        "global": (distance >= FAR) & (keys > 0),
        "sink": (keys == 0) & (distance >= 0),
        "delimiter": (distance >= 0) & marks & (keys > 0),
    }
    return {name: _pairs(mask, queries) for name, mask in masks.items()}


def token_pairs(ids: Sequence[int], queries: np.ndarray) -> dict[str, np.ndarray]:
    """Pairs of the behaviours that random tokens show, fixed offsets, previous token, duplicate and
    induction, of these query positions: {behaviour: (pair, 2)}, query and key. As patterns of
    head_statistics they give TransformerLens's head detectors."""
    keys = np.arange(len(ids))
    distance = queries[:, None] - keys  # (query, key)
    same = np.equal.outer(np.asarray(ids)[queries], ids)
    after = np.pad(same, ((0, 0), (1, 0)))[:, :-1]  # the key follows the query's token
    masks = {f"offset {d}": distance == d for d in range(OFFSETS)} | {
        "previous token": distance == 1,
        "duplicate": (distance > 0) & same,
        "induction": (distance >= 0) & after,
    }
    return {name: _pairs(mask, queries) for name, mask in masks.items()}


def _pairs(mask, queries):
    row, key = mask.nonzero()
    return np.column_stack([queries[row], key])


def is_delimiter(piece: str | bytes) -> bool:
    """Whether a piece is punctuation or white space only."""
    text = piece.decode(errors="replace") if isinstance(piece, bytes) else piece
    return bool(text) and set(text) <= DELIMITERS | {" ", "▁"} and text not in (" ", "▁")


def add_pairs(text: Text, shuffles: int, rng: np.random.Generator) -> None:
    """Fill in `text.pairs`: of each behaviour that its kind of text shows, the pairs and `shuffles`
    shuffled versions of them."""
    n = len(text.ids)
    queries = np.sort(rng.choice(np.arange(1, n), min(ROWS, n - 1), replace=False))
    found = {name: versions[0] for name, versions in text.pairs.items()}  # of a template's grammar
    if text.natural:
        found |= natural_pairs(text.pieces, queries)
    if text.kind == "random":
        found |= token_pairs(text.ids, queries)
    text.pairs = {}
    for name, pairs in found.items():
        if not len(pairs):
            continue
        if name == "syntactic":
            shuffled = [same_distance(pairs, n, rng) for _ in range(shuffles)]
        else:
            rows = np.unique(pairs[:, 0])
            rows = rng.choice(rows, min(SHUFFLE_ROWS, len(rows)), replace=False)
            kept = pairs[np.isin(pairs[:, 0], rows)]
            shuffled = [same_row(kept, rng) for _ in range(shuffles)]
        text.pairs[name] = [pairs, *shuffled]


def same_row(pairs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As many keys for each query, drawn from those that it sees: the row's weights shuffled."""
    query, count = np.unique(pairs[:, 0], return_counts=True)
    keys = [rng.permutation(q + 1)[:c] for q, c in zip(query, count)]
    return np.column_stack([np.repeat(query, count), np.concatenate(keys)])


def same_distance(pairs: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """For each pair another one of the same distance that carries no label, the first token left
    out."""
    labelled, out = set(map(tuple, pairs.tolist())), []
    for distance in (pairs[:, 0] - pairs[:, 1]).tolist():
        every = [(query, query - distance) for query in range(distance + 1, n)]
        free = [pair for pair in every if pair not in labelled]
        out.append(free[rng.integers(len(free))] if free else (n - 1, n - 1 - distance))
    return np.array(out)


def scores(text: Text, statistics: xr.Dataset) -> dict[str, np.ndarray]:
    """The scores of every head in a text: {behaviour: (version, layer, head)}, the attention on the
    pairs per query that has one; version 0 is the behaviour's own pairs, the rest is shuffled.

    statistics: head_statistics of text.ids with text.patterns."""
    whole = statistics["mass"].values * len(text.ids)  # attention of a head over all rows
    found = {}
    for name, versions in text.pairs.items():
        # Drawn syntactic pairs may share a query, so pairs are counted there.
        counts = [len(p if name == "syntactic" else np.unique(p[:, 0])) for p in versions]
        shares = [statistics[f"{name}~{number}"].values for number in range(len(versions))]
        found[name] = np.stack([share * whole / count for share, count in zip(shares, counts)])
    return found


def collect(
    texts: Sequence[Text],
    statistics: Sequence[xr.Dataset],
    semantic: dict[str, np.ndarray] | None = None,
) -> xr.Dataset:
    """Scores of every head in every text: Dataset (text, layer, head), and of each behaviour `name`
    the shuffled `name~` (text, shuffle, layer, head); NaN where a text does not have a behaviour.

    statistics: head_statistics of each text with its patterns; semantic: {name of a text:
    semantic.semantic_scores}. "best_offset" (layer, head) is the one that "positional" is at."""
    found = []
    for text, stats in zip(texts, statistics):
        plain = {name: stats[name].values[None] for name in PLAIN} if text.natural else {}
        more = {"semantic": semantic[text.name]} if semantic and text.name in semantic else {}
        found.append(plain | scores(text, stats) | more)
    data: dict[str, tuple] = {}
    for name in dict.fromkeys(name for one in found for name in one):
        empty = np.full_like(next(one[name] for one in found if name in one), np.nan)
        values = np.stack([one.get(name, empty) for one in found])  # (text, version, layer, head)
        data[name] = ("text", "layer", "head"), values[:, 0]
        if values.shape[1] > 1:
            data[f"{name}~"] = ("text", "shuffle", "layer", "head"), values[:, 1:]
    layers = statistics[0]["layer"].values
    coords = {
        "text": [text.name for text in texts],
        "kind": ("text", [text.kind for text in texts]),
        "layer": layers,
        "head": np.arange(statistics[0].sizes["head"]),
    }
    return _less_the_same_distances(_at_the_best_offset(xr.Dataset(data, coords)))


def _at_the_best_offset(data):
    """The scores of the offsets as one, "positional": that of the best offset in the mean over
    texts, chosen for every shuffled version as well."""
    for end in ("", "~"):
        names = [f"offset {d}{end}" for d in range(OFFSETS) if f"offset {d}{end}" in data]
        if not names:
            continue
        offsets = xr.concat([data[name] for name in names], "offset", join="exact")
        best = offsets.mean("text").fillna(0).argmax("offset")
        picked = offsets.isel(offset=best).transpose(*data[names[0]].dims)
        data = data.drop_vars(names).assign({f"positional{end}": picked})
        data = data if end else data.assign(best_offset=best)
    return data


def _less_the_same_distances(data):
    if "syntactic~" not in data:
        return data
    matched = data["syntactic~"].mean("shuffle")
    return data.assign({name: data[name] - matched for name in ("syntactic", "syntactic~")})
