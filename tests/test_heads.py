"""Heads on attention of known kinds, against TransformerLens's detector, and on tiny models with
planted heads."""

from pathlib import Path

import gguf
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from models import tiny_model

from llamatelemetry import CaptureError
from llamatelemetry.capture.finite import MISSING
from llamatelemetry.capture.measures import HeadStatistics
from llamatelemetry.capture.session import CaptureSession
from llamatelemetry.heads import behaviours, importance, profile, say, semantic, similarity
from llamatelemetry.heads import texts as heads_texts

REFERENCE = np.load(Path(__file__).parent / "references" / "heads.npz")


def one_hot(keys, n):
    """Attention of one head (query, key) that puts everything on keys[query]."""
    out = np.zeros((n, n))
    out[np.arange(n), keys] = 1
    return out


def fake_tokens(pieces):
    """A tokenizer of single characters: DataFrame (id, piece) with a start token."""

    def tokenize(text, add_special=True):
        ids = [0] * add_special + [pieces.index(c) for c in text]
        return pd.DataFrame({"id": ids, "piece": [pieces[i] for i in ids]})

    return tokenize


PIECES = ["", *map(chr, range(32, 127)), "\n"]


@pytest.fixture(scope="module")
def texts():
    kinds = [3] + [1] * (len(PIECES) - 1)
    return heads_texts.default_texts(fake_tokens(PIECES), PIECES, kinds, shuffles=5, max_tokens=90)


def statistics(texts, attention_of):
    """Datasets as head_statistics gives them, of made attention: attention_of(text) -> (head,
    query, key)."""
    out = []
    for text in texts:
        reducer = HeadStatistics(text.ids, text.patterns)
        for layer in (0, 1):
            reducer.action(layer)(attention_of(text).astype(np.float32), 0)
        table, layers = reducer.table()
        data = {name: (("layer", "head"), values) for name, values in table.items()}
        out.append(xr.Dataset(data, {"layer": layers}))
    return out


def pure_heads(text):
    """Heads of one pure kind each, in this order: KINDS."""
    n, position = len(text.ids), np.arange(len(text.ids))
    ids = np.asarray(text.ids)
    last = [
        max(np.flatnonzero(ids[:q] == ids[q]), default=0) for q in position
    ]  # the last occurrence before
    after = [max((k + 1 for k in np.flatnonzero(ids[:q] == ids[q])), default=0) for q in position]
    uniform = np.tril(np.ones((n, n))) / (position[:, None] + 1)
    far = one_hot(np.where(position >= 17, position - 16, 0), n)
    syntactic = one_hot(position * 0, n)
    for query, key in text.pairs.get("syntactic", [()])[0]:
        syntactic[query] = 0
        syntactic[query, key] = 1
    keys = [
        position * 0,
        position,
        np.maximum(position - 1, 0),
        np.maximum(position - 6, 0),
        last,
        after,
    ]
    return np.stack([*(one_hot(k, n) for k in keys), uniform, far, syntactic])


KINDS = {
    "sink": 0,
    "self": 1,
    "previous token": 2,
    "offset 6": 3,
    "duplicate": 4,
    "induction": 5,
    "uniform": 6,
    "global": 7,
    "syntactic": 8,
}


@pytest.fixture(scope="module")
def measured(texts):
    scores = behaviours.collect(texts, statistics(texts, pure_heads))
    profiled = profile.profile(scores, n_boot=100)
    return scores, profiled, profile.labels(profiled, margin=0.1)


@pytest.mark.parametrize(
    "measure, kind, expected",
    [
        ("sink", "sink", 1),
        ("local", "self", 1),
        ("local", "previous token", 1),
        ("local", "offset 6", 0.0),
        ("global", "global", 1),
        ("previous token", "previous token", 1),
        ("previous token", "self", 0),
        ("positional", "offset 6", 1),
        ("positional", "self", 1),
        ("duplicate", "duplicate", 1),
        ("duplicate", "induction", 0),
        ("induction", "induction", 1),
        ("induction", "duplicate", 0),
        ("syntactic", "syntactic", 1),
        ("entropy", "sink", 0),
        ("distance", "self", 0),
        ("top", "previous token", 1),
    ],
)
def test_pure_heads_have_their_score(measured, measure, kind, expected):
    value = measured[1]["value"].sel(measure=measure).isel(head=KINDS[kind])
    np.testing.assert_allclose(value, expected, atol=0.08 if expected == 0 else 1e-5)


def test_pure_heads_have_their_label_and_uniform_has_none(measured):
    table = (
        profile.head_table(measured[1], measured[2]).query("layer == 0").set_index("head")["labels"]
    )
    assert "sink" in table[KINDS["sink"]] and "local" not in table[KINDS["sink"]]
    assert {"local", "positional"} == set(table[KINDS["self"]].split(", "))
    assert {"local", "positional", "previous token"} == set(
        table[KINDS["previous token"]].split(", ")
    )
    assert table[KINDS["offset 6"]] == "positional"
    assert "duplicate" in table[KINDS["duplicate"]] and "induction" not in table[KINDS["duplicate"]]
    assert "induction" in table[KINDS["induction"]] and "global" in table[KINDS["global"]]
    assert "syntactic" in table[KINDS["syntactic"]]
    assert table[KINDS["uniform"]] == "none"
    assert measured[0]["best_offset"].values[0, KINDS["offset 6"]] == 6
    counts = profile.label_counts(measured[2], measured[1])
    assert (
        counts.loc["syntactic", "best"] == f"L0H{KINDS['syntactic']}"
        and counts.loc["syntactic", "heads"] == 2
    )


def test_baselines_are_what_chance_gives(measured, texts):
    """The shuffled versions of a uniform head and of a sharp one have the same mean: the share of
    keys."""
    base = measured[1]["baseline"].sel(measure="local").isel(layer=0)
    queries = np.concatenate([np.arange(1, len(t.ids)) for t in texts if t.natural])
    expected = np.mean(np.minimum(behaviours.LOCAL, queries + 1) / (queries + 1))
    assert abs(float(base.isel(head=KINDS["uniform"])) - expected) < 0.05
    assert abs(float(base.isel(head=KINDS["self"])) - expected) < 0.08
    uniform = measured[1].isel(layer=0, head=KINDS["uniform"])
    interval = uniform.sel(measure="duplicate")  # its share of the keys is another one in each text
    assert interval["low"] < interval["value"] < interval["high"]
    same = uniform.sel(measure="entropy")  # texts of one length: the same in each
    np.testing.assert_allclose([same["low"], same["high"]], same["value"], rtol=1e-6)


def pattern_scores(attention, text):
    """The scores of a Text from a full capture (layer, head, query, key): {behaviour: (version,
    layer, head)}."""
    values = np.asarray(attention, np.float64)

    def score(name, pairs):
        per = len(pairs) if name == "syntactic" else len(set(pairs[:, 0].tolist()))
        return values[:, :, pairs[:, 0], pairs[:, 1]].sum(-1) / per

    return {
        name: np.stack([score(name, pairs) for pairs in versions])
        for name, versions in text.pairs.items()
    }


def test_scores_streamed_equal_those_of_the_full_matrix(texts):
    rng = np.random.default_rng(0)
    for text in texts[::5]:
        n = len(text.ids)
        attention = np.tril(rng.random((2, 3, n, n)))
        attention /= attention.sum(-1, keepdims=True)
        full = pattern_scores(attention, text)
        streams = HeadStatistics(text.ids, text.patterns)
        for layer in (0, 1):
            for start in range(0, n, 31):  # in pieces, as a long prompt comes
                streams.action(layer)(
                    attention[layer][:, start : start + 31].astype(np.float32), start
                )
        table, layers = streams.table()
        stats = xr.Dataset({k: (("layer", "head"), v) for k, v in table.items()}, {"layer": layers})
        found = behaviours.scores(text, stats)
        assert list(found) == list(full)
        for name, expected in full.items():
            np.testing.assert_allclose(found[name], expected, atol=1e-5)


@pytest.mark.parametrize(
    "name, theirs",
    [
        ("previous token", "previous_token_head"),
        ("duplicate", "duplicate_token_head"),
        ("induction", "induction_head"),
    ],
)
def test_pairs_and_their_share_are_transformerlens(name, theirs):
    """Patterns and scores of transformer_lens 2.15.0's own functions
    (tests/references/make_heads_reference.py). The notebook divides by the rows that have a pair
    instead of by all."""
    tokens = REFERENCE["tokens"].tolist()
    pairs = behaviours.token_pairs(tokens, np.arange(1, len(tokens)))[name]
    mask = np.zeros((len(tokens), len(tokens)), int)
    mask[tuple(pairs.T)] = 1
    np.testing.assert_array_equal(mask, REFERENCE[f"{theirs}_pattern"])
    streams = HeadStatistics(tokens, {name: pairs})
    for layer in (0, 1):
        streams.action(layer)(REFERENCE["attention"][layer], 0)
    np.testing.assert_allclose(streams.table()[0][name], REFERENCE[theirs], atol=1e-6)


def test_a_pattern_may_not_take_the_name_of_a_measure():
    with pytest.raises(CaptureError, match="'sink' has the name of a measure"):
        HeadStatistics([1, 2], {"sink": [(1, 0)]})


def test_template_pairs_are_the_words_they_say():
    closing = 0
    for seed in range(6):
        text = heads_texts.template_text("t", fake_tokens(PIECES), np.random.default_rng(seed), 240)
        behaviours.add_pairs(text, 2, np.random.default_rng(0))
        pairs, shuffled, _ = text.pairs["syntactic"]
        spelled = "".join(text.pieces)
        for query, key in pairs:
            # The start token has no characters: position p is character p - 1, the last one of its
            # word.
            word, earlier = (spelled[:p].split(" ")[-1] for p in (query, key))
            assert key < query
            if text.pieces[query] == ")":
                closing += 1
                assert text.pieces[key] == "("
            elif word in heads_texts.VERBS:
                assert earlier in heads_texts.NOUNS
            else:
                assert word in heads_texts.NOUNS + heads_texts.PLACES
                assert earlier.lower() in ("the", "a", "this", "every")
        distances = set((pairs[:, 0] - pairs[:, 1]).tolist())
        assert {q - k for q, k in shuffled.tolist()} <= distances
        assert not {tuple(p) for p in shuffled} & {tuple(p) for p in pairs}
    assert closing > 0


def test_characters_find_their_tokens():
    assert heads_texts.character_tokens(["<s>", "A", " c", "at"], "A cat") == [1, 2, 2, 3, 3]
    assert heads_texts.character_tokens(["▁h", "é".encode()[:1], "é".encode()[1:]], "hé") == [0, 1]
    with pytest.raises(ValueError, match="do not spell"):
        heads_texts.character_tokens(["b"], "a")


@pytest.mark.parametrize(
    "piece, expected",
    [(",", True), ("\n\n", True), (" (", True), (" ", False), ("a.", False), (b"\xe2", False)],
)
def test_delimiters(piece, expected):
    assert behaviours.is_delimiter(piece) == expected


def test_semantic_score_finds_cosine_and_not_distance():
    rng = np.random.default_rng(0)
    n, ids = 60, np.arange(60)
    embeddings = rng.standard_normal((n, 8))
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    distance = np.arange(n)[:, None] - np.arange(n)[None, :]
    maps = np.stack([np.exp(3 * unit @ unit.T), np.exp(-distance / 5.0), rng.random((n, n))])[
        None
    ]  # (1, head, q, k)
    rows = semantic.sample_rows(n, 20)
    value, *null = semantic.semantic_scores(maps[:, :, rows], rows, ids, embeddings, shuffles=10)
    assert value[0, 0] > 0.97 and abs(value[0, 1]) < 0.1 and abs(value[0, 2]) < 0.15
    assert np.abs(null).max() < 0.3 and np.shape(null) == (10, 1, 3)
    few = semantic.semantic_scores(maps[:, :, :4], [1, 2, 3, 4], ids, embeddings)
    assert np.isnan(few).all()


def test_js_divergence_by_hand():
    """Two rows without a common key are 1 bit apart, equal rows 0; (1, 0) and (1/2, 1/2) by the
    formula. A head that its layer does not have is no row."""
    heads = np.array([[1, 0], [0, 1], [0.5, 0.5], [1, 0], [MISSING, MISSING]], np.float32)
    sums = similarity.divergence_sums(heads[None, :, None, :], [1])  # (layer, head, row, key)
    mixed = -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25)) - 0.5
    np.testing.assert_allclose(sums[0], [0, 1, mixed, 0], atol=1e-12)
    distance = similarity.distances([sums, sums], [1, 1])
    np.testing.assert_allclose(distance[0], [0, 1, np.sqrt(mixed), 0])


def test_js_in_small_blocks_is_the_same(monkeypatch):
    rng = np.random.default_rng(1)
    rows = rng.dirichlet(np.ones(12), (2, 3, 4)).astype(np.float32)
    whole = similarity.divergence_sums(rows, [5, 8, 10, 11])
    monkeypatch.setattr(similarity, "BLOCK", 1)
    np.testing.assert_allclose(similarity.divergence_sums(rows, [5, 8, 10, 11]), whole, rtol=1e-6)


@pytest.fixture
def planted_distance():
    """Three groups of points on a line: distances within are below 0.1, between above 1."""
    points = np.concatenate([[0, 0.005, 0.05, 0.06, 0.09], [2, 2.04, 2.05], [5, 5.02]])
    return np.abs(points[:, None] - points[None, :])


def test_clusters_cover_and_pairs_of_planted_groups(planted_distance):
    sizes = [5, 3, 2]
    found, silhouette = similarity.cluster(planted_distance, largest=6)
    assert found.tolist() == np.repeat([0, 1, 2], sizes).tolist() and silhouette > 0.9
    assert len(similarity.cover(planted_distance, 0.1)) == 3
    curve = similarity.cover_curve(planted_distance, [0.0, 0.1, 2.1, 5.1])
    assert curve["heads"].tolist() == [10, 3, 2, 1]
    names = [(i // 5, i % 5) for i in range(10)]
    first = similarity.closest_pairs(planted_distance, names, 1).iloc[0]
    assert (
        first["a"] == "L0H0" and first["b"] == "L0H1" and first["distance"] == pytest.approx(0.005)
    )
    rand, jaccard = similarity.stability([planted_distance**2] * 3, [1, 1, 1], found, n_boot=3)
    assert (rand == 1).all() and (jaccard == 1).all()
    coordinates, share = similarity.classical_mds(planted_distance, 1)
    np.testing.assert_allclose(np.abs(coordinates - coordinates.T), planted_distance, atol=1e-9)
    assert share[0] == pytest.approx(1)


def test_group_agreement_sees_planted_groups():
    names = [(layer, head) for layer in range(6) for head in range(6)]
    layer, head = np.array(names).T
    distance = np.where(
        (head[:, None] // 3 == head[None] // 3) & (layer[:, None] == layer[None]), 0.1, 0.5
    )
    np.fill_diagonal(distance, 0)
    found = similarity.group_agreement(distance, names, 6, 2)
    assert (
        found["inside"] == pytest.approx(0.1)
        and found["outside"] == pytest.approx(0.5)
        and found["p"] < 0.05
    )
    assert similarity.group_agreement(distance, names, 6, 6) is None
    assert similarity.group_agreement(distance, names, 6, 1) is None
    rng = np.random.default_rng(0)
    noise = rng.random((36, 36))
    assert similarity.group_agreement(noise + noise.T, names, 6, 2)["p"] > 0.05


def test_importance_pruning_and_sampling():
    names = [(layer, head) for layer in range(3) for head in range(2)]
    kl = np.array([0.5, 0.1, 0.3, 0.0, 0.2, 0.4])
    sweep = pd.DataFrame(
        {"loss_change": kl, "loss_change_err": 0.1, "kl": kl},
        index=pd.Index(names, tupleize_cols=False),
    )
    table = importance.importance_table(sweep)
    assert list(zip(table["layer"], table["head"])) == names and (table["error"] == 0.1).all()
    sets = importance.pruning_sets(table, repeats=1, counts=[1, 3])
    sets = {name: [(*edit.layer, *edit.head) for edit in edits] for name, edits in sets.items()}
    assert sets["least important", 0, 3] == [(1, 1), (0, 1), (2, 0)]
    assert sets["most important", 0, 1] == [(0, 0)] and len(set(sets["random", 0, 3])) == 3
    assert {count for _, _, count in importance.pruning_sets(table)} == {1, 2, 3}
    picked = importance.sample_heads(names, 3)
    assert [layer for layer, _ in picked] == [0, 1, 2]
    assert importance.sample_heads(names, 9) == names
    related = importance.relations(table.assign(twice=2 * kl, against=-kl), ["twice", "against"])
    assert related["rho"].tolist() == pytest.approx([1, -1])
    whole = importance.population(kl, 6)
    assert whole["mean"] == pytest.approx((0.25, 0.25, 0.25)) and whole["share"][
        0
    ] == pytest.approx(5 / 6)
    part = importance.population(kl, 600)
    assert part["mean"][1] < 0.25 < part["mean"][2]
    rows = pd.DataFrame(
        {"order": ["random"] * 3, "removed": [1, 2, 3], "loss_change": [0.01, 0.3, 0.05]}
    )
    assert importance.tolerated(rows, 0.1)["random"] == 1


def test_depth_and_comparison_and_their_sentences(measured, texts):
    scores, profiled, earned = measured
    moved = profiled.copy(deep=True)
    moved["value"].loc[{"measure": "induction", "layer": 1, "head": KINDS["induction"]}] = 0.25
    moved["low"].loc[{"measure": "induction", "layer": 1, "head": KINDS["induction"]}] = 0.0
    found = profile.compare(profiled, moved, earned, profile.labels(moved, 0.1))
    assert found.loc["induction", "lost"] == 1 and found.loc["induction", "head"] == "L1H5"
    assert found.loc["induction", "largest_change"] == pytest.approx(0.75)
    rest = found.drop("induction")
    assert (
        (rest["spearman"].dropna() > 0.999).all()
        and (rest["mean_change"] == 0).all()
        and rest["lost"].sum() == 0
    )
    said = " ".join(say.survival(found, "one", "two").split())
    had = int(earned.sum())
    assert f"Of {had} labels in one, {had - 1} " in said and "induction of L1H5, by 0.750" in said
    depth = profile.by_depth(moved)
    assert (
        depth.loc["induction", "peak layer"] == 0
        and depth.loc["induction", "spearman with layer"] <= 0
    )
    assert depth.loc["sink", "spearman with layer"] == pytest.approx(0)
    table = profile.head_table(profiled, earned)
    text = " ".join(say.baselines(profile.label_counts(earned, profiled), table, 0.1).split())
    assert text.startswith("Of 18 heads") and "syntactic 2" in text and text.endswith("2 none.")
    best = profile.typical_texts(scores, 0, KINDS["induction"], ["induction"]).loc["induction"]
    assert best["text"].startswith("random") and best["score"] == pytest.approx(1)
    assert say.texts(texts).count(" of ") == 5


def planted(folder, change):
    """A tiny model after change({tensor name: writable array})."""
    path = tiny_model("llama", folder, n_kv_head=4)
    reader = gguf.GGUFReader(str(path), "r+")
    change({tensor.name: tensor.data for tensor in reader.tensors})
    reader.data.flush()
    return path


def test_a_copied_head_is_the_closest_pair(tmp_path):
    def copy(tensors):
        for part in "qkv":
            weight = tensors[f"blk.1.attn_{part}.weight"]
            weight[16:32] = weight[:16]

    with CaptureSession(planted(tmp_path, copy)) as session:
        ids = list(range(3, 60, 2))
        rows = list(range(4, len(ids), 3))
        cap = session.capture(ids, ("attention", "attn_heads"), queries=rows)
    np.testing.assert_array_equal(
        cap.attn_heads.sel(layer=1).values[0], cap.attn_heads.sel(layer=1).values[1]
    )
    distance = similarity.distances([similarity.divergence_sums(cap.attention, rows)], [len(rows)])
    best = similarity.closest_pairs(distance, [(i // 4, i % 4) for i in range(12)], 2)
    assert (best.loc[0, "a"], best.loc[0, "b"]) == ("L1H0", "L1H1") and best.loc[
        0, "distance"
    ] < 1e-3
    assert best.loc[1, "distance"] > 0.1


@pytest.mark.parametrize("mode", ["zero", "mean"])
def test_ablating_a_head_without_output_changes_nothing(tmp_path, mode):
    def silence(tensors):
        tensors["blk.2.attn_output.weight"][:, 32:48] = 0

    with CaptureSession(planted(tmp_path, silence)) as session:
        names = [(layer, head) for layer in range(3) for head in range(4)]
        variants = importance.one_by_one(names, mode)
        rows = session.sweep(list(range(3, 40)), variants, progress=False)
    table = importance.importance_table(rows).set_index(["layer", "head"])
    assert table.loc[(2, 2), "loss_change"] == 0 and table.loc[(2, 2), "kl"] == pytest.approx(
        0, abs=1e-9
    )
    assert (table.drop((2, 2))["kl"] > 1e-5).all()


@pytest.mark.slow
def test_profile_of_smollm2_streamed_is_that_of_the_full_capture(engine):
    """One text of each kind through the worker, and the same scores from the captured matrices."""
    model = engine.model
    texts = heads_texts.default_texts(engine.tokenize, model.pieces, model.token_types, shuffles=2)
    for text in (texts[0], texts[12], texts[-1]):
        stats = engine.head_statistics(text.ids, patterns=text.patterns)
        attention = engine.capture(text.ids, stages=("attention",)).attention
        found = behaviours.scores(text, stats)
        for name, expected in pattern_scores(attention, text).items():
            np.testing.assert_allclose(found[name], expected, atol=1e-5)
