"""Small labelled sets, made by rules with a seed: what a state may hold, in sentences whose other
words do not tell it. Rows of one group share the words that decide the label, so that a probe is
tested on words that it has not seen (groups are never split)."""

from collections.abc import Callable

import numpy as np
import pandas as pd

from ..arguments import whole
from ..errors import ProbeError

NOUNS = (
    "key cabinet farmer teacher sailor doctor king horse bird dog cat lawyer writer driver painter "
    "soldier guard friend neighbour student"
).split()
VERBS = (
    "walk:walked help:helped watch:watched call:called paint:painted follow:followed look:looked "
    "talk:talked see:saw find:found leave:left meet:met build:built send:sent write:wrote sing:sang"
).split()
PLACES = "river house bridge garden market tower school forest station harbour".split()
GOOD = (
    "wonderful brilliant delightful superb charming excellent lovely moving splendid gripping "
    "beautiful fantastic enjoyable clever touching perfect"
).split()
BAD = (
    "terrible dreadful boring awful clumsy horrible dull tedious shallow ugly "
    "disappointing painful stupid annoying weak miserable"
).split()
THINGS = "film book play song meal speech game painting story concert".split()
# The same eight subjects, five verbs and six objects in four languages.
LANGUAGES = {
    "English": (
        "the dog|the woman|the child|my friend|the king|the bird|the teacher|the doctor",
        "sees|loves|knows|finds|buys",
        "the house|the book|the river|the garden|the bread|the city",
    ),
    "French": (
        "le chien|la femme|l'enfant|mon ami|le roi|l'oiseau|le professeur|le médecin",
        "voit|aime|connaît|trouve|achète",
        "la maison|le livre|la rivière|le jardin|le pain|la ville",
    ),
    "German": (
        "der Hund|die Frau|das Kind|mein Freund|der König|der Vogel|der Lehrer|der Arzt",
        "sieht|liebt|kennt|findet|kauft",
        "das Haus|das Buch|den Fluss|den Garten|das Brot|die Stadt",
    ),
    "Spanish": (
        "el perro|la mujer|el niño|mi amigo|el rey|el pájaro|el maestro|el médico",
        "ve|ama|conoce|encuentra|compra",
        "la casa|el libro|el río|el jardín|el pan|la ciudad",
    ),
}


def number(rng: np.random.Generator, n: int) -> list[tuple]:
    """Singular or plural: of the subject, with another noun, of either number, after it."""
    rows = []
    for at in range(n):
        noun, other, place = rng.choice(NOUNS), rng.choice(NOUNS), rng.choice(PLACES)
        label = ("singular", "plural")[at % 2]
        subject = noun + "s" * (label == "plural")
        rows.append(
            (f"The {subject} near the {other}{'s' * rng.integers(2)} by the {place}", label, noun)
        )
    return rows


def tense(rng: np.random.Generator, n: int) -> list[tuple]:
    """Present or past: of the verb, three words or more before the end."""
    rows = []
    for at in range(n):
        present, past = rng.choice(VERBS).split(":")
        label = ("present", "past")[at % 2]
        verb = present if label == "present" else past
        who = f"The {rng.choice(NOUNS)}s"
        rows.append(
            (
                f"{who} {verb} with the {rng.choice(NOUNS)} in the {rng.choice(PLACES)}",
                label,
                present,
            )
        )
    return rows


def sentiment(rng: np.random.Generator, n: int) -> list[tuple]:
    """Praise or blame: one adjective, and then the same words in both."""
    rows = []
    for at in range(n):
        label, words = (("positive", GOOD), ("negative", BAD))[at % 2]
        word, thing = rng.choice(words), rng.choice(THINGS)
        rows.append((f"It was a truly {word} {thing}, said the {rng.choice(NOUNS)}", label, word))
    return rows


def language(rng: np.random.Generator, n: int) -> list[tuple]:
    """Which of four languages: the same sentence in each; a group is what is said of whom."""
    rows, names = [], list(LANGUAGES)
    for at in range(n):
        parts = [words.split("|") for words in LANGUAGES[names[at % 4]]]
        if at % 4 == 0:
            places = [int(rng.integers(len(words))) for words in parts]
        said = " ".join(words[place] for words, place in zip(parts, places))
        rows.append((said[0].upper() + said[1:], names[at % 4], f"{places[0]}-{places[2]}"))
    return rows


def sums(rng: np.random.Generator, n: int) -> list[tuple]:
    """True or false: a sum of two numbers; wrong by 1, 2 or 10, both ways. A group is the first
    number."""
    rows = []
    for at in range(n):
        one, other = rng.integers(11, 50, 2)
        wrong = 0 if at % 2 == 0 else int(rng.choice([-10, -2, -1, 1, 2, 10]))
        label = "false" if wrong else "true"
        rows.append((f"{one} + {other} = {one + other + wrong}", label, f"{one}"))
    return rows


SETS: dict[str, Callable] = {
    "number": number,
    "tense": tense,
    "sentiment": sentiment,
    "language": language,
    "sums": sums,
}


def labelled(name: str, n: int = 240, seed: int = 0) -> pd.DataFrame:
    """A set by its name (number, tense, sentiment, language, sums): DataFrame (text, label, group),
    n rows of different texts, each label as often, as far as n divides. ProbeError for another
    name, or for more texts than the rules make."""
    if name not in SETS:
        raise ProbeError(f"There is no set {name!r}: {', '.join(SETS)}, or a DataFrame of yours.")
    whole("n", n, 1, error=ProbeError)
    rng = np.random.default_rng(whole("seed", seed, 0, error=ProbeError))
    table = pd.DataFrame(SETS[name](rng, 8 * n), columns=["text", "label", "group"])
    table = table.drop_duplicates("text")
    each = n // table.label.nunique()
    if not each:
        raise ProbeError(
            f"n={n}: the set {name!r} has {table.label.nunique()} labels, one text each is the least."
        )
    if (table.label.value_counts() < each).any():
        raise ProbeError(f"The set {name!r} has no {n} different texts: ask for fewer.")
    return table.groupby("label").head(each).reset_index(drop=True)
