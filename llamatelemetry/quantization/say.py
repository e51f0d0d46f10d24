"""What the numbers of notebook 16 say: `say.x` explains `figures.x`, from the same tables."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import xarray as xr

from ..compare.quality import NOISE
from ..convert.reckoning import Ladder
from ..files.gguf import GGUFFile
from ..maths import ratio
from ..views.sentences import counted, listed, sentence, sentence_by_name, some
from . import contents, decision, tokens
from .figures import COSTS, PARTS

NOTHING = "Nothing was measured: there is nothing to say."


@sentence
def steps(plan: Ladder, model: str) -> str:
    """plan: of reckoning.ladder. model: the name of MODEL's file."""
    names = [f"{model} as it is" if kind == plan.own else kind for kind in plan.wanted]
    facts = [f"Compared are {listed(names)}"]
    if plan.seconds:
        facts.append(f"making files takes about {_time(plan.seconds.values())} on these cores")
    if plan.left:
        why = f"would take {_time(plan.left.values())} more, or more room than scratch has"
        facts.append(f"{listed(plan.left)} can be named in QUANTIZATIONS, but {why}")
    return f"{'; '.join(facts)}."


def _time(seconds):
    total = sum(seconds)
    return f"{total / 60:.0f} minutes" if total >= 90 else f"{total:.0f} s"


@sentence
def focus(name: str, start: str) -> str:
    if name.startswith(start):
        return f"{name} is looked into part by part."
    return f"No {start} is made: {name}, nearest to it in size, is looked into part by part."


@sentence
def reference(file: GGUFFile, grid: float) -> str:
    """grid: of contents.grid_share."""
    lying = f"{some(grid, '{:.0%}')} of its blocks lie on an even grid"
    luck = "how two grids fall together decides what comes closest, and no ladder of precision follows."
    meaning = {
        "quantized": f"is itself quantized: {luck}",
        "expanded": f"was expanded from a quantized file ({lying}): {luck}",
        "stand-in": f"is a stand-in, {file.name}: steps between its quantizations are measured, the original is not.",
        "precise": f"holds {listed(contents.matrix_types(file))}, {file.bits_per_weight:.3g} bits per weight; {lying}: "
        "its weights are those that were trained, as far as a file can show it.",
    }
    return f"The reference {file.path.name} {meaning[contents.reference_kind(file, grid)]}"


@sentence_by_name
def fallbacks(table: pd.DataFrame) -> str:
    kinds = table.groupby(["instead_of", "type"], sort=False).size().items()
    many = (f"{counted(n, 'matrix', 'matrices')} meant for {a} became {b}" for (a, b), n in kinds)
    return "no fallback" if table.empty else listed(many)


@sentence
def ladder(table: pd.DataFrame, reference: str) -> str:
    rows = table.dropna(subset="kld_mean").sort_values("kld_mean")
    if rows.empty:
        return NOTHING
    said = [f"{r.Index} ({_with_error(r)} nats)" for r in rows.itertuples()]
    if len(rows) == 1:
        return f"Mean KLD from {reference}: {said[0]}, the only file."
    if np.ptp(rows["kld_mean"]) <= NOISE:
        return f"Mean KLD from {reference}: the same for all files, {listed(said)}."
    odd = listed(f"{more} than {less}" for more, less in decision.ladder(rows))
    ends = f"{said[0]} is closest to {reference}, {said[-1]} farthest"
    return f"Mean KLD: {ends}. More divergence in spite of more bits: {odd}."


def _with_error(row):
    """Of ten tokens or fewer llama-perplexity's error is 0: it is not known."""
    known = row.n_tokens > 10
    return f"{row.kld_mean:.4g} ± {row.kld_mean_err:.2g}" if known else f"{row.kld_mean:.4g}"


@sentence
def noise(table: pd.DataFrame, quality: pd.DataFrame, floor: float) -> str:
    """table: a Comparison's noise; floor: its floor."""
    rows = table.dropna(subset="kld_mean")
    if rows.empty:
        return "The reference could not be computed another way: its own noise is not known."
    way, most = rows["kld_mean"].idxmax(), rows["kld_mean"].max()
    said = f"Computed another way, the reference is up to {most:.2g} nats from itself ({way})"
    if most <= 0:
        said = "Computed another way, the reference is where it was"
    below = quality.index[quality["kld_mean"] <= floor]
    if quality["kld_mean"].isna().all():
        return f"{said}. No file was measured beside it."
    if len(below):
        return f"{said}. No more than the floor of {floor:.2g} from it, so not to be told from it: {listed(below)}."
    times = float(ratio(quality["kld_mean"].min(), floor))
    over = f"{some(times, '{:,.0f}')} times the floor of {floor:.2g}"
    return f"{said}. The closest file is at {over}: more than noise."


@sentence
def better(pairs: pd.DataFrame, quality: pd.DataFrame) -> str:
    """Of neighbours on the ladder. pairs: of paired.better."""
    order = list(quality["kld_mean"].dropna().sort_values().index)
    verdicts: dict[str, list] = {"yes": [], "equal": [], "cannot be told": []}
    for near, far in zip(order, order[1:]):
        found = pairs.loc[(near, far) if (near, far) in pairs.index else (far, near), "better"]
        verdicts["yes" if found == "no" else found].append(f"{near} and {far}")
    if len(order) < 2:
        return "There are no two files to compare."
    told = len(verdicts["yes"])
    apart = f"Of {counted(len(order) - 1, 'pair')} of neighbours, {told} {'is' if told == 1 else 'are'} told apart"
    equal, open_ = listed(verdicts["equal"]), listed(verdicts["cannot be told"])
    return f"{apart} by this text. Closer than the noise floor: {equal}. Cannot be told: {open_}."


@sentence
def cache(steps: pd.DataFrame, turns: pd.DataFrame, n_tokens: int, why: str = "") -> str:
    """steps, turns: of cache.crossover and cache.turning; why: of cache.with_smaller."""
    if why:
        return f"No smaller cache could be measured: {why}"
    if not (steps["smaller_weights"].notna() & steps["smaller_cache"].notna()).any():
        return "There are no two ways to save memory to compare: a full and a smaller cache are needed."
    asked = steps.dropna(subset=["smaller_weights", "smaller_cache"])
    wins = asked[asked["better"] == "smaller cache"]
    count = f"{len(wins)} of {counted(len(asked), 'budget')}"
    said = f"At {n_tokens:,} tokens a smaller cache beats smaller weights at {count} where both fit"
    if len(wins):
        row = wins.loc[(wins["weights_loss"] - wins["cache_loss"]).idxmax()]
        said += (
            f", most at {row.name / 1e6:,.1f} MB: {row.smaller_cache} ({row.cache_loss:.3g} nats) "
        )
        said += f"instead of {row.smaller_weights} ({row.weights_loss:.3g})"
    if turns.empty:
        return (
            f"{said}. No context makes a smaller cache with larger weights the better of two files."
        )
    first = turns.iloc[0]
    gain = f"from {first.tokens:,} tokens on {first.keep} takes less memory than {first.instead_of}"
    return f"{said}. {gain[0].upper() + gain[1:]} and is {first.gain:.3g} nats closer."


@sentence
def percentiles(table: pd.DataFrame) -> str:
    if table["kld_mean"].isna().all():
        return NOTHING
    row = table.loc[table["kld_mean"].idxmax()]
    whole = float(ratio(row.kld_mean, row.kld_median, NOISE))
    times = some(whole, "{:.1f}", "no measurable number of")
    ends = f"half of the tokens below {row.kld_median:.3g} nats, 1 in 100 above {row.kld_p99:.3g}"
    return f"{row.name}: {ends}; the mean is {times} times the median."


@sentence
def token_kinds(kinds: pd.DataFrame, by: str) -> str:
    mean = tokens.kind_means(kinds, by).sort_values()
    if len(mean) < 2:
        return "Fewer than two kinds have ten tokens or more: too few to compare kinds."
    if np.ptp(mean) <= NOISE:
        return f"Over all files {listed(map(repr, mean.index))} diverge alike ({mean.iloc[0]:.3g} nats)."
    least, most = (f"'{kind}' ({mean[kind]:.3g} nats)" for kind in mean.index[[0, -1]])
    return f"Over all files {most} diverges most and {least} least, of the kinds with ten tokens or more."


@sentence_by_name
def weight_errors(table: pd.DataFrame) -> str:
    error = table.dropna(subset="layer")["error"].dropna()
    if error.empty:
        return "no matrix of a layer to compare"
    worst = error.idxmax()
    if not error[worst] > 0:
        return "no matrix of a layer has an error"
    return f"mean {error.mean():.4f}, worst {worst} ({table['type'][worst]}, {error[worst]:.4f})"


@sentence_by_name
def embeddings(table: pd.DataFrame) -> str:
    mean = table[["cosine", "overlap"]].mean()
    cosine, overlap = some(mean.cosine, "{:.5f}"), some(mean.overlap, "{:.1%}")
    return f"mean cosine {cosine}, {overlap} of ten neighbours kept in {table.attrs['type']}"


@sentence_by_name
def attention(bits: xr.DataArray) -> str:
    heads = bits.to_series().dropna()
    if heads.empty:
        return "no head to compare"
    layer, head = heads.idxmax()
    if not heads.max() > 0:
        return "no head's attention differs"
    return f"mean {heads.mean():.4f} bits, most in layer {layer} head {head} ({heads.max():.4f})"


@sentence_by_name
def drift(table: pd.DataFrame) -> str:
    rise = table["error"].diff().dropna()
    if rise.empty:
        return "no drift to be had"
    end = f"error {table['error'].iloc[-1]:.3f} after the last layer"
    if not rise.max() > 0:
        return f"{end}; no layer adds to it"
    return f"{end}; layer {rise.idxmax() - 1} adds most ({rise.max():+.3f})"


@sentence
def costs(table: pd.DataFrame, kld: float) -> str:
    """kld: of the whole file."""
    total = table["cost"].sum()
    many = "1 cost is" if len(table) == 1 else f"{len(table)} costs add up to"
    whole = f"{many} {total:.3g} nats"
    if not total > NOISE:
        return f"No part costs anything alone: {whole}."
    share = some(float(ratio(total, kld, NOISE)), "{:.0%} of ", "beside ")
    return f"Most costs {_largest(table, 'cost')}. The {whole}, {share}the {kld:.3g} of the whole file."


@sentence
def falls(table: pd.DataFrame) -> str:
    if table["share"].isna().all():
        return f"{table.attrs['kld']:.2g} nats from the reference: there is nothing to give back."
    worse = f"At {(table['fall'] < 0).sum()} of {len(table)} parts the answer gets worse"
    if not (table["share"] > 0).any():
        return f"At no part does the divergence fall. {worse}."
    return f"Most of the divergence falls with {_largest(table, 'share', '.1%')}. {worse}."


def _largest(table, column, form=".3g"):
    rows = table[table[column] > 0].nlargest(3, column)
    names = "the " + rows["part"].map(PARTS).str[0] + " of layer " + rows["layer"].astype(str)
    return listed(f"{name} ({value:{form}})" for name, value in zip(names, rows[column]))


@sentence
def together(correlations: pd.DataFrame, n_layers: int) -> str:
    """correlations: of inside.rank_correlations."""
    pairs = ("weight_error", "cost"), ("drift_added", "cost"), ("cost", "fall")
    rhos = {f"{a} and {b}".replace("_", " "): correlations.loc[a, b] for a, b in pairs}
    known = listed(f"{pair} {rho:+.2f}" for pair, rho in rhos.items() if np.isfinite(rho))
    if known == "none" or n_layers < 3:  # two points always have an order of their own
        return f"{counted(n_layers, 'layer')}: too few, or too alike, for a rank correlation."
    return f"Rank correlations: {known}. Chance alone stays within ±{1.96 / np.sqrt(n_layers - 1):.2f} in 19 of 20."


@sentence
def answers(rows: list[dict]) -> str:
    names = [name for row in rows[:1] for name in row["answers"] if name != "reference"]
    apart = {name: sum(row["answers"][name][1] is not None for row in rows) for name in names}
    differ = listed(f"{n} of {name}" for name, n in apart.items())
    return f"Of {counted(len(rows), 'prompt')}, the answers that differ from the reference's: {differ}."


@sentence
def pareto(fronts: Mapping[str, pd.Series]) -> str:
    files = {COSTS[column][0]: front.index[front] for column, front in fronts.items()}
    return " ".join(f"Unbeaten in {what}: {listed(names)}." for what, names in files.items())


@sentence
def mixture(before: pd.Series, chosen: pd.Series, other: pd.Series, pairs: pd.DataFrame) -> str:
    """Rows of the plain file, the mixture and the control; pairs: paired.better of the three."""
    added, beside = ((row.size_bytes - before.size_bytes) / 2**20 for row in (chosen, other))
    if not added:
        return "Every part that costs something has these bits already: there is nothing to keep."
    step = f"{added:.1f} MiB more take the mean KLD from {before.kld_mean:.4g} to {chosen.kld_mean:.4g} nats"
    rivals = [before.name, *([other.name] if beside else [])]
    closer = {name: _closer(pairs, chosen.name, name) for name in rivals}
    step += f"; a control of {beside:.1f} MiB takes it to {other.kld_mean:.4g}" * bool(beside)
    apart = " No other part is left for a control." * (not beside)
    if set(closer.values()) == {"yes"}:
        return f"The recommendation holds: {step}.{apart}"
    if "no" in closer.values():
        return f"The recommendation does not hold: {step}.{apart}"
    open_ = listed(name for name, told in closer.items() if told != "yes")
    return f"Whether the recommendation holds cannot be told: {step}; not told apart from it: {open_}.{apart}"


def _closer(pairs, one, other):
    """Whether one file is closer than another, as paired.better says it of either order."""
    if (one, other) in pairs.index:
        return pairs.loc[(one, other), "better"]
    turned = {"yes": "no", "no": "yes"}
    found = pairs.loc[(other, one), "better"]
    return turned.get(found, found)
