"""Sparse autoencoders and transcoders that others trained and published, read on the states of a
GGUF model: `Features`."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

from ..backend.base import CpuBackend
from ..capture.finite import measured
from ..errors import FeatureError, shown
from . import formats, hooks

if TYPE_CHECKING:
    from ..capture.data import Capture
    from ..engine import InferenceEngine
    from ..files.gguf import GGUFFile

_VALUES = 1 << 25  # activations per temporary: 128 MiB
_NAMES = ("name", "basename", "finetune")  # keys of a GGUF that say what it was made from
LAYER_NORM_EPS = 1e-5  # SAELens'


@dataclass(frozen=True, eq=False)
class Features:
    """Directions in the states of one hook point, with what says how active each is (Bricken et al.
    2023; Rajamanoharan et al. 2024 on JumpReLU and gates; Gao et al. 2024 on top k; Dunefsky et al.
    2024 on transcoders).

    name: folder or repository. facts: kind, normalization, names as published. hook: where in a
    model it reads (hooks.Hook). n_in, n_features, n_out: values per token read, features, values
    per token written. weights: W_enc (n_in, feature), W_dec (feature, n_out), b_dec, .., float32.
    """

    name: str
    facts: formats.Facts
    hook: hooks.Hook
    weights: dict[str, np.ndarray]

    @classmethod
    def load(
        cls, source: str | Path, *, hook: str | None = None, progress: bool = True
    ) -> "Features":
        """Read features from a folder or from "OWNER/NAME/FOLDER" on the hub, where Gemma Scope and
        what SAELens saved lie. They are downloaded only if they are on the hub.

        hook: where they read, where the files do not say it ("blocks.12.hook_resid_post",
        "model.layers.12.output"). All weights are kept as float32: 8 bytes times n_in times
        n_features. Raises FeatureError for what cannot be read, with the reason."""
        facts, weights = formats.read(source, progress)
        name = hook or facts.hook
        if not name:
            raise FeatureError(
                f"The files of {shown(source)} do not say which states they read: give it as hook=, "
                'for example hook="blocks.12.hook_resid_post".'
            )
        return cls(str(shown(source)), facts, hooks.parse(name), weights)

    @property
    def n_in(self) -> int:
        return len(self.weights["W_enc"])

    @property
    def n_features(self) -> int:
        return len(self.weights["W_dec"])

    @property
    def n_out(self) -> int:
        return self.weights["W_dec"].shape[1]

    def __repr__(self) -> str:
        kind, trained = self.facts.kind.replace("_", " "), self.facts.model or "an unnamed model"
        return f"<{self.n_features} features ({kind}) of {self.hook.name}, trained on {trained}: {self.name}>"

    def check(self, gguf: "GGUFFile") -> str:
        """A sentence on whether this model is the one they were trained on, as far as the files
        tell. Raises FeatureError where width or layers say that it cannot be."""
        width = hooks.width(self.hook, gguf)
        # hidden has one layer more: what enters the first
        beyond = [at >= gguf.n_layer + (stage == "hidden") for stage, at in self.hook.parts]
        if width != self.n_in or any(beyond):
            raise FeatureError(
                f"{self.name} reads {self.n_in} values at {self.hook.name}, and {gguf.name} has {width} "
                f"there and {gguf.n_layer} layers: take features that were trained on this model "
                f"(these: {self.facts.model or 'not said'})."
            )
        trained, names = self.facts.model, [gguf.metadata.get(f"general.{key}") for key in _NAMES]
        if not trained:
            return f"The files do not say what model the features were trained on; {shown(gguf.path.name)} is as wide."
        own = variant(" ".join(map(str, [gguf.path.stem, *names])))
        said = f"The features were trained on {trained} ({variant(trained)}) at {self.hook.name}"
        if own == variant(trained):
            return f"{said}; {shown(gguf.path.name)} is {own}, too, by its names."
        return (
            f"{said}; {shown(gguf.path.name)} is {own} by its names: a feature can stand for something else here, and "
            "the share of variance that they explain says how well they still fit."
        )

    def of(self, captured: "Capture", gguf: "GGUFFile", backend: Any = None) -> xr.DataArray:
        """Activations on a capture that holds `hook.stages`: (token, feature) float32, with the
        capture's token coordinates. Raises FeatureError where model or capture do not fit."""
        return self.encode(self.states(captured, gguf), backend)

    def states(self, captured: "Capture", gguf: "GGUFFile") -> xr.DataArray:
        """What they read of a capture: (token, embd) float32. Raises FeatureError as `of` does."""
        self.check(gguf)
        return hooks.states(captured, gguf, self.hook)

    def read(self, engine: "InferenceEngine", text: str, tokens: int = 512) -> np.ndarray:
        """The states that they read of a text's first tokens, without the first one: (<= tokens,
        n_in) float32. Raises FeatureError where the loaded model is none of theirs."""
        if engine.model is None:
            raise FeatureError("No model is loaded: call load_model first.")
        self.check(engine.model)
        ids = engine.tokenize(text)["id"].tolist()[: tokens + 1]
        captured = engine.capture(ids, stages=self.hook.stages)
        return self.states(captured, engine.model).values[1:]

    def encode(self, states: Any, backend: Any = None) -> Any:
        """Activations of states at the hook: (row, n_in) -> (row, feature) float32, as sae_lens
        gives them; a DataArray (.., embd) gives a DataArray (.., feature).

        backend: get_backend's, to compute on its device."""
        if not isinstance(states, xr.DataArray):
            return np.concatenate([block for _, [block] in self.encoded([states], backend)])
        other = [dim for dim in states.dims if dim != "embd"]
        ordered = states.transpose(*other, "embd")
        rows = self.encode(ordered.values.reshape(-1, ordered.sizes["embd"]), backend)
        sizes = [ordered.sizes[dim] for dim in other]
        out = xr.DataArray(rows.reshape(*sizes, -1), dims=[*other, "feature"], name="activation")
        kept = {name: c for name, c in ordered.coords.items() if "embd" not in c.dims}
        return out.assign_coords(kept).assign_attrs(states.attrs | {"features": self.name})

    def encoded(
        self, states: Sequence[np.ndarray], backend: Any = None
    ) -> Iterator[tuple[int, list[np.ndarray]]]:
        """`encode` by blocks of rows, for many rows, of several runs side by side. states: one or
        more of (row, n_in); yields (first row, [(<= size, feature) float32 of each])."""
        runs = [self._rows(run) for run in states]
        backend = backend or CpuBackend("asked for")
        weights = {name: backend.xp.asarray(array) for name, array in self.weights.items()}
        active, size = _ACTIVE[_shape(self.facts.kind)], max(1, _VALUES // self.n_features)
        for start in range(0, len(runs[0]), size):
            blocks = (run[start : start + size] for run in runs)
            read = (self._input(backend.xp, weights, block)[0] for block in blocks)
            yield (
                start,
                [backend.to_numpy(active(self, backend.xp, weights, rows)) for rows in read],
            )

    def _rows(self, states):
        states = measured(states, np.float32)
        if states.ndim != 2 or states.shape[1] != self.n_in or not len(states):
            raise FeatureError(
                f"{self.name} reads rows of {self.n_in} values, not {states.shape}: give the states at "
                f"{self.hook.name}, (row, {self.n_in})."
            )
        return states

    def reconstruct(self, states: np.ndarray) -> np.ndarray:
        """What decoder and activations give back for states at the hook: (row, n_in) -> (row,
        n_out) float32. A transcoder predicts the FFN's output from its input."""
        states = self._rows(states)
        blocks = self.encoded([states])
        return np.concatenate([self._decoded(states, start, active) for start, [active] in blocks])

    def _decoded(self, states, start, active):
        block = states[start : start + len(active)]
        _, back = self._input(np, self.weights, block)
        made = active @ self.weights["W_dec"] + self.weights["b_dec"]
        if "W_skip" in self.weights:
            made += block @ self.weights["W_skip"].T
        return made if self.n_out != self.n_in else back(made)

    def fit(self, states: np.ndarray) -> dict[str, float]:
        """How well they describe states (row, n_in). active: features active per row; explained:
        the share of the states' variance about their mean that the reconstruction has (1 - FVU; NaN
        for a transcoder, which predicts another point, and for states that do not vary)."""
        states, active, missed = self._rows(states), 0, 0.0
        for start, [block] in self.encoded([states]):
            active += np.count_nonzero(block)
            if not self.facts.hook_out:
                gap = states[start : start + len(block)] - self._decoded(states, start, block)
                missed += float((gap**2).sum(dtype=np.float64))
        mean = states.mean(0, dtype=np.float64)  # of equal states exactly what they are
        spread = float(((states - mean) ** 2).sum())
        none = self.facts.hook_out or not spread
        explained = float("nan") if none else 1 - missed / spread
        return {"active": active / len(states), "explained": explained}

    def direction(self, feature: int) -> np.ndarray:
        """What one unit of a feature's activation writes: (n_out,) float32, for `add("hidden", ..)`
        where the hook is the residual stream."""
        if not isinstance(feature, (int, np.integer)) or not 0 <= feature < self.n_features:
            raise FeatureError(f"feature is 0 to {self.n_features - 1}, not {feature!r:.50}.")
        return self.weights["W_dec"][feature].copy()

    def top(self, activations: xr.DataArray, n: int = 10, skip: int = 1) -> pd.DataFrame:
        """The features that are most active on a text. activations: `of`'s, (token, feature).

        skip: so many first tokens are left out, whose states are unlike all others (attention
        sinks). Returns n rows by their largest activation: feature, largest, position and piece of
        it, active (share of the tokens), mean (over those)."""
        later = activations.isel(token=slice(skip, None))
        if not later.sizes["token"]:
            raise FeatureError(
                f"The text has {activations.sizes['token']} tokens, and {skip} are left out."
            )
        values = later.values
        largest, on = values.max(0), (values > 0).sum(0)
        best = np.argsort(-largest, kind="stable")[:n]
        best = best[largest[best] > 0]
        where = values[:, best].argmax(0)
        pieces, positions = later["token"].values, np.arange(len(values)) + skip
        return pd.DataFrame(
            {
                "feature": best,
                "largest": largest[best],
                "position": positions[where],
                "piece": pieces[where],
                "active": on[best] / len(values),
                "mean": values[:, best].sum(0, dtype=np.float64) / on[best],
            }
        )

    def _input(self, xp, weights, rows):
        """Rows as the encoder reads them, and what undoes the normalization of what it writes."""
        rows, back = xp.asarray(rows), _as_it_is
        if self.facts.normalize == "constant_norm_rescale":
            factor = self.n_in**0.5 / xp.linalg.norm(rows, axis=1, keepdims=True)
            rows, back = rows * factor, lambda made: made / factor
        elif self.facts.normalize == "layer_norm":
            mean = rows.mean(1, keepdims=True)
            spread = (rows - mean).std(1, ddof=1, keepdims=True)
            rows, back = (
                (rows - mean) / (spread + LAYER_NORM_EPS),
                lambda made: made * spread + mean,
            )
        return (rows - weights["b_dec"] if self.facts.centre else rows), back


def variant(name: str) -> str:
    """What a model's name says it is: "instruct" or "base"."""
    tuned = re.search(r"(?i)(?<![a-z])(it|instruct|chat|dpo|sft|rlhf|assistant)(?![a-z])", name)
    return "instruct" if tuned else "base"


def _as_it_is(made):
    return made


def _shape(kind):
    """The kind of encoder, whatever is decoded from it."""
    return kind.removesuffix("transcoder").removesuffix("_").removesuffix("skip").removesuffix("_")


def _relu(features, xp, weights, rows):
    return xp.maximum(rows @ weights["W_enc"] + weights["b_enc"], 0)


def _jump(features, xp, weights, rows):
    before = rows @ weights["W_enc"] + weights["b_enc"]
    return xp.maximum(before, 0) * (before > weights["threshold"])


def _gated(features, xp, weights, rows):
    shared = rows @ weights["W_enc"]
    size = xp.maximum(shared * xp.exp(weights["r_mag"]) + weights["b_mag"], 0)
    return size * (shared + weights["b_gate"] > 0)


def _topk(features, xp, weights, rows):
    before = rows @ weights["W_enc"] + weights["b_enc"]
    k = features.facts.k
    kept = xp.argpartition(before, -k, axis=1)[:, -k:]
    out, at = xp.zeros_like(before), (xp.arange(len(before))[:, None], kept)
    out[at] = xp.maximum(before[at], 0)
    return out


_ACTIVE = {"": _relu, "standard": _relu, "jumprelu": _jump, "gated": _gated, "topk": _topk}
