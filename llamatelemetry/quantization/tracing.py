"""Which parts of a quantized model cost the answer: errors inside are traced to the prediction by
activation patching (Meng et al. 2022, "Locating and editing factual associations in GPT").

`run(**options)` is a capture of one prompt: functools.partial(engine.capture, prompt)."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd

from ..capture.data import Capture
from ..capture.edits import patch
from ..compare.quality import NOISE, Predictions
from ..maths import ratio

PARTS = {"attn_out": "attention", "ffn_out": "FFN"}
Run = Callable[..., Capture]
Predict = Callable[[str | None, int | None], np.ndarray]


def own_outputs(run: Run, base: Capture) -> dict[str, Capture]:
    """What each part of the quantized model makes of the reference's own input: {part: Capture}.

    run: the quantized model; base: the reference's capture of the same tokens, with hidden and
    attn_out. Nothing is inherited: the residual stream at every layer, and before every FFN what
    attention added to it, are the reference's."""
    layers = range(base.model.n_layer)
    clean = [patch("hidden", layer=layer, source=base) for layer in layers]
    to_ffn = clean + [patch("attn_out", layer=layer, source=base) for layer in layers]
    return {
        "attn_out": run(stages=("attn_out",), edits=clean),
        "ffn_out": run(stages=("ffn_out",), edits=to_ffn),
    }


def given_back(run: Run, base: Capture) -> Predict:
    """predict(part, layer) for fall_map: the quantized model's logits with that part's output
    replaced by the reference's. run: the quantized model; base: the reference's capture."""
    return _replacing(run, dict.fromkeys(PARTS, base))


def quantized_alone(run: Run, own: dict[str, Capture]) -> Predict:
    """predict(part, layer) for cost_map: the reference's logits with that part's output replaced by
    what the quantized part makes of the same input. run: the reference; own: own_outputs."""
    return _replacing(run, own)


def _replacing(run, sources):
    def predict(part, layer):
        edits = [patch(part, layer=layer, source=sources[part])] if part else []
        return run(stages=("logits",), edits=edits).logits.values

    return predict


def fall_map(
    predict: Predict, base: np.ndarray, n_layer: int, progress: bool = True
) -> pd.DataFrame:
    """What the answer gains when one part of one layer is given back to the quantized model.

    The part's output at all positions is what the reference had there, and the KL divergence from
    the reference's predictions is measured again. What falls is the part's own error and what it
    had inherited, with their interplay with every other error of the model.

    predict(part, layer) -> logits (token, vocab), see given_back; predict(None, None): unpatched.
    base: the reference's logits. DataFrame: part, layer, kld (patched), fall (nats), share (of the
    unpatched; NaN where that is no more than NOISE). attrs["kld"]: the unpatched mean. The first
    position, which sees one token, is left out."""
    from_base = _mean_divergence(base)
    before = from_base(predict(None, None))
    table = _every_part(predict, from_base, n_layer, progress, "give back")
    table["fall"] = before - table["kld"]
    table["share"] = ratio(table["fall"], before, NOISE)
    table.attrs["kld"] = before
    return table


def cost_map(
    predict: Predict, base: np.ndarray, n_layer: int, progress: bool = True
) -> pd.DataFrame:
    """What the answer loses when one part of one layer alone is quantized: nothing is inherited,
    nothing interferes.

    predict(part, layer) -> logits (token, vocab), see quantized_alone. To second order in the
    errors these costs are the diagonal of the divergence, free of the cross terms that fall_map
    holds. DataFrame: part, layer, kld, cost (the same, nats)."""
    from_base = _mean_divergence(base)
    table = _every_part(predict, from_base, n_layer, progress, "quantize alone")
    return table.assign(cost=table["kld"])


def _every_part(predict, from_base, n_layer, progress, what):
    from tqdm.auto import tqdm

    runs = [(part, layer) for layer in range(n_layer) for part in PARTS]
    with ThreadPoolExecutor(1) as pool:  # a run's divergence while llama.cpp computes the next
        klds = [
            pool.submit(from_base, predict(part, layer))
            for part, layer in tqdm(runs, desc=what, unit="run", disable=not progress)
        ]
    rows = [(*run, kld.result()) for run, kld in zip(runs, klds)]
    return pd.DataFrame(rows, columns=["part", "layer", "kld"])


def _mean_divergence(base):
    """The mean divergence of logits from `base`, the first token left out."""
    predictions = Predictions(base[1:])
    return lambda logits: float(predictions.divergence(logits[1:]).mean())
