"""Make `heads.npz`, what `tests/test_heads.py` compares head scores with: TransformerLens's own
head detector.

    python tests/references/make_heads_reference.py FOLDER

needs torch; FOLDER is an unpacked transformer_lens wheel (made with 2.15.0). Its module
`head_detector` is loaded alone, with empty stand-ins for the model classes that it names but that
its scores do not use."""

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import torch

DETECTORS = ("previous_token_head", "duplicate_token_head", "induction_head")


def detector(folder):
    """The module transformer_lens.head_detector."""
    for name, members in {
        "transformer_lens": (),
        "transformer_lens.ActivationCache": ("ActivationCache",),
        "transformer_lens.HookedTransformer": ("HookedTransformer",),
        "transformer_lens.utils": ("is_lower_triangular", "is_square"),
    }.items():
        module = sys.modules[name] = types.ModuleType(name)
        for member in members:
            setattr(module, member, type(member, (), {}))
    sys.modules["transformer_lens.utils"].is_square = lambda x: (
        x.ndim == 2 and x.shape[0] == x.shape[1]
    )
    spec = importlib.util.spec_from_file_location(
        "head_detector", Path(folder) / "transformer_lens/head_detector.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main():
    lens = detector(sys.argv[1])
    rng = np.random.default_rng(0)
    tokens = np.array(
        [7, *np.tile(rng.integers(10, 20, 11), 3)]
    )  # a period of 11, and repeats inside it
    logits = 3 * rng.standard_normal((2, 3, len(tokens), len(tokens))).astype(
        np.float32
    )  # (layer, head, query, key)
    logits[..., ~np.tri(len(tokens), dtype=bool)] = -np.inf
    attention = torch.softmax(torch.tensor(logits), -1)
    out = {"tokens": tokens, "attention": attention.numpy().copy()}
    for name in DETECTORS:
        pattern = getattr(lens, f"get_{name}_detection_pattern")(torch.tensor(tokens)[None])
        out[name] = np.array(
            [
                [
                    lens.compute_head_attention_similarity_score(
                        head,
                        detection_pattern=pattern,
                        exclude_bos=False,
                        exclude_current_token=False,
                        error_measure="mul",
                    )
                    for head in layer
                ]
                for layer in attention
            ]
        )
        out[f"{name}_pattern"] = pattern.numpy().astype(np.uint8)
    np.savez_compressed(Path(__file__).parent / "heads.npz", **out)


if __name__ == "__main__":
    main()
