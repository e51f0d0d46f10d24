"""Several workers on this machine for compare_quantizations, each shown a GPU of its own, and what
the workers of any cluster answer."""

import logging
import time
from typing import TYPE_CHECKING, Any

from ..errors import LlamaTelemetryError
from ..gpus import devices
from ..imports import uninterrupted

if TYPE_CHECKING:
    from distributed import Client, Future

ALONE = 120  # seconds without a worker, in which a cluster has started one or got one back
LOOK = 5


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


def answer(client: "Client", future: "Future", error: type[LlamaTelemetryError]) -> Any:
    """A future's result, for as long as there are workers: dask itself waits without end for those
    that may come. Raises what the task raised; `error` where for ALONE seconds there was none."""
    since = time.monotonic()
    while True:
        try:
            return future.result(timeout=LOOK)
        except TimeoutError:
            if future.done():  # its own
                raise
        if client.nthreads():
            since = time.monotonic()
        elif time.monotonic() - since > ALONE:
            future.cancel()
            raise error(
                f"The cluster has had no worker for {ALONE} s: start some (cluster.scale(2)), or leave "
                "out client=."
            )
