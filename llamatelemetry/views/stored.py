"""What a GGUF file holds, from its header alone: the first figure of a notebook, while nothing has
been loaded.

Takes GGUFFile.tensors."""

import pandas as pd
import plotly.graph_objects as go

from . import panels, theme
from .sentences import counted, listed, sentence

KIND, LAYER = "group", "layer"


def matrices(tensors: pd.DataFrame) -> pd.DataFrame:
    """The rows of GGUFFile.tensors that are matrices: norms and biases are never quantized."""
    return tensors[tensors["shape"].map(len) > 1]


def bits(tensors: pd.DataFrame) -> pd.DataFrame:
    """Bits per weight by group and layer, DataFrame (group, layer): of all matrices that a layer
    has of a group. Groups in the file's order; those outside the layers, the embedding among them,
    are NaN throughout."""
    table = matrices(tensors)
    sizes = table.assign(layer=table[LAYER].fillna(-1).astype(int))
    sums = sizes.groupby([KIND, LAYER], sort=False)[["size_bytes", "n_elements"]].sum()
    wide = (8 * sums["size_bytes"] / sums["n_elements"]).unstack()
    layers = range(max(0, wide.columns.max() + 1) if len(wide) else 0)
    return wide.reindex(index=table[KIND].unique(), columns=layers)


def figure(tensors: pd.DataFrame, *, title: str) -> go.Figure:
    """Left a map of bits per weight, a row per group of matrices, a column per layer; right the
    megabytes of each group, by type."""
    table, wide = matrices(tensors), bits(tensors)
    if table.empty:
        return theme.nothing(title, "This file holds no matrix.")
    drawn = panels.panels(
        title,
        height=160 + 32 * len(wide),
        cols=2,
        shared_yaxes=True,
        column_widths=[0.6, 0.4],
        horizontal_spacing=0.16,
    )
    names = (
        table.assign(layer=table[LAYER].fillna(-1).astype(int))
        .groupby([KIND, LAYER], sort=False)["type"]
        .agg(lambda types: ", ".join(dict.fromkeys(types)))
        .unstack()
        .reindex_like(wide)
        .fillna("")
    )
    bar = dict(title=dict(text="bits per weight", side="right"), x=0.52, thickness=12)
    drawn.add_heatmap(
        z=wide.to_numpy(),
        x=list(wide.columns),
        y=list(wide.index),
        text=names.to_numpy(),
        zmin=0,
        zmax=max(8.5, float(table["bits_per_weight"].max())),
        colorscale=theme.MAGNITUDE,
        colorbar=bar,
        hovertemplate="%{y}, layer %{x}: %{z:.3g} bits per weight, %{text}<extra></extra>",
        row=1,
        col=1,
    )
    sizes = table.groupby([KIND, "type"], sort=False)["size_bytes"].sum().div(1e6).unstack()
    for number, kind in enumerate(sizes.sum().sort_values(ascending=False).index):
        color = theme.CATEGORIES[number] if number < len(theme.CATEGORIES) else theme.MISSING
        hover = "%{y}: %{x:.4g} MB"
        x, y = sizes[kind], list(sizes.index)
        panels.add_bars(drawn, x, y, kind, color, hover, col=2, orientation="h")
    panels.name_axes(drawn, "layer", None, list(wide.columns), autorange="reversed")
    panels.name_axes(drawn, "MB", None, col=2)
    return drawn.update_layout(barmode="stack")


@sentence
def said(tensors: pd.DataFrame) -> str:
    """How large, of which types, and whether all layers are stored alike."""
    table = matrices(tensors)
    weights, size = int(table["n_elements"].sum()), int(table["size_bytes"].sum())
    if not weights:
        return "This file holds no matrix."
    by_group = table.groupby(KIND)["size_bytes"].sum()
    by_type = table.groupby("type")["n_elements"].sum().sort_values(ascending=False) / weights
    types = listed((f"{kind} ({share:.0%} of the weights)" for kind, share in by_type.items()), 4)
    wide = bits(tensors)
    uneven = wide.index[wide.max(axis=1) > wide.min(axis=1)]
    layers = (
        f"{listed(uneven)} have more bits in some layers than in others"
        if len(uneven)
        else "every layer is stored alike"
    )
    return (
        f"{counted(len(table), 'matrix', 'matrices')} of {weights / 1e6:,.1f} million weights take "
        f"{size / 1e6:,.1f} MB, {8 * size / weights:.2f} bits per weight; "
        f"{by_group.idxmax()} takes {by_group.max() / size:.0%} of them. Types: {types}; {layers}."
    )
