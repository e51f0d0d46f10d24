"""What llama.cpp's log says of a failure: its own sentence, not what a debugger wrote behind it."""

import re

from .errors import ServerError

# Without it ggml writes a backtrace, through gdb where there is one, behind the sentence that says
# why it aborts.
ENVIRONMENT = {"GGML_NO_BACKTRACE": "1"}

# "/.../ggml.c:123: GGML_ASSERT(x) failed" is ggml_abort's form, the other C++'s own: what a process
# says at its end.
_ENDS = [
    re.compile(form)
    for form in (r"^\S*\.(?:c|cc|cpp|cu|cuh|h|hpp|m|mm|comp):\d+: .*\S", r"^\s*what\(\):.*\S")
]
# What it says before it gives up in order; of what may be a mere complaint the last few lines only.
_LOADER = re.compile(r"error loading model:.*\S")
_REFUSED = r"failed|unable to|cannot|does not (divide|support)|requires"
_TROUBLE = [
    re.compile(form, re.IGNORECASE)
    for form in (r"\berror:.*\S", r"^\d[\d.]* E .*\S", r"\berror\b.*\S", _REFUSED)
]
_PREFIX = re.compile(r"^\d+\.\d+\.\d+\.\d+ [EWI] ")
_FEW = 12


def reason(log, killed=False):
    """The line of a log that says why llama.cpp failed, without its time; "" where no line does.

    killed: a signal ended the process; earlier complaints, which it survived, are then not the
    reason."""
    lines = log.splitlines()
    for form in _ENDS if killed else (*_ENDS, _LOADER):
        if found := [line for line in lines if form.search(line)]:
            return found[-1].strip()
    for form in () if killed else _TROUBLE:
        if found := [line for line in lines[-_FEW:] if form.search(line)]:
            # The cause comes before those that it brought down
            return _PREFIX.sub("", found[0]).strip()
    return ""


def last_words(log, n_lines=15):
    """The end of a log, at most n_lines: up to the sentence of an abort where there is one, without
    a backtrace."""
    lines = log.strip().splitlines()
    ends = [
        number for number, line in enumerate(lines, 1) if any(form.match(line) for form in _ENDS)
    ]
    if ends:
        lines = lines[: ends[-1]]
    return "\n".join(lines[-n_lines:])


def check_room(log):
    """OSError where a log (an open file) cannot be written: llama-server's port is read from it."""
    log.write(bytes(1 << 16))
    log.flush()
    log.seek(0)
    log.truncate()


def no_room(folder):
    """The error for a folder of logs that is full."""
    return ServerError(
        f"llama-server's log cannot be written: {folder} is full. Make room there, or set TMPDIR to "
        "a folder that has some."
    )
