"""One wheel with the bindings, llama-server and the reference tools, all from one llama.cpp commit.

llama-cpp-python's source distribution carries llama.cpp. pip builds it, `slim` takes out what is
there several times, and the result is kept in a cache for every checkout on this machine."""

import contextlib
import fcntl
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import deque
from pathlib import Path

from ..errors import EngineBuildError, OutputError
from ..files.outputs import path_of, written
from ..files.places import cache_dir
from ..gpus.cores import usable_cores
from ..liveness import Watch
from . import cuda_toolkit, needs
from .build_log import failure, progress
from .pip import pip
from .recipes import MANIFEST, VERSION, key, recipe


def reckoned(cuda: str | None) -> str:
    """How long a build takes. CUDA: as others measured it for a T4 in Kaggle's sessions; CPU:
    measured here."""
    return "27 to 30 minutes on 4 cores" if cuda else "about 6 minutes on 2 cores"


def cached_wheel(recipe: dict) -> Path | None:
    """The wheel that an earlier build made of this recipe, or None."""
    return next(iter((cache_dir() / "engine" / key(recipe)).glob("*.whl")), None)


def installed() -> dict | None:
    """What the installed engine was built from, or None where no llama-cpp-python is installed.

    A wheel of another maker has no manifest: `tools` is then empty and `llama_cpp_commit` None.
    """
    try:
        package = importlib.metadata.distribution("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        return None
    manifest = Path(str(package.locate_file(MANIFEST)))
    if manifest.is_file():
        return json.loads(manifest.read_text())
    return {
        "llama_cpp_python": package.version,
        "llama_cpp_commit": None,
        "flags": {},
        "tools": [],
        "cpu_features": [],
        "cuda": None,
    }


def build(
    cuda: str | None = None,
    out: Path | None = None,
    jobs: int | None = None,
    portable: bool = False,
) -> Path:
    """Make the engine wheel, or find it in the cache, and return its path.

    cuda: GPU architectures for CMake, such as "75" (T4) or "75;90"; None builds for the CPU alone.
    out: a folder that gets a copy. jobs: compilers at a time. portable: for other CPUs than this
    one, too. Raises EngineBuildError with the tail of the log and, where it is known, what is
    missing."""
    wanted = recipe(cuda, portable)
    wheel = cached_wheel(wanted)
    if wheel is None:
        _check_tools(cuda)
        folder = cache_dir() / "engine"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EngineBuildError(
                f"No cache folder {folder}: {error.strerror}. Set LLAMATELEMETRY_CACHE."
            ) from None
        with _lock(folder / f"{key(wanted)}.lock"):
            wheel = cached_wheel(wanted) or _build_into(folder, wanted, jobs or _default_jobs())
    if out is not None:
        wheel = _copied(wheel, path_of(out, EngineBuildError))
    return wheel


def _copied(wheel: Path, out: Path) -> Path:
    copy = out / wheel.name
    try:
        if not copy.exists() or not copy.samefile(wheel):  # the cache itself has it already
            with written(copy, need=wheel.stat().st_size) as temporary:
                shutil.copy2(wheel, temporary)
    except OutputError as error:
        raise EngineBuildError(
            f"{wheel} is built and could not be copied to {out}: {error}"
        ) from None
    return copy


def install(wheel: Path) -> None:
    """Install an engine wheel, and what it depends on, into this Python."""
    for options in (["--force-reinstall", "--no-deps"], []):  # the second for its dependencies
        if said := pip("install", *options, wheel):
            raise EngineBuildError(f"pip could not install {wheel.name}: {said[-2000:]}")


def _build_into(folder: Path, recipe: dict, jobs: int) -> Path:
    from .slim import slim

    log = folder / f"{key(recipe)}.log"
    with tempfile.TemporaryDirectory(dir=folder, prefix="building-") as scratch:
        scratch = Path(scratch)
        _pip_wheel(recipe["flags"], scratch / "raw", log, jobs)
        ready = scratch / "ready"
        ready.mkdir()
        slim(next((scratch / "raw").glob("*.whl")), ready, recipe)
        (ready / "engine.json").write_text(json.dumps(recipe, indent=1))
        target = folder / key(recipe)
        shutil.rmtree(target, ignore_errors=True)
        ready.rename(target)  # whole or not at all
    return next(target.glob("*.whl"))


def _pip_wheel(flags: dict, out: Path, log: Path, jobs: int) -> None:
    # Without pip's cache: its wheels are not keyed by CMAKE_ARGS.
    command = [sys.executable, "-m", "pip", "wheel", f"llama-cpp-python=={VERSION}"]
    command += ["--no-deps", "--wheel-dir", str(out), "--no-binary", "llama-cpp-python"]
    command += ["--no-cache-dir", "--verbose", "--disable-pip-version-check", "--no-input"]
    command += ["--config-settings", "cmake.verbose=false"]
    tail: deque[str] = deque(maxlen=400)
    process = subprocess.Popen(
        command,
        env=_environment(flags, jobs),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    stalled: list[str] = []

    def end(why):
        stalled.append(f"pip {why}")
        os.killpg(process.pid, signal.SIGKILL)

    try:
        # How long a compiler takes is its own affair: only what is stopped is ended.
        watch, bar = Watch(process.pid, end, None), progress("fetching sources")
        with open(log, "w") as file, bar, watch:
            for line in process.stdout or ():
                file.write(line)
                tail.append(line.rstrip())
                step = re.match(r"\s*\[(\d+)/(\d+)\]", line)
                if step:
                    bar.total = int(step[2])
                    bar.set_description("compiling llama.cpp", refresh=False)
                    bar.update(int(step[1]) - bar.n)
                elif "Configuring CMake" in line:
                    bar.set_description("configuring")
        process.wait()
    finally:
        if process.poll() is None:  # interrupted: compilers and all
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode:
        raise EngineBuildError(failure([*tail, *stalled], log))


def _environment(flags, jobs):
    env = os.environ | {
        "CMAKE_ARGS": " ".join(f"'-D{name}={value}'" for name, value in flags.items()),
        "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs),
        "PYTHONUNBUFFERED": "1",
    }
    for name in ("FORCE_CMAKE", "SKBUILD_CMAKE_ARGS"):
        env.pop(name, None)
    # CMake before 3.29 looks for the toolkit on PATH only
    if "GGML_CUDA" in flags and (nvcc := cuda_toolkit.nvcc()):
        path = os.pathsep.join((str(Path(nvcc).parent), env.get("PATH", os.defpath)))
        env |= {"CUDACXX": nvcc, "PATH": path}
    return env


def _check_tools(cuda: str | None) -> None:
    for module in ("pip", "wheel"):
        if importlib.util.find_spec(module) is None:
            how = "python -m ensurepip" if module == "pip" else "pip install wheel"
            raise EngineBuildError(f"Building the engine needs the Python package {module}: {how}")
    compiler = os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in compiler):
        raise EngineBuildError(
            f"No C++ compiler ({' or '.join(compiler)}): install one "
            "(Debian, Ubuntu: apt-get install g++)."
        )
    if cuda and cuda_toolkit.nvcc() is None:
        named = os.environ.get("CUDACXX")
        raise EngineBuildError(
            f"No CUDA compiler{f' at $CUDACXX ({named})' if named else ''}: put nvcc on PATH or set "
            f"CUDACXX (looked in {', '.join(cuda_toolkit.FOLDERS)}, too)."
        )
    # Else half an hour of compiling ends with a library that is not found.
    names = cuda_toolkit.runtime() if cuda and not cuda_toolkit.runtime_folder() else []
    if names and (why := needs.lacking({"libraries": names})):
        raise EngineBuildError(
            f"An engine built with CUDA {cuda_toolkit.nvcc_release()} {why}: install that CUDA's runtime and "
            "cuBLAS, or name their folder in LD_LIBRARY_PATH."
        )


def _default_jobs() -> int:
    """As many compilers as this process may use cores (a container's share counts), with 1.5 GB of
    memory for each."""
    import psutil

    memory = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # ValueError: "max", no limit
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return max(1, min(usable_cores(), int(memory / 1.5e9)))


@contextlib.contextmanager
def _lock(path: Path):
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(
                f"Another process builds this engine: waiting for it ({path.with_suffix('.log')}).",
                file=sys.stderr,
            )
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
