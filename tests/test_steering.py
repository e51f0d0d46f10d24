"""Directions and control vectors: against llama.cpp's own generator, its file format, llama-server
and what is known of models made for it."""

from itertools import product
from pathlib import Path

import gguf
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from models import IDS, tiny_model
from scipy.stats import spearmanr

from llamatelemetry import (
    CaptureError,
    ControlVector,
    InferenceEngine,
    ModelLoadError,
    ablate_head,
    direction,
    knock_out,
)
from llamatelemetry.errors import LlamaTelemetryError, NotFiniteError
from llamatelemetry.maths import log_softmax
from llamatelemetry.steering import dose, figures, knockout, say

pytest.importorskip("llama_cpp", reason="the engine is not built: llamatelemetry engine build")
TOOL = np.load(Path(__file__).parent / "references" / "control_vector.npz")
PAIRS = [tuple(pair) for pair in TOOL["pairs"].tolist()]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with InferenceEngine() as engine:
        path = tiny_model("llama", tmp_path_factory.mktemp("models"))
        engine.load_model(path, auto_start=False, silent=True, threads=1)
        yield engine


def vector(layers=(2, 3), width=64, **more):
    rows = np.random.RandomState(5).standard_normal((len(layers), width)).astype(np.float32)
    rows = xr.DataArray(rows, dims=("layer", "embd"), coords={"layer": list(layers)})
    return ControlVector(rows, "llama", **more)


# Directions


def test_the_mean_direction_is_llama_cvector_generators(engine):
    """What it calls direction.l is of what leaves layer l - 1, and llama.cpp adds it a layer later:
    its quirk. Pairs are of equal length, where it fills nothing up with blanks."""
    for pair in PAIRS:
        assert len({len(engine.tokenize(text)) for text in pair}) == 1
    found = direction(engine, PAIRS, [1, 2], "mean", "all").unit()
    for layer in (1, 2):
        assert found.vectors.sel(layer=layer).values @ TOOL[f"direction.{layer}"] > 0.9999
    assert np.allclose(found.norms, 1, atol=1e-6)


def test_a_direction_by_hand(engine):
    states = [[engine.capture(text, "hidden").hidden for text in pair] for pair in PAIRS]
    last = np.stack(
        [a.values[2:, -1] - b.values[2:, -1] for a, b in states], 1
    )  # (layer, pair, embd)
    mean = direction(engine, PAIRS)
    assert mean.layers == [2, 3] and mean.hint == "llama" and mean.about["pairs"] == 3
    np.testing.assert_allclose(mean.vectors, last.mean(1), atol=1e-6)
    unit = mean.unit().vectors.values.astype(float)
    along = np.square(np.einsum("lpe,le->lp", last, unit)).sum(1)
    np.testing.assert_allclose(mean.explained, along / np.square(last).sum((1, 2)), rtol=1e-5)
    pca = direction(engine, PAIRS, slice(2, None), "pca")
    values, axes = np.linalg.eigh(np.einsum("lpe,lpf->lef", last.astype(float), last))
    np.testing.assert_allclose(pca.norms, np.sqrt(values[:, -1] / 3), rtol=1e-5)
    np.testing.assert_allclose(
        np.abs((pca.unit().vectors * axes[:, :, -1]).sum("embd")), 1, atol=1e-5
    )
    assert (pca.explained.values > mean.explained.values).all()
    assert (np.einsum("lpe,le->l", last, pca.vectors) > 0).all()
    over = direction(engine, PAIRS, 3, position="mean").vectors.values[0]
    wanted = np.mean([(a.mean("token") - b.mean("token")).values[3] for a, b in states], 0)
    np.testing.assert_allclose(over, wanted, atol=1e-6)


@pytest.mark.parametrize("architecture", ["qwen3moe", "lfm2", "gpt-oss"])
def test_mixtures_and_hybrids(architecture, tmp_path):
    """Strength 1 at the layer and position where it was found carries one text's state into the
    other's."""
    with InferenceEngine() as engine:
        path = tiny_model(architecture, tmp_path)
        engine.load_model(path, auto_start=False, silent=True, threads=1)
        pairs = [(IDS, IDS[:-1] + [9])]
        with pytest.warns(UserWarning, match="1 pair"):
            found = direction(engine, pairs, [2])
        edits = found.edits(1.0, positions=len(IDS) - 1)
        steered = engine.capture(pairs[0][1], "hidden", edits=edits).hidden.sel(layer=2)
        np.testing.assert_allclose(
            steered[-1], engine.capture(IDS, "hidden").hidden.sel(layer=2)[-1], atol=1e-5
        )


def test_a_planted_direction_is_found(tmp_path):
    """A model of one layer whose FFN and attention add nothing, and whose embedding is the token's
    own: the stream of two classes of tokens differs by what was planted, and adding it moves the
    logits as the output matrix says."""
    path, n = tiny_model("llama", tmp_path, n_layer=2), 40
    planted = np.random.RandomState(1).standard_normal(64).astype(np.float32)
    planted /= np.linalg.norm(planted)
    data = bytearray(path.read_bytes())
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}

    def written(name):
        place = tensors[name]
        shape = tuple(map(int, place.shape[::-1]))
        return np.frombuffer(data, np.float32, place.n_elements, place.data_offset).reshape(shape)

    for layer in (0, 1):
        written(f"blk.{layer}.attn_output.weight")[:] = 0
        written(f"blk.{layer}.ffn_down.weight")[:] = 0
    rows = written("token_embd.weight")
    rows -= np.outer(rows @ planted, planted)
    rows[:n] += 4 * planted  # class A: the first tokens
    output, norm = written("output.weight"), written("output_norm.weight")
    output, norm = output.copy(), norm.copy()
    path.write_bytes(data)
    random = np.random.RandomState(2)
    pairs = [([0, int(random.randint(3, n))], [0, int(random.randint(n, 320))]) for _ in range(40)]
    with InferenceEngine() as engine:
        engine.load_model(path, auto_start=False, silent=True, threads=1)
        found = direction(engine, pairs, [1, 2])
        cosine = found.unit().vectors.values @ planted
        assert (cosine > 0.9).all() and np.allclose(found.vectors.values @ planted, 4, atol=1e-4)
        # the rest of a token's embedding is noise, which random directions of that length are
        assert (np.abs(found.random(0).unit().vectors.values @ planted) < 0.5).all()
        plain = engine.capture([0, 200], ("hidden", "logits"))
        moved = engine.capture([0, 200], "logits", edits=found.edits(1.5, 2)).logits.values[1]
    x = plain.hidden.values[2, 1] + 1.5 * found.vectors.sel(layer=2).values
    x = x / np.sqrt(np.square(x).mean() + 1e-5) * norm
    np.testing.assert_allclose(moved, output @ x, atol=1e-4)


# Files


def test_saved_and_loaded(tmp_path):
    made = vector(about={"method": "mean", "pairs": 3})
    path = made.save(tmp_path / "folder" / "x.gguf")
    loaded = ControlVector.load(path)
    assert (
        loaded.vectors.equals(made.vectors) and loaded.hint == "llama" and loaded.layers == [2, 3]
    )
    assert loaded.about == {"method": "mean", "pairs": "3"}
    reader = gguf.GGUFReader(str(path))
    assert {tensor.name for tensor in reader.tensors} == {"direction.1", "direction.2"}
    assert reader.fields["general.architecture"].contents() == "controlvector"
    assert reader.fields["controlvector.layer_count"].contents() == 2
    made.save(path)  # its own kind may be written over


def test_repengs_file(tmp_path):
    """As its export_gguf writes one: the layers from the last to the first, of unit length, with
    the name that transformers has for the model's kind."""
    writer = gguf.GGUFWriter(str(tmp_path / "r.gguf"), "controlvector")
    writer.add_string("controlvector.model_hint", "mistral")
    writer.add_uint32("controlvector.layer_count", 3)
    rows = vector((2, 3, 4)).unit().vectors
    for layer in (3, 2, 1):
        writer.add_tensor(f"direction.{layer}", rows.sel(layer=layer + 1).values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = ControlVector.load(tmp_path / "r.gguf")
    assert loaded.hint == "mistral" and loaded.layers == [2, 3, 4]
    np.testing.assert_array_equal(loaded.vectors, rows)


@pytest.mark.slow
def test_llama_server_and_captures_run_a_saved_vector(tmp_path, llama_server):
    """The same logits as with the edits that the vector is."""
    path, saved = tiny_model("llama", tmp_path), vector().save(tmp_path / "x.gguf")
    exact = {"flash_attn": "off", "cache_type_k": "f32", "cache_type_v": "f32", "swa_full": True}
    with InferenceEngine(llama_server) as engine:
        engine.load_model(path, auto_start=False, silent=True, threads=1)
        edited = engine.capture(IDS, "logits", edits=vector().edits(0.8)).logits.values
        plain = engine.capture(IDS, "logits").logits.values
        engine.load_model(path, silent=True, threads=1, control_vectors=[(saved, 0.8)], **exact)
        np.testing.assert_allclose(engine.capture(IDS, "logits").logits, edited, atol=1e-6)
        said = engine.infer(IDS, max_tokens=1, temperature=0, n_probs=5).probabilities
    wanted = log_softmax(edited)[-1]
    np.testing.assert_allclose(said["logprob"], wanted[said["id"]], atol=1e-4)
    assert np.abs(wanted - log_softmax(plain)[-1]).max() > 0.1


@pytest.mark.parametrize(
    "made, says",
    [
        (vector(width=65), "65 wide.* is 64 wide"),
        (vector((2, 3, 4)), "directions up to 3.*from 1 to 2"),
    ],
)
def test_a_vector_of_another_model_is_named_by_load_model(tmp_path, made, says):
    saved = made.save(tmp_path / "x.gguf")
    with InferenceEngine() as engine, pytest.raises(ModelLoadError, match=says):
        path = tiny_model("llama", tmp_path)
        engine.load_model(path, auto_start=False, silent=True, control_vectors=[(saved, 0.8)])


@pytest.mark.parametrize(
    "made, says", [(vector(width=65), "65 wide"), (vector((2, 4)), "leaves layer 3")]
)
def test_a_vector_of_another_model_is_named_by_its_check(engine, made, says):
    with pytest.raises(CaptureError, match=says):
        made.check_fits(engine.model)
    with pytest.raises(CaptureError):
        engine.capture(IDS, edits=made.edits())


def test_what_a_file_cannot_hold_or_is_not(tmp_path):
    with pytest.raises(CaptureError, match=r"at\(slice\(2, None\)\)"):
        vector((1, 2)).save(tmp_path / "x.gguf")
    vector((1, 2)).at(slice(2, None)).save(tmp_path / "x.gguf")
    with pytest.raises(ModelLoadError, match="no control vector"):
        ControlVector.load(tiny_model("llama", tmp_path))
    with pytest.raises(CaptureError, match="not a file"):
        ControlVector.load(tmp_path / "no.gguf")
    with pytest.raises(CaptureError, match="no direction for layer 7"):
        vector().at([2, 7])


def test_lengths_cosines_and_random_ones():
    made = vector()
    drawn = made.random(3)
    np.testing.assert_allclose(drawn.norms, made.norms, rtol=1e-6)
    np.testing.assert_allclose(made.cosine(made), 1, rtol=1e-12)
    assert drawn.vectors.equals(made.random(3).vectors) and (np.abs(made.cosine(drawn)) < 0.5).all()
    assert not drawn.vectors.equals(made.random(4).vectors)
    assert made.cosine(vector((3, 4))).layer.values.tolist() == [3]
    with pytest.raises(CaptureError, match="64 wide and the other control vector 65"):
        made.cosine(vector(width=65))


@pytest.mark.parametrize(
    "arguments, says",
    [
        (dict(pairs=[]), "at least one"),
        (dict(pairs="ab"), r"pairs are"),
        (dict(pairs=[("a", "b", "c")] * 3), "pair 0 is two texts"),
        (dict(pairs=[("the", "the")] * 3), "the same"),
        (dict(pairs=PAIRS, method="median"), "method"),
        (dict(pairs=PAIRS, position="first"), "position"),
        (dict(pairs=PAIRS, position=99), "position=99"),
        (dict(pairs=PAIRS, layers=[44]), "0 to 3"),
        (dict(pairs=[("the cat", "the")] * 3, position="all"), "equally long"),
    ],
)
def test_what_gives_no_direction(engine, arguments, says):
    with pytest.raises(CaptureError, match=says):
        direction(engine, **arguments)


# Dose and response


def test_a_dose_is_what_the_output_matrix_says(tmp_path):
    """Added to what leaves the last layer, a direction moves the logits by the final norm and the
    output matrix alone."""
    with InferenceEngine() as engine:
        path = tiny_model("llama", tmp_path)
        engine.load_model(path, auto_start=False, silent=True, threads=1)
        output, norm = (
            np.array(tensor.data)
            for name in ("output.weight", "output_norm.weight")
            for tensor in gguf.GGUFReader(str(path)).tensors
            if tensor.name == name
        )
        made, prompts = vector((3,)), [IDS, IDS[:9]]
        found = dose.dose(
            engine, made, prompts, [5, 6], [7], strengths=(-1, 0, 2), n_random=2, progress=False
        )
        assert len(found) == 2 * (2 * 3 + 1)
        last = [engine.capture(prompt, "hidden").hidden.values[3, -1] for prompt in prompts]
        directions = {-1: made, 0: made.random(0), 1: made.random(1)}
        for row in found.itertuples():
            x = last[row.prompt] + row.strength * directions[row.seed].vectors.values[0]
            logits = output @ (x / np.sqrt(np.square(x).mean() + 1e-5) * norm)
            logp = log_softmax(logits[None])[0]
            wanted = np.logaddexp(logp[5], logp[6])
            assert row.difference == pytest.approx(wanted - logp[7], abs=1e-4)
            assert row.probability == pytest.approx(np.exp(wanted), abs=1e-5)
        odds = dose.dose(engine, made, prompts, [5], n_random=0, progress=False)
        p = odds["probability"]
        np.testing.assert_allclose(odds["difference"], np.log(p / (1 - p)), atol=1e-4)
        cost = dose.price(engine, made, IDS, strengths=(2,), n_random=1, progress=False)
        loss = [-engine.score(IDS, edits)["logprob"].mean() for edits in ((), made.edits(2))]
        row = cost[(cost["direction"] == "found") & (cost["strength"] == 2)].iloc[0]
        assert row["mean"] == pytest.approx(np.exp(loss[1] - loss[0]), rel=1e-5)
        assert row["low"] < row["mean"] < row["high"]
        assert cost[cost["strength"] == 0][["mean", "low", "high"]].to_numpy().tolist() == [
            [1, 1, 1]
        ]


def test_the_same_file_twice_steers_alike(engine, tmp_path):
    with InferenceEngine() as other:
        other.load_model(engine.model.path, auto_start=False, silent=True, threads=1)
        found, table = dose.across(
            {"a": engine, "b": other}, PAIRS, [IDS, IDS[:7]], [5], [6], layers=[2], progress=False
        )
    assert found["a"].vectors.equals(found["b"].vectors)
    pairs = table.groupby(["found_in", "steered"])["difference"].apply(list)
    assert len(pairs) == 4 and all(values == pairs.iloc[0] for values in pairs)
    said = say.across(dose.response(table), found["a"].cosine(found["b"]), ("a", "b"))
    assert "cosine of at least 1.000" in said.replace("\n", " ")
    figure = figures.across(dose.summary(table), measured="lead (nats)", title="t")
    assert len(figure.data) == 8


def test_intervals_and_slopes_by_hand():
    rows = [
        (name, seed, strength, prompt, slope * strength + prompt)
        for name, seed, slope in (("found", -1, 3.0), ("random", 0, -1.0), ("random", 1, 2.0))
        for strength in (-1.0, 0.0, 2.0)
        for prompt in (0, 1)
        if strength or name == "found"
    ]
    table = pd.DataFrame(rows, columns=["direction", "seed", "strength", "prompt", "difference"])
    summary = dose.summary(table).set_index(["direction", "strength"])
    assert summary.loc[("found", 2.0)].tolist() == [6, 6, 6]  # both prompts move alike
    assert summary.loc[("random", 2.0)].tolist() == [1, -2, 4]
    slopes = dose.response(table).groupby(["direction", "seed"])["slope"].mean()
    assert slopes.to_dict() == pytest.approx(
        {("found", -1): 3, ("random", 0): -1, ("random", 1): 2}
    )
    table.loc[(table["strength"] == 2) & (table["prompt"] == 1), "difference"] += 2
    summary = dose.summary(table).set_index(["direction", "strength"])
    assert summary.loc[("found", 2.0)].tolist() == [7, 6, 8]  # one moves by 6, one by 8


def test_words_are_told_apart_by_one_token(engine):
    ids = {word: engine.tokenize(word, False)["id"].tolist() for word in ("the cat", "the dog")}
    first, second = ids.values()
    at = next(place for place, pair in enumerate(zip(first, second)) if len(set(pair)) > 1)
    assert at and dose.answers(engine, "the cat", ["the dog"]) == (
        first[:at],
        [first[at]],
        [second[at]],
    )
    assert dose.answers(engine, [7, 8], ["the dog"]) == ([], [7, 8], [second[0]])
    assert dose.answers(engine, "the cat", ()) == ([], [first[0]], [])
    found = dose.dose(engine, vector(), [IDS], "the cat", "the dog", n_random=0, progress=False)
    logits = engine.capture(IDS + first[:at], "logits").logits.values[-1]
    lead = found[found["strength"] == 0]["difference"].item()
    assert lead == pytest.approx(logits[first[at]] - logits[second[at]], abs=1e-4)
    for arguments, says in (
        (([IDS], ["the", "cat"], ["the"]), "one token tells apart"),
        (([IDS], []), "at least one"),
        (([IDS], [""]), "at least one"),
        (("a text", ["the"]), "several texts"),
    ):
        with pytest.raises(CaptureError, match=says):
            dose.dose(engine, vector(), *arguments, progress=False)


# Edges


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    """gemma2: layers 0 and 2 see 8 tokens back."""
    with InferenceEngine() as engine:
        path = tiny_model("gemma2", tmp_path_factory.mktemp("models"))
        engine.load_model(path, auto_start=False, silent=True, threads=1)
        yield engine, engine.capture(IDS, ("attention", "logits"))


def test_cuts_are_those_of_captures(windowed):
    engine, cap = windowed
    last, answers = len(IDS) - 1, (5, 77)
    groups = [
        knockout.Group("one", [0]),
        knockout.Group("two", [0, 1], [1, 2]),
        knockout.Group("three", [3]),
    ]
    found = knockout.cut(engine, IDS, cap.attention, answers, groups, [0, 22, last], progress=False)
    assert np.isnan(found["kl"].sel(group="one", key=0))  # before its window
    logits = cap.logits.values[-1]
    assert found.attrs["lead"] == pytest.approx(logits[5] - logits[77], abs=1e-4)
    for name, layers, heads, key in (
        ("one", [0], None, 22),
        ("two", [1], [1, 2], 0),  # layer 0 does not see that far
        ("two", [0, 1], [1, 2], 22),
        ("three", [3], None, last),
    ):
        edits = knock_out(layers, heads, last, key)
        again = engine.capture(IDS, "logits", edits=edits).logits.values[-1]
        change = (again[5] - again[77]) - (logits[5] - logits[77])
        row = found.sel(group=name, key=key)
        assert float(row["change"]) == pytest.approx(change, abs=1e-4)
        weights = cap.attention.sel(layer=layers).isel(query=-1, key=key)
        weights = weights if heads is None else weights.isel(head=heads)
        assert float(row["weight"]) == pytest.approx(float(weights.mean()), rel=1e-5)
    assert "rank correlation" in say.cuts(found, cap.tokens["piece"].tolist())


def test_a_map_is_as_fine_as_its_seconds_allow(windowed, capsys):
    engine, cap = windowed
    fine = knockout.cut_map(engine, IDS, cap.attention, (5, 77), seconds=1e6, progress=False)
    assert fine.sizes == {"group": 4, "key": len(IDS)} and fine["group"][1] == "layer 1"
    coarse = knockout.cut_map(engine, IDS, cap.attention, (5, 77), 1, seconds=1e-6)
    assert coarse.sizes == {"group": 4, "key": 12} and coarse["group"][0] == "head 0"
    assert "4 groups and 12 keys are tried" in capsys.readouterr().out
    grouped = knockout.head_groups(cap.attention, 1, 3)
    assert [group.name for group in grouped] == ["heads 0 to 2", "head 3"]


def test_whole_tokens_beside_attention_and_rollout(windowed):
    engine, cap = windowed
    rollout = np.linspace(0, 1, len(IDS))
    table = knockout.whole_tokens(engine, IDS, cap.attention, (5, 77), range(28), rollout, False)
    layers = [1, 3]  # of the others the window is over
    again = engine.capture(IDS, "logits", edits=knock_out(layers, None, 27, 3)).logits.values
    kl = np.exp(log_softmax(cap.logits.values)) * (
        log_softmax(cap.logits.values) - log_softmax(again)
    )
    assert table["kl"][3] == pytest.approx(kl[-1].sum(), abs=1e-5)
    expected = spearmanr(table["kl"][1:], cap.attention.values[:, :, -1].mean((0, 1))[1:])[0]
    assert table.attrs["attention"] == pytest.approx(expected)


def test_the_strongest_edge_of_every_query(windowed):
    engine, cap = windowed
    weights = cap.attention.values[1, 2]
    edited = engine.capture(
        IDS, edits=knockout.strongest_edges(cap.attention, 1, 2)
    ).attention.values[1, 2]
    rows = np.arange(1, len(IDS))
    assert not edited[rows, weights.argmax(-1)[rows]].any() and edited[0, 0] == 1
    np.testing.assert_allclose(edited.sum(-1), 1, atol=1e-6)
    table = knockout.head_or_edge(engine, IDS, cap.attention, [(1, 2), (2, 0)], progress=False)
    swept = engine.sweep(IDS, {"head": ablate_head(1, 2)}, progress=False)
    assert (
        table["kl_head"][0] == pytest.approx(swept["kl"].iloc[0]) and (table["kl_edge"] > 0).all()
    )
    assert table["weight"][0] == pytest.approx(weights.max(-1)[1:].mean(), rel=1e-6)
    assert "median of 2 heads" in say.head_or_edge(table).replace("\n", " ")


def test_one_token_has_no_edge_to_cut(windowed):
    engine, _ = windowed
    cap = engine.capture([5], "attention")
    found = knockout.cut_map(engine, [5], cap.attention, (5, 77), progress=False)
    assert not found["kl"].notnull().any() and "No edge" in say.cuts(found, ["a"])
    assert "no edge could be cut" in figures.cuts(found, ["a"], title="t").to_json()
    table = knockout.whole_tokens(engine, [5], cap.attention, (5, 77), [0], [1.0], False)
    assert say.importance(table, ["a"]) == "No token after the first could be cut out."
    assert knockout.head_or_edge(
        engine, [5, 6], engine.capture([5], "attention").attention, [(0, 0)], False
    ).empty


def dosed(strengths, n_prompts=3, n_random=2):
    """A dose table whose difference rises by a tenth per unit of strength, of random ones by a
    hundredth."""
    rows = [("found", -1, 0.0, prompt, 0.5) for prompt in range(n_prompts)]
    for prompt, strength in product(range(n_prompts), filter(None, strengths)):
        rows.append(("found", -1, strength, prompt, 0.5 + 0.1 * strength + 0.01 * prompt))
        rows += [
            ("random", seed, strength, prompt, 0.5 + 0.01 * strength) for seed in range(n_random)
        ]
    return pd.DataFrame(rows, columns=[*dose.KEYS, "prompt", "difference"])


@pytest.mark.parametrize(
    "strengths, expected",
    [
        ((1.0, 2.0), "+0.11 nats at strength 1 and +0.21 nats at strength 2"),
        ((-2.0, -1.0), "-0.19 nats at strength -2 and -0.09 nats at strength -1"),
        ((4.0,), "+0.41 nats at strength 4; with random directions of its length by +0.04; the two intervals "
         "part at 1 of 1 strength"),
        ((0.0,), "Only strength 0 was tried"),
    ],
)  # fmt: skip
def test_what_a_dose_does_is_said_of_strengths_that_were_tried(strengths, expected):
    """Not of 0 among the ends, where no random direction was measured."""
    cost = pd.DataFrame({"direction": "found", "strength": [0.0, *strengths], "mean": 1.5})
    response = dose.summary(dosed(strengths))
    said = " ".join(say.dose(response, cost.drop_duplicates(), [" a"], []).split())
    assert expected in said and "nan" not in said


def test_one_prompt_has_no_interval():
    response = dose.summary(dosed((1.0, 2.0), n_prompts=1))
    assert response.loc[response["direction"] == "found", ["low", "high"]].isna().all(None)
    cost = pd.DataFrame(
        {"direction": "found", "strength": [1.0, 2.0], "mean": 1.5, "low": 1, "high": 2}
    )
    said = " ".join(say.dose(response, cost, [" a"], [" b"]).split())
    assert "one prompt alone has no interval" in said and "part" not in said
    figure = figures.dose(response, cost, measured="lead (nats)", title="t")
    assert "customdata" not in figure.data[1].hovertemplate


def test_where_a_direction_lies_most_is_said_where_it_lies_anywhere_more():
    norms = xr.DataArray([1.0, 1.0, 1.0], dims="layer", coords={"layer": [2, 3, 4]}, name="norm")
    stream, same = pd.Series([2.0] * 3, [2, 3, 4]), norms.rename("explained")
    said = " ".join(say.direction(norms, same, stream).split())
    assert said == (
        "The direction is 50% as long as the stream in each of 3 states; 100% of the pairs' squared "
        "differences lie along it in each of 3 states."
    )
    said = " ".join(say.direction(norms * [1, 2, 1], same * [0.1, 0.2, 0.9], stream).split())
    assert "100% as long as the stream in state 3, the most of 3 states" in said
    assert "90% of the pairs' squared differences lie along it in state 4, the most" in said
    none = say.direction(norms[:1], same[:1] * np.nan, 0 * stream)
    assert none == "There is no length to compare."
    figures.direction(norms, same, 0 * stream, title="t")


def test_cuts_that_change_nothing_are_no_finding():
    size, coords = ("group", "key"), {"group": ["layer 0"], "key": [0, 1, 2]}
    flat = {name: (size, np.zeros((1, 3))) for name in ("change", "kl", "weight")}
    said = " ".join(say.cuts(xr.Dataset(flat, coords, {"lead": 1.0}), ["a", "b", "c"]).split())
    assert said.endswith("3 cuts: too few, or too alike, for a rank correlation.")
    table = pd.DataFrame({"key": [0, 1], "kl": 0.0, "attention": 0.5})
    assert (
        say.importance(table, ["a", "b"])
        == "Cutting out any of 1 token after the first changes nothing."
    )
    none = pd.DataFrame({"kl_head": [0.0], "kl_edge": [0.0]})
    assert "Zeroing any of 1 head changes nothing" in say.head_or_edge(none)


def test_what_cannot_be_cut_is_named_at_the_call(engine):
    cap = engine.capture(IDS[:6], stages="attention")
    given = (engine, IDS[:6], cap.attention)
    groups = knockout.layer_groups(cap.attention)
    for wrong, says in (
        (lambda: knockout.cut(*given, [5, 5], groups), "two different tokens"),
        (lambda: knockout.cut(*given, [5, 6, 7], groups), "two different tokens"),
        (lambda: knockout.cut(*given, [5, 6], groups, [6]), "a key=6: .* from 0 to 5"),
        (lambda: knockout.cut(*given, [5, 6], [knockout.Group("x", [99])]), "no layer 99"),
        (lambda: knockout.head_groups(cap.attention, 99), "no layer 99"),
        (lambda: knockout.layer_groups(cap.attention, 0), "size=0"),
        (lambda: knockout.head_or_edge(*given, [(0, 4)]), "head=4"),
        (lambda: knockout.head_or_edge(*given, [(99, 0)]), "no layer 99"),
    ):
        with pytest.raises(CaptureError, match=says):
            wrong()
    broken = cap.attention.copy(data=cap.attention.values * np.float32(np.nan))
    with pytest.raises(NotFiniteError):
        knockout.cut(engine, IDS[:6], broken, [5, 6], groups)


def test_an_edge_of_the_last_query_moves_no_scored_token(engine):
    """Of two tokens only the first one's prediction is scored, and it sees itself alone."""
    cap = engine.capture(IDS[:2], stages="attention")
    assert knockout.head_or_edge(engine, IDS[:2], cap.attention, [(0, 0)], False).empty
    cap = engine.capture(IDS[:3], stages="attention")
    assert len(knockout.head_or_edge(engine, IDS[:3], cap.attention, [(0, 0)], False)) == 1


def test_a_dose_of_nothing_is_refused(engine):
    vector = direction(engine, [("good day", "bad day")] * 3)
    for run in (
        lambda: dose.dose(engine, vector, ["The cat"], [5], strengths=[0]),
        lambda: dose.price(engine, vector, "The cat", strengths=[]),
        lambda: dose.dose(engine, vector, [""], [5], strengths=[1]),
        lambda: dose.dose(engine, vector, ["The cat"], [5], strengths=[np.nan]),
    ):
        with pytest.raises(CaptureError, match="not 0|is empty|finite"):
            run()
    for run in (
        lambda: dose.dose(engine, 5, ["The cat"], [5]),
        lambda: dose.dose(engine, vector, ["The cat"], [5], n_random=-1),
        lambda: dose.dose(engine, vector, ["The cat"], [5], seed=-1),
        lambda: vector.random("x"),
        lambda: vector.cosine(5),
    ):
        with pytest.raises(CaptureError, match="ControlVector|n_random=-1|seed="):
            run()


@pytest.mark.parametrize(
    "given, says",
    [((5,), "no name of a file"), ([("x.gguf", float("nan"))], "nan: it is a number")],
)
def test_no_control_vector_is_named_by_load_model(tmp_path, monkeypatch, given, says):
    monkeypatch.chdir(tmp_path)
    vector().save("x.gguf")
    path = tiny_model("llama", tmp_path)
    with InferenceEngine() as engine, pytest.raises(LlamaTelemetryError, match=says):
        engine.load_model(path, auto_start=False, silent=True, control_vectors=given)
