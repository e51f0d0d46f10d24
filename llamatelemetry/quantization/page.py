"""The page of notebook 16: each file's greedy answers, side by side."""

from collections.abc import Iterable, Sequence

from ..views.page import Page
from ..views.text import counted, html, text_of, whole_characters

_STYLE = """td.a{text-align:left;white-space:pre-wrap;width:100%} th{text-align:left}
td.p{white-space:nowrap} mark{background:var(--c1);color:#000}"""


def answers(rows: Iterable[dict], *, model: str) -> Page:
    """Generated answers beside the reference's, the first token that differs marked.

    rows: tokens.answer_rows, the reference first."""
    rows = list(rows)
    body = f"<h1>Greedy answers of each quantization: {html(model)}</h1>"
    body += "<p class='note'>Marked: the first token that is not the reference's.</p>"
    for row in rows:
        table = "".join(_answer(name, *said) for name, said in row["answers"].items())
        body += f"<h2 class='mono'>{html(row['prompt'])}</h2><table>{table}</table>"
    height = 110 + sum(60 + 34 * len(row["answers"]) for row in rows)
    return Page(f"Answers: {model}", body, "", {}, style=_STYLE, height=min(1000, height))


def _answer(name, pieces, first):
    said = html(text_of(pieces)) if first is None else _marked(pieces, first)
    place = "the same" if first is None else f"differs at token {first + 1}"
    place = f"ends after {counted(first, 'token')}" if first == len(pieces) else place
    place = "" if name == "reference" else place
    return f"<tr><th>{html(name)}</th><td class='a'>{said}</td><td class='p'>{place}</td></tr>"


def _marked(pieces: Sequence[str | bytes], first):
    """The text of pieces as HTML; marked: the characters that the token `first` is a part of."""
    parts, stop = [], 0
    for count, text in whole_characters(pieces):
        start, stop = stop, stop + count
        shown = html(text)
        parts.append(f"<mark>{shown or '&#8203;'}</mark>" if start <= first < stop else shown)
    return "".join(parts)
