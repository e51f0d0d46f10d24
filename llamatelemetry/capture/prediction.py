"""Whether a model says what comes next: its graph computes logits, and a position sees nothing that
comes after it.

llama.cpp hands out a buffer of logits for every model. An encoder's graph never fills it, and what
a model that reads in both directions gives at a position has seen the token that follows: neither
is a prediction. So the graph is looked at, once per model, while two tokens run through a small
context of their own."""

from dataclasses import dataclass

import numpy as np

from ..errors import CaptureError
from .ends import find_logits
from .ggml import Scratch, Tensor
from .graph import Graph
from .recorder import on_host

INSTEAD = (
    "What it computes can be captured (attention, hidden, ...); where it is an embedding model, embed() gives "
    "its embeddings."
)
# The architectures of which `look` says one or the other. llama-server does not look: it ends,
# refuses in words of its own, or samples from a buffer that nothing has filled.
NO_LOGITS = set(
    "bert nomic-bert nomic-bert-moe jina-bert-v2 jina-bert-v3 neo-bert eurobert modern-bert "
    "gemma-embedding llama-embed t5 t5encoder wavtokenizer-dec".split()
)
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


def look(runtime):
    """The Prediction of a Runtime's model."""
    ggml = runtime.ggml
    graph, scratch, ahead = Graph(ggml), Scratch(), []

    def observe(address, ask):
        mask = Tensor.from_address(address).src[1]
        if ask:
            graph.add(address)
            return bool(mask) and ggml.op_desc(address) == b"SOFT_MAX"
        # (.., query, key), minus infinity where it hides a key
        values = on_host(ggml.array(mask, None, scratch))
        ahead.append(np.isfinite(values[..., 0, 1]).any())
        return True

    runtime.decode_apart([0, 1], observe)
    return Prediction(find_logits(graph) is not None, any(ahead))
