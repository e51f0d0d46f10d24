"""Imports without what takes long there and serves nobody here."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without(package: str) -> Iterator[None]:
    """The imports of a `with` block as if a package that others can do without were not installed.
    It can be imported afterwards; one that is loaded already stays."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]  # an ImportError
    try:
        yield
    finally:
        del sys.modules[package]


# Where it is installed, jsonschema, which nbformat needs, makes 38 grammars at its import: more
# than a second, for the check of a format that notebooks do not have.
IRIS = "rfc3987_syntax"
