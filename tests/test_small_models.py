"""Nothing is taken for granted: one layer, one head, one category, two equal answers, a constant
column. "None" is a finding, a quotient over nothing is not."""

import re
from pathlib import Path

import hostile
import models
import nbformat
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import xarray as xr
from models import tiny_model

from llamatelemetry.attention import say as attention_says
from llamatelemetry.backend import get_backend
from llamatelemetry.embeddings import groups
from llamatelemetry.embeddings import say as embeddings_sentences
from llamatelemetry.files.gguf import GGUFFile
from llamatelemetry.heads import figures, importance_figures, similarity
from llamatelemetry.heads import importance as heads_importance
from llamatelemetry.heads import profile as heads
from llamatelemetry.heads import say as heads_say
from llamatelemetry.layers import compare, say, states
from llamatelemetry.layers import figures as layer_figures
from llamatelemetry.maths import rank_correlation, ratio
from llamatelemetry.quantization import cache, inside, quality_figures, tracing
from llamatelemetry.quantization import figures as quantization_figures
from llamatelemetry.quantization import say as quantization_words
from llamatelemetry.tools.notebooks import run_notebook
from llamatelemetry.views import theme
from llamatelemetry.views.sentences import some
from llamatelemetry.views.text import counted

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
NO_NUMBER = re.compile(r"(?<![\w.])[-+±]?(nan|inf)(?![\w])", re.IGNORECASE)


# Quotients


def test_a_ratio_is_given_where_its_whole_stands_out_of_its_noise():
    assert ratio(1, 4) == 0.25 and ratio(1, -4, noise=3) == -0.25
    assert np.isnan(ratio(1, 0)) and np.isnan(ratio(1, 0.5, noise=0.5))
    np.testing.assert_array_equal(ratio([1, 2, 3], [2, 0, 4]), [0.5, np.nan, 0.75])
    assert [counted(n, "head") for n in (0, 1, 2)] == ["0 heads", "1 head", "2 heads"]
    assert some(0.5, "{:.0%}") == "50%" and some(np.nan, "{:.0%}", "none") == "none"


@pytest.mark.parametrize(
    "a, b, rho",
    [
        ([1, 2, 3, 4], [1, 2, 4, 9], 1.0),
        ([1, 2, 3], [3, 2, 1], -1.0),
        ([1, 2, np.nan, 3], [1, 2, 9, 3], 1.0),
        ([1, 2], [1, 2], None),
        ([1, 1, 1], [1, 2, 3], None),
        ([], [], None),
    ],
)
def test_rank_correlation_needs_an_order(a, b, rho):
    found = rank_correlation(a, b)
    assert np.isnan(found) if rho is None else found == pytest.approx(rho)


def test_two_prompts_with_one_answer_restore_nothing():
    """The shares were -311 to 255 of a gap of a thousandth of a logit."""
    logits = np.array([[0.0, 5.0, 4.0]], np.float32)
    assert compare.answers(logits, logits) == (1, 2)
    assert compare.answers(logits, np.array([[9.0, 5.0, 4.0]])) == (1, 0)
    shares = compare.restored([0.2, -0.3, 0.0], 1.000, 1.001)
    assert np.isnan(shares).all()
    coords = {"layer": [0, 1, 2], "position": [0]}
    tried = xr.DataArray(shares[:, None], coords, dims=("layer", "position"))
    said = say.patches(tried, ["a"])
    assert "No share is given" in said and not NO_NUMBER.search(said)
    np.testing.assert_allclose(compare.restored([1.0, 2.0], 0.0, 4.0), [0.25, 0.5])
    assert np.isnan(compare.restored([1.0], 0.0, 4.0, noise=4.5)).all()  # what the kernels round
    both = say.answers(["a", "b"], (1.0, 1.1))
    assert "Both prompts' best token is 'a'" in both
    assert "Both" not in say.answers("ab", (1.0, -1.0))


def test_the_runs_of_one_model_say_the_same(engine):
    """Patching between prompts that share their answer, on the real model, as notebook 14 does
    it."""
    first, second = (
        engine.tokenize(text)["id"]
        for text in ("Monday, Tuesday, Wednesday,", "Sunday, Tuesday, Wednesday,")
    )
    a, b = (engine.capture(ids, stages="logits").logits for ids in (first, second))
    pair = compare.answers(a, b)
    source, target = (compare.answer_difference(x, pair) for x in (a, b))
    assert a.values[-1].argmax() == b.values[-1].argmax() and abs(source - target) < 0.05
    assert np.isnan(compare.restored([source], target, source)).all()


def test_a_divergence_of_nothing_has_no_shares():
    base = np.zeros((3, 5), np.float32)
    table = tracing.fall_map(lambda part, layer: base, base, 1, progress=False)
    assert table["share"].isna().all() and "nothing to give back" in quantization_words.falls(table)
    costs = tracing.cost_map(lambda part, layer: base, base, 1, progress=False)
    assert "No part costs anything" in quantization_words.costs(costs, 0.0)


def test_states_that_do_not_vary_are_like_nothing():
    hidden = xr.DataArray(
        np.ones((2, 4, 3), np.float32), dims=("layer", "token", "embd"), coords={"layer": [0, 1]}
    )
    values, chance = states.cka_map(hidden)
    assert np.isnan(values).all()
    assert not NO_NUMBER.search(say.similarity(values, chance))
    drift = inside.hidden_drift(hidden * 0, hidden * 0)
    assert drift["error"].isna().all()


def test_one_text_gives_no_interval_no_label_and_no_stability():
    data = xr.Dataset(
        {
            "sink": (("text", "layer", "head"), np.full((1, 1, 2), 0.9)),
            "sink~": (("text", "shuffle", "layer", "head"), np.full((1, 3, 1, 2), 0.1)),
        },
        {"text": ["one"], "layer": [0], "head": [0, 1]},
    )
    profiled = heads.profile(data, n_boot=5)
    assert (
        (profiled["value"] == 0.9).all()
        and profiled["low"].isnull().all()
        and profiled["high"].isnull().all()
    )
    earned = heads.labels(profiled)
    assert not earned.any()
    counts, table = heads.label_counts(earned, profiled), heads.head_table(profiled, earned)
    said = heads_say.baselines(counts, table, 0.1)
    assert "One text gives no interval" in said and "No head is" not in said
    assert len(figures.measures(profiled, ["sink"], title="m").data) == 1
    distance = np.array([[0, 0.1, 0.9], [0.1, 0, 0.9], [0.9, 0.9, 0]])
    rand, jaccard = similarity.stability(distance[None] ** 2, [1], np.array([0, 0, 1]), n_boot=3)
    assert np.isnan(rand).all() and jaccard.isna().all()
    said = heads_say.clusters(np.array([0, 0, 1]), 0.5, rand, jaccard)
    assert "One text cannot say" in said and not NO_NUMBER.search(said)


def test_four_heads_are_too_few_for_an_interval_of_their_ranks():
    """Of four heads one order in twelve agrees wholly: resampled, it gave an interval of 1 to 1."""
    table = pd.DataFrame({"entropy": [1.0, 2, 3, 4], "kl": [0.1, 0.2, 0.3, 0.4]})
    found = heads_importance.relations(table, ["entropy"])
    assert found[["rho", "low", "high"]].isna().all(axis=None)
    assert "No relation can be seen" in heads_say.relations(found)


# No variety


def distance_of(n, seed=0):
    points = np.random.default_rng(seed).normal(size=(n, 5))
    distance = np.sqrt(((points[:, None] - points) ** 2).sum(-1))
    return distance / max(distance.max(), 1e-9)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 9])
@pytest.mark.parametrize("wanted", [8, 2, 1, None])
def test_clusters_of_few_heads(n, wanted):
    distance, names = distance_of(n), [(0, head) for head in range(n)]
    labels, silhouette = similarity.cluster(distance, wanted)
    assert len(labels) == n and np.isfinite(silhouette) == (n > 2 and wanted != 1)
    rand, jaccard = similarity.stability(distance[None] ** 2, [1], labels, n_boot=3)
    coordinates, drawn = similarity.maps(distance, get_backend("cpu"))
    assert len(drawn) == 1 and "nan" not in str(list(drawn))
    assert coordinates.shape[1] >= 2 and np.isfinite(coordinates).all()
    assert sorted(similarity.order_of(distance)) == list(range(n))
    assert len(similarity.dense_groups(get_backend("cpu"), coordinates)) == n
    pairs = similarity.closest_pairs(distance, names)
    table = pd.DataFrame({"layer": 0, "head": range(n), "cluster": labels})
    _, links = similarity.links(table, table.assign(loss_change=0.0), distance)
    curve = similarity.cover_curve(distance, [0.1, 0.5])
    said = [
        heads_say.clusters(labels, silhouette, rand, jaccard),
        heads_say.cover(pairs, curve, n, None),
        heads_say.distances(*similarity.layer_distances(distance, names)),
        heads_say.links(links),
    ]
    assert not NO_NUMBER.search(" ".join(said)), said
    if n == 1:
        assert (
            np.isnan(similarity.uniqueness(distance)).all()
            and "one head" in said[1]
            and "one head" in said[2]
        )


def test_sentences_of_one_head():
    one = pd.DataFrame(
        {
            "layer": [0],
            "head": [0],
            "loss_change": [-0.1],
            "error": [np.nan],
            "kl": [0.2],
            "entropy": [1.0],
            "zero": [-0.1],
            "mean": [0.3],
        }
    )
    relations = heads_importance.relations(one, ["entropy"])
    assert relations["rho"].isna().all()
    said = [
        heads_say.importance(one, 3.0, heads_importance.population(one["loss_change"], 1)),
        heads_say.relations(relations),
        heads_say.both_ways(one),
        heads_say.side_by_side({}),
    ]
    assert not NO_NUMBER.search(" ".join(said)), said
    assert (
        "No head costs anything" in said[0] and "too few" in said[1] and "none to show" in said[3]
    )
    empty = figures.side_by_side(None, {}, ["a", "b"], title="tiny")
    assert empty.layout.annotations[0].text == "no head to show"


def test_sentences_of_one_layer():
    depth = pd.DataFrame({"spearman with layer": [np.nan], "peak layer": [0.0]}, index=["sink"])
    heads = pd.DataFrame(
        {"layer": [0], "head": [0], "entropy_normalised": [0.5], "distance": [2.0]}
    )
    nodes = pd.DataFrame(
        {"id": ["0:0", "1:0"], "layer": [0, 1], "probability": [0.1, 0.9], "says": ["a", "b"]}
    )
    edges = pd.DataFrame({"kind": ["stream"], "src": ["0:0"], "dst": ["1:0"], "weight": [1.0]})
    importance = pd.DataFrame({"influence": [0.1], "both": [0.2]})
    importance.attrs["spearman"] = {"both": np.nan}
    correlations = pd.DataFrame(np.nan, *[["weight_error", "drift_added", "cost", "fall"]] * 2)
    said = [
        heads_say.depth(depth, None),
        attention_says.depth_profile(heads),
        say.graph(nodes, edges),
        say.importance(importance),
        quantization_words.together(correlations, 1),
    ]
    assert not NO_NUMBER.search(" ".join(said)), said
    assert "no state between" in said[2] and "only layer" in said[1] and "only layer" in said[3]
    assert not re.search("broadest|farthest|costs most|rises most", " ".join(said))


def test_rollout_may_never_pass_one_half():
    said = attention_says.rollout([[0.1, 0.2, 0.7]], ["a", "b", "c"])
    assert "never passes one half and ends at 0.100. After" in " ".join(said.split())
    said = attention_says.rollout([[0.1, 0.9], [0.6, 0.4]], ["a", "b"])
    assert "passes one half after layer 1 and ends" in " ".join(said.split())


@pytest.mark.parametrize("n, step", [(1, 1), (2, 1), (7, 1), (8, None), (30, None)])
def test_axes_that_count_have_no_ticks_between_whole_numbers(n, step):
    assert theme.whole(range(n)).get("dtick") == step and theme.whole(["0 a"] * n) == {}
    figure = theme.heatmap(
        np.ones((n, 2)), ["a", "b"], list(range(n)), title="", x_title="", y_title="", unit=""
    )
    assert figure.layout.yaxis.dtick == step and figure.layout.xaxis.dtick is None
    table = pd.DataFrame({"low": 1.0, "median": 20.0, "high": 30.0, "first": 500.0}, index=range(n))
    assert layer_figures.lengths(table, title="").layout.xaxis.dtick == step


@pytest.mark.parametrize(
    "values, step",
    [([2.0, 500.0], 1), ([0.2, 1.1, 9.0], "D2"), ([0.99, 1.01], None), ([0.0, np.nan], None)],
)
def test_a_log_axis_of_less_than_two_decades_is_labelled_between_them(values, step):
    figure = go.Figure(go.Scatter(y=values))
    assert theme.decades(figure).layout.yaxis.dtick == step and figure.layout.yaxis.type == "log"


def test_one_layer_and_one_head_can_be_seen():
    profile = xr.Dataset(
        {"value": (("measure", "layer", "head"), [[[0.5]]])},
        {"measure": ["sink"], "layer": [0], "head": [0]},
    )
    assert {trace.mode for trace in figures.depth(profile, ["sink"], title="tiny").data[1:]} == {
        "markers"
    }
    assert figures.distances(np.zeros((1, 1)), [0], ["L0H0"], title="tiny").data[0].zmax == 1
    assert figures.side_by_side(None, {}, ["a"], title="tiny").layout.xaxis.visible is False


def test_a_table_shows_no_nan():
    frame = pd.DataFrame(
        {
            "kept": [2.0, np.nan],
            "rho": [0.5, np.nan],
            "head": ["L0H0", None],
            "n": [1, 2],
            "peak": 24.0,
        },
        index=["sink", "top"],
    )
    shown = theme.dashes(frame)
    assert shown.loc["top"].tolist() == ["–", "–", "–", 2, 24] and shown.loc["sink"].tolist() == [
        2,
        0.5,
        "L0H0",
        1,
        24,
    ]
    assert (
        str(shown.loc["sink", "peak"]) == "24"
        and not NO_NUMBER.search(shown.to_html())
        and frame["rho"].isna().any()
    )


def test_files_that_do_not_differ():
    same = pd.DataFrame(
        {
            "layer": [0],
            "head": [0],
            "js_distance": [0.0],
            "max_difference": [0.0],
            "top_moved": [0.0],
            "top_shift": [np.nan],
        }
    )
    assert "no weight of any head differs" in attention_says.changes(same, "a", "b").replace(
        "\n", " "
    )
    before = pd.Series({"kld_mean": 0.1, "size_bytes": 2**20}, name="a")
    chosen = pd.Series({"kld_mean": 0.05, "size_bytes": 2**21}, name="b")
    pairs = pd.DataFrame({"better": ["no"]}, pd.MultiIndex.from_tuples([("a", "b")]))
    said = quantization_words.mixture(before, chosen, before, pairs).replace("\n", " ")
    assert "recommendation holds" in said and "No other part is left" in said
    assert "nothing to keep" in quantization_words.mixture(before, before, before, pairs)


def nothing_of_heads():
    """Where no head earns a label, none was ablated, and no measure was made."""
    values = {
        name: (("measure", "layer", "head"), np.zeros((0, 2, 2))) for name in ("value", "low")
    }
    values |= {name: values["value"] for name in ("high", "baseline", "baseline_high")}
    profiled = xr.Dataset(
        values, {"measure": np.array([], object), "layer": [0, 1], "head": [0, 1]}
    )
    empty = np.zeros((0, 2, 2), bool)
    coords = {"label": np.array([], object), "layer": [0, 1], "head": [0, 1]}
    earned = xr.DataArray(empty, coords, ("label", "layer", "head"))
    lost = pd.DataFrame(columns="layer head loss_change error kl zero mean".split(), dtype=float)
    pruned = pd.DataFrame(columns="order repeat removed loss_change".split(), dtype=float)
    compared = heads.compare(profiled, profiled, earned, earned)
    related = heads_importance.relations(lost, [])
    table = pd.DataFrame({"labels": ["none"] * 4})
    figures_of = [
        figures.measures(profiled, [], title="t"),
        figures.baselines(profiled, earned, title="t"),
        figures.depth(profiled, [], title="t"),
        figures.survival(compared, "a", "b", title="t"),
        figures.side_by_side(None, {}, [], title="t"),
        figures.clusters(lost, {}, title="t"),
        figures.distances(np.zeros((0, 0)), [], [], title="t"),
        importance_figures.importance(lost, title="t"),
        importance_figures.relations(related, "x", title="t"),
        importance_figures.both_ways(lost, title="t"),
        importance_figures.pruning(pruned, 0, title="t"),
    ]
    said = [
        heads_say.texts([]),
        heads_say.measures(profiled, []),
        heads_say.baselines(heads.label_counts(earned, profiled), table, 0.1),
        heads_say.depth(heads.by_depth(profiled), earned),
        heads_say.survival(compared, "a", "b"),
        heads_say.importance(lost, 3.0, {}),
        heads_say.relations(related),
        heads_say.both_ways(lost),
        heads_say.pruning(pruned, None, 0, 0.1),
        heads_say.typical(profiled, pd.DataFrame(), 0, 0),
    ]
    return figures_of, said


def nothing_of_files():
    """Where no file could be measured, and nothing in it moved."""
    file = pd.DataFrame(columns="kld_mean bits_per_weight size_bytes".split(), dtype=float)
    file = file.assign(memory_bytes=0.0, token_bytes=0.0, weights="", cache_k="", cache_v="")
    costs = pd.DataFrame(columns="part layer cost fall share".split(), dtype=float)
    costs.attrs["kld"] = 0.0
    matrix = pd.DataFrame({"layer": [np.nan], "group": "token_embd", "error": [np.nan]})
    moved = xr.DataArray(np.full((1, 2), np.nan), dims=("layer", "head"))
    columns = ["weight_error", "drift_added", "cost", "fall"]
    layer = pd.DataFrame(columns=columns, dtype=float)
    kinds = pd.DataFrame()
    figures_of = [
        quality_figures.ladder(file, title="t"),
        quality_figures.percentiles(file, title="t"),
        quality_figures.token_kinds(kinds, "piece", title="t"),
        quality_figures.cache(file, 512, title="t"),
        quantization_figures.weight_errors({"a": matrix}, "a", title="t"),
        quantization_figures.attention({"a": moved}, "a", title="t"),
        quantization_figures.drift({}, title="t"),
        quantization_figures.embeddings({}, title="t"),
        quantization_figures.costs(costs, title="t"),
        quantization_figures.falls(costs, title="t"),
        quantization_figures.together(layer, title="t"),
        quantization_figures.pareto(file, {}, title="t"),
    ]
    said = [
        quantization_words.ladder(file, "r"),
        quantization_words.percentiles(file),
        quantization_words.noise(file, file, 1e-5),
        quantization_words.better(pd.DataFrame(), file),
        quantization_words.cache(cache.crossover(file), cache.turning(file), 512),
        quantization_words.token_kinds(kinds, "piece"),
        quantization_words.weight_errors({"a": matrix}),
        quantization_words.attention({"a": moved.assign_coords(layer=[0], head=[0, 1])}),
        quantization_words.costs(costs, 0.0),
        quantization_words.falls(costs),
        quantization_words.together(inside.rank_correlations(layer), 0),
        quantization_words.answers([]),
    ]
    return figures_of, said


@pytest.mark.parametrize("make", [nothing_of_heads, nothing_of_files])
def test_nothing_is_said_and_drawn_as_nothing(make):
    figures_of, said = make()
    for figure in figures_of:
        assert len(figure.layout.annotations) == 1 and not figure.data
        assert figure.layout.annotations[0].text.startswith("no ")
    assert all(said) and not NO_NUMBER.search(" ".join(said)), said


def test_one_category_is_nothing_to_agree_with():
    points = np.random.default_rng(0).normal(size=(12, 6)).astype(np.float32)
    near = np.argsort(((points[:, None] - points) ** 2).sum(-1), 1)[:, 1:4]
    labels = {"k-means": np.arange(12) % 2}
    table = groups.cluster_agreement(points, labels, ["colours"] * 12, near, rounds=5)
    said = embeddings_sentences.agreement(table)
    assert not NO_NUMBER.search(said) and "of one category" in said and "Rand index" not in said


def test_two_tokens_and_a_constant_rank():
    table = pd.DataFrame(
        {
            "position": [0, 1],
            "piece": ["a", "b"],
            "received": [1.0, 0.0],
            "pagerank": [0.5, 0.5],
            "betweenness": [0.0, 0.0],
        }
    )
    said = " ".join(attention_says.centrality(table).split())
    assert not NO_NUMBER.search(said) and said.count("not to be had") == 2
    flow = " ".join(attention_says.token_bars([0.5, 0.5], [0.5, 0.5], ["a", "b"]).split())
    assert not NO_NUMBER.search(flow) and "mean attention: not to be had" in flow


# The notebooks

PARAMETERS = {
    "12": {},
    "13": {"SAMPLE": 300},
    "14": {},
    "15": {},
    "16": {},
}


@pytest.fixture(scope="module", params=[1, 2], ids=["1 x 1", "2 x 2"])
def small(request, tmp_path_factory, smollm2, llama_server):
    """A random model of as many layers and heads, with a vocabulary of whole words. The second has
    markup for a name, the file's and the model's."""
    n, plain = request.param, models.metadata
    with pytest.MonkeyPatch.context() as patch:
        if n == 2:
            named = {"general.name": hostile.NAME}
            patch.setattr(models, "metadata", lambda *args: plain(*args) | named)
        path = tiny_model(
            "llama",
            tmp_path_factory.mktemp(f"small{n}"),
            vocabulary=GGUFFile(smollm2),
            n_layer=n,
            n_head=n,
            n_kv_head=n,
            head_dim=64 // n,
            n_ctx=2048,
        )
    return path if n == 1 else path.rename(path.with_name(f"{hostile.FILE}.gguf"))


def marked_up(output):
    """Texts of an output in which a part of the hostile names is markup."""
    if output.output_type == "stream" or "data" not in output:
        return []

    def texts(part):
        if isinstance(part, (dict, list)):
            for each in part.values() if isinstance(part, dict) else part:
                yield from texts(each)
        elif isinstance(part, str):
            yield part

    found = []
    for kind, data in output.data.items():
        if kind in hostile.MARKUP:
            drawn = [data["data"], data["layout"]] if "plotly" in kind else data
            # Plotly's own HTML has its figure in a script, as JSON
            shown = [text for text in texts(drawn) if "Plotly.newPlot" not in text]
            marks = hostile.MARKUP[kind]
            found += [(mark, text[:300]) for text in shown for mark in marks if mark in text]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", PARAMETERS)
def test_a_notebook_passes_on_a_small_model_and_says_only_what_is_so(small, number, tmp_path):
    path = next(NOTEBOOKS.glob(f"{number}-*.ipynb"))
    parameters = {"MODEL": str(small), "OUTPUT_DIR": str(tmp_path / "out"), **PARAMETERS[number]}
    executed = nbformat.read(run_notebook(path, tmp_path, parameters, progress=False), 4)
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    said = "\n".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")
    assert len(said) > 1000 and not NO_NUMBER.search(said), NO_NUMBER.findall(said)
    assert [found for output in outputs for found in marked_up(output)] == []
    tables = [
        output.data.get("text/html", "") for output in outputs if output.output_type != "stream"
    ]
    assert not re.search(r"<td[^>]*>(nan|&lt;NA&gt;)</td>", "".join(tables), re.IGNORECASE)
