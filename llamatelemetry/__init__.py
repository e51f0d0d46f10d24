"""llamatelemetry: see inside a quantized language model while llama.cpp runs it.

Public names are imported on first use, so that `import llamatelemetry` loads no GPU library and
costs nothing. They and their modules are in __init__.pyi, which editors and type checkers read."""

import ast
from importlib import import_module
from pathlib import Path

from .imports import uninterrupted

__version__ = "0.1.0"

_WHERE = {
    alias.name: statement.module
    for statement in ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
    if isinstance(statement, ast.ImportFrom)
    for alias in statement.names
}
__all__ = ["__version__", *_WHERE]


def __getattr__(name):
    if name not in _WHERE:
        raise AttributeError(f"module 'llamatelemetry' has no attribute {name!r}")
    with uninterrupted():
        module = import_module(f"{__name__}.{_WHERE[name]}")
    value = globals()[name] = getattr(module, name)
    return value


def __dir__():
    return sorted(__all__)
