"""The CUDA toolkit on this machine: its compiler, and the libraries that an engine links to."""

import os
import re
import shutil
import subprocess
from pathlib import Path

from . import needs

FOLDERS = ("/usr/local", "/opt")  # where toolkits lie: cuda, cuda-12.8


def runtime() -> list[str]:
    """CUDA's own libraries that an engine built here links to."""
    major = (nvcc_release() or "").partition(".")[0]
    return [f"lib{name}.so.{major}" for name in ("cudart", "cublas")] if major else []


def runtime_folder() -> str | None:
    """The toolkit's folder with those libraries, where the dynamic linker does not find them on its
    own."""
    names, program = runtime(), nvcc()
    if not program or not names or needs.lacking({"libraries": names}) is None:
        return None
    toolkit = Path(program).resolve().parents[1]
    for name in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        if all((toolkit / name / library).is_file() for library in names):
            return str(toolkit / name)
    return None


def nvcc() -> str | None:
    """$CUDACXX, else nvcc on PATH, in $CUDA_HOME or $CUDA_PATH, in .../cuda, in the newest
    .../cuda-*."""
    if os.environ.get("CUDACXX"):
        return shutil.which(os.environ["CUDACXX"])
    homes = [home for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
    homes += [f"{folder}/cuda" for folder in FOLDERS]
    versioned = [path for folder in FOLDERS for path in Path(folder).glob("cuda-*")]
    homes += map(str, sorted(versioned, key=_version, reverse=True))
    found = (shutil.which(program) for program in ("nvcc", *(f"{home}/bin/nvcc" for home in homes)))
    return next(filter(None, found), None)


def _version(path):
    return [int(part) for part in re.findall(r"\d+", path.name)]


def nvcc_release() -> str | None:
    """Such as "12.8"; None without a compiler."""
    program = nvcc()
    if program is None:
        return None
    text = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release ([\d.]+)", text)
    return found[1] if found else None
