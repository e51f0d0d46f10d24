"""Interventions: what a capture or a score changes in the running model. llama.cpp's later nodes
see every edit.

Layers, heads, positions and keys are whole numbers counted from 0: one, a list or range of them, or
a slice: slice(4, None) is everything from 4 on, tokens that are generated later included."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from ..arguments import finite
from ..errors import CaptureError
from .names import EDITABLE, STAGES

if TYPE_CHECKING:
    import xarray as xr

    from .data import Capture

Some: TypeAlias = int | Sequence[int] | np.ndarray | slice
Maybe: TypeAlias = Some | None  # None: all
EVERYTHING = range(2**31)  # more than any text has positions


@dataclass(frozen=True, eq=False)
class Edit:
    """One change of one stage, made with `ablate_head`, `ablate_layer`, `scale`, `add`, `patch` or
    `knock_out`.

    values <- factor * values + summand. layer, head, positions (queries of a grid), keys (of a
    grid): kept as a tuple of numbers in order, a slice, or None for all. values: the summand, as
    the stage has it, (token, embd), (head, token, feature) or (head, query, key), or without its
    positions: (embd,), (feature,), (head, feature), (). mean: replace by the mean over positions of
    the unedited run instead; cut: minus infinity before the softmax."""

    stage: str
    layer: Some
    head: Maybe = None
    positions: Maybe = None
    keys: Maybe = None
    factor: float = 0.0
    values: np.ndarray | None = None
    mean: bool = False
    cut: bool = False

    def __post_init__(self):
        _check_editable(self.stage)
        for name in ("layer", "head", "positions", "keys"):
            object.__setattr__(self, name, _some(name, getattr(self, name)))
        if self.layer is None:
            raise CaptureError(
                "an edit names its layers: a number, a list, or slice(None) for all."
            )
        if self.head is not None and not STAGES[self.stage].by_head:
            raise CaptureError(f"stage {self.stage!r} has no heads: leave `head` out.")
        if self.keys is not None and not STAGES[self.stage].grid:
            raise CaptureError(f"stage {self.stage!r} has no keys: leave `keys` out.")

    @property
    def whole(self):
        """Whether the summand has the text's positions, and not one value for all of them."""
        return self.values is not None and self.values.ndim == len(STAGES[self.stage].dims)

    @property
    def first(self):
        """The first position that it may change."""
        return where(self.positions)[0]


def where(some):
    """What a tuple, a slice or None names, to ask for membership: a tuple or a range."""
    return some if isinstance(some, tuple) else EVERYTHING[some or slice(None)]


def _some(name, value):
    if value is None:
        return None
    if isinstance(value, slice):
        what, ends = f"the ends of {name} are", (value.start, value.stop, value.step)
        value = slice(*(end if end is None else _index(end, what) for end in ends))
        if value.step == 0 or not EVERYTHING[value]:
            raise CaptureError(f"{name}={value} is empty.")
        return value
    what = {"positions": "positions are", "keys": "keys are"}.get(name, "layer and head are")
    if isinstance(value, (str, bytes)):
        _index(value, what)
    some = tuple(sorted({_index(one, what) for one in np.atleast_1d(value)}))
    if not some:
        raise CaptureError(f"{name} is empty: name at least one, or leave it out for all.")
    return some


def ablate_head(layer: Some, head: Maybe, mode: str = "zero") -> Edit:
    """Remove heads' outputs before the output projection: zero them, or (mode="mean") put their
    mean over positions.

    layer, head: one, several, or a slice; head: None for all. The mean is taken over all positions
    of the same text in a run without edits. Raises CaptureError for another mode, and at the
    capture for a layer or head that the model has not."""
    if mode not in ("zero", "mean"):
        raise CaptureError(f'mode is "zero" or "mean", not {mode!r}.')
    return Edit("attn_heads", layer, head, mean=mode == "mean")


def ablate_layer(layer: Some, part: str = "both") -> list[Edit]:
    """Remove what layers' attention, FFN or both add to the residual stream.

    layer: one, several, or a slice; part: "attention", "ffn" or "both". Returns a list of edits.
    Raises CaptureError for another part, and at the capture for a layer without it."""
    stages = {"attention": ["attn_out"], "ffn": ["ffn_out"], "both": ["attn_out", "ffn_out"]}
    if part not in stages:
        raise CaptureError(f'part is "attention", "ffn" or "both", not {part!r}.')
    return [Edit(stage, layer) for stage in stages[part]]


def scale(
    stage: str,
    layer: Some,
    factor: float,
    head: Maybe = None,
    positions: Maybe = None,
    keys: Maybe = None,
) -> Edit:
    """Multiply a stage by a factor; `head`, `positions` (queries) and `keys` (of scores and
    attention) restrict it.

    stage: one with values per layer that `edits` can change, such as "hidden", "attn_out" or "q".
    For k and v, `head` is the key's head: several query heads may share it. Raises CaptureError for
    a factor that is no finite number and for a stage that cannot be edited."""
    factor = finite("factor", factor, error=CaptureError)
    return Edit(stage, layer, head, positions, keys, factor)


def add(
    stage: str,
    layer: Some,
    vector: "np.ndarray | xr.DataArray | Sequence[float] | float",
    strength: float = 1.0,
    positions: Maybe = None,
    head: Maybe = None,
    keys: Maybe = None,
) -> Edit:
    """Add strength * vector to a stage (activation addition: Turner et al. 2023; Rimsky et al.
    2024).

    stage, layer: "hidden" of layer l + 1 is the stream that leaves layer l, where llama.cpp's
    control vectors add their direction l. vector: (embd,) for hidden, attn_out and ffn_out;
    (feature,) or (head, feature) for q, k, v and attn_heads; a number for scores and attention; or
    with the text's positions, as `patch` takes them. positions: None for all, those of generated
    tokens included. In the stage's own units: see `hidden`'s norms for what is much. Raises
    CaptureError here for what is no vector, at the capture for one that is not as wide as the
    model."""
    _check_editable(stage)
    strength = finite("strength", strength, error=CaptureError)
    try:
        with np.errstate(over="ignore"):
            values = np.float32(strength) * np.asarray(vector).astype("f4", casting="same_kind")
    except (TypeError, ValueError):
        raise CaptureError(f"a vector is an array of numbers, not {vector!r:.80}.") from None
    if not np.isfinite(values).all():
        raise CaptureError("strength * vector holds a value that is no finite 32-bit number.")
    least = 0 if STAGES[stage].grid else 1
    if (
        not least <= values.ndim <= len(STAGES[stage].dims)
        or STAGES[stage].grid
        and values.ndim in (1, 2)
    ):
        raise CaptureError(
            f"what is added to {stage!r} is {_shapes(stage)}; this has shape {values.shape}."
        )
    return Edit(stage, layer, head, positions, keys, 1.0, values)


def _shapes(stage):
    whole = f"({', '.join(STAGES[stage].dims)})"
    if STAGES[stage].grid:
        return f"a number, or {whole}"
    return (
        f"(feature,), (head, feature) or {whole}"
        if STAGES[stage].by_head
        else f"(embd,) or {whole}"
    )


def patch(
    stage: str,
    layer: Some,
    source: "Capture | np.ndarray",
    positions: Maybe = None,
    head: Maybe = None,
    keys: Maybe = None,
) -> Edit | list[Edit]:
    """Replace a stage by what another run had there (activation patching: Meng et al. 2022).

    source: a Capture that holds the stage, or an array (token, embd), or (head, token, feature) for
    stages by head. positions: token positions to replace, the same in both runs; None for all (the
    texts must be equally long). Of several layers of a Capture, a list of edits, one per layer.
    Raises CaptureError for a source that has not the stage, or not all queries of it."""
    _check_editable(stage)
    layers = _some("layer", layer)
    if isinstance(source, np.ndarray):
        return Edit(stage, layers, head, positions, keys, 0.0, _plain(source))
    if stage not in getattr(source, "stages", ()):
        raise CaptureError(
            f"a patch's source is an array or a Capture that holds {stage!r}: capture it with stages=."
        )
    there = source[stage].layer.values.tolist()
    chosen = layers if isinstance(layers, tuple) else [one for one in there if one in where(layers)]
    if missing := [one for one in chosen if one not in there] or not chosen and [layer]:
        raise CaptureError(f"the source capture does not hold {stage!r} of layer {missing[0]}.")
    if source[stage].sizes[STAGES[stage].place] != len(source.tokens):
        raise CaptureError(
            f"the source capture holds only some queries or positions of {stage!r}: capture all of them."
        )
    made = [
        Edit(stage, one, head, positions, keys, 0.0, _plain(source[stage].sel(layer=one).values))
        for one in chosen
    ]
    return made[0] if len(made) == 1 else made


def _plain(values):
    return np.ascontiguousarray(values, np.float32)


def knock_out(layer: Some, head: Maybe = None, query: Maybe = None, key: Maybe = None) -> Edit:
    """Cut attention edges: the queries no longer see the keys in these heads (Geva et al. 2023).

    The scores of every pair of `query` and `key` become minus infinity before the softmax, so that
    the rest of each row is renormalized (and its attention sink, where the model has one). Each is
    one position, several, or a slice; None for all. Pairs that the model's own mask hides are no
    edges. Raises CaptureError at the capture where none of the pairs is an edge, and where a row
    would have no key left."""
    return Edit("scores", layer, head, query, key, cut=True)


def flatten(edits):
    """A flat list of Edit from an edit, a list of edits or lists of edits."""
    if isinstance(edits, Edit):
        return [edits]
    if not isinstance(edits, (list, tuple)):
        raise CaptureError(
            "edits are what ablate_head, ablate_layer, scale, add, patch and knock_out return, not "
            f"{edits!r}."
        )
    return [flat for edit in edits for flat in flatten(edit)]


def _check_editable(stage):
    if stage not in EDITABLE:
        raise CaptureError(f"stage {stage!r} cannot be edited; these can: {', '.join(EDITABLE)}.")


def _index(value, what):
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)) or value < 0:
        raise CaptureError(f"{what} whole numbers counted from 0, not {value!r}.")
    return int(value)


def pack(edits, new_file):
    """Edits as rows for JSON; arrays go through files, whose paths new_file() gives."""
    rows = []
    for edit in flatten(edits):
        ends = {
            name: {"slice": [value.start, value.stop, value.step]}
            for name, value in vars(edit).items()
            if isinstance(value, slice)
        }
        rows.append(vars(edit) | {"values": None} | ends)
        if edit.values is not None:
            rows[-1]["values"] = str(new_file())
            np.save(rows[-1]["values"], edit.values)
    return rows


def unpack(rows):
    """The edits that `pack` made rows of."""

    def value(name, given):
        if name == "values" and given:
            return np.load(given)
        return slice(*given["slice"]) if isinstance(given, dict) else given

    return [Edit(**{name: value(name, given) for name, given in row.items()}) for row in rows]
