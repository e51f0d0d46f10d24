"""One wheel with the bindings, llama-server and the reference tools, all from one llama.cpp commit.

llama-cpp-python's source distribution carries llama.cpp. pip builds it, `slim` takes out what is there several times,
and the result is kept in a cache for every checkout on this machine.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import deque
from pathlib import Path

from . import needs
from .build_log import failure, progress
from .errors import LlamaTelemetryError, OutputError
from .files import path_of, written

VERSION = "0.3.36"  # of llama-cpp-python; its change log names the llama.cpp commit, its archive holds no git history
COMMIT = "0c1e57098"
TOOLS = ("llama-server", "llama-quantize", "llama-perplexity", "llama-imatrix", "llama-bench", "llama-tokenize",
         "llama-gguf-split")
MANIFEST = "llama_cpp/lib/engine.json"

FLAGS = {
    "LLAMA_BUILD_TOOLS": "ON",
    "LLAMA_BUILD_SERVER": "ON",
    "LLAMA_TOOLS_INSTALL": "ON",
    "LLAVA_BUILD": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",  # would be downloaded
    "LLAMA_OPENSSL": "OFF",  # llama-server answers on 127.0.0.1 only
    "LLAMA_BUILD_NUMBER": "0",
    "LLAMA_BUILD_COMMIT": COMMIT,
    # A wheel cannot hold symlinks: lib.so, lib.so.0 and lib.so.0.1 would be three copies, and the copy that Python
    # opens another library than the one that its neighbours link to.
    "CMAKE_PLATFORM_NO_VERSIONED_SONAME": "ON",
    "CMAKE_INSTALL_RPATH": "$ORIGIN;$ORIGIN/../llama_cpp/lib",  # from llama_cpp/lib and from bin
}

# Without the driver's library: CMake stops where it is not found, as on machines without a GPU and in Kaggle's image
# (which has libcuda.so.1 and not the libcuda.so that CMake looks for, as scripts published for Kaggle say), and what
# links to it does not load where there is no driver. Only the pool for temporary buffers uses it (ggml-cuda.cu,
# ggml_cuda_pool_vmm). The other pool (ggml_cuda_pool_leg) keeps buffers by size and, where memory runs out, gives back
# those that are free and tries again (llama.cpp pull request 22155): its price is memory for temporaries. NCCL would tie
# the wheel to the NCCL of the machine that builds.
CUDA_FLAGS = {"GGML_CUDA": "ON", "GGML_CUDA_NO_VMM": "ON", "GGML_CUDA_NCCL": "OFF"}
CUDA_FOLDERS = ("/usr/local", "/opt")  # where toolkits lie: cuda, cuda-12.8


class EngineBuildError(LlamaTelemetryError):
    """The engine could not be built; the message carries the tail of the log."""


def cache_dir() -> Path:
    """$LLAMATELEMETRY_CACHE, $XDG_CACHE_HOME/llamatelemetry or ~/.cache/llamatelemetry."""
    if os.environ.get("LLAMATELEMETRY_CACHE"):
        return Path(os.environ["LLAMATELEMETRY_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "llamatelemetry"


def cpu_features() -> list[str]:
    """Instruction sets of this CPU as the kernel names them: -march=native code needs each that it was built with."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return sorted(set(value.split()))
    return [platform.processor() or platform.machine()]


def recipe(cuda: str | None = None, portable: bool = False) -> dict:
    """Everything that decides what the build gives: version, flags, and the machine that it is for."""
    flags = dict(FLAGS)
    if cuda:
        flags |= CUDA_FLAGS | {"CMAKE_CUDA_ARCHITECTURES": cuda}
        if folder := _runtime_folder():
            flags["CMAKE_SHARED_LINKER_FLAGS"] = f"-Wl,-rpath,{folder}"
    if portable:
        flags["GGML_NATIVE"] = "OFF"  # AVX2, FMA and F16C instead of all that this CPU has
    return {
        "llama_cpp_python": VERSION,
        "llama_cpp_commit": COMMIT,
        "flags": flags,
        "tools": list(TOOLS),
        "machine": platform.machine(),
        "libc": "-".join(platform.libc_ver()),
        "cpu_features": [] if portable else cpu_features(),
        "cuda": _nvcc_release() if cuda else None,
    }


def key(recipe: dict) -> str:
    """Name of the recipe's folder in the cache."""
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    arch = recipe["flags"].get("CMAKE_CUDA_ARCHITECTURES")
    return f"{recipe['llama_cpp_python']}-{'cuda' + arch.replace(';', '+') if arch else 'cpu'}-{digest}"


def reckoned(cuda: str | None) -> str:
    """How long a build takes. CUDA: as others measured it for a T4 in Kaggle's sessions; CPU: measured here."""
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
    manifest = Path(package.locate_file(MANIFEST))
    if manifest.is_file():
        return json.loads(manifest.read_text())
    return {"llama_cpp_python": package.version, "llama_cpp_commit": None, "flags": {}, "tools": [], "cpu_features": [],
            "cuda": None}


def build(cuda: str | None = None, out: Path | None = None, jobs: int | None = None, portable: bool = False) -> Path:
    """Make the engine wheel, or find it in the cache, and return its path.

    cuda: GPU architectures for CMake, such as "75" (T4) or "75;90"; None builds for the CPU alone.
    out: a folder that gets a copy. jobs: compilers at a time. portable: for other CPUs than this one, too.
    Raises EngineBuildError with the tail of the log and, where it is known, what is missing.
    """
    wanted = recipe(cuda, portable)
    wheel = cached_wheel(wanted)
    if wheel is None:
        _check_tools(cuda)
        folder = cache_dir() / "engine"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EngineBuildError(f"No cache folder {folder}: {error.strerror}. Set LLAMATELEMETRY_CACHE.") from None
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
        raise EngineBuildError(f"{wheel} is built and could not be copied to {out}: {error}") from None
    return copy


def install(wheel: Path) -> None:
    """Install an engine wheel, and what it depends on, into this Python."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for options in (["--force-reinstall", "--no-deps"], []):  # the second for its dependencies
        done = subprocess.run([*pip, *options, str(wheel)], capture_output=True, text=True)
        if done.returncode:
            raise EngineBuildError(f"pip could not install {wheel.name}: {done.stderr.strip()[-2000:]}")


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
    return cached_wheel(recipe)


def _pip_wheel(flags: dict, out: Path, log: Path, jobs: int) -> None:
    # Without pip's cache: its wheels are not keyed by CMAKE_ARGS.
    command = [sys.executable, "-m", "pip", "wheel", f"llama-cpp-python=={VERSION}", "--no-deps", "--wheel-dir",
               str(out), "--no-binary", "llama-cpp-python", "--no-cache-dir",
               "--verbose", "--disable-pip-version-check", "--no-input", "--config-settings", "cmake.verbose=false"]
    env = os.environ | {"CMAKE_ARGS": " ".join(f"'-D{name}={value}'" for name, value in flags.items()),
                        "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs), "PYTHONUNBUFFERED": "1"}
    for name in ("FORCE_CMAKE", "SKBUILD_CMAKE_ARGS"):
        env.pop(name, None)
    if "GGML_CUDA" in flags and (nvcc := _nvcc()):  # CMake before 3.29 looks for the toolkit on PATH only
        env |= {"CUDACXX": nvcc, "PATH": os.pathsep.join((str(Path(nvcc).parent), env.get("PATH", os.defpath)))}
    tail = deque(maxlen=400)
    bar = progress("fetching sources")
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               errors="replace", start_new_session=True)
    try:
        with open(log, "w") as file, bar:
            for line in process.stdout:
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
        raise EngineBuildError(failure(tail, log))


def _check_tools(cuda: str | None) -> None:
    for module in ("pip", "wheel"):
        if importlib.util.find_spec(module) is None:
            how = "python -m ensurepip" if module == "pip" else "pip install wheel"
            raise EngineBuildError(f"Building the engine needs the Python package {module}: {how}")
    compiler = os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in compiler):
        raise EngineBuildError(f"No C++ compiler ({' or '.join(compiler)}): install one "
                               "(Debian, Ubuntu: apt-get install g++).")
    if cuda and _nvcc() is None:
        named = os.environ.get("CUDACXX")
        raise EngineBuildError(f"No CUDA compiler{f' at $CUDACXX ({named})' if named else ''}: put nvcc on PATH or set "
                               f"CUDACXX (looked in {', '.join(CUDA_FOLDERS)}, too).")
    # Else half an hour of compiling ends with a library that is not found.
    if cuda and (names := _runtime()) and not _runtime_folder() and (why := needs.lacking({"libraries": names})):
        raise EngineBuildError(f"An engine built with CUDA {_nvcc_release()} {why}: install that CUDA's runtime and "
                               "cuBLAS, or name their folder in LD_LIBRARY_PATH.")


def _runtime() -> list[str]:
    """CUDA's own libraries that an engine built here links to."""
    major = (_nvcc_release() or "").partition(".")[0]
    return [f"lib{name}.so.{major}" for name in ("cudart", "cublas")] if major else []


def _runtime_folder() -> str | None:
    """The toolkit's folder with those libraries, where the dynamic linker does not find them on its own."""
    names, nvcc = _runtime(), _nvcc()
    if not names or needs.lacking({"libraries": names}) is None:
        return None
    toolkit = Path(nvcc).resolve().parents[1]
    folders = (toolkit / name for name in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"))
    return next((str(folder) for folder in folders if all((folder / name).is_file() for name in names)), None)


def _nvcc() -> str | None:
    """$CUDACXX, else nvcc on PATH, in $CUDA_HOME or $CUDA_PATH, in .../cuda, in the newest .../cuda-*."""
    if os.environ.get("CUDACXX"):
        return shutil.which(os.environ["CUDACXX"])
    homes = [home for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
    homes += [f"{folder}/cuda" for folder in CUDA_FOLDERS]
    versioned = [path for folder in CUDA_FOLDERS for path in Path(folder).glob("cuda-*")]
    homes += sorted(versioned, key=lambda path: [int(part) for part in re.findall(r"\d+", path.name)], reverse=True)
    return shutil.which("nvcc") or next(filter(None, (shutil.which(f"{home}/bin/nvcc") for home in homes)), None)


def _nvcc_release() -> str | None:
    nvcc = _nvcc()
    if nvcc is None:
        return None
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release ([\d.]+)", text)
    return found[1] if found else None


def _default_jobs() -> int:
    """As many compilers as this process may use cores (a container's share counts), with 1.5 GB of memory for each."""
    import psutil

    cores, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # ValueError: "max", no limit
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, round(int(quota) / int(period))))
    with contextlib.suppress(OSError, ValueError):
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return max(1, min(cores, int(memory / 1.5e9)))


@contextlib.contextmanager
def _lock(path: Path):
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Another process builds this engine: waiting for it ({path.with_suffix('.log')}).", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
