"""Analysis of quantizations on inputs with known answers."""

import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from models import tiny_model

from llamatelemetry import compare_quantizations
from llamatelemetry.convert.expand import quantized_types
from llamatelemetry.maths import jensen_shannon
from llamatelemetry.quantization import cache, contents, decision, inside, say, tracing
from llamatelemetry.quantization import tokens as token_tables
from llamatelemetry.views.text import piece_kind


def tensors(**rows):
    """{name: (type, shape, bits)} as GGUFFile.tensors."""
    table = pd.DataFrame(
        [(n, k, s, int(np.prod(s)), b) for n, (k, s, b) in rows.items()],
        columns=["name", "type", "shape", "n_elements", "bits_per_weight"],
    ).set_index("name")
    table["layer"] = pd.array(
        [int(n.split(".")[1]) if n.startswith("blk") else None for n in table.index], dtype="Int64"
    )
    table["group"] = [n.split(".")[-2] for n in table.index]
    return table


class File:
    """A GGUFFile with its weights in memory."""

    def __init__(self, weights, kind="F32", bits=32.0):
        self.weights, self.n_vocab, self.path = (
            weights,
            len(weights.get("token_embd.weight", ())),
            Path("hand-made.gguf"),
        )
        self.tensors = tensors(
            **{n: (kind if w.ndim > 1 else "F32", w.shape, bits) for n, w in weights.items()}
        )

    def rows(self, name, ids=slice(None)):
        return self.weights[name][ids]


def test_types_of_groups():
    file = SimpleNamespace(
        tensors=tensors(
            **{
                "blk.0.attn_q.weight": ("Q5_0", (4, 4), 5.5),
                "blk.1.attn_q.weight": ("Q8_0", (4, 4), 8.5),
                "blk.2.attn_q.weight": ("Q5_0", (4, 4), 5.5),
                "blk.0.attn_norm.weight": ("F32", (4,), 32.0),
            }
        )
    )
    assert contents.type_table({"a": file}).to_dict() == {"a": {"attn_q": "Q5_0 x2, Q8_0 x1"}}
    assert quantized_types(file) == ["Q5_0", "Q8_0"]
    assert quantized_types(File({"blk.0.attn_q.weight": np.ones((2, 2))})) == []


def test_weight_error_is_relative():
    w = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)
    base, other = (
        {"blk.0.ffn_up.weight": w * f, "blk.0.attn_norm.weight": w[0]} for f in (1, 1.25)
    )
    for rows in (None, 50, 1000):
        table = inside.weight_errors(File(base), File(other), rows=rows)
        assert list(table.index) == ["blk.0.ffn_up.weight"]  # vectors are not quantized
        assert table["error"].iloc[0] == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("stored", ["F32", "F16"])
def test_an_expanded_file_is_found_out(kind, stored):
    if (kind, stored) == ("Q8_0", "F16"):
        pytest.skip("255 levels do not survive F16's rounding: the docstring says so")
    rng = np.random.default_rng(0)
    weights = {}
    for i in range(3):
        values = rng.normal(size=(40, 576), scale=0.05).astype(np.float32)
        for step in (kind, stored):
            qtype = gguf.GGMLQuantizationType[step]
            values = gguf.quants.dequantize(gguf.quants.quantize(values, qtype), qtype)
        weights[f"blk.{i}.attn_q.weight"] = values
    share = contents.grid_share(File(weights))
    assert share > 0.4 if kind.startswith("Q") else share < 0.05


def test_embeddings_rotated_together_keep_their_neighbours():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 16)).astype(np.float32)
    rotation, _ = np.linalg.qr(rng.normal(size=(16, 16)))
    files = [
        File({"token_embd.weight": e.astype(np.float32)})
        for e in (x, x * 3, x @ rotation, rng.normal(size=x.shape))
    ]
    scaled, rotated, other = (
        inside.embedding_preservation(files[0], f, pool=200, queries=50, k=5) for f in files[1:]
    )
    assert scaled["cosine"].min() > 0.99999 and scaled["overlap"].mean() == 1
    assert rotated["overlap"].mean() == 1 and abs(rotated["cosine"].mean()) < 0.9
    assert other["overlap"].mean() < 0.2 and scaled["overlap"].notna().sum() == 50


@pytest.mark.parametrize(
    "p, q_, expected",
    [
        ([1, 0], [0, 1], 1),
        ([0.5, 0.5], [0.5, 0.5], 0),
        ([1, 0], [0.5, 0.5], 0.311278),
        ([1, 0, 0], [1, 0, 0], 0),
    ],
)
def test_jensen_shannon(p, q_, expected):
    assert jensen_shannon(p, q_) == pytest.approx(expected, abs=1e-6)
    assert jensen_shannon(q_, p) == pytest.approx(expected, abs=1e-6)


def test_attention_divergence_of_one_head():
    base = np.zeros((2, 2, 3, 3), np.float32)
    base[..., 0] = 1
    other = base.copy()
    other[1, 0, 1:] = [0, 1, 0]  # layer 1, head 0 looks elsewhere from every query but the first
    maps = [
        xr.DataArray(a, dims=("layer", "head", "query", "key"), coords={"layer": [4, 5]})
        for a in (base, other)
    ]
    found = inside.attention_divergence(*maps)
    assert found.values.tolist() == [[0, 0], [1, 0]] and found["layer"].values.tolist() == [4, 5]


def test_drift_keeps_the_first_token_apart():
    base = np.ones((3, 4, 2))
    base[:, 0] *= 100
    other = base.copy()
    other[1, 1:] *= 1.1
    other[2, 0] *= -1
    drift = inside.hidden_drift(
        *(
            xr.DataArray(a, dims=("layer", "token", "embd"), coords={"layer": [0, 1, 2]})
            for a in (base, other)
        )
    )
    assert drift["error"].tolist() == pytest.approx([0, 0.1, 0]) and drift[
        "cosine"
    ].tolist() == pytest.approx([1, 1, 1])
    assert drift["error_first"].tolist() == pytest.approx([0, 0, 2])
    assert drift["cosine_first"].tolist() == pytest.approx([1, 1, -1])


def test_layers_put_together():
    weights = pd.DataFrame(
        {
            "layer": pd.array([0, 0, 1, None], dtype="Int64"),
            "n_elements": [1, 3, 2, 9],
            "error": [0.2, 0.1, 0.5, 9.0],
        }
    )
    drift = pd.DataFrame({"error": [0.0, 0.1, 0.4]})
    falls = pd.DataFrame({"layer": [0, 0, 1, 1], "fall": [0.1, 0.2, -0.1, 0.3]})
    costs = pd.DataFrame({"layer": [0, 0, 1, 1], "cost": [0.1, 0.2, 0.5, 0.3]})
    table = inside.layer_table(weights, drift, costs, falls)
    assert table["weight_error"].tolist() == pytest.approx([np.sqrt((0.04 + 3 * 0.01) / 4), 0.5])
    assert table["drift_added"].tolist() == pytest.approx([0.1, 0.3]) and table[
        "fall"
    ].tolist() == pytest.approx([0.3, 0.2])
    assert table["cost"].tolist() == pytest.approx([0.3, 0.8])
    correlations = inside.rank_correlations(table)
    assert (
        correlations.loc["weight_error", "fall"]
        == pytest.approx(-1)
        == -correlations.loc["weight_error", "cost"]
    )


@pytest.mark.parametrize(
    "piece, kind",
    [
        (" the", "word"),
        ("ing", "part"),
        (" 12", "number"),
        (",", "punctuation"),
        ("\n", "whitespace"),
        (b"\xe2", "other"),
        ("a1", "number"),
        ("don't", "other"),
    ],
)
def test_kinds_of_pieces(piece, kind):
    assert piece_kind(piece) == kind


def scored(**columns):
    """Tokens of one candidate, as many as the columns have."""
    table = pd.DataFrame({"candidate": "x", "dp": 0.0, "same_top": True, "top10": 1.0} | columns)
    given = {"piece": " a", "kld": 1.0, "logprob_base": -1.0, "confidence_base": 0.5}
    missing = {"position": np.arange(len(table))} | given
    return table.assign(**{name: missing[name] for name in missing if name not in columns})


def test_vulnerable_tokens_add_up():
    tokens = scored(
        piece=[" a", "b", " c", "1"],
        kld=[1.0, 2.0, 3.0, 4.0],
        logprob_base=np.log([0.9, 0.1, 0.01, 0.6]),
        same_top=[True, True, False, True],
        dp=[0.3, 0, -0.4, 0],
        top10=[1.0, 1.0, 0.5, 0.9],
    )
    table = token_tables.vulnerable_tokens(tokens)
    words = table.loc[("x", "piece", "word")]
    assert words["kld"] == 2 and words["n"] == 2 and words["same_top"] == 0.5
    assert words["mean_dp"] == pytest.approx(-0.05) and words["top10"] == 0.75
    assert words["rms_dp"] == pytest.approx(np.sqrt(0.125)) and words["median"] == 1
    assert table.loc[("x", "piece", "number"), "share_of_kld"] == 0.4
    sure = table.loc[("x", "reference's probability")]
    assert sure["kld"].to_dict() == {"p < 0.05": 3.0, "0.05 to 0.5": 2.0, "p >= 0.5": 2.5}
    assert table.groupby("by")["n"].sum().tolist() == [4] * 4
    assert list(table.xs("position", level="by").loc["x"].index) == [
        "0 to 0",
        "1 to 1",
        "2 to 2",
        "3 to 3",
    ]
    one = token_tables.vulnerable_tokens(scored(kld=[1.0]))
    assert list(one.loc[("x", "position")].index) == ["0 to 0"]


def test_buckets_of_confidence_are_qbenchs():
    """Share, mean and lower median of the KLD where low <= the reference's likeliest < high: what
    exllamav3's eval/qbench/measure.py has for the same numbers."""
    rng = np.random.default_rng(0)
    confidence, kld = rng.random(1001), rng.exponential(0.1, 1001)
    confidence[:5] = 0.25, 0.5, 0.75, 0.95, 1.0  # an end belongs to the bucket above
    table = token_tables.vulnerable_tokens(scored(kld=kld, confidence_base=confidence))
    table = table.loc[("x", "reference's confidence")]
    buckets = [(0.00, 0.25), (0.25, 0.50), (0.50, 0.75), (0.75, 0.95), (0.95, 1.01)]
    assert len(table) == len(buckets)
    for (kind, row), (low, high) in zip(table.iterrows(), buckets):
        inside = np.sort(kld[(confidence >= low) & (confidence < high)])
        assert kind == f"{low:.2f} to {min(high, 1):.2f}"
        assert row["n"] / 1001 == (len(inside) / 1001)
        assert row["kld"] == pytest.approx(inside.mean(), rel=1e-12)
        assert row["median"] == inside[(len(inside) - 1) // 2]


def two_files(**more):
    """Large and small weights, each with a full and a small cache: size, bytes per token, KLD."""
    rows = {
        "large": ("large", "f16", "f16", 100, 4.0, 0.01),
        "large, q8_0/q8_0 cache": ("large", "q8_0", "q8_0", 100, 2.0, 0.02),
        "small": ("small", "f16", "f16", 60, 4.0, 0.05),
        "small, q8_0/q8_0 cache": ("small", "q8_0", "q8_0", 60, 2.0, 0.06),
    } | more
    columns = ["weights", "cache_k", "cache_v", "size_bytes", "token_bytes", "kld_mean"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def for_context(table, tokens):
    return table.assign(memory_bytes=table["size_bytes"] + tokens * table["token_bytes"])


def test_a_smaller_cache_beats_smaller_weights_where_it_fits_and_loses_less():
    # 30 tokens: large 220, with the small cache 160; small 180, with it 120.
    found = cache.crossover(for_context(two_files(), 30))
    assert list(found.index) == [120, 160, 180, 220]
    assert list(found["better"]) == [
        "smaller cache",
        "smaller cache",
        "smaller cache",
        "smaller weights",
    ]
    assert found.loc[180].tolist()[:4] == ["small", "large, q8_0/q8_0 cache", 0.05, 0.02]
    assert found["smaller_weights"].isna().tolist() == [True, True, False, False]
    # 5 tokens: 120, 110; 80, 70: large weights with any cache come after small ones with a full.
    found = cache.crossover(for_context(two_files(), 5))
    assert list(found["better"]) == [
        "smaller cache",
        "smaller weights",
        "smaller cache",
        "smaller weights",
    ]
    assert list(found.index) == [70, 80, 110, 120]
    assert (
        list(cache.crossover(for_context(two_files(), 30), floor=0.04)["better"][-2:])
        == ["equal"] * 2
    )
    blurred = for_context(two_files(), 30).assign(kld_mean_err=[0.0, 0.03, 0.001, 0.0])
    assert list(cache.crossover(blurred)["better"])[-2:] == ["equal", "equal"]
    # 20 tokens: large with the small cache needs what small with the full one does.
    turns = cache.turning(two_files())
    assert turns.loc[0].tolist() == ["large, q8_0/q8_0 cache", "small", 20, pytest.approx(0.03)]
    assert len(turns) == 1 and cache.turning(two_files(), floor=0.04).empty
    lost = two_files(bad=("bad", "q4_0", "q4_0", 100, 1.0, np.nan))
    assert cache.turning(lost).equals(turns)
    assert cache.crossover(for_context(lost.iloc[:0], 1)).empty


def test_memory_is_reckoned_for_a_context_as_llama_cpp_makes_the_cache():
    file = SimpleNamespace(n_ctx_train=8192)
    assert cache.context(file, None, 512) == 8192 and cache.context(file, 100, 512) == 100
    assert cache.context(SimpleNamespace(n_ctx_train=131072), None, 512) == 32768
    assert cache.context(SimpleNamespace(n_ctx_train=None), None, 512) == 512
    shape = dict(n_layer=3, n_kv_head=2, head_dim=64, head_dim_v=32, architecture="llama")
    gguf_file = SimpleNamespace(**shape, sliding_window=None, metadata={})
    gguf_file.n_kv_head_per_layer = [2, 2, 1]  # 5 heads in all
    table = two_files().iloc[[0, 1]].assign(cache_v=["f16", "q4_0"])
    found = cache.at_context(table, {"large": gguf_file}, 300)  # 512 cells
    assert list(found["cache_bytes"]) == [512 * 5 * 2 * 96, 512 * 5 * (64 * 34 + 32 * 18) // 32]
    assert list(found["memory_bytes"]) == [100 + n for n in found["cache_bytes"]]
    sizes = pd.DataFrame({"size_bytes": [3, 9, 5]}, index=["a", "b", "c"])
    assert cache.some_files(sizes, "c") == ["b", "c", "a"] and cache.some_files(sizes, "b") == [
        "b",
        "a",
    ]


def test_smaller_caches_are_measured_or_it_is_said_why_not(tmp_path):
    pytest.importorskip("llama_cpp")
    text = dict(text="The dog saw the cat and the cat. " * 20, n_ctx=64)
    for width, pairs in ((64, 2), (16, 1)):
        model = tiny_model("llama", tmp_path, seed=width, head_dim=width, n_layer=1)
        full = compare_quantizations(model, {"m": model}, **text, max_windows=1, progress=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the candidate is left out
            ask = dict(**text, max_windows=1)
            # A full cache is a row already
            asked = ["f16/f16", "q8_0/q8_0"]
            found = cache.with_smaller(full, model, {"m": model}, asked, **ask)
            alone = cache.with_smaller(full, model, {"m": model}, asked[:1], **ask)
        assert list(alone.index) == ["m"] and cache.crossover(alone)["smaller_cache"].isna().all()
        assert len(found) == pairs and found["kld_mean"].iloc[0] == 0
        assert bool(found.attrs["why"]) == (width == 16)
    assert "blocks of 32 numbers" in found.attrs["why"]
    steps, turns = cache.crossover(found), cache.turning(found)
    assert "No smaller cache could" in say.cache(steps, turns, 64, found.attrs["why"])


def test_maps_find_the_part_that_was_broken():
    rng = np.random.default_rng(0)
    base, broken = (
        rng.normal(size=(5, 50)).astype(np.float32),
        rng.normal(size=(5, 50)).astype(np.float32),
    )
    log_p, log_q = (
        x.astype(float) - np.log(np.exp(x.astype(float)).sum(axis=1, keepdims=True))
        for x in (base, broken)
    )
    kld = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)[1:].mean()

    falls = tracing.fall_map(
        lambda part, layer: base if (part, layer) == ("ffn_out", 1) else broken,
        base,
        3,
        progress=False,
    )
    best = falls.loc[falls["fall"].idxmax()]
    assert (
        (best.part, best.layer) == ("ffn_out", 1)
        and best.share == pytest.approx(1)
        and best.kld == 0
    )
    assert (falls["fall"] == 0).sum() == 5 and falls.attrs["kld"] == pytest.approx(kld, rel=1e-5)

    costs = tracing.cost_map(
        lambda part, layer: broken if (part, layer) == ("attn_out", 2) else base,
        base,
        3,
        progress=False,
    )
    worst = costs.loc[costs["cost"].idxmax()]
    assert (worst.part, worst.layer) == ("attn_out", 2) and worst.cost == pytest.approx(
        kld, rel=1e-5
    )
    assert (costs["cost"] == 0).sum() == 5


def test_recommendation_is_per_byte():
    costs = pd.DataFrame(
        [
            ("attn_out", 0, 0.2),
            ("ffn_out", 0, 0.3),
            ("attn_out", 1, 0.02),
            ("ffn_out", 1, 0.01),
            ("ffn_out", 2, 9.0),
        ],
        columns=["part", "layer", "cost"],
    )
    table = tensors(
        **{
            f"blk.{i}.{n}.weight": ("Q4_K" if i < 2 else "Q8_0", s, 4.5 if i < 2 else 8.5)
            for i in (0, 1, 2)
            for n, s in (("attn_q", (64, 64)), ("attn_output", (64, 64)), ("ffn_up", (256, 64)))
        }
    )
    best = decision.recommend(costs, table, keep=2)
    assert best[["part", "layer"]].values.tolist() == [
        ["attention", 0],
        ["FFN", 0],
    ]  # 0.2 for half the bytes of 0.3
    assert best["bytes_added"].tolist() == [64 * 64 * 2 * 4 // 8, 256 * 64 * 4 // 8]
    assert table.index.str.fullmatch(best["pattern"][0]).sum() == 2
    assert len(decision.recommend(costs, table)) == 4  # what is Q8_0 already cannot be kept at it
    cheap = decision.control(costs, table, best)
    assert sorted(cheap[["part", "layer"]].values.tolist()) == [["FFN", 1], ["attention", 1]]
    assert cheap["bytes_added"].sum() == best["bytes_added"].sum()
    types = decision.explicit_types(table, best)
    chosen = {
        name: next(kind for p, kind in types.items() if re.search(p, name)) for name in table.index
    }
    assert {chosen[name] for name in table.index if ".0." in name or ".2." in name} == {"Q8_0"}
    assert {chosen[name] for name in table.index if ".1." in name} == {"Q4_K"}


def test_experts_and_latent_attention_are_parts_like_others():
    names = ["attn_kv_a_mqa", "attn_kv_b", "ffn_down_exps", "ffn_up_shexp", "ffn_gate_inp"]
    table = tensors(**{f"blk.0.{name}.weight": ("Q4_K", (64, 64), 4.5) for name in names})
    costs = pd.DataFrame(
        [("attn_out", 0, 0.2), ("ffn_out", 0, 0.3)], columns=["part", "layer", "cost"]
    )
    best = decision.recommend(costs, table)
    assert best["bytes_added"].tolist() == [2 * 64 * 64 * 4 // 8] * 2
    kept = [table.index[table.index.str.fullmatch(pattern)] for pattern in best["pattern"]]
    assert [len(own) for own in kept] == [2, 2] and "blk.0.ffn_gate_inp.weight" not in kept[0]


def test_pareto_and_decision():
    table = pd.DataFrame(
        {"memory_bytes": [10, 20, 30, 25, 5], "kld_mean": [0.5, 0.2, 0.01, 0.3, np.nan]},
        index=list("abcde"),
    )
    assert decision.pareto(table, "memory_bytes", "kld_mean").to_dict() == dict(
        a=True, b=True, c=True, d=False, e=False
    )
    assert decision.decide(table, [8, 20, 100], [0.1, 1]).values.tolist() == [
        ["none", "none"],
        ["none", "b"],
        ["c", "c"],
    ]


@pytest.mark.parametrize(
    "a, b, expected",
    [([1, 2, 3], [1, 5, 3], 1), ([1, 2], [1, 2], None), ([1, 2], [1, 2, 3], 2), ([1, 2], [1], 1)],
)
def test_an_answer_that_ends_sooner_is_another(a, b, expected):
    assert token_tables.first_divergence(a, b) == expected


def test_costs_join_the_losses():
    quality = pd.DataFrame({"size_bytes": 5e6, "kld_mean": [0.012, 0.3]}, index=["a", "b"])
    speed = pd.DataFrame(
        {"gpu_bytes": [0.0, 7e6], "resident_bytes": 2e6 + 0.5, "generation_tps": [4.0, 8.0]},
        index=["a", "b"],
    )
    table = decision.with_costs(quality, speed)
    assert table["memory_bytes"].tolist() == [2e6 + 0.5, 7e6]
    assert table["seconds_per_token"].tolist() == [0.25, 0.125]
    assert decision.megabytes(table[["size_bytes"]])["size_MB"].tolist() == [5, 5]
    budgets, limits = decision.steps(table)
    assert (budgets, limits) == ([2e6 + 1, 7e6], [0.02, 0.3])
    assert decision.decide(table, budgets, [0.02, 1]).values.tolist() == [["a", "a"], ["a", "a"]]


@pytest.mark.parametrize(
    "kld, limit",
    [(0.0133, 0.02), (0.3, 0.3), (1.3, 2), (9.3, 10), (0.0097, 0.01), (-2e-9, 0), (0, 0)],
)
def test_every_file_is_within_a_limit_of_its_own(kld, limit):
    """0.0133 became "at most 0.01", and no memory was enough for that file."""
    table = pd.DataFrame({"memory_bytes": [7e6], "kld_mean": [kld]}, index=["a"])
    budgets, limits = decision.steps(table)
    assert limits == pytest.approx([limit], abs=2e-9) and limits[0] >= kld
    assert decision.decide(table, budgets, limits).values.tolist() == [["a"]]


def test_worst_tokens_stand_in_their_own_window():
    rows = {"candidate": "x", "window": [0] * 9 + [1], "position": range(10), "kld": 0.0}
    scored = pd.DataFrame(rows | {"logprob_base": -1.0, "logprob": -2.0, "top_base": 0, "top": 1})
    scored["piece"] = [" a", "b", "c", "d", "e", "f", "g", "h", "i", "j"]
    scored.loc[[8, 9], "kld"] = [2.0, 1.0]
    table = token_tables.worst_tokens(scored, "x", ["é", "\n"], n=2)
    assert table["before"].tolist() == ["␣abcdefgh", "∅"] and table["token"].tolist() == ["i", "j"]
    assert table["reference expected"].tolist() == ["é"] * 2
    assert table["file expected"].tolist() == ["⏎"] * 2


def test_answers_are_held_against_the_reference():
    def table(*ids):
        return pd.DataFrame(
            {"id": ids, "piece": list(map(str, ids)), "generated": [False] + [True] * 2}
        )

    (row,) = token_tables.answer_rows(["p"], {"reference": [table(1, 2, 3)], "x": [table(1, 2, 4)]})
    assert row["prompt"] == "p" and row["answers"]["reference"] == (["2", "3"], None)
    assert row["answers"]["x"] == (["2", "4"], 1)


def test_ladder_names_what_is_out_of_order():
    table = pd.DataFrame(
        {"bits_per_weight": [4.5, 5.5, 8.5, 3], "kld_mean": [0.076, 0.086, 0.01, 1]},
        index=["Q4", "Q5", "Q8", "IQ3"],
    )
    assert decision.ladder(table) == [("Q5", "Q4")]
    assert decision.ladder(table.drop("Q5")) == []
