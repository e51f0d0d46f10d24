"""The suite as staged, in a session as Kaggle gives one: the image's versions, /kaggle, secrets, no network, no GPU.

Each notebook runs top to bottom from its upload folder, with its workloads made small by its own parameters.
"""

import json
from pathlib import Path

import nbformat
import pytest

import kaggle_session
from llamatelemetry import build, kaggle_stage
from llamatelemetry.kaggle_install import PROTECTED

pytestmark = pytest.mark.slow
CHECKOUT = Path(__file__).parents[1]
NOTEBOOKS = sorted((CHECKOUT / "notebooks").glob("*.ipynb"))
TOKEN = "hf_rehearsal_4711"
SMALL = {  # parameters that only make a notebook shorter
    "13": {"SAMPLE": 400},
    "14": {"TEXT_TOKENS": 12, "PATCH_EVERY": 10},
    "15": {"ABLATION_SECONDS": 5},
    "16": {"QUANTIZATIONS": ["Q8_0", "Q4_K_M"], "WINDOWS": 1, "N_CTX": 128,
           "PROMPT": "The whaler Essex left Nantucket in August."},
}


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """The staged folders, with real wheels; a dataset and a kernel's output, as a user attaches them."""
    wheel = build.cached_wheel(build.recipe())
    if wheel is None:
        pytest.skip("the engine's wheel is not in the cache (llamatelemetry engine build)")
    out = tmp_path_factory.mktemp("staged")
    made = kaggle_stage.stage("someone", out, CHECKOUT, progress=False)
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


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem[:2])
def test_staged_notebook_runs(session, suite, notebook):
    before = session.listing()
    staged = suite[0][notebook.stem] / notebook.name
    done, out = session.papermill(staged, SMALL.get(notebook.stem[:2], {}))
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    executed = nbformat.read(out, as_version=4)
    said = {tag: "".join(output.get("text", "") for output in cell.outputs)
            for cell in executed.cells if cell.cell_type == "code" for tag in cell.metadata.get("tags", [])}
    assert "ready in" in said["setup"] and "Engine: llama.cpp" in said["setup"] and "HF_TOKEN set" in said["setup"]
    assert "run on the CPU" in said["setup"] and "Not here" not in said["setup"]
    assert TOKEN not in out.read_text()
    assert session.listing() == before, "something was written below /kaggle/input"
    outside = {path.name for path in session.root.iterdir()} - {"kaggle", "env"}
    assert all(name.startswith(".") for name in outside), f"written outside /kaggle: {outside}"


def test_image_stays_as_it_is(session):
    """After all notebooks: nothing of the image's own was installed on top of it, and its versions still answer."""
    installed = {path.name.partition("-")[0].replace("_", "-").lower() for path in session.packages.glob("*.dist-info")}
    assert {"llamatelemetry", "gguf", "llama-cpp-python"} <= installed and not installed & set(PROTECTED)
    wanted = dict(line.split("==") for line in kaggle_session.IMAGE.read_text().split() if "==" in line)
    done = session.run("-c", "import json, numpy, pandas, plotly; "
                             "print(json.dumps([numpy.__version__, pandas.__version__, plotly.__version__]))")
    assert json.loads(done.stdout) == [wanted["numpy"], wanted["pandas"], wanted["plotly"]]


def test_session_has_no_network_no_answer_and_raising_secrets(session):
    for code, message in (("import socket; socket.create_connection(('example.org', 80))", "no internet"),
                          ("import socket; socket.socket().connect(('192.0.2.1', 80))", "no internet"),
                          ("input('name?')", "nobody watches"),
                          ("import kaggle_secrets; kaggle_secrets.UserSecretsClient().get_secret('X')",
                           "No user secrets exist")):
        done = session.run("-c", code)
        assert done.returncode == 1 and message in done.stderr, done.stderr


def test_first_cell_without_anything_attached(suite, tmp_path):
    """Offline, and nothing attached: the error says what to attach."""
    session = kaggle_session.Session(tmp_path)
    code = kaggle_stage.setup_cell(CHECKOUT)
    done = session.run("-c", code)
    assert done.returncode == 1 and "attach its dataset (Add Input)" in done.stderr
    session.attach(suite[0]["wheels"], "llamatelemetry-wheels")
    done = session.run("-c", code.replace("kaggle.setup()", "kaggle.setup(make_engine=False)"))
    assert done.returncode == 1 and "Attach the output of the engine kernel" in done.stderr, done.stderr


def test_engine_kernel_in_a_session_of_its_own(suite, tmp_path):
    """With what it would compile in the cache already: that everything up to there and the output are right."""
    session = kaggle_session.Session(tmp_path / "session")
    session.attach(suite[0]["wheels"], "llamatelemetry-wheels")
    session.env["LLAMATELEMETRY_CACHE"] = str(tmp_path / "cache")
    for name, recipe in (("cuda", build.recipe("75", portable=True)), ("cpu", build.recipe(portable=True))):
        folder = tmp_path / "cache" / "engine" / build.key(recipe)
        folder.mkdir(parents=True)
        (folder / f"llama_cpp_python-{build.VERSION}-py3-none-linux_x86_64.whl").write_text(name)
    done = session.run(suite[0]["engine"] / "build_engine.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "costs no GPU quota" in done.stdout and "27 to 30 minutes on 4 cores" in done.stdout
    assert {path.parent.name: path.read_text() for path in session.working.rglob("*.whl")} == {"cuda": "cuda", "cpu": "cpu"}
