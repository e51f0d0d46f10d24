"""One or two sentences under each figure of notebook 14, computed from the numbers that the figure
shows."""

import numpy as np

from ..maths import rank_correlation, ratio
from ..views.sentences import some
from ..views.text import quoted
from .states import MASSIVE_RATIO, MASSIVE_VALUE


def span(name, places):
    """The first and the last of some states or layers, in words."""
    return (
        f"{name} {min(places)}"
        if min(places) == max(places)
        else f"{name}s {min(places)} to {max(places)}"
    )


def norm_sentence(table):
    """table: norm_table."""
    peak, n = table["first"].idxmax(), table.index[-1]
    times = ratio(table["first"], table["median"])
    grown = some(ratio(table["median"].iloc[-1], table["median"].iloc[0]), ", {:.3g} times")
    return (
        f"The median length of the other tokens goes from {table['median'].iloc[0]:.3g} at the embedding to "
        f"{table['median'].iloc[-1]:.3g} after layer {n - 1}{grown}. The first token is longest before layer {peak} "
        f"({table['first'].max():.3g}, {times[table.index.get_loc(peak)]:.3g} times the others' median there) and ends "
        f"at {times[-1]:.1f} times."
        if peak < n
        else f"The median length of the other tokens goes from {table['median'].iloc[0]:.3g} at the embedding to "
        f"{table['median'].iloc[-1]:.3g} after the last layer; the first token grows to the end, where it is "
        f"{times[-1]:.1f} times as long as their median."
    )


def massive_sentence(table, quantiles):
    """table: massive_activations; quantiles: magnitude_quantiles."""
    last = quantiles.iloc[-1]
    tail = (
        f"Among the later tokens the largest value after the last layer is "
        f"{some(ratio(last[1.0], last[0.5]), '{:.0f} times the median magnitude', 'all that is not 0')}."
    )
    if table.empty:
        return f"No value is above {MASSIVE_VALUE:.0f} and {MASSIVE_RATIO:.0f} times the median of its layer. {tail}"
    top = table.iloc[0]
    where = sorted(set(table["position"]))
    layers, dims = sorted(set(table["layer"])), len(set(table["dim"]))
    shown = ", ".join(map(str, where[:6])) + (" and others" if len(where) > 6 else "")
    return (
        f"Massive activations (above {MASSIVE_VALUE:.0f} and {MASSIVE_RATIO:.0f} times the median of their layer) "
        "stand at "
        f"position{'s' if len(where) > 1 else ''} {shown}, in {dims} dimension{'s' if dims > 1 else ''}, "
        f"{span('state', layers)}. The largest relative to its layer is {top['value']:.4g} in dimension "
        f"{int(top['dim'])} of state {int(top['layer'])}, {top['ratio']:.0f} times the median. {tail}"
    )


def sparsity_sentence(table):
    """table: ffn_sparsity."""
    low, high = table["needed"].idxmin(), table["needed"].idxmax()
    exact = table["zero"].mean()
    zeros = "No neuron is exactly 0" if exact == 0 else f"{exact:.1%} of the values are exactly 0"
    if len(table) == 1:
        return (
            f"{zeros}; {table['small'].mean():.0%} are below 1% of their token's largest. In the only layer "
            f"{table['needed'].iloc[0]:.1%} of the neurons hold 90% of the sum of squares, and a single one up to "
            f"{table['largest'].max():.0%}."
        )
    return (
        f"{zeros}; {table['small'].mean():.0%} are below 1% of their token's largest. In the most concentrated layer "
        f"({low}) {table.loc[low, 'needed']:.1%} of the neurons hold 90% of the sum of squares, in the broadest "
        f"({high}) "
        f"{table.loc[high, 'needed']:.1%}; a single neuron holds up to {table['largest'].max():.0%} (layer "
        f"{table['largest'].idxmax()})."
    )


def contribution_sentence(data):
    """data: contributions."""
    later = data.isel(token=slice(1, None)).median("token", skipna=True)
    parts = []
    for part in data["part"].values:
        values = later["relative"].sel(part=part).values
        if np.isfinite(values).any():
            layer = int(np.nanargmax(values))
            parts.append(
                f"{part} adds most in layer {layer} ({values[layer]:.2g} times the stream's length), in the "
                f"median layer {np.nanmedian(values):.2g}"
                if len(values) > 1
                else f"{part} adds {values[0]:.2g} times the stream's length in the only layer"
            )
    if not parts:
        return "No layer adds anything to the stream of the later tokens."
    against = (later["cosine"] < 0).sum("layer")
    signs = " and ".join(f"{int(against.sel(part=p))} for {p}" for p in data["part"].values)
    return (
        f"For the later tokens, {'; '.join(parts)}. The addition points against the stream in {signs} of "
        f"{later.sizes['layer']} layer{'s' if later.sizes['layer'] > 1 else ''}."
    )


def projection_sentence(table, piece):
    """table: projection of one token; piece: that token."""
    parts = table[["attention", "ffn"]].stack()
    layer, part = parts.idxmax()
    half = (
        int((table["cumulative"] >= 0.5).to_numpy().nonzero()[0][0])
        if (table["cumulative"] >= 0.5).any()
        else None
    )
    said = f"Half of it is there after layer {half}. " if half is not None else ""
    sums = table[["attention", "ffn"]].sum()
    three = (sums["attention"], sums["ffn"], table.attrs["embedding"])
    attention, ffn, start = (f"{round(100 * x) + 0}%" for x in three)  # + 0: no "-0%"
    return (
        f"Along the final state of {quoted(piece)}, attention writes {attention}, the feed-forward blocks {ffn}, the "
        "embedding "
        f"{start}. {said}The largest single part is {part} of layer "
        f"{layer} ({parts.max():.0%})."
    )


def norms_sentence(table):
    """table: norm_impact."""
    said = []
    for part, rows in table.groupby(level="part"):
        rows = rows.droplevel("part")
        turn = rows["cosine"].idxmin()
        text = (
            f"before {part}, the direction changes most in layer {turn} (cosine {rows['cosine'].min():.2f})"
            if len(rows) > 1
            else f"before {part}, state and normed state have a cosine of {rows['cosine'].min():.2f}"
        )
        if rows["silenced"].notna().any():
            layer = rows["silenced"].idxmax()
            text += (
                f" and up to {rows['silenced'].max():.1%} of the dimensions are silenced (layer {layer})"
                if rows["silenced"].max() > 0
                else " and no dimension is silenced"
            )
        said.append(text)
    known = table["error"].dropna()
    check = (
        f"Recomputed with the file's weights the norms are off by at most {known.max():.1e}."
        if len(known)
        else "No tensor of the file reproduces the captured norms, so their gains are not shown."
    )
    return f"{'; '.join(said).capitalize()}. {check}"


def gain_sentence(gains, median=1.0):
    """gains: dimension_gains of the massive dimensions."""
    if gains.empty or not len(gains.columns):
        return "There are no massive dimensions whose gain could be compared."
    values = gains.to_numpy()
    return (
        f"In the dimension{'s' if values.shape[1] > 1 else ''} with massive activations "
        f"({', '.join(map(str, gains.columns))})"
        f" the gain of the attention norm is {np.median(values):.2g} times the layer's median (median over layers; "
        "lowest "
        f"{values.min():.2g}, highest {values.max():.2g}): the norm "
        + ("turns them down." if np.median(values) < median else "does not turn them down.")
    )


def lens_sentence(data, position, vocabulary):
    """data: lens Dataset with the model's own best token as target; position: of the token."""
    one = data.isel(token=position)
    best = int(one["top"].isel(layer=-1, best=0))
    first = (
        one["layer"].values[np.argmax(one["rank"].values == 0)]
        if (one["rank"].values == 0).any()
        else None
    )
    half = np.flatnonzero(one["probability"].values >= 0.5 * float(one["probability"][-1]))
    said = f"it is the lens's best token first at state {first}"
    said = "it is never the best token of the lens" if first is None else said
    return (
        f"The answer {quoted(vocabulary[best])} has rank {int(one['rank'][0])} (0: best) at the embedding; {said}, and "
        "reaches half of "
        f"its final probability ({float(one['probability'][-1]):.3f}) at state {one['layer'].values[half[0]]}. The "
        "lens's "
        f"entropy goes from {float(one['entropy'][0]):.2f} to {float(one['entropy'][-1]):.2f} nats."
    )


def settled_sentence(layers, n_layer):
    """layers: (token,) of lens.settled."""
    layers = np.asarray(layers)
    return (
        f"The prediction settles at state {np.median(layers):.0f} of {n_layer} "
        + (
            f"in the median over tokens; earliest at {layers.min()} (position {layers.argmin()}), latest at "
            f"{layers.max()} (position {layers.argmax()}). "
            if layers.min() < layers.max()
            else "for every token. "
        )
        + f"{(layers > 0.8 * n_layer).mean():.0%} of the positions change their mind in the last fifth of the layers."
    )


def attribution_sentence(table, pieces):
    """table: logit_attribution of pieces[0] against pieces[1]."""
    sums, blocks = table.groupby("component")["value"].sum(), table[table["layer"] >= 0]
    most, least = blocks.loc[blocks["value"].idxmax()], blocks.loc[blocks["value"].idxmin()]
    return (
        f"{quoted(pieces[0])} leads {quoted(pieces[1])} by {table.attrs['total']:.2f} in logit (captured: "
        f"{table.attrs['captured']:.2f}): {sums['attention']:+.2f} from attention, {sums['ffn']:+.2f} from the "
        "feed-forward "
        f"blocks, {sums['embedding']:+.2f} from the embedding. {most['component']} of layer {int(most['layer'])} "
        f"adds most ({most['value']:+.2f}); "
        + (
            f"{least['component']} of layer {int(least['layer'])} works hardest against it ({least['value']:+.2f})."
            if least["value"] < 0
            else "no layer works against it."
        )
    )


def importance_sentence(table):
    """table: layer_importance."""
    rho = table.attrs["spearman"]["both"]
    agree = f" Rank correlation of the two: {rho:.2f}." if np.isfinite(rho) else ""
    best, worst = table["both"].idxmin(), table["both"].idxmax()
    proxy = table["influence"].idxmin()
    rank = int(table["both"].rank()[proxy])
    if len(table) == 1:
        return (
            f"Removing the only layer changes the loss by {table.loc[worst, 'both']:+.2f} nats per token. With one "
            "layer there is no order to compare with Block Influence's."
        )
    return (
        (
            ""
            if table["both"].max() > 0
            else "No layer costs anything here: without any of them the loss is lower. "
        )
        + f"Removing layer {worst} costs most ({table.loc[worst, 'both']:+.2f} nats per token), layer {best} least "
        f"({table.loc[best, 'both']:+.2f}). Block Influence calls layer {proxy} the least important; by ablation it is "
        f"number {rank} of {len(table)} from the harmless end.{agree}"
    )


def cka_sentence(values, chance):
    """values, chance: cka_map."""
    near = np.diag(values, 1)
    far = values[0, -1]
    if not np.isfinite(values).all():
        return "In some state all tokens after the first are the same: there is nothing that another could resemble."
    cut = int(near.argmin())
    return (
        f"Neighbouring states have a CKA of {near.mean():.3f} on average; the largest step is from state {cut} to "
        f"{cut + 1} "
        f"({near.min():.3f}). First and last have {far:.2f}. The same states with their tokens shuffled give "
        f"{chance:.2f}: "
        "only what is above that says something."
    )


def divergence_sentence(data, what):
    """data: divergence; what: the two runs in words."""
    by_layer = data["distance"].mean("pair").values
    same = (data["distance"] == 0).all("layer").values
    peak = int(by_layer.argmax())
    apart = np.flatnonzero(~same)
    start = (
        f"{int(same.sum())} of {len(same)} paired positions have identical states in every layer; "
    )
    start = start if same.any() else ""
    if not len(apart):
        return f"{what}: all paired positions have identical states in every layer."
    last = data.isel(pair=apart[-1])
    return (
        f"{what}: {start}the mean relative distance is largest at state {peak} ({by_layer[peak]:.3f}) and "
        f"{by_layer[-1]:.3f} after the last layer. At position {int(last['position'])} it goes from "
        f"{float(last['distance'][0]):.3f} to {float(last['distance'][-1]):.3f}."
    )


def answers_sentence(names, same, source, target):
    """What the two answers are. names: the two pieces; same: whether both prompts have one best
    token; source, target: the first's lead over the second in either run (logits)."""
    first, second = (quoted(piece) for piece in names)
    whose = f"The first prompt's best token is {first}, the second's {second}"
    if same:
        whose = f"Both prompts have {first} for their best token; against it stands the second's next best, {second}"
    return f"{whose}. The lead of {first} is {source:+.2f} logits in the first run and {target:+.2f} in the second."


def patch_sentence(values, layers, positions, pieces, n_layer):
    """values: (layer, position) restored shares."""
    values = np.asarray(values)
    if np.isnan(values).all():
        return (
            "No share is given: the two prompts' answers are no farther apart than rounding can put them, so that "
            "there is nothing to bring back. Choose prompts whose best next tokens differ."
        )
    i, j = np.unravel_index(np.nanargmax(values), values.shape)
    half = {int(p): np.asarray(layers)[column >= 0.5] for p, column in zip(positions, values.T)}
    spans = "; ".join(
        f"position {p} {quoted(pieces[p])}: {span('state', where)}"
        for p, where in half.items()
        if len(where)
    )
    spans = f"At least half of the answer comes back from {spans}." if spans else ""
    return (
        f"The largest share is {values[i, j]:.2f}, at state {layers[i]} and position {positions[j]} "
        f"{quoted(pieces[positions[j]])}. "
        + (spans or "No single patch brings back half of the answer.")
    )


def quantization_sentence(data, change, names):
    """data: divergence of two files on one text; change: output_change; names: of both."""
    by_layer = data["distance"].isel(pair=slice(1, None)).median("pair").values
    steps = np.diff(by_layer)
    return (
        f"Between {names[0]} and {names[1]} the median relative distance of the later tokens goes from "
        f"{by_layer[0]:.3f} to "
        f"{by_layer[-1]:.3f}, most in layer {int(steps.argmax())} ({steps.max():+.3f}). The predictions differ by a "
        "mean KL "
        f"of {change['kl'].mean():.4f} nats and name the same best token at {change['same_top'].mean():.0%} of the "
        "positions."
    )


def models_sentence(values, chance, change, names):
    """Two models of different shape: values, chance: cka_map of both; change: output_change; names:
    of both."""
    best = np.asarray(values).max(1)
    return (
        f"The states of {names[0]} and {names[1]} share no space; by CKA a state of the first resembles its nearest "
        "state of the "
        f"second at {best.mean():.2f} on average ({best.min():.2f} at least; shuffled tokens give {chance:.2f}). "
        "The predictions "
        f"differ by a mean KL of {change['kl'].mean():.4f} nats and name the same best token at "
        f"{change['same_top'].mean():.0%} of the positions."
    )


def generation_sentence(table):
    """table: generation_table."""
    unsure, late = table.loc[table["entropy"].idxmax()], table.loc[table["settled"].idxmax()]
    rho = rank_correlation(table["entropy"], table["settled"])
    agree = f" Entropy and settling state have a rank correlation of {rho:.2f} over {len(table)} tokens."
    agree = agree if np.isfinite(rho) else ""
    settled = (
        f"settled latest on the token at position {int(late['position'])} (state {int(late['settled'])})"
        if table["settled"].nunique() > 1
        else f"settled on every token at state {int(late['settled'])}"
    )
    return (
        f"The model was least sure before {quoted(unsure['piece'])} (position {int(unsure['position'])}: entropy "
        f"{unsure['entropy']:.2f} nats, probability {unsure['probability']:.2f}) and {settled}.{agree}"
    )


def graph_sentence(nodes, edges):
    """nodes, edges: stream_graph."""
    # State 0 of a model with a tied output matrix names its own token.
    inner = nodes[nodes["layer"].between(1, nodes["layer"].max() - 1)].sort_values("probability")
    strong = edges[edges["kind"] == "attention"].sort_values("weight")
    text = f"{len(nodes):,} nodes and {len(edges):,} edges. "
    if len(strong):
        edge = strong.iloc[-1]
        text += (
            f"The strongest attention edge (the first token and the token itself aside) goes from {edge['src']} "
            f"to {edge['dst']} (layer:position), weight {edge['weight']:.2f}. "
        )
    if inner.empty:
        return text + "There is no state between the embedding and the last one."
    sure = inner.iloc[-1]
    return text + (
        f"Between the embedding and the last state the lens is surest at {sure['id']}: "
        f"{quoted(sure['says'])} with probability {sure['probability']:.2f}."
    )


def routing_sentence(load, entropy):
    """Where the load is most uneven and the router most and least decided."""
    values, even = np.asarray(load), 1 / load.shape[1]
    layer, expert = np.unravel_index(values.argmax(), values.shape)
    by_layer = entropy.mean("token")
    most, least = (
        int(entropy["layer"][i]) for i in (by_layer.values.argmin(), by_layer.values.argmax())
    )
    idle = int((values == 0).sum())
    return (
        f"The busiest expert is {expert} of layer {int(load['layer'][layer])} with {values.max():.0%} of the "
        "choices (even "
        f"load: {even:.0%}); {idle} of {values.size} experts were never chosen in this text. The router is most "
        "decided "
        f"in layer {most} (entropy {float(by_layer.min()):.2f} nats) and least in layer {least} "
        f"({float(by_layer.max()):.2f}; {np.log(load.shape[1]):.2f} would be undecided)."
    )


def same_experts_sentence(shares, what):
    """shares: routing.same_experts; what: the other run in words."""
    worst = int(shares["layer"][int(shares.values.argmin())])
    return (
        f"{what} sends the tokens to {float(shares.mean()):.0%} of the same experts, mean over layers; least in "
        f"layer {worst} "
        f"({float(shares.min()):.0%})."
    )


def kind_sentence(distance):
    """Which kind of token has experts of its own. distance: of experts_by_kind."""
    gain = (distance["distance"] - distance["expected"]).sort_values(ascending=False)
    kind = gain.index[0]
    row = distance.loc[kind]
    return (
        f"The load of {kind} tokens ({int(row['n'])} of them) is farthest from that of all tokens beyond chance: total "
        f"variation distance {row['distance']:.2f}, where {int(row['n'])} tokens drawn at random give "
        f"{row['expected']:.2f}. A small number of tokens cannot show more than a hint."
    )
