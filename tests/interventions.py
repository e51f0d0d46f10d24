"""Edits that tests/test_edits.py makes in llama.cpp and tests/references/make_interventions.py
makes in transformers: the same, as data.

`edit`: arguments of llamatelemetry's function of that name. Positions are written as lists and
slices. The tiny models have 4 heads, 2 of keys, and 28 tokens (models.IDS)."""

import numpy as np

FAMILIES = ("llama", "gemma3", "qwen3", "gpt-oss")
KEPT = 3  # positions at the text's end whose logits are kept
FROM = slice(20, None)


def vector(name, *shape):
    """The same random numbers on both sides."""
    return np.random.RandomState(len(name) + 7 * sum(map(ord, name))).standard_normal(shape)


def interventions(feature):
    """{name: (function, arguments)}; feature: values per head."""
    return {
        "hidden": ("add", ("hidden", 2, vector("hidden", 64), 0.5, slice(10, None))),
        "ffn_out": ("add", ("ffn_out", [0, 1], vector("ffn_out", 64), -0.25)),
        "edges": ("knock_out", ([1, 2], [1, 2], FROM, [21, 22, 24])),
        "q": ("add", ("q", 1, vector("q", feature), 1.0, FROM, [0, 3])),
        "k": ("scale", ("k", 1, 0.25, 1, range(5, 24))),
        "v": ("add", ("v", [0, 2], vector("v", 2, feature), 0.5, slice(12, None))),
        "keys": ("patch", ("k", 1, vector("keys", 2, 28, feature), [22, 25], 1)),
        "scaled": ("scale", ("scores", 1, 2.0, [0, 1])),
        "scores": ("add", ("scores", [1, 2], 3.0, 1.0, FROM, 2, [20, 23])),
        "attention": ("scale", ("attention", 0, 0.0, [1, 2], FROM, slice(22, 25))),
    }
