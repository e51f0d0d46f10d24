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

    def ask(room):
        ids = (ctypes.c_int32 * room)()
        special = add_special, parse_special
        return ids, api.llama_tokenize(vocab, data, len(data), ids, room, *special)

    # Enough for most; a normalizer may make more of a character than it has bytes.
    what = f"could not tokenize a text of {len(data):,} bytes"
    return _with_room(ask, len(data) + 16, what)


def token_piece(api, vocab, token):
    """The bytes of a token, special ones by name."""

    def ask(room):
        piece = ctypes.create_string_buffer(room)
        return piece, api.llama_token_to_piece(vocab, token, piece, room, 0, True)

    return _with_room(ask, 64, f"gives no piece of token {token}")


def _with_room(ask, room, what):
    """What ask(room) gives, as much as it says; asked again with the room that it wants where it
    answers with its negative."""
    while True:
        found, count = ask(room)
        if count >= 0:
            return found[:count]
        if -count <= room or -count >= 2**31:  # not a size that it asks for
            raise CaptureError(f"llama.cpp {what} (it answered {count}).")
        room = -count
