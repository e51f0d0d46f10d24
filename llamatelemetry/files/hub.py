"""The Hugging Face hub: what its cache holds, downloads with progress, resume and checksum, and why
one failed."""

import contextlib
import os
import re
from pathlib import Path

from ..errors import ModelLoadError, brief
from .checksums import sha256
from .outputs import is_first, split_parts

SILENCE_S = 10  # of the hub, which its client would wait for without a limit


class Refused(Exception):
    """Nothing could be fetched: the text is why, `do` what to do next. Nobody but this room sees
    it: resolve_model makes a ModelNotFoundError of it."""

    def __init__(self, why, do):
        super().__init__(why)
        self.do = do


def model_files(paths):
    """Model files among paths: first parts only, no multimodal projectors, no importance
    matrices."""
    return [
        path
        for path in map(Path, paths)
        if path.suffix.lower() == ".gguf"
        and is_first(path)
        and not re.search("mmproj|imatrix", path.name.lower())
    ]


def size_of(path: str | os.PathLike) -> int:
    """Bytes of a model file, all its parts together."""
    total = 0
    for part in split_parts(path):
        with contextlib.suppress(OSError):  # not there, or nobody may look
            total += part.stat().st_size
    return total


def quantization(path: str | os.PathLike) -> str | None:
    """The quantization that a file name states ("Q4_K_M"), or None."""
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", Path(path).stem)
    found = re.search(r"(?<![A-Za-z0-9])([IT]?Q\d\w*|MXFP4\w*|BF16|F16|F32)$", stem, re.IGNORECASE)
    return found[1].upper() if found else None


def cached(repo, file):
    """The path of "repo:file" (or of "repo:Q4_K_M") in the cache, all its parts there; None where
    it is not."""
    from huggingface_hub import try_to_load_from_cache

    if not file.lower().endswith(".gguf"):
        here = [name.partition(":")[2] for name, _ in all_cached() if name.startswith(f"{repo}:")]
        file = _one(repo, file, here)
        if file is None:
            return None
    try:
        found = [try_to_load_from_cache(repo, str(part)) for part in split_parts(file)]
    except (ValueError, OSError) as error:  # HFValidationError is one: of names that none can have
        raise Refused(
            f"{brief(repo)} is no repository's name, or {brief(file)} no file's in one ({error})",
            "give it as OWNER/NAME:FILE",
        ) from None
    return Path(found[0]) if all(isinstance(path, str) for path in found) else None


def all_cached():
    """("repo:file", path) of every model in the cache."""
    from huggingface_hub import constants

    files, cache = [], Path(constants.HF_HUB_CACHE)
    for path in model_files(sorted(cache.glob("models--*/snapshots/*/**/*.gguf"))):
        # models--OWNER--NAME, snapshots, revision, the file's path
        folder, _, _, *name = path.relative_to(cache).parts
        repo = folder.removeprefix("models--").replace("--", "/", 1)
        files.append((f"{repo}:{'/'.join(name)}", path))
    return files


def _one(repo, wanted, files):
    """The one model among a repository's files with this quantization; None where none has it."""
    found = [str(path) for path in model_files(files) if quantization(path) == wanted.upper()]
    if len(found) > 1:
        raise Refused(
            f"several files of {repo} are {wanted}: {', '.join(found)}", f"name one: {repo}:FILE"
        )
    return found[0] if found else None


def download(repo, file, progress=True):
    """Fetches "repo:file" (or "repo:Q4_K_M"), all parts of a split model; an interrupted download
    goes on where it stopped. Returns the path of the (first) file. Raises Refused, or
    ModelLoadError for a file that arrived damaged."""
    if not file.lower().endswith(".gguf"):
        from huggingface_hub import HfApi

        reach()
        about = ask(lambda: HfApi().model_info(repo, timeout=SILENCE_S))
        files = [file.rfilename for file in about.siblings or ()]
        wanted, file = file, _one(repo, file, files)
        if file is None:
            there = ", ".join(str(path) for path in model_files(files)) or "no GGUF file"
            raise Refused(f"no file of {repo} is {wanted}", f"take one of what it has: {there}")
    return fetch(repo, split_parts(file), progress)[0]


def fetch(repo, files, progress=True):
    """Paths of files of a repository, fetched where the cache has not got all of them. Raises
    Refused, or ModelLoadError for a file that arrived damaged."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    files = list(map(str, files))
    here = [try_to_load_from_cache(repo, file) for file in files]
    if all(isinstance(path, str) for path in here):
        return list(map(Path, here))
    reach()
    _check_room(repo, files)
    quiet = not progress and not are_progress_bars_disabled()
    if quiet:
        disable_progress_bars()
    try:
        paths = [Path(ask(lambda file=file: hf_hub_download(repo, file))) for file in files]
    finally:
        if quiet:
            enable_progress_bars()
    for path in paths:
        _verify(path, progress)
    return paths


def _check_room(repo, parts):
    """Refused where the disk has no room for the parts that are still to be fetched."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    from .places import free_bytes

    parts = map(str, parts)
    absent = [part for part in parts if not isinstance(try_to_load_from_cache(repo, part), str)]
    urls = [hf_hub_url(repo, part) for part in absent]
    need = sum(ask(lambda url=url: get_hf_file_metadata(url)).size or 0 for url in urls)
    if need > (free := free_bytes(constants.HF_HUB_CACHE)):
        raise Refused(
            f"it needs {need / 1e9:,.1f} GB and {constants.HF_HUB_CACHE} has {free / 1e9:,.1f} GB free",
            "take a smaller quantization, attach the file under /kaggle/input, or set HF_HOME to a folder "
            "with more room",
        )


def _verify(path, progress):
    """The cache keeps large files under their SHA-256: checked once, after the download."""
    blob = path.resolve()
    if not re.fullmatch("[0-9a-f]{64}", blob.name):
        return
    if sha256([blob], f"checking {path.name}", progress) != blob.name:
        path.unlink()
        blob.unlink(missing_ok=True)
        raise ModelLoadError(
            f"{path.name} arrived damaged (its SHA-256 differs) and was removed. Fetch it again."
        )


def reach():
    """Refused, at once, where the hub cannot be reached or must not."""
    import requests
    from huggingface_hub import constants

    local = "put the file under /kaggle/input, or give its path"
    # huggingface_hub reads the variable once, at its import; a user sets it when they think of it
    said = os.environ.get("HF_HUB_OFFLINE", "").upper()
    if constants.HF_HUB_OFFLINE or said in ("1", "ON", "YES", "TRUE"):
        raise Refused("HF_HUB_OFFLINE is set", f"unset it, {local}")
    try:  # without this, huggingface_hub retries for 24 s where there is no network
        requests.head(constants.ENDPOINT, timeout=5)
    except requests.RequestException:
        raise Refused(
            "the Hugging Face hub cannot be reached",
            f"switch the network on (Kaggle: Settings, Internet), {local}",
        ) from None


_AGAIN = "run it again, the download goes on where it stopped"
# Errors of huggingface_hub, each before those that it is one of: why, and what to do.
_ANSWERS = {
    "GatedRepoError": (
        "its licence must be accepted first",
        "accept it on its page on the hub and set HF_TOKEN",
    ),
    "RepositoryNotFoundError": (
        "the hub has no such repository, or it is private",
        "check its name, or set HF_TOKEN",
    ),
    "LocalEntryNotFoundError": ("the connection broke ({cause})", _AGAIN),
    "EntryNotFoundError": (
        "the repository has no such file",
        "check the file's name on its page on the hub",
    ),
}


def ask(request):
    """What a request of huggingface_hub returns; Refused with the reason for whatever it raises."""
    from huggingface_hub import errors

    try:
        return request()
    except Exception as error:  # the network's and the disk's too, from any HTTP library
        for name, (why, do) in _ANSWERS.items():
            if isinstance(error, getattr(errors, name)):
                raise Refused(why.format(cause=error.__cause__ or error), do) from None
        raise Refused(f"{type(error).__name__}: {error}", _AGAIN) from None
