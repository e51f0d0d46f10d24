"""Every notebook as it goes into git: no outputs, valid, short cells, one setup cell for all."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llamatelemetry.kaggle.cells import setup_cell
from llamatelemetry.kaggle.rules import notebook_problems
from llamatelemetry.views.light import without

nbformat = pytest.importorskip("nbformat")
CHECKOUT = Path(__file__).parents[1]
NOTEBOOKS = sorted((CHECKOUT / "notebooks").glob("*.ipynb"))


def test_what_is_shown_is_escaped_in_one_place():
    """Tables by theme.table, text by views.text: no cell and no module has an escape, a Styler or a
    decoder of its own."""
    own = re.compile(r"\.style\b|html\.escape|<br>|\.decode\(")
    for path in NOTEBOOKS:
        cells = [
            cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"
        ]
        assert [found for cell in cells for found in own.findall("".join(cell["source"]))] == [], (
            path.name
        )
    modules = [
        path
        for path in (CHECKOUT / "llamatelemetry").rglob("*.py")
        if "html.escape(" in path.read_text()
    ]
    # The latter to find a secret that somebody else has escaped
    assert sorted(path.name for path in modules) == ["secrecy.py", "text.py"]


def test_all_five_are_here():
    assert [path.name[:2] for path in NOTEBOOKS] == ["12", "13", "14", "15", "16"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem[:2])
class TestNotebook:
    def test_nothing_is_wrong_with_it(self, path):
        assert list(notebook_problems(path)) == []

    def test_first_cell_is_everybody_s(self, path):
        cells = json.loads(path.read_text())["cells"]
        found = [
            "".join(cell["source"]) for cell in cells if "setup" in cell["metadata"].get("tags", [])
        ]
        assert found == [setup_cell(CHECKOUT)], (
            "run `llamatelemetry kaggle setup-cell --write notebooks/*.ipynb`"
        )

    def test_parameters_have_the_common_names(self, path):
        cell = next(
            cell
            for cell in nbformat.read(path, 4).cells
            if "parameters" in cell.metadata.get("tags", [])
        )
        names = set(re.findall(r"^([A-Z_]+)(?:, [A-Z_]+)* = ", cell.source, re.MULTILINE))
        assert {"MODEL", "OUTPUT_DIR", "BACKEND", "SEED"} <= names
        assert 'MODEL = "smollm2-135m-Q4_1"' in cell.source

    def test_code_cells_compile(self, path):
        for cell in nbformat.read(path, 4).cells:
            if cell.cell_type == "code":
                compile(cell.source, path.name, "exec")

    def test_nothing_asks_or_shells_out(self, path):
        text = "\n".join(
            cell.source
            for cell in nbformat.read(path, 4).cells
            if cell.cell_type == "code" and "setup" not in cell.metadata.get("tags", [])
        )
        assert not re.search(
            r"\binput\(|^\s*[!%]|pip install|simulat|np\.random\.(rand|normal)\b",
            text,
            re.MULTILINE,
        )
        assert not re.search(r"/work|/tmp/|/home/", text)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda cells: cells[2].update(execution_count=1), "outputs or a number"),
        (
            lambda cells: cells[2].update(outputs=[nbformat.v4.new_output("stream", text="x")]),
            "outputs or a number",
        ),
        (lambda cells: cells[2].update(source="a = 1\n" * 11), "11 lines, 10 are allowed"),
        (lambda cells: cells[2].update(source=f"a = {89 * '1'}"), "93 wide, 88 columns"),
        (lambda cells: cells[0].metadata.update(tags=[]), "must be tagged"),
    ],
)
def test_what_is_wrong_is_found(tmp_path, change, message):
    cells = [
        nbformat.v4.new_code_cell("A = 1", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("B = 1", metadata={"tags": ["setup"]}),
        nbformat.v4.new_code_cell("C = 1"),
    ]
    path = tmp_path / "a.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    assert list(notebook_problems(path)) == []
    change(cells)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    assert any(message in problem for problem in notebook_problems(path))


def test_two_cells_of_one_id_are_found(tmp_path):
    """As two branches leave them that both added a cell."""
    cells = [nbformat.v4.new_code_cell(source, id=source.lower()) for source in "AB"]
    cells[0].metadata.tags, cells[1].metadata.tags = ["parameters"], ["setup"]
    path = tmp_path / "a.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    assert list(notebook_problems(path)) == []
    path.write_text(path.read_text().replace('"id": "b"', '"id": "a"'))
    with pytest.warns(nbformat.warnings.DuplicateCellId):
        assert list(notebook_problems(path)) == ["several cells have one id: a"]


def test_a_late_output_does_not_end_a_run(tmp_path, monkeypatch):
    """The client waits 4 s for what a cell has printed: on a busy machine long prompts ended so."""
    from llamatelemetry.tools import notebooks

    given = {}
    monkeypatch.setattr("papermill.execute_notebook", lambda *_, **options: given.update(options))
    notebooks._execute(tmp_path / "a.ipynb", tmp_path / "b.ipynb", {}, tmp_path, False)
    assert given["iopub_timeout"] >= 60


@pytest.mark.slow
def test_outputs_that_do_not_come_are_no_full_disk(tmp_path, monkeypatch):
    """nbclient's limit is a TimeoutError, and so an OSError."""
    from llamatelemetry import NotebookError
    from llamatelemetry.tools import notebooks

    mute = "get_ipython().kernel._publish_status = lambda *_: None  # nor says that it is through"
    sources = ["print(1)", f"\n{mute}", "print(2)"]
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "mute.ipynb")
    monkeypatch.setattr(notebooks, "IOPUB_SECONDS", 1)
    with pytest.raises(NotebookError) as error:
        notebooks.run_notebook(tmp_path / "mute.ipynb", tmp_path / "out", progress=False)
    said = str(error.value)
    assert said.startswith(f"mute.ipynb, In [2] ({mute}): its code has ended, and its outputs did")
    assert "within 1 s" in said and "Run it again" in said and "room" not in said
    assert (tmp_path / "out" / "mute.html").is_file()


def test_an_import_goes_without_a_package_that_others_can_miss(tmp_path, monkeypatch):
    (tmp_path / "grammars_of_iris.py").write_text("READ = True")
    monkeypatch.syspath_prepend(tmp_path)
    with without("grammars_of_iris"), pytest.raises(ImportError):
        importlib.import_module("grammars_of_iris")
    assert importlib.import_module("grammars_of_iris").READ  # afterwards it is there
    with without("grammars_of_iris"):  # what is loaded stays
        assert importlib.import_module("grammars_of_iris").READ
    monkeypatch.delitem(sys.modules, "grammars_of_iris")


def test_figures_are_set_up_without_grammars_of_iris():
    lines = "import sys; from llamatelemetry.views import light, theme; theme.setup()"
    lines += "; assert 'nbformat' in sys.modules; print(light.IRIS in sys.modules)"
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", "")


@pytest.mark.slow
def test_a_notebook_is_written_when_it_has_ended_well_or_not(tmp_path, monkeypatch):
    """papermill writes it before and after each cell, all figures in it."""
    from papermill import engines

    from llamatelemetry import NotebookError
    from llamatelemetry.tools import notebooks

    writes, write = [], engines.write_ipynb
    monkeypatch.setattr(engines, "write_ipynb", lambda *given: writes.append(write(*given)))
    sources = ["print('kept')", "import os", "2", "os.kill(os.getpid(), 9)", "3"]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python", "language": "python"}}
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "a.ipynb")
    with pytest.raises(NotebookError, match=r"In \[4\] \(os.kill.*the kernel died"):
        notebooks.run_notebook(tmp_path / "a.ipynb", tmp_path / "out", progress=False)
    assert len(writes) == 2  # before the first cell, and at the end
    first, *_ = nbformat.read(tmp_path / "out" / "a.ipynb", 4).cells
    assert first.outputs[0].text == "kept\n"
