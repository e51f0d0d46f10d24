"""What llama-server's /completion is asked, and what comes back, as InferResult."""

import difflib
import math
from dataclasses import dataclass, field

from ..arguments import finite, say_two_starts, whole
from ..arguments import prompt as as_prompt
from ..errors import NotFiniteError, ServerError


@dataclass
class InferResult:
    """What infer() returns; str() is the text.

    text; tokens_generated; latency_ms: wall time of the whole request; tokens_per_sec: decode
    speed, the prompt and the token that comes out of it excluded (nan for fewer than two tokens);
    prompt_tokens; prompt_tokens_per_sec; stop_reason: "eos", "word" (a stop sequence), "limit"
    (max_tokens, or the context is full) or "none"; stop_word: the sequence that stopped it, or "";
    probabilities: DataFrame or None, see infer()."""

    text: str
    tokens_generated: int
    latency_ms: float
    tokens_per_sec: float
    prompt_tokens: int
    prompt_tokens_per_sec: float
    stop_reason: str
    stop_word: str = ""
    probabilities: object = field(default=None, repr=False)

    def __str__(self):
        return self.text


ARGUMENTS = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop_sequences", "n_probs")
# What a request must not ask of llama-server, and why.
REFUSED = {
    "stream": "infer_stream does",
    "n_predict": "max_tokens says it",
    "max_completion_tokens": "max_tokens says it",
    "stop": "stop_sequences says it",
    "prompt": "it is the first argument",
    "logprobs": "n_probs says it",
    "n_probs": "infer and chat do",
    "return_tokens": "n_probs has them",
    "return_progress": "one answer is read",
    "n_cmpl": "one answer is read",
    "n": "one answer is read",
    "n_keep": "the server's context is never shifted",
    "n_discard": "the server's context is never shifted",
    "lora": "captures have the adapters of load_model(..., lora=...), always",
    "post_sampling_probs": "probabilities are the model's, before any sampling",
    "response_fields": "the answer is read as a whole",
    "n_cache_reuse": "moved keys and values are not those of the text",
}
# llama-server has defaults (min_p 0.05), and a model's file may have more (general.sampling.*):
# nobody asked for them.
OFF = {
    "min_p": 0.0,
    "xtc_probability": 0.0,
    "repeat_penalty": 1.0,
    "mirostat": 0,
    "samplers": [
        "penalties",
        "dry",
        "top_n_sigma",
        "top_k",
        "typ_p",
        "top_p",
        "min_p",
        "xtc",
        "temperature",
    ],
}
# What else /completion reads (server-schema.cpp of the pinned llama.cpp). It ignores every other
# name.
OPTIONS = set(
    """min_p top_n_sigma xtc_probability xtc_threshold typical_p dynatemp_range dynatemp_exponent
    repeat_last_n repeat_penalty frequency_penalty presence_penalty dry_multiplier dry_base
    dry_allowed_length dry_penalty_last_n dry_sequence_breakers mirostat mirostat_tau mirostat_eta
    adaptive_target adaptive_decay min_keep backend_sampling json_schema grammar grammar_lazy
    grammar_triggers preserved_tokens logit_bias ignore_eos samplers t_max_predict_ms n_indent id_slot
    cache_prompt verbose timings_per_token sse_ping_interval reasoning_control reasoning_budget_tokens
    reasoning_budget_start_tag reasoning_budget_end_tag reasoning_budget_end_tags
    reasoning_budget_message""".split()
)
NOT_SOUND = (
    "the model's log-probabilities are no numbers (NaN or infinity): its text would be made up. score() names "
    "the layer where that begins; another file of this model may be sound."
)
FORCED = 1e4  # logits: more than any model's


def request_body(
    prompt, max_tokens, temperature, top_p, top_k, seed, stop_sequences, n_probs, options
):
    """The JSON body of POST /completion for the arguments of InferenceEngine.infer; ServerError
    where one is wrong."""
    prompt = as_prompt(prompt, ServerError)
    stop_sequences = (
        [stop_sequences] if isinstance(stop_sequences, str) else list(stop_sequences or ())
    )
    if not all(isinstance(text, str) and text for text in stop_sequences):
        raise ServerError(f"stop_sequences={stop_sequences!r}: they are texts that are not empty.")
    for name in sorted(options.keys() - OPTIONS):
        if name in REFUSED:
            raise ServerError(f"A request does not take {name!r}: {REFUSED[name]}.")
        near = difflib.get_close_matches(name, [*OPTIONS, *ARGUMENTS], 1)
        raise ServerError(
            f"llama-server knows no {name!r}: it would ignore it"
            f"{f'; the nearest name is {near[0]!r}' if near else ''}."
        )
    if max_tokens != -1:  # 0 would give a token
        max_tokens = whole("max_tokens", max_tokens, 1, 2**31 - 1, error=ServerError)
    return (
        OFF
        | {
            "prompt": prompt,
            "n_predict": int(max_tokens),
            "temperature": finite("temperature", temperature, 0, error=ServerError),
            "top_p": finite("top_p", top_p, 0, error=ServerError),
            "top_k": whole("top_k", top_k, error=ServerError),
            "seed": -1
            if seed is None
            else whole("seed", seed, 0, 2**32 - 2, error=ServerError),  # 2**32 - 1: random
            "stop": stop_sequences,
            "n_probs": whole("n_probs", n_probs, 0, error=ServerError),
            "return_tokens": n_probs > 0,
            # A prompt that is partly reused is computed in other batches, whose sums round
            # differently: same seed, other text.
            "cache_prompt": False,
        }
        | options
    )


def check_start(prompt, post, model):
    """Warn where llama-server will put a start token before a prompt that begins with one. Asks
    only where it does."""
    start = model.metadata.get("tokenizer.ggml.bos_token_id")
    if isinstance(prompt, str) and isinstance(start, int) and start < len(model.pieces):
        piece = model.pieces[start]
        if isinstance(piece, str) and piece and prompt.startswith(piece):
            said = post(
                "/tokenize",
                {"content": prompt[: len(piece) + 16], "add_special": True, "parse_special": True},
            )
            say_two_starts(said["tokens"], start, piece)


def every_token(answer, body, post, model):
    """The answer with probabilities of each generated token, also of those for which llama-server
    gives none.

    It gives none where the text ends within a character (they are in the tokens all the same), and
    leaves out some at the end where a stop sequence was found. Each of them is asked for once more,
    from the text so far. post: sends a request to that server; model: its GGUFFile."""
    tokens, given = answer.get("tokens") or [], answer.get("completion_probabilities") or []
    if not body["n_probs"]:
        return drawn(answer)
    if len(given) == len(tokens):
        return answer
    whole = [place for place, held in enumerate(_held_back(tokens, model)) if not held][
        : len(given)
    ]
    rows = (
        dict(zip(whole, given))
        if [tokens[place] for place in whole] == [row["id"] for row in given]
        else {}
    )
    # Backwards, so that the server's cache always holds what comes before
    for place in reversed(range(len(tokens))):
        if place not in rows:
            rows[place] = _asked_again(tokens[:place], tokens[place], body, post, model)
    return answer | {"completion_probabilities": [rows[place] for place in range(len(tokens))]}


def _held_back(tokens, model):
    """For each token, whether the text up to it ends within a character: validate_utf8 of
    llama-server."""
    text, held = b"", []
    for token in tokens:
        # Control tokens are not written
        piece = b"" if model.token_types[token] == 3 else model.pieces[token]
        text = (text + (piece.encode() if isinstance(piece, str) else piece))[-8:]
        starts = [text[-back] for back in range(1, min(4, len(text)) + 1)]
        held.append(
            any(
                byte >= 0xC0 and back < (2 if byte < 0xE0 else 3 if byte < 0xF0 else 4)
                for back, byte in enumerate(starts, 1)
            )
        )
    return held


def _asked_again(before, token, body, post, model):
    """llama-server's row for one token after the prompt and the tokens before: it is made to choose
    one whose row it gives, a plain word; the probabilities are from before that."""
    word = next(
        (
            i
            for i, piece in enumerate(model.pieces)
            if model.token_types[i] == 1
            and isinstance(piece, str)
            and piece.isascii()
            and piece.isalpha()
        ),
        None,
    )
    prompt = body["prompt"]
    request = {
        "prompt": [prompt, *before] if isinstance(prompt, str) else [*prompt, *before],
        "n_predict": 1,
        "temperature": 0.0,
        "logit_bias": [[word, FORCED]],
        "cache_prompt": bool(before),
    }
    # The second where the token is not among the most probable
    for n_probs in (body["n_probs"], model.n_vocab):
        rows = post("/completion", request | {"n_probs": n_probs}).get("completion_probabilities")
        # Logits beyond FORCED: it chose another token
        tops = rows[0]["top_logprobs"] if rows else ()
        if found := next((top for top in tops if top["id"] == token), None):
            return found | {"top_logprobs": tops[: body["n_probs"]]}
    raise ServerError(f"llama-server gave no probability of its own token {token}.")


def watched(body):
    """The body with which llama-server shows the probabilities that it draws from: of logits that
    are no numbers they are none. It has them at hand; those before sampling take a sort of the
    vocabulary."""
    return body if body["n_probs"] else body | {"n_probs": 1, "post_sampling_probs": True}


def drawn(answer):
    """A whole or a streamed answer without what `watched` asked for; NotFiniteError where that is
    no number."""
    if any(row["prob"] is None for row in answer.get("completion_probabilities") or ()):
        raise NotFiniteError(NOT_SOUND)
    return answer | {"completion_probabilities": None}


def check_sound(server, body):
    """NotFiniteError unless the model's log-probabilities are numbers; asked once of a started
    server.

    llama-server makes a text of whatever the logits are: of NaN, the vocabulary's first token again
    and again. What `drawn` sees of every answer is no twin of this: one row of NaN in the output
    matrix leaves the tokens that are drawn from numbers, and only the sum over the whole vocabulary
    shows it."""
    if not server.sound:
        # The end of the user's own prompt: what is asked about must be there to tokenize
        few = body["prompt"][-8:]
        asked = {
            "prompt": few,
            "n_predict": 1,
            "n_probs": 1,
            "temperature": 0.0,
            "cache_prompt": False,
        }
        rows = _probabilities(server.post("/completion", asked).get("completion_probabilities"))
        server.sound = rows is not None  # none for half a character: the next request asks again


def as_result(answer, latency_ms, pieces=None):
    """llama-server's answer -> InferResult. pieces: of every token, where they are known."""
    times, n = answer["timings"], answer["tokens_predicted"]
    # The first token comes out of the prompt's pass, so n tokens are n - 1 decodes.
    speed = (
        1000 * (n - 1) / times["predicted_ms"] if n > 1 and times["predicted_ms"] > 0 else math.nan
    )
    tops = answer.get("completion_probabilities")
    return InferResult(
        answer["content"],
        n,
        latency_ms,
        speed,
        answer["tokens_evaluated"],
        1000 * times["prompt_n"] / times["prompt_ms"] if times["prompt_ms"] > 0 else math.nan,
        answer.get("stop_type", "none"),
        answer.get("stopping_word", ""),
        _probabilities(tops, pieces),
    )


def _probabilities(tokens, pieces=None):
    import pandas as pd

    if not tokens:
        return None

    # llama-server writes no special tokens, and with a character's last token all that was held
    # back
    def piece(top):
        return pieces[top["id"]] if pieces else _piece(top)

    rows = []
    for position, token in enumerate(tokens):
        tops = token["top_logprobs"]
        if any(top["logprob"] is None for top in (token, *tops)):  # JSON has no NaN
            raise NotFiniteError(NOT_SOUND)
        rows += [(position, rank, top, top["id"] == token["id"]) for rank, top in enumerate(tops)]
        if not any(top["id"] == token["id"] for top in tops):
            # Sampled from further down: its rank is not reported
            rows.append((position, None, token, True))
    table = [
        (position, rank, top["id"], piece(top), math.exp(top["logprob"]), top["logprob"], chosen)
        for position, rank, top, chosen in rows
    ]
    columns = ["position", "rank", "id", "piece", "prob", "logprob", "chosen"]
    return pd.DataFrame(table, columns=columns).astype({"rank": "Int64"})


def _piece(token):
    raw = bytes(token["bytes"])
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw
