"""Where llama.cpp's programs are: one search for llama-server and for the tools beside it."""

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from ..errors import QuantizeError, ServerError
from .outputs import path_of

ENGINE_MEND = (
    "`llamatelemetry engine build` makes an engine wheel with llama-server in it; "
    "or set LLAMA_SERVER_PATH to a llama-server of your own."
)


def engine_folder() -> Path | None:
    """The folder of the installed bindings, or None. Located, not imported: importing them loads
    libllama and with it CUDA."""
    spec = find_spec("llama_cpp")
    return Path(spec.origin).parent if spec and spec.origin else None


def find_program(name: str) -> Path | None:
    """Path of one of llama.cpp's programs, or None: with the installed engine, in this Python's
    bin, beside LLAMA_SERVER_PATH, on PATH."""
    engine, server = engine_folder(), os.environ.get("LLAMA_SERVER_PATH")
    folders = [engine.parent / "bin"] if engine else []
    folders.append(Path(sys.prefix) / "bin")
    if server:
        folders.append(Path(server) if Path(server).is_dir() else Path(server).parent)
    for folder in folders:
        if is_program(folder / name):
            return (folder / name).resolve()
    found = shutil.which(name)
    return Path(found).resolve() if found else None


def find_server(path: str | os.PathLike | None = None) -> Path:
    """Path of llama-server: the argument, LLAMA_SERVER_PATH, beside the installed engine, PATH;
    ServerError if none.

    A path that was given but is not an executable file is an error, never passed over.
    """
    named = {"server_path": path, "LLAMA_SERVER_PATH": os.environ.get("LLAMA_SERVER_PATH")}
    for whose, given in named.items():
        if given:
            file = path_of(given, ServerError)
            file = file / "llama-server" if file.is_dir() else file
            if not is_program(file):
                raise ServerError(
                    f"{whose} says {given}, but there is no executable llama-server. {ENGINE_MEND}"
                )
            return file.resolve()
    if found := find_program("llama-server"):
        return found
    raise ServerError(
        "No llama-server: not in LLAMA_SERVER_PATH, not beside the installed engine, not on PATH. "
        + ENGINE_MEND
    )


def tool(name: str) -> str:
    """Path of one of llama.cpp's programs, see find_program. QuantizeError where there is none."""
    if found := find_program(name):
        return str(found)
    raise QuantizeError(
        f"{name} is not on this machine (looked beside the engine, beside LLAMA_SERVER_PATH and on "
        "PATH): install the engine's wheel, made by `llamatelemetry engine build`."
    )


def is_program(path: Path) -> bool:
    """Whether this is a file that may be executed."""
    return path.is_file() and os.access(path, os.X_OK)
