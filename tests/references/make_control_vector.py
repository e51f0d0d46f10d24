"""Make `control_vector.npz`, which `tests/test_steering.py` compares with: what llama.cpp's own
llama-cvector-generator makes of a tiny model and a few pairs of texts.

    python tests/references/make_control_vector.py LLAMA_CPP

needs a C++ compiler, gguf and the installed engine, against whose libraries the tool is compiled.
LLAMA_CPP: the folder of the same llama.cpp's source (vendor/llama.cpp of llama-cpp-python's source
distribution). Its mean method only: what its pca writes is no principal component of the
differences (of the first layer's here the Rayleigh quotient was 82, the largest eigenvalue 583)."""

import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from models import tiny_model  # noqa: E402

# Of equal length in the tiny models' vocabulary: the tool fills up the shorter text with blanks.
PAIRS = [
    ("the cat sat on the mat", "the dog sat on the log"),
    ("the cat saw the house", "the dog saw the house"),
    ("in the house the cat ran", "in the house the dog ran"),
]


def main():
    source, libraries = Path(sys.argv[1]), Path(llama_cpp.__file__).parent / "lib"
    arrays = {"pairs": np.array(PAIRS)}
    with tempfile.TemporaryDirectory() as folder:
        folder, program = Path(folder), Path(folder) / "cvector-generator"
        includes = [
            f"-I{source / name}" for name in "include ggml/include src common vendor".split()
        ]
        linked = "-lllama -lllama-common -lggml -lggml-base -lggml-cpu"
        code = source / "tools" / "cvector-generator" / "cvector-generator.cpp"
        command = ["g++", "-O1", "-std=c++17", *includes, str(code), f"-L{libraries}"]
        command += [*linked.split(), f"-Wl,-rpath,{libraries}", "-o", str(program)]
        subprocess.run(command, check=True)
        model = tiny_model("llama", folder)
        for name, texts in zip(("positive", "negative"), zip(*PAIRS)):
            (folder / name).write_text("\n".join(texts) + "\n")
        out = folder / "out.gguf"
        options = ["--positive-file", folder / "positive", "--negative-file", folder / "negative"]
        command = [program, "-m", model, "-ngl", "0", "--method", "mean", "-o", out, *options]
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
        for tensor in gguf.GGUFReader(out).tensors:
            arrays[tensor.name] = np.array(tensor.data)
    np.savez_compressed(HERE / "control_vector.npz", **arrays)
    print({name: array.shape for name, array in arrays.items()})


if __name__ == "__main__":
    main()
