"""Kaggle's rules, checked before anything is sent, and the push with its official client."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

from .errors import LlamaTelemetryError

SLUG = re.compile(r"[a-z0-9](?:[a-z0-9-]{3,48})[a-z0-9]")  # 5 to 50 characters
LIMITS = {"notebook": 1_000_000, "dataset": 200_000_000_000}  # bytes
KERNEL, DATASET = "kernel-metadata.json", "dataset-metadata.json"


class StageError(LlamaTelemetryError):
    """Something cannot be staged or pushed as it is; the message names the file and the rule."""


def slug_of(title):
    """The slug that Kaggle makes of a title."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


# Kaggle's rules

def check(folder):
    """StageError if a staged folder breaks a rule of Kaggle's: names, titles, sizes, fields, a clean notebook."""
    folder = Path(folder)
    kind = next((name for name in (KERNEL, DATASET) if (folder / name).is_file()), None)
    if kind is None:
        raise StageError(f"{folder} has neither {KERNEL} nor {DATASET}: stage it first.")
    meta = json.loads((folder / kind).read_text())
    if problems := list(_problems(folder, kind, meta)):
        raise StageError(f"{folder.name}: {'; '.join(problems)}.")
    return meta


def _problems(folder, kind, meta):
    owner, _, slug = meta.get("id", "").partition("/")
    title = meta.get("title", "")
    if not owner or owner == "OWNER" or not SLUG.fullmatch(slug):
        yield f"id {meta.get('id')!r} is not ACCOUNT/SLUG with a slug of 5 to 50 of a-z, 0-9 and -"
    shortest = 5 if kind == KERNEL else 6
    if not shortest <= len(title) <= 50:
        yield f"title {title!r} has {len(title)} characters, {shortest} to 50 are allowed"
    if slug_of(title) != slug:
        yield f"Kaggle makes {slug_of(title)!r} of the title, the id says {slug!r}"
    if kind == DATASET:
        if not 20 <= len(meta.get("subtitle", "")) <= 80:
            yield f"subtitle has {len(meta.get('subtitle', ''))} characters, 20 to 80 are allowed"
        if len(meta.get("licenses", [])) != 1:
            yield "exactly one licence is expected"
        files = [file for file in folder.iterdir() if file.name != kind]
        if any(file.is_dir() for file in files):
            yield "the client leaves folders of a dataset out"
        if not files or (total := sum(file.stat().st_size for file in files)) > LIMITS["dataset"]:
            yield "no files" if not files else f"{total / 1e9:,.0f} GB, 200 are allowed"
        return
    for field in ("dataset_sources", "kernel_sources"):
        yield from (f"{field}: {source!r} is not ACCOUNT/SLUG" for source in meta[field]
                    if not re.fullmatch(r"[a-z0-9_-]+/[a-z0-9-]{5,50}", source))
    if meta["kernel_type"] not in ("notebook", "script") or meta["language"] != "python":
        yield f"kernel_type {meta['kernel_type']!r}, language {meta['language']!r}"
    code = folder / meta.get("code_file", "")
    if not code.is_file():
        yield f"code_file {meta.get('code_file')!r} is not there"
    elif code.stat().st_size > LIMITS["notebook"]:
        yield f"{code.name} has {code.stat().st_size:,} bytes, {LIMITS['notebook']:,} are allowed"
    elif code.suffix == ".ipynb":
        yield from notebook_problems(code)


def notebook_problems(path):
    """What is wrong with a notebook as it goes into git and to Kaggle: sentences, none where all is well."""
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    try:
        nbformat.validate(notebook)
    except nbformat.ValidationError as error:
        yield f"{Path(path).name} is not valid: {str(error).splitlines()[0]}"
    if (notebook.nbformat, notebook.nbformat_minor) < (4, 5):
        yield f"{Path(path).name} is nbformat {notebook.nbformat}.{notebook.nbformat_minor}, 4.5 is expected"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    tags = [set(cell.metadata.get("tags", [])) for cell in code]
    if [tag & {"parameters", "setup"} for tag in tags[:2]] != [{"parameters"}, {"setup"}]:
        yield "the first two code cells must be tagged `parameters` and `setup`"
    for cell in code:
        first = cell.source.strip().partition("\n")[0][:50]
        if cell.outputs or cell.execution_count is not None:
            yield f"the cell {first!r} has outputs or a number: clear them"
        if (lines := sum(bool(line.strip()) for line in cell.source.splitlines())) > 15:
            yield f"the cell {first!r} has {lines} lines, 15 are allowed"


# Pushing

def push(folder="staged", names=(), wait=True, poll_s=30, timeout_s=5400):
    """Send staged folders with the official `kaggle` client, in the order in which they need one another.

    Datasets first, then the engine kernel; wait: until it has built the wheel, because a notebook that is pushed before
    cannot attach it. names: only these folders. StageError if the client is missing or refuses.
    """
    folders = {path.name: path for path in sorted(Path(folder).iterdir()) if path.is_dir()} \
        if Path(folder).is_dir() else {}
    if lost := [name for name in names if name not in folders] or (not folders and [str(folder)]):
        raise StageError(f"Not staged: {', '.join(lost)}. Run `llamatelemetry kaggle stage --user NAME` first.")
    chosen = [folders[name] for name in names or folders]
    metas = {path: check(path) for path in chosen}  # everything, before anything is sent
    chosen.sort(key=lambda path: ({"wheels": 0, "models": 0, "engine": 1}.get(path.name, 2), path.name))
    for path in chosen:
        if (path / DATASET).is_file():
            _push_dataset(path, metas[path]["id"])
        else:
            said = _client("kernels", "push", "-p", path, "--accelerator", metas[path]["machine_shape"])
            print(f"{path.name}: {said}")
            if path.name == "engine" and wait:
                _wait(lambda: _client("kernels", "status", metas[path]["id"]), "complete", poll_s, timeout_s)


def _push_dataset(path, name):
    known = _client("datasets", "status", name, fail=False)
    if known is None:
        said = _client("datasets", "create", "-p", path)
    else:
        said = _client("datasets", "version", "-p", path, "-m", "llamatelemetry kaggle push")
    print(f"{path.name}: {said}")
    _wait(lambda: _client("datasets", "status", name), "ready", 10, 1800)


def _wait(ask, good, poll_s, timeout_s):
    from tqdm.auto import tqdm

    started, answer = time.monotonic(), ""
    with tqdm(total=timeout_s, unit="s", desc=f"waiting for {good}", leave=False) as bar:
        while (passed := time.monotonic() - started) < timeout_s:
            bar.update(int(passed) - bar.n)
            answer = ask().lower()
            if good in answer:
                return
            if "error" in answer or "cancel" in answer:
                raise StageError(f"Kaggle says: {answer.strip()}. Open the kernel's log on its page.")
            time.sleep(poll_s)
    raise StageError(f"Kaggle did not say {good!r} within {timeout_s / 60:.0f} minutes, but: {answer.strip()}")


def _client(*arguments, fail=True):
    """What the kaggle client printed; None where it failed and fail is False."""
    done = subprocess.run([sys.executable, "-m", "kaggle", *map(str, arguments)], capture_output=True, text=True)
    said = (done.stdout + done.stderr).strip()
    if "No module named kaggle" in said:
        raise StageError("The kaggle client is not installed: pip install kaggle six.")
    # Some versions end with 0 whatever happened.
    if done.returncode or re.search(r"^\d{3} - |push error|creation error|credentials|kaggle\.json", said, re.M | re.I):
        if not fail:
            return None
        raise StageError(f"kaggle {' '.join(map(str, arguments[:2]))}: {said[-600:]}\nThe client reads its token from "
                         "~/.kaggle (Kaggle: Settings, API).")
    return said.splitlines()[-1] if said else "done"
