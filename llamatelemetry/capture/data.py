"""What a capture gives back: named, labelled arrays that can be saved and loaded."""

import json
import os
import struct
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import pandas as pd

from ..errors import CaptureError, shown
from ..files.outputs import path_of, written
from ..imports import uninterrupted
from ..metadata import check_capture
from .names import STAGES

if TYPE_CHECKING:
    import xarray as xr

Tokens: TypeAlias = tuple[Sequence[int], Sequence[str | bytes], Sequence[bool]]
Part: TypeAlias = tuple[np.ndarray, Sequence[int] | None, Sequence[int] | None]


class Capture:
    """Stages of one run as xarray.DataArrays (float32; `experts` int32), by attribute or index:
    `cap.q`, `cap["q"]`.

    stages: the names that are there. tokens: DataFrame (position, id, piece, generated). n_prompt:
    how many of them were given, with what the model puts first; the others were generated. layers:
    DataFrame of facts per layer (kind, scale, softcap; sliding: its mask hid earlier positions in
    this run). model: architecture, n_layer, n_head, n_kv_head, n_embd, n_vocab, name, file (its
    name), gpu (whether a GPU took part)."""

    def __init__(
        self, parts: Mapping[str, Part], tokens: Tokens, model: Mapping, layers: Sequence[Mapping]
    ) -> None:
        """parts: {stage: (array, layer numbers or None, positions or None)}; tokens: (ids,
        pieces, generated); layers: a list of dicts. Labelled when first looked at: a capture of 700
        MB takes less time than its labels."""
        self._parts = parts
        self._labelled: dict[str, xr.DataArray] = {}
        self._tokens, self._layers = tokens, layers
        self.model = SimpleNamespace(**model)
        self.stages = tuple(parts)
        self.n_prompt = len(tokens[2]) - sum(tokens[2])

    @cached_property
    def tokens(self) -> pd.DataFrame:
        return token_table(*self._tokens)

    @cached_property
    def layers(self) -> pd.DataFrame:
        return pd.DataFrame(self._layers).rename_axis("layer")

    def __getitem__(self, stage: str) -> "xr.DataArray":
        if stage not in self._parts:
            known = "" if stage in STAGES else f" Stages are {', '.join(STAGES)}."
            raise CaptureError(
                f"this capture holds {', '.join(self.stages)}, not {stage!r}.{known}"
            )
        if stage not in self._labelled:
            array, layers, queries = self._parts[stage]
            self._labelled[stage] = label(stage, array, layers, self._tokens[1], queries)
            self._labelled[stage].attrs["model"] = getattr(self.model, "file", self.model.name)
        return self._labelled[stage]

    def __getattr__(self, name: str) -> "xr.DataArray":
        if name.startswith("_") or name not in STAGES:
            raise AttributeError(f"Capture has no attribute {name!r}")
        return self[name]

    def __contains__(self, stage: object) -> bool:
        return stage in self._parts

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {tuple(self[name].sizes.items())}" for name in self.stages)
        return f"<Capture of {self.model.name or self.model.architecture}, {len(self._tokens[0])} tokens: {shapes}>"

    def save(self, path: str | os.PathLike) -> Path:
        """Write everything as one safetensors file, in a new folder if need be; returns the path.

        The file appears when it is whole, and never in the place of a model. Raises CaptureError
        where it cannot."""
        ids, pieces, generated = self._tokens
        facts = {
            "model": vars(self.model),
            "layers": self._layers,
            "ids": list(ids),
            "pieces": [{"hex": one.hex()} if isinstance(one, bytes) else one for one in pieces],
            "generated": list(generated),
            "parts": {
                name: [layers, queries] for name, (_, layers, queries) in self._parts.items()
            },
        }
        header: dict = {"__metadata__": {"llamatelemetry": json.dumps(facts, default=_plain)}}
        end = 0
        for name, (array, _, _) in self._parts.items():
            start, end, kind = end, end + array.nbytes, {"f": "F32", "i": "I32"}[array.dtype.kind]
            header[name] = {"dtype": kind, "shape": array.shape, "data_offsets": [start, end]}
        head = json.dumps(header).encode()
        head += b" " * (-len(head) % 8)
        path = path_of(path, CaptureError)
        with written(path, need=end, error=CaptureError) as half, open(half, "wb") as file:
            file.write(struct.pack("<Q", len(head)) + head)
            for array, _, _ in self._parts.values():  # safetensors' own writer copies all of them
                file.write(np.ascontiguousarray(array).data)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Capture":
        """Read a file that `save` wrote. Raises CaptureError for any other, and for one whose parts
        do not belong together."""
        from safetensors import SafetensorError, safe_open

        path = path_of(path, CaptureError)
        try:
            with safe_open(str(path), "numpy") as file:
                facts = json.loads((file.metadata() or {})["llamatelemetry"])
                check_capture(facts)
                ids, pieces, generated = facts["ids"], facts["pieces"], facts["generated"]
                pieces = [bytes.fromhex(p["hex"]) if isinstance(p, dict) else p for p in pieces]
                parts = {
                    name: (_saved_array(file, len(ids), name, *part), *part)
                    for name, part in facts["parts"].items()
                }
        except (KeyError, OSError, ValueError, RecursionError) as error:
            raise CaptureError(
                f"{shown(path)} is not a capture saved by llamatelemetry ({error!s:.200})."
            ) from error
        except SafetensorError as error:
            raise CaptureError(
                f"{shown(path)} cannot be read as safetensors: {error!s:.200}"
            ) from error
        return cls(
            parts, (ids, pieces, generated), {"name": None} | facts["model"], facts["layers"]
        )


def _plain(value):
    return value.item() if hasattr(value, "item") else str(value)


def _saved_array(file, n_tokens, name, layers, queries):
    """A stage's array from a saved file; ValueError where its sizes are not those of the tokens,
    layers and queries beside it."""
    if name not in STAGES or (STAGES[name].per_layer and layers is None):
        raise ValueError(f"{name!r:.80} is no stage with its layers")
    sizes = dict.fromkeys(("token", "query", "key"), n_tokens)
    sizes |= {} if layers is None else {"layer": len(layers)}
    sizes |= {} if queries is None else {STAGES[name].place: len(queries)}
    array, dims = file.get_tensor(name), STAGES[name].all_dims
    expected = tuple(sizes.get(dim, size) for dim, size in zip(dims, array.shape))
    right = array.dtype in (np.float32, np.int32) and all(
        0 <= query < n_tokens for query in queries or ()
    )
    if not right or array.shape != expected or len(dims) != array.ndim:
        raise ValueError(f"{name} is {array.dtype} {array.shape}, not {expected} of {dims}")
    return array


def token_table(ids, pieces, generated):
    """DataFrame (position, id, piece, generated)."""
    return pd.DataFrame(
        {"position": range(len(ids)), "id": ids, "piece": pieces, "generated": generated}
    )


def label(stage, array, layers, pieces, queries=None):
    """A DataArray with the stage's dims: `layer` numbers, pieces on token, query and key, their
    positions beside. queries: the positions that it holds, None: all."""
    with uninterrupted():
        import xarray as xr

    dims = STAGES[stage].all_dims
    coords = {"layer": list(layers)} if STAGES[stage].per_layer else {}
    labels = np.empty(len(pieces), object)  # text, or bytes where a piece is not UTF-8
    labels[:] = pieces
    for dim in dims:
        if dim in ("token", "query", "key"):
            some = dim == STAGES[stage].place and queries is not None
            chosen = np.asarray(queries) if some else np.arange(len(pieces))
            coords[dim] = (dim, labels[chosen])
            coords[f"{dim}_position"] = (dim, chosen)
    return xr.DataArray(array, dims=dims, coords=coords, name=stage)
