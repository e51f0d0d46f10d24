"""pip of this Python, in a process of its own, and what it has installed."""

import importlib
import importlib.metadata
import os
import subprocess
import sys

from ..secrecy import redact


def pip(*arguments: object, **variables: str) -> str | None:
    """Run pip quietly: what it says where it fails, else None. variables: of its environment."""
    quietly = ["--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *map(str, arguments), *quietly],
        capture_output=True,
        text=True,
        env=os.environ | variables,
    )
    importlib.invalidate_caches()
    if done.returncode == 0:
        return None
    return redact(done.stderr).strip() or f"pip ended with exit status {done.returncode}"


def installed_version(name: str) -> str | None:
    """The version of a distribution, None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
