"""Texts that heads are measured on: natural ones (prose, code, lists), random tokens that repeat,
and sentences from templates whose grammar is known."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from .behaviours import Text, add_pairs

EACH = 4  # texts of each kind that is made here
NOUNS = "farmer teacher sailor doctor king child horse bird dog cat lawyer writer driver painter soldier guard".split()
VERBS = "sees follows helps carries watches finds leaves meets paints calls sends builds".split()
ADJECTIVES = "old young tall quiet small happy tired clever brown strange".split()
PLACES = "river house bridge garden market tower school forest".split()
DETERMINERS = "the a this every".split()


def default_texts(
    tokenize: Callable[..., pd.DataFrame],
    pieces: Sequence[str | bytes],
    token_types: Sequence[int],
    *,
    texts: dict[str, list[str]] | None = None,
    shuffles: int = 20,
    max_tokens: int = 96,
    seed: int = 0,
) -> list[Text]:
    """The set of texts with their pairs.

    tokenize: as InferenceEngine.tokenize, a DataFrame (id, piece) of a text. pieces, token_types:
    the vocabulary, to draw random tokens from. texts: {kind: [text, ...]} in place of the package's
    own prose, code and lists. max_tokens cuts each text; shuffles: versions of each pattern."""
    rng = np.random.default_rng(seed)
    special = tokenize("a")["id"].tolist()[:-1]  # what the model puts first
    found = []
    for kind, group in (texts or load_texts()).items():
        for number, text in enumerate(group, 1):
            tokens = tokenize(text).iloc[:max_tokens]
            ids, spelled = tokens["id"].tolist(), tokens["piece"].tolist()
            found.append(Text(f"{kind} {number}", kind, ids, spelled))
    pool = plain_tokens(pieces, token_types)
    for number in range(1, EACH + 1):
        # A head that looks a fixed number of tokens back is not taken for an induction head:
        # periods differ.
        period = int(max_tokens * (0.2 + 0.3 * number / EACH))
        ids = special + repeated_random(pool, period, min(max_tokens, 3 * period), rng)
        found.append(Text(f"random {number}", "random", ids, [pieces[i] for i in ids]))
    for number in range(1, EACH + 1):
        found.append(template_text(f"template {number}", tokenize, rng, max_tokens))
    for text in found:
        add_pairs(text, shuffles, rng)
    return found


def load_texts() -> dict[str, list[str]]:
    """The package's own texts: {kind: [text, ...]}."""
    return {kind: group for kind, group in _stored().items() if kind != "held_out"}


def held_out() -> list[str]:
    """The package's texts that no head is profiled on: losses are measured on them."""
    return _stored()["held_out"]


def _stored():
    return json.loads((Path(__file__).parent / "texts.json").read_text(encoding="utf-8"))


def plain_tokens(pieces: Sequence[str | bytes], token_types: Sequence[int]) -> np.ndarray:
    """Ids of ordinary word pieces (token type 1, a space and letters): what random sequences are
    drawn from; any ordinary tokens where there are fewer than 200 such."""

    def is_word(piece):
        if not isinstance(piece, str):
            return False
        return piece[:1] in " ▁" and piece[1:].isascii() and piece[1:].isalpha()

    ordinary = np.flatnonzero(np.asarray(token_types) == 1)
    words = [i for i in ordinary if is_word(pieces[int(i)])]
    return np.array(words) if len(words) >= 200 else ordinary


def repeated_random(
    pool: np.ndarray, period: int, length: int, rng: np.random.Generator
) -> list[int]:
    """`length` ids: `period` random tokens, then the same ones again and again (Olsson et al.
    2022)."""
    block = rng.choice(pool, period, replace=len(pool) < period)
    return np.resize(block, length).tolist()


class _Sentences:
    """A text made of templates, and the pairs in it: (last character of the later word, of the
    earlier one)."""

    def __init__(self, rng):
        self.rng, self.text, self.pairs = rng, "", []

    def add(self, word, space=True):
        """Returns where the word's last character is."""
        self.text += (" " if space and self.text else "") + word
        return len(self.text) - 1

    def noun_phrase(self, nouns, first=False):
        word = self.rng.choice(DETERMINERS)
        determiner = self.add(word.capitalize() if first else word)
        for adjective in self.rng.choice(ADJECTIVES, self.rng.integers(0, 3), replace=False):
            self.add(adjective)
        noun = self.add(self.rng.choice(nouns))
        self.pairs.append((noun, determiner))
        return noun

    def bracket(self):
        opening = self.add("(")
        words = self.rng.choice(ADJECTIVES, self.rng.integers(1, 5), replace=False)
        for number, word in enumerate(words):
            self.add(word, space=number > 0)
        self.pairs.append((self.add(")", space=False), opening))

    def sentence(self):
        subject = self.noun_phrase(NOUNS, first=True)
        if self.rng.random() < 0.5:
            self.add(self.rng.choice(["near", "behind", "from"]))
            self.noun_phrase(PLACES)
        if self.rng.random() < 0.6:
            self.bracket()
        self.pairs.append((self.add(self.rng.choice(VERBS)), subject))
        self.noun_phrase(NOUNS)
        self.add(".", space=False)


def template_text(
    name: str,
    tokenize: Callable[..., pd.DataFrame],
    rng: np.random.Generator,
    max_tokens: int = 96,
) -> Text:
    """Sentences from templates; its pairs are verb and subject, noun and determiner, closing and
    opening bracket."""
    made, pieces = _Sentences(rng), list[str | bytes]()
    while len(pieces) < max_tokens - 16:
        made.sentence()
        tokens = tokenize(made.text)
        pieces = tokens["piece"].tolist()
    token_of = character_tokens(pieces, made.text)
    pairs = {(token_of[later], token_of[earlier]) for later, earlier in made.pairs}
    kept = sorted((query, key) for query, key in pairs if key < query < max_tokens)
    grammar = {"syntactic": [np.array(kept, int).reshape(-1, 2)]}
    return Text(name, "templates", tokens["id"].tolist()[:max_tokens], pieces[:max_tokens], grammar)


def character_tokens(pieces: Sequence[str | bytes], text: str) -> list[int]:
    """For each character of a text, the token that holds it. ValueError where the pieces do not
    spell the text."""
    raw = [p if isinstance(p, bytes) else p.replace("▁", " ").encode() for p in pieces]
    owner = np.repeat(np.arange(len(raw)), [len(part) for part in raw])  # of each byte
    start = b"".join(raw).find(text.encode())
    if start < 0:
        raise ValueError(f"the tokens do not spell the text {text[:40]!r}: {pieces[:8]!r}")
    sizes = np.cumsum([0, *(len(char.encode()) for char in text[:-1])])
    return owner[start + sizes].tolist()
