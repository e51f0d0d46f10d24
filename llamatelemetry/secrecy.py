"""What nobody prints: tokens, keys and passwords, in whatever form they come back in a message.

Every error of ours goes through `redact`, and so does an executed notebook. What is a secret: what
was given to `keep`, variables of the environment whose names say so, and the hub's token."""

import base64
import html
import json
import os
import re
import sys
from functools import lru_cache
from urllib.parse import quote, quote_plus

MASK = "***"
# Variables of the services that this package talks to, whose value is a secret however short, and
# the endings of everybody else's, whose value is one where it is long enough to be no word.
_OURS = re.compile(r"HF_TOKEN|HUGGING_?FACE_HUB_TOKEN|KAGGLE_(KEY|API_TOKEN)|LLAMA_API_KEY", re.I)
_OURS_TOO = re.compile(r"graphistry_(personal_\w*key\w*|password|token)", re.I)
_OTHERS = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|SECRET_KEY|ACCESS_KEY(_ID)?)$", re.I)
_LONG = 8  # characters of a secret of somebody else's
_WORD = 4  # characters: a shorter secret is one only where it stands alone
# What is a secret by where it stands or how it looks, whoever's it is.
_SHAPES = (
    (re.compile(r"(\b\w+:/{1,2})[^/?#\s\"'<>]*@"), rf"\1{MASK}@"),  # a path has one slash left
    (
        re.compile(
            r"([?&;](?:\w*token|\w*key|\w*secret|password|sig|\w*signature|x-amz-\w+-?\w*)=)[^&\s#'\"<>]+",
            re.I,
        ),
        rf"\1{MASK}",
    ),
    (re.compile(r"(authorization['\"]?\s*[:=]\s*['\"]?(?:\w+\s+)?)[^\s'\"]+", re.I), rf"\1{MASK}"),
    (re.compile(r"(\bBearer\s+|\bapi_keys: )[^\s'\"]{4,}"), rf"\1{MASK}"),
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), MASK),
)
_BASE_64 = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/-_=")
_kept: set[str] = set()


def keep(value: str | None) -> str | None:
    """Remember a secret, so that it is redacted from now on; returns it."""
    if value and value.strip():
        _kept.add(value)
    return value


def redact(text: str, shortest: int = 1) -> str:
    """Text without the secrets that are known, whatever they are written as: as they are, in quotes
    (Python's, JSON's, HTML's), in a URL, in base 64, also as a part of it. shortest: over 1 of what
    is no prose (code, pictures): those with fewer characters are left there, and so is what only
    looks like a secret."""
    if known := frozenset(value for value in _known() if len(value) >= shortest):
        plain, coded = _patterns(known)
        text = plain.sub(MASK, _without_runs(text, coded))
    for form, instead in _SHAPES if shortest == 1 else ():
        text = form.sub(instead, text)
    return text


def _without_runs(text, coded):
    """Text without the runs of base 64 that have a secret in them."""
    parts, at = [], 0
    for found in coded.finditer(text):
        start, end = max(at, found.start()), found.end()
        while start > at and text[start - 1] in _BASE_64:
            start -= 1
        while end < len(text) and text[end] in _BASE_64:
            end += 1
        if end > at:
            parts += [text[at:start], MASK]
            at = end
    return "".join([*parts, text[at:]])


def _known():
    found = set(_kept)
    for name, value in os.environ.items():
        ours = _OURS.fullmatch(name) or _OURS_TOO.fullmatch(name)
        if ours or _OTHERS.search(name) and len(value) >= _LONG:
            found.add(value)
    if hub := sys.modules.get("huggingface_hub"):  # without it nobody has sent the token anywhere
        try:
            found.add(hub.get_token() or "")
        except Exception:  # whatever a version of it raises: no token was read
            pass
    lines = {line for value in found for line in value.splitlines() if len(line) >= _LONG}
    return {each.strip() for each in found | lines} | found - {""} if found else set()


@lru_cache(8)
def _patterns(secrets):
    """(of secrets as they are written, of secrets in base 64)."""
    forms, coded = set(), {"(?!)"}
    for secret in filter(str.strip, secrets):
        plain = {form for written in _written(secret) for form in (written, written.strip())}
        forms |= {re.escape(form) for form in plain if len(form) >= _WORD}
        forms |= {rf"(?<!\w){re.escape(form)}(?!\w)" for form in plain if len(form) < _WORD}
        coded |= set(_in_base_64(secret))
    return tuple(
        re.compile("|".join(sorted(each, key=len, reverse=True))) for each in (forms, coded)
    )


def _written(secret):
    """What a secret looks like where somebody has quoted it."""
    data = secret.encode("utf-8", "surrogatepass")
    yield secret
    for text in (json.dumps(secret), json.dumps(secret, ensure_ascii=False), repr(secret)):
        yield text[1:-1]
    yield repr("'" + secret)[2:-1]  # in double quotes
    yield repr(data)[2:-1]
    yield secret.encode("utf-8", "backslashreplace").decode()
    yield html.escape(secret)
    yield html.escape(secret, quote=False)
    for safe in ("", "/"):
        for coded in (quote(data, safe=safe), quote_plus(data, safe=safe)):
            yield coded
            yield re.sub("%..", lambda found: found[0].lower(), coded)
    yield data.hex()


def _in_base_64(secret):
    """Patterns of a secret in a run of base 64, where it may begin at any byte of three."""
    data = secret.encode("utf-8", "surrogatepass")
    whole = base64.b64encode(data).decode().rstrip("=")
    for before in range(3):
        code = base64.b64encode(bytes(before) + data).decode().rstrip("=")
        # Characters that hold bits of what is before or behind it are not its own.
        own = code[-(-8 * before // 6) : 8 * (before + len(data)) // 6]
        for text in {own, own.translate(str.maketrans("+/", "-_"))}:
            if len(text) >= _WORD and len(data) >= _WORD:
                yield re.escape(text)
    if len(data) > 2:
        yield rf"(?<![\w+/-]){re.escape(whole)}(?![\w+/-])"
