"""compare_quantizations against llama-perplexity's two passes: seconds on the same text, side by
side, and the numbers.

python tests/benchmarks/bench_compare.py [--reference FILE] [--windows 4] [--n-ctx 512] [--types
Q8_0 Q4_K_M Q4_0]"""

import argparse
import re
import tempfile
import time
from pathlib import Path

from common import perplexity, report

from llamatelemetry import resolve_model
from llamatelemetry.compare.comparison import compare_quantizations
from llamatelemetry.compare.texts import load_text
from llamatelemetry.convert.expand import make_reference
from llamatelemetry.convert.quantize import quantize


def main(reference, types, n_ctx, windows):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        reference = reference or make_reference(
            resolve_model("smollm2-135m-Q4_1"), folder / "reference.gguf"
        )
        files = [quantize(reference, folder / f"{kind}.gguf", kind) for kind in types]
        text, base = folder / "text.txt", folder / "base.kld"
        text.write_text(load_text())
        for file in (reference, *files):  # every file is in the page cache before anything is timed
            file.read_bytes()
        rows = []
        for turn in range(2):  # both in turn, twice: neither always runs first
            start = time.perf_counter()
            ours = compare_quantizations(
                reference, files, text, n_ctx=n_ctx, max_windows=windows, progress=False
            )
            seconds = time.perf_counter() - start
            rows.append(
                {
                    "run": turn,
                    "what": "compare_quantizations, all files",
                    "seconds": seconds,
                    "file_MB": 0.0,
                }
            )
            start = time.perf_counter()
            perplexity(reference, text, base, n_ctx, windows)
            printed = {
                file.stem: perplexity(file, text, base, n_ctx, windows, "--kl-divergence")
                for file in files
            }
            theirs = time.perf_counter() - start
            rows.append(
                {
                    "run": turn,
                    "what": "llama-perplexity, reference and files",
                    "seconds": theirs,
                    "file_MB": base.stat().st_size / 1e6,
                    "ratio": seconds / theirs,
                }
            )
        for name, words in printed.items():
            found = float(re.search(r"Mean    KLD:\s*([\d.]+)", words)[1])
            rows.append(
                {
                    "what": f"mean KLD of {name}",
                    "ours": float(ours.loc[name, "kld_mean"]),
                    "theirs": found,
                }
            )
        report("compare", rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--types", nargs="+", default=["Q8_0", "Q4_K_M", "Q4_0"])
    parser.add_argument("--n-ctx", type=int, default=512)
    parser.add_argument("--windows", type=int, default=4)
    main(**vars(parser.parse_args()))
