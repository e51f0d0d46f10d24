"""Probes: a label that was planted is found at its layer and at chance elsewhere; sets by rules do
not leak; figures and sentences of what was measured."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from llamatelemetry import ProbeError
from llamatelemetry.errors import NotFiniteError
from llamatelemetry.probing import figures, probes, say, sets

pytest.importorskip("sklearn", reason="llamatelemetry[analysis] is not installed")
N, LAYERS, WIDTH, PLANTED = 200, 5, 40, 3


@pytest.fixture(scope="module")
def planted():
    """(states, labels, groups): noise, and a direction added to half of the texts at one layer."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(N, LAYERS, WIDTH)).astype(np.float32)
    labels = np.array(["no", "yes"] * (N // 2))
    direction = rng.normal(size=WIDTH)
    values[labels == "yes", PLANTED] += 4 * direction / np.linalg.norm(direction)
    states = xr.DataArray(values, dims=("text", "layer", "embd"), coords={"layer": range(LAYERS)})
    return states, labels, np.repeat(np.arange(N // 4), 4)


def test_a_planted_label_is_found_at_its_layer_and_at_chance_elsewhere(planted):
    table = probes.by_layer(*planted, shuffles=5)
    assert table.accuracy[PLANTED] > 0.93 and table.low[PLANTED] > 0.9
    others = table.drop(index=PLANTED)
    assert (others.accuracy < 0.62).all() and (others.low < 0.5 + 0.05).all()
    assert (table.shuffled - 0.5).abs().max() < 0.08  # also where it was planted
    assert (table.low <= table.accuracy).all() and (table.accuracy <= table.high).all()
    assert (table.majority == 0.5).all() and table.attrs["groups"] == N // 4
    pd.testing.assert_frame_equal(table, probes.by_layer(*planted, shuffles=5))  # the seed's
    said = say.probes({"a planted label": table})
    assert f"state {PLANTED}" in said and "200 texts in 50 groups" in said


def test_accuracy_is_scikit_learns(planted):
    """The same folds through scikit-learn's own pipeline and scorer."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    states, labels, groups = planted
    table = probes.by_layer(*planted, shuffles=0, strength=0.3)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=1000))
    parts = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    for layer in range(LAYERS):
        x = states.sel(layer=layer).values.astype(np.float64)
        told = cross_val_predict(model, x, labels, groups=groups, cv=parts)
        assert table.accuracy[layer] == pytest.approx((told == labels).mean(), abs=1e-12)
    assert table.shuffled.isna().all()


def test_words_that_leak_are_held_back_by_groups():
    """States that only tell the word, each word with one label: perfect on words that were seen, at
    chance on others."""
    rng = np.random.default_rng(1)
    words = np.repeat(np.arange(40), 6)
    labels = (np.arange(40) % 2)[words]
    values = rng.normal(size=(40, 1, 60))[words] + 0.01 * rng.normal(size=(240, 1, 60))
    states = xr.DataArray(values, dims=("text", "layer", "embd"), coords={"layer": [0]})
    assert probes.by_layer(states, labels).accuracy[0] > 0.95
    grouped = probes.by_layer(states, labels, words)
    assert grouped.accuracy[0] < 0.7 and grouped.low[0] < 0.5 < grouped.high[0]
    # Whole groups are shuffled where a group has one label.
    task = probes.Task(labels, words, 5, 0)
    codes = task.shuffled()
    assert all(len(set(codes[words == word])) == 1 for word in range(40))
    assert (np.bincount(codes) == np.bincount(labels)).all() and (codes != labels).any()
    mixed = probes.Task(np.arange(240) % 2, words, 5, 0)
    codes = mixed.shuffled()
    assert all(codes[words == word].sum() == 3 for word in range(40))


def test_across_files_the_difference_is_paired(planted):
    """A second file whose states are noisier at the planted layer, a third that is turned over."""
    states, labels, groups = planted
    rng = np.random.default_rng(2)
    noisy = states + rng.normal(size=states.shape) * 3
    table = probes.across(
        {"F32": states, "Q2_K": noisy, "turned": 2 * states.mean("text") - states}, labels, groups
    )
    row = table.loc[("Q2_K", PLANTED)]
    assert row.lost > 0.1 and row.lost_low > 0 and row.lost_low <= row.lost <= row.lost_high
    assert row.lost == pytest.approx(table.loc[("F32", PLANTED)].accuracy - row.accuracy)
    alone = probes.by_layer(noisy, labels, groups, shuffles=0)
    np.testing.assert_array_equal(alone.accuracy, table.loc["Q2_K"].accuracy)
    same = table.loc["F32"]
    assert (same.lost == 0).all() and (same.moved == same.accuracy).all()
    turned = table.loc[("turned", PLANTED)]  # as readable, but not by the first file's probe
    assert turned.accuracy > 0.93 and turned.moved < 0.1
    figure = figures.across(table, title="t")
    assert len([t for t in figure.data if t.mode == "lines+markers"]) == 6
    assert "a probe of Q2_K has" in say.across(table) and "points lost" in say.across(table)


def told_by_group(size, at):
    """States that tell each group's commoner label, groups of `size` with their label `at`."""
    rng = np.random.default_rng(3)
    groups = np.repeat(np.arange(40), size)
    values = rng.normal(size=(40 * size, 1, 8))
    values[:, 0, 0] = np.where(groups % 2, 6, -6)
    labels = np.concatenate([at(group % 2) for group in range(40)])
    return (
        xr.DataArray(values, dims=("text", "layer", "embd"), coords={"layer": [0]}),
        labels,
        groups,
    )


@pytest.mark.parametrize(
    "size, at",
    [
        pytest.param(3, lambda one: [one, one, one], id="one label each"),
        pytest.param(4, lambda one: [one, one, one, 1 - one], id="most of one"),
        pytest.param(4, lambda one: [one, one, 0, 1], id="some of one"),
    ],
)
def test_shuffled_labels_mean_nothing_whatever_the_groups(size, at):
    """Shuffled inside groups that tell the label, they would tell it still."""
    table = probes.by_layer(*told_by_group(size, at), shuffles=5)
    assert abs(table.shuffled[0] - 0.5) < 0.1 and table.accuracy[0] > 0.7
    states, labels, groups = told_by_group(3, lambda one: [one] * 3)
    labels[0] = 1 - labels[0]  # a single group of two labels
    assert abs(probes.by_layer(states, labels, groups, shuffles=5).shuffled[0] - 0.5) < 0.1


def test_equal_texts_are_one_group_or_refused(planted):
    """A probe is never tested on a text that it was made from."""
    states, labels, _ = planted
    twice = states.assign_coords(text=[f"text {n // 4}" for n in range(N)])
    assert probes.by_layer(twice, labels, shuffles=0).attrs["groups"] == N // 4
    assert probes.by_layer(twice, labels, np.arange(N) // 8, shuffles=0).attrs["groups"] == N // 8
    with pytest.raises(ProbeError, match="Text 0 is there again in another group"):
        probes.by_layer(twice, labels, np.arange(N))
    with pytest.raises(ProbeError, match="Text 0 is there again"):
        probes.across({"a": twice}, labels, np.arange(N))


def test_what_is_read_best_is_said_of_one_layer_alone(planted):
    states, labels, groups = planted
    sure = states.copy()
    sure[:, :, 0] = np.where(labels == "yes", 9, -9)[:, None]
    said = " ".join(say.probes({"x": probes.by_layer(sure, labels, groups)}).split())
    assert f"alike at all {LAYERS} states: 100%" in said and "best" not in said
    said = say.probes({"x": probes.by_layer(sure[:, :1], labels, groups)})
    assert "x is read at state 0: 100%" in said and "1 of 1 state," in said
    sure[:, :2] = states[:, :2]
    assert "best at 3 states, first at state 2" in say.across(
        probes.across({"x": sure}, labels, groups)
    )


def test_what_the_commonest_label_gives_is_no_finding(planted):
    """170 of 200 have one label: 85% is read off anything."""
    states, *_ = planted
    labels = np.where(np.arange(N) % 20 < 17, "a", "b")
    table = probes.by_layer(0 * states, labels, shuffles=2)
    assert (table.accuracy == 0.85).all()
    said = " ".join(say.probes({"x": table.assign(shuffled_high=0.5)}).split())
    assert "the commonest label alone is 85%; at no state" in said
    said = " ".join(say.across(probes.across({"x": 0 * states, "y": states}, labels)).split())
    assert "nothing that a file could lose" in said and "points" not in said


def test_what_cannot_be_probed_is_refused(planted):
    states, labels, groups = planted
    for wrong in (None, states.values, states.to_dataset(name="hidden")):
        with pytest.raises(ProbeError, match="States are a DataArray"):
            probes.by_layer(wrong, labels, groups)
    with pytest.raises(ProbeError, match="name: states"):
        probes.across([states], labels, groups)
    with pytest.raises(ProbeError, match="not of one model"):
        probes.across({"a": states, "b": states[..., :2]}, labels, groups)
    for wrong in (
        dict(folds=2.5),
        dict(folds=1),
        dict(shuffles=-1),
        dict(strength=0),
        dict(seed=-1),
    ):
        with pytest.raises(ProbeError, match=next(iter(wrong))):
            probes.by_layer(states, labels, groups, **wrong)
    with pytest.raises(ProbeError, match="group of text 7 is missing"):
        probes.by_layer(states, labels, [None if n == 7 else n for n in range(N)])
    with pytest.raises(ProbeError, match="one value per text"):
        probes.by_layer(states, np.ones((N, 2)))
    with pytest.raises(ProbeError, match="no states"):
        probes.across({}, labels)
    with pytest.raises(ProbeError, match="layer"):
        probes.by_layer(states[:, :0], labels)
    with pytest.raises(ProbeError, match="two kinds"):
        probes.by_layer(states, ["a"] * N)
    with pytest.raises(ProbeError, match="5 folds need"):
        probes.by_layer(states, labels, np.arange(N) % 4)
    with pytest.raises(ProbeError, match="200 labels and 3 groups"):
        probes.by_layer(states, labels, [1, 2, 3])
    with pytest.raises(ProbeError, match="pool="):
        probes.by_layer(states.rename(text="token"), labels)
    with pytest.raises(ProbeError, match="missing"):
        probes.by_layer(states, pd.Series(labels).replace("no", None))
    broken = states.copy()
    broken[3, 2, 1] = np.nan
    with pytest.raises(NotFiniteError):
        probes.by_layer(broken, labels, groups)
    with pytest.raises(ProbeError, match="same layers"):
        probes.across({"a": states, "b": states[:, :2]}, labels, groups)


@pytest.mark.parametrize("name", sets.SETS)
def test_a_set_is_balanced_and_its_groups_hold(name):
    table = sets.labelled(name, 200)
    assert len(table) == 200 and not table.text.duplicated().any()
    assert table.label.value_counts().nunique() == 1
    assert table.groupby("label").group.nunique().min() >= 10  # enough for folds
    pd.testing.assert_frame_equal(table, sets.labelled(name, 200))
    assert not table.text.equals(sets.labelled(name, 200, seed=1).text)
    probes.Task(table.label, table.group, 5, 0)


@pytest.mark.parametrize("name", ["number", "tense", "sums"])
def test_the_last_word_does_not_tell_the_label(name):
    """What ends the text is drawn without a look at the label: last words are at chance."""
    table = sets.labelled(name, 240)
    last = table.text.str.split(n=-1).str[-1]
    if name == "sums":  # the answer: true and false ones of the same size
        sizes = last.astype(int).groupby(table.label).mean()
        assert abs(sizes["true"] - sizes["false"]) < 6
        right = table.text.map(lambda text: eval(text.replace("=", "==")))
        assert (right == (table.label == "true")).all()
        return
    best = pd.crosstab(last, table.label).max(axis=1).sum() / len(table)
    assert best < 0.65


def test_sets_say_what_they_are():
    number = sets.labelled("number", 40)
    for row in number.itertuples():
        subject = row.text.split()[1]
        assert subject == row.group + "s" * (row.label == "plural")
    tense = sets.labelled("tense", 40)
    pairs = dict(word.split(":") for word in sets.VERBS)
    for row in tense.itertuples():
        word = row.text.split()[2]
        assert word == (row.group if row.label == "present" else pairs[row.group])
    with pytest.raises(ProbeError, match="no set"):
        sets.labelled("colour")
    with pytest.raises(ProbeError, match="ask for fewer"):
        sets.labelled("language", 10_000)
    for n in (0, -1, 2.5, 1):
        with pytest.raises(ProbeError, match="n="):
            sets.labelled("tense", n)


def test_figures_show_every_line_and_say_survives_little(planted):
    table = probes.by_layer(*planted, shuffles=2)
    figure = figures.probes({"one": table, "two": table}, title="t")
    names = [trace.name for trace in figure.data if trace.mode == "lines+markers"]
    assert names == ["one", "one, labels shuffled", "two", "two, labels shuffled"]
    assert figure.layout.xaxis.title.text and figure.layout.yaxis.title.text
    alone = table.loc[[0]]
    alone.attrs = table.attrs
    assert "at no state" in say.probes({"noise": alone})
    without = probes.by_layer(*planted, shuffles=0)
    assert "nan" not in say.probes({"planted": without})


@pytest.fixture(scope="module")
def collected(engine, tmp_path_factory):
    table = sets.labelled("language", 120)
    where = tmp_path_factory.mktemp("states")
    return engine.collect(table, layers=[0, 8, 20], where=where, progress=False)


@pytest.mark.slow  # a model
def test_a_model_tells_languages_apart(collected):
    table = probes.by_layer(collected.hidden, collected.label, collected.group)
    assert table.accuracy.max() > 0.9 and table.low.max() > table.shuffled_high.max()


@pytest.mark.slow
def test_a_direction_planted_in_a_models_states_is_found_there_only(collected):
    """Added to half of the texts at layer 8, whatever they say."""
    rng = np.random.default_rng(0)
    states = collected.hidden.load().copy()
    labels = np.tile([0, 1], len(states.text) // 2)
    rng.shuffle(labels)
    direction = rng.normal(size=states.sizes["embd"])
    spread = states.sel(layer=8).std("text").values
    states.loc[dict(layer=8)] += labels[:, None] * 0.5 * direction * spread
    table = probes.by_layer(states, labels, collected.group)
    assert table.accuracy[8] > 0.9
    assert (table.accuracy.drop(8) < 0.65).all() and (table.shuffled < 0.65).all()
