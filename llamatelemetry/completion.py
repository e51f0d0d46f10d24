"""What llama-server's /completion is asked, and what comes back, as InferResult."""

import math
from dataclasses import dataclass, field

from .errors import ServerError


@dataclass
class InferResult:
    """What infer() returns; str() is the text.

    text; tokens_generated; latency_ms: wall time of the whole request; tokens_per_sec: decode speed, the prompt and
    the token that comes out of it excluded (nan for fewer than two tokens); prompt_tokens; prompt_tokens_per_sec;
    stop_reason: "eos", "word" (a stop sequence), "limit" (max_tokens, or the context is full) or "none";
    stop_word: the sequence that stopped it, or ""; probabilities: DataFrame or None, see infer().
    """

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


def request_body(prompt, max_tokens, temperature, top_p, top_k, seed, stop_sequences, n_probs, options):
    """The JSON body of POST /completion for the arguments of InferenceEngine.infer."""
    if not isinstance(prompt, str):
        prompt = [int(token) for token in prompt]
    if len(prompt) == 0:
        raise ServerError("The prompt is empty: there is nothing to continue.")
    if isinstance(stop_sequences, str):
        stop_sequences = [stop_sequences]
    return {
        "prompt": prompt,
        "n_predict": int(max_tokens),
        "temperature": float(temperature),
        "top_p": float(top_p),
        "top_k": int(top_k),
        "min_p": 0.0,  # llama-server's default is 0.05: a limit that nobody asked for
        "seed": -1 if seed is None else int(seed),
        "stop": list(stop_sequences or ()),
        "n_probs": int(n_probs),
        # A prompt that is partly reused is computed in other batches, whose sums round differently: same seed, other
        # text.
        "cache_prompt": False,
    } | options


def as_result(answer, latency_ms):
    """llama-server's answer -> InferResult."""
    times, n = answer["timings"], answer["tokens_predicted"]
    # The first token comes out of the prompt's pass, so n tokens are n - 1 decodes.
    speed = 1000 * (n - 1) / times["predicted_ms"] if n > 1 and times["predicted_ms"] > 0 else math.nan
    tops = answer.get("completion_probabilities")
    return InferResult(answer["content"], n, latency_ms, speed, answer["tokens_evaluated"],
                       1000 * times["prompt_n"] / times["prompt_ms"] if times["prompt_ms"] > 0 else math.nan,
                       answer.get("stop_type", "none"), answer.get("stopping_word", ""), _probabilities(tops))


def _probabilities(tokens):
    import pandas as pd

    if not tokens:
        return None
    rows = []
    for position, token in enumerate(tokens):
        tops = token["top_logprobs"]
        rows += [(position, rank, top, top["id"] == token["id"]) for rank, top in enumerate(tops)]
        if not any(top["id"] == token["id"] for top in tops):
            rows.append((position, None, token, True))  # sampled from further down: its rank is not reported
    table = [(position, rank, top["id"], _piece(top), math.exp(top["logprob"]), top["logprob"], chosen)
             for position, rank, top, chosen in rows]
    columns = ["position", "rank", "id", "piece", "prob", "logprob", "chosen"]
    return pd.DataFrame(table, columns=columns).astype({"rank": "Int64"})


def _piece(token):
    raw = bytes(token["bytes"])
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw
