"""The Hugging Face hub: what its cache holds, downloads with progress, resume and checksum, and why
one failed."""

import hashlib
import os
import re
from pathlib import Path

from ..errors import ModelLoadError
from .header import split_parts


class Refused(Exception):
    """Nothing could be fetched: the text is why, `do` what to do next."""

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
        and split_parts(path)[0] == path
        and not re.search("mmproj|imatrix", path.name.lower())
    ]


def size_of(path):
    """Bytes of a model file, all its parts together."""
    return sum(part.stat().st_size for part in split_parts(path) if part.exists())


def quantization(path):
    """The quantization that a file name states ("Q4_K_M"), or None."""
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", Path(path).stem)
    found = re.search(r"(?<![A-Za-z0-9])([IT]?Q\d\w*|MXFP4\w*|BF16|F16|F32)$", stem, re.IGNORECASE)
    return found[1].upper() if found else None


def cached(repo, file):
    """The path of "repo:file" (or of "repo:Q4_K_M") in the cache, all its parts there; None where
    it is not."""
    from huggingface_hub import errors, try_to_load_from_cache

    if not file.lower().endswith(".gguf"):
        file = _one(
            repo,
            file,
            [name.partition(":")[2] for name, _ in all_cached() if name.startswith(f"{repo}:")],
        )
        if file is None:
            return None
    try:
        found = [try_to_load_from_cache(repo, str(part)) for part in split_parts(file)]
    except errors.HFValidationError as error:
        raise Refused(
            f"{repo!r} is no repository's name ({error})", "give it as OWNER/NAME:FILE"
        ) from None
    return Path(found[0]) if all(isinstance(path, str) for path in found) else None


def all_cached():
    """("repo:file", path) of every model in the cache."""
    from huggingface_hub import constants

    files = []
    cache = Path(constants.HF_HUB_CACHE)
    for path in model_files(sorted(cache.glob("models--*/snapshots/*/**/*.gguf"))):
        # models--OWNER--NAME, snapshots, revision, the file's path
        parts = path.relative_to(cache).parts
        files.append(
            (
                f"{parts[0].removeprefix('models--').replace('--', '/', 1)}:{'/'.join(parts[3:])}",
                path,
            )
        )
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
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    _reach_hub()
    if not file.lower().endswith(".gguf"):
        files = _ask(lambda: HfApi().list_repo_files(repo))
        wanted, file = file, _one(repo, file, files)
        if file is None:
            there = ", ".join(str(path) for path in model_files(files)) or "no GGUF file"
            raise Refused(f"no file of {repo} is {wanted}", f"take one of what it has: {there}")
    _check_room(repo, split_parts(file))
    quiet = not progress and not are_progress_bars_disabled()
    if quiet:
        disable_progress_bars()
    try:
        paths = [
            Path(_ask(lambda part=part: hf_hub_download(repo, str(part))))
            for part in split_parts(file)
        ]
    finally:
        if quiet:
            enable_progress_bars()
    for path in paths:
        _verify(path, progress)
    return paths[0]


def _check_room(repo, parts):
    """Refused where the disk has no room for the parts that are still to be fetched."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    from .places import free_bytes

    absent = [
        str(part) for part in parts if not isinstance(try_to_load_from_cache(repo, str(part)), str)
    ]
    need = sum(
        _ask(lambda part=part: get_hf_file_metadata(hf_hub_url(repo, part))).size or 0
        for part in absent
    )
    if need > (free := free_bytes(constants.HF_HUB_CACHE)):
        raise Refused(
            f"it needs {need / 1e9:,.1f} GB and {constants.HF_HUB_CACHE} has {free / 1e9:,.1f} GB free",
            "take a smaller quantization, attach the file under /kaggle/input, or set HF_HOME to a folder "
            "with more room",
        )


def _verify(path, progress):
    """The cache keeps large files under their SHA-256: checked once, after the download."""
    from tqdm.auto import tqdm

    blob = path.resolve()
    if not re.fullmatch("[0-9a-f]{64}", blob.name):
        return
    digest = hashlib.sha256()
    with (
        open(blob, "rb") as file,
        tqdm(
            total=blob.stat().st_size,
            unit="B",
            unit_scale=True,
            disable=not progress,
            desc=f"checking {path.name}",
            leave=False,
        ) as bar,
    ):
        while block := file.read(1 << 22):
            digest.update(block)
            bar.update(len(block))
    if digest.hexdigest() != blob.name:
        path.unlink()
        blob.unlink(missing_ok=True)
        raise ModelLoadError(
            f"{path.name} arrived damaged (its SHA-256 differs) and was removed. Fetch it again."
        )


def _reach_hub():
    import requests
    from huggingface_hub import constants

    local = "put the file under /kaggle/input, or give its path"
    # huggingface_hub reads the variable once, at its import; a user sets it when they think of it
    if constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in (
        "1",
        "ON",
        "YES",
        "TRUE",
    ):
        raise Refused("HF_HUB_OFFLINE is set", f"unset it, {local}")
    try:  # without this, huggingface_hub retries for 24 s where there is no network
        requests.head(constants.ENDPOINT, timeout=5)
    except requests.RequestException:
        raise Refused(
            "the Hugging Face hub cannot be reached",
            f"switch the network on (Kaggle: Settings, Internet), {local}",
        ) from None


def _ask(request):
    from huggingface_hub import errors

    again = "run it again, the download goes on where it stopped"
    try:
        return request()
    except errors.GatedRepoError:
        why, do = (
            "its licence must be accepted first",
            "accept it on its page on the hub and set HF_TOKEN",
        )
    except errors.RepositoryNotFoundError:
        why, do = (
            "the hub has no such repository, or it is private",
            "check its name, or set HF_TOKEN",
        )
    except errors.LocalEntryNotFoundError as error:
        why, do = f"the connection broke ({error.__cause__ or error})", again
    except errors.EntryNotFoundError:
        why, do = "the repository has no such file", "check the file's name on its page on the hub"
    except Exception as error:  # the network's and the disk's, from whichever HTTP library the installed version uses
        why, do = f"{type(error).__name__}: {error}", again
    raise Refused(why, do)
