"""One object for arrays, tables and machine learning: RAPIDS on the analytics GPU, or the CPU
libraries.

    b = get_backend("auto"); print(b.line)

Arrays go in and come out as NumPy whatever the backend; `b.xp` and `b.table` are there for code
that stays on the device. Both backends refuse the same bad input with the same words."""

from functools import cache

from ..errors import GpuError
from .base import CpuBackend

__all__ = ["get_backend"]


@cache
def get_backend(name: str = "auto") -> CpuBackend:
    """The backend "cpu", "gpu", or the better of the two ("auto"); the same object on every call.

    "gpu" without RAPIDS or without a GPU raises GpuError; "auto" then takes the CPU, and `line`
    says why."""
    if name not in ("auto", "cpu", "gpu"):
        raise ValueError(f"backend must be 'auto', 'cpu' or 'gpu', not {name!r}")
    if name == "cpu":
        return CpuBackend("asked for")
    from .gpu import GpuBackend

    try:
        return GpuBackend("asked for" if name == "gpu" else "RAPIDS and a GPU are here")
    except GpuError as error:
        if name == "gpu":
            raise
        return CpuBackend(str(error).split(". ")[0].rstrip("."))
