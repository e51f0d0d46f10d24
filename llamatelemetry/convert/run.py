"""One run of a program of llama.cpp's, with its progress and its last words."""

import os
import re
from collections import deque
from collections.abc import Iterable
from pathlib import Path

from .. import guard, logs
from ..errors import ModelLoadError, QuantizeError
from ..files.scratch import scratch
from ..options import environment


def run_tool(
    command: list[str],
    what: str,
    step: str | None = None,
    total: str | None = None,
    bar: str = "",
    progress: bool = False,
    leaves: Iterable[Path] = (),
) -> str:
    """Run a tool, with a progress bar from its own output; returns that output. It dies with this
    process; then what it `leaves` is removed.

    step: a regular expression whose group 1 is the step reached, and group 2 the total unless
    `total` finds it."""
    from tqdm.auto import tqdm

    tail: deque[str] = deque(maxlen=400)
    read, write = os.pipe()
    left = "\n".join(map(str, [*leaves, scratch()]))
    output = os.fdopen(read, "rb")
    try:
        with os.fdopen(write, "wb") as log:
            process, _ = guard.popen(command, log, env=environment(), grace=0, folder=left)
    except OSError as error:
        output.close()
        raise QuantizeError(
            f"Could not {what}: {command[0]} cannot be executed: {error}."
        ) from error
    try:
        with tqdm(desc=bar, disable=not (progress and step)) as meter:
            pending = ""
            # llama-imatrix reports its steps without ending the line.
            while chunk := output.read1(4096):
                pending += chunk.decode("utf-8", "replace")
                *lines, pending = pending.split("\n")
                tail.extend(lines)
                seen = "\n".join([*lines, pending])
                if total and (found := re.search(total, seen)):
                    meter.total = int(found[1])
                for found in re.finditer(step, seen) if step else ():
                    meter.total = int(found[2]) if found.re.groups > 1 else meter.total
                    meter.update(max(0, int(found[1]) - meter.n))
            tail.append(pending)
        code = process.wait()
        guard.stop(process)
    except BaseException:
        process.kill()
        process.wait()
        raise
    finally:
        output.close()
    words = "\n".join(tail)
    if code:
        ending = f"signal {code - 128}" if code > 128 else f"exit status {code}"
        unread = "failed to load model" in words or "failed to read" in words
        error = ModelLoadError if unread else QuantizeError
        why = logs.reason(words, killed=code > 128)
        last = logs.last_words(words)[-1200:]
        raise error(f"Could not {what} ({ending}{why and f': {why}'}). Its last words:\n{last}")
    return words
