"""Whether a process that a test started still runs."""

import time

import psutil


def alive(pid):
    """Running, and not a zombie that only waits to be collected."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it may end between any two questions, so none is asked first
        return False


def gone(pid, seconds=5):
    """Whether it ended within so many seconds."""
    deadline = time.monotonic() + seconds
    while (running := alive(pid)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not running
