"""Values that are no numbers: a measure of them would look like a finding. Captures show them,
measures refuse them."""

import numpy as np

from ..errors import NotFiniteError

# What fills a capture where a layer has fewer heads or neurons than the widest: a NaN that no
# arithmetic makes, so that it can be told from one that the model computed.
_BITS = np.uint32(0x7FC00BAD)
MISSING = np.array(_BITS).view(np.float32)[()]


def check_finite(values, stage, layer=None, file=None):
    """`values`, an array of numbers; NotFiniteError, with file, stage and layer, where NaN or
    infinity is among them.

    layer: its number, or the numbers of the layers along the first axis. A capture's padding
    (MISSING) is no fault."""
    array = np.asarray(values)
    if array.dtype.kind != "f":
        return values
    # By layer: small temporaries.
    for number, part in zip(layer, array) if np.ndim(layer) else [(layer, array)]:
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(part.sum()):  # one pass, nothing written: NaN and infinity survive a sum
                continue
        bad = ~np.isfinite(part)
        if part.dtype == np.float32:
            bad &= np.ascontiguousarray(part).view(np.uint32).reshape(part.shape) != _BITS
        if bad.any():
            where = f"{stage!r}" if number is None else f"{stage!r} of layer {number}"
            what = "NaN" if np.isnan(part[bad]).any() else "infinity"
            raise NotFiniteError(
                f"{where}{f' in {file}' if file else ''} holds {what}: nothing can be measured from it. A weight that "
                "is no number makes that, or an edit, or 16 bits that a value does not fit into. capture() shows the "
                "values; another file of this model may be sound."
            )
    return values


def measured(values, dtype=None):
    """A captured DataArray's numbers for a measure, checked: a NumPy array of its shape.

    values: of a Capture, or a part of it (its name is the stage), or a plain array. dtype: None
    keeps the array's own."""
    array = np.asarray(values)
    stage, file = (
        getattr(values, "name", None) or "the captured array",
        getattr(values, "attrs", {}).get("model"),
    )
    layer = values.coords["layer"].values if "layer" in getattr(values, "coords", ()) else None
    if np.ndim(layer):
        check_finite(np.moveaxis(array, values.dims.index("layer"), 0), stage, layer.tolist(), file)
    else:
        check_finite(array, stage, None if layer is None else layer.item(), file)
    return array if dtype is None else array.astype(dtype)
