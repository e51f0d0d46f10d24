"""A Plan: after which graph nodes which stage is read."""

import struct
from dataclasses import dataclass, field

from .graph import base
from .names import STAGES


@dataclass
class Tap:
    """Where one stage of one layer is read: after node `index` is computed, as `view` of its bytes.

    view: None for the node as it is, else (offset, ne, nb) with the number of tokens in
    ne[token_dim]."""

    index: int
    name: str
    shape: tuple  # of one token's values: (width,), (head, feature); a grid's without its positions
    view: tuple | None = None
    token_dim: int = 1
    source: int | None = None  # read this source of the node instead of its result
    grid: int = 0  # 2 for (head, query, key), 1 for (query, key)
    after: int = -1  # before the node is computed, but after this one: what it is made from

    def overlaps(self, other):
        """Whether a token's values here and there share bytes."""
        spans = []
        for tap in (self, other):
            offset, ne, nb = tap.view or (0, tap.shape, (0, 0))
            spans.append(set(range(offset, offset + 4 * ne[0])))
        return self.index == other.index and bool(spans[0] & spans[1])

    @classmethod
    def of(cls, node, shape, *view, **how):
        return cls(node.index, node.name, shape, *view, **how)


@dataclass
class Plan:
    """taps: {stage: {layer: [Tap, ...]}} (several taps add up); layers: facts per layer; n_nodes:
    of the graph."""

    n_nodes: int
    n_layer: int
    taps: dict = field(default_factory=dict)
    layers: list = field(default_factory=list)
    why_not: dict = field(default_factory=dict)  # stage -> reason
    masks: dict = field(default_factory=dict)  # mask -> layers that share it
    edges: dict = field(default_factory=dict)  # layer -> (Tap of what the softmax takes, its mask)
    output: dict = field(default_factory=dict)  # done to the logits: softcap (0: none), bias

    def put(self, stage, layer, *taps):
        if taps and all(tap is not None for tap in taps):
            self.taps.setdefault(stage, {})[layer] = list(taps)

    def of(self, stage):
        """{layer: [Tap, ...]}"""
        return self.taps.get(stage, {})

    def found(self, stage):
        """The layers that have a stage, in order; [None] for one without layers."""
        return sorted(self.of(stage), key=lambda layer: layer or 0)

    def missing(self, stage):
        """The layers that have it not."""
        return [
            layer for layer in STAGES[stage].layers(self.n_layer) if layer not in self.of(stage)
        ]

    def why(self, stage):
        """Why layers have it not, in words; "" where all have it."""
        missing = self.missing(stage)
        if not missing:
            return ""
        reason = self.why_not.get(stage) or "its graph has no node that computes it"
        if not self.of(stage):
            return reason
        kinds = sorted({self.layers[layer]["kind"] for layer in missing if layer < self.n_layer})
        where = ", ".join(map(str, missing))
        return f"not in layers {where} ({', '.join(kinds) or 'the last'}): {reason}"


def float_param(node, slot):
    return struct.unpack_from("<f", node.params, 4 * slot)[0]


def view_tap(node, token_dim):
    """A Tap on the bytes of a 3-d view (feature, head, token) of whatever node computed them."""
    source = base(node)
    if source.is_leaf:
        return None
    layout = (node.data - source.data, node.ne[:3], node.nb[:3])
    return Tap.of(source, (node.ne[1], node.ne[0]), layout, token_dim)


def node_tap(node, n_tokens):
    """A Tap on a whole node whose outermost dimension is the tokens: several streams are one wide
    vector per token."""
    source = base(node)
    sizes = [size for size in source.ne if size != 1] or [1]
    if source.is_leaf or n_tokens > 1 and sizes[-1] != n_tokens:
        return None
    return Tap.of(source, (source.ne[0] * source.ne[1] * source.ne[2] // n_tokens,))
