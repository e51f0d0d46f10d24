"""Where things lie: Kaggle's folders and secrets, the cache, the room that is left."""

import contextlib
import os
import shutil
import tempfile
import threading
from pathlib import Path
from urllib.error import HTTPError

from ..secrecy import keep

SECRET_SECONDS = 10  # for one secret; Kaggle's client alone would wait 40


def input_dir() -> Path:
    """Where attached data are: /kaggle/input, read-only."""
    return Path(os.environ.get("LLAMATELEMETRY_KAGGLE_INPUT", "/kaggle/input"))


def working_dir() -> Path:
    """Where results go: /kaggle/working, which Kaggle keeps (20 GB); elsewhere the current
    folder."""
    return (
        Path(os.environ.get("LLAMATELEMETRY_KAGGLE_WORKING", "/kaggle/working"))
        if on_kaggle()
        else Path.cwd()
    )


def temp_dir() -> Path:
    """Where models and scratch go: /kaggle/temp, which Kaggle does not keep; elsewhere the
    system's."""
    if not on_kaggle():
        return Path(tempfile.gettempdir())
    folder = Path(os.environ.get("LLAMATELEMETRY_KAGGLE_TEMP", "/kaggle/temp"))
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return folder if os.access(folder, os.W_OK) else Path(tempfile.gettempdir())


def on_kaggle() -> bool:
    """Is this a Kaggle session? (Also true where the tests have laid out one.)"""
    return "KAGGLE_KERNEL_RUN_TYPE" in os.environ or input_dir().is_dir()


def free_bytes(folder: str | os.PathLike) -> int:
    """Free bytes where `folder` is, or will be once it is made."""
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


silent = (
    False  # the service of secrets did not answer: it needs the internet, and is not asked again
)


def secret(*labels: str) -> str | None:
    """The first of these that is a Kaggle secret or an environment variable, else None. Nothing
    prints it."""
    for label in labels:
        if value := _attached_secret(label) or os.environ.get(label):
            return keep(value)
    return None


def _attached_secret(label):
    """A secret that is attached to this notebook, or None. Asks within SECRET_SECONDS, and not at
    all once the service was silent."""
    global silent
    if silent:
        return None
    answers = []

    def ask():
        try:
            from kaggle_secrets import UserSecretsClient

            answers.append(UserSecretsClient().get_secret(label))
        # Not on Kaggle, nothing attached, no connection: each a type of its own
        except Exception as error:
            answers.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECRET_SECONDS)
    answer = answers[0] if answers else TimeoutError()
    # The client makes a ConnectionError of an HTTP status, too: that is an answer.
    silent = isinstance(answer, OSError) and not isinstance(answer.__cause__, HTTPError)
    return None if isinstance(answer, Exception) else answer


def cache_dir() -> Path:
    """$LLAMATELEMETRY_CACHE, $XDG_CACHE_HOME/llamatelemetry or ~/.cache/llamatelemetry."""
    if os.environ.get("LLAMATELEMETRY_CACHE"):
        return Path(os.environ["LLAMATELEMETRY_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "llamatelemetry"
