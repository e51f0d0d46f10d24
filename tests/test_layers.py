"""Layer analyses on hand-made arrays with known answers, and on a model whose weights were set by
hand."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from llamatelemetry.layers import (
    budget,
    compare,
    graph,
    norms,
    routing,
    say,
    states,
)


def stage(values, dims=("layer", "token", "embd")):
    values = np.asarray(values, dtype=np.float32)
    coords = {"layer": np.arange(values.shape[0])} if dims[0] == "layer" else {}
    return xr.DataArray(values, dims=dims, coords=coords)


@pytest.fixture
def stream():
    """Three tokens in two dimensions through two layers: hidden, attn_out, ffn_out with h' = h + a
    + f."""
    start = np.array([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
    attention = np.array([[[0, 0], [0, 1], [0, 2]], [[1, 0], [0, 0], [0, -1]]], dtype=float)
    ffn = np.array([[[3, 4], [0, 0], [3, 0]], [[0, 0], [2, 0], [0, 0]]], dtype=float)
    hidden = np.stack([start, start + attention[0] + ffn[0], start + (attention + ffn).sum(0)])
    return stage(hidden), stage(attention), stage(ffn)


def test_norms_keep_the_first_token_apart(stream):
    table = states.norm_table(stream[0])
    assert table["first"].tolist() == pytest.approx([5, 10, np.hypot(7, 8)])
    assert table.loc[0, "median"] == pytest.approx(1.5)  # of lengths 1 and 2
    assert table.loc[0, "low"] == pytest.approx(1.1)


def test_one_token_is_refused():
    with pytest.raises(ValueError, match="at least two tokens"):
        states.norm_table(stage(np.ones((3, 1, 2))))


@pytest.mark.parametrize(
    "value, median, found", [(2001, 2, 1), (1999, 2, 0), (99, 0.01, 0), (-2001, 2, 1)]
)
def test_massive_needs_both_the_size_and_the_ratio(value, median, found):
    hidden = np.full((1, 4, 5), median, dtype=float)
    hidden[0, 2, 3] = value
    table = states.massive_activations(stage(hidden), list("abcd"))
    assert len(table) == found
    if found:
        row = table.iloc[0]
        assert (row["layer"], row["position"], row["piece"], row["dim"], row["value"]) == (
            0,
            2,
            "c",
            3,
            value,
        )
        assert row["ratio"] == pytest.approx(abs(value) / median)


def test_quantiles_are_of_the_later_tokens():
    hidden = np.zeros((1, 3, 2))
    hidden[0] = [[100, -200], [1, -2], [3, -4]]
    table = states.magnitude_quantiles(stage(hidden), (0.5, 1.0))
    assert table.loc[0].tolist() == [2.5, 4.0, 200.0]


def test_sparsity_by_counting():
    act = stage([[[0, 0, 3, 4], [0.001, 0, 0, 5]]], ("layer", "token", "neuron"))
    row = states.ffn_sparsity(act, energy=0.5).loc[0]
    assert row["zero"] == 4 / 8
    assert row["small"] == 5 / 8  # 0.001 is below 1% of 5
    assert row["needed"] == 1 / 4  # one neuron: 16 of 25, and all of the second token
    assert row["largest"] == pytest.approx((16 / 25 + 1) / 2)


def test_sparsity_of_layers_of_different_width():
    act = stage([[[1, 1, 0, 0]], [[1, 1, 1, 1]]], ("layer", "token", "neuron"))
    table = states.ffn_sparsity(act, widths=[2, 4])
    assert table["zero"].tolist() == [0, 0] and table["needed"].tolist() == [1, 1]


def test_additions_sum_to_the_stream(stream):
    assert states.sum_error(*stream)["error"].tolist() == [0, 0]
    moved = stream[1].copy()
    moved[1, 2, 0] += 0.5
    assert states.sum_error(stream[0], moved, stream[2])["error"].tolist() == [0, 0.5]


def test_a_layer_without_attention_counts_as_zero(stream):
    hidden, attention, ffn = stream
    hidden = hidden - np.concatenate(
        [np.zeros((1, 3, 2)), np.cumsum(attention.values * [[[1]], [[0]]], axis=0)]
    )
    data = states.contributions(hidden, attention.isel(layer=[1]), ffn)
    assert np.isnan(data["norm"].sel(part="attention", layer=0)).all()
    assert states.sum_error(hidden, attention.isel(layer=[1]), ffn)["error"].max() == 0


def test_contributions_relative_to_the_stream_they_meet(stream):
    data = states.contributions(*stream)
    assert data["relative"].sel(part="attention", layer=0).values[1:].tolist() == [1, 1]
    # The FFN meets the stream after attention: (0, 4) for the last token, to which (3, 0) is added.
    assert float(data["relative"].sel(part="ffn", layer=0)[2]) == pytest.approx(3 / 4)
    assert data["cosine"].sel(part="attention", layer=0).values[1:].tolist() == [0, 1]


def test_projection_reaches_one(stream):
    table = states.projection(*stream, position=2)  # (0, 2) -> (3, 4) -> (3, 3)
    assert table.attrs["embedding"] == pytest.approx(6 / 18)
    assert table["attention"].tolist() == pytest.approx([6 / 18, -3 / 18])
    assert table["ffn"].tolist() == pytest.approx([9 / 18, 0])
    assert table["cumulative"].iloc[-1] == pytest.approx(1)


def test_block_influence_is_one_minus_cosine():
    hidden = stage([[[1, 0], [1, 0], [0, 1]], [[2, 0], [0, 3], [0, 5]]])
    row = states.block_influence(hidden).loc[0]
    assert row["influence"] == pytest.approx(0.5) and row["first"] == pytest.approx(0)


def test_cka_of_rotated_and_scaled_states_is_one():
    rng = np.random.default_rng(0)
    x, other = rng.standard_normal((2, 40, 6))
    rotation = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    values = states.cka_map(stage(np.stack([x, 3 * x @ rotation + 5, other])))[0]
    assert values[0, 1] == pytest.approx(1) and values[0, 2] < 0.5
    with np.errstate(invalid="ignore"):
        assert np.isnan(states.cka_map(stage(np.stack([x, np.ones((40, 6))])))[0][0, 1])


def test_cka_equals_the_feature_form_and_leaves_the_first_token_out():
    rng = np.random.default_rng(1)
    hidden = stage(rng.standard_normal((3, 20, 5)))
    values, chance = states.cka_map(hidden)
    x, y = (hidden.values[i, 1:] - hidden.values[i, 1:].mean(0) for i in (0, 2))
    expected = np.linalg.norm(y.T @ x) ** 2 / (
        np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    )  # Kornblith, eq. 5
    assert values[0, 2] == pytest.approx(expected, rel=1e-5)
    assert values.diagonal() == pytest.approx(1)
    hidden[:, 0] += 1e6
    assert states.cka_map(hidden)[0] == pytest.approx(values)
    assert 0 < chance < 0.9


def test_cka_between_models_of_different_width():
    rng = np.random.default_rng(2)
    a, b = stage(rng.standard_normal((3, 9, 5))), stage(rng.standard_normal((2, 9, 7)))
    assert states.cka_map(a, b)[0].shape == (3, 2)


def test_patch_map_tries_every_state_at_every_position():
    def run(state, positions):
        return np.array([[0.0, 0.0], [10 * state + positions[0], 1.0]])

    shares = compare.patch_map(run, [0, 2], [1, 3, 5], (0, 1), (24.0, 0.0), progress=False)
    assert shares.sel(layer=2, position=5) == 1 and shares.sel(layer=0, position=1) == 0
    assert shares.sizes == {"layer": 2, "position": 3}
    nothing = compare.patch_map(run, [0, 2], [], (0, 1), (24.0, 0.0), progress=False)
    assert nothing.shape == (2, 0)


def test_ablations_are_of_the_blocks_that_are_there():
    edits = states.ablations([1], [0, 1])
    assert list(edits) == ["attention 1", "ffn 0", "ffn 1", "both 0", "both 1"]
    assert [(edit.stage, edit.layer) for edit in edits["both 1"]] == [
        ("attn_out", (1,)),
        ("ffn_out", (1,)),
    ]
    assert [edit.stage for edit in edits["both 0"]] == ["ffn_out"]


def test_importance_reads_the_sweep_by_name():
    hidden = stage([[[1, 0], [1, 0]], [[1, 0], [1, 1]], [[1, 0], [0, 1]]])
    names = ["attention 0", "ffn 0", "both 0", "attention 1", "ffn 1", "both 1"]
    sweep = pd.DataFrame({"loss_change": [1, 2, 3, 4, 5, 6.0]}, index=pd.Index(names, name="name"))
    table = states.layer_importance(hidden, sweep)
    assert table["both"].tolist() == [3, 6] and table["ffn"].tolist() == [2, 5]
    assert set(table.attrs["spearman"]) == {"attention", "ffn", "both"}


class Clocked:
    """A sweep that takes `start` + `each` * tokens seconds of its own clock, + `late` at first."""

    def __init__(self, start, each, late=0.0):
        self.start, self.each, self.now, self.late, self.asked = start, each, 0.0, late, []

    def __call__(self, ids, variants, progress):
        assert variants == {} and not progress
        self.now += self.start + self.each * len(ids) + self.late
        self.late = 0.0
        self.asked.append(len(ids))

    def perf_counter(self):
        return self.now


@pytest.mark.parametrize(
    "n, start, each, kept, layers, said",
    [
        (48, 0.1, 0.001, 48, range(10), ""),  # fits as it is
        (2000, 0.1, 0.0018, 2000, range(10), ""),  # 31 runs of 3.7 s
        # 31 runs of 120/31 s are 1,885 tokens
        (4000, 0.1, 0.002, 1885, range(10), "about 251 s: all layers are tried on the first 1,885"),
        # 23 runs of 5 s: the one without an edit, and 3 of each of 7 layers
        (48, 5, 0, 48, [0, 2, 3, 4, 6, 8, 9], "155 s: layers 0, 2, 3, 4, 6, 8, 9 are tried on all"),
        # Tokens first, down to 48, then layers; the first and the last are tried whatever it takes
        (500, 50, 1, 48, [0, 9], "17,050 s: layers 0, 9 are tried on the first 48 tokens"),
    ],
)
def test_a_sweep_is_what_time_allows(n, start, each, kept, layers, said, monkeypatch, capsys):
    sweep = Clocked(start, each, late=30)
    monkeypatch.setattr(budget, "time", sweep)
    variants = states.ablations(range(10), range(10))
    ids, chosen = budget.sweepable(sweep, list(range(n)), variants, seconds=120)
    assert ids == list(range(kept)) and max(sweep.asked) == n
    names = {f"{part} {layer}" for part in ("attention", "ffn", "both") for layer in layers}
    assert set(chosen) == names and all(chosen[name] is variants[name] for name in names)
    printed = capsys.readouterr().out
    assert said in printed and bool(printed) == bool(said)
    reckoned = (len(chosen) + 1) * (start + each * kept)
    assert reckoned <= 120 * 1.001 or list(layers) == [0, 9]


def test_of_a_part_of_the_layers_only_that_part_is_spoken_of():
    hidden = stage([[[1, 0], [1, 0]], [[1, 0], [1, 1]], [[1, 0], [0, 1]], [[1, 0], [0, 1]]])
    names = ["attention 0", "ffn 0", "both 0", "attention 1", "ffn 1", "both 1"]
    sweep = pd.DataFrame({"loss_change": [1, 2, 3, 4, 5, 6.0]}, index=pd.Index(names, name="name"))
    table = states.layer_importance(hidden, sweep)
    assert np.isnan(table["both"][2]) and table["influence"].idxmin() == 2
    said = " ".join(say.importance(table).split())
    assert "layer 1 costs most (+6.00" in said and "layer 0 least" in said
    assert "of 2 from the harmless end" in said and "layer 2" not in said


class Weights:
    """As much of GGUFFile as norms need."""

    architecture, metadata, norm_eps = "any", {}, 1e-5

    def __init__(self, **tensors):
        self._tensors = {
            key.replace("__", "."): np.asarray(value, dtype=np.float32)
            for key, value in tensors.items()
        }
        self.tensors = pd.DataFrame(index=list(self._tensors))

    def tensor(self, name):
        return self._tensors[name]


def capture_of(parts, **facts):
    """As much of a Capture as the measures need."""
    return type("Parts", (dict,), {"stages": tuple(parts), **facts})(parts)


def rms(x):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)


@pytest.mark.parametrize("parallel", [False, True])
def test_norm_impact_finds_weights_and_what_they_silence(stream, parallel):
    hidden, attention, ffn = (x.astype(np.float64) for x in stream)
    gain = np.array([2.0, 0.02])
    gguf = Weights(**{"blk__0__attn_norm__weight": gain, "blk__0__ffn_norm__weight": [1, 1]})
    before = hidden.values[0] if parallel else hidden.values[0] + attention.values[0]
    parts = {
        "hidden": hidden,
        "attn_out": attention,
        "ffn_out": ffn,
        "attn_norm": stage([rms(hidden.values[0]) * gain]),
        "ffn_norm": stage([rms(before)]),
    }
    table = norms.norm_impact(capture_of(parts), gguf)
    row = table.loc[("attention", 0)]
    # Tokens 1 and 2 are (1, 0) and (0, 2): gains 2 and 0.02, directions unchanged.
    assert row["cosine"] == pytest.approx(1) and row["silenced"] == pytest.approx(0.5)
    assert row["scale"] == pytest.approx((2 * np.sqrt(2) + 0.02 * np.sqrt(2) / 2) / 2, rel=1e-4)
    assert row["error"] < 1e-6 and table.loc[("ffn", 0), "error"] < 1e-6


def test_norm_without_its_tensor_has_no_gains(stream):
    hidden, attention, ffn = stream
    parts = {
        "hidden": hidden,
        "attn_out": attention,
        "ffn_out": ffn,
        "attn_norm": stage([hidden.values[0] * 7]),
    }
    table = norms.norm_impact(capture_of(parts), Weights(blk__0__attn_norm__weight=[1.0, 1.0]))
    assert (
        np.isnan(table.loc[("attention", 0), "silenced"])
        and table.loc[("attention", 0), "scale"] == 7
    )
    assert "No tensor" in say.norms(table)


def test_gains_of_dimensions_over_the_median():
    gguf = Weights(blk__0__attn_norm__weight=[1, 2, 3, -0.2, 2])
    assert norms.dimension_gains(gguf, [0, 1], [3]).loc[0, 3] == pytest.approx(0.1)


def test_align_by_position_and_by_token():
    assert compare.align([1, 2, 3], [9, 2], "position").tolist() == [[0, 0], [1, 1]]
    assert compare.align([1, 2, 3, 4], [7, 1, 2, 4], "token").tolist() == [[0, 1], [1, 2], [3, 3]]
    assert compare.align([1], [2], "token").shape == (0, 2)
    with pytest.raises(ValueError, match="position"):
        compare.align([1], [2], "piece")


def test_divergence_of_pairs():
    a = stage([[[3, 4], [1, 0]]])
    b = stage([[[9, 9], [3, 4], [0, 2]]])
    data = compare.divergence(a, b, np.array([[0, 1], [1, 2]]))
    assert data["distance"].values[0].tolist() == pytest.approx([0, np.sqrt(5) / np.sqrt(2)])
    assert data["cosine"].values[0].tolist() == [1, 0]
    with pytest.raises(ValueError, match="cka_map"):
        compare.divergence(a, stage(np.ones((1, 2, 3))), np.array([[0, 0]]))


def test_output_change_of_known_distributions():
    p, q = np.log([[0.5, 0.5]]), np.log([[0.9, 0.1]])
    row = compare.output_change(p, q, np.array([[0, 0]])).iloc[0]
    assert row["kl"] == pytest.approx(0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1), rel=1e-5)
    assert compare.output_change(p, p, np.array([[0, 0]]))["kl"][0] == 0


def test_restored_is_zero_without_and_one_with_the_source():
    assert compare.restored([-2, 1, 4], -2, 4).tolist() == [0, 0.5, 1]
    assert np.isnan(compare.restored([1, 2], 3, 3)).all()
    assert compare.answer_difference(np.array([[0, 0], [5, 2]]), (0, 1)) == 3
    assert compare.changed_positions(np.zeros((2, 3, 2)), np.eye(3)[None, :, :2]).tolist() == [0, 1]


def test_generated_tokens_are_read_where_they_were_predicted():
    tokens = pd.DataFrame(
        {
            "position": range(3),
            "id": [0, 1, 0],
            "piece": list("aba"),
            "generated": [False, True, True],
        }
    )
    logits = np.log([[0.25, 0.75], [0.5, 0.5], [0.9, 0.1]])
    best = [[[9], [1], [1]], [[0], [1], [2]]]
    data = xr.Dataset(
        {
            "entropy": (("layer", "token"), [[1.0, 2, 3], [3, 4, 5]]),
            "top": (("layer", "token", "best"), best),
        },
        {"layer": [5, 6], "position": ("token", [0, 1, 2])},
    )
    run = capture_of({"logits": logits}, tokens=tokens, n_prompt=1)
    table = compare.generation_table(run, data)
    read = data.isel(token=[0, 1])  # those that predicted something
    pd.testing.assert_frame_equal(table, compare.generation_table(run, read))
    assert table["probability"].tolist() == pytest.approx([0.75, 0.5])
    assert table["settled"].tolist() == [6, 5] and table["lens_entropy"].tolist() == [2, 3]
    assert table["entropy"][1] == pytest.approx(np.log(2))


def test_graph_has_a_node_per_layer_and_token():
    hidden = stage(np.ones((3, 4, 2)))
    hidden[1, 2] = stage(np.ones((3, 4, 2)))[0, 0] * -1
    data = xr.Dataset(
        {
            "top": (("layer", "token", "best"), np.full((3, 4, 1), 1)),
            "top_probability": (("layer", "token", "best"), np.full((3, 4, 1), 0.5)),
        }
    )
    weights = np.tril(np.ones((4, 4))) / np.arange(1, 5)[:, None]
    weights[3] = [0.1, 0.2, 0.6, 0.1]
    attention = stage(np.stack([weights, weights]), ("layer", "query", "key"))
    tokens = pd.DataFrame(
        {"position": range(4), "id": range(4), "piece": list("abcd"), "generated": [False] * 4}
    )
    run = capture_of({"hidden": hidden, "attention_mean": attention}, tokens=tokens)
    nodes, edges = graph.stream_graph(run, data, ["x", "y"], per_query=1)
    assert nodes["label"][0] == "a → y"
    assert len(nodes) == 12 and set(nodes["says"]) == {"y"} and nodes["id"].is_unique
    streams = edges[edges["kind"] == "stream"].set_index(["src", "dst"])["weight"]
    assert len(streams) == 8 and streams["0:0", "1:0"] == pytest.approx(1)
    assert (
        streams["0:2", "1:2"] == 1e-3
    )  # opposite directions: kept, with a weight that is still positive
    arrows = edges[edges["kind"] == "attention"]
    assert (
        arrows.groupby("dst")["src"].first()["1:3"] == "0:2"
    )  # the strongest key but the first and itself
    assert "12 nodes" in say.graph(nodes, edges)
    last = attention[:, 2:].assign_coords(query_position=("query", [2, 3]))
    fewer = capture_of({"hidden": hidden, "attention_mean": last}, tokens=tokens)
    pd.testing.assert_frame_equal(graph.stream_graph(fewer, data, ["x", "y"])[1], edges)


@pytest.mark.parametrize("written", [0, 1, 5])
def test_what_is_captured_of_a_long_text_is_what_is_drawn_of_it(written, capsys):
    """Also where the text ends before `generate` tokens are written."""
    stages = ("hidden", "logits", "attention_mean")
    assert graph.needed(stages, 2, 20, 5) == {} and not capsys.readouterr().out
    wanted = graph.needed(stages, 2, 20, 5, most=30)
    assert set(wanted) == {"logits", "attention_mean"}
    assert set(graph.needed(stages[:2], 2, 20, 5, most=30)) == {"logits"}
    assert "The last 10 of the prompt's 20 tokens" in capsys.readouterr().out
    run = capture_of({"hidden": stage(np.ones((3, 20 + written, 2)))}, tokens=None, n_prompt=20)
    assert set(graph.drawn(run, most=30)) <= set(wanted["logits"])


@pytest.fixture
def chosen():
    """Two layers, four tokens, two of four experts each."""
    ids = [[[0, 1], [0, 1], [0, 2], [0, 2]], [[0, 1], [2, 3], [0, 1], [2, 3]]]
    return xr.DataArray(
        np.array(ids, np.int32), dims=("layer", "token", "slot"), coords={"layer": [0, 1]}
    )


def test_load_counts_choices(chosen):
    load = routing.expert_load(chosen, 4)
    assert load.values.tolist() == [[0.5, 0.25, 0.25, 0], [0.25] * 4]


@pytest.mark.parametrize(
    "kind, values, entropy",
    [
        ("softmax", [0.5, 0.5, 0, 0], np.log(2)),
        ("sigmoid", [0.9, 0.9, 0, 0], np.log(2)),
        ("logits", [3, 3, 3, 3], np.log(4)),
    ],
)
def test_routing_entropy_of_what_the_router_gives(kind, values, entropy):
    router = stage([[values]], ("layer", "token", "expert"))
    assert float(routing.routing_entropy(router, kind)[0, 0]) == pytest.approx(entropy)


def test_kinds_of_tokens_with_experts_of_their_own(chosen):
    pieces = [" cat", "7", " dog", "8"]
    table, distance = routing.experts_by_kind(chosen.isel(layer=[1]), pieces, 4)
    assert table.loc["number"].tolist() == [0, 0, 0.5, 0.5] and table.loc["word"].tolist() == [
        0.5,
        0.5,
        0,
        0,
    ]
    assert (
        distance.loc["number", "distance"] == pytest.approx(0.5)
        and distance.loc["number", "n"] == 2
    )
    assert distance.loc["number", "expected"] < 0.5
    assert "number" in say.kinds(distance) or "word" in say.kinds(distance)


def test_routing_of_two_runs(chosen):
    other = chosen.copy()
    other[1, 0] = xr.DataArray(np.array([1, 3], np.int32), dims="slot")
    assert routing.same_experts(chosen, chosen).values.tolist() == [1, 1]
    assert routing.same_experts(chosen, other).values.tolist() == [1, 7 / 8]


def test_routing_sentence_names_the_busiest(chosen):
    entropy = xr.DataArray(
        np.array([[1.0] * 4, [0.5] * 4]), dims=("layer", "token"), coords={"layer": [0, 1]}
    )
    said = say.routing(routing.expert_load(chosen, 4), entropy)
    assert (
        "expert is 0 of layer 0 with 50%" in said
        and "1 of 8 experts" in said
        and "in layer 1 (entropy 0.50" in said
    )


def shares(values, layers, positions):
    coords = {"layer": layers, "position": positions}
    return xr.DataArray(values, coords, dims=("layer", "position"))


def test_sentences_say_what_the_numbers_say(stream):
    table = states.norm_table(stream[0])
    assert "first token" in say.lengths(table)
    empty = states.massive_activations(stream[0], list("abc"))
    assert say.magnitudes(states.magnitude_quantiles(stream[0]), empty).startswith("No value")
    said = say.contributions(states.contributions(*stream))
    assert "attention adds most in layer 0" in said and "ffn adds most in layer 1" in said
    said = say.projection(states.projection(*stream, position=2), "c")
    assert "attention writes 17%" in said and "ffn of layer 0 (50%)" in said
    said = say.patches(shares([[0, 0.9], [0.2, 0.1]], [0, 4], [1, 2]), ["a", "b", "c"])
    assert "0.90, at state 0 and position 2 'c'" in said and "position 2 'c': state 0." in said
    said = say.patches(shares([[0.9], [0.8]], [0, 4], [1]), ["a", "b", "c"])
    assert "position 1 'b': states 0 to 4." in said


def test_measures_of_a_long_text_need_no_second_copy_of_it():
    """norms, magnitudes, outliers, Block Influence and CKA in double precision state by state:
    2,000 tokens of an 8B model were 2.1 GB of doubles each."""
    import tracemalloc

    hidden = np.random.default_rng(0).normal(size=(12, 500, 256)).astype(np.float32)  # 6.1 MB
    hidden[3, 4, 5] = 5000
    hidden = xr.DataArray(hidden, dims=("layer", "token", "embd"))
    tracemalloc.start()
    states.norm_table(hidden), states.magnitude_quantiles(hidden), states.block_influence(hidden)
    found = states.massive_activations(hidden, ["a"] * 500)
    states.contributions(hidden, layered(hidden[1:]), layered(hidden[1:]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found[["layer", "position", "dim"]].to_numpy().tolist() == [[3, 4, 5]]
    assert peak < hidden.nbytes * 0.9, f"{peak / hidden.nbytes:.2f} times the states"


def layered(values):
    return values.assign_coords(layer=np.arange(len(values)))


@pytest.mark.parametrize("elements", [1, 3000, 1 << 24])
def test_cka_by_rows_is_that_of_whole_matrices(monkeypatch, elements):
    rng = np.random.default_rng(1)
    one, other = rng.normal(size=(3, 40, 7)), rng.normal(size=(4, 40, 9)) + 3
    monkeypatch.setattr(states, "CKA_ELEMENTS", elements)
    dims = ("layer", "token", "embd")
    found, chance = states.cka_map(xr.DataArray(one, dims=dims), xr.DataArray(other, dims=dims))

    def gram(h):
        h = h[1:] - h[1:].mean(axis=0)
        return h @ h.T / np.linalg.norm(h @ h.T)

    expected = [[(gram(a) * gram(b)).sum() for b in other] for a in one]
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    order = np.random.default_rng(0).permutation(39)
    shuffled = [(gram(a) * gram(a)[order][:, order]).sum() for a in one]
    assert chance == pytest.approx(np.mean(shuffled))
