"""What the model loses without a head: tables from ablations, relations to what heads do, and
pruning orders."""

import numpy as np
import pandas as pd


def importance_table(sweeps, n_tokens):
    """Importance of each head from sweeps of {(layer, head): ablation} over held-out texts.

    sweeps: list of engine.sweep's DataFrames, one per text, with the same names; n_tokens:
    predicted tokens of each. Returns a DataFrame (layer, head, loss_change, error, kl): nats per
    token over all texts, and the standard error of the loss change over tokens."""
    weight = np.asarray(n_tokens, float) / np.sum(n_tokens)
    mean = weight @ np.stack(
        [sweep["loss_change"].to_numpy() for sweep in sweeps]
    )  # (text, head) -> (head,)
    spread = np.sqrt(
        weight**2 @ np.stack([sweep["loss_change_err"].to_numpy() ** 2 for sweep in sweeps])
    )
    layer, head = np.array(list(sweeps[0].index)).T
    kl = weight @ np.stack([sweep["kl"].to_numpy() for sweep in sweeps])
    return pd.DataFrame(
        {"layer": layer, "head": head, "loss_change": mean, "error": spread, "kl": kl}
    )


def sample_heads(names, count, seed=0):
    """At most `count` of the heads: as many from every layer as can be, drawn at random."""
    if count >= len(names):
        return list(names)
    rng = np.random.default_rng(seed)
    shuffled = [names[i] for i in rng.permutation(len(names))]
    seen, keyed = {}, []
    for place in shuffled:
        seen[place[0]] = seen.get(place[0], 0) + 1
        keyed.append((seen[place[0]], rng.random(), place))
    return sorted(place for _, _, place in sorted(keyed)[:count])


def population(values, n_heads, threshold=0.01, n_boot=1000, seed=0):
    """What a sample of heads says about all of them: mean loss change and the share above
    `threshold` nats, each with its 95% bootstrap interval, narrowed for a sample that is a good
    part of the whole (finite population)."""
    values, rng = np.asarray(values, float), np.random.default_rng(seed)
    draws = values[rng.integers(0, len(values), (n_boot, len(values)))]
    narrow = np.sqrt(max(0.0, 1 - len(values) / n_heads))
    out = {}
    for name, stat in (
        ("mean", lambda v: v.mean(-1)),
        ("share", lambda v: (v > threshold).mean(-1)),
    ):
        value = float(stat(values))
        low, high = np.quantile(stat(draws), [0.025, 0.975])
        out[name] = (
            value,
            float(value - (value - low) * narrow),
            float(value + (high - value) * narrow),
        )
    return out | {"sampled": len(values), "of": n_heads}


def relations(table, columns, target="kl", n_boot=500, seed=0):
    """Spearman's correlation of a head's importance with other things measured: DataFrame (rho,
    low, high, p).

    low, high: 95% bootstrap over heads. table: one row per head; target: "kl" or "loss_change".
    """
    from scipy.stats import rankdata, spearmanr

    rng, rows = np.random.default_rng(seed), {}
    for name in columns:
        pair = table[[name, target]].dropna().to_numpy(float)
        # A column without an order, or so few heads that chance orders them (of 4, one order in 12
        # agrees wholly).
        if len(pair) < 5 or (np.ptp(pair, axis=0) == 0).any():
            rows[name] = {
                "rho": np.nan,
                "low": np.nan,
                "high": np.nan,
                "p": np.nan,
                "heads": len(pair),
            }
            continue
        rho, p = spearmanr(pair[:, 0], pair[:, 1])
        picks = rng.integers(0, len(pair), (n_boot, len(pair)))
        a, b = (rankdata(pair[picks, i], axis=1) for i in (0, 1))
        a, b = (x - x.mean(1, keepdims=True) for x in (a, b))
        boot = (a * b).sum(1) / np.maximum(np.sqrt((a**2).sum(1) * (b**2).sum(1)), 1e-12)
        low, high = np.quantile(boot, [0.025, 0.975])
        rows[name] = {"rho": rho, "low": low, "high": high, "p": p, "heads": len(pair)}
    return pd.DataFrame(rows).T.rename_axis("measure")


def pruning_sets(table, counts, repeats=2, seed=0, by="kl"):
    """Heads to remove: {(order, repeat, count): [(layer, head), ...]}, the least important first,
    the most important first, and `repeats` random orders."""
    places = list(zip(table["layer"].astype(int), table["head"].astype(int)))
    rank = np.argsort(table[by].to_numpy(), kind="stable")
    rng = np.random.default_rng(seed)
    orders = {("least important", 0): rank, ("most important", 0): rank[::-1]}
    orders |= {("random", repeat): rng.permutation(len(places)) for repeat in range(repeats)}
    return {
        (*name, count): [places[i] for i in order[:count]]
        for name, order in orders.items()
        for count in counts
    }


def pruning_table(sweep):
    """engine.sweep's DataFrame of `pruning_sets` as rows (order, repeat, removed, loss,
    loss_change, kl, ...)."""
    rows = [dict(zip(("order", "repeat", "removed"), name)) for name in sweep.index]
    kept = sweep[["loss", "loss_change", "kl", "top1_agreement"]].reset_index(drop=True)
    return pd.concat([pd.DataFrame(rows), kept], axis=1)


def tolerated(table, limit=0.1):
    """How many heads can be removed in each order before the loss rises by more than `limit` nats
    per token: the largest measured count below it (mean over repeats). Series by order."""
    mean = table.groupby(["order", "removed"])["loss_change"].mean().reset_index()
    out = {}
    for order, group in mean.groupby("order"):
        group = group.sort_values("removed")
        within = (group["loss_change"] <= limit).cummin()
        out[order] = int(group.loc[within, "removed"].max()) if within.any() else 0
    return pd.Series(out, name="removed")
