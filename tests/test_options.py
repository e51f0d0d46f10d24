"""Options of load_model: what changes the model is in the server and in captures alike, or refused
by name."""

import itertools
import os
import re
import subprocess
from functools import cache

import gguf
import models
import numpy as np
import pytest
from models import IDS, N_VOCAB, layout, tiny_model

from llamatelemetry import (
    InferenceEngine,
    LlamaTelemetryError,
    ModelLoadError,
    ModelNotFoundError,
    OptionError,
    ServerError,
    resolve_model,
)
from llamatelemetry.capture.session import CaptureSession
from llamatelemetry.compare.texts import load_text
from llamatelemetry.convert.expand import _rewrite
from llamatelemetry.convert.importance import imatrix
from llamatelemetry.files.gguf import GGUFFile
from llamatelemetry.options import (
    KIND,
    PARAMETERS,
    SHARED,
    canonical,
    environment,
    flags,
    refusal,
)
from llamatelemetry.server.loading import (
    described,
    least_context,
    settle,
    trained_context,
)
from llamatelemetry.server.settings import sort_options

# With these llama-server computes as captures of an F32 file do: what is left is the order of sums.
EXACT = {"flash_attn": "off", "cache_type_k": "f32", "cache_type_v": "f32"}
NEAR, FAR = 1e-4, 0.05  # nats: the same model; another one


# Sorting them


@pytest.mark.parametrize(
    "given, name, value",
    [
        ("batch_size", "batch_size", 1),
        ("--batch-size", "batch_size", 1),
        ("ub", "ubatch_size", 1),
        ("no_jinja", "jinja", False),
        ("no_kv_offload", "kv_offload", False),
        ("nkvo", "kv_offload", False),
        ("no_host", "no_host", True),
        ("ctk", "cache_type_k", 1),
        ("swa_checkpoints", "ctx_checkpoints", 1),
    ],
)
def test_names(given, name, value):
    assert canonical(given, True if isinstance(value, bool) else 1) == (name, value)


@pytest.mark.parametrize(
    "name, says",
    [
        ("temperature", "argument of infer"),
        ("n_ctx", "ctx_size"),
        ("ngl", "gpu_layers"),
        ("np", "n_parallel"),
        ("mmproj", "read texts"),
        ("model_draft", "other models"),
        ("spec_type", "other models"),
        ("md", "other models"),
        ("kv_unified", "cache of its own"),
        ("context_shift", "cut or moved"),
        ("api_key", "log and answers"),
        ("mmap", "load_mode"),
        ("rerank", "embed"),
        ("device", "tensor_split"),
        ("lora_init_without_apply", "start"),
        ("rope_freq_bsae", "'rope_freq_base'"),
        ("thread", "'threads'"),
        ("frobnicate", "no option"),
    ],
)
def test_refused_by_name(name, says):
    with pytest.raises(OptionError, match=f"{name}.*{says}"):
        sort_options({name: 1})


@pytest.mark.parametrize(
    "options, says",
    [
        ({"jinja": "yes"}, "True or False"),
        ({"batch_size": True}, "takes a value"),
        ({"rope_scaling": "linaer"}, "yarn"),
        ({"rope_freq_base": "1e4x"}, "a number"),
        ({"rope_scale": 0}, "more than 0"),
        ({"pooling": "none"}, "per token"),
        ({"pooling": "rank"}, "reranker"),
        ({"pooling": "max"}, "mean"),
        ({"cache_type_v": "q8_0"}, "fused attention"),
        ({"cache_type_k": "f32"}, "one type"),
        ({"override_kv": "a=uint:1"}, "KEY=TYPE:VALUE"),
        ({"override_kv": "a=bool:yes"}, "KEY=TYPE:VALUE"),
        ({"batch_size": 1, "n_batch": 2}, "same option"),
        ({"control_vector_layer_range": 3}, "first and the last"),
        ({"lora_scaled": "x.gguf"}, "FILE:SCALE"),
    ],
)
def test_wrong_values(options, says):
    with pytest.raises(OptionError, match=says):
        sort_options(options)


def test_a_missing_adapter_is_said_at_once(tmp_path):
    with pytest.raises(ModelNotFoundError, match="lora.*none.gguf"):
        sort_options({"lora": tmp_path / "none.gguf"})


def test_files_however_they_are_given(tmp_path):
    one, two = tmp_path / "a, b.gguf", tmp_path / "c.gguf"
    one.touch(), two.touch()
    for options, wanted in (
        ({"lora": one}, [[str(one), 1.0]]),
        ({"lora": [one, str(two)]}, [[str(one), 1.0], [str(two), 1.0]]),
        ({"lora_scaled": f"{two}:0.5"}, [[str(two), 0.5]]),
        ({"lora": (one, 2)}, [[str(one), 2.0]]),
        ({"lora": two, "lora_scaled": [f"{one}:-1"]}, [[str(two), 1.0], [str(one), -1.0]]),
    ):
        assert sort_options(options)[1] == {"loras": wanted}


def test_flags():
    made = flags(
        {
            "batch_size": 256,
            "jinja": True,
            "repack": False,
            "lora_scaled": None,
            "fit_target": [1, 2],
            "control_vector_layer_range": [1, 3],
        }
    )
    assert " ".join(made) == (
        "--batch-size 256 --jinja --no-repack --fit-target 1,2 --control-vector-layer-range 1 3"
    )


def test_settings_of_the_machine(tmp_path, monkeypatch):
    path = tmp_path / "config.ini"
    monkeypatch.setenv("LLAMA_ARG_ROPE_FREQ_BASE", "500")
    made = environment(path)  # there is none: the rule
    assert "LLAMA_ARG_ROPE_FREQ_BASE" not in made and made["PATH"] == os.environ["PATH"]
    path.write_text("version = 1\n[*]\nthreads-batch = 2\n; rope-freq-base = 5\n")
    environment(path)
    path.write_text("[*]\nthreads-batch = 2\nrope-freq-base = 500\n")
    with pytest.raises(ServerError, match="rope-freq-base"):
        environment(path)


@pytest.mark.slow
def test_llama_servers_own_list(llama_server):
    """Every option that this llama-server has is taken or refused for a reason, and none is taken
    that it has not."""
    text = subprocess.run(
        [llama_server, "--help"], capture_output=True, text=True, check=True
    ).stdout
    starts = (
        itertools.takewhile(lambda word: word.startswith("-"), line.split())
        for line in text.splitlines()
        if line.startswith("-") and not line.startswith("-----")
    )
    names = {word.strip("-,") for words in starts for word in words}
    assert len(names) > 250
    taken = {*KIND, *SHARED, *PARAMETERS}
    unknown = [
        name
        for name in names
        if (found := canonical(name)[0]) not in taken
        and "no option of load_model" in refusal(name, found)
    ]
    assert not unknown
    assert not [name for name in taken if name.replace("_", "-") not in names]


# What they do


def write_gguf(path, architecture, keys, tensors):
    writer = gguf.GGUFWriter(str(path), architecture)
    for key, value in keys.items():
        models.put(writer, key, value)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Tiny models, and adapters and control vectors for the first: {name: path}."""
    folder, random = tmp_path_factory.mktemp("options"), np.random.RandomState(3)
    made = {name: tiny_model(name, folder) for name in ("llama", "gemma3", "qwen3moe")}
    shapes = {"a": (4, 64), "b": (64, 4)}
    for number in (1, 2):
        made[f"lora{number}"] = write_gguf(
            folder / f"lora{number}.gguf",
            "llama",
            {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 8.0},
            {
                f"blk.{layer}.attn_output.weight.lora_{part}": random.standard_normal(shape).astype(
                    np.float32
                )
                for layer in range(3)
                for part, shape in shapes.items()
            },
        )
        made[f"control{number}"] = write_gguf(
            folder / f"control{number}.gguf",
            "controlvector",
            {"controlvector.layer_count": 2},
            {
                f"direction.{layer}": random.standard_normal(64).astype(np.float32)
                for layer in (1, 2)
            },
        )
    made["template"] = folder / "template.jinja"
    made["template"].write_text("{{ messages[0].content }}")
    return made


def log_softmax(logits):
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def served(engine, ids):
    """llama-server's log-probabilities of the token after ids."""
    table = engine.infer(ids, max_tokens=1, temperature=0, n_probs=N_VOCAB).probabilities
    return table.set_index("id")["logprob"].reindex(range(N_VOCAB)).to_numpy()


def captured(engine, ids):
    return log_softmax(engine.capture(ids, stages="logits").logits.values[-1])


def off(one, other):
    return np.abs(one - other).max()


FREE_VALUES = {
    "threads_batch": 1,
    "threads_http": 1,
    "cpu_mask": "1",
    "cpu_range": "0-0",
    "cpu_strict": 0,
    "prio": 0,
    "poll": 0,
    "cpu_mask_batch": "1",
    "cpu_range_batch": "0-0",
    "cpu_strict_batch": 0,
    "prio_batch": 0,
    "poll_batch": 0,
    "batch_size": 64,
    "ubatch_size": 8,
    "flash_attn": False,
    "ctx_checkpoints": 1,
    "checkpoint_min_step": 0,
    "cache_ram": 1,
    "load_mode": "none",
    "lazy_mode": "off",
    "numa": "distribute",
    "override_tensor": "output=CPU",
    "n_cpu_moe": 2,
    "n_cpu_ffn": 2,
    "fit": False,
    "fit_target": 64,
    "alias": "x",
    "tags": "x",
    "sse_ping_interval": 5,
    "slot_save_path": ".",
    "chat_template": "chatml",
    "chat_template_file": "template",
    "chat_template_kwargs": '{"a": 1}',
    "reasoning": "off",
    "reasoning_format": "none",
    "reasoning_effort": "low",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KIND)
def test_no_effect_on_the_numbers(files, llama_server, name):
    """llama-server with the option says what a capture without it shows."""
    value = FREE_VALUES.get(name, True) if KIND[name] != "either" else False
    value = str(files["template"]) if value == "template" else value
    path = files[
        "qwen3moe" if "moe" in name or "tensor" in name else "gemma3" if "swa" in name else "llama"
    ]
    with InferenceEngine(llama_server) as engine:
        engine.load_model(path, silent=True, threads=1, **(EXACT | {name: value}))
        assert off(served(engine, IDS), captured(engine, IDS)) < NEAR


YARN = {"rope_scaling": "yarn", "rope_scale": 4}
SHARED_VALUES = [  # (option and what else it needs, the same without it)
    ({"rope_freq_base": 500}, {}),
    ({"rope_freq_scale": 0.25}, {}),
    ({"rope_scale": 4}, {}),
    ({"rope_scaling": "yarn", "rope_scale": 4}, {"rope_scale": 4}),
    ({"rope_scaling": "none", "rope_scale": 4}, {"rope_scale": 4}),
    ({"yarn_orig_ctx": 64, **YARN}, YARN),
    ({"yarn_ext_factor": 0.3, **YARN}, YARN),
    ({"yarn_attn_factor": 3}, {}),
    ({"yarn_beta_slow": 8, **YARN}, YARN),
    ({"yarn_beta_fast": 2, **YARN}, YARN),
    ({"override_kv": "llama.rope.freq_base=float:500"}, {}),
    (
        {
            "override_kv": (
                "llama.attention.layer_norm_rms_epsilon=float:0.5",
                "llama.rope.freq_base=float:500",
            )
        },
        {},
    ),
    ({"lora": "lora1"}, {}),
    ({"lora": ("lora1", "lora2")}, {"lora": "lora1"}),
    ({"lora_scaled": "lora1:-0.5"}, {}),
    ({"lora": "lora1", "lora_scaled": "lora2:0.5"}, {"lora": "lora1"}),
    ({"control_vector": "control1"}, {}),
    ({"control_vector": ("control1", "control2")}, {"control_vector": "control1"}),
    ({"control_vector_scaled": "control1:-2"}, {}),
    (
        {"control_vector": "control1", "control_vector_layer_range": (2, 2)},
        {"control_vector": "control1"},
    ),
    ({"lora": "lora1", "control_vector": "control1", "rope_freq_base": 500}, {"lora": "lora1"}),
]


def named(files, options):
    def replace(value):
        if isinstance(value, tuple):
            return tuple(map(replace, value))
        found = re.match("(lora|control)[12]", value) if isinstance(value, str) else None
        return value.replace(found[0], str(files[found[0]])) if found else value

    return {name: replace(value) for name, value in options.items()}


@pytest.fixture(scope="module")
def agreed(files, llama_server):
    """What llama-server and captures both say with an option (log-probabilities): tried once."""

    @cache
    def ask(given):
        options = dict(given)
        with InferenceEngine(llama_server) as engine:
            engine.load_model(
                files["llama"], silent=True, threads=1, **EXACT, **named(files, options)
            )
            capture = engine.capture(IDS, stages="logits")
            assert (" with " in capture.logits.attrs["model"]) == bool(options)
            found = log_softmax(capture.logits.values[-1])
            assert off(served(engine, IDS), found) < NEAR
        return found

    return lambda options: ask(tuple(options.items()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, without", SHARED_VALUES, ids=lambda options: "-".join(options) or "nothing"
)
def test_both_or_neither(agreed, options, without):
    """llama-server and captures agree with the option, and it has an effect."""
    assert off(agreed(options), agreed(without)) > FAR


@pytest.mark.slow
def test_types_of_the_cache(files, llama_server):
    """In 16 bits both round alike; captures of an F32 file keep 32 unless they are told to."""
    found = {}
    for kind in ("f16", "f32"):
        with InferenceEngine(llama_server) as engine:
            types = {"cache_type_k": kind, "cache_type_v": kind}
            engine.load_model(files["llama"], silent=True, threads=1, flash_attn="off", **types)
            found[kind] = captured(engine, IDS)
            assert off(served(engine, IDS), found[kind]) < NEAR
    assert off(*found.values()) > NEAR


def test_every_shared_option_is_tried():
    tried = {name for options, _ in SHARED_VALUES for name in options} | {
        "cache_type_k",
        "cache_type_v",
    }
    assert tried == set(SHARED)
    assert set(FREE_VALUES) == {name for name, kind in KIND.items() if kind == "value"}


@pytest.mark.slow
def test_settings_elsewhere_are_not_read(files, llama_server, monkeypatch, tmp_path):
    (tmp_path / "llama.cpp").mkdir()
    (tmp_path / "llama.cpp" / "config.ini").write_text("[*]\nrope-freq-base = 500\n")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("LLAMA_ARG_ROPE_FREQ_SCALE", "0.25")
    monkeypatch.setenv("LLAMA_ARG_N_PREDICT", "1")
    with InferenceEngine(llama_server) as engine:
        engine.load_model(files["llama"], silent=True, threads=1, **EXACT)
        assert off(served(engine, IDS), captured(engine, IDS)) < NEAR
        assert engine.infer(IDS, max_tokens=3, ignore_eos=True).tokens_generated == 3


@pytest.mark.slow
def test_settings_elsewhere_change_no_importance_matrix(files, tmp_path, monkeypatch):
    made = []
    for number, base in enumerate((None, "500")):
        if base:
            monkeypatch.setenv("LLAMA_ARG_ROPE_FREQ_BASE", base)
        path = imatrix(
            files["llama"],
            load_text()[:1000],
            tmp_path / f"{number}.gguf",
            n_ctx=64,
            progress=False,
        )
        made.append(
            {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}
        )
    assert made[0] and all(np.array_equal(made[0][name], made[1][name]) for name in made[0])


@pytest.mark.slow
def test_adapters_that_do_not_fit(files, tmp_path):
    wide = write_gguf(
        tmp_path / "wide.gguf", "controlvector", {}, {"direction.1": np.ones(65, np.float32)}
    )
    for options, says in (
        ({"lora": files["control1"]}, "adapter"),
        ({"control_vector": wide}, "65 wide"),
        ({"control_vector": files["lora1"]}, "no control vector"),
    ):
        with InferenceEngine() as engine, pytest.raises(ModelLoadError, match=says):
            engine.load_model(files["llama"], auto_start=False, silent=True, threads=1, **options)
            engine.capture(IDS)


def test_overrides_reach_what_is_read_from_the_file(files):
    file = GGUFFile(files["llama"])
    settle(
        file,
        None,
        {"override_kv": "llama.rope.freq_base=float:500,tokenizer.ggml.add_bos_token=bool:false"},
    )
    assert file.rope_freq_base == 500 and file.metadata["tokenizer.ggml.add_bos_token"] is False
    assert GGUFFile(files["llama"]).rope_freq_base == 10000


# The context


def test_a_changed_model_is_called_so(tmp_path):
    (tmp_path / "a.gguf").touch()
    options = {
        "lora_scaled": f"{tmp_path}/a.gguf:0.5",
        "rope_freq_base": 500,
        "override_kv": "x.y=int:3",
    }
    assert (
        described(sort_options(options)[1]) == " with lora a.gguf x 0.5, x.y 3, rope_freq_base 500"
    )
    assert described(sort_options(EXACT)[1]) == ""


@pytest.fixture(scope="module")
def longrope(tmp_path_factory):
    """A tiny Phi 3 trained for 4,096 tokens with other rotary factors beyond 512."""

    def with_factors(architecture, size):
        half = (size["n_rot"] // 2,)
        return layout(architecture, size) + [
            ("rope_factors_long.weight", half, 8.0, 2.0),
            ("rope_factors_short.weight", half, 1.0, 0.02),
        ]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "layout", with_factors)
        return tiny_model(
            "phi3",
            tmp_path_factory.mktemp("longrope"),
            n_ctx=4096,
            keys={"rope.scaling.original_context_length": 512},
        )


def test_least_context(longrope, files):
    file = GGUFFile(longrope)
    assert [least_context(file, size) for size in (256, 512, 513, 4096)] == [0, 0, 513, 513]
    assert least_context(GGUFFile(files["llama"]), 4096) == 0


@pytest.mark.slow
def test_a_capture_does_not_depend_on_those_before(longrope):
    found = {}
    for size in (512, 600, 4096):
        with CaptureSession(longrope, threads=1, n_ctx=size) as session:
            found[size] = session.capture(IDS, "logits").logits.values
            if size > 600:
                session.capture(IDS * 25, "logits")
            assert np.array_equal(session.capture(IDS, "logits").logits.values, found[size])
    assert np.array_equal(found[600], found[4096]) and off(found[512], found[600]) > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "ctx_size, n_parallel", [(None, 1), (256, 3), (512, 1), (520, 2), (2048, 1)]
)
def test_longrope_as_the_server_has_it(longrope, llama_server, ctx_size, n_parallel):
    with InferenceEngine(llama_server) as engine:
        engine.load_model(
            longrope, ctx_size=ctx_size, n_parallel=n_parallel, silent=True, threads=1, **EXACT
        )
        assert off(served(engine, IDS), captured(engine, IDS)) < NEAR


@pytest.mark.slow
def test_beyond_the_training_in_both(files, llama_server, capsys):
    with InferenceEngine(llama_server) as engine:
        engine.load_model(files["llama"], ctx_size=2048, threads=1, **EXACT)
        assert "ctx_size=2,048: tiny llama was trained for 512 tokens" in capsys.readouterr().out
        long = (IDS * 25)[:700]
        assert off(served(engine, long), captured(engine, long)) < NEAR
        short = captured(engine, IDS)
    with InferenceEngine() as engine:
        engine.load_model(files["llama"], auto_start=False, threads=1, **EXACT)
        assert "trained" not in capsys.readouterr().out
        assert off(captured(engine, IDS), short) == 0
        with pytest.raises(LlamaTelemetryError, match="ctx_size=700"):
            engine.capture(long, stages="logits")


@pytest.mark.slow
def test_a_table_of_positions_ends(tmp_path, llama_server, capsys):
    with InferenceEngine(llama_server) as engine:
        engine.load_model(tiny_model("gpt2", tmp_path), ctx_size=2048, threads=1)
        assert "trained for 512 tokens. Answers and captures end there" in capsys.readouterr().out
        for call in (
            lambda ids: engine.infer(ids, max_tokens=1),
            lambda ids: engine.capture(ids, stages="logits"),
        ):
            with pytest.raises(LlamaTelemetryError, match="512"):
                call((IDS * 25)[:600])
        assert engine.capture((IDS * 25)[:500], stages="logits").logits.shape[0] == 500


@pytest.mark.slow
def test_yarn_reaches_further(files, llama_server):
    """llama.cpp multiplies the training by the YaRN factor; in 500 tokens of 2,000 both are the
    same."""
    file = GGUFFile(files["llama"])
    assert trained_context(file, {"rope_scaling_type": 2, "rope_freq_scale": 0.25})[0] == 2048
    assert trained_context(file, {"rope_scaling_type": 2, "rope_freq_scale": 1 / 3})[0] == 1536
    assert trained_context(file, {"rope_freq_scale": 0.25}) == (512, "")
    with InferenceEngine(llama_server) as engine:
        engine.load_model(files["llama"], ctx_size=2048, silent=True, threads=1, **EXACT, **YARN)
        long = (IDS * 60)[:1500]
        assert off(served(engine, long), captured(engine, long)) < NEAR


@pytest.mark.slow
def test_a_sliding_windows_cache_that_is_used_again(files, llama_server):
    """The server's cells of a window come round; captures keep one per position. In exact
    arithmetic: the same."""
    with InferenceEngine(llama_server) as engine:
        engine.load_model(
            files["gemma3"], ctx_size=2048, silent=True, threads=1, ubatch_size=32, **EXACT
        )
        long = (IDS * 30)[:800]
        assert off(served(engine, long), captured(engine, long)) < NEAR


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, n, batch", [("smollm2-135m-Q4_1", 200, 128), ("gemma-3-270m-Q4_K_M", 700, 512)]
)
def test_answers_as_captured(llama_server, name, n, batch, monkeypatch):
    """Of quantized files too, over more than a batch and a window, where the server sums in the
    order of captures."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    try:
        path = resolve_model(name, progress=False)
    except ModelNotFoundError as error:
        pytest.skip(str(error))
    apart = {}
    for options in ({}, {"flash_attn": "off", "swa_full": True}):
        with InferenceEngine(llama_server) as engine:
            engine.load_model(path, ctx_size=1024, silent=True, ubatch_size=batch, **options)
            ids = engine.tokenize(load_text()[:6000])["id"].tolist()[:n]
            logp = log_softmax(engine.capture(ids, stages="logits").logits.values[-1])
            table = engine.infer(ids, max_tokens=1, temperature=0, n_probs=100).probabilities
            apart[len(options)] = np.abs(table["logprob"] - logp[table["id"]]).max()
    assert apart[2] < 1e-3 < apart[0] < 2


def test_a_context_is_a_number_of_tokens(files):
    for size in (0, -5, True, "4096", 1.5):
        with pytest.raises(OptionError, match="ctx_size"):
            settle(GGUFFile(files["llama"]), size, {})


@pytest.mark.slow
def test_a_chat_template_of_the_users(files, llama_server):
    with InferenceEngine(llama_server) as engine:
        engine.load_model(files["llama"], silent=True, threads=1, chat_template="chatml")
        assert engine.apply_template("Hi").startswith("<|im_start|>user\nHi")
        engine.load_model(files["llama"], silent=True, threads=1)
        with pytest.raises(ServerError, match="chat template"):
            engine.apply_template("Hi")


MATRICES = {
    "qwen3moe": "attn_q attn_k attn_v attn_output ffn_gate_exps ffn_up_exps ffn_down_exps",
    "llama": "attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down",
    "gemma3": "attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down",
    "phi3": "attn_qkv attn_output ffn_up ffn_down",
    "gpt2": "attn_qkv attn_output ffn_up ffn_down",
}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", MATRICES)
def test_every_stage_is_that_of_the_adapted_model(tmp_path, architecture):
    """With an adapter every stage is that of a file whose weights hold the adapter: W + scale alpha
    / rank B A."""
    path, random = tiny_model(architecture, tmp_path), np.random.RandomState(5)
    file, tensors, changes = GGUFFile(path), {}, {}
    for layer in range(file.n_layer):
        for matrix in MATRICES[architecture].split():
            name = f"blk.{layer}.{matrix}.weight"
            *experts, rows, width = file.tensors.loc[name, "shape"]
            a, b = (
                0.2 * random.standard_normal(shape).astype(np.float32)
                for shape in ((*experts, 4, width), (*experts, rows, 4))
            )
            tensors |= {f"{name}.lora_a": a, f"{name}.lora_b": b}
            changes[name] = 0.5 * 8 / 4 * b @ a
    lora = write_gguf(
        tmp_path / "lora.gguf",
        architecture,
        {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 8.0},
        tensors,
    )

    def change(tensor, start):
        def add(at, values):  # (rows, width)
            if tensor.name in changes:
                rows = changes[tensor.name].reshape(-1, values.shape[-1])
                values += rows[at : at + len(values)].astype(np.float32)

        return add

    merged = _rewrite(path, tmp_path / "merged.gguf", "F32", change, {}, False)
    captures = []
    for model, options in ((path, {"lora_scaled": f"{lora}:0.5"}), (merged, {}), (path, {})):
        with InferenceEngine() as engine:
            engine.load_model(model, auto_start=False, silent=True, threads=1, **options)
            if not captures:
                have = engine.stages().query("there").index
            captures.append(engine.capture(IDS, stages=have))
    adapted, wanted, plain = captures
    assert {"attention", "hidden", "attn_out", "ffn_out", "q", "logits"} <= set(adapted.stages)
    other = []
    for stage in adapted.stages:
        values, found = wanted[stage].values, adapted[stage].values
        room = (
            1e-4 * np.abs(values[np.isfinite(values)]).max()
        )  # GELU's table of the CPU makes steps of a half
        if values.shape != found.shape or not np.allclose(found, values, rtol=0, atol=room):
            other.append(stage)
    assert not other
    assert np.abs(plain.hidden.values[1:] - wanted.hidden.values[1:]).max() > FAR


@pytest.mark.slow
def test_a_control_vector_is_added_behind_its_layers(files):
    rows = {
        tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(files["control1"]).tensors
    }
    with InferenceEngine() as engine:
        engine.load_model(
            files["llama"],
            auto_start=False,
            silent=True,
            threads=1,
            control_vector_scaled=f"{files['control1']}:2",
            control_vector_layer_range=(2, 2),
        )
        found = engine.capture(IDS, stages=("hidden", "attn_out", "ffn_out"))
    for layer in range(3):
        left = (
            found.hidden.values[layer + 1]
            - found.hidden.values[layer]
            - found.attn_out.values[layer]
        )
        left = left - found.ffn_out.values[layer]
        assert np.allclose(left, 2 * rows["direction.2"] if layer == 2 else 0, atol=1e-5), layer
