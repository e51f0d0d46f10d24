"""Captures with a quantized K cache: what attention reads is recomputed, turned by the Hadamard
matrix that llama.cpp turns it with, or not."""

import numpy as np
import pytest
from models import IDS, tiny_model

from llamatelemetry import InferenceEngine, OptionError
from llamatelemetry.attention import steps
from llamatelemetry.attention.cached import as_cached
from llamatelemetry.capture.session import CaptureSession
from llamatelemetry.files.gguf import GGUFFile


def score_error(captured, layer, cached):
    """Relative difference of q·k from the captured scores, of what the mask lets through."""
    q, k, scores = (captured[name].sel(layer=layer).values for name in ("q", "k", "scores"))
    facts = captured.layers.loc[layer]
    keys = as_cached(k, facts["key_type"], facts["key_turn"]) if cached else k
    mine = q @ np.repeat(keys, len(q) // len(k), axis=0).transpose(0, 2, 1)
    seen = np.tril(np.ones(mine.shape[1:], bool))
    return np.linalg.norm((mine - scores)[:, seen]) / np.linalg.norm(scores[:, seen])


@pytest.mark.parametrize("kind", ["q8_0", "q5_1", "q4_0"])
@pytest.mark.parametrize(
    "width, turn, off", [(64, 64, ""), (64, 0, "1"), (32, 0, ""), (128, 128, "")]
)
def test_scores_are_those_of_the_keys_that_are_read(kind, width, turn, off, tmp_path):
    pytest.importorskip("llama_cpp")
    path = tiny_model("llama", tmp_path, head_dim=width, n_layer=2)
    found = {}
    for cache in ("f16", kind):
        env = {"LLAMA_ATTN_ROT_DISABLE": off} if off else {}
        with CaptureSession(path, threads=1, cache_type=cache, env=env) as session:
            found[cache] = session.capture(IDS, stages=("q_pre", "k_pre", "q", "k", "v", "scores"))
    plain, own = found["f16"], found[kind]
    facts = own.layers
    assert (facts["key_type"] == kind).all() and (facts["key_turn"] == turn).all()
    assert (plain.layers["key_type"] == "f16").all() and (plain.layers["key_turn"] == 0).all()
    # Turned or not, the first layer's queries and keys are shown as they were before it.
    for name in ("q_pre", "k_pre", "q", "k"):
        np.testing.assert_allclose(own[name][0], plain[name][0], rtol=2e-3, atol=2e-3)
    for layer in range(2):
        # What is left is that queries are rounded to 8 bits.
        assert score_error(own, layer, cached=True) < 0.012
        if kind != "q8_0":
            assert score_error(own, layer, cached=False) > 0.02


def test_turning_is_undone_and_spreads_what_is_large():
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(2, 5, 64)).astype(np.float32)
    keys[..., 3] *= 50  # one feature far larger than the others, as models have them
    error = {
        turn: np.linalg.norm((as_cached(keys, "q4_0", turn) - keys)[..., np.arange(64) != 3])
        for turn in (0, 64)
    }
    assert 0 < error[64] < 0.8 * error[0]
    assert as_cached(keys, "f16") is keys and as_cached(keys, "q8_0").shape == keys.shape
    np.testing.assert_allclose(as_cached(keys, "q8_0", 64), keys, atol=1.0)


def test_what_the_cache_cannot_hold_is_refused(tmp_path):
    pytest.importorskip("llama_cpp")
    path = tiny_model("llama", tmp_path)
    with InferenceEngine() as engine:
        with pytest.raises(OptionError, match="keys and values in one type"):
            engine.load_model(
                path, auto_start=False, silent=True, cache_type_k="q8_0", cache_type_v="f32"
            )
        with pytest.raises(OptionError, match="fused attention"):
            engine.load_model(path, auto_start=False, silent=True, cache_type_v="q8_0")
        with pytest.raises(OptionError, match="blocks of 32 numbers.* has heads of 16"):
            engine.load_model(path, auto_start=False, silent=True, cache_type_k="q8_0")


@pytest.mark.slow
def test_every_step_is_recomputed_with_quantized_keys(smollm2):
    gguf = GGUFFile(smollm2)
    with InferenceEngine() as engine:
        engine.load_model(smollm2, auto_start=False, silent=True, cache_type_k="q4_0")
        captured = engine.capture("The whaler Essex left Nantucket.", stages=steps.STAGES)
    assert captured.layers.loc[3, "key_turn"] == 64
    table = steps.check_steps(captured, gguf, 3)
    assert table["agrees"].all(), table
    assert table.set_index("step").loc["scores q·k", "kind"] == "quantized keys"
    assert score_error(captured, 3, cached=False) > 10 * score_error(captured, 3, cached=True)
