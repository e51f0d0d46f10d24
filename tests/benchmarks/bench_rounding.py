"""How far the CPU's and the GPU's quantized kernels are from exact arithmetic on the same weights,
and from each other.

    python tests/benchmarks/bench_rounding.py [--types Q8_0 Q4_1 Q5_0 Q5_1] [--results FILE]

SmolLM2 is dequantized to F32 and quantized to each type; "exact" is that file dequantized again, on
the CPU in F32. All differences are root mean squares as shares of the reference's. Both kinds of
kernel round activations to 8 bits, in ways that differ for types with a minimum per block:
bench_rounding_cause.py computes both, and needs no GPU."""

import numpy as np
from common import rounding

STAGES = ("attention", "q", "hidden", "logits")
TEXT = "The capital of France is Paris, and the capital of Italy is Rome."
ON_CPU = {"env": {"CUDA_VISIBLE_DEVICES": "-1"}, "gpu_layers": 0}


def rms(a, b):
    """Root mean square of a - b as a share of that of b."""
    return float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)))


def errors(source, kind, folder):
    """One row per stage for one type. source: F32 file; folder: for the files that are made, and
    removed again."""
    from llamatelemetry.capture.session import CaptureSession
    from llamatelemetry.convert.expand import expand
    from llamatelemetry.convert.quantize import quantize

    quantized, dequantized = folder / f"{kind}.gguf", folder / f"{kind}-F32.gguf"
    quantize(source, quantized, kind, progress=False, pure=True)
    expand(quantized, dequantized, progress=False)
    captures, runs = (
        {},
        (("exact", dequantized, ON_CPU), ("cpu", quantized, ON_CPU), ("gpu", quantized, {})),
    )
    for name, path, options in runs:
        with CaptureSession(path, **options) as session:
            captures[name] = session.capture(TEXT, STAGES)
    quantized.unlink(), dequantized.unlink()
    pairs = (("cpu", "exact"), ("gpu", "exact"), ("gpu", "cpu"))
    return [
        {"what": f"{kind}, {stage}", "type": kind, "stage": stage}
        | {f"{a}_{b}": rms(captures[a][stage].values, captures[b][stage].values) for a, b in pairs}
        for stage in STAGES
    ]


def main():
    from llamatelemetry.gpus.devices import list_gpus

    if not list_gpus():
        print("bench_rounding: needs an NVIDIA GPU: not run")
        return
    rounding("gpu_rounding", __doc__, errors, ["Q8_0", "Q4_1", "Q5_0", "Q5_1"])


if __name__ == "__main__":
    main()
