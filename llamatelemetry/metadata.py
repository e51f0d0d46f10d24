"""What a key of a file's metadata may hold, a model's or a saved capture's, said once for every key
that is read anywhere here, and checked when the file is opened: who reads one later need not ask
again."""

import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

_U32 = 2**32 - 1


class Rule(NamedTuple):
    """says: what a value must be, in words; holds: whether it is."""

    says: str
    holds: Callable[[Any], bool]


def _whole(low=0, high=_U32):
    return Rule(
        f"a whole number from {low} to {high}",
        lambda value: _is_whole(value) and low <= value <= high,
    )


def _is_whole(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _list_of(what, holds, ends=lambda values: values[:1]):
    """ends: the values that stand for all. They are of one type, as a GGUF file stores them."""
    return Rule(
        f"an array of {what}",
        lambda value: isinstance(value, list) and all(map(holds, ends(value))),
    )


def _extremes(values):
    numbers = all(isinstance(value, int) for value in values[:1])
    return [*values[:1], min(values), max(values)] if values and numbers else values[:1]


def _either(one, other):
    return Rule(
        f"{one.says}, or {other.says}", lambda value: one.holds(value) or other.holds(value)
    )


_COUNT = _whole()
_PER_LAYER = _either(_COUNT, _list_of("such", _COUNT.holds, _extremes))
_NUMBER = Rule(
    "a finite number",
    lambda value: isinstance(value, float) and math.isfinite(value) or _is_whole(value),
)
_NOT_NEGATIVE = Rule("a finite number, not negative", lambda v: _NUMBER.holds(v) and v >= 0)
_TEXT = Rule("a text", lambda value: isinstance(value, str))
_FLAG = Rule("true or false", lambda value: isinstance(value, bool))
_RAW = Rule("a text", lambda value: isinstance(value, str | bytes))  # some vocabularies hold bytes
_INT32 = _whole(-(2**31), 2**31 - 1)

# Keys by their rule; those that begin with a dot stand behind the architecture's name.
_KEYS = {
    _TEXT: "general.architecture general.type tokenizer.ggml.model .rope.scaling.type",
    _RAW: "general.name tokenizer.chat_template",
    _COUNT: "general.file_type split.count split.no split.tensors.count tokenizer.ggml.bos_token_id "
    ".embedding_length .context_length .attention.key_length .attention.value_length "
    ".rope.dimension_count .attention.sliding_window .expert_count .vocab_size .pooling_type "
    ".rope.scaling.original_context_length",
    _whole(0, 9_999): ".block_count",
    _PER_LAYER: ".attention.head_count .attention.head_count_kv .feed_forward_length "
    ".expert_used_count",
    _NUMBER: ".logit_scale",
    _NOT_NEGATIVE: ".rope.freq_base .rope.freq_base_swa .rope.scaling.factor .rope.scale_linear "
    ".final_logit_softcapping .attn_logit_softcapping .attention.layer_norm_epsilon "
    ".attention.layer_norm_rms_epsilon",
    _FLAG: ".attention.causal",
    _either(_COUNT, _list_of("whole numbers or of flags", lambda v: isinstance(v, int))): (
        ".attention.sliding_window_pattern"
    ),
    _list_of("texts", _RAW.holds): "tokenizer.ggml.tokens",
    _list_of("whole numbers of 32 bits", _INT32.holds, _extremes): "tokenizer.ggml.token_type",
    Rule("a power of two", lambda v: _is_whole(v) and 0 < v <= _U32 and v & (v - 1) == 0): (
        "general.alignment"
    ),
}
RULES = {key: rule for rule, keys in _KEYS.items() for key in keys.split()}


def check(metadata: Mapping[str, Any]) -> None:
    """Raise ValueError where a key that is read here holds what it cannot: the message names it."""
    architecture = metadata.get("general.architecture")
    names = {key: key for key in RULES if key[0] != "."}
    if isinstance(architecture, str):
        names |= {key: architecture + key for key in RULES if key[0] == "."}
    for key, name in names.items():
        if name in metadata and not RULES[key].holds(metadata[name]):
            found = reprlib.repr(metadata[name])
            raise ValueError(f"{name[:80]} is {found}, not {RULES[key].says}")


def _list(what, holds):
    return _list_of(what, holds, lambda values: values)  # of JSON, where each has its own type


def _is_piece(value):
    """A text without half characters, or the bytes of a piece that is none."""
    if isinstance(value, dict):
        return isinstance(value.get("hex"), str)
    return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)


def _is_part(value):
    """Layers and query positions of a stage, each None or whole numbers."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(numbers is None or _NUMBERS.holds(numbers) for numbers in value)
    )


_NUMBERS = _list("whole numbers", _INT32.holds)
_CAPTURE = {
    "ids": _NUMBERS,
    "pieces": _list("texts", _is_piece),
    "generated": _list("flags", _FLAG.holds),
    "layers": _list("facts", lambda value: isinstance(value, dict)),
    "model": Rule(
        "facts with the architecture",
        lambda value: isinstance(value, dict) and isinstance(value.get("architecture"), str),
    ),
    "parts": Rule(
        "stages, each with its layers and queries",
        lambda value: isinstance(value, dict) and all(map(_is_part, value.values())),
    ),
}


def check_capture(facts: Any) -> None:
    """Raise ValueError where the facts of a saved capture are not what they must be, by name."""
    if not isinstance(facts, dict):
        raise ValueError("no facts")
    for name, rule in _CAPTURE.items():
        if not rule.holds(facts.get(name)):
            raise ValueError(f"{name} is {reprlib.repr(facts.get(name))}, not {rule.says}")
    lengths = [len(facts[name]) for name in ("ids", "pieces", "generated")]
    if len(set(lengths)) > 1:
        raise ValueError("{} ids, {} pieces and {} flags".format(*lengths))
