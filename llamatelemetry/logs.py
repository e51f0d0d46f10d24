"""What llama.cpp's log says of a failure: its own sentence, not what a debugger wrote behind it."""

import re

# Without it ggml writes a backtrace, through gdb where there is one, behind the sentence that says why it aborts.
ENVIRONMENT = {"GGML_NO_BACKTRACE": "1"}

# "/.../ggml.c:123: GGML_ASSERT(x) failed": ggml_abort's form. The others: C++'s own, and what the loader says.
_ABORT = re.compile(r"^\S*\.(?:c|cc|cpp|cu|cuh|h|hpp|m|mm|comp):\d+: .*\S")
_OTHERS = [re.compile(form, re.IGNORECASE) for form in (
    r"^\s*what\(\):.*\S", r"error loading model:.*\S", r"\berror:.*\S", r"^\d[\d.]* E .*\S", r"\berror\b.*\S",
    r"failed|unable to|cannot")]  # fmt: skip
_PREFIX = re.compile(r"^\d+\.\d+\.\d+\.\d+ [EWI] ")


def reason(log):
    """The line of a log that says why llama.cpp failed, without its time; "" where no line does."""
    lines = log.splitlines()
    aborts = [line for line in lines if _ABORT.match(line)]
    if aborts:
        return aborts[-1].strip()
    for form in _OTHERS:
        if found := [line for line in lines if form.search(line)]:
            return _PREFIX.sub("", found[-1]).strip()
    return ""


def last_words(log, n_lines=15):
    """The end of a log, at most n_lines: up to the sentence of an abort where there is one, without a backtrace."""
    lines = log.strip().splitlines()
    ends = [number for number, line in enumerate(lines, 1) if _ABORT.match(line) or "what():" in line]
    if ends:
        lines = lines[: ends[-1]]
    return "\n".join(lines[-n_lines:])
