"""Where a model goes, by what the driver says is free now."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from . import devices
from .fit import MIB, Asked, as_type, fit, mend, ways_out

if TYPE_CHECKING:
    from ..files.gguf import GGUFFile


@dataclass(frozen=True)
class Place:
    """Where a model goes, beside what is there already. fits: does it go anywhere; tensor_split:
    what load_model takes, None where there is no GPU or no room; gpus: the Gpus that get a part of
    it; need_bytes: of all its processes, on all of them; sentence: that with numbers, and what
    would fit where it does not (also str())."""

    fits: bool
    tensor_split: str | None
    gpus: tuple[devices.Gpu, ...]
    need_bytes: int
    sentence: str

    def __str__(self) -> str:
        return self.sentence


def place(
    gguf: "GGUFFile",
    ctx_size: int = 4096,
    *,
    kind: str | None = None,
    n_parallel: int = 1,
    capture: bool = True,
    server: bool = False,
    ours: dict[int, int] | None = None,
) -> Place:
    """Where one more model goes, by what the driver says is free now: the analytics GPU alone,
    another alone, over all of them with layers according to their room, or nowhere; without GPUs
    the machine's memory counts.

    kind: of a file that is yet to be made from `gguf` ("F16", "Q4_K_M": `as_type`). capture,
    server: what is needed of it. ours: {GPU's index: bytes} that closing what is loaded would
    give back, for the sentence. Returns a Place for load_model(tensor_split=place.tensor_split)."""
    gguf = as_type(gguf, kind) if kind else gguf
    cards, analytics = devices.visible_gpus(), devices.plan().analytics
    if not cards:
        found = fit(gguf, ctx_size, n_parallel, capture=capture, server=server, gpu=False)
        return Place(found.fits, None, (), found.need_bytes, found.sentence)
    asked = Asked(gguf, ctx_size, n_parallel, server, capture, True, 1.0, True)
    need, who = asked.total(), " and ".join(asked.needs())
    said = f"{gguf.called}, {need / MIB:,.0f} MiB for the {who} at {ctx_size:,} tokens,"
    if dealt := _dealt(asked, cards, analytics):
        used = [(card, part) for card, (_, part) in zip(cards, dealt) if part]
        where = [f"GPU {card.index} ({part / MIB:,.0f} of {_free(card)})" for card, part in used]
        split = _split([count for count, _ in dealt])
        need = sum(part for _, part in used)
        gpus = tuple(card for card, _ in used)
        return Place(True, split, gpus, need, f"{said} goes to {' and '.join(where)}.")
    ways = list(ways_out(asked, lambda other: bool(_dealt(other, cards, analytics))))
    back = [card.free_bytes + (ours or {}).get(card.index, 0) for card in cards]
    closed = [replace(card, free_bytes=free) for card, free in zip(cards, back)]
    if closed != cards and _dealt(asked, closed, analytics):
        ways.insert(0, "the same once the model that is loaded is closed")
    there = ", ".join(f"GPU {card.index} has {_free(card)}" for card in cards)
    sentence = f"{said} fits nowhere: {there}. {mend(ways)}"
    return Place(False, None, (), need, sentence)


def _free(card):
    return f"{card.free_bytes / MIB:,.0f} MiB free"


def _dealt(asked, cards, analytics):
    """[(layers, bytes)] of each card, the output counted as one more layer after the last: all on
    one, the analytics GPU first, else over all so that they are filled alike. [] where there is no
    room."""
    every = asked.gguf.n_layer + 1
    for chosen in sorted(cards, key=lambda card: card.uuid != analytics.uuid):
        if (need := asked.total()) <= chosen.free_bytes:
            return [(every, need) if card is chosen else (0, 0) for card in cards]
    for filled in range(1, 21) if len(cards) > 1 else ():
        dealt, left = [], every
        for card in cards:
            parts = ((count, asked.part(count, count == left)) for count in range(left, 0, -1))
            room = card.free_bytes * filled / 20
            dealt.append(next((part for part in parts if part[1] <= room), (0, 0)))
            left -= dealt[-1][0]
        if not left:
            return dealt
    return []


def _split(counts):
    """The shares that make llama.cpp deal out so. It compares fractions in single precision: each
    bound lies between two layers."""
    shares, used = list(counts), [number for number, count in enumerate(counts) if count]
    shares[used[0]] -= 0.5
    shares[used[-1]] += 0.5
    return ",".join(f"{share / sum(counts):.4g}" for share in shares)
