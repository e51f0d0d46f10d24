"""Which parts of a quantized model to keep at higher precision, and which file to take. Pure
functions on tables."""

import re

import numpy as np
import pandas as pd

from ..compare.quality import NOISE
from .tracing import PARTS

# Tensors behind each part, as a regular expression for `--tensor-type`.
TENSORS = {
    "attn_out": r"attn_(q|k|v|qkv|output|gate|q_a|q_b|kv_a_mqa|kv_b|k_b|v_b)",
    "ffn_out": r"ffn_(up|gate|down|gate_up)(_exps|_shexp|_chexps)?",
}


def recommend(
    costs: pd.DataFrame, tensors: pd.DataFrame, keep: int = 8, type: str = "Q8_0", bits: float = 8.5
) -> pd.DataFrame:
    """The parts to keep at higher precision: those that cost the answer most per byte that keeping
    them adds.

    costs: a cost_map; tensors: GGUFFile.tensors of the quantized file; keep: at most so many parts.
    DataFrame: part, layer, cost, bytes_added, cost_per_MiB, pattern (a regular expression on tensor
    names), type: see explicit_types."""
    rows = []
    for part, layer, cost in costs[["part", "layer", "cost"]].itertuples(index=False):
        pattern = rf"blk\.{layer}\.{TENSORS[part]}\.weight"
        own = tensors[tensors.index.str.fullmatch(pattern)]
        added = float((own["n_elements"] * np.maximum(bits - own["bits_per_weight"], 0)).sum() / 8)
        if cost > 0 and added > 0:
            rows.append((PARTS[part], layer, cost, int(added), cost / added * 2**20, pattern, type))
    table = pd.DataFrame(
        rows, columns=["part", "layer", "cost", "bytes_added", "cost_per_MiB", "pattern", "type"]
    )
    return table.sort_values("cost_per_MiB", ascending=False).head(keep).reset_index(drop=True)


def control(
    costs: pd.DataFrame,
    tensors: pd.DataFrame,
    chosen: pd.DataFrame,
    type: str = "Q8_0",
    bits: float = 8.5,
) -> pd.DataFrame:
    """As many parts of each kind as were chosen, the cheapest of those left: what the
    recommendation must beat."""
    everything = recommend(costs, tensors, keep=len(costs), type=type, bits=bits)
    left = everything[~everything["pattern"].isin(chosen["pattern"])].sort_values("cost")
    parts = [
        left[left["part"] == part].head(n) for part, n in chosen["part"].value_counts().items()
    ]
    # Without rows where no part of the kind is left.
    return pd.concat([left.head(0), *parts], ignore_index=True)


def explicit_types(tensors: pd.DataFrame, chosen: pd.DataFrame) -> dict[str, str]:
    """The chosen parts at their type and every other quantized matrix at the type it has: {pattern:
    type}, in order.

    Naming the chosen parts alone would change others too: llama-quantize's mixtures count the
    layers that they choose a type for, and a type given by hand is not counted. tensors:
    GGUFFile.tensors; chosen: a recommendation."""
    kept = dict(zip(chosen["pattern"], chosen["type"], strict=True))
    matrices = tensors[
        (tensors["shape"].map(len) > 1) & ~tensors["type"].isin(["F32", "F16", "BF16"])
    ]
    return kept | {f"^{re.escape(name)}$": kind for name, kind in matrices["type"].items()}


def with_costs(quality: pd.DataFrame, speed: pd.DataFrame) -> pd.DataFrame:
    """What each file loses and what it costs: a Comparison's rows joined with bench_all's, and
    memory_bytes (on the GPU where the driver reports any, else resident), seconds_per_token."""
    table = pd.DataFrame(quality).join(speed)
    on_gpu = table["gpu_bytes"] > 0
    table["memory_bytes"] = table["gpu_bytes"].where(on_gpu, table["resident_bytes"])
    return table.assign(seconds_per_token=1 / table["generation_tps"])


def megabytes(table: pd.DataFrame) -> pd.DataFrame:
    """A table to be shown: its columns of bytes in MB, and named so."""
    columns = [name for name in table if name.endswith("_bytes")]
    shown = table.assign(**{name: table[name] / 1e6 for name in columns})
    return shown.rename(columns={name: name.removesuffix("bytes") + "MB" for name in columns})


def pareto(table: pd.DataFrame, cost: str, loss: str = "kld_mean") -> pd.Series:
    """True for rows that no other row beats in both: at most its cost and at most its loss, and one
    of them less.

    cost, loss: columns where less is better. NaN is never on the front. Boolean Series.
    """
    values = table[[cost, loss]].to_numpy(dtype=float)
    front = []
    for row in values:
        no_worse, better = (values <= row).all(axis=1), (values < row).any(axis=1)
        front.append(not np.isnan(row).any() and not (no_worse & better).any())
    return pd.Series(front, index=table.index, name="pareto", dtype=bool)


def steps(
    table: pd.DataFrame, need: str = "memory_bytes", loss: str = "kld_mean"
) -> tuple[list[float], list[float]]:
    """Where a decision can turn: the memory that each file needs, and for each file's divergence
    the least number of one digit that is no less."""
    return sorted(np.ceil(table[need])), sorted(set(map(_round_above, table[loss])))


def _round_above(value):
    near = float(f"{value:.0e}")
    digit = 10.0 ** np.floor(np.log10(abs(value) or 1.0))
    return near if near >= value else float(f"{near + digit:.0e}")


def decide(
    table: pd.DataFrame,
    memory: list[float],
    limits: list[float],
    need: str = "memory_bytes",
    loss: str = "kld_mean",
) -> pd.DataFrame:
    """Given this much memory and at most this much divergence, which file: DataFrame (memory,
    limit) of names.

    memory: budgets in bytes; limits: largest mean KL divergence in nats. The fitting file with the
    least divergence, or "none" where there is none."""

    def best(budget, limit):
        fits = table[(table[need] <= budget) & (table[loss] <= limit)]
        return fits[loss].idxmin() if len(fits) else "none"

    return pd.DataFrame(
        [[best(budget, limit) for limit in limits] for budget in memory],
        index=pd.Index(memory, name="memory_bytes"),
        columns=pd.Index(limits, name="kld at most"),
    )


def ladder(
    table: pd.DataFrame, by: str = "bits_per_weight", loss: str = "kld_mean"
) -> list[tuple[str, str]]:
    """Neighbouring pairs out of order, more bits per weight yet more divergence by more than NOISE:
    list of (larger, smaller)."""
    ordered = table.dropna(subset=[by, loss]).sort_values([by, loss], ascending=[True, False])
    rows = list(zip(ordered.index, ordered[by], ordered[loss]))
    return [
        (larger, smaller)
        for (smaller, few, little), (larger, many, much) in zip(rows, rows[1:])
        if many > few and much - little > NOISE
    ]
