"""A GGUF file written tensor by tensor, with the metadata of another."""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from ..errors import QuantizeError, shown
from ..files.gguf import GGUFFile
from ..files.outputs import written
from ..files.types import TensorType
from ..gpus.cores import physical_cores

WORKERS = 4  # blocks under way at a time
SLACK = 64 << 20  # metadata, tokenizer and padding, in bytes


class Output(NamedTuple):
    """A GGUF file to be written. tensors: {name: (shape, rows first, and type)}; metadata: what it
    says otherwise than its source."""

    dst: Path
    tensors: Mapping[str, tuple[tuple[int, ...], TensorType]]
    metadata: Mapping[str, str | int] = MappingProxyType({})


def assemble(
    outputs: Sequence[Output],
    source: GGUFFile,
    blocks: Callable[[str, Executor], Iterable[Sequence[Iterable]]],
    *,
    inputs: Iterable[str | Path],
    bar: bool = True,
) -> None:
    """Write GGUF files of the same tensors in one pass, with the metadata of `source`.

    blocks(name, pool): a tensor's bytes, block after block, of each output a list of buffers.
    inputs: files that no output must be. All appear when they are whole, the last of them first.
    Raises QuantizeError."""
    from tqdm.auto import tqdm

    with ExitStack() as stack:
        files = [stack.enter_context(_begun(output, source, inputs)) for output in outputs]
        text = shown(outputs[-1].dst.name) + f" and {len(files) - 1} more" * (len(files) > 1)
        names = tqdm(outputs[0].tensors, desc=text, unit="tensor", disable=not bar)
        with ThreadPoolExecutor(min(WORKERS, physical_cores())) as pool:
            for name in names:
                _pad(files)
                for made in blocks(name, pool):
                    for (_, file), block in zip(files, made, strict=True):
                        file.writelines(block)
                _pad(files)


@contextmanager
def _begun(output, source, inputs):
    """(writer, file) of an output whose header is written."""
    import gguf

    sizes = {name: _bytes(shape, kind) for name, (shape, kind) in output.tensors.items()}
    need = sum(sizes.values()) + SLACK
    options = dict(inputs=inputs, need=need, model=True, error=QuantizeError)
    with written(output.dst, **options) as temporary:
        writer = gguf.GGUFWriter(temporary, source.architecture)
        try:
            _copy_metadata(source, writer, output.metadata)
            for name, (shape, kind) in output.tensors.items():
                add = writer.add_tensor_info
                add(name, shape, np.dtype(np.float32), sizes[name], raw_dtype=kind.number)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            yield writer, writer.fout[0]
        finally:
            writer.close()


def _pad(files):
    for writer, file in files:
        writer.write_padding(file, file.tell())


def _bytes(shape, kind):
    return int(np.prod(shape)) // kind.block * kind.size


def in_order(
    pool: Executor, job: Callable[[Any], Any], items: Iterable, ahead: int
) -> Iterable[Any]:
    """job(item) of every item, in their order, at most `ahead` of them done or under way before one
    is taken: memory for that many."""
    waiting: deque = deque()
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
