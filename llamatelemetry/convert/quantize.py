"""Making quantizations with llama.cpp's own quantizer, and saying what is really inside them."""

import re
import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import pandas as pd

from ..errors import ModelLoadError, ModelNotFoundError, QuantizeError, shown
from ..files.gguf import GGUFFile
from ..files.outputs import labels, once, path_of, refuse_overwriting, written
from ..files.places import free_bytes
from ..files.programs import tool
from ..files.registry import TYPES
from ..files.scratch import ANNOUNCED, scratch
from ..gpus.cores import physical_cores
from ..gpus.fit import as_type
from ..liveness import LOOP
from ..running import run_tool
from . import importance
from .expand import SLACK, open_model, output, quantized_types, reference_type

SLOWEST = 1e5  # weights per second of the slowest type on the slowest machine
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


def quantize(
    src: str | Path,
    dst: str | Path,
    type: str,
    imatrix: str | Path | None = None,
    tensor_types: dict[str, str] | None = None,
    progress: bool = True,
    pure: bool = False,
) -> Path:
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
    source = open_model(src)
    if imatrix is not None:
        importance.check(source, imatrix)
    if kinds := quantized_types(source):
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
    dry = run_tool([tool("llama-quantize"), "--dry-run", *options, str(src), type], what)
    if not (size := re.search(r"quant size\s*=\s*([\d.]+) MiB", dry)):
        raise QuantizeError(
            f"llama-quantize did not say how large {shown(dst)} will be. Its last words:\n{dry[-800:]}"
        )
    if _NEEDS_MATRIX in dry and imatrix is None:
        raise QuantizeError(
            f"{type} needs an importance matrix: make one with imatrix(model, text, dst) and pass it."
        )
    need = float(size[1]) * 2**20 + SLACK
    largest = int(source.tensors["n_elements"].max())  # it says a word after each tensor
    with written(
        dst, inputs=[src, imatrix], need=need, model=True, error=QuantizeError
    ) as temporary:
        run_tool(
            [tool("llama-quantize"), *options, str(src), str(temporary), type, threads],
            what,
            step=r"\[\s*(\d+)/\s*(\d+)\]",
            bar=shown(dst.name),
            progress=progress,
            leaves=[temporary],
            limit=LOOP + largest / SLOWEST,
        )
    return dst


def needs_imatrix(src: str | Path, type: str) -> bool:
    """Whether llama-quantize makes this type of a file only with an importance matrix: a dry run, a
    tenth of a second.

    It depends on the model, since rows that are no multiple of 256 wide get another type.
    """
    command = [tool("llama-quantize"), "--dry-run", "--allow-requantize", str(src), type]
    return _NEEDS_MATRIX in run_tool(command, f"quantize {shown(src)} to {type}")


def quantizations(
    reference: str | Path,
    wanted: Iterable[str | Path],
    folder: str | Path,
    imatrix: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Path]:
    """A file for each of `wanted`: {name: path}, the names those of files.labels.

    A type ("Q4_K_M") is made from `reference` into `folder`, over 1 GB into scratch, unless a file
    that was made from it is there already, after it and after the importance matrix; anything else
    is a path or a registry name and taken as it is."""
    from ..files.models import resolve_model

    paths, inputs = [], [reference] + [imatrix] * (imatrix is not None)
    for name in wanted:
        if str(name).upper() not in TYPES:
            paths.append(Path(resolve_model(name)))
            continue
        size = as_type(GGUFFile(reference), str(name).upper()).size_bytes
        file, there = (
            f"{name}{'-imatrix' if imatrix else ''}.gguf",
            partial(_made_from, inputs=inputs),
        )
        path = output(file, size, folder, there)
        if not there(path):
            quantize(reference, path, str(name), imatrix=imatrix, progress=progress)
        paths.append(path)
    return once(dict(zip(labels(paths), paths)))


LADDER = ("Q8_0", "Q4_K_M", "Q5_K_M", "IQ3_XS")  # what is made first where not all can be
# Weights per second and core of llama-quantize: 18 million for k-quants (measured on 2 cores with
# 1.2 billion weights), ten times as many for Q8_0.
RATES = {"Q8_0": 180e6}
RATE = 18e6


def ladder(file: GGUFFile, seconds: float = 240) -> list[str]:
    """Types for a comparison of what a model loses from step to step, largest first: Q8_0, Q5_K_M,
    Q4_K_M and IQ3_XS (Q3_K_M where that needs an importance matrix), without those whose making
    would go beyond `seconds` on this machine's cores or beyond what scratch has free."""
    weights, used = int(file.tensors["n_elements"].sum()), 0.0
    room = free_bytes(scratch()) - as_type(file, reference_type(file)).size_bytes
    chosen: list[tuple[int, str]] = []
    for kind in LADDER:
        if kind == "IQ3_XS" and needs_imatrix(file.path, kind):
            kind = "Q3_K_M"
        size = as_type(file, kind).size_bytes
        used += weights / RATES.get(kind, RATE) / physical_cores()
        # Beside them a mixture and its control are made.
        room -= size if size > ANNOUNCED else 0
        if len(chosen) > 1 and (used > seconds or size > ANNOUNCED and room < 2 * size):
            break
        chosen.append((size, kind))
    return [kind for _, kind in sorted(chosen, reverse=True)]


def with_origin(paths: Mapping[str, Path], origin: str | Path) -> dict[str, Path]:
    """quantizations() and the file that their reference was made from, unless that is one of them:
    {name: path}, its name unlike theirs."""
    origin = Path(origin)
    *_, name = labels([*paths.values(), origin])
    name = name if name not in paths else str(origin)
    return once({**paths, name: origin})


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


def fallbacks(path: str | Path) -> pd.DataFrame:
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
                why = f"{shape[-1]} is not a multiple of 256"
                rows.append((name, kind, STANDS_FOR[kind], shape[-1], why))
    columns = ["tensor", "type", "instead_of", "row_width", "why"]
    return pd.DataFrame(rows, columns=columns).set_index("tensor")
