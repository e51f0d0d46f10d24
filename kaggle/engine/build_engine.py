"""Build the engine on Kaggle, once: a wheel for its T4s, and in a session without a GPU one for the
CPU alone, too.

A kernel of its own, with internet. Its output (cuda/, cpu/) is what the notebooks attach. The
wheels are built for any CPU with AVX2, because Kaggle's machines differ. Compiling needs no GPU,
but Kaggle's image with the CUDA toolkit does: so the kernel runs with GPUs and builds only what
needs their image. The CUDA wheel does not link to the driver, and sessions without a GPU use it on
their CPU where CUDA's libraries are in their image."""

import os
import subprocess
import sys
import time
from pathlib import Path

INPUT = Path(os.environ.get("LLAMATELEMETRY_KAGGLE_INPUT", "/kaggle/input"))
OUT = Path(os.environ.get("LLAMATELEMETRY_KAGGLE_WORKING", "/kaggle/working"))
CUDA = "75"  # the T4's compute capability, 7.5


def main():
    wheel = max(INPUT.rglob("llamatelemetry-*.whl"), key=lambda path: path.name, default=None)
    if wheel is None:
        sys.exit(
            f"No llamatelemetry wheel below {INPUT}: attach the dataset that `llamatelemetry kaggle stage` makes."
        )
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True
    )
    from llamatelemetry.files import places
    from llamatelemetry.gpus import devices
    from llamatelemetry.kaggle.install import install_missing
    from llamatelemetry.tools import build

    os.environ.setdefault("LLAMATELEMETRY_CACHE", str(places.temp_dir() / "llamatelemetry"))
    for sentence in install_missing(extras=("build",)):
        print(sentence, flush=True)
    has_gpu = bool(devices.visible_gpus())
    kinds = {"cuda": CUDA} if has_gpu else {"cuda": CUDA, "cpu": None}
    for folder, cuda in kinds.items():
        print(f"Building {folder}/: {build.reckoned(cuda)}.", flush=True)
    print(
        "This session has GPUs, so the time counts against the week's GPU quota (30 hours): half an hour, once."
        if has_gpu
        else "This session has no GPU: it costs no GPU quota.",
        flush=True,
    )
    failures = []
    for folder, cuda in kinds.items():
        started = time.monotonic()
        try:
            made = build.build(
                cuda, OUT / folder, portable=True
            )  # in the output as soon as it is there
        except build.EngineBuildError as error:
            failures.append(error)
            which = "the T4s" if cuda else "sessions without a GPU"
            print(f"No wheel for {which}: {error}", flush=True)
            continue
        print(
            f"{made}: {made.stat().st_size / 1e6:,.0f} MB, {(time.monotonic() - started) / 60:.0f} minutes",
            flush=True,
        )
    if len(failures) == len(kinds):
        raise failures[0]


if __name__ == "__main__":
    main()
