"""Chat templates are programs of whoever made the file: whether one ends within limits is tried in
a process of its own before llama-server, which runs it while it loads, gets it."""

import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256

from .errors import TemplateError, shown
from .files.places import cache_dir

SECONDS, BYTES = 2, 256 << 20  # CPU time and memory of a probe: real templates take milliseconds
WALL = 60  # seconds, on a machine that is busy with other things: what loops ends before

_PROBE = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (SECONDS + 1, SECONDS + 1))
resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
text, talks = json.load(sys.stdin)
try:
    from jinja2.sandbox import ImmutableSandboxedEnvironment
except ImportError:
    sys.exit(0)
def no(message=""):
    raise ValueError(message)
tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {
    "type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}}}
says = [{"role": role, "content": "x"} for role in ("system", "user", "assistant", "user")]
for messages in talks or (says[1:2], says[1:], says):
    for tools in (None, [tool]):
        try:
            made = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
            made.globals |= {"raise_exception": no, "strftime_now": lambda form: "1"}
            written, most = 0, (1 << 20) + 16 * len(json.dumps(messages))
            for piece in made.from_string(text).generate(messages=messages, tools=tools,
                    bos_token="<s>", eos_token="</s>", add_generation_prompt=True):
                written += len(piece)
                if written > most:
                    raise MemoryError
        except (MemoryError, OverflowError, RecursionError):
            sys.exit(3)
        except Exception:
            pass  # llama.cpp has a Jinja of its own, which says what it does not take
"""


def check(template: object, model: object, messages: Sequence | None = None) -> None:
    """TemplateError where a file's chat template takes more than SECONDS or BYTES for `messages`,
    None: for a few words. Only that: what is wrong with it otherwise llama-server says."""
    if not isinstance(template, str):
        return
    code = _PROBE.replace("SECONDS", str(SECONDS)).replace("BYTES", str(BYTES))
    given = json.dumps([template, [messages] if messages else []], default=str).encode()
    tried = cache_dir() / "templates" / sha256(code.encode() + given).hexdigest()
    if tried.is_file():  # this one was: a process costs a tenth of a second
        return
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            input=given,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=WALL,
        ).returncode
    except subprocess.TimeoutExpired:
        done = 3
    if done == 3 or done < 0:
        raise TemplateError(
            f"The chat template of {shown(str(model))} takes more than {SECONDS} s or {BYTES >> 20} MiB for "
            f"{'these messages' if messages else 'a few words'}. "
            'Give one with load_model(..., chat_template="chatml"), the name of another '
            "that llama.cpp knows or a text in Jinja; infer uses none."
        )
    if messages:  # another conversation is another
        return
    with suppress(OSError):  # nowhere to remember it
        tried.parent.mkdir(parents=True, exist_ok=True)
        tried.touch()
