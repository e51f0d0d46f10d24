"""compare_quantizations against llama-perplexity of the same build, and what it does with bad
input."""

import contextlib
import os
import re
import shutil
import subprocess
import threading
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil
import pytest
from common import perplexity
from models import tiny_model
from processes import gone

from llamatelemetry import (
    LlamaTelemetryError,
    ModelLoadError,
    ModelNotFoundError,
    WorkerCrashedError,
)
from llamatelemetry.compare import bench, comparison, jobs, kept, placing, ways, worker
from llamatelemetry.compare.comparison import CompareError, compare_quantizations
from llamatelemetry.compare.paired import better
from llamatelemetry.compare.texts import TEXT, load_text
from llamatelemetry.compare.worker import windows
from llamatelemetry.convert.quantize import quantize
from llamatelemetry.errors import QuantizeError
from llamatelemetry.files.gguf import GGUFFile
from llamatelemetry.files.header import Header
from llamatelemetry.files.programs import tool
from llamatelemetry.files.scratch import scratch
from llamatelemetry.gpus import devices
from llamatelemetry.quantization.inside import weight_errors
from llamatelemetry.quantization.tokens import vulnerable_tokens
from llamatelemetry.views.text import piece_kind

N_CTX, WINDOWS = 128, 4
NUMBER = r"\s*(-?[\d.]+)(?: ±\s*([\d.]+))?"
# llama-perplexity keeps the reference's log probabilities in 16 bits over a range of 16 nats, or
# less.
STEP = 16 / 65535


@pytest.fixture(scope="module", params=["smollm2-135m-Q4_1", "gemma-3-270m-Q4_K_M"])
def family(request, tmp_path_factory):
    """A shipped model as the reference, and three quantizations made from it."""
    from llamatelemetry import resolve_model

    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        reference = resolve_model(request.param, progress=False)
        tool("llama-perplexity")
    except (ModelNotFoundError, QuantizeError) as error:
        pytest.skip(str(error))
    finally:
        del os.environ["HF_HUB_OFFLINE"]
    folder = tmp_path_factory.mktemp(request.param)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return reference, [
            quantize(reference, folder / f"{kind}.gguf", kind, progress=False)
            for kind in ("Q8_0", "Q4_0", "Q3_K_M")
        ]


def numbers(printed, label, scale=1.0):
    found = re.search(re.escape(label) + NUMBER, printed)
    return [float(x) * scale for x in found.groups() if x]


@pytest.mark.slow
def test_the_numbers_are_llama_perplexitys(family, tmp_path):
    reference, candidates = family
    text, base = tmp_path / "text.txt", tmp_path / "base.kld"
    text.write_text(load_text()[2000:9000].strip())
    ours = compare_quantizations(
        reference, candidates, text, n_ctx=N_CTX, max_windows=WINDOWS, progress=False
    )
    first = perplexity(reference, text, base, N_CTX, WINDOWS)
    assert numbers(first, "Final estimate: PPL =")[0] == pytest.approx(
        ours["ppl_base"].iloc[0], rel=1e-3
    )
    for path in candidates:
        theirs = perplexity(path, text, base, N_CTX, WINDOWS, "--kl-divergence")
        row = ours.loc[path.stem]
        assert numbers(theirs, "Mean PPL(Q)                   :") == pytest.approx(
            [row.ppl, row.ppl_err], rel=1e-3
        )
        assert numbers(theirs, "Mean PPL(Q)/PPL(base)         :") == pytest.approx(
            [row.ppl_ratio, row.ppl_ratio_err], rel=2e-3, abs=STEP
        )
        assert numbers(theirs, "Mean    KLD:") == pytest.approx(
            [row.kld_mean, row.kld_mean_err], abs=STEP
        )
        assert numbers(theirs, "Mean    Δp:", 0.01) == pytest.approx(
            [row.mean_dp, row.mean_dp_err], abs=STEP
        )
        assert numbers(theirs, "RMS Δp    :", 0.01) == pytest.approx(
            [row.rms_dp, row.rms_dp_err], abs=STEP
        )
        assert numbers(theirs, "Same top p:", 0.01) == pytest.approx(
            [row.same_top, row.same_top_err], abs=1.01 / row.n_tokens
        )  # rounding can make a tie
        for label, name in {
            "Maximum": "max",
            "99.9%  ": "p999",
            "99.0%  ": "p99",
            "95.0%  ": "p95",
            "90.0%  ": "p90",
            "Median ": "median",
            "10.0%  ": "p10",
            " 5.0%  ": "p05",
            " 1.0%  ": "p01",
            " 0.1%  ": "p001",
            "Minimum": "min",
        }.items():
            assert numbers(theirs, f"{label} KLD:")[0] == pytest.approx(
                row[f"kld_{name}"], abs=STEP
            ), label
            assert numbers(theirs, f"{label} Δp:", 0.01)[0] == pytest.approx(
                row[f"dp_{name}"], abs=STEP
            ), label
    assert row.n_tokens == WINDOWS * (N_CTX // 2 - 1)


@pytest.mark.slow
def test_the_numbers_with_a_smaller_cache_are_llama_perplexitys(smollm2, tmp_path):
    text, base, kinds = tmp_path / "text.txt", tmp_path / "base.kld", [("q8_0", "q8_0")]
    kinds += [("q8_0", "q4_0"), ("q4_0", "f16")]
    text.write_text(load_text()[2000:9000].strip())
    settings = dict(n_ctx=N_CTX, max_windows=2, progress=False)
    ours = compare_quantizations(smollm2, smollm2, text, cache_types=kinds, **settings)
    perplexity(smollm2, text, base, N_CTX, 2)
    for (_, row), (k, v) in zip(ours.iterrows(), kinds, strict=True):
        theirs = perplexity(smollm2, text, base, N_CTX, 2, "--kl-divergence", "-ctk", k, "-ctv", v)
        assert row.name == f"{smollm2.stem}, {k}/{v} cache" and (row.cache_k, row.cache_v) == (k, v)
        assert row.weights == smollm2.stem and row.kld_mean > 1e-3
        for label, name, scale in (
            ("Mean    KLD:", "kld_mean", 1),
            ("Mean    Δp:", "mean_dp", 0.01),
            ("RMS Δp    :", "rms_dp", 0.01),
        ):
            found = numbers(theirs, label, scale)
            assert found == pytest.approx([row[name], row[f"{name}_err"]], abs=STEP), label
        assert numbers(theirs, "Maximum KLD:")[0] == pytest.approx(row.kld_max, abs=STEP)
        assert numbers(theirs, "99.0%   KLD:")[0] == pytest.approx(row.kld_p99, abs=STEP)


def test_every_file_comes_with_every_cache(tmp_path):
    """Heads of 64: the cache is turned before it is quantized. What llama.cpp has no cache for has
    its reason in its row, and the weights are read once."""
    pytest.importorskip("llama_cpp")
    source = tiny_model("llama", tmp_path, head_dim=64, n_layer=1)
    other = quantize(source, tmp_path / "Q8_0.gguf", "Q8_0", progress=False)
    kinds, text = [("f16", "f16"), ("q8_0", "q4_0")], "The dog saw the cat and the cat. " * 20
    settings = dict(text=text, n_ctx=64, progress=False, max_windows=2)
    found = compare_quantizations(
        source, [source, other], cache_types=kinds, memory_ctx=8192, noise=True, **settings
    )
    names = [source.stem, f"{source.stem}, q8_0/q4_0 cache", "Q8_0", "Q8_0, q8_0/q4_0 cache"]
    assert list(found.index) == names == list(found.tokens["candidate"].unique())
    assert list(found["weights"]) == [source.stem] * 2 + ["Q8_0"] * 2
    assert found["kld_mean"].iloc[0] == 0 < found["kld_mean"].iloc[1]
    # 1 layer, 2 heads of 64 keys and values: 2 bytes each, or 34 and 18 for 32 of them.
    assert list(found["token_bytes"]) == [512, 208] * 2
    assert list(found["memory_bytes"] - found["size_bytes"]) == [512 * 8192, 208 * 8192] * 2
    alone = compare_quantizations(source, [source, other], **settings)
    same = alone.columns.drop(["cache_bytes", "memory_bytes"])
    pd.testing.assert_frame_equal(pd.DataFrame(alone[same]), found.loc[alone.index, same])
    assert list(found.noise.index) == ["attention not fused", "batches of 64 tokens"]
    assert found.noise["error"].isna().all() and (found.noise["n_tokens"] == 62).all()
    assert 1e-5 <= found.floor < 1e-3 and alone.noise is None and alone.floor == 1e-5

    narrow = tiny_model("llama", tmp_path, seed=1)  # heads of 16, and a block is 32 numbers
    says = "a q8_0 cache holds blocks of 32 numbers, and tiny llama has keys of 16 per head"
    with pytest.warns(UserWarning, match=says):
        found = compare_quantizations(narrow, narrow, cache_types=kinds, **settings)
    assert pd.isna(found["error"].iloc[0]) and found["kld_max"].iloc[0] == 0
    assert found["error"].iloc[1] == says and found.attempts[found.index[1]] == 0
    assert np.isnan(found["kld_mean"].iloc[1]) and found["token_bytes"].iloc[1] > 0
    with pytest.raises(ModelLoadError, match="a q4_0 cache .* has values of 16 per head") as error:
        compare_quantizations(narrow, narrow, cache_types=["f16/q4_0"], **settings)
    assert "memory" not in str(error.value)


def test_noise_is_measured_where_it_can_be(tmp_path, monkeypatch):
    path = tiny_model("llama", tmp_path)
    everywhere = ["attention not fused", "batches of 64 tokens"]
    assert list(ways.noise_ways(path, gpu=False)) == everywhere
    on_gpu = [*everywhere, "batches of 8 tokens", "on the CPU"]
    found = ways.noise_ways(path, gpu=True)
    assert list(found) == on_gpu and {way.path for way in found.values()} == {str(path)}
    monkeypatch.setattr(ways, "LARGE", 1000)  # too large for a CPU beside it
    assert list(ways.noise_ways(path, gpu=True)) == on_gpu[:3]


def test_noise_is_measured_on_the_first_windows(tmp_path, monkeypatch):
    pytest.importorskip("llama_cpp")
    path, text = tiny_model("llama", tmp_path), "The dog saw the cat and the cat. " * 20
    settings = dict(text=text, max_windows=3, noise=True, progress=False)
    found = compare_quantizations(path, path, n_ctx=64, **settings)
    assert (found.noise["n_tokens"] == 93).all() and found["n_tokens"].item() == 93
    monkeypatch.setattr(ways, "NOISE_TOKENS", 100)
    found = compare_quantizations(path, path, n_ctx=64, **settings)
    assert (found.noise["n_windows"] == 2).all() and (found.noise["n_tokens"] == 62).all()
    assert found["n_windows"].item() == 3 and 0 < found.noise["kld_mean"].max() < 1e-3


def test_a_file_computed_on_the_cpu_is_a_way_of_its_own(tmp_path):
    """Another load of the reference, whose context has settings of its own."""
    pytest.importorskip("llama_cpp")
    path = tiny_model("llama", tmp_path)
    key = f"{path} (on the CPU)"
    job = {"reference": str(path), "text": "The dog saw the cat and the cat. " * 20, "n_ctx": 64}
    job |= {"max_windows": 1, "gpu_layers": None, "threads": 1, "candidates": [str(path), key]}
    job |= {"ways": {key: ways.noise_ways(path, gpu=True)["on the CPU"]}, "beside": {}}
    found = jobs.measure_all(job)
    assert found[key]["error"] is None and len(found[key]["columns"]["kld"]) == 31
    assert found[str(path)]["columns"]["kld"].max() == 0


def test_pairs_of_cache_types():
    assert ways.pairs(None) == [("f16", "f16")]
    assert ways.pairs([["q8_0", "q4_0"], ("q8_0", "q4_0"), "q8_0/q4_0"]) == [("q8_0", "q4_0")]
    for wrong in (["q8_0"], [("q8_0",)], [("q8_0", "q3_K")], [], "q8_0"):
        with pytest.raises(CompareError, match="cache_types"):
            ways.pairs(wrong)


@pytest.mark.slow
def test_a_file_against_itself_is_nothing_and_windows_may_be_short(smollm2):
    text = load_text()[:3000]
    found = compare_quantizations(smollm2, [smollm2], text, n_ctx=96, progress=False)
    row = found.iloc[0]
    assert row.kld_max == row.kld_min == row.dp_max == row.dp_min == 0
    assert row.same_top == row.top5 == row.top10 == row.ppl_ratio == 1
    assert (
        row.n_tokens == row.n_windows * 47 and row.n_windows > 5
    )  # the last batch has fewer windows than the others
    tokens = found.tokens
    assert tokens["position"].min() == 49 and tokens["position"].max() == 95
    said = "".join(tokens[tokens["window"] == 1]["piece"])
    assert said in text


@pytest.mark.slow
def test_long_windows_are_decoded_in_steps(smollm2):
    text = load_text()[:9000]
    long = compare_quantizations(smollm2, [smollm2], text, n_ctx=1040, progress=False).iloc[
        0
    ]  # 512 + 512 + 16 tokens
    assert long.n_tokens == long.n_windows * 519 and long.kld_max == 0 and 2 < long.ppl < 200


@pytest.mark.slow
def test_a_corrupt_candidate_leaves_the_others(family, tmp_path):
    reference, candidates = family
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(candidates[0].read_bytes()[:60_000_000])
    with pytest.warns(UserWarning, match="cut"):
        found = compare_quantizations(
            reference,
            [candidates[0], cut],
            load_text()[:4000],
            n_ctx=N_CTX,
            max_windows=1,
            progress=False,
        )
    assert list(found.index) == [candidates[0].stem, "cut"]
    assert "cannot load" in found.loc["cut", "error"] and np.isnan(found.loc["cut", "ppl"])
    assert (
        pd.isna(found.loc[candidates[0].stem, "error"]) and found.loc[candidates[0].stem, "ppl"] > 1
    )
    with pytest.raises(ModelLoadError, match="cut"):
        compare_quantizations(reference, cut, load_text()[:4000], n_ctx=N_CTX, progress=False)
    with pytest.raises(ModelLoadError, match="reference"):
        compare_quantizations(cut, reference, load_text()[:4000], n_ctx=N_CTX, progress=False)


@pytest.mark.slow
def test_another_model_is_refused(smollm2):
    from llamatelemetry import resolve_model

    try:
        other = resolve_model("gemma-3-270m-Q4_K_M", progress=False)
    except LlamaTelemetryError as error:
        pytest.skip(str(error))
    with pytest.raises(CompareError, match="architecture is gemma3"):
        compare_quantizations(smollm2, [other], load_text()[:4000], n_ctx=N_CTX, progress=False)


@pytest.mark.slow
def test_too_short_a_text_is_refused(smollm2):
    with pytest.raises(CompareError, match=r"tokens and a window needs 512.*smaller n_ctx"):
        compare_quantizations(smollm2, [smollm2], "Call me Ishmael.", progress=False)


def test_what_is_not_there_is_refused(tmp_path):
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(ModelNotFoundError):
        compare_quantizations(file, [tmp_path / "none.gguf"], "text")
    with pytest.raises(CompareError, match="No candidates"):
        compare_quantizations(file, [], "text")
    with pytest.raises(CompareError, match="at least 4"):
        compare_quantizations(file, [file], "text", n_ctx=2)
    with pytest.raises(CompareError, match="No text"):
        load_text(tmp_path / "none.txt")


def forget_kept():
    """Remove the logits that comparisons of this process have kept."""
    for path in scratch().glob("kept-*.logits"):
        path.unlink()


@pytest.mark.parametrize("n_ctx", [64, 200, 520])
def test_one_model_at_a_time_gives_the_same(n_ctx, tmp_path, monkeypatch, smollm2):
    """Where two models find no room together, the reference's logits are kept in scratch."""
    source = tiny_model("llama", tmp_path, vocabulary=GGUFFile(smollm2), n_layer=1, n_ctx=1024)
    made = [
        quantize(source, tmp_path / f"{kind}.gguf", kind, progress=False)
        for kind in ("Q8_0", "Q4_0")
    ]
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(made[0].read_bytes()[:10_000])
    settings = dict(text=load_text()[:9000], n_ctx=n_ctx, max_windows=3, progress=False)
    with pytest.warns(UserWarning, match="cut"):
        together = compare_quantizations(source, [*made, cut], **settings)
    found = jobs.placed(str(source), list(map(str, [*made, cut])))
    assert [placing.apart for placing in found] == [False]
    apart = [one._replace(apart=True) for one in found]
    monkeypatch.setattr(jobs, "placed", lambda *_: apart)
    forget_kept()
    with pytest.warns(UserWarning, match="cut"):
        alone = compare_quantizations(source, [*made, cut], **settings)
    pd.testing.assert_frame_equal(together, alone)
    pd.testing.assert_frame_equal(together.tokens, alone.tokens)
    assert together["kld_mean"]["Q8_0"] > 0


def test_a_reference_whose_logits_are_there_is_asked_for_its_words_alone(tmp_path, smollm2):
    source = str(tiny_model("llama", tmp_path, vocabulary=GGUFFile(smollm2), n_layer=1))
    whole, words = worker.Runtime(source, threads=1), worker.Vocabulary(source)
    assert worker.identity(words) == worker.identity(whole) and words.name == whole.name
    assert worker.opening(words) == worker.opening(whole)
    both = [worker.token_ids(one, "Call me Ishmael.").tolist() for one in (words, whole)]
    assert both[0] == both[1] and words.piece(both[0][0]) == whole.piece(both[0][0])
    words.close(), whole.close()


def test_a_candidate_that_sees_what_follows_is_found_among_files_alike(tmp_path, smollm2):
    """Its graph is looked at, where that of a file that says the same as the reference is not."""
    settings = dict(vocabulary=GGUFFile(smollm2), n_layer=1, n_ctx=1024)
    source = tiny_model("llama", tmp_path, **settings)
    ahead = tiny_model("llama", tmp_path, seed=1, keys={"attention.causal": False}, **settings)
    ask = dict(text=load_text()[:2000], n_ctx=64, max_windows=1, progress=False)
    for _ in range(2):  # with the reference's logits kept, too
        with pytest.raises(CompareError, match="Not a quantization.*both directions"):
            compare_quantizations(source, [ahead], **ask)


def test_a_reference_is_computed_once_for_a_text(tmp_path, monkeypatch, smollm2):
    """Its logits are kept: what lies there is read, unless the file is another by now."""
    forget_kept()
    source = tiny_model("llama", tmp_path, vocabulary=GGUFFile(smollm2), n_layer=1, n_ctx=1024)
    small = quantize(source, tmp_path / "Q4_0.gguf", "Q4_0", progress=False)
    settings = dict(text=load_text()[:6000], n_ctx=64, max_windows=3, progress=False)
    first = compare_quantizations(source, [small], **settings)
    (own,) = scratch().glob("kept-*.logits")
    assert own.stat().st_size == 4 * 3 * 32 * GGUFFile(source).n_vocab
    again = compare_quantizations(source, [small], **settings)
    pd.testing.assert_frame_equal(first.tokens, again.tokens)

    compare_quantizations(small, [small], **settings)
    (other,) = set(scratch().glob("kept-*.logits")) - {own}
    own.write_bytes(other.read_bytes())
    assert compare_quantizations(source, [small], **settings)["kld_max"].item() == 0
    os.utime(source)
    renewed = compare_quantizations(source, [small], **settings)
    pd.testing.assert_frame_equal(first.tokens, renewed.tokens)

    monkeypatch.setattr(kept, "ROOM", own.stat().st_size)
    settings["n_ctx"] = 60
    compare_quantizations(source, [small], **settings)
    (last,) = scratch().glob("kept-*.logits")
    assert last.stat().st_size == 4 * 3 * 30 * GGUFFile(source).n_vocab
    forget_kept()
    monkeypatch.setattr(kept, "LARGEST", 1000)
    compare_quantizations(source, [small], **settings)
    assert not list(scratch().glob("kept-*"))


@pytest.mark.parametrize(
    "reference, candidates, free, groups, reference_on, own_on, apart",
    [
        (1, [1, 1], [], [2], None, None, False),  # the machine's memory
        (1, [1, 1], [14], [2], None, None, False),
        (7, [2, 2, 2], [14], [1, 1, 1], None, None, False),  # one at a time
        (8, [5], [14], [1], None, None, True),
        (8, [4, 4, 4], [14, 14], [2, 1], [1, 0], [0, 1], False),  # a GPU each
        (8, [4], [7, 14], [1], [0, 1], [1, 0], False),
        (4, [8], [7, 14], [1], [1, 0], [0, 1], False),
        (15, [8, 5], [14.5, 14.5], [1, 1], [0.5, 0.5], [0.5, 0.5], False),  # F16 of 8B: over both
        (15, [10, 4], [14.5, 14.5], [2], [0.5, 0.5], [0.5, 0.5], True),
    ],
)
def test_where_a_reference_and_its_candidates_go(
    reference, candidates, free, groups, reference_on, own_on, apart, monkeypatch
):
    gib = 2**30
    sizes = {"r": reference} | {f"c{n}": size for n, size in enumerate(candidates)}
    cards = [
        devices.Gpu(n, f"GPU-{n}", "T4", 15 * gib, int(size * gib)) for n, size in enumerate(free)
    ]
    monkeypatch.setattr(devices, "list_gpus", lambda: cards)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(placing.hub, "size_of", lambda path: sizes[path] * gib)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=20 * gib))
    found = placing.placed("r", list(sizes)[1:])
    assert [len(one.candidates) for one in found] == groups
    assert all(one.apart == apart and one.gpus == tuple(cards) for one in found)
    if reference_on:
        assert found[0].reference == pytest.approx(reference_on)
        assert found[0].own == pytest.approx(own_on)
    # Nothing is placed on a GPU that has no room for it.
    for one in found if not apart else ():
        for n, card in enumerate(cards):
            shares = (one.reference, one.own) if one.reference else ([1.0], [1.0])
            held = sizes["r"] * shares[0][n] + shares[1][n] * sum(sizes[c] for c in one.candidates)
            assert held * gib < card.free_bytes
    if cards:
        (whole,) = placing.placed("r", list(sizes)[1:], gpu_layers=0)[:1]
        assert whole.gpus == () and whole.reference is None


@pytest.mark.parametrize("rows, groups", [(None, [1, 1]), (512, [2]), (10**6, [1, 1])])
def test_a_reference_is_read_once_where_its_logits_are_less(rows, groups, monkeypatch):
    """F16 of 8B over both GPUs, with room for one candidate beside it: 512 rows of 128,256 logits
    are 263 MB, a million are half a terabyte."""
    gib, sizes = 2**30, {"r": 15, "a": 8, "b": 5}
    cards = [devices.Gpu(n, f"GPU-{n}", "T4", 15 * gib, int(14.5 * gib)) for n in range(2)]
    monkeypatch.setattr(devices, "list_gpus", lambda: cards)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(placing.hub, "size_of", lambda path: sizes[path] * gib)
    monkeypatch.setattr(placing, "GGUFFile", lambda path: SimpleNamespace(n_vocab=128_256))
    found = placing.placed("r", ["a", "b"], rows=rows)
    assert [len(one.candidates) for one in found] == groups
    assert all(one.apart == (groups == [2]) for one in found)


def test_a_file_is_one_row_under_one_name(tmp_path):
    """MODEL among the quantizations: its row came twice, and every look at it gave two."""
    from llamatelemetry.convert.quantize import with_origin

    folder = tmp_path / "other"
    folder.mkdir()
    one, other, link = tmp_path / "a.gguf", folder / "a.gguf", tmp_path / "link.gguf"
    for path in (one, other):
        path.write_bytes(path.parent.name.encode())
    link.symlink_to(one)
    assert list(comparison.named_files([one, one, link, other])) == [
        f"{tmp_path.name}/a",
        "other/a",
    ]
    assert comparison.named_files({"x": one, "y": link, "z": other}) == {"x": one, "z": other}
    paths = {"Q8_0": other, "a": one}
    assert with_origin(paths, link) == with_origin(paths, one) == paths
    assert list(with_origin({"a": other}, one)) == ["a", f"{tmp_path.name}/a"]


def test_windows_leave_out_the_remainder():
    assert windows(np.arange(11), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert windows(np.arange(11), 4, 1).tolist() == [[0, 1, 2, 3]]
    assert len(windows(np.arange(3), 4)) == 0


def test_a_crash_costs_only_the_candidate_that_makes_it(monkeypatch):
    """Two candidates in one process crash it; alone, only one of them does."""

    def child(job, progress):
        if "bad" in job["candidates"]:
            return {}, "llama.cpp ended with signal 6"
        return {
            path: {"columns": path, "error": None, "kind": None} for path in job["candidates"]
        }, "exit status 0"

    monkeypatch.setattr(jobs, "_child", child)
    found = jobs.measure({"candidates": ["good", "bad", "fine"]})
    assert found["good"]["columns"] == "good" and found["fine"]["error"] is None
    assert found["bad"]["kind"] == "crash" and "signal 6" in found["bad"]["error"]
    assert found["good"]["attempts"] == 2
    with pytest.raises(WorkerCrashedError, match="bad: llama.cpp ended"):
        row = comparison.Row("bad", "bad", ways.Way("bad", {}))
        comparison._result({"bad": found["bad"]}, {}, [row], 0, 512)


@pytest.fixture(scope="module")
def cluster():
    distributed = pytest.importorskip("distributed")
    from llamatelemetry.backend.cluster import local_cluster

    with local_cluster(2) as cluster, distributed.Client(cluster) as client:
        yield client


@pytest.mark.slow
def test_a_cluster_gives_the_same_and_survives_a_dead_worker(family, cluster):
    reference, candidates = family
    if reference.stat().st_size > 150e6:
        pytest.skip("once is enough")
    here = compare_quantizations(
        reference, candidates[:2], load_text()[:1500], n_ctx=64, progress=False
    )
    there = compare_quantizations(
        reference, candidates[:2], load_text()[:1500], n_ctx=64, client=cluster, progress=False
    )
    assert here.drop(columns="file").equals(there.drop(columns="file"))
    assert set(there.attempts.values()) == {1}

    def kill_one():
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for child in psutil.Process().children(recursive=True):
                try:
                    if "llamatelemetry.compare.worker" in child.cmdline():
                        killed.append(child.pid)
                        return child.parent().kill()
                except psutil.NoSuchProcess:
                    pass
            time.sleep(0.05)

    killed = []
    thread = threading.Thread(target=kill_one)
    thread.start()
    with pytest.warns(UserWarning, match="worker died"):
        again = compare_quantizations(
            reference, candidates[:2], load_text()[:1500], n_ctx=64, client=cluster, progress=False
        )
    thread.join()
    assert here.equals(again) and sorted(again.attempts.values()) == [1, 2]
    assert killed and gone(killed[0])  # the child of a dead worker ends too


def test_default_text_is_long_enough_and_wheel_data():
    assert 150_000 < len(load_text()) < 200_000
    assert TEXT.with_suffix(".md").is_file()


def test_links_and_parts_keep_their_names(tmp_path, monkeypatch):
    """The hub's cache: snapshots hold links to blobs that are named by checksum, parts too."""
    pytest.importorskip("llama_cpp")
    made, text = tmp_path / "made", load_text()[:3000]
    made.mkdir()
    source = tiny_model("llama", made)
    quantized = quantize(source, made / "tiny-Q8_0.gguf", "Q8_0", progress=False)
    split = [tool("llama-gguf-split"), "--split", "--split-max-tensors", "12", source, made / "ref"]
    subprocess.run(split, check=True, capture_output=True)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for number, file in enumerate(sorted(made.glob("*.gguf"))):
            blob = tmp_path / folder / f"{number:064x}"
            blob.hardlink_to(file)
            (tmp_path / folder / file.name).symlink_to(blob)
    first = next((tmp_path / "a").glob("ref-00001*"))
    one, other = tmp_path / "a" / "tiny-Q8_0.gguf", tmp_path / "b" / "tiny-Q8_0.gguf"
    monkeypatch.chdir(tmp_path)
    settings = {"text": text, "n_ctx": 64, "max_windows": 1, "progress": False}
    found = compare_quantizations(
        first, [one, "b/tiny-Q8_0.gguf", "./a/tiny-llama-0.gguf"], **settings
    )
    assert list(found.index) == ["a/tiny-Q8_0", "b/tiny-Q8_0", "tiny-llama-0"]
    assert list(found["file"])[:2] == [str(one), str(other)] and set(
        found.tokens["candidate"]
    ) == set(found.index)
    assert found.kld_mean.iloc[0] == found.kld_mean.iloc[1] > 0 == found.kld_max.iloc[2]
    assert found.attempts == dict.fromkeys(found.index, 1)
    whole = compare_quantizations(
        source, [first], **settings
    )  # and a split candidate, with the size of all parts
    assert list(whole.index) == ["ref-00001-of-00003"] and whole.kld_max.iloc[0] == 0
    assert whole.size_bytes.iloc[0] > source.stat().st_size > quantized.stat().st_size


def test_a_long_text_of_one_line_is_scored(tmp_path):
    pytest.importorskip("llama_cpp")
    model, text = (
        tiny_model("llama", tmp_path),
        "The dog saw the cat and the cat saw the dog. " * 12,
    )
    assert len(compare_quantizations(model, model, text, n_ctx=64, progress=False).tokens) == 62


@pytest.mark.slow
def test_planted_noise_is_found_where_it_is(smollm2, tmp_path):
    """The steps of some tokens' rows of the embedding, which also makes the logits, moved by 5% or
    15%, up or down: the kind of token that suffers is theirs, and no other matrix has an error."""
    file, header = GGUFFile(smollm2), Header(smollm2)
    kind, (n_rows, width), offset, _ = header.tensors["token_embd.weight"]
    of_piece = np.array([piece_kind(piece) for piece in file.pieces])
    rng, planted = np.random.default_rng(0), {}
    for wanted, size in (("part", 0.05), ("part", 0.15), ("word", 0.15)):
        path = planted[f"{wanted} {size}"] = tmp_path / f"{wanted}-{size}.gguf"
        shutil.copy(smollm2, path)
        shape = (n_rows, width // kind.block, kind.size)
        blocks = np.memmap(path, np.uint8, "r+", header.data + offset, shape)
        rows = np.flatnonzero(of_piece == wanted)
        step = np.ascontiguousarray(blocks[rows, :, :2]).view(np.float16)  # of Q8_0, in front
        step = step * (1 + size * rng.choice([-1, 1], step.shape))
        blocks[rows, :, :2] = step.astype(np.float16).view(np.uint8)
        blocks.flush()
        error = weight_errors(file, GGUFFile(path))["error"]
        assert list(error.index[error > 0]) == ["token_embd.weight"]
        assert error["token_embd.weight"] == pytest.approx(
            size * np.sqrt(np.mean(of_piece == wanted)), rel=0.4
        )
    found = compare_quantizations(smollm2, planted, n_ctx=256, max_windows=2, progress=False)
    kinds = vulnerable_tokens(found.tokens).xs("piece", level="by")
    kinds = kinds[kinds["n"] >= 10]
    for name, times in zip(planted, (5, 5, 1.2)):
        hurt = kinds.loc[name].sort_values("kld")
        assert hurt.index[-1] == name.split()[0]
        assert hurt["kld"].iloc[-1] > times * hurt["kld"].iloc[-2]
        assert times < 5 or hurt["same_top"].idxmin() == hurt["top10"].idxmin() == hurt.index[-1]
    assert better(found.tokens).loc[("part 0.05", "part 0.15"), "better"] == "yes"


@pytest.mark.slow
def test_a_long_window_needs_no_more_logits_than_a_short_one(tmp_path):
    """16,384 tokens: the logits of their second half would be 0.5 GiB for two models of this
    vocabulary, and are 32 MiB."""
    pytest.importorskip("llama_cpp")
    narrow = dict(n_layer=1, n_head=1, n_kv_head=1, head_dim=64, n_vocab=8192, n_ctx=16384)
    model, peak, done = tiny_model("llama", tmp_path, **narrow), {}, threading.Event()

    def watch(n_ctx):
        while not done.is_set():
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if "llamatelemetry.compare.worker" in child.cmdline():
                        peak[n_ctx] = max(peak.get(n_ctx, 0), child.memory_info().rss)
            time.sleep(0.02)

    for n_ctx in (512, 16384):
        done.clear()
        thread = threading.Thread(target=watch, args=(n_ctx,))
        thread.start()
        try:
            found = compare_quantizations(
                model,
                model,
                n_ctx=n_ctx,
                max_windows=1,
                cache_types=[("q8_0", "q8_0")],
                progress=False,
            )
        finally:
            done.set()
            thread.join()
        assert found["n_tokens"].iloc[0] == n_ctx // 2 - 1 and found["kld_mean"].iloc[0] > 1e-5
    assert peak[16384] - peak[512] < 200 * 2**20


@pytest.mark.parametrize(
    "gpus, seen, largest",
    [(1, [np.nan, 5.0, 9.0, np.nan], 9), (1, [np.nan] * 2, np.nan), (0, [0.0], 0), (0, [], 0)],
)
def test_the_memory_of_a_gpu_is_the_largest_that_was_told(gpus, seen, largest, monkeypatch):
    """A process that still ends has left its GPU: the last look forgot all before."""
    alive, told = iter([7] * len(seen) + [0]), iter(seen)
    monkeypatch.setattr(bench, "list_gpus", lambda: [None] * gpus)
    monkeypatch.setattr(bench, "_largest", lambda pid: next(alive))
    monkeypatch.setattr(bench, "_gpu_bytes", lambda pid: next(told))
    memory = bench._Memory()
    memory._look(1)
    assert memory.gpu == pytest.approx(largest, nan_ok=True)
    assert memory.resident == (7 if seen else 0)


def test_a_character_can_be_four_tokens(monkeypatch):
    """Logits of 400 tokens were taken for those of 100: too little for what is kept of them."""
    seen = []
    monkeypatch.setattr(jobs, "placed", lambda *options: [placing.Placing(["a"])])
    monkeypatch.setattr(kept, "place", lambda job, rows, where: seen.append(rows))
    monkeypatch.setattr(jobs, "measure", lambda *_: {})
    job = {"reference": "a", "candidates": ["a"], "ways": {}, "gpu_layers": 0, "beside": 0}
    for text, limit in (("\U00013000" * 100, None), ("\U00013000" * 100, 3), ("a" * 40, None)):
        jobs.measure_all(job | {"text": text, "n_ctx": 8, "max_windows": limit})
    assert seen == [50 * 4, 3 * 4, 5 * 4]


def test_half_of_the_kept_logits_goes_with_the_process_that_wrote_it(tmp_path, monkeypatch):
    """Whatever ended that: the next comparison has another name where the file was changed."""
    path = tmp_path / "kept-x.logits"

    def ended(*_):
        (tmp_path / "kept-x.logits.part").write_bytes(b"half")
        raise CompareError("planted")

    some = placing.Placing(["a.gguf"])
    monkeypatch.setattr(jobs, "placed", lambda *_: [some])
    monkeypatch.setattr(kept, "place", lambda *_: str(path))
    monkeypatch.setattr(jobs, "measure", ended)
    job = {"reference": "a.gguf", "candidates": ["a.gguf"], "ways": {}, "text": "a" * 99}
    with pytest.raises(CompareError, match="planted"):
        jobs.measure_all(job | {"n_ctx": 8, "max_windows": None, "gpu_layers": 0, "beside": 0})
    assert not list(tmp_path.iterdir())
