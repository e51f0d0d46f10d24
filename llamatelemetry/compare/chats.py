"""Texts of the kind that a model is used for: conversations in its own template, and what it wrote
itself. Their special tokens count as such when they are read."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..arguments import whole, writable
from ..errors import CompareError

Conversation = Sequence[Mapping[str, str]]
CTX = 2048  # tokens of a conversation with its answer
# Asked by default where a model is to write something itself.
PROMPTS: tuple[Conversation, ...] = tuple(
    [{"role": "user", "content": text}]
    for text in (
        "Explain in a few sentences why the sea is salty.",
        "Write a short letter to a friend about a day at the harbour.",
        "How do I cook rice? Give the steps as a numbered list.",
        "Write a Python function that returns the largest of three numbers, and say how it works.",
        "Tell a story about a whale and a small boat.",
        "What is the difference between weather and climate?",
        "Translate into French: The ship leaves tomorrow at six.",
        "Give three reasons for learning to read music.",
    )
)


class Special(str):
    """A text in which special tokens are written out: compare_quantizations reads them as what they
    are (llama.cpp's parse_special). A plain str has none."""


def chat_text(
    model: str | Path, conversations: Iterable[Conversation], gpu_layers: int | None = None
) -> Special:
    """Conversations as the model reads them: rendered by its own chat template (llama-server's
    /apply-template), one after the other.

    conversations: each a list of {"role": "system" | "user" | "assistant", "content": text}. Raises
    CompareError for what is none, TemplateError or ServerError for a model without a template."""
    found = [_checked(one) for one in conversations]
    if not found:
        raise CompareError("There are no conversations: give at least one.")
    with _serving(model, gpu_layers) as engine:
        return _rendered(engine, found)


def written_by(
    model: str | Path,
    prompts: Iterable[str | Conversation] | None = None,
    n_tokens: int = 128,
    seed: int = 0,
    gpu_layers: int | None = None,
) -> Special:
    """What a model writes itself, as a text to compare its quantizations on: the distribution that
    it is used on, and the one on which its predictions are surest.

    prompts: texts to go on with, or conversations to answer (then rendered with the answer by
    chat_text); None: PROMPTS, or their words where the model has no chat template. n_tokens: at
    most so many for each; drawn from the whole distribution at temperature 1, by llama-server, from
    the seed. Raises CompareError, ServerError."""
    whole("n_tokens", n_tokens, 1, error=CompareError)
    given = None if prompts is None else list(prompts)
    with _serving(model, gpu_layers) as engine:
        return _written(engine, _asked(engine) if given is None else given, n_tokens, seed)


def _written(engine, prompts, n_tokens, seed, enough=None):
    drawn = dict(max_tokens=n_tokens, temperature=1.0, top_p=1.0, top_k=0)
    parts = []
    for number, prompt in enumerate(prompts):
        if _enough(engine, parts, enough):
            break
        own = drawn | {"seed": seed + number}
        if isinstance(prompt, str):
            answer = engine.infer(writable(prompt, CompareError), **own).text
            parts.append(f"{prompt}{answer}\n")
            continue
        messages = _checked(prompt)
        answer = engine.chat(messages, **own).text
        parts.append(_rendered(engine, [[*messages, _said(answer)]]))
    if not parts:
        raise CompareError("There are no prompts: give at least one.")
    return Special("".join(parts))


def _asked(engine):
    """PROMPTS, or their words where the model has no chat template."""
    return PROMPTS if _has_template(engine) else [one[0]["content"] for one in PROMPTS]


def _has_template(engine):
    return "tokenizer.chat_template" in engine.model.metadata


def talk(text: str, turns: int = 40) -> list[Conversation]:
    """A text's paragraphs as conversations of two turns, the user's and the answer: what a chat
    template alone changes."""
    parts = [part.strip() for part in text.split("\n\n") if part.strip()][:turns]
    asked = [{"role": "user", "content": part} for part in parts[::2]]
    return [[one, _said(part)] for one, part in zip(asked, parts[1::2])]


def texts(
    model: str | Path,
    text: str,
    prompts: int = 4,
    n_tokens: int = 40,
    seed: int = 0,
    enough: int | None = None,
) -> dict[str, str]:
    """Texts of other kinds to compare on beside `text`: {"as a chat": talk of it in the model's
    template, "written by the reference": its answers to so many of PROMPTS}. Without the first
    where the model has no template, or the text fewer than two paragraphs.

    n_tokens: of an answer, at most; enough: tokens with which a text is long enough (those that are
    read of it): nothing is added to it then; None: all that there is."""
    talks, found = talk(text), {}
    with _serving(model, None) as engine:
        if talks and _has_template(engine):
            found["as a chat"] = _rendered(engine, talks, enough)
        written = _written(engine, _asked(engine)[:prompts], n_tokens, seed, enough)
    return found | {"written by the reference": written}


def _said(answer):
    return {"role": "assistant", "content": answer}


def _serving(model, gpu_layers):
    """An engine whose server renders a last answer as one that has ended."""
    from ..engine import InferenceEngine
    from ..files.gguf import GGUFFile
    from ..files.models import resolve_model
    from .placing import split_for

    file = GGUFFile(resolve_model(model))
    settings = dict(ctx_size=min(CTX, file.n_ctx_train or CTX), auto_start=False, silent=True)
    split = None if gpu_layers is not None else split_for(file, CTX, capture=False)
    return InferenceEngine().load_model(
        file.path, gpu_layers, tensor_split=split, prefill_assistant=False, **settings
    )


def _rendered(engine, conversations, enough=None):
    parts = []
    for one in conversations:
        if _enough(engine, parts, enough):
            break
        parts.append(engine.apply_template(one, answer=False))
    return Special("".join(parts))


def _enough(engine, parts, enough):
    """Whether a text has so many tokens (None: never)."""
    return bool(parts and enough) and _length(engine, "".join(parts)) >= enough


def _length(engine, text):
    """Tokens of a text as a comparison reads it, special tokens parsed."""
    asked = {"content": text, "add_special": True, "parse_special": True}
    with engine._serving() as server:
        return len(server.post("/tokenize", asked)["tokens"])


def _checked(conversation):
    """A list of messages, or CompareError."""
    messages = conversation if isinstance(conversation, (list, tuple)) else []
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise CompareError(
                f'A message is {{"role": ..., "content": ...}}, not {message!r:.80}: a conversation is a list '
                "of them, and a text of chats a list of conversations."
            )
        writable(message["content"], CompareError)
    if not messages:
        raise CompareError(
            f"A conversation is a list of messages with role and content, not {conversation!r:.80}."
        )
    return [dict(message) for message in messages]
