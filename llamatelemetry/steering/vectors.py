"""Control vectors: directions of the residual stream, found from contrastive texts, in llama.cpp's
own file format.

`layer` is that of the stage `hidden`: layer l + 1 is what leaves layer l. llama.cpp and repeng call
the same place l ("direction.l"), and llama.cpp adds nothing to what leaves layer 0: a file holds
the layers from 2 on."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import xarray as xr

from ..arguments import whole
from ..capture.edits import Edit, Maybe, Some, add
from ..capture.variants import control_vector
from ..errors import CaptureError
from ..files.header import Header
from ..files.outputs import path_of, written
from ..maths import ratio

if TYPE_CHECKING:
    from ..capturing import Prompt
    from ..engine import InferenceEngine
    from ..files.gguf import GGUFFile

Position: TypeAlias = int | Literal["mean", "all"]
FIRST = 2  # the first layer of `hidden` that llama.cpp's control vectors reach
ARCHITECTURE = "controlvector"


@dataclass(frozen=True, eq=False)
class ControlVector:
    """A direction of the stream per layer.

    vectors: (layer, embd) float32 in the stream's own units, so that strength 1 adds what the texts
    differed by. hint: what the model's kind is called (llama.cpp's architecture, or what another
    program wrote). explained: (layer), the share of the pairs' squared differences that lies along
    the direction; None for a vector from a file. about: method, position, pairs, model."""

    vectors: xr.DataArray
    hint: str = ""
    explained: xr.DataArray | None = None
    about: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.vectors.dims != ("layer", "embd") or not self.vectors.size:
            raise CaptureError(f"vectors are (layer, embd), not {dict(self.vectors.sizes)}.")
        if not np.isfinite(self.vectors.values).all():
            raise CaptureError("a control vector holds a value that is no finite number.")

    @property
    def layers(self) -> list[int]:
        """The layers of `hidden` that it has a direction for."""
        return self.vectors.layer.values.tolist()

    @property
    def norms(self) -> xr.DataArray:
        """(layer): Euclidean lengths."""
        return _length(self.vectors)

    def unit(self) -> "ControlVector":
        """The same directions at length 1, as llama-cvector-generator and repeng give them."""
        return self._with(self.vectors / self.norms.where(self.norms > 0, 1), self.explained)

    def at(self, layers: Some) -> "ControlVector":
        """Only these layers. CaptureError for one that it has not."""
        if isinstance(layers, slice):
            layers = [layer for layer in self.layers if layer in range(2**31)[layers]]
        chosen = np.atleast_1d(layers).tolist()
        if missing := [one for one in chosen if one not in self.layers] or not chosen and [layers]:
            raise CaptureError(
                f"this control vector has no direction for layer {missing[0]} of hidden: it has "
                f"{_listed(self.layers)}."
            )
        explained = self.explained
        if explained is not None:
            explained = explained.sel(layer=chosen)
        return self._with(self.vectors.sel(layer=chosen), explained)

    def random(self, seed: int = 0) -> "ControlVector":
        """Random directions of the same lengths, from a seeded normal distribution: what a
        direction must do more than."""
        seed = whole("seed", seed, 0, error=CaptureError)
        drawn = np.random.default_rng(seed).standard_normal(self.vectors.shape)
        drawn *= (self.norms / np.linalg.norm(drawn, axis=1)).values[:, None]
        about = self.about | {"method": f"random, seed {seed}"}
        vectors = self.vectors.copy(data=drawn.astype(np.float32))
        return ControlVector(vectors, self.hint, None, about)

    def cosine(self, other: "ControlVector") -> xr.DataArray:
        """(layer): cosine with another vector's directions, of the layers that both have."""
        if not isinstance(other, ControlVector):
            raise CaptureError(f"a cosine is with another ControlVector, not {other!r:.80}.")
        self._check_width(other.vectors.sizes["embd"], "the other control vector")
        mine, others = xr.align(self.vectors, other.vectors, join="inner")
        products = (mine.astype(float) * others.astype(float)).sum("embd")
        lengths = _length(mine).values * _length(others).values
        return products.copy(data=ratio(products.values, lengths)).rename("cosine")

    def edits(
        self, strength: float = 1.0, layers: Maybe = None, positions: Maybe = None
    ) -> list[Edit]:
        """What engine.capture, score, sweep and predict take as edits: strength times each
        direction, added to `hidden` (Turner et al. 2023; Rimsky et al. 2024). layers: None for
        all; positions: None for all, those that are generated included."""
        chosen = self if layers is None else self.at(layers)
        rows = zip(chosen.layers, chosen.vectors.values)
        return [add("hidden", layer, row, strength, positions) for layer, row in rows]

    def check_fits(self, model: "GGUFFile") -> None:
        """CaptureError where it is as wide as another model, or has layers that this one has
        not."""
        self._check_width(model.n_embd, model.path.name)
        if self.layers[-1] > model.n_layer:
            raise CaptureError(
                f"the control vector has a direction for what leaves layer {self.layers[-1] - 1}, and "
                f"{model.path.name} has layers 0 to {model.n_layer - 1}: it was made for another model."
            )

    def _check_width(self, width, what):
        if self.vectors.sizes["embd"] != width:
            raise CaptureError(
                f"the control vector is {self.vectors.sizes['embd']} wide and {what} {width}: they are "
                "of different models."
            )

    def _with(self, vectors, explained):
        return ControlVector(vectors.astype(np.float32), self.hint, explained, self.about)

    def save(self, path: str | os.PathLike) -> Path:
        """Write llama.cpp's format, one tensor direction.l per layer; returns the path.

        llama-server takes it (load_model(..., control_vectors=[(path, 0.8)])), llama.cpp's own
        programs (--control-vector-scaled path:0.8) and repeng's import_gguf. CaptureError for
        directions of the layers 0 and 1 of hidden, to which llama.cpp adds none: `at(slice(2,
        None))` leaves them out."""
        import gguf

        if self.layers[0] < FIRST:
            raise CaptureError(
                f"llama.cpp adds no direction to layer {self.layers[0]} of hidden (what enters the model "
                f"or leaves its layer 0): save at(slice({FIRST}, None))."
            )
        path = path_of(path, CaptureError)
        need = self.vectors.nbytes
        with written(path, need=need, model=True, error=CaptureError) as temporary:
            writer = gguf.GGUFWriter(str(temporary), ARCHITECTURE)
            writer.add_string(f"{ARCHITECTURE}.model_hint", self.hint)
            writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(self.layers))
            for key, value in self.about.items():
                writer.add_string(f"{ARCHITECTURE}.{key}", str(value))
            for layer, row in zip(self.layers, self.vectors.values):
                writer.add_tensor(f"direction.{layer - 1}", np.ascontiguousarray(row, np.float32))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> "ControlVector":
        """Read llama.cpp's format: what `save`, llama-cvector-generator or repeng wrote. Raises
        ModelLoadError for another file. A direction of zeros is none."""
        path = path_of(path, CaptureError)
        if not path.is_file():
            raise CaptureError(f"{path} is not a file.")
        rows, prefix = control_vector([[str(path), 1.0]]), f"{ARCHITECTURE}."
        there = np.flatnonzero(rows.any(axis=1))
        if not there.size:
            raise CaptureError(f"every direction in {path} is zero: it changes nothing.")
        said = {
            key.removeprefix(prefix): value
            for key, value in Header(path).metadata.items()
            if key.startswith(prefix)
        }
        hint = str(said.pop("model_hint", ""))
        said.pop("layer_count", None)
        return cls(_labelled(rows[there], there + FIRST), hint, None, said)


def direction(
    engine: "InferenceEngine",
    pairs: "Sequence[tuple[Prompt, Prompt]]",
    layers: Maybe = None,
    method: Literal["mean", "pca"] = "mean",
    position: Position = -1,
) -> ControlVector:
    """The direction of the stream in which the first texts of pairs differ from the second ones.

    pairs: [(with, without), ...], texts or token ids. layers: of `hidden`; None for all that
    llama.cpp can steer, 2 to n_layer. position: which of a text's tokens is compared: -1 the last,
    another number from the start or the end, "mean" over the text, "all" each with that of the same
    position (pairs of equal length), as llama-cvector-generator has it.

    method: "mean", the mean difference (Rimsky et al. 2024), whose length is that of the mean; or
    "pca", the first principal component of the differences, not centred (Zou et al. 2023; the same
    as repeng's pca_center), towards the first texts, as long as the differences along it are in the
    root mean square. Raises CaptureError for pairs or layers that cannot be compared."""
    if method not in ("mean", "pca"):
        raise CaptureError(f'method is "mean" or "pca", not {method!r}.')
    pairs = _checked(pairs)
    if (gguf := engine.model) is None:
        raise CaptureError("no model is loaded: call load_model first.")
    n_layer = gguf.n_layer
    there = list(range(min(FIRST, n_layer), n_layer + 1))
    if isinstance(layers, slice):
        layers = [layer for layer in range(n_layer + 1) if layer in range(2**31)[layers]]
    chosen = there if layers is None else sorted(set(np.atleast_1d(layers).tolist()))
    differences = np.concatenate(
        [_difference(engine, number, pair, chosen, position) for number, pair in enumerate(pairs)],
        1,
    )  # (layer, pair, embd)
    squares = np.square(differences).sum((1, 2))
    if method == "mean":
        vectors = differences.mean(1)
    else:
        _, singular, axes = np.linalg.svd(differences, full_matrices=False)
        rms = singular[:, 0] / np.sqrt(differences.shape[1])
        sign = np.where(np.einsum("lpe,le->l", differences, axes[:, 0]) < 0, -1, 1)
        vectors = axes[:, 0] * (rms * sign)[:, None]
    along = np.square(np.einsum("lpe,le->lp", differences, vectors)).sum(1)
    length = np.square(vectors).sum(1)
    if not length.any():
        raise CaptureError("the texts of the pairs do not differ there: no direction.")
    explained = xr.DataArray(ratio(along, length * squares), dims="layer", coords={"layer": chosen})
    about = {"method": method, "position": position, "pairs": len(pairs), "model": gguf.path.name}
    vectors = _labelled(vectors.astype(np.float32), chosen)
    return ControlVector(vectors, gguf.architecture, explained.rename("explained"), about)


def _difference(engine, number, pair, layers, position):
    """(layer, 1 or token, embd) float64: one pair's difference."""
    first, second = (
        engine.capture(text, stages="hidden", layers=layers).hidden.values.astype(np.float64)
        for text in pair
    )
    if position == "all":
        if first.shape != second.shape:
            raise CaptureError(
                f'position="all" compares token with token, and the texts of pair {number} have '
                f"{first.shape[1]} and {second.shape[1]} tokens: make them equally long."
            )
        difference = first - second
        return difference[:, np.abs(difference).max((0, 2)) > 1e-6]  # what both begin with
    return (_at(first, position, number) - _at(second, position, number))[:, None]


def _at(states, position, number):
    if position == "mean":
        return states.mean(1)
    if isinstance(position, bool) or not isinstance(position, (int, np.integer)):
        raise CaptureError(f'position is a whole number, "mean" or "all", not {position!r}.')
    if not -states.shape[1] <= position < states.shape[1]:
        raise CaptureError(
            f"position={position}: a text of pair {number} has {states.shape[1]} tokens."
        )
    return states[:, position]


def _checked(pairs):
    if isinstance(pairs, str) or not isinstance(pairs, Sequence) or not pairs:
        raise CaptureError("pairs are [(text with, text without), ...], at least one.")
    for number, pair in enumerate(pairs):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise CaptureError(f"pair {number} is two texts, not {pair!r:.80}.")
    if all(first == second for first, second in pairs):
        raise CaptureError("the texts of every pair are the same: they have no direction.")
    if len(pairs) < 3:
        warnings.warn(
            f"A direction from {len(pairs)} pair(s) is mostly what else these texts differ in: give more.",
            stacklevel=3,
        )
    return pairs


def _labelled(rows, layers):
    return xr.DataArray(rows, dims=("layer", "embd"), coords={"layer": list(map(int, layers))})


def _length(vectors):
    return np.sqrt(np.square(vectors.astype(float)).sum("embd")).rename("norm")


def _listed(layers):
    return f"{layers[0]} to {layers[-1]}" if len(layers) == layers[-1] - layers[0] + 1 else layers
