"""Probabilities in llama-server's answers: what it leaves out, and what is no number."""

import math

from ..errors import NotFiniteError, ServerError
from ..imports import uninterrupted

NOT_SOUND = (
    "the model's log-probabilities are no numbers (NaN or infinity): its text would be made up. score() names "
    "the layer where that begins; another file of this model may be sound."
)
FORCED = 1e4  # logits: more than any model's


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
    whole = [place for place, held in enumerate(_held_back(tokens, model)) if not held]
    rows = dict(zip(whole, given))
    if [tokens[place] for place in rows] != [row["id"] for row in given]:
        rows = {}
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
        held.append(any(back < _length(byte) for back, byte in enumerate(starts, 1)))
    return held


def _length(byte):
    """Bytes of the character that this byte begins; 0 where it begins none of several."""
    return 0 if byte < 0xC0 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4


def _asked_again(before, token, body, post, model):
    """llama-server's row for one token after the prompt and the tokens before: it is made to choose
    one whose row it gives, a plain word; the probabilities are from before that."""
    plain = (i for i, piece in enumerate(model.pieces) if _is_word(piece, model.token_types[i]))
    word, prompt = next(plain, None), body["prompt"]
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


def _is_word(piece, kind):
    return kind == 1 and isinstance(piece, str) and piece.isascii() and piece.isalpha()


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
        asked = {"prompt": few, "n_predict": 1, "n_probs": 1, "temperature": 0.0}
        answer = server.post("/completion", asked | {"cache_prompt": False})
        rows = probability_table(answer.get("completion_probabilities"))
        server.sound = rows is not None  # none for half a character: the next request asks again


def probability_table(tokens, pieces=None):
    """DataFrame of an answer's completion_probabilities, see InferenceEngine.infer; None without
    any. pieces: of every token, where they are known; llama-server writes no special tokens, and
    with a character's last token all that was held back. NotFiniteError where one is no number."""
    with uninterrupted():
        import pandas as pd

    if not tokens:
        return None
    rows = []
    for position, token in enumerate(tokens):
        tops = list(enumerate(token["top_logprobs"]))
        if not any(top["id"] == token["id"] for _, top in tops):
            tops.append((None, token))  # sampled from further down: its rank is not reported
        for rank, top in tops:
            number, logprob = top["id"], top["logprob"]
            if logprob is None:  # JSON has no NaN
                raise NotFiniteError(NOT_SOUND)
            piece = pieces[number] if pieces else _piece(top)
            chosen = number == token["id"]
            rows.append((position, rank, number, piece, math.exp(logprob), logprob, chosen))
    columns = ["position", "rank", "id", "piece", "prob", "logprob", "chosen"]
    return pd.DataFrame(rows, columns=columns).astype({"rank": "Int64"})


def _piece(token):
    raw = bytes(token["bytes"])
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw
