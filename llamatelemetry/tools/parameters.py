"""A notebook's parameters against what they may be: what is wrong is said by name, before any work.

    # before anything is loaded; returns the GGUFFile of MODEL
    model = parameters.check(globals())
    # after load_model: what needs the tokenizer
    tokens = parameters.check_texts(globals(), engine)

The rules are those of parameter_rules, which a notebook names as parameters.optional(...)."""

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
    "LAYER": index("n_layer", "layers"),
    "HEAD": index("n_head", "heads"),
    "CONTEXT": whole(4),
    "N_CTX": whole(4, "n_ctx_train"),
    "GENERATE": whole(1),
    "ALIGN": one_of(("position", "token")),
    "TEXT_TOKENS": whole(3, "n_ctx_train"),
    "MAX_TOKENS": whole(17, "n_ctx_train"),
    "PATCH_EVERY": whole(1),
    "PATCH_POSITIONS": whole(1),
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
    "OTHER_TYPE": quantization,
    "QUANTIZATION": quantization,
    "REQUANTIZE": quantization,
    "QUANTIZATIONS": optional(candidates),
    "FOCUS": start_of_candidate,
    "IMATRIX": flag,
    "LONGER": optional(flag),
    "TASKS": optional(passage),
    "N_TASKS": optional(whole(1)),
    "SIZE_MB": optional(number(0.001)),
    "COST_SECONDS": number(0),
    "CACHE_TYPES": cache_types,
    "CACHE_TOKENS": optional(whole(1)),
    "WORKERS": whole(0),
    "OUTPUT_DIR": folder,
    "BACKEND": backend,
    "SEED": whole(0, 2**32 - 1),
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
    """Check what needs the model's tokenizer: the lengths of PROMPT, SECOND_PROMPT and TEXT, and
    that LAYER has attention.

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
    if "LAYER" in values:
        first = found["PROMPT"]["id"].tolist()[:2]
        _check_attention(values["LAYER"], engine.capture(first, stages=("attention",)))
    return found


def _check_text(value, least, engine):
    from ..compare.texts import load_text

    try:
        found = len(engine.tokenize(load_text(value)[: 64 * least]))  # enough of a long one
    except LlamaTelemetryError as error:
        raise _error("TEXT", value, str(error)) from error
    if found < least:
        raise _error("TEXT", value, f"it is {found} token(s) long, {least} are needed")


def _check_attention(layer, capture):
    layers = capture.attention["layer"].values.tolist()
    if layer not in layers:
        raise _error("LAYER", layer, f"attention is in layers {', '.join(map(str, layers))}")


def _error(name, value, wrong):
    said = brief(value)
    return ParameterError(
        f"{name} = {said}: {wrong.rstrip('.')}. Change {name} in the parameters cell."
    )
