"""load_model's options, sorted: what llama-server gets, and what the worker gets with it."""

import json
import re
from pathlib import Path

import numpy as np

from ..arguments import finite, whole
from ..errors import ModelNotFoundError, OptionError
from ..files.outputs import path_of
from ..options import (
    CACHE_TYPES,
    KEY_TYPES,
    KIND,
    NUMBERS,
    PARAMETERS,
    SCALINGS,
    SHARED,
    canonical,
    check_pooling,
    refusal,
)

_CHECKS = {
    "pooling": check_pooling,
    "threads": lambda value: whole("threads", value, 1),
    "port": lambda value: whole("port", value, 0, 65535),
    "timeout": lambda value: finite("timeout", value, 0),
}


def sort_options(options):
    """load_model's options -> (arguments of start_server, the variant of the model that both
    processes compute).

    A variant, for the worker (capture/variants.py) and for `both`, has those that were asked for
    of: context ({field of llama_context_params: number}), overrides ([key, type, value]), loras and
    controls ([path, scale]), control_layers (first, last), cache_type. Raises OptionError,
    ModelNotFoundError."""
    server, variant, seen = {}, {}, {}
    for given, value in options.items():
        if value is None:
            continue
        name, value = canonical(given, value)
        if seen.setdefault(name, given) != given:
            raise OptionError(
                f"{given!r} and {seen[name]!r} are the same option of llama-server. Give one of them."
            )
        if name in PARAMETERS:
            server[name] = _CHECKS[name](value) if name in _CHECKS else value
        elif name in SHARED:
            value = _shared(name, value, variant)
            if value is not None:
                server[name] = value
        elif name in KIND:
            server[name] = _plain(name, value, KIND[name])
        else:
            raise OptionError(refusal(given, name))
    keys, values = (server.get(f"cache_type_{each}", "f16") for each in "kv")
    if keys != values and (keys not in KEY_TYPES or values != "f16"):
        raise OptionError(
            "cache_type_k and cache_type_v: captures keep keys and values in one type, or quantized keys "
            "beside f16 values. Give both, alike, or cache_type_k alone."
        )
    if "cache_type_k" in server or "cache_type_v" in server:
        variant["cache_type"] = keys
    return server, variant


def both(variant):
    """The options of llama-server that say what a variant's files and overrides say."""
    named = {"lora_scaled": variant.get("loras"), "control_vector_scaled": variant.get("controls")}
    options = {
        name: ",".join(_quoted(f"{path}:{scale!r}") for path, scale in files)
        for name, files in named.items()
        if files
    }
    if overrides := variant.get("overrides"):
        options["override_kv"] = ",".join(
            _quoted(f"{key}={kind}:{str(value).lower() if kind == 'bool' else value}")
            for key, kind, value in overrides
        )
    return options


def _plain(name, value, kind):
    if name in ("flash_attn", "fit", "reasoning") and isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, dict):
        return json.dumps(value)  # chat_template_kwargs
    if kind == "value" and (isinstance(value, bool) or value == ""):
        raise OptionError(f"{name}={value!r}: it takes a value.")
    if kind != "value" and not isinstance(value, bool):
        raise OptionError(f"{name}={value!r}: it is True or False.")
    return None if kind == "switch" and value is False else value


def _shared(name, value, variant):
    """Puts an option into what the worker gets; returns what llama-server gets."""
    context = (
        variant.setdefault("context", {}) if name in NUMBERS or name.startswith("rope_") else None
    )
    if name in NUMBERS:
        context[name] = value = _number(name, value, NUMBERS[name])
    elif name == "rope_scale":
        value = _number(name, value, float)
        if not value > 0:
            raise OptionError(f"rope_scale={value:g}: it is more than 0.")
        context["rope_freq_scale"] = float(1 / np.float32(value))  # as llama-server rounds it
    elif name == "rope_scaling":
        if value not in SCALINGS:
            raise OptionError(f"rope_scaling={value!r}: it is one of {', '.join(SCALINGS)}.")
        context["rope_scaling_type"] = SCALINGS[value]
    elif name == "override_kv":
        variant["overrides"] = [_override(item) for item in _items(value)]
        return None
    elif name.startswith("cache_type_"):
        if value not in CACHE_TYPES + (KEY_TYPES if name.endswith("k") else ()):
            raise OptionError(
                f"{name}={value!r}: captures keep {' or '.join(CACHE_TYPES)}, keys also {', '.join(KEY_TYPES)}. "
                "llama.cpp has quantized values only with fused attention, which never makes what a "
                "capture shows."
            )
    elif name == "control_vector_layer_range":
        layers = value.split() if isinstance(value, str) else np.ravel(value).tolist()
        if len(layers) != 2:
            raise OptionError(f"{name}={value!r}: it is the first and the last layer, (1, 12).")
        variant["control_layers"] = value = [_number(name, layer, int) for layer in layers]
    else:
        files = variant.setdefault("loras" if name.startswith("lora") else "controls", [])
        files += [_file(name, item, scaled=name.endswith("_scaled")) for item in _items(value)]
        return None
    return value


def _number(name, value, kind):
    try:
        if isinstance(value, bool) or not np.isfinite(float(value)):
            raise ValueError
        return kind(value)
    except (TypeError, ValueError):
        raise OptionError(f"{name}={value!r}: it is a number.") from None


def _items(value):
    """One value, a list of them, or llama-server's own list with commas."""
    if isinstance(value, str) and not Path(value).is_file():
        return [item for item in value.split(",") if item]
    return list(value) if isinstance(value, (list, tuple)) and not _is_pair(value) else [value]


def _is_pair(value):
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], (int, float))


def _file(name, item, scaled):
    path, scale = item if _is_pair(item) else (item, 1.0)
    if scaled and not _is_pair(item):
        path, _, scale = str(item).rpartition(":")
        if not path:
            raise OptionError(f"{name}={str(item)!r}: it is FILE:SCALE.")
    path = path_of(path, ModelNotFoundError)
    if not path.is_file():
        raise ModelNotFoundError(f"{name}: {path} is not a file.")
    if ":" in str(path) or '"' in str(path):
        raise OptionError(
            f"{name}: llama-server cannot read a path with a colon or a quotation mark: {path}. "
            "Make a link to it of another name."
        )
    return [str(path), _number(name, scale, float)]


def _override(item):
    found = re.fullmatch(r"([^=]{1,127})=(int|float|bool|str):(.*)", str(item), re.S)
    truth = {"true": True, "false": False}.__getitem__
    try:
        key, kind, text = found.groups()
        value = {"int": int, "float": float, "str": str, "bool": truth}[kind](text)
        if kind == "str" and len(text.encode()) > 127:
            raise ValueError
    except (AttributeError, KeyError, ValueError):
        raise OptionError(
            f"override_kv={str(item)!r}: it is KEY=TYPE:VALUE, the type one of int, float, bool, str "
            "(at most 127 bytes)."
        ) from None
    return [key, kind, value]


def _quoted(text):
    return '"' + text.replace('"', '""') + '"' if "," in text else text
