"""Making quantizations with llama.cpp's own quantizer, and saying what is really inside them."""

import re
import shutil
import subprocess
import tempfile
import warnings
from collections import deque
from pathlib import Path

import pandas as pd

from .. import logs
from ..errors import ModelLoadError, ModelNotFoundError, QuantizeError, shown
from ..files.texts import load_text, place
from ..gpus.cores import physical_cores
from ..options import environment
from . import importance
from .expand import FLOATS, SLACK, _open, expand, make_reference
from .gguf import GGUFFile
from .outputs import labels, path_of, refuse_overwriting, written
from .programs import find_program
from .registry import TYPES

__all__ = [
    "QuantizeError",
    "quantize",
    "quantizations",
    "expand",
    "make_reference",
    "imatrix",
    "fallbacks",
    "tool",
]

_NEEDS_MATRIX = "will require an imatrix"  # what llama-quantize says in a dry run
# What llama-quantize takes when a row is not a multiple of 256 wide: the type that is there -> what
# it stands for.
STANDS_FOR = {
    "Q5_0": "Q4_K",
    "Q5_1": "Q5_K",
    "Q8_0": "Q6_K",
    "Q4_0": "Q2_K or Q3_K",
    "IQ4_NL": "IQ1 to IQ3, or IQ4_XS",
}


def quantize(src, dst, type, imatrix=None, tensor_types=None, progress=True, pure=False):
    """Quantize a GGUF file with llama-quantize, in a process of its own.

    type: a type that llama-quantize knows ("Q4_K_M", "IQ3_XS", "Q8_0", ...). imatrix: a file made
    by imatrix(). tensor_types: {pattern: type}, a regular expression on tensor names each
    (`--tensor-type`), first match wins. pure: every matrix of that one type, no mixture. `dst`
    appears when it is whole and not before. A source that is itself quantized is taken, with a
    warning: the result is then no step of a ladder. Returns the path of `dst`. Warns, too, where
    the importance matrix fits only a part of the model. Raises ModelNotFoundError, ModelLoadError
    or QuantizeError: unknown type, disk full, an importance matrix missing or of another model, or
    a `dst` that is one of the inputs by whatever name."""
    src, dst = path_of(src, ModelNotFoundError), path_of(dst, QuantizeError)
    imatrix, type = None if imatrix is None else path_of(imatrix, ModelNotFoundError), str(type)
    refuse_overwriting(dst, [src, imatrix], QuantizeError)
    if imatrix is not None and not imatrix.is_file():
        raise ModelNotFoundError(
            f"No importance matrix at {imatrix}: make one with imatrix(model, text, dst)."
        )
    source = _open(src)
    if imatrix is not None:
        importance.check(source, imatrix)
    kinds = set(source.tensors["type"][source.tensors["shape"].map(len) > 1])
    if kinds - {*FLOATS, "F64"}:
        warnings.warn(
            f"{shown(src)} is quantized already ({', '.join(sorted(kinds))}): requantizing it is not what "
            f"quantizing its original to {type} would give.",
            stacklevel=2,
        )
    options = ["--allow-requantize"]
    if pure:
        options += ["--pure"]
    if imatrix is not None:
        options += ["--imatrix", str(imatrix)]
    for pattern, kind in (tensor_types or {}).items():
        options += ["--tensor-type", f"{pattern}={kind.lower()}"]
    threads = str(physical_cores())
    what = f"quantize {shown(src)} to {type}"
    dry = _run([tool("llama-quantize"), "--dry-run", *options, str(src), type], what)
    if not (size := re.search(r"quant size\s*=\s*([\d.]+) MiB", dry)):
        raise QuantizeError(
            f"llama-quantize did not say how large {shown(dst)} will be. Its last words:\n{dry[-800:]}"
        )
    if _NEEDS_MATRIX in dry and imatrix is None:
        raise QuantizeError(
            f"{type} needs an importance matrix: make one with imatrix(model, text, dst) and pass it."
        )
    need = float(size[1]) * 2**20 + SLACK
    with written(
        dst, inputs=[src, imatrix], need=need, model=True, error=QuantizeError
    ) as temporary:
        _run(
            [tool("llama-quantize"), *options, str(src), str(temporary), type, threads],
            what,
            step=r"\[\s*(\d+)/\s*(\d+)\]",
            bar=shown(dst.name),
            progress=progress,
        )
    return dst


def needs_imatrix(src, type):
    """Whether llama-quantize makes this type of a file only with an importance matrix: a dry run, a
    tenth of a second.

    It depends on the model, since rows that are no multiple of 256 wide get another type.
    """
    command = [tool("llama-quantize"), "--dry-run", "--allow-requantize", str(src), type]
    return _NEEDS_MATRIX in _run(command, f"quantize {shown(src)} to {type}")


def quantizations(reference, wanted, folder, imatrix=None, progress=True):
    """A file for each of `wanted`: {name: path}, the names those of files.labels.

    A type ("Q4_K_M") is made from `reference` into `folder`, unless a file that was made from it is
    there already, after it and after the importance matrix; anything else is a path or a registry
    name and taken as it is."""
    from .models import resolve_model

    paths = []
    for name in wanted:
        if str(name).upper() not in TYPES:
            paths.append(Path(resolve_model(name)))
            continue
        path = Path(folder) / f"{name}{'-imatrix' if imatrix else ''}.gguf"
        if not _made_from(path, [reference] + [imatrix] * (imatrix is not None)):
            quantize(reference, path, name, imatrix=imatrix, progress=progress)
        paths.append(path)
    return dict(zip(labels(paths), paths))


def _made_from(path, inputs):
    """Whether a quantization is newer than what it is made from, and of the same model: metadata
    and shapes."""
    newest = max(Path(given).stat().st_mtime for given in inputs)
    if not path.is_file() or path.samefile(inputs[0]) or path.stat().st_mtime < newest:
        return False
    own = r"general\.(file_type|quantization_version)|quantize\..*|split\..*"  # what llama-quantize writes

    def identity(file):
        kept = {key: value for key, value in file.metadata.items() if not re.fullmatch(own, key)}
        return repr(kept), file.tensors["shape"].to_dict()

    try:
        return identity(GGUFFile(path)) == identity(GGUFFile(inputs[0]))
    except ModelLoadError:
        return False  # half a file of a process that was killed


def imatrix(model, text, dst, n_ctx=512, chunks=None, progress=True):
    """Compute an importance matrix (mean squared activation per input column) of a model on a text,
    by llama-imatrix.

    text: the text itself or a path, as load_text takes it. chunks: at most so many windows of n_ctx
    tokens. Returns the path of `dst`. Raises QuantizeError, also for a text shorter than two
    windows (llama-imatrix asks for that much) and for a `dst` that is the model or the text;
    CompareError for a text that is not there."""
    model, dst = path_of(model, ModelNotFoundError), path_of(dst, QuantizeError)
    _open(model)
    file = place(text)
    output = {
        "inputs": [model, file],
        "need": SLACK,
        "model": importance.is_one(dst),
        "error": QuantizeError,
    }
    with tempfile.TemporaryDirectory() as folder, written(dst, **output) as temporary:
        path = Path(folder) / "text.txt"
        path.write_bytes(load_text(text).encode())  # line ends stay as they are
        # llama-imatrix chooses its format by the file's ending.
        out = Path(folder) / "imatrix.gguf"
        options = {
            "-m": model,
            "-f": path,
            "-o": out,
            "-c": n_ctx,
            "-b": n_ctx,
            "-t": physical_cores(),
        }
        options |= {"--chunks": chunks} if chunks else {}
        words = _run(
            [
                tool("llama-imatrix"),
                "--no-ppl",
                *(str(part) for option in options.items() for part in option),
            ],
            f"compute an importance matrix of {shown(model)}",
            step=r"\[(\d+)\]",
            total=r"over (\d+) chunks",
            bar=shown(dst.name),
            progress=progress,
        )
        if not out.is_file():
            reason = re.search(r"you need at least.*", words)
            raise QuantizeError(
                f"llama-imatrix wrote nothing: {reason[0] if reason else words[-800:]}"
            )
        shutil.copy(out, temporary)
    return dst


def fallbacks(path):
    """Tensors that are not of the type the file is named after because their rows do not fit its
    blocks.

    DataFrame indexed by tensor name: type, instead_of, row_width, why. A k-quant or i-quant packs
    256 weights of a row; where a row is no multiple of 256, llama-quantize takes a type with blocks
    of 32, which is larger. Empty for files of F32, F16, BF16 or of a type with blocks of 32."""
    file = GGUFFile(path)
    asked, rows = file.file_type or "", []
    if "_K" in asked or asked.startswith(("IQ1", "IQ2", "IQ3", "IQ4_XS", "TQ")):
        for name, kind, shape in file.tensors[["type", "shape"]].itertuples():
            if len(shape) > 1 and shape[-1] % 256 and kind in STANDS_FOR:
                rows.append(
                    (
                        name,
                        kind,
                        STANDS_FOR[kind],
                        shape[-1],
                        f"{shape[-1]} is not a multiple of 256",
                    )
                )
    return pd.DataFrame(
        rows, columns=["tensor", "type", "instead_of", "row_width", "why"]
    ).set_index("tensor")


def tool(name):
    """Path of one of llama.cpp's programs, see files.programs. QuantizeError where there is none."""
    if found := find_program(name):
        return str(found)
    raise QuantizeError(
        f"{name} is not on this machine (looked beside the engine, beside LLAMA_SERVER_PATH and on "
        "PATH): install the engine's wheel, made by `llamatelemetry engine build`."
    )


def _run(command, what, step=None, total=None, bar="", progress=False):
    """Run a tool, with a progress bar from its own output; returns that output.

    step: a regular expression whose group 1 is the step reached, and group 2 the total unless
    `total` finds it."""
    from tqdm.auto import tqdm

    tail = deque(maxlen=400)
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env=environment(),
    )
    try:
        with tqdm(desc=bar, disable=not (progress and step)) as meter:
            pending = ""
            while chunk := process.stdout.read1(
                4096
            ):  # llama-imatrix reports its steps without ending the line
                pending += chunk.decode("utf-8", "replace")
                *lines, pending = pending.split("\n")
                tail.extend(lines)
                seen = "\n".join([*lines, pending])
                if total and (found := re.search(total, seen)):
                    meter.total = int(found[1])
                for found in re.finditer(step, seen) if step else ():
                    meter.total = int(found[2]) if found.re.groups > 1 else meter.total
                    meter.update(max(0, int(found[1]) - meter.n))
            tail.append(pending)
        code = process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise
    finally:
        process.stdout.close()
    words = "\n".join(tail)
    if code:
        ending = f"signal {-code}" if code < 0 else f"exit status {code}"
        error = (
            ModelLoadError
            if "failed to load model" in words or "failed to read" in words
            else QuantizeError
        )
        why = logs.reason(words, killed=code < 0)
        tail = logs.last_words(words)[-1200:]
        raise error(f"Could not {what} ({ending}{why and f': {why}'}). Its last words:\n{tail}")
    return words
