"""What is sampled in a thread while something else runs: memory of processes, and what they hold on
each GPU."""

import threading
import time

import psutil
import pynvml

EVERY_S = 0.25
# What a command line holds -> what the process is. The first that fits counts.
KINDS = (
    ("llama-server", "llama-server"),
    ("llamatelemetry.capture.worker", "capture worker"),
    ("llamatelemetry.compare.worker", "compare worker"),
    ("ipykernel", "notebook"),
    ("llama-bench", "llama-bench"),
)


class Sampler:
    """Calls `sample` four times a second between entering and leaving it."""

    def __enter__(self):
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def _run(self):
        while not self._stop.wait(EVERY_S):
            try:
                self.sample()
            except Exception:  # a process ended between being listed and being asked
                pass

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()


class Watch(Sampler):
    """What each process holds on each GPU, and how busy each GPU is, by NVML.

    samples: list of {seconds, gpu, use (percent), used (MiB), and MiB per kind of process}, a row
    per GPU and time."""

    def __enter__(self):
        pynvml.nvmlInit()
        self._gpus = [
            pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())
        ]
        self._kinds, self.samples, self._started = {}, [], time.monotonic()
        return super().__enter__()

    def sample(self):
        seconds = round(time.monotonic() - self._started, 2)
        for index, handle in enumerate(self._gpus):
            row = {
                "seconds": seconds,
                "gpu": index,
                "use": pynvml.nvmlDeviceGetUtilizationRates(handle).gpu,
                "used": pynvml.nvmlDeviceGetMemoryInfo(handle).used >> 20,
            }
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
                kind = self._kind(process.pid)
                row[kind] = row.get(kind, 0) + ((process.usedGpuMemory or 0) >> 20)
            self.samples.append(row)

    def _kind(self, pid):
        if pid not in self._kinds:
            try:
                line = " ".join(psutil.Process(pid).cmdline())
            except psutil.Error:
                return "ended"
            self._kinds[pid] = next((kind for part, kind in KINDS if part in line), "other")
        return self._kinds[pid]

    def peaks(self):
        """{kind: {gpu: largest MiB}} of the processes that were seen."""
        found = {}
        for row in self.samples:
            for kind in row.keys() - {"seconds", "gpu", "use", "used"}:
                on = found.setdefault(kind, {})
                on[row["gpu"]] = max(on.get(row["gpu"], 0), row[kind])
        return found
