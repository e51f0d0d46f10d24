"""InferenceEngine: the one object that a notebook holds. Text comes from llama-server, captures
from the worker."""

from __future__ import annotations

import os
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

from .arguments import whole
from .errors import WorkerCrashedError
from .files.programs import find_server
from .gpus import devices
from .gpus.cores import physical_cores
from .gpus.fit import Fit, fit, spread
from .gpus.placement import placement, proof
from .gpus.placing import Place, place
from .history import forget
from .imports import uninterrupted
from .server.loading import settle
from .serving import Serving

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    import pandas as pd
    import xarray as xr
    from distributed import Client

    from .capture.data import Capture
    from .capture.edits import Edit
    from .capture.session import CaptureSession
    from .files.gguf import GGUFFile

    Prompt = str | Sequence[int]
    Edits = Edit | Sequence[Edit | Sequence[Edit]]


class InferenceEngine(Serving):
    """One model: generated text, embeddings, tokens, and captures of what happens inside.

    server_path: llama-server, else found by llamatelemetry.files.programs.find_server(). Also a
    context manager. Attributes: model (the GGUFFile, None before load_model), server (the
    ServerManager), plan (who gets which GPU)."""

    def __init__(self, server_path: str | Path | None = None):
        super().__init__(server_path)
        self._session: CaptureSession | None = None
        self._says = False  # verbose and not silent
        self._session_lock = threading.RLock()  # one capture at a time

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

    def tokenize(self, text: str, add_special: bool = True) -> pd.DataFrame:
        """DataFrame of a text's tokens: position, id, piece (bytes where a token is not whole
        characters).

        add_special: with the tokens that the model puts first (and last). Needs no server.
        """
        with uninterrupted():
            import pandas as pd

        with self._session_lock:  # of one model
            pieces = self._loaded().pieces
            ids = self._call("tokenize", text, add_special=add_special)
        return pd.DataFrame(
            {"position": range(len(ids)), "id": ids, "piece": [pieces[i] for i in ids]}
        )

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        with self._session_lock:
            model = self._loaded()
            if self._session is not None and not self._session.alive:  # interrupted, or killed
                self._session.close()
                self._session = None
            if self._session is None:
                with uninterrupted():
                    from .collecting.session import CollectSession

                self._session = CollectSession(model, **self._session_args)
                self._prove()
            try:
                return getattr(self._session, name)(*args, **kwargs)
            except WorkerCrashedError:
                session, self._session = self._session, None  # the next call starts a new worker
                session.close()
                raise

    def capture(
        self,
        text: Prompt,
        stages: str | Iterable[str] = ("attention", "hidden"),
        layers: int | Sequence[int] | None = None,
        queries: int | Sequence[int] | None = None,
        edits: Edits = (),
        generate: int = 0,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Capture:
        """Run the model over a text (or token ids) and return its tensors, a Capture of the named
        stages.

        text: tokenized with the model's special tokens. stages: see `stages()`. layers: only these
        layers of stages that have layers. queries: only these query positions of attention, scores
        and mask (attention_mean, the mean over heads, always has all). edits: changes made while it
        runs (ablate_head, ablate_layer, scale, add, patch, knock_out). generate: decode this many
        more tokens one by one (fewer when the model ends its text), greedily at temperature 0, else
        drawn with the seed; every stage then covers prompt and generated tokens, the former up to
        the Capture's n_prompt. Raises CaptureError for what cannot be done, WorkerCrashedError when
        llama.cpp ended."""
        return self._call(
            "capture",
            text,
            stages=stages,
            layers=layers,
            queries=queries,
            edits=edits,
            generate=generate,
            temperature=temperature,
            seed=seed,
        )

    def collect(
        self,
        texts: Iterable[Prompt | Mapping[str, Any]] | pd.DataFrame | str | Path,
        stages: str | Iterable[str] = "hidden",
        layers: int | Sequence[int] | None = None,
        pool: str | None = "last",
        where: str | Path | None = None,
        *,
        labels: Iterable[Any] | None = None,
        too_long: str = "error",
        client: Client | None = None,
        progress: bool = True,
    ) -> xr.Dataset:
        """The states of many texts, several to a batch, in a store on disk: a Dataset that reads
        what is looked at (see llamatelemetry.open_states for its dims and coordinates).

        texts: a list or generator of texts (or token ids, or mappings with a "text"), a DataFrame
        with a column "text", or the path of a Parquet, JSONL or text file; what else a row has is
        carried along, labels are the column "label". stages, layers: as for `capture`, of those
        with a value per token. pool: one row per text, of its "last" token, or the "mean" or "max"
        over its tokens; None keeps every token. where: the store's folder; None: one in scratch,
        gone with this process. The same call goes on where it was interrupted. too_long: a text
        that the context does not hold is an "error", or "cut" after its first tokens. client: a
        dask.distributed Client, whose workers share the texts (cluster.local_cluster: one per GPU).
        Memory does not grow with the texts. Raises CaptureError for what cannot be captured,
        CollectError for a text that is none, a store of something else, or no room."""
        with uninterrupted():
            from .collecting.run import collect

        return collect(
            self._call,
            self._loaded(),
            self._session_args,
            texts,
            stages,
            layers,
            pool,
            where,
            labels=labels,
            too_long=too_long,
            client=client,
            progress=progress,
        )

    def stages(self) -> pd.DataFrame:
        """What this model's captures can hold, a DataFrame by stage: dims; there: whether the model
        has it; layers: those that have it, () for a stage without layers; why it is not there, or
        not in every layer, "" where it is. Decided from the graph of a prompt, without a
        capture."""
        return self._call("stages")

    def head_statistics(
        self,
        text: Prompt,
        layers: int | Sequence[int] | None = None,
        patterns: Mapping[str, Sequence[tuple[int, int]]] | None = None,
    ) -> xr.Dataset:
        """Statistics of every head's attention over a text, streamed: memory does not grow with
        heads x tokens^2.

        Returns a Dataset of (layer, head), means over query rows of: entropy (nats),
        normalized_entropy (by the log of the number of keys), distance (tokens), sink (mass on the
        first token: Xiao et al. 2023), top (the largest weight), mass (row sum); and the score of
        each of patterns={name: [(query, key), ...]}, the share of all attention that lies on these
        pairs: what TransformerLens's head detector computes with error_measure="mul". NaN where a
        pattern has no pair, or the text one token."""
        return self._call("head_statistics", text, layers=layers, patterns=patterns)

    def score(self, text: Prompt, edits: Edits = ()) -> pd.DataFrame:
        """How the model predicts each token of a text from those before it: position, id, piece,
        logprob (nats), entropy (nats), rank (0 is best), top_id, top_logprob."""
        return self._call("score", text, edits=edits)

    def sweep(
        self, text: Prompt, variants: Mapping[Any, Edits], progress: bool = True
    ) -> pd.DataFrame:
        """Loss of a text under each of {name: edits}: DataFrame indexed by name.

        loss: mean nats per token; loss_change: against no edits, with its standard error over
        tokens (loss_change_err); kl: mean KL(no edits || edited) in nats; top1_agreement: share of
        positions with the same best token. attrs["base_loss"]: the loss without edits."""
        return self._call("sweep", text, variants, progress=progress)

    def predict(
        self,
        text: Prompt,
        variants: Mapping[Any, Edits],
        tokens: Sequence[int] = (),
        progress: bool = True,
    ) -> xr.Dataset:
        """What comes next after a text under each of {name: edits}: a Dataset of (variant, token),
        by name and token id.

        logprob: of `tokens` (nats), and before: without the edits (a difference of two tokens'
        logprobs is one of their logits); by variant alone kl: KL(no edits || edited) of the next
        token in nats, top_id and top_logprob. Only the positions from the first edited one on are
        read again: many edits of the last query cost one token each."""
        return self._call("predict", text, variants, tokens, progress=progress)

    def _processes(self):
        processes = {"notebook": os.getpid()}
        if self.server.is_running():
            processes["llama-server"] = self.server.pid
        if (session := self._session) is not None:  # another thread may close it meanwhile
            processes["capture worker"] = session.pid
        return processes

    def placement(self) -> pd.DataFrame:
        """Which process sits on which GPU with how much memory, as the driver reports it: see
        gpus.placement."""
        return placement(self._processes())

    def _prove(self):
        """Say where a process that was just started sits, by the driver; nothing on a machine
        without GPUs."""
        if self._says and self.plan.inference:
            print(proof(self._processes()))

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
