"""One or two sentences under each figure of attention, computed from the numbers that it shows."""

import numpy as np
import pandas as pd
import xarray as xr

from ..capture.finite import measured
from ..maths import rank_correlation
from ..views.sentences import counted, listed, quoted, sentence, some
from .output import attention_share, first_shares
from .patterns import SINK_THRESHOLD, query_positions


@sentence
def token_map(attention: xr.DataArray, pieces: list) -> str:
    """Where one head looks. attention: (query, key), of all tokens or some."""
    query = query_positions(attention)
    a, query = measured(attention)[query > 0], query[query > 0]  # the first token has no choice
    places = {"the first token": 0, "the token before": query - 1, "the token itself": query}
    shares = {name: (a.argmax(-1) == key).mean() for name, key in places.items()}
    best = max(shares, key=shares.__getitem__)
    row, key = np.unravel_index(a[:, 1:].argmax(), a[:, 1:].shape)
    return (
        f"{shares[best]:.0%} of the {len(a)} queries that have a choice attend most to {best}. The largest weight on "
        f"any other token than the first is {a[row, key + 1]:.3f}, from {quoted(pieces[query[row]])} (position "
        f"{query[row]}) to {quoted(pieces[key + 1])} (position {key + 1})."
    )


@sentence
def depth_profile(table: pd.DataFrame) -> str:
    """How entropy and distance change over depth. table: patterns.head_table."""
    spread, far = table.groupby("layer")["entropy_normalised"].mean(), table["distance"].idxmax()
    low, high = (f"{spread[i]:.2f} (layer {i})" for i in (spread.idxmin(), spread.idxmax()))
    said = f"is {low} in the only layer" if len(spread) == 1 else f"runs from {low} to {high}"
    return (
        f"The mean normalized entropy of a layer {said}. The longest mean look back is {table['distance'][far]:.1f} "
        f"tokens, of layer {table['layer'][far]}, head {table['head'][far]}."
    )


@sentence
def sinks(table: pd.DataFrame) -> str:
    """How many heads are sinks, and where. table: patterns.head_table."""
    sink, rate = table["sink"], table.groupby("layer")["sink"].mean()
    return (
        f"{sink.sum()} of {counted(len(sink), 'head')} ({sink.mean():.0%}) give the first token more than "
        f"{SINK_THRESHOLD} on average, more than half of the heads in {(rate > 0.5).sum()} of "
        f"{counted(len(rate), 'layer')}."
    )


@sentence
def norm_weighted(attention: xr.DataArray, norms: xr.DataArray, layer: int, head: int) -> str:
    """Raw against norm-weighted attention of one head and of all. attention: (layer, head, query,
    key); norms: (layer, head, key)."""
    one = first_shares(attention.sel(layer=layer, head=head), norms.sel(layer=layer, head=head))
    (raw, moved), (all_raw, all_moved) = one, first_shares(attention, norms)
    return (
        f"The first token gets {raw:.0%} of this head's weight and {some(moved, '{:.0%}', 'none')} of the length that "
        f"it moves; over all heads {all_raw:.0%} of the weight and {some(all_moved, '{:.0%}', 'none')} of the length."
    )


@sentence
def rollout(rolled: xr.DataArray, pieces: list) -> str:
    """How the rollout of one query changes over the layers. rolled: (layer, key)."""
    r, quarter = np.asarray(rolled), len(rolled) // 4
    half, best = np.flatnonzero(r[:, 0] > 0.5), 1 + int(r[quarter, 1:].argmax())
    passes = f"passes one half after layer {half[0]}" if len(half) else "never passes one half"
    return (
        f"The first token's rollout {passes} and ends at {r[-1, 0]:.3f}. After layer {quarter} the largest other token "
        f"is {quoted(pieces[best])} (position {best}, {r[quarter, best]:.2f})."
    )


@sentence
def token_bars(flow: xr.DataArray, mean: xr.DataArray, pieces: list) -> str:
    """Flow to, and mean attention on, every token from the last query: (key,) each, sums 1."""
    best, order = int(np.asarray(flow).argmax()), some(rank_correlation(flow, mean), "{:.2f}")
    return (
        f"Flow is largest from {quoted(pieces[best])} (position {best}): {float(flow[best]):.3f}, against "
        f"{1 / len(flow):.3f} for an even share. Spearman's correlation with mean attention: {order}."
    )


@sentence
def generated(split: pd.DataFrame) -> str:
    """Where generated tokens look. split: patterns.generated_split."""
    first, prompt, before, itself = split.mean()
    return (
        f"Generated tokens give {first:.0%} of their attention to the first token, {prompt:.0%} to the rest of the "
        f"prompt, {before:.0%} to generated ones before and {itself:.0%} to themselves, mean over layers and heads."
    )


@sentence
def residual(added: xr.Dataset, shares: pd.DataFrame) -> str:
    """Attention against feed-forward. added: states.contributions; shares: states.projection."""
    mean = float(attention_share(added["norm"]).mean())
    parts = (shares["attention"].sum(), shares["ffn"].sum(), shares.attrs["embedding"])
    attention, ffn, embedding = (f"{round(value, 2) + 0.0:.0%}" for value in parts)
    return (
        f"Attention writes {mean:.0%} of the length that the blocks add, mean over layers and tokens after the first. "
        f"Along the last token's final stream the shares are {attention} attention, {ffn} feed-forward blocks, "
        f"{embedding} embedding; negative means against it."
    )


@sentence
def logit_build_up(lead: pd.DataFrame, pieces: list) -> str:
    """What separates pieces[0] from pieces[1]. lead: lens.logit_attribution of the two."""
    sums, blocks = lead.groupby("component")["value"].sum(), lead[lead["layer"] >= 0]
    parts = sums[sums.abs() >= 0.005].items()
    said = listed(f"{value:+.2f} from {name}" for name, value in parts)
    most = blocks.groupby("layer")["value"].sum()
    return (
        f"{quoted(pieces[0])} leads {quoted(pieces[1])} by {lead.attrs['captured']:.2f} in logit: {said}. "
        f"The largest addition is {most.max():+.2f}, of layer {most.idxmax()}."
    )


@sentence
def changes(table: pd.DataFrame, a: str, b: str) -> str:
    """How far two precisions' attention is apart. table: compare_heads; a, b: their names."""
    if not table["max_difference"].max() > 0:
        return f"Between {a} and {b} no weight of any head differs."
    top, median = table.iloc[0], table["js_distance"].median()
    return (
        f"Between {a} and {b} a head's attention differs by a Jensen-Shannon distance of {median:.4f} (median over "
        f"heads), most in layer {int(top['layer'])}, head {int(top['head'])}: {top['js_distance']:.4f}. The largest "
        f"difference of a single weight is {table['max_difference'].max():.4f}."
    )


@sentence
def moved(table: pd.DataFrame, moved: pd.DataFrame, n_token: int) -> str:
    """How far the most attended keys move. table: compare_heads; moved: of the heads shown."""
    queries = counted(len(moved), "query attends", "queries attend")
    away = ", and the target is then {:.1f} positions away on average"
    return (
        f"In the heads shown {queries} most to another token; over all heads {table['top_moved'].mean():.1%} of "
        f"{n_token - 1} queries do{some(table['top_shift'].mean(), away, '')}."
    )


@sentence
def centrality(table: pd.DataFrame) -> str:
    """PageRank and betweenness against the attention received. table: flow.token_nodes."""
    rank = rank_correlation(table["received"], table["pagerank"])
    between = rank_correlation(table["received"], table["betweenness"])
    top, piece = table["pagerank"].max(), table["piece"][table["pagerank"].idxmax()]
    return (
        f"Spearman's correlation with the attention that positions receive: PageRank {some(rank, '{:.2f}')}, "
        f"betweenness {some(between, '{:.2f}')}. PageRank is highest for {quoted(piece)} ({top:.2f})."
    )
