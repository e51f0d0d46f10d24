"""A notebook's parameters against what they may be: what is wrong is said by name, before any work.

    # before anything is loaded; returns the GGUFFile of MODEL
    model = parameters.check(globals())
    # after load_model: what needs the tokenizer
    tokens = parameters.check_texts(globals(), engine)
    # what the parameters cell leaves open, as None: right for the model that is there
    LAYER, HEAD = parameters.layer_and_head(globals(), engine)

The rules are those of parameter_rules, which a notebook names as parameters.optional(...)."""

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import LlamaTelemetryError, ParameterError, brief
from ..files.gguf import GGUFFile
from ..files.models import resolve_model
from .parameter_rules import (
    METRICS,
    Rule,
    backend,
    cache_types,
    candidates,
    file,
    flag,
    folder,
    index,
    number,
    one_of,
    optional,
    passage,
    place,
    quantization,
    same_model,
    same_vocabulary,
    some_of,
    start_of_candidate,
    text,
    texts,
    whole,
)
from .vocabulary import Vocabulary

if TYPE_CHECKING:
    import pandas as pd

    from ..engine import InferenceEngine

__all__ = [
    "check",
    "check_texts",
    "coarser",
    "context",
    "layer_and_head",
    "one_of",
    "optional",
    "same_vocabulary",
    "some_of",
    "texts",
    "whole",
]

# What a name means is the same in every notebook; what only one of them knows is given to check()
# there.
# The sentences from templates are made 16 tokens shorter
RULES = {
    "REFERENCE_MODEL": optional(same_model),
    "OTHER_MODEL": optional(same_model),
    "PROMPT": text,
    "SECOND_PROMPT": text,
    "STEER_TO": text,
    "STEER_FROM": text,
    "MORE": text,
    "LESS": text,
    "TEXT": optional(passage),
    "TEXTS": optional(texts()),
    "LAYER": optional(index("n_layer", "layers")),
    "HEAD": optional(index("n_head", "heads")),
    "CONTEXT": optional(whole(4)),
    "N_CTX": whole(4, "n_ctx_train"),
    "GENERATE": whole(1),
    "ALIGN": one_of(("position", "token")),
    "TEXT_TOKENS": whole(3, "n_ctx_train"),
    "MAX_TOKENS": whole(17, "n_ctx_train"),
    "PATCH_EVERY": whole(1),
    "PATCH_POSITIONS": whole(1),
    "PROBE_TEXTS": whole(40, 400),
    "WINDOWS": optional(whole(1)),
    "SAMPLE": whole(1),
    "WHOLE_VOCABULARY": optional(flag),
    "METRIC": one_of(METRICS),
    "N_NEIGHBORS": whole(2, "n_vocab"),
    "MIN_DIST": number(0, 1),
    "K": whole(1, "n_vocab"),
    "THRESHOLD": number(-1, 1),
    "MARGIN": number(0, 1),
    "N_CLUSTERS": optional(whole(2)),
    "ABLATION_SECONDS": number(0),
    "OTHER_TYPE": optional(quantization),
    "QUANTIZATION": optional(quantization),
    "REQUANTIZE": optional(quantization),
    "QUANTIZATIONS": optional(candidates),
    "FOCUS": start_of_candidate,
    "IMATRIX": flag,
    "LONGER": optional(flag),
    "TASKS": optional(passage),
    "N_TASKS": optional(whole(1)),
    "SIZE_MB": optional(number(0.001)),
    "COST_SECONDS": number(0),
    "FEATURES": optional(place),
    "CACHE_TYPES": cache_types,
    "CACHE_TOKENS": optional(whole(1)),
    "WORKERS": whole(0),
    "OUTPUT_DIR": folder,
    "BACKEND": backend,
    "SEED": whole(0, 2**32 - 1),
}
CONTEXT = 2048  # tokens, where the model was trained for as many
# Types to requantize MODEL to, finest first
COARSER = {
    "QUANTIZATION": ("Q4_K_M", "Q3_K_M", "Q2_K"),
    "REQUANTIZE": ("Q3_K_M", "Q2_K"),
    "OTHER_TYPE": ("Q4_0", "Q2_K"),
}


def check(values: Mapping[str, Any], **rules: Rule) -> GGUFFile:
    """Check every parameter of a notebook; returns the GGUFFile of MODEL, of which only the header
    was read.

    values: the notebook's globals(); rules: {NAME: rule} in place of, or beside, RULES. Raises
    ParameterError that names the parameter, its value and what is expected; for MODEL what
    resolve_model and GGUFFile raise."""
    if wrong := file(values["MODEL"], None, values):
        raise _error("MODEL", values["MODEL"], wrong)
    try:
        model = GGUFFile(resolve_model(values["MODEL"]))
    except LlamaTelemetryError as error:
        raise type(error)(f"MODEL = {values['MODEL']!r}: {error}") from error
    for name, rule in (RULES | rules).items():
        if name in values and (wrong := rule(values[name], model, values)):
            raise _error(name, values[name], wrong)
    return model


def check_texts(
    values: Mapping[str, Any], engine: "InferenceEngine | GGUFFile", room: int | None = None
) -> dict[str, "pd.DataFrame"]:
    """Check what needs the model's tokenizer: the lengths of PROMPT, SECOND_PROMPT and TEXT.

    engine: with the model loaded, or the GGUFFile of a notebook that has not loaded it: then only
    its vocabulary is read. room: tokens that a prompt may have; None: CONTEXT - GENERATE. Returns
    {name: tokens} of the prompts, as engine.tokenize gives them. Raises ParameterError."""
    if isinstance(engine, GGUFFile):
        with Vocabulary(engine) as vocabulary:
            return _check_texts(values, vocabulary, room)
    return _check_texts(values, engine, room)


def _check_texts(values, engine, room):
    context, generate = values.get("CONTEXT", 0), values.get("GENERATE", 0)
    because = "" if room else f" (CONTEXT {context} - GENERATE {generate})"
    room = room or context - generate
    if room < 2:
        fits = f"a whole number from 1 to {context - 2} fits beside a prompt in CONTEXT {context}"
        raise _error("GENERATE", generate, fits)
    prompts = [name for name in ("PROMPT", "SECOND_PROMPT") if name in values]
    found = {name: engine.tokenize(values[name]) for name in prompts}
    for name, tokens in found.items():
        if not 2 <= len(tokens) <= room:
            raise ParameterError(
                f"{name} is {len(tokens)} token(s) long; 2 to {room} fit{because}. Change {name} in "
                "the parameters cell."
            )
    if "TEXT" in values:
        _check_text(values["TEXT"], values.get("N_CTX", 3), engine)
    return found


def _check_text(value, least, engine):
    from ..compare.texts import load_text

    try:
        found = len(engine.tokenize(load_text(value)[: 64 * least]))  # enough of a long one
    except LlamaTelemetryError as error:
        raise _error("TEXT", value, str(error)) from error
    if found < least:
        raise _error("TEXT", value, f"it is {found} token(s) long, {least} are needed")


def context(values: Mapping[str, Any], model: GGUFFile) -> int:
    """CONTEXT, or for None 2,048 tokens, of a model that was trained for fewer those, which is then
    printed."""
    if values["CONTEXT"] is not None:
        return values["CONTEXT"]
    trained = model.n_ctx_train or CONTEXT
    if trained < CONTEXT:
        print(f"CONTEXT = {trained} is taken: {model.path.stem} was trained for no more.")
    return min(trained, CONTEXT)


def layer_and_head(values: Mapping[str, Any], engine: "InferenceEngine") -> tuple[int, int]:
    """LAYER and HEAD, or for None such as every model has: of the layers with attention the one
    three fifths of the way up, of its heads the one two thirds on; what is taken is printed.

    engine: with the model loaded, which is asked where it has attention. Raises ParameterError for
    a LAYER without attention and for a HEAD that this layer has not got."""
    first = engine.tokenize(values["PROMPT"])["id"].tolist()[:2]
    attention = engine.capture(first, stages=("attention",)).attention
    layers = attention["layer"].values.tolist()
    layer, head = values["LAYER"], values["HEAD"]
    if layer is None:
        layer = layers[len(layers) * 3 // 5]
    elif layer not in layers:
        raise _error("LAYER", layer, f"attention is in layers {', '.join(map(str, layers))}")
    assert engine.model
    n_head = engine.model.n_head_per_layer[layer]
    if head is None:
        head = n_head * 2 // 3
    elif head >= n_head:
        raise _error("HEAD", head, f"layer {layer} has {n_head} heads, 0 to {n_head - 1}")
    if None in (values["LAYER"], values["HEAD"]):
        print(
            f"Layer {layer} (of {_span(layers)}) and head {head} (of {_span(range(n_head))}) are taken: "
            "LAYER and HEAD choose others."
        )
    return layer, head


def coarser(values: Mapping[str, Any], name: str, own: str | None) -> str:
    """The type to requantize MODEL to: the parameter of this name (one of COARSER), or for None the
    first of COARSER that has no more bits than MODEL's own and is another; what is taken is
    printed, unless a second file makes it needless. own: MODEL's type, None where the file does not
    say."""
    if values[name] is not None:
        return values[name]
    others = [kind for kind in COARSER[name] if not own or kind[:4] != own[:4]]
    kind = next((kind for kind in others if not own or _bits(kind) <= _bits(own)), others[0])
    if not (values.get("REFERENCE_MODEL") or values.get("OTHER_MODEL")):
        print(
            f"{kind} is taken ({own or 'an unnamed type'} is what there is): {name} chooses another type."
        )
    return kind


def _bits(kind):
    found = re.search(r"\d+", kind)
    return int(found[0]) if found else math.inf


def _span(layers):
    """0, 1, 2 -> "0 to 2"; 1, 4 -> "1, 4"."""
    first, last = layers[0], layers[-1]
    every = len(layers) == last - first + 1 > 1
    return f"{first} to {last}" if every else ", ".join(map(str, layers))


def _error(name, value, wrong):
    said = brief(value)
    return ParameterError(
        f"{name} = {said}: {wrong.rstrip('.')}. Change {name} in the parameters cell."
    )
