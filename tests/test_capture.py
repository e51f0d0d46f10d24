"""Captures, edits and measures on a tiny model of every kind that matters, and what happens when
something is wrong."""

import glob
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from models import DENSE, IDS, tiny_encoder, tiny_model

from llamatelemetry import (
    Capture,
    CaptureError,
    ModelLoadError,
    WorkerCrashedError,
    ablate_head,
    ablate_layer,
    patch,
    scale,
)
from llamatelemetry.capture.measures import HeadStatistics, Score
from llamatelemetry.capture.names import STAGES
from llamatelemetry.capture.session import CaptureSession
from llamatelemetry.heads.behaviours import token_pairs
from llamatelemetry.maths import log_softmax


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    with CaptureSession(
        tiny_model("gemma2", tmp_path_factory.mktemp("models")), threads=1
    ) as session:
        yield session


@pytest.fixture(scope="module")
def full(session):
    return session.capture(IDS, stages=DENSE)


def test_dims_and_coordinates(full, session):
    n, facts = len(IDS), full.model
    assert full.attention.dims == ("layer", "head", "query", "key")
    assert full.attention.shape == (facts.n_layer, facts.n_head, n, n)
    assert (
        full.k.dims == ("layer", "kv_head", "token", "feature")
        and full.k.sizes["kv_head"] == facts.n_kv_head
    )
    assert full.hidden.sizes["layer"] == facts.n_layer + 1 and list(
        full.hidden.layer.values
    ) == list(range(facts.n_layer + 1))
    assert full.logits.dims == ("token", "vocab") and full.logits.sizes["vocab"] == facts.n_vocab
    assert full.hidden.dtype == np.float32
    assert list(full.tokens["id"]) == IDS and list(full.attention.key.values) == list(
        full.tokens["piece"]
    )


def test_every_stage_follows_from_the_one_before(full):
    for layer in range(full.model.n_layer):
        facts = full.layers.loc[layer]
        q, k, v = (full[s].sel(layer=layer).values for s in ("q", "k", "v"))
        k, v = (np.repeat(a, len(q) // len(k), 0) for a in (k, v))
        scores = np.einsum("hqf,hkf->hqk", q, k)
        mask = full.mask.sel(layer=layer).values
        allowed = np.isfinite(mask)
        np.testing.assert_allclose(
            full.scores.sel(layer=layer).values[:, allowed], scores[:, allowed], atol=1e-5
        )
        capped = facts.softcap * np.tanh(scores / facts.softcap) * facts.scale + mask
        p = np.exp(capped - capped.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        np.testing.assert_allclose(full.attention.sel(layer=layer).values, p, atol=1e-6)
        np.testing.assert_allclose(full.attn_heads.sel(layer=layer).values, p @ v, atol=1e-6)
        after = (
            full.hidden.sel(layer=layer)
            + full.attn_out.sel(layer=layer)
            + full.ffn_out.sel(layer=layer)
        )
        np.testing.assert_allclose(full.hidden.sel(layer=layer + 1).values, after.values, atol=1e-6)


@pytest.mark.parametrize("kind", ["gemma2", "lfm2", "bert"])
def test_stages_are_those_that_can_be_captured(tmp_path, kind):
    path = tiny_encoder(tmp_path) if kind == "bert" else tiny_model(kind, tmp_path)
    with CaptureSession(path, threads=1) as session:
        table = session.stages()
        assert list(table.index) == list(STAGES)
        for stage, row in table.iterrows():
            if not row["there"]:
                with pytest.raises(CaptureError, match=re.escape(row["why"])):
                    session.capture([2, 3, 4, 5], stage)
                continue
            array = session.capture([2, 3, 4, 5], stage)[stage]
            assert array.dims == row["dims"]
            assert (
                tuple(array.coords["layer"].values if "layer" in row["dims"] else ())
                == row["layers"]
            )
            whole = "layer" not in row["dims"] or len(row["layers"]) >= session.model.n_layer
            assert bool(row["why"]) != whole
    if kind == "lfm2":  # layers 0 and 2 are convolutions
        assert table.loc["attention", "layers"] == (1, 3)
        assert table.loc["attention", "why"].startswith("not in layers 0, 2 (recurrent): ")
    if kind == "bert":
        assert "encoder" in table.loc["logits", "why"]


def test_sliding_window_is_in_the_mask_of_its_layers_only(full):
    forbidden = [
        int(np.isneginf(full.mask.sel(layer=layer).values).sum())
        for layer in range(full.model.n_layer)
    ]
    causal = len(IDS) * (len(IDS) - 1) // 2
    for layer, count in enumerate(forbidden):
        assert (count > causal) == bool(full.layers.loc[layer, "sliding"])
    assert min(forbidden) == causal < max(forbidden)


def test_same_text_same_capture_and_logits_untouched(session, full):
    again = session.capture(IDS, stages=DENSE)
    for stage in DENSE:
        np.testing.assert_array_equal(again[stage].values, full[stage].values)
    np.testing.assert_array_equal(
        session.capture(IDS, stages="logits").logits.values, full.logits.values
    )
    other = session.capture(IDS[::-1], stages="logits")
    assert not np.array_equal(other.logits.values, full.logits.values)


def test_restricted_layers_and_queries(session, full):
    part = session.capture(IDS, stages=("attention", "hidden"), layers=[1, 3], queries=[2, 20])
    assert list(part.attention.layer.values) == [1, 3] and list(
        part.attention.query_position.values
    ) == [2, 20]
    np.testing.assert_array_equal(
        part.attention.values, full.attention.sel(layer=[1, 3]).values[:, :, [2, 20]]
    )
    np.testing.assert_array_equal(part.hidden.values, full.hidden.sel(layer=[1, 3]).values)


def test_prompt_over_several_ubatches(tmp_path):
    path = tiny_model("gemma2", tmp_path)
    with (
        CaptureSession(path, threads=1) as one,
        CaptureSession(path, threads=1, n_ubatch=9) as several,
    ):
        a, b = one.capture(IDS, stages=DENSE), several.capture(IDS, stages=DENSE)
        for stage in DENSE:
            if stage not in ("mask", "scores"):
                np.testing.assert_allclose(
                    a[stage].values, b[stage].values, atol=2e-5, err_msg=stage
                )
        np.testing.assert_allclose(
            one.head_statistics(IDS).to_array(), several.head_statistics(IDS).to_array(), atol=1e-5
        )


def test_generated_tokens_are_captured_as_they_come(session):
    cap = session.capture(IDS[:10], stages=("attention", "hidden", "logits"), generate=6)
    ids = list(cap.tokens["id"])
    assert len(ids) <= 16 and cap.tokens["generated"].sum() == len(ids) - 10 > 0
    assert cap.n_prompt == 10
    assert [int(row.argmax()) for row in cap.logits.values[9:-1]] == ids[10:]  # greedy
    whole = session.capture(ids, stages=("attention", "hidden", "logits"))
    for stage in ("attention", "hidden", "logits"):
        np.testing.assert_allclose(cap[stage].values, whole[stage].values, atol=1e-4)
    drawn = [
        list(session.capture(IDS[:5], "logits", generate=8, temperature=2.0, seed=s).tokens["id"])
        for s in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_text_says_where_it_ended(session, tmp_path):
    """Also where the model puts a token before it, and after a detour through a file."""
    given = session.tokenize("the cat")
    cap = session.capture("the cat", stages="hidden", generate=3)
    assert cap.n_prompt == len(given) < len(cap.tokens)
    assert list(cap.tokens["id"])[: cap.n_prompt] == given
    assert Capture.load(cap.save(tmp_path / "x.safetensors")).n_prompt == cap.n_prompt


def test_zeroed_head_leaves_the_rest_of_the_layer(session, full):
    cap = session.capture(IDS, stages=("attn_heads", "attention"), edits=[ablate_head(1, 2)])
    heads = cap.attn_heads.sel(layer=1).values
    assert not heads[2].any()
    np.testing.assert_array_equal(
        np.delete(heads, 2, 0), np.delete(full.attn_heads.sel(layer=1).values, 2, 0)
    )
    np.testing.assert_array_equal(
        cap.attention.sel(layer=1).values, full.attention.sel(layer=1).values
    )
    assert not np.array_equal(cap.attention.sel(layer=2).values, full.attention.sel(layer=2).values)


def test_mean_ablation_puts_the_mean_of_the_unedited_run(session, full):
    cap = session.capture(
        IDS, stages="attn_heads", edits=[ablate_head(2, 1, "mean"), ablate_head(0, 0)]
    )
    mean = full.attn_heads.sel(layer=2).values[1].mean(0)
    np.testing.assert_allclose(
        cap.attn_heads.sel(layer=2).values[1],
        np.broadcast_to(mean, (len(IDS), len(mean))),
        atol=1e-6,
    )


def test_ablated_layer_passes_the_stream_through(session):
    cap = session.capture(IDS, stages="hidden", edits=ablate_layer(1))
    np.testing.assert_array_equal(cap.hidden.sel(layer=2).values, cap.hidden.sel(layer=1).values)


def test_scale_at_positions(session, full):
    cap = session.capture(IDS, stages="ffn_out", edits=scale("ffn_out", 0, 0.5, positions=[3, 4]))
    expected = full.ffn_out.sel(layer=0).values.copy()
    expected[[3, 4]] *= 0.5
    np.testing.assert_array_equal(cap.ffn_out.sel(layer=0).values, expected)


@pytest.mark.parametrize("stage", ["hidden", "attn_out", "ffn_out", "attn_heads", "attention", "q"])
def test_patching_with_itself_changes_nothing(session, full, stage):
    cap = session.capture(IDS, stages="logits", edits=[patch(stage, 1, full)])
    np.testing.assert_allclose(cap.logits.values, full.logits.values, atol=1e-6)


def test_patching_the_whole_stream_gives_the_source_run(session, full):
    other = list(reversed(IDS))
    cap = session.capture(other, stages="logits", edits=[patch("hidden", 0, full)])
    np.testing.assert_array_equal(cap.logits.values, full.logits.values)
    some = session.capture(other, stages="hidden", edits=[patch("hidden", 2, full, positions=[4])])
    np.testing.assert_array_equal(
        some.hidden.sel(layer=2).values[4], full.hidden.sel(layer=2).values[4]
    )


def test_statistics_equal_those_of_the_full_capture(session, full):
    n, position = len(IDS), np.arange(len(IDS))
    pairs = token_pairs(IDS, position) | {"diagonal": np.column_stack([position, position])}
    stats = session.head_statistics(IDS, patterns=pairs)
    p = full.attention.values.astype(np.float64)
    expected = {
        "entropy": -(p * np.log(np.maximum(p, 1e-30))).sum(-1).mean(-1),
        "sink": p[..., 0].mean(-1),
        "distance": (p * (position[:, None] - position)).sum(-1).mean(-1),
        "top": p.max(-1).mean(-1),
        **{name: p[:, :, *found.T].sum(-1) / n for name, found in pairs.items()},
    }
    for name, values in expected.items():
        np.testing.assert_allclose(stats[name].values, values, atol=1e-5, err_msg=name)


def test_patterns_by_hand():
    pairs = [(query, key) for query in range(5) for key in range(query + 1)]
    attention = np.zeros(
        (len(pairs), 5, 5), np.float32
    )  # every head attends once, each to another pair
    attention[range(len(pairs)), *np.transpose(pairs)] = 1
    found = []
    for threads, block in ((1, 2**18), (3, 1)):
        statistics = HeadStatistics([5, 6, 5, 6, 7], {"some": [(4, 1), (2, 2)]}, threads=threads)
        statistics.BLOCK = block
        for start in (0, 2):  # as two batches give it
            statistics.action(0)(attention[:, start : start + (2 if start == 0 else 3)], start)
        table, _ = statistics.table()
        found.append(
            {
                name: {pair for pair, score in zip(pairs, table[name][0]) if score == 1}
                for name in table
            }
        )
        assert set(np.unique(table["some"])) == {0, 1}
    one, several = found
    assert one == several
    assert one["some"] == {(4, 1), (2, 2)}


def test_score_by_hand():
    tokens = [1, 0, 2]
    logits = np.log(
        np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [1 / 3, 1 / 3, 1 / 3]], np.float32)
    )
    result = Score(tokens)
    result(logits, 0)
    table = result.table()
    np.testing.assert_allclose(table["logprob"], np.log([0.5, 0.7]), rtol=1e-6)
    assert table["rank"] == [0, 0] and table["top_id"] == [0, 2]
    np.testing.assert_allclose(
        table["entropy"][0], -(0.5 * np.log(0.5) + 0.5 * np.log(0.25)), rtol=1e-6
    )
    np.testing.assert_allclose(np.exp(log_softmax(logits)).sum(-1), 1, rtol=1e-6)


def test_score_and_sweep_agree_with_captured_logits(session, full):
    logp = log_softmax(full.logits.values)
    table = session.score(IDS)
    np.testing.assert_allclose(table["logprob"], logp[np.arange(len(IDS) - 1), IDS[1:]], atol=1e-5)
    edits = [ablate_head(1, 0)]
    edited = log_softmax(session.capture(IDS, "logits", edits=edits).logits.values)
    rows = session.sweep(
        IDS, {"none": [], "head": edits, ("layer", 1): ablate_layer(1)}, progress=False
    )
    kl = (np.exp(logp) * (logp - edited)).sum(-1)[:-1].mean()
    assert rows.loc["none", "loss_change"] == 0 and rows.loc["none", "top1_agreement"] == 1
    np.testing.assert_allclose(rows.loc["head", "kl"], kl, rtol=1e-4)
    np.testing.assert_allclose(rows.attrs["base_loss"], -table["logprob"].mean(), rtol=1e-6)
    assert rows["loss"].iloc[2] != rows.loc["none", "loss"]


def test_saved_and_loaded(full, tmp_path):
    full.save(tmp_path / "new folder" / "x.safetensors")
    loaded = Capture.load(tmp_path / "new folder" / "x.safetensors")
    assert loaded.stages == full.stages and vars(loaded.model) == vars(full.model)
    for stage in DENSE:
        assert loaded[stage].equals(full[stage]), stage
    assert loaded.tokens.equals(full.tokens) and loaded.n_prompt == full.n_prompt == len(IDS)
    (tmp_path / "bad.safetensors").write_bytes(b"not a capture")
    with pytest.raises(CaptureError):
        Capture.load(tmp_path / "bad.safetensors")


@pytest.mark.parametrize(
    "arguments, says",
    [
        (dict(text_or_ids=""), "empty"),
        (dict(text_or_ids=[]), "empty"),
        (dict(text_or_ids=[1, 10**6]), "vocabulary"),
        (dict(text_or_ids=[1] * 5000), "context"),
        (dict(text_or_ids=IDS, stages="nonsense"), "unknown stage"),
        (dict(text_or_ids=IDS, stages=()), "unknown stage"),
        (dict(text_or_ids=IDS, stages="router"), "gemma2"),
        (dict(text_or_ids=IDS, layers=[44]), "0 to 3"),
        (dict(text_or_ids=IDS, queries=[99]), "out of range"),
        (dict(text_or_ids=IDS, generate=-1), "generate"),
        (dict(text_or_ids=IDS, generate="3"), "generate"),
        (dict(text_or_ids=IDS, generate=2, temperature=-1.0), "temperature"),
        (dict(text_or_ids=IDS, layers=[]), "at least one"),
        (dict(text_or_ids=IDS, queries=[]), "at least one"),
        (dict(text_or_ids=[1.7, 2.2]), "whole numbers"),
        (dict(text_or_ids=[[1, 2], [3, 4]]), "one sequence"),
        (dict(text_or_ids=IDS, edits="abc"), "edits are"),
        (dict(text_or_ids=IDS, edits=[scale("ffn_out", 0, 2.0, positions=[99])]), "position 99"),
        (dict(text_or_ids=IDS, edits=[ablate_head(9, 0)]), "layers 0 to 3"),
        (dict(text_or_ids=IDS, edits=[ablate_head(0, 9)]), "heads 0 to 3"),
    ],
)
def test_what_cannot_be_captured_is_said_and_the_next_call_works(session, full, arguments, says):
    with pytest.raises(CaptureError, match=says):
        session.capture(**arguments)
    np.testing.assert_array_equal(session.capture(IDS, "logits").logits.values, full.logits.values)


@pytest.mark.parametrize(
    "make",
    [
        lambda cap: scale("k_pre", 0, 2.0),
        lambda cap: scale("hidden", 0, 2.0, head=1),
        lambda cap: ablate_head(-1, 0),
        lambda cap: ablate_head(0, 0, "median"),
        lambda cap: ablate_layer(0, "nose"),
        lambda cap: patch("attn_out", 40, cap),
        lambda cap: patch("logits", 0, cap),
        lambda cap: patch("hidden", 0, None),
        lambda cap: ablate_head("a", 0),
        lambda cap: scale("hidden", 0, 2.0, positions=[-1]),
        lambda cap: scale("hidden", 0, "x"),
    ],
)
def test_edits_that_make_no_sense(full, make):
    with pytest.raises(CaptureError):
        make(full)


def test_patch_from_some_queries_only(session):
    part = session.capture(IDS, stages="attention", queries=[2, 4])
    with pytest.raises(CaptureError, match="only some queries"):
        patch("attention", 1, part)


def test_a_run_that_has_to_be_planned_again_counts_nothing_twice(tmp_path):
    """In the worker's own code: the plan is made wrong on purpose, as another graph than the
    planned one would."""
    from llamatelemetry.capture.runs import Runs
    from llamatelemetry.capture.runtime import Runtime
    from llamatelemetry.capture.worker import Sampler

    runtime = Runtime(str(tiny_model("llama", tmp_path)), threads=1, cache_type="f32")
    runs = Runs(runtime, "llama")
    mean = [ablate_head(1, 0, "mean")]
    means = runs.means(IDS, mean)
    runs.plan(IDS).n_nodes += 1
    np.testing.assert_array_equal(runs.means(IDS, mean)[1], means[1])
    runs.plan(IDS).n_nodes += 1
    reducer = HeadStatistics(IDS, {})

    def setup(recorder, plan):
        for tap in runs.taps(plan, "attention", 0):
            recorder.on(tap, reducer.action(0))

    runs.run(IDS, setup, restart=reducer.restart)
    np.testing.assert_allclose(reducer.table()[0]["mass"], 1, atol=1e-6)
    runs.plan(IDS).n_nodes += 1
    sampler = Sampler(3, 1.0, 7, lambda token: False)
    again = Sampler(3, 1.0, 7, lambda token: False)
    assert runs.run(IDS, sampler=sampler) == runs.run(IDS, sampler=again)
    runtime.close()


def test_queries_of_generated_tokens(session):
    cap = session.capture(IDS[:6], stages="attention", generate=3, queries=[2, 7, 2])
    there = [query for query in (2, 7) if query < len(cap.tokens)]
    assert list(cap.attention.query_position.values) == there
    np.testing.assert_allclose(cap.attention.values.sum(-1), 1, atol=1e-5)


def test_numpy_numbers_are_numbers(session, full):
    cap = session.capture(
        np.array(IDS), "logits", generate=np.int64(0), seed=np.int64(1), temperature=np.float32(0)
    )
    np.testing.assert_array_equal(cap.logits.values, full.logits.values)


def test_patch_of_another_length(session, full):
    with pytest.raises(CaptureError, match="positions"):
        session.capture(IDS * 2, stages="logits", edits=[patch("hidden", 1, full)])


def test_missing_stage_is_an_error_not_an_empty_array(session):
    cap = session.capture(IDS, stages="hidden")
    with pytest.raises(CaptureError, match="holds hidden"):
        cap.attention
    with pytest.raises(AttributeError):
        cap.nonsense


def test_killed_worker_is_reported_and_leaves_nothing(tmp_path):
    session = CaptureSession(tiny_model("llama", tmp_path), threads=1)
    folder = session.child.folder
    os.kill(session.pid, signal.SIGKILL)
    with pytest.raises(WorkerCrashedError, match="SIGKILL"):
        session.capture(IDS)
    session.close()
    assert not folder.exists()


def test_engine_starts_a_new_worker_after_one_died(tmp_path):
    from llamatelemetry import InferenceEngine, ModelNotFoundError

    with InferenceEngine() as engine:
        engine.load_model(tiny_model("llama", tmp_path), auto_start=False, silent=True)
        before = engine.capture(IDS, stages="logits").logits.values.copy()
        os.kill(engine._session.pid, signal.SIGKILL)
        engine._session.child.process.wait()
        np.testing.assert_array_equal(engine.capture(IDS, stages="logits").logits.values, before)
        with pytest.raises(ModelNotFoundError):
            engine.load_model("no-such-model-at-all", silent=True)
        np.testing.assert_array_equal(engine.capture(IDS, stages="logits").logits.values, before)


def test_killed_in_the_middle_of_a_capture(tmp_path):
    with CaptureSession(tiny_model("llama", tmp_path), threads=1) as session:
        threading.Timer(0.3, os.kill, (session.pid, signal.SIGKILL)).start()
        with pytest.raises(WorkerCrashedError):
            for _ in range(10_000):
                session.capture(IDS, DENSE)


def test_captures_leave_at_most_the_arenas_that_are_used_again(tmp_path):
    with CaptureSession(tiny_model("llama", tmp_path), threads=1) as session:
        kept = [session.capture(IDS, stages="hidden") for _ in range(5)]
        values = [cap.hidden.values.copy() for cap in kept]
        session.capture(IDS[::-1], stages="hidden", edits=[patch("hidden", 0, kept[0])])
        for cap, before in zip(kept, values):  # a living capture is never written into
            np.testing.assert_array_equal(cap.hidden.values, before)
        del kept, cap
        session.capture(IDS, stages="attention")
        names = sorted(path.name.split("-")[0] for path in session.child.folder.iterdir())
        assert names.count("arena") <= 2 and set(names) <= {"arena", "worker.log"}
        folder = session.child.folder
    assert not folder.exists()


def test_arenas_are_used_again_without_a_trace(tmp_path):
    with CaptureSession(tiny_model("gemma2", tmp_path), threads=1, n_ubatch=9) as session:
        first = session.capture(IDS, stages="attention").attention.values.copy()
        for _ in range(3):  # every one writes other values into the arena of the one before
            session.capture(IDS[::-1], stages=("hidden", "logits", "attention"))
        np.testing.assert_array_equal(
            session.capture(IDS, stages="attention").attention.values, first
        )


def test_worker_ends_with_its_parent(tmp_path):
    import subprocess
    import sys

    path = tiny_model("llama", tmp_path)
    code = (
        f"from llamatelemetry.capture.session import CaptureSession; s = CaptureSession({str(path)!r}, threads=1);"
        "print(s.pid, flush=True); import time; time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    folder = next(
        path.parent
        for path in map(
            Path,
            glob.glob(f"{tempfile.gettempdir()}/llamatelemetry-*/worker.log")
            + glob.glob("/dev/shm/llamatelemetry-*/worker.log"),
        )
        if str(path.parent) in " ".join(psutil.Process(pid).cmdline())
    )
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(100):
        if not os.path.exists(f"/proc/{pid}") or open(f"/proc/{pid}/stat").read().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("the worker outlived its parent by 10 s")
    assert not folder.exists()


@pytest.mark.parametrize("content", [b"", b"GGUF", b"just a text, renamed\n" * 99])
def test_files_that_are_no_models(tmp_path, content):
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelLoadError):
        CaptureSession(path)


def test_truncated_model(tmp_path):
    path = tiny_model("llama", tmp_path)
    path.write_bytes(path.read_bytes()[:-20_000])
    with pytest.raises(ModelLoadError):
        CaptureSession(path)


def test_saving_copies_no_tensor(tmp_path):
    """A capture of a long text is gigabytes, and safetensors' own writer makes bytes of all of it
    first; the file is what that writer would have written for its reader."""
    import tracemalloc

    from safetensors import safe_open

    from llamatelemetry import Capture

    array = np.random.default_rng(0).random((4, 1000, 1024), np.float32)  # 16 MB
    parts = {"hidden": (array, [0, 1, 2, 3], None)}
    facts = {"architecture": "llama", "n_layer": 3, "n_head": 1, "n_kv_head": 1, "n_embd": 1024}
    model = {**facts, "n_vocab": 9, "name": "é", "file": "m.gguf", "gpu": False}
    tokens = (list(range(1000)), ["é", b"\xff"] * 500, [False] * 1000)
    capture = Capture(parts, tokens, model, [{"kind": "attention"}] * 3)
    tracemalloc.start()
    path = capture.save(tmp_path / "a.safetensors")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < array.nbytes / 8
    with safe_open(str(path), "numpy") as file:
        np.testing.assert_array_equal(file.get_tensor("hidden"), array)
        assert (path.stat().st_size - array.nbytes) % 8 == 0, "aligned"
    again = Capture.load(path)
    np.testing.assert_array_equal(again.hidden, array)
    assert again.tokens["piece"].tolist() == capture.tokens["piece"].tolist()


READ = """
import sys
import llama_cpp, numpy as np
from llamatelemetry.capture.runtime import Runtime
if sys.argv[2] == "read":  # as where a GPU is, which is not here: the layers stay on the CPU
    llama_cpp.llama_supports_gpu_offload = lambda: True
runtime = Runtime(sys.argv[1], threads=1)
maps = [line for line in open("/proc/self/maps") if sys.argv[1] in line]
runtime.open(3)
runtime.decode([1, 2, 3])
print(len(maps), runtime.logits(3).tobytes().hex())
"""


def test_a_model_for_a_gpu_is_read_and_not_mapped(tmp_path):
    """All of a mapped file counts as memory while it is copied: of 8B 4.5 GiB."""
    model = str(tiny_model("llama", tmp_path))
    told = {}
    for how in ("map", "read"):
        command = [sys.executable, "-c", READ, model, how]
        told[how] = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (mapped, logits), (read, same) = (told[how].split() for how in ("map", "read"))
    assert int(mapped) > 0 == int(read) and logits == same


PLACES = {
    "attention": [2, 20],
    "attention_mean": [0, 21],
    "hidden": [5],
    "q": [1, 2, 3],
    "logits": [len(IDS) - 1],
}


@pytest.mark.parametrize("n_ubatch", [512, 9])
def test_positions_of_a_stage_are_those_of_the_whole(tmp_path, n_ubatch):
    """Also where the text runs in pieces, and some pieces have none of them."""
    stages = (*PLACES, "scores", "ffn_out")
    with CaptureSession(tiny_model("gemma2", tmp_path), threads=1, n_ubatch=n_ubatch) as one:
        whole = one.capture(IDS, stages=stages)
        asked = PLACES | {"logits": len(IDS) - 1}
        part = one.capture(IDS, stages=stages, queries=[7], positions=asked)
    for stage in stages:
        place = "query" if "query" in part[stage].dims else "token"
        wanted = {"scores": [7], "ffn_out": range(len(IDS))} | PLACES
        assert part[stage][f"{place}_position"].values.tolist() == list(wanted[stage])
        same = whole[stage].isel({place: list(wanted[stage])})
        np.testing.assert_array_equal(part[stage].values, same.values, err_msg=stage)
    part.save(tmp_path / "part.safetensors")
    again = Capture.load(tmp_path / "part.safetensors")
    for stage in stages:
        assert again[stage].identical(part[stage].assign_attrs(again[stage].attrs)), stage


def test_positions_of_generated_tokens(session):
    cap = session.capture(
        IDS[:6], ("hidden", "logits"), generate=3, positions={"logits": range(5, 9)}
    )
    n = len(cap.tokens)
    assert cap.logits["token_position"].values.tolist() == list(range(5, n)) and n > 6
    assert cap.hidden.sizes["token"] == n
    assert cap.logits.values[:-1].argmax(-1).tolist() == cap.tokens["id"].tolist()[6:]


@pytest.mark.parametrize(
    "positions, message",
    [
        ({"logits": [99]}, "token position 99 is out of range: the text has"),
        ({"hidden": [-1]}, "token position -1"),
        ({"q": [1]}, r"\{captured stage: positions\}"),
        ([1], r"\{captured stage: positions\}"),
        ({"logits": []}, "at least one"),
        ({"logits": ["x"]}, "whole numbers"),
    ],
)
def test_positions_that_are_none(session, positions, message):
    with pytest.raises(CaptureError, match=message):
        session.capture(IDS, ("hidden", "logits"), positions=positions)


def test_patch_from_some_positions_only(session):
    part = session.capture(IDS, stages="hidden", positions={"hidden": [2, 4]})
    with pytest.raises(CaptureError, match="only some queries or positions of 'hidden'"):
        patch("hidden", 1, part)
