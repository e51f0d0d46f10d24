"""Importance matrices: what one holds, and how much of a model it fits."""

import math
import re
import shutil
import struct
import tempfile
import warnings
from pathlib import Path

from ..compare.texts import load_text, place
from ..errors import ModelLoadError, ModelNotFoundError, QuantizeError, shown
from ..files.gguf import GGUFFile
from ..files.header import Header
from ..files.outputs import path_of, some, split_parts, written
from ..files.places import free_bytes
from ..files.programs import tool
from ..files.scratch import borrowed
from ..gpus.cores import physical_cores
from ..gpus.devices import list_gpus
from ..liveness import patience
from ..reading import Source
from ..running import run_tool
from .expand import open_model
from .writing import SLACK

SUMS = ".in_sum2"  # llama-imatrix: sums of squared activations, (matrices, width) per tensor
# What llama-imatrix leaves out unless told otherwise: the output, and what is looked up and not
# multiplied.
APART = re.compile(r"^(output|token_embd|per_layer_token_embd|position_embd|token_types)\.")


def imatrix(
    model: str | Path,
    text: str | Path,
    dst: str | Path,
    n_ctx: int = 512,
    chunks: int | None = None,
    progress: bool = True,
) -> Path:
    """Compute an importance matrix (mean squared activation per input column) of a model on a text,
    by llama-imatrix.

    text: the text itself or a path, as load_text takes it. chunks: at most so many windows of n_ctx
    tokens. Returns the path of `dst`. Raises QuantizeError, also for a text shorter than two
    windows (llama-imatrix asks for that much) and for a `dst` that is the model or the text;
    CompareError for a text that is not there."""
    model, dst = path_of(model, ModelNotFoundError), path_of(dst, QuantizeError)
    source, file = open_model(model), place(text)
    limit = patience(split_parts(model), n_ctx, n_ctx, bool(list_gpus()))
    output = dict(inputs=[model, file], need=SLACK, model=is_one(dst), error=QuantizeError)
    with (
        borrowed() as scratch,
        tempfile.TemporaryDirectory(dir=scratch) as folder,
        written(dst, **output) as temporary,
    ):
        path = Path(folder) / "text.txt"
        path.write_bytes(load_text(text).encode())  # line ends stay as they are
        # llama-imatrix chooses its format by the file's ending.
        out = Path(folder) / "imatrix.gguf"
        command = [tool("llama-imatrix"), "--no-ppl", "-m", model, "-f", path, "-o", out]
        command += ["-c", n_ctx, "-b", n_ctx, "-t", physical_cores()]
        command += ["--chunks", chunks] if chunks else []
        words = run_tool(
            list(map(str, command)),
            f"compute an importance matrix of {shown(model)}",
            step=r"\[(\d+)\]",
            total=r"over (\d+) chunks",
            bar=shown(dst.name),
            progress=progress,
            limit=limit,
        )
        if not out.is_file():
            reason = re.search(r"you need at least.*", words)
            said = reason[0] if reason else words[-800:]
            raise QuantizeError(f"llama-imatrix wrote nothing: {said}")
        if not is_one(out):  # it says nothing of a disk that is full
            raise QuantizeError(
                f"llama-imatrix wrote no whole file: {shown(out.parent)} has "
                f"{free_bytes(out.parent) / 1e9:.2f} GB free. Make room there, or set TMPDIR."
            )
        source.check_place(running=True)
        shutil.copy(out, temporary)
    return dst


def entries(path: str | Path) -> dict[str, int]:
    """{tensor name: number of its values} of an importance matrix, GGUF or of llama.cpp's former
    format.

    Raises QuantizeError for a file that is none.
    """
    try:
        source = Source(Path(path))
        if source.read(0, min(4, source.size)) == b"GGUF":
            return _of_gguf(Path(path))
        return _of_former_format(source)
    except (ModelLoadError, ModelNotFoundError) as error:
        raise QuantizeError(f"{shown(path)} is no readable importance matrix: {error}") from error


def is_one(path: str | Path) -> bool:
    """Whether an importance matrix is there."""
    try:
        return bool(entries(path))
    except QuantizeError:
        return False


def check(model: GGUFFile, path: str | Path) -> None:
    """Say with a warning where an importance matrix fits only a part of `model` (a GGUFFile).

    A matrix of the model takes part where the file has its name with one value per column (and
    expert). QuantizeError where none does, or where a name is there with another width: it is then
    another model's."""
    have, shapes = entries(path), model.tensors["shape"]
    wanted = {
        name: math.prod(shape[:-2]) * shape[-1]
        for name, shape in shapes.items()
        if _weighed(name, shape)
    }
    there = [name for name in wanted if name in have]
    other = [name for name in there if have[name] != wanted[name]]
    foreign = [name for name in have if name not in shapes.index]
    told = (
        f"{shown(path)} has {len(have)} entries: {len(there) - len(other)} of the {len(wanted)} matrices of "
        f"{model.name} that it could weigh have one that fits"
    )
    if other:
        example = f"{other[0]} is {wanted[other[0]]} wide there and {have[other[0]]} in it"
        raise QuantizeError(
            f"{told}, {len(other)} have one of another width ({example}): it is another model's. Make "
            "one with imatrix(model, text, dst)."
        )
    if wanted and not there:
        raise QuantizeError(
            f"{told}: it is another model's. Make one with imatrix(model, text, dst)."
        )
    lost = [name for name in wanted if name not in there]
    if lost or foreign:
        apart = [f"without one: {some(lost)}"] if lost else []
        apart += [f"not of this model: {some(foreign)}"] if foreign else []
        warnings.warn(
            f"{told}; {'; '.join(apart)}. Where it has none the weights count alike. One that fits is made "
            "with imatrix(model, text, dst).",
            stacklevel=3,
        )


def _weighed(name, shape):
    """A matrix that llama-quantize weighs where it can: of the layers, not a norm, a router or a
    convolution."""
    never = re.search(
        "norm|ffn_gate_inp|conv|time_mix|altup|laurel|per_layer_model_proj|indexer", name
    )
    return len(shape) > 1 and name.endswith("weight") and not never and not APART.match(name)


def _of_gguf(path):
    tensors = Header(path).tensors
    sums = {
        name.removesuffix(SUMS): shape
        for name, (_, shape, *_) in tensors.items()
        if name.endswith(SUMS)
    }
    found = {name: math.prod(shape) for name, shape in sums.items()}
    if not found:
        raise QuantizeError(
            f"{shown(path)} is a GGUF file, but no importance matrix: make one with "
            "imatrix(model, text, dst)."
        )
    return found


def _of_former_format(source):
    """int32 count; of each entry: length and name, number of calls, number of values, the values
    (float32)."""
    found, at = {}, 4

    def number(at):
        (value,) = struct.unpack("<i", source.read(at, 4 if at + 4 <= source.size else 0))
        return value

    try:
        for _ in range(number(0)):
            length = number(at)
            if not 0 < length < 1 << 16:
                raise ValueError(f"entry {len(found)} has a name of {length:,} bytes")
            name = source.read(at + 4, min(length, max(0, source.size - at - 4))).decode()
            count = number(at + 8 + length)
            at += 12 + length + 4 * count
            if count <= 0 or at > source.size or name in found:
                raise ValueError(f"entry {name[:80]!r} is there twice, or not whole")
            found[name] = count
    except (struct.error, ValueError) as error:
        raise QuantizeError(
            f"{shown(source.path)} is no importance matrix ({error}): make one with "
            "imatrix(model, text, dst)."
        ) from error
    return found
