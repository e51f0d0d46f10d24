"""What a GGUF file says: architecture facts, tensors with their real precision, token pieces,
dequantized weights.

The header is read by `header`; types and dequantization are the gguf package's or the engine's
(`types`)."""

import difflib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import LlamaFileType
from numpy.typing import NDArray

from ..errors import ModelLoadError, ModelNotFoundError, shown
from ..imports import uninterrupted
from ..metadata import check
from ..reading import Rows
from .header import Header
from .outputs import path_of, some, split_parts
from .types import TensorType, dequantize
from .vocabulary import decode_pieces

if TYPE_CHECKING:
    import pandas as pd


class GGUFFile:
    """One model file, or all parts of a split one, opened by its first part. Nothing is loaded but
    the header.

    path: a GGUF file. Attributes, from the file's metadata (None where the file does not say, 0
    experts where there are none):
        name, architecture, file_type ("Q4_1"; what most tensors have), n_layer, n_head, n_kv_head,
        n_embd, n_ff, n_vocab, head_dim, head_dim_v, rope_dim, n_ctx_train, sliding_window (tokens),
        rope_freq_base, final_logit_softcap, attn_logit_softcap, norm_eps, n_expert, n_expert_used.
        Where layers differ, n_head, n_kv_head and n_ff are the largest; *_per_layer lists have one
        int per layer.
    metadata: dict, key -> int, float, bool, str or list; kinds: of its values, see Header;
    size_bytes: of all parts;
        bits_per_weight: mean over all tensors.

    Raises ModelNotFoundError where there is no file, ModelLoadError where it is not a complete
    GGUF."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = path_of(path, ModelNotFoundError)
        first = Header(self.path)
        self.metadata, self.kinds = first.metadata, first.kinds
        try:
            self._parts = [first, *self._other_parts()]
            self._infos = {
                name: (part, *info) for part in self._parts for name, info in part.tensors.items()
            }
            there = sum(len(part.tensors) for part in self._parts)
            total = self.metadata.get("split.tensors.count", there)
            if total != len(self._infos):
                raise ModelLoadError(
                    f"{self.path}: {len(self._infos)} tensors in its parts, {total} expected. "
                    "Its parts are of different models: fetch them again."
                )
            self._facts()
        except ValueError as error:
            raise ModelLoadError(
                f"{shown(self.path)}: its metadata is damaged ({error}). Fetch the file again."
            ) from error
        self.size_bytes = sum(part.size for part in self._parts)

    def _other_parts(self):
        count = self.metadata.get("split.count", 0)
        if count <= 1:
            return []
        paths = split_parts(self.path)
        if len(paths) != count:
            raise ModelLoadError(
                f"{self.path} is part of a GGUF split in {count}, and needs its name as it was made: "
                f"NAME-00001-of-{count:05d}.gguf. Rename it back."
            )
        number = self.metadata.get("split.no", 0)
        if number != 0:
            raise ModelLoadError(
                f"{self.path} is part {number + 1} of {count}. Open the first: {paths[0].name}"
            )
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise ModelLoadError(
                f"{self.path} is split in {count} parts; missing beside it: {some(missing)}. "
                "Fetch them into the same folder."
            )
        return [Header(path) for path in paths[1:]]

    def _facts(self):
        meta = self.metadata
        self.architecture = meta.get("general.architecture")
        if not isinstance(self.architecture, str):
            raise ModelLoadError(
                f"{self.path} names no architecture (general.architecture): it is not a language "
                "model's GGUF, perhaps an importance matrix or an adapter. Give the model's own file."
            )
        self.name = shown(meta.get("general.name") or self.path.stem)
        self.called = self.path.stem  # tells files of one model apart, which share a name
        file_type, self.file_type = meta.get("general.file_type"), None
        if file_type in list(LlamaFileType):
            self.file_type = re.sub("^(ALL|MOSTLY)_", "", LlamaFileType(file_type).name)

        def get(key, default=None):
            return meta.get(f"{self.architecture}.{key}", default)

        self.n_layer = get("block_count", 0)
        self.n_embd = get("embedding_length", 0)
        self.n_ctx_train = get("context_length", 0)
        self.n_head_per_layer = self._per_layer("attention.head_count", 0)
        self.n_kv_head_per_layer = self._per_layer("attention.head_count_kv", self.n_head_per_layer)
        self.n_ff_per_layer = self._per_layer("feed_forward_length", 0)
        self.n_head = max(self.n_head_per_layer, default=0)
        self.n_kv_head = max(self.n_kv_head_per_layer, default=0)
        self.n_ff = max(self.n_ff_per_layer, default=0)
        width = self.n_embd // self.n_head if self.n_head else 0
        self.head_dim = get("attention.key_length", width)
        self.head_dim_v = get("attention.value_length", width)
        self.rope_dim = get("rope.dimension_count", self.head_dim)
        self.rope_freq_base = get("rope.freq_base")
        self.sliding_window = get("attention.sliding_window") or None
        self.final_logit_softcap = get("final_logit_softcapping") or None
        self.attn_logit_softcap = get("attn_logit_softcapping") or None
        self.norm_eps = get("attention.layer_norm_rms_epsilon", get("attention.layer_norm_epsilon"))
        self.n_expert = get("expert_count", 0)
        self.n_expert_used = max(self._per_layer("expert_used_count", 0), default=0)
        embedding = self._infos.get("token_embd.weight")
        tokens, types = meta.get("tokenizer.ggml.tokens", []), meta.get("tokenizer.ggml.token_type")
        self.n_vocab = len(tokens) or get("vocab_size", sum(embedding[2][:1]) if embedding else 0)
        if types and len(types) != len(tokens):
            raise ValueError(f"{len(tokens)} tokens and {len(types)} tokenizer.ggml.token_type")
        # Without an output matrix llama.cpp uses the token embedding for the logits: tied.
        tied = "output.weight" not in self._infos
        self.output_name = "token_embd.weight" if tied else "output.weight"

    def _per_layer(self, key, default):
        name = f"{self.architecture}.{key}"
        value = self.metadata.get(name, default)
        if not isinstance(value, list):
            return [value] * self.n_layer
        if len(value) != self.n_layer:  # llama.cpp refuses that, too
            raise ValueError(f"{name[:80]} has {len(value)} values for {self.n_layer} layers")
        return value

    def check_place(self, running: bool = False) -> None:
        """ModelLoadError where another file lies under the name of one of its parts by now: before
        a process opens it anew. running: only where a part was written to, which a process that
        maps it has seen: after its answer."""
        for part in self._parts:
            part.source.check_place(running)

    def override(self, metadata: Mapping[str, Any]) -> None:
        """Go on as if the file said this: {key: value}, as llama.cpp's override_kv does."""
        if metadata:
            self.metadata = self.metadata | metadata
            try:
                check(self.metadata)
                self._facts()
            except ValueError as error:
                raise ModelLoadError(f"{shown(self.path)} with override_kv: {error}.") from error

    def has_tensor(self, end: str) -> bool:
        """Whether a tensor's name is this, or ends so behind its layer ("blk.3.")."""
        return any(name.endswith(end) for name in self._infos)

    def __repr__(self) -> str:
        return (
            f"GGUFFile({self.name!r}, {self.architecture}, {self.n_layer} layers, {self.n_head} heads, "
            f"{self.n_embd} wide, {self.n_vocab} tokens, {self.bits_per_weight:.2f} bits per weight)"
        )

    @cached_property
    def tensors(self) -> "pd.DataFrame":
        """DataFrame indexed by tensor name: type, shape (rows first), n_elements, size_bytes,
        bits_per_weight, layer (NA outside the layers), group (embedding, attn_q, attn_k, attn_v,
        attn_qkv, attn_output, ffn_gate, ffn_up, ffn_down, experts, norm, output, other)."""
        with uninterrupted():
            import pandas as pd

        infos = self._infos.items()
        columns = {
            "name": [name for name, _ in infos],
            "type": [kind.name for _, (_, kind, *_) in infos],
            "shape": [shape for _, (_, _, shape, *_) in infos],
            "n_elements": [math.prod(shape) for _, (_, _, shape, *_) in infos],
            "size_bytes": [size for _, (*_, size) in infos],
        }
        table = pd.DataFrame(columns)
        table["bits_per_weight"] = 8 * table["size_bytes"] / table["n_elements"]
        table["layer"] = pd.array([_layer(name) for name in columns["name"]], "Int64")
        table["group"] = [_group(name) for name in columns["name"]]
        return table.set_index("name")

    @cached_property
    def bits_per_weight(self) -> float:
        elements = sum(math.prod(shape) for _, _, shape, _, _ in self._infos.values())
        size = sum(size for *_, size in self._infos.values())
        return 8 * size / elements if elements else 0.0

    @cached_property
    def token_types(self) -> np.ndarray:
        """(n_vocab,) int32: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte."""
        tokens = self.metadata.get("tokenizer.ggml.tokens", ())
        return np.asarray(
            self.metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens), np.int32
        )

    @cached_property
    def pieces(self) -> list[str | bytes]:
        """The text of every token, as llama.cpp writes it: ' the', '\\n'; bytes where a piece is
        not valid UTF-8; special tokens by name ('<|im_end|>'). Empty where the file has no
        tokenizer."""
        return decode_pieces(
            self.metadata.get("tokenizer.ggml.model"),
            self.metadata.get("tokenizer.ggml.tokens", []),
            self.token_types,
        )

    def raw(self, name: str) -> tuple[Rows, TensorType, tuple[int, ...]]:
        """A tensor as it is stored: its Rows of bytes, its TensorType, its shape (rows first)."""
        if name not in self._infos:
            near = difflib.get_close_matches(name, self._infos, 3)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            raise ModelLoadError(
                f"{self.path.name} has no tensor {name!r}{hint}. GGUFFile.tensors lists them."
            )
        part, kind, shape, offset, size = self._infos[name]
        if kind.block is None:
            raise unreadable(name, kind.name)
        n = math.prod(shape[:-1])
        return Rows(part.source, part.data + offset, (n, size // n)), kind, shape

    def rows(
        self, name: str, ids: int | Sequence[int] | NDArray[np.integer] | slice = slice(None)
    ) -> np.ndarray:
        """Rows of a tensor, dequantized; only their bytes are read.

        ids: a row number, a sequence of them or a slice; a tensor of 3 dims is seen as (first *
        second, width). Returns (n, width) float32. Raises ModelLoadError for an unknown tensor,
        IndexError for an unknown row."""
        raw, kind, _ = self.raw(name)
        if isinstance(ids, slice) and ids.step in (None, 1):
            return _dequantize(raw.part(ids.start, ids.stop), kind, name)
        if not isinstance(ids, slice):
            ids = np.atleast_1d(np.asarray(ids, np.int64))
            if ids.size and not (-len(raw) <= ids.min() and ids.max() < len(raw)):
                raise IndexError(
                    f"{name} has rows 0 to {len(raw) - 1}; asked for {ids.min()} to {ids.max()}"
                )
        return _dequantize(raw[ids], kind, name)

    def tensor(self, name: str) -> np.ndarray:
        """The whole tensor, dequantized: float32, shape as in `tensors` (rows first)."""
        raw, kind, shape = self.raw(name)
        return _dequantize(raw, kind, name).reshape(shape)

    def iter_rows(self, name: str, block: int = 4096) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (first row number, (<= block, width) float32), over all rows of a tensor in
        bounded memory."""
        raw, kind, _ = self.raw(name)
        for start in range(0, len(raw), block):
            yield start, _dequantize(raw.part(start, start + block), kind, name)


def _dequantize(raw, kind, name):
    try:
        return dequantize(raw, kind)
    except NotImplementedError:
        raise unreadable(name, kind.name) from None


def unreadable(name: str, kind: str) -> ModelLoadError:
    return ModelLoadError(
        f"{name} is {kind}, which neither the installed gguf package nor the installed engine turns "
        "into floats. Upgrade them (pip install -U gguf, `llamatelemetry engine build`) or use "
        "another quantization."
    )


_NAMED = "attn_q attn_k attn_v attn_qkv attn_output ffn_gate ffn_up ffn_down".split()


def _layer(name):
    found = re.match(r"blk\.(\d{1,4})\.", name)  # a larger number is no layer's
    return int(found[1]) if found else None


def _group(name):
    if name.startswith(("token_embd.", "per_layer_token_embd.", "position_embd.", "token_types.")):
        return "embedding"
    if name.startswith("output."):
        return "output"
    in_layer = name.startswith("blk.") and name.count(".") > 2
    part = name.split(".")[2] if in_layer else name.rsplit(".", 1)[0]
    if "norm" in part:
        return "norm"
    if part.endswith("_exps") or re.match(r"ffn_(gate|up|down)\.\d+", name.split(".", 2)[-1]):
        return "experts"
    part = re.sub("_(a|b|shexp)$", "", part)
    return part if part in _NAMED else "other"
