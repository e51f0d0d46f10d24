"""Imports inside of functions, whole even where a Ctrl-C comes meanwhile."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold a SIGINT while the imports of a `with` block run; it is delivered after them.

    A package that is interrupted in the middle of its import stays half there: its submodules are
    loaded, it is not, and each later import of it fails ("partially initialized module") until
    the process ends. In another thread than the main one nothing is held: no KeyboardInterrupt
    comes there."""
    there = threading.current_thread() is threading.main_thread()
    usual = signal.getsignal(signal.SIGINT) if there else None
    if usual is None:  # or not Python's to hold
        yield
        return
    held: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
        if held:
            signal.raise_signal(signal.SIGINT)
