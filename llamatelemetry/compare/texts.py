"""Texts to measure a model on: the one of this package, a file, or WikiText-2 where there is a
network."""

import os
import re
from pathlib import Path

from ..arguments import writable
from ..errors import CompareError, shown
from ..files.outputs import path_of

TEXT = Path(__file__).parent / "text.txt"


def load_text(text: str | Path | None = None) -> str:
    """A text to measure on, as a str.

    text: None for the package's own; a Path for a file (UTF-8, line ends kept); "wikitext-2" (a
    download); any other str is the text itself, unless it is written as a path: on one line and
    either starting with "/", "./", "../" or "~/", or with a "/" and no space, or ending like a file
    of text (.txt, .md, .raw, .json, .py, ...). That one is read; CompareError where no such file
    is. CompareError, too, for a str that could be both, because a file of that name is here: a Path
    makes it the file, a newline at its end the text. What the disk holds never decides in silence
    which of the two is meant."""
    if isinstance(text, str) and text == "wikitext-2":
        return _wikitext()
    text = TEXT if text is None else text
    path = place(text)
    if path is None:
        return writable(text, CompareError)
    try:
        return path.read_bytes().decode("utf-8-sig")  # line ends stay as they are
    except (OSError, ValueError) as error:  # ValueError: not UTF-8
        mend = (
            " If this is the text itself, end it with a newline." if isinstance(text, str) else ""
        )
        raise CompareError(f"No text at {shown(text)}: {error}.{mend}") from error


def place(text):
    """The absolute path where load_text would read a text, None for one that is meant itself.
    CompareError as there."""
    if is_path(text):
        return path_of(text, CompareError)
    if isinstance(text, str) and _is_file(text):
        raise CompareError(
            f"{text!r} is the name of a file here and may be the text itself: give Path({text!r}) for "
            "the file, or end the text with a newline."
        )
    return None


_SUFFIXES = (
    "txt|text|md|rst|raw|jsonl?|csv|tsv|tex|html?|xml|ya?ml|py|ipynb|c|cc|cpp|h|js|ts|rs|go|java|sh"
)
_PATH = re.compile(rf"(/|\.\.?/|~[^/\s]*/).+|\S*/\S*|.*[^\s/]\.({_SUFFIXES})", re.IGNORECASE)


def is_path(text):
    """Whether load_text takes it for a path: a Path, or a str in the form of one, by its characters
    alone."""
    if not isinstance(text, str):
        return isinstance(text, os.PathLike)
    parts = text.encode("utf-8", "surrogatepass").split(b"/")
    return (
        max(map(len, parts)) < 256
        and len(text) < 4096
        and "\0" not in text
        and bool(_PATH.fullmatch(text))
    )


def _is_file(text):
    try:
        return "\n" not in text and Path(text).is_file()
    except (OSError, ValueError):  # longer than a name can be, or with a zero byte: no file
        return False


def _wikitext():
    import zipfile

    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download("ggml-org/ci", "wikitext-2-raw-v1.zip", repo_type="dataset")
    except (
        Exception
    ) as error:  # offline, refused, gone: the hub's client raises a different one for each
        raise CompareError(
            f"WikiText-2 could not be downloaded ({error}): pass text=None for the built-in text."
        ) from None
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if n.endswith("wiki.test.raw"))
        return archive.read(name).decode("utf-8").removesuffix("\n")
