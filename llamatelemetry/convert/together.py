"""A stand-in and its quantizations, made in one pass over the file that they come from."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

from gguf import GGMLQuantizationType, LlamaFileType

from ..files.gguf import GGUFFile
from ..files.registry import TYPES
from ..files.types import TensorType, engine_library, tensor_type
from ..gpus.fit import as_type
from .expand import FLOATS, output, quantized_types, reference_type, stand_in, stand_in_name
from .quantize import dry_run, made_from, place_of, targets, wants_imatrix


def reference_for(
    file: GGUFFile, folder: str | Path, seed: int = 0, types: Iterable[str | Path] = ()
) -> GGUFFile:
    """What quantizations of a model are compared with: the file itself where its matrices are
    floats, else its stand-in of reference_type, made unless it is there (one of another file of
    that name is not it): into `folder`, or into scratch where it is over 1 GB (`expand.output`).

    types: what quantizations() will be asked for. Those that need no importance matrix are made of
    the stand-in while its weights are at hand, by the engine's own code, and lie where
    quantizations() looks: the same tensors as llama-quantize makes of it, and nothing is read
    twice. Errors: make_reference's."""
    if not quantized_types(file):
        return file
    kind = reference_type(file)
    size, name = as_type(file, kind).size_bytes, f"{file.path.stem}-noise-{seed}-{kind}.gguf"
    there = partial(made_from, inputs=[file.path], called=stand_in_name(file, seed))
    path = output(name, size, folder, there)
    if not there(path):
        planned = ((each, _plan(file, str(each), kind)) for each in types)
        beside = [(place_of(each, file, folder), *plan) for each, plan in planned if plan]
        stand_in(file.path, path, seed, True, kind, beside)
        for made, *_ in beside:
            made.touch()  # no older than what it was made from
    return GGUFFile(path)


def _plan(file: GGUFFile, kind: str, floats: str) -> tuple[int, dict[str, TensorType]] | None:
    """(general.file_type, {tensor: its type}) of a quantization of the stand-in; None where
    llama-quantize has to make it, or nobody."""
    name = f"MOSTLY_{kind.upper()}"
    if (
        kind.upper() not in TYPES
        or engine_library() is None
        or name not in LlamaFileType.__members__
    ):
        return None
    words = dry_run(file.path, kind)
    if wants_imatrix(words):
        return None
    wanted, types = targets(words), {}
    for tensor, shape in file.tensors["shape"].items():
        own = "F32" if len(shape) < 2 else wanted.get(tensor, "")
        if len(shape) > 1 and own in FLOATS:  # what is never quantized stays as the stand-in has it
            own = floats
        if own not in GGMLQuantizationType.__members__:
            return None
        types[tensor] = tensor_type(GGMLQuantizationType[own].value)
    return LlamaFileType[name].value, types
