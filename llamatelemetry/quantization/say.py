"""What the numbers of notebook 16 say, in one or two sentences each. Every word of them follows
from its arguments."""

import numpy as np

from ..maths import ratio
from ..views.sentences import some
from .decision import NOISE, PARTS, ladder
from .inside import quantized_types


def is_stand_in(file):
    """Whether a GGUFFile is what make_reference makes: it writes so into the file's own name."""
    return "uniform noise" in str(file.name)


def reference_name(file):
    """What figures and sentences call the reference, a GGUFFile: its file's name, and that it is a
    stand-in."""
    return f"{file.path.stem}{', a stand-in' if is_stand_in(file) else ''}"


def reference_note(file, grid):
    """What kind of reference this is, and what that means for the ladder.

    file: the reference's GGUFFile; grid: its grid_share, None for a quantized file.
    """
    kinds = quantized_types(file)
    if kinds or grid > 0.2:
        how = (
            f"quantized ({', '.join(kinds)})"
            if kinds
            else f"quantized and expanded ({grid:.0%} of its blocks lie on a grid)"
        )
        return (
            f"The reference {file.path.name} is itself {how}: which type comes closest to it depends on how the two "
            "grids fall together. What follows is no ladder of precision."
        )
    if is_stand_in(file):
        return (
            f"The reference is a stand-in: {file.name}. The steps between its quantizations are measured; their "
            "distance from the original is not."
        )
    return (
        f"The reference {file.path.name} holds {file.bits_per_weight:.3g} bits per weight; {grid:.0%} of its blocks "
        "lie on an even grid, so that it was not expanded from a quantized file of that kind."
    )


def fallbacks(tables):
    """Which files are not what they are named after. tables: {name: quantize.fallbacks table}."""
    said = []
    for name, table in tables.items():
        if len(table):
            kinds = table.groupby(["instead_of", "type"], sort=False).size()
            parts = [
                f"{n} {'matrices' if n > 1 else 'matrix'} meant for {asked} became {kind}"
                for (asked, kind), n in kinds.items()
            ]
            widths = sorted({f"{width:,}" for width in table["row_width"]})
            said.append(
                f"{name}: {', '.join(parts)}, because rows of {' and '.join(widths)} weights are no multiple of 256."
            )
    return (
        " ".join(said)
        or "No file has a fallback: every matrix is of a type that its file's name stands for."
    )


def quality(table, reference):
    """Best and worst file, and whether more bits meant less divergence. reference: its
    reference_name."""
    good = table.dropna(subset="kld_mean").sort_values("kld_mean")
    best, worst = good.iloc[0], good.iloc[-1]
    said = (
        f"{best.name} is closest to the reference ({reference}): mean KLD {best.kld_mean:.4g} ± {best.kld_mean_err:.2g} nats, same "
        f"top token at {best.same_top:.1%} of {best.n_tokens:.0f} positions, perplexity x {best.ppl_ratio:.4f}."
    )
    if len(good) > 1:
        said += (
            f" {worst.name} is farthest: {worst.kld_mean:.4g} nats, {worst.same_top:.1%}, perplexity x "
            f"{worst.ppl_ratio:.4f}."
        )
        out = [f"{a} has more bits than {b} and yet more divergence" for a, b in ladder(good)]
        said += (
            f" Out of order: {'; '.join(out)}."
            if out
            else " More bits per weight meant less divergence throughout."
        )
    return said


def percentiles(table):
    """How much of the divergence sits in few tokens."""
    row = table.dropna(subset="kld_mean").sort_values("kld_mean").iloc[-1]
    return (
        f"For {row.name} half of the tokens have a KLD below {row.kld_median:.3g} nats, one in a hundred above "
        f"{row.kld_p99:.3g}"
        + some(
            ratio(row.kld_mean, row.kld_median, NOISE),
            ": the mean is {:.1f} times the median.",
            ".",
        )
    )


def tokens(kinds, by):
    """Which kind of token suffers most, over all files."""
    part = kinds.xs(by, level="by")
    mean = (part["kld"] * part["n"]).groupby("kind").sum() / part["n"].groupby("kind").sum()
    n = part["n"].groupby("kind").max()
    mean = mean[n >= 10].sort_values()
    if len(mean) < 2:
        return (
            "Fewer than two kinds have ten tokens or more: this text is too short to compare kinds."
        )
    return (
        f"By {by}, '{mean.index[-1]}' diverges most ({mean.iloc[-1]:.3g} nats on average over the files) and "
        f"'{mean.index[0]}' least ({mean.iloc[0]:.3g}); kinds with fewer than ten tokens are not counted."
    )


def weights(errors):
    """Where the weight error is, per file. errors: {name: weight_errors table}."""
    said = []
    for name, table in errors.items():
        inside = table.dropna(subset="layer")
        groups = inside.groupby("group")["error"].mean().sort_values()
        worst = inside.loc[inside["error"].idxmax()]
        said.append(
            f"{name}: mean {inside['error'].mean():.4f}, most in {groups.index[-1]} ({groups.iloc[-1]:.4f}), worst "
            f"matrix {inside['error'].idxmax()} ({worst['type']}, {worst['error']:.4f})."
        )
    return " ".join(said)


def attention(maps):
    """Which head moved most, per file. maps: {name: DataArray (layer, head)} in bits."""
    said = []
    for name, m in maps.items():
        layer, head = np.unravel_index(int(m.values.argmax()), m.shape)
        said.append(
            f"{name}: mean {m.values.mean():.4f} bits, most in layer {int(m['layer'][layer])} head {head} "
            f"({m.values.max():.4f})."
        )
    return " ".join(said)


def drift(tables):
    """Where the residual stream ends up, and the layer that adds most. tables: {name: hidden_drift
    table}."""
    said = []
    for name, table in tables.items():
        rise = table["error"].diff()
        last, first = table.iloc[-1], table["error_first"].iloc[-1]
        said.append(
            f"{name}: error {last['error']:.3f} and cosine {last['cosine']:.4f} after the last layer (first token: "
            f"{first:.3f}); layer {int(rise.idxmax()) - 1} adds most ({rise.max():+.3f})."
        )
    return " ".join(said)


def embeddings(tables, files):
    """How many neighbours survive. tables: {name: embedding_preservation table}; files: {name:
    GGUFFile}."""
    kinds = {name: files[name].tensors.loc["token_embd.weight", "type"] for name in tables}
    said = " ".join(
        f"{name} ({kinds[name]}): mean cosine {t['cosine'].mean():.5f}, {t['overlap'].mean():.1%} of ten "
        "neighbours kept."
        for name, t in tables.items()
    )
    if len(tables) > 1 and len(set(kinds.values())) == 1:
        said += (
            " All of them hold the embedding in the same type, so that it does not tell them apart."
        )
    return said


def together(correlations, n_layers):
    """How weight error, drift and cost go together over the layers. correlations:
    rank_correlations(layer_table)."""
    names = {
        "weight_error": "weight error",
        "drift_added": "drift added",
        "cost": "cost",
        "fall": "fall",
    }
    pairs = [
        ("weight_error", "cost"),
        ("drift_added", "cost"),
        ("weight_error", "drift_added"),
        ("cost", "fall"),
    ]
    pairs = [(a, b) for a, b in pairs if np.isfinite(correlations.loc[a, b])]
    if not pairs or n_layers < 3:  # two points always have an order of their own
        return f"{n_layers} layer{'s' if n_layers > 1 else ''}: too few, or too alike, for a rank correlation."
    said = [f"{names[a]} and {names[b]} {correlations.loc[a, b]:+.2f}" for a, b in pairs]
    limit = 1.96 / np.sqrt(max(n_layers - 1, 1))
    sure = sum(abs(correlations.loc[a, b]) > limit for a, b in pairs)
    return (
        f"Rank correlations over {n_layers} layers: {', '.join(said)}; {sure} of the {len(pairs)} lie beyond "
        f"±{limit:.2f}, which unrelated columns of this length exceed one time in twenty."
    )


def falls(table):
    """What giving back one part alone removes. table: fall_map."""
    ordered = table.sort_values("fall", ascending=False)
    if table["share"].isna().all():
        return f"The file is {table.attrs['kld']:.2g} nats from the reference here: there is nothing to give back."
    top = [f"{_part(r)} ({r.share:.1%})" for r in ordered.head(3).itertuples()]
    harm = int((table["fall"] < 0).sum())
    return (
        f"Of {table.attrs['kld']:.4g} nats, giving back one part alone removes most at {', '.join(top)}; "
        + (
            f"at {harm} of {len(table)} parts the answer gets worse: their error had been cancelling another's."
            if harm
            else "at none does the answer get worse."
        )
    )


def costs(table, kld):
    """Which parts cost most on their own, and whether the costs add up. table: cost_map; kld: of
    the whole file."""
    ordered = table.sort_values("cost", ascending=False)
    top = [f"{_part(r)} ({r.cost:.3g})" for r in ordered.head(3).itertuples()]
    total = table["cost"].sum()
    if not total > NOISE:
        return f"No part costs anything alone: the {len(table)} costs add up to {total:.2g} nats."
    by = table.groupby("part")["cost"].sum() / total
    half = int((ordered["cost"].cumsum() < total / 2).sum()) + 1
    whole = some(ratio(total, kld, NOISE), "{:.0%} of ", "beside ")
    return (
        f"Quantized alone, {', '.join(top)} nats cost most. The {len(table)} costs add up to {total:.3g} nats, "
        f"{whole}the {kld:.3g} of the whole file; {by.get('attn_out', 0):.0%} of them is attention and "
        f"{by.get('ffn_out', 0):.0%} FFN. Half of the sum lies in {half} of them."
    )


def _part(row):
    return f"the {PARTS[row.part]} of layer {row.layer}"


def mixture(before, chosen, other):
    """Did the recommendation hold? Rows of a Comparison: the plain file, the mixture, the control
    of the same size."""
    won, control = before.kld_mean - chosen.kld_mean, before.kld_mean - other.kld_mean
    added = (chosen.size_bytes - before.size_bytes) / 2**20
    if chosen.size_bytes == before.size_bytes:
        return "Every part that costs something has these bits already: there is nothing to keep at higher precision."
    if other.size_bytes == before.size_bytes:
        return (
            f"For {added:.1f} MiB more, the mean KLD goes from {before.kld_mean:.4g} to {chosen.kld_mean:.4g} nats "
            f"({won:+.4g} removed). No other part is left for a control."
        )
    held = "holds" if won > control and won > 0 else "does not hold"
    return (
        f"The recommendation {held}: for {added:.1f} MiB more, the mean KLD goes from {before.kld_mean:.4g} to "
        f"{chosen.kld_mean:.4g} nats ({won:+.4g} removed); the control, as many other parts "
        f"({(other.size_bytes - before.size_bytes) / 2**20:.1f} MiB), to {other.kld_mean:.4g}."
    )


def answers(rows):
    """Where greedy answers part. rows: as for quantization.figures.answers."""
    names = list(rows[0]["answers"])[1:]
    said = []
    for name in names:
        places = [row["answers"][name][1] for row in rows]
        apart = [p + 1 for p in places if p is not None]
        said.append(
            f"{name}: {len(apart)} of {len(rows)} differ"
            + (f", first at token {min(apart)}" if apart else "")
        )
    return "; ".join(said) + "."


def speed(table):
    """Fastest and slowest file at both tasks, with spread."""
    said = []
    for column, what in (("prompt_tps", "prompt"), ("generation_tps", "generation")):
        ordered = table.sort_values(column)
        fast, slow = ordered.iloc[-1], ordered.iloc[0]
        said.append(
            f"{what}: {fast.name} is fastest at {fast[column]:.1f} ± {fast[column + '_err']:.1f} tokens/s, {slow.name} "
            f"slowest at {slow[column]:.1f} ± {slow[column + '_err']:.1f}"
        )
    return f"For the {said[0]}; for {said[1]}."


def front(fronts):
    """Which files no other beats. fronts: {what: boolean Series}."""
    return " ".join(
        f"On the front of {what}: {', '.join(map(str, mask.index[mask])) or 'none'}."
        for what, mask in fronts.items()
    )
