"""A text to ids and an id to its piece, by llama.cpp, with as much room as it asks for."""

import ctypes

from ..errors import CaptureError

NO_TOKENIZER = 0  # enum llama_vocab_type: asked for tokens, llama.cpp would abort


def token_ids(api, vocab, text, add_special=True, parse_special=True):
    """Ids of a text. add_special: with what the model puts first and last; parse_special: special
    tokens written out in the text are those tokens. Raises CaptureError for a file without a
    tokenizer."""
    if api.llama_vocab_type(vocab) == NO_TOKENIZER:
        raise CaptureError(
            "this model's file holds no tokenizer: pass token ids instead of a text."
        )
    data = text.encode("utf-8", "surrogateescape")
    room = (
        len(data) + 16
    )  # enough for most; a normalizer may make more of a character than it has bytes
    while True:
        ids = (ctypes.c_int32 * room)()
        count = api.llama_tokenize(vocab, data, len(data), ids, room, add_special, parse_special)
        if count >= 0:
            return list(ids[:count])
        if -count <= room or -count >= 2**31:  # not a size that it asks for
            raise CaptureError(
                f"llama.cpp could not tokenize a text of {len(data):,} bytes (it answered {count})."
            )
        room = -count


def token_piece(api, vocab, token):
    """The bytes of a token, special ones by name."""
    room = 64
    while True:
        piece = ctypes.create_string_buffer(room)
        count = api.llama_token_to_piece(vocab, token, piece, room, 0, True)
        if count >= 0:
            return piece.raw[:count]
        if -count <= room:
            raise CaptureError(f"llama.cpp gives no piece of token {token} (it answered {count}).")
        room = -count
