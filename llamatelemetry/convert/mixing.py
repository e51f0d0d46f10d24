"""A mixture from what is there: tensors of one file as they are, others quantized anew."""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from gguf import GGMLQuantizationType

from ..errors import QuantizeError, shown
from ..files.gguf import GGUFFile
from ..files.outputs import path_of
from ..files.types import TensorType, dequantize, tensor_type
from .chunks import NEVER, PART, chunk, needs_weights
from .expand import FLOATS, open_model
from .writing import Output, assemble, copied, cut

# What an importance matrix does not change.
UNWEIGHED = ("Q8_0", *FLOATS)


def mix(
    base: str | Path,
    source: str | Path,
    dst: str | Path,
    tensor_types: Mapping[str, str],
    imatrix: str | Path | None = None,
    progress: bool = True,
) -> Path:
    """Make a mixture without quantizing anew what is there: every tensor of `base` byte for byte,
    but those to which `tensor_types` gives another type than they have, which are quantized from
    `source` by the engine's own code.

    tensor_types: as for quantize(), {regular expression on tensor names: type}, first match wins.
    Where `base` was made from `source` by llama-quantize, all tensors are those that it would make
    with these types, in the time of a copy. imatrix: the one that `base` was made with; then only
    Q8_0 and floats can be given, which it does not change. Metadata: that of `base`. Returns the
    path of `dst`. Raises ModelNotFoundError, ModelLoadError or QuantizeError."""
    old, new = open_model(base), open_model(source)
    for pattern in tensor_types:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise QuantizeError(
                f"tensor_types: {pattern!r:.80} is no regular expression ({error})."
            ) from None
    given = {name: _given(name, tensor_types) for name in old.tensors.index}
    plan, changed = {}, {}
    for name, (kind, shape) in zip(old.tensors.index, old.tensors[["type", "shape"]].to_numpy()):
        wanted = (given[name] or kind).upper()
        if wanted == kind:
            plan[name] = shape, old.raw(name)[1]
        else:
            changed[name] = _type(name, wanted, shape, new, imatrix)
            plan[name] = shape, changed[name]

    def jobs(name):
        rows, kind, shape = (new if name in changed else old).raw(name)
        job = partial(copied, rows)
        if name in changed:
            job = partial(_quantized, rows, kind, changed[name], max(1, PART // shape[-1]))
        return (partial(job, part) for part in cut(rows, shape[-1]))

    dst = path_of(dst, QuantizeError)
    assemble([Output(dst, plan)], old, jobs, inputs=[base, source], bar=progress)
    return dst


def _given(name, tensor_types):
    return next((kind for pattern, kind in tensor_types.items() if re.search(pattern, name)), None)


def _type(name: str, wanted: str, shape: tuple, source: GGUFFile, imatrix) -> TensorType:
    """The type that a tensor is to have, or QuantizeError."""
    why = None
    if wanted not in GGMLQuantizationType.__members__ or wanted in NEVER:
        raise QuantizeError(f"{name}: {wanted!r} is no type of a tensor: Q8_0, Q4_K, F16, ...")
    kind = tensor_type(GGMLQuantizationType[wanted].value)
    if name not in source.tensors.index or source.tensors["shape"][name] != shape:
        why = f"{shown(source.path)} has no such tensor of the shape {shape}"
    elif len(shape) < 2:
        why = "vectors stay as they are"
    elif not kind.block or shape[-1] % kind.block:
        why = f"{wanted} packs {kind.block} weights of a row, and {shape[-1]} are no multiple of it"
    elif needs_weights(kind):
        why = f"{wanted} needs an importance matrix: use quantize()"
    elif imatrix is not None and wanted not in UNWEIGHED:
        why = f"an importance matrix changes {wanted}: use quantize()"
    if why:
        raise QuantizeError(f"{name} cannot be made {wanted}: {why}.")
    return kind


def _quantized(rows, kind, wanted, step, part):
    """Some rows, `step` at a time dequantized from `kind` and quantized to `wanted`."""
    parts = (rows.part(at, min(at + step, part.stop)) for at in part[::step])
    return [[chunk(dequantize(some, kind), wanted).data for some in parts]]
