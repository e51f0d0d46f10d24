"""The engine of a Kaggle session: the best that is attached or installed, else one built there."""

import json
import re
import time
import zipfile

from ..errors import LlamaTelemetryError
from ..files.places import working_dir
from ..files.programs import find_server
from ..gpus import devices
from ..running import run_tool
from ..tools import build, needs, recipes
from .install import attached_wheels, install_missing

_NO_ENGINE = (
    "Attach the output of the engine kernel (Add Input, Your Work, Notebooks), or the wheel that "
    "`llamatelemetry engine build --portable --out DIR` makes."
)


def _manifest(wheel):
    """What an engine wheel was built from, as far as it says, and what its files need (its own
    word, or read)."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            manifest = (
                json.loads(archive.read(recipes.MANIFEST)) if recipes.MANIFEST in names else {}
            )
            compiled = [
                name for name in names if name.endswith(".so") or ".so." in name or "bin/" in name
            ]
            if "needs" not in manifest and (
                asks := needs.of({name: archive.read(name) for name in compiled})
            ):
                manifest["needs"] = asks
            return manifest
    except (OSError, ValueError, zipfile.BadZipFile):
        return {}


def _capability():
    """The lowest compute capability of the GPUs here, such as 75 (T4), or None without any."""
    nvml, lowest = devices._nvml(), None
    for gpu in devices.visible_gpus():
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(
            nvml.nvmlDeviceGetHandleByIndex(gpu.index)
        )
        lowest = min(lowest or 10 * major + minor, 10 * major + minor)
    return lowest


def _unfit(manifest, capability):
    """Why an engine with this manifest cannot run here, or None. capability: the lowest of the GPUs
    here, or None."""
    archs, asks = _archs(manifest), manifest.get("needs")
    if strange := set(manifest.get("cpu_features", [])) - set(recipes.cpu_features()):
        return f"is built for another CPU (with {', '.join(sorted(strange)[:3])}); build it with --portable"
    # An engine that does not link to the driver runs without GPUs, too, on the CPU, if CUDA's own
    # libraries are here.
    if (
        archs
        and capability is None
        and (asks is None or "libcuda.so.1" in asks.get("libraries", []))
    ):
        return (
            "is built for GPUs, and this session has none: choose GPU T4 x2 (Settings, Accelerator)"
        )
    if archs and capability is not None and min(archs) > capability:
        return (
            f"is built for compute capability {min(archs) / 10} and newer, this GPU has {capability / 10}: choose "
            "GPU T4 x2 (Settings, Accelerator)"
        )
    if why := _driver_too_old(manifest, archs, capability):
        return why
    if asks is None:  # nothing is known but where it was built
        kind, _, version = manifest.get("libc", "").partition("-")
        asks = {"versions": {"GLIBC": version}} if kind == "glibc" and version else {}
    why = needs.lacking(asks)
    return why and f"{why}: build it in a session like this one (the engine kernel does)"


def _driver_too_old(manifest, archs, capability):
    """CUDA's own rule: a driver runs what an older CUDA or another release of its own major version
    built, but compiles PTX (for GPUs that the engine holds no code for) only of releases as old as
    itself."""
    driver = _driver_cuda()
    built = tuple(int(part) for part in re.findall(r"\d+", manifest.get("cuda") or "")[:2])
    if not archs or capability is None or not built or driver is None or built <= driver:
        return None
    has_code = any(arch // 10 == capability // 10 and arch <= capability for arch in archs)
    if built[0] == driver[0] and has_code:
        return None
    return (
        f"is built with CUDA {manifest['cuda']}, and this session's driver knows CUDA {driver[0]}.{driver[1]}: build "
        "it with that or an older one (the engine kernel does)"
    )


def _driver_cuda():
    """The newest CUDA that the driver knows, such as (12, 8), or None where there is no driver or
    it does not say."""
    try:
        version = devices._nvml().nvmlSystemGetCudaDriverVersion()
    except Exception:
        return None
    return version // 1000, version % 1000 // 10


def _archs(manifest):
    """Compute capabilities that an engine is built for: [75] for a T4, [] for the CPU alone."""
    return [
        int(arch)
        for arch in re.findall(
            r"\d+", manifest.get("flags", {}).get("CMAKE_CUDA_ARCHITECTURES", "")
        )
    ]


def install_engine(make: bool = True) -> str:
    """Make an engine ready: the best of those attached and installed, else (make) one built here,
    which takes long.

    An engine with CUDA is better than one without where there is a GPU. Returns a sentence on which
    it is. Raises LlamaTelemetryError where there is none that runs here."""
    capability, refused, choices = _capability(), [], []
    for wheel in attached_wheels():
        if wheel.name.startswith("llama_cpp_python-"):
            manifest = _manifest(wheel)
            why = _unfit(manifest, capability) or (
                None
                if wheel.name.startswith(f"llama_cpp_python-{recipes.VERSION}")
                else f"is not {recipes.VERSION}"
            )
            if why:
                refused.append(f"{wheel} {why}.")
            else:
                choices.append((_rank(manifest, capability), wheel))
    have = build.installed()
    if (
        have
        and have["llama_cpp_python"].partition("+")[0] == recipes.VERSION
        and not _unfit(have, capability)
    ):
        if not choices or _rank(have, capability) >= max(choices)[0]:
            return _engine_line("installed")
    if choices:
        build.install(max(choices)[1])
        return _engine_line(f"from {max(choices)[1].parent}")
    why = (
        " ".join(refused)
        or "No engine (llama.cpp with its Python bindings) is attached or installed."
    )
    if not make:
        raise LlamaTelemetryError(f"{why} {_NO_ENGINE}")
    cuda = str(capability) if capability else None
    print(f"{why} Building it, once: {build.reckoned(cuda)}.", flush=True)
    started = time.monotonic()
    install_missing(("build",))
    try:
        build.install(build.build(cuda, portable=True))
    except build.EngineBuildError as error:
        raise LlamaTelemetryError(
            f"{why} Building it here failed: {error}\n{_NO_ENGINE} With the internet switched on "
            "(Settings) it can be built in the session."
        ) from None
    minutes = (time.monotonic() - started) / 60
    try:
        kept = build.build(cuda, working_dir() / "engine", portable=True)  # from the cache
        where = f"its wheel is in {kept.parent}, to be attached next time"
    except build.EngineBuildError as error:
        where = f"but not kept: {error}"
    return _engine_line(f"built here in {minutes:.0f} minutes; {where}")


def _rank(manifest, capability):
    """CUDA where there is a GPU and only there, our own before others'."""
    cuda = bool(manifest.get("flags", {}).get("GGML_CUDA"))
    return (cuda == (capability is not None), bool(manifest.get("llama_cpp_commit")))


def _engine_line(where):
    engine = build.installed()
    archs = ", ".join(f"{arch / 10}" for arch in _archs(engine))
    try:
        run_tool([find_server(), "--version"], "ask llama-server for its version")
    except LlamaTelemetryError as error:
        raise LlamaTelemetryError(f"llama-server does not run here: {error} {_NO_ENGINE}") from None
    kind = f"CUDA for compute capability {archs}" if archs else "CPU"
    if archs and not devices.visible_gpus():
        kind += ", on the CPU (no GPU here)"
    if not archs and devices.visible_gpus():
        kind += " alone (the GPUs are idle: attach the output of the engine kernel)"
    return f"Engine: llama.cpp {engine['llama_cpp_commit'] or engine['llama_cpp_python']}, {kind}, {where}."
