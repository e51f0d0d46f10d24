"""InferenceEngine: the one object that a notebook holds. Text comes from llama-server (serving),
captures from the worker (capturing)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from .arguments import whole
from .capturing import Capturing
from .files.programs import find_server
from .gpus import devices
from .gpus.cores import physical_cores
from .gpus.fit import Fit, fit, spread
from .gpus.placing import Place, place
from .history import forget
from .imports import uninterrupted
from .server.loading import settle

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from .files.gguf import GGUFFile


class InferenceEngine(Capturing):
    """One model: generated text, embeddings, tokens, and captures of what happens inside.

    server_path: llama-server, else found by llamatelemetry.files.programs.find_server(). Also a
    context manager. Attributes: model (the GGUFFile, None before load_model), server (the
    ServerManager), plan (who gets which GPU)."""

    def load_model(
        self,
        model: str | Path,
        gpu_layers: int | None = None,
        ctx_size: int | None = None,
        auto_start: bool = True,
        n_parallel: int = 1,
        verbose: bool = True,
        silent: bool = False,
        tensor_split: str | Sequence[float] | None = None,
        **server_kwargs: Any,
    ) -> InferenceEngine:
        """Load a model; another one that was loaded is closed first. Returns self.

        model: a name of the registry, a path, or "repo:file". gpu_layers: None for as many as fit,
        -1 all, 0 none. ctx_size: tokens per request and per capture, None for 4,096 or what the
        model was trained for if that is less; rounded up to a multiple of 256, as llama.cpp has it.
        auto_start=False: no llama-server now; infer, chat and embed start it when they are first
        called. tensor_split: "1.0,0.0" shows inference only GPU 0, "0.5,0.5" spreads the weights
        over both. verbose: one line on the GPUs and one on the server; silent: neither, and no
        progress. server_kwargs: threads, port, host, timeout, embeddings=True, and llama-server's
        options; those that change the model (lora, control_vector, rope_*, override_kv, ...) are
        for captures too, those that captures cannot follow are refused: llamatelemetry.options.
        LLAMA_ARG_* and ~/.config/llama.cpp are not read. flash_attn="off" with swa_full=True makes
        the server sum in the order of captures: the same numbers to the last digits (of an F32 file
        with cache_type_k="f32" and cache_type_v="f32", as captures of it have). Keys may be
        quantized (cache_type_k="q8_0"), values not: that needs fused attention, which makes no
        probabilities. Capture.layers then says key_type, and in key_turn how many features were
        turned together before it; q and k are shown as they are before. Raises ModelNotFoundError,
        ModelLoadError, GpuError, OptionError, ServerError."""
        with uninterrupted():
            from .capture.variants import check_controls
            from .files.gguf import GGUFFile
            from .files.models import resolve_model

        gpu_layers = whole("gpu_layers", gpu_layers, -1, none=True)
        n_parallel = whole("n_parallel", n_parallel, 1)
        plan, opened = devices.plan(tensor_split), GGUFFile(resolve_model(model))
        setup = settle(opened, ctx_size, server_kwargs)
        if controls := setup.session["variant"].get("controls"):
            check_controls(controls, opened)
        # A load that another thread makes ends before; what runs there on captures, too
        forget(InferenceEngine, self)
        with self._session_lock, self._lock:
            self.close()  # only now: a misspelt name leaves the loaded model as it was
            try:
                self._load(plan, opened, setup, gpu_layers, n_parallel, auto_start, verbose, silent)
            except BaseException:
                self.close()  # nothing half loaded: the next load_model begins afresh
                raise
        return self

    def _load(self, plan, opened, setup, gpu_layers, n_parallel, auto_start, verbose, silent):
        self.plan = plan
        if auto_start and self.server.server_path is None:
            self.server.server_path = find_server()
        self._says = verbose and not silent
        if self._says:
            print(self.plan.line)
        if setup.says and not silent:
            print(setup.says)
        self._pooling, self._template_error = setup.server.get("pooling"), None
        # On a CPU llama-server's warm-up run only delays the first answer (SmolLM2, 2 cores: ready
        # in 0.6 s, not 2.4).
        self._server_args = {
            "gpu_layers": gpu_layers,
            "ctx_size": setup.ctx_size,
            "n_parallel": n_parallel,
            "tensor_split": plan.split,
            "verbose": verbose,
            "silent": silent,
            "warmup": None if plan.inference else False,
        } | setup.server
        self._session_args = {
            "n_ctx": setup.ctx_size,
            "gpu_layers": gpu_layers,
            "env": plan.inference_env(),
            "threads": setup.server.get("threads") or physical_cores(),
            "tensor_split": plan.shares if plan.split else None,
        } | setup.session
        self.model = opened
        if not silent and not (found := self.fit(server=auto_start)).fits:
            # Not an error: llama.cpp may leave layers in the machine's memory, and captures come
            # later.
            print(found)
        if auto_start:
            self._start_server()
            self._prove()

    def close(self) -> None:
        """Stop the server and the capture worker; a call that another thread is in raises
        ServerError or WorkerCrashedError. The engine can load again."""
        if not self._session_lock.acquire(blocking=False):
            if (session := self._session) is not None:
                session.end()  # a capture in another thread
            self._session_lock.acquire()
        try:
            with self._lock:
                self.server.stop_server()
                session, self._session = self._session, None
                self.model = None
                if session is not None:
                    session.close()
        finally:
            self._session_lock.release()

    def __enter__(self) -> InferenceEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fit(
        self,
        ctx_size: int | None = None,
        *,
        memory_bytes: int | None = None,
        capture: bool = True,
        server: bool = True,
        gpu: bool | None = None,
    ) -> Fit:
        """Does the loaded model fit, as server and capture worker together: see
        llamatelemetry.gpus.fit.fit.

        What our own processes hold on the GPU already counts as there. Of several GPUs, the answer
        is that for the one where the most is missing, or the least is left."""
        model, plan = self._loaded(), self.plan
        sizes = ctx_size or self._server_args["ctx_size"], self._server_args["n_parallel"]
        asked = partial(fit, model, *sizes, capture=capture, server=server, gpu=gpu)
        if plan is None or not plan.inference or memory_bytes is not None:
            return asked(memory_bytes=memory_bytes)
        ours, found = self._held(), []
        now = {gpu.uuid: gpu for gpu in devices.list_gpus()}
        shares = spread(model.n_layer, plan.shares)
        for card, (share, output) in zip(plan.inference, shares):
            there = ours.get(card.index, 0) + now[card.uuid].free_bytes
            found.append(asked(memory_bytes=there, share=share, output=output))
        return max(found, key=lambda fit: fit.need_bytes - fit.memory_bytes)

    def place(
        self,
        model: GGUFFile,
        ctx_size: int | None = None,
        *,
        kind: str | None = None,
        capture: bool = True,
        server: bool = False,
    ) -> Place:
        """Where one more model goes while this one stays: see llamatelemetry.gpus.placing.place.

        model: a GGUFFile; kind: it once it is expanded or quantized to this. ctx_size: None for
        that of the loaded model. Another engine takes the answer:
        load_model(..., tensor_split=place.tensor_split)."""
        size = ctx_size or self._server_args.get("ctx_size", 4096)
        ours = self._held()
        return place(model, size, kind=kind, capture=capture, server=server, ours=ours)

    def _held(self):
        """{GPU's index: bytes} that llama-server and the capture worker hold, as far as the driver
        says."""
        table = self.placement()
        known = table[table["process"] != "notebook"].dropna(subset=["gpu", "memory_mib"])
        sums = known.groupby("gpu")["memory_mib"].sum().items()
        return {int(gpu): int(mib * 2**20) for gpu, mib in sums}
