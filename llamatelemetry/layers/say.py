"""What each figure of notebook 14 shows, computed from the numbers that the figure was given:
`say.norms` explains `figures.norms`."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import xarray as xr

from ..files.vocabulary import named
from ..maths import rank_correlation, ratio
from ..views.sentences import counted, listed, quoted, sentence, some, span
from .states import MASSIVE_RATIO, MASSIVE_VALUE


@sentence
def lengths(table: pd.DataFrame) -> str:
    """table: states.norm_table."""
    first, others, peak = table["first"], table["median"], table["first"].idxmax()
    return f"""The median length of the other tokens goes from {others.iloc[0]:.3g} at the embedding to
        {others.iloc[-1]:.3g} after the last layer. The first token is longest at state {peak} ({first[peak]:.3g}; the
        others' median there is {others[peak]:.3g})."""


@sentence
def magnitudes(table: pd.DataFrame, massive: pd.DataFrame) -> str:
    """table: states.magnitude_quantiles; massive: states.massive_activations."""
    times = float(ratio(table[1.0].iloc[-1], table[0.5].iloc[-1]))
    times = some(times, "{:.0f} times the median", "all that is not 0")
    tail = f"The largest value of the later tokens after the last layer is {times}."
    bound = f"above {MASSIVE_VALUE:.0f} and {MASSIVE_RATIO:.0f} times the median of their layer"
    if massive.empty:
        return f"No values are {bound}. {tail}"
    where, top = sorted(set(massive["position"])), massive.iloc[0]
    return f"""Massive activations ({bound}) stand at {counted(len(where), "position")} ({listed(where, 6)}) in
        {span("state", massive["layer"])}, the largest in dimension {top["dim"]} of state {top["layer"]}:
        {top["value"]:.4g}, {top["ratio"]:.0f} times the median. {tail}"""


@sentence
def sparsity(table: pd.DataFrame) -> str:
    """table: states.ffn_sparsity."""
    small, needed = table["small"].mean(), table["needed"]
    low, high = (f"{needed[at]:.1%} in layer {at}" for at in (needed.idxmin(), needed.idxmax()))
    return f"""{small:.0%} of the values are below 1% of their token's largest. From {low} to {high} of the neurons hold
        90% of the sum of squares."""


@sentence
def contributions(data: xr.Dataset) -> str:
    """data: states.contributions."""
    later = data.isel(token=slice(1, None)).median("token", skipna=True)
    added, against = later["relative"].to_series().dropna(), (later["cosine"] < 0).sum("layer")
    most = (group.idxmax() for _, group in added.groupby(level="part"))
    of = f"of {counted(later.sizes['layer'], 'layer')}"
    facts = [
        f"""{part} adds most in layer {layer} ({added[part, layer]:.2g} times the stream's length) and points against it
            in {int(against.sel(part=part))} {of}"""
        for part, layer in most
    ]
    return f"For the later tokens, {'; '.join(facts) or 'no layer adds anything to the stream'}."


@sentence
def projection(table: pd.DataFrame, piece: str | bytes) -> str:
    """table: states.projection of one token; piece: that token."""
    parts = table[["attention", "ffn"]].stack()
    shares = (table["attention"].sum(), table["ffn"].sum(), table.attrs["embedding"])
    attention, ffn, start = (f"{round(100 * share) + 0}%" for share in shares)  # + 0: no "-0%"
    layer, part = parts.idxmax()
    return f"""Along the final state of {quoted(piece)}, attention writes {attention}, the feed-forward blocks {ffn},
        the embedding {start}. The largest single part is {part} of layer {layer} ({parts.max():.0%})."""


@sentence
def norms(table: pd.DataFrame) -> str:
    """table: norms.norm_impact."""
    turns = ((values.idxmin(), values.min()) for _, values in table["cosine"].groupby(level="part"))
    most = listed(f"{part} of layer {at} (cosine {cosine:.2f})" for (part, at), cosine in turns)
    check = "Recomputed with the file's weights the norms are off by at most {:.1e}, and at most"
    check = some(
        table["error"].max(),
        f"{check} {table['silenced'].max():.1%} of a layer's dimensions are silenced.",
        "No tensor of the file reproduces the captured norms, so their gains are not shown.",
    )
    return f"The direction changes most before {most}. {check}"


@sentence
def gains(table: pd.DataFrame) -> str:
    """table: norms.dimension_gains of the massive dimensions."""
    if table.empty or not len(table.columns):
        return "There are no massive dimensions whose gain could be compared."
    values, dims = table.to_numpy(), counted(len(table.columns), "dimension")
    turned = "turns such values down" if np.median(values) < 1 else "does not turn such values down"
    return f"""In the {dims} with massive activations ({listed(table.columns)}) the gain of the attention norm is
        {np.median(values):.2g} times the layer's median, in the median over layers: the norm {turned}."""


@sentence
def lens(data: xr.Dataset, position: int, vocabulary: Sequence) -> str:
    """data: lens.lens with the model's own best token as target; position: of the token."""
    one = data.isel(token=position)
    (answer,) = named(vocabulary, [int(one["top"][-1, 0])])
    states, rank, p = (one[name].values for name in ("layer", "rank", "probability"))
    first = f"first at state {states[rank.argmin()]}" if rank.min() == 0 else "nowhere"
    return f"""The answer {quoted(answer)} has rank {rank[0] + 1} (1: best) at the embedding, is the lens's best token
        {first} and has half of its final probability ({p[-1]:.3f}) at state {states[(p >= p[-1] / 2).argmax()]}."""


@sentence
def settled(layers: Sequence[int], n_layer: int) -> str:
    """layers: (token,) of lens.settled; n_layer: the last state."""
    layers = np.asarray(layers)
    late = f"{(layers > 0.8 * n_layer).mean():.0%} of the positions"
    return f"""The prediction settles at state {np.median(layers):.0f} of {n_layer} in the median over tokens. {late}
        change their mind in the last fifth of the layers."""


@sentence
def attribution(table: pd.DataFrame, pieces: Sequence) -> str:
    """table: lens.logit_attribution of pieces[0] against pieces[1]."""
    sums, blocks = table.groupby("component")["value"].sum(), table[table["layer"] >= 0]
    most, least = (blocks.loc[at] for at in (blocks["value"].idxmax(), blocks["value"].idxmin()))
    parts = listed(f"{sums[name]:+.2f} from {name}" for name in ("attention", "ffn", "embedding"))
    return f"""{quoted(pieces[0])} leads {quoted(pieces[1])} by {table.attrs["total"]:.2f} in logit (captured:
        {table.attrs["captured"]:.2f}): {parts}. Most is added by {most["component"]} of layer {most["layer"]}
        ({most["value"]:+.2f}), least by {least["component"]} of layer {least["layer"]} ({least["value"]:+.2f})."""


@sentence
def importance(table: pd.DataFrame) -> str:
    """table: states.layer_importance."""
    both = table["both"].dropna()  # of the layers that were tried
    if len(table) == 1:
        return f"Removing the only layer changes the loss by {both.iloc[0]:+.2f} nats per token."
    proxy = table["influence"][both.index].idxmin()
    agree = some(table.attrs["spearman"]["both"], " (rank correlation of the two: {:.2f})", "")
    return f"""Removing layer {both.idxmax()} costs most ({both.max():+.2f} nats per token), layer {both.idxmin()} least
        ({both.min():+.2f}). Block Influence calls layer {proxy} the least important; by ablation it is number
        {both.rank()[proxy]:.0f} of {len(both)} from the harmless end{agree}."""


@sentence
def similarity(values: np.ndarray, chance: float) -> str:
    """values, chance: states.cka_map of one run."""
    if not np.isfinite(values).all():
        return "In some state all tokens after the first are the same: nothing can resemble it."
    near = np.diag(values, 1)
    cut = near.argmin()
    return f"""Neighbouring states have a CKA of {near.mean():.3f} on average, least from state {cut} to {cut + 1}
        ({near[cut]:.3f}). Shuffled tokens give {chance:.2f}: only what is above that says something."""


@sentence
def divergence(data: xr.Dataset, what: str) -> str:
    """data: compare.divergence; what: the two runs in words."""
    distance = data["distance"]
    mean, same = distance.mean("pair").values, (distance == 0).all("layer").values
    alike = f"{same.sum()} of {counted(len(same), 'paired position')} have identical states"
    return f"""{what}: {alike} in every layer. The mean relative distance is largest at state {mean.argmax()}
        ({mean.max():.3f}), and {mean[-1]:.3f} after the last layer."""


@sentence
def answers(pieces: Sequence, leads: Sequence[float]) -> str:
    """pieces: the two answers; leads: the first's lead over the second in either run (logits)."""
    first, second = map(quoted, pieces)
    whose = f"The first prompt's best token is {first}, the second's {second}"
    if leads[1] > 0:
        whose = f"Both prompts' best token is {first}, the second's next best {second}"
    return f"{whose}. {first} leads by {leads[0]:+.2f} logits in the first run, {leads[1]:+.2f} in the second."


@sentence
def patches(shares: xr.DataArray, pieces: Sequence) -> str:
    """shares: compare.patch_map; pieces: of the whole prompt."""
    if not shares.size:
        return "No patching: it needs two different prompts of the same number of tokens."
    table = shares.to_series()  # (layer, position)
    if table.isna().all():
        return "No share is given: the two answers are no farther apart than rounding can put them."
    state, at = table.idxmax()
    half = table[table >= 0.5].reset_index("layer")["layer"].groupby(level="position")
    spans = [f"position {p} {quoted(pieces[p])}: {span('state', states)}" for p, states in half]
    back = f"At least half of the answer comes back from {'; '.join(spans)}."
    return f"""The largest share is {table.max():.2f}, at state {state} and position {at} {quoted(pieces[at])}.
        {back if spans else "No single patch brings back half of the answer."}"""


@sentence
def drift(data: xr.Dataset, models: Sequence[str]) -> str:
    """data: compare.divergence of two files on one text."""
    median = data["distance"].isel(pair=slice(1, None)).median("pair").values
    steps = np.diff(median)
    return f"""Between {models[0]} and {models[1]} the median relative distance of the later tokens goes from
        {median[0]:.3f} to {median[-1]:.3f}, most in layer {steps.argmax()} ({steps.max():+.3f})."""


@sentence
def unlike(values: np.ndarray, chance: float, models: Sequence[str]) -> str:
    """values, chance: states.cka_map of two models of different shape."""
    best = np.asarray(values).max(1)
    return f"""The states of {models[0]} and {models[1]} share no space; by CKA a state of the first resembles its
        nearest of the second at {best.mean():.2f} on average (shuffled tokens: {chance:.2f})."""


@sentence
def predictions(change: pd.DataFrame) -> str:
    """change: compare.output_change."""
    return f"""The predictions differ by a mean KL of {change["kl"].mean():.4f} nats and name the same best token at
        {change["same_top"].mean():.0%} of the positions."""


@sentence
def generation(table: pd.DataFrame) -> str:
    """table: compare.generation_table."""
    unsure, n = table.loc[table["entropy"].idxmax()], counted(len(table), "token")
    rho = rank_correlation(table["entropy"], table["settled"])
    return f"""The model was least sure before {quoted(unsure["piece"])} (position {unsure["position"]}: entropy
        {unsure["entropy"]:.2f} nats, probability {unsure["probability"]:.2f}). Over {n} entropy and settling state have
        {some(rho, "a rank correlation of {:.2f}", "no rank correlation")}."""


@sentence
def graph(nodes: pd.DataFrame, edges: pd.DataFrame) -> str:
    """nodes, edges: graph.stream_graph."""
    # State 0 of a model with a tied output matrix names its own token.
    inner = nodes[nodes["layer"].between(1, nodes["layer"].max() - 1)].sort_values("probability")
    size = f"{counted(len(nodes), 'node')} and {counted(len(edges), 'edge')}."
    if inner.empty:
        return f"{size} There is no state between the embedding and the last one."
    sure = inner.iloc[-1]
    return f"""{size} Between the embedding and the last state the lens is surest at {sure["id"]} (layer:position):
        {quoted(sure["says"])} with probability {sure["probability"]:.2f}."""


@sentence
def routing(load: xr.DataArray, entropy: xr.DataArray) -> str:
    """load: routing.expert_load; entropy: routing.routing_entropy."""
    shares = pd.DataFrame(load.values, load["layer"].values).stack()
    mean = pd.Series(entropy.mean("token").values, entropy["layer"].values)
    (layer, expert), n = shares.idxmax(), load.shape[1]
    return f"""The busiest expert is {expert} of layer {layer} with {shares.max():.0%} of the choices (even load:
        {1 / n:.0%}); {(shares == 0).sum()} of {counted(len(shares), "expert")} were never chosen. The router is most
        decided in layer {mean.idxmin()} (entropy {mean.min():.2f} nats) and least in layer {mean.idxmax()}
        ({mean.max():.2f}; {np.log(n):.2f} would be undecided)."""


@sentence
def same_experts(shares: xr.DataArray, model: str) -> str:
    """shares: routing.same_experts; model: the other one."""
    at, least, mean = int(shares.idxmin("layer")), float(shares.min()), float(shares.mean())
    return f"{model} sends tokens to {mean:.0%} of the same experts; least in layer {at} ({least:.0%})."


@sentence
def kinds(distance: pd.DataFrame) -> str:
    """distance: of routing.experts_by_kind."""
    kind = (distance["distance"] - distance["expected"]).idxmax()
    n, found, expected = distance.loc[kind, ["n", "distance", "expected"]]
    return f"""The load of {kind} tokens ({n:.0f} of them) is farthest from that of all tokens beyond chance: total
        variation distance {found:.2f}, where {n:.0f} tokens drawn at random give {expected:.2f}."""
