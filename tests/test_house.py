"""The layout's rules: contracts on imports, what the spine needs, and that no module takes a public
name."""

import subprocess
import sys
from pathlib import Path

import pytest

import llamatelemetry

ROOT = Path(__file__).parent.parent
SPINE = ("capture", "server", "files", "gpus")
# What the spine does without: the extras, and what only draws.
HEAVY = (
    "plotly",
    "scipy",
    "sklearn",
    "umap",
    "igraph",
    "graphistry",
    "pyarrow",
    "distributed",
    "cupy",
    "cudf",
    "cuml",
    "IPython",
    "nbformat",
    "kaggle",
)


def run(*command):
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT)


def test_imports_keep_the_contracts():
    done = run(
        "-c",
        "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))",
    )
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("room", SPINE)
def test_the_spine_needs_only_its_own_dependencies(room):
    modules = [
        f"llamatelemetry.{room}.{path.stem}"
        for path in (ROOT / "llamatelemetry" / room).glob("*.py")
    ]
    code = (
        f"import importlib, sys\nfor name in {HEAVY!r}: sys.modules[name] = None\n"
        f"for name in {modules!r}: importlib.import_module(name.removesuffix('.__init__'))"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


def test_no_module_takes_a_public_name():
    """Importing a submodule sets it as an attribute of its package: a function of that name would
    be gone."""
    modules = {path.stem for path in (ROOT / "llamatelemetry").iterdir()}
    assert not modules & (set(llamatelemetry.__all__) - {"__version__"})
