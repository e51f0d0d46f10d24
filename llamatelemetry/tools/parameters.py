"""A notebook's parameters against what they may be: what is wrong is said by name, before any work.

    model = parameters.check(globals())                         # before anything is loaded; -> the GGUFFile of MODEL
    tokens = parameters.check_texts(globals(), engine)          # after load_model: what needs the tokenizer

A rule takes (value, model, values of the notebook) and returns None, or what is expected in place
of the value."""

import math
import numbers
import os
from pathlib import Path

from ..errors import LlamaTelemetryError, ParameterError
from ..files.gguf import GGUFFile
from ..files.models import resolve_model
from ..files.registry import TYPES

# Umap-learn's and cuML's, of floats
METRICS = ("cosine", "correlation", "euclidean", "manhattan", "chebyshev", "canberra")
VOCABULARY = ("n_vocab", "pieces")
SHAPE = ("architecture", "n_layer", "n_head", "n_kv_head", "n_embd")


# ---- rules


def text(value, model, values):
    """A text that is not empty."""
    return (
        None if isinstance(value, str) and value.strip() else "a text that is not empty is expected"
    )


def file(value, model, values):
    """The name of a model, or the path of its file."""
    fits = isinstance(value, str | os.PathLike) and os.fspath(value).strip()
    return None if fits else "the name or the file of a model is expected"


def passage(value, model, values):
    """A text that is not empty, or where it lies, as texts.load_text takes it."""
    return None if isinstance(value, os.PathLike) else text(value, model, values)


def flag(value, model, values):
    """True or False."""
    return None if isinstance(value, bool) else "True or False is expected"


def optional(rule):
    """None, or what `rule` allows."""

    def check(value, model, values):
        wrong = None if value is None else rule(value, model, values)
        return wrong and f"{wrong.rstrip('.')} (or None)"

    return check


def whole(least, most=None):
    """A whole number from `least` to `most`: a number, the name of a fact of the model, or None for
    no limit."""

    def check(value, model, values):
        last = getattr(model, most) or None if isinstance(most, str) else most
        fits = _is(value, numbers.Integral) and least <= value <= (last or math.inf)
        of_model = f" ({most} of the model)" if isinstance(most, str) else ""
        return None if fits else f"a whole number {_range(least, last)}{of_model} is expected"

    return check


def number(least, most=None):
    """A number from `least` to `most`."""

    def check(value, model, values):
        fits = (
            _is(value, numbers.Real)
            and least <= value < math.inf
            and (most is None or value <= most)
        )
        return None if fits else f"a number {_range(least, most)} is expected"

    return check


def index(count, what):
    """A layer or head of the model. count: name of the model's fact; what: the plural."""

    def check(value, model, values):
        n = getattr(model, count)
        if _is(value, numbers.Integral) and 0 <= value < n:
            return None
        return f"the model has {n} {what}, 0 to {n - 1}"

    return check


def one_of(choices):
    """One of these texts."""

    def check(value, model, values):
        fits = isinstance(value, str) and value in choices
        return None if fits else f"one of {', '.join(map(repr, choices))} is expected"

    return check


def some_of(choices):
    """A list of one or more of these texts, none of them twice."""
    rule = one_of(choices)

    def check(value, model, values):
        if not isinstance(value, list | tuple) or not value:
            return f"a list with {rule(None, model, values).removesuffix(' is expected')} or more is expected"
        for item in value:
            if wrong := rule(item, model, values):
                return f"{wrong} in place of {item!r}"
        return None if len(set(value)) == len(value) else "a list that names none twice is expected"

    return check


def texts(reserved=()):
    """A dict of lists of texts, none of them empty. reserved: names that its keys must not have."""

    def check(value, model, values):
        if not isinstance(value, dict) or not value:
            return "a dict {kind: [text, ...]} is expected"
        for kind, group in value.items():
            if not isinstance(kind, str) or kind in reserved:
                return f"{kind!r} cannot be the name of a kind (reserved: {', '.join(reserved)})"
            if (
                not isinstance(group, list | tuple)
                or not group
                or any(text(one, model, values) for one in group)
            ):
                return f"a list of one or more texts, none of them empty, is expected for {kind!r}"
        return None

    return check


def quantization(value, model, values):
    """A type that llama-quantize makes."""
    kind = str(value).upper()
    if kind not in TYPES:
        return f"a type that llama-quantize makes is expected: {', '.join(TYPES)}"
    if kind.startswith(("IQ1", "IQ2", "IQ3", "Q2_K_S")) and not values.get("IMATRIX"):
        from ..convert.quantize import needs_imatrix

        if needs_imatrix(model.path, kind):
            return (
                f"{kind} of this model needs an importance matrix (IMATRIX = True in notebook 16)"
            )
    return None


def same_model(value, model, values, facts=SHAPE + VOCABULARY):
    """A file of the same model in another precision: its vocabulary, architecture and shape are
    MODEL's."""
    if wrong := file(value, model, values):
        return wrong
    try:
        other = GGUFFile(resolve_model(value))
    except LlamaTelemetryError as error:
        return str(error)
    return differences(model, other, facts)


def same_vocabulary(value, model, values):
    """A file that reads the same tokens: MODEL's vocabulary, whatever its shape."""
    return same_model(value, model, values, VOCABULARY)


def differences(model, other, facts=SHAPE + VOCABULARY):
    """Why `other` is not comparable with `model` (two GGUFFiles), None where it is.

    facts: what must be equal. VOCABULARY where predictions over the same tokens are compared, SHAPE
    too where states, heads or matrices are."""
    apart = [
        fact for fact in facts if fact != "pieces" and getattr(model, fact) != getattr(other, fact)
    ]
    if apart:
        said = ", ".join(
            f"{fact} {getattr(other, fact)} instead of {getattr(model, fact)}" for fact in apart
        )
        what = (
            "has another vocabulary than MODEL"
            if apart == ["n_vocab"]
            else "is not another precision of MODEL"
        )
        return f"{other.path.name} {what}: {said}"
    if "pieces" in facts and list(model.pieces) != list(other.pieces):
        pairs = enumerate(zip(model.pieces, other.pieces))
        first = next(
            (f" (token {i} is {b!r} instead of {a!r})" for i, (a, b) in pairs if a != b), ""
        )
        return f"{other.path.name} has another vocabulary than MODEL: the same text would be other tokens{first}"
    return None


def candidates(value, model, values):
    """A list of types to make, and of files and names of the same model."""
    if not isinstance(value, list | tuple) or not value:
        return "a list of one or more types or files is expected"
    for item in value:
        if str(item).upper() in TYPES:
            wrong = quantization(item, model, values)
        elif wrong := same_model(item, model, values):
            wrong = f"{item!r} is no type of llama-quantize, and as a file: {wrong}"
        if wrong:
            return wrong
    return None if len(set(value)) == len(value) else "a list that names none twice is expected"


def start_of_candidate(value, model, values):
    """The beginning of the name of one of QUANTIZATIONS."""
    names = [name for item in values["QUANTIZATIONS"] for name in (str(item), Path(str(item)).stem)]
    if isinstance(value, str) and value and any(name.startswith(value) for name in names):
        return None
    return f"none of QUANTIZATIONS begins so: {', '.join(map(str, values['QUANTIZATIONS']))}"


def backend(value, model, values):
    """Where the analytics run; "gpu" insists on RAPIDS and a GPU."""
    if (wrong := one_of(("auto", "gpu", "cpu"))(value, model, values)) or value != "gpu":
        return wrong
    from ..backend import get_backend

    try:
        get_backend("gpu")
    except LlamaTelemetryError as error:
        return str(error)
    return None


def folder(value, model, values):
    """A folder to write to, which need not exist yet."""
    if not isinstance(value, str | os.PathLike) or not str(value).strip():
        return "the name of a folder is expected"
    path = Path(value).absolute()
    try:
        there = next(place for place in (path, *path.parents) if place.exists())
    except OSError as error:  # a name that is too long, a folder that must not be looked into
        return str(error)
    if not there.is_dir():
        return f"a folder is expected, and {there} is a file"
    return None if os.access(there, os.W_OK | os.X_OK) else f"nothing can be written in {there}"


def _is(value, kind):
    return isinstance(value, kind) and not isinstance(value, bool)


def _range(least, most):
    return f"from {least} to {most}" if most is not None else f"of {least} or more"


# What a name means is the same in every notebook; what only one of them knows is given to check()
# there.
# The sentences from templates are made 16 tokens shorter
RULES = {
    "REFERENCE_MODEL": optional(same_model),
    "OTHER_MODEL": optional(same_model),
    "PROMPT": text,
    "SECOND_PROMPT": text,
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
    "QUANTIZATIONS": candidates,
    "FOCUS": start_of_candidate,
    "IMATRIX": flag,
    "WORKERS": whole(0),
    "OUTPUT_DIR": folder,
    "BACKEND": backend,
    "SEED": whole(0, 2**32 - 1),
}


# ---- checks


def check(values, **rules):
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


def check_texts(values, engine, room=None):
    """Check what needs the model's tokenizer: the lengths of PROMPT, SECOND_PROMPT and TEXT, and
    that LAYER has attention.

    room: tokens that a prompt may have; None: CONTEXT - GENERATE. Returns {name: tokens} of the
    prompts, as engine.tokenize gives them. Raises ParameterError."""
    context, generate = values.get("CONTEXT"), values.get("GENERATE", 0)
    because = "" if room else f" (CONTEXT {context} - GENERATE {generate})"
    room = room or context - generate
    if room < 2:
        raise _error(
            "GENERATE",
            generate,
            f"a whole number from 1 to {context - 2} fits beside a prompt in CONTEXT {context}",
        )
    found = {
        name: engine.tokenize(values[name])
        for name in ("PROMPT", "SECOND_PROMPT")
        if name in values
    }
    for name, tokens in found.items():
        if not 2 <= len(tokens) <= room:
            raise ParameterError(
                f"{name} is {len(tokens)} token(s) long; 2 to {room} fit{because}. Change {name} in "
                "the parameters cell."
            )
    if "TEXT" in values:
        _check_text(values["TEXT"], values.get("N_CTX", 3), engine)
    if "LAYER" in values:
        _check_attention(
            values["LAYER"],
            engine.capture(found["PROMPT"]["id"].tolist()[:2], stages=("attention",)),
        )
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
    said = repr(value) if len(repr(value)) < 80 else f"{value!r:.76} ..."
    return ParameterError(
        f"{name} = {said}: {wrong.rstrip('.')}. Change {name} in the parameters cell."
    )
