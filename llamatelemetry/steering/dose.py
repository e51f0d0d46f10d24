"""Dose and response: what a direction does to a measured answer at each strength, beside random
directions of the same length, what it costs on a text that has nothing to do with it, and whether a
direction of one file steers another."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import pandas as pd

from ..arguments import prompt, whole
from ..capture.edits import Edit, Maybe
from ..errors import CaptureError
from ..maths import middle
from .vectors import ControlVector, Position, direction

if TYPE_CHECKING:
    from ..capturing import Prompt
    from ..engine import InferenceEngine

Words: TypeAlias = Sequence[str | int]  # or token ids
STRENGTHS = (-4.0, -2.0, 2.0, 4.0)
KEYS = ["direction", "seed", "strength"]
FILES = ["found_in", "steered"]
SEED = 0
# What a pair's two texts end with, and what is completed under a direction: as plain as can be.
ENDINGS = ("Today", "My friend and I", "At the office", "In the evening", "Then she said", "It was")
PROMPTS = (
    "After the visit the old man felt",
    "When she read the letter she was",
    "The child looked",
)


def contrast(first: str, second: str, endings: Sequence[str] = ENDINGS) -> list[tuple[str, str]]:
    """Pairs for `direction`: two texts before each of several endings."""
    return [(f"{first.strip()} {end}", f"{second.strip()} {end}") for end in endings]


def answers(
    engine: "InferenceEngine", more: Words, less: Words
) -> tuple[list[int], list[int], list[int]]:
    """(what all words begin with, ids of `more`, ids of `less`): of each word the first token that
    it does not share with all the others, and before it what they share. Words are written as the
    model writes them after a text (" happy", with its blank).

    CaptureError for no word, and for words of both groups that are told apart only later."""
    more, less = ([one] if isinstance(one, str) else list(one) for one in (more, less))
    lists = [
        engine.tokenize(word, False)["id"].tolist() if isinstance(word, str) else [int(word)]
        for word in (*more, *less)
    ]
    shared = list(os.path.commonprefix(lists)) if len(lists) > 1 else []
    at = len(shared)
    wanted, other = (
        list(dict.fromkeys(ids[at] for ids in some if len(ids) > at))
        for some in (lists[: len(more)], lists[len(more) :])
    )
    if not more or not all(len(ids) > at for ids in lists) or set(wanted) & set(other):
        raise CaptureError(
            f"`more` and `less` are words that one token tells apart, at least one in `more`: not "
            f"{more!r} and {less!r}."
        )
    return shared, wanted, other


def variants(
    vector: ControlVector,
    strengths: Sequence[float] = STRENGTHS,
    layers: Maybe = None,
    positions: Maybe = None,
    n_random: int = 3,
    seed: int = SEED,
) -> dict[tuple[str, int, float], list[Edit]]:
    """{(direction, seed, strength): edits} for engine.predict and engine.sweep: "found", seed -1,
    and "random", n_random of the same length; without strength 0, which is no edit."""
    if not isinstance(vector, ControlVector):
        raise CaptureError(f"a dose is of a ControlVector, not {vector!r:.80}.")
    whole("n_random", n_random, 0, error=CaptureError)
    seed = whole("seed", seed, 0, error=CaptureError)
    made = {-1: vector} | {
        seed + number: vector.random(seed + number) for number in range(n_random)
    }
    return {
        ("found" if number < 0 else "random", number, float(strength)): one.edits(
            strength, layers, positions
        )
        for number, one in made.items()
        for strength in strengths
        if strength
    }


def dose(
    engine: "InferenceEngine",
    vector: ControlVector,
    prompts: "Sequence[Prompt]",
    more: Words,
    less: Words = (),
    *,
    strengths: Sequence[float] = STRENGTHS,
    layers: Maybe = None,
    positions: Maybe = None,
    n_random: int = 3,
    seed: int = SEED,
    progress: bool = True,
) -> pd.DataFrame:
    """How probable some words are after prompts, at each strength of a direction and of random ones
    of its length (Turner et al. 2023; Rimsky et al. 2024).

    more, less: words, or ids, as `answers` tells them apart; layers, positions: where the direction
    is added, None for all. A row per direction, seed, strength and prompt: difference (nats) is
    log P(more) - log P(less), of two words the difference of their logits; without `less` the
    log-odds of `more`; probability is that of `more`; kl (nats) how far the whole prediction moved.
    Strength 0, without an edit, is a row of the found direction. One run per row; prompts are read
    once for positions that start late. Raises CaptureError."""
    edits = variants(vector, strengths, layers, positions, n_random, seed)
    vector.check_fits(engine._loaded())
    shared, wanted, other = answers(engine, more, less)
    if isinstance(prompts, str) or not len(prompts):
        raise CaptureError("prompts are several texts, at least one.")
    if not any(strengths):
        raise CaptureError(
            f"strengths={list(strengths)!r:.80}: give one that is not 0, which is no edit."
        )
    tables = []
    for number, given in enumerate(prompts):
        ids = prompt(given)
        if isinstance(ids, str):
            ids = engine.tokenize(ids)["id"].tolist()
        said = engine.predict(
            [*ids, *shared], edits, [*wanted, *other], progress=progress and not number
        )
        keys = pd.DataFrame([*said.variant.values, ("found", -1, 0.0)], columns=KEYS)
        logprob = np.vstack([said["logprob"], said["before"][:1]]).astype(float)
        group = np.logaddexp.reduce(logprob[:, : len(wanted)], axis=1)
        if other:
            against = np.logaddexp.reduce(logprob[:, len(wanted) :], axis=1)
        else:
            against = np.log(-np.expm1(np.minimum(group, -1e-9)))
        columns = {"difference": group - against, "probability": np.exp(group)}
        tables.append(keys.assign(prompt=number, **columns, kl=[*said["kl"].values, 0.0]))
    table = pd.concat(tables, ignore_index=True)
    return table.sort_values([*KEYS, "prompt"], ignore_index=True)


def price(
    engine: "InferenceEngine",
    vector: ControlVector,
    text: "Prompt",
    *,
    strengths: Sequence[float] = STRENGTHS,
    layers: Maybe = None,
    n_random: int = 3,
    seed: int = SEED,
    progress: bool = True,
) -> pd.DataFrame:
    """What a direction costs: the perplexity of a neutral text under it over that without it.

    A row per direction, seed and strength: mean (the factor), low and high (1.96 standard errors
    over tokens, which are not independent), loss_change (nats per token)."""
    vector.check_fits(engine._loaded())
    if not any(strengths):
        raise CaptureError(
            f"strengths={list(strengths)!r:.80}: give one that is not 0, which is no edit."
        )
    edits = variants(vector, strengths, layers, None, n_random, seed)
    rows = engine.sweep(text, edits, progress=progress)
    change, error = rows["loss_change"].to_numpy(), 1.96 * rows["loss_change_err"].to_numpy()
    table = pd.DataFrame(list(rows.index), columns=KEYS).assign(
        mean=np.exp(change), low=np.exp(change - error), high=np.exp(change + error)
    )
    table = table.assign(loss_change=change)
    none = ("found", -1, 0.0, 1.0, 1.0, 1.0, 0.0)
    table.loc[len(table)] = none
    return table.sort_values(KEYS, ignore_index=True)


def summary(
    dosed: pd.DataFrame, column: str = "difference", n_boot: int = 1000, seed: int = SEED
) -> pd.DataFrame:
    """How far a dose table's column is from its value at strength 0, means over prompts with
    intervals: direction, strength, mean, low, high.

    found: a 95% bootstrap over prompts, the same draws at every strength; NaN of one prompt, which
    says nothing of others. random: the mean over directions, low and high the least and the largest
    of their means. Of `across`'s table one
    after the other, with found_in and steered."""
    if FILES[0] in dosed:
        parts = [
            summary(part.drop(columns=FILES), column, n_boot, seed).assign(
                **dict(zip(FILES, names))
            )
            for names, part in dosed.groupby(FILES, sort=False)
        ]
        return pd.concat(parts, ignore_index=True)
    wide = dosed.pivot_table(index=KEYS, columns="prompt", values=column)  # (key, prompt)
    wide = wide - wide.loc[("found", -1, 0.0)]
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, wide.shape[1], (n_boot, wide.shape[1]))
    rows = []
    for (name, strength), part in wide.groupby(["direction", "strength"]):
        means = part.mean(axis=1)
        low, high = means.min(), means.max()
        if name == "found":
            low, high = middle(part.to_numpy()[0][draws].mean(1))
            low, high = (low, high) if wide.shape[1] > 1 else (np.nan, np.nan)
        rows.append((name, strength, means.mean(), low, high))
    return pd.DataFrame(rows, columns=["direction", "strength", "mean", "low", "high"])


def response(dosed: pd.DataFrame, column: str = "difference") -> pd.DataFrame:
    """What strength does per unit: the least-squares slope of a dose table's column through its
    value at strength 0, of every direction and prompt (and file): direction, seed, prompt,
    slope."""
    files = [name for name in FILES if name in dosed]
    at = [*files, "prompt"]
    zero = dosed[dosed["strength"] == 0].set_index(at)[column].rename("zero")
    moved = dosed[dosed["strength"] != 0].join(zero, on=at)
    up = (moved[column] - moved["zero"]) * moved["strength"]
    sums = moved.assign(up=up, square=moved["strength"] ** 2)
    sums = sums.groupby([*files, "direction", "seed", "prompt"])[["up", "square"]].sum()
    return (sums["up"] / sums["square"]).rename("slope").reset_index()


def across(
    engines: "Mapping[str, InferenceEngine]",
    pairs: "Sequence[tuple[Prompt, Prompt]]",
    prompts: "Sequence[Prompt]",
    more: Words,
    less: Words = (),
    *,
    layers: Maybe = None,
    method: Literal["mean", "pca"] = "mean",
    position: Position = -1,
    strengths: Sequence[float] = STRENGTHS,
    progress: bool = True,
) -> tuple[dict[str, ControlVector], pd.DataFrame]:
    """Does a direction found in one precision steer another? {name: its direction}, and the dose
    table of every direction in every file: found_in, steered, and `dose`'s columns.

    engines: of files of one model, each loaded, {name: engine}. The vectors' `cosine` says how far
    apart the directions themselves are."""
    found = {
        name: direction(engine, pairs, layers, method, position) for name, engine in engines.items()
    }
    tables = []
    for name, engine in engines.items():
        for origin, vector in found.items():
            table = dose(
                engine, vector, prompts, more, less,
                strengths=strengths, n_random=0, progress=progress,
            )  # fmt: skip
            tables.append(table.assign(found_in=origin, steered=name))
    return found, pd.concat(tables, ignore_index=True)
