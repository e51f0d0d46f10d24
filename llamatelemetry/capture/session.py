"""The parent's end of the capture worker: what it is asked, and its files as arrays."""

import os
import shutil
import weakref

import numpy as np
import pandas as pd

from .. import logs
from ..arguments import finite, one_sequence, prompt, say_two_starts, whole, writable
from ..child import Child
from ..errors import CaptureError, ModelLoadError, WorkerCrashedError
from ..files.gguf import GGUFFile
from ..files.outputs import split_parts
from ..files.vocabulary import named
from ..gpus.cores import physical_cores
from ..gpus.devices import list_gpus
from ..imports import uninterrupted
from ..liveness import patience
from ..server.loading import described, least_context
from .data import Capture, token_table
from .edits import pack
from .names import STAGES

# Arenas kept between captures, each at most 1/8 of what its folder has free.
KEPT_ARENAS, KEPT_SHARE = 2, 8
# CUDA kernels are fused where nobody stops between them, and a fused kernel rounds differently in
# the last bits: without fusion what is computed does not depend on what is looked at.
UNFUSED = {"GGML_CUDA_DISABLE_FUSION": "1"}


class CaptureSession:
    """A model loaded in a worker process of its own.

    n_ctx: most tokens a text may have (default: what the model was trained with); memory is taken
    as needed. longest: fewer, where the model stops before. variant: other metadata, rotary
    settings, adapters and control vectors, as llamatelemetry.options makes them of load_model's
    options. gpu_layers: layers on the GPU, -1 for all. threads: default the physical cores. env:
    environment of the worker (CUDA_VISIBLE_DEVICES). cache_type: "f16" as llama-server has it,
    "f32", or None: f32 only for a file that is F32; "q8_0", ...: keys so, values in 16 bits."""

    WORKER = "llamatelemetry.capture.worker"

    def __init__(
        self,
        model_path,
        *,
        n_ctx=None,
        gpu_layers=None,
        threads=None,
        env=None,
        cache_type=None,
        n_ubatch=512,
        tensor_split=None,
        longest=None,
        variant=None,
    ):
        self.model = model_path if isinstance(model_path, GGUFFile) else GGUFFile(model_path)
        if cache_type is None:
            matrices = self.model.tensors[self.model.tensors["shape"].map(len) > 1]
            cache_type = "f32" if (matrices["type"] == "F32").all() else "f16"
        self.cache_type, self._variant = cache_type, described(variant or {})
        self._count, self._free = 0, []
        context, gpu = n_ctx or self.model.n_ctx_train, gpu_layers != 0 and bool(list_gpus())
        self.model.check_place()
        self.child = Child(
            self.WORKER,
            "the capture worker",
            UNFUSED | logs.ENVIRONMENT | os.environ | (env or {}),
            then="The next capture starts a new one.",
            limit=patience(split_parts(self.model.path), n_ubatch, context, gpu),
        )
        self.pid = self.child.pid
        try:
            self.facts = self._call(
                "load",
                path=str(self.model.path),
                architecture=self.model.architecture,
                n_ctx=n_ctx,
                n_ubatch=n_ubatch,
                threads=threads or physical_cores(),
                gpu_layers=-1 if gpu_layers is None else gpu_layers,
                cache_type=cache_type,
                tensor_split=tensor_split,
                longest=longest,
                at_least=least_context(self.model, n_ctx or self.model.n_ctx_train),
                variant=variant,
            )
        except BaseException as error:
            log = self.child.log()
            self.close()
            if isinstance(error, WorkerCrashedError):  # it has the log in it
                raise ModelLoadError(str(error)) from None
            if isinstance(error, ModelLoadError):
                why, end = logs.reason(log), logs.last_words(log)
                says = f"{error}{why and f' It says: {why}'}\nEnd of llama.cpp's log:\n{end}"
                raise ModelLoadError(says) from None
            raise

    def tokenize(self, text, add_special=True):
        """Token ids of a text, as llama.cpp makes them (special tokens written in the text are
        parsed)."""
        ids = self._call("tokenize", text=writable(text), add_special=add_special)["tokens"]
        self._say_two_starts(text, ids)
        return ids

    def stages(self):
        """As InferenceEngine.stages."""
        rows = [
            {
                "stage": name,
                "dims": STAGES[name].all_dims,
                "there": bool(found["layers"]),
                "layers": tuple(layer for layer in found["layers"] if layer is not None),
                "why": found["why"],
            }
            for name, found in self._call("stages").items()
        ]
        return pd.DataFrame(rows).set_index("stage")

    def capture(
        self,
        text_or_ids,
        stages=("attention", "hidden"),
        layers=None,
        queries=None,
        edits=(),
        generate=0,
        temperature=0.0,
        seed=0,
        positions=None,
    ):
        """As InferenceEngine.capture."""
        stages = named_stages(stages)
        request = {
            "prompt": prompt(text_or_ids),
            "stages": stages,
            "layers": chosen("layers", layers),
            "positions": by_stage(stages, chosen("queries", queries), positions),
            "generate": whole("generate", generate, 0, error=CaptureError),
            "temperature": finite("temperature", temperature, 0, error=CaptureError),
            "seed": whole("seed", seed, 0, error=CaptureError),
        }
        answer, memory = self.into_arena("capture", edits=self._pack(edits), **request)
        self._say_two_starts(text_or_ids, answer["tokens"])
        return self._captured(answer, memory, request["positions"])

    def into_arena(self, command, hear=None, **request):
        """The worker's answer to a command that fills an arena, and the arena's memory."""
        arena = self._free.pop() if self._free else self._file("arena")
        try:
            answer = self._call(command, hear, path=str(arena), **request)
            memory = np.memmap(arena, np.uint8, "c")  # the user's own copy where it is written to
        except BaseException:
            arena.unlink(missing_ok=True)
            raise
        weakref.finalize(memory, self._release, self._free, arena)
        return answer, memory

    def _captured(self, answer, memory, positions):
        """The Capture in an arena's memory, without the positions kept free for tokens that were
        not generated because the text ended."""
        ids, n, parts = answer["tokens"], len(answer["tokens"]), {}
        positions = {name: [one for one in some if one < n] for name, some in positions.items()}
        for name, part in answer["layout"].items():
            stage, chosen = STAGES[name], positions.get(name)
            count = n if chosen is None else len(chosen)
            sizes = dict.fromkeys(("token", "query", "key"), n) | {stage.place: count}
            array = np.ndarray(part["shape"], part["dtype"], memory, part["offset"])
            array = array[tuple(slice(sizes.get(dim)) for dim in stage.all_dims)]
            parts[name] = (array, part["layers"] if stage.per_layer else None, chosen)
        generated = [position >= answer["n_prompt"] for position in range(n)]
        tokens = (ids, self._pieces(ids), generated)
        return Capture(parts, tokens, self.model_facts(), answer["layers"])

    def score(self, text_or_ids, edits=()):
        """As InferenceEngine.score."""
        answer = self._ask("score", text_or_ids, edits=self._pack(edits))
        ids, table = answer["tokens"], pd.DataFrame(answer["table"]).drop(columns="kl")
        tokens = token_table(ids, self._pieces(ids), False).iloc[1:].drop(columns="generated")
        return pd.concat([tokens.reset_index(drop=True), table], axis=1)

    def sweep(self, text_or_ids, variants, progress=True):
        """As InferenceEngine.sweep."""
        answer = self._try("sweep", text_or_ids, variants, progress)
        names = pd.Index(list(variants), name="name", tupleize_cols=False)
        table = pd.DataFrame(list(answer["rows"].values()), index=names)
        table.attrs["base_loss"] = answer["base"]["loss"]
        return table

    def predict(self, text_or_ids, variants, tokens=(), progress=True):
        """As InferenceEngine.predict."""
        with uninterrupted():
            import xarray as xr

        ids = one_sequence(tokens, CaptureError)
        if variants == {}:
            raise CaptureError("predict takes at least one variant: {name: edits}.")
        rows = pd.DataFrame(self._try("predict", text_or_ids, variants, progress, ids=ids)["rows"])
        wide = {
            name: (("variant", "token"), np.stack(rows.pop(name))) for name in ("logprob", "before")
        }
        data = wide | {name: ("variant", values) for name, values in rows.items()}
        names = np.empty(len(variants), object)
        names[:] = list(variants)
        coords = {"variant": names, "token": ids, "piece": ("token", self._pieces(ids))}
        return xr.Dataset(data, coords)

    def _try(self, command, text_or_ids, variants, progress, **arguments):
        """The worker's answer to a command on {name: edits}, with a bar that runs meanwhile."""
        if not isinstance(variants, dict):
            raise CaptureError(f"variants are {{name: edits}}, not {type(variants).__name__}.")
        from tqdm.auto import tqdm

        packed = {str(number): self._pack(edits) for number, edits in enumerate(variants.values())}
        with tqdm(total=len(variants), desc="interventions", disable=not progress) as bar:
            hear = lambda done: bar.update(done - bar.n)  # noqa: E731
            return self._ask(command, text_or_ids, hear, variants=packed, **arguments)

    def head_statistics(self, text_or_ids, layers=None, patterns=None):
        """As InferenceEngine.head_statistics."""
        with uninterrupted():
            import xarray as xr

        pairs = {name: np.asarray(value).tolist() for name, value in (patterns or {}).items()}
        layers = chosen("layers", layers)
        answer = self._ask("head_statistics", text_or_ids, layers=layers, patterns=pairs)
        data = {name: (("layer", "head"), np.asarray(v)) for name, v in answer["table"].items()}
        return xr.Dataset(data, {"layer": answer["layers"]}, {"n_tokens": len(answer["tokens"])})

    def time_decode(self, text_or_ids, repeat=3, all_logits=True):
        """Seconds of each of `repeat` plain decodes: the yardstick of the benchmarks."""
        times = {"repeat": repeat, "all_logits": all_logits}
        return self._ask("time_decode", text_or_ids, **times)["seconds"]

    def model_facts(self):
        names = "name architecture n_layer n_head n_kv_head n_embd n_vocab".split()
        facts = {name: getattr(self.model, name) for name in names}
        file = self.model.path.name + self._variant
        return facts | {"file": file, "gpu": self.facts["gpu"]}

    @property
    def alive(self):
        """Whether the worker runs."""
        return self.child.alive

    def end(self):
        """End the worker at once, also from another thread than the one that it works for, whose
        call raises WorkerCrashedError."""
        self.child.kill("close() was called during this call")

    def close(self):
        """End the worker and remove its files. Safe to call twice."""
        self.child.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _pieces(self, ids):
        return named(self.model.pieces, ids)

    def _say_two_starts(self, text_or_ids, ids):
        if isinstance(text_or_ids, str):
            say_two_starts(ids, self.facts["bos"], self._pieces(ids[:1])[0] if ids else "")

    @staticmethod
    def _release(free, arena):
        """Once no array looks at an arena any more, the next capture writes into it: its pages are
        there already."""
        if len(free) < KEPT_ARENAS and arena.exists():
            room = shutil.disk_usage(arena.parent).free
            if arena.stat().st_size * KEPT_SHARE <= room:
                free.append(arena)
                return
        arena.unlink(missing_ok=True)

    def _file(self, kind, suffix=""):
        self._count += 1
        path = self.child.folder / f"{kind}-{self._count}{suffix}"
        path.touch()
        return path

    def _pack(self, edits):
        return pack(edits, lambda: self._file("patch", ".npy"))

    def _ask(self, command, text_or_ids, hear=None, **arguments):
        """The worker's answer to a command on a text; "tokens" are its ids."""
        answer = self._call(command, hear, prompt=prompt(text_or_ids), **arguments)
        self._say_two_starts(text_or_ids, answer["tokens"])
        return answer

    def _call(self, command, hear=None, **arguments):
        try:
            answer = self.child.call(command, hear, **arguments)
        finally:
            for path in self.child.folder.glob("patch-*"):
                path.unlink()
        self.model.check_place(running=True)
        return answer


def named_stages(stages):
    """The stages of a request, each once; CaptureError where one is unknown, or there is none."""
    stages = [stages] if isinstance(stages, str) or not hasattr(stages, "__iter__") else stages
    stages = tuple(dict.fromkeys(stages))
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown or not stages:
        raise CaptureError(
            f"unknown stage {unknown[:1] or stages!r}; stages are {', '.join(STAGES)}."
        )
    return stages


def by_stage(stages, queries, positions):
    """{stage: sorted positions} of the stages of which only some are wanted."""
    some = {} if positions is None else positions
    if not isinstance(some, dict) or not some.keys() <= set(stages):
        raise CaptureError(f"positions are {{captured stage: positions}}, not {some!r:.200}.")
    maps = [name for name in stages if STAGES[name].grid and not STAGES[name].mean]
    found = dict.fromkeys(maps, queries) | {name: chosen(name, some[name]) for name in some}
    return {name: values for name, values in found.items() if values is not None}


def chosen(name, values):
    """A sorted list of layers or positions without repetitions, or None for all."""
    if values is None:
        return None
    values = np.atleast_1d(values)
    if not values.size or values.dtype.kind not in "iu":
        raise CaptureError(
            f"{name} is None for all, or whole numbers, at least one; not {values.tolist()!r}."
        )
    return sorted(set(values.tolist()))
