"""Where the models of a comparison go: a reference and a candidate on a GPU each, both over all of
them, or one after the other."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ..files import hub
from ..files.gguf import GGUFFile
from ..gpus import devices
from ..gpus.fit import CONTEXT_BYTES, fit
from ..gpus.placing import place

# Bytes beside the weights: two copies of 256 rows of logits for a vocabulary of 262,144, KV cache.
BUFFERS = 640 << 20
SHARE, SPREAD = 0.8, 0.9  # of one memory, of several GPUs' that whole layers do not quite fill


class Placing(NamedTuple):
    """Candidates that are compared in one process. reference, own: how much of the reference's and
    of a candidate's layers each GPU gets, None where there is one or none; apart: the reference's
    logits are kept, and it goes before a candidate comes; gpus: what the process sees."""

    candidates: list[str]
    reference: list[float] | None = None
    own: list[float] | None = None
    apart: bool = False
    gpus: tuple[devices.Gpu, ...] = ()


def placed(
    reference: str,
    candidates: list[str],
    gpu_layers: int | None = None,
    beside: Mapping[str, int] | None = None,
    rows: int | None = None,
) -> list[Placing]:
    """How candidates are compared with a reference within the memory that is free now: as many at a
    time as fit beside it, since it is decoded once for all of them. Where it would have to be read
    again for those that do not, its logits are kept instead if they are less: `rows` of them.
    beside: {path: bytes} for more contexts of a file than one."""
    import psutil

    more = {path: BUFFERS + (beside or {}).get(path, 0) for path in candidates}
    # The reference among the candidates shares its weights.
    need = {path: n + hub.size_of(path) * (path != reference) for path, n in more.items()}
    whole = hub.size_of(reference) + BUFFERS + more.get(reference, 0)
    largest = max(need.values())
    cards = devices.visible_gpus() if gpu_layers != 0 else []
    rooms = [max(card.free_bytes - CONTEXT_BYTES, 0) for card in cards]
    if len(cards) > 1:
        for one, other in ((a, b) for a in range(len(cards)) for b in range(len(cards)) if a != b):
            if whole <= rooms[one] and largest <= rooms[other]:
                first, second = np.eye(len(cards))[[one, other]].tolist()
                groups = _groups(candidates, need, rooms[other])
                return [Placing(group, first, second, gpus=tuple(cards)) for group in groups]
        shares = [room / (sum(rooms) or 1) for room in rooms]
        where: dict[str, Any] = dict(reference=shares, own=shares, gpus=tuple(cards))
        room = SPREAD * sum(rooms)
    else:
        # One GPU's buffers are in what is measured as free; the machine's pages can be given back.
        where = dict(gpus=devices.plan().inference if cards else ())
        room = SHARE * (cards[0].free_bytes if cards else psutil.virtual_memory().available)
    apart = whole + largest > room
    groups = _groups(candidates, need, 0 if apart else room - whole)
    again = (len(groups) - 1) * hub.size_of(reference)
    if again and rows and 4 * rows * GGUFFile(reference).n_vocab < again:
        apart = True
    if apart:
        groups = [candidates]  # one after the other, over logits that are made once
    return [Placing(group, apart=apart, **where) for group in groups]


def _groups(paths, need, room):
    groups, used = [[]], 0
    for path in paths:
        if groups[-1] and used + need[path] > room:
            groups.append([])
            used = 0
        groups[-1].append(path)
        used += need[path]
    return groups


def split_for(file: GGUFFile, ctx_size: int = 512, capture: bool = True) -> str | None:
    """load_model's tensor_split for a model that needs more than the inference GPU has: over all of
    them, by their room. None where that GPU, or the machine without one, is enough."""
    if len(devices.visible_gpus()) < 2:
        return None
    if fit(file, ctx_size, capture=capture, server=not capture).fits:
        return None
    return place(file, ctx_size, capture=capture, server=not capture).tensor_split
