"""The mixture of least divergence within a size: an exact choice, costs that are measured, and a
degradation that was planted."""

import itertools
import os
import subprocess

import gguf
import numpy as np
import pandas as pd
import pytest
from models import tiny_model

from llamatelemetry.compare.comparison import compare_quantizations
from llamatelemetry.convert import mixture
from llamatelemetry.convert.choice import (
    at_random,
    fitting,
    groups,
    least,
    options,
    tensor_types,
    type_file,
)
from llamatelemetry.convert.mixing import mix
from llamatelemetry.errors import CompareError, QuantizeError
from llamatelemetry.files.gguf import GGUFFile
from llamatelemetry.files.outputs import folder_of
from llamatelemetry.files.programs import tool

TEXT = "The dog saw the cat and the cat saw the dog. A bird sang in the old tree by the river. " * 9
OTHER = (
    "In the tree by the river the bird saw a cat. The old dog sang and the cat saw the bird. " * 9
)


def table(seed, n_groups=5, types=("a", "b", "c", "d")):
    """Random sizes and costs: smaller costs more, not always."""
    rng, rows = np.random.default_rng(seed), []
    for group in range(n_groups):
        size = np.sort(rng.integers(10, 10_000, len(types)))
        cost = np.sort(rng.exponential(0.1, len(types)))[::-1] + rng.normal(0, 0.01, len(types))
        rows += [(f"g{group}", kind, int(s), c) for kind, s, c in zip(types, size, cost)]
    return pd.DataFrame(rows, columns=["group", "type", "bytes", "cost"])


@pytest.mark.parametrize("seed", range(8))
def test_the_choice_is_the_best_of_all(seed):
    pytest.importorskip("scipy.optimize")
    costs = table(seed)
    parts = [part for _, part in costs.groupby("group")]
    every = [pd.DataFrame(rows) for rows in itertools.product(*([*p.iloc] for p in parts))]
    sizes = np.array([rows["bytes"].sum() for rows in every])
    worth = np.array([rows["cost"].sum() for rows in every])
    for budget in np.quantile(sizes, [0, 0.01, 0.3, 0.7, 1]):
        found = least(costs, budget)
        assert found["bytes"].sum() <= budget and len(found) == found["group"].nunique() == 5
        assert found["cost"].sum() == pytest.approx(worth[sizes <= budget].min())
    with pytest.raises(QuantizeError, match="give more bytes"):
        least(costs, sizes.min() - 1)


def test_a_cost_that_was_not_measured_is_no_cost():
    costs = table(0)
    costs.loc[3, "cost"] = np.nan
    with pytest.raises(QuantizeError, match="no number"):
        least(costs, 1e9)


@pytest.mark.parametrize("kind", ["I8", "F64", "Q8_K", "Q8_1", "Q9", "q4_k"])
def test_a_type_that_weights_never_have_is_named_before_anything_is_made(kind, tmp_path):
    """ggml would end the process."""
    path = tiny_model("llama", tmp_path)
    with pytest.raises(QuantizeError, match="no type of a tensor"):
        mixture.group_costs(path, tmp_path, TEXT, types=["Q4_0", kind])
    with pytest.raises(QuantizeError, match="types is empty"):
        mixture.group_costs(path, tmp_path, TEXT, types=[])
    assert list(tmp_path.iterdir()) == [path]


def test_a_control_is_as_large_and_another():
    costs = table(0)
    best = least(costs, 20_000)
    other = at_random(costs, 20_000, best, seed=1)
    assert set(other.index) != set(best.index) and other["bytes"].sum() <= 20_000
    assert abs(other["bytes"].sum() - best["bytes"].sum()) < 0.05 * best["bytes"].sum()
    assert other.equals(at_random(costs, 20_000, best, seed=1))
    one = costs[costs["type"] == "a"]
    assert at_random(one, 1e9, one) is one  # nothing else can be drawn


def test_what_a_group_can_be():
    shapes = {
        "token_embd.weight": (100, 256),
        "output.weight": (100, 256),
        "blk.0.attn_q.weight": (64, 96),
        "blk.0.attn_norm.weight": (96,),
        "blk.0.ffn_gate_inp.weight": (4, 96),
    }
    frame = pd.DataFrame({"shape": shapes.values()}, index=list(shapes))
    frame["type"] = ["Q8_0", "Q8_0", "Q8_0", "F32", "F32"]
    frame["group"] = ["embedding", "output", "attn_q", "norm", "other"]
    frame["n_elements"] = frame["shape"].map(np.prod)
    assert groups(frame).tolist() == ["embedding, output"] * 2 + ["attn_q"]
    rows = options(frame, ["Q4_K", "Q6_K", "Q5_0", "Q4_K"])
    both = rows[rows["group"] == "embedding, output"]
    assert both["type"].tolist() == ["Q4_K", "Q6_K", "Q5_0", "Q8_0"]
    # Of a file: Q6_K's 21,000 bytes are filled up to a multiple of 32
    assert both["bytes"].tolist() == [2 * size for size in (14_400, 21_024, 17_600, 27_200)]
    narrow = rows[rows["group"] == "attn_q"]  # 96 wide: Q5_0 for Q4_K, Q8_0 for Q6_K
    assert narrow["inside"].tolist() == ["Q5_0", "Q8_0"]
    assert fitting("Q3_K", 512) == "Q3_K" and fitting("Q3_K", 96) == "Q4_0"
    types = tensor_types(narrow.iloc[:1])
    assert types == {r"^blk\.0\.attn_q\.weight$": "Q5_0"}
    assert type_file(types) == "^blk\\.0\\.attn_q\\.weight$=q5_0\n"
    with pytest.raises(QuantizeError, match="no type of a tensor"):
        options(frame, ["Q4_K_M"])


PLANTED, OUTLIER = "ffn_up", 6.0


@pytest.fixture(scope="module", params=["as it is", "planted"])
def measured(request, tmp_path_factory):
    """A tiny model, in one of whose groups every block of 32 weights has one of OUTLIER: a step of
    Q4_0 is an eighth of that, five times the others' size, and its noise is as large as they."""
    pytest.importorskip("llama_cpp")
    folder = tmp_path_factory.mktemp("mixture")
    source = tiny_model("llama", folder, n_layer=2)
    if request.param == "planted":
        for tensor in gguf.GGUFReader(source, "r+").tensors:
            if PLANTED in tensor.name:
                tensor.data[:, ::32] = OUTLIER * np.sign(tensor.data[:, ::32])
    costs = mixture.group_costs(
        source, folder, TEXT, types=["Q3_K", "Q4_K"], n_ctx=64, seconds=600, progress=False
    )
    return request.param, source, folder, costs


def test_a_mixture_of_odd_matrices_is_no_larger_than_it_says(tmp_path):
    """What GGUF fills up between tensors was not counted: 24 bytes for each of these."""
    path = tmp_path / "odd.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name in ("blk.0.attn_q.weight", "blk.0.attn_k.weight"):
        writer.add_tensor(name, np.random.default_rng(0).normal(size=(100, 256)).astype("f4"))
    for write in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{write}_to_file")()
    writer.close()
    base = mix(path, path, tmp_path / "base.gguf", {"": "Q8_0"}, progress=False)
    rows = options(GGUFFile(base).tensors, ["Q6_K"]).assign(kld=0.1, cost=0.0)
    rows["cost"] = rows["type"].map({"Q6_K": 0.1, "Q8_0": 0.0})
    costs = mixture.Costs(rows, base, 0.1, 0.0, {})
    chosen = mixture.recommend(mixture.smallest(costs), costs)
    made = mixture.make(chosen, costs, path, tmp_path / "made.gguf")
    assert made.stat().st_size == chosen.size_bytes == mixture.smallest(costs)


@pytest.mark.parametrize("fault", [KeyboardInterrupt, CompareError])
def test_files_of_one_group_go_however_their_comparison_ends(fault, tmp_path, monkeypatch):
    source, calls = tiny_model("llama", tmp_path, n_layer=1), []

    def compared(reference, candidates, **_):
        calls.append([path.is_file() for path in candidates.values()])
        if len(calls) > 1:
            raise fault("in the middle")
        return pd.DataFrame({"kld_mean": [0.1]})

    monkeypatch.setattr(mixture, "compare_quantizations", compared)
    with pytest.raises(fault, match="in the middle"):
        mixture.group_costs(source, tmp_path, TEXT, types=["Q4_0"], seconds=600, progress=False)
    assert len(calls[1]) > 3 and all(calls[1])
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {source.name, f"{source.stem}-Q8_0.gguf"}


def test_the_base_of_another_model_of_that_name_is_made_anew(tmp_path):
    first, second = (
        tiny_model("llama", folder_of(tmp_path / name), n_layer=layers)
        for name, layers in (("one", 1), ("two", 2))
    )
    os.utime(second, (0, 0))  # older than the other one's base
    made = [mixture._base(GGUFFile(path), tmp_path, False) for path in (first, second)]
    assert made[0] == made[1] and GGUFFile(made[0]).n_layer == 2


@pytest.mark.slow
def test_the_planted_group_gets_the_most_bits(measured):
    how, source, folder, costs = measured
    worth = costs.table[costs.table["inside"] == "Q4_0"].set_index("group")["cost"]
    assert costs.left == {} and costs.seconds > 0 and len(costs.table) == 3 * 8
    assert (costs.table.loc[costs.table["type"] == "Q8_0", "cost"] == 0).all()
    small, full = (costs.table.groupby("group")["bytes"].agg(a).sum() for a in ("min", "max"))
    chosen = mixture.recommend(mixture._rest(costs) + 0.8 * small + 0.2 * full, costs)
    own = chosen.rows.set_index("group")["bytes"]
    bits = own / costs.table.groupby("group")["bytes"].max()  # as a share of Q8_0's
    if how == "planted":
        assert worth.idxmax() == PLANTED and worth[PLANTED] > 1.5 * worth.drop(PLANTED).max()
        assert chosen.types[PLANTED] == "Q8_0" and (bits.drop(PLANTED) <= bits[PLANTED]).all()
        again = mixture.make(
            mixture.recommend(mixture._rest(costs) + small, costs), costs, source, folder / "s.gguf"
        )
        name = f"blk.0.{PLANTED}.weight"
        whole, rounded = (GGUFFile(path).tensor(name) for path in (source, again))
        own, noise = (np.delete(a, np.s_[::32], axis=1) for a in (whole, rounded - whole))
        assert noise.std() == pytest.approx(own.std(), rel=0.05)
    else:
        assert worth[PLANTED] < worth.max()


@pytest.mark.slow
def test_a_mixture_is_as_large_as_it_says_and_holds_on_another_text(measured):
    _, source, folder, costs = measured
    small, full = (costs.table.groupby("group")["bytes"].agg(a).sum() for a in ("min", "max"))
    budget = mixture._rest(costs) + (small + full) / 2
    best, drawn = mixture.recommend(budget, costs), mixture.random_mixture(budget, costs)
    assert best.size_bytes <= budget and best.kld <= drawn.kld
    made = {
        name: mixture.make(one, costs, source, folder / f"{name}.gguf")
        for name, one in {"mixture": best, "random": drawn}.items()
    }
    assert made["mixture"].stat().st_size == best.size_bytes
    # What llama-quantize makes of the file of types
    recipe, theirs = folder / "types.txt", folder / "theirs.gguf"
    recipe.write_text(type_file(best.tensor_types))
    command = [tool("llama-quantize"), "--tensor-type-file", recipe, source, theirs, "Q8_0"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    ours, theirs = GGUFFile(made["mixture"]), GGUFFile(theirs)
    assert ours.tensors["type"].equals(theirs.tensors["type"])
    for name in ours.tensors.index:
        assert (ours.raw(name)[0][:] == theirs.raw(name)[0][:]).all(), name
    found = compare_quantizations(source, made, OTHER, n_ctx=64, progress=False)
    verdict = mixture.verdicts(found, "mixture")["random"]
    assert verdict.difference == pytest.approx(
        found.loc["mixture", "kld_mean"] - found.loc["random", "kld_mean"]
    )
    assert verdict.verdict != "more"
    assert 0.5 < found.loc["mixture", "kld_mean"] / best.kld < 2  # the costs add up


@pytest.mark.slow
def test_what_there_is_no_time_for_is_said(measured):
    _, source, folder, costs = measured
    ask = dict(base=costs.base, n_ctx=64, progress=False)
    with pytest.raises(QuantizeError, match="costs takes"):
        mixture.group_costs(source, folder, TEXT, types=["Q4_K"], seconds=0, **ask)
