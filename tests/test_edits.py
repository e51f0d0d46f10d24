"""Interventions: each equals the same one in transformers (tests/references/make_interventions.py),
in llama.cpp itself where it has one, or what its definition says; and what makes no sense is named
where it is asked for."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from interventions import FAMILIES, KEPT, interventions
from models import IDS, tiny_model

import llamatelemetry
from llamatelemetry import CaptureError, ablate_head, ablate_layer, add, knock_out, patch, scale
from llamatelemetry.capture.edits import pack, unpack
from llamatelemetry.capture.session import CaptureSession
from llamatelemetry.gpus.devices import list_gpus
from llamatelemetry.maths import log_softmax

pytest.importorskip("llama_cpp", reason="the engine is not built: llamatelemetry engine build")
REFERENCES = np.load(Path(__file__).parent / "references" / "interventions.npz")
LAST = len(IDS) - 1
FEATURE = {"llama": 16, "gemma3": 32, "qwen3": 32, "gpt-oss": 16}
ATOL = {"gemma3": 3e-4}  # GELU comes from a table of halves: see test_references.py


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """One family: a session that reads a text at once, and one that takes 9 tokens at a time."""
    path = tiny_model(request.param, tmp_path_factory.mktemp("models"))
    with (
        CaptureSession(path, threads=1) as whole,
        CaptureSession(path, threads=1, n_ubatch=9) as parts,
    ):
        yield SimpleNamespace(name=request.param, path=path, whole=whole, parts=parts)


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    path = tiny_model("gemma2", tmp_path_factory.mktemp("models"))
    with CaptureSession(path, threads=1) as session:
        yield session


def logits(session, edits=(), ids=IDS, **options):
    return session.capture(ids, "logits", edits=edits, **options).logits.values


# transformers


@pytest.mark.parametrize("name", interventions(16))
def test_equals_transformers(family, name):
    function, arguments = interventions(FEATURE[family.name])[name]
    edit = getattr(llamatelemetry, function)(*arguments)
    wanted, plain = REFERENCES[f"{family.name} {name}"], logits(family.whole)[-KEPT:]
    for session in (family.whole, family.parts):
        found = logits(session, edit)[-KEPT:]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=ATOL.get(family.name, 1e-4))
    assert np.abs(wanted - plain).max() > 0.1


# What llama.cpp has itself


@pytest.mark.parametrize("architecture", ["llama", "qwen3moe", "lfm2"])
def test_adding_to_the_stream_is_llama_cpps_control_vector(architecture, tmp_path):
    """llama_set_adapter_cvec, asked for in the worker's own code; its direction of layer l is added
    to what leaves layer l, which is `hidden` of layer l + 1."""
    import ctypes

    from llamatelemetry.capture.runtime import Runtime

    path = tiny_model(architecture, tmp_path)
    n_layer = 4 if architecture == "lfm2" else 3
    vectors = np.random.RandomState(3).standard_normal((n_layer - 1, 64)).astype(np.float32)
    runtime = Runtime(str(path), threads=1, cache_type="f32")
    runtime.open(len(IDS))
    data = (np.float32(0.3) * vectors).ctypes
    runtime.api.llama_set_adapter_cvec(
        runtime.context, data.data_as(ctypes.POINTER(ctypes.c_float)), vectors.size, 64, 1, n_layer
    )
    runtime.decode(IDS)
    rows = runtime.logits(len(IDS)).copy()
    runtime.close()
    edits = [add("hidden", layer + 2, row, 0.3) for layer, row in enumerate(vectors)]
    with CaptureSession(path, threads=1) as session:
        np.testing.assert_array_equal(logits(session, edits), rows)
        assert np.abs(rows - logits(session)).max() > 0.1


# Definitions


def test_cutting_every_edge_of_a_head_but_its_own_leaves_its_own_value(session):
    """What it gives is then the value of the position itself, whatever its scores are."""
    everything = [knock_out(1, 2, query, slice(0, query)) for query in range(1, len(IDS))]
    stages = ("attention", "attn_heads", "v", "logits")
    cap = session.capture(IDS, stages, edits=everything)
    np.testing.assert_array_equal(cap.attention.values[1, 2], np.eye(len(IDS)))
    np.testing.assert_allclose(cap.attn_heads.values[1, 2], cap.v.values[1, 1], atol=1e-6)
    with pytest.raises(CaptureError, match="no key would be left for query 0 in head 2 of layer 1"):
        session.capture(IDS, edits=[*everything, knock_out(1, 2)])


def test_with_a_sink_all_edges_can_be_cut_and_that_ablates_the_head(tmp_path):
    """gpt-oss gives the attention that nothing takes to the head's sink, whose value is zero."""
    with CaptureSession(tiny_model("gpt-oss", tmp_path), threads=1) as session:
        cut, ablated = (
            logits(session, knock_out(1, [0, 3])),
            logits(session, ablate_head(1, [0, 3])),
        )
        np.testing.assert_array_equal(cut, ablated)
        assert np.abs(cut - logits(session)).max() > 0.1
        assert not session.capture(IDS, edits=knock_out(1, 0)).attention.values[1, 0].any()


@pytest.mark.parametrize("layer", [0, 1])  # gemma2: a sliding window, and all
def test_the_rest_of_a_row_is_renormalised(session, layer):
    plain = session.capture(IDS).attention.values[layer]
    keys, heads = [22, 25], [1, 3]
    found = session.capture(IDS, edits=knock_out(layer, heads, slice(24, None), keys))
    wanted = plain.copy()
    for head in heads:
        wanted[head, 24:, keys] = 0
        wanted[head, 24:] /= wanted[head, 24:].sum(-1, keepdims=True)
    np.testing.assert_allclose(found.attention.values[layer], wanted, atol=1e-6)


def test_edges_that_are_none(session):
    for edit in (knock_out(0, 1, 27, 3), knock_out(1, None, 3, [4, 7])):  # a window of 8; later
        with pytest.raises(CaptureError, match=f"names no edge of layer {edit.layer[0]}"):
            session.capture(IDS, edits=edit)
    session.capture(IDS, edits=knock_out(1, 1, 27, 3))  # that layer has no window
    session.capture(IDS, edits=knock_out(1, 1, slice(2, 9), 4))  # only from 4 on, and that is one


def test_ranges_are_the_edits_of_their_members(session):
    vector = np.random.RandomState(0).standard_normal((4, 32))
    pairs = [
        (scale("q", slice(1, 3), 0.5, [0, 2], slice(20, None)),
         [scale("q", l, 0.5, h, p) for l in (1, 2) for h in (0, 2) for p in range(20, 28)]),
        (add("attn_heads", range(2), vector, 1.0, [3, 27], slice(1, 3)),
         [add("attn_heads", l, vector[h], 1.0, p, h) for l in (0, 1) for h in (1, 2) for p in (3, 27)]),
        (knock_out([1, 3], [0, 1], [26, 27], range(22, 24)),
         [knock_out(l, h, q, k) for l in (1, 3) for h in (0, 1) for q in (26, 27) for k in (22, 23)]),
        (ablate_head([0, 2], slice(2, None)), [ablate_head(l, h) for l in (0, 2) for h in (2, 3)]),
        (ablate_head(2, [1, 3], "mean"), [ablate_head(2, h, "mean") for h in (1, 3)]),
        (ablate_layer([0, 1], "ffn"), [ablate_layer(0, "ffn"), ablate_layer(1, "ffn")]),
    ]  # fmt: skip
    for one, several in pairs:
        found = logits(session, one)
        np.testing.assert_array_equal(found, logits(session, several))
        assert np.abs(found - logits(session)).max() > 1e-3


@pytest.mark.parametrize("stage", ["q", "k", "v", "scores", "attention", "attn_heads", "hidden"])
def test_patching_with_itself_and_adding_nothing_change_nothing(session, stage):
    cap = session.capture(IDS, stages=(stage, "logits"))
    for edit in (patch(stage, [1, 2], cap), add(stage, 1, np.zeros(cap[stage].shape[1:])),
                 scale(stage, slice(None), 1.0)):  # fmt: skip
        np.testing.assert_array_equal(logits(session, edit), cap.logits.values)


def test_an_open_end_holds_for_tokens_that_are_generated(session):
    edits = [
        add("hidden", 2, np.random.RandomState(1).standard_normal(64), 0.4, slice(5, None)),
        knock_out(1, 0, slice(6, None), 3),
        scale("v", 1, 0.5, 1, slice(4, None)),
    ]
    cap = session.capture(IDS[:8], ("logits", "attention"), edits=edits, generate=6)
    ids = cap.tokens["id"].tolist()
    assert len(ids) > 9 and not cap.attention.values[1, 0, 6:, 3].any()
    np.testing.assert_allclose(cap.logits.values, logits(session, edits, ids), atol=1e-5)
    stopped = [edits[0].__class__(**vars(edits[0]) | {"positions": range(5, 8)}), *edits[1:]]
    assert np.abs(logits(session, stopped, ids)[9:] - cap.logits.values[9:]).max() > 1e-3


# Many at once


def test_predict_says_what_captures_say(family):
    edits = {
        "last": knock_out(1, 1, LAST, 25),
        "again": knock_out(2, None, LAST, 24),
        ("early", 3): [add("hidden", 1, np.ones(64), 0.2, slice(3, None)), ablate_head(2, 0, "mean")],
        "none": (),
    }  # fmt: skip
    before = log_softmax(logits(family.whole))[-1]
    for session in (family.whole, family.parts):
        found = session.predict(IDS, edits, [5, 77], progress=False)
        assert list(found.variant.values) == list(edits) and list(found.token.values) == [5, 77]
        np.testing.assert_allclose(found.before, np.tile(before[[5, 77]], (4, 1)), atol=1e-4)
        for number, edit in enumerate(edits.values()):
            after = log_softmax(logits(session, edit))[-1]
            row = found.isel(variant=number)
            np.testing.assert_allclose(row.logprob, after[[5, 77]], atol=2e-5)
            assert row.top_id == after.argmax() and row.top_logprob == pytest.approx(
                after.max(), abs=1e-4
            )
            kl = (np.exp(before) * (before - after)).sum()
            assert float(row.kl) == pytest.approx(kl, abs=1e-4)


def test_predict_of_a_model_whose_state_cannot_go_back(tmp_path):
    with CaptureSession(tiny_model("lfm2", tmp_path), threads=1) as session:
        edits = {key: knock_out(3, 0, LAST, key) for key in (3, 20)}
        found = session.predict(IDS, edits, [5], progress=False)
        for key, edit in edits.items():
            after = log_softmax(logits(session, edit))[-1, 5]
            assert float(found.logprob.sel(variant=key)[0]) == pytest.approx(float(after), abs=1e-5)


def test_edits_cross_to_the_worker_whole(tmp_path):
    numbers = iter(range(9))
    edits = [
        add("hidden", slice(1, None, 2), np.ones(4), 0.5, [4, 2, 2]),
        knock_out(0, 1, 5, slice(3)),
    ]
    for was, now in zip(edits, unpack(pack(edits, lambda: tmp_path / f"{next(numbers)}.npy"))):
        values = {**vars(was), "values": None}, {**vars(now), "values": None}
        assert values[0] == values[1]
        np.testing.assert_array_equal(was.values, now.values) if was.values is not None else None
    assert edits[0].positions == (2, 4) and edits[0].first == 2 and edits[1].first == 5


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: add("hidden", 1, np.ones(65)), "65.*64 per token.*another model"),
        (lambda: add("q", 1, np.ones(31)), "4 x 32 per token"),
        (lambda: add("k", 1, np.ones((4, 32))), "2 x 32 per token"),
        (lambda: add("hidden", 1, np.ones((3, 64))), "position 27 was asked for"),
        (lambda: patch("q", 1, np.ones((3, 28, 32), np.float32)), "4 x 32 per token"),
        (lambda: patch("scores", 1, np.ones((3, 28, 28), np.float32)), "has 4 per token"),
        (lambda: add("hidden", 5, np.ones(64)), "layers 0 to 4"),
        (lambda: add("hidden", slice(9, None), np.ones(64)), "layer 9"),
        (lambda: scale("k", 1, 2.0, head=2), "head 2 of layer 1: it has heads 0 to 1"),
        (lambda: scale("scores", 1, 2.0, keys=28), "names key 28: the text has 28 tokens"),
        (lambda: knock_out(1, 1, slice(30, None), 2), "names position 30"),
    ],
)
def test_what_does_not_fit_the_model_is_named_at_the_capture(session, make, says):
    edit = make()
    with pytest.raises(CaptureError, match=says):
        session.capture(IDS, edits=edit)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: add("hidden", 1, "up"), "a vector is an array of numbers"),
        (lambda: add("hidden", 1, [1.0, np.nan]), "no finite 32-bit number"),
        (lambda: add("hidden", 1, 3.0), r"\(embd,\) or \(token, embd\)"),
        (lambda: add("scores", 1, np.ones(3)), "a number, or"),
        (lambda: add("logits", 1, np.ones(3)), "cannot be edited"),
        (lambda: add("hidden", 1, np.ones(3), np.inf), "strength"),
        (lambda: add("hidden", 1, np.ones(3), 1e300), "finite 32-bit"),
        (lambda: add("hidden", 1, np.full(3, 3e38), 2.0), "finite 32-bit"),
        (lambda: add("hidden", 1, np.ones(3) * 1j), "array of numbers"),
        (lambda: add("hidden", None, np.ones(3)), "names its layers"),
        (lambda: scale("v", 1, 2.0, keys=3), "has no keys"),
        (lambda: knock_out(1, 0, slice(-2, None), 0), "counted from 0"),
        (lambda: knock_out(1, 0, slice(3, 3), 0), "empty"),
        (lambda: knock_out(1, 0, [], 0), "empty"),
        (lambda: knock_out(1, True, 2, 0), "counted from 0"),
    ],
)
def test_edits_that_make_no_sense(make, says):
    with pytest.raises(CaptureError, match=says):
        make()


def test_predict_refuses_what_it_cannot_say(session):
    for arguments, says in (
        ((IDS, {}), "at least one"),
        ((IDS, []), "name: edits"),
        ((IDS, {"a": ()}, [320]), "vocabulary"),
    ):
        with pytest.raises(CaptureError, match=says):
            session.predict(*arguments, progress=False)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", FAMILIES)
def test_on_the_device_as_on_the_cpu(architecture, tmp_path):
    """Without TF32 (see test_gpu.py); the references are transformers'."""
    if not list_gpus():
        pytest.skip("no NVIDIA GPU on this machine")
    path, plain = tiny_model(architecture, tmp_path), None
    for cupy in ({}, {"n_ubatch": 9}):
        with CaptureSession(path, env={"NVIDIA_TF32_OVERRIDE": "0"}, **cupy) as session:
            assert session.facts["gpu"]
            for name, (function, arguments) in interventions(FEATURE[architecture]).items():
                edit = getattr(llamatelemetry, function)(*arguments)
                found, wanted = logits(session, edit)[-KEPT:], REFERENCES[f"{architecture} {name}"]
                # The cache keeps 16 bits: 0.54% at most on an H100, of gpt-oss
                bound = 1e-2 if architecture == "gpt-oss" else 5e-3
                assert np.abs(found - wanted).max() < bound * np.abs(wanted).max(), name
            plain = logits(session) if plain is None else plain
            edits = {key: knock_out(1, 1, LAST, key) for key in (22, 25)}
            found = session.predict(IDS, edits, [5], progress=False)
            for key, edit in edits.items():
                after = log_softmax(logits(session, edit))[-1, 5]
                assert abs(float(found.logprob.sel(variant=key)[0]) - after) < 0.05


def test_keys_and_values_in_one_vector_overlap():
    """As multi-head latent attention has them: values are the first features of the keys. Fused
    projections lie side by side."""
    from llamatelemetry.capture.plan import Tap

    def tap(offset, width, index=7):
        view = (offset, (width, 1, 5), (4, 4 * width, 400))
        return Tap(index, "kv", (1, width), view, 2)

    keys, values = tap(0, 72), tap(0, 64)
    assert keys.overlaps(values) and values.overlaps(keys) and keys.overlaps(tap(256, 8))
    assert not tap(0, 64).overlaps(tap(256, 64)) and not keys.overlaps(tap(0, 64, index=8))


def test_predict_compares_what_the_same_kernels_read():
    """One token's kernels round otherwise than a batch's: the run without edits begins where the
    edited one does, after what comes before was read once."""
    from llamatelemetry.capture.measures import predict

    reads, tokens = [], list(range(9))

    def run(_, setup, all_logits, on_logits, past, restart):
        reads.append(past)
        # as kernels that say how many tokens they read at once
        on_logits(np.array([[0.0, len(tokens) - past]]), past)

    runs = SimpleNamespace(
        plan=lambda _: None,
        means=lambda *_: (),
        late=bool,
        run=run,
        kept=([], 0, -1),
        runtime=SimpleNamespace(steps=3),
    )
    edits = {key: [SimpleNamespace(first=first)] for key, first in {"a": 8, "b": 8, "c": 5}.items()}
    rows = predict(runs, tokens, edits, [1], lambda _: None)
    assert runs.kept == (tokens, 5, 3) and reads == [0, 8, 8, 8, 5, 5]
    assert all(row["kl"] == 0 for row in rows.values())


def test_predict_reads_a_text_once_for_several_calls(tmp_path, monkeypatch):
    """Unless anything else has run in between: then what is in the context is not the text."""
    from llamatelemetry.capture.measures import predict
    from llamatelemetry.capture.runs import Runs
    from llamatelemetry.capture.runtime import Runtime

    runtime = Runtime(str(tiny_model("llama", tmp_path)), threads=1)
    runs, decode, sizes = Runs(runtime, "llama"), runtime.decode, []

    def counted(tokens, *args, **options):
        sizes.append(len(tokens))
        return decode(tokens, *args, **options)

    monkeypatch.setattr(runtime, "decode", counted)
    edits = {"cut": [knock_out(1, 1, LAST, 5)], "all": [knock_out(0, None, LAST, 9)]}

    def ask(tokens=IDS):
        sizes.clear()
        return predict(runs, tokens, edits, [5, 77], lambda _: None)

    ask()
    first = ask()
    assert sizes == [1, 1, 1] and all(row["kl"] > 0 for row in first.values())
    others = (
        lambda: runs.run(IDS[::-1]),
        lambda: runs.run(IDS[:1], past=0),
        lambda: runtime.clear(),
        lambda: ask([*IDS[1:], 3]),
        lambda: runtime.close_context(),
    )
    for other in others:
        other()
        again = ask()
        assert sizes[0] > 1, "read again"
        for name, row in first.items():
            for key, value in row.items():
                np.testing.assert_allclose(again[name][key], value, atol=1e-5)
    assert ask() == again and sizes == [1, 1, 1]
    runtime.close()
