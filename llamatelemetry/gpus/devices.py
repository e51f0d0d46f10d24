"""Which GPUs are here, who gets which, and proof of where each process sits. All of it from NVML,
the driver's library.

Inference (llama-server and the capture worker) gets the first visible GPU, analytics (this process:
RAPIDS, Graphistry) the second. With one GPU they share it, with none everything runs on the CPU. A
process is shown only its own GPU by CUDA_VISIBLE_DEVICES: with --tensor-split 1,0 alone llama.cpp
still opens a context on the other one."""

import os
import sys
from dataclasses import dataclass

from .. import logs
from ..errors import GpuError

_before = None  # CUDA_VISIBLE_DEVICES as it was before assign_analytics() narrowed it: (was, set)


@dataclass(frozen=True)
class Gpu:
    """One GPU as the driver reports it. index: NVML's (PCI bus order); memory in bytes."""

    index: int
    uuid: str
    name: str
    memory_bytes: int
    free_bytes: int

    @property
    def used_bytes(self):
        return self.memory_bytes - self.free_bytes

    def __str__(self):
        return f"GPU {self.index} ({self.name}, {self.memory_bytes / 2**20:,.0f} MiB)"


def _nvml():
    """The initialised pynvml module, or None where there is no driver. Tests put a recorded one
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


def list_gpus():
    """Every GPU that the driver knows, in PCI order: list of Gpu; [] without a driver."""
    nvml = _nvml()
    found = []
    for index in range(nvml.nvmlDeviceGetCount() if nvml else 0):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        found.append(
            Gpu(
                index,
                _text(nvml.nvmlDeviceGetUUID(handle)),
                _text(nvml.nvmlDeviceGetName(handle)),
                memory.total,
                memory.free,
            )
        )
    return found


def visible_gpus():
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
        match = [
            gpu
            for gpu in gpus
            if entry == str(gpu.index) or (len(entry) > 4 and gpu.uuid.startswith(entry))
        ]
        if len(match) != 1 or match[0] in chosen:
            break
        chosen += match
    return chosen


def inference_environment():
    """This process's environment with only the inference GPU visible: for children that run
    llama.cpp."""
    return logs.ENVIRONMENT | os.environ | plan().inference_env()


@dataclass(frozen=True)
class Plan:
    """Who gets which GPU. inference: tuple of Gpu; analytics: Gpu or None; split: for
    --tensor-split, or None; line: one sentence that says which of the cases holds."""

    inference: tuple
    analytics: Gpu | None
    split: str | None
    line: str

    @property
    def shares(self):
        """How much of the layers each inference GPU holds: tuple, sum 1; () without GPUs."""
        given = parse_split(self.split) if self.split else [1.0] * len(self.inference)
        return tuple(share / sum(given) for share in given)

    def inference_env(self):
        """Environment of llama-server and of the capture worker."""
        return (
            {"CUDA_VISIBLE_DEVICES": ",".join(gpu.uuid for gpu in self.inference)}
            if self.inference
            else {}
        )


def parse_split(tensor_split):
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


def plan(tensor_split=None):
    """Assign the visible GPUs. tensor_split: a share of the weights per visible GPU; a GPU with 0
    is hidden.

    None gives inference the first one. GpuError where tensor_split asks for a GPU that is not here;
    on a machine without any it has no effect, and the plan's line says that the CPU is used."""
    shares = [1.0] if tensor_split is None else parse_split(tensor_split)
    gpus = visible_gpus()
    if not gpus:
        why = (
            "CUDA_VISIBLE_DEVICES hides every GPU"
            if list_gpus()
            else "no NVIDIA GPU that the driver reports"
        )
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
    """UUIDs of the GPUs that CUDA shows to this process if something has already initialised it
    here, else None.

    Asks without initialising: until cuInit was called, the driver answers
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


def assign_analytics(chosen=None):
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
    others = (
        [] if seen is None or seen[:1] == [gpu.uuid] else [g for g in list_gpus() if g.uuid in seen]
    )
    others = others or [
        g for g in list_gpus() if g.uuid != gpu.uuid and os.getpid() in _processes(g)[0]
    ]
    if others:
        users = (
            "cudf",
            "cuml",
            "cugraph",
            "cupy",
            "rmm",
            "torch",
            "numba.cuda",
            "tensorflow",
            "jax",
        )
        guilty = [name for name in users if name in sys.modules]
        raise GpuError(
            f"CUDA was started in this process before the GPUs were assigned"
            f"{' (imported: ' + ', '.join(guilty) + ')' if guilty else ''}: it sits on "
            f"{' and '.join(map(str, others))}, analytics belongs on {gpu}. Restart the kernel and make "
            "llamatelemetry.gpus.devices.assign_analytics() (or get_backend) the first cell, before those imports."
        )
    was = os.environ.get("CUDA_VISIBLE_DEVICES")
    if was != gpu.uuid:
        _before = (was, gpu.uuid)
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu.uuid
    return gpu


def _processes(gpu):
    """({pid: bytes or None}, note) of the processes with a context on `gpu`, as the driver reports
    them."""
    nvml = _nvml()
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(gpu.index)
        running = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except nvml.NVMLError as error:
        return {}, f"the driver does not list processes: {error}"
    return {process.pid: process.usedGpuMemory for process in running}, ""


def placement(processes):
    """Where processes sit, as the driver reports it.

    processes: {name: pid}. DataFrame, one row per process and GPU: process, pid, gpu (index),
    gpu_name, memory_mib (both NA where the process is on no GPU, or the driver does not say), note
    (what the driver left out, and why)."""
    import pandas as pd

    gpus = list_gpus()
    reported = [(gpu, *_processes(gpu)) for gpu in gpus]
    notes = [note for *_, note in reported if note]
    # In a container the driver may count processes of another namespace: its numbers then exist
    # nowhere here.
    strangers = [
        pid for _, found, _ in reported for pid in found if not os.path.exists(f"/proc/{pid}")
    ]
    rows = []
    for name, pid in processes.items():
        here = [(gpu, found[pid]) for gpu, found, _ in reported if pid in found]
        for gpu, memory in here:
            note = "" if memory is not None else "the driver does not report memory per process"
            rows.append(
                (name, pid, gpu.index, gpu.name, None if memory is None else memory / 2**20, note)
            )
        if not here:
            if not gpus:
                note = "no GPU: on the CPU"
            elif notes:
                note = notes[0]
            elif strangers:
                note = (
                    f"not proven: the driver reports processes {', '.join(map(str, strangers[:4]))} that this "
                    "container cannot see, so this one may be among them"
                )
            else:
                note = "no context on a GPU"
            rows.append((name, pid, None, None, None, note))
    table = pd.DataFrame(rows, columns=["process", "pid", "gpu", "gpu_name", "memory_mib", "note"])
    return table.astype({"pid": "Int64", "gpu": "Int64", "memory_mib": "Float64"})


def proof(processes):
    """Where things are now, as the driver reports it, in one sentence: memory in use per GPU, and
    each process's GPU where the driver lists it (in a container, as on Kaggle, it may not).
    processes: {name: pid}. "" without GPUs."""
    gpus = list_gpus()
    if not gpus:
        return ""
    table = placement(processes)
    used = "; ".join(f"GPU {gpu.index} {gpu.used_bytes / 2**20:,.0f} MiB in use" for gpu in gpus)
    known = table.dropna(subset=["gpu"])
    where = "".join(f"; {row.process} on GPU {row.gpu}" for row in known.itertuples())
    silent = table["process"][table["gpu"].isna() & (table["note"] != "no context on a GPU")]
    where += f"; where {', '.join(silent)} sits it does not say" if len(silent) else ""
    return f"The driver reports: {used}{where}."
