"""Whether a model says what comes next: its graph computes logits, and a position sees nothing that
comes after it.

llama.cpp hands out a buffer of logits for every model. An encoder's graph never fills it, and what
a model that reads in both directions gives at a position has seen the token that follows: neither
is a prediction. So the graph is looked at, once per model, while two tokens run through a small
context of their own."""

import ctypes
from dataclasses import dataclass

import numpy as np

from ..errors import CaptureError
from .ggml import Scratch, Tensor
from .graph import Graph
from .residual import find_logits

INSTEAD = (
    "What it computes can be captured (attention, hidden, ...); where it is an embedding model, embed() gives "
    "its embeddings."
)
# The architectures of which `look` says one or the other. llama-server does not look: it ends,
# refuses in words of its own, or samples from a buffer that nothing has filled.
NO_LOGITS = {
    "bert",
    "nomic-bert",
    "nomic-bert-moe",
    "jina-bert-v2",
    "jina-bert-v3",
    "neo-bert",
    "eurobert",
    "modern-bert",
    "gemma-embedding",
    "llama-embed",
    "t5",
    "t5encoder",
    "wavtokenizer-dec",
}
BOTH_WAYS = {"dream", "llada", "llada-moe", "rnd1"}


@dataclass(frozen=True)
class Prediction:
    """logits: the graph computes them; ahead: some position attends to later ones."""

    logits: bool
    ahead: bool

    def why_not(self, what):
        """Why `what` (a model in words) predicts no next token, and what it gives instead; None
        where it does."""
        if not self.logits:
            return f"{what} predicts no next token: its graph computes no logits, as an encoder's does not. {INSTEAD}"
        if self.ahead:
            return (
                f"{what} predicts no next token: its attention runs in both directions, so that what it says at a "
                f"position has seen what follows. {INSTEAD}"
            )
        return None


def check_file(model):
    """CaptureError, by name, for a GGUFFile that llama-server cannot generate with."""
    ahead = (
        model.architecture in BOTH_WAYS
        or model.metadata.get(f"{model.architecture}.attention.causal") is False
    )
    says = Prediction(logits=model.architecture not in NO_LOGITS, ahead=ahead)
    if why := says.why_not(f"{model.path.name} (architecture {model.architecture!r})"):
        raise CaptureError(why)


def look(api, ggml, model):
    """The Prediction of a loaded model. api: llama_cpp; ggml: a Ggml; model: llama.cpp's
    pointer."""
    graph, scratch, ahead, failure = Graph(ggml), Scratch(), [], []

    def on_node(address, ask, _):
        try:
            tensor = Tensor.from_address(address)
            if ask:
                graph.add(address)
                return bool(tensor.src[1]) and ggml.op_desc(address) == b"SOFT_MAX"
            mask = ggml.array(
                tensor.src[1], None, scratch
            )  # (.., query, key), minus infinity where it hides a key
            mask = mask if isinstance(mask, np.ndarray) else mask.get()
            ahead.append(np.isfinite(mask[..., 0, 1]).any())
            return True
        except BaseException as error:  # ctypes would swallow it
            failure.append(error)
            return bool(ask)

    callback = api.ggml_backend_sched_eval_callback(on_node)
    params = api.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 256, 32, 32, 1
    params.flash_attn_type, params.no_perf, params.cb_eval = 0, True, callback
    context = api.llama_init_from_model(model, params)
    if not context:
        raise CaptureError(
            "llama.cpp could not make a context of 256 tokens for a look at the model; see its log."
        )
    try:
        status = _decode_two(api, context, api.llama_model_has_encoder(model))
    finally:
        api.llama_free(context)
        ggml.forget()
    if failure:
        raise failure[0]
    if status:
        raise CaptureError(
            f"llama.cpp could not run two tokens through the model (status {status}); see its log."
        )
    return Prediction(find_logits(graph) is not None, any(ahead))


def _decode_two(api, context, encoder):
    batch = api.llama_batch_init(2, 0, 1)
    try:
        batch.n_tokens = 2
        for i in range(2):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = i, i, 1, True
            batch.seq_id[i][0] = 0
        return (api.llama_encode if encoder else api.llama_decode)(context, batch)
    finally:
        api.llama_batch_free(batch)


def architecture(api, model):
    """general.architecture of a loaded model."""
    room = ctypes.create_string_buffer(128)
    api.llama_model_meta_val_str(model, b"general.architecture", room, len(room))
    return room.value.decode(errors="replace")
