"""Published features against sae_lens' own encoders (references/features.npz), and what of them
survives against scipy."""

import http.server
import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr
from safetensors.numpy import load_file, save_file
from scipy.stats import pearsonr

from llamatelemetry import Features
from llamatelemetry.errors import FeatureError, NotFiniteError
from llamatelemetry.features import figures, formats, hooks, say
from llamatelemetry.features.encoder import variant
from llamatelemetry.features.survival import CONTROL, survival

SAVED = np.load(Path(__file__).parent / "references/features.npz")
CASES = sorted({name.split("/")[0] for name in SAVED.files if name.endswith("/active")})
STATES = SAVED["states"]


def folder_of(case, root):
    """The folder that sae_lens saved, written again."""
    folder = root / (SAVED[f"{case}/folder"].item() if f"{case}/folder" in SAVED else case)
    folder.mkdir(parents=True)
    arrays = {}
    for name in SAVED.files:
        parts = name.split("/")
        if parts[0] == case and parts[1].endswith(".json"):
            (folder / parts[1]).write_text(SAVED[name].item())
        elif parts[0] == case and len(parts) == 3:
            arrays.setdefault(parts[1], {})[parts[2]] = SAVED[name]
    for file, weights in arrays.items():
        if file.endswith(".npz"):
            np.savez(folder / file, **weights)
        else:
            save_file(weights, folder / file)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_activations_and_reconstructions_are_those_of_sae_lens(case, tmp_path):
    features = Features.load(folder_of(case, tmp_path))
    expected = SAVED[f"{case}/active"]
    assert 0 < (expected > 0).mean() < 1, "the case tells nothing"
    np.testing.assert_allclose(features.encode(STATES), expected, atol=1e-5)
    np.testing.assert_allclose(features.reconstruct(STATES), SAVED[f"{case}/made"], atol=1e-4)
    hook = SAVED[f"{case}/hook"].item() if f"{case}/hook" in SAVED else "blocks.3.hook_resid_post"
    assert hooks.parse(hook).parts == features.hook.parts


def test_features_of_a_labelled_array_keep_its_dims(tmp_path):
    features = Features.load(folder_of("jumprelu", tmp_path))
    states = xr.DataArray(
        np.stack([STATES[:8], STATES[8:]]),
        dims=("text", "token", "embd"),
        coords={"text": ["a", "b"]},
    )
    active = features.encode(states.transpose("embd", "text", "token"))
    assert active.dims == ("text", "token", "feature") and list(active["text"].values) == ["a", "b"]
    np.testing.assert_allclose(active.sel(text="b").values, SAVED["jumprelu/active"][8:], atol=1e-5)


@pytest.mark.parametrize(
    "name, parts, change",
    [
        ("blocks.12.hook_resid_post", (("hidden", 13),), None),
        ("blocks.12.hook_resid_pre", (("hidden", 12),), None),
        ("blocks.0.hook_resid_mid", (("hidden", 0), ("attn_out", 0)), None),
        ("hook_embed", (("hidden", 0),), None),
        ("blocks.4.hook_mlp_out", (("ffn_out", 4),), None),
        ("blocks.4.attn.hook_z", (("attn_heads", 4),), "flat"),
        ("blocks.4.ln2.hook_normalized", (("hidden", 4), ("attn_out", 4)), "norm"),
        ("model.layers.9.output", (("hidden", 10),), None),
        ("layers.9.self_attn.o_proj.input", (("attn_heads", 9),), "flat"),
        ("model.layers.2.pre_feedforward_layernorm.output", (("ffn_norm", 2),), None),
    ],
)
def test_a_published_hook_point_is_a_stage(name, parts, change):
    hook = hooks.parse(name)
    assert (hook.parts, hook.change) == (parts, change)


@pytest.mark.parametrize("name", ["blocks.1.mlp.hook_post", "blocks.x.hook_resid_post", "", None])
def test_a_hook_point_without_a_stage_is_refused(name):
    with pytest.raises(FeatureError, match="hook"):
        hooks.parse(name)


@pytest.mark.parametrize(
    "name, kind",
    [
        ("google/gemma-2-2b", "base"),
        ("google/gemma-2-2b-it", "instruct"),
        ("Llama-3.1-8B-Instruct", "instruct"),
        ("Gemma 3 270m It", "instruct"),
        ("google/gemma-3-270m", "base"),
        ("Mitral-7B", "base"),
    ],
)
def test_what_a_name_says_of_tuning(name, kind):
    assert variant(name) == kind


def config(folder, **change):
    path = folder / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


DAMAGE = {
    "normalize_activations": dict(normalize_activations="expected_average_only_in"),
    "temporal": dict(architecture="temporal"),
    "hook": dict(metadata={}),
    "k is 'all'": dict(architecture="topk", k="all"),
    "is standard|b_enc|activation": dict(activation_fn="gelu"),
    "k is None": dict(activation_fn="topk"),
    "k is True": dict(architecture="topk", k=True),
    "k is 5.0": dict(architecture="topk", k=5.0),
    "d_in is 99, and W_enc is": dict(d_in=99),
    "d_sae is 99, and W_enc is": dict(d_sae=99),
    "apply_b_dec_to_input is 'false'": dict(apply_b_dec_to_input="false"),
    "one attention head .3.": dict(metadata={"hook_name": "attn.hook_z", "hook_head_index": 3}),
}


@pytest.mark.parametrize("match", DAMAGE)
def test_what_cannot_be_read_is_said(match, tmp_path):
    folder = folder_of("standard", tmp_path)
    config(folder, **DAMAGE[match])
    with pytest.raises(FeatureError, match=match):
        Features.load(folder)


def test_several_layers_at_once_are_refused_by_name(tmp_path):
    folder = folder_of("standard", tmp_path)
    weights = load_file(folder / "sae_weights.safetensors")
    weights |= {name: np.stack([weights[name]] * 2) for name in ("W_enc", "W_dec")}
    save_file(weights, folder / "sae_weights.safetensors")
    with pytest.raises(FeatureError, match="crosscoder or reads several layers"):
        Features.load(folder)


@pytest.mark.parametrize("damage", ["cut", "text", "nan", "missing", "shape", "no config", "list"])
def test_a_damaged_folder_is_a_typed_error(damage, tmp_path):
    folder = folder_of("jumprelu", tmp_path)
    path = folder / "sae_weights.safetensors"
    weights = {
        name.split("/")[2]: SAVED[name].copy()
        for name in SAVED.files
        if name.startswith("jumprelu/sae")
    }
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "text":
        path.write_text("not weights")
    elif damage == "nan":
        weights["W_enc"][0, 0] = np.nan
        save_file(weights, path)
    elif damage == "missing":
        del weights["threshold"]
        save_file(weights, path)
    elif damage == "shape":
        weights["W_enc"] = weights["W_enc"].ravel()
        save_file(weights, path)
    elif damage == "list":
        (folder / "cfg.json").write_text("[1]")
    else:
        (folder / "cfg.json").unlink()
    with pytest.raises(FeatureError):
        Features.load(folder)


@pytest.mark.parametrize("source", ["nowhere", "a/b", "/no/such/folder", 3, b"\xff"])
def test_what_is_no_place_is_said(source):
    with pytest.raises(FeatureError):
        Features.load(source)


def test_without_a_network_the_hub_is_named(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FeatureError, match="HF_HUB_OFFLINE"):
        Features.load("google/gemma-scope-2b-pt-res/layer_1/width_16k/average_l0_9")


@pytest.fixture
def asked_hub(monkeypatch):
    """asked_hub(names): the hub, with a repository of these files; None: it never says which."""
    from huggingface_hub import constants

    end, servers = threading.Event(), []

    def start(names):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.send_response(200)
                self.end_headers()

            def do_GET(self):
                if names is None:
                    end.wait(20)
                    return
                said = {"id": "a/b", "siblings": [{"rfilename": name} for name in names]}
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(json.dumps(said).encode())

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    yield start
    end.set()
    for server in servers:
        server.shutdown()
        server.server_close()


def test_the_repository_says_which_format_it_has(asked_hub, monkeypatch):
    asked_hub(["f/cfg.json", "f/params.npz", "g/cfg.json"])
    monkeypatch.setattr(formats.hub, "fetch", lambda repo, names, progress: [repo, *names])
    assert formats.locate("a/b/f") == ("a/b/f", ["a/b", "f/params.npz"])
    with pytest.raises(FeatureError, match="a/b has no features in g: there is no cfg.json with"):
        formats.locate("a/b/g")


def test_a_hub_that_says_nothing_is_not_waited_for(asked_hub, monkeypatch):
    asked_hub(None)
    monkeypatch.setattr(formats.hub, "SILENCE_S", 0.3)
    started = time.monotonic()
    with pytest.raises(FeatureError, match="a/b/f could not be fetched: .*imeout.* Run it again"):
        formats.locate("a/b/f")
    assert time.monotonic() - started < 10


def planted(n_in=6):
    """Features that are the unit vectors, each with its opposite: known by hand."""
    eye = np.eye(n_in, dtype=np.float32)
    weights = {
        "W_enc": np.hstack([eye, -eye]),
        "W_dec": np.vstack([eye, -eye]),
        "b_enc": np.zeros(2 * n_in, np.float32),
        "b_dec": np.zeros(n_in, np.float32),
    }
    hook = hooks.parse("blocks.0.hook_resid_post")
    return Features("planted", formats.Facts("standard", hook.name), hook, weights)


def test_a_dictionary_of_all_directions_explains_all():
    states = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    found = planted().fit(states)
    assert found["explained"] == pytest.approx(1, abs=1e-6) and found["active"] == pytest.approx(6)
    assert np.isnan(planted().fit(np.ones((5, 6), np.float32))["explained"])
    assert "100%" in say.fit(found, 12)


def test_survival_is_the_correlation_of_activations():
    rng = np.random.default_rng(0)
    states = rng.normal(size=(400, 6)).astype(np.float32)
    noisy = states.copy()
    noisy[:, 2] += 2 * rng.normal(size=400)  # planted: one direction damaged
    features = planted()
    table = survival(features, states, {"noisy": noisy}, states + 0)
    expected = [
        pearsonr(a, b)[0] for a, b in zip(features.encode(states).T, features.encode(noisy).T)
    ]
    np.testing.assert_allclose(table["noisy"], expected, atol=1e-6)
    np.testing.assert_allclose(table[CONTROL], 1, atol=1e-6)
    assert set(table.index[table["noisy"] < 0.9]) == {2, 8}
    assert "17% of the features" in say.survival(table)  # 2 of 12
    assert len(figures.survival(table, title="t").data) == 2


def test_features_that_are_hardly_active_have_no_correlation():
    states = np.abs(np.random.default_rng(0).normal(size=(40, 6))).astype(np.float32)
    states[:, 5] = 0
    states[:3, 5] = 1
    table = survival(planted(), states, {"same": states}, min_active=10)
    assert list(table.index) == [0, 1, 2, 3, 4]
    dead = survival(planted(), states, {"dead": states * 0})
    assert dead["dead"].isna().all() and "median 0.000" in say.survival(dead)
    assert "counted as 0: 5 in dead." in say.survival(dead).replace("\n", " ")
    assert "no other file" in say.survival(dead[["active", "mean"]])
    with pytest.raises(FeatureError, match="same tokens"):
        survival(planted(), states, {"short": states[:5]})


def test_what_never_varies_has_no_correlation_to_lose():
    """A feature that is always as active: its correlation is none, in any file."""
    states = np.abs(np.random.default_rng(0).normal(size=(40, 6))).astype(np.float32)
    states[:, 2] = 0.3
    assert list(survival(planted(), states, {"same": states}).index) == [0, 1, 3, 4, 5]


def test_states_that_are_no_numbers_are_refused():
    states = np.ones((20, 6), np.float32)
    states[3, 1] = np.nan
    for read in (planted().encode, planted().fit, planted().reconstruct):
        with pytest.raises(NotFiniteError, match="NaN"):
            read(states)
    with pytest.raises(NotFiniteError):
        survival(planted(), np.ones((20, 6)), {"broken": states})


def test_equal_states_are_not_explained():
    """Their mean in 32 bits is beside them: a variance of nothing."""
    found = planted().fit(np.full((777, 6), 0.1, np.float32))
    assert np.isnan(found["explained"]) and "explain" not in say.fit(found, 12)
    assert "explain nothing" in say.fit({"active": 0.4, "explained": -3.0}, 12)
    assert say.fit({"active": 0.4, "explained": np.nan}, 12).startswith("0.4 of 12 features")


@pytest.mark.parametrize(
    "name, fits",
    [
        ("blocks.3.hook_resid_post", True),
        ("blocks.4.hook_resid_pre", True),
        ("blocks.4.hook_resid_post", False),
        ("blocks.4.hook_resid_mid", False),
        ("blocks.4.hook_mlp_out", False),
        ("model.layers.4.output", False),
    ],
)
def test_a_layer_that_is_not_there_is_named_at_the_call(name, fits):
    """Of a model of four layers, 0 to 3."""
    gguf = SimpleNamespace(n_embd=6, n_layer=4, name="m", path=Path("m.gguf"), metadata={})
    own = replace(planted(), hook=hooks.parse(name))
    if fits:
        assert "as wide" in own.check(gguf)
    else:
        with pytest.raises(FeatureError, match="4 layers"):
            own.check(gguf)


def activations(values):
    n = len(values)
    coords = {"token": ("token", list("abcdefgh"[:n])), "token_position": ("token", range(n))}
    return xr.DataArray(np.asarray(values, np.float32), dims=("token", "feature"), coords=coords)


def test_the_strongest_features_of_a_text():
    active = activations([[99, 0, 0], [0, 1, 0], [0, 3, 0.5], [0, 0, 0.5]])
    top = planted().top(active, 5)
    assert list(top["feature"]) == [1, 2] and list(top["piece"]) == ["c", "c"]
    assert list(top["active"]) == pytest.approx([2 / 3, 2 / 3]) and top["mean"][0] == 2
    figure = figures.strips(active, top["feature"], title="t")
    assert figure.data[0].z.shape == (2, 3) and "feature 1" in say.strips(active, top)
    with pytest.raises(FeatureError, match="left out"):
        planted().top(active.isel(token=[0]))
    nothing = active * 0
    assert "No feature" in say.strips(nothing, planted().top(nothing))
    figures.strips(nothing, [], title="t")


@pytest.mark.slow
def test_features_of_a_capture_are_those_of_its_states(engine, smollm2, tmp_path):
    from llamatelemetry import GGUFFile

    gguf, rng = GGUFFile(smollm2), np.random.default_rng(0)
    weights = {
        "W_enc": rng.normal(size=(576, 64)), "b_enc": rng.normal(size=64),
        "W_dec": rng.normal(size=(64, 576)), "b_dec": rng.normal(size=576),
    }  # fmt: skip
    save_file(
        {k: v.astype(np.float32) for k, v in weights.items()}, tmp_path / "sae_weights.safetensors"
    )
    about = dict(architecture="standard", apply_b_dec_to_input=False, metadata={})
    (tmp_path / "cfg.json").write_text(json.dumps(about))
    for name, expected in {
        "blocks.3.hook_resid_post": lambda cap: cap.hidden.sel(layer=4).values,
        "blocks.3.attn.hook_z": lambda cap: np.concatenate(
            list(cap.attn_heads.sel(layer=3).values), 1
        ),
        "blocks.3.ln2.hook_normalized": lambda cap: (
            cap.ffn_norm.sel(layer=3).values / gguf.tensor("blk.3.ffn_norm.weight")
        ),
    }.items():
        features = Features.load(tmp_path, hook=name)
        stages = [*features.hook.stages, "ffn_norm"]
        cap = engine.capture("The cat sat on the mat", stages=stages)
        states = hooks.states(cap, gguf, features.hook)
        assert states.dims == ("token", "embd")
        np.testing.assert_allclose(states, expected(cap), atol=2e-3)
        active = features.of(cap, gguf)
        assert list(active["token"].values) == list(cap.tokens["piece"])
        np.testing.assert_allclose(active, features.encode(states.values), atol=1e-4)
    assert "as wide" in features.check(gguf)
    about["metadata"] = {"model_name": "HuggingFaceTB/SmolLM2-135M"}
    (tmp_path / "cfg.json").write_text(json.dumps(about))
    said = Features.load(tmp_path, hook="blocks.3.hook_mlp_out").check(gguf)
    assert "(base)" in said and "is instruct by its names" in said
    with pytest.raises(FeatureError, match="does not hold"):
        Features.load(tmp_path, hook="blocks.3.hook_mlp_out").of(cap, gguf)
    with pytest.raises(FeatureError, match="layers"):
        Features.load(tmp_path, hook="blocks.30.hook_resid_post").of(cap, gguf)
