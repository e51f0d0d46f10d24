"""From attention to output: what heads write, its share of the residual stream, and next-token
probabilities."""

import numpy as np
import pandas as pd
import xarray as xr

from ..capture import rounding
from ..capture.finite import measured
from ..maths import ratio, softmax
from .patterns import kv_head
from .weights import output_weight, project_output


def value_norms(v, gguf, progress=False):
    """Length of W_O v for every head and key: how much a token's value would write at weight 1
    (Kobayashi et al. 2020).

    v: (layer, kv_head, token, feature). Returns (layer, head, key) float64, in the residual
    stream's units, before a post-norm where the model has one."""
    from tqdm.auto import tqdm

    group = [kv_head(h, gguf.n_head, v.sizes["kv_head"]) for h in range(gguf.n_head)]
    layers = v["layer"].values if "layer" in v.coords else np.arange(v.sizes["layer"])
    out = np.empty((len(layers), gguf.n_head, v.sizes["token"]))
    for i, layer in enumerate(
        tqdm(layers, desc="W_O v", unit="layer", disable=not progress, leave=False)
    ):
        values = measured(v.isel(layer=i).transpose("kv_head", "token", "feature"))[
            group
        ]  # (head, token, feature)
        out[i] = np.linalg.norm(values @ output_weight(gguf, layer).transpose(0, 2, 1), axis=-1)
    return xr.DataArray(out, dims=("layer", "head", "key"), coords={"layer": layers})


def norm_weighted(attention, norms):
    """alpha * |W_O v|: attention with the length of what it moves (Kobayashi et al. 2020). Same
    dims as attention."""
    values = measured(attention, np.float64) * np.asarray(norms)[..., None, :]
    return xr.DataArray(values, dims=attention.dims, coords=attention.coords)


def first_shares(attention, weighted):
    """The first token's share of what later tokens attend to: of the weight, and of the moved
    length. Two floats."""
    raw, moved = measured(attention, np.float64), np.asarray(weighted)
    shares = ratio(moved[..., 0], moved.sum(-1))[..., 1:]  # NaN where a head moves nothing
    return float(raw[..., 1:, 0].mean()), float(np.nanmean(shares)) if np.isfinite(
        shares
    ).any() else float("nan")


def residual_shares(hidden, attn_out, ffn_out):
    """Who writes the residual stream. hidden: (layer 0..n, token, embd); attn_out, ffn_out: (layer,
    token, embd).

    Dataset: attention_norm, ffn_norm (layer, token), lengths of what each adds; attention_share,
    attention_norm over their sum; attention_direct, ffn_direct (layer, token) and embedding_direct
    (token): projection on the final stream, x · final / |final|^2, which together sum to 1 where
    nothing else writes the stream."""
    h, a, f = (
        measured(x.transpose("layer", "token", "embd"), np.float64)
        for x in (hidden, attn_out, ffn_out)
    )
    final = ratio(h[-1], np.sum(h[-1] ** 2, axis=-1, keepdims=True))
    norms = np.linalg.norm(a, axis=-1), np.linalg.norm(f, axis=-1)
    dims = ("layer", "token")
    return xr.Dataset(
        {
            "attention_norm": (dims, norms[0]),
            "ffn_norm": (dims, norms[1]),
            "attention_share": (dims, ratio(norms[0], norms[0] + norms[1])),
            "attention_direct": (dims, np.einsum("lte,te->lt", a, final)),
            "ffn_direct": (dims, np.einsum("lte,te->lt", f, final)),
            "embedding_direct": ("token", np.einsum("te,te->t", h[0], final)),
        },
        coords={"layer": np.arange(len(a))},
    )


def logit_parts(captured, gguf, token_ids, position=-1):
    """What each block adds to the logits of chosen tokens at one position: direct logit attribution
    (nostalgebraist 2020; Elhage et al. 2021), exact because the final norm's divisor is the one
    that this position had.

    Needs stages hidden, attn_out, ffn_out, logits. DataFrame, one row per token id: embedding,
    attention and ffn (sums over layers), total (before a soft-cap), captured (the runtime's logit,
    soft-cap undone), tolerance (what the runtime's rounding can do to it), by_layer: (layer, 2).
    """
    h = measured(captured["hidden"].isel(token=position), np.float64)  # (layer + 1, embd)
    a = measured(captured["attn_out"].isel(token=position), np.float64)
    f = measured(captured["ffn_out"].isel(token=position), np.float64)
    divisor = np.sqrt(np.mean(h[-1] ** 2) + gguf.norm_eps)
    matrix, gain = (
        gguf.rows(gguf.output_name, token_ids).astype(np.float64),
        gguf.tensor("output_norm.weight") / divisor,
    )
    unembed = matrix * gain
    logits = measured(captured["logits"].isel(token=position), np.float64)[list(token_ids)]
    cap = gguf.final_logit_softcap
    by_layer = np.stack([a @ unembed.T, f @ unembed.T], axis=-1)  # (layer, token id, 2)
    table = pd.DataFrame({"id": list(token_ids), "embedding": unembed @ h[0]})
    table["attention"], table["ffn"] = by_layer.sum(0).T
    table["total"] = table[["embedding", "attention", "ffn"]].sum(axis=1)
    table["captured"] = logits if not cap else cap * np.arctanh(logits / cap)
    kind = gguf.tensors.loc[gguf.output_name, "type"]
    table["tolerance"] = rounding.logit_tolerance(
        h[-1:] * gain, matrix, kind, captured.model.gpu, np.abs(table["captured"]).max()
    )[0]
    return table.assign(by_layer=list(by_layer.transpose(1, 0, 2)))


def sampled_probabilities(logits, temperature=0.8, top_k=40, top_p=0.95, min_p=0.05):
    """The distribution that llama.cpp draws from: its default chain top-k, top-p, min-p,
    temperature, in that order.

    top-p sums the softmax of what top-k left, at temperature 1; min-p drops tokens below min_p
    times the best. Off: top_k 0, top_p 1, min_p 0; temperature 0 takes the best token. (The chain's
    penalties, DRY, XTC, typical-p and top-n-sigma are off by default.) logits: (vocab,). Returns
    (vocab,) float64."""
    logits = measured(logits, np.float64)
    order = np.argsort(-logits, kind="stable")
    order = order[: top_k if 0 < top_k < len(order) else len(order)]
    if top_p < 1:
        reached = np.cumsum(softmax(logits[order])) >= top_p
        order = order[: int(np.argmax(reached)) + 1 if reached.any() else len(order)]
    if min_p > 0:
        order = order[logits[order] >= logits[order[0]] + np.log(min_p)]
    if temperature <= 0:
        order = order[:1]
    out = np.zeros(len(logits))
    out[order] = softmax(logits[order] / (temperature if temperature > 0 else 1.0))
    return out


def head_writes(attn_heads, attn_out, gguf, position=-1, progress=False):
    """What each head writes into the residual stream at one position, and how well the heads' sum
    explains attn_out.

    attn_heads: (layer, head, token, feature); attn_out: (layer, token, embd). Dataset: written
    (layer, head, embd), W_O of the head times its output, before bias and post-norm; difference
    (layer,), relative L2 between the captured attn_out and the projection of the captured heads
    with dequantized weights."""
    from tqdm.auto import tqdm

    heads = measured(attn_heads, np.float64)[:, :, [position]]  # (layer, head, 1, feature)
    theirs = measured(attn_out, np.float64)[:, position]
    written, difference = [], []
    for layer in tqdm(
        range(len(heads)), desc="W_O by head", unit="layer", disable=not progress, leave=False
    ):
        written.append(
            np.einsum("hf,hef->he", heads[layer, :, 0], output_weight(gguf, layer)).astype(
                np.float32
            )
        )
        mine = project_output(heads[layer], gguf, layer)[0]
        difference.append(
            np.linalg.norm(mine - theirs[layer]) / (np.linalg.norm(theirs[layer]) or 1)
        )
    return xr.Dataset(
        {
            "written": (("layer", "head", "embd"), np.stack(written)),
            "difference": ("layer", difference),
        }
    )
