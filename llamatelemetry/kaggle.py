"""What Kaggle gives and takes: attached wheels, secrets, folders that are kept or not, disk, GPUs.

`setup()` is what the first cell of every notebook calls. Off Kaggle it installs nothing and only says what is here.
"""

import contextlib
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path
from urllib.error import HTTPError

from . import build, gpus
from .errors import LlamaTelemetryError

SESSION_HOURS = 12
SECRET_SECONDS = 10  # for one secret; Kaggle's client alone would wait 40


# Folders

def input_dir():
    """Where attached data are: /kaggle/input, read-only."""
    return Path(os.environ.get("LLAMATELEMETRY_KAGGLE_INPUT", "/kaggle/input"))


def working_dir():
    """Where results go: /kaggle/working, which Kaggle keeps (20 GB); elsewhere the current folder."""
    return Path(os.environ.get("LLAMATELEMETRY_KAGGLE_WORKING", "/kaggle/working")) if on_kaggle() else Path.cwd()


def temp_dir():
    """Where models and scratch go: /kaggle/temp, which Kaggle does not keep; elsewhere the system's."""
    if not on_kaggle():
        return Path(tempfile.gettempdir())
    folder = Path(os.environ.get("LLAMATELEMETRY_KAGGLE_TEMP", "/kaggle/temp"))
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return folder if os.access(folder, os.W_OK) else Path(tempfile.gettempdir())


def on_kaggle():
    """Is this a Kaggle session? (Also true where the tests have laid out one.)"""
    return "KAGGLE_KERNEL_RUN_TYPE" in os.environ or input_dir().is_dir()


def free_bytes(folder):
    """Free bytes where `folder` is, or will be once it is made."""
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


# Secrets

_silent = False  # the service of secrets did not answer: it needs the internet, and is not asked again


def secret(*labels):
    """The first of these that is a Kaggle secret or an environment variable, else None. Nothing prints it."""
    for label in labels:
        if value := _attached_secret(label) or os.environ.get(label):
            return value
    return None


def _attached_secret(label):
    """A secret that is attached to this notebook, or None. Asks within SECRET_SECONDS, and not at all once the service
    was silent."""
    global _silent
    if _silent:
        return None
    answers = []

    def ask():
        try:
            from kaggle_secrets import UserSecretsClient

            answers.append(UserSecretsClient().get_secret(label))
        except Exception as error:  # not on Kaggle, nothing attached, no connection: each a type of its own
            answers.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECRET_SECONDS)
    answer = answers[0] if answers else TimeoutError()
    # The client makes a ConnectionError of an HTTP status, too: that is an answer.
    _silent = isinstance(answer, OSError) and not isinstance(answer.__cause__, HTTPError)
    return None if isinstance(answer, Exception) else answer


# The first cell

def setup(make_engine=True):
    """Prepare this session: packages, engine, secrets, folders, the theme, and the GPU of this process.

    Everything that can be said before RAPIDS is imported is said here, in a few lines. Needs no restart of the kernel.
    Raises GpuError if RAPIDS was imported before (it then sits on the inference GPU), LlamaTelemetryError where
    something that all notebooks need is not to be had.
    """
    global _silent
    from . import __version__
    from .kaggle_install import install_engine, install_missing

    started, _silent = time.monotonic(), False  # the internet may be on by now
    plan = gpus.plan()
    gpus.assign_analytics(plan)  # first: nothing after this may start CUDA on the wrong GPU
    lines = []
    if on_kaggle():
        _folders()
        lines += install_missing()
        lines.append(install_engine(make_engine))
        if token := secret("HF_TOKEN"):
            os.environ["HF_TOKEN"] = token
        keys = [secret(label) for label in ("Graphistry_Personal_Key_ID", "Graphistry_Personal_Secret_Key")]
        lines.append(f"Secrets: HF_TOKEN {_there(token)}, Graphistry key {_there(keys[0])}, secret {_there(keys[1])}."
                     + " Kaggle gives none without the internet (Settings)." * _silent)
        lines.append(_session_line())
    elif (engine := build.installed()) is None:
        raise LlamaTelemetryError("The engine is not installed: llamatelemetry engine build --install. "
                                  "`llamatelemetry doctor` says what else is missing.")
    else:
        lines.append(f"Engine: llama.cpp {engine['llama_cpp_commit'] or engine['llama_cpp_python']}.")
    from .plots import theme  # Plotly may only just have been installed

    theme.setup()
    for line in (f"llamatelemetry {__version__}, ready in {time.monotonic() - started:.1f} s.", *lines, plan.line):
        print(line)


def _there(value):
    return "set" if value else "not set"


def _folders():
    """Models and scratch to where Kaggle does not keep them, unless the user said otherwise."""
    os.environ.setdefault("HF_HOME", str(temp_dir() / "huggingface"))
    os.environ.setdefault("LLAMATELEMETRY_CACHE", str(temp_dir() / "llamatelemetry"))


def _session_line():
    import psutil

    up = (time.time() - psutil.Process(1).create_time()) / 3600
    rooms = [f"{folder} {free_bytes(folder) / 1e9:,.0f} GB free ({kept})"
             for folder, kept in ((working_dir(), "kept"), (temp_dir(), "not kept"))]
    memory = psutil.virtual_memory().available / 1e9
    return f"Session: up {up:.1f} of {SESSION_HOURS} h; {'; '.join(rooms)}; memory {memory:,.0f} GB free."
