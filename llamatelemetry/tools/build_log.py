"""What a build's log says: progress while it runs, the reason where it fails."""

import re
import sys
from pathlib import Path

EVERY_S = 30  # between two lines of progress where nobody watches

# What a failed build's log says, and the way out.
_REASONS = [
    (
        r"No CMAKE_C(XX)?_COMPILER could be found|is not a full path to an existing compiler",
        "No C and C++ compiler: install one (Debian, Ubuntu: apt-get install g++).",
    ),
    (
        r"Killed signal|cc1plus: out of memory|virtual memory exhausted",
        "Out of memory: build with --jobs 1.",
    ),
    (
        r"No space left on device",
        "The disk is full: the build needs about 2 GB below the temporary folder ($TMPDIR).",
    ),
    (
        r"Failed to establish a new connection|Temporary failure in name resolution|Could not find a version"
        r"|No matching distribution|Connection (refused|reset)|Read timed out|ProxyError",
        "The package registry could not be reached: the source distribution and CMake come from there.",
    ),
    (
        r"Failed to find nvcc|No CMAKE_CUDA_COMPILER|CUDA Toolkit not found",
        "No CUDA compiler: put nvcc on PATH.",
    ),
    (
        r"CUDA::cuda_driver\s+but the target was not found",
        "CMake found no CUDA driver library (libcuda.so) on this machine: build with GGML_CUDA_NO_VMM=ON, as `engine "
        "build --cuda` does, which needs none.",
    ),
    (
        r"CUDA::\w+\s+but the target was not found",
        "The CUDA toolkit has nvcc, but not every library that llama.cpp links to: install the whole toolkit, or "
        "cuBLAS and the runtime with their development files (Debian, Ubuntu: libcublas-dev-12-8 for CUDA 12.8).",
    ),
    (
        r"unsupported GNU version|Unsupported gpu architecture|nvcc fatal",
        "nvcc refused: check --cuda against `nvcc --list-gpu-arch`, and the compiler's version.",
    ),
]


def progress(what):
    """A bar that counts files: written over in a terminal, a line now and then elsewhere, as in
    Kaggle's log."""
    from tqdm import tqdm

    look = (
        {"mininterval": 0.5, "leave": False, "dynamic_ncols": True}
        if sys.stderr.isatty()
        else {"mininterval": EVERY_S, "file": _Lines(), "ascii": True, "ncols": 100}
    )
    return tqdm(desc=what, unit="file", miniters=1, **look)


class _Lines:
    """Where a bar writes a line for each of its states."""

    def write(self, text):
        if text := text.strip():
            print(text, file=sys.stderr, flush=True)

    def flush(self):
        pass


def failure(lines, log: Path) -> str:
    """Message for a failed build: what is missing, where it is known, and the end of the log."""
    text = "\n".join(lines)
    reason = next((advice for pattern, advice in _REASONS if re.search(pattern, text)), "")
    return f"The engine could not be built. {reason}\nLog: {log}\n...\n" + "\n".join(
        list(lines)[-25:]
    )
