"""Embedding analyses on hand-built matrices with known answers, and their figures and sentences."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from llamatelemetry import maths
from llamatelemetry.backend import get_backend
from llamatelemetry.embeddings import context, figures, groups, lists, say, vectors
from llamatelemetry.errors import EmbeddingError

RNG = np.random.default_rng(7)
GAUSS = RNG.standard_normal((3000, 24)).astype(np.float32)


@pytest.fixture(scope="module")
def cpu():
    return get_backend("cpu")


@pytest.fixture(scope="module")
def planted():
    """Four clusters of 30 around orthogonal directions, 16 wide. -> (points (120, 16), names
    (120,))"""
    labels = np.repeat(np.arange(4), 30)
    points = 5 * np.eye(16)[labels] + 0.3 * RNG.standard_normal((120, 16))
    return points.astype(np.float32), np.array(["a", "b", "c", "d"])[labels]


# The matrix


@pytest.mark.parametrize(
    "matrix, expected",
    [
        (np.eye(8), 0.0),  # orthogonal
        (np.outer(np.arange(1, 9), np.ones(5)), 1.0),  # collapsed to one direction
        (np.array([[1, 0], [-3, 0]]), -1.0),
        (np.array([[1, 0], [1, 0], [0, 0], [0, 2]]), 1 / 3),  # the row of zeros has no direction
    ],
)
def test_anisotropy_of_known_matrices(matrix, expected):
    assert vectors.anisotropy(matrix.astype(np.float32)) == pytest.approx(expected, abs=1e-6)


def test_anisotropy_is_the_mean_over_all_pairs_across_blocks(monkeypatch):
    monkeypatch.setattr(maths, "BLOCK", 7)
    rows = GAUSS[:50] + 1
    cosine = maths.unit(rows) @ maths.unit(rows).T
    assert vectors.anisotropy(rows) == pytest.approx(
        cosine[~np.eye(50, dtype=bool)].mean(), abs=1e-6
    )


def test_random_pairs_are_of_different_rows_and_agree_with_all_pairs():
    rows = GAUSS + 0.5
    sample = vectors.random_cosines(rows, pairs=40000, seed=1)
    assert sample.mean() == pytest.approx(
        vectors.anisotropy(rows), abs=float(6 * sample.std() / 200)
    )
    assert vectors.random_cosines(rows, pairs=40000, center=True).mean() == pytest.approx(
        0, abs=0.01
    )
    assert (
        np.abs(vectors.random_cosines(np.eye(3, dtype=np.float32), pairs=500)).max() == 0
    )  # a row with itself would be 1
    assert (vectors.random_cosines(rows, seed=3) == vectors.random_cosines(rows, seed=3)).all()


@pytest.mark.parametrize(
    "values, rank",
    [([2, 2, 2, 2], 4), ([5, 0, 0], 1), ([1, 1, 0], 2), ([0.5, 0.25, 0.25], 2 * 2**0.5)],
)  # entropy 1.5 bits
def test_effective_rank_as_defined_by_roy_and_vetterli(values, rank):
    assert vectors.effective_rank(values) == pytest.approx(rank)


def test_effective_rank_of_nothing():
    with pytest.raises(EmbeddingError, match="zero"):
        vectors.effective_rank([0, 0])


@pytest.mark.parametrize("center", [False, True])
def test_spectrum_is_that_of_numpy(monkeypatch, center):
    monkeypatch.setattr(maths, "BLOCK", 1000)
    rows = GAUSS + 2
    expected = np.linalg.svd(
        (rows - rows.mean(axis=0) * center).astype(np.float64), compute_uv=False
    )
    found = vectors.spectra(rows, get_backend("cpu"))
    name = "minus the mean row" if center else "as stored"
    np.testing.assert_allclose(found[name], expected, rtol=1e-5)


def test_where_every_token_is_known_to_be_unused():
    """Rows of random shapes repeat: nothing is left to compare norms with."""
    rows = np.tile(GAUSS[:3], (2, 1))
    tokens = vectors.token_table(rows, [" w"] * 6, np.ones(6, int))
    table = vectors.unused_tokens(rows, tokens)
    assert len(table) == 6 and "No token is left" in say.unused(table, tokens)


@pytest.mark.parametrize("shape", [(3000, 24), (2000, 500), (200, 500)])
def test_random_spectrum_is_that_of_gaussian_matrices(shape):
    measured = np.linalg.svd(np.random.default_rng(0).standard_normal(shape), compute_uv=False)
    np.testing.assert_allclose(vectors.random_spectrum(*shape), measured, rtol=0.06)


def test_table_of_planted_tokens():
    rows = np.array([[3, 4], [0, 0], [3, 4], [-4, 3]], np.float32)
    table = vectors.token_table(rows, [" a", "b", b"\xe2", "<s>"], [1, 1, 1, 3])
    assert table.kind.tolist() == ["word start", "word part", "byte", "special"]
    np.testing.assert_allclose(table.norm, [5, 0, 5, 5])
    np.testing.assert_allclose(table.mean_cosine, [1 / 3, 0, 1 / 3, 0], atol=1e-6)
    assert table.copies.tolist() == [2, 1, 2, 1]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_damaged_rows_are_named(value):
    rows = GAUSS[:100].copy()
    rows[[3, 41], 5] = value
    with pytest.raises(EmbeddingError, match="token 3, 41"):
        maths.check_rows(rows)


@pytest.mark.parametrize("bad", [np.ones(4), np.ones((1, 4)), np.ones((2, 2, 2))])
def test_what_is_no_embedding_matrix_is_refused(bad):
    with pytest.raises(EmbeddingError, match="two rows or more"):
        maths.check_rows(bad)


def test_unused_tokens_planted_in_every_way():
    rows = RNG.standard_normal((400, 32)).astype(np.float32)
    never = RNG.standard_normal(32)
    for token in (10, 20, 30, 40, 50):  # never moved from one start, but for noise
        rows[token] = 3 * never + 0.05 * RNG.standard_normal(32)
    rows[60] = rows[50]
    pieces, types = [f" w{i}" for i in range(400)], np.ones(400, int)
    pieces[10], types[20] = b"\xff", 5
    tokens = vectors.token_table(rows, pieces, types)
    table = vectors.unused_tokens(rows, tokens)
    assert dict(zip(table.id, table.why)) == {
        10: "byte that UTF-8 never has",
        20: "marked unused in the file",
        50: "same row as another token",
        60: "same row as another token",
        30: "as close to those",
        40: "as close to those",
    }
    assert table.why.tolist().index("as close to those") == 4, "known ones come first"
    said = say.unused(table, tokens)
    assert "4 tokens are known" in said and "2 more" in said and "would tell them" in said


def test_no_unused_token_without_anything_to_compare_with():
    pieces = [f" w{i}" for i in range(len(GAUSS))]
    tokens = vectors.token_table(GAUSS, pieces, np.ones(len(GAUSS), int))
    table = vectors.unused_tokens(GAUSS, tokens)
    assert len(table) == 0 and "Nothing here tells" in say.unused(table, tokens)


def test_norms_of_one_kind_are_not_compared():
    tokens = vectors.token_table(GAUSS, [" w"] * len(GAUSS), np.ones(len(GAUSS), int))
    assert "median" in say.norms(tokens) and "kinds" not in say.norms(tokens)
    numbers = tokens.assign(kind=np.where(np.arange(len(GAUSS)) < 9, "number", "space"))
    assert "smallest median" in say.norms(numbers)


# Words

PIECES = [
    " cat",
    "cat",
    " dog",
    "red",
    " red",
    " blue",
    "<s>",
    b"\xe2",
    "\n",
    "12",
    " über",
    "мир",
    "+=",
]


@pytest.mark.parametrize(
    "piece, type, kind",
    [
        (" cat", 1, "word start"),
        ("cat", 1, "word part"),
        (" über", 1, "word start"),
        ("мир", 1, "other script"),
        (" 12", 1, "number"),
        ("+=", 1, "symbol"),
        ("\n\n", 1, "space"),
        (b"\xe2", 1, "byte"),
        ("A", 6, "byte"),
        ("<s>", 3, "special"),
        ("<unused1>", 5, "special"),
    ],
)
def test_kinds_of_tokens(piece, type, kind):
    table = vectors.token_table(GAUSS[:2], [piece] * 2, [type] * 2)
    assert table.kind.tolist() == [kind] * 2 and kind in vectors.KINDS


def test_words_are_found_as_in_a_text_first_and_others_reported():
    table = vectors.word_table(PIECES, {"animals": ["cat", "dog", "horse"], "colours": ["red"]})
    assert list(zip(table.word, table.category, table.id)) == [
        ("cat", "animals", 0),
        ("dog", "animals", 2),
        ("red", "colours", 4),
    ]
    assert table.attrs["skipped"] == ["horse"]
    assert "horse" in say.words(table)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(only=["animals", "planets"]), "No category 'planets'. Known: animals, colours"),
        (dict(only=["colours"]), "Not one token in this vocabulary: teal"),
    ],
)
def test_words_that_cannot_be_had(arguments, message):
    with pytest.raises(EmbeddingError, match=message):
        vectors.word_table(PIECES, {"animals": ["cat", "horse"], "colours": ["teal"]}, **arguments)


def test_word_lists_are_consistent():
    words = [word for category in lists.CATEGORIES.values() for word in category]
    assert len(words) == len(set(words)) and len(lists.CATEGORIES) <= 8, "one colour per category"
    for word, senses in lists.SENSES.items():
        assert len(senses) == 2
        assert all(text.split()[-1] == word for texts in senses.values() for text in texts)


def test_analogies_with_planted_offsets():
    rng = np.random.default_rng(0)
    pieces = [" man", " king", " woman", " queen", "queen", " Man", *(f" w{i}" for i in range(200))]
    rows = 0.3 * rng.standard_normal((206, 64))
    male, royal, female = rng.standard_normal((3, 64))
    rows[:4] += np.stack([male, male + royal, female, female + royal])
    rows[5] = female + royal - male  # would be first, but is " Man", a variant of a
    table = vectors.analogies(
        rows.astype(np.float32), pieces, [("man", "king", "woman", "queen"), ("man", "x", "a", "b")]
    )
    assert table.loc[0, ["answer", "rank"]].tolist() == [" queen", 1]
    assert table.attrs["skipped"] == [("man", "x", "a", "b")]
    assert "first in 100% of 1 questions" in say.analogies(table)


def test_analogy_ranks_count_all_better_tokens():
    rows = np.eye(6, dtype=np.float32)
    rows[4] = rows[1] - rows[0] + rows[2]  # exactly b - a + c: rank 1
    rows[3] = [
        0,
        1,
        1,
        1,
        0,
        0,
    ]  # d: rank 2; without the offset cosine 0.577 to c, also behind row 4's 0.577
    table = vectors.analogies(rows, [" a", " b", " c", " d", " e", " f"], [("a", "b", "c", "d")])
    assert table.loc[0, ["answer", "rank"]].tolist() == [" e", 2] and table.rank_without[0] in (
        1,
        2,
    )
    with pytest.raises(EmbeddingError, match="four words"):
        vectors.analogies(rows, [" a", " b", " c", " d", " e", " f"], [("a", "b", "c", "zebra")])


# Groups


def test_planted_clusters_are_found_and_shuffled_labels_are_not(cpu, planted):
    points, names = planted
    near = cpu.neighbors(points, 10)[1]
    found = cpu.kmeans(maths.unit(points), 4)
    table = groups.cluster_agreement(points, {"k-means": found}, names, near, rounds=30)
    assert table.value["categories", "purity"] == 1 and table.value["k-means", "adjusted Rand"] == 1
    assert table.value["categories", "silhouette"] > 0.8
    assert table.shuffled["categories", "purity"] == pytest.approx(29 / 119, abs=0.03)  # chance
    assert abs(table.shuffled["k-means", "adjusted Rand"]) < 0.02
    assert "100% of a word's nearest neighbours" in say.agreement(table)
    counts = groups.contingency(found, names)
    assert sorted(counts.to_numpy().ravel().tolist()) == [0] * 12 + [30] * 4
    assert np.trace(counts.to_numpy()) == 120, "columns follow the categories"
    assert "for 4 of 4 categories" in say.contingency(counts, "k-means")


def test_noise_is_left_out_and_one_cluster_says_nothing(cpu, planted):
    points, names = planted
    near = cpu.neighbors(points, 5)[1]
    labels = np.where(np.arange(120) % 30 < 3, -1, np.repeat(np.arange(4), 30))
    clusterings = {"some": labels, "one": np.zeros(120, int), "none": np.full(120, -1)}
    table = groups.cluster_agreement(points, clusterings, names, near, rounds=5)
    assert table.value["some", "adjusted Rand"] == 1 and table.noise[
        "some", "adjusted Rand"
    ] == pytest.approx(0.1)
    assert table.loc[[("one", "silhouette"), ("none", "adjusted Rand")], "value"].isna().all()
    assert "nothing to compare" in say.agreement(table) and "nan" not in say.agreement(table)
    noise = groups.contingency(clusterings["none"], names)
    assert "for 0 of 4 categories: none" in say.contingency(noise, "none")


def test_purity_and_overlap_by_hand():
    near = np.array([[1, 2], [0, 2], [0, 1]])
    assert groups.neighborhood_purity(near, ["x", "x", "y"]) == pytest.approx(2 / 6)
    np.testing.assert_allclose(groups.neighbor_overlap(near, [[2, 1], [2, 5], [4, 5]]), [1, 0.5, 0])
    with pytest.raises(EmbeddingError, match="same rows"):
        groups.neighbor_overlap(near, near[:2])


def test_own_row_is_dropped_also_where_a_copy_comes_first():
    distances = np.array([[0, 0, 0.1], [0, 0.2, 0.3]])
    near = np.array([[7, 3, 1], [8, 2, 1]])
    left, ids = groups.drop_self(
        distances, near, [3, 9]
    )  # 9 is not among its neighbours: the last one goes
    assert ids.tolist() == [[7, 1], [8, 2]] and left.tolist() == [[0, 0.1], [0, 0.2]]


def test_network_of_planted_neighbours(cpu, planted):
    points, names = planted
    ids = np.arange(120) * 3 + 5
    distances, near = cpu.neighbors(points, 6)
    edges = groups.neighbor_edges(distances, near, ids, threshold=0.5)
    assert (edges.src < edges.dst).all() and not edges.duplicated(["src", "dst"]).any()
    both = {(min(a, b), max(a, b)) for a in range(120) for b in near[a]}
    assert len(edges) == len(both)
    mutual = {(a, b) for a, b in both if b in near[a] and a in near[b]}
    assert edges.mutual.sum() == len(mutual)
    parts = groups.components(edges, ids)
    assert (
        np.bincount(parts).tolist() == [30] * 4
        and pd.Series(parts).groupby(names).nunique().eq(1).all()
    )
    one = edges.iloc[0]
    cosine = float(
        maths.unit(points[[(one.src - 5) // 3]])[0] @ maths.unit(points[[(one.dst - 5) // 3]])[0]
    )
    assert one.cosine == pytest.approx(cosine, abs=1e-5)


def test_network_of_categories_says_what_stays_inside_and_who_is_named_most(cpu, planted):
    points, names = planted
    tokens = pd.DataFrame({"piece": [f" w{i}" for i in range(120)]})
    around = pd.Series(names, index=pd.RangeIndex(120, name="id"))
    nodes, edges = groups.network(points, around, 3, 0.5, cpu)
    assert nodes.named.sum() == 360 and np.bincount(nodes.part).tolist() == [30] * 4
    said = say.network(nodes, edges, tokens, 0.5).replace("\n", " ")
    assert "0 of 120 tokens have no edge" in said
    assert (
        "100% stay inside one category; by chance 25%" in said
        and f"'␣w{nodes.named.idxmax()}'" in said
    )
    nodes, edges = groups.network(points, around, 3, 1.1, cpu)
    assert len(edges) == 0 and nodes.part.nunique() == 120
    assert "lower the threshold" in say.network(nodes, edges, tokens, 1.1)


def test_surroundings_take_the_category_of_the_nearest_word():
    words = pd.DataFrame(
        {"word": ["cat", "red"], "category": ["animals", "colours"], "id": [10, 20]}
    )
    around = groups.surroundings(words, [[0.1, 0.4], [0.2, 0.3]], [[20, 7], [7, 3]])
    assert around.to_dict() == {3: "colours", 7: "colours", 10: "animals", 20: "colours"}
    assert list(around.cat.categories) == ["animals", "colours"]  # the words' order, not theirs


def test_nearest_rows_are_others_and_the_isolated_come_first(cpu, planted):
    points, _ = planted
    sample = np.array([3, 40, 80])
    distances, near = groups.nearest(points, sample, 4, cpu, progress=False)
    expected = cpu.neighbors(points, 4)
    np.testing.assert_array_equal(near, expected[1][sample])
    tokens = pd.DataFrame({"piece": [f" w{i}" for i in range(120)], "kind": "word start"})
    table = groups.isolated(tokens.rename_axis("id"), sample, distances, near)
    assert table.cosine.is_monotonic_increasing and set(table.id) == set(sample)
    assert dict(zip(table.id, table.nearest_piece)) == {
        row: f" w{other}" for row, other in zip(sample, near[:, 0])
    }
    assert f"least {table.cosine[0]:.2f}" in say.isolated(table)


def test_projections_keep_neighbours_and_say_how_many(cpu, planted, monkeypatch):
    points, _ = planted
    monkeypatch.setattr(cpu, "umap", lambda x, n, *rest: 2 * cpu.pca(x, n)[0])
    near = cpu.neighbors(points, 5)[1]
    maps = groups.projections(points, near, cpu, n_neighbors=10)
    assert {name: view.shape for name, view in maps.views.items()} == {
        "UMAP": (120, 3),
        "PCA": (120, 3),
    }
    low = cpu.neighbors(maps.views["PCA"], 5, metric="euclidean")[1]
    assert maps.kept["PCA"] == pytest.approx(groups.neighbor_overlap(near, low).mean())
    said = say.projections(maps, "points").replace("\n", " ")
    assert f"PCA {maps.kept['PCA']:.0%}. Three principal" in said
    sample = np.arange(0, 120, 10)
    whole = groups.vocabulary_map(points, sample, near[sample], cpu, n_neighbors=10)
    np.testing.assert_array_equal(whole.views["UMAP"], maps.views["UMAP"])
    assert 0 < whole.kept["UMAP"] <= 1 and "principal" not in say.projections(whole, "points")


def test_precision_of_the_same_and_of_rounded_rows(cpu):
    rows = GAUSS[:300]
    near = cpu.neighbors(rows, 10)[1]
    same = groups.precision(rows, rows, near, near)
    assert (
        same.relative_error.max() == 0
        and (same.overlap == 1).all()
        and same.cosine.min() > 1 - 1e-6
    )
    assert "100% of tokens keep all 10" in say.precision(same, 10, "Q8_0", "Q8_0")
    coarse = np.round(rows * 2) / 2
    table = groups.precision(rows, coarse, near, cpu.neighbors(coarse, 10)[1])
    expected = (
        (rows * coarse).sum(1) / np.linalg.norm(rows, axis=1) / np.linalg.norm(coarse, axis=1)
    )
    np.testing.assert_allclose(table.cosine, expected, atol=1e-5)
    assert 0.3 < table.overlap.mean() < 1
    with pytest.raises(EmbeddingError, match="different models"):
        groups.precision(rows, rows[:, :8], near, near)


def test_more_neighbours_than_tokens_is_refused(cpu):
    with pytest.raises(ValueError, match="lower it or give more rows"):
        cpu.umap(GAUSS[:10], 3, n_neighbors=15)
    with pytest.raises(ValueError, match="lower it or give more rows"):
        cpu.neighbors(GAUSS[:10], 10)


# Contexts


@pytest.fixture(scope="module")
def senses():
    """Six layers of two words with two senses each, four occurrences per sense: at layer 0 one
    vector per word, then senses move apart layer by layer. -> (layers (6, 16, 40), senses,
    words)"""
    words, sense = np.repeat(["bank", "light"], 8), np.tile(np.repeat(["one", "two"], 4), 2)
    base = 4 * np.eye(40)[np.repeat([0, 1], 8)]
    direction = 2 * np.eye(40)[np.where(sense == "one", 2, 3) + np.where(words == "bank", 0, 2)]
    noise = RNG.standard_normal((16, 40))
    layers = np.stack(
        [base + 0.4 * layer * direction + (0.15 * noise if layer else 0) for layer in range(6)]
    )
    return layers, sense, words


def test_sense_separation_grows_from_zero_and_beats_shuffled_senses(senses):
    layers, sense, words = senses
    table = context.separation_by_layer(layers, sense, words, rounds=100)
    assert table.separation[0] == pytest.approx(0, abs=1e-9)
    assert table.agreement[0] == pytest.approx(3 / 7)  # all are tied: chance
    assert (np.diff(table.separation) > 0).all() and table.agreement[5] == 1
    assert (table.separation[2:] > table.shuffled_p95[2:]).all() and abs(table.shuffled).max() < 0.1
    said = say.separation(table, "sense")
    assert "is 0.00 at layer 0 and largest" in said and "at layer 5;" in said
    assert "first at layer 0" not in said


def test_shuffled_senses_do_not_separate(senses):
    layers, sense, words = senses
    flat = np.tile(np.tile(["one", "two"], 4), 2)  # half of each sense in each
    table = context.separation_by_layer(layers, flat, words, rounds=100)
    assert not (table.separation > table.shuffled_p95 + 1e-9).any()
    assert "At no layer" in say.separation(table, "sense")


def test_a_direction_that_all_share_does_not_count(senses):
    layers, sense, words = senses
    table = context.separation_by_layer(layers[[3, 3]] + [[[0]], [[1000]]], sense, words, rounds=2)
    assert table.separation[0] == pytest.approx(table.separation[1], abs=1e-3)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda h, s, w: (h[:, :3], s, w), "one row per label"),
        (lambda h, s, w: (np.where(h == h.max(), np.nan, h), s, w), "NaN or infinity"),
        (lambda h, s, w: (h, np.repeat("one", 16), w), "two labels"),
        (lambda h, s, w: (h, s, np.arange(16)), "three rows or more"),
    ],
)
def test_occurrences_that_cannot_be_compared(senses, change, message):
    with pytest.raises(EmbeddingError, match=message):
        context.separation_by_layer(*change(*senses), rounds=2)


def test_the_last_occurrence_of_a_word_is_found_and_a_split_word_named():
    tokens = pd.DataFrame(
        {"position": range(5), "piece": ["The", " bank", " by", " bank", b"\xe2"]}
    )
    assert context.word_position(tokens, "bank") == 3
    with pytest.raises(EmbeddingError, match="'river' is no single token"):
        context.word_position(tokens, "river")


def test_states_are_taken_at_the_word_and_at_the_token_before_it():
    """Of texts of different lengths; a word that comes first has itself before it."""
    pieces = ["a", " b", " bank", "bank", " c", "bank", " bank"]
    data = np.arange(7 * 2 * 3, dtype=np.float32).reshape(7, 2, 3)
    coords = {"layer": [0, 1], "token": ("token", np.array(pieces, object))}
    coords |= {
        "token_id": ("token", np.arange(10, 17)),
        "token_text": ("token", [0] * 3 + [1] * 2 + [2] * 2),
    }
    coords |= {"token_position": ("token", [0, 1, 2, 0, 1, 0, 1])}
    coords |= {"start": ("text", [0, 3, 5]), "n_tokens": ("text", [3, 2, 2])}
    many = xr.Dataset({"hidden": (("token", "layer", "embd"), data)}, coords)
    found = context.word_states(many, ["bank"] * 3)
    assert found.at_word.dims == ("layer", "occurrence", "embd")
    assert found.id.values.tolist() == [12, 13, 16]
    np.testing.assert_array_equal(found.at_word.values, data[[2, 3, 6]].swapaxes(0, 1))
    np.testing.assert_array_equal(found.before.values, data[[1, 3, 5]].swapaxes(0, 1))


def test_means_over_sentences_come_one_capture_at_a_time():
    """Captures come from a generator: what is kept must be copies."""

    class Fake(dict):
        hidden = property(lambda self: self["hidden"])

    def captures():
        data = np.empty((2, 3, 4), np.float32)
        for number in (1, 2):
            data[:] = number * np.arange(1, 25).reshape(2, 3, 4)
            hidden = xr.DataArray(data, dims=("layer", "token", "embd"), coords={"layer": [0, 1]})
            yield Fake(hidden=hidden, final_norm=hidden[1])
            data[:] = np.nan

    means = context.sentence_states(captures())
    assert means.hidden.dims == ("layer", "sentence", "embd")
    np.testing.assert_allclose(means.hidden[:, 0], means.hidden[:, 1], rtol=1e-6)
    assert means.final_norm.values[:, 0].tolist() == [17, 34]


def test_occurrences_are_of_words_that_are_one_token():
    cases = context.occurrences({"cat": {"pet": ["a cat"]}, "zebra": {"x": ["a zebra"]}}, PIECES)
    assert cases.to_dict("records") == [{"word": "cat", "sense": "pet", "text": "a cat"}]
    topics = context.topics({"sea": ["one", "two"]})
    assert topics.label.tolist() == ["sea 1", "sea 2"]


def test_principal_plane_holds_planar_points_and_survives_equal_ones():
    flat = np.zeros((9, 7))
    flat[:, 2:4] = RNG.standard_normal((9, 2))
    scores, share = context.principal_plane(flat)
    assert share == pytest.approx(1)
    distance = lambda x: np.linalg.norm(x[:, None] - x[None], axis=-1)
    np.testing.assert_allclose(distance(scores), distance(flat), atol=1e-9)
    assert not context.principal_plane(np.ones((5, 3)))[0].any()


@pytest.fixture(scope="module")
def bank(senses):
    """The planes of the word "bank" in the planted states."""
    layers, sense, words = senses
    states = xr.DataArray(layers, dims=("layer", "occurrence", "embd"), coords={"layer": range(6)})
    cases = pd.DataFrame({"word": words, "sense": sense, "text": [f"<i>{i}" for i in range(16)]})
    with pytest.raises(EmbeddingError, match="choose one of bank, light"):
        context.planes(states, cases, "spring")
    return context.planes(states, cases, "bank", panels=3)


def test_planes_of_a_word_move_apart(bank):
    assert bank.layer.unique().tolist() == [0, 1, 5] and len(bank) == 24
    apart = bank.groupby("layer").apart.first()
    assert apart[0] == 0 and apart[5] > 3 and f"and {apart[5]:.1f} at" in say.planes(bank)
    assert "one sense, 'one'" in say.planes(bank[bank.sense == "one"])


def test_the_closest_sentences_are_named():
    topics = context.topics({"sea": ["a", "b"], "sky": ["c"]})
    cosines = np.array([[1, 0.5, 0.2], [0.5, 1, 0.3], [0.2, 0.3, 1]])
    assert say.sentences(cosines, topics).endswith(
        "'a' and 'b', 0.50. Closest of two topics: 'b' and 'c', 0.30."
    )
    assert say.sentences(cosines[:2, :2], topics[:2]).endswith("Closest of two topics: none.")
    figure = figures.sentences(cosines, topics, title="t")
    assert figure.data[0].y[2] == "sky 1: c"


# Figures


def _tokens(pieces):
    return pd.DataFrame({"piece": pieces, "norm": 1.0})


def test_projections_carry_every_token_once_per_view_and_escape_it(planted):
    points, names = planted
    views = {"UMAP": points[:, :3], "PCA": points[:, 3:6]}
    figure = figures.projections(views, _tokens([" <b>&", *[" w"] * 119]), names, title="t")
    assert [len(trace.x) for trace in figure.data] == [30] * 8
    assert figure.data[0].text[0] == "␣&lt;b&gt;&amp;"
    assert [trace.showlegend for trace in figure.data] == [True, False] * 4
    assert "id" in figure.data[0].hovertemplate and "norm" in figure.data[0].hovertemplate
    assert figure.layout.scene2.xaxis.title.text == "PCA 1"


def test_more_groups_than_colours_stay_apart():
    names = np.array([f"group {i}" for i in range(20)])
    figure = figures.projections({"UMAP": np.eye(20, 3)}, _tokens(names), names, title="t")
    looks = {(trace.marker.color, trace.marker.symbol) for trace in figure.data}
    assert len(looks) == 20


def test_figures_hold_the_numbers_they_were_given(senses, planted, bank, cpu):
    layers, sense, words = senses
    table = context.separation_by_layer(layers, sense, words, rounds=5)
    server = pd.DataFrame({"separation": [0.3], "agreement": [0.9]})
    figure = figures.separation({"senses": table}, title="t", points={"server": server})
    np.testing.assert_allclose(figure.data[0].y, table.separation)
    assert figure.data[-1].x == (5,) and figure.data[-1].y == (0.9,)
    norms = np.linalg.norm(GAUSS, axis=1)
    tokens = pd.DataFrame({"norm": norms, "kind": np.repeat(["a", "b"], 1500)})
    box = figures.norms(tokens, title="t").data[0]
    medians = sorted([np.median(norms[:1500]), np.median(norms[1500:])])
    np.testing.assert_allclose(box.median, medians)
    bars = figures.cosines({"raw": vectors.random_cosines(GAUSS)}, title="t").data[0]
    assert sum(bars.y) == pytest.approx(1)
    assert len(figures.planes(bank, title="t").data) == 6
    near = cpu.neighbors(planted[0], 10)[1]
    same = groups.precision(planted[0], planted[0], near, near)
    figure = figures.precision(same, "Q8_0", title="t")
    assert sum(figure.data[0].y) == 120 and list(figure.data[1].x) == [1.0]


@pytest.mark.slow
def test_smollm2_matrix(smollm2):
    from llamatelemetry import GGUFFile

    model = GGUFFile(smollm2)
    matrix = vectors.token_embedding(model)
    np.testing.assert_array_equal(matrix, model.tensor("token_embd.weight"))
    assert matrix.shape == (model.n_vocab, model.n_embd)
    assert vectors.stored_as(model) == "Q8_0 (8.50 bits)"
    words = vectors.word_table(model.pieces, lists.CATEGORIES)
    assert len(words) > 180 and words.category.nunique() == len(lists.CATEGORIES)
    tokens = vectors.token_table(matrix, model.pieces, model.token_types)
    unused = vectors.unused_tokens(matrix, tokens)
    assert {"<jupyter_start>", "<gh_stars>"} <= set(unused.piece), "rows that training left equal"
    assert (vectors.analogies(matrix, model.pieces, lists.ANALOGIES)["rank"] == 1).mean() > 0.5
    near = get_backend("cpu").neighbors(matrix[words.id], 10)[1]
    assert groups.neighborhood_purity(near, words.category) > 0.6


def test_bars_of_kept_neighbours_are_as_wide_as_one_neighbour():
    """The width came from the smallest share: where none kept fewer than two of ten, bars ran into
    one another."""
    kept = pd.DataFrame({"cosine": [0.9, 0.95, 0.99, 1.0], "overlap": [0.2, 0.8, 0.9, 1.0]})
    figure = figures.precision(kept, "Q5_0", title="t")
    assert figure.data[1].width == pytest.approx(0.08)


def test_a_map_of_more_rows_than_can_be_afforded_is_of_some(cpu, monkeypatch, capsys):
    assert groups.affordable(3000, 24, cpu)[0] == 3000
    monkeypatch.setattr(groups, "_products_per_second", lambda width, backend: 4e9)
    count, said = groups.affordable(100_000, 4000, cpu, seconds=100)
    assert count == 5000 and "40,000 s and 6.4 GB" in said and "5,000 at random" in said
    monkeypatch.setattr(cpu, "free_bytes", lambda: 4 * 4 * 24 * 400, raising=False)
    sample = np.array([5, 700, 2999])
    near = groups.nearest(GAUSS, sample, 4, cpu, progress=False)[1]
    found = groups.vocabulary_map(GAUSS, sample, near, cpu)
    assert 400 <= len(found.ids) <= 403 and set(sample) <= set(found.ids)
    assert len(found.views["UMAP"]) == len(found.ids) and "400 at random" in capsys.readouterr().out
    ids, view = groups.drawn(found, 50, np.random.default_rng(0))
    np.testing.assert_array_equal(view, found.views["UMAP"][np.searchsorted(found.ids, ids)])


def stored_matrix(path, values):
    """A GGUF whose token embedding is `values` in Q8_0."""
    import gguf

    from llamatelemetry import GGUFFile

    writer = gguf.GGUFWriter(path, "llama")
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor(vectors.EMBEDDING, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFFile(path)


def test_rows_read_in_blocks_are_the_matrix(tmp_path, cpu):
    file = stored_matrix(tmp_path / "a.gguf", RNG.standard_normal((500, 32)).astype(np.float32))
    matrix, rows = vectors.token_embedding(file), vectors.StoredRows(file)
    assert len(rows) == 500 and rows.shape == (500, 32)
    np.testing.assert_array_equal(rows[7:9], matrix[7:9])
    ids = np.array([[499, 3], [3, 0]])
    np.testing.assert_array_equal(rows[ids], matrix[ids])
    sample = np.array([0, 17, 499])
    for mine, expected in zip(*(groups.nearest(x, sample, 5, cpu) for x in (rows, matrix))):
        np.testing.assert_array_equal(mine, expected)


def test_rows_of_a_damaged_file_are_refused_by_their_ids(tmp_path):
    file = stored_matrix(tmp_path / "a.gguf", np.ones((9, 32), np.float32))
    data = bytearray(file.path.read_bytes())
    step = len(data) - 320 + 4 * 34  # 9 blocks, padded: the float16 that row 4's begins with
    data[step : step + 2] = np.float16(np.nan).tobytes()
    file.path.write_bytes(data)
    from llamatelemetry import GGUFFile

    with pytest.raises(EmbeddingError, match="NaN or infinity in the row of token 4"):
        vectors.StoredRows(GGUFFile(file.path))


def test_a_second_file_costs_no_second_matrix(tmp_path):
    """The whole of notebook 13's comparison: one matrix, and of the other file blocks."""
    values = np.random.default_rng(0).standard_normal((65536, 768)).astype(np.float32)  # 201 MB
    path = stored_matrix(tmp_path / "a.gguf", values).path
    program = f"""
import subprocess
import sys

import numpy as np
from llamatelemetry import GGUFFile
from llamatelemetry.backend import get_backend
from llamatelemetry.embeddings import groups, vectors
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
cpu, file, sample = get_backend("cpu"), GGUFFile({str(path)!r}), np.arange(0, 65536, 900)
warm = vectors.token_embedding(GGUFFile({str(path)!r}))[:9000].copy()
groups.nearest(warm, sample[:5], 5, cpu, progress=False)
del warm
matrix = vectors.token_embedding(file)
tokens = vectors.token_table(matrix, ["a"] * len(matrix), np.ones(len(matrix)))
for centred in (False, True):
    vectors.random_cosines(matrix, center=centred)
vectors.anisotropy(matrix)
vectors.spectra(matrix, cpu)
vectors.unused_tokens(matrix, tokens)
one = groups.nearest(matrix, sample, 5, cpu, progress=False)[1]
first = peak()
rows = vectors.StoredRows(file)
assert (groups.nearest(rows, sample, 5, cpu, progress=False)[1] == one).all()
print(first, peak())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, both = map(float, done.stdout.split())
    matrix = values.nbytes / 2**20
    assert first < 2.5 * matrix + 250, "the matrix, blocks of it, and the libraries"
    assert both < first + 160, "two blocks of 64 MiB, no second matrix"
