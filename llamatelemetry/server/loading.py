"""What load_model asked for, settled once for both processes: options, context and the numbers that
depend on them."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..arguments import finite, whole
from ..errors import ModelLoadError, ModelNotFoundError, OptionError
from ..files.outputs import path_of
from ..options import (
    CACHE_TYPES,
    KIND,
    NUMBERS,
    PARAMETERS,
    SCALINGS,
    SHARED,
    canonical,
    check_pooling,
    pooling_of,
    refusal,
)

_CHECKS = {
    "pooling": check_pooling,
    "threads": lambda value: whole("threads", value, 1),
    "port": lambda value: whole("port", value, 0, 65535),
    "timeout": lambda value: finite("timeout", value, 0),
}
DEFAULT_CTX = 4096  # tokens, where the model was trained for more: a KV cache for 128k tokens does not fit a T4


@dataclass(frozen=True)
class Setup:
    """ctx_size: tokens of a context in both processes; server: further arguments of start_server;
    session: of CaptureSession; says: what the user should know about ctx_size, or ""."""

    ctx_size: int
    server: dict = field(default_factory=dict)
    session: dict = field(default_factory=dict)
    says: str = ""


def settle(gguf, ctx_size, options):
    """The Setup for a GGUFFile, whose metadata become what the option override_kv makes of them.

    Raises OptionError, ModelNotFoundError, ModelLoadError for a GGUF file that is no model.
    """
    server, variant = sort_options(options)
    if what := _no_model(gguf):
        raise ModelLoadError(f"{gguf.path} is {what}.")
    gguf.override({key: value for key, _, value in variant.get("overrides", ())})
    if server.get("embeddings"):
        server.setdefault("pooling", pooling_of(gguf))
    trained, fixed = trained_context(gguf, variant.get("context", {}))
    size = whole("ctx_size", ctx_size, 1, none=True) or min(DEFAULT_CTX, trained or DEFAULT_CTX)
    says, longest = "", None
    if trained and size > trained:
        says = f"ctx_size={size:,}: {gguf.name} was trained for {trained:,} tokens. "
        if fixed:
            longest = trained
            says += f"Answers and captures end there: {fixed}."
        else:
            says += "What comes after those, in answers and captures, it has never learned."
            variant["overrides"] = _longer(gguf, size, variant.get("overrides", []))
    session = {"longest": longest, "cache_type": variant.pop("cache_type", None)}
    # llama.cpp makes contexts in steps of 256, and llama-server ends a request at what the model
    # was trained for.
    size = min(-(-size // 256) * 256, max(trained, size)) if trained else -(-size // 256) * 256
    return Setup(size, server | both(variant), session | {"variant": variant}, says)


def _no_model(gguf):
    """What a GGUF file is that is no language model, and what to do with it; None for a model."""
    kind, architecture = gguf.metadata.get("general.type"), gguf.architecture
    if kind == "adapter":
        return "an adapter, not a model: load the model that it was made for, with lora=... for it"
    if architecture == "controlvector":
        return "a control vector, not a model: load the model that it was made for, with control_vector=... for it"
    if kind in ("mmproj", "imatrix") or architecture == "clip":
        return f"a part beside a model ({kind or architecture}), not the model: give the model's own file"
    return (
        None
        if gguf.has_tensor("")
        else "a vocabulary without weights: give a file of the whole model"
    )


def described(variant):
    """What a variant changes, for a capture's label: " with lora a.gguf x 0.5, rope_freq_base 500";
    "" for nothing."""
    files = [
        (name, Path(path).name, scale)
        for name, key in (("lora", "loras"), ("control vector", "controls"))
        for path, scale in variant.get(key, ())
    ]
    said = [
        f"{name} {file}" + (f" x {scale:g}" if scale != 1 else "") for name, file, scale in files
    ]
    said += [
        f"{key} {value}"
        for key, _, value in variant.get("overrides", ())
        if not key.endswith("context_length")
    ]
    scalings = {number: name for name, number in SCALINGS.items()}
    said += [
        f"rope_scaling {scalings[value]}" if name == "rope_scaling_type" else f"{name} {value:g}"
        for name, value in variant.get("context", {}).items()
    ]
    return f" with {', '.join(said)}" if said else ""


def _longer(gguf, size, overrides):
    """Overrides with which llama-server lets a request have `size` tokens: else it ends it at what
    the file says. What llama.cpp derives from the file's own length stays as it is."""
    length = f"{gguf.architecture}.context_length"
    original = f"{gguf.architecture}.rope.scaling.original_context_length"
    rows = [row for row in overrides if row[0] != length] + [[length, "int", size]]
    return rows if original in gguf.metadata else rows + [[original, "int", gguf.n_ctx_train]]


def trained_context(gguf, context):
    """(tokens that llama-server lets a request have, why that cannot be changed or ""). context:
    the options'."""

    def key(name, default=None):
        return gguf.metadata.get(f"{gguf.architecture}.rope.scaling.{name}", default)

    trained = gguf.n_ctx_train
    factor = np.float32(
        key("factor") or gguf.metadata.get(f"{gguf.architecture}.rope.scale_linear") or 1
    )
    scale = np.float32(context.get("rope_freq_scale") or 1 / factor)
    named = {"none": 0, "linear": 1, "yarn": 2, "longrope": 3}.get(key("type", "linear"), 1)
    if context.get("rope_scaling_type", named) == 2 and scale != np.float32(1 / factor):
        # llama.cpp takes YaRN that the user asked for as what extends the training
        # (llama_init_from_model).
        original = context.get("yarn_orig_ctx") or key("original_context_length") or trained
        return int(np.float32(original) / scale), "the YaRN scaling that you gave reaches that far"
    if gguf.has_tensor("position_embd.weight"):
        return trained, "its positions are a table of that length"
    return trained, ""


def least_context(gguf, size):
    """Tokens that a context needs at least to have the rotary factors that it would have with
    `size` tokens.

    LongRoPE (Ding et al. 2024; Phi 3 and 4): llama.cpp takes the long factors where a context, in
    steps of 256, holds more than the original one (llama_model::get_rope_factors). 0 for every
    other model."""
    if not gguf.has_tensor("rope_factors_long.weight"):
        return 0
    original = gguf.metadata.get(
        f"{gguf.architecture}.rope.scaling.original_context_length", gguf.n_ctx_train
    )
    return original + 1 if -(-size // 256) * 256 > original else 0


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
    if server.get("cache_type_k", "f16") != server.get("cache_type_v", "f16"):
        raise OptionError(
            "cache_type_k and cache_type_v: captures keep keys and values in one type. Give both, alike."
        )
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
        if value not in CACHE_TYPES:
            raise OptionError(
                f"{name}={value!r}: captures keep {' or '.join(CACHE_TYPES)}. llama.cpp has quantized "
                "values only with fused attention, which never makes what a capture shows."
            )
        variant["cache_type"] = value
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
        if isinstance(value, bool):
            raise ValueError
        return kind(value)
    except (TypeError, ValueError):
        raise OptionError(f"{name}={value!r}: it is a number.") from None


def _items(value):
    """One value, a list of them, or llama-server's own list with commas."""
    if isinstance(value, str) and not Path(value).is_file():
        return [item for item in value.split(",") if item]
    return [value] if isinstance(value, (str, Path)) or _is_pair(value) else list(value)


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
    kinds = {
        "int": int,
        "float": float,
        "str": str,
        "bool": {"true": True, "false": False}.__getitem__,
    }
    try:
        key, kind, text = found.groups()
        value = kinds[kind](text)
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
