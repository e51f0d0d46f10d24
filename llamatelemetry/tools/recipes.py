"""What an engine is built from: the version, the flags, and the machine that it is for."""

import contextlib
import hashlib
import json
import platform
from pathlib import Path

from . import cuda_toolkit

# Of llama-cpp-python; its change log names the llama.cpp commit, its archive holds no git history.
VERSION = "0.3.36"
COMMIT = "0c1e57098"
TOOLS = tuple(
    f"llama-{name}"
    for name in ("server", "quantize", "perplexity", "imatrix", "bench", "tokenize", "gguf-split")
)
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
    # A wheel cannot hold symlinks: lib.so, lib.so.0 and lib.so.0.1 would be three copies, and the
    # copy that Python opens another library than the one that its neighbours link to.
    "CMAKE_PLATFORM_NO_VERSIONED_SONAME": "ON",
    "CMAKE_INSTALL_RPATH": "$ORIGIN;$ORIGIN/../llama_cpp/lib",  # from llama_cpp/lib and from bin
}

# Without the driver's library: CMake stops where it is not found, as on machines without a GPU and
# in Kaggle's image (which has libcuda.so.1 and not the libcuda.so that CMake looks for, as scripts
# published for Kaggle say), and what links to it does not load where there is no driver. Only the
# pool for temporary buffers uses it (ggml-cuda.cu, ggml_cuda_pool_vmm). The other pool
# (ggml_cuda_pool_leg) keeps buffers by size and, where memory runs out, gives back those that are
# free and tries again (llama.cpp pull request 22155): its price is memory for temporaries. NCCL
# would tie the wheel to the NCCL of the machine that builds.
CUDA_FLAGS = {"GGML_CUDA": "ON", "GGML_CUDA_NO_VMM": "ON", "GGML_CUDA_NCCL": "OFF"}


def cpu_features() -> list[str]:
    """Instruction sets of this CPU as the kernel names them: -march=native code needs each that it
    was built with."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return sorted(set(value.split()))
    return [platform.processor() or platform.machine()]


def recipe(cuda: str | None = None, portable: bool = False) -> dict:
    """Everything that decides what the build gives: version, flags, and the machine that it is
    for."""
    flags = dict(FLAGS)
    if cuda:
        flags |= CUDA_FLAGS | {"CMAKE_CUDA_ARCHITECTURES": cuda}
        if folder := cuda_toolkit.runtime_folder():
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
        "cuda": cuda_toolkit.nvcc_release() if cuda else None,
    }


def key(recipe: dict) -> str:
    """Name of the recipe's folder in the cache."""
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    arch = recipe["flags"].get("CMAKE_CUDA_ARCHITECTURES")
    return f"{recipe['llama_cpp_python']}-{'cuda' + arch.replace(';', '+') if arch else 'cpu'}-{digest}"
