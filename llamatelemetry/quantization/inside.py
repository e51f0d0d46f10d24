"""Where a quantized model differs from its reference: weights, embeddings, attention, residual
stream.

Pure functions on arrays, xarray captures of the same tokens, and objects with the interface of
GGUFFile."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import xarray as xr

from ..capture.finite import check_finite, measured
from ..files.gguf import GGUFFile
from ..maths import check_rows, jensen_shannon, ratio, unit
from .contents import some_of


def weight_errors(
    reference: GGUFFile, candidate: GGUFFile, rows: int | None = 64, seed: int = 0
) -> pd.DataFrame:
    """Relative RMS error of every matrix: ||W' - W|| / ||W||.

    reference, candidate: GGUFFile. rows: so many randomly chosen rows of each matrix (None: all of
    them); the norm of 64 rows of 576 weights is known to about 1%. DataFrame indexed by tensor:
    layer, group, type, bits_per_weight, n_elements, error."""
    table = candidate.tensors[candidate.tensors["shape"].map(len) == 2]
    errors = []
    for name, shape in table["shape"].items():
        ids = slice(None) if rows is None or rows >= shape[0] else some_of(shape[0], rows, seed)
        base, own = (
            check_finite(file.rows(name, ids), name, file=file.path.name)
            for file in (reference, candidate)
        )
        # A matrix of zeros has no relative error, unless it stays one.
        difference = np.linalg.norm(own - base)
        errors.append(float(ratio(difference, np.linalg.norm(base))) if difference else 0.0)
    return table[["layer", "group", "type", "bits_per_weight", "n_elements"]].assign(error=errors)


def embedding_preservation(
    reference: GGUFFile,
    candidate: GGUFFile,
    pool: int = 8192,
    queries: int = 512,
    k: int = 10,
    seed: int = 0,
) -> pd.DataFrame:
    """How well the token embeddings keep their similarities.

    Of `pool` random tokens: cosine of each embedding with its quantized self, and for `queries` of
    them the share of the k nearest neighbours (cosine, within the pool) that stay neighbours.
    DataFrame indexed by token id: cosine, overlap (NaN where not a query); attrs["type"]: the
    candidate's."""
    ids = some_of(reference.n_vocab, pool, seed)
    base, other = (
        unit(check_rows(file.rows("token_embd.weight", ids))) for file in (reference, candidate)
    )  # (pool, embd)
    asked = some_of(len(ids), queries, seed + 1)
    near, far = (_neighbours(x, asked, min(k, len(ids) - 1)) for x in (base, other))  # (queries, k)
    overlap = np.full(len(ids), np.nan)
    overlap[asked] = (near[:, :, None] == far[:, None, :]).any(axis=2).mean(axis=1)
    columns = {"cosine": (base * other).sum(axis=1), "overlap": overlap}
    table = pd.DataFrame(columns, index=pd.Index(ids, name="id"))
    table.attrs["type"] = candidate.tensors.loc["token_embd.weight", "type"]
    return table


def _neighbours(x, rows, k):
    similarity = x[rows] @ x.T  # (queries, pool)
    similarity[np.arange(len(rows)), rows] = -np.inf
    return np.argpartition(-similarity, k - 1, axis=1)[:, :k]


def attention_divergence(reference: xr.DataArray, candidate: xr.DataArray) -> xr.DataArray:
    """Mean Jensen-Shannon divergence (bits) of each head's attention rows: (layer, head).

    reference, candidate: attention (layer, head, query, key) of the same tokens. The first query
    has one key only and is left out."""
    values = [
        jensen_shannon(measured(a)[:, 1:], measured(b)[:, 1:]).mean(axis=-1)
        for a, b in zip(reference, candidate, strict=True)  # layer by layer: less memory
    ]
    coords = {"layer": reference["layer"].values, "head": np.arange(reference.sizes["head"])}
    return xr.DataArray(np.stack(values), coords, ("layer", "head"))


def hidden_drift(reference: xr.DataArray, candidate: xr.DataArray) -> pd.DataFrame:
    """How far the residual stream has moved, layer by layer.

    reference, candidate: hidden (layer, token, embd) of the same tokens. DataFrame indexed by layer
    (0 is what enters the first): error (mean over tokens of ||h' - h|| / ||h||), cosine (mean), and
    error_first, cosine_first for the first token, whose norm is often hundreds of times the others'
    and would hide them (Sun et al. 2024, "Massive activations"), so that it is kept apart."""
    base, other = measured(reference, np.float64), measured(candidate, np.float64)
    norm, norm_other = (np.linalg.norm(x, axis=-1) for x in (base, other))  # (layer, token)
    error = ratio(np.linalg.norm(other - base, axis=-1), norm)
    cosine = ratio((base * other).sum(axis=-1), norm * norm_other)
    return pd.DataFrame(
        {
            "error": error[:, 1:].mean(axis=1),
            "cosine": cosine[:, 1:].mean(axis=1),
            "error_first": error[:, 0],
            "cosine_first": cosine[:, 0],
        },
        index=pd.Index(reference["layer"].values, name="layer"),
    )


def layer_table(
    weights: pd.DataFrame, drift: pd.DataFrame, costs: pd.DataFrame, falls: pd.DataFrame
) -> pd.DataFrame:
    """Per layer: weight_error (all its matrices), drift_added (rise of the residual error through
    it), cost and fall.

    weights: weight_errors; drift: hidden_drift; costs, falls: cost_map and fall_map, summed over
    the layer's parts. DataFrame indexed by layer."""
    inside = weights.dropna(subset="layer")
    squared = (inside["error"] ** 2 * inside["n_elements"]).groupby(inside["layer"]).sum()
    error = np.sqrt(squared / inside.groupby("layer")["n_elements"].sum())
    table = pd.DataFrame({"weight_error": error.astype(float)})
    table.index = table.index.astype(int)
    table["drift_added"] = drift["error"].diff().iloc[1:].to_numpy()[: len(table)]
    table["cost"] = costs.groupby("layer")["cost"].sum()
    table["fall"] = falls.groupby("layer")["fall"].sum()
    return table


def rank_correlations(table: pd.DataFrame) -> pd.DataFrame:
    """Spearman correlations between the columns of a table (layer, column), as a square
    DataFrame."""
    return table.corr(method="spearman")


def summary(
    result: pd.DataFrame,
    attention: Mapping[str, xr.DataArray],
    drift: Mapping[str, pd.DataFrame],
    embeddings: Mapping[str, pd.DataFrame],
) -> pd.DataFrame:
    """One row per file: what it costs and loses (of decision.with_costs), and attention_bits,
    last_layer_drift and neighbours_kept, the means of the other three."""
    columns = ["size_bytes", "bits_per_weight", "ppl_ratio", "kld_mean", "same_top"]
    return result[[*columns, "generation_tps", "memory_bytes"]].assign(
        attention_bits={name: float(bits.mean()) for name, bits in attention.items()},
        last_layer_drift={name: table["error"].iloc[-1] for name, table in drift.items()},
        neighbours_kept={name: table["overlap"].mean() for name, table in embeddings.items()},
    )
