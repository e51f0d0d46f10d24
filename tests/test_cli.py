"""The command line, doctor, and the runner of notebooks."""

import re
import subprocess
import sys

import pytest
from models import tiny_model

from llamatelemetry import __version__, cli
from llamatelemetry.tools import build, doctor, recipes

nbformat = pytest.importorskip("nbformat")


def run(capsys, *arguments):
    status = cli.main(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def notebook(path, *cells, parameters="A = 1"):
    v4 = nbformat.v4
    first = v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    made = [
        v4.new_markdown_cell(cell[3:]) if cell.startswith("md:") else v4.new_code_cell(cell)
        for cell in cells
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(v4.new_notebook(cells=[first, *made]), path)
    return path


def test_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "llamatelemetry.cli", "--version"], capture_output=True, text=True
    )
    assert done.stdout.strip() == __version__


def test_every_command_explains_itself():
    import argparse

    def walk(parser, path=()):
        yield path, parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, sub in action.choices.items():
                    yield from walk(sub, (*path, name))

    found = dict(walk(cli.parser()))
    assert {path[0] for path in found if path} == {
        "doctor",
        "models",
        "run",
        "capture",
        "engine",
        "notebooks",
        "kaggle",
    }
    assert all(
        parser.description
        for path, parser in found.items()
        if path not in ((), ("engine",), ("kaggle",))
    )


def test_doctor_reports_what_is_here(capsys):
    status, out, _ = run(capsys, "doctor")
    lines = {
        line.split()[1]: line for line in out.splitlines() if not line.lstrip().startswith("->")
    }
    assert __version__ in lines["llamatelemetry"]
    assert {
        "engine",
        "llama-server",
        "tools",
        "GPU",
        "analysis",
        "RAPIDS",
        "credentials",
        "browser",
    } <= set(lines)
    assert status == any(line.startswith("missing") for line in lines.values())


def test_doctor_without_an_engine_gives_the_next_step(capsys, monkeypatch):
    monkeypatch.setattr(build, "installed", lambda: None)
    status, out, _ = run(capsys, "doctor")
    assert status == 1
    assert re.search(
        r"^missing +engine .*\n +-> llamatelemetry engine build --install$", out, re.MULTILINE
    )


@pytest.mark.parametrize(
    "engine, expected",
    [
        (
            {
                "llama_cpp_python": "0.3.1",
                "llama_cpp_commit": None,
                "flags": {},
                "cpu_features": [],
            },
            "captures need " + recipes.VERSION,
        ),
        (
            {
                "llama_cpp_python": recipes.VERSION,
                "llama_cpp_commit": "abc",
                "flags": {},
                "cpu_features": ["avx99"],
            },
            "with avx99",
        ),
    ],
)
def test_doctor_refuses_an_engine_that_will_not_do(engine, expected, monkeypatch):
    monkeypatch.setattr(build, "installed", lambda: engine)
    finding = next(iter(doctor._engine()))
    assert finding.state == "missing" and expected in finding.text


def test_doctor_accepts_the_wheel_of_another_maker(monkeypatch):
    version = recipes.VERSION + "+cu121"
    monkeypatch.setattr(
        build,
        "installed",
        lambda: {
            "llama_cpp_python": version,
            "llama_cpp_commit": None,
            "flags": {},
            "tools": [],
            "cpu_features": [],
            "cuda": None,
        },
    )
    assert next(iter(doctor._engine())).state == "ok"


def test_doctor_never_prints_a_credential(capsys, monkeypatch):
    monkeypatch.setenv("GRAPHISTRY_PERSONAL_KEY_ID", "id-8f3a")
    monkeypatch.setenv("GRAPHISTRY_PERSONAL_SECRET_KEY", "secret-77b1")
    _, out, err = run(capsys, "doctor")
    assert "key and secret are set" in out
    assert "8f3a" not in out + err and "77b1" not in out + err


def test_models_lists_names_and_sizes(capsys):
    status, out, _ = run(capsys, "models")
    assert status == 0 and out.splitlines()[0].split() == ["name", "parameters", "here", "repo"]
    assert any(line.startswith("gemma-3-1b-Q4_K_M ") for line in out.splitlines())
    _, here, _ = run(capsys, "models", "--here")
    assert all(re.search(r"\d MB", line) for line in here.splitlines()[1:])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("capture", "m", "t", "--out", "x.txt"), "saved as a .safetensors file"),
        (("capture", "m", "t", "--out", "/no/such/folder/x.safetensors"), "no such folder"),
        (("run", "/no/such/model.gguf", "Hello"), "/no/such/model.gguf"),
        (("notebooks", "--folder", "/no/such/folder", "99"), "No notebook '99'"),
        (("notebooks", "-p", "LAYER", "1", "-p", "LAYER", "2"), "-p LAYER is given twice"),
        (("notebooks", "--folder", "/no/such/folder"), "No notebooks in /no/such/folder"),
        (("notebooks", "12", "--out", "/dev/null"), "No folder /dev/null could be made"),
    ],
)
def test_an_error_is_a_message_not_a_traceback(arguments, message, capsys):
    status, _, err = run(capsys, *arguments)
    assert (
        status == 1
        and err.startswith("llamatelemetry: ")
        and message in err
        and "Traceback" not in err
    )


def test_an_output_that_will_not_do_is_said_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("llamatelemetry.engine.InferenceEngine", None)
    model, folder, link = (
        tiny_model("llama", tmp_path),
        tmp_path / "a.safetensors",
        tmp_path / "b.safetensors",
    )
    folder.mkdir()
    link.symlink_to(model)
    wrong = {
        folder: "is a folder",
        link: "would destroy",
        "/dev/null/c.safetensors": "no such folder",
    }
    for out, message in wrong.items():
        status, _, err = run(capsys, "capture", str(model), "text", "--out", str(out))
        assert status == 1 and message in err


@pytest.mark.parametrize(
    "markdown, kept, formulas",
    [
        ("costs 5 dollars", "costs 5 dollars", 0),
        ("from $5 to $6 each", "from $5 to $6 each", 0),
        ("`$x$` and ```\n$$y$$\n```", "`$x$` and ```\n$$y$$\n```", 0),
        ("a $x^2$ b $$\\frac{a}{b}$$ c", None, 2),
        ("$\\sqrt{d}$", None, 1),
    ],
)
def test_formulas_become_mathml_outside_code(markdown, kept, formulas):
    from llamatelemetry.tools.export import take_formulas

    found = []
    text = take_formulas(markdown, found)
    assert len(found) == formulas and all(formula.startswith("<math") for formula in found)
    assert kept is None or text == kept


def test_unknown_latex_is_shown_as_written():
    from llamatelemetry.tools.export import take_formulas

    found = []
    take_formulas(r"$\frac{<b>}$", found)
    assert len(found) == 1 and "<b>" not in found[0]


def test_exported_page_refers_to_no_server(tmp_path):
    from llamatelemetry.tools.export import export_html

    path = notebook(tmp_path / "n.ipynb", "md:# Title\n\n$\\sqrt{d}$", "1")
    made = nbformat.read(path, as_version=4)
    remote = '<script src="https://cdn.example/mathjax.js"></script><b>figure</b>'
    made.cells[-1].outputs = [nbformat.v4.new_output("display_data", {"text/html": remote})]
    nbformat.write(made, path)
    page = export_html(path).read_text()
    assert "<b>figure</b>" in page and "<msqrt>" in page and "formula-7c1f" not in page
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=[\"']?https?:", page)
    assert "Content-Security-Policy" in page and "default-src 'none'" in page


@pytest.mark.slow
def test_notebooks_run_with_parameters_and_name_the_cell_that_fails(tmp_path, capsys):
    folder, out = tmp_path / "notebooks", tmp_path / "executed"
    notebook(folder / "01-good.ipynb", "import os\nprint('A is', A, os.path.basename(os.getcwd()))")
    notebook(folder / "02-bad.ipynb", "md:text", "1", "raise KeyError('lost')", "2")
    notebook(folder / "03-dead.ipynb", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    status, printed, err = run(
        capsys, "notebooks", "--folder", str(folder), "--out", str(out), "-p", "A", "7"
    )
    assert status == 1
    assert "01-good.ipynb" in printed and "A is 7 executed" in (out / "01-good.html").read_text()
    assert "2 of 3 notebooks failed" in err
    assert "02-bad.ipynb, In [4] (raise KeyError('lost')): KeyError: 'lost'" in err
    assert "03-dead.ipynb, In [3] (import os, signal): the kernel died" in err
    assert (out / "02-bad.html").is_file()
    assert not (tmp_path / "01-good.ipynb").exists() and {
        path.suffix for path in out.iterdir()
    } == {".ipynb", ".html"}


@pytest.mark.slow
def test_a_page_with_a_figure_makes_no_request(tmp_path, page):
    from llamatelemetry.tools.notebooks import run_notebook

    source = notebook(
        tmp_path / "n.ipynb",
        "md:$\\sqrt{d}$",
        "from llamatelemetry.views import theme; theme.setup()\nimport plotly.graph_objects as go",
        "go.Figure(go.Heatmap(z=[[A, 2], [3, 4]])).show()",
        "from llamatelemetry.views.page import Page\n"
        "Page('t', '<p id=h></p>', 'document.getElementById(\"h\").textContent=DATA.a', {'a': 'ran'})",
    )
    executed = run_notebook(source, tmp_path / "out", progress=False)
    requests, errors = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on(
        "console", lambda message: errors.append(message.text) if message.type == "error" else None
    )
    page.goto(executed.with_suffix(".html").as_uri())
    page.wait_for_selector(".js-plotly-plot .heatmaplayer image")
    assert page.frame_locator("iframe").locator("#h").inner_text() == "ran"
    assert [
        url for url in requests if not url.startswith(("data:", "blob:", "file:", "about:"))
    ] == []
    assert errors == []


@pytest.mark.slow
def test_run_prints_the_continuation(smollm2, llama_server, capfd):
    assert (
        cli.main(
            [
                "run",
                str(smollm2),
                "The capital of France is",
                "--max-tokens",
                "8",
                "--temperature",
                "0",
            ]
        )
        == 0
    )
    out, err = capfd.readouterr()
    assert "Paris" in out and re.search(r"^\d+ tokens, [\d.]+ tokens/s$", err, re.MULTILINE)


@pytest.mark.slow
def test_capture_writes_what_load_reads(smollm2, tmp_path, capfd):
    from llamatelemetry import Capture

    path = tmp_path / "x.safetensors"
    assert (
        cli.main(
            ["capture", str(smollm2), "The cat sat", "--stages", "attention, q", "--out", str(path)]
        )
        == 0
    )
    out, _ = capfd.readouterr()
    assert re.search(r"^attention: layer 30, head 9, query (\d+), key \1$", out, re.MULTILINE)
    assert set(Capture.load(path).stages) == {"attention", "q"}
