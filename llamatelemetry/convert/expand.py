"""Rewriting a GGUF file tensor by tensor: expanded to floats, or made into a stand-in for a
full-precision model."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from gguf import GGML_QUANT_VERSION, LlamaFileType

from ..errors import ModelLoadError, QuantizeError, shown
from ..files.gguf import GGUFFile, unreadable
from ..files.outputs import path_of
from ..files.scratch import ANNOUNCED, ScratchFile, borrowed, scratch
from ..files.types import TensorType, dequantize, tensor_type
from ..reading import Rows
from .chunks import PART, chunk
from .writing import Output, assemble, copied, cut

ROWS = 4096  # rows of a block, which has one seed of the noise
FLOATS = {"F32": 4, "F16": 2, "BF16": 2}  # bytes per weight
NUMBERS = {"F32": 0, "F16": 1, "BF16": 30}  # in a file
# Bytes per block of 32 weights, the step in float16 first.
SIMPLE = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34}
LARGEST_F32 = 2 * 10**9  # bytes of a stand-in in F32; a larger one is F16


class Tensor(NamedTuple):
    """data: its rows as they are stored; shape: rows first."""

    name: str
    data: Rows
    tensor_type: TensorType
    shape: tuple


def quantized_types(file: GGUFFile) -> list[str]:
    """Quantized types of a file's matrices, most frequent first; [] for a file of floats."""
    matrices = file.tensors[file.tensors["shape"].map(len) > 1]
    return [kind for kind in matrices["type"].value_counts().index if kind not in (*FLOATS, "F64")]


def expand(src: str | Path, dst: str | Path, type: str = "F32", progress: bool = True) -> Path:
    """Dequantize every tensor of a GGUF file (of all parts of a split one) to F32, F16 or BF16 and
    keep its metadata.

    The weights are those of `src` and no better: quantizing the result again is a requantization.
    Vectors (norms, biases) stay F32 whatever `type` is, as llama.cpp requires. Memory: one block of
    rows, not the model. Returns the path of `dst`. Raises ModelNotFoundError, ModelLoadError or
    QuantizeError (a type that is not one of the three, a `dst` that is `src` itself by whatever
    name, too little disk space)."""
    _check_float("expand", type)
    return _rewrite(src, dst, type, None, {}, progress)


def excerpt(src: str | Path, dst: str | Path, names: Iterable[str]) -> Path:
    """Some tensors of a GGUF file, as they are stored, with all of its metadata: for a quantizer
    that is wanted for those alone. No model: nothing runs it. Returns the path of `dst`. Raises
    ModelNotFoundError, ModelLoadError (no such tensor) or QuantizeError (too little disk space, a
    `dst` that is `src`)."""
    source, dst = open_model(src), path_of(dst, QuantizeError)
    tensors = {name: Tensor(name, *source.raw(name)) for name in names}

    def jobs(name):
        data = tensors[name].data
        return (partial(copied, data, rows) for rows in cut(data, tensors[name].shape[-1]))

    plan = {name: (tensor.shape, tensor.tensor_type) for name, tensor in tensors.items()}
    assemble([Output(dst, plan)], source, jobs, inputs=[src], bar=False)
    return dst


def make_reference(
    src: str | Path, dst: str | Path, seed: int = 0, progress: bool = True, type: str = "F32"
) -> Path:
    """Make a stand-in for the full-precision model that a quantized file came from: its weights
    plus uniform noise.

    Each weight of a quantized block moves by at most half of that block's step, which is where the
    original could have been. It is another model than the original (its own perplexity says how
    much worse); it serves to put quantizations in order, which a requantized file does not, because
    its weights already lie on a grid. The file's `general.name` says what it is. type: "F32", "F16"
    or "BF16" (see reference_type); same seed and type, same file. Returns the path of `dst`. Raises
    as expand() does."""
    _check_float("make_reference", type)
    return stand_in(src, dst, seed, progress, type)


def stand_in(
    src: str | Path,
    dst: str | Path,
    seed: int,
    progress: bool,
    type: str,
    beside: Sequence[tuple[Path, int, dict[str, TensorType]]] = (),
) -> Path:
    """make_reference, and in the same pass quantizations of what it makes, `beside` it: (path,
    general.file_type, {tensor: type}) of each."""

    def noisy(tensor, start):
        block = start // ROWS * ROWS
        rng = np.random.default_rng([seed, block, *tensor.name.encode()])
        # Two weights of each number of 64 bits: the noise is the same wherever a job begins.
        rng.bit_generator.advance((start - block) * tensor.shape[-1] // 2)

        def add(at, values):
            step = _steps(tensor, at, len(values))  # (rows, blocks of weights)
            if step is not None:
                noise = rng.random((*step.shape, values.shape[1] // step.shape[1]), np.float32)
                noise -= np.float32(0.5)
                noise *= step[..., None]
                values += noise.reshape(values.shape)

        return add

    called = {"general.name": stand_in_name(open_model(src), seed)}
    return _rewrite(src, dst, type, noisy, called, progress, beside)


def stand_in_name(file: GGUFFile, seed: int) -> str:
    """What a stand-in of a file calls itself."""
    return f"{file.name} + uniform noise of one quantization step (seed {seed}), not the original"


def _check_float(what, type):
    if type not in FLOATS:
        raise QuantizeError(
            f"{what}() writes {', '.join(FLOATS)}, not {type!r}: use quantize() for quantized types."
        )


def reference_type(file: GGUFFile) -> str:
    """The float type of a stand-in: F32 where the file is then at most 2 GB, else F16, whose
    rounding (1/2048 of a weight) is far below a step of any quantization, in half the room."""
    return "F32" if 4 * int(file.tensors["n_elements"].sum()) <= LARGEST_F32 else "F16"


def output(
    name: str, size_bytes: int, folder: str | Path, there: Callable[[Path], bool] | None = None
) -> Path:
    """Where a file that is made goes: into `folder`, over 1 GB into scratch, where it is announced
    and not kept (files.scratch). there(path): whether one that is there already is the right one;
    another is removed from scratch. OutputError where scratch has less room."""
    if size_bytes <= ANNOUNCED:
        return Path(folder) / name
    path = scratch() / name
    if path.is_file() and there and there(path):
        return path
    return ScratchFile(name, size_bytes).path


def used_up(paths: Iterable[str | Path]) -> None:
    """Remove those of some files that lie in scratch."""
    with borrowed() as folder:
        for path in map(Path, paths):
            if path.parent == folder:
                path.unlink(missing_ok=True)


def _steps(tensor, start, rows):
    """The quantization step of every block of weights in these rows, float32 (rows, blocks); None
    for unquantized tensors."""
    kind = tensor.tensor_type.name
    if kind in (*FLOATS, "F64"):
        return None
    raw = tensor.data[start : start + rows]
    if kind in SIMPLE:
        blocks = raw.reshape(rows, -1, SIMPLE[kind])
        step = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0].astype(np.float32)
    elif kind in ("Q4_K", "Q5_K"):
        from gguf.quants import Q4_K

        # 256 weights: d and dmin in float16, then 12 bytes of 6-bit scales and minima.
        blocks = raw.reshape(-1, {"Q4_K": 144, "Q5_K": 176}[kind])
        d = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
        scale, _ = Q4_K.get_scale_min(np.ascontiguousarray(blocks[:, 4:16]))
        step = (d * scale).reshape(rows, -1)
    elif kind == "Q6_K":  # 256 weights: 192 bytes of weights, 16 int8 scales, d in float16
        blocks = raw.reshape(-1, 210)
        d = np.ascontiguousarray(blocks[:, -2:]).view(np.float16).astype(np.float32)
        scale = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)
        step = (d * scale).reshape(rows, -1)
    else:
        raise QuantizeError(
            f"{tensor.name} is {kind}: make_reference() knows the step of Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K "
            "and Q6_K. Use a file made of these types, or a full-precision model as the reference."
        )
    return np.abs(step)


def _rewrite(src, dst, type, change, metadata, progress, beside=()):
    """change(tensor, start): of a block of rows from `start` on, a function (row, values) that
    changes its values from that row on in place; None: they stay. beside: [(path, its
    general.file_type, {tensor: TensorType})] of quantizations of the result, made in the same
    pass."""
    source, dst = open_model(src), path_of(dst, QuantizeError)
    # Vectors stay F32.
    kinds = source.tensors["shape"].map(lambda shape: type if len(shape) > 1 else "F32")
    ftype = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16"}[type]
    shapes = source.tensors["shape"]
    floats = {name: tensor_type(NUMBERS[kind]) for name, kind in kinds.items()}
    every = [*beside, (dst, LlamaFileType[ftype].value, floats)]
    outputs = []
    for path, file_type, types in every:
        plan = {name: (shapes[name], types[name]) for name in kinds.index}
        more = {"general.file_type": file_type}
        if path != dst:
            more["general.quantization_version"] = GGML_QUANT_VERSION
        outputs.append(Output(path, plan, metadata | more))

    def jobs(name):
        tensor = Tensor(name, *source.raw(name))
        job = partial(_rows, tensor, change, [types[name] for _, _, types in every])
        for start in range(0, len(tensor.data), ROWS):
            stop = min(start + ROWS, len(tensor.data))
            yield from (
                partial(job, part) for part in cut(tensor.data, tensor.shape[-1], start, stop)
            )

    assemble(outputs, source, jobs, inputs=[src], bar=progress)
    return dst


def _rows(tensor, change, wanted, rows):
    """Some rows as they are written: of each wanted type its parts, in bytes. The last is of
    floats, and the others are made of what is left of a weight in those; a type that several files
    have is made once."""
    step = max(1, PART // tensor.shape[-1])
    change, parts = change and change(tensor, rows.start), [[] for _ in wanted]
    for at in rows[::step]:
        try:
            data = tensor.data.part(at, min(at + step, rows.stop))
            values = dequantize(data, tensor.tensor_type)
        except NotImplementedError:
            raise unreadable(tensor.name, tensor.tensor_type.name) from None
        if change:
            change(at, values)
        floats = _as_floats(values, wanted[-1].name)
        if len(wanted) > 1 and floats is not values:
            values = dequantize(floats.view(np.uint8), wanted[-1])
        made = {wanted[-1]: floats.data}
        for kind, own in zip(wanted, parts):
            if kind not in made:
                made[kind] = chunk(values, kind).data
            own.append(made[kind])
    return parts


def _as_floats(values, kind):
    if kind == "BF16":
        from gguf import GGMLQuantizationType, quants

        return quants.quantize(values, GGMLQuantizationType.BF16)
    return values.astype({"F32": np.float32, "F16": np.float16}[kind], copy=False)


def open_model(path: str | Path) -> GGUFFile:
    """The file as a GGUFFile, or a typed error."""
    try:
        return GGUFFile(path)
    except ModelLoadError as error:
        raise ModelLoadError(f"{shown(path)} is not a readable GGUF file: {error}") from error
