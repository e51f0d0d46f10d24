"""Figures of published features: their activation over a text, and what other files leave of
them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr

from ..views import theme
from ..views.panels import add_line, name_axes, panels
from ..views.text import token_labels


def strips(activations: xr.DataArray, features: Sequence[int], *, title: str) -> go.Figure:
    """Some features over the tokens of a text, a row each, coloured by activation.

    activations: Features.of's (token, feature); features: their numbers, the first one on top. The
    first token is not drawn where there are others: it can hide all else."""
    if not len(features):
        return theme.nothing(title, "no feature is active")
    later = activations.isel(token=slice(min(1, activations.sizes["token"] - 1), None))
    positions = later["token_position"].values
    labels = token_labels(list(activations["token"].values), positions)
    values, names = later.isel(feature=list(features)).values.T, [str(one) for one in features]
    look: dict[str, Any] = dict(x_title="token", y_title="feature", unit="activation")
    figure = theme.heatmap(values, labels, names, title=title, height=190 + 24 * len(names), **look)
    figure.update_yaxes(type="category")
    return theme.label_ticks(figure, labels, "x", most=48).update_xaxes(tickangle=-60)


def survival(table: pd.DataFrame, *, title: str) -> go.Figure:
    """Share of the features whose correlation with the reference is at most so much, a line per
    file. table: survival.survival."""
    figure, share = panels(title), np.linspace(0, 1, 201)
    for i, name in enumerate(table.columns.drop(["active", "mean"])):
        values = np.sort(table[name].fillna(0).to_numpy())
        control = name == table.attrs.get("control")
        color = theme.COLOR["reference"] if control else theme.CATEGORIES[i % 7]
        look: dict[str, Any] = dict(dash="dot" if control else None, mode="lines")
        at = np.quantile(values, share) if len(values) else []
        add_line(figure, at, share, name, color, unit=".0%", **look)
    name_axes(
        figure, "correlation with the reference", "share of the features below it", tickformat=".0%"
    )
    return figure
