"""Which tokens suffer, and what each file says instead. Pure functions on tables."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from ..views.text import piece_kind, text_of, token_text

BEFORE = 8  # tokens shown before one that moved


def vulnerable_tokens(tokens: pd.DataFrame) -> pd.DataFrame:
    """Mean KLD by kind of token, per candidate: DataFrame indexed by (candidate, by, kind): kld,
    share_of_kld, n.

    tokens: Comparison.tokens. Kinds of the token that came next: number, punctuation, whitespace,
    word (begins one), part (continues one), other; and by how sure the reference was of it: "p >=
    0.5", "0.05 to 0.5", "p < 0.05"."""
    p, labels = np.exp(tokens["logprob_base"]), ["p < 0.05", "0.05 to 0.5", "p >= 0.5"]
    kinds = {
        "piece": tokens["piece"].map(piece_kind),
        "reference's probability": pd.cut(p, [-1, 0.05, 0.5, 2], right=False, labels=labels),
    }
    found = {by: _by_kind(tokens, kind.astype(str)) for by, kind in kinds.items()}
    table = pd.concat(found, names=["by"]).reset_index("by")
    return table.set_index(["candidate", "by", "kind"])


def kind_means(kinds: pd.DataFrame, by: str) -> pd.Series:
    """Mean KLD by kind over all candidates, of the kinds with ten tokens or more. kinds:
    vulnerable_tokens."""
    if kinds.empty:
        return pd.Series(dtype=float)
    part = kinds.xs(by, level="by")
    mean = (part["kld"] * part["n"]).groupby("kind").sum() / part["n"].groupby("kind").sum()
    return mean[part["n"].groupby("kind").max() >= 10]


def _by_kind(tokens, kind):
    groups = tokens.groupby([tokens["candidate"], kind.rename("kind")], sort=False)["kld"]
    table = groups.agg(kld="mean", share_of_kld="sum", n="size").reset_index()
    table["share_of_kld"] /= table.groupby("candidate")["share_of_kld"].transform("sum")
    return table


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
    """Index of the first generated token that differs, or None if one sequence is a beginning of
    the other."""
    n = min(len(base), len(ids))
    different = np.flatnonzero(np.asarray(base)[:n] != np.asarray(ids)[:n])
    return int(different[0]) if len(different) else None
