"""Parameters from the shell and from Python: the notebook's own defaults say what they are, nothing
is guessed."""

from pathlib import Path

import numpy as np
import pytest

from llamatelemetry import ParameterError, cli
from llamatelemetry.tools.parameter_types import (
    FILES,
    declared,
    fit,
    parameters_cell,
    words,
)

nbformat = pytest.importorskip("nbformat")
CELL = """
PROMPT = ("one " "two")  # adjacent literals
LAYER, MARGIN = 18, 0.5
TYPES = ["Q8_0"]
SURE = False
SIZES = (1, 2)
FILE: str | None = None
COUNT: int | None = 8
MAP: bool | None = None
KINDS: list[str] | None = None
TEXTS: dict[str, list[str]] | None = None
BARE = None
MADE = 2 * 512
"""


@pytest.fixture
def notebook(tmp_path):
    path = tmp_path / "07-some.ipynb"
    cell = nbformat.v4.new_code_cell(CELL, metadata={"tags": ["parameters"]})
    nbformat.write(
        nbformat.v4.new_notebook(cells=[cell, nbformat.v4.new_code_cell("PROMPT")]), path
    )
    return path


def test_types_are_the_defaults_or_the_annotations():
    assert declared(CELL) == {
        "PROMPT": str,
        "LAYER": int,
        "MARGIN": float,
        "TYPES": list[str],
        "SURE": bool,
        "SIZES": list[int],
        "FILE": str | None,
        "COUNT": int | None,
        "MAP": bool | None,
        "KINDS": list[str] | None,
        "TEXTS": dict[str, list[str]] | None,
        "BARE": None,
        "MADE": None,
    }


@pytest.mark.parametrize(
    "text",
    [
        "1984",
        "true",
        "NaN",
        "null",
        "None",
        '"Hello"',
        '"Hello", she said',
        "[1, 2, 3]",
        "",
        "{}",
        " a ",
        "1e3",
        "0x10",
        "\u05d0",
        "a\nb",
    ],
)
def test_a_text_stays_a_text(text, notebook):
    assert fit(notebook, {"PROMPT": text}, typed=True) == {"PROMPT": text}


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("LAYER", "3", 3),
        ("LAYER", "-1", -1),
        ("LAYER", " 12 ", 12),
        ("MARGIN", "1", 1.0),
        ("MARGIN", "1e-3", 0.001),
        ("SURE", "true", True),
        ("SURE", "False", False),
        ("TYPES", "Q4_0", ["Q4_0"]),
        ("TYPES", "1984", ["1984"]),
        ("TYPES", '["a", "b"]', ["a", "b"]),
        ("TYPES", "['a', 'b']", ["a", "b"]),
        ("TYPES", "[]", []),
        ("SIZES", "3", [3]),
        ("SIZES", "[3, 4]", [3, 4]),
        ("FILE", "None", None),
        ("FILE", "1984", "1984"),
        ("FILE", "null", "null"),
        ("COUNT", "None", None),
        ("COUNT", "12", 12),
        ("MAP", "None", None),
        ("MAP", "true", True),
        ("KINDS", "food", ["food"]),
        ("KINDS", "None", None),
        ("TEXTS", '{"prose": ["a"], "code": "b"}', {"prose": ["a"], "code": ["b"]}),
    ],
)
def test_other_types_are_read(name, text, value, notebook):
    found = fit(notebook, {name: text}, typed=True)[name]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("LAYER", "three", "a whole number"),
        ("LAYER", "3.0", "a whole number"),
        ("LAYER", "true", "a whole number"),
        ("LAYER", "None", "a whole number"),
        ("LAYER", "1_0", "a whole number"),
        ("MARGIN", "NaN", "a number"),
        ("MARGIN", "inf", "a number"),
        ("MARGIN", "much", "a number"),
        ("SURE", "yes", "True or False"),
        ("SURE", "1", "True or False"),
        ("TYPES", "[1, 2]", "a list of texts"),
        ("TYPES", "[a, b]", "a list of texts"),
        ("SIZES", "x", "a list of whole numbers"),
        ("COUNT", "many", "a whole number or None"),
        ("MAP", "perhaps", "True or False or None"),
        ("KINDS", "[1]", "a list of texts or None"),
        ("TEXTS", "prose", "a dict of lists of texts or None"),
        ("TEXTS", '{"a": 1}', "a dict of lists of texts or None"),
    ],
)
def test_what_does_not_fit_is_named(name, text, expected, notebook):
    with pytest.raises(ParameterError) as error:
        fit(notebook, {name: text}, typed=True)
    assert str(error.value) == f"{name} = {text!r}: {expected} is expected by 07-some.ipynb."


@pytest.mark.parametrize("name", ["BARE", "MADE"])
def test_a_default_that_says_nothing_takes_no_guess(name, notebook):
    with pytest.raises(ParameterError, match=f"{name}: its default .* Annotate it"):
        fit(notebook, {name: "3"}, typed=True)
    assert fit(notebook, {name: "3"}) == {name: "3"}


@pytest.mark.parametrize(
    "values, fitted",
    [
        ({"PROMPT": Path("a/b.gguf")}, {"PROMPT": str(Path("a/b.gguf").absolute())}),
        ({"LAYER": np.int64(4)}, {"LAYER": 4}),
        ({"MARGIN": 1}, {"MARGIN": 1.0}),
        ({"TYPES": "Q4_0"}, {"TYPES": ["Q4_0"]}),
        ({"TYPES": ("a",)}, {"TYPES": ["a"]}),
        ({"COUNT": None}, {"COUNT": None}),
        ({"SURE": np.bool_(True)}, {"SURE": True}),
        (None, {}),
    ],
)
def test_values_from_python(values, fitted, notebook):
    assert fit(notebook, values) == fitted


@pytest.mark.parametrize(
    "values",
    [
        {"PROMPT": 1984},
        {"PROMPT": None},
        {"LAYER": "3"},
        {"LAYER": 3.0},
        {"LAYER": True},
        {"MARGIN": float("nan")},
        {"MARGIN": 10**400},
        {"SURE": 1},
        {"TYPES": [1]},
        {"COUNT": "None"},
    ],
)
def test_values_from_python_are_not_read_as_texts(values, notebook):
    with pytest.raises(ParameterError, match=f"^{next(iter(values))} = "):
        fit(notebook, values)


@pytest.mark.parametrize(
    "name, near", [("PROMT", "PROMPT"), ("layer", "LAYER"), ("TYPE", "TYPES"), ("zzz", None)]
)
def test_a_name_that_is_not_there_gives_the_nearest(name, near, notebook):
    with pytest.raises(ParameterError) as error:
        fit(notebook, {name: "x"}, typed=True)
    assert f"07-some.ipynb has no parameter {name}" in str(error.value)
    assert (f"did you mean {near}?" in str(error.value)) == (
        near is not None
    ) and "It has PROMPT, LAYER" in str(error.value)


def test_nothing_runs_where_one_notebook_refuses(notebook, tmp_path, capsys):
    other = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("A = 1", metadata={"tags": ["parameters"]})]
    )
    nbformat.write(other, tmp_path / "08-other.ipynb")
    out = tmp_path / "out"
    assert (
        cli.main(["notebooks", "--folder", str(tmp_path), "--out", str(out), "-p", "A", "2"]) == 1
    )
    assert "Nothing was run. 07-some.ipynb has no parameter A" in capsys.readouterr().err
    left = nbformat.read(out / "07-some.ipynb", 4)
    assert [path.name for path in out.iterdir()] == ["07-some.ipynb"]
    assert left.cells[0].source.startswith("**Not run:** 07-some.ipynb has no parameter A")
    assert all(cell.get("outputs", []) == [] for cell in left.cells)
    (out / "07-some.ipynb").write_text("results of an earlier run")
    assert (
        cli.main(["notebooks", "07", "--folder", str(tmp_path), "--out", str(out), "-p", "A", "2"])
        == 1
    )
    assert (out / "07-some.ipynb").read_text() == "results of an earlier run"


@pytest.mark.slow
def test_texts_arrive_in_the_notebook_as_they_were_typed(notebook, tmp_path, capsys, caplog):
    text = 'a "b" \\n {x} \u05d0 \U0001f600\n$ %'
    out = tmp_path / "out"
    assert (
        cli.main(
            [
                "notebooks",
                "--folder",
                str(tmp_path),
                "--out",
                str(out),
                "-p",
                "PROMPT",
                text,
                "-p",
                "MARGIN",
                "1",
                "-p",
                "COUNT",
                "None",
            ]
        )
        == 0
    )
    cells = nbformat.read(out / "07-some.ipynb", 4).cells
    assert eval(cells[-1].outputs[0]["data"]["text/plain"]) == text
    injected = next(
        cell.source for cell in cells if "injected-parameters" in cell.metadata.get("tags", [])
    )
    assert "MARGIN = 1.0\nCOUNT = None" in injected and "unknown parameter" not in caplog.text


def test_a_name_that_a_notebook_cannot_hold_is_refused(notebook):
    with pytest.raises(
        ParameterError, match=r"FILE = 'caf\\udce9': a notebook is written in UTF-8"
    ):
        fit(notebook, {"FILE": "caf\udce9"}, typed=True)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A notebook whose parameters name files, and files in the folder where the user stands."""
    cell = """MODEL, PROMPT, QUANTIZATIONS = "m", "p", ["Q8_0"]
REFERENCE_MODEL: str | None = None
TEXT: str | None = None"""
    path = tmp_path / "09-files.ipynb"
    cells = [
        nbformat.v4.new_code_cell(cell, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("MODEL"),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    for name in ("x.gguf", "Q4_0", "corpus", "a.txt"):
        (tmp_path / name).write_text("here")
    (tmp_path / "smollm2-135m-Q4_1").mkdir()
    monkeypatch.chdir(tmp_path)
    return path


@pytest.mark.parametrize("typed", [True, False])
@pytest.mark.parametrize(
    "name, value, meant",
    [
        ("MODEL", "./x.gguf", "{}/x.gguf"),
        ("MODEL", "x.gguf", "{}/x.gguf"),
        ("REFERENCE_MODEL", "sub/none.gguf", "{}/sub/none.gguf"),
        ("MODEL", "smollm2-135m-Q4_1", None),
        ("MODEL", "none.gguf", None),
        ("MODEL", "owner/repo:Q4_K_M", None),
        ("MODEL", "/x/y.gguf", None),
        ("MODEL", "../up.gguf", "{}/../up.gguf"),
        ("TEXT", "a.txt", "{}/a.txt"),
        ("TEXT", "./none.txt", "{}/none.txt"),
        ("TEXT", "Some words.", None),
        ("TEXT", "wikitext-2", None),
        ("PROMPT", "./x.gguf", None),
        ("PROMPT", "a.txt", None),
        ("REFERENCE_MODEL", None, None),
    ],
)
def test_a_relative_path_is_meant_from_where_it_was_given(
    name, value, meant, typed, files, tmp_path
):
    given = "None" if typed and value is None else value
    assert fit(files, {name: given}, typed) == {name: meant.format(tmp_path) if meant else value}


def test_types_are_no_files_and_lists_hold_paths(files, tmp_path):
    assert fit(files, {"QUANTIZATIONS": '["Q4_0", "x.gguf", "q8_0"]'}, typed=True) == {
        "QUANTIZATIONS": ["Q4_0", f"{tmp_path}/x.gguf", "q8_0"]
    }
    with pytest.raises(
        ParameterError, match="^TEXT = 'corpus': 'corpus' is the name of a file here"
    ):
        fit(files, {"TEXT": "corpus"}, typed=True)
    with pytest.raises(ParameterError, match="^MODEL = .*no name of a file"):
        fit(files, {"MODEL": "x" * 300}, typed=True)


@pytest.mark.parametrize("given, taken", [("mmlu", "mmlu"), ("mine.bin", "{here}/mine.bin")])
def test_tasks_are_names_or_files(given, taken):
    """A notebook runs in another folder."""
    path = next((Path(__file__).parent.parent / "notebooks").glob("16-*.ipynb"))
    found = fit(path, {"TASKS": given}, typed=True)
    assert found == {"TASKS": taken.format(here=Path.cwd())}


def test_every_file_of_the_notebooks_is_one():
    """Parameters that name models or a text, by what the notebooks' cells say of them."""
    for path in sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb")):
        above = ""  # a comment on the line before
        for line in parameters_cell(path).splitlines():
            if line.startswith("#"):
                above += line
                continue
            name, said = line.partition(" = ")[0].partition(":")[0], above + line.partition("#")[2]
            above = ""
            if "file" in said or "path" in said or name.endswith("MODEL"):
                assert name in (*FILES, "TEXT", "TASKS"), line


@pytest.mark.slow
def test_a_shells_path_arrives_in_a_notebook(files, tmp_path):
    assert (
        cli.main(
            ["notebooks", "--folder", str(tmp_path), "--out", "out", "-p", "MODEL", "./x.gguf"]
        )
        == 0
    )
    cells = nbformat.read(tmp_path / "out" / files.name, 4).cells
    assert eval(cells[-1].outputs[0]["data"]["text/plain"]) == f"{tmp_path}/x.gguf"


@pytest.mark.parametrize("value", ["-1", "--help", "-p", "-hello", "--out", ""])
def test_any_value_can_be_typed(value, monkeypatch):
    from llamatelemetry.tools import notebooks

    asked = []
    monkeypatch.setattr(notebooks, "run_all", lambda *args, **kwargs: asked.append(args))
    assert (
        cli.main(["notebooks", "12", "-p", "PROMPT", value, "--out", "o", "-p", "LAYER", "-1"]) == 0
    )
    assert asked == [(Path("notebooks"), Path("o"), ["12"], {"PROMPT": value, "LAYER": "-1"})]


def test_a_cell_that_is_no_python_is_said(tmp_path):
    cell = nbformat.v4.new_code_cell("%matplotlib inline\nA = 1", metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "m.ipynb")
    with pytest.raises(ParameterError, match="parameters cell of m.ipynb is no plain Python"):
        fit(tmp_path / "m.ipynb", {"A": 2})


def test_types_have_names():
    assert words(list[str] | None) == "a list of texts or None"
