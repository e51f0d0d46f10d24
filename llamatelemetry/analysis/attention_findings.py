"""One or two sentences under each figure of notebook 12, computed from the numbers that the figure shows."""

import numpy as np

from .attention import SINK_THRESHOLD
from .attention_output import first_shares


def _name(piece):
    return repr(piece) if isinstance(piece, str) else f"bytes {piece.hex(' ')}"


def head_finding(attention, pieces):
    """Where one head looks. attention: (query, key) of all tokens."""
    a = np.asarray(attention)[1:]  # the first token has no choice
    targets = a.argmax(-1)
    where = np.arange(1, len(a) + 1)
    shares = {
        "the first token": (targets == 0).mean(),
        "the token before": (targets == where - 1).mean(),
        "the token itself": (targets == where).mean(),
    }
    best = max(shares, key=shares.get)
    q, k = np.unravel_index(np.argmax(a[:, 1:]), a[:, 1:].shape)
    return (
        f"{shares[best]:.0%} of the {len(a)} queries that have a choice attend most to {best}. The largest weight on "
        f"any other token than the first is {a[q, k + 1]:.3f}, from {_name(pieces[q + 1])} (position {q + 1}) to "
        f"{_name(pieces[k + 1])} (position {k + 1})."
    )


def depth_finding(table):
    """How entropy and distance change over depth. table: head_table."""
    layers = table.groupby("layer")[["entropy_normalised", "distance"]].mean()
    low, high = layers["entropy_normalised"].idxmin(), layers["entropy_normalised"].idxmax()
    far = table.loc[table["distance"].idxmax()]
    return (
        f"Attention is broadest in layer {high} (mean normalised entropy {layers.loc[high, 'entropy_normalised']:.2f}) and "
        f"most concentrated in layer {low} ({layers.loc[low, 'entropy_normalised']:.2f}). The head that looks farthest "
        f"back is layer {int(far['layer'])}, head {int(far['head'])}: {far['distance']:.1f} tokens on average."
    )


def sink_finding(table):
    """How many heads are sinks. table: head_table."""
    rate, by_layer = table["sink"].mean(), table.groupby("layer")["sink"].mean()
    most = by_layer[by_layer > 0.5].index
    where = f"more than half of a layer's heads in {len(most)} of {len(by_layer)} layers"
    where += f", the first of them layer {most[0]}" if len(most) else ""
    return (
        f"{table['sink'].sum()} of {len(table)} heads ({rate:.0%}) give the first token more than {SINK_THRESHOLD} on "
        f"average (Gu et al. 2024): {where}. Later tokens give it {table['sink_mass'].mean():.0%} of their attention, "
        "mean over heads."
    )


def weighted_finding(raw, weighted, norms, pieces):
    """Raw against norm-weighted attention of one head. raw, weighted: (query, key); norms: (key,), |W_O v|."""
    norms, later = np.asarray(norms), slice(1, None)
    shares = np.asarray(weighted) / np.asarray(weighted).sum(-1, keepdims=True)
    return (
        f"The first token gets {np.asarray(raw)[later, 0].mean():.0%} of this head's weight, and "
        f"{shares[later, 0].mean():.0%} of the length that the head moves: its value is {norms[0]:.3g} long through W_O, "
        f"against {np.median(norms[later]):.3g} for the median of the others. The longest is {_name(pieces[norms.argmax()])}"
        f" (position {norms.argmax()}, {norms.max():.3g})."
    )


def weighted_layers_finding(attention, weighted):
    """The same over all heads: (layer, head, query, key)."""
    raw, moved = first_shares(attention, weighted)
    return (
        f"Over all heads the first token receives {raw:.0%} of the attention and {moved:.0%} of the moved length: raw "
        "weights "
        + ("overstate" if raw > moved else "understate")
        + " its part in what heads write."
    )


def rollout_finding(rolled, flow, mean, pieces):
    """Rollout, flow and mean attention of the last query: (key,) each, sums 1."""
    parts = {name: np.asarray(x) for name, x in (("rollout", rolled), ("flow", flow), ("mean attention", mean))}
    first = ", ".join(f"{x[0]:.3f} by {name}" for name, x in parts.items())
    others = {name: 1 + int(x[1:].argmax()) for name, x in parts.items()}
    said = ", ".join(f"{_name(pieces[i])} (position {i}, {parts[n][i]:.3f}) by {n}" for n, i in others.items())
    order = np.corrcoef(*(np.argsort(np.argsort(parts[n])) for n in ("rollout", "flow")))[0, 1]
    return (
        f"The last token draws on the first {first}; on another token most: {said}. Rollout and flow rank the tokens with "
        f"a rank correlation of {order:.2f}."
    )


def generated_finding(split):
    """Where generated tokens look. split: attention.generated_split."""
    mean = split.mean()
    return (
        f"The {len(split)} generated tokens give {mean['first token']:.0%} of their attention to the first token, "
        f"{mean['rest of prompt']:.0%} to the rest of the prompt, {mean['generated']:.0%} to generated tokens before them "
        f"and {mean['itself']:.0%} to themselves, mean over all layers and heads; the last one gives the prompt after its "
        f"first token {split['rest of prompt'].iloc[-1]:.0%}."
    )


def residual_finding(shares, position=-1):
    """Attention against feed-forward in the residual stream. shares: residual_shares."""
    by_layer = shares["attention_share"].isel(token=slice(1, None)).mean("token")
    strongest = int(by_layer.argmax())
    direct = {
        "attention": float(shares["attention_direct"].isel(token=position).sum()),
        "feed-forward blocks": float(shares["ffn_direct"].isel(token=position).sum()),
        "embedding": float(shares["embedding_direct"].isel(token=position)),
    }
    said = ", ".join(f"{value:.0%} {name}" for name, value in direct.items())
    return (
        f"Attention writes {float(by_layer.mean()):.0%} of the length that the blocks add, mean over layers and tokens "
        f"after the first, most in layer {strongest} ({float(by_layer[strongest]):.0%}). Along the direction of the last "
        f"token's final stream the shares are {said}; negative means against it."
    )


def logit_finding(parts, pieces):
    """What separates the first chosen token from the second. parts: logit_parts of two or more tokens."""
    first, second = parts.iloc[0], parts.iloc[1]
    gap = {name: first[name] - second[name] for name in ("embedding", "attention", "ffn")}
    layers = np.asarray(first["by_layer"]).sum(-1) - np.asarray(second["by_layer"]).sum(-1)
    return (
        f"{_name(pieces[0])} leads {_name(pieces[1])} by {first['captured'] - second['captured']:.2f} in logit: "
        f"{gap['attention']:+.2f} from attention, {gap['ffn']:+.2f} from the feed-forward blocks, "
        f"{gap['embedding']:+.2f} from the embedding. Layer {layers.argmax()} adds most to the lead ({layers.max():+.2f})."
    )


def compare_finding(table, a="the quantized file", b="the reference"):
    """How far two precisions' attention is apart. table: compare_heads."""
    top, moved = table.iloc[0], table["top_moved"].mean()
    return (
        f"Between {a} and {b} a head's attention differs by a Jensen-Shannon distance of "
        f"{table['js_distance'].median():.4f} (median over heads), most in layer {int(top['layer'])}, head "
        f"{int(top['head'])}: {top['js_distance']:.4f}. The largest difference of a single weight is "
        f"{table['max_difference'].max():.4f}; {moved:.1%} of the most attended keys are other ones."
    )


def centrality_finding(table):
    """PageRank and betweenness against received attention. table: as plots.attention.centrality_scatter."""
    order = table[["received", "pagerank", "betweenness"]].corr(method="spearman")["received"]
    top = table.loc[table["pagerank"].idxmax()]
    between = table.loc[table["betweenness"].idxmax()]
    return (
        f"PageRank ranks positions with a Spearman correlation of {order['pagerank']:.2f} to the attention they receive, "
        f"betweenness with {order['betweenness']:.2f}. The highest PageRank is {_name(top['piece'])} (position "
        f"{int(top['position'])}, {top['pagerank']:.2f}); most shortest paths pass {_name(between['piece'])} (position "
        f"{int(between['position'])})."
    )
