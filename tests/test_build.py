"""The engine build with pip replaced by a script: keys, cache, lock, slimming, messages. Where
there is nvcc, the CUDA build is configured for real. Nothing is compiled here."""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path

import pytest
from processes import gone

from llamatelemetry.tools import build, build_log, cuda_toolkit, needs, recipes
from llamatelemetry.tools.slim import slim

pytest.importorskip("wheel", reason="the package wheel is not installed")

LIBRARIES = ("libllama", "libggml", "libggml-base", "libggml-cpu")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMATELEMETRY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "engine"


def raw_wheel(folder, tools=recipes.TOOLS):
    """A wheel laid out as scikit-build-core leaves it: libraries twice, headers, tools nobody asked
    for."""
    root = folder / "tree" / f"llama_cpp_python-{recipes.VERSION}"
    files = {f"llama_cpp/lib/{name}.so": "" for name in LIBRARIES}
    files |= {
        f"lib/{name}.so": ""
        for name in (*LIBRARIES, "libllama-common", "libllama-tts-impl", "libllama-server-impl")
    }
    files |= {f"bin/{tool}": "" for tool in (*tools, "llama-tts")}
    files |= {
        "llama_cpp/__init__.py": "",
        "include/llama.h": "",
        "lib/cmake/llama/llama-config.cmake": "",
        "lib/pkgconfig/llama.pc": "",
    }
    info = f"llama_cpp_python-{recipes.VERSION}.dist-info"
    files[f"{info}/METADATA"] = (
        f"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: {recipes.VERSION}\n"
    )
    files[f"{info}/WHEEL"] = (
        "Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: py3-none-linux_x86_64\n"
    )
    files[f"{info}/RECORD"] = ""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    out = folder / "raw"
    out.mkdir()
    subprocess.run(
        [sys.executable, "-m", "wheel", "pack", "--dest-dir", out, root],
        check=True,
        capture_output=True,
    )
    return next(out.glob("*.whl"))


def script(path, body):
    """A stand-in for the Python that runs pip."""
    path.write_text("#!/bin/sh\n" + body)
    path.chmod(0o755)
    return str(path)


def test_slim_keeps_one_set_of_libraries_and_the_tools(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    recipe = recipes.recipe(portable=True)
    wheel = slim(raw_wheel(tmp_path), out, recipe)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"llama_cpp_python-{recipes.VERSION}.dist-info"
        expected = {
            f"llama_cpp/lib/{name}.so"
            for name in (*LIBRARIES, "libllama-common", "libllama-server-impl")
        }
        expected |= {f"bin/{tool}" for tool in recipes.TOOLS} | {
            "llama_cpp/__init__.py",
            recipes.MANIFEST,
        }
        assert names == expected | {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD")}
        assert json.loads(archive.read(recipes.MANIFEST)) == recipe
        recorded = {
            line.split(",")[0] for line in archive.read(f"{info}/RECORD").decode().splitlines()
        }
        assert recorded == names
        assert archive.getinfo("bin/llama-server").external_attr >> 16 & stat.S_IXUSR
    assert wheel.name == f"llama_cpp_python-{recipes.VERSION}-py3-none-linux_x86_64.whl"


def test_slim_refuses_a_build_without_a_tool(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(build.EngineBuildError, match="no llama-perplexity"):
        tools = [tool for tool in recipes.TOOLS if tool != "llama-perplexity"]
        slim(raw_wheel(tmp_path, tools), out, recipes.recipe(portable=True))


def test_key_follows_what_decides_the_build(monkeypatch):
    base = recipes.recipe()
    assert recipes.key(base) == recipes.key(recipes.recipe())
    others = [recipes.recipe(cuda="75"), recipes.recipe(cuda="90"), recipes.recipe(portable=True)]
    monkeypatch.setattr(recipes, "cpu_features", lambda: ["another"])
    others.append(recipes.recipe())
    keys = {recipes.key(recipe) for recipe in others}
    assert len(keys) == 4 and recipes.key(base) not in keys
    assert recipes.key(others[0]).startswith(f"{recipes.VERSION}-cuda75-")
    assert recipes.key(recipes.recipe(portable=True)) == recipes.key(
        others[2]
    )  # does not depend on the CPU


def test_flags_are_the_pinned_commit_and_relative_paths():
    flags = recipes.recipe()["flags"]
    assert flags["LLAMA_BUILD_COMMIT"] == recipes.COMMIT
    assert all(part.startswith("$ORIGIN") for part in flags["CMAKE_INSTALL_RPATH"].split(";"))
    assert "GGML_CUDA" not in flags and recipes.recipe(cuda="75")["flags"]["GGML_CUDA"] == "ON"


def test_a_cuda_build_needs_no_driver_and_no_nccl_and_is_keyed_by_its_toolkit(monkeypatch):
    monkeypatch.setattr(cuda_toolkit, "nvcc_release", lambda: "12.8")
    recipe = recipes.recipe(cuda="75", portable=True)
    assert (
        recipe["flags"]["GGML_CUDA_NO_VMM"] == "ON" and recipe["flags"]["GGML_CUDA_NCCL"] == "OFF"
    )
    monkeypatch.setattr(cuda_toolkit, "nvcc_release", lambda: "13.0")
    assert recipes.key(recipes.recipe(cuda="75", portable=True)) != recipes.key(recipe)
    assert not any("CUDA" in name for name in recipes.recipe(portable=True)["flags"])


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({"LLAMATELEMETRY_CACHE": "/a"}, "/a"),
        ({"LLAMATELEMETRY_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/llamatelemetry"),
        ({"HOME": "/c"}, "/c/.cache/llamatelemetry"),
    ],
)
def test_cache_dir(variables, expected, monkeypatch):
    for name in ("LLAMATELEMETRY_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert build.cache_dir() == Path(expected)


def test_two_builds_at_once_compile_once(tmp_path, cache, monkeypatch, capsys):
    compiled = []

    def fake(flags, out, log, jobs):
        compiled.append(jobs)
        time.sleep(0.3)
        raw_wheel(tmp_path)
        (tmp_path / "raw").rename(out)

    monkeypatch.setattr(build, "_pip_wheel", fake)
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(build.build(jobs=3))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert compiled == [3]
    assert results[0] == results[1] and results[0].is_file()
    assert "waiting" in capsys.readouterr().err
    assert {path.suffix for path in cache.iterdir() if path.name.startswith("building-")} == set()

    copy = build.build(out=tmp_path / "copy")  # from the cache: nothing is compiled
    assert (
        compiled == [3]
        and copy.parent == tmp_path / "copy"
        and copy.read_bytes() == results[0].read_bytes()
    )
    copy.unlink()
    copy.symlink_to(results[0])  # what is there already is not copied onto itself
    assert (
        build.build(out=tmp_path / "copy") == copy
        and build.build(out=results[0].parent) == results[0]
    )
    (tmp_path / "file").write_text("kept")
    with pytest.raises(build.EngineBuildError, match="is built and could not be copied to"):
        build.build(out=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept" and results[0].is_file()


def test_a_failed_build_leaves_no_wheel_and_says_why(tmp_path, cache, monkeypatch):
    fake = script(
        tmp_path / "python",
        "echo '[1/3] one'\necho 'c++: fatal error: Killed signal terminated program cc1plus'\nexit 1\n",
    )
    monkeypatch.setattr(build, "_check_tools", lambda cuda: None)
    monkeypatch.setattr(sys, "executable", fake)
    with pytest.raises(build.EngineBuildError, match="--jobs 1") as caught:
        build.build()
    assert "Killed signal" in str(caught.value)
    assert [path.suffix for path in sorted(cache.iterdir())] == [".lock", ".log"]
    assert "[1/3] one" in next(cache.glob("*.log")).read_text()


@pytest.mark.parametrize(
    "line, advice",
    [
        ("CMake Error: No CMAKE_CXX_COMPILER could be found.", "apt-get install g++"),
        (
            "ERROR: No matching distribution found for llama-cpp-python==0.3.36",
            "registry could not be reached",
        ),
        ("fatal error: error writing to /tmp/x.s: No space left on device", "disk is full"),
        ("nvcc fatal   : Unsupported gpu architecture 'compute_20'", "--list-gpu-arch"),
        (
            '  Target "ggml-cuda" links to:\n\n    CUDA::cuda_driver\n\n  but the target was not found.',
            "GGML_CUDA_NO_VMM",
        ),
        (
            '  Target "ggml-cuda" links to:\n\n    CUDA::cublas\n\n  but the target was not found.',
            "whole toolkit",
        ),
        ("something else", "could not be built"),
    ],
)
def test_failure_names_what_is_missing(line, advice, tmp_path):
    message = build.failure(["first", line], tmp_path / "x.log")
    assert advice in message and line in message and "x.log" in message


def test_no_compiler_is_said_before_anything_is_fetched(cache, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build.EngineBuildError, match="No C\\+\\+ compiler"):
        build.build()
    assert not cache.exists()


@pytest.fixture
def toolkits(tmp_path, monkeypatch):
    """toolkits("cuda-12.8") makes nvcc in such a folder, where toolkits are looked for; none is on
    PATH."""
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(cuda_toolkit, "FOLDERS", (str(tmp_path / "local"),))

    def make(name, parent="local"):
        folder = tmp_path / parent / name / "bin"
        folder.mkdir(parents=True)
        return script(
            folder / "nvcc",
            f'echo "Cuda compilation tools, release {name.partition("-")[2] or 9.9}, V1"\n',
        )

    return make


def test_nvcc_is_found_where_toolkits_lie(toolkits, tmp_path, monkeypatch):
    assert cuda_toolkit.nvcc() is None and cuda_toolkit.nvcc_release() is None
    older, newer = toolkits("cuda-9.2"), toolkits("cuda-12.8")
    assert (
        cuda_toolkit.nvcc() == newer and cuda_toolkit.nvcc_release() == "12.8"
    )  # 12 is newer than 9
    chosen = toolkits("cuda")  # what the machine's owner made the default
    assert cuda_toolkit.nvcc() == chosen
    for name, home in (("CUDA_PATH", "p"), ("CUDA_HOME", "h")):
        found = toolkits(home, "homes")
        monkeypatch.setenv(name, str(Path(found).parents[1]))
        assert cuda_toolkit.nvcc() == found
    on_path = toolkits("x", "path")
    monkeypatch.setenv("PATH", str(Path(on_path).parent))
    assert cuda_toolkit.nvcc() == on_path
    monkeypatch.setenv("CUDACXX", older)
    assert cuda_toolkit.nvcc() == older
    monkeypatch.setenv("CUDACXX", "/nowhere/nvcc")
    monkeypatch.setenv("CXX", on_path)  # some compiler, so that only nvcc is missing
    with pytest.raises(
        build.EngineBuildError, match=r"No CUDA compiler at \$CUDACXX \(/nowhere/nvcc\)"
    ):
        build._check_tools("75")


def test_cmake_gets_the_nvcc_that_was_found(toolkits, tmp_path, monkeypatch):
    nvcc, seen = toolkits("cuda-12.8"), tmp_path / "seen"
    monkeypatch.setattr(
        sys, "executable", script(tmp_path / "python", f'echo "$CUDACXX $PATH" > {seen}\n')
    )
    build._pip_wheel(recipes.recipe("75")["flags"], tmp_path / "out", tmp_path / "log", 1)
    assert seen.read_text().split() == [nvcc, f"{Path(nvcc).parent}:{tmp_path / 'empty'}"]
    build._pip_wheel(recipes.recipe()["flags"], tmp_path / "out", tmp_path / "log", 1)
    assert nvcc not in seen.read_text()


def test_a_toolkit_without_its_libraries_is_said_before_half_an_hour_of_compiling(
    toolkits, monkeypatch
):
    toolkits("cuda-99.1")
    monkeypatch.setenv("CXX", sys.executable)
    with pytest.raises(
        build.EngineBuildError,
        match=r"CUDA 99.1 needs libcudart.so.99, and here is .*LD_LIBRARY_PATH",
    ):
        build._check_tools("75")


def test_libraries_that_only_the_toolkit_s_folder_has_are_found_by_the_engine(
    toolkits, tmp_path, monkeypatch
):
    """/usr/local/cuda is a link, lib64 another one, and the linker's cache knows nothing of
    them."""
    home = Path(toolkits("cuda-99.1")).parents[1]
    home.with_name("cuda").symlink_to(home)
    (home / "targets" / "x86_64-linux" / "lib").mkdir(parents=True)
    (home / "lib64").symlink_to("targets/x86_64-linux/lib")
    plain = recipes.recipe("75", portable=True)
    assert "CMAKE_SHARED_LINKER_FLAGS" not in plain["flags"]
    for name in ("libcudart.so.99", "libcublas.so.99"):
        (home / "lib64" / name).write_bytes(b"")
    found = recipes.recipe("75", portable=True)
    assert found["flags"][
        "CMAKE_SHARED_LINKER_FLAGS"
    ] == f"-Wl,-rpath,{home / 'lib64'}" and recipes.key(found) != recipes.key(plain)
    monkeypatch.setenv("CXX", sys.executable)
    build._check_tools("75")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(home / "lib64"))  # then the linker finds them
    assert recipes.key(recipes.recipe("75", portable=True)) == recipes.key(plain)


def test_progress_in_a_log_is_lines(tmp_path, monkeypatch, capsys):
    steps = "\n".join(f"echo '[{n}/4] file'" for n in range(1, 5))
    monkeypatch.setattr(
        sys,
        "executable",
        script(tmp_path / "python", f"echo '*** Configuring CMake...'\n{steps}\n"),
    )
    monkeypatch.setattr(build_log, "EVERY_S", 0)
    build._pip_wheel(recipes.FLAGS, tmp_path / "out", tmp_path / "log", 1)
    said = capsys.readouterr().err
    assert "\r" not in said
    lines = said.splitlines()
    assert lines[0].startswith("fetching sources") and "4/4" in lines[-1] and len(lines) >= 5
    assert sum("compiling llama.cpp" in line for line in lines) >= 4


def test_interrupted_build_ends_its_compilers(tmp_path, monkeypatch):
    import tqdm

    pid_file = tmp_path / "pid"
    fake = script(
        tmp_path / "python", f"sleep 60 &\necho $! > {pid_file}\necho '[1/3] one'\nwait\n"
    )
    monkeypatch.setattr(sys, "executable", fake)

    class Interrupted(tqdm.tqdm):
        def update(self, n=1):
            raise KeyboardInterrupt

    monkeypatch.setattr(tqdm, "tqdm", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        build._pip_wheel(recipes.FLAGS, tmp_path / "out", tmp_path / "log", 1)
    compiler = int(pid_file.read_text())
    assert gone(compiler)


def test_cmake_arguments_survive_the_way_to_cmake(tmp_path, monkeypatch):
    import shlex

    seen = tmp_path / "seen"
    monkeypatch.setattr(
        sys, "executable", script(tmp_path / "python", f'printf %s "$CMAKE_ARGS" > {seen}\n')
    )
    build._pip_wheel(
        {"A": "$ORIGIN;$ORIGIN/../x", "B": "75;90"}, tmp_path / "out", tmp_path / "log", 1
    )
    assert shlex.split(seen.read_text()) == ["-DA=$ORIGIN;$ORIGIN/../x", "-DB=75;90"]


# What compiled files need, and the CUDA build configured for real


def test_needs_are_what_readelf_reads(llama_server):
    readelf = shutil.which("readelf") or pytest.skip("no readelf (binutils) on this machine")
    import llama_cpp

    files = [llama_server, *Path(llama_cpp.__file__).parent.glob("lib/*.so")]
    found = needs.of({Path(file).name: Path(file).read_bytes() for file in files})
    said = subprocess.run(
        [readelf, "-W", "-d", "-V", *files], capture_output=True, text=True, check=True
    ).stdout
    libraries = set(re.findall(r"\(NEEDED\)\s+Shared library: \[(.+)\]", said)) - {
        Path(file).name for file in files
    }
    assert set(found["libraries"]) == libraries
    for name, version in found["versions"].items():
        every = re.findall(rf"Name: {name}_([\d.]+)", said)
        assert version == max(every, key=lambda text: [int(part) for part in text.split(".")])
    assert needs.lacking(found) is None  # it runs here


@pytest.mark.parametrize(
    "lacks, said",
    [
        ({"versions": {"GLIBC": "2.99"}}, r"needs glibc 2.99 or newer, and here is 2\.\d+"),
        ({"versions": {"GLIBC": "2.4"}}, None),  # 2.4 is older than 2.36
        ({"libraries": ["libcudart.so.99"]}, "needs libcudart.so.99, and here is "),
        (
            {"libraries": ["libstdc++.so.6"], "versions": {"GLIBCXX": "3.4.999"}},
            r"GLIBCXX 3.4.999, and the one here has 3.4.\d",
        ),
        ({}, None),
    ],
)
def test_what_this_machine_lacks(lacks, said):
    found = needs.lacking(lacks)
    assert found is None if said is None else re.match(said, found) or re.search(said, found)


def test_a_library_is_looked_for_where_the_linker_would(tmp_path, monkeypatch):
    (tmp_path / "libcudart.so.99").write_bytes(b"")
    asks = {"libraries": ["libcudart.so.99"]}
    assert needs.lacking(asks | {"folders": [str(tmp_path)]}) is None
    monkeypatch.setenv("LD_LIBRARY_PATH", f"/nowhere:{tmp_path}")
    assert needs.lacking(asks) is None


def test_relative_relocations_mean_glibc_2_36(monkeypatch):
    monkeypatch.setattr(
        needs,
        "read",
        lambda data: {
            "needed": ["libc.so.6", "libown.so"],
            "folders": ["$ORIGIN", "/opt/x"],
            "versions": ["GLIBC_2.9", "GLIBC_2.17", "GLIBC_ABI_DT_RELR"],
        },
    )
    assert needs.of({"lib/libown.so": b"x"}) == {
        "libraries": ["libc.so.6"],
        "versions": {"GLIBC": "2.36"},
        "folders": ["/opt/x"],
    }


@pytest.fixture(scope="module")
def source_distribution():
    """Folder with llama-cpp-python's source distribution; kept beside the engine's cache, fetched
    once."""
    folder = build.cache_dir() / "sources"
    if not list(folder.glob(f"llama_cpp_python-{recipes.VERSION}.tar.gz")):
        with tempfile.TemporaryDirectory() as scratch:
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                f"llama-cpp-python=={recipes.VERSION}",
                "--no-deps",
                "--no-binary",
                "llama-cpp-python",
                "--dest",
                scratch,
                "--quiet",
                "--retries",
                "0",
                "--timeout",
                "15",
            ]
            try:
                subprocess.run(command, check=True, capture_output=True, timeout=240)
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                pytest.skip(
                    f"the source distribution could not be fetched: {(error.stderr or b'')[-200:]}"
                )
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(next(Path(scratch).glob("*.tar.gz")), folder)
    return folder


@pytest.fixture
def configure(source_distribution, tmp_path, monkeypatch):
    """configure(flags) runs the build until the first file would be compiled; the log, and the
    build's files.

    CMake sees no driver library, as on a machine without a GPU. An empty file stands in for cuBLAS,
    which not every machine with nvcc has: configuring only looks whether it is there."""
    import tqdm

    if cuda_toolkit.nvcc() is None:
        pytest.skip("no nvcc on this machine")

    class UntilCompiling(tqdm.tqdm):
        def update(self, n=1):
            raise KeyboardInterrupt

    monkeypatch.setattr(tqdm, "tqdm", UntilCompiling)
    (tmp_path / "scratch").mkdir()
    (tmp_path / "libcublas.so").write_bytes(b"")
    for name, value in {
        "TMPDIR": tmp_path / "scratch",
        "PIP_FIND_LINKS": source_distribution,
        "PIP_RETRIES": "0",
        "PIP_DEFAULT_TIMEOUT": "15",
        "SKBUILD_CMAKE_DEFINE": f"CUDA_cublas_LIBRARY={tmp_path / 'libcublas.so'};CUDA_cuda_driver_LIBRARY=",
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("CUDACXX", raising=False)
    tempfile.tempdir = None

    def run(flags):
        log, main = tmp_path / "log", threading.main_thread().ident
        late = threading.Timer(300, lambda: signal.pthread_kill(main, signal.SIGINT))
        late.start()
        try:
            build._pip_wheel(flags, tmp_path / "out", log, 1)
        except KeyboardInterrupt:
            pass
        except build.EngineBuildError as error:
            if "registry could not be reached" in str(error):
                pytest.skip("CMake and scikit-build-core could not be fetched")
            raise
        finally:
            late.cancel()
        if "Configuring CMake" not in log.read_text():
            pytest.skip("what CMake needs was not fetched within 5 minutes")
        return log.read_text(), tmp_path / "scratch"

    yield run
    tempfile.tempdir = None


@pytest.mark.slow
def test_cuda_build_is_configured_where_there_is_no_driver(configure):
    log, scratch = configure(recipes.recipe(cuda="75", portable=True)["flags"])
    assert "Build files have been written to" in log and "CMAKE_CUDA_ARCHITECTURES=75" in log, log[
        -3000:
    ]
    assert "NCCL" not in log.partition("Configuring CMake")[2].replace("GGML_CUDA_NCCL", "")
    ninja = next(scratch.rglob("build.ninja"))
    links = next(
        line
        for line in ninja.read_text().splitlines()
        if line.startswith("build ") and "libggml-cuda.so:" in line
    )
    assert "libcublas.so" in links and "libcuda.so" not in links
    cache = (ninja.parent / "CMakeCache.txt").read_text()
    assert re.search(r"CMAKE_CUDA_COMPILER:\w+=(.+)", cache)[1] == cuda_toolkit.nvcc()
    assert re.search(
        r"^CUDA_cuda_driver_LIBRARY:\w+=$", cache, re.MULTILINE
    )  # and none was found after all


@pytest.mark.slow
def test_with_the_driver_s_allocator_configuring_fails_and_says_why(configure):
    flags = recipes.recipe(cuda="75", portable=True)["flags"]
    with pytest.raises(
        build.EngineBuildError, match="found no CUDA driver library .* GGML_CUDA_NO_VMM=ON"
    ):
        configure({name: value for name, value in flags.items() if name != "GGML_CUDA_NO_VMM"})


def test_installed_engine_runs(llama_server):
    engine = build.installed()
    if engine is None or not engine["tools"]:
        pytest.skip("the installed engine is not ours")
    folder = Path(llama_server).parent
    said = subprocess.run(
        [folder / "llama-server", "--version"],
        capture_output=True,
        text=True,
        env={"PATH": os.defpath},
    )  # no LD_LIBRARY_PATH
    assert said.returncode == 0 and engine["llama_cpp_commit"][:7] in said.stdout + said.stderr
    assert all(os.access(folder / tool, os.X_OK) for tool in engine["tools"])
