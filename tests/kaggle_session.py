"""A Kaggle session without Kaggle: its Python environment, its folders, its secrets, and no
network.

The environment is made once per machine from tests/kaggle_image.txt (or kaggle_image_newest.txt)
and kept beside the engine's cache. A session gets a thin environment on top, so that what the first
cell installs goes there and the image stays as it is."""

import base64
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from llamatelemetry.tools import build

IMAGE = Path(__file__).with_name("kaggle_image.txt")
NEWEST = Path(__file__).with_name("kaggle_image_newest.txt")

# Runs in every Python of the session before anything else: only this machine can be reached (with
# REHEARSAL_INTERNET pip may go on to the package index), /kaggle/input is the session's, nobody
# answers input(), and the secrets are those of the variables: the service raises as Kaggle's does,
# for a secret that is not attached and without the internet.
_SITE = """
import builtins, glob, os, socket, sys, types

_connect, _lookup = socket.socket.connect, socket.getaddrinfo

def _local(address):
    return not isinstance(address, tuple) or str(address[0]) in ("127.0.0.1", "::1", "localhost")

def connect(self, address):
    if not _local(address):
        raise OSError(101, f"no internet in this session (tried {address})")
    return _connect(self, address)

def lookup(host, *args, **kwargs):
    if host not in (None, "", "localhost", "127.0.0.1", "::1", "0.0.0.0"):
        raise socket.gaierror(-3, f"no internet in this session (asked for {host})")
    return _lookup(host, *args, **kwargs)

if not (os.environ.get("REHEARSAL_INTERNET") and any("pip" in part for part in sys.orig_argv[1:3])):
    socket.socket.connect, socket.getaddrinfo = connect, lookup

_glob, _input = glob.glob, os.environ.get("LLAMATELEMETRY_KAGGLE_INPUT", "/kaggle/input")
glob.glob = lambda path, **options: _glob(path.replace("/kaggle/input", _input), **options)

class BackendError(Exception):
    pass

class UserSecretsClient:
    def get_secret(self, label):
        if not os.environ.get("REHEARSAL_SECRETS"):
            raise ConnectionError("Connection error trying to communicate with service.")
        value = os.environ.get("REHEARSAL_SECRET_" + label)
        if value is None:
            raise BackendError("No user secrets exist for kernel")
        return value

secrets = types.ModuleType("kaggle_secrets")
secrets.UserSecretsClient, secrets.BackendError = UserSecretsClient, BackendError
sys.modules["kaggle_secrets"] = secrets

def asked(prompt=""):
    raise RuntimeError(f"input({prompt!r}) in a session that nobody watches")

builtins.input = asked
"""


def image(file=IMAGE):
    """The Python of an environment with an image's versions; made (minutes) where there is none
    yet.

    Raises OSError where it cannot be made, for example without a network.
    """
    key = hashlib.sha256(file.read_bytes() + sys.version.encode()).hexdigest()[:12]
    folder = build.cache_dir() / f"rehearsal-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            for command in (
                [sys.executable, "-m", "venv", folder],
                [
                    folder / "bin" / "python",
                    "-m",
                    "pip",
                    "install",
                    "--quiet",
                    "--only-binary",
                    ":all:",
                    "--disable-pip-version-check",
                    "-r",
                    file,
                ],
            ):
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise OSError(
                        f"the environment of the rehearsal could not be made: {done.stderr.strip()[-400:]}"
                    )
            (folder / "done").touch()
    return folder / "bin" / "python"


class Session:
    """One session: .input (read-only), .working, .temp, .python, and run() in it.

    secrets: {label: value} of those attached; None: the service does not answer. internet: pip
    reaches the package index that this machine's pip is set up for."""

    def __init__(self, root, secrets=None, internet=False, file=IMAGE):
        base = image(file)
        self.root = Path(root)
        self.input, self.working, self.temp = (
            self.root / "kaggle" / name for name in ("input", "working", "temp")
        )
        for folder in (self.input, self.working):
            folder.mkdir(parents=True)
        subprocess.run([base, "-m", "venv", "--without-pip", self.root / "env"], check=True)
        self.python = self.root / "env" / "bin" / "python"
        self.packages = next((self.root / "env" / "lib").glob("python*")) / "site-packages"
        below = next((base.parents[1] / "lib").glob("python*")) / "site-packages"
        self.require_js = below / "nbclassic" / "static" / "components" / "requirejs" / "require.js"
        (self.packages / "image.pth").write_text(f"import sitecustomize_rehearsal\n{below}\n")
        (self.packages / "sitecustomize_rehearsal.py").write_text(_SITE)
        keep = {
            name: value
            for name, value in os.environ.items()
            if name in ("PATH", "LANG", "TMPDIR")
            or internet
            and name.upper().startswith(
                ("PIP_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT")
            )
        }
        keep |= {"REHEARSAL_INTERNET": "on"} if internet else {"PIP_CONFIG_FILE": os.devnull}
        keep |= {"REHEARSAL_SECRETS": "on"} if secrets is not None else {}
        self.env = (
            keep
            | {
                "HOME": str(self.root),
                "KAGGLE_KERNEL_RUN_TYPE": "Batch",
                "LLAMATELEMETRY_KAGGLE_INPUT": str(self.input),
                "LLAMATELEMETRY_KAGGLE_WORKING": str(self.working),
                "LLAMATELEMETRY_KAGGLE_TEMP": str(self.temp),
                "MPLBACKEND": "module://matplotlib_inline.backend_inline",
                "JUPYTER_PLATFORM_DIRS": "1",
                "PYDEVD_DISABLE_FILE_VALIDATION": "1",
            }
            | {f"REHEARSAL_SECRET_{label}": value for label, value in (secrets or {}).items()}
        )

    def attach(self, folder, *where):
        """Attach a folder's files as Kaggle does, below input/<where>."""
        target = self.input.joinpath(*where)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(folder, target, copy_function=_link)
        return target

    def seal(self):
        """Make the input folder read-only. (For root the mode does not count: tests compare the
        folder instead.)"""
        for path in (*self.input.rglob("*"), self.input):
            if path.is_dir():
                path.chmod(0o555)

    def unseal(self):
        for path in (self.input, *self.input.rglob("*")):
            if path.is_dir():
                path.chmod(0o755)

    def listing(self):
        """{path: size} of everything attached."""
        return {str(path): path.stat().st_size for path in sorted(self.input.rglob("*"))}

    def run(self, *arguments, timeout=600):
        """Run Python in the session, in its working folder; the CompletedProcess."""
        return subprocess.run(
            [self.python, *map(str, arguments)],
            cwd=self.working,
            env=self.env,
            timeout=timeout,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )

    def papermill(self, notebook, parameters, timeout=900):
        """Run a notebook top to bottom; (CompletedProcess, path of the executed notebook)."""
        out = self.working / Path(notebook).name
        given = (
            ["-b", base64.b64encode(json.dumps(parameters).encode()).decode()] if parameters else []
        )
        return self.run(
            "-m",
            "papermill",
            notebook,
            out,
            "--kernel",
            "python3",
            "--no-progress-bar",
            "--cwd",
            self.working,
            *given,
            timeout=timeout,
        ), out


def _link(source, target):
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
