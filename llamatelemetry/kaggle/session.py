"""What Kaggle gives and takes: attached wheels, secrets, folders that are kept or not, disk, GPUs.

`setup()` is what the first cell of every notebook calls. Off Kaggle it installs nothing and only
says what is here."""

import os
import time

from ..errors import LlamaTelemetryError
from ..files import places
from ..files.places import free_bytes, on_kaggle, secret, temp_dir, working_dir
from ..files.scratch import sweep
from ..gpus import devices
from ..tools import build

SESSION_HOURS = 12


def setup(make_engine: bool = True) -> None:
    """Prepare this session: packages, engine, secrets, folders, the theme, and the GPU of this
    process.

    Everything that can be said before RAPIDS is imported is said here, in a few lines. Needs no
    restart of the kernel. Raises GpuError if RAPIDS was imported before (it then sits on the
    inference GPU), LlamaTelemetryError where something that all notebooks need is not to be had.
    """
    from .. import __version__
    from .engine import install_engine
    from .install import install_missing

    started, places.silent = time.monotonic(), False  # the internet may be on by now
    plan = devices.plan()
    devices.assign_analytics(plan)  # first: nothing after this may start CUDA on the wrong GPU
    lines = []
    if on_kaggle():
        _folders()
        lines += install_missing()
        lines.append(install_engine(make_engine))
        if token := secret("HF_TOKEN"):
            os.environ["HF_TOKEN"] = token
        names = ("Graphistry_Personal_Key_ID", "Graphistry_Personal_Secret_Key")
        key, key_secret = (_there(secret(name)) for name in names)
        lines.append(
            f"Secrets: HF_TOKEN {_there(token)}, Graphistry key {key}, secret {key_secret}."
            + " Kaggle gives none without the internet (Settings)." * places.silent
        )
        lines.append(_session_line())
    elif (engine := build.installed()) is None:
        raise LlamaTelemetryError(
            "The engine is not installed: llamatelemetry engine build --install. "
            "`llamatelemetry doctor` says what else is missing."
        )
    else:
        version = engine["llama_cpp_commit"] or engine["llama_cpp_python"]
        lines.append(f"Engine: llama.cpp {version}.")
    from ..views import theme  # Plotly may only just have been installed

    theme.setup()
    print(f"llamatelemetry {__version__}, ready in {time.monotonic() - started:.1f} s.")
    print(*lines, plan.line, sep="\n")


def _there(value):
    return "set" if value else "not set"


def _folders():
    """Models and scratch to where Kaggle does not keep them, unless the user said otherwise."""
    os.environ.setdefault("HF_HOME", str(temp_dir() / "huggingface"))
    os.environ.setdefault("LLAMATELEMETRY_CACHE", str(temp_dir() / "llamatelemetry"))
    sweep()


def _session_line():
    import psutil

    up = (time.time() - psutil.Process(1).create_time()) / 3600
    rooms = [
        f"{folder} {free_bytes(folder) / 1e9:,.0f} GB free ({kept})"
        for folder, kept in ((working_dir(), "kept"), (temp_dir(), "not kept"))
    ]
    memory = psutil.virtual_memory().available / 1e9
    return f"Session: up {up:.1f} of {SESSION_HOURS} h; {'; '.join(rooms)}; memory {memory:,.0f} GB free."
