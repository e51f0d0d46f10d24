"""What became of a call, in the words that the fuzzer and the soak count: "works", "typed" (an
error of ours), "interrupted", "untyped"."""

import re
import traceback
from pathlib import Path


def outcome(call):
    """(kind, what it returned or what its error said)."""
    from llamatelemetry import LlamaTelemetryError

    try:
        return "works", call()
    except LlamaTelemetryError as error:
        # The worker gives an error that is none of ours so
        foreign = re.match(r"[A-Za-z.]*(Error|Exception): ", str(error))
        return "untyped" if foreign else "typed", f"{type(error).__name__}: {error}"
    except KeyboardInterrupt:
        return "interrupted", ""
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = (frame for frame in reversed(frames) if "llamatelemetry/" in frame.filename)
        where = next(ours, frames[-1])
        place = f"{Path(where.filename).name}:{where.lineno}"
        return "untyped", f"{type(error).__name__}: {str(error)[:200]} ({place})"
