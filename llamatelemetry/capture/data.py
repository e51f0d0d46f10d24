"""What a capture gives back: named, labelled arrays that can be saved and loaded."""

import json
from functools import cached_property
from types import SimpleNamespace

import numpy as np
import pandas as pd

from ..errors import CaptureError
from ..files.outputs import path_of, written
from .names import STAGES


class Capture:
    """Stages of one run as xarray.DataArrays (float32; `experts` int32), by attribute or index:
    `cap.q`, `cap["q"]`.

    stages: the names that are there. tokens: DataFrame (position, id, piece, generated). n_prompt:
    how many of them were given, with what the model puts first; the others were generated. layers:
    DataFrame of facts per layer (kind, scale, softcap; sliding: its mask hid earlier positions in
    this run). model: architecture, n_layer, n_head, n_kv_head, n_embd, n_vocab, name, file (its
    name), gpu (whether a GPU took part)."""

    def __init__(self, parts, tokens, model, layers):
        """parts: {stage: (array, layer numbers or None, query positions or None)}; tokens: (ids,
        pieces, generated); layers: a list of dicts. Labelled when first looked at: a capture of 700
        MB takes less time than its labels."""
        self._parts, self._labelled = parts, {}
        self._tokens, self._layers = tokens, layers
        self.model = SimpleNamespace(**model)
        self.stages = tuple(parts)
        self.n_prompt = len(tokens[2]) - sum(tokens[2])

    @cached_property
    def tokens(self):
        return token_table(*self._tokens)

    @cached_property
    def layers(self):
        return pd.DataFrame(self._layers).rename_axis("layer")

    def __getitem__(self, stage):
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

    def __getattr__(self, name):
        if name.startswith("_") or name not in STAGES:
            raise AttributeError(f"Capture has no attribute {name!r}")
        return self[name]

    def __contains__(self, stage):
        return stage in self._parts

    def __repr__(self):
        shapes = ", ".join(f"{name} {tuple(self[name].sizes.items())}" for name in self.stages)
        return f"<Capture of {self.model.name or self.model.architecture}, {len(self._tokens[0])} tokens: {shapes}>"

    def save(self, path):
        """Write everything as one safetensors file, in a new folder if need be; returns the path.

        The file appears when it is whole, and never in the place of a model. Raises CaptureError
        where it cannot."""
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        ids, pieces, generated = self._tokens
        facts = {
            "model": vars(self.model),
            "layers": self._layers,
            "ids": list(ids),
            "pieces": [
                {"hex": piece.hex()} if isinstance(piece, bytes) else piece for piece in pieces
            ],
            "generated": list(generated),
            "parts": {
                name: [layers, queries] for name, (_, layers, queries) in self._parts.items()
            },
        }
        arrays = {name: np.ascontiguousarray(array) for name, (array, _, _) in self._parts.items()}
        path = path_of(path, CaptureError)
        with written(path, error=CaptureError) as temporary:
            try:
                save_file(arrays, temporary, {"llamatelemetry": json.dumps(facts, default=_plain)})
            except SafetensorError as error:  # its words for what the disk refuses
                raise OSError(str(error)) from error
        return path

    @classmethod
    def load(cls, path):
        """Read a file that `save` wrote."""
        from safetensors import safe_open

        path = path_of(path, CaptureError)
        try:
            with safe_open(str(path), "numpy") as file:
                facts = json.loads((file.metadata() or {})["llamatelemetry"])
                parts = {
                    name: (file.get_tensor(name), *rest) for name, rest in facts["parts"].items()
                }
        except (KeyError, OSError, ValueError) as error:
            raise CaptureError(
                f"{path} is not a capture saved by llamatelemetry ({error})."
            ) from error
        except Exception as error:  # safetensors' own error type is not public
            raise CaptureError(f"{path} cannot be read as safetensors: {error}") from error
        pieces = [
            bytes.fromhex(piece["hex"]) if isinstance(piece, dict) else piece
            for piece in facts["pieces"]
        ]
        return cls(
            parts, (facts["ids"], pieces, facts["generated"]), facts["model"], facts["layers"]
        )


def _plain(value):
    return value.item() if hasattr(value, "item") else str(value)


def token_table(ids, pieces, generated):
    """DataFrame (position, id, piece, generated)."""
    return pd.DataFrame(
        {"position": range(len(ids)), "id": ids, "piece": pieces, "generated": generated}
    )


def label(stage, array, layers, pieces, queries=None):
    """A DataArray with the stage's dims: `layer` numbers, pieces on token, query and key, their
    positions beside."""
    import xarray as xr

    dims = STAGES[stage].all_dims
    coords = {"layer": list(layers)} if STAGES[stage].per_layer else {}
    labels = np.empty(len(pieces), object)  # text, or bytes where a piece is not UTF-8
    labels[:] = pieces
    for dim in dims:
        if dim in ("token", "query", "key"):
            some = dim == "query" and queries is not None
            chosen = np.asarray(queries) if some else np.arange(len(pieces))
            coords[dim] = (dim, labels[chosen])
            coords[f"{dim}_position"] = (dim, chosen)
    return xr.DataArray(array, dims=dims, coords=coords, name=stage)
