"""Build the engine on Kaggle, once: a wheel for its T4s and one for sessions without a GPU.

A kernel of its own, with internet. Its output (cuda/ and cpu/) is what the notebooks attach. The wheels are built for
any CPU with AVX2, because Kaggle's machines differ.
"""

import os
import subprocess
import sys
from pathlib import Path

INPUT = Path(os.environ.get("LLAMATELEMETRY_KAGGLE_INPUT", "/kaggle/input"))
OUT = Path(os.environ.get("LLAMATELEMETRY_KAGGLE_WORKING", "/kaggle/working"))
CUDA = "75"  # the T4's compute capability, 7.5


def main():
    wheel = max(map(str, INPUT.rglob("llamatelemetry-*.whl")))
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True)
    from llamatelemetry import kaggle
    from llamatelemetry.build import build

    os.environ.setdefault("LLAMATELEMETRY_CACHE", str(kaggle.temp_dir() / "llamatelemetry"))
    for sentence in kaggle.install_missing(extras=("build",)):
        print(sentence, flush=True)
    for folder, cuda in (("cpu", None), ("cuda", CUDA)):
        made = build(cuda, OUT / folder, portable=True)
        print(f"{made}: {made.stat().st_size / 1e6:,.0f} MB", flush=True)


if __name__ == "__main__":
    main()
