"""What a capture gives back: named, labelled arrays that can be saved and loaded."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd

from ..errors import CaptureError
from .names import STAGES


class Capture:
    """Stages of one run as xarray.DataArrays (float32), by attribute or index: `cap.attention`, `cap["q"]`.

    stages: the names that are there. tokens: DataFrame (position, id, piece, generated). layers: DataFrame of facts
    per layer (kind, scale, softcap, sliding). model: architecture, n_layer, n_head, n_kv_head, n_embd, n_vocab, name.
    """

    def __init__(self, arrays, tokens, model, layers):
        self._arrays, self.tokens, self.layers = arrays, tokens, layers
        self.model = SimpleNamespace(**model)
        self.stages = tuple(arrays)

    def __getitem__(self, stage):
        if stage not in self._arrays:
            known = "" if stage in STAGES else f" Stages are {', '.join(STAGES)}."
            raise CaptureError(f"this capture holds {', '.join(self.stages)}, not {stage!r}.{known}")
        return self._arrays[stage]

    def __getattr__(self, name):
        if name.startswith("_") or name not in STAGES:
            raise AttributeError(f"Capture has no attribute {name!r}")
        return self[name]

    def __contains__(self, stage):
        return stage in self._arrays

    def __repr__(self):
        shapes = ", ".join(f"{name} {tuple(array.sizes.items())}" for name, array in self._arrays.items())
        return f"<Capture of {self.model.name or self.model.architecture}, {len(self.tokens)} tokens: {shapes}>"

    def save(self, path):
        """Write everything as one safetensors file; returns the path."""
        from safetensors.numpy import save_file

        facts = {
            "model": vars(self.model),
            "layers": self.layers.reset_index().to_dict("list"),
            "tokens": {
                "id": self.tokens["id"].tolist(),
                "piece": [p.hex() if isinstance(p, bytes) else p for p in self.tokens["piece"]],
                "bytes": [isinstance(p, bytes) for p in self.tokens["piece"]],
                "generated": self.tokens["generated"].tolist(),
            },
            "dims": {name: list(array.dims) for name, array in self._arrays.items()},
            "coords": {
                name: {dim: array[dim].values.tolist() for dim in ("layer", "query") if dim in array.coords
                       and array[dim].dtype.kind == "i"}
                for name, array in self._arrays.items()
            },
            "positions": {name: array.attrs.get("positions") for name, array in self._arrays.items()},
        }  # fmt: skip
        arrays = {name: np.ascontiguousarray(array.values) for name, array in self._arrays.items()}
        save_file(arrays, str(path), {"llamatelemetry": json.dumps(facts, default=_plain)})
        return path

    @classmethod
    def load(cls, path):
        """Read a file that `save` wrote."""
        from safetensors import safe_open

        try:
            with safe_open(str(path), "numpy") as file:
                facts = json.loads((file.metadata() or {})["llamatelemetry"])
                arrays = {name: file.get_tensor(name) for name in facts["dims"]}
        except (KeyError, OSError, ValueError) as error:
            raise CaptureError(f"{path} is not a capture saved by llamatelemetry ({error}).") from error
        except Exception as error:  # safetensors' own error type is not public
            raise CaptureError(f"{path} cannot be read as safetensors: {error}") from error
        rows = facts["tokens"]
        pieces = [bytes.fromhex(p) if raw else p for p, raw in zip(rows["piece"], rows["bytes"])]
        tokens = token_table(rows["id"], pieces, rows["generated"])
        layers = pd.DataFrame(facts["layers"]).set_index("layer")
        known = piece_array(tokens)
        labelled = {
            name: label(name, array, facts["coords"][name].get("layer"), known, facts["positions"][name])
            for name, array in arrays.items()
        }
        return cls(labelled, tokens, facts["model"], layers)


def _plain(value):
    return value.item() if hasattr(value, "item") else str(value)


def token_table(ids, pieces, generated):
    """DataFrame (position, id, piece, generated)."""
    return pd.DataFrame({"position": range(len(ids)), "id": ids, "piece": pieces, "generated": generated})


def label(stage, array, layers, pieces, queries=None):
    """A DataArray with the stage's dims: `layer` numbers, pieces on token, query and key, their positions beside.

    pieces: object array of the tokens' pieces (`piece_array`).
    """
    import xarray as xr

    facts = STAGES[stage]
    dims = (("layer",) if facts.per_layer else ()) + facts.dims
    coords = {"layer": list(layers)} if facts.per_layer else {}
    for dim in dims:
        if dim in ("token", "query", "key"):
            chosen = np.arange(len(pieces)) if dim != "query" or queries is None else np.asarray(queries)
            coords[dim] = (dim, pieces[chosen])
            coords[f"{dim}_position"] = (dim, chosen)
    return xr.DataArray(array, dims=dims, coords=coords, name=stage, attrs={"positions": queries} if queries else {})


def piece_array(tokens):
    """The pieces of a token table as an object array (text, or bytes where a piece is not UTF-8)."""
    pieces = np.empty(len(tokens), object)
    pieces[:] = tokens["piece"].tolist()
    return pieces
