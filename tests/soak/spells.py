"""Chat templates that somebody wrote to do harm: whatever the template, text and captures are to be
had, chat answers or raises an error of ours, and memory and time are bounded."""

import tempfile
from collections import Counter
from pathlib import Path

from damage import LIMIT, TEXT, Watched, build, parse, text

SECONDS = 180  # for one file: each of its two conversations may be cut after an endless loop's time
PLAIN = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
LONG = "{% if messages|length > 6 %}SPELL{% endif %}" + PLAIN  # no sooner than in a conversation
MACRO = "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 2) }}{% endmacro %}{{ f(0) }}"
DOUBLED = "{% set ns = namespace(s='x') %}{% for i in range(40) %}{% set ns.s = ns.s + ns.s %}{% endfor %}"
SPELLS = {
    "loop": "{% for i in range(1000000000) %}{% endfor %}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "endless recursion": MACRO,
    "doubled text": DOUBLED + "{{ ns.s }}",
    "repeated text": "{{ 'x' * 4000000000 }}",
    "repeated list": "{{ ([1] * 900000000)|length }}",
    "list of a range": "{{ range(900000000)|list|length }}",
    "lazy range": "{{ range(100000000)|length }}",
    "much text": "{{ 'x' * 100000000 }}",
    "text put away": "{% set a = 'x' * 200000000 %}{% set b = a ~ a ~ a %}{{ b|length }}",
    "wide text": "{{ 'x'.center(3000000000) }}",
    "format": "{{ '%3000000000d' % 1 }}",
    "power": "{{ 9 ** 9 ** 9 }}",
    "much output": "{% for i in range(30000000) %}abcdefghijklmnopqrstuvwxyz{% endfor %}",
    "joined": "{{ range(200000000)|join('xxxxxxxxxx') }}",
    "sorted": "{{ (range(100000000)|list|sort)|last }}",
    "replaced": "{{ ('x' * 30000).replace('x', 'x' * 300000) }}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os.system('true') }}",
    "raised": "{{ raise_exception('no') }}",
    "unknown filter": "{{ messages|nothing }}",
    "unknown function": "{{ nothing() }}",
    "not ended": "{% for m in messages %}{{ m.content }}",
    "not begun": "{% endfor %}",
    "only a brace": "{{",
    "empty": "",
    "a space": " ",
    "many braces": "{{" * 20000,
    "deep parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep conditions": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "long": "x" * 4_000_000,
    "not UTF-8": b"{{ messages }}\xff\xfe\xc3",
    "zero bytes": b"{{ messages }}\0\0{{ messages }}",
    "division": "{{ 1 // 0 }}{{ 1 % 0 }}",
    "negative index": "{{ messages[-99].content }}",
    "odd attributes": "{{ messages.x.y.z[1][2]() }}",
    "special tokens": "<|im_start|><s></s><|im_end|>{{ messages[0].content }}",
}
# Of those that do harm, once a conversation is long: no probe before the server's start sees it
LATER = (
    "loop",
    "doubled text",
    "endless recursion",
    "repeated list",
    "much output",
    "deep parentheses",
)
SPELLS |= {f"{name}, later": LONG.replace("SPELL", SPELLS[name]) for name in LATER}


def write(base, template, path):
    """A file like `base` (a path) with this chat template."""
    raw = template if isinstance(template, bytes) else template.encode()
    model = parse(base)
    model.keys = [key for key in model.keys if key[0] != b"tokenizer.chat_template"]
    model.keys.append([b"tokenizer.chat_template", TEXT, text(raw)])
    Path(path).write_bytes(build(model))


def visit(path):
    """All that a template may spoil, in the process that opens a file (damage.Watched)."""
    from llamatelemetry import InferenceEngine, LlamaTelemetryError
    from llamatelemetry.errors import ModelLoadError

    talk = [{"role": role, "content": "a b"} for role in ("user", "assistant") * 4]
    with InferenceEngine() as engine:
        try:
            engine.load_model(path, silent=True)
        except ModelLoadError as error:  # a text that is none is no model
            if "chat_template" in str(error):
                raise
            raise AssertionError(f"the model is taken away: {error}") from error
        said = []
        for messages in (talk[:1], talk[:7]):
            _works(engine)
            try:
                engine.chat(messages, max_tokens=1)
            except LlamaTelemetryError as error:
                said.append(str(error))
        _works(engine)
        if said:
            raise LlamaTelemetryError(said[-1])
        return True


def _works(engine):
    from llamatelemetry import LlamaTelemetryError

    try:
        answer = engine.infer([1, 2, 3], max_tokens=2, ignore_eos=True)
        assert answer.tokens_generated == 2 and len(engine.capture([1, 2, 3]).tokens) == 3
    except LlamaTelemetryError as error:
        raise AssertionError(f"infer or capture is taken away: {error}") from error


def run(soak):
    """The row of this part."""
    from models import tiny_model

    counts, todo = Counter(), list(SPELLS)[: soak.count]
    watched = Watched(seconds=SECONDS)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        base = tiny_model("llama", folder, n_ctx=4096)
        try:
            for number, name in enumerate(todo):
                if soak.over():
                    return None
                path = Path(folder) / "spell.gguf"
                write(base, SPELLS[name], path)
                kind, said = watched.open("template", path)
                counts[kind] += 1
                if kind not in ("works", "typed"):
                    soak.find(f"template {name!r}: {kind}: {said}", f"--parts templates ({name})")
                soak.progress(number + 1, len(todo), f"{name}: {kind}: {said}")
        finally:
            watched.close()
    limits = {"limit_s": SECONDS, "limit_mib": LIMIT >> 20}
    return [{"what": "all", "count": len(todo), **counts, **limits}]
