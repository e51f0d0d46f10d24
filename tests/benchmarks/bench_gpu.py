"""Capture, head statistics and inference on a GPU, against what the hardware allows, in one run.

    python tests/benchmarks/bench_gpu.py --shape1b 1b.gguf --shape8b 8b.gguf [--out FILE]

The files are those of make_shapes.py. Limits: plain decode + captured bytes / measured copy
bandwidth for captures, the plain decode for statistics."""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import psutil
from common import report

STAGES = ("attention", "q", "k", "v", "hidden")
FUSED = {"GGML_CUDA_DISABLE_FUSION": "0"}  # the plain decode as llama-server runs it
TEXT = "The cat sat on the mat because it was tired of chasing the small grey mouse around the old house. "


def bandwidth(n_bytes=2**30):
    """Bytes per second from the device into page-locked memory, best of 5."""
    import cupy

    source, target = cupy.zeros(n_bytes, "u1"), cupy.cuda.alloc_pinned_memory(n_bytes)
    best = 0.0
    for _ in range(5):
        cupy.cuda.runtime.deviceSynchronize()
        started = time.perf_counter()
        cupy.cuda.runtime.memcpy(
            target.ptr, source.data.ptr, n_bytes, cupy.cuda.runtime.memcpyDeviceToHost
        )
        best = max(best, n_bytes / (time.perf_counter() - started))
    del source
    cupy.get_default_memory_pool().free_all_blocks()
    return best


def text_of(session, n_tokens):
    return (session.tokenize(TEXT) * (n_tokens // 8))[:n_tokens]


def capture(path, name, n_tokens, rate, repeat=9):
    from llamatelemetry.capture.session import CaptureSession

    with CaptureSession(path) as session, CaptureSession(path, env=FUSED) as other:
        tokens = text_of(session, n_tokens)
        for _ in range(3):
            size = sum(session.capture(tokens, STAGES)[stage].nbytes for stage in STAGES)
        other.time_decode(tokens, 2)
        plain, captured = [], []
        for _ in range(repeat):
            plain += other.time_decode(tokens, 1)
            started = time.perf_counter()
            session.capture(tokens, STAGES)
            captured.append(time.perf_counter() - started)
    plain, captured = statistics.median(plain), statistics.median(captured)
    limit = plain + size / rate
    return {
        "what": f"capture, {name}, {n_tokens} tokens",
        "plain_ms": plain * 1e3,
        "ours_ms": captured * 1e3,
        "limit_ms": limit * 1e3,
        "ratio": captured / limit,
        "mb": size / 1e6,
    }


def without_cupy(folder):
    """An environment in which CuPy cannot be imported."""
    (folder / "cupy").mkdir()
    (folder / "cupy" / "__init__.py").write_text("raise ImportError('blocked by a benchmark')")
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    }


def head_statistics(path, name, n_tokens, repeat=5, env=None):
    from llamatelemetry.capture.session import CaptureSession

    with (
        CaptureSession(path, n_ctx=n_tokens, env=env) as session,
        CaptureSession(path, n_ctx=n_tokens, env=FUSED) as other,
    ):
        assert session.facts["cupy"] == (env is None)
        tokens = text_of(session, n_tokens)
        session.time_decode(tokens, 2, all_logits=False)
        other.time_decode(tokens, 2, all_logits=False)
        worker = psutil.Process(session.pid)
        before = worker.memory_info().rss
        session.head_statistics(tokens)
        added = worker.memory_info().rss - before
        plain, ours = [], []
        for _ in range(repeat):
            plain += other.time_decode(tokens, 1, all_logits=False)
            started = time.perf_counter()
            session.head_statistics(tokens)
            ours.append(time.perf_counter() - started)
    plain, ours = statistics.median(plain), statistics.median(ours)
    return {
        "what": f"head_statistics, {name}, {n_tokens} tokens",
        "plain_ms": plain * 1e3,
        "ours_ms": ours * 1e3,
        "limit_ms": plain * 1e3,
        "ratio": ours / plain,
        "mb": added / 1e6,
    }


def inference(path, name, repeat=20):
    from llamatelemetry import InferenceEngine

    rows = []
    with InferenceEngine() as engine:
        started = time.perf_counter()
        engine.load_model(path, silent=True)
        rows.append(
            {
                "what": f"load_model to ready, {name}",
                "ours_ms": (time.perf_counter() - started) * 1e3,
            }
        )
        engine.infer(TEXT, max_tokens=8)
        whole, first, overhead = [], [], []
        for _ in range(repeat):
            started = time.perf_counter()
            result = engine.infer(TEXT, max_tokens=64, ignore_eos=True)
            whole.append(time.perf_counter() - started)
            server = (
                result.prompt_tokens / result.prompt_tokens_per_sec
                + (result.tokens_generated - 1) / result.tokens_per_sec
            )
            overhead.append(whole[-1] - server)
        for _ in range(repeat):
            started = time.perf_counter()
            pieces = engine.infer_stream(TEXT, max_tokens=64, ignore_eos=True)
            next(pieces)
            first.append(time.perf_counter() - started)
            pieces.close()
        for what, values in (
            ("64 tokens through infer", whole),
            ("first token through infer_stream", first),
            ("infer beyond llama-server's own time", overhead),
        ):
            rows.append(
                {
                    "what": f"{what}, {name}, median of {repeat}",
                    "ours_ms": statistics.median(values) * 1e3,
                }
            )
        print(engine.placement().to_string())
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape1b")
    parser.add_argument("--shape8b")
    parser.add_argument("--out")
    options = parser.parse_args()
    from llamatelemetry.gpus.devices import list_gpus

    if not list_gpus() or not (options.shape1b or options.shape8b):
        print(
            "bench_gpu: needs an NVIDIA GPU and the files of make_shapes.py (--shape1b, --shape8b): not run"
        )
        return
    rate = bandwidth()
    rows = [{"what": "copy to page-locked host memory, GB/s", "ours_ms": rate / 1e9}]
    for name, path in (("1B shape", options.shape1b), ("8B shape", options.shape8b)):
        if path:
            rows.append(capture(path, name, 512, rate))
            rows.append(head_statistics(path, name, 4096))
            with tempfile.TemporaryDirectory() as folder:
                rows.append(
                    head_statistics(
                        path, f"without CuPy, {name}", 4096, 3, without_cupy(Path(folder))
                    )
                )
            report("gpu", rows, options.out)
    if options.shape1b:
        rows += inference(options.shape1b, "1B shape")
    report("gpu", rows, options.out)


if __name__ == "__main__":
    main()
