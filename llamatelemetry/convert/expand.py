"""Rewriting a GGUF file tensor by tensor: expanded to floats, or made into a stand-in for a
full-precision model."""

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import ModelLoadError, QuantizeError, shown
from ..files.gguf import GGUFFile, unreadable
from ..files.outputs import path_of, written
from ..files.scratch import ANNOUNCED, ScratchFile, scratch
from ..files.types import TensorType, dequantize
from ..gpus.cores import physical_cores
from ..gpus.fit import as_type
from ..reading import Rows

ROWS = 4096  # rows of a tensor that are dequantized at once: 4,096 x 4,096 float32 is 64 MiB
WORKERS = 4  # blocks under way at a time
FLOATS = {"F32": 4, "F16": 2, "BF16": 2}  # bytes per weight
# Bytes per block of 32 weights, the step in float16 first.
SIMPLE = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34}
LARGEST_F32 = 2 * 10**9  # bytes of a stand-in in F32; a larger one is F16
SLACK = 64 << 20  # metadata, tokenizer and padding, in bytes


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
    return _rewrite(src, dst, type, lambda tensor, start, values: values, {}, progress)


def excerpt(src: str | Path, dst: str | Path, names: Iterable[str]) -> Path:
    """Some tensors of a GGUF file, as they are stored, with all of its metadata: for a quantizer
    that is wanted for those alone. No model: nothing runs it. Returns the path of `dst`. Raises
    ModelNotFoundError, ModelLoadError (no such tensor) or QuantizeError (too little disk space, a
    `dst` that is `src`)."""
    import gguf

    source, dst = open_model(src), path_of(dst, QuantizeError)
    tensors = [Tensor(name, *source.raw(name)) for name in names]
    need = int(source.tensors.loc[[tensor.name for tensor in tensors], "size_bytes"].sum())
    options = dict(inputs=[src], need=need + SLACK, model=True, error=QuantizeError)
    with written(dst, **options) as temporary:
        writer = gguf.GGUFWriter(temporary, source.architecture)
        try:
            _copy_metadata(source, writer, {})
            for name, data, kind, shape in tensors:
                number: Any = kind.number  # also of a type that this package lacks
                size = len(data) * data.shape[1]
                writer.add_tensor_info(name, shape, np.dtype(np.int8), size, raw_dtype=number)
            _write_head(writer)
            for tensor in tensors:
                _write_rows(writer, (tensor.data[at : at + ROWS] for at in _starts(tensor)))
        finally:
            writer.close()
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

    def noisy(tensor, start, values):
        step = _steps(tensor, start, len(values))  # (rows, width)
        if step is None:
            return values
        rng = np.random.default_rng([seed, start, *tensor.name.encode()])
        return values + (rng.random(values.shape, dtype=np.float32) - np.float32(0.5)) * step

    note = f"{open_model(src).name} + uniform noise of one quantization step (seed {seed}), not the original"
    return _rewrite(src, dst, type, noisy, {"general.name": note}, progress)


def _check_float(what, type):
    if type not in FLOATS:
        raise QuantizeError(
            f"{what}() writes {', '.join(FLOATS)}, not {type!r}: use quantize() for quantized types."
        )


def reference_type(file: GGUFFile) -> str:
    """The float type of a stand-in: F32 where the file is then at most 2 GB, else F16, whose
    rounding (1/2048 of a weight) is far below a step of any quantization, in half the room."""
    return "F32" if 4 * int(file.tensors["n_elements"].sum()) <= LARGEST_F32 else "F16"


def reference_for(file: GGUFFile, folder: str | Path, seed: int = 0) -> GGUFFile:
    """What quantizations of a model are compared with: the file itself where its matrices are
    floats, else its stand-in of reference_type, made unless it is there: into `folder`, or into
    scratch where it is over 1 GB (`output`). Errors: make_reference's."""
    if not quantized_types(file):
        return file
    kind = reference_type(file)
    size, name = as_type(file, kind).size_bytes, f"{file.path.stem}-noise-{seed}-{kind}.gguf"
    stand_in = output(name, size, folder, there=lambda path: True)
    if not stand_in.is_file():
        make_reference(file.path, stand_in, seed, type=kind)
    return GGUFFile(stand_in)


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
    for path in map(Path, paths):
        if path.parent == scratch():
            path.unlink(missing_ok=True)


def _steps(tensor, start, rows):
    """The quantization step of every weight in these rows, float32 (rows, width); None for
    unquantized tensors."""
    kind = tensor.tensor_type.name
    if kind in (*FLOATS, "F64"):
        return None
    raw = tensor.data[start : start + rows]
    if kind in SIMPLE:
        blocks = raw.reshape(rows, -1, SIMPLE[kind])
        step = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
        step = np.repeat(step.astype(np.float32), 32, axis=-1)
    elif kind in ("Q4_K", "Q5_K"):
        from gguf.quants import Q4_K

        # 256 weights: d and dmin in float16, then 12 bytes of 6-bit scales and minima.
        blocks = raw.reshape(-1, {"Q4_K": 144, "Q5_K": 176}[kind])
        d = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
        scale, _ = Q4_K.get_scale_min(np.ascontiguousarray(blocks[:, 4:16]))
        step = np.repeat(d * scale, 32, axis=-1).reshape(rows, -1)
    elif kind == "Q6_K":  # 256 weights: 192 bytes of weights, 16 int8 scales, d in float16
        blocks = raw.reshape(-1, 210)
        d = np.ascontiguousarray(blocks[:, -2:]).view(np.float16).astype(np.float32)
        scale = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)
        step = np.repeat(d * scale, 16, axis=-1).reshape(rows, -1)
    else:
        raise QuantizeError(
            f"{tensor.name} is {kind}: make_reference() knows the step of Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K "
            "and Q6_K. Use a file made of these types, or a full-precision model as the reference."
        )
    return np.abs(step)  # (rows, width)


def _rewrite(src, dst, type, change, metadata, progress):
    import gguf
    from tqdm.auto import tqdm

    source, dst = open_model(src), path_of(dst, QuantizeError)
    # Vectors stay F32.
    kinds = source.tensors["shape"].map(lambda shape: type if len(shape) > 1 else "F32")
    need = int((source.tensors["n_elements"] * kinds.map(FLOATS)).sum()) + SLACK
    with written(dst, inputs=[src], need=need, model=True, error=QuantizeError) as temporary:
        writer = gguf.GGUFWriter(temporary, source.architecture)
        try:
            ftype = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16"}[type]
            metadata = metadata | {"general.file_type": int(gguf.LlamaFileType[ftype])}
            _copy_metadata(source, writer, metadata)
            for name, shape, n in source.tensors[["shape", "n_elements"]].itertuples():
                _announce(writer, name, shape, n, kinds[name])
            _write_head(writer)
            names = tqdm(kinds.index, desc=shown(dst.name), unit="tensor", disable=not progress)
            with ThreadPoolExecutor(min(WORKERS, physical_cores())) as pool:
                for name in names:
                    tensor = Tensor(name, *source.raw(name))
                    _write_tensor(writer, tensor, kinds[name], change, pool)
        except NotImplementedError:
            raise unreadable(name, source.tensors["type"][name]) from None
        finally:
            writer.close()
    return dst


def _announce(writer, name, shape, n, kind):
    from gguf import GGMLQuantizationType

    dtype = np.dtype({"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[kind])
    raw_dtype = GGMLQuantizationType.BF16 if kind == "BF16" else None
    writer.add_tensor_info(name, shape, dtype, n * FLOATS[kind], raw_dtype=raw_dtype)


def _write_tensor(writer, tensor, kind, change, pool):
    from gguf import GGMLQuantizationType

    job = partial(_block, tensor, change, GGMLQuantizationType[kind])
    _write_rows(writer, in_order(pool, job, _starts(tensor), WORKERS))


def _starts(tensor):
    """The first row of every block of a tensor."""
    return range(0, len(tensor.data), ROWS)


def _write_head(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _write_rows(writer, blocks):
    """The next tensor: bytes of blocks of its rows, padded."""
    file = writer.fout[0]
    writer.write_padding(file, file.tell())
    for block in blocks:
        file.write(block)
    writer.write_padding(file, file.tell())


def _block(tensor, change, kind, start):
    """One block of rows as it is written: bytes of the given float type."""
    import gguf

    values = dequantize(tensor.data.part(start, start + ROWS), tensor.tensor_type)
    values = change(tensor, start, values)
    return gguf.quants.quantize(values, kind).data


def in_order(pool, job, items, ahead):
    """job(item) of every item, in their order, at most `ahead` of them done or under way before one
    is taken: memory for that many."""
    waiting = deque()
    for item in items:
        waiting.append(pool.submit(job, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _copy_metadata(source, writer, metadata):
    import gguf

    for key, value in source.metadata.items():
        # One file comes out of all parts of a split one.
        if key in ("general.architecture", *metadata) or key.startswith("split."):
            continue
        if key == "general.alignment":
            writer.add_custom_alignment(value)
            continue
        kind = source.kinds[key]
        kind, inner = kind if isinstance(kind, tuple) else (kind, None)
        # The writer refuses to write an empty array.
        if kind != gguf.GGUFValueType.ARRAY or value:
            writer.add_key_value(key, value, kind, sub_type=inner)
    for key, value in metadata.items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)


def open_model(path: str | Path) -> GGUFFile:
    """The file as a GGUFFile, or a typed error."""
    try:
        return GGUFFile(path)
    except ModelLoadError as error:
        raise ModelLoadError(f"{shown(path)} is not a readable GGUF file: {error}") from error
