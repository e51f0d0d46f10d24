"""What load_model asked for, settled once for both processes: options, context and the numbers that
depend on them."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..arguments import whole
from ..errors import ModelLoadError, OptionError
from ..options import CACHE_TYPES, KEY_TYPES, SCALINGS, pooling_of
from .settings import both, sort_options

# Tokens, where the model was trained for more: a KV cache for 128k tokens does not fit a T4.
DEFAULT_CTX = 4096


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
    if session["cache_type"] in KEY_TYPES and gguf.head_dim % 32:
        raise OptionError(
            f"cache_type_k={session['cache_type']!r} holds blocks of 32 numbers, and {gguf.name} has heads "
            f"of {gguf.head_dim}: leave it out, or use {' or '.join(CACHE_TYPES)}."
        )
    # llama-server ends a request at what the model was trained for.
    size = min(in_steps(size), max(trained, size)) if trained else in_steps(size)
    return Setup(size, server | both(variant), session | {"variant": variant}, says)


def in_steps(size):
    """Tokens of a context: llama.cpp makes them in steps of 256."""
    return -(-size // 256) * 256


def _no_model(gguf):
    """What a GGUF file is that is no language model, and what to do with it; None for a model."""
    kind, architecture = gguf.metadata.get("general.type"), gguf.architecture
    if kind == "adapter":
        return "an adapter, not a model: load the model that it was made for, with lora=... for it"
    if architecture == "controlvector":
        return "a control vector, not a model: load the model that it was made for, with control_vector=... for it"
    if kind in ("mmproj", "imatrix") or architecture == "clip":
        return f"a part beside a model ({kind or architecture}), not the model: give the model's own file"
    if not gguf.has_tensor(""):
        return "a vocabulary without weights: give a file of the whole model"
    return None


def described(variant):
    """What a variant changes, for a capture's label: " with lora a.gguf x 0.5, rope_freq_base 500";
    "" for nothing."""
    said = []
    for name, key in (("lora", "loras"), ("control vector", "controls")):
        for path, scale in variant.get(key, ()):
            said.append(f"{name} {Path(path).name}" + (f" x {scale:g}" if scale != 1 else ""))
    for key, _, value in variant.get("overrides", ()):
        if not key.endswith("context_length"):
            said.append(f"{key} {value}")
    scalings = {number: name for name, number in SCALINGS.items()}
    for name, value in variant.get("context", {}).items():
        scaling = name == "rope_scaling_type"
        said.append(f"rope_scaling {scalings[value]}" if scaling else f"{name} {value:g}")
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
    return original + 1 if in_steps(size) > original else 0
