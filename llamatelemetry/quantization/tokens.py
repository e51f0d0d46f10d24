"""Which tokens suffer, and what each file says instead. Pure functions on tables."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from ..compare.quality import NOISE
from ..maths import ratio
from ..views.text import piece_kind, text_of, token_text

BEFORE = 8  # tokens shown before one that moved
CONFIDENCE = [0.0, 0.25, 0.5, 0.75, 0.95, 1.01]


def vulnerable_tokens(tokens: pd.DataFrame) -> pd.DataFrame:
    """Where it hurts: DataFrame indexed by (candidate, by, kind): kld (mean, nats), median (the
    lower one of two), share_of_kld, n, and same_top, top10, mean_dp, rms_dp there.

    tokens: Comparison.tokens. by and its kinds: "piece", of the token that came next: number,
    punctuation, whitespace, word (begins one), part (continues one), other; "reference's
    probability" of that token; "reference's confidence", its probability of what it holds for
    likeliest, in the buckets of exllamav3's qbench (eval/qbench/measure.py); "position" in the
    window, four parts of what is scored."""
    p, labels = np.exp(tokens["logprob_base"]), ["p < 0.05", "0.05 to 0.5", "p >= 0.5"]
    kinds = {
        "piece": tokens["piece"].map(piece_kind),
        "reference's probability": pd.cut(p, [-1, 0.05, 0.5, 2], right=False, labels=labels),
        "reference's confidence": _between(
            tokens["confidence_base"], CONFIDENCE, "{:.2f} to {:.2f}"
        ),
        "position": _quarters(tokens["position"]),
    }
    found = {by: _by_kind(tokens, kind) for by, kind in kinds.items()}
    table = pd.concat(found, names=["by"]).reset_index("by")
    return table.set_index(["candidate", "by", "kind"])


def _between(values, ends, form):
    """Which bucket each value is in, [low, high): a categorical of their names."""
    labels = [form.format(low, min(high, 1.0)) for low, high in zip(ends, ends[1:])]
    return pd.cut(values, ends, right=False, labels=labels)


def _quarters(positions):
    """Positions as four stretches of the same length: "257 to 320"."""
    first, last = int(positions.min()), int(positions.max())
    ends = np.unique(np.linspace(first, last + 1, 5).astype(int))
    labels = [f"{low} to {high - 1}" for low, high in zip(ends, ends[1:])]
    return pd.cut(positions, ends, right=False, labels=labels)


def kind_means(kinds: pd.DataFrame, by: str) -> pd.Series:
    """Mean KLD by kind over all candidates, of the kinds with ten tokens or more. kinds:
    vulnerable_tokens."""
    if kinds.empty:
        return pd.Series(dtype=float)
    part = kinds.xs(by, level="by")
    mean = (part["kld"] * part["n"]).groupby("kind").sum() / part["n"].groupby("kind").sum()
    return mean[part["n"].groupby("kind").max() >= 10]


def _by_kind(tokens, kind):
    # In the order in which kinds come, and buckets in their own.
    kind = kind.astype("category") if kind.dtype != "category" else kind
    own = tokens[["candidate", "kld", "dp", "same_top", "top10"]].assign(
        kind=kind, square=tokens["dp"] ** 2
    )
    groups = own.groupby(["candidate", "kind"], sort=True, observed=True)
    table = groups["kld"].agg(
        kld="mean",
        median=lambda values: values.quantile(0.5, interpolation="lower"),
        share_of_kld="sum",
        n="size",
    )
    names = dict(same_top="same_top", top10="top10", mean_dp="dp", rms_dp="square")
    means = groups[list(names.values())].mean().set_axis(list(names), axis=1)
    table = table.join(means.assign(rms_dp=np.sqrt(means["rms_dp"]))).reset_index()
    whole = table.groupby("candidate")[["share_of_kld", "n"]].transform("sum")
    table["share_of_kld"] = ratio(table["share_of_kld"], whole["share_of_kld"], NOISE * whole["n"])
    order = {name: place for place, name in enumerate(tokens["candidate"].unique())}
    table = table.sort_values("candidate", key=lambda names: names.map(order), kind="stable")
    return table.astype({"kind": str})


def worst_tokens(
    tokens: pd.DataFrame, candidate: str, pieces: Sequence[str | bytes], n: int = 10
) -> pd.DataFrame:
    """The n tokens of one candidate with the largest KLD: window, position, kld, logprob_base,
    logprob, and as token text what came before, the token itself, what the reference expected and
    what the file expected.

    tokens: Comparison.tokens; pieces: by token id, GGUFFile.pieces."""
    scored = tokens[tokens["candidate"] == candidate].reset_index(drop=True)
    worst = scored.nlargest(n, "kld")
    table = worst[["window", "position", "kld", "logprob_base", "logprob"]].copy()
    whole = scored["window"].diff(BEFORE).eq(0)  # what came before it is of the same window
    table["before"] = [
        token_text(text_of(scored["piece"][place - BEFORE : place]) if whole[place] else "")
        for place in worst.index
    ]
    table["token"] = worst["piece"].map(token_text)
    for column, ids in (("reference expected", "top_base"), ("file expected", "top")):
        table[column] = [token_text(pieces[number]) for number in worst[ids]]
    return table


def answer_rows(
    prompts: Sequence[str], answers: Mapping[str, Sequence[pd.DataFrame]]
) -> list[dict]:
    """Generated answers beside the reference's, for page.answers: [{"prompt", "answers": {name:
    (pieces, index of the first token that is not the reference's, or None)}}].

    answers: {name: Capture.tokens of every prompt}, with "reference" among them."""
    new = {name: [table.query("generated") for table in own] for name, own in answers.items()}
    return [
        {
            "prompt": prompt,
            "answers": {
                name: (
                    list(own[i]["piece"]),
                    first_divergence(new["reference"][i]["id"], own[i]["id"]),
                )
                for name, own in new.items()
            },
        }
        for i, prompt in enumerate(prompts)
    ]


def first_divergence(base: Sequence[int], ids: Sequence[int]) -> int | None:
    """Index of the first generated token that differs, of the end of the shorter sequence where it
    is a beginning of the other (an answer that ends sooner is another one), None for the same."""
    n = min(len(base), len(ids))
    different = np.flatnonzero(np.asarray(base)[:n] != np.asarray(ids)[:n])
    if len(different):
        return int(different[0])
    return None if len(base) == len(ids) else n
