"""Make `interventions.npz`, which `tests/test_edits.py` compares with: Hugging Face transformers
runs the tiny models while hooks, and an attention of our own, do what tests/interventions.py says.

    python tests/references/make_interventions.py

needs torch, transformers (made with 5.24), accelerate and gguf, as make_references.py does, which
loads the models. llama.cpp's order of features within a head (llama: rotated pairs side by side)
and its queries, which gemma3 has divided by the square root of their width already, are followed.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from make_references import HERE, header, load, width

sys.path.insert(0, str(HERE.parent))
from interventions import FAMILIES, KEPT, interventions  # noqa: E402
from models import IDS, tiny_model  # noqa: E402

ALL = slice(None)


class Model:
    """One family's model, its attention replaced by `attend`."""

    def __init__(self, architecture, folder):
        path = tiny_model(architecture, folder)
        self.model, _ = load(path)
        self.model.config._attn_implementation = "eager"
        self.architecture, self.feature = architecture, width(header(path)[1])
        sys.modules[type(self.model).__module__].eager_attention_forward = self.attend
        self.kind = self.arguments = None

    def run(self, kind=None, arguments=()):
        """Logits of the last tokens under an intervention, (KEPT, vocab)."""
        self.kind, self.arguments, hooks = kind, arguments, []
        stage = arguments[0] if kind in ("add", "scale", "patch") else None
        for layer in np.atleast_1d(arguments[1]).tolist() if stage in ("hidden", "ffn_out") else ():
            block = self.model.model.layers[layer - (stage == "hidden")]
            if stage == "ffn_out":
                block = getattr(block, "post_feedforward_layernorm", block.mlp)
            hooks.append(block.register_forward_hook(self.stream))
        with torch.no_grad():
            logits = self.model(torch.tensor([IDS]), use_cache=False).logits[0]
        for hook in hooks:
            hook.remove()
        return logits[-KEPT:].numpy()

    def stream(self, module, inputs, output):
        """A hook that adds to what a module gives."""
        _, _, vector, strength, *positions = self.arguments
        x = (output[0] if isinstance(output, tuple) else output).clone()
        x[:, positions[0] if positions else ALL] += torch.tensor(strength * vector).float()
        return (x, *output[1:]) if isinstance(output, tuple) else x

    def attend(self, module, query, key, value, mask, scaling, dropout=0.0, **_):
        """Attention as its definition has it, (batch, head, token, feature), edited on the way."""
        parts = {"q": query, "k": key, "v": value}
        for name in parts:
            parts[name] = self.edited(name, module.layer_idx, parts[name].clone(), scaling)
        group = query.shape[1] // key.shape[1]
        k, v = (parts[name].repeat_interleave(group, 1) for name in "kv")
        scores = parts["q"] @ k.transpose(2, 3)  # (batch, head, query, key)
        scores = self.edited("scores", module.layer_idx, scores, scaling)
        scores = scores * scaling + mask[..., : k.shape[2]]
        if self.kind == "knock_out":
            layers, heads, queries, keys = self.arguments
            if module.layer_idx in layers:
                edges = torch.zeros(scores.shape[1:], dtype=torch.bool)
                for head in heads:
                    for at in keys:
                        edges[head, queries, at] = True
                scores = scores.masked_fill(edges, -torch.inf)
        sinks = getattr(module, "sinks", None)
        if sinks is not None:
            column = sinks.reshape(1, -1, 1, 1).expand(-1, -1, scores.shape[2], 1)
            scores = torch.cat([scores, column], -1)
        weights = scores.softmax(-1)[..., : k.shape[2]]
        weights = self.edited("attention", module.layer_idx, weights, scaling)
        return (weights @ v).transpose(1, 2).contiguous(), weights

    def edited(self, stage, layer, x, scaling):
        if self.kind in (None, "knock_out") or self.arguments[0] != stage:
            return x
        if layer not in np.atleast_1d(self.arguments[1]):
            return x
        if self.kind == "scale":
            (_, _, factor, *where), new = self.arguments, lambda x, _: x * factor
            heads, positions, keys = [*where, *[None] * (3 - len(where))]
        elif self.kind == "add":
            _, _, vector, strength, *where = self.arguments
            positions, heads, keys = [*where, *[None] * (3 - len(where))]
            added = self.ours(stage, strength * np.asarray(vector), scaling)
            new = lambda x, head: x + (added[head] if added.ndim == 2 else added)  # noqa: E731
        else:
            _, _, given, positions, heads = self.arguments
            keys, given = None, self.ours(stage, given, scaling)
            new = lambda x, head: given[head][positions]  # noqa: E731
        for head in range(x.shape[1]) if heads is None else np.atleast_1d(heads):
            rows = ALL if positions is None else positions
            if keys is None:
                x[0, head, rows] = new(x[0, head, rows], head)
            else:
                for at in range(x.shape[3])[keys] if isinstance(keys, slice) else keys:
                    x[0, head, rows, at] = new(x[0, head, rows, at], head)
        return x

    def ours(self, stage, values, scaling):
        """Values in llama.cpp's order and size of features as transformers has them."""
        if self.architecture == "llama" and stage in "qk":  # pairs (2i, 2i+1), here (i, i + n/2)
            values = np.concatenate([values[..., ::2], values[..., 1::2]], -1)
        if self.architecture == "gemma3" and stage == "q":
            values = values / scaling
        # its scores, too, are of divided queries
        if self.architecture == "gemma3" and stage == "scores":
            values = values / scaling
        return torch.tensor(values).float()


def main():
    arrays = {}
    for architecture in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            model = Model(architecture, Path(folder))
        plain = model.run()
        stored = np.load(HERE / f"{architecture}.npz")["logits"][-KEPT:]
        print(f"{architecture}: as make_references.py's to {np.abs(plain - stored).max():.1e}")
        for name, intervention in interventions(model.feature).items():
            logits = arrays[f"{architecture} {name}"] = model.run(*intervention)
            print(f"    {name:10} moves the logits by {np.abs(logits - plain).max():.3f}")
    np.savez_compressed(HERE / "interventions.npz", **arrays)
    print(f"{(HERE / 'interventions.npz').stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
