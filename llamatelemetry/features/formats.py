"""Published features as they lie on disk: SAELens' folders, and Gemma Scope's of both generations.

A reader gives facts and weights in one form: W_enc (n_in, feature), W_dec (feature, n_out), b_dec
(n_out,), and what the kind adds."""

import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..errors import FeatureError, LlamaTelemetryError, shown
from ..files import hub
from ..files.outputs import path_of

# Of a kind: the weights beside W_enc, W_dec and b_dec.
KINDS = {
    "standard": ("b_enc",),
    "topk": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "b_mag", "r_mag"),
    "transcoder": ("b_enc",),
    "skip_transcoder": ("b_enc", "W_skip"),
    "jumprelu_transcoder": ("b_enc", "threshold"),
    "jumprelu_skip_transcoder": ("b_enc", "threshold", "W_skip"),
}
_UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    EOFError,
    RecursionError,
    NotImplementedError,  # a compression that is not known
    zipfile.BadZipFile,
)
NORMALIZATIONS = ("none", "layer_norm", "constant_norm_rescale")


@dataclass(frozen=True)
class Facts:
    """What the files say of features: kind, a name of KINDS; hook and hook_out: names of the points
    that are read and (a transcoder) predicted; model: what they were trained on; k: active features
    of a topk; centre: whether b_dec is taken off first; normalize: a name of NORMALIZATIONS."""

    kind: str
    hook: str | None = None
    hook_out: str | None = None
    model: str | None = None
    k: int | None = None
    centre: bool = False
    normalize: str = "none"


def read(source: str | Path, progress: bool = True) -> tuple[Facts, dict[str, np.ndarray]]:
    """Facts and weights (float32) of a folder, or of "OWNER/NAME/FOLDER" on the hub."""
    place, paths = locate(source, progress)
    try:
        facts, weights = FORMATS[tuple(path.name for path in paths)](place, *paths)
        _check(place, facts, weights)
    except LlamaTelemetryError:
        raise
    except _UNREADABLE as error:
        raise FeatureError(
            f"{shown(place)} cannot be read as features ({type(error).__name__}: {error!s:.200}). "
            "Fetch it again."
        ) from error
    return facts, weights


def locate(source: str | Path, progress: bool = True) -> tuple[str, list[Path]]:
    """What names features (a folder, or the hub's repository and folder) and their files here."""
    folder = path_of(source, FeatureError)
    if folder.is_dir():
        for names in FORMATS:
            if all((folder / name).is_file() for name in names):
                return folder.resolve().as_posix(), [folder / name for name in names]
        raise FeatureError(f"{shown(source)} holds no features: there is no {_formats()} in it.")
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)/(.+?)/?", str(source))
    if not found:
        raise FeatureError(
            f"{shown(source)!r:.200} is neither a folder that is there nor OWNER/NAME/FOLDER on the hub."
        )
    repo, inside = found.groups()
    try:
        names = _first_there(repo, [[f"{inside}/{name}" for name in names] for names in FORMATS])
        if names is None:
            raise FeatureError(f"{repo} has no features in {inside}: there is no {_formats()}.")
        return f"{repo}/{inside}", hub.fetch(repo, names, progress)
    except (hub.Refused, ValueError) as error:
        if isinstance(error, LlamaTelemetryError):
            raise
        do = getattr(error, "do", "check its name")
        raise FeatureError(
            f"{shown(source)} could not be fetched: {error}. {do[:1].upper()}{do[1:]}."
        ) from None


def _first_there(repo, choices):
    """The first of several lists of files that the cache or the repository has whole, or None."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    for files in choices:
        if all(isinstance(try_to_load_from_cache(repo, file), str) for file in files):
            return files
    hub.reach()
    about = hub.ask(lambda: HfApi().model_info(repo, timeout=hub.SILENCE_S))
    there = {file.rfilename for file in about.siblings or ()}
    return next((files for files in choices if there.issuperset(files)), None)


def _formats():
    return ", ".join(" with ".join(names) for names in FORMATS)


def _sae_lens(place, config_path, weights_path):
    """sae_lens >= 6 keeps the hook's facts under "metadata", earlier ones beside the rest."""
    config = json.loads(config_path.read_text(encoding="utf-8"))
    about = config | (config.get("metadata") or {})
    kind, normalize = config.get("architecture") or "standard", config.get("normalize_activations")
    k = config.get("k") or (config.get("activation_fn_kwargs") or {}).get("k")
    activation = config.get("activation_fn") or config.get("activation_fn_str") or "relu"
    if activation not in ("relu", "topk", "topk-relu") and kind == "standard":
        raise FeatureError(
            f"{shown(place)} uses the activation {activation!r:.50}, which is not read."
        )
    if (k or activation != "relu") and kind == "standard":
        kind = "topk"
    if about.get("hook_head_index") is not None:
        raise FeatureError(
            f"{shown(place)} reads one attention head ({about['hook_head_index']!r:.50}), which no hook here is."
        )
    centre = config.get("apply_b_dec_to_input", "transcoder" not in kind)
    if centre not in (True, False, None):
        raise FeatureError(f"{shown(place)}: apply_b_dec_to_input is {centre!r:.50}.")
    if normalize is True:  # as version 2 wrote it
        normalize = "expected_average_only_in"
    weights = _safetensors(weights_path)
    for name, axis in (("d_in", 0), ("d_sae", 1)):
        said, shape = config.get(name), np.shape(weights.get("W_enc", 0))
        if said is not None and len(shape) == 2 and said != shape[axis]:
            raise FeatureError(f"{shown(place)}: {name} is {said!r:.50}, and W_enc is {shape}.")
    factor = weights.pop("scaling_factor", None)
    if factor is not None and not np.allclose(factor, 1):
        raise FeatureError(
            f"{shown(place)} was fine-tuned with a scaling factor, which is not read."
        )
    if kind == "topk" and config.get("rescale_acts_by_decoder_norm"):
        length = np.linalg.norm(weights["W_dec"], axis=1)
        weights["W_enc"], weights["b_enc"] = weights["W_enc"] * length, weights["b_enc"] * length
        weights["W_dec"] = weights["W_dec"] / length[:, None]
    facts = Facts(
        kind=kind,
        hook=about.get("hf_hook_name") or about.get("hook_name") or about.get("hook_point"),
        hook_out=about.get("hf_hook_name_out") or about.get("hook_name_out"),
        model=about.get("model_name"),
        k=k,
        centre=bool(centre),
        normalize=normalize or "none",
    )
    return facts, weights


def _gemma_scope(place, path):
    """The first generation (Lieberum et al. 2024, Gemma 2): the folder's name says the rest."""
    with np.load(path, allow_pickle=False) as saved:
        weights = {_name(name): saved[name].astype(np.float32) for name in saved.files}
    layer = re.search(r"layer_(\d+)", place)
    size = re.search(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)", place)
    facts = Facts(kind="jumprelu")
    if size:
        model = f"google/gemma-2-{size[1]}{'-it' if size[2] == 'it' else ''}"
        points = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}
        facts = replace(facts, model=model)
        if "embedding" in place:  # trained on the embedding before Gemma scales it
            facts = replace(facts, hook="hook_embed")
            scale = np.float32(np.sqrt(len(weights["W_enc"])))
            weights["W_enc"], weights["W_dec"] = weights["W_enc"] / scale, weights["W_dec"] * scale
        elif layer and size[3] == "transcoders":
            block = f"blocks.{layer[1]}."
            points = dict(hook=block + "ln2.hook_normalized", hook_out=block + "hook_mlp_out")
            facts = replace(facts, kind="jumprelu_transcoder", **points)
        elif layer:
            facts = replace(facts, hook=f"blocks.{layer[1]}.{points[size[3]]}")
    return facts, weights


def _gemma_scope_2(place, config_path, weights_path):
    """The second generation (Gemma 3): config.json names the hook points."""
    config = json.loads(config_path.read_text(encoding="utf-8"))
    if config.get("architecture") != "jump_relu":
        raise FeatureError(f"{shown(place)} is {config.get('architecture')!r:.50}, not jump_relu.")
    weights = {_name(name): array for name, array in _safetensors(weights_path).items()}
    if weights["W_dec"].ndim != 2:
        raise FeatureError(f"{shown(place)} is a cross-layer transcoder, which is not read.")
    skip = weights.pop("affine_skip_connection", None)  # (n_in, n_out)
    if skip is not None:
        weights["W_skip"] = skip.T
    hook_out = config.get("hf_hook_point_out")
    hook_out = hook_out if hook_out != config.get("hf_hook_point_in") else None
    kind = "jumprelu" + ("_skip" if skip is not None else "") + ("_transcoder" if hook_out else "")
    model = str(config.get("model_name") or "").replace("gemma-v3", "gemma-3") or None
    return Facts(kind, config.get("hf_hook_point_in"), hook_out, model), weights


FORMATS: dict[tuple[str, ...], Callable[..., tuple[Facts, dict[str, np.ndarray]]]] = {
    ("cfg.json", "sae_weights.safetensors"): _sae_lens,
    ("params.npz",): _gemma_scope,
    ("config.json", "params.safetensors"): _gemma_scope_2,
}


def _name(name):
    """w_enc, W_enc -> W_enc"""
    return f"W_{name[2:]}" if name.lower().startswith("w_") else name


def _safetensors(path):
    """All arrays as float32; bfloat16, which NumPy has not got, from its bits."""
    from safetensors import SafetensorError, deserialize

    try:
        arrays = dict(deserialize(path.read_bytes()))
    except SafetensorError as error:
        raise ValueError(f"{path.name}: {error}") from error
    types = {"F32": np.float32, "F16": np.float16, "F64": np.float64}
    found = {}
    for name, part in arrays.items():
        if part["dtype"] == "BF16":
            bits = np.frombuffer(part["data"], np.uint16).astype(np.uint32) << 16
            values = bits.view(np.float32)
        else:
            values = np.frombuffer(part["data"], types[part["dtype"]]).astype(np.float32)
        found[name] = values.reshape(part["shape"])
    return found


def _check(place, facts, weights):
    """FeatureError where kind, normalization, names, shapes or values are not those of features."""
    if facts.kind not in KINDS or facts.normalize not in NORMALIZATIONS:
        raise FeatureError(
            f"{shown(place)} is {facts.kind!r:.50} with normalize_activations {facts.normalize!r:.50}; "
            f"read are {', '.join(KINDS)}, with {', '.join(NORMALIZATIONS)}."
            + (
                " Fold the norm's factor into the weights first (sae_lens: fold_activation_norm_scaling_factor)."
                if facts.normalize == "expected_average_only_in"
                else ""
            )
        )
    if deep := [name for name, array in weights.items() if array.ndim > 2]:
        raise FeatureError(
            f"{shown(place)} is a crosscoder or reads several layers ({deep[0]} is {weights[deep[0]].shape}), "
            "which is not read."
        )
    n_in, n_features = np.shape(weights.get("W_enc", 0)) or (0, 0)
    n_out = np.shape(weights.get("W_dec", 0))[-1:] or (0,)
    expected = {"W_enc": (n_in, n_features), "W_dec": (n_features, *n_out), "b_dec": n_out}
    for name in KINDS[facts.kind]:
        expected[name] = (*n_out, n_in) if name == "W_skip" else (n_features,)
    for name, shape in expected.items():
        if 0 in shape or np.shape(weights.get(name, 0)) != shape:
            raise FeatureError(
                f"{shown(place)}: {name} is {np.shape(weights.get(name, 0)) or 'missing'}, "
                f"and features of kind {facts.kind} need {shape}. Fetch it again."
            )
        if not np.isfinite(weights[name]).all():
            raise FeatureError(f"{shown(place)}: {name} holds NaN or infinity. Fetch it again.")
    counted = type(facts.k) is int and 1 <= facts.k <= n_features
    if facts.kind == "topk" and not counted:
        raise FeatureError(f"{shown(place)}: k is {facts.k!r:.50} of {n_features} features.")
    if "transcoder" not in facts.kind and n_out != (n_in,):
        raise FeatureError(f"{shown(place)}: reads {n_in} values and writes {n_out[0]}.")
