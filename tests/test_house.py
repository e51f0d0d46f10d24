"""The layout's rules: contracts on imports, what the spine needs, sizes, style, types, and that no
module takes a public name."""

import inspect
import re
import subprocess
import sys
import tokenize
from functools import cache
from pathlib import Path

import pytest

import llamatelemetry

ROOT = Path(__file__).parent.parent
# Tokens that are no code by themselves.
LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
# Further options of llama-server are passed on to it as they are.
PASSED_ON = {"load_model": "server_kwargs", "start_server": "server_kwargs"} | dict.fromkeys(
    ("infer", "infer_stream", "chat"), "options"
)
PACKAGE = ROOT / "llamatelemetry"
SUBJECTS = (
    "attention",
    "embeddings",
    "layers",
    "heads",
    "quantization",
    "features",
    "steering",
    "live",
    "probing",
)
SPINE = ("capture", "server", "files", "gpus")
# What every room stands on. The face is not among it.
GROUND = (
    "arguments",
    "child",
    "errors",
    "guard",
    "history",
    "imports",
    "liveness",
    "logs",
    "maths",
    "metadata",
    "norms",
    "options",
    "ports",
    "reading",
    "rounding",
    "secrecy",
    "templates",
)
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
    modules = [f"llamatelemetry.{room}.{path.stem}" for path in (PACKAGE / room).glob("*.py")]
    code = (
        f"import importlib, sys\nfor name in {HEAVY!r}: sys.modules[name] = None\n"
        f"for name in {modules!r}: importlib.import_module(name.removesuffix('.__init__'))"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


def test_no_module_takes_a_public_name():
    """Importing a submodule sets it as an attribute of its package: a function of that name would
    be gone."""
    modules = {path.stem for path in PACKAGE.iterdir()}
    assert not modules & (set(llamatelemetry.__all__) - {"__version__"})


@pytest.mark.parametrize("command", [("check",), ("format", "--check", "--diff")], ids=" ".join)
def test_style(command):
    done = run("-m", "ruff", *command, "--no-cache", "--quiet", ".")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.mark.slow  # 15 s without mypy's cache
def test_types():
    done = run("-m", "mypy")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def public():
    """(name, function) of what users call: public functions, and the public methods of public
    classes."""
    for name in llamatelemetry.__all__:
        value = getattr(llamatelemetry, name)
        if inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value) and not issubclass(value, Exception):
            yield name, value.__init__
            for key, method in inspect.getmembers_static(value):
                method = getattr(method, "__func__", method)  # of a classmethod or staticmethod
                if not key.startswith("_") and inspect.isfunction(method):
                    yield f"{name}.{key}", method


@pytest.mark.parametrize("name, function", list(public()))
def test_a_public_signature_says_everything(name, function):
    """An editor completes it: each argument is named and has a type, and so has what comes back."""
    signature = inspect.signature(function)
    given = [one for one in signature.parameters.values() if one.name not in ("self", "cls")]
    assert not [one.name for one in given if one.annotation is one.empty], "no type"
    assert function.__name__ == "__init__" or signature.return_annotation is not signature.empty
    starred = [one.name for one in given if one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    assert starred in ([], [PASSED_ON.get(function.__name__)])


@cache
def code_lines(path):
    """Lines that hold code: no blank ones, comments or docstrings."""
    lines, statement = set(), []
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type == tokenize.NEWLINE:
                if any(one.type != tokenize.STRING for one in statement):
                    lines.update(*(range(one.start[0], one.end[0] + 1) for one in statement))
                statement = []
            elif token.type not in LAYOUT:
                statement.append(token)
    return len(lines)


def size(*rooms):
    return sum(code_lines(path) for room in rooms for path in (PACKAGE / room).rglob("*.py"))


def test_the_spine_is_as_thin_as_the_readme_promises():
    readme = (ROOT / "README.md").read_text().replace("\n", " ")
    spine, beside = re.search(
        r"under ([\d,]+) lines of code.* is under ([\d,]+) more", readme
    ).groups()
    assert size(*SPINE) < int(spine.replace(",", ""))
    assert sum(code_lines(PACKAGE / f"{name}.py") for name in GROUND) < int(beside.replace(",", ""))


@pytest.mark.parametrize("room", SUBJECTS)
def test_a_subject_is_thin(room):
    assert size(room) <= 1400


def test_a_module_is_read_in_one_sitting():
    sizes = {str(path.relative_to(PACKAGE)): code_lines(path) for path in PACKAGE.rglob("*.py")}
    assert not {path: lines for path, lines in sizes.items() if lines > 300}
