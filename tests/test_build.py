"""The engine build with pip replaced by a script: keys, cache, lock, slimming, messages. Nothing is compiled here."""

import json
import os
import stat
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
from processes import gone

from llamatelemetry import build
from llamatelemetry.slim import slim

pytest.importorskip("wheel", reason="the package wheel is not installed")

LIBRARIES = ("libllama", "libggml", "libggml-base", "libggml-cpu")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMATELEMETRY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "engine"


def raw_wheel(folder, tools=build.TOOLS):
    """A wheel laid out as scikit-build-core leaves it: libraries twice, headers, tools nobody asked for."""
    root = folder / "tree" / f"llama_cpp_python-{build.VERSION}"
    files = {f"llama_cpp/lib/{name}.so": "" for name in LIBRARIES}
    files |= {f"lib/{name}.so": "" for name in (*LIBRARIES, "libllama-common", "libllama-tts-impl",
                                                "libllama-server-impl")}
    files |= {f"bin/{tool}": "" for tool in (*tools, "llama-tts")}
    files |= {"llama_cpp/__init__.py": "", "include/llama.h": "", "lib/cmake/llama/llama-config.cmake": "",
              "lib/pkgconfig/llama.pc": ""}
    info = f"llama_cpp_python-{build.VERSION}.dist-info"
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: {build.VERSION}\n"
    files[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: py3-none-linux_x86_64\n"
    files[f"{info}/RECORD"] = ""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    out = folder / "raw"
    out.mkdir()
    subprocess.run([sys.executable, "-m", "wheel", "pack", "--dest-dir", out, root], check=True, capture_output=True)
    return next(out.glob("*.whl"))


def script(path, body):
    """A stand-in for the Python that runs pip."""
    path.write_text("#!/bin/sh\n" + body)
    path.chmod(0o755)
    return str(path)


def test_slim_keeps_one_set_of_libraries_and_the_tools(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    recipe = build.recipe(portable=True)
    wheel = slim(raw_wheel(tmp_path), out, recipe)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"llama_cpp_python-{build.VERSION}.dist-info"
        expected = {f"llama_cpp/lib/{name}.so" for name in (*LIBRARIES, "libllama-common", "libllama-server-impl")}
        expected |= {f"bin/{tool}" for tool in build.TOOLS} | {"llama_cpp/__init__.py", build.MANIFEST}
        assert names == expected | {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD")}
        assert json.loads(archive.read(build.MANIFEST)) == recipe
        recorded = {line.split(",")[0] for line in archive.read(f"{info}/RECORD").decode().splitlines()}
        assert recorded == names
        assert archive.getinfo("bin/llama-server").external_attr >> 16 & stat.S_IXUSR
    assert wheel.name == f"llama_cpp_python-{build.VERSION}-py3-none-linux_x86_64.whl"


def test_slim_refuses_a_build_without_a_tool(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(build.EngineBuildError, match="no llama-perplexity"):
        tools = [tool for tool in build.TOOLS if tool != "llama-perplexity"]
        slim(raw_wheel(tmp_path, tools), out, build.recipe(portable=True))


def test_key_follows_what_decides_the_build(monkeypatch):
    base = build.recipe()
    assert build.key(base) == build.key(build.recipe())
    others = [build.recipe(cuda="75"), build.recipe(cuda="90"), build.recipe(portable=True)]
    monkeypatch.setattr(build, "cpu_features", lambda: ["another"])
    others.append(build.recipe())
    keys = {build.key(recipe) for recipe in others}
    assert len(keys) == 4 and build.key(base) not in keys
    assert build.key(others[0]).startswith(f"{build.VERSION}-cuda75-")
    assert build.key(build.recipe(portable=True)) == build.key(others[2])  # does not depend on the CPU


def test_flags_are_the_pinned_commit_and_relative_paths():
    flags = build.recipe()["flags"]
    assert flags["LLAMA_BUILD_COMMIT"] == build.COMMIT
    assert all(part.startswith("$ORIGIN") for part in flags["CMAKE_INSTALL_RPATH"].split(";"))
    assert "GGML_CUDA" not in flags and build.recipe(cuda="75")["flags"]["GGML_CUDA"] == "ON"


@pytest.mark.parametrize("variables, expected", [
    ({"LLAMATELEMETRY_CACHE": "/a"}, "/a"),
    ({"LLAMATELEMETRY_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
    ({"XDG_CACHE_HOME": "/b"}, "/b/llamatelemetry"),
    ({"HOME": "/c"}, "/c/.cache/llamatelemetry"),
])
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
    threads = [threading.Thread(target=lambda: results.append(build.build(jobs=3))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert compiled == [3]
    assert results[0] == results[1] and results[0].is_file()
    assert "waiting" in capsys.readouterr().err
    assert {path.suffix for path in cache.iterdir() if path.name.startswith("building-")} == set()

    copy = build.build(out=tmp_path / "copy")  # from the cache: nothing is compiled
    assert compiled == [3] and copy.parent == tmp_path / "copy" and copy.read_bytes() == results[0].read_bytes()


def test_a_failed_build_leaves_no_wheel_and_says_why(tmp_path, cache, monkeypatch):
    fake = script(tmp_path / "python",
                  "echo '[1/3] one'\necho 'c++: fatal error: Killed signal terminated program cc1plus'\nexit 1\n")
    monkeypatch.setattr(build, "_check_tools", lambda cuda: None)
    monkeypatch.setattr(sys, "executable", fake)
    with pytest.raises(build.EngineBuildError, match="--jobs 1") as caught:
        build.build()
    assert "Killed signal" in str(caught.value)
    assert [path.suffix for path in sorted(cache.iterdir())] == [".lock", ".log"]
    assert "[1/3] one" in next(cache.glob("*.log")).read_text()


@pytest.mark.parametrize("line, advice", [
    ("CMake Error: No CMAKE_CXX_COMPILER could be found.", "apt-get install g++"),
    ("ERROR: No matching distribution found for llama-cpp-python==0.3.36", "registry could not be reached"),
    ("fatal error: error writing to /tmp/x.s: No space left on device", "disk is full"),
    ("nvcc fatal   : Unsupported gpu architecture 'compute_20'", "--list-gpu-arch"),
    ("something else", "could not be built"),
])
def test_failure_names_what_is_missing(line, advice, tmp_path):
    message = build.failure(["first", line], tmp_path / "x.log")
    assert advice in message and line in message and "x.log" in message


def test_no_compiler_is_said_before_anything_is_fetched(cache, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build.EngineBuildError, match="No C\\+\\+ compiler"):
        build.build()
    assert not cache.exists()


def test_interrupted_build_ends_its_compilers(tmp_path, monkeypatch):
    import tqdm

    pid_file = tmp_path / "pid"
    fake = script(tmp_path / "python", f"sleep 60 &\necho $! > {pid_file}\necho '[1/3] one'\nwait\n")
    monkeypatch.setattr(sys, "executable", fake)

    class Interrupted(tqdm.tqdm):
        def update(self, n=1):
            raise KeyboardInterrupt

    monkeypatch.setattr(tqdm, "tqdm", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        build._pip_wheel(build.FLAGS, tmp_path / "out", tmp_path / "log", 1)
    compiler = int(pid_file.read_text())
    assert gone(compiler)


def test_cmake_arguments_survive_the_way_to_cmake(tmp_path, monkeypatch):
    import shlex

    seen = tmp_path / "seen"
    monkeypatch.setattr(sys, "executable", script(tmp_path / "python", f'printf %s "$CMAKE_ARGS" > {seen}\n'))
    build._pip_wheel({"A": "$ORIGIN;$ORIGIN/../x", "B": "75;90"}, tmp_path / "out", tmp_path / "log", 1)
    assert shlex.split(seen.read_text()) == ["-DA=$ORIGIN;$ORIGIN/../x", "-DB=75;90"]


def test_installed_engine_runs(llama_server):
    engine = build.installed()
    if engine is None or not engine["tools"]:
        pytest.skip("the installed engine is not ours")
    folder = Path(llama_server).parent
    said = subprocess.run([folder / "llama-server", "--version"], capture_output=True, text=True,
                          env={"PATH": os.defpath})  # no LD_LIBRARY_PATH
    assert said.returncode == 0 and engine["llama_cpp_commit"][:7] in said.stdout + said.stderr
    assert all(os.access(folder / tool, os.X_OK) for tool in engine["tools"])
