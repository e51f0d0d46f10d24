"""A reference's logits over a text, kept in scratch: the next comparison with it on the same text
reads them instead of computing the reference again."""

import hashlib
from typing import Any

from ..errors import LlamaTelemetryError
from ..files.gguf import GGUFFile
from ..files.outputs import split_parts
from ..files.places import free_bytes
from ..files.scratch import scratch

LARGEST, ROOM = 512 << 20, 1 << 30  # bytes of one text's logits, and of all that are kept
_NAME = "kept-{}.logits"


def place(job: dict[str, Any], rows: int, where: dict[str, Any]) -> str | None:
    """Where the logits of a comparison's reference are kept: a path, and they are there if the file
    is.

    job: as jobs.measure_all has it; rows: of logits, at most; where: the devices that compute them.
    The name is a digest of all that they depend on: the file as it is now, the text, the windows,
    the devices. None where they are too large, scratch has no room, or nobody can read the file.
    The oldest others go where all would be over ROOM."""
    try:
        need = 4 * rows * GGUFFile(job["reference"]).n_vocab
        parts = [(str(part), part.stat()) for part in split_parts(job["reference"])]
        if need > LARGEST or 4 * need > free_bytes(scratch()):
            return None
    except (LlamaTelemetryError, OSError):
        return None  # llama.cpp says what is wrong with it
    states = [(name, at.st_ino, at.st_size, at.st_mtime_ns) for name, at in parts]
    depends = [job.get(name) for name in ("text", "special", "n_ctx", "max_windows", "gpu_layers")]
    digest = hashlib.sha256(repr((states, depends, sorted(where.items()))).encode())
    path = scratch() / _NAME.format(digest.hexdigest()[:24])
    others = [one for one in scratch().glob(_NAME.format("*")) if one != path]
    others.sort(key=lambda one: one.stat().st_mtime_ns, reverse=True)
    while others and need + sum(one.stat().st_size for one in others) > ROOM:
        others.pop().unlink()
    return str(path)
