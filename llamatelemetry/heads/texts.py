"""Texts that heads are measured on, and the (query, key) pairs in them that stand for a behaviour.

A set of texts holds natural ones (prose, code, lists), sequences of random tokens that repeat, and
sentences from templates whose grammar is known. Every pattern comes with shuffled versions of
itself: the baseline."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

MADE = (
    "random",
    "templates",
)  # kinds of texts that are generated here; every other kind is natural
LOCAL, FAR, OFFSETS = (
    4,
    16,
    9,
)  # keys: the last 4 with the query itself; 16 or more back; offsets 0 to 8
DELIMITERS = set(".,;:!?()[]{}<>\"'`|-\n\t")
NOUNS = "farmer teacher sailor doctor king child horse bird dog cat lawyer writer driver painter soldier guard".split()
VERBS = "sees follows helps carries watches finds leaves meets paints calls sends builds".split()
ADJECTIVES = "old young tall quiet small happy tired clever brown strange".split()
PLACES = "river house bridge garden market tower school forest".split()


@dataclass
class Text:
    """One text: token ids, the pieces to show, and patterns {"@name": (m, 2) pairs of query and key
    positions}.

    rows: {name: queries that the pattern covers}. "@name~3" is a shuffled version of "@name", its
    rows are "name~". The mark keeps patterns apart from the measures that head_statistics has by
    itself."""

    name: str
    kind: str
    ids: list
    pieces: list
    patterns: dict = field(default_factory=dict)
    rows: dict = field(default_factory=dict)

    @property
    def natural(self):
        return self.kind not in MADE


def default_texts(
    tokenize,
    vocabulary,
    *,
    texts=None,
    n_random=4,
    n_templates=4,
    shuffles=20,
    max_tokens=96,
    max_rows=128,
    shuffle_rows=24,
    seed=0,
):
    """The set of texts with their patterns: list of Text.

    tokenize(text, add_special=True): DataFrame (id, piece), as InferenceEngine.tokenize gives it.
    vocabulary: (pieces, token_types) of the model, to draw random tokens from. texts: {kind: [text,
    ...]} in place of the package's own prose, code and lists. max_tokens cuts each text; max_rows:
    query rows that patterns are taken at, and shuffle_rows: at most so many of them for each
    shuffled version, so that long texts stay cheap."""
    rng = np.random.default_rng(seed)
    special = tokenize("a")["id"].tolist()[:-1]  # what the model puts first
    out = []
    for kind, group in (texts or load_texts()).items():
        for number, text in enumerate(group, 1):
            tokens = tokenize(text).iloc[:max_tokens]
            out.append(
                Text(f"{kind} {number}", kind, tokens["id"].tolist(), tokens["piece"].tolist())
            )
    pool = plain_tokens(*vocabulary)
    for number in range(1, n_random + 1):
        # A head that looks a fixed number of tokens back is not taken for an induction head:
        # periods differ.
        period = int(max_tokens * (0.2 + 0.3 * number / n_random))
        ids = special + repeated_random(pool, period, min(max_tokens, 3 * period), rng)
        out.append(Text(f"random {number}", "random", ids, [vocabulary[0][i] for i in ids]))
    for number in range(1, n_templates + 1):
        out.append(template_text(f"template {number}", tokenize, rng, max_tokens))
    for text in out:
        add_patterns(text, shuffles, max_rows, shuffle_rows, rng)
    return out


def load_texts(held_out=False):
    """The package's own texts: {kind: [text, ...]}, or the list kept aside for measuring losses."""
    texts = json.loads((Path(__file__).parent / "texts.json").read_text(encoding="utf-8"))
    rest = texts.pop("held_out")
    return rest if held_out else texts


def plain_tokens(pieces, token_types):
    """Ids of ordinary word pieces (token type 1, a space and letters): what random sequences are
    drawn from."""
    found = [
        i
        for i, (piece, kind) in enumerate(zip(pieces, token_types))
        if kind == 1
        and isinstance(piece, str)
        and piece[:1] in " ▁"
        and piece[1:].isascii()
        and piece[1:].isalpha()
    ]
    if len(found) >= 200:
        return np.array(found)
    return np.flatnonzero(
        np.asarray(token_types) == 1
    )  # a vocabulary without such pieces: any ordinary token


def repeated_random(pool, period, length, rng):
    """`length` ids: `period` random tokens, then the same ones again and again (Olsson et al.
    2022)."""
    block = rng.choice(pool, period, replace=len(pool) < period)
    return np.resize(block, length).tolist()


def template_text(name, tokenize, rng, max_tokens=96):
    """Sentences from templates; pairs of verb and subject, noun and determiner, closing and opening
    bracket."""
    text, marks = (
        "",
        [],
    )  # marks: (role, start of the later word, start of the earlier one), characters

    def add(word, space=True):
        nonlocal text
        text += (" " if space and text else "") + word
        return len(text) - 1  # the word's last character

    def noun_phrase(nouns, first=False):
        determiner = add(
            rng.choice(["the", "a", "this", "every"]).capitalize()
            if first
            else rng.choice(["the", "a", "this", "every"])
        )
        for adjective in rng.choice(ADJECTIVES, rng.integers(0, 3), replace=False):
            add(adjective)
        noun = add(rng.choice(nouns))
        marks.append(("determiner", noun, determiner))
        return noun

    pieces = []
    while len(pieces) < max_tokens - 16:
        subject = noun_phrase(NOUNS, first=True)
        if rng.random() < 0.5:
            add(rng.choice(["near", "behind", "from"]))
            noun_phrase(PLACES)
        if rng.random() < 0.6:
            opening = add("(")
            for number, word in enumerate(
                rng.choice(ADJECTIVES, rng.integers(1, 5), replace=False)
            ):
                add(word, space=number > 0)
            marks.append(("bracket", add(")", space=False), opening))
        marks.append(("subject", add(rng.choice(VERBS)), subject))
        noun_phrase(NOUNS)
        add(".", space=False)
        tokens = tokenize(text)
        pieces = tokens["piece"].tolist()
    token_of = character_tokens(pieces, text)
    found = Text(name, "templates", tokens["id"].tolist()[:max_tokens], pieces[:max_tokens])
    pairs = {(token_of[later], token_of[earlier]) for _, later, earlier in marks}
    found.patterns["@syntactic"] = np.array(
        sorted((q, k) for q, k in pairs if k < q < max_tokens), int
    ).reshape(-1, 2)
    return found


def character_tokens(pieces, text):
    """For each character of a text, the token that holds it. ValueError where the pieces do not
    spell the text."""
    spelled, owner = b"", []
    for position, piece in enumerate(pieces):
        raw = piece if isinstance(piece, bytes) else piece.replace("▁", " ").encode()
        spelled += raw
        owner += [position] * len(raw)
    start = spelled.find(text.encode())
    if start < 0:
        raise ValueError(f"the tokens do not spell the text {text[:40]!r}: {pieces[:8]!r}")
    sizes = np.cumsum([0, *(len(char.encode()) for char in text[:-1])])
    return [owner[start + int(size)] for size in sizes]


def add_patterns(text, shuffles, max_rows, shuffle_rows, rng):
    """Fill in `patterns` and `rows` of a Text: what each behaviour means there, and its shuffled
    versions."""
    n = len(text.ids)
    queries = np.sort(rng.choice(np.arange(1, n), min(max_rows, n - 1), replace=False))
    own = {name.removeprefix("@"): pairs for name, pairs in text.patterns.items()}
    if text.natural:
        own |= natural_pairs(text.pieces, queries)
    if text.kind == "random":
        own |= token_pairs(text.ids, queries)
    text.patterns, text.rows = {}, {}
    for name, pairs in own.items():
        if len(pairs) == 0:
            continue
        text.patterns[f"@{name}"], text.rows[name] = pairs, len(np.unique(pairs[:, 0]))
        if name == "syntactic":
            shuffled = [same_distance(pairs, n, rng) for _ in range(shuffles)]
        else:
            few = np.unique(pairs[:, 0])
            few = rng.choice(few, min(shuffle_rows, len(few)), replace=False)
            kept = pairs[np.isin(pairs[:, 0], few)]
            shuffled = [same_row(kept, n, rng) for _ in range(shuffles)]
        for number, drawn in enumerate(shuffled):
            text.patterns[f"@{name}~{number}"] = drawn
            # A verb has one subject, but drawn pairs may share a query: these count pairs, not
            # rows.
            text.rows[f"{name}~"] = (
                len(drawn) if name == "syntactic" else len(np.unique(drawn[:, 0]))
            )
        if name == "syntactic":
            text.rows[name] = len(pairs)


def natural_pairs(pieces, queries):
    """Pairs of local, global, sink and delimiter attention at these queries: {name: (m, 2)}."""
    marks = np.array([is_delimiter(piece) for piece in pieces])
    keys = np.arange(len(pieces))
    distance = queries[:, None] - keys[None, :]  # (query, key)
    masks = {
        "local": (distance >= 0) & (distance < LOCAL),
        "global": (distance >= FAR) & (keys > 0),
        "sink": (keys == 0) & (distance >= 0),
        "delimiter": (distance >= 0) & marks & (keys > 0),
    }
    return {
        name: np.column_stack([queries[mask.nonzero()[0]], mask.nonzero()[1]])
        for name, mask in masks.items()
    }


def token_pairs(ids, queries):
    """Pairs of the behaviours that random tokens show: previous token, fixed offsets, duplicates,
    induction."""
    ids = np.asarray(ids)
    same = np.tril(ids[:, None] == ids[None, :], -1)
    after = np.zeros_like(same)
    after[:, 1:] = same[:, :-1]  # what followed the earlier occurrences
    out = {
        f"offset {d}": np.column_stack([queries[queries >= d], queries[queries >= d] - d])
        for d in range(OFFSETS)
    }
    out["previous token"] = out["offset 1"]
    for name, mask in (("duplicate", same), ("induction", np.tril(after))):
        row, key = mask[queries].nonzero()
        out[name] = np.column_stack([queries[row], key])
    return out


def is_delimiter(piece):
    """Whether a piece is punctuation or white space only."""
    text = piece.decode(errors="replace") if isinstance(piece, bytes) else piece
    return bool(text) and set(text) <= DELIMITERS | {" ", "▁"} and text not in (" ", "▁")


def same_row(pairs, n, rng):
    """As many keys for each query, drawn from those it may see: the row's weights shuffled."""
    query, count = np.unique(pairs[:, 0], return_counts=True)
    keys = [rng.permutation(q + 1)[:c] for q, c in zip(query, count)]
    return np.column_stack([np.repeat(query, count), np.concatenate(keys)])


def same_distance(pairs, n, rng):
    """For each pair another one of the same distance that carries no label, the first token left
    out."""
    labelled = set(map(tuple, pairs.tolist()))
    out = []
    for distance in (pairs[:, 0] - pairs[:, 1]).tolist():
        free = [
            (q, q - distance) for q in range(distance + 1, n) if (q, q - distance) not in labelled
        ]
        out.append(free[rng.integers(len(free))] if free else (n - 1, n - 1 - distance))
    return np.array(out)
