"""One or two sentences under each figure of notebook 12, computed from the numbers that the figure
shows."""

import functools
import textwrap

import numpy as np

from ..capture.finite import measured
from ..maths import rank_correlation, ratio
from ..views.sentences import some
from ..views.text import counted, quoted
from .output import first_shares
from .patterns import SINK_THRESHOLD


def _wrapped(function):
    """Lines of at most 100 characters, so that no viewer breaks a word or a number."""

    @functools.wraps(function)
    def finding(*args, **kwargs):
        return textwrap.fill(
            function(*args, **kwargs), 100, break_long_words=False, break_on_hyphens=False
        )

    return finding


@_wrapped
def head_finding(attention, pieces):
    """Where one head looks. attention: (query, key) of all tokens."""
    a = measured(attention)[1:]  # the first token has no choice
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
        f"any other token than the first is {a[q, k + 1]:.3f}, from {quoted(pieces[q + 1])} (position {q + 1}) to "
        f"{quoted(pieces[k + 1])} (position {k + 1})."
    )


@_wrapped
def depth_finding(table):
    """How entropy and distance change over depth. table: head_table."""
    layers = table.groupby("layer")[["entropy_normalised", "distance"]].mean()
    low, high = layers["entropy_normalised"].idxmin(), layers["entropy_normalised"].idxmax()
    far = table.loc[table["distance"].idxmax()]
    broad = (
        f"Attention is broadest in layer {high} (mean normalised entropy "
        f"{layers.loc[high, 'entropy_normalised']:.2f}) and "
        f"most concentrated in layer {low} ({layers.loc[low, 'entropy_normalised']:.2f})."
        if low != high
        else f"Attention has a mean normalised entropy of {layers.loc[low, 'entropy_normalised']:.2f} in "
        f"{'the only' if len(layers) == 1 else 'every'} layer."
    )
    if len(table) == 1:
        return f"{broad} The only head looks {far['distance']:.1f} tokens back on average."
    return (
        f"{broad} The head that looks farthest "
        f"back is layer {int(far['layer'])}, head {int(far['head'])}: {far['distance']:.1f} tokens on average."
    )


@_wrapped
def sink_finding(table):
    """How many heads are sinks. table: head_table."""
    rate, by_layer = table["sink"].mean(), table.groupby("layer")["sink"].mean()
    most = by_layer[by_layer > 0.5].index
    where = f"more than half of a layer's heads in {len(most)} of {counted(len(by_layer), 'layer')}"
    where += f", the first of them layer {most[0]}" if len(most) else ""
    return (
        f"{table['sink'].sum()} of {counted(len(table), 'head')} ({rate:.0%}) give the first token more than "
        f"{SINK_THRESHOLD} on average (Gu et al. 2024): {where}. Later tokens give it "
        f"{table['sink_mass'].mean():.0%} of their attention, mean over heads."
    )


@_wrapped
def weighted_finding(raw, weighted, norms, pieces):
    """Raw against norm-weighted attention of one head. raw, weighted: (query, key); norms: (key,),
    |W_O v|."""
    norms, later = np.asarray(norms), slice(1, None)
    if not norms.any():
        return "Every value of this head is 0 through W_O: whatever it looks at, it moves nothing."
    shares = ratio(weighted, np.asarray(weighted).sum(-1, keepdims=True))
    return (
        f"The first token gets {np.asarray(raw)[later, 0].mean():.0%} of this head's weight, and "
        f"{np.nanmean(shares[later, 0]):.0%} of the length that the head moves: its value is {norms[0]:.3g} long "
        "through W_O, "
        f"against {np.median(norms[later]):.3g} for the median of the others. The longest is "
        f"{quoted(pieces[norms.argmax()])}"
        f" (position {norms.argmax()}, {norms.max():.3g})."
    )


@_wrapped
def weighted_layers_finding(attention, weighted):
    """The same over all heads: (layer, head, query, key)."""
    raw, moved = first_shares(attention, weighted)
    return (
        f"Over all heads the first token receives {raw:.0%} of the attention and "
        f"{some(moved, '{:.0%}', 'no')} of the moved length: raw weights "
        + (
            "match"
            if not abs(raw - moved) > 0.005
            else "overstate"
            if raw > moved
            else "understate"
        )
        + " its part in what heads write."
    )


@_wrapped
def rollout_finding(rolled, pieces):
    """How rollout of one query changes over the layers. rolled: (layer, key)."""
    r = np.asarray(rolled)
    half = np.flatnonzero(r[:, 0] > 0.5)
    where = f"passes one half after layer {half[0]}" if len(half) else "never passes one half"
    drains = (
        ": in a causal model the first token sees only itself, so a product of many maps drains into it"
        if len(half)
        else ""
    )
    middle = r[len(r) // 4]
    best = 1 + int(middle[1:].argmax())
    return (
        f"The first token's rollout {where} and ends at {r[-1, 0]:.3f}{drains}. "
        f"After layer {len(r) // 4} the largest other token is {quoted(pieces[best])} (position {best}, "
        f"{middle[best]:.2f})."
    )


@_wrapped
def flow_finding(flow, mean, pieces):
    """Flow and mean attention of the last query: (key,) each, sums 1."""
    flow, mean = np.asarray(flow), np.asarray(mean)
    best = int(flow.argmax())
    order = some(
        rank_correlation(flow, mean),
        "The two rank tokens with a correlation of {:.2f}.",
        "There is too little to rank for a correlation of the two.",
    )
    other = 1 + int(mean[1:].argmax())
    return (
        f"Flow is largest from {quoted(pieces[best])} (position {best}): {flow[best]:.3f}, against "
        f"{1 / len(flow):.3f} for an "
        f"even share. Mean attention gives the first token {mean[0]:.2f} and among the others most to "
        f"{quoted(pieces[other])} "
        f"(position {other}, {mean[other]:.2f}). {order}"
    )


@_wrapped
def generated_finding(split):
    """Where generated tokens look. split: attention.generated_split."""
    mean = split.mean()
    return (
        f"The {len(split)} generated tokens give {mean['first token']:.0%} of their attention to the first token, "
        f"{mean['rest of prompt']:.0%} to the rest of the prompt, {mean['generated']:.0%} to generated tokens "
        "before them "
        f"and {mean['itself']:.0%} to themselves, mean over all layers and heads; the last one gives the prompt "
        "after its "
        f"first token {split['rest of prompt'].iloc[-1]:.0%}."
    )


@_wrapped
def residual_finding(shares, position=-1):
    """Attention against feed-forward in the residual stream. shares: residual_shares."""
    by_layer = shares["attention_share"].isel(token=slice(1, None)).mean("token")
    strongest = int(np.argmax(by_layer.values))
    most = (
        f", most in layer {strongest} ({float(by_layer[strongest]):.0%})"
        if by_layer.size > 1
        else ""
    )
    direct = {
        "attention": float(shares["attention_direct"].isel(token=position).sum()),
        "feed-forward blocks": float(shares["ffn_direct"].isel(token=position).sum()),
        "embedding": float(shares["embedding_direct"].isel(token=position)),
    }
    said = ", ".join(f"{round(value, 2) + 0.0:.0%} {name}" for name, value in direct.items())
    return (
        f"Attention writes {float(by_layer.mean()):.0%} of the length that the blocks add, mean over layers and tokens "
        f"after the first{most}. Along the direction of "
        "the last "
        f"token's final stream the shares are {said}; negative means against it."
    )


@_wrapped
def logit_finding(parts, pieces):
    """What separates the first chosen token from the second. parts: logit_parts of two or more
    tokens."""
    first, second = parts.iloc[0], parts.iloc[1]
    gap = {name: first[name] - second[name] for name in ("embedding", "attention", "ffn")}
    layers = np.asarray(first["by_layer"]).sum(-1) - np.asarray(second["by_layer"]).sum(-1)
    return (
        f"{quoted(pieces[0])} leads {quoted(pieces[1])} by {first['captured'] - second['captured']:.2f} in logit: "
        f"{gap['attention']:+.2f} from attention, {gap['ffn']:+.2f} from the feed-forward blocks, "
        f"{gap['embedding']:+.2f} from the embedding."
        + (
            f" Layer {layers.argmax()} adds most to the lead ({layers.max():+.2f})."
            if len(layers) > 1
            else ""
        )
    )


@_wrapped
def compare_finding(table, a="the quantized file", b="the reference"):
    """How far two precisions' attention is apart. table: compare_heads."""
    top, moved = table.iloc[0], table["top_moved"].mean()
    if not table["max_difference"].max() > 0:
        return f"Between {a} and {b} no weight of any head differs."
    return (
        f"Between {a} and {b} a head's attention differs by a Jensen-Shannon distance of "
        f"{table['js_distance'].median():.4f} (median over heads), most in layer {int(top['layer'])}, head "
        f"{int(top['head'])}: {top['js_distance']:.4f}. The largest difference of a single weight is "
        f"{table['max_difference'].max():.4f}; {moved:.1%} of the most attended keys are other ones."
    )


@_wrapped
def moved_finding(table, moved, n_token):
    """How far the most attended keys move. table: compare_heads; moved: moved_targets of the heads
    shown."""
    shift = table["top_shift"].mean()
    text = (
        f"In the heads shown {counted(len(moved), 'query attends', 'queries attend')} most to another token; over all "
        f"heads {table['top_moved'].mean():.1%} of {n_token - 1} queries do"
    )
    return text + (
        f", and the target is then {shift:.1f} positions away on average."
        if shift == shift
        else "."
    )


@_wrapped
def centrality_finding(table):
    """PageRank and betweenness against received attention. table: as
    attention.figures.centrality_scatter."""
    order = {
        name: rank_correlation(table["received"], table[name])
        for name in ("pagerank", "betweenness")
    }
    top = table.loc[table["pagerank"].idxmax()]
    between = table.loc[table["betweenness"].idxmax()]
    others = table["received"].iloc[1:]
    return (
        f"Later tokens give the first {table['received'].iloc[0]:.2f} of their attention, its sink mass, and any "
        "other at "
        f"most {others.max():.2f} (position {others.idxmax()}). "
        + some(
            order["pagerank"],
            "PageRank ranks positions with a Spearman correlation of {:.2f} to what they receive",
            "PageRank gives no order to compare with what positions receive",
        )
        + some(order["betweenness"], ", betweenness with {:.2f}", "")
        + f". The highest PageRank is {quoted(top['piece'])} (position {int(top['position'])}, {top['pagerank']:.2f}); "
        + (
            f"most shortest paths pass {quoted(between['piece'])} (position {int(between['position'])})."
            if between["betweenness"] > 0
            else "no shortest path passes a third position."
        )
    )
