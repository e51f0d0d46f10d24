"""Runs the notebooks with papermill and keeps each as .ipynb and as one self-contained .html
file."""

import logging
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..errors import NotebookError, ParameterError
from ..files.outputs import folder_of, refuse_overwriting, written
from ..views import text
from .parameter_types import fit

# The lab template without what it would load from the network: require.js, MathJax, Mermaid, the
# widget renderer. Without a font that holds the radical sign Chromium leaves square roots out: the
# fonts of Windows, macOS, Linux. The policy makes "no request" a property of the page instead of a
# hope about what its outputs hold.
_TEMPLATE = """{%- extends 'index.html.j2' -%}
{%- block html_head_js_requirejs -%}
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline';
 script-src 'unsafe-inline' 'unsafe-eval' blob:; img-src data: blob:; font-src data:; media-src data:; worker-src blob:;
 frame-src data: blob:">
{%- endblock -%}
{%- block jupyter_widgets -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}
<style>.jp-OutputArea-output pre { word-break: normal; overflow-wrap: anywhere; }
math { font-family: "Cambria Math", "STIX Two Math", "Latin Modern Math", "DejaVu Math TeX Gyre", "DejaVu Sans" }
</style>
{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
"""
_REMOTE_SCRIPT = re.compile(r"<script[^>]*\ssrc=[\"']https?://[^>]*>\s*</script>", re.IGNORECASE)
_CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)
_FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<![\\$\w])\$(?=\S)([^$\n]+?)(?<=\S)\$(?![\w$])", re.DOTALL)
_PLACE = "formula-7c1f-{}-here"
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def find(folder: Path, names: Sequence[str] = ()) -> list[Path]:
    """The notebooks of a folder in order, or those whose file name starts with or contains one of
    `names`."""
    every = sorted(Path(folder).glob("*.ipynb"))
    chosen = [
        path
        for path in every
        if not names or any(name in path.name or name == str(path) for name in names)
    ]
    for name in names:
        if not any(name in path.name or name == str(path) for path in every):
            have = ", ".join(path.stem for path in every) or "none"
            raise NotebookError(f"No notebook {name!r} in {folder}; there are: {have}")
    return chosen


def run_notebook(
    path: Path, out: str | os.PathLike, parameters: dict | None = None, progress: bool = True
) -> Path:
    """Execute one notebook into `out` (also its working directory) and export it; returns the
    executed .ipynb.

    parameters: {name: value}, of the types that the notebook's `parameters` cell declares; a
    ParameterError names what is not, before anything runs. Raises NotebookError that names the cell
    when one fails; what was executed until then is kept and exported, too. OutputError where `out`
    is the notebook's own folder."""
    import papermill
    from nbclient.exceptions import DeadKernelError
    from traitlets.config import Config

    path, out = Path(path).absolute(), Path(out).resolve()  # a link to a notebook keeps its name
    parameters = fit(path, parameters)
    logging.getLogger("papermill").addFilter(_unless_unknown)
    executed = folder_of(out) / path.name
    refuse_overwriting(executed, [path])
    # Else the kernel warns about a debugger
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    os.environ.setdefault("JUPYTER_PLATFORM_DIRS", "1")
    if progress is True:
        progress = {"desc": path.stem, "mininterval": 0.1 if sys.stderr.isatty() else 10}
    try:
        # No open port
        papermill.execute_notebook(
            path,
            executed,
            parameters=parameters,
            kernel_name="python3",
            language="python",
            cwd=out,
            progress_bar=progress,
            config=Config({"KernelManager": {"transport": "ipc"}}),
        )
    except papermill.exceptions.PapermillExecutionError as error:
        trace = _COLOUR.sub("", "\n".join(error.traceback)).strip().splitlines()
        first = next((line for line in error.source.splitlines() if line.strip()), "")
        raise NotebookError(
            f"{path.name}, In [{error.exec_count}] ({first}): {error.ename}: {error.evalue}\n"
            + "\n".join("    " + line for line in trace[-15:])
        ) from None
    except DeadKernelError:
        raise NotebookError(
            f"{path.name}, In [{_running_cell(executed)}]: the kernel died (out of memory?)"
        ) from None
    except OSError as trouble:
        raise NotebookError(
            f"{path.name}: its results could not be written to {out}: {trouble}. Make room there, or "
            "choose another folder."
        ) from trouble
    finally:
        if executed.is_file():
            export_html(executed)
    return executed


def run_all(
    folder: str | os.PathLike = "notebooks",
    out: str | os.PathLike = "executed",
    names: Sequence[str] = (),
    parameters: dict | None = None,
    typed: bool = False,
) -> list[Path]:
    """Run every notebook of the folder (or those named), print where each result is; NotebookError
    at the end.

    parameters: as in run_notebook, for each of them; typed: texts as typed in a shell
    (parameter_types.fit). A notebook that has not got one of them, or cannot take its value, is a
    ParameterError before any notebook runs."""
    paths = find(Path(folder), names)
    if not paths:
        raise NotebookError(
            f"No notebooks in {folder} (working folder: {Path.cwd()}): name theirs with --folder."
        )
    fitted = _fit_all(paths, Path(out), parameters, typed)
    failures = []
    for path in paths:
        start = time.monotonic()
        try:
            executed = run_notebook(path, out, fitted[path])
            print(
                f"{path.name}: {time.monotonic() - start:.0f} s -> {executed.with_suffix('.html')}",
                flush=True,
            )
            if typed and parameters:  # how what was typed has been read
                said = ", ".join(f"{name} = {value!r}" for name, value in fitted[path].items())
                print(f"{path.name} ran with {said}", file=sys.stderr, flush=True)
        except NotebookError as error:
            failures.append(str(error))
            print(f"FAILED {error}", file=sys.stderr, flush=True)
    if failures:
        raise NotebookError(
            f"{len(failures)} of {len(paths)} notebooks failed: "
            + "; ".join(failure.splitlines()[0] for failure in failures)
        )
    return [Path(out) / path.name for path in paths]


def _fit_all(paths, out, parameters, typed):
    """{path: its parameters}. A notebook that refuses them is left in `out` as it is, the reason on
    top, unless results of an earlier run are there: who looks into that folder sees why there are
    none."""
    import nbformat

    fitted, refused = {}, []
    for path in paths:
        try:
            fitted[path] = fit(path, parameters, typed)
        except ParameterError as error:
            refused.append(str(error))
            if not (out / path.name).exists():
                notebook = nbformat.read(path, as_version=4)
                notebook.cells.insert(
                    0, nbformat.v4.new_markdown_cell(f"**Not run:** {text.markdown(error)}")
                )
                with written(folder_of(out) / path.name) as temporary:
                    nbformat.write(notebook, temporary)
    if refused:
        raise ParameterError("Nothing was run. " + " ".join(refused))
    return fitted


def _unless_unknown(record):
    """papermill takes annotated parameters, and several on one line, for unknown ones and says so;
    fit() knows."""
    return not record.getMessage().startswith("Passed unknown parameter")


def export_html(path: Path) -> Path:
    """Write an executed notebook as one HTML file that makes no network request; formulas become
    MathML."""
    import nbformat
    from nbconvert import HTMLExporter

    path = Path(path)
    notebook = nbformat.read(path, as_version=4)
    formulas: list[str] = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = take_formulas(cell.source, formulas)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "text/html" in data:
                data["text/html"] = _REMOTE_SCRIPT.sub("", data["text/html"])
    exporter = HTMLExporter(template_name="lab", raw_template=_TEMPLATE, embed_images=True)
    page, _ = exporter.from_notebook_node(notebook, resources={"metadata": {"name": path.stem}})
    for number, formula in enumerate(formulas):
        page = page.replace(_PLACE.format(number), formula)
    target = path.with_suffix(".html")
    with written(target) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return target


def take_formulas(markdown: str, formulas: list[str]) -> str:
    """Replace $...$ and $$...$$ outside code by placeholders and append each as MathML, which
    browsers draw, to `formulas`. (nbconvert parses inline HTML tag by tag and would close every
    MathML element at once.)"""
    from latex2mathml.converter import convert

    def one(match):
        display = match[1] is not None
        try:
            formulas.append(
                convert(match[1] if display else match[2], display="block" if display else "inline")
            )
        except Exception:  # LaTeX that the converter does not know is shown as it was written
            formulas.append(f"<code>{text.html(match[0])}</code>")
        return _PLACE.format(len(formulas) - 1)

    parts = _CODE.split(markdown)
    return "".join(part if part.startswith("`") else _FORMULA.sub(one, part) for part in parts)


def _running_cell(executed: Path) -> str:
    """Number of the first cell that the kernel never answered."""
    import nbformat

    cells = nbformat.read(executed, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code" and cell.source.strip()]
    for number, cell in enumerate(code, start=1):
        if "shell.execute_reply" not in cell.metadata.get("execution", {}):
            return str(number)
    return "?"
