"""Text as it is drawn: a token's piece made visible, pieces joined to text, and what each medium
needs escaped.

Figures, pages and sentences are given plain text (a piece, a model's name, a prompt). It is escaped
once, where it is drawn: by `plotly` in a Plotly figure, by `html` in a page, by `markdown` in a
document. Printed lines, canvases and `textContent` need nothing beyond `token_text`."""

import codecs
import html as _html
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

_NAMED = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍", "\u00a0": "⍽"}
# Drawn as nothing although Python calls them printable: joiners, fillers, variation selectors, the
# empty Braille cell.
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
_RIGHT_TO_LEFT = re.compile(
    "[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefe\U00010800-\U00010fff\U0001e800-\U0001efff]"
)
_ISOLATE, _POP = "\u2068", "\u2069"
# What plotly.js (src/lib/svg_text_utils.js) takes for markup: tags, entities, TeX between dollars
# where the page has MathJax; in templates %{...}. Of the named entities it knows only eight, of the
# numeric ones all.
_PLOTLY = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "$": "&#36;", "\n": "<br>"}
_PLOTLY_SPECIAL = re.compile(r"[&<>$\n]|%(?=\{)")


def token_text(piece: str | bytes) -> str:
    """A token's piece so that a space, a newline, a tab and a byte piece can be told apart: ' the'
    -> '␣the'.

    Text with right-to-left letters is put between Unicode's isolates (U+2068, U+2069), which are
    not seen: else the numbers beside it would change places. What is token text already stays as it
    is."""
    if isinstance(piece, bytes):
        try:
            piece = piece.decode()
        except UnicodeDecodeError:
            return "".join(f"<0x{byte:02X}>" for byte in piece)
    if piece == "":
        return "∅"
    if piece[0] == _ISOLATE and piece[-1] == _POP:
        return piece
    return isolated("".join(map(_visible, piece)))


def seen(text: str) -> str:
    """Text as it is where all of it is seen, else (blanks at its ends, control characters) as token
    text."""
    bare = text.replace(_ISOLATE, "").replace(_POP, "")
    whole = bare.strip() == bare != "" and all(
        char == " " or _visible(char) == char for char in bare
    )
    return text if whole and bare != text else isolated(bare) if whole else token_text(bare)


def isolated(text: str) -> str:
    """Text as it is, between Unicode's isolates where it has right-to-left letters."""
    return f"{_ISOLATE}{text}{_POP}" if _RIGHT_TO_LEFT.search(text) else text


def _visible(char: str) -> str:
    if char in _NAMED:
        return _NAMED[char]
    return char if char.isprintable() and not _INVISIBLE.match(char) else f"\\x{ord(char):02x}"


def token_labels(
    pieces: Sequence[str | bytes], positions: Iterable[int] | None = None
) -> list[str]:
    """Labels for tokens, each one once: 'position text'. positions: which of the pieces, all where
    left out."""
    chosen = enumerate(pieces) if positions is None else ((at, pieces[at]) for at in positions)
    return [f"{position} {token_text(piece)}" for position, piece in chosen]


def token_columns(frame: "pd.DataFrame") -> "pd.DataFrame":
    """A DataFrame with its columns of pieces ("piece", "from_piece", ...) as token text, for a
    table that is shown."""
    columns = [column for column in frame.columns if str(column).split("_")[-1] == "piece"]
    return frame.assign(**{column: frame[column].map(token_text) for column in columns})


def quoted(piece: str | bytes) -> str:
    """A piece in a sentence."""
    return f"'{token_text(piece)}'"


def counted(n: int, one: str, many: str | None = None) -> str:
    """A number of things in words: counted(1, "head") is "1 head", counted(0, "query", "queries")
    "0 queries"."""
    return f"{n} {one if n == 1 else many or one + 's'}"


def shorten(text: str, length: int) -> str:
    """Text of at most `length` characters, the last one … where some are left out."""
    if len(text) <= length:
        return text
    return text[: length - 1] + "…" + (_POP if text[0] == _ISOLATE else "")


def whole_characters(pieces: Iterable[str | bytes]) -> list[tuple[int, str]]:
    """[(number of pieces, text)]: the pieces in the shortest runs whose bytes are whole characters.

    Pieces: str, or bytes where a token is not whole characters. Bytes that never become one are
    U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    runs, count, text = [], 0, ""
    for piece in pieces:
        count += 1
        text += decoder.decode(
            piece if isinstance(piece, bytes) else piece.encode("utf-8", "replace")
        )
        if not decoder.getstate()[0]:
            runs.append((count, text))
            count, text = 0, ""
    if count:
        runs.append((count, text + decoder.decode(b"", final=True)))
    return runs


def text_of(pieces: Iterable[str | bytes]) -> str:
    """The text that consecutive pieces spell; a character may span several of them."""
    return "".join(text for _, text in whole_characters(pieces))


def plotly(text: object) -> str:
    """Text for a Plotly title, label, name, hover or template: shown as it is, with its line
    breaks."""
    return _PLOTLY_SPECIAL.sub(lambda found: _PLOTLY.get(found[0], "&#37;"), str(text))


def html(text: object) -> str:
    """Text for an HTML element or a quoted attribute."""
    return _html.escape(str(text))


def markdown(text: object) -> str:
    """Text in which Markdown, with GitHub's tables and formulas, finds nothing to do."""
    return re.sub(r"([\\`*_\[\]<>&|$~])", r"\\\1", str(text))


def piece_kind(piece: str | bytes) -> str:
    """number, word, part, punctuation, whitespace or other, from a token's piece."""
    if isinstance(piece, bytes):
        return "other"
    text = piece.strip()
    if not text:
        return "whitespace"
    if any(c.isdigit() for c in text):
        return "number"
    if text.isalpha():
        return "word" if piece[0].isspace() else "part"
    return "punctuation" if not any(c.isalnum() for c in text) else "other"
