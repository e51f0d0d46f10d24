"""Runs the notebooks with papermill and keeps each as .ipynb and as one self-contained .html
file (export)."""

import logging
import os
import re
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..errors import NotebookError, ParameterError
from ..files.outputs import folder_of, refuse_overwriting, written
from ..files.places import temp_dir
from ..files.scratch import ScratchFile
from ..liveness import Watch
from ..secrecy import redact
from ..views import text
from ..views.light import IRIS, without
from .export import export_html, keep
from .parameter_types import fit

IOPUB_SECONDS = 300  # for the last output of a cell that has ended
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
    when one fails, or whose kernel is stopped by a signal; what was executed until then is kept and
    exported, too, and until then lies in scratch. No secret that is known here (secrecy) is in it.
    OutputError where `out` is the notebook's own folder."""
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
    with ScratchFile(f"{secrets.token_hex(4)}-{path.name}") as growing:
        try:
            _execute(path, growing, parameters, out, progress)
        finally:
            if growing.is_file():
                _keep(growing, executed)
    return executed


def _execute(path, growing, parameters, out, progress):
    with without(IRIS):
        import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from traitlets.config import Config

    stalled: list[str] = []
    try:
        # No open port
        papermill.execute_notebook(
            path,
            growing,
            parameters=parameters,
            engine_name=_saved_once(),
            kernel_name="python3",
            language="python",
            cwd=out,
            progress_bar=progress,
            config=Config({"KernelManager": {"transport": "ipc"}}),
            kernel_manager_class=_watched_kernel(stalled),
            # Late on a busy machine, where the client's own 4 s end the run.
            iopub_timeout=IOPUB_SECONDS,
        )
    except papermill.exceptions.PapermillExecutionError as error:
        trace = redact(_COLOUR.sub("", "\n".join(error.traceback))).strip().splitlines()
        first = next((line for line in error.source.splitlines() if line.strip()), "")
        raise NotebookError(
            f"{path.name}, In [{error.exec_count}] ({first}): {error.ename}: {error.evalue}\n"
            + "\n".join("    " + line for line in trace[-15:])
        ) from None
    except DeadKernelError:
        why = f"the kernel {stalled[0]}" if stalled else "the kernel died (out of memory?)"
        raise NotebookError(f"{path.name}, {_cell(growing)}: {why}") from None
    except CellTimeoutError:  # a TimeoutError, which is an OSError
        raise NotebookError(
            f"{path.name}, {_cell(growing, answered=True)}: its code has ended, and its outputs did not "
            f"all come within {IOPUB_SECONDS} s. Run it again when less else runs here, or have this "
            "cell print and draw less."
        ) from None
    except OSError as trouble:
        raise _no_room(path, temp_dir(), trouble) from trouble


def _keep(growing, executed):
    try:
        keep(growing, executed)
        export_html(executed)
    except (OSError, ValueError) as trouble:  # ValueError: scratch has only a half of it
        raise _no_room(executed, executed.parent, trouble) from trouble


def _no_room(path, folder, trouble):
    return NotebookError(
        f"{path.name}: its results could not be written to {folder}: {trouble}. Make room there, or "
        "choose another folder."
    )


def _saved_once():
    """The name of papermill's usual engine, but that it writes the notebook when it has ended, well
    or not, and not before and after each cell, which of figures took seconds."""
    from papermill.engines import NBClientEngine, papermill_engines

    class Once(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man, kernel_name, **options):
            nb_man.save = lambda **_: None
            try:
                super().execute_managed_notebook(nb_man, kernel_name, **options)
            finally:
                del nb_man.save

    papermill_engines.register("once", Once)
    return "once"


def _watched_kernel(stalled):
    """The class of a kernel that is ended where a signal has stopped it; why is put into `stalled`.
    One that computes is let be: how long a cell takes is its author's."""
    from jupyter_client.manager import AsyncKernelManager

    class Watched(AsyncKernelManager):
        async def start_kernel(self, **options):
            await super().start_kernel(**options)
            process = self.provisioner.process

            def end(why):
                stalled.append(why)
                process.kill()

            Watch(process.pid, end, None).__enter__()  # to the end of the kernel

    return Watched


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


def _cell(executed: Path, answered: bool = False) -> str:
    """Number and first line of the first cell that the kernel never answered; answered: of the last
    that it did."""
    import nbformat

    cells = nbformat.read(executed, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code" and cell.source.strip()]
    done = [cell for cell in code if "shell.execute_reply" in cell.metadata.get("execution", {})]
    number = len(done) - answered  # they run in order
    if not 0 <= number < len(code):
        return "In [?]"
    first = next(line for line in code[number].source.splitlines() if line.strip())
    return f"In [{number + 1}] ({first})"
