"""Making quantizations with llama.cpp's own quantizer, and saying what is really inside them."""

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path

import pandas as pd

from ..errors import ModelLoadError, ModelNotFoundError, QuantizeError, shown
from ..files.gguf import GGUFFile
from ..files.outputs import labels, once, path_of, refuse_overwriting, written
from ..files.programs import tool
from ..files.registry import TYPES
from ..gpus.cores import physical_cores
from ..gpus.fit import as_type
from ..liveness import LOOP
from ..running import run_tool
from . import importance
from .expand import open_model, output, quantized_types
from .writing import SLACK

SLOWEST = 1e5  # weights per second of the slowest type on the slowest machine
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
    dry = dry_run(src, type, options)
    need = dry_size(dry) + SLACK
    if wants_imatrix(dry) and imatrix is None:
        raise QuantizeError(
            f"{type} needs an importance matrix: make one with imatrix(model, text, dst) and pass it."
        )
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
            limit=LOOP + largest / SLOWEST,
        )
        source.check_place(running=True)
    return dst


def dry_run(src: str | Path, type: str, options: Iterable[str] = ("--allow-requantize",)) -> str:
    """What llama-quantize says it would do, tensor by tensor: a tenth of a second, once."""
    path = path_of(src, ModelNotFoundError)
    return _dry_run(path, type, tuple(options), path.is_file() and path.stat().st_mtime_ns)


@lru_cache(maxsize=32)
def _dry_run(path, type, options, _):
    command = [tool("llama-quantize"), "--dry-run", *options, str(path), type]
    return run_tool(command, f"quantize {shown(path)} to {type}")


def targets(words: str) -> dict[str, str]:
    """{tensor: the type that it would get, "Q4_K"} of a dry run: of those that can be quantized,
    else the type that they have."""
    found = re.findall(
        r"^\[ *\d+/ *\d+\] +(\S+) .*type = +(\w+), size = [^(\n]*(?:\((\w+)\))?", words, re.M
    )
    return {name: (new or old).upper() for name, old, new in found}


def dry_size(words: str) -> float:
    """Bytes of the tensors that a dry run announces."""
    if not (size := re.search(r"quant size\s*=\s*([\d.]+) MiB", words)):
        raise QuantizeError(
            f"llama-quantize did not say how large the file will be. Its last words:\n{words[-800:]}"
        )
    return float(size[1]) * 2**20


def needs_imatrix(src: str | Path, type: str) -> bool:
    """Whether llama-quantize makes this type of a file only with an importance matrix.

    It depends on the model, since rows that are no multiple of 256 wide get another type.
    """
    return wants_imatrix(dry_run(src, type))


def wants_imatrix(words: str) -> bool:
    """Whether a dry run says so."""
    return "will require an imatrix" in words


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

    paths, inputs = [], [reference] if imatrix is None else [reference, imatrix]
    for name in wanted:
        if str(name).upper() not in TYPES:
            paths.append(Path(resolve_model(name)))
            continue
        there = partial(made_from, inputs=inputs)
        path = place_of(name, GGUFFile(reference), folder, imatrix, there)
        if not there(path):
            quantize(reference, path, str(name), imatrix=imatrix, progress=progress)
        paths.append(path)
    return once(dict(zip(labels(paths), paths)))


def place_of(
    kind: str | Path,
    model: GGUFFile,
    folder: str | Path,
    imatrix: str | Path | None = None,
    there: Callable[[Path], bool] | None = None,
) -> Path:
    """Where a quantization of a model is made (expand.output)."""
    size = as_type(model, str(kind).upper()).size_bytes
    return output(f"{kind}{'-imatrix' if imatrix else ''}.gguf", size, folder, there)


def with_origin(paths: Mapping[str, Path], origin: str | Path) -> dict[str, Path]:
    """quantizations() and the file that their reference was made from, unless that is one of them:
    {name: path}, its name unlike theirs."""
    origin = Path(origin)
    *_, name = labels([*paths.values(), origin])
    name = name if name not in paths else str(origin)
    return once({**paths, name: origin})


def made_from(path: Path, inputs: Sequence[str | Path], called: str | None = None) -> bool:
    """Whether a file is no older than what it is made from, and of the same model as the first of
    `inputs`: metadata, but for the name of a stand-in (`called`), and shapes."""
    newest = max(Path(given).stat().st_mtime for given in inputs)
    if not path.is_file() or path.samefile(inputs[0]) or path.stat().st_mtime < newest:
        return False
    own = r"general\.(file_type|quantization_version)|quantize\..*|split\..*"  # what llama-quantize writes

    def identity(file, **changes):
        kept = {key: value for key, value in file.metadata.items() if not re.fullmatch(own, key)}
        return repr(sorted((kept | changes).items())), file.tensors["shape"].to_dict()

    changes = {"general.name": called} if called else {}
    try:
        return identity(GGUFFile(path)) == identity(GGUFFile(inputs[0]), **changes)
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
