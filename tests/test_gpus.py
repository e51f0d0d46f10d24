"""Who gets which GPU, with recorded drivers of two T4s, one and none; what fits, against
llama.cpp's own figures."""

import os
import re
import sys
import types
from dataclasses import dataclass, field

import pandas as pd
import pytest

from llamatelemetry import GpuError
from llamatelemetry.gpus import devices, placement
from llamatelemetry.gpus.fit import (
    as_type,
    compute_bytes,
    fit,
    kv_bytes,
    sliding_layers,
    spread,
    weight_bytes,
)
from llamatelemetry.gpus.placing import place

T4 = 15360 * 2**20


class Driver:
    """What pynvml answers on a machine, as recorded: names, UUIDs, and (pid, bytes) per GPU."""

    NVMLError = type("NVMLError", (Exception,), {})

    def __init__(self, count, processes=(), error=None):
        self.count, self.processes, self.error = count, dict(processes), error

    def nvmlDeviceGetCount(self):
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetName(self, index):
        return "Tesla T4"

    def nvmlDeviceGetUUID(self, index):
        return f"GPU-{index}a3b5c7d-0000-1111-2222-333344445555"

    def nvmlDeviceGetMemoryInfo(self, index):
        return types.SimpleNamespace(total=T4, free=14913 * 2**20)

    def nvmlDeviceGetComputeRunningProcesses(self, index):
        if self.error:
            raise self.NVMLError(self.error)
        return [
            types.SimpleNamespace(pid=pid, usedGpuMemory=used)
            for pid, used in self.processes.get(index, ())
        ]


@pytest.fixture
def machine(monkeypatch):
    """machine(2) makes this a machine with two T4s."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices, "_before", None)
    monkeypatch.setattr(devices, "_cuda_uuids", lambda: None)

    def make(count, processes=(), error=None):
        driver = Driver(count, processes, error) if count is not None else None
        monkeypatch.setattr(devices, "_nvml", lambda: driver)
        return [driver.nvmlDeviceGetUUID(index) for index in range(count or 0)]

    return make


@pytest.mark.parametrize("split", [None, "1.0,0.0", "1", [1, 0]])
def test_two_gpus(machine, split):
    first, second = machine(2)
    plan = devices.plan(split)
    assert plan.inference_env() == {"CUDA_VISIBLE_DEVICES": first} and plan.split is None
    assert plan.analytics.uuid == second
    assert plan.line == (
        "GPUs: inference on GPU 0 (Tesla T4, 15,360 MiB); "
        "analytics on GPU 1 (Tesla T4, 15,360 MiB)."
    )


def test_both_for_inference(machine):
    first, second = machine(2)
    plan = devices.plan("0.5,0.5")
    assert (
        plan.inference_env() == {"CUDA_VISIBLE_DEVICES": f"{first},{second}"}
        and plan.split == "0.5,0.5"
    )
    assert plan.analytics.uuid == second and "shared with inference" in plan.line


def test_the_second_for_inference(machine):
    first, second = machine(2)
    plan = devices.plan("0,1")
    assert plan.inference_env() == {"CUDA_VISIBLE_DEVICES": second} and plan.analytics.uuid == first


@pytest.mark.parametrize(
    "split, shares",
    [
        (None, (1.0,)),
        ("0.5,0.5", (0.5, 0.5)),
        ("3,1", (0.75, 0.25)),
        ("0,1", (1.0,)),
    ],
)
def test_shares_of_the_layers(machine, split, shares):
    machine(2)
    assert devices.plan(split).shares == shares
    machine(0)
    assert devices.plan(split).shares == ()


def test_one_gpu_is_shared(machine):
    (only,) = machine(1)
    plan = devices.plan("1.0,0.0")
    assert plan.inference_env() == {"CUDA_VISIBLE_DEVICES": only}
    assert plan.analytics.uuid == only and "share it" in plan.line


@pytest.mark.parametrize("count", [None, 0])
@pytest.mark.parametrize("split", [None, "1.0,0.0", "0.5,0.5"])
def test_no_gpu(machine, count, split):
    machine(count)
    plan = devices.plan(split)
    assert plan.inference_env() == {} and plan.analytics is None and plan.split is None
    assert "run on the CPU" in plan.line and devices.assign_analytics() is None
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_proof_is_what_the_driver_says(machine):
    machine(2, {0: [(os.getpid(), 500 * 2**20)]})
    used = f"GPU 0 {15360 - 14913} MiB in use; GPU 1 {15360 - 14913} MiB in use"
    assert (
        placement.proof({"llama-server": os.getpid()})
        == f"The driver reports: {used}; llama-server on GPU 0."
    )
    assert placement.proof({"notebook": os.getppid()}) == f"The driver reports: {used}."
    machine(2, error="Not Supported")
    assert placement.proof({"llama-server": 1}).endswith(
        f"{used}; where llama-server sits it does not say."
    )
    machine(0)
    assert placement.proof({"llama-server": 1}) == ""


@pytest.mark.parametrize("split", ["", "a,b", "0,0", "-1,2", "nan", 5, "inf"])
def test_a_split_that_is_none(machine, split):
    machine(2)
    with pytest.raises(GpuError, match="tensor_split"):
        devices.plan(split)


def test_more_gpus_than_there_are(machine):
    machine(1)
    with pytest.raises(GpuError, match="only 1 is visible"):
        devices.plan("0.5,0.5")


@pytest.mark.parametrize(
    "shown, indices",
    [
        ("0", [0]),
        ("1", [1]),
        ("1,0", [1, 0]),
        ("GPU-1a3b", [1]),
        ("0,7,1", [0]),
        ("", []),
        ("-1", []),
        ("0,0", [0]),
    ],
)
def test_cuda_visible_devices_is_respected(machine, monkeypatch, shown, indices):
    machine(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert [gpu.index for gpu in devices.visible_gpus()] == indices
    assert [gpu.index for gpu in devices.plan().inference] == indices[:1]
    if not indices:
        assert "hides every GPU" in devices.plan().line


# Analytics


def test_assign_analytics(machine, monkeypatch):
    first, second = machine(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert devices.assign_analytics().uuid == second
    assert os.environ["CUDA_VISIBLE_DEVICES"] == second
    # What this process is shown now does not narrow what inference gets, however often it is
    # called.
    assert devices.plan().inference_env() == {"CUDA_VISIBLE_DEVICES": first}
    assert devices.assign_analytics().uuid == second
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")  # but the user's own later word does
    assert devices.plan().inference_env() == {"CUDA_VISIBLE_DEVICES": second}


def test_cudf_first_is_refused(machine, monkeypatch):
    """The predecessor's order: cuDF imported first, so CUDA shows both GPUs and takes the first."""
    first, second = machine(2)
    monkeypatch.setattr(devices, "_cuda_uuids", lambda: [first, second])
    monkeypatch.setitem(devices.sys.modules, "cudf", types.ModuleType("cudf"))
    with pytest.raises(
        GpuError, match=r"imported: cudf.*GPU 0 .*belongs on GPU 1.*Restart the kernel.*first cell"
    ):
        devices.assign_analytics()
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_cuda_already_on_the_right_gpu(machine, monkeypatch):
    _, second = machine(2)
    monkeypatch.setattr(devices, "_cuda_uuids", lambda: [second])
    assert devices.assign_analytics().uuid == second


def test_a_context_that_the_driver_reports(machine):
    machine(2, {0: [(os.getpid(), 300 * 2**20)]})
    with pytest.raises(GpuError, match="GPU 0"):
        devices.assign_analytics()


@pytest.mark.slow  # five processes that import Dask
def test_each_worker_of_a_cluster_is_shown_a_gpu_of_its_own(machine):
    distributed = pytest.importorskip("distributed")
    from llamatelemetry.backend.cluster import local_cluster

    def shown(workers=None):
        with local_cluster(workers) as cluster, distributed.Client(cluster) as client:
            return sorted(client.run(os.getenv, "CUDA_VISIBLE_DEVICES").values())

    first, second = machine(2)
    devices.assign_analytics()  # in this process only the second is left
    assert shown() == [first, second] and shown(3) == [first, first, second]


def test_cuda_is_asked_without_being_started():
    assert devices._cuda_uuids() is None  # nothing in the tests has started CUDA


# Placement


def test_placement(machine):
    me, parent = os.getpid(), os.getppid()
    machine(2, {0: [(parent, 1200 * 2**20)], 1: [(me, None)]})
    table = placement.placement({"notebook": me, "llama-server": parent, "capture worker": 1})
    assert table["gpu"].tolist()[:2] == [1, 0] and table["gpu"].isna().tolist() == [
        False,
        False,
        True,
    ]
    assert table["memory_mib"].tolist()[1] == 1200 and pd.isna(table["memory_mib"][0])
    assert (
        "does not report memory" in table["note"][0] and table["note"][2] == "no context on a GPU"
    )
    assert table["gpu_name"][0] == "Tesla T4"


def test_placement_across_two_gpus(machine):
    machine(2, {0: [(1, 100 * 2**20)], 1: [(1, 200 * 2**20)]})
    assert placement.placement({"llama-server": 1})["memory_mib"].tolist() == [100, 200]


@pytest.mark.parametrize(
    "count, processes, error, note",
    [
        (None, {}, None, "no GPU: on the CPU"),
        (2, {}, "Insufficient Permissions", "does not list processes: Insufficient Permissions"),
        (2, {0: [(2**22 + 17, 5)]}, None, "not proven.*cannot see"),
    ],
)
def test_placement_that_the_driver_does_not_tell(machine, count, processes, error, note):
    machine(count, processes, error)
    table = placement.placement({"notebook": os.getpid()})
    assert (
        re.search(note, table["note"][0])
        and table["gpu"].isna().all()
        and table["memory_mib"].isna().all()
    )


# What fits


@dataclass
class File:
    """A model of 10 layers, 4 heads of 16, 2 kv heads, 1,000 tokens; 8 bits per weight."""

    called: str = "tiny"
    architecture: str = "llama"
    n_layer: int = 10
    n_head: int = 4
    n_kv_head: int = 2
    n_embd: int = 64
    n_ff: int = 128
    n_vocab: int = 1000
    head_dim: int = 16
    head_dim_v: int = 16
    sliding_window: int | None = None
    bits_per_weight: float = 8.5
    output_name: str = "output.weight"
    metadata: dict = field(default_factory=dict)
    weights: int = 64_000_000

    @property
    def tensors(self):
        names = ["token_embd.weight", "blk.0.ffn_up.weight", "output.weight"][
            : 3 if self.output_name[0] == "o" else 2
        ]
        return pd.DataFrame(
            {"size_bytes": [10_000_000, self.weights, 10_000_000][: len(names)]}, index=names
        )


def test_weights():
    assert weight_bytes(File()) == 74_000_000  # on a GPU the embedding stays behind
    assert weight_bytes(File(), gpu=False) == 84_000_000
    assert (
        weight_bytes(File(output_name="token_embd.weight")) == 74_000_000
    )  # unless it also makes the logits


def test_kv_cache():
    per_token = 10 * 2 * (16 + 16) * 2  # layers, kv heads, key and value, two bytes
    assert kv_bytes(File(), 4096) == 4096 * per_token
    assert kv_bytes(File(), 4096, n_parallel=3) == 3 * 4096 * per_token
    assert kv_bytes(File(), 300) == 512 * per_token  # padded to 256
    # Gemma 3: five sliding layers, then one that sees everything; 10 layers have 9 and 1.
    gemma = File(architecture="gemma3", sliding_window=512, metadata={})
    assert sliding_layers(gemma) == [True] * 5 + [False] + [True] * 4
    assert kv_bytes(gemma, 4096) == (9 * 1024 + 4096) * per_token // 10
    assert kv_bytes(gemma, 4096, swa_full=True) == 4096 * per_token
    # Every fourth layer has keys and values, the others a state: 2 of 10
    hybrid = File(architecture="qwen3next", metadata={"qwen3next.full_attention_interval": 4})
    assert kv_bytes(hybrid, 4096) == 2 * 4096 * per_token // 10
    told = {"minimax-01.attention.recurrent_layers": [True] * 7 + [False] * 3}
    assert (
        kv_bytes(File(architecture="minimax-01", metadata=told), 4096) == 3 * 4096 * per_token // 10
    )
    # Latent attention has no cache of values
    latent = File(architecture="deepseek2", metadata={"deepseek2.attention.key_length_mla": 192})
    assert kv_bytes(latent, 4096) == 4096 * per_token // 2


@pytest.mark.parametrize(
    "architecture, pattern, slides",
    [
        ("gemma2", None, [True, False] * 5),
        ("gemma3", 3, [True, True, False] * 3 + [True]),
        ("gpt-oss", [False] * 4 + [True] * 6, [False] * 4 + [True] * 6),
        ("phi3", None, [False] * 10),
        ("unheard-of", None, [False] * 10),
    ],
)
def test_sliding_layers(architecture, pattern, slides):
    key = f"{architecture}.attention.sliding_window_pattern"
    file = File(
        architecture=architecture, sliding_window=128, metadata={key: pattern} if pattern else {}
    )
    assert sliding_layers(file) == slides


def test_compute_buffers():
    file = File(n_vocab=50_000)
    assert compute_bytes(file, 512) == 6 * 512 * 512 + 4 * 512 * (
        4 * 64 + 3 * 128
    )  # one output: a layer is the peak
    # Every token's logits: the end is the peak, the layers' memory is used again.
    assert (
        compute_bytes(file, 512, n_outputs=512, flash=False)
        == 4 * 512 * 512 + 4 * 512 * 50_000 + 8 * 512 * 64
    )
    # Scores of all heads where attention is not fused.
    assert (
        compute_bytes(file, 8192, flash=False)
        == 4 * 512 * 8192 + 4 * 512 * (4 * 64 + 3 * 128) + 8 * 512 * 8192 * 4
    )


@pytest.mark.slow
def test_fit_is_what_the_worker_takes(smollm2):
    """Figures of llama.cpp's log for SmolLM2, all logits asked for, attention not fused: 98.3 MiB
    at 512 and 1,024 tokens, 99.4 at 2,048."""
    from llamatelemetry import GGUFFile

    model = GGUFFile(smollm2)
    for ctx_size, measured in ((512, 98.25), (1024, 98.25), (2048, 99.38)):
        assert (
            measured
            <= compute_bytes(model, ctx_size, n_outputs=512, flash=False) / 2**20
            <= measured + 5
        )


def test_it_fits():
    found = fit(File(), 1024, memory_bytes=2**31, gpu=True)
    assert found.fits and str(found).startswith("tiny fits") and len(found.table) == 2
    assert found.table["total"].sum() * 2**20 == pytest.approx(found.need_bytes)
    one = fit(File(), 1024, memory_bytes=2**31, gpu=True, capture=False)
    assert one.table["process"].tolist() == ["llama-server"] and one.need_bytes < found.need_bytes
    # On the CPU both processes map one copy of the file.
    assert fit(File(), 1024, memory_bytes=2**31, gpu=False).table["weights"].tolist()[1] == 0


def test_what_would_fit():
    need = fit(File(weights=4 * 2**30), 65536, memory_bytes=1, gpu=True).need_bytes
    found = fit(File(weights=4 * 2**30), 65536, memory_bytes=int(0.95 * need), gpu=True)
    assert not found.fits
    shorter = int(re.search(r"ctx_size=(\d+)", str(found))[1])
    assert fit(File(weights=4 * 2**30), shorter, memory_bytes=int(0.95 * need), gpu=True).fits
    assert "auto_start=False" in str(found) and "the Q6_K quantization" in str(found)
    assert "choose a smaller one" in str(fit(File(), 65536, memory_bytes=10, gpu=True))


@pytest.mark.parametrize(
    "n_layer, shares, parts",
    [
        (
            32,
            (0.5, 0.5),
            [(17 / 32, False), (15 / 32, True)],
        ),  # by NVML on two H100s: 1,990 and 2,166 MiB of an 8B's weights
        (10, (1.0,), [(1.0, True)]),
        (10, (3, 1), [(0.9, False), (0.1, True)]),
        (2, (0.9, 0.1), [(1.0, True), (0.0, False)]),
    ],
)
def test_layers_are_dealt_out_as_llama_cpp_does(n_layer, shares, parts):
    assert spread(n_layer, shares) == parts


def test_what_fits_spread_over_gpus(machine):
    machine(2)
    file = File(weights=4 * 2**30)
    whole, first, last = (
        fit(file, 65536, memory_bytes=1, gpu=True, share=share, output=output)
        for share, output in ((1, True), (0.6, False), (0.4, True))
    )
    for part in ("weights", "kv_cache"):
        assert (first.table[part] + last.table[part]).tolist() == pytest.approx(
            whole.table[part].tolist()
        )
    assert first.table["weights"][0] == pytest.approx(0.6 * 4 * 2**10)  # all but the output's
    assert first.table["context"].equals(whole.table["context"])  # every GPU needs its own
    there = dict(memory_bytes=first.need_bytes, gpu=True)
    assert '2 GPUs together (tensor_split="0.5,0.5")' in str(fit(file, 65536, **there))
    found = fit(file, 65536, **there, share=0.6, output=False)
    assert found.fits and "on the GPU with 60% of the layers" in str(found)
    assert "together" not in str(fit(file, 65536, **there, share=0.75))
    machine(1)
    assert "together" not in str(fit(file, 65536, **there))


@pytest.fixture
def cards(machine, monkeypatch):
    """cards(9, 3) makes this a machine whose GPUs have 9 and 3 GiB free."""

    def make(*free):
        uuids = machine(len(free))
        found = [
            devices.Gpu(index, uuid, "T4", T4, int(gib * 2**30))
            for index, (uuid, gib) in enumerate(zip(uuids, free))
        ]
        monkeypatch.setattr(devices, "list_gpus", lambda: found)

    return make


@pytest.mark.parametrize(
    "split, share, output, there, fits",
    [
        ("0.5,0.5", 0.4, True, 3, False),
        ("4,1", 0.9, False, 9, True),
        ("1,0", 1, True, 9, True),
    ],
)
def test_a_model_must_fit_where_the_least_is_left(cards, split, share, output, there, fits):
    from llamatelemetry import InferenceEngine

    cards(9, 3)
    engine = InferenceEngine()
    engine.model, engine._server_args = File(weights=8 * 2**30), {"ctx_size": 1024, "n_parallel": 1}
    engine.plan = devices.plan(split)
    found = engine.fit(server=False)
    assert found.memory_bytes == there * 2**30 and found.fits == fits
    assert found.table["weights"][0] == pytest.approx(
        weight_bytes(engine.model, share=share, output=output) / 2**20
    )
    engine.model = None


@pytest.mark.parametrize(
    "weights, free, split, indices",
    [
        (4, (3, 14), "0,1", [1]),  # the analytics GPU
        (4, (14, 3), "1,0", [0]),
        (4, (14,), "1", [0]),
        (8, (3, 8), "0.1364,0.8636", [0, 1]),  # 1.5 and 9.5 of 10 layers and the output
        (8, (3, 3, 8), None, [0, 1, 2]),
        (8, (3, 3), None, []),
        (8, (3,), None, []),
    ],
)
def test_where_a_second_model_goes(cards, weights, free, split, indices):
    cards(*free)
    file = File(weights=weights * 2**30)
    found = place(file, 1024)
    assert [gpu.index for gpu in found.gpus] == indices and found.fits == bool(indices)
    assert str(found).startswith("tiny, ") and "capture worker at 1,024 tokens" in str(found)
    if not found.fits:
        assert found.tensor_split is None and "fits nowhere: GPU 0 has 3,072 MiB" in str(found)
        assert "What would fit: the Q" in str(found) or "choose a smaller one" in str(found)
        return
    assert split is None or found.tensor_split == split
    # load_model's plan shows inference these GPUs, and what each gets by it fits there.
    plan = devices.plan(found.tensor_split)
    assert plan.inference == found.gpus
    parts = spread(file.n_layer, plan.shares)
    for gpu, (share, output) in zip(plan.inference, parts):
        asked = dict(share=share, output=output, server=False, gpu=True)
        assert fit(file, 1024, memory_bytes=gpu.free_bytes, **asked).fits
        assert f"GPU {gpu.index} (" in str(found)


def test_what_would_make_room_for_a_second_model(cards):
    cards(3, 3)
    file = File(weights=8 * 2**30)
    assert "is closed" in str(place(file, 1024, ours={0: 8 * 2**30}))
    assert "is closed" not in str(place(file, 1024, ours={0: 2**30}))
    cards(9.5, 3)
    both = place(file, 1024, server=True)
    assert not both.fits and "captures without the server" in str(both)
    assert place(file, 1024).tensor_split == "1,0"


def test_a_second_model_without_gpus(cards):
    cards()
    found = place(File(), 1024)
    assert found.fits and found.tensor_split is None and found.gpus == ()
    assert "MiB there" in str(found)
    assert not place(File(weights=2**50), 1024).fits


@pytest.mark.slow  # expands the whole model
def test_a_file_that_is_yet_to_be_made(smollm2, cards, tmp_path):
    from llamatelemetry import GGUFFile
    from llamatelemetry.convert.expand import expand
    from llamatelemetry.errors import OptionError

    file = GGUFFile(smollm2)
    made = GGUFFile(expand(smollm2, tmp_path / "F16.gguf", type="F16", progress=False))
    reckoned = as_type(file, "F16")
    assert reckoned.tensors["size_bytes"].equals(made.tensors["size_bytes"])
    assert reckoned.bits_per_weight == pytest.approx(made.bits_per_weight)
    assert reckoned.size_bytes == pytest.approx(made.size_bytes, rel=1e-3)
    assert reckoned.called.endswith("as F16") and file.called != reckoned.called
    assert file.bits_per_weight < 6  # stays as it is
    assert as_type(file, "IQ3_XXS").size_bytes < as_type(file, "Q4_K_S").size_bytes
    with pytest.raises(OptionError, match="no type"):
        as_type(file, "float")
    cards(14, 14)
    assert place(file, 1024, kind="F16").need_bytes == place(made, 1024).need_bytes


def test_what_the_engine_holds_is_given_back_by_closing_it(cards, machine, monkeypatch):
    from llamatelemetry import InferenceEngine

    cards(3, 3)
    engine = InferenceEngine()
    engine.model, engine._server_args = File(), {"ctx_size": 1024, "n_parallel": 1}
    server, worker = 4 * 2**30, 3 * 2**30
    table = placement.placement({"notebook": 1, "llama-server": 2, "capture worker": 3})
    table["gpu"], table["memory_mib"] = [1, 0, 0], [100.0, server / 2**20, worker / 2**20]
    monkeypatch.setattr(engine, "placement", lambda: table)
    assert engine._held() == {0: server + worker}
    assert "is closed" in str(engine.place(File(weights=8 * 2**30)))
    assert "at 512 tokens" in str(engine.place(File(), 512))
    engine.model = None


@pytest.mark.slow
@pytest.mark.parametrize("ctx_size", [512, 4096])
def test_fit_is_what_llama_server_takes(smollm2, llama_server, ctx_size):
    """Weights and KV cache exactly, compute buffers from above and within 25 MiB, by its own
    log."""
    from llamatelemetry import GGUFFile, ServerManager

    model = GGUFFile(smollm2)
    with ServerManager(llama_server) as manager:
        manager.start_server(smollm2, ctx_size=ctx_size, silent=True, warmup=False)
        log = manager.log_tail(10**6)

    def mib(pattern):
        return float(re.search(pattern + r"\s*=\s*([\d.]+) MiB", log)[1])

    assert weight_bytes(model, gpu=False) / 2**20 == pytest.approx(
        mib("CPU_Mapped model buffer size"), abs=0.02
    )
    assert kv_bytes(model, ctx_size) / 2**20 == pytest.approx(mib("CPU KV buffer size"), abs=0.02)
    measured = mib("CPU compute buffer size")
    assert measured <= compute_bytes(model, ctx_size) / 2**20 <= measured + 25


@pytest.mark.parametrize(
    "count, options, mode",
    [
        (1, {}, "none"),
        (1, {"gpu_layers": -1}, "none"),
        (1, {"gpu_layers": 0}, None),
        (1, {"gpu_layers": 5}, None),  # the rest is computed from the map
        (0, {}, None),  # the worker's pages are the server's
    ],
)
def test_what_goes_to_a_gpu_is_not_mapped(machine, monkeypatch, tmp_path, count, options, mode):
    """llama-server's own flag, load_mode=, comes after its environment and so before it."""
    from llamatelemetry import ServerError, ServerManager
    from llamatelemetry.server import process

    machine(count)
    seen = {}

    def popen(command, log, env):
        seen.update(env, command=command)
        raise OSError(2, "not here")

    monkeypatch.setattr(process.guard, "popen", popen)
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(ServerError, match="cannot be executed"):
        ServerManager(sys.executable).start_server(path, silent=True, **options)
    assert seen.get("LLAMA_ARG_LOAD_MODE") == mode and "--load-mode" not in seen["command"]
