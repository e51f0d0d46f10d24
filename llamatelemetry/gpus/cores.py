"""How many cores there are for one more process."""

import os
from pathlib import Path


def physical_cores():
    """Cores that this process may use, hyper-threads counted once: llama.cpp's own default is 4
    everywhere."""
    import psutil

    allowed = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    cores = min(psutil.cpu_count(logical=False) or allowed, allowed)
    try:  # a container's share of the machine (cgroup v2)
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass  # no limit
    return max(1, cores)
