"""Which parts of a quantized model cost the answer, and which file to take. Pure functions."""

import re

import numpy as np
import pandas as pd

from ..capture.finite import measured
from ..compare.quality import Reference
from ..maths import ratio

# Nats. A mean divergence below this cannot be told from 0: logits are 32-bit floats, whose sums are
# off by about 1e-6.
NOISE = 1e-5
PARTS = {"attn_out": "attention", "ffn_out": "FFN"}
# Tensors behind each part, as a regular expression for `--tensor-type`.
TENSORS = {"attn_out": r"attn_(q|k|v|qkv|output)", "ffn_out": r"ffn_(up|gate|down)"}


def kl(base, logits, targets=None):
    """KL divergence of each position's prediction from the reference's, nats (token,). base,
    logits: (token, vocab)."""
    base, logits = measured(base), measured(logits)
    targets = np.zeros(len(base), int) if targets is None else targets
    return np.concatenate(
        [
            Reference(base[i : i + 8], targets[i : i + 8], k=1).compare(logits[i : i + 8])["kld"]
            for i in range(0, len(base), 8)
        ]
    )


def fall_map(run, base, n_layer, parts=tuple(PARTS), layers=None, progress=True):
    """What the answer gains when one part of one layer is given back to the quantized model.

    Activation patching (Meng et al. 2022, "Locating and editing factual associations in GPT") with
    the reference as the clean run: the part's output at all positions is replaced by what the
    reference had there, and the KL divergence from the reference's predictions is measured again.
    What falls is the part's own error and what it had inherited, with their interplay with every
    other error of the model.

    run(part, layer) -> logits (token, vocab) of the quantized model, patched; run(None, None)
    unpatched. base: the reference's logits. DataFrame: part, layer, kld (patched), fall (nats),
    share (of the unpatched; NaN where that is no more than NOISE). attrs["kld"]: the unpatched
    mean. The first position, which sees one token, is left out."""
    before = kl(base[1:], run(None, None)[1:]).mean()
    table = _every_part(run, base, n_layer, parts, layers, progress, "give back")
    table["fall"] = before - table["kld"]
    table["share"] = ratio(table["fall"], before, NOISE)
    table.attrs["kld"] = float(before)
    return table


def cost_map(run, base, n_layer, parts=tuple(PARTS), layers=None, progress=True):
    """What the answer loses when one part of one layer alone is quantized: nothing is inherited,
    nothing interferes.

    run(part, layer) -> logits (token, vocab) of the reference with that part's output replaced by
    what the quantized part makes of the reference's own input. To second order in the errors these
    costs are the diagonal of the divergence, free of the cross terms that fall_map holds.
    DataFrame: part, layer, kld, cost (the same, nats)."""
    table = _every_part(run, base, n_layer, parts, layers, progress, "quantize alone")
    return table.assign(cost=table["kld"])


def _every_part(run, base, n_layer, parts, layers, progress, what):
    from tqdm.auto import tqdm

    todo = [
        (part, layer) for layer in (range(n_layer) if layers is None else layers) for part in parts
    ]
    rows = [
        (part, layer, kl(base[1:], run(part, layer)[1:]).mean())
        for part, layer in tqdm(todo, desc=what, unit="run", disable=not progress)
    ]
    return pd.DataFrame(rows, columns=["part", "layer", "kld"])


def recommend(costs, tensors, keep=8, type="Q8_0", bits=8.5):
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


def control(costs, tensors, chosen, type="Q8_0", bits=8.5):
    """As many parts of each kind as were chosen, the cheapest of those left: what the
    recommendation must beat."""
    everything = recommend(costs, tensors, keep=len(costs), type=type, bits=bits)
    left = everything[~everything["pattern"].isin(chosen["pattern"])].sort_values("cost")
    parts = [
        left[left["part"] == part].head(n) for part, n in chosen["part"].value_counts().items()
    ]
    return pd.concat(
        [left.head(0), *parts], ignore_index=True
    )  # empty where no part of the kind is left


def explicit_types(tensors, chosen):
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


def pareto(table, cost, loss):
    """True for rows that no other row beats in both: at most its cost and at most its loss, and one
    of them less.

    cost, loss: columns where less is better. NaN is never on the front. Boolean Series.
    """
    values = table[[cost, loss]].to_numpy(dtype=float)
    front = []
    for row in values:
        no_worse, better = (values <= row).all(axis=1), (values < row).any(axis=1)
        front.append(not np.isnan(row).any() and not (no_worse & better).any())
    return pd.Series(front, index=table.index, name="pareto")


def decide(table, memory, limits, need="memory_bytes", loss="kld_mean", prefer="kld_mean"):
    """Given this much memory and at most this much divergence, which file: DataFrame (memory,
    limit) of names.

    memory: budgets in bytes; limits: largest mean KL divergence in nats. The fitting file with the
    least `prefer`, or "none" where there is none."""

    def best(budget, limit):
        fits = table[(table[need] <= budget) & (table[loss] <= limit)]
        return fits[prefer].idxmin() if len(fits) else "none"

    return pd.DataFrame(
        [[best(budget, limit) for limit in limits] for budget in memory],
        index=pd.Index(memory, name="memory_bytes"),
        columns=pd.Index(limits, name="kld at most"),
    )


def first_divergence(base, ids):
    """Index of the first generated token that differs, or None if one sequence is a beginning of
    the other."""
    n = min(len(base), len(ids))
    different = np.flatnonzero(np.asarray(base[:n]) != np.asarray(ids[:n]))
    return int(different[0]) if len(different) else None


def ladder(table, by="bits_per_weight", loss="kld_mean"):
    """Neighbouring pairs out of order, more bits per weight yet more divergence: list of (larger,
    smaller)."""
    ordered = table.dropna(subset=[by, loss]).sort_values(by)
    names = list(ordered.index)
    return [(b, a) for a, b in zip(names, names[1:]) if ordered.loc[b, loss] > ordered.loc[a, loss]]
