"""Texts to measure a model on: the one of this package, a file, or WikiText-2 where there is a network."""

from pathlib import Path

from .errors import LlamaTelemetryError

TEXT = Path(__file__).parent / "data" / "text.txt"


class CompareError(LlamaTelemetryError, ValueError):
    """Files or a text that cannot be compared as asked."""


def load_text(text=None):
    """A text to measure on: None for the package's own, a path to a file, "wikitext-2" (a download), or the text."""
    if text is None:
        text = TEXT
    elif text == "wikitext-2":
        return _wikitext()
    if isinstance(text, Path) or (len(text) < 1024 and "\n" not in text and Path(text).is_file()):
        try:
            return Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CompareError(f"No text at {text}: {error}.") from error
    return text


def _wikitext():
    import zipfile

    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download("ggml-org/ci", "wikitext-2-raw-v1.zip", repo_type="dataset")
    except Exception as error:  # offline, refused, gone: the hub's client raises a different one for each
        raise CompareError(
            f"WikiText-2 could not be downloaded ({error}): pass text=None for the built-in text."
        ) from error
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if n.endswith("wiki.test.raw"))
        return archive.read(name).decode("utf-8").removesuffix("\n")
