"""One run of a program of llama.cpp's, with its progress and its last words."""

import os
import re
import select
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping

from . import guard, logs
from .errors import ModelLoadError, QuantizeError
from .imports import uninterrupted
from .liveness import LOOP, Watch
from .options import environment

GUARD_S = 10  # seconds after a tool's end in which its guard says how it ended, or it lets go


def run_tool(
    command: list[str],
    what: str,
    step: str | None = None,
    total: str | None = None,
    bar: str = "",
    progress: bool = False,
    limit: float = LOOP,
    env: Mapping[str, str] | None = None,
    seen: Callable[[int], object] | None = None,
) -> str:
    """Run a tool, with a progress bar from its own output; returns that output. It dies with this
    process.

    step: a regular expression whose group 1 is the step reached, and group 2 the total unless
    `total` finds it. limit: seconds that the tool may compute without a word (liveness.Watch ends
    one that stalls). env: its environment, where it is another than a tool's usual one. seen: told
    its process id. Raises QuantizeError, or ModelLoadError where it could not read the model."""
    tail: deque[str] = deque(maxlen=4000)
    read, write = os.pipe()
    output, stalled = os.fdopen(read, "rb"), []
    try:
        with os.fdopen(write, "wb") as log:
            env = environment() if env is None else env
            process, pid = guard.popen(command, log, env=env, grace=0)
    except OSError as error:
        output.close()
        raise QuantizeError(
            f"Could not {what}: {command[0]} cannot be executed: {error}."
        ) from error

    def end(why):
        stalled.append(why)
        guard.stop(process, GUARD_S)

    try:
        with uninterrupted():  # takes longer than all else: the tool is on its way by now
            from tqdm.auto import tqdm
        if seen:
            seen(pid)
        with (
            tqdm(desc=bar, disable=not (progress and step)) as meter,
            Watch(pid, end, limit) as watch,
        ):
            pending = ""
            # llama-imatrix reports its steps without ending the line.
            while chunk := output.read1(4096):
                watch.beat()
                pending += chunk.decode("utf-8", "replace")
                *lines, pending = pending.split("\n")
                tail.extend(lines)
                words = "\n".join([*lines, pending])
                if total and (found := re.search(total, words)):
                    meter.total = int(found[1])
                for found in re.finditer(step, words) if step else ():
                    meter.total = int(found[2]) if found.re.groups > 1 else meter.total
                    meter.update(max(0, int(found[1]) - meter.n))
            tail.append(pending)
        code = process.wait(GUARD_S)
        guard.stop(process)
    except subprocess.TimeoutExpired:
        raise QuantizeError(
            f"Could not {what}: the process between this one and {command[0]} does not answer."
        ) from None
    finally:
        if process.returncode is None:
            guard.stop(process, GUARD_S)
            # To its output's end, which is the tool's: then it writes no more
            deadline = time.monotonic() + GUARD_S
            while time.monotonic() < deadline:
                if select.select([output], [], [], 0.1)[0] and not output.read1(4096):
                    break
        output.close()
    words = "\n".join(tail)
    if code:
        ending = f"signal {code - 128}" if code > 128 else f"exit status {code}"
        ending = f"it {stalled[0]}, and was ended" if stalled else ending
        unread = "failed to load model" in words or "failed to read" in words
        error = ModelLoadError if unread and not stalled else QuantizeError
        why = logs.reason(words, killed=code > 128)
        last = logs.last_words(words)[-1200:]
        raise error(f"Could not {what} ({ending}{why and f': {why}'}). Its last words:\n{last}")
    return words
