"""Interventions: what a capture or a score changes in the running model. llama.cpp's later nodes
see every edit."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from ..errors import CaptureError
from .names import EDITABLE, STAGES

if TYPE_CHECKING:
    from .data import Capture

Positions: TypeAlias = int | Sequence[int] | None


@dataclass(frozen=True, eq=False)
class Edit:
    """One change of one stage of one layer, made with `ablate_head`, `ablate_layer`, `scale` or
    `patch`.

    values <- factor * values, or, with `values`, values <- values[...]: (token, embd) or (head,
    token, feature). head, positions: None for all. mean: replace by the mean over positions of the
    unedited run instead."""

    stage: str
    layer: int
    head: int | None = None
    positions: tuple | None = None
    factor: float = 0.0
    values: np.ndarray | None = None
    mean: bool = False

    def __post_init__(self):
        _check_editable(self.stage)
        if self.head is not None and not STAGES[self.stage].by_head:
            raise CaptureError(f"stage {self.stage!r} has no heads: leave `head` out.")


def ablate_head(layer: int, head: int, mode: str = "zero") -> Edit:
    """Remove one head's output before the output projection: zero it, or (mode="mean") put its mean
    over positions.

    The mean is taken over all positions of the same text in a run without edits.
    """
    if mode not in ("zero", "mean"):
        raise CaptureError(f'mode is "zero" or "mean", not {mode!r}.')
    return Edit("attn_heads", _index(layer), head=_index(head), mean=mode == "mean")


def ablate_layer(layer: int, part: str = "both") -> list[Edit]:
    """Remove what a layer's attention, FFN or both add to the residual stream. Returns a list of
    edits."""
    stages = {"attention": ["attn_out"], "ffn": ["ffn_out"], "both": ["attn_out", "ffn_out"]}
    if part not in stages:
        raise CaptureError(f'part is "attention", "ffn" or "both", not {part!r}.')
    return [Edit(stage, _index(layer)) for stage in stages[part]]


def scale(
    stage: str, layer: int, factor: float, head: int | None = None, positions: Positions = None
) -> Edit:
    """Multiply a stage of a layer by a factor; `head` and `positions` restrict it."""
    if isinstance(factor, bool) or not isinstance(factor, (int, float, np.number)):
        raise CaptureError(f"factor is a number, not {factor!r}.")
    return _edit(stage, layer, head, positions, factor=float(factor))


def patch(
    stage: str,
    layer: int,
    source: "Capture | np.ndarray",
    positions: Positions = None,
    head: int | None = None,
) -> Edit:
    """Replace a stage of a layer by what another run had there (activation patching: Meng et al.
    2022).

    source: a Capture that holds the stage, or an array (token, embd), or (head, token, feature) for
    stages by head. positions: token positions to replace, the same in both runs; None for all (the
    texts must be equally long)."""
    _check_editable(stage)
    if isinstance(source, np.ndarray):
        values = source
    elif stage not in getattr(source, "stages", ()):
        raise CaptureError(
            f"a patch's source is an array or a Capture that holds {stage!r}: capture it with stages=."
        )
    elif layer not in source[stage].layer.values:
        raise CaptureError(f"the source capture does not hold {stage!r} of layer {layer}.")
    elif (
        "query" in source[stage].dims and source[stage].sizes["query"] != source[stage].sizes["key"]
    ):
        raise CaptureError(
            "the source capture holds only some queries: capture it without queries= to patch from it."
        )
    else:
        values = source[stage].sel(layer=layer).values
    return _edit(
        stage, layer, head, positions, factor=1.0, values=np.ascontiguousarray(values, np.float32)
    )


def flatten(edits):
    """A flat list of Edit from an edit, a list of edits or lists of edits."""
    if isinstance(edits, Edit):
        return [edits]
    if not isinstance(edits, (list, tuple)):
        raise CaptureError(
            f"edits are what ablate_head, ablate_layer, scale and patch return, not {edits!r}."
        )
    return [flat for edit in edits for flat in flatten(edit)]


def _check_editable(stage):
    if stage not in EDITABLE:
        raise CaptureError(f"stage {stage!r} cannot be edited; these can: {', '.join(EDITABLE)}.")


def _index(value, what="layer and head are"):
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)) or value < 0:
        raise CaptureError(f"{what} whole numbers counted from 0, not {value!r}.")
    return int(value)


def _edit(stage, layer, head, positions, **change):
    head = None if head is None else _index(head)
    if positions is not None:
        positions = tuple(_index(one, "positions are") for one in np.atleast_1d(positions))
    return Edit(stage, _index(layer), head, positions, **change)


def pack(edits, new_file):
    """Edits as rows for JSON; the arrays of patches go through files, whose paths new_file()
    gives."""
    rows = []
    for edit in flatten(edits):
        rows.append(vars(edit) | {"values": None})
        if edit.values is not None:
            rows[-1]["values"] = str(new_file())
            np.save(rows[-1]["values"], edit.values)
    return rows


def unpack(rows):
    """The edits that `pack` made rows of."""
    return [
        Edit(
            **row
            | {
                "positions": row["positions"] and tuple(row["positions"]),
                "values": np.load(row["values"]) if row["values"] else None,
            }
        )
        for row in rows
    ]
