"""Captures against Hugging Face transformers (tests/references), and against what each stage must
be given the others.

Tiny models are F32 and run on the CPU: agreement is to 1e-4 absolute. llama.cpp's CPU kernel takes
GELU from a table in half precision. The references follow it, and still one unit takes the table's
next step wherever two float32 sums differ in their last bits: one step moves the stream by up to
3e-4 (the same network in float64: 2e-4), so that is the bound for those families. Attention is
within 1e-4 in all of them."""

import ctypes
import hashlib
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from models import DENSE, FAMILIES, IDS, WINDOW, tiny_model

from llamatelemetry import CaptureError, InferenceEngine, ablate_head, ablate_layer

api = pytest.importorskip(
    "llama_cpp", reason="the engine is not built: llamatelemetry engine build"
)
# llama.cpp's log, dropped. It calls this as long as the process lives, also in other files' tests.
SILENT = api.llama_log_callback(lambda level, text, data: None)

REFERENCES = Path(__file__).parent / "references"
ATOL = 1e-4
STAGES = [stage for stage in DENSE if stage not in ("mask", "ffn_act")]  # the references have them
NOT_THERE = {
    "gpt2": {"q_pre", "k_pre"},
    "bloom": {"q_pre", "k_pre"},
}  # no rotation: q and k are all there is
PRESCALED = ("gemma2", "gemma3", "phi3")  # these graphs divide the query by sqrt(d), not the scores
DIMS = {
    "attn_norm": "layer token embd",
    "ffn_norm": "layer token embd",
    "q": "layer head token feature",
    "k": "layer kv_head token feature",
    "v": "layer kv_head token feature",
    "q_pre": "layer head token feature",
    "k_pre": "layer kv_head token feature",
    "scores": "layer head query key",
    "attention": "layer head query key",
    "attention_mean": "layer query key",
    "attn_heads": "layer head token feature",
    "attn_out": "layer token embd",
    "ffn_out": "layer token embd",
    "hidden": "layer token embd",
    "final_norm": "token embd",
    "logits": "token vocab",
}


SUITE = (
    "llama",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
)  # the families of the suite's own models


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=() if name in SUITE else pytest.mark.slow) for name in FAMILIES
    ],
)
def tiny(request, tmp_path_factory):
    """One architecture: engine, capture of all stages, reference arrays, sizes."""
    architecture = request.param
    path = tiny_model(architecture, tmp_path_factory.mktemp(architecture))
    reference = np.load(REFERENCES / f"{architecture}.npz")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == str(reference["sha256"]), (
        "tiny_model() writes another file than the references were made from: run tests/references/make_references.py"
    )
    size = {"n_layer": 3, "n_kv_head": 2, "head_dim": 16, "conv_layers": ()} | FAMILIES[
        architecture
    ]
    attention_layers = [i for i in range(size["n_layer"]) if i not in size["conv_layers"]]
    with InferenceEngine() as engine:
        engine.load_model(path, gpu_layers=0, auto_start=False, silent=True)
        stages = [stage for stage in STAGES if stage not in NOT_THERE.get(architecture, ())]
        cap = engine.capture(IDS, stages=stages)
        yield SimpleNamespace(
            architecture=architecture,
            path=path,
            engine=engine,
            cap=cap,
            reference=reference,
            attention_layers=attention_layers,
            atol=3 * ATOL if size.get("gelu") else ATOL,
            **size,
        )


def close(actual, desired, atol=ATOL):
    np.testing.assert_allclose(np.asarray(actual), desired, rtol=0, atol=atol)


# Transformers


@pytest.mark.parametrize("stage", ["attention", "hidden", "attn_out", "final_norm", "logits"])
def test_equals_transformers(tiny, stage):
    close(tiny.cap[stage], tiny.reference[stage], ATOL if stage == "attention" else tiny.atol)


def test_states_of_many_texts_equal_transformers(tiny, tmp_path):
    """The text and its beginnings, in one batch, among others: what follows changes nothing."""
    pytest.importorskip("pyarrow", reason="llamatelemetry[analysis] is not installed")
    texts = [IDS[5:9], IDS[:9], IDS, IDS[3:], IDS[:20]]
    found = tiny.engine.collect(texts, pool=None, where=tmp_path, progress=False)
    for number in (1, 2, 4):
        start, count = int(found.start[number]), len(texts[number])
        states = found.hidden[start : start + count].transpose("layer", "token", "embd")
        close(states, tiny.reference["hidden"][:, :count], tiny.atol)


def test_ffn_out_equals_transformers(tiny):
    hidden = tiny.reference["hidden"]
    close(
        tiny.cap.ffn_out, hidden[1:] - hidden[:-1] - tiny.reference["attn_out"], atol=2 * tiny.atol
    )


def test_ablated_head_equals_zeroed_slice_before_o_proj(tiny):
    logits = tiny.engine.capture(
        IDS, stages=("logits",), edits=[ablate_head(layer=1, head=2)]
    ).logits
    close(logits[-8:], tiny.reference["no_head"], tiny.atol)
    assert np.abs(tiny.reference["no_head"] - tiny.reference["logits"][-8:]).max() > 100 * ATOL


def test_ablated_ffn_equals_zeroed_mlp(tiny):
    logits = tiny.engine.capture(
        IDS, stages=("logits",), edits=ablate_layer(layer=1, part="ffn")
    ).logits
    close(logits[-8:], tiny.reference["no_ffn"], tiny.atol)
    assert np.abs(tiny.reference["no_ffn"] - tiny.reference["logits"][-8:]).max() > 100 * ATOL


# Shapes


@pytest.mark.parametrize("stage", STAGES)
def test_dims_and_shape(tiny, stage):
    if stage in NOT_THERE.get(tiny.architecture, ()):
        with pytest.raises(CaptureError, match=tiny.architecture):
            tiny.engine.capture(IDS, stages=(stage,))
        return
    n = len(IDS)
    sizes = {
        "head": 4,
        "kv_head": tiny.n_kv_head,
        "token": n,
        "query": n,
        "key": n,
        "feature": tiny.head_dim,
        "embd": 64,
        "vocab": 320,
    }
    array = tiny.cap[stage]
    assert array.dims == tuple(DIMS[stage].split())
    assert array.dtype == np.float32
    assert {dim: size for dim, size in array.sizes.items() if dim != "layer"} == {
        dim: sizes[dim] for dim in array.dims if dim != "layer"
    }
    if "layer" in array.dims:
        by_head = {"head", "kv_head", "query"} & set(array.dims)  # also a mean over heads
        layers = tiny.attention_layers if by_head else range(tiny.n_layer + (stage == "hidden"))
        assert array.layer.values.tolist() == list(layers)
    for dim in {"token", "query", "key"} & set(array.dims):
        assert array[dim].values.tolist() == tiny.cap.tokens["piece"].tolist()


def test_the_mean_over_heads_is_that_of_the_heads(tiny):
    mean = tiny.engine.capture(IDS, stages=("attention_mean",)).attention_mean
    np.testing.assert_allclose(mean.values, tiny.cap.attention.mean("head").values, atol=1e-6)


def test_tokens_and_model_facts(tiny):
    assert tiny.cap.tokens["id"].tolist() == IDS
    assert not tiny.cap.tokens["generated"].any()
    model = tiny.cap.model
    assert (model.architecture, model.n_layer) == (tiny.architecture, tiny.n_layer)
    assert (model.n_embd, model.n_vocab, model.n_head, model.n_kv_head) == (
        64,
        320,
        4,
        tiny.n_kv_head,
    )


def test_layers_without_attention_are_named(tiny):
    kinds = tiny.cap.layers["kind"]
    assert [i for i, kind in kinds.items() if kind == "attention"] == tiny.attention_layers
    assert all(kinds[i] == "recurrent" for i in tiny.conv_layers)


# What the stages are to one another


def test_residual_stream_adds_up(tiny):
    cap = tiny.cap
    close(
        cap.hidden[1:], cap.hidden.values[:-1] + cap.attn_out.values + cap.ffn_out.values, atol=1e-5
    )


def test_attention_is_causal_and_within_the_window(tiny):
    attention = tiny.cap.attention
    assert (attention.values >= 0).all()
    for layer in tiny.attention_layers:
        seen = visible(tiny.architecture, layer)
        assert (attention.sel(layer=layer).values[:, ~seen] == 0).all()
        assert (attention.sel(layer=layer).values[:, seen] > 0).all()
        assert tiny.cap.layers["sliding"][layer] == (
            not seen.all(where=np.tri(len(IDS), dtype=bool))
        )


def test_rows_of_attention_sum_to_one(tiny):
    sums = tiny.cap.attention.values.sum(-1)
    if tiny.architecture == "gpt-oss":  # the rest of each row goes to the head's sink
        assert (sums < 1).all() and (sums > 0).all()
    else:
        close(sums, np.ones_like(sums), atol=1e-6)


def test_scores_are_products_of_queries_and_keys(tiny):
    q, k = tiny.cap.q.values, tiny.cap.k.values
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    seen = np.broadcast_to(np.tri(len(IDS), dtype=bool), tiny.cap.scores.shape)
    close(tiny.cap.scores.values[seen], (q @ k.swapaxes(-1, -2))[seen], atol=1e-4)


def test_attention_is_the_softmax_of_its_scores(tiny):
    for layer in tiny.attention_layers:
        facts = tiny.cap.layers.loc[layer]
        scores = tiny.cap.scores.sel(layer=layer).values.astype(np.float64)  # (head, query, key)
        divided = tiny.architecture in PRESCALED
        assert facts["scale"] == pytest.approx(1 if divided else tiny.head_dim**-0.5)
        assert facts["softcap"] == pytest.approx(2.0 if tiny.architecture == "gemma2" else 0.0)
        if facts["softcap"]:
            scores = np.tanh(scores / facts["softcap"]) * facts["softcap"]
        else:
            scores = scores * facts["scale"]
        if (
            tiny.architecture == "bloom"
        ):  # ALiBi (Press et al. 2022), slopes 2^-2, 2^-4, 2^-6, 2^-8 for four heads
            position = np.arange(len(IDS))
            scores -= 2.0 ** -np.array([2, 4, 6, 8])[:, None, None] * (position[:, None] - position)
        weights = np.where(visible(tiny.architecture, layer), np.exp(scores), 0)
        total = weights.sum(-1, keepdims=True)
        if tiny.architecture == "gpt-oss":
            total += np.exp(tensor(tiny.path, f"blk.{layer}.attn_sinks.weight"))[:, None, None]
        close(tiny.cap.attention.sel(layer=layer), weights / total, atol=1e-5)


def test_heads_are_attention_times_values(tiny):
    attention, v = tiny.cap.attention.values, tiny.cap.v.values
    close(
        tiny.cap.attn_heads,
        attention @ np.repeat(v, attention.shape[1] // v.shape[1], axis=1),
        atol=1e-5,
    )


def test_attention_output_is_the_projection_of_the_heads(tiny):
    for layer in tiny.attention_layers:
        heads = tiny.cap.attn_heads.sel(layer=layer).transpose("token", "head", "feature").values
        out = heads.reshape(len(IDS), -1) @ tensor(tiny.path, f"blk.{layer}.attn_output.weight").T
        bias = tensor(tiny.path, f"blk.{layer}.attn_output.bias")
        out = out if bias is None else out + bias
        if tiny.architecture in ("gemma2", "gemma3"):
            norm = tensor(tiny.path, f"blk.{layer}.post_attention_norm.weight")
            out = out / np.sqrt(np.square(out).mean(-1, keepdims=True) + 1e-5) * norm
        close(tiny.cap.attn_out.sel(layer=layer), out, atol=1e-5)


def test_queries_and_keys_are_rotated(tiny):
    """RoPE (Su et al. 2021) in NumPy: pairs (2i, 2i+1) in llama files, (i, i + n/2) elsewhere."""
    if tiny.architecture in NOT_THERE:
        pytest.skip("no rotary embedding in this family")
    width = FAMILIES[tiny.architecture].get("n_rot", tiny.head_dim)
    base = FAMILIES[tiny.architecture].get("rope_base", 10000.0)
    for layer in tiny.attention_layers:
        local = tiny.architecture == "gemma3" and layer != 2
        frequency = (10000.0 if local else base) ** (-np.arange(0, width, 2) / width)
        angle = np.arange(len(IDS))[:, None] * frequency  # (token, pair)
        for name in "qk":
            before = tiny.cap[f"{name}_pre"].sel(layer=layer).values
            pairs = (
                np.stack([before[..., 0:width:2], before[..., 1:width:2]])
                if tiny.architecture == "llama"
                else (np.stack([before[..., : width // 2], before[..., width // 2 : width]]))
            )
            first = pairs[0] * np.cos(angle) - pairs[1] * np.sin(angle)
            second = pairs[0] * np.sin(angle) + pairs[1] * np.cos(angle)
            axis = -1 if tiny.architecture == "llama" else -2
            turned = np.stack([first, second], axis=axis).reshape(*first.shape[:-1], width)
            turned = np.concatenate([turned, before[..., width:]], axis=-1)
            if name == "q" and tiny.architecture in PRESCALED:
                turned = turned * tiny.head_dim**-0.5
            close(tiny.cap[name].sel(layer=layer), turned, atol=2e-5)


def test_final_norm_is_the_norm_of_the_last_residual(tiny):
    x = tiny.cap.hidden.values[-1]
    name = "token_embd_norm" if tiny.architecture == "lfm2" else "output_norm"
    weight, bias = (tensor(tiny.path, f"{name}.{part}") for part in ("weight", "bias"))
    if bias is not None:
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5) * weight
    close(tiny.cap.final_norm, x if bias is None else x + bias, atol=1e-5)


def test_logits_are_the_output_matrix_times_the_final_norm(tiny):
    output = tensor(tiny.path, "output.weight")
    output = tensor(tiny.path, "token_embd.weight") if output is None else output
    logits = tiny.cap.final_norm.values @ output.T
    if tiny.architecture == "gemma2":
        logits = np.tanh(logits / 3.0) * 3.0
    close(tiny.cap.logits, logits, atol=2e-5)


def test_normalized_inputs_are_norms_of_the_stream(tiny):
    for layer in range(tiny.n_layer):
        entering = tiny.cap.hidden.sel(layer=layer).values
        between = entering + tiny.cap.attn_out.sel(layer=layer).values
        ffn = {"gpt-oss": ("post_attention_norm", between), "falcon": ("attn_norm", entering)}.get(
            tiny.architecture, ("ffn_norm", between)
        )
        for stage, (name, x) in (("attn_norm", ("attn_norm", entering)), ("ffn_norm", ffn)):
            weight, bias = (
                tensor(tiny.path, f"blk.{layer}.{name}.{part}") for part in ("weight", "bias")
            )
            if bias is not None:
                x = x - x.mean(-1, keepdims=True)
            x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5) * weight
            close(tiny.cap[stage].sel(layer=layer), x if bias is None else x + bias, atol=2e-5)


def test_queries_keys_and_values_are_projections_of_the_normalized_input(tiny):
    widths = {
        "q": 4 * tiny.head_dim,
        "k": tiny.n_kv_head * tiny.head_dim,
        "v": tiny.n_kv_head * tiny.head_dim,
    }
    before = "" if tiny.architecture in NOT_THERE else "_pre"
    for layer in tiny.attention_layers:
        x = tiny.cap.attn_norm.sel(layer=layer).values
        fused, start = (
            [tensor(tiny.path, f"blk.{layer}.attn_qkv.{part}") for part in ("weight", "bias")],
            0,
        )
        for name, width in widths.items():
            if fused[0] is not None:
                weight, bias = (t if t is None else t[start : start + width] for t in fused)
            else:
                weight, bias = (
                    tensor(tiny.path, f"blk.{layer}.attn_{name}.{part}")
                    for part in ("weight", "bias")
                )
            start += width
            out = (
                (x @ weight.T + (0 if bias is None else bias))
                .reshape(len(IDS), -1, tiny.head_dim)
                .swapaxes(0, 1)
            )
            norm = tensor(tiny.path, f"blk.{layer}.attn_{name}_norm.weight")
            if norm is not None:
                out = out / np.sqrt(np.square(out).mean(-1, keepdims=True) + 1e-5) * norm
            close(tiny.cap["v" if name == "v" else name + before].sel(layer=layer), out, atol=2e-5)


# Capturing changes nothing


def test_logits_are_those_of_a_plain_decode_to_the_bit(tiny):
    np.testing.assert_array_equal(tiny.cap.logits.values, plain_logits(tiny.path, IDS))


def test_same_text_same_capture(tiny):
    again = tiny.engine.capture(IDS, stages=tiny.cap.stages)
    for stage in tiny.cap.stages:
        np.testing.assert_array_equal(again[stage].values, tiny.cap[stage].values)


def test_another_token_changes_only_what_comes_after(tiny):
    other = [*IDS[:10], 200, *IDS[11:]]
    hidden = tiny.engine.capture(other, stages=("hidden",)).hidden.values
    close(hidden[:, :10], tiny.cap.hidden.values[:, :10], atol=1e-5)
    assert (np.abs(hidden - tiny.cap.hidden.values)[-1, 10:].max(-1) > ATOL).all()


# Real files


@pytest.fixture(scope="module", params=["smollm2", "gemma-3-270m"])
def real(request, tmp_path_factory):
    """A real model in its own file and expanded to F32, captured, beside the reference."""
    from llamatelemetry import ModelNotFoundError, resolve_model
    from llamatelemetry.convert.expand import expand

    name = {"smollm2": "smollm2-135m-Q4_1", "gemma-3-270m": "gemma-3-270m-Q4_K_M"}[request.param]
    try:
        path = resolve_model(name)
    except ModelNotFoundError as error:
        pytest.skip(str(error))
    reference = np.load(REFERENCES / f"{request.param}.npz")
    ids, layers, heads = (reference[key].tolist() for key in ("ids", "layers", "heads"))
    expanded = expand(
        path, tmp_path_factory.mktemp("expanded") / f"{request.param}-F32.gguf", progress=False
    )
    captures = {}
    for kind, file in (("quantized", path), ("expanded", expanded)):
        with InferenceEngine() as engine:
            engine.load_model(file, auto_start=False, silent=True)
            captures[kind] = engine.capture(
                ids, stages=("attention", "hidden", "attn_out", "final_norm", "logits")
            )
            captures[f"{kind} no head"] = engine.capture(
                ids, stages=("logits",), edits=[ablate_head(layer=layers[1], head=heads[1])]
            )
            many = engine.collect([ids[:5], ids, ids[2:]], pool=None, progress=False)
            of_text = many.hidden[5 : 5 + len(ids)].transpose("layer", "token", "embd")
            captures[f"{kind} among others"] = of_text.values
    expanded.unlink()
    # Gemma's GELU comes from a half-precision table: two exact evaluations of the network with that
    # table, in float32 and in float64, are 0.017 apart in logits (of standard deviation 2.9).
    # SmolLM2 has no table.
    loose = request.param != "smollm2"
    yield SimpleNamespace(
        reference=reference, layers=layers, heads=heads, captures=captures, loose=loose
    )


@pytest.mark.slow
def test_real_model_expanded_equals_transformers(real):
    cap, reference = real.captures["expanded"], real.reference
    attention = cap.attention.sel(layer=real.layers, head=real.heads).values
    close(attention, reference["attention"], atol=1e-3 if real.loose else 5e-6)
    states = real.captures["expanded among others"]  # of many texts in one batch
    noise = 1e-4 if real.loose else 2e-6  # the table again
    assert np.abs(states - cap.hidden.values).max() <= noise * np.abs(states).max()
    norms = np.linalg.norm(states, axis=-1)
    np.testing.assert_allclose(norms, reference["hidden_norm"], rtol=2e-3 if real.loose else 2e-6)
    rows = states[np.ix_([0, *(layer + 1 for layer in real.layers)], reference["hidden_tokens"])]
    size = np.linalg.norm(reference["hidden"], axis=-1)
    relative = np.linalg.norm(rows - reference["hidden"], axis=-1) / size  # of each row
    assert relative.max() < (5e-3 if real.loose else 5e-6)
    top = np.take_along_axis(cap.logits.values, reference["top_id"], -1)
    close(top, reference["top_logit"], atol=0.05 if real.loose else 5e-5)
    no_head = np.take_along_axis(
        real.captures["expanded no head"].logits.values, reference["top_id"], -1
    )
    close(no_head, reference["no_head_logits"], atol=0.05 if real.loose else 1e-4)


@pytest.mark.slow
def test_real_model_quantized_is_near_its_dequantized_self(real):
    """The kernels quantize activations too: near, and not equal."""
    cap, reference = real.captures["quantized"], real.reference
    attention = cap.attention.sel(layer=real.layers, head=real.heads).values
    assert np.corrcoef(attention.ravel(), reference["attention"].ravel())[0, 1] > (
        0.99 if real.loose else 0.999
    )
    assert np.abs(attention - reference["attention"]).max() > 1e-3
    top = np.take_along_axis(cap.logits.values, reference["top_id"], -1)
    assert np.corrcoef(top.ravel(), reference["top_logit"].ravel())[0, 1] > 0.98


# Helpers


def visible(architecture, layer):
    """(query, key) mask of what a layer may see: causal, and within the window in sliding
    layers."""
    n = len(IDS)
    seen = np.tri(n, dtype=bool)
    sliding = {"gemma2": layer % 2 == 0, "gpt-oss": layer % 2 == 0, "gemma3": layer != 2}.get(
        architecture, False
    )
    return seen & ~np.tri(n, k=-WINDOW, dtype=bool) if sliding else seen


@cache
def tensors(path):
    """All weights of an F32 file by name, rows first."""
    import gguf

    return {t.name: np.array(t.data) for t in gguf.GGUFReader(path).tensors}


def tensor(path, name):
    return tensors(path).get(name)


def plain_logits(path, ids):
    """Logits of every token from llama.cpp alone: no callback, the cache in F32 as captures of F32
    files have it."""
    api.llama_backend_init()
    api.llama_log_set(SILENT, ctypes.c_void_p(0))
    model_params = api.llama_model_default_params()
    model_params.n_gpu_layers = 0
    model = api.llama_model_load_from_file(str(path).encode(), model_params)
    params = api.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 512
    params.flash_attn_type = params.type_k = params.type_v = 0
    params.swa_full = True
    context = api.llama_init_from_model(model, params)
    batch = api.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
        batch.seq_id[i][0] = 0
    assert api.llama_decode(context, batch) == 0
    n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    logits = np.ctypeslib.as_array(api.llama_get_logits(context), shape=(len(ids), n_vocab)).copy()
    api.llama_batch_free(batch)
    api.llama_free(context)
    api.llama_model_free(model)
    return logits
