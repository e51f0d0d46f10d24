"""What the figures of published features show, computed from their numbers."""

import numpy as np
import pandas as pd
import xarray as xr

from ..views.sentences import counted, listed, quoted, sentence, some
from .survival import CONTROL


@sentence
def fit(found: dict[str, float], n_features: int) -> str:
    """found: Features.fit."""
    share = some(found["explained"], "They explain {:.0%} of the variance of these states.", "")
    if found["explained"] < 0:
        share = "They explain nothing of these states, which are nearer to their mean."
    return (
        f"{found['active']:.1f} of {n_features} features are active per token on average. {share}"
    )


@sentence
def strips(activations: xr.DataArray, top: pd.DataFrame) -> str:
    """top: Features.top of the same activations."""
    if top.empty:
        return "No feature is active after the first token of this text."
    first, everywhere = top.iloc[0], top[top["active"] > 0.5]
    once = int((top["active"] * (activations.sizes["token"] - 1)).round().eq(1).sum())
    most = f"{listed(everywhere['feature'], 4)} at more than half of them"
    often = most if len(everywhere) else "none at more than half of them"
    alone = f"{once} {'is' if once == 1 else 'are'} active at one token only"
    return f"""The strongest is feature {first["feature"]}: {first["largest"]:.3g} at {quoted(first["piece"])} (position
        {first["position"]}). Of {counted(len(top), "feature")} {alone}, {often}."""


@sentence
def survival(table: pd.DataFrame) -> str:
    """table: survival.survival."""
    if table.empty:
        return "No feature is active in enough rows of the reference for a correlation."
    files = table.columns.drop(["active", "mean", CONTROL], errors="ignore")
    if files.empty:
        return f"{counted(len(table), 'feature')} of the reference, and no other file to compare."
    medians = table[files].fillna(0).median()
    facts = [f"{name}: median {median:.3f}" for name, median in medians.items()]
    text = f"Correlation with the reference over {counted(len(table), 'feature')}: {listed(facts)}."
    gone = {name: int(table[name].isna().sum()) for name in files}
    if any(gone.values()):
        silent = listed(f"{n} in {name}" for name, n in gone.items() if n)
        text += f" Never active there, or always alike, and counted as 0: {silent}."
    if CONTROL not in table:
        return text
    low = float(np.quantile(table[CONTROL].fillna(0), 0.05))
    lost = [f"{name} {(table[name].fillna(0) < low).mean():.0%}" for name in files]
    return f"""{text} Kernel noise alone leaves 95% of them at {low:.3f} or above; below that are
        {listed(lost)} of the features."""
