"""Several workers on this machine for compare_quantizations, each shown a GPU of its own."""

import logging

from ..gpus import devices
from ..imports import uninterrupted


def local_cluster(workers=None):
    """A dask.distributed cluster of worker processes on this machine, a context manager;
    Client(cluster) talks to it.

    workers: None for one per GPU that CUDA_VISIBLE_DEVICES leaves (assign_analytics does not
    count), one without GPUs; more workers than GPUs take them in turn. distributed.LocalCluster
    would give every worker the environment of this process, which has only the analytics GPU left.
    Needs llamatelemetry[distributed]."""
    with uninterrupted():
        from distributed import Nanny, Scheduler, SpecCluster

    shown = [{"CUDA_VISIBLE_DEVICES": gpu.uuid} for gpu in devices.visible_gpus()] or [{}]
    quiet, local = {"silence_logs": logging.WARNING}, {"host": "127.0.0.1", "dashboard": False}
    specs = {
        number: {
            "cls": Nanny,
            "options": local | quiet | {"nthreads": 1, "env": shown[number % len(shown)]},
        }
        for number in range(workers or len(shown))
    }
    scheduler = {
        "cls": Scheduler,
        "options": local | {"port": 0, "dashboard_address": "127.0.0.1:0"},
    }
    return SpecCluster(workers=specs, scheduler=scheduler, **quiet)
