"""Which GPUs are here, and who gets which. All of it from NVML, the driver's library.

Inference (llama-server and the capture worker) gets the first visible GPU, analytics (this process:
RAPIDS, Graphistry) the second. With one GPU they share it, with none everything runs on the CPU. A
process is shown only its own GPU by CUDA_VISIBLE_DEVICES: with --tensor-split 1,0 alone llama.cpp
still opens a context on the other one."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from .. import logs
from ..errors import GpuError

USERS = "cudf cuml cugraph cupy rmm torch numba.cuda tensorflow jax".split()  # of CUDA, in Python
# CUDA_VISIBLE_DEVICES as it was before assign_analytics() narrowed it: (was, set)
_before = None


@dataclass(frozen=True)
class Gpu:
    """One GPU as the driver reports it. index: NVML's (PCI bus order); memory in bytes."""

    index: int
    uuid: str
    name: str
    memory_bytes: int
    free_bytes: int

    @property
    def used_bytes(self) -> int:
        return self.memory_bytes - self.free_bytes

    def __str__(self) -> str:
        return f"GPU {self.index} ({self.name}, {self.memory_bytes / 2**20:,.0f} MiB)"


def _nvml():
    """The initialized pynvml module, or None where there is no driver. Tests put a recorded one
    here."""
    try:
        import pynvml

        pynvml.nvmlInit()
    # Not installed, no driver, driver and library of different versions: no GPU to be had
    except Exception:
        return None
    return pynvml


def _text(value):
    return value.decode() if isinstance(value, bytes) else value


def list_gpus() -> list[Gpu]:
    """Every GPU that the driver knows, in PCI order: list of Gpu; [] without a driver."""
    nvml = _nvml()
    found = []
    for index in range(nvml.nvmlDeviceGetCount() if nvml else 0):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        uuid, name = nvml.nvmlDeviceGetUUID(handle), nvml.nvmlDeviceGetName(handle)
        found.append(Gpu(index, _text(uuid), _text(name), memory.total, memory.free))
    return found


def visible_gpus() -> list[Gpu]:
    """The GPUs that CUDA_VISIBLE_DEVICES (as it was before assign_analytics) leaves to us, in its
    order.

    Indices are read in PCI order; CUDA stops at the first entry that names no GPU, and so does
    this."""
    gpus = list_gpus()
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if _before is not None and shown == _before[1]:
        shown = _before[0]
    if shown is None:
        return gpus
    chosen = []
    for entry in filter(None, map(str.strip, shown.split(","))):
        match = [gpu for gpu in gpus if _is_named(gpu, entry)]
        if len(match) != 1 or match[0] in chosen:
            break
        chosen += match
    return chosen


def _is_named(gpu, entry):
    return entry == str(gpu.index) or (len(entry) > 4 and gpu.uuid.startswith(entry))


def inference_environment() -> dict[str, str]:
    """This process's environment with only the inference GPU visible: for children that run
    llama.cpp."""
    return logs.ENVIRONMENT | os.environ | plan().inference_env()


@dataclass(frozen=True)
class Plan:
    """Who gets which GPU. inference: tuple of Gpu; analytics: Gpu or None; split: for
    --tensor-split, or None; line: one sentence that says which of the cases holds."""

    inference: tuple[Gpu, ...]
    analytics: Gpu | None
    split: str | None
    line: str

    @property
    def shares(self) -> tuple[float, ...]:
        """How much of the layers each inference GPU holds: tuple, sum 1; () without GPUs."""
        given = parse_split(self.split) if self.split else [1.0] * len(self.inference)
        return tuple(share / sum(given) for share in given)

    def inference_env(self) -> dict[str, str]:
        """Environment of llama-server and of the capture worker."""
        if not self.inference:
            return {}
        return {"CUDA_VISIBLE_DEVICES": ",".join(gpu.uuid for gpu in self.inference)}


def parse_split(tensor_split: str | Sequence[float]) -> list[float]:
    """ "1.0,0.0" or [1, 0] -> [1.0, 0.0]; GpuError if it is not a list of shares with at least one
    above zero."""
    parts = tensor_split.split(",") if isinstance(tensor_split, str) else tensor_split
    try:
        shares = [float(part) for part in parts]
    except (TypeError, ValueError):
        shares = []
    if not shares or not all(0 <= share < float("inf") for share in shares) or not any(shares):
        raise GpuError(
            f'tensor_split={tensor_split!r} is not a list of shares per GPU, such as "1.0,0.0" (only GPU 0) '
            'or "0.5,0.5" (both).'
        )
    return shares


def plan(tensor_split: str | Sequence[float] | None = None) -> Plan:
    """Assign the visible GPUs. tensor_split: a share of the weights per visible GPU; a GPU with 0
    is hidden.

    None gives inference the first one. GpuError where tensor_split asks for a GPU that is not here;
    on a machine without any it has no effect, and the plan's line says that the CPU is used."""
    shares = [1.0] if tensor_split is None else parse_split(tensor_split)
    gpus = visible_gpus()
    if not gpus:
        hidden = "CUDA_VISIBLE_DEVICES hides every GPU"
        why = hidden if list_gpus() else "no NVIDIA GPU that the driver reports"
        return Plan((), None, None, f"GPUs: none ({why}). Inference and analytics run on the CPU.")
    wanted = [position for position, share in enumerate(shares) if share > 0]
    if wanted[-1] >= len(gpus):
        raise GpuError(
            f"tensor_split={tensor_split!r} gives weights to GPU {wanted[-1]}, but only {len(gpus)} "
            f"{'is' if len(gpus) == 1 else 'are'} visible: {', '.join(map(str, gpus))}. "
            f'Use tensor_split="1.0" for the first alone.'
        )
    inference = tuple(gpus[position] for position in wanted)
    rest = [gpu for gpu in gpus if gpu not in inference]
    analytics = rest[0] if rest else gpus[-1]
    split = ",".join(f"{shares[position]:g}" for position in wanted) if len(wanted) > 1 else None
    if len(gpus) == 1:
        line = f"GPUs: one, {gpus[0]}; inference and analytics share it."
    else:
        both = " (shared with inference)" if analytics in inference else ""
        line = f"GPUs: inference on {' and '.join(map(str, inference))}; analytics on {analytics}{both}."
    return Plan(inference, analytics, split, line)


def _cuda_uuids():
    """UUIDs of the GPUs that CUDA shows to this process if something has already initialized it
    here, else None.

    Asks without initializing: until cuInit was called, the driver answers
    CUDA_ERROR_NOT_INITIALIZED to everything."""
    import ctypes

    try:
        with open("/proc/self/maps") as maps:
            if "libcuda.so" not in maps.read():
                return None
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count, device, raw = ctypes.c_int(), ctypes.c_int(), (ctypes.c_ubyte * 16)()
    if cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return None
    uuids = []
    for ordinal in range(count.value):
        cuda.cuDeviceGet(ctypes.byref(device), ordinal)
        cuda.cuDeviceGetUuid(raw, device)
        text = bytes(raw).hex()
        uuids.append("GPU-" + "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:])))
    return uuids


def assign_analytics(chosen: Plan | None = None) -> Gpu | None:
    """Show this process only the analytics GPU. Call it before RAPIDS, CuPy or torch touches CUDA.
    Returns that Gpu, or None without GPUs.

    chosen: a Plan, else plan(). GpuError if CUDA is already in use here on another GPU:
    CUDA_VISIBLE_DEVICES is read once, when CUDA starts, so setting it now would do nothing and
    analytics would sit on the inference GPU."""
    global _before
    chosen = chosen or plan()
    gpu = chosen.analytics
    if gpu is None:
        return None
    seen = _cuda_uuids()
    # With several GPUs in view libraries take the first, whatever is wanted.
    wrong = seen is not None and seen[:1] != [gpu.uuid]
    others = [other for other in list_gpus() if wrong and other.uuid in seen]
    if not others:
        others = [
            other
            for other in list_gpus()
            if other.uuid != gpu.uuid and os.getpid() in processes_on(other)[0]
        ]
    if others:
        guilty = [name for name in USERS if name in sys.modules]
        imported = f" (imported: {', '.join(guilty)})" if guilty else ""
        raise GpuError(
            f"CUDA was started in this process before the GPUs were assigned{imported}: it sits on "
            f"{' and '.join(map(str, others))}, analytics belongs on {gpu}. Restart the kernel and make "
            "llamatelemetry.gpus.devices.assign_analytics() (or get_backend) the first cell, before those imports."
        )
    was = os.environ.get("CUDA_VISIBLE_DEVICES")
    if was != gpu.uuid:
        _before = (was, gpu.uuid)
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu.uuid
    return gpu


def processes_on(gpu: Gpu) -> tuple[dict[int, int | None], str]:
    """({pid: bytes or None}, note) of the processes with a context on `gpu`, as the driver reports
    them."""
    nvml = _nvml()
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(gpu.index)
        running = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except nvml.NVMLError as error:
        return {}, f"the driver does not list processes: {error}"
    return {process.pid: process.usedGpuMemory for process in running}, ""
