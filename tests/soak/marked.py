"""All processes of a scene, told by a mark in their environment."""

import secrets
import time
from pathlib import Path

import psutil


class Marked:
    """Processes that carry a mark in their environment: whoever started them, or adopted them.

    name: the variable's; value: of a mark that is there already."""

    def __init__(self, name="SOAK_MARK", value=None):
        self.mark = f"{name}={value or secrets.token_hex(8)}"

    @property
    def environment(self):
        return dict([self.mark.split("=")])

    def all(self, but=()):
        found = []
        for process in psutil.process_iter():
            try:
                there = self.mark.encode() in Path(f"/proc/{process.pid}/environ").read_bytes()
                if there and process.pid not in but and process.status() != "zombie":
                    found.append(process)
            except (OSError, psutil.Error):
                pass
        return found

    def working(self, name):
        """The process whose program or module has this name; None where there is none."""
        for process in self.all():
            try:
                words = process.cmdline()
            except psutil.Error:
                continue
            if words and (words[0].endswith(name) or any(w.endswith(name) for w in words[1:3])):
                return process
        return None

    def guard(self):
        found = (one for one in self.all() if "guard.py" in " ".join(one.cmdline()[:6]))
        return next(found, None)

    def left(self, seconds, but=()):
        """What still runs after so many seconds; it is ended."""
        deadline = time.monotonic() + seconds
        while (still := self.all(but)) and time.monotonic() < deadline:
            time.sleep(0.1)
        said = []
        for process in still:
            try:
                said.append(" ".join(process.cmdline())[:120])
                process.kill()
            except psutil.Error:
                pass
        return said
