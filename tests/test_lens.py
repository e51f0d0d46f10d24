"""Logit lens, attribution and patching: on a two-layer model set by hand, on families of tiny
models, on real ones.

The hand-made model has the residual stream, the lens and the attributions in closed form; see
`hand_made`."""

from dataclasses import replace

import gguf
import models
import numpy as np
import pytest
import xarray as xr

from llamatelemetry import InferenceEngine, patch
from llamatelemetry.errors import CaptureError
from llamatelemetry.layers import compare, states
from llamatelemetry.layers.lens import (
    Unembedding,
    lens,
    logit_attribution,
    logit_error,
    readable,
    settled,
    unembedding,
)

STAGES = ("hidden", "attn_out", "ffn_out", "final_norm", "logits")
ROOT8 = np.sqrt(8)
A, B, TWO, THREE, ONE = 20, 21, 10, 11, 12  # two tokens that are read, three that are spoken of


def hand_made(folder):
    """Write a llama model of two layers, eight dimensions and one head.

    Token A is sqrt(8) e0, token B sqrt(8) e1, so that the norm leaves them as they are. Queries and
    keys are zero: attention is uniform. Layer 0 moves 2 e2 from A and 4 e2 from B; its FFN is zero.
    Layer 1 has no attention, and an FFN that answers e1 with 5 e3. Output: token 10 reads e2, 11
    reads e3, 12 reads e1; the final gain is 2 on e2 and 1/2 on e3."""
    path = folder / "hand.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    keys = {
        "context_length": 64,
        "embedding_length": 8,
        "block_count": 2,
        "feed_forward_length": 8,
        "attention.head_count": 1,
        "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": 1e-12,
        "rope.dimension_count": 8,
        "vocab_size": 320,
    }
    for key, value in (
        {f"llama.{key}": value for key, value in keys.items()} | models.tokenizer()
    ).items():
        models.put(writer, key, value)
    matrices = {
        f"blk.{layer}.{name}.weight": np.zeros((8, 8))
        for layer in (0, 1)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    }
    matrices["blk.0.attn_v.weight"] = np.eye(8)
    matrices["blk.0.attn_output.weight"][2, :2] = 2 / ROOT8, 4 / ROOT8
    # After layer 0 token B after A is sqrt(8) e1 + 3 e2, of root mean square r = sqrt(17 / 8). The
    # gate is 100 times its normalized e1, about 194, where silu(x) = x; up reads e2: 3 / r. Down
    # makes 5 of the product.
    r = np.sqrt(17 / 8)
    matrices["blk.1.ffn_gate.weight"][0, 1] = 100
    matrices["blk.1.ffn_up.weight"][0, 2] = 1
    matrices["blk.1.ffn_down.weight"][3, 0] = 5 / ((100 * ROOT8 / r) * (3 / r))
    embedding, output = np.zeros((320, 8)), np.zeros((320, 8))
    embedding[A, 0] = embedding[B, 1] = ROOT8
    output[TWO, 2] = output[THREE, 3] = output[ONE, 1] = 1
    final = np.ones(8)
    final[2:4] = 2, 0.5
    norms = {
        f"blk.{layer}.{name}.weight": np.ones(8)
        for layer in (0, 1)
        for name in ("attn_norm", "ffn_norm")
    }
    for name, values in {
        "token_embd.weight": embedding,
        "output.weight": output,
        "output_norm.weight": final,
        **norms,
        **matrices,
    }.items():
        writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load(path):
    return InferenceEngine().load_model(str(path), auto_start=False, silent=True)


@pytest.fixture(scope="module")
def hand(tmp_path_factory):
    engine = load(hand_made(tmp_path_factory.mktemp("hand")))
    cap = engine.capture([A, B], stages=STAGES)
    yield engine, cap, unembedding(engine.model, cap)
    engine.close()


def vector(**parts):
    out = np.zeros(8)
    for name, value in parts.items():
        out[int(name[1:])] = value
    return out


def test_hand_made_residuals(hand):
    _, cap, _ = hand
    assert cap.hidden.values[:, 0] == pytest.approx(
        np.stack([vector(e0=ROOT8), vector(e0=ROOT8, e2=2), vector(e0=ROOT8, e2=2)]), abs=1e-6
    )
    after = [vector(e1=ROOT8), vector(e1=ROOT8, e2=3), vector(e1=ROOT8, e2=3, e3=5)]
    assert cap.hidden.values[:, 1] == pytest.approx(np.stack(after), abs=1e-5)
    assert cap.attn_out.values[:, 1] == pytest.approx(np.stack([vector(e2=3), vector()]), abs=1e-6)
    assert states.sum_error(cap.hidden, cap.attn_out, cap.ffn_out)["error"].max() < 1e-6
    relative = states.contributions(cap.hidden, cap.attn_out, cap.ffn_out)["relative"]
    assert float(relative.sel(part="attention", layer=0)[1]) == pytest.approx(3 / ROOT8, rel=1e-5)
    assert float(relative.sel(part="ffn", layer=1)[1]) == pytest.approx(5 / np.sqrt(17), rel=1e-5)
    table = states.projection(
        cap.hidden, cap.attn_out, cap.ffn_out, position=1
    )  # of length sqrt(42)
    assert table["attention"].tolist() == pytest.approx([9 / 42, 0])
    assert table.attrs["embedding"] == pytest.approx(8 / 42)
    assert table["ffn"].tolist() == pytest.approx([0, 25 / 42], rel=1e-5)


def test_hand_made_lens(hand):
    _, cap, head = hand
    data = lens(head, cap.hidden, [TWO, TWO], cap.logits)
    # The divisors of B's three states are 1, sqrt(17/8) and sqrt(42/8); the gain on e2 is 2, on e3
    # 1/2.
    expected = {
        TWO: [0, 6 / np.sqrt(17 / 8), 6 / np.sqrt(42 / 8)],
        ONE: [ROOT8, ROOT8 / np.sqrt(17 / 8), ROOT8 / np.sqrt(42 / 8)],
        THREE: [0, 0, 2.5 / np.sqrt(42 / 8)],
    }
    assert data["logit"].values[:, 1] == pytest.approx(expected[TWO], abs=1e-5)
    for token, values in expected.items():
        assert head.logits(cap.hidden.values[:, 1], [token])[:, 0] == pytest.approx(
            values, abs=1e-5
        )
    for state in range(3):
        rest = 317 + sum(
            np.exp(values[state]) for values in expected.values()
        )  # all other logits are 0
        assert float(data["probability"][state, 1]) == pytest.approx(
            np.exp(expected[TWO][state]) / rest, rel=1e-5
        )
        p = np.array([np.exp(values[state]) for values in expected.values()] + [1.0] * 317) / rest
        assert float(data["entropy"][state, 1]) == pytest.approx(-(p * np.log(p)).sum(), rel=1e-5)
    assert data["top"].values[:, 1, 0].tolist() == [ONE, TWO, TWO]
    assert data["rank"].values[1:, 1].tolist() == [0, 0]
    assert settled(data).tolist() == [1, 1]
    assert float(data["kl"][-1, 1]) < 1e-5 < float(data["kl"][0, 1])


def test_hand_made_attribution(hand):
    _, cap, head = hand
    table = logit_attribution(cap, head, TWO, THREE, position=1)
    values = table.set_index(["component", "layer"])["value"]
    divisor = np.sqrt(42 / 8)
    assert values["attention", 0] == pytest.approx(6 / divisor, rel=1e-5)
    assert values["ffn", 1] == pytest.approx(-2.5 / divisor, rel=1e-5)
    for key in (("attention", 1), ("ffn", 0), ("embedding", -1), ("other", -1), ("bias", -1)):
        assert values[key] == pytest.approx(0, abs=1e-6)
    assert table["value"].sum() == pytest.approx(table.attrs["total"], abs=1e-9)
    assert table.attrs["captured"] == pytest.approx(3.5 / divisor, rel=1e-5)


def test_hand_made_ablation_takes_the_answer_away(hand):
    engine, cap, _ = hand
    edited = engine.capture(
        [A, B], stages=("hidden",), edits=[patch("attn_out", 0, 0 * cap.attn_out.values[0])]
    )
    # Without attention B is sqrt(8) e1 alone, up is 0, and layer 1 adds nothing.
    assert edited.hidden.values[2, 1] == pytest.approx(vector(e1=ROOT8), abs=1e-6)


class Matrix:
    """An output matrix with the interface of GGUFFile."""

    output_name = "output.weight"

    architecture, metadata, norm_eps = "any", {}, 1e-6

    def __init__(self, values):
        import pandas as pd

        self.values = np.asarray(values, np.float32)
        self.tensors = pd.DataFrame(
            {"type": ["F32"], "shape": [self.values.shape]}, index=["output.weight"]
        )

    def rows(self, name, ids):
        return self.values[ids]

    def iter_rows(self, name, block):
        for start in range(0, len(self.values), block):
            yield start, self.values[start : start + block]


@pytest.mark.parametrize("softcap, scale", [(None, 1.0), (5.0, 1.0), (None, 0.25)])
def test_lens_in_blocks_equals_the_whole_vocabulary(softcap, scale):
    rng = np.random.default_rng(0)
    n_vocab, width = 1003, 16
    matrix = Matrix(rng.standard_normal((n_vocab, width)))
    head = Unembedding(matrix, "norm", 1.5, scale, softcap)
    hidden = xr.DataArray(
        rng.standard_normal((3, 4, width)).astype(np.float32), dims=("layer", "token", "embd")
    )
    whole = head.logits(hidden.values, np.arange(n_vocab))  # (layer, token, vocab) float64
    logp = whole - np.log(np.exp(whole).sum(-1, keepdims=True))
    targets = [5, 1002, 5, 77]
    data = lens(head, hidden, targets, whole[-1], k=3)
    own = whole[:, np.arange(4), targets]
    assert data["probability"].values == pytest.approx(
        np.exp(logp[:, np.arange(4), targets]), rel=1e-4
    )
    assert data["rank"].values.tolist() == (whole > own[..., None]).sum(-1).tolist()
    assert data["entropy"].values == pytest.approx(-(np.exp(logp) * logp).sum(-1), rel=1e-4)
    assert data["kl"].values == pytest.approx(
        (np.exp(logp[-1]) * (logp[-1] - logp)).sum(-1), abs=1e-4
    )
    assert data["top"].values.tolist() == np.argsort(-whole, axis=-1)[..., :3].tolist()
    if softcap:
        assert np.abs(data["logit"].values).max() < softcap


def test_small_blocks_of_a_large_lens(monkeypatch):
    from llamatelemetry.layers import lens as module

    rng = np.random.default_rng(1)
    head = Unembedding(Matrix(rng.standard_normal((2000, 8))), "norm")
    hidden = xr.DataArray(rng.standard_normal((2, 3, 8)), dims=("layer", "token", "embd"))
    whole = lens(head, hidden, [1, 2, 1999])
    monkeypatch.setattr(module, "_ELEMENTS", 1)  # 256 rows at a time
    small = lens(head, hidden, [1, 2, 1999])
    for key in whole:
        assert small[key].values == pytest.approx(whole[key].values, rel=1e-5)


def test_a_lens_of_some_positions_is_those_of_all():
    rng = np.random.default_rng(2)
    head = Unembedding(Matrix(rng.standard_normal((700, 8))), "norm")
    hidden = xr.DataArray(rng.standard_normal((3, 6, 8)), dims=("layer", "token", "embd"))
    targets, logits = rng.integers(0, 700, 6), rng.standard_normal((6, 700)).astype(np.float32)
    whole = lens(head, hidden, targets, logits)
    some = lens(head, hidden, targets, logits, positions=[0, 4, 5])
    assert some["position"].values.tolist() == [0, 4, 5]
    for key in whole:
        assert some[key].values == pytest.approx(whole[key].values[:, [0, 4, 5]], rel=1e-5)
    # What the model puts first, of logits of these positions alone
    best, at = logits.argmax(-1), {"token_position": ("token", [0, 4, 5])}
    few = xr.DataArray(logits[[0, 4, 5]], dims=("token", "vocab"), coords=at)
    read = lens(head, hidden, None, few, positions=[0, 4, 5])
    assert read.identical(lens(head, hidden, best, logits, positions=[0, 4, 5]))
    with pytest.raises(CaptureError, match="no logits of position 3"):
        lens(head, hidden, best, few, positions=[3, 4])


def test_a_lens_that_would_take_too_long_reads_the_last_tokens_and_says_so(capsys, monkeypatch):
    from llamatelemetry.layers import lens as module

    head = Unembedding(Matrix(np.ones((3000, 8))), "norm")
    hidden = xr.DataArray(np.ones((2, 300, 8), np.float32), dims=("layer", "token", "embd"))
    assert len(readable(head, hidden, seconds=0)) == 300, "few states are read without reckoning"
    monkeypatch.setattr(module, "ROWS", 100)
    assert len(readable(head, hidden, seconds=1e6)) == 300 and not capsys.readouterr().out
    assert readable(head, hidden, seconds=0).tolist() == [0, 299]
    assert "for 300 tokens: it reads the first and the last 1, about" in capsys.readouterr().out


def test_settled_is_the_last_change_of_mind():
    top = np.array([[7, 1, 2], [7, 9, 2], [7, 1, 3], [7, 1, 4]])
    data = xr.Dataset(
        {"top": (("layer", "token", "best"), top[..., None])}, coords={"layer": range(4)}
    )
    assert settled(data).tolist() == [0, 2, 3]


@pytest.mark.parametrize("architecture", sorted(models.FAMILIES))
def test_lens_of_every_family_is_the_models_own(architecture, tmp_path):
    """Norm, gain, bias, tied or own matrix, soft-cap are found: the lens of the last layer is the
    captured logits."""
    engine = load(models.tiny_model(architecture, tmp_path))
    try:
        cap = engine.capture(models.IDS, stages=STAGES)
        head = unembedding(engine.model, cap)
        assert logit_error(head, cap)["ratio"].max() < 1
        few = engine.capture(models.IDS, STAGES, positions={"logits": len(models.IDS) - 1})
        assert unembedding(engine.model, few).scale == head.scale
        assert logit_error(head, few, [-1]).equals(logit_error(head, cap, [-1]))
        best = cap.logits.values.argmax(-1)
        data = lens(head, cap.hidden, best, cap.logits)
        assert (data["rank"].values[-1] == 0).all() and data["kl"].values[-1].max() < 1e-4
        assert states.sum_error(cap.hidden, cap.attn_out, cap.ffn_out)["relative"].max() < 1e-5
        table = logit_attribution(cap, head, *np.argsort(-cap.logits.values[-1])[:2])
        assert table["value"].sum() == pytest.approx(table.attrs["total"], abs=1e-6)
        assert table.attrs["total"] == pytest.approx(table.attrs["captured"], abs=1e-3)
    finally:
        engine.close()


def test_a_norm_that_does_not_reproduce_the_capture_is_refused(hand):
    engine, cap, _ = hand
    other = {stage: cap[stage] for stage in STAGES}
    other["final_norm"] = cap.final_norm + np.arange(8)
    with pytest.raises(CaptureError, match="no logit lens"):
        unembedding(engine.model, other)
    other = {stage: cap[stage] for stage in STAGES}
    other["logits"] = cap.logits * 3
    with pytest.raises(CaptureError, match="3 times"):
        unembedding(engine.model, other)


def test_logit_error_sees_a_wrong_head(hand):
    _, cap, head = hand
    assert logit_error(head, cap)["ratio"].max() < 1
    wrong = replace(head, multiplier=1.01)
    assert logit_error(wrong, cap)["ratio"].max() > 1


def test_patching_everything_is_the_source_and_nothing_is_nothing(tmp_path):
    engine = load(models.tiny_model("llama", tmp_path))
    ids, other = models.IDS[:12], [*models.IDS[:5], 99, *models.IDS[6:12]]
    try:
        source = engine.capture(ids, stages=("hidden", "logits"))
        target = engine.capture(other, stages=("hidden", "logits"))
        for layer in range(engine.model.n_layer + 1):
            all_of_it = engine.capture(
                other, stages=("logits",), edits=[patch("hidden", layer, source)]
            )
            assert np.array_equal(all_of_it.logits.values, source.logits.values), layer
            nothing = engine.capture(
                other, stages=("logits",), edits=[patch("hidden", layer, target)]
            )
            assert np.array_equal(nothing.logits.values, target.logits.values), layer
        assert compare.changed_positions(source.hidden, target.hidden)[0] == 5
        before = engine.capture(
            other, stages=("logits",), edits=[patch("hidden", 1, source, positions=[0, 4])]
        )
        assert np.array_equal(
            before.logits.values, target.logits.values
        )  # those states are the same
    finally:
        engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m-Q4_1", "gemma-3-270m-Q4_K_M"])
def test_lens_of_a_quantized_model(name):
    """Within what rounding activations to 8 bits does; the best token is the same unless two are
    that close."""
    from llamatelemetry import ModelNotFoundError

    try:
        engine = load(name)
    except ModelNotFoundError as error:
        pytest.skip(str(error))
    try:
        cap = engine.capture("The capital of France is", stages=STAGES)
        head = unembedding(engine.model, cap)
        assert logit_error(head, cap)["ratio"].max() < 1
        data = lens(head, cap.hidden, cap.logits.values.argmax(-1), cap.logits)
        assert data["kl"].values[-1].max() < 0.02 and float(data["rank"][-1, -1]) == 0
        assert states.sum_error(cap.hidden, cap.attn_out, cap.ffn_out)["relative"].max() < 1e-5
        first, second = np.argsort(-cap.logits.values[-1])[:2]
        table = logit_attribution(cap, head, first, second)
        assert table["value"].sum() == pytest.approx(table.attrs["total"], abs=1e-4)
        allowed = 2 * logit_error(head, cap)["tolerance"].max()
        assert table.attrs["total"] == pytest.approx(table.attrs["captured"], abs=allowed)
    finally:
        engine.close()
