"""From a name to a GGUF file on this machine: a path, a package, /kaggle/input, the Hugging Face
cache, a download."""

import contextlib
import difflib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ModelLoadError, ModelNotFoundError, shown
from ..imports import uninterrupted
from . import hub
from .outputs import path_of, split_parts
from .packages import assembled, from_package, package_parts
from .places import input_dir
from .registry import PACKAGES, REGISTRY

if TYPE_CHECKING:
    import pandas as pd

DEFAULT_MODEL = "smollm2-135m-Q4_1"


def resolve_model(name: str | os.PathLike | None = None, progress: bool = True) -> Path:
    """The path of a model's GGUF file (of a split model: of its first part).

    name: a path (a file, or a folder with one GGUF; a pathlib.Path is nothing else), a name that
    `list_models` shows
        (upper or lower case), or "repo:file" of the Hugging Face hub ("repo:Q4_K_M" where one file
        of the repository has that quantization); None is DEFAULT_MODEL.
    Looked for, in this order: a file, an installed model package, /kaggle/input (any depth), the
    Hugging Face cache, a download. The file is not read; GGUFFile does that. progress: show bars
    for slow steps.

    Raises ModelNotFoundError where there is none (with the nearest names, or with what is here
    where nothing could be fetched), ModelLoadError for a folder without exactly one model or a file
    that arrived damaged."""
    name = DEFAULT_MODEL if name is None else name
    text = name if isinstance(name, str) else str(path_of(name, ModelNotFoundError))
    if not text.strip():
        raise ModelNotFoundError(
            f"The model's name is empty. Give a file or a name of list_models(), as {DEFAULT_MODEL!r}."
        )
    path = path_of(text, ModelNotFoundError)
    model = _by_name(text)
    if _is_here(path, model):
        return _from_path(path)
    if isinstance(name, os.PathLike):
        raise ModelNotFoundError(
            f"There is no file {path} (working folder: {Path.cwd()}). A Path is a file's; names of "
            'list_models() and "repo:file" are given as str.'
        )
    if model is None:
        return _unregistered(text, progress)
    return (
        from_package(model, progress)
        or _from_kaggle(model, _kaggle_files())
        or _from_hub(model.repo, model.file, progress, model.name)
    )


def from_here(name: str) -> str:
    """A model's name that means the same in another folder: of a path the absolute one, any other
    as it is."""
    path = path_of(name, ModelNotFoundError)
    is_path = _is_here(path, _by_name(name)) or ("/" in name and _repository(name) is None)
    return str(path) if is_path else name


def list_models() -> "pd.DataFrame":
    """DataFrame of the registered models and of the other GGUF files here: name (for
    resolve_model), parameters, repo, file, quantization, here (bool), path and size_bytes (NA where
    not on disk)."""
    with uninterrupted():
        import pandas as pd

    rows, seen = [], set()
    on_kaggle = _kaggle_files()
    for model in REGISTRY.values():
        path, size = _here(model, on_kaggle)
        seen.add(path)
        rows.append((*model, size is not None, shown(path) if path else None, size))
    for name, path in _other_files(on_kaggle):
        if path not in seen:
            repo = name.partition(":")[0] if ":" in name else None
            about = (name, None, repo, shown(path.name), hub.quantization(path))
            rows.append((*about, True, shown(path), hub.size_of(path)))
    columns = ["name", "parameters", "repo", "file", "quantization", "here", "path", "size_bytes"]
    return pd.DataFrame(rows, columns=columns).astype({"size_bytes": "Int64"})


# A file or a folder


def _is_here(path, model):
    return path.is_file() or (path.is_dir() and model is None)


def _from_path(path):
    if path.is_dir():
        found = hub.model_files(path.iterdir())
        if len(found) != 1:
            names = ", ".join(sorted(file.name for file in found))
            what = f"{len(found)} models: {names}" if found else "no GGUF file"
            raise ModelLoadError(f"The folder {path} has {what}. Give the path of one .gguf file.")
        path = found[0]
    first = split_parts(path)[0]
    if not first.exists():
        raise ModelNotFoundError(
            f"{path.name} is part of a split model and its first part, {first.name}, is not "
            "beside it. Fetch all parts into one folder."
        )
    # Links stay: the parts of a split model lie beside each other under their names.
    return first.absolute()


# Names


def _by_name(text):
    wanted = text.casefold().removesuffix(".gguf")
    return next((model for model in REGISTRY.values() if model.name.casefold() == wanted), None)


def _repository(text):
    """(repo, file) of "repo:file", None for anything else."""
    repo, _, file = text.partition(":")
    named = file and repo.count("/") == 1 and not repo.startswith((".", "/", "~"))
    return (repo, file) if named else None


def _unregistered(text, progress):
    if found := _repository(text):
        return _from_hub(*found, progress)
    wanted = shown(Path(text).name).casefold().removesuffix(".gguf")
    for path in _kaggle_files() if "/" not in text else []:
        if shown(path.stem).casefold() == wanted:
            return path
    if "/" in text or text.lower().endswith(".gguf"):
        # Kaggle's folders have moved: /kaggle/input/SLUG is /kaggle/input/datasets/OWNER/SLUG in
        # sessions of 2026.
        named = (path for path in _kaggle_files() if shown(path.name) == shown(Path(text).name))
        there = next(named, None)
        attached = f"A file of that name is attached: {shown(there)}. " if there else ""
        raise ModelNotFoundError(
            f"There is no file {text}. {attached}Check the path (working folder: {Path.cwd()}), or "
            f"give a name that llamatelemetry.list_models() shows. {_what_is_here()}"
        )
    names = {name.casefold(): name for name in REGISTRY}
    family = [name for key, name in names.items() if key.rpartition("-")[0] == wanted]
    if family:
        raise ModelNotFoundError(f"{text!r} needs a quantization: {', '.join(family)}.")
    near = [names[key] for key in difflib.get_close_matches(wanted, names, 3, cutoff=0.5)]
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    raise ModelNotFoundError(
        f"No model is called {text!r}. {hint}llamatelemetry.list_models() shows all names; a path "
        'and "repo:file" of the Hugging Face hub work too.'
    )


def _normal(stem):
    """File names of one model differ by publisher: google_gemma-3-1b-it-Q4_K_M,
    gemma-3-1b-it.Q4_K_M."""
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", stem.casefold())
    words = re.split(r"[-_. ]+", stem)
    publishers = ("google", "meta", "microsoft")
    return tuple("it" if word == "instruct" else word for word in words if word not in publishers)


# Kaggle


def _kaggle_files():
    found, seen = [], set()
    for folder, folders, files in os.walk(input_dir(), followlinks=True):
        if (real := os.path.realpath(folder)) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        found += [Path(folder) / file for file in sorted(files)]
    return hub.model_files(found)


def _from_kaggle(model, files):
    wanted = {_normal(Path(model.file).stem), _normal(model.name)}
    return next((path for path in files if _normal(path.stem) in wanted), None)


# What is here


def _here(model, on_kaggle):
    """(path or None, bytes or None) of a model on this machine, nothing made or fetched."""
    with contextlib.suppress(ModelLoadError):  # a package without its parts is not here
        parts, checksum = package_parts(model)
        path = parts[0] if parts and checksum is None else assembled(model)
        if parts:
            return (path if path.is_file() else None), sum(part.stat().st_size for part in parts)
    path = _from_kaggle(model, on_kaggle) or hub.cached(model.repo, model.file)
    return path, (hub.size_of(path) if path else None)


def _other_files(on_kaggle):
    """(name, path) of GGUF files in /kaggle/input and in the Hugging Face cache."""
    return [(shown(path.stem), path) for path in on_kaggle] + hub.all_cached()


def _what_is_here():
    on_kaggle = _kaggle_files()
    found = {model.name: _here(model, on_kaggle) for model in REGISTRY.values()}
    here = [name for name, (_, size) in found.items() if size is not None]
    known = {path for path, _ in found.values()}
    here += [name for name, path in _other_files(on_kaggle) if path not in known]
    return f"Models here: {', '.join(here)}." if here else "No model is here."


def _from_hub(repo, file, progress, name=None):
    try:
        return hub.cached(repo, file) or hub.download(repo, file, progress)
    except hub.Refused as refused:
        what = f"{name} ({repo}:{file})" if name else f"{repo}:{file}"
        do = f"To do next: {refused.do}."
        if name in PACKAGES:
            do = f"Install it: pip install {PACKAGES[name][1]}. Or {refused.do}."
        raise ModelNotFoundError(
            f"{what} is not here and could not be fetched: {refused}. {do} {_what_is_here()}"
        ) from None
