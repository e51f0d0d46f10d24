"""States of many texts: equal to single captures, one store that is read lazily and goes on where
it was interrupted."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from models import FAMILIES, IDS, tiny_encoder, tiny_model

from llamatelemetry import CaptureError, CollectError, InferenceEngine, open_states
from llamatelemetry.capture.runs import Runs
from llamatelemetry.capture.runtime import Runtime
from llamatelemetry.collecting import many, run
from llamatelemetry.collecting.many import layout
from llamatelemetry.collecting.session import CollectSession
from llamatelemetry.collecting.texts import blocks, rows
from llamatelemetry.errors import CompareError

pytest.importorskip("pyarrow", reason="llamatelemetry[analysis] is not installed")

# Of one token, of many, longer than the tiny models' windows, and together more than one batch.
LENGTHS = [5, 1, 28, 9, 2, 27, 17, 1, 3]
TEXTS = [IDS[:length] if number % 2 else IDS[-length:] for number, length in enumerate(LENGTHS)]
STAGES = ("hidden", "attn_out", "ffn_out", "attn_norm", "q", "v", "final_norm")


def reduced(values, pool):
    """A stage of one capture, (layer, token, ...), as `collect` gives it."""
    ways = {"last": lambda v: v[:, -1], "mean": lambda v: v.mean(1), "max": lambda v: v.max(1)}
    return ways[pool](values)


def single(session, ids, stage):
    """(layer, token, ...) of a capture."""
    array = session.capture(ids, stage)[stage]
    array = array if "layer" in array.dims else array.expand_dims("layer")
    return array.transpose("layer", "token", ...).values


@pytest.mark.parametrize("pool", ["last", "mean", "max", None])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "bloom", "lfm2", "qwen3moe", "bert"])
def test_collected_states_are_those_of_single_captures(tmp_path, kind, pool):
    """Also of a text that is longer than a batch (32 tokens), and of what several batches hold."""
    path = tiny_encoder(tmp_path) if kind == "bert" else tiny_model(kind, tmp_path)
    texts = [*TEXTS, IDS + IDS + IDS[:9]]
    if kind == "bert":  # it reads a batch at most, and has 35 tokens
        texts = [[token % 35 for token in text] for text in TEXTS]
    with CollectSession(path, threads=1, n_ubatch=32) as session:
        there = session.stages()["there"]
        stages = [stage for stage in STAGES if there[stage]]
        assert "hidden" in stages
        tokens, cut, found = session.collect(texts, stages, pool=pool)
        assert tokens == texts and not any(cut)
        starts = np.cumsum([0, *map(len, texts)])
        for stage, array in found.items():
            for number, ids in enumerate(texts):
                expected = single(session, ids, stage)
                if pool is None:
                    got = array[:, starts[number] : starts[number + 1]]
                else:
                    got, expected = array[:, number], reduced(expected, pool)
                np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


LATE = "ffn_norm attn_out ffn_out ffn_act router experts expert_weights hidden final_norm logits"


@pytest.mark.parametrize(
    "kind", ["llama", "gemma3", "phi3", "falcon", "gpt2", "bloom", "qwen2moe", "gpt-oss", "lfm2"]
)
def test_last_tokens_of_the_last_layer_are_those_of_single_captures(tmp_path, kind):
    """It goes on with them alone: also the numbers of experts, which are a view, and sums of what
    is computed before and after that."""
    texts = [*TEXTS, IDS + IDS + IDS[:9], IDS[:4]]
    near = 1e-3 if FAMILIES[kind].get("gelu") else 1e-4  # ggml's GELU is a table of 16 bits
    with CollectSession(
        tiny_model(kind, tmp_path), threads=1, n_ubatch=32, cache_type="f32"
    ) as session:
        there = session.stages()["there"]
        stages = [stage for stage in LATE.split() if there[stage]]
        _, _, found = session.collect(texts, stages)
        for number, ids in enumerate(texts):
            for stage, array in found.items():
                expected = single(session, ids, stage)[:, -1]
                np.testing.assert_allclose(array[:, number], expected, rtol=1e-4, atol=near)


@pytest.mark.parametrize("pool, outputs", [("last", [3, 1, 1]), ("mean", [25, 32, 28])])
def test_no_more_rows_of_logits_are_asked_for_than_needed(tmp_path, monkeypatch, pool, outputs):
    """Each is as wide as the vocabulary. Three texts in a batch, and one that is longer."""
    import llama_cpp

    runs, asked = Runs(Runtime(str(tiny_model("llama", tmp_path)), n_ubatch=32), "llama"), []
    layout(runs, ["hidden"], None)  # the graph is known, and whether it reads texts whole
    assert not runs.runtime.reads_whole
    decode = llama_cpp.llama_decode

    def count(context, batch):
        asked.append(sum(batch.logits[at] for at in range(batch.n_tokens)))
        return decode(context, batch)

    monkeypatch.setattr(llama_cpp, "llama_decode", count)
    texts = [IDS[:9], IDS[:7], IDS[5:14], IDS + IDS + IDS[:4]]
    many.collect(runs, texts, ["hidden"], None, pool, bytearray, lambda done: None)
    runs.runtime.close()
    assert asked == outputs


def test_the_first_text_may_be_longer_than_a_batch(tmp_path):
    """Whether a model reads texts whole is known before anything was read."""
    with CollectSession(tiny_model("gemma3", tmp_path), threads=1, n_ubatch=32) as session:
        tokens, _, found = session.collect([IDS + IDS], ("hidden",), pool="last")
    assert tokens == [IDS + IDS] and np.isfinite(found["hidden"]).all()


@pytest.mark.parametrize("cache", ["f16", "q8_0"])
def test_keys_and_values_have_their_caches_formats(tmp_path, cache):
    path = tiny_model("llama", tmp_path, head_dim=32)  # a block of a quantized cache
    with CollectSession(path, threads=1, cache_type=cache) as session:
        _, _, found = session.collect(TEXTS, ["k", "v"], pool=None)
        start = 0
        for ids in TEXTS:
            for stage, array in found.items():
                got = array[:, start : start + len(ids)]
                np.testing.assert_allclose(got, single(session, ids, stage), rtol=1e-3, atol=1e-3)
            start += len(ids)


def test_what_comes_after_the_last_stage_is_not_computed(tmp_path):
    """Layer 1 alone: no later layer runs; a capture afterwards is what it was before."""
    with CollectSession(tiny_model("llama", tmp_path), threads=1) as session:
        before = session.capture(IDS, ("hidden", "logits"))
        _, _, early = session.collect(TEXTS, ["hidden"], layers=[1])
        np.testing.assert_allclose(
            early["hidden"][0, 2], single(session, TEXTS[2], "hidden")[1, -1], atol=1e-5
        )
        after = session.capture(IDS, ("hidden", "logits"))
        np.testing.assert_array_equal(before.logits.values, after.logits.values)
        np.testing.assert_array_equal(before.hidden.values, after.hidden.values)


def test_experts_and_what_has_no_value_per_token(tiny):
    for stage in ("attention", "scores", "mask", "attention_mean"):
        with pytest.raises(CaptureError, match="pair of positions"):
            tiny.collect(["a"], stage)
    with pytest.raises(CaptureError, match="no mean"):
        tiny.collect(["a"], "experts", pool="mean")
    with pytest.raises(CaptureError, match="pool="):
        tiny.collect(["a"], pool="first")
    with pytest.raises(CaptureError, match="'router'.*llama|llama.*'router'"):
        tiny.collect(["a"], "router")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tiny_model("llama", tmp_path_factory.mktemp("models"))
    with InferenceEngine() as engine:
        engine.load_model(path, ctx_size=256, auto_start=False, silent=True)
        yield engine


WORDS = ["the cat sat", "a dog", "héllo wörld 漢字 🙂", "the", "it was late\nand dark", "one two"]


def test_a_pooled_store_is_a_lazy_dataset(tiny, tmp_path):
    table = pd.DataFrame({"text": WORDS, "label": list("abcabc"), "group": [0, 0, 1, 1, 2, 2]})
    found = tiny.collect(
        table, ("hidden", "attn_out"), where=tmp_path / "s", pool="mean", progress=False
    )
    assert found.hidden.dims == ("text", "layer", "embd") and found.attrs["complete"]
    assert found.hidden.dtype == np.float32 and not found.hidden.variable._in_memory
    assert list(found.text.values) == WORDS and list(found.label.values) == list("abcabc")
    assert list(found.group.values) == [0, 0, 1, 1, 2, 2]
    n_layer = tiny.model.n_layer
    assert list(found.layer.values) == list(range(n_layer + 1))
    assert found.attn_out.isel(layer=n_layer).isnull().all()  # no block there
    for number, text in enumerate(WORDS):
        cap = tiny.capture(text, ("hidden", "attn_out"))
        assert found.n_tokens.values[number] == len(cap.tokens)
        np.testing.assert_allclose(
            found.hidden[number].values, cap.hidden.mean("token").values, atol=1e-5
        )
        np.testing.assert_allclose(
            found.attn_out[number, :n_layer].values, cap.attn_out.mean("token").values, atol=1e-5
        )
    again = open_states(tmp_path / "s")
    np.testing.assert_array_equal(again.hidden.values, found.hidden.values)
    whole = again.hidden.values
    np.testing.assert_array_equal(again.hidden[1:5:2, 1, [3, 0]].values, whole[1:5:2, 1, [3, 0]])
    np.testing.assert_array_equal(again.hidden[-1, :, 2].values, whole[-1, :, 2])
    np.testing.assert_array_equal(again.hidden.sel(layer=1, text="a dog").values, whole[1, 1])


def test_an_unpooled_store_has_the_tokens_of_all_texts_one_after_another(tiny, tmp_path):
    found = tiny.collect(WORDS, ("hidden", "q"), pool=None, where=tmp_path / "s", progress=False)
    assert found.hidden.dims == ("token", "layer", "embd")
    assert found.q.dims == ("token", "layer", "head", "feature")
    for number, text in enumerate(WORDS):
        cap = tiny.capture(text, ("hidden", "q"))
        start = int(found.start[number])
        one = found.isel(token=slice(start, start + int(found.n_tokens[number])))
        assert list(one.token.values) == list(cap.tokens["piece"])
        assert list(one.token_id.values) == list(cap.tokens["id"])
        assert list(one.token_position.values) == list(range(len(cap.tokens)))
        assert set(one.token_text.values) == {number}
        np.testing.assert_allclose(
            one.hidden.transpose("layer", "token", "embd").values, cap.hidden.values, atol=1e-5
        )
        np.testing.assert_allclose(
            one.q.sel(layer=slice(0, tiny.model.n_layer - 1)).transpose(
                "layer", "head", "token", ...
            ),
            cap.q.values,
            atol=1e-5,
        )


def test_texts_from_wherever_they_are(tiny, tmp_path):
    """The same states from a list, a generator, mappings, token ids, JSONL and Parquet."""
    labels = list("abcabc")
    lines = [{"text": text, "label": label} for text, label in zip(WORDS, labels)]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    pd.DataFrame(lines).to_parquet(tmp_path / "t.parquet")
    ids = [tiny.tokenize(text)["id"].tolist() for text in WORDS]
    ways = {
        "list": (WORDS, labels),
        "generator": ((text for text in WORDS), iter(labels)),
        "mappings": (iter(lines), None),
        "jsonl": (str(tmp_path / "t.jsonl"), None),
        "parquet": (tmp_path / "t.parquet", None),
        "ids": (ids, labels),
    }
    first = None
    for name, (texts, given) in ways.items():
        found = tiny.collect(texts, where=tmp_path / name, labels=given, progress=False)
        assert list(found.label.values) == labels
        first = found.hidden.values if first is None else first
        np.testing.assert_array_equal(found.hidden.values, first)
    tiny.collect(ids, where=tmp_path / "ids", labels=labels, progress=False)  # the same again


@pytest.mark.parametrize(
    "texts, says",
    [
        (["a", ""], "Text 1: .*empty"),
        (["a", 3], "Text 1"),
        (["a", "\ud83d"], "Text 1: .*half a character"),
        ("no such file", "no file"),
        ([], "No texts"),
        ([{"label": "x"}], "Text 0 has no 'text'"),
        ([{"text": "a", "hidden": 1}], "another name"),
        ([{"text": "a", "x": 1}, {"text": "b"}], "Text 1 has columns"),
        ([{"text": "a", "n_tokens": 1}], "'n_tokens' would be taken"),
        ([{"text": "a", "embd": 1}], "'embd' would be taken"),
        ({"text": ["a", "b"], "label": [0, 1]}, "DataFrame .*not dict"),
        (None, "not NoneType"),
        (pd.DataFrame([["a", "b"]], columns=["text", "text"]), "two columns 'text'"),
        ([{"text": "a", "x": 1}, {"text": "b", "x": "one"}], "'x' cannot be stored"),
        ([{"text": "a", "x": 2**70}], "'x' cannot be stored"),
        ([{"text": "a", "x": "\ud83d"}], "'x' cannot be stored"),
    ],
)
def test_what_is_no_text_is_named(tiny, tmp_path, texts, says):
    with pytest.raises(CollectError, match=says):
        tiny.collect(texts, where=tmp_path, progress=False)
    with pytest.raises(CollectError, match="labels"):
        list(rows(["a", "b"], ["x"]))
    with pytest.raises(CollectError, match="labels"):
        list(rows(["a"], ["x", "y"]))
    for wrong in ("xy", 3):
        with pytest.raises(CollectError, match="labels=.* a list"):
            list(rows(["a", "b"], wrong))
    with pytest.raises(CollectError, match="a column 'label'"):
        list(rows([{"text": "a", "label": 1}], [2]))


@pytest.mark.parametrize(
    "name, holds, says",
    [
        ("t.csv", "text,label\na,1\n", "read line by line"),
        ("t.json", '[\n{"text": "a"}\n]', "line 1: .*one value in every line"),
        ("t.jsonl", "[" * 100_000, "line 1"),
        ("t.JSONL", '{"text": "a"}', None),
        ("t.ndjson", '{"text": "a"}', None),
    ],
)
def test_what_a_files_name_says_of_its_lines(tmp_path, name, holds, says):
    (tmp_path / name).write_text(holds)
    if says is None:
        assert list(rows(tmp_path / name)) == [{"text": "a"}]
        return
    with pytest.raises(CollectError, match=says):
        list(rows(tmp_path / name))


@pytest.mark.parametrize(
    "labels, fit",
    [
        ([float("nan"), 1.0, 2, 3.5], True),
        ([None, None, "a", "b"], True),
        ([pd.NA, "a", "b", "c"], True),
        ([pd.NaT, *[pd.Timestamp("2020-01-01")] * 3], True),
        ([(1, 2), (3,), (), (4,)], True),
        (np.eye(4), True),
        ([{"a": 1}, {"b": 2}, {"a": 3}, {}], True),
        ([1, 2, "a", "b"], False),
        ([True, False, 1, 2], False),
    ],
)
def test_labels_of_all_types_go_on_or_are_refused_before_they_are_computed(
    tiny, tmp_path, monkeypatch, labels, fit
):
    """Two texts to a block: what is missing, and of another type, may be in a later one."""
    monkeypatch.setattr(run, "TEXTS", 2)
    asked, keep = [], run.Local.ask
    monkeypatch.setattr(run.Local, "ask", lambda *a: asked.append(a[1]) or keep(*a))
    given = lambda: tiny.collect(WORDS[:4], where=tmp_path, labels=labels, progress=False)  # noqa: E731
    if not fit:
        with pytest.raises(CollectError, match="another type than before.*label"):
            given()
        assert len(asked) == 1 and list(open_states(tmp_path).text.values) == WORDS[:2]
        return
    first = given()
    assert list(pd.isna(first.label.values)) == [
        np.ndim(one) == 0 and pd.isna(one) for one in labels
    ]
    asked.clear()
    assert list(map(str, given().label.values)) == list(map(str, first.label.values)) and not asked


def test_a_start_token_that_is_written_out_is_said(tiny, tmp_path):
    with pytest.warns(UserWarning, match="two start tokens"):
        found = tiny.collect(["<|begin|>the cat"], where=tmp_path, progress=False)
    ids = tiny.tokenize("the cat")["id"].tolist()
    assert int(found.n_tokens[0]) == len(ids) + 1


def test_adapters_and_caches_are_part_of_what_a_store_was_made_with(tiny, tmp_path):
    path = tiny.model.path
    tiny.collect(["a"], where=tmp_path, progress=False)
    with InferenceEngine() as engine:
        engine.load_model(path, 0, 256, False, silent=True, cache_type_k="f32", cache_type_v="f32")
        with pytest.raises(CollectError, match="other adapters or options"):
            engine.collect(["a"], where=tmp_path, progress=False)


def test_a_text_longer_than_the_context_is_refused_or_cut(tiny, tmp_path):
    long = IDS * 10
    assert len(long) > 256
    with pytest.raises(CaptureError, match="text 1: the prompt has 280 tokens"):
        tiny.collect([IDS, long], where=tmp_path / "a", progress=False)
    found = tiny.collect([IDS, long], where=tmp_path / "b", too_long="cut", progress=False)
    assert list(found.cut.values) == [False, True] and list(found.n_tokens.values) == [28, 256]
    expected = tiny.capture(long[:256], "hidden").hidden.values[:, -1]
    np.testing.assert_allclose(found.hidden[1].values, expected, atol=1e-5)


def test_a_store_of_something_else_is_refused(tiny, tmp_path):
    where = tmp_path / "s"
    tiny.collect(WORDS, where=where, progress=False)
    with pytest.raises(CollectError, match="pool='last', not 'mean'"):
        tiny.collect(WORDS, pool="mean", where=where, progress=False)
    with pytest.raises(CollectError, match="stages="):
        tiny.collect(WORDS, "attn_out", where=where, progress=False)
    with pytest.raises(CollectError, match="layers=None"):
        tiny.collect(WORDS, layers=[1], where=where, progress=False)
    with pytest.raises(CollectError, match="another text, or label, at 2 of its block 0"):
        tiny.collect([*WORDS[:2], "else", *WORDS[3:]], where=where, progress=False)
    with pytest.raises(CollectError, match="more texts than were given"):
        tiny.collect(WORDS[:3], where=where, progress=False)
    other = tiny_model("llama", tmp_path, seed=1)
    with InferenceEngine() as engine:
        engine.load_model(other, ctx_size=256, auto_start=False, silent=True)
        with pytest.raises(CollectError, match="another file"):
            engine.collect(WORDS, where=where, progress=False)
    (where / "block-000000.arrow").write_bytes(b"nothing")
    with pytest.raises(CollectError, match="no block"):
        open_states(where)
    with pytest.raises(CollectError, match="no collected states"):
        open_states(tmp_path / "nowhere")


def test_two_runs_do_not_share_a_store(tiny, tmp_path):
    """Each would take the other's blocks for its own."""

    def texts():
        yield "one"
        with pytest.raises(CollectError, match="Another run collects into"):
            tiny.collect(["two"], where=tmp_path, progress=False)

    assert list(tiny.collect(texts(), where=tmp_path, progress=False).text.values) == ["one"]
    tiny.collect(["one"], where=tmp_path, progress=False)  # let go


def test_what_is_there_is_not_computed_again(tiny, tmp_path, monkeypatch):
    """A run that stops in the middle, then texts added at the end."""
    monkeypatch.setattr(run, "TEXTS", 2)
    asked, keep = [], run.Local.ask

    def ask(self, some, request, bar):
        asked.append([row["text"] for row in some])
        return keep(self, some, request, bar)

    monkeypatch.setattr(run.Local, "ask", ask)

    def broken():
        yield from WORDS[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny.collect(broken(), where=tmp_path, progress=False)
    assert not open_states(tmp_path).attrs["complete"]
    asked.clear()
    found = tiny.collect(WORDS, where=tmp_path, progress=False)
    assert asked == [WORDS[4:6]] and found.attrs["complete"]
    more = [*WORDS, "and more"]
    asked.clear()
    found = tiny.collect(more, where=tmp_path, progress=False)
    assert asked == [["and more"]] and list(found.text.values) == more
    whole = tiny.collect(more, where=tmp_path / "again", progress=False)
    np.testing.assert_array_equal(found.hidden.values, whole.hidden.values)
    asked.clear()
    tiny.collect(more, where=tmp_path, progress=False)
    assert not asked


def test_blocks_are_bounded():
    some = [{"text": "abcd"} for _ in range(10)]
    assert [(len(part), last) for part, last in blocks(some, 4, 1000)] == [
        (4, False),
        (4, False),
        (2, True),
    ]
    assert [len(part) for part, _ in blocks(some, 100, 10)] == [3, 3, 3, 1]
    assert list(blocks([], 4, 10)) == []


KILLED = """
import sys
from llamatelemetry import InferenceEngine
from llamatelemetry.capture.runs import Runs
from llamatelemetry.capture.runtime import Runtime
from llamatelemetry.collecting import many, run
from llamatelemetry.collecting.many import layout
from llamatelemetry.collecting.session import CollectSession
run.TEXTS = 8
texts = [f"{n} the cat sat on the mat {n}" for n in range(400)]
with InferenceEngine() as engine:
    engine.load_model(sys.argv[1], ctx_size=256, auto_start=False, silent=True)
    engine.collect(texts, "hidden", pool=None, where=sys.argv[2], progress=False)
"""


@pytest.mark.slow  # three processes
def test_a_killed_run_goes_on_with_the_same_values(tmp_path):
    path, where = tiny_model("llama", tmp_path), tmp_path / "s"
    command = [sys.executable, "-c", KILLED, str(path)]
    process = subprocess.Popen([*command, str(where)], env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    while len(list(where.glob("block-*.arrow"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = len(list(where.glob("block-*.arrow")))
    assert 3 <= before < 50
    kept = os.stat(where / "block-000001.arrow").st_mtime_ns
    subprocess.run([*command, str(where)], check=True)
    subprocess.run([*command, str(tmp_path / "whole")], check=True)
    found, whole = open_states(where), open_states(tmp_path / "whole")
    assert found.attrs["complete"] and os.stat(where / "block-000001.arrow").st_mtime_ns == kept
    np.testing.assert_array_equal(found.hidden.values, whole.hidden.values)
    assert found.drop_attrs().identical(whole.drop_attrs())


@pytest.mark.slow  # a cluster of processes
def test_a_cluster_without_workers_is_not_waited_for(tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed")
    from llamatelemetry import compare_quantizations
    from llamatelemetry.backend import cluster as clusters

    monkeypatch.setattr(clusters, "ALONE", 2)
    monkeypatch.setattr(clusters, "LOOK", 0.5)
    path = tiny_model("llama", tmp_path)
    with clusters.local_cluster(1) as cluster, distributed.Client(cluster) as client:
        client.wait_for_workers(1, timeout=60)
        client.retire_workers()
        with InferenceEngine() as engine:
            engine.load_model(path, ctx_size=256, auto_start=False, silent=True)
            with pytest.raises(CollectError, match="no worker for 2 s"):
                engine.collect(WORDS, where=tmp_path / "s", client=client, progress=False)
        with pytest.raises(CompareError, match="no worker for 2 s"):
            compare_quantizations(path, [path], text="a b " * 99, n_ctx=32, client=client)
        assert client.submit(int, 3, pure=False).status == "pending"


@pytest.mark.slow
def test_an_answer_of_a_cluster_is_its_own(monkeypatch):
    distributed = pytest.importorskip("distributed")
    from llamatelemetry.backend import cluster as clusters

    monkeypatch.setattr(clusters, "ALONE", 1)
    monkeypatch.setattr(clusters, "LOOK", 0.5)

    def late():
        time.sleep(3)
        raise TimeoutError("of the task")

    with clusters.local_cluster(1) as cluster, distributed.Client(cluster) as client:
        with pytest.raises(TimeoutError, match="of the task"):
            clusters.answer(client, client.submit(late, pure=False), CollectError)
        assert clusters.answer(client, client.submit(int, 3, pure=False), CollectError) == 3


@pytest.mark.slow  # a cluster of processes
def test_workers_of_a_cluster_share_the_texts(tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed")
    from llamatelemetry.backend.cluster import local_cluster

    monkeypatch.setattr(run, "TEXTS", 2)
    texts = [f"{text} {number}" for number in range(4) for text in WORDS]
    with InferenceEngine() as engine, local_cluster(2) as cluster:
        engine.load_model(
            tiny_model("llama", tmp_path), ctx_size=256, auto_start=False, silent=True
        )
        here = engine.collect(texts, where=tmp_path / "here", progress=False)
        with distributed.Client(cluster) as client:
            there = engine.collect(texts, where=tmp_path / "there", client=client, progress=False)
            used = client.run(lambda: len(run._sessions))
        assert there.drop_attrs().identical(here.drop_attrs())
        assert len(used) == 2 and not any(used.values())  # ended with the run
