"""Figures and sentences of notebook 16 from hand-made tables: they say what the numbers say, and
escape text."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from llamatelemetry.compare.quality import summarize
from llamatelemetry.convert.reckoning import Ladder
from llamatelemetry.quantization import cache, contents, figures, page, quality_figures, say
from llamatelemetry.quantization.graph import graph_tables


def quality(**klds):
    """A table with these mean KLDs; bits per weight rise with the place in the list."""
    rng = np.random.default_rng(0)
    rows = {}
    for i, (name, kld) in enumerate(klds.items()):
        tokens = pd.DataFrame(
            {"window": np.repeat([0, 1], 50), "logprob_base": -rng.random(100), "kld": kld}
        )
        tokens["logprob"], tokens["dp"], tokens["same_top"] = (
            tokens["logprob_base"] - kld,
            -kld / 10,
            True,
        )
        rows[name] = summarize(tokens) | {"bits_per_weight": 3.0 + i}
    return pd.DataFrame.from_dict(rows, orient="index")


def weights(value):
    index = [
        "blk.0.attn_q.weight",
        "blk.1.attn_q.weight",
        "blk.1.ffn_up.weight",
        "token_embd.weight",
    ]
    return pd.DataFrame(
        {
            "layer": pd.array([0, 1, 1, None], dtype="Int64"),
            "group": ["attn_q", "attn_q", "ffn_up", "embedding"],
            "type": ["Q4_K", "Q5_0", "Q4_K", "Q8_0"],
            "n_elements": 4,
            "error": [value, 2 * value, value, value / 5],
        },
        index=pd.Index(index, name="name"),
    )


def drift(value):
    return pd.DataFrame(
        {
            "error": [0, value, 3 * value],
            "cosine": [1, 0.99, 0.9],
            "error_first": 0.0,
            "cosine_first": 1.0,
        },
        index=pd.RangeIndex(3, name="layer"),
    )


def test_the_ladder_is_drawn_and_told():
    table = quality(low=1.0, middle=0.1, high=0.2)
    said = say.ladder(table, "m, a stand-in").replace("\n", " ")
    assert (
        said.startswith("Mean KLD: middle (0.1 ± ") and "closest to m, a stand-in, low (1 ±" in said
    )
    assert said.endswith("More divergence in spite of more bits: high than middle.")
    assert say.ladder(quality(low=1.0, high=0.2), "m").endswith("more bits: none.")
    figure = quality_figures.ladder(table, title="m")
    assert [t.y[0] for t in figure.data] == pytest.approx([1.0, 0.1, 0.2]) and [
        t.x[0] for t in figure.data
    ] == [
        3,
        4,
        5,
    ]
    one_window = table.assign(kld_mean_low=np.nan, kld_mean_high=np.nan)
    assert quality_figures.ladder(one_window, title="m").data[0].error_y.array[0] == 0
    assert len(quality_figures.percentiles(table, title="m").data) == 3
    assert "1.0 times the median" in say.percentiles(table)


def test_a_file_that_failed_is_left_out():
    table = quality(good=0.1, bad=0.2)
    table.loc["bad", table.columns != "bits_per_weight"] = np.nan
    assert len(quality_figures.ladder(table, title="m").data) == 1 and "bad" not in say.ladder(
        table, "m"
    )


def test_every_file_keeps_its_colour():
    table = quality(a=1.0, b=0.1)
    chosen = figures.colors(["a", "b"])
    assert [t.marker.color for t in quality_figures.ladder(table, title="m").data] == list(
        chosen.values()
    )
    assert [t.line.color for t in quality_figures.percentiles(table, title="m").data] == list(
        chosen.values()
    )


def test_menus_show_one_file():
    errors = {"a": weights(0.01), "b": weights(0.1)}
    maps = {
        name: xr.DataArray(np.full((2, 3), v), dims=("layer", "head"), coords={"layer": [0, 1]})
        for name, v in (("a", 0.1), ("b", 0.0))
    }
    for figure in (
        figures.weight_errors(errors, "b", title="m"),
        figures.attention(maps, "b", title="m"),
    ):
        assert [t.visible for t in figure.data] == [False, True]
        buttons = figure.layout.updatemenus[0].buttons
        assert [b.label for b in buttons] == ["a", "b"]
        assert buttons[1].args[0]["visible"] == [False, True]
        assert figure.layout.updatemenus[0].active == 1
        # In two lines, too, the title ends above the menu, which ends above the plot.
        assert figure.layout.title.yanchor == "top" and figure.layout.margin.t >= 14 + 40 + 41
        # Also where the divergence is exactly 0.
        assert np.isfinite([t.z[0, 0] for t in figure.data]).all()
    assert figures.weight_errors(errors, "b", title="m").data[0].customdata[0, 0] == 0.01
    said = say.weight_errors(errors).replace("\n", " ")
    assert said.endswith("b: mean 0.1333, worst blk.1.attn_q.weight (Q5_0, 0.2000).")
    assert "most in layer 0 head 0 (0.1000)" in say.attention(maps)
    one = xr.DataArray([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], dims=("layer", "head"))
    one = one.assign_coords(layer=[0, 1], head=[0, 1, 2])
    (drawn,) = figures.attention(
        {"a": one}, "a", title="m"
    ).data  # as notebooks 12 and 15 have heads
    assert drawn.customdata[2][1] == 0.6 and list(drawn.x) == [0, 1] and list(drawn.y) == [0, 1, 2]


def test_drift_is_told_by_the_layer_that_adds_it():
    assert "layer 1 adds most (+0.200)" in say.drift({"a": drift(0.1)})
    figure = figures.drift({"a": drift(0.1)}, title="m")
    assert len(figure.data) == 4 and figure.data[1].y[2] == pytest.approx(0.1)  # 1 - cosine


def test_parts():
    costs = pd.DataFrame(
        [("attn_out", 0, 0.3), ("ffn_out", 0, 0.1)], columns=["part", "layer", "cost"]
    )
    said = say.costs(costs, 0.8).replace("\n", " ")
    assert said.startswith(
        "Most costs the attention of layer 0 (0.3) and the FFN of layer 0 (0.1)."
    )
    assert said.endswith("The 2 costs add up to 0.4 nats, 50% of the 0.8 of the whole file.")
    falls = pd.DataFrame(
        [("attn_out", 0, 0.3, 0.6), ("ffn_out", 0, -0.1, -0.2)],
        columns=["part", "layer", "fall", "share"],
    )
    falls.attrs["kld"] = 0.5
    said = say.falls(falls).replace("\n", " ")
    assert "the attention of layer 0 (60.0%)" in said and "At 1 of 2 parts" in said
    figure = figures.falls(falls, title="m")
    assert [(t.name, t.y[0]) for t in figure.data] == [("attention", 0.3), ("FFN", -0.1)]


@pytest.mark.parametrize(
    "closer, control, said",
    [
        (("no", "yes"), 102, "The recommendation holds: 2.0 MiB more"),
        (("yes", "yes"), 102, "The recommendation does not hold: 2.0 MiB more"),
        (("no", "cannot be told"), 102, "Whether the recommendation holds cannot be told"),
        (("equal", "yes"), 102, "not told apart from it: Q4."),
        (("no", "cannot be told"), 100, "The recommendation holds: 2.0 MiB more"),
    ],
)
def test_the_verdict_on_the_mixture_is_that_of_paired_intervals(closer, control, said):
    sizes = {"Q4": 100, "mixture": 102, "control": control}
    rows = [
        pd.Series({"kld_mean": 0.05, "size_bytes": size * 2**20}, name=name)
        for name, size in sizes.items()
    ]
    index = pd.MultiIndex.from_tuples([("Q4", "mixture"), ("mixture", "control")])
    told = " ".join(say.mixture(*rows, pd.DataFrame({"better": closer}, index)).split())
    assert said in told and ("No other part is left" in told) == (control == 100)


def test_no_direction_is_told_between_equal_values():
    """Candidates that are the reference, files of one size, heads and layers without a change."""
    same = quality(a=0.0, b=0.0)
    assert "the same for all files, a (0" in say.ladder(same, "m")
    level = quality(a=0.1, b=0.2).assign(bits_per_weight=4.0)
    assert say.ladder(level, "m").endswith("more bits: none.")
    few = quality(a=0.1, b=0.2).assign(n_tokens=10)  # whose error is not known
    assert "±" not in say.ladder(few, "m")
    assert "could" in say.noise(same * np.nan, same, 1e-5)
    assert "reference is where it was" in say.noise(same, same, 1e-5)
    assert "No file was measured" in say.noise(quality(x=0.1), same * np.nan, 0.1)
    assert "no matrix of a layer has an error" in say.weight_errors({"a": weights(0.0)})
    flat = xr.DataArray(np.zeros((2, 3)), dims=("layer", "head"), coords={"layer": [0, 1]})
    assert "no head's attention differs" in say.attention({"a": flat})
    assert "no layer adds to it" in say.drift({"a": drift(0.0)})
    falls = pd.DataFrame({"part": ["attn_out"], "layer": 0, "fall": [-0.1], "share": [-0.2]})
    falls.attrs["kld"] = 0.5
    assert "At no part does the divergence fall" in say.falls(falls)
    costs = pd.DataFrame({"part": ["attn_out", "ffn_out"], "layer": 0, "cost": [0.3, -0.1]})
    said = " ".join(say.costs(costs, 0.8).split())
    assert said.startswith("Most costs the attention of layer 0 (0.3). The 2 costs add")


def test_answers_are_escaped_and_marked():
    rows = [
        {
            "prompt": "<b>",
            "answers": {"reference": ([" a", "<i>"], None), "x": ([" a", "</td>"], 1)},
        }
    ]
    html = page.answers(rows, model="<m>").html
    assert "<mark>&lt;/td&gt;</mark>" in html and "&lt;b&gt;" in html and "<i>" not in html
    assert say.answers(rows).endswith("differ from the reference's: 1 of x.")


def test_the_mark_covers_the_whole_character_of_a_token():
    pizza = "🍕".encode()
    pieces = [" a", pizza[:2], pizza[2:], "<b>", "", pizza[:1]]
    for first, marked in (
        (0, " a"),
        (1, "🍕"),
        (2, "🍕"),
        (3, "&lt;b&gt;"),
        (4, "&#8203;"),
        (5, "\ufffd"),
    ):
        html = page.answers([{"prompt": "p", "answers": {"x": (pieces, first)}}], model="m").html
        assert html.count("<mark>") == 1 and f"<mark>{marked}</mark>" in html
        cell = html.split("<td class='a'>")[1].split("</td>")[0]
        assert re.sub("</?mark>|&#8203;", "", cell) == " a🍕&lt;b&gt;\ufffd"


def test_pareto_marks_what_is_beaten():
    table = pd.DataFrame({"size_bytes": [1e6, 2e6], "kld_mean": [0.1, 0.2]}, index=["a", "b"])
    fronts = {"size_bytes": pd.Series([True, False], index=["a", "b"])}
    figure = figures.pareto(table, fronts, title="m")
    assert [t.marker.symbol for t in figure.data[1:]] == ["circle", "x"]
    assert figure.data[1].x == (1.0,)
    assert say.pareto(fronts) == "Unbeaten in size (MB): a."


@pytest.mark.parametrize(
    "kinds, name, grid, expected",
    [
        (["Q4_1", "F32"], "x", np.nan, "is itself quantized: how two grids"),
        (["F32"], "x", 0.9, "no ladder"),
        (
            ["F32"],
            "x + uniform noise of one step, not the original",
            0.0,
            "is a stand-in, x + uniform noise",
        ),
        (
            ["F32"],
            "x",
            0.01,
            "holds F32, 32 bits per weight; 1% of its blocks lie on an even grid: its w",
        ),
        (["BF16"] * 3 + ["F32"], "x", 0.0, "holds BF16 and F32, 32 bits per weight"),
    ],
)
def test_the_reference_is_named_for_what_it_is(kinds, name, grid, expected):
    tensors = pd.DataFrame({"type": kinds, "shape": [(2, 2)] * len(kinds)})
    file = SimpleNamespace(tensors=tensors, path=Path("f.gguf"), name=name, bits_per_weight=32.0)
    assert expected in say.reference(file, grid).replace("\n", " ")
    what = {
        "is itself": "itself Q4_1 and F32",
        "no ladder": "expanded from a quantized file",
        "is a stan": "a stand-in: quantized, with noise",
        "holds F32": "F32",
        "holds BF1": "BF16 and F32",
    }
    assert contents.reference_name(file, grid) == f"f ({what[expected[:9]]})"


def with_caches():
    """Two files with a full and a small cache, at 1,000 tokens."""
    table = quality(Q8=0.01, small=0.02, Q4=0.05, tiny=0.06)
    table.index = ["Q8", "Q8, q8_0/q8_0 cache", "Q4", "Q4, q8_0/q8_0 cache"]
    table["weights"] = ["Q8", "Q8", "Q4", "Q4"]
    table["cache_k"] = table["cache_v"] = ["f16", "q8_0"] * 2
    table["size_bytes"], table["token_bytes"] = [100e6, 100e6, 60e6, 60e6], [40e3, 20e3] * 2
    return table.assign(memory_bytes=table["size_bytes"] + 3000 * table["token_bytes"])


def test_the_cache_is_drawn_against_all_memory_and_said():
    table = with_caches()
    figure = quality_figures.cache(table, 3000, floor=1e-3, title="m")
    lines = {trace.name: trace for trace in figure.data}
    assert list(lines["Q8"].x) == [160, 220] and list(lines["Q8"].y) == pytest.approx([0.02, 0.01])
    assert list(lines["Q4"].x) == [120, 180] and lines["Q4"].marker.symbol == ("square", "circle")
    assert lines["noise floor"].y == (1e-3, 1e-3) and lines["q8_0/q8_0 cache"].x == (None,)
    said = say.cache(cache.crossover(table), cache.turning(table), 3000).replace("\n", " ")
    assert (
        "At 3,000 tokens a smaller cache beats smaller weights at 1 of 2 budgets where both" in said
    )
    assert "most at 180.0 MB: Q8, q8_0/q8_0 cache (0.02 nats) instead of Q4 (0.05)" in said
    assert (
        "From 2,000 tokens on Q8, q8_0/q8_0 cache takes less memory than Q4 and is 0.03 nats"
        in said
    )
    full = table.iloc[::2]
    assert "no two ways" in say.cache(cache.crossover(full), cache.turning(full), 3000)


def test_where_no_way_fits_none_is_the_better():
    """A smaller cache whose full one was not measured."""
    table = pd.DataFrame(
        {"weights": "Q8", "cache_k": ["f16", "q8_0"], "cache_v": ["f16", "q8_0"], "size_bytes": 100,
         "token_bytes": [4, 2], "memory_bytes": [500, 300], "kld_mean": [np.nan, 0.1]},
        index=["Q8", "Q8, q8_0/q8_0 cache"],
    )  # fmt: skip
    steps = cache.crossover(table)
    assert steps.empty and "no two ways" in say.cache(steps, cache.turning(table), 300)


def test_noise_is_drawn_and_said():
    table, noise = quality(a=0.04, b=0.002), quality(**{"not fused": 0.001, "batches": 0.003})
    figure = quality_figures.ladder(table, floor=0.003, title="m")
    assert figure.data[-1].name == "noise floor" and figure.data[-1].y == (0.003, 0.003)
    said = say.noise(noise, table, 0.003).replace("\n", " ")
    assert "up to 0.003 nats from itself (batches)" in said and said.endswith("told from it: b.")
    assert "20 times the floor of 0.002: more than noise" in say.noise(
        noise, table[:1], 0.002
    ).replace("\n", " ")
    pairs = pd.DataFrame({"better": ["no"]}, pd.MultiIndex.from_tuples([("a", "b")]))
    said = say.better(pairs, table).replace("\n", " ")
    assert said.startswith("Of 1 pair of neighbours, 1 is told apart") and "told: none" in said
    pairs["better"] = "equal"
    assert "noise floor: b and a." in say.better(pairs, table).replace("\n", " ")
    fronts = {"size_bytes": pd.Series([True, False], table.index)}
    drawn = figures.pareto(table.assign(size_bytes=[1e6, 2e6]), fronts, floor=0.003, title="m")
    assert {trace.name for trace in drawn.data} >= {"noise floor", "a", "b"}


def test_what_is_made_is_said_beforehand():
    whole = Ladder(["Q8_0", "Q4_K_M"], {"stand-in": 6.0, "Q8_0": 5.0, "Q4_K_M": 30.0}, {})
    said = say.steps(whole, "m").replace("\n", " ")
    assert said == "Compared are Q8_0 and Q4_K_M; making files takes about 41 s on these cores."
    cut = Ladder(["Q8_0", "/x/m.gguf"], {"Q8_0": 100.0}, {"Q5_K_M": 217.0}, "/x/m.gguf")
    said = say.steps(cut, "m").replace("\n", " ")
    assert said.startswith("Compared are Q8_0 and m as it is; making files takes about 2 minutes")
    assert said.endswith(
        "Q5_K_M can be named in QUANTIZATIONS, but would take 4 minutes more, or "
        "more room than scratch has."
    )
    assert say.steps(Ladder(["/x/m.gguf"], {}, {}), "m") == "Compared are /x/m.gguf."


def test_what_is_looked_into_is_named_or_nearest():
    files = {
        name: SimpleNamespace(bits_per_weight=bits, called=name, size_bytes=1)
        for name, bits in {"Q8_0": 8.5, "m": 4.8, "Q3_K_S": 3.5}.items()
    }
    for file in files.values():
        shape = {"shape": [(8, 8)], "n_elements": [64], "size_bytes": [1]}
        file.tensors = pd.DataFrame(shape)
    assert contents.looked_into(files, "Q8") == "Q8_0" and say.focus("Q8_0", "Q8").startswith(
        "Q8_0"
    )
    assert contents.looked_into(files, "Q4_K_M") == "m"
    assert "No Q4_K_M is made: m, nearest" in say.focus("m", "Q4_K_M").replace("\n", " ")
    assert contents.looked_into(files, "Q3_K_M") == "Q3_K_S"


def test_fallbacks_are_counted_in_words():
    table = pd.DataFrame(
        {"type": ["Q5_0", "Q5_0", "Q8_0"], "instead_of": ["Q4_K", "Q4_K", "Q6_K"], "row_width": 576}
    )
    said = say.fallbacks({"f": table, "g": table.iloc[:0]}).replace("\n", " ")
    assert "2 matrices meant for Q4_K became Q5_0 and 1 matrix meant for Q6_K became Q8_0" in said
    assert said.endswith("g: no fallback.")


def test_graph_tables_fit_together():
    table = quality(a=1.0, b=0.1)
    nodes, edges = graph_tables(
        table, {"a": drift(0.1), "b": drift(0.2)}, {"a": weights(0.1), "b": weights(0.2)}, "b"
    )
    assert nodes["kind"].value_counts().to_dict() == {"tensor": 4, "file": 2, "layer": 2}
    assert nodes["id"].is_unique and set(edges["src"]) | set(edges["dst"]) <= set(nodes["id"])
    edge = edges.set_index(["src", "dst"])["weight"]
    assert edge["file a", "layer 1"] == pytest.approx(0.3) and edge[
        "layer 1", "blk.1.attn_q.weight"
    ] == pytest.approx(0.4)
    assert len(nodes[["x", "y"]].drop_duplicates()) == len(nodes) and nodes["size"].max() == 1
