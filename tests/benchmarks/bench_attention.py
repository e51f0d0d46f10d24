"""What fused attention and a sliding window's small cache change in a model's predictions:
divergence, no seconds.

llama-server fuses attention where it can (llama.cpp's default is automatic) and keeps only a
window's keys and values in the layers that see no more; captures do neither. Each row compares two
contexts of one file, or of the file and its own weights as F32, through compare_quantizations'
worker. python tests/benchmarks/bench_attention.py [--windows 4]"""

import argparse
import tempfile
from pathlib import Path

import pandas as pd
from common import report

from llamatelemetry import resolve_model
from llamatelemetry.compare.quality import summarize
from llamatelemetry.compare.texts import load_text
from llamatelemetry.compare.worker import compare, open_model, opening, token_ids, windows
from llamatelemetry.convert.expand import expand
from llamatelemetry.gpus.cores import physical_cores

APART, FUSED = {"flash_attn_type": 0}, {"flash_attn_type": 1}
EXACT = {"type_k": 0, "type_v": 0}  # keys and values in 32 bits, for weights in 32 bits


def divergence(what, one, other, n_ctx, n_windows):
    """The row of two (path, context settings): the second's divergence from the first."""
    made = [
        open_model(str(path), n_ctx, max(1, 512 // n_ctx), physical_cores(), 0, **settings)
        for path, settings in (one, other)
    ]
    texts = windows(token_ids(made[0], load_text()), n_ctx, n_windows)
    columns, failed = compare(
        made[0], made[1:], texts, opening(made[0]), lambda _: None, physical_cores()
    )
    assert not failed, failed
    found = summarize(pd.DataFrame(columns[made[1].path]))
    for model in made:
        model.close()
    return {"what": what, "tokens": n_ctx, "windows": len(texts)} | {
        name: float(found[name])
        for name in ("kld_mean", "kld_mean_err", "kld_max", "same_top", "ppl_ratio")
    }


def main(n_windows):
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("smollm2-135m-Q4_1", "gemma-3-270m-Q4_K_M"):
            file = resolve_model(name)
            exact = expand(file, Path(folder) / f"{name}-F32.gguf", progress=False)
            rows += [
                divergence(
                    f"{name}, fused attention", (file, APART), (file, FUSED), 512, n_windows
                ),
                divergence(
                    f"{name} as F32, fused attention",
                    (exact, APART | EXACT),
                    (exact, FUSED | EXACT),
                    512,
                    n_windows,
                ),
                *(
                    divergence(
                        f"{name} against its F32, {said}", (exact, how), (file, how), 512, n_windows
                    )
                    for said, how in (("neither fused", APART), ("both fused", FUSED))
                ),
            ]
        small, full = APART | {"swa_full": False}, APART | {"swa_full": True}
        rows += [
            divergence(
                f"{name}, a cache of the window's size",
                (file, full),
                (file, small),
                1536,
                n_windows // 2,
            ),
            divergence(
                f"{name} as F32, a cache of the window's size",
                (exact, full | EXACT),
                (exact, small | EXACT),
                1536,
                n_windows // 2,
            ),
        ]
    report("attention", rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=4)
    main(parser.parse_args().windows)
