"""A notebook's parameters against the loaded model: what is wrong is said by the parameter's name, before any work."""

from ..errors import CaptureError


def check_layer_head(model, LAYER=0, HEAD=0):
    """LAYER and HEAD are in the model, which is anything with n_layer and n_head (a GGUFFile, a capture's model)."""
    for name, value, count, what in (("LAYER", LAYER, model.n_layer, "layers"), ("HEAD", HEAD, model.n_head, "heads")):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
            raise CaptureError(
                f"{name} = {value!r}: the model has {count} {what}, 0 to {count - 1}. "
                f"Change {name} in the parameters cell."
            )


def check_prompt(tokens, n_ctx, generate=0, name="PROMPT"):
    """The prompt has at least two tokens, and fits in the context together with the tokens to generate.

    tokens: what engine.tokenize returns, or anything with a length; n_ctx: context size, tokens.
    """
    if len(tokens) < 2:
        raise CaptureError(
            f"{name} is {len(tokens)} token(s) long: its attention is 1 by definition, there is nothing to see. "
            f"Give {name} at least two tokens."
        )
    if len(tokens) + generate > n_ctx:
        more = f" and {generate} to generate" if generate else ""
        raise CaptureError(
            f"{name} is {len(tokens)} tokens long{more}; the context holds {n_ctx}. Shorten {name}, or load the model "
            "with a larger ctx_size."
        )


def check_reference(model, reference, name="REFERENCE_MODEL"):
    """Two GGUFFiles are precisions of one model: same architecture, layers, heads, widths and vocabulary."""
    facts = ("architecture", "n_layer", "n_head", "n_kv_head", "n_embd", "n_vocab")
    different = [f for f in facts if getattr(model, f) != getattr(reference, f)]
    if different:
        said = ", ".join(f"{f} {getattr(reference, f)} instead of {getattr(model, f)}" for f in different)
        raise CaptureError(
            f"{name} is not another precision of MODEL: {said}. Give {name} a file of the same model, or None."
        )
    if list(model.pieces) != list(reference.pieces):
        raise CaptureError(
            f"{name} has another vocabulary than MODEL: the same text would be other tokens. Give {name} a file made "
            "from the same model, or None."
        )
