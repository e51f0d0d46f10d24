"""Attention analysis on arrays made by hand, whose answers are known."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from llamatelemetry.attention import (
    compare,
    figures,
    flow,
    output,
    patterns,
    say,
    weights,
)


def maps(*layers):
    """(layer, head, query, key) from a list of layers, each a list of (query, key) maps."""
    return xr.DataArray(np.array(layers, dtype=np.float32), dims=("layer", "head", "query", "key"))


def identity(n):
    return np.eye(n)


def uniform(n):
    return np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None]


def previous(n):
    a = np.eye(n, k=-1)
    a[0, 0] = 1
    return a


def to_first(n):
    return np.eye(n)[[0] * n]


class FakeGGUF:
    """What the weight functions read from a GGUFFile, with tensors given as arrays."""

    def __init__(self, tensors, n_head, n_kv_head, head_dim, **facts):
        self._tensors = tensors
        self.tensors = pd.DataFrame({"type": "F32"}, index=list(tensors))
        self.n_head, self.n_kv_head, self.head_dim, self.rope_dim = (
            n_head,
            n_kv_head,
            head_dim,
            head_dim,
        )
        self.architecture, self.norm_eps, self.rope_freq_base = "llama", 0.0, 10000.0
        self.metadata = {"llama.attention.layer_norm_rms_epsilon": 0.0}
        self.sliding_window = self.attn_logit_softcap = self.final_logit_softcap = None
        self.output_name = "output.weight"
        self.__dict__.update(facts)

    def tensor(self, name):
        return self._tensors[name]

    def rows(self, name, ids):
        return self._tensors[name][ids]


def test_query_heads_map_to_consecutive_kv_heads():
    assert [patterns.kv_head(h, 9, 3) for h in range(9)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert patterns.head_groups(4, 2)["heads"].tolist() == ["0, 1", "2, 3"]


def test_masks():
    causal = patterns.allowed_keys(range(3), 3)
    assert causal.tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert patterns.allowed_keys(range(3), 3, window=2)[2].tolist() == [False, True, True]
    assert patterns.allowed_keys([2], 3).tolist() == [[True, True, True]]


def test_attend_with_two_heads_on_one_kv_head():
    q = np.array([[[1.0, 0.0], [0.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]]])  # (head, token, feature)
    k = np.array([[[1.0, 0.0], [0.0, 1.0]]])
    v = np.array([[[1.0, 10.0], [3.0, 30.0]]])
    steps = patterns.attend(q, k, v, scale=0.5)
    assert steps["scores"].values[0].tolist() == [[1, 0], [0, 2]]
    weight = np.exp(1) / (1 + np.exp(1))  # softmax(0, 2 * 0.5)
    np.testing.assert_allclose(steps["attention"].values[0], [[1, 0], [1 - weight, weight]])
    np.testing.assert_allclose(steps["attention"].values[1], uniform(2))
    np.testing.assert_allclose(steps["head_output"].values[1], [[1, 10], [2, 20]])
    assert np.isneginf(steps["masked"].values[0, 0, 1])


def test_softcap_comes_before_the_scale_and_window_masks():
    q, k = np.full((1, 3, 1), 10.0), np.full((1, 3, 1), 10.0)
    steps = patterns.attend(q, k, k, scale=0.5, softcap=5.0, window=2)
    assert steps["scaled"].values[0, 2, 0] == pytest.approx(5 * np.tanh(100 / 5) * 0.5)
    assert steps["attention"].values[0, 2].tolist() == [0, 0.5, 0.5]


@pytest.mark.parametrize(
    "a, entropy, distance",
    [
        (identity(4), 0.0, 0.0),
        (previous(4), 0.0, 1.0),
        (to_first(4), 0.0, 3.0),
        (uniform(4), np.log(4), 1.5),
    ],
)
def test_entropy_and_distance_of_the_last_query(a, entropy, distance):
    a = maps([a])
    assert float(patterns.entropy(a)[0, 0, -1]) == pytest.approx(entropy)
    assert float(patterns.mean_distance(a)[0, 0, -1]) == pytest.approx(distance)


def test_normalised_entropy_is_one_for_uniform_and_nan_for_a_single_key():
    values = patterns.entropy(maps([uniform(5)]), normalised=True)[0, 0]
    assert np.isnan(values[0])
    np.testing.assert_allclose(values[1:], 1, rtol=1e-6)


def test_positions_of_a_few_queries_come_from_the_coordinate():
    part = maps([uniform(5)]).isel(query=[4])
    assert patterns.query_positions(part).tolist() == [4]  # the last, where nothing else is known
    part = maps([uniform(5)]).assign_coords(query_position=("query", np.arange(5))).isel(query=[2])
    assert patterns.query_positions(part).tolist() == [2]
    assert float(patterns.mean_distance(part)[0, 0, 0]) == pytest.approx(1.0)


def test_sink_measures():
    a = maps([to_first(4), identity(4), uniform(4)])
    np.testing.assert_allclose(
        patterns.sink_mass(a)[0], [1, 0, (1 / 2 + 1 / 3 + 1 / 4) / 3], rtol=1e-6
    )
    # Gu et al. count the token's own query too: identity gives 1/4, uniform (1 + 1/2 + 1/3 + 1/4) /
    # 4
    np.testing.assert_allclose(patterns.key_importance(a)[0, :, 0], [1, 0.25, 25 / 48], rtol=1e-6)
    assert patterns.is_sink_head(a)[0].values.tolist() == [True, False, True]
    assert float(patterns.key_importance(a)[0, 1, 3]) == 1.0  # seen by one query only
    table = patterns.head_table(a)
    assert list(table["head"]) == [0, 1, 2] and table["sink"].tolist() == [True, False, True]
    assert table["distance"].tolist() == pytest.approx([2.0, 0.0, (0.5 + 1 + 1.5) / 3])


def test_rollout_of_two_hops_is_the_product():
    # Half previous token, half residual, twice: 1/4 two back, 1/2 one back, 1/4 self.
    rolled = flow.rollout(maps([previous(4)], [previous(4)]))
    np.testing.assert_allclose(rolled[1, 3], [0, 0.25, 0.5, 0.25])
    np.testing.assert_allclose(rolled[0, 3], [0, 0, 0.5, 0.5])
    np.testing.assert_allclose(rolled.sum("key"), 1)
    np.testing.assert_allclose(flow.rollout(maps([identity(3)], [identity(3)]))[1], np.eye(3))
    np.testing.assert_allclose(  # heads are averaged before the product
        flow.rollout(maps([identity(2), to_first(2)]))[0, 1], [0.25, 0.75]
    )


def test_flow_is_limited_by_the_narrowest_edge():
    # Two layers of previous(3), query 2: token 0 by 2-1-0 (0.5), token 1 by 2-1-1 and 2-2-1 (0.5
    # each), 2 by 2-2-2.
    values = flow.flow(maps([previous(3)], [previous(3)]))
    np.testing.assert_allclose(values, np.array([0.5, 1.0, 0.5]) / 2.0)
    np.testing.assert_allclose(flow.flow(maps([previous(3)]), query=1), [0.5, 0.5, 0])


def test_rollout_needs_every_query():
    with pytest.raises(ValueError, match="every query"):
        flow.rollout(maps([uniform(3)]).isel(query=[2]))


def test_edges():
    edges = flow.head_edges(maps([previous(3), uniform(3)]), threshold=0.4)
    assert edges[["src", "dst", "head"]].values.tolist() == [[1, 0, 0], [2, 1, 0], [1, 0, 1]]
    assert edges["weight"].tolist() == [1, 1, 0.5]
    rolled = flow.rollout_edges(flow.rollout(maps([previous(3)], [previous(3)])), threshold=0.3)
    assert rolled[["src", "dst"]].values.tolist() == [[1, 0], [2, 1]]


def test_token_nodes_rank_the_token_that_all_look_at():
    from llamatelemetry.backend import get_backend

    nodes = flow.token_nodes(maps([to_first(4), uniform(4)]), list("abcd"), get_backend("cpu"))
    first = (1 + 1 / 2 + 1 + 1 / 3 + 1 + 1 / 4) / 6
    assert nodes["received"].tolist() == pytest.approx([first, (1 / 3 + 1 / 4) / 4, 1 / 8, 0])
    assert nodes["pagerank"].idxmax() == 0 and nodes["pagerank"].sum() == pytest.approx(1)


def test_js_distance_and_moved_targets():
    a, b = maps([identity(3), uniform(3)]), maps([previous(3), uniform(3)])
    np.testing.assert_allclose(compare.js_distance(a, b)[0], [[0, 1, 1], [0, 0, 0]], atol=1e-7)
    table = compare.compare_heads(a, b)
    assert table["head"].tolist() == [0, 1]
    assert table.loc[0, ["js_distance", "max_difference", "top_moved", "top_shift"]].tolist() == [
        1,
        1,
        1,
        1,
    ]
    assert table.loc[1, "top_moved"] == 0 and np.isnan(table.loc[1, "top_shift"])
    moves = compare.moved_targets(a, b, ["a", "b", "c"], table)
    assert moves[["layer", "head"]].drop_duplicates().values.tolist() == [[0, 0]]
    assert moves[["query", "from_piece", "to_piece"]].values.tolist() == [
        [1, "b", "a"],
        [2, "c", "b"],
    ]


def test_js_distance_of_a_half_step():
    from scipy.spatial.distance import jensenshannon

    p, q = [0.5, 0.5], [0.9, 0.1]
    got = compare.js_distance(maps([[p]]), maps([[q]]))
    assert float(got[0, 0, 0]) == pytest.approx(jensenshannon(p, q, base=2))


def test_captures_of_different_texts_are_refused():
    with pytest.raises(ValueError, match="same text"):
        compare.js_distance(maps([identity(3)]), maps([identity(4)]))


@pytest.mark.parametrize(
    "pairing, turned", [("neighbours", [0, 1, 1, 0]), ("halves", [-1, 0, 1, 0])]
)
def test_rope_turns_pairs(pairing, turned):
    # Base 1: every pair turns by one radian a token; a quarter turn, with factors, at token 1.
    x = np.array([[[1.0, 0, 1, 0], [1.0, 0, 1, 0]]])
    if pairing == "neighbours":
        x[..., 2:] = [0, -1]
    out = weights.rope(x, 1.0, pairing, factors=2 / np.pi)
    np.testing.assert_allclose(out[0, 0], x[0, 0])
    np.testing.assert_allclose(out[0, 1], turned, atol=1e-12)


def test_fitted_rope_finds_pairing_and_base():
    x = np.random.default_rng(0).normal(size=(2, 5, 8))
    gguf = FakeGGUF({}, 2, 2, 8, rope_freq_base=1e6)
    for base, pairing in ((1e6, "halves"), (1e4, "neighbours")):
        found = weights.fitted_rope(x, weights.rope(x, base, pairing), gguf)
        assert found[:2] == (pairing, base) and found[3] < 1e-12


def test_projections_split_fused_matrices_alike():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(4 * 2 + 2 * 2 + 2 * 2, 6))  # 4 query heads, 2 kv heads, 2 features
    separate = FakeGGUF(
        {
            "blk.0.attn_q.weight": matrix[:8],
            "blk.0.attn_k.weight": matrix[8:12],
            "blk.0.attn_v.weight": matrix[12:],
        },
        *(4, 2, 2),
    )
    fused = FakeGGUF({"blk.0.attn_qkv.weight": matrix}, 4, 2, 2)
    x = rng.normal(size=(3, 6))
    a, b = (weights.project_qkv(x, g, 0) for g in (separate, fused))
    assert a["q"].shape == (4, 3, 2) and a["k"].shape == (2, 3, 2)
    for name in "qkv":
        np.testing.assert_allclose(a[name], b[name])
    np.testing.assert_allclose(a["q"][3, 1], (x[1] @ matrix.T)[6:8])


def test_output_projection_is_the_sum_of_heads():
    w = np.array([[1.0, 0, 2, 0], [0, 1, 0, 3]])  # 2 embd, 2 heads of 2 features
    gguf = FakeGGUF({"blk.0.attn_output.weight": w}, 2, 1, 2)
    heads = np.array([[[1.0, 2.0]], [[10.0, 20.0]]])  # (head, token, feature)
    np.testing.assert_allclose(weights.project_output(heads, gguf, 0), [[1 + 20, 2 + 60]])
    v = xr.DataArray(np.array([[[[3.0, 4.0]]]]), dims=("layer", "kv_head", "token", "feature"))
    norms = output.value_norms(v, gguf)
    np.testing.assert_allclose(norms[0, :, 0], [5, np.hypot(6, 12)])
    weighted = output.norm_weighted(maps([[[0.5]], [[1.0]]]), norms)
    np.testing.assert_allclose(weighted[0, :, 0, 0], [2.5, np.hypot(6, 12)])
    assert output.moved_shares(maps([[[3.0, 1.0], [0, 0]]]))[0, 0].values.tolist() == [
        [0.75, 0.25],
        [0, 0],
    ]


def test_share_of_attention_in_what_layers_write():
    nan = np.nan  # a layer without such a block
    norm = [[[9.0, 3, 1], [9, nan, nan]], [[9.0, 1, 3], [9, 2, 2]], [[0.0, 0, 0], [0, 0, 0]]]
    norm = xr.DataArray(
        norm, dims=("layer", "part", "token"), coords={"part": ["attention", "ffn"]}
    )
    shares = output.attention_share(norm)
    np.testing.assert_allclose(shares, [1, (1 / 3 + 3 / 5) / 2, np.nan])


def lead(total, layers=2):
    """A table as layers.lens.logit_attribution makes it."""
    rows = [("embedding", -1, 1.0)]
    rows += [(part, layer, 1.0 + layer) for part in ("attention", "ffn") for layer in range(layers)]
    rows += [("other", -1, 0.25), ("bias", -1, 0.0)]
    table = pd.DataFrame(rows, columns=["component", "layer", "value"])
    table.attrs.update(total=total, captured=total + 0.01)
    return table


def test_leads():
    table = output.lead_table([lead(7.25), lead(8.0)], ["a", "b"])
    assert table["over"].tolist() == ["a", "b"] and table["total"].tolist() == [7.25, 8.0]
    assert table.loc[0, ["embedding", "attention", "ffn", "other", "bias"]].tolist() == [
        *(1, 3, 3, 0.25, 0)
    ]
    line = figures.logit_build_up([lead(7.25)], ["x"], title="t").data[0]
    assert list(line.y) == [1, 2, 3, 5, 7, 7.25] and line.name == "over x"
    assert list(line.x) == [-0.5, 0, 0.5, 1, 1.5, 2] and line.text[-2] == "layer 1 ffn"
    sentence = said(say.logit_build_up(lead(7.25), ["x", "y"]))
    assert sentence == (
        "'x' leads 'y' by 7.26 in logit: +3.00 from attention, +1.00 from embedding, +3.00 from ffn and +0.25 "
        "from other. The largest addition is +4.00, of layer 1."
    )


def test_sampling_chain():
    logits = np.log([0.5, 0.25, 0.15, 0.1])
    plain = output.sampled_probabilities(logits, temperature=1, top_k=0, top_p=1, min_p=0)
    np.testing.assert_allclose(plain, [0.5, 0.25, 0.15, 0.1])
    # top-p comes after top-k and sees what that left: 0.5 / 0.75 < 0.7, so both stay
    both = output.sampled_probabilities(logits, temperature=1, top_k=2, top_p=0.7, min_p=0)
    np.testing.assert_allclose(both, [2 / 3, 1 / 3, 0, 0])
    one = output.sampled_probabilities(logits, temperature=1, top_k=2, top_p=0.6, min_p=0)
    assert one.tolist() == [1, 0, 0, 0]
    # temperature comes last: it does not change who is left
    hot = output.sampled_probabilities(logits, temperature=100, top_k=0, top_p=0.7, min_p=0)
    assert (hot > 0).sum() == 2 and hot[0] == pytest.approx(0.5, abs=0.01)
    assert (output.sampled_probabilities(logits, 1, 0, 1, min_p=0.29) > 0).sum() == 3
    assert output.sampled_probabilities(logits[::-1], temperature=0).tolist() == [0, 0, 0, 1]


def said(sentence):
    return sentence.replace("\n", " ")


def test_findings_say_what_the_numbers_say():
    sentence = said(say.token_map(maps([previous(4)])[0, 0], list("abcd")))
    assert sentence.startswith(
        "100% of the 3 queries that have a choice attend most to the token before"
    )
    assert "1.000, from 'c' (position 2) to 'b' (position 1)" in sentence
    part = said(say.token_map(maps([previous(4)])[0, 0, 2:], list("abcd")))
    assert part.startswith("100% of the 2 queries") and "from 'c' (position 2)" in part
    a = maps([uniform(4), identity(4)], [to_first(4), to_first(4)])
    table = patterns.head_table(a)
    sentence = said(say.sinks(table))
    assert sentence.startswith("3 of 4 heads (75%)") and "in 1 of 2 layers" in sentence
    assert "2.0 tokens, of layer 1, head 0" in said(say.depth_profile(table))
    raw = maps([to_first(3), uniform(3)], [identity(3), uniform(3)])
    lengths = np.array([[[2.0, 1, 1], [0, 0, 0]], [[2, 1, 1], [2, 1, 1]]])
    moves = xr.DataArray(lengths, dims=("layer", "head", "key"), coords={"layer": [0, 1]})
    assert said(say.norm_weighted(raw, moves, 0, 1)) == (
        "The first token gets 42% of this head's weight and none of the length that it moves; over all heads 46% "
        "of the weight and 53% of the length."
    )
    table = compare.compare_heads(a, a[::-1])
    assert "largest difference of a single weight is 1.0000" in said(say.changes(table, "a", "b"))
    rolled = flow.rollout(maps(*[[to_first(4)]] * 4))[:, -1]
    sentence = said(say.rollout(rolled, list("abcd")))
    assert "passes one half after layer 1 and ends at 0.938" in sentence
    drawn = flow.flow(maps([to_first(3)]))
    assert said(say.token_bars(drawn, drawn, list("abc"))) == (
        "Flow is largest from 'a' (position 0): 0.500, against 0.333 for an even share. Spearman's correlation "
        "with mean attention: 1.00."
    )


def test_sentences_fit_a_page():
    sentence = say.token_map(maps([previous(4)])[0, 0], ["x" * 30] * 4)
    assert max(map(len, sentence.splitlines())) <= 100


def test_generated_tokens_attention_is_split_by_target():
    split = patterns.generated_split(maps([uniform(5)]), n_prompt=3)
    assert split.index.tolist() == [3, 4]
    np.testing.assert_allclose(split.loc[3], [1 / 4, 2 / 4, 0, 1 / 4], rtol=1e-6)
    np.testing.assert_allclose(split.loc[4], [1 / 5, 2 / 5, 1 / 5, 1 / 5], rtol=1e-6)
    only = patterns.generated_split(maps([uniform(5)]).isel(query=[4]), n_prompt=3)
    assert only.index.tolist() == [4]


def test_heads_above_a_mark_carry_a_dot():
    values = [[0.2, 0.31], [0.3, 0.9], [0.0, 1.0]]  # (layer, head)
    figure = figures.layer_head_map(values, title="t", unit="weight", mark=0.3)
    assert figure.data[0].text.tolist() == [["", "", ""], ["•", "•", "•"]]
    assert figures.layer_head_map(values, title="t", unit="weight").data[0].text is None


def test_figures_leave_the_future_blank_and_escape_tokens():
    figure = figures.token_map(uniform(3), ["<b>", " a", "c"], title="t", unit="weight")
    assert figure.data[0].x[0] == "0 &lt;b&gt;"
    z = np.asarray(figure.data[0].z)
    assert np.isnan(z[0, 1]) and not np.isnan(z[1]).all() and z[2, 0] == pytest.approx(1 / 3)
    rows = figures.token_map(uniform(4)[2:], list("abcd"), queries=[2, 3], title="t", unit="weight")
    assert np.isnan(np.asarray(rows.data[0].z)).tolist() == [[False] * 3 + [True], [False] * 4]
    longer = figures.token_map(
        uniform(40)[28:], ["word " * 4] * 40, queries=range(28, 40), title="t", unit="weight"
    )
    assert (
        longer.layout.height - 8 * 18 - 120 >= 12 * 16
    )  # beside title and labels, 12 rows that can be told apart


@pytest.mark.slow
def test_every_step_of_a_real_layer_is_recomputed_and_a_wrong_one_is_found(engine):
    from bench_rounding_cause import BEFORE, product
    from bench_rounding_cause import weights as matrix_of
    from gguf import GGUFReader

    from llamatelemetry.attention.steps import STAGES, check_steps

    cap = engine.capture("The cat sat on the mat and the cat", stages=STAGES)
    for layer in (0, 13, 17):
        steps = check_steps(cap, engine.model, layer)
        assert len(steps) == 12 and steps["agrees"].all(), steps
        quantized = steps[
            steps["kind"] == "quantized"
        ]  # the tolerance is twice what rounding explains: neither more ...
        used = quantized["relative_difference"] / (quantized["tolerance"] - 1e-3)
        assert len(used) == 4 and used.between(0.4, 0.65).all(), steps  # ... nor less is there
    tensor = next(
        t for t in GGUFReader(engine.model.path).tensors if t.name == "blk.13.attn_v.weight"
    )
    on_cuda = product(np.asarray(cap.attn_norm.sel(layer=13)), matrix_of(tensor), BEFORE)
    cap.v.values[13] = on_cuda.reshape(len(on_cuda), engine.model.n_kv_head, -1).swapaxes(0, 1)
    for gpu in (False, True):  # a GPU rounds more coarsely there, and is allowed to
        cap.model.gpu = gpu
        assert check_steps(cap, engine.model, 13).set_index("step")["agrees"]["project to v"] == gpu
    cap.v.values[17] *= (
        1.01  # one percent: within what quantized kernels differ by, but not for the weighted values
    )
    steps = check_steps(cap, engine.model, 17).set_index("step")
    assert steps.index[~steps["agrees"]].tolist() == ["weighted values"]
    cap.q.values[17, 3] *= -1
    wrong = check_steps(cap, engine.model, 17).query("not agrees")["step"].tolist()
    assert wrong == ["RoPE on q", "scores q·k", "q and k to attention", "weighted values"]


def test_flow_of_groups_bounds_the_flow_of_their_tokens():
    rng = np.random.default_rng(0)
    a = np.tril(rng.random((3, 24, 24)) ** 3)
    a = xr.DataArray(a / a.sum(-1, keepdims=True), dims=("layer", "query", "key"))
    group = flow.groups(24, 3, seconds=0)
    assert (
        len(set(group)) == 20
        and (np.diff(group) >= 0).all()
        and (group[-8:] == range(12, 20)).all()
    )
    exact, together = flow.flow(a), flow.flow(a, seconds=0)
    assert together["group"].values.tolist() == group.tolist()
    assert exact.sum() == pytest.approx(1) and together.sum() == pytest.approx(1)


def test_rollout_of_the_last_query_is_that_of_all():
    rng = np.random.default_rng(0)
    a = np.tril(rng.random((4, 2, 9, 9)))
    a = xr.DataArray(
        a / a.sum(-1, keepdims=True),
        {"layer": range(4)},
        dims=("layer", "head", "query", "key"),
    )
    every = flow.rollout(a).isel(query=-1)
    np.testing.assert_allclose(flow.last_rollout(a.mean("head")), every, atol=1e-12)
