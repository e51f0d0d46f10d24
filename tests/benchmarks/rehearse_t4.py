"""The GPU tests and the five notebooks on the T4's own kernels, with a T4's memory and Kaggle's
four cores, on a GPU host.

    python tests/benchmarks/rehearse_t4.py --sources LLAMA_CPP [--parts PART ...] [--model FILE]
        [--results FILE]

An engine for compute capability 7.5 carries PTX beside its code, and a newer GPU compiles and runs
that: the kernels are the T4's, the memory is what --keep leaves of each GPU; times are this host's,
not a T4's. Parts:

    kernels    builds ggml-cuda for 7.5 (--sources: llama.cpp's folder) and lays it over the engine
               that is installed
    tests      tests/test_gpu.py on it
    notebooks  the notebooks on it, with --model or the embedded one (shapes of 1B and 8B:
               make_shapes.py)
    wheel      `engine build --cuda 75 --portable`, the driver's library hidden from CMake; offline
               with --links, a folder with llama-cpp-python's source distribution and the wheels of
               scikit-build-core, CMake and ninja
    no_driver  that wheel where no driver can be loaded: llama-server's version, and a capture on
               the CPU

Each result is stored as soon as it is there. A part begins only where --until (minutes from now)
leaves time, and is stopped there; run it again with what is left (--names)."""

import argparse
import contextlib
import ctypes
import fcntl
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from bench_notebooks import FOLDER, Peak
from common import RESULTS, gpu_used, report, same_machine

from llamatelemetry.tools import cuda_toolkit, recipes

ROOT = Path(__file__).resolve().parents[2]
T4_MIB = 14913  # free on a T4 of a new session
HOLD = "--hold"  # what this script is called with to hold memory
OURS = [sys.executable, "-c", "import sys; from llamatelemetry.cli import main; sys.exit(main())"]


# Memory and cores


def hold(keep_mib):
    """Take all but keep_mib of every GPU's free memory with plain allocations, say what is left,
    wait for stdin's end."""
    cuda = next(filter(None, map(_library, ("libcudart.so.13", "libcudart.so.12", "libcudart.so"))))
    count, free, total, left = ctypes.c_int(), ctypes.c_size_t(), ctypes.c_size_t(), []
    cuda.cudaGetDeviceCount(ctypes.byref(count))
    for device in range(count.value):
        cuda.cudaSetDevice(device)
        cuda.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))
        block = free.value - (keep_mib << 20)
        while block > 2 << 20:
            status = cuda.cudaMalloc(ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(block))
            cuda.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))
            block = free.value - (keep_mib << 20) if status == 0 else block // 2
        left.append(free.value >> 20)
    print(json.dumps(left), flush=True)
    sys.stdin.read()


def _library(name):
    with contextlib.suppress(OSError):
        return ctypes.CDLL(name)


@contextlib.contextmanager
def pinned(options):
    """What is started runs on --cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, options.cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def like_a_t4(options):
    """What is started runs on --cores, and each GPU has --keep MiB left; yields what the GPUs have
    left, in MiB."""
    holder = subprocess.Popen(
        [sys.executable, __file__, HOLD, str(options.keep)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        left = json.loads(holder.stdout.readline() or "[]")
        if not left or max(left) > options.keep + 64:
            raise RuntimeError(f"the GPUs' memory could not be held: {left} MiB left")
        with pinned(options):
            yield left
    finally:
        holder.stdin.close()
        holder.wait()


# Commands


def run(command, log, options, env=None, cwd=ROOT):
    """Run a command into a log file, say every minute where it is, stop it at --until.

    Returns (its exit status or "stopped", seconds, the end of what it said).
    """
    shown = [*(["llamatelemetry"] if command[:3] == OURS else command[:3]), *command[3:]]
    print(f"{' '.join(map(str, shown))[:150]} > {log}", flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    started = said = time.monotonic()
    with open(log, "w") as file:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": _path(cwd)} | (env or {}),
            start_new_session=True,
        )
        try:
            while process.poll() is None and (now := time.monotonic()) < options.deadline:
                if now - said > 60:
                    said = now
                    print(
                        f"  {now - started:.0f} s: {(_tail(log).splitlines() or [''])[-1][:120]}",
                        flush=True,
                    )
                time.sleep(0.2)
        finally:
            status = process.poll()
            if status is None:
                stop(process)
    seconds = time.monotonic() - started
    return "stopped" if status is None else status, round(seconds, 1), _tail(log)


def stop(process):
    """As Ctrl-C does, which lets a build end its compilers and a notebook its kernel; by force
    where that does nothing."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _path(first):
    return os.pathsep.join(filter(None, [str(first), os.environ.get("PYTHONPATH")]))


def _tail(log):
    return log.read_text(errors="replace")[-4000:].replace("\r", "\n").strip()


def failed(status, tail, row):
    """The row, with what went wrong where something did."""
    return (
        row
        if status == 0
        else row | {"failed": f"{status}: {' '.join(tail.splitlines()[-3:])[-300:]}"}
    )


# Parts: each yields rows


def kernels(options):
    """Build ggml-cuda for 7.5 and lay it over the engine's own (which stays beside it as .own)."""

    source, made, laid = options.sources / "ggml", options.work / "kernels", engine_libraries()
    if not (source / "ggml.pc.in").is_file():  # the source distribution leaves it out
        (source / "ggml.pc.in").touch()
    versioned = any(
        own.suffix != ".so" for own in laid
    )  # libggml-cuda.so.0: then it links to libggml-base.so.0
    flags = recipes.CUDA_FLAGS | {
        "CMAKE_CUDA_ARCHITECTURES": "75",
        "GGML_NATIVE": "OFF",
        "BUILD_SHARED_LIBS": "ON",
        "GGML_BUILD_TESTS": "OFF",
        "GGML_BUILD_EXAMPLES": "OFF",
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_PLATFORM_NO_VERSIONED_SONAME": "OFF" if versioned else "ON",
        "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
        "CMAKE_INSTALL_RPATH": "$ORIGIN",
    }
    env, steps = (
        {"CUDACXX": cuda_toolkit.nvcc(), "LD_PRELOAD": ""},
        (
            [
                "cmake",
                "-S",
                source,
                "-B",
                made,
                "-G",
                "Ninja",
                *(f"-D{name}={value}" for name, value in flags.items()),
            ],
            ["cmake", "--build", made, "--target", "ggml-cuda", "-j", str(len(options.cores))],
        ),
    )
    spent = 0
    for command, log in zip(steps, ("configure.log", "kernels.log")):
        with pinned(options):
            status, seconds, tail = run(command, options.work / log, options, env)
        spent += seconds
        if status:
            break
    row = {"what": "ggml-cuda for 7.5", "seconds": round(spent, 1), "cores": len(options.cores)}
    if status == 0:
        library = next(path for path in made.rglob("libggml-cuda.so*") if not path.is_symlink())
        for own in laid:
            if not own.with_name(f"{own.name}.own").exists():
                shutil.copy2(own, own.with_name(f"{own.name}.own"))
            shutil.copy2(library, own)
        row |= {
            "mb": round(library.stat().st_size / 1e6),
            "code": code_in(library),
            "engine": engine_says(),
        }
    yield failed(status, tail, row)


def engine_libraries():
    """Files of the installed engine's libggml-cuda.so, links followed."""
    package = Path(importlib.util.find_spec("llama_cpp").origin).parent
    found = {
        path.resolve()
        for folder in (package / "lib", package.parent / "lib")
        for path in folder.glob("libggml-cuda.so*")
        if not path.name.endswith(".own")
    }
    if not found:
        raise RuntimeError(
            f"the engine in {package} has no libggml-cuda.so: it was built without CUDA"
        )
    return found


def code_in(library):
    """Architectures of the code and of the PTX in a library, as cuobjdump lists them; [] without
    it."""
    if shutil.which("cuobjdump") is None:
        return []
    said = "".join(
        subprocess.run(["cuobjdump", kind, library], capture_output=True, text=True).stdout
        for kind in ("--list-elf", "--list-ptx")
    )
    return sorted(
        {
            f"{'PTX' if kind == 'ptx' else 'code'} {arch}"
            for arch, kind in re.findall(r"\.(sm_\d+)\w*\.(cubin|ptx)", said)
        }
    )


def engine_says():
    """What the engine's CUDA backend says of its build: "ARCHS = 750 | NO_VMM = 1 ..."."""
    code = "import llama_cpp; print(llama_cpp.llama_print_system_info().decode())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    return (re.search(r"CUDA : (.*?) \| (?:CPU|$)", said) or ["", "nothing about CUDA"])[1]


def needs_kernels():
    if "ARCHS = 750 " not in f"{engine_says()} ":
        raise RuntimeError(
            f"the engine's kernels are not the T4's ({engine_says()}): run the part kernels first"
        )


def tests(options):
    needs_kernels()
    with like_a_t4(options) as left:
        status, seconds, tail = run(
            [
                sys.executable,
                "-m",
                "pytest",
                "tests/test_gpu.py",
                "--durations=5",
                "-p",
                "no:cacheprovider",
            ],
            options.work / "tests.log",
            options,
        )
    found = dict(
        (kind, int(count))
        for count, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", tail)
    )
    yield failed(
        status,
        tail,
        {
            "what": "tests/test_gpu.py",
            "seconds": seconds,
            "left_mib": left,
            "cores": len(options.cores),
        }
        | found,
    )


class PeakOfEach(Peak):
    """Peak, and the most that was in use on each GPU beyond what was when it began (each, MiB)."""

    def __enter__(self):
        self._first = gpu_used()
        self.each = [0] * len(self._first)
        return super().__enter__()

    def sample(self):
        self.each = [
            max(most, now - was) for most, now, was in zip(self.each, gpu_used(), self._first)
        ]
        super().sample()


def notebooks(options):
    from llamatelemetry.tools.notebooks import find

    needs_kernels()
    model = Path(options.model).name if options.model else "SmolLM2"
    for path in find(FOLDER, options.names):
        given = {"BACKEND": "gpu"} | ({"MODEL": options.model} if options.model else {})
        parameters = [part for name, value in given.items() for part in ("-p", name, value)]
        out = options.work / "executed" / model
        with like_a_t4(options) as left, PeakOfEach() as peak:
            status, seconds, tail = run(
                [*OURS, "notebooks", path.stem, "--folder", FOLDER, "--out", out, *parameters],
                options.work / f"{path.stem}.log",
                options,
            )
        page = out / f"{path.stem}.html"
        yield failed(
            status,
            tail,
            {
                "what": f"{path.stem}, {model}",
                "seconds": seconds,
                "peak_mib": round(peak.mib),
                "gpu_mib": peak.each,
                "html_mb": round(page.stat().st_size / 1e6, 1) if page.is_file() else None,
                "left_mib": left,
                "cores": len(options.cores),
            },
        )


def wheel(options):
    """The build as on Kaggle: four cores, nothing in a cache, no driver in CMake's sight."""
    shutil.rmtree(options.work / "cache", ignore_errors=True)
    defined = filter(None, [os.environ.get("SKBUILD_CMAKE_DEFINE"), "CUDA_cuda_driver_LIBRARY="])
    env = {
        "LLAMATELEMETRY_CACHE": str(options.work / "cache"),
        "SKBUILD_CMAKE_DEFINE": ";".join(defined),
        "LD_PRELOAD": "",
    }
    if options.links:
        env |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(options.links.resolve())}
    with pinned(options):
        status, seconds, tail = run(
            [
                *OURS,
                "engine",
                "build",
                "--cuda",
                "75",
                "--portable",
                "--out",
                options.work / "wheel",
            ],
            options.work / "wheel.log",
            options,
            env,
        )
    steps = re.findall(r"(\d+)/(\d+) \[", (options.work / "wheel.log").read_text(errors="replace"))
    row = {
        "what": "engine build --cuda 75 --portable",
        "seconds": seconds,
        "cores": len(options.cores),
        "files": "/".join(steps[-1]) if steps else None,
    }
    if status == 0:
        made = next((options.work / "wheel").glob("*.whl"))
        row |= {"mb": round(made.stat().st_size / 1e6), "needs": manifest(made)["needs"]}
    yield failed(status, tail, row)


def manifest(path):
    from llamatelemetry.tools.recipes import MANIFEST

    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read(MANIFEST))


def no_driver(options):
    """Files that are no libraries stand where the linker would find the driver's: as where there
    are none. The system's C++ runtime comes first, because an engine that a host's own g++ built
    can meet another one in Python."""
    from llamatelemetry.tools import needs

    made = next((options.work / "wheel").glob("*.whl"), None)
    if made is None:
        raise RuntimeError("no wheel to try: run the part wheel first")
    target, hidden = options.work / "installed", options.work / "hidden"
    shutil.rmtree(target, ignore_errors=True)
    with zipfile.ZipFile(made) as archive:
        archive.extractall(target)
    for tool in (target / "bin").iterdir():
        tool.chmod(0o755)
    hidden.mkdir(exist_ok=True)
    for name in ("libcuda.so.1", "libnvidia-ml.so.1"):
        (hidden / name).write_text("no library")
    folders = os.pathsep.join(filter(None, [str(hidden), os.environ.get("LD_LIBRARY_PATH")]))
    env = {
        "LD_LIBRARY_PATH": folders,
        "PYTHONPATH": os.pathsep.join([str(target), _path(ROOT)]),
        "LD_PRELOAD": needs.find("libstdc++.so.6") or "",
        "LLAMA_SERVER_PATH": str(target / "bin" / "llama-server"),
    }
    for what, command in (
        ("llama-server --version without a driver", [target / "bin" / "llama-server", "--version"]),
        (
            "a capture on the CPU without a driver",
            [
                *OURS,
                "capture",
                "smollm2-135m-Q4_1",
                "The cat sat",
                "--out",
                options.work / "cat.safetensors",
            ],
        ),
    ):
        status, seconds, tail = run(command, options.work / "no_driver.log", options, env)
        yield failed(status, tail, {"what": what, "seconds": seconds})


PARTS = {
    "kernels": kernels,
    "tests": tests,
    "notebooks": notebooks,
    "wheel": wheel,
    "no_driver": no_driver,
}


# Results


def store(part, row, path, benchmark="t4_kernels"):
    """Put a row in the place of the one that it repeats; parts that run at the same time take
    turns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        stored = json.loads(path.read_text()) if path.is_file() else None
        rows = stored["rows"] if stored and same_machine(stored["hardware"]) else []
        report(
            benchmark,
            [other for other in rows if other["what"] != row["what"]] + [{"part": part, **row}],
            path,
        )
    finally:
        os.close(folder)


def main():
    if sys.argv[1:2] == [HOLD]:
        return hold(int(sys.argv[2]))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument(
        "--sources",
        type=Path,
        help="llama.cpp's folder, as the source distribution has it (vendor/llama.cpp)",
    )
    parser.add_argument(
        "--links", type=Path, help="folder with what pip needs for `wheel` without a network"
    )
    parser.add_argument("--model", help="a GGUF file for the notebooks instead of SmolLM2")
    parser.add_argument(
        "--names", nargs="*", default=[], help="only these notebooks, such as 12 13"
    )
    parser.add_argument(
        "--cores",
        default="0-3",
        type=cores_of,
        help="processors, such as 0-3 or 4,5,6,7; default: 0-3",
    )
    parser.add_argument(
        "--keep", type=int, default=T4_MIB, help="MiB left on each GPU; default: %(default)s"
    )
    parser.add_argument(
        "--until", type=float, default=60, help="minutes after which nothing runs any more"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("/tmp/rehearse_t4"), help="folder for builds and logs"
    )
    parser.add_argument("--results", type=Path, default=RESULTS / "t4_kernels.json")
    options = parser.parse_args()
    options.deadline = time.monotonic() + 60 * options.until
    options.work = options.work.resolve()
    os.environ.setdefault(
        "CUDA_CACHE_PATH", str(options.work / "ptx")
    )  # compiled once, not for every process
    os.environ.setdefault("CUDA_CACHE_MAXSIZE", str(4 << 30))
    broken = []
    for part in options.parts:
        if missing := lacks(part, options):
            print(f"{part}: not run: {missing}", flush=True)
            continue
        try:
            for row in PARTS[part](options):
                store(part, row, options.results)
                broken += ["failed"] if "failed" in row else []
        except (
            Exception
        ) as error:  # the other parts are still worth their time on a host that is hard to get
            print(f"{part}: {type(error).__name__}: {error}", flush=True)
            broken.append(part)
    if broken:
        raise SystemExit(1)


def cores_of(text):
    """ "0-3" or "4,5,6" -> {0, 1, 2, 3}."""
    ranges = [part.partition("-") for part in text.split(",")]
    return {core for first, _, last in ranges for core in range(int(first), int(last or first) + 1)}


def lacks(part, options):
    """Why a part cannot run here, or None."""
    from llamatelemetry.gpus.devices import list_gpus

    if time.monotonic() > options.deadline:
        return "--until is over"
    if part in ("tests", "notebooks") and not list_gpus():
        return "no NVIDIA GPU"
    if part in ("kernels", "wheel") and cuda_toolkit.nvcc() is None:
        return "no nvcc"
    if part == "kernels" and not (options.sources and (options.sources / "ggml").is_dir()):
        return "--sources must name llama.cpp's folder"
    return None


if __name__ == "__main__":
    main()
