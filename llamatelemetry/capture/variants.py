"""What load_model's options make of a model, inside the worker: other metadata, other context
settings, adapters and control vectors. The same as llama-server makes of them
(common_init_from_params in llama.cpp's common/common.cpp)."""

import ctypes
import os
import re
from pathlib import Path

import numpy as np

from ..errors import ModelLoadError
from ..files.header import Header

# llama.cpp's number of a type, and the field of llama_model_kv_override that holds its values.
TAGS = {
    "int": (0, "val_i64"),
    "float": (1, "val_f64"),
    "bool": (2, "val_bool"),
    "str": (3, "val_str"),
}


class Variant:
    """One model's options; see llamatelemetry.options.sort_options for what each holds."""

    def __init__(
        self, api, overrides=(), context=None, loras=(), controls=(), control_layers=(0, 0)
    ):
        self.api, self._context, self._loras, self._layers = (
            api,
            context or {},
            loras,
            control_layers,
        )
        self._overrides = (
            api.llama_model_kv_override * (len(overrides) + 1)
        )()  # ends with an empty key
        for entry, (key, kind, value) in zip(self._overrides, overrides):
            tag, field = TAGS[kind]
            entry.tag, entry.key = tag, key.encode()
            setattr(entry.value, field, value.encode() if kind == "str" else value)
        self._control = control_vector(controls) if controls else None  # (layer from 1, embd)

    def set_model(self, params):
        """Into llama_model_params, before the model is loaded."""
        if len(self._overrides) > 1:
            params.kv_overrides = self._overrides

    def load(self, model):
        """The adapters of a model that is loaded. Raises ModelLoadError for one that does not fit
        it."""
        self._adapters = (self.api.llama_adapter_lora_p_ctypes * len(self._loras))()
        self._scales = (ctypes.c_float * len(self._loras))(*(scale for _, scale in self._loras))
        for number, (path, _) in enumerate(self._loras):
            adapter = self.api.llama_adapter_lora_init(model, os.fsencode(path))
            if not adapter:
                raise ModelLoadError(
                    f"llama.cpp could not apply the adapter {path} to this model; its log says why."
                )
            if self.api.llama_adapter_get_alora_n_invocation_tokens(adapter):
                raise ModelLoadError(
                    f"{path} is an activated adapter (aLoRA): it works from some token of a text on, "
                    "in llama-server only. Captures need a plain one."
                )
            self._adapters[number] = ctypes.cast(adapter, self.api.llama_adapter_lora_p_ctypes)
        self._n_layer, self._n_embd = (
            self.api.llama_model_n_layer(model),
            self.api.llama_model_n_embd(model),
        )

    def set_context(self, params):
        """Into llama_context_params, before a context is made."""
        for field, value in self._context.items():
            setattr(params, field, value)

    def apply(self, context):
        """Adapters and control vector onto a new context."""
        if self._loras:
            self.api.llama_set_adapters_lora(
                context, self._adapters, len(self._loras), self._scales
            )
        if self._control is not None:
            first, last = self._layers
            data = self._control.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            self.api.llama_set_adapter_cvec(
                context,
                data,
                self._control.size,
                self._n_embd,
                first if first > 0 else 1,
                last if last > 0 else self._n_layer,
            )


def check_controls(files, model):
    """ModelLoadError where [path, scale] files hold control vectors of another model than this
    GGUFFile, as far as their sizes tell."""
    rows = control_vector(files)
    if rows.shape[1] != model.n_embd or len(rows) >= model.n_layer:
        raise ModelLoadError(
            f"the control vector is {rows.shape[1]} wide and has directions up to {len(rows)}; "
            f"{model.path.name} is {model.n_embd} wide and takes them from 1 to {model.n_layer - 1}: "
            "it was made for another model."
        )


def control_vector(files):
    """The sum of [path, scale] files as (layer, embd) float32, rows from layer 1 on: tensors
    direction.1, ..."""
    found = {}
    for path, scale in files:
        header = Header(Path(path))
        for name, (kind, shape, offset, _) in header.tensors.items():
            layer = re.fullmatch(r"direction\.(\d+)", name)
            if not layer or not 0 < int(layer[1]) < 1000 or kind.name != "F32" or len(shape) != 1:
                raise ModelLoadError(
                    f"{path} is no control vector: {name} is not a direction.1, .2, ... in F32."
                )
            values = np.frombuffer(header.source.read(header.data + offset, 4 * shape[0]), "<f4")
            found[int(layer[1])] = found.get(int(layer[1]), 0) + np.float32(scale) * values
    if not found or len({len(row) for row in found.values()}) > 1:
        raise ModelLoadError(
            f"no control vector in {', '.join(path for path, _ in files)}: the files hold no "
            "directions, or directions of several widths."
        )
    rows = np.zeros((max(found), len(next(iter(found.values())))), np.float32)
    for layer, row in found.items():
        rows[layer - 1] = row
    return rows
