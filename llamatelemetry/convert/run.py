"""One run of a program of llama.cpp's, with its progress and its last words."""

import re
import subprocess
from collections import deque
from io import BufferedReader
from typing import cast

from .. import logs
from ..errors import ModelLoadError, QuantizeError
from ..options import environment


def run_tool(
    command: list[str],
    what: str,
    step: str | None = None,
    total: str | None = None,
    bar: str = "",
    progress: bool = False,
) -> str:
    """Run a tool, with a progress bar from its own output; returns that output.

    step: a regular expression whose group 1 is the step reached, and group 2 the total unless
    `total` finds it."""
    from tqdm.auto import tqdm

    tail: deque[str] = deque(maxlen=400)
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env=environment(),
    )
    output = cast(BufferedReader, process.stdout)  # bytes, through a pipe
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
    except BaseException:
        process.kill()
        process.wait()
        raise
    finally:
        output.close()
    words = "\n".join(tail)
    if code:
        ending = f"signal {-code}" if code < 0 else f"exit status {code}"
        unread = "failed to load model" in words or "failed to read" in words
        error = ModelLoadError if unread else QuantizeError
        why = logs.reason(words, killed=code < 0)
        last = logs.last_words(words)[-1200:]
        raise error(f"Could not {what} ({ending}{why and f': {why}'}). Its last words:\n{last}")
    return words
