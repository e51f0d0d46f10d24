"""A GGUF file written tensor by tensor, with the metadata of another."""

import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import gguf
import numpy as np
from gguf import GGUFValueType

from ..errors import QuantizeError, shown
from ..files.gguf import GGUFFile
from ..files.header import SCALARS
from ..files.outputs import written
from ..files.types import TensorType
from ..gpus.cores import physical_cores
from ..reading import Rows

JOB = 1 << 20  # weights that a thread has before it takes others: a tenth of a second of k-quants
# Jobs per thread that are done or under way before the oldest is written. Between two tensors that
# are quantized anew lie others of their layer, copied in no time: with two, one thread did it all.
AHEAD = 16
SLACK = 64 << 20  # metadata, tokenizer and padding, in bytes


class Output(NamedTuple):
    """A GGUF file to be written. tensors: {name: (shape, rows first, and type)}; metadata: what it
    says otherwise than its source."""

    dst: Path
    tensors: Mapping[str, tuple[tuple[int, ...], TensorType]]
    metadata: Mapping[str, str | int] = MappingProxyType({})


class Writer(gguf.GGUFWriter):
    """gguf's own takes 1.5 µs for each value of an array: a vocabulary and its merges are 100,000
    of them, in every file. Here they are packed together."""

    def _pack_val(self, val, vtype, add_vtype, sub_type=None):
        if vtype != GGUFValueType.ARRAY or not (
            sub_type == GGUFValueType.STRING or sub_type in SCALARS
        ):
            return super()._pack_val(val, vtype, add_vtype, sub_type)
        if sub_type in SCALARS:
            packed = np.array(val, f"<{SCALARS[sub_type]}").tobytes()
        else:
            words = (one.encode() if isinstance(one, str) else one for one in val)
            packed = b"".join(part for one in words for part in (struct.pack("<Q", len(one)), one))
        kinds = (vtype, sub_type) if add_vtype else (sub_type,)
        return struct.pack(f"<{len(kinds)}IQ", *kinds, len(val)) + packed


def assemble(
    outputs: Sequence[Output],
    source: GGUFFile,
    jobs: Callable[[str], Iterable[Callable[[], Sequence[Iterable]]]],
    *,
    inputs: Iterable[str | Path],
    bar: bool = True,
) -> None:
    """Write GGUF files of the same tensors in one pass, with the metadata of `source`.

    jobs(name): what a tensor's bytes are made by, in their order: each, called in a thread, makes
    the next of them, of each output a list of buffers. Threads do not wait for the end of a tensor:
    many are no larger than one job. inputs: files that no output must be. All appear when they are
    whole, the last of them first. Raises QuantizeError."""
    from tqdm.auto import tqdm

    with ExitStack() as stack:
        files = [stack.enter_context(_begun(output, source, inputs)) for output in outputs]
        text = shown(outputs[-1].dst.name) + f" and {len(files) - 1} more" * (len(files) > 1)
        names = outputs[0].tensors
        done = stack.enter_context(
            tqdm(total=len(names), desc=text, unit="tensor", disable=not bar)
        )
        every = ((name, job) for name in names for job in jobs(name))
        for _, parts in groupby(_in_order(every), key=lambda part: part[0]):
            _pad(files)
            for _, made in parts:
                for (_, file), block in zip(files, made, strict=True):
                    file.writelines(block)
            _pad(files)
            done.update()


def cut(tensor: Rows, width: int, start: int = 0, stop: int | None = None) -> Iterator[range]:
    """The rows of each job on a tensor with so many weights in a row: JOB weights, or one row."""
    stop, step = len(tensor) if stop is None else stop, max(1, JOB // width)
    return (range(at, min(at + step, stop)) for at in range(start, stop, step))


def copied(tensor: Rows, rows: range) -> Sequence[Iterable]:
    """Some rows as they are: what a job of one output returns."""
    return [[tensor[rows.start : rows.stop].data]]


@contextmanager
def _begun(output, source, inputs):
    """(writer, file) of an output whose header is written."""
    sizes = {name: _bytes(shape, kind) for name, (shape, kind) in output.tensors.items()}
    need = sum(sizes.values()) + SLACK
    options = dict(inputs=inputs, need=need, model=True, error=QuantizeError)
    with written(output.dst, **options) as temporary:
        writer = Writer(temporary, source.architecture)
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


def _in_order(jobs):
    """(name, what job() returns) of every (name, job), in their order, on all cores."""
    threads, waiting = physical_cores(), deque()
    with ThreadPoolExecutor(threads) as pool:
        for name, job in jobs:
            waiting.append((name, pool.submit(job)))
            if len(waiting) > AHEAD * threads:
                name, oldest = waiting.popleft()
                yield name, oldest.result()
        while waiting:
            name, oldest = waiting.popleft()
            yield name, oldest.result()


def _copy_metadata(source, writer, metadata):
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
