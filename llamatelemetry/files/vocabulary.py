"""Tokens' texts: as a GGUF file stores them, and as llama.cpp writes them."""

import re
from collections.abc import Iterable, Sequence

import numpy as np


def named(pieces: Sequence[str | bytes], ids: Iterable[int]) -> list[str | bytes]:
    """The piece of each token id; <id> where the vocabulary has none, as in a file without
    tokenizer."""
    return [pieces[i] if i < len(pieces) else f"<{i}>" for i in ids]


def decode_pieces(
    model: str | None, tokens: Sequence[str | bytes], types: Sequence[int] | np.ndarray
) -> list[str | bytes]:
    """Token texts as they are stored -> as they are written, for the tokenizer models of llama.cpp.

    Byte-level BPE (Radford et al. 2019, GPT-2) stores each byte as a printable character;
    SentencePiece (Kudo and Richardson 2018) stores a space as U+2581 and has tokens for single
    bytes, <0x0A>. Special and user-defined tokens are stored as they are. model: "gpt2", "llama",
    ...; tokens: texts (or bytes); types: (n,) ints as in GGUFFile.token_types."""
    if model == "gpt2":
        decode = _from_byte_level
    elif model in ("llama", "t5", "bert", "gemma4", "hybriddna", "whitespace"):
        decode = _from_sentencepiece
    else:
        decode = str
    pieces: list[str | bytes] = []
    for token, kind in zip(tokens, np.asarray(types).tolist()):
        if isinstance(token, bytes):
            pieces.append(token)
        elif kind == 6 and _BYTE.match(token):
            pieces.append(_text_or_bytes(bytes([int(token[3:-1], 16)])))
        else:
            pieces.append(decode(token) if kind in (1, 6) else token)
    return pieces


_BYTE = re.compile("^<0x[0-9A-Fa-f]{2}>$")


def _byte_characters():
    """GPT-2's table: printable Latin-1 bytes stand for themselves, the others for U+0100 and on, in
    order."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_characters()


def _from_byte_level(token):
    if token.isascii():
        return token  # most tokens: every ASCII character of the table stands for itself
    try:
        return _text_or_bytes(bytes([_BYTE_OF[char] for char in token]))
    except KeyError:  # a character that is not of the table: an added token
        return token


def _from_sentencepiece(token):
    return token.replace("\u2581", " ")


def _text_or_bytes(raw):
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw
