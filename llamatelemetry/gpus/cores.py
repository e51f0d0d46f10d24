"""How many cores there are for one more process."""

import os
from pathlib import Path


def usable_cores() -> int:
    """Cores that this process may use, each hyper-thread one: by affinity, and a container's share
    of the machine (cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(cores, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no limit
        return cores


def physical_cores() -> int:
    """Cores that this process may use, hyper-threads counted once: llama.cpp's own default is 4
    everywhere."""
    import psutil

    usable = usable_cores()
    return min(psutil.cpu_count(logical=False) or usable, usable)
