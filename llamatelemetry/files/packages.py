"""Models that come as Python packages: found without an import, put together from their parts."""

import importlib.util
from pathlib import Path

from ..errors import ModelLoadError
from .checksums import sha256
from .outputs import written
from .places import cache_dir
from .registry import PACKAGES, Model


def _folder_of(module):
    """The folder of an installed package, found without importing it; None where it is not
    installed."""
    spec = importlib.util.find_spec(module)
    found = spec and spec.submodule_search_locations
    return Path(next(iter(found))) if found else None


def package_parts(model: Model) -> tuple[list[Path], str | None]:
    """([files whose bytes make the model], sha256 or None) of its installed package, or ([],
    None)."""
    module, wanted = PACKAGES.get(model.name, (None, None))
    folder = _folder_of(module) if module else None
    if folder is None:
        return [], None
    whole = sorted(folder.rglob("*.gguf"))
    if whole:
        return whole[:1], None
    checksum, file = (folder / "data" / "SHA256SUMS").read_text().split()[:2]
    parts: list[Path] = []
    while (part := _folder_of(f"{module}_part{len(parts) + 1}")) is not None:
        parts.append(part / "data" / f"{file}.part{len(parts):02d}")
    if not parts or not all(part.is_file() for part in parts):
        raise ModelLoadError(
            f"The package {module} is here without its parts. Install it whole: pip install {wanted}"
        )
    return parts, checksum


def assembled(model: Model) -> Path:
    """Where a model lies that comes in parts, once they were put together."""
    return cache_dir() / "models" / model.file


def from_package(model: Model, progress: bool = True) -> Path | None:
    """The path of a model that is installed as a package, put together where it comes in parts."""
    parts, checksum = package_parts(model)
    if checksum is None:
        return parts[0] if parts else None
    target = assembled(model)
    # It only ever appears whole and checked, so its size is check enough.
    if not target.is_file() or target.stat().st_size != _size(parts):
        _assemble(parts, checksum, target, progress)
    return target


def _assemble(parts, checksum, target, progress):
    whole = written(target, need=_size(parts), model=True, error=_unwritable)
    with whole as temporary, open(temporary, "wb") as out:
        if sha256(parts, f"assembling {target.name}", progress, copy=out) != checksum:
            raise ModelLoadError(
                f"The parts of {target.name} do not have the checksum that their package states. "
                "Install the package again (pip install --force-reinstall)."
            )


def _unwritable(why):
    return ModelLoadError(f"{why} LLAMATELEMETRY_CACHE names another folder.")


def _size(parts):
    return sum(part.stat().st_size for part in parts)
