"""Where a quantized model differs from its reference: types, weights, embeddings, attention,
residual stream.

Pure functions on arrays, xarray captures of the same tokens, and objects with the interface of
GGUFFile."""

import numpy as np
import pandas as pd

from ..capture.finite import check_finite, measured
from ..maths import check_rows, jensen_shannon, ratio, unit
from ..views.text import piece_kind

FLOATS = ("F32", "F16", "BF16", "F64")


def type_table(files):
    """What is inside each file: DataFrame (group, name) of texts such as "Q5_0 x45, Q8_0 x15".

    files: {name: GGUFFile}. Only matrices; groups as in GGUFFile.tensors.
    """

    def describe(types):
        return ", ".join(f"{kind} x{n}" for kind, n in types.value_counts().items())

    columns = {}
    for name, file in files.items():
        matrices = file.tensors[file.tensors["shape"].map(len) > 1]
        columns[name] = matrices.groupby("group", sort=False)["type"].agg(describe)
    return pd.DataFrame(columns).rename_axis("group")


def quantized_types(file):
    """Quantized types of a file's matrices, most frequent first; [] for a file of floats."""
    matrices = file.tensors[file.tensors["shape"].map(len) > 1]
    return [kind for kind in matrices["type"].value_counts().index if kind not in FLOATS]


def grid_share(file, matrices=8, rows=32, seed=0):
    """Share of blocks of 16 weights that lie on an even grid of at most 256 levels, in a file of
    floats.

    Near 1 for a file that was expanded from a quantized one (Q4_0 to Q5_1 and k-quants; Q8_0 where
    it was kept in F32; not the uneven grids of the i-quants), near 0 for weights that were trained.
    Some rows of some matrices of the layers are looked at."""
    inside = file.tensors[(file.tensors["shape"].map(len) == 2) & file.tensors["layer"].notna()]
    names = inside.index[_some(len(inside), matrices, seed)]
    blocks = []
    for name in names:
        values = file.rows(name, _some(inside["shape"][name][0], rows, seed))
        width = values.shape[1] // 16 * 16
        blocks.append(values[:, :width].reshape(-1, 16).astype(np.float64))
    blocks = np.sort(np.concatenate(blocks), axis=1)
    gaps, span = np.diff(blocks, axis=1), np.ptp(blocks, axis=1, keepdims=True)
    # Two weights of one level differ only by rounding: a step is the smallest gap above 1/1000 of
    # the block's span.
    step = np.where(gaps > span / 1000, gaps, np.inf).min(axis=1, keepdims=True)  # (block, 1)
    with np.errstate(invalid="ignore"):
        even = (np.abs(gaps / step - np.round(gaps / step)) < 0.1).all(axis=1) & (
            span[:, 0] / step[:, 0] < 256
        )
    return (
        float(even[span[:, 0] > 0].mean()) if (span > 0).any() else 1.0
    )  # constant weights lie on any grid


def weight_errors(reference, candidate, rows=64, seed=0):
    """Relative RMS error of every matrix: ||W' - W|| / ||W||.

    reference, candidate: GGUFFile. rows: so many randomly chosen rows of each matrix (None: all of
    them); the norm of 64 rows of 576 weights is known to about 1%. DataFrame indexed by tensor:
    layer, group, type, bits_per_weight, n_elements, error."""
    table = candidate.tensors[candidate.tensors["shape"].map(len) == 2]
    errors = []
    for name, shape in table["shape"].items():
        ids = slice(None) if rows is None or rows >= shape[0] else _some(shape[0], rows, seed)
        base, own = (
            check_finite(file.rows(name, ids), name, file=file.path.name)
            for file in (reference, candidate)
        )
        length = np.linalg.norm(
            base
        )  # a matrix of zeros has no relative error, unless it stays one
        errors.append(
            np.linalg.norm(own - base) / length if length else 0.0 if not own.any() else np.nan
        )
    return table[["layer", "group", "type", "bits_per_weight", "n_elements"]].assign(error=errors)


def _some(n, count, seed):
    return np.sort(np.random.default_rng(seed).choice(n, min(count, n), replace=False))


def embedding_preservation(reference, candidate, pool=8192, queries=512, k=10, seed=0):
    """How well the token embeddings keep their similarities.

    Of `pool` random tokens: cosine of each embedding with its quantized self, and for `queries` of
    them the share of the k nearest neighbours (cosine, within the pool) that stay neighbours.
    DataFrame indexed by token id: cosine, overlap (NaN where not a query)."""
    ids = _some(reference.n_vocab, pool, seed)
    base, other = (
        unit(check_rows(file.rows("token_embd.weight", ids))) for file in (reference, candidate)
    )  # (pool, embd)
    asked = _some(len(ids), queries, seed + 1)
    near, far = (_neighbours(x, asked, min(k, len(ids) - 1)) for x in (base, other))  # (queries, k)
    overlap = np.full(len(ids), np.nan)
    overlap[asked] = (near[:, :, None] == far[:, None, :]).any(axis=2).mean(axis=1)
    return pd.DataFrame(
        {"cosine": (base * other).sum(axis=1), "overlap": overlap}, index=pd.Index(ids, name="id")
    )


def _neighbours(x, rows, k):
    similarity = x[rows] @ x.T  # (queries, pool)
    similarity[np.arange(len(rows)), rows] = -np.inf
    return np.argpartition(-similarity, k - 1, axis=1)[:, :k]


def attention_divergence(reference, candidate):
    """Mean Jensen-Shannon divergence (bits) of each head's attention rows: xarray.DataArray (layer,
    head).

    reference, candidate: attention (layer, head, query, key) of the same tokens. The first query
    has one key only and is left out."""
    import xarray as xr

    values = np.stack(
        [
            jensen_shannon(measured(a)[:, 1:], measured(b)[:, 1:]).mean(
                axis=-1
            )  # layer by layer: less memory
            for a, b in zip(reference, candidate, strict=True)
        ]
    )
    return xr.DataArray(values, dims=("layer", "head"), coords={"layer": reference["layer"].values})


def hidden_drift(reference, candidate):
    """How far the residual stream has moved, layer by layer.

    reference, candidate: hidden (layer, token, embd) of the same tokens. DataFrame indexed by layer
    (0 is what enters the first): error (mean over tokens of ||h' - h|| / ||h||), cosine (mean), and
    error_first, cosine_first for the first token, whose norm is often hundreds of times the others'
    and would hide them (Sun et al. 2024, "Massive activations"), so that it is kept apart."""
    base, other = measured(reference, np.float64), measured(candidate, np.float64)
    norm, norm_other = (
        np.linalg.norm(base, axis=-1),
        np.linalg.norm(other, axis=-1),
    )  # (layer, token)
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


def layer_table(weights, drift, costs, falls):
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


def rank_correlations(table):
    """Spearman correlations between the columns of a table (layer, column), as a square
    DataFrame."""
    return table.corr(method="spearman")


def vulnerable_tokens(tokens):
    """Mean KLD by kind of token, per candidate: DataFrame indexed by (candidate, by, kind): kld,
    share_of_kld, n.

    tokens: Comparison.tokens. Kinds of the token that came next: number, punctuation, whitespace,
    word (begins one), part (continues one), other; and by how sure the reference was of it: "p >=
    0.5", "0.05 to 0.5", "p < 0.05"."""
    p = np.exp(tokens["logprob_base"])
    sure = pd.cut(
        p, [-1, 0.05, 0.5, 2], right=False, labels=["p < 0.05", "0.05 to 0.5", "p >= 0.5"]
    ).astype(str)
    rows = []
    for by, kinds in (
        ("piece", tokens["piece"].map(piece_kind)),
        ("reference's probability", sure),
    ):
        groups = tokens["kld"].groupby([tokens["candidate"], kinds], sort=False)
        part = groups.agg(["mean", "sum", "size"]).rename_axis(["candidate", "kind"]).reset_index()
        total = part.groupby("candidate")["sum"].transform("sum")
        rows.append(
            pd.DataFrame(
                {
                    "candidate": part["candidate"],
                    "by": by,
                    "kind": part["kind"],
                    "kld": part["mean"],
                    "share_of_kld": part["sum"] / total,
                    "n": part["size"],
                }
            )
        )
    return pd.concat(rows, ignore_index=True).set_index(["candidate", "by", "kind"])
