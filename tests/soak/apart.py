"""A part of the soak in a process of its own: nothing of it is in another part's counts, and
nothing of it stays, whatever ends it or the soak."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from .marked import Marked
from .scene import can_mount, namespace

HERE = Path(__file__).parent
NAME = "SOAK_PART"  # a variable of all processes of a part


class Apart:
    """Runs a part with these arguments of the command; `--said` is added, where it writes what it
    found. It has a temporary folder and, where that can be had, shared memory of its own: what
    another part's processes sweep away there is not missed here."""

    def __init__(self, part, arguments):
        self.part, self.marked = part, Marked(NAME)
        self.folder = Path(tempfile.mkdtemp(prefix=f"soak-{part}-"))
        self._said = self.folder / "said.json"
        given = [*arguments, "--parts", part, "--said", str(self._said)]
        command = [sys.executable, str(HERE), *given]
        if can_mount():
            shell = 'mount -t tmpfs soak /dev/shm; exec "$@"'
            command = ["unshare", namespace(), "sh", "-ec", shell, "sh", *command]
        env = os.environ | self.marked.environment | {"TMPDIR": str(self.folder)}
        env |= {"OMP_WAIT_POLICY": "passive"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, env=env, start_new_session=True
        )

    def over(self):
        """Whether it has said what it found, or ended without."""
        return self._said.is_file() or self.process.poll() is not None

    def found(self):
        """What it found (see __main__.alone); None where it ended before it said so."""
        return json.loads(self._said.read_text()) if self._said.is_file() else None

    def close(self):
        """End it and all that it started; remove its folder."""
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        while self.marked.left(0):  # those that were being started, too
            pass
        shutil.rmtree(self.folder, ignore_errors=True)


def ends_with_the_soak():
    """In a part: a thread that ends it, all that it has started and its folder, where stdin ends:
    then the soak was killed."""
    name, folder = os.environ[NAME], os.environ["TMPDIR"]

    def watch():
        while os.read(0, 4096):  # sys.stdin's lock would be held when Python ends
            pass
        Marked(NAME, name).left(0, but=[os.getpid()])
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    (thread := threading.Thread(target=watch, daemon=True)).start()
    return thread
