"""From attention to output: what heads write, its share of what blocks write, and next-token
probabilities."""

import numpy as np
import pandas as pd
import xarray as xr

from ..capture.finite import measured
from ..files.gguf import GGUFFile
from ..maths import ratio, softmax
from .patterns import kv_head, query_positions
from .weights import output_weight, project_output


def _bar(layers, name, progress):
    from tqdm.auto import tqdm

    return tqdm(layers, desc=name, unit="layer", disable=not progress, leave=False)


def value_norms(v: xr.DataArray, gguf: GGUFFile, *, progress: bool = False) -> xr.DataArray:
    """Length of W_O v for every head and key: how much a token's value would write at weight 1
    (Kobayashi et al. 2020).

    v: (layer, kv_head, token, feature). Returns (layer, head, key) float64, in the residual
    stream's units, before a post-norm where the model has one."""
    group = [kv_head(h, gguf.n_head, v.sizes["kv_head"]) for h in range(gguf.n_head)]
    layers = v["layer"].values if "layer" in v.coords else np.arange(v.sizes["layer"])
    out = np.empty((len(layers), gguf.n_head, v.sizes["token"]))
    for i, layer in enumerate(_bar(layers, "W_O v", progress)):
        values = measured(v.isel(layer=i).transpose("kv_head", "token", "feature"))[group]
        out[i] = np.linalg.norm(values @ output_weight(gguf, layer).transpose(0, 2, 1), axis=-1)
    return xr.DataArray(out, dims=("layer", "head", "key"), coords={"layer": layers})


def norm_weighted(attention: xr.DataArray, norms: xr.DataArray) -> xr.DataArray:
    """alpha * |W_O v|: attention with the length of what it moves (Kobayashi et al. 2020). Same
    dims as attention, float32."""
    values = measured(attention) * np.asarray(norms, np.float32)[..., None, :]
    return xr.DataArray(values, dims=attention.dims, coords=attention.coords)


def moved_shares(weighted: xr.DataArray) -> xr.DataArray:
    """Norm-weighted attention as shares of each query's sum; 0 where a head moves nothing."""
    return (weighted / weighted.sum("key")).fillna(0)


def first_shares(attention: xr.DataArray, norms: xr.DataArray) -> tuple[float, float]:
    """The first token's share of what later tokens attend to: of the weight, and of the moved
    length (nan where no head moves anything).

    attention: (..., query, key); norms: (..., key), of value_norms. Layer by layer: norm-weighted
    maps of all heads are as large as the maps."""
    later = query_positions(attention) > 0
    raw, layered = measured(attention)[..., later, 0], "layer" in attention.dims
    pairs = zip(attention, norms) if layered else [(attention, norms)]
    moved = (norm_weighted(*pair).values for pair in pairs)
    # NaN where a head moves nothing
    shares = np.stack([ratio(one[..., 0], one.sum(-1))[..., later] for one in moved])
    known = shares[np.isfinite(shares)]
    return float(raw.mean(dtype=np.float64)), float(known.mean()) if known.size else float("nan")


def attention_share(norm: xr.DataArray) -> xr.DataArray:
    """Attention's share of the length that the blocks of each layer add, mean over the tokens after
    the first. norm: (part, layer, token), of layers.states.contributions; returns (layer,)."""
    length = norm.isel(token=slice(1, None)).fillna(0)  # NaN: the layer has no such block
    total = length.sum("part")
    return (length.sel(part="attention") / total.where(total > 0)).mean("token")


def lead_table(leads: list[pd.DataFrame], pieces: list) -> pd.DataFrame:
    """What gives one token its lead over others: one row per rival, with columns over (its piece),
    the sum of each component, total and captured.

    leads: of layers.lens.logit_attribution, one per rival; pieces: the rivals'."""
    rows = [lead.groupby("component", sort=False)["value"].sum() for lead in leads]
    ends = [{name: lead.attrs[name] for name in ("total", "captured")} for lead in leads]
    table = pd.concat([pd.DataFrame(rows, index=range(len(rows))), pd.DataFrame(ends)], axis=1)
    table.insert(0, "over", list(pieces))
    return table


def sampled_probabilities(
    logits: np.ndarray,
    temperature: float = 0.8,
    top_k: int = 40,
    top_p: float = 0.95,
    min_p: float = 0.05,
) -> np.ndarray:
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


def head_writes(
    attn_heads: xr.DataArray,
    attn_out: xr.DataArray,
    gguf: GGUFFile,
    *,
    position: int = -1,
    progress: bool = False,
) -> xr.Dataset:
    """What each head writes into the residual stream at one position, and how well the heads' sum
    explains attn_out.

    attn_heads: (layer, head, token, feature); attn_out: (layer, token, embd). Dataset: written
    (layer, head, embd), W_O of the head times its output, before bias and post-norm; difference
    (layer,), relative L2 between the captured attn_out and the projection of the captured heads
    with dequantized weights; type (layer,), of W_O in the file."""
    heads = measured(attn_heads)[:, :, [position]].astype(np.float64)  # (layer, head, 1, feature)
    theirs = measured(attn_out)[:, position].astype(np.float64)
    layers = range(len(heads))
    written, difference = [], []
    for layer in _bar(layers, "W_O by head", progress):
        writes = np.einsum("hf,hef->he", heads[layer, :, 0], output_weight(gguf, layer))
        written.append(writes.astype(np.float32))
        gap = project_output(heads[layer], gguf, layer)[0] - theirs[layer]
        difference.append(np.linalg.norm(gap) / (np.linalg.norm(theirs[layer]) or 1))
    types = gguf.tensors["type"]
    data = {
        "written": (("layer", "head", "embd"), np.stack(written)),
        "difference": ("layer", difference),
        "type": ("layer", [types[f"blk.{layer}.attn_output.weight"] for layer in layers]),
    }
    return xr.Dataset(data)
