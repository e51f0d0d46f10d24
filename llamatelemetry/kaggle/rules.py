"""Kaggle's rules, checked before anything is sent."""

import json
import re
from collections import Counter
from pathlib import Path

from ..errors import StageError

SLUG = re.compile(r"[a-z0-9](?:[a-z0-9-]{3,48})[a-z0-9]")  # 5 to 50 characters
LIMITS = {
    "notebook": 1_000_000,  # bytes
    "dataset": 200_000_000_000,
    "files": 50,  # at the top of a dataset
    "cell": 10,  # lines
    "columns": 88,
}
_IMPORTS = re.compile(r"^(from \S+ )?import (\([^)]*\)|[^(\n]*$)", re.MULTILINE)
KERNEL, DATASET = "kernel-metadata.json", "dataset-metadata.json"


def slug_of(title):
    """The slug that Kaggle makes of a title."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def check(folder):
    """StageError if a staged folder breaks a rule of Kaggle's: names, titles, sizes, fields, a
    clean notebook."""
    folder = Path(folder)
    kind = next((name for name in (KERNEL, DATASET) if (folder / name).is_file()), None)
    if kind is None:
        raise StageError(f"{folder} has neither {KERNEL} nor {DATASET}: stage it first.")
    try:
        meta = json.loads((folder / kind).read_text())
    except ValueError as error:
        raise StageError(f"{folder.name}: {kind} is no JSON ({error}).") from None
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
    elif len(slug) < shortest:
        yield f"slug {slug!r} has {len(slug)} characters, {shortest} to 50 are allowed"
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
        if len(files) > LIMITS["files"]:
            yield f"{len(files)} files, {LIMITS['files']} are allowed at the top of a dataset"
        return
    for field in ("dataset_sources", "kernel_sources"):
        yield from (
            f"{field}: {source!r} is not ACCOUNT/SLUG"
            for source in meta.get(field, ())
            if not re.fullmatch(r"[a-z0-9_-]+/[a-z0-9-]{5,50}", source)
        )
    if meta.get("kernel_type") not in ("notebook", "script") or meta.get("language") != "python":
        yield f"kernel_type {meta.get('kernel_type')!r}, language {meta.get('language')!r}"
    code = folder / meta.get("code_file", "")
    if not code.is_file():
        yield f"code_file {meta.get('code_file')!r} is not there"
    elif (size := _sent_size(code)) > LIMITS["notebook"]:
        yield f"{code.name} has {size:,} bytes, {LIMITS['notebook']:,} are allowed"
    elif code.suffix == ".ipynb":
        yield from notebook_problems(code)


def _sent_size(code):
    """Bytes of a code file as the client sends it: a notebook written anew, with every character in
    ASCII."""
    try:
        return (
            len(json.dumps(json.loads(code.read_text())))
            if code.suffix == ".ipynb"
            else code.stat().st_size
        )
    except ValueError:
        return code.stat().st_size


def cell_lines(source):
    """Lines of a cell that a reader reads: neither empty ones nor imports."""
    return sum(bool(line.strip()) for line in _IMPORTS.sub("", source).splitlines())


def notebook_problems(path):
    """What is wrong with a notebook as it goes into git and to Kaggle: sentences, none where all is
    well. The one place of these rules: tests ask it, too."""
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    try:
        nbformat.validate(notebook)
    except nbformat.ValidationError as error:
        yield f"{Path(path).name} is not valid: {str(error).splitlines()[0]}"
    if (notebook.nbformat, notebook.nbformat_minor) < (4, 5):
        yield f"{Path(path).name} is nbformat {notebook.nbformat}.{notebook.nbformat_minor}, 4.5 is expected"
    # nbformat gives a cell another id where two have one, in memory
    ids = Counter(cell.get("id") for cell in json.loads(Path(path).read_bytes())["cells"])
    if twice := [str(name) for name, n in ids.items() if name and n > 1]:
        yield f"several cells have one id: {', '.join(twice)}"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    # Of a staged one: not for readers
    code = [cell for cell in code if "package" not in cell.metadata.get("tags", [])]
    tags = [set(cell.metadata.get("tags", [])) for cell in code]
    if [tag & {"parameters", "setup"} for tag in tags[:2]] != [{"parameters"}, {"setup"}]:
        yield "the first two code cells must be tagged `parameters` and `setup`"
    for cell, tag in zip(code, tags):
        first = cell.source.strip().partition("\n")[0][:50]
        if cell.outputs or cell.execution_count is not None:
            yield f"the cell {first!r} has outputs or a number: clear them"
        columns = max(map(len, cell.source.splitlines()), default=0)
        if columns > LIMITS["columns"] and "setup" not in tag:
            yield f"the cell {first!r} is {columns} wide, {LIMITS['columns']} columns are allowed"
        lines = 0 if tag & {"parameters", "setup"} else cell_lines(cell.source)
        if lines > LIMITS["cell"]:
            yield f"the cell {first!r} has {lines} lines, {LIMITS['cell']} are allowed"
