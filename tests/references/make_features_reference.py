"""Make `features.npz`, what `tests/test_features.py` compares published features with: sae_lens'
own encoders.

    python tests/references/make_features_reference.py

needs sae_lens (made with 6.54.12). Autoencoders of every kind that is read, with seeded random
weights, are saved by sae_lens, and its own `encode` and `forward` run on seeded states. Gemma
Scope's files are written by hand in its layout and read by sae_lens' loaders."""

import json
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from sae_lens import SAE
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.saes.sae import SAEMetadata
from safetensors.numpy import load_file, save_file

N_IN, N_FEATURES, N_OUT, ROWS = 12, 28, 10, 16
CASES = {  # name: architecture and what its configuration adds
    "standard": dict(apply_b_dec_to_input=True),
    "standard_no_centre": dict(apply_b_dec_to_input=False),
    "standard_layer_norm": dict(normalize_activations="layer_norm"),
    "standard_rescale": dict(normalize_activations="constant_norm_rescale"),
    "topk": dict(k=5),
    "topk_rescaled": dict(k=5, rescale_acts_by_decoder_norm=True),
    "jumprelu": {},
    "gated": {},
    "transcoder": dict(d_out=N_OUT, apply_b_dec_to_input=False),
    "skip_transcoder": dict(d_out=N_OUT, apply_b_dec_to_input=False),
    "jumprelu_transcoder": dict(d_out=N_OUT, apply_b_dec_to_input=False),
    "jumprelu_skip_transcoder": dict(d_out=N_OUT, apply_b_dec_to_input=False),
}


def fill(sae, seed):
    """Seeded values for every weight, of sizes that leave some features on and some off."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(sae.named_parameters()):
            weight.copy_(torch.randn(weight.shape, generator=draw) * 0.4)
            if name == "threshold":
                weight.abs_()


def keep(out, case, folder, sae, states):
    """Files, activations and reconstructions of a case."""
    for path in sorted(Path(folder).rglob("*")):
        if path.suffix == ".json":
            out[f"{case}/{path.name}"] = np.array(path.read_text())
        elif path.suffix == ".safetensors":
            out |= {f"{case}/{path.name}/{key}": array for key, array in load_file(path).items()}
        elif path.suffix == ".npz":
            out |= {f"{case}/{path.name}/{key}": array for key, array in np.load(path).items()}
    sae.eval()
    with torch.no_grad():
        active = sae.encode(states)
        active = active.to_dense() if active.is_sparse else active
        out[f"{case}/active"], out[f"{case}/made"] = active.numpy(), sae(states).numpy()
    return out


def gemma(case, folder, states, out):
    """A folder in Gemma Scope's layout, read by sae_lens' loader of it."""
    draw = np.random.default_rng(7)
    weights = {
        "w_enc": draw.normal(size=(N_IN, N_FEATURES)) * 0.4,
        "w_dec": draw.normal(size=(N_FEATURES, N_IN)),
        "b_enc": draw.normal(size=N_FEATURES),
        "b_dec": draw.normal(size=N_IN),
        "threshold": abs(draw.normal(size=N_FEATURES)),
    }
    weights = {name: array.astype(np.float32) for name, array in weights.items()}
    folder.mkdir(parents=True)
    here = lambda repo_id=None, filename=None, subfolder=None, **_: str(
        folder / Path(filename).name
    )  # noqa: E731
    if case == "gemma_scope_2":
        save_file(weights, folder / "params.safetensors")
        config = dict(
            architecture="jump_relu",
            model_name="gemma-v3-270m-it",
            hf_hook_point_in="model.layers.9.output",
            width=N_FEATURES,
        )
        (folder / "config.json").write_text(json.dumps(config))
        shapes = {name: list(array.shape) for name, array in weights.items()}
        with (
            mock.patch.object(
                loaders,
                "hf_hub_download",
                lambda *a, **k: here(filename=a[1] if len(a) > 1 else k["filename"]),
            ),
            mock.patch.object(loaders, "get_safetensors_tensor_shapes", lambda *_: shapes),
        ):
            config, state, _ = loaders.gemma_3_sae_huggingface_loader(
                "google/gemma-scope-2-270m-it", "resid_post/layer_9_width_16k_l0_small"
            )
    else:
        upper = {
            f"W{name[1:]}" if name[0] == "w" else name: array for name, array in weights.items()
        }
        np.savez(folder / "params.npz", **upper)
        loader, about = loaders.gemma_2_sae_huggingface_loader, loaders.get_gemma_2_config_from_hf
        small = lambda *given: about(*given) | {"d_in": N_IN}  # noqa: E731  # it knows only Gemma's
        with (
            mock.patch.object(loaders, "hf_hub_download", here),
            mock.patch.object(loaders, "get_gemma_2_config_from_hf", small),
        ):
            config, state, _ = loader(
                "google/gemma-scope-2b-pt-res", out[f"{case}/folder"].item().split("/", 2)[2]
            )
    config["d_in"], config["d_sae"] = N_IN, N_FEATURES
    sae = SAE.from_dict(loaders.handle_config_defaulting(config))
    sae.load_state_dict(state)
    out[f"{case}/hook"] = np.array(sae.cfg.metadata.hook_name)
    return sae


def main():
    draw = torch.Generator().manual_seed(1)
    states = torch.randn(ROWS, N_IN, generator=draw) * 2 + 0.3
    out = {"states": states.numpy()}
    with tempfile.TemporaryDirectory() as root:
        for seed, (case, more) in enumerate(CASES.items()):
            kind = (
                case
                if case in ("skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
                else case.split("_")[0]
            )
            config = dict(architecture=kind, d_in=N_IN, d_sae=N_FEATURES) | more
            sae = SAE.from_dict(config)
            sae.cfg.metadata = SAEMetadata(
                model_name="a-model-it", hook_name="blocks.3.hook_resid_post"
            )
            fill(sae, seed)
            sae.save_model(Path(root) / case)
            keep(out, case, Path(root) / case, SAE.load_from_disk(Path(root) / case), states)
        places = {
            "gemma_scope": "google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82",
            "gemma_scope_embedding": "google/gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6",
            "gemma_scope_2": "google/gemma-scope-2-270m-it/resid_post/layer_9_width_16k_l0_small",
        }
        for case, place in places.items():
            out[f"{case}/folder"] = np.array(place)
            sae = gemma(case, Path(root) / place, states, out)
            keep(out, case, Path(root) / place, sae, states)
    path = Path(__file__).with_name("features.npz")
    np.savez_compressed(path, **out)
    print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
