"""A Ctrl-C while a package is imported inside of one of our functions: the import is whole, and
the interrupt comes."""

import importlib
import os
import signal
import sys
import threading

import pytest

import llamatelemetry
from llamatelemetry.imports import uninterrupted

# A package that is struck when it is half there.
SLOW = {
    "__init__": "import os, signal, threading, time\nfrom . import part\n"
    "arrived = []\n"
    "def strike():\n    os.kill(os.getpid(), signal.SIGINT)\n    arrived.append(1)\n"
    "threading.Thread(target=strike).start()\n"
    "while not arrived:\n    time.sleep(0.001)\n"
    "time.sleep(0.05)\nvalue = part.value\n",
    "part": "value = 3\n",
}


@pytest.fixture
def slow(tmp_path, monkeypatch):
    (folder := tmp_path / "slowly_there").mkdir()
    for name, text in SLOW.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield "slowly_there"
    for name in [name for name in sys.modules if name.startswith("slowly_there")]:
        del sys.modules[name]


def held(slow):
    with uninterrupted():
        importlib.import_module(slow)


def nested(slow):
    with uninterrupted():
        held(slow)
        assert sys.modules[slow].value == 3  # the outer one still holds it


def failing(slow):
    with uninterrupted():
        importlib.import_module(slow)
        raise ImportError("planted")


def a_public_name(slow):
    llamatelemetry.planted  # noqa: B018


@pytest.mark.parametrize("call", [held, nested, failing, a_public_name])
def test_an_interrupt_comes_after_a_whole_import(slow, call, monkeypatch):
    monkeypatch.setitem(llamatelemetry._WHERE, "planted", "planted")
    monkeypatch.setattr(llamatelemetry, "import_module", lambda name: importlib.import_module(slow))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        call(slow)
    assert signal.getsignal(signal.SIGINT) is before
    module = sys.modules[slow]
    assert module.value == 3 and importlib.import_module(slow) is module


def test_without_it_the_package_is_gone(slow):
    """Why it is needed: what the tests above plant does strike."""
    with pytest.raises(KeyboardInterrupt):
        importlib.import_module(slow)
    assert slow not in sys.modules and f"{slow}.part" in sys.modules


def test_another_thread_holds_nothing():
    seen = []

    def work():
        with uninterrupted():
            seen.append(signal.getsignal(signal.SIGINT))

    (thread := threading.Thread(target=work)).start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]


def test_a_users_own_handler_is_told_afterwards():
    told, inside = [], []
    before = signal.signal(signal.SIGINT, lambda *_: told.append(1))
    try:
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            inside = list(told)
        assert not inside and told == [1]
    finally:
        signal.signal(signal.SIGINT, before)
