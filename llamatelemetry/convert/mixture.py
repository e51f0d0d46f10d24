"""A file of a given size that diverges least: what each group of tensors costs at each type is
measured, and the mixture chosen, made and measured again on another text."""

import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ..arguments import finite, whole
from ..compare.comparison import Comparison, compare_quantizations
from ..compare.paired import Paired, paired
from ..compare.texts import load_text
from ..errors import QuantizeError
from ..files.gguf import GGUFFile
from ..files.outputs import path_of
from ..files.scratch import ScratchFile
from ..gpus.cores import physical_cores
from .choice import BASE, TYPES, at_random, block, least, options, tensor_types
from .expand import open_model, output
from .mixing import mix
from .quantize import made_from, quantize
from .reckoning import FLOW, PER_CORE, SLOWEST, speed

GROUPS = "attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down embedding".split()
TOGETHER = 1 << 30  # bytes of files that lie there at a time, or one file


class Costs(NamedTuple):
    """table: choice.options with kld (mean, of the file with that group alone at that type) and
    cost (kld less that of the file that is all BASE); base: that file, kld: its mean KLD; seconds:
    what was reckoned before it began; left: types for which there was no time, with what they would
    have taken."""

    table: pd.DataFrame
    base: Path
    kld: float
    seconds: float
    left: dict[str, float]


class Recommendation(NamedTuple):
    """types: {group: what is inside}; tensor_types: {pattern: type}, as quantize() takes it;
    size_bytes: of the file; kld: expected, if costs add up; rows: the chosen ones of
    Costs.table."""

    types: dict[str, str]
    tensor_types: dict[str, str]
    size_bytes: int
    kld: float
    rows: pd.DataFrame


def group_costs(
    reference: str | Path,
    folder: str | Path,
    text: str | Path | None = None,
    *,
    base: str | Path | None = None,
    types: Iterable[str] = TYPES,
    n_ctx: int = 512,
    max_windows: int | None = 1,
    seconds: float = 60,
    progress: bool = True,
) -> Costs:
    """What every group of tensors (attention q, k, v and output, FFN gate, up and down, embedding
    and output) costs at each type: the mean KLD from the reference of a file in which that group
    alone has it and everything else is Q8_0, less that of the file that is all Q8_0 (nats).

    base: the reference's Q8_0 file; None makes one in `folder` (over 1 GB: in scratch). The files
    with one group apart lie in scratch, one GiB or one file at a time, and are removed.
    text: as for compare_quantizations; what is recommended is to be measured on another. seconds:
    how long it may take; the time is reckoned from the first comparison, and types that would go
    beyond it are left out, the last first. Raises QuantizeError where not even one type is left,
    with what it would take."""
    finite("seconds", seconds, 0, error=QuantizeError)
    source = open_model(reference)
    types = list(dict.fromkeys([types] if isinstance(types, str) else types))
    if not types:
        raise QuantizeError(f"types is empty: name one at least, as {', '.join(TYPES)}.")
    for kind in types:
        block(kind)  # says what is none before anything is made
    # Before anything is made: for every group there is at least a copy of the base.
    copies = len(GROUPS) * 2 * _size(source) / FLOW
    _time_for(dict.fromkeys(types, copies), seconds)
    base = _base(source, folder, progress) if base is None else path_of(base, QuantizeError)
    settings: dict[str, Any] = dict(n_ctx=n_ctx, max_windows=max_windows, progress=progress)
    settings["text"] = load_text(text)
    begun = time.perf_counter()
    plain = compare_quantizations(source.path, {BASE: base}, **settings)
    once = time.perf_counter() - begun
    tensors = GGUFFile(base).tensors
    need = {kind: _seconds(options(tensors, [kind]), GGUFFile(base), once) for kind in types}
    need, left = _time_for(need, seconds)
    table = options(tensors, need)
    table["kld"] = float(plain["kld_mean"].iloc[0])
    unmeasured = table.index[table["type"] != BASE]
    parts = -(-len(unmeasured) // _together(base.stat().st_size))
    for some in np.array_split(unmeasured, parts) if parts else ():
        made = {str(n): ScratchFile(f"group-{n}.gguf", base.stat().st_size) for n in some}
        try:
            for n, file in zip(some, made.values()):
                alone = tensor_types(table.loc[[n]])
                mix(base, source.path, file.path, alone, progress=False)
            paths = {name: file.path for name, file in made.items()}
            found = compare_quantizations(source.path, paths, **settings)
        finally:
            for file in made.values():
                file.remove()
        table.loc[some, "kld"] = found["kld_mean"].to_numpy()
    table = table[np.isfinite(table["kld"])]  # without those that llama.cpp could not compare
    own = float(plain["kld_mean"].iloc[0])
    return Costs(table.assign(cost=table["kld"] - own), base, own, sum(need.values()), left)


def _time_for(need, seconds):
    """What can be had within some seconds, the last left out first, and what is left out."""
    need, left = dict(need), {}
    while sum(need.values()) > seconds and need:
        left |= dict([need.popitem()])
    if not need:
        raise QuantizeError(
            f"Measuring what each group of tensors costs takes {min(left.values()):.2g} s or more for one type, "
            f"and seconds={seconds:g} allows less: allow more, or name fewer types."
        )
    return need, left


def _base(source, folder, progress):
    there = partial(made_from, inputs=[source.path])
    path = output(f"{source.path.stem}-{BASE}.gguf", _size(source), folder, there)
    if not there(path):
        quantize(source.path, path, BASE, progress=progress)
    return path


def _size(source):
    from ..gpus.fit import as_type

    return as_type(source, BASE).size_bytes


def _together(size):
    """How many files of a size lie there at a time."""
    return max(1, TOGETHER // size)


def _seconds(rows, base, once):
    """Reckoned seconds for one type of all groups: their weights quantized, the base copied, and
    the comparison as it was timed, half of which was the reference's, which is kept."""
    own, weights = rows[rows["type"] != BASE], base.tensors["n_elements"]
    each = [(kind, weights[name]) for given in own["tensors"] for name, kind in given.items()]
    work = sum(n / PER_CORE.get(kind, SLOWEST) for kind, n in each if kind != BASE)
    copies = len(own) * 2 * base.size_bytes / FLOW
    return work / (physical_cores() * speed()) + copies + once / 2 * len(own)


def recommend(size_bytes: float, costs: Costs) -> Recommendation:
    """The mixture of least divergence in a file of at most so many bytes: an exact integer program
    over the measured costs of each group at each type, which are taken to add up.

    costs: of group_costs. `make` writes the file; whether the costs add up in it and whether it is
    better than others of its size, compare_quantizations and `verdicts` say. Raises
    QuantizeError for a size below the smallest mixture."""
    finite("size_bytes", size_bytes, 1, error=QuantizeError)
    return _recommendation(least(costs.table, size_bytes - _rest(costs)), costs)


def smallest(costs: Costs) -> int:
    """Bytes of the smallest file that can be asked for."""
    return _rest(costs) + int(costs.table.groupby("group")["bytes"].min().sum())


def frontier(costs: Costs, sizes: int = 24) -> dict[int, float]:
    """{bytes: expected mean KLD} of the best mixtures from the smallest size to all Q8_0."""
    ends = smallest(costs), costs.base.stat().st_size
    found = [recommend(size, costs) for size in np.linspace(*ends, sizes)]
    return {one.size_bytes: one.kld for one in found}


def random_mixture(size_bytes: float, costs: Costs, seed: int = 0) -> Recommendation:
    """A mixture of the size of recommend()'s, drawn at random from the same types: its control."""
    chosen = recommend(size_bytes, costs).rows
    whole("seed", seed, 0, error=QuantizeError)
    return _recommendation(at_random(costs.table, size_bytes - _rest(costs), chosen, seed), costs)


def _rest(costs):
    """Bytes of a file that no choice changes."""
    rows = costs.table
    return costs.base.stat().st_size - int(rows.loc[rows["type"] == BASE, "bytes"].sum())


def _recommendation(rows, costs):
    size = _rest(costs) + int(rows["bytes"].sum())
    types = dict(zip(rows["group"], rows["inside"]))
    return Recommendation(
        types, tensor_types(rows), size, costs.kld + float(rows["cost"].sum()), rows
    )


def make(chosen: Recommendation, costs: Costs, reference: str | Path, dst: str | Path) -> Path:
    """The mixture as a file, tensors that stay Q8_0 copied: the bytes that llama-quantize makes
    with these types. Returns its path."""
    return mix(
        costs.base, reference, path_of(dst, QuantizeError), chosen.tensor_types, progress=False
    )


def verdicts(found: Comparison, name: str, floor: float = 0.0, seed: int = 0) -> dict[str, Paired]:
    """Is one file of a comparison closer to the reference than each of the others: {other: Paired},
    "less" where `name` diverges less. By whole windows (paired.paired)."""
    tokens = {one: part for one, part in found.tokens.groupby("candidate", sort=False)}
    mine = tokens[name]
    return {
        other: paired(mine["kld"], theirs["kld"], mine["window"], seed, floor)
        for other, theirs in tokens.items()
        if other != name
    }
