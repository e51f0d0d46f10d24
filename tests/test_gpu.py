"""What only an NVIDIA GPU can show: CUDA captures against the CPU's, placement, and memory given
back.

CI has no GPU; the last real run is in tests/benchmarks/results/gpu_tests.txt.
"""

import time

import numpy as np
import psutil
import pytest
from bench_gpu import without_cupy
from bench_rounding import ON_CPU, TEXT, errors, rms
from models import DENSE, IDS, tiny_model

from llamatelemetry import InferenceEngine, ablate_head, patch, scale
from llamatelemetry.capture.session import CaptureSession
from llamatelemetry.collecting.session import CollectSession
from llamatelemetry.convert.expand import expand
from llamatelemetry.gpus.devices import list_gpus
from llamatelemetry.gpus.placement import placement

pytestmark = pytest.mark.gpu
STAGES = tuple(stage for stage in DENSE if stage != "mask")
# ggml lets cuBLAS round float32 factors to TF32 (10 bits, 1e-3). Without that the two devices must
# agree closely.
EXACT = {"NVIDIA_TF32_OVERRIDE": "0"}


@pytest.fixture(scope="module", autouse=True)
def cuda():
    """Skips unless there is a GPU and an engine built for it."""
    if not list_gpus():
        pytest.skip("no NVIDIA GPU on this machine")
    import llama_cpp

    if not llama_cpp.llama_supports_gpu_offload():
        pytest.skip("the engine was built without CUDA: `llamatelemetry engine build --cuda ARCH`")


@pytest.fixture(scope="module", params=["llama", "gemma2", "gemma3", "qwen3", "phi3"])
def pair(request, tmp_path_factory):
    """The same F32 file on the GPU and on the CPU."""
    path = tiny_model(request.param, tmp_path_factory.mktemp("models"))
    with CaptureSession(path, env=EXACT) as gpu, CaptureSession(path, **ON_CPU) as cpu:
        yield gpu, cpu


def relative(a, b):
    """Largest difference over the largest value of b."""
    return np.abs(a - b).max() / max(np.abs(b).max(), 1e-9)


@pytest.mark.parametrize("pool", ["last", "mean", "max", None])
def test_states_of_many_texts_equal_single_captures(tmp_path, pool):
    """In batches of 32 tokens, and of a text that is longer, pooled on the device."""
    texts = [IDS[:9], IDS[:1], IDS, IDS[5:12], IDS + IDS, IDS[::-1]]
    ways = {"last": lambda v: v[:, -1], "mean": lambda v: v.mean(1), "max": lambda v: v.max(1)}
    with CollectSession(tiny_model("gemma3", tmp_path), env=EXACT, n_ubatch=32) as session:
        stages = ("hidden", "ffn_out", "q", "k")
        _, _, found = session.collect(texts, stages, pool=pool)
        start = 0
        for number, ids in enumerate(texts):
            cap = session.capture(ids, stages)
            for stage, array in found.items():
                expected = cap[stage].transpose("layer", "token", ...).values
                got = array[:, start : start + len(ids)]
                if pool:
                    got, expected = array[:, number], ways[pool](expected)
                # One token has kernels of its own, and the cache keeps 16 bits: 4.1e-4 on an H100
                assert relative(got, expected) < 1e-3, (stage, number)
            start += len(ids)


def test_every_stage_equals_the_cpus(pair):
    gpu, cpu = (session.capture(IDS, (*STAGES, "mask")) for session in pair)
    worst = {
        stage: float(relative(gpu[stage].values, cpu[stage].values))
        for stage in STAGES
        if stage != "scores"
    }
    allowed = np.isfinite(cpu.mask.values)[:, None]  # scores of masked pairs are never used
    a, b = (np.where(allowed, cap.scores.values, 0) for cap in (gpu, cpu))
    worst["scores"] = float(relative(a, b))
    assert max(worst.values()) < 1e-3, worst


def test_default_rounding_stays_within_tf32(tmp_path):
    path = tiny_model("llama", tmp_path)
    with CaptureSession(path) as gpu, CaptureSession(path, **ON_CPU) as cpu:
        a, b = (session.capture(IDS, STAGES) for session in (gpu, cpu))
    assert max(float(rms(a[s].values, b[s].values)) for s in STAGES if s != "scores") < 2e-3


def test_logits_are_the_same_bits_with_and_without_capture(pair):
    gpu, _ = pair
    alone = gpu.capture(IDS, "logits").logits.values
    np.testing.assert_array_equal(gpu.capture(IDS, STAGES).logits.values, alone)
    np.testing.assert_array_equal(
        -gpu.score(IDS)["logprob"].mean(), gpu.sweep(IDS, {"none": []}, False).attrs["base_loss"]
    )


@pytest.mark.parametrize("edit", ["head", "mean", "scale", "patch"])
def test_edits_do_what_they_do_on_the_cpu(pair, edit):
    source = pair[1].capture(IDS[::-1], "hidden")
    edits = {
        "head": ablate_head(1, 2),
        "mean": ablate_head(1, 2, "mean"),
        "scale": scale("ffn_out", 0, 0.25, positions=[3]),
        "patch": patch("hidden", 1, source, positions=[5, 6]),
    }[edit]
    gpu, cpu = (session.capture(IDS, ("logits", "attn_heads"), edits=edits) for session in pair)
    assert relative(gpu.logits.values, cpu.logits.values) < 1e-3
    assert relative(gpu.logits.values, pair[0].capture(IDS, "logits").logits.values) > 1e-3


def test_statistics_on_the_device_equal_the_cpus(pair):
    options = {"patterns": {"some": [(3, 1), (20, 4), (27, 27)]}}
    gpu, cpu = (session.head_statistics(IDS, **options) for session in pair)
    for name in cpu:
        np.testing.assert_allclose(gpu[name].values, cpu[name].values, atol=2e-3, err_msg=name)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_several_ubatches_and_generation(architecture, tmp_path):
    path = tiny_model(architecture, tmp_path)
    with (
        CaptureSession(path, env=EXACT) as one,
        CaptureSession(path, n_ubatch=9, env=EXACT) as several,
    ):
        a, b = (session.capture(IDS, STAGES, generate=4) for session in (one, several))
        for stage in set(STAGES) - {
            "scores"
        }:  # for at most 16 tokens ggml takes kernels of its own that use TF32
            assert relative(a[stage].values, b[stage].values) < 5e-3, stage
        part = several.capture(IDS, "attention", queries=[2, 20], layers=[1])
        whole = several.capture(IDS, "attention")
        np.testing.assert_array_equal(
            part.attention.values[0], whole.attention.sel(layer=1).values[:, [2, 20]]
        )


@pytest.fixture(scope="module")
def both():
    """Environments in which one GPU, and two, are to be seen."""
    found = list_gpus()
    if len(found) < 2:
        pytest.skip("needs two GPUs")
    return [
        {**EXACT, "CUDA_VISIBLE_DEVICES": ",".join(gpu.uuid for gpu in found[:count])}
        for count in (1, 2)
    ]


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen3"])
def test_a_model_spread_over_two_gpus_is_captured_as_on_one(both, architecture, tmp_path):
    path = tiny_model(architecture, tmp_path, n_layer=6, n_ctx=1024)
    long = (
        IDS * 4
    )  # with 9 tokens at a time: several batches, and contexts that are made anew as the text grows
    with (
        CaptureSession(path, env=both[0], n_ubatch=9) as one,
        CaptureSession(path, env=both[1], n_ubatch=9, tensor_split=[0.5, 0.5]) as spread,
    ):
        assert {row.gpu for row in placement({"worker": spread.pid}).itertuples()} == {0, 1}
        source = one.capture(IDS[::-1], "hidden")
        for tokens in (IDS, long * 6, long):
            edits = [
                ablate_head(1, 2),
                scale("ffn_out", 4, 0.25),
                patch("hidden", 3, source, positions=[5, 6]),
            ]
            for change in ((), edits):
                a, b = (session.capture(tokens, STAGES, edits=change) for session in (one, spread))
                for stage in STAGES:
                    np.testing.assert_array_equal(a[stage].values, b[stage].values, err_msg=stage)
            a, b = (session.head_statistics(tokens) for session in (one, spread))
            for name in a:
                np.testing.assert_allclose(a[name].values, b[name].values, atol=1e-6, err_msg=name)
        a, b = (
            session.capture(IDS, ("attention", "logits"), generate=5) for session in (one, spread)
        )
        np.testing.assert_array_equal(a.logits.values, b.logits.values)


def test_without_cupy_the_tensors_are_copied_and_equal(tmp_path):
    path = tiny_model("gemma2", tmp_path)
    with CaptureSession(path, env=without_cupy(tmp_path)) as without:
        assert not without.facts["cupy"]
        copied, sums = (
            without.capture(IDS, STAGES, edits=ablate_head(0, 1)),
            without.head_statistics(IDS),
        )
    with CaptureSession(path) as session:
        assert session.facts["cupy"]
        looked, reduced = (
            session.capture(IDS, STAGES, edits=ablate_head(0, 1)),
            session.head_statistics(IDS),
        )
    for stage in STAGES:
        a, b = copied[stage].values, looked[stage].values
        rounding = 1e-6 if stage == "attention_mean" else 0  # summed by NumPy, and on the device
        np.testing.assert_allclose(a, b, rtol=0, atol=rounding, err_msg=stage)
    for name in sums:
        np.testing.assert_allclose(reduced[name].values, sums[name].values, atol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def dequantized(smollm2, tmp_path_factory):
    return expand(smollm2, tmp_path_factory.mktemp("dequantized") / "F32.gguf", progress=False)


# Q4_1 has a minimum per block: there CUDA rounds more coarsely than the CPU
# (bench_rounding_cause.py says why).
@pytest.mark.parametrize("kind, times_the_cpus, apart", [("Q8_0", 1.25, 2e-2), ("Q4_1", 4, 6e-2)])
def test_quantized_kernels_are_near_exact_arithmetic_and_each_other(
    dequantized, tmp_path, kind, times_the_cpus, apart
):
    found = {row["stage"]: row for row in errors(dequantized, kind, tmp_path)}
    for stage, row in found.items():
        assert row["gpu_exact"] < times_the_cpus * row["cpu_exact"], found
    assert max(found["attention"]["gpu_cpu"], found["q"]["gpu_cpu"]) < apart, found
    assert found["hidden"]["gpu_cpu"] < 2e-2, found


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0", "Q4_1"])
def test_what_notebooks_allow_for_rounding_is_what_the_gpu_rounds(dequantized, tmp_path, kind):
    from llamatelemetry.attention import steps as attention_steps
    from llamatelemetry.convert.quantize import quantize
    from llamatelemetry.layers import lens

    path = dequantized
    if kind != "F32":
        path = quantize(dequantized, tmp_path / f"{kind}.gguf", kind, progress=False, pure=True)
    with CaptureSession(path) as session:
        assert session.facts["gpu"]
        cap = session.capture(TEXT, (*attention_steps.STAGES, "final_norm", "logits"))
        for layer in (0, 13, 29):
            steps = attention_steps.check_steps(cap, session.model, layer)
            assert steps["agrees"].all(), steps
        assert lens.logit_error(lens.unembedding(session.model, cap), cap)["ratio"].max() < 1


def test_server_and_worker_sit_on_the_gpu_and_give_it_back(smollm2):
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    before = pynvml.nvmlDeviceGetMemoryInfo(handle).used
    with InferenceEngine() as engine:
        engine.load_model(smollm2, silent=True)
        engine.infer("Hello", max_tokens=4)
        engine.capture("Hello", stages="hidden")
        table = engine.placement()
        print(table.to_string())
        during = pynvml.nvmlDeviceGetMemoryInfo(handle).used
        assert during - before > 100 * 2**20
        ours = table["pid"][table["process"] != "notebook"]
        assert len(ours) == 2
    deadline = time.monotonic() + 10
    while (
        after := pynvml.nvmlDeviceGetMemoryInfo(handle).used
    ) > before + 2**20 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert after <= before + 2**20
    assert not [pid for pid in ours if psutil.pid_exists(pid)]
