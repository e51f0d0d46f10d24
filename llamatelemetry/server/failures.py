"""Why llama-server ended, refused or stayed silent, as the error that says what to do next."""

import re
import signal
from pathlib import Path

from .. import logs
from ..errors import LlamaTelemetryError, ModelLoadError, ServerError, TemplateError, shown

NO_MEMORY = r"out of memory|failed to allocate|unable to allocate|cudaMalloc failed"
NO_TEMPLATE = r"chat template parsing error|the supplied chat template is not supported"


def death(when: str, code: int | None, log: str, model: Path) -> LlamaTelemetryError:
    """The error for a server that ended. code: the guard's, 128 + n for signal n; log: its end."""
    how, killed = f"exit code {code}", (code or 0) > 128
    if code and 128 < code < 160:
        how = f"signal {signal.Signals(code - 128).name}"
    why = logs.reason(log, killed=killed)
    tail = f"{why and f'It says: {why}. '}Its log ends:\n{logs.last_words(log, 40)[-3000:]}"
    if "couldn't bind HTTP server socket" in log:
        return ServerError(
            "llama-server cannot listen there: the port is in use or the host is not this "
            f"machine's. Leave port=None for a free one. {tail}"
        )
    if re.search(NO_TEMPLATE, log):
        return _no_template(log, model)
    if unknown := re.search(r"unknown model architecture: '([^']*)'", log):
        return ModelLoadError(
            f"This llama.cpp does not know the architecture {unknown[1]!r} of {model}. "
            "A newer engine may; else choose another model."
        )
    if re.search(NO_MEMORY, log):
        return ModelLoadError(
            f"{model.name} does not fit in memory. Choose a smaller quantization, a smaller "
            f"ctx_size, fewer gpu_layers, or auto_start=False. {tail}"
        )
    if re.search("(failed to load|error loading) model", log):
        return ModelLoadError(f"llama.cpp cannot load {model} ({how}). {tail}")
    return ServerError(f"llama-server {when} ({how}). {tail}")


def _no_template(log, model):
    given = "the supplied chat template" in log
    whose = "chat template that was given" if given else f"chat template of {shown(model)}"
    reasons = ("_init: error", "chat template parsing error", "failed to apply template")
    found = filter(None, (re.search(f"{reason}: (.*)", log) for reason in reasons))
    why = next((f" ({said[1].strip().rstrip(':')})" for said in found), "")
    return TemplateError(
        f"llama-server cannot parse the {whose}{why}. Give one with load_model(..., "
        'chat_template="chatml"), the name of another that llama.cpp knows or a text in Jinja; infer '
        "uses none."
    )


def refusal(response) -> ServerError:
    """The error for an answer (requests.Response) with a status of 400 or more."""
    try:
        error = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        error = {"message": response.text[:500]}
    message, counts, mend = error.get("message"), "", ""
    if error.get("type") == "exceed_context_size_error":
        if "n_prompt_tokens" in error:
            n_ctx = error.get("n_ctx")
            counts = f" ({error['n_prompt_tokens']} tokens, the context holds {n_ctx})"
        return ServerError(
            f"The prompt is longer than the context{counts}. Shorten it, or load the model with a "
            "larger ctx_size."
        )
    if "physical batch size" in str(message):
        mend = " Shorten the text, or load the model with larger ubatch_size and batch_size."
    return ServerError(
        f"llama-server refused the request ({response.status_code}): {message}.{mend}"
    )
