"""What an engine wheel does not need is left out of it.

CMake installs every library twice (once for the bindings, once for the tools), headers, CMake files
and tools that this package never calls. Left are one set of libraries in llama_cpp/lib, the tools
in bin, and a manifest: the recipe, and what the files need of the machine that runs them."""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ..errors import EngineBuildError
from . import needs
from .recipes import MANIFEST, VERSION


def slim(raw: Path, out: Path, recipe: dict) -> Path:
    """Rewrite the wheel `raw` into the folder `out`: one set of libraries, the tools of the recipe,
    a manifest."""
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        _wheel("unpack", "--dest", scratch, str(raw))
        root = next(Path(scratch).iterdir())
        libs = root / "llama_cpp" / "lib"
        for library in (root / "lib").glob("*.so*"):
            if not (libs / library.name).exists():
                shutil.move(library, libs)
        for library in libs.glob("lib*-impl.so"):  # each tool's main is a library of its own
            if library.name.removeprefix("lib").removesuffix("-impl.so") not in recipe["tools"]:
                library.unlink()
        for tool in (root / "bin").iterdir():
            if tool.name not in recipe["tools"]:
                tool.unlink()
        for name in ("lib", "include", "share"):
            shutil.rmtree(root / name, ignore_errors=True)
        _check(root, recipe)
        asks = needs.of({path.name: path.read_bytes() for path in _compiled(root)})
        (root / MANIFEST).write_text(
            json.dumps(recipe | ({"needs": asks} if asks else {}), indent=1)
        )
        _wheel("pack", "--dest-dir", str(out), str(root))
    return next(out.glob("*.whl"))


def _compiled(root: Path) -> list[Path]:
    return [*(root / "bin").iterdir(), *(root / "llama_cpp" / "lib").glob("*.so")]


def _check(root: Path, recipe: dict) -> None:
    missing = [tool for tool in recipe["tools"] if not (root / "bin" / tool).is_file()]
    if missing:
        raise EngineBuildError(
            f"The build gave no {', '.join(missing)}: llama-cpp-python {VERSION} is expected."
        )
    for file in _compiled(root):
        if file.parent.name == "bin":
            file.chmod(0o755)
        linked = subprocess.run(["ldd", str(file)], capture_output=True, text=True).stdout
        lost = [line.split()[0] for line in linked.splitlines() if "not found" in line]
        if lost:
            raise EngineBuildError(f"{file.name} does not find {', '.join(lost)}.")


def _wheel(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "wheel", *arguments], capture_output=True, text=True
    )
    if done.returncode:
        raise EngineBuildError(f"wheel {arguments[0]} failed: {done.stderr.strip()[-1000:]}")
