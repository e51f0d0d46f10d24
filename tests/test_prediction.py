"""What predicts nothing, or gives no numbers, is refused by name: encoders, models that read both
ways, NaN weights."""

import numpy as np
import pytest
import xarray as xr
from models import IDS, tiny_encoder, tiny_model, with_value

from llamatelemetry import (
    CaptureError,
    InferenceEngine,
    LlamaTelemetryError,
    compare_quantizations,
)
from llamatelemetry.attention import (
    compare as attention_compare,
)
from llamatelemetry.attention import (
    flow,
    output,
    patterns,
    say,
)
from llamatelemetry.capture.data import Capture
from llamatelemetry.capture.finite import MISSING, check_finite, measured
from llamatelemetry.capture.session import CaptureSession
from llamatelemetry.compare.quality import Predictions
from llamatelemetry.errors import NotFiniteError
from llamatelemetry.heads import semantic, similarity
from llamatelemetry.layers import compare, routing, states
from llamatelemetry.quantization import inside

SHORT = [5, 9, 7, 6, 11]


@pytest.fixture(scope="module", params=["bert", "t5", "both ways"])
def reader(request, tmp_path_factory):
    """An engine with a model that predicts no next token, its name in errors, and why it does
    not."""
    folder = tmp_path_factory.mktemp("readers")
    if request.param == "both ways":
        path, why = (
            tiny_model("llama", folder, keys={"attention.causal": False}, n_ctx=1024),
            "both directions",
        )
    else:
        path, why = tiny_encoder(folder, request.param), "computes no logits"
    with InferenceEngine() as engine:
        engine.load_model(path, auto_start=False, silent=True, threads=1)
        yield engine, f"{path.name} .architecture '{engine.model.architecture}'.*{why}"


@pytest.mark.parametrize(
    "ask",
    [
        lambda engine: engine.score(SHORT),
        lambda engine: engine.sweep(SHORT, {}, progress=False),
        lambda engine: engine.capture(SHORT, generate=2),
        lambda engine: engine.infer(SHORT),
        lambda engine: engine.infer(SHORT, n_probs=2),
        lambda engine: engine.infer_stream(SHORT),
        lambda engine: compare_quantizations(
            engine.model.path, [engine.model.path], "the cat\n" * 99, 64, progress=False
        ),
    ],
    ids=["score", "sweep", "generate", "infer", "n_probs", "infer_stream", "compare_quantizations"],
)
def test_no_prediction_is_asked_of_a_model_that_makes_none(reader, ask):
    engine, said = reader
    with pytest.raises(LlamaTelemetryError, match=said):
        ask(engine)


def test_what_such_a_model_computes_is_captured(reader):
    engine, _ = reader
    cap = engine.capture(SHORT, stages=("attention", "hidden", "final_norm"))
    assert cap.attention.values[..., 0, -1].min() > 0  # the first token sees the last
    np.testing.assert_allclose(cap.attention.sum("key"), 1, atol=1e-5)
    with pytest.raises(CaptureError, match="looks back"):
        engine.head_statistics(SHORT)
    with pytest.raises(
        CaptureError, match="as a whole, at most 512 tokens at once: this one has 600"
    ):
        engine.capture(SHORT * 120, stages="hidden")


def test_logits_are_captured_only_where_the_graph_has_them(reader):
    engine, _ = reader
    if engine.model.architecture == "llama":
        assert np.isfinite(engine.capture(SHORT, stages="logits").logits).all()
    else:
        with pytest.raises(CaptureError, match="no stage 'logits': its graph computes none"):
            engine.capture(SHORT, stages="logits")


def test_the_states_of_an_encoder_are_those_that_its_embeddings_are_made_of(tmp_path, llama_server):
    with InferenceEngine(server_path=llama_server) as engine:
        engine.load_model(tiny_encoder(tmp_path), auto_start=False, silent=True, threads=1)
        text = "the cat sat on the mat"
        cap = engine.capture(text, stages=("hidden", "final_norm"))
        np.testing.assert_array_equal(
            cap.hidden[-1], cap.final_norm
        )  # BERT's layers end in their norm
        # llama-server's attention is fused, in 16 bits
        np.testing.assert_allclose(
            cap.final_norm.mean("token"), engine.embed(text, normalize=False)[0], atol=3e-3
        )


# Values that are no numbers


@pytest.fixture(scope="module", params=[np.nan, np.inf], ids=["NaN", "infinity"])
def broken(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    path = with_value(
        tiny_model("llama", folder), "blk.1.ffn_up.weight", request.param, folder / "broken.gguf"
    )
    with InferenceEngine() as engine:
        engine.load_model(path, auto_start=False, silent=True, threads=1)
        yield engine


@pytest.mark.parametrize(
    "ask",
    [
        lambda engine: engine.score(IDS),
        lambda engine: engine.sweep(IDS, {"none": []}, progress=False),
        lambda engine: engine.capture(IDS, generate=2),
        lambda engine: engine.head_statistics(IDS),
    ],
    ids=["score", "sweep", "generate", "head_statistics"],
)
def test_a_measure_names_the_file_and_where_the_numbers_end(broken, ask):
    with pytest.raises(NotFiniteError, match="'ffn_act' of layer 1 in broken.gguf holds"):
        ask(broken)


def test_the_values_can_be_looked_at(broken):
    cap = broken.capture(IDS, stages=("hidden", "logits"))
    assert np.isfinite(cap.hidden[:2]).all() and not np.isfinite(cap.hidden[2:]).any()
    with pytest.raises(NotFiniteError, match="'hidden' of layer 2 in broken.gguf"):
        states.norm_table(cap.hidden)


def test_text_is_not_made_of_nan(broken, llama_server):
    for ask in (
        lambda: broken.infer(IDS, max_tokens=2),
        lambda: list(broken.infer_stream(IDS, max_tokens=2)),
    ):
        with pytest.raises(NotFiniteError, match="made up"):
            ask()


def test_embeddings_are_numbers(tmp_path, llama_server):
    path = with_value(
        tiny_encoder(tmp_path), "blk.1.ffn_up.weight", np.nan, tmp_path / "broken.gguf"
    )
    with InferenceEngine(server_path=llama_server) as engine:
        engine.load_model(path, auto_start=False, silent=True, threads=1)
        with pytest.raises(NotFiniteError, match="'embeddings' in broken.gguf holds NaN"):
            engine.embed(["the cat", "the mat"], normalize=False)


def test_a_comparison_says_which_file_has_no_numbers(broken, tmp_path):
    good, settings = (
        tiny_model("llama", tmp_path),
        dict(text="the cat sat on the mat\n" * 60, n_ctx=64, progress=False),
    )
    with pytest.raises(LlamaTelemetryError, match="'logits' in broken.gguf"):
        compare_quantizations(broken.model.path, [good], **settings)
    with pytest.warns(UserWarning, match="broken.gguf was left out"):
        table = compare_quantizations(good, [broken.model.path, good], **settings)
    assert "'logits' in broken.gguf" in table["error"]["broken"] and np.isnan(
        table["kld_mean"]["broken"]
    )
    assert table["kld_mean"]["tiny-llama-0"] == pytest.approx(0, abs=1e-6)


def test_sixteen_bits_that_a_key_does_not_fit_into(tmp_path):
    path = with_value(
        tiny_model("llama", tmp_path), "blk.1.attn_k.weight", 1e7, tmp_path / "wide.gguf"
    )
    with CaptureSession(path, threads=1, cache_type="f16") as session:
        with pytest.raises(NotFiniteError, match="of layer 1 in wide.gguf"):
            session.score(IDS)
    with CaptureSession(path, threads=1, cache_type="f32") as session:
        assert np.isfinite(session.score(IDS)["logprob"]).all()


def captured(stage, shape, layer=1, value=np.nan, position=1):
    """A stage with one value that is no number."""
    array = np.full(shape, 0.5, np.float32)
    array[(layer, *[-1] * (len(shape) - 2), position)] = value
    cap = Capture(
        {stage: (array, list(range(shape[0])), None)},
        ([1, 2, 3], ["a", "b", "c"], [False] * 3),
        {"name": "tiny", "file": "tiny.gguf", "architecture": "llama"},
        [],
    )
    return cap[stage]


MAPS, STREAM = (2, 2, 3, 3), (3, 3, 4)
PAIRS = compare.align([1, 2, 3], [1, 2, 3])
LAYERS = [
    lambda h: states.sum_error(h, h[1:] * 0, h[1:] * 0),
    lambda h: states.contributions(h, h[1:] * 0, h[1:] * 0),
    lambda h: states.projection(h, h[1:] * 0, h[1:] * 0),
    states.cka_map,
    states.block_influence,
    states.magnitude_quantiles,
    lambda h: states.massive_activations(h, "abc"),
    states.norm_table,
    lambda h: compare.divergence(h, h, PAIRS),
    lambda h: compare.changed_positions(h, h),
    lambda h: inside.hidden_drift(h, h),
]
ATTENTION = [
    patterns.head_table,
    patterns.entropy,
    patterns.mean_distance,
    patterns.sink_mass,
    patterns.key_importance,
    patterns.is_sink_head,
    lambda a: patterns.generated_split(a, 1),
    flow.rollout,
    flow.flow,
    flow.head_edges,
    lambda a: flow.token_nodes(a, "abc", None),
    lambda a: attention_compare.compare_heads(a, a),
    lambda a: say.token_map(a[1, 1], "abc"),
    lambda a: output.first_shares(a, a.isel(query=0)),
    lambda a: inside.attention_divergence(a, a),
    lambda a: similarity.divergence_sums(a, [0, 1, 2]),
    lambda a: semantic.semantic_scores(a, [0, 1, 2], [1, 2, 3], np.eye(3)),
]


@pytest.mark.parametrize(
    "stage, shape, measure",
    [
        *(("hidden", STREAM, measure) for measure in LAYERS),
        *(("attention", MAPS, measure) for measure in ATTENTION),
        ("ffn_act", STREAM, states.ffn_sparsity),
        ("router", STREAM, routing.routing_entropy),
    ],
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_every_measure_refuses_what_is_no_number(stage, shape, measure, value):
    with pytest.raises(NotFiniteError, match=f"'{stage}' of layer 1 in tiny.gguf"):
        measure(captured(stage, shape, value=value))


@pytest.mark.parametrize(
    "measure",
    [
        lambda x: compare.output_change(x, x, PAIRS),
        lambda x: Predictions(x.values).divergence(x.values),
        lambda x: compare.answer_difference(x, (0, 1), 1),
        lambda x: output.sampled_probabilities(x[1]),
    ],
)
def test_so_do_measures_of_logits(measure):
    logits = xr.DataArray(np.full((3, 4), 0.5, np.float32), dims=("token", "vocab"), name="logits")
    logits[1, 2] = np.nan
    with pytest.raises(NotFiniteError):
        measure(logits)


def test_padding_of_uneven_layers_is_no_fault():
    array = np.ones((2, 3), np.float32)
    array[1, 2] = MISSING
    assert check_finite(array, "q", [0, 1]) is array
    array[1, 1] = np.nan
    with pytest.raises(NotFiniteError, match="'q' of layer 1 holds NaN"):
        check_finite(array, "q", [0, 1])
    large = np.full(4, 3e38, np.float32)  # finite, though their sum is not
    assert measured(large, np.float64).sum() == pytest.approx(1.2e39)
