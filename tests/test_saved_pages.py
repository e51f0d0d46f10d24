"""Figures of a saved notebook are drawn whatever renders it: Kaggle's nbconvert 6.4.5 and today's,
with require.js, with the Plotly of Kaggle's image and with the one that is installed here."""

import subprocess
import sys
from pathlib import Path

import kaggle_session
import nbformat
import pytest
import saved_pages

from llamatelemetry.tools.notebooks import run_notebook

pytestmark = pytest.mark.slow
CHECKOUT = Path(__file__).parents[1]
CELLS = [
    "from llamatelemetry.views import theme\ntheme.setup()",
    "import plotly.graph_objects as go\ngo.Figure(go.Heatmap(z=[[1, 2], [3, 4]])).show()",
    "go.Figure(go.Scatter(y=[1, 3, 2])).show()",
    "theme.setup()  # the first cell run again",
    "go.Figure(go.Bar(y=[1, 3, 2])).show()\ngo.Figure(go.Scatter3d(x=[1, 2], y=[1, 2], z=[1, 2])).show()",
]


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    session = kaggle_session.Session(tmp_path_factory.mktemp("session"))
    session.env["PYTHONPATH"] = str(CHECKOUT)
    return session


@pytest.fixture(scope="module")
def executed(session, tmp_path_factory):
    """{"image": path, "here": path}: the small notebook, executed with Plotly 5.24.1 and with the
    Plotly of this Python."""
    path = tmp_path_factory.mktemp("small") / "small.ipynb"
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    done, out = session.papermill(path, {})
    assert done.returncode == 0, done.stderr[-2000:]
    return {"image": out, "here": run_notebook(path, path.parent / "here", progress=False)}


def export(python, template, path, out):
    """The notebook as a page; also without its outputs, for what the template itself asks the
    network for."""
    bare = nbformat.read(path, 4)
    for cell in bare.cells:
        cell.outputs = []
    nbformat.write(bare, out / "bare.ipynb")
    for notebook, name in ((path, "whole"), (out / "bare.ipynb", "bare")):
        command = [
            python,
            "-m",
            "nbconvert",
            "--to",
            "html",
            "--template",
            template,
            "--output-dir",
            out,
            "--output",
            name,
        ]
        done = subprocess.run([*map(str, command), str(notebook)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    return out / "whole.html", out / "bare.html"


@pytest.mark.parametrize("plotly", ["image", "here"])
@pytest.mark.parametrize(
    "nbconvert, template", [("image", "classic"), ("here", "classic"), ("here", "lab")]
)
def test_every_figure_is_drawn(
    session, executed, browser, page, tmp_path, plotly, nbconvert, template
):
    python = kaggle_session.image() if nbconvert == "image" else sys.executable
    whole, bare = export(python, template, executed[plotly], tmp_path)
    assert saved_pages.figures(nbformat.read(executed[plotly], 4)) == 4
    found, asked = saved_pages.drawn(page, whole, session.require_js)
    assert found == [True] * 4
    assert any("require" in address for address in asked)
    other = browser.new_page()
    assert set(asked) <= set(saved_pages.drawn(other, bare, session.require_js)[1]), (
        "an output asks the network"
    )
    other.close()


def test_a_figure_waits_for_a_script_that_comes_later_and_a_blank_one_is_seen(
    session, executed, page, tmp_path
):
    """An application may add outputs from the end; without the script nothing is drawn, and the
    check above says so."""
    notebook = nbformat.read(executed["image"], 4)
    first, figures = notebook.cells[0], notebook.cells[1:3]
    for name, cells in (("late", [*figures, first]), ("never", figures)):
        notebook.cells = cells
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
        (tmp_path / name).mkdir()
        whole, _ = export(
            kaggle_session.image(), "classic", tmp_path / f"{name}.ipynb", tmp_path / name
        )
        assert (
            saved_pages.drawn(page, whole, session.require_js, wait_s=3)[0] == [name == "late"] * 2
        )


def test_the_bundle_is_there_once_and_asks_no_loader(executed):
    for path in executed.values():
        outputs = [
            output.data.get("text/html", "")
            for cell in nbformat.read(path, 4).cells
            for output in cell.outputs
        ]
        assert [len(text) > 2_000_000 for text in outputs] == [
            True,
            False,
            False,
            True,
            False,
            False,
        ]
        assert all("window.Plotly || {}" in text for text in outputs if len(text) > 2_000_000)
