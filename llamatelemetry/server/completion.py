"""What llama-server's /completion is asked, and what comes back, as InferResult."""

import difflib
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..arguments import finite, say_two_starts, whole
from ..arguments import prompt as as_prompt
from ..errors import ServerError
from .probabilities import probability_table

if TYPE_CHECKING:
    import pandas as pd


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
    probabilities: "pd.DataFrame | None" = field(default=None, repr=False)

    def __str__(self) -> str:
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
    "samplers": "penalties dry top_n_sigma top_k typ_p top_p min_p xtc temperature".split(),
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


def request_body(
    prompt, max_tokens, temperature, top_p, top_k, seed, stop_sequences, n_probs, options
):
    """The JSON body of POST /completion for the arguments of InferenceEngine.infer; ServerError
    where one is wrong."""
    prompt = as_prompt(prompt, ServerError)
    if isinstance(stop_sequences, str):
        stop_sequences = [stop_sequences]
    stop_sequences = list(stop_sequences or ())
    if not all(isinstance(text, str) and text for text in stop_sequences):
        raise ServerError(f"stop_sequences={stop_sequences!r}: they are texts that are not empty.")
    for name in sorted(options.keys() - OPTIONS):
        if name in REFUSED:
            raise ServerError(f"A request does not take {name!r}: {REFUSED[name]}.")
        near = difflib.get_close_matches(name, [*OPTIONS, *ARGUMENTS], 1)
        hint = f"; the nearest name is {near[0]!r}" if near else ""
        raise ServerError(f"llama-server knows no {name!r}: it would ignore it{hint}.")
    if max_tokens != -1:  # 0 would give a token
        max_tokens = whole("max_tokens", max_tokens, 1, 2**31 - 1, error=ServerError)
    if seed is not None:  # the last of 32 bits asks for a random one
        seed = whole("seed", seed, 0, 2**32 - 2, error=ServerError)
    asked = {
        "prompt": prompt,
        "n_predict": int(max_tokens),
        "temperature": finite("temperature", temperature, 0, error=ServerError),
        "top_p": finite("top_p", top_p, 0, error=ServerError),
        "top_k": whole("top_k", top_k, error=ServerError),
        "seed": -1 if seed is None else seed,
        "stop": stop_sequences,
        "n_probs": whole("n_probs", n_probs, 0, error=ServerError),
        "return_tokens": n_probs > 0,
        # A prompt that is partly reused is computed in other batches, whose sums round
        # differently: same seed, other text.
        "cache_prompt": False,
    }
    return OFF | asked | options


def check_start(prompt, post, model):
    """Warn where llama-server will put a start token before a prompt that begins with one. Asks
    only where it does."""
    start = model.metadata.get("tokenizer.ggml.bos_token_id")
    if isinstance(prompt, str) and isinstance(start, int) and start < len(model.pieces):
        piece = model.pieces[start]
        if isinstance(piece, str) and piece and prompt.startswith(piece):
            text = prompt[: len(piece) + 16]
            asked = {"content": text, "add_special": True, "parse_special": True}
            said = post("/tokenize", asked)
            say_two_starts(said["tokens"], start, piece)


def as_result(answer, latency_ms, pieces=None):
    """llama-server's answer -> InferResult. pieces: of every token, where they are known."""
    times, n = answer["timings"], answer["tokens_predicted"]
    # The first token comes out of the prompt's pass, so n tokens are n - 1 decodes.
    decodes, decode_ms = max(n - 1, 0), times["predicted_ms"]
    return InferResult(
        text=answer["content"],
        tokens_generated=n,
        latency_ms=latency_ms,
        tokens_per_sec=_per_second(decodes, decode_ms) if decodes else math.nan,
        prompt_tokens=answer["tokens_evaluated"],
        prompt_tokens_per_sec=_per_second(times["prompt_n"], times["prompt_ms"]),
        stop_reason=answer.get("stop_type", "none"),
        stop_word=answer.get("stopping_word", ""),
        probabilities=probability_table(answer.get("completion_probabilities"), pieces),
    )


def _per_second(count, ms):
    return 1000 * count / ms if ms > 0 else math.nan
