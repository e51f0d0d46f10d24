"""The cells that are the same in every notebook: the set-up, and this package as text."""

import base64
import lzma
import os
import zipfile
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

from ..errors import StageError
from ..files.outputs import written

# A saved page shows every cell's text: this one takes its own away, in the classic notebook's pages
# and in JupyterLab's.
_FOLDED = (
    "<style>.cell:has(.carried-wheel) .input, .jp-Cell:has(.carried-wheel) .jp-Cell-inputWrapper "
    "{ display: none }</style><span class='carried-wheel'>llamatelemetry, carried by this notebook.</span>"
)


def setup_cell(checkout: str | os.PathLike = ".") -> str:
    """The text of the first code cell of every notebook."""
    return (Path(checkout) / "kaggle" / "setup_cell.py").read_text().rstrip("\n")


def package_cell(wheel: str | os.PathLike) -> str:
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


def write_setup_cell(
    paths: Iterable[str | os.PathLike],
    checkout: str | os.PathLike = ".",
    wheel: str | os.PathLike | None = None,
) -> list[Path]:
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
        words = nbformat.writes(notebook).rstrip("\n") + "\n"
        if words != before:
            with written(path, error=StageError) as temporary:
                temporary.write_text(words, encoding="utf-8")
            changed.append(path)
    return changed
