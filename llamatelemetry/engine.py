"""InferenceEngine: the one object that a notebook holds. Text comes from llama-server, captures
from the worker."""

import json
import os
import threading
import time
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .arguments import whole, writable
from .errors import (
    LlamaTelemetryError,
    NotFiniteError,
    ServerError,
    TemplateError,
    WorkerCrashedError,
)
from .files.programs import find_server
from .gpus import devices
from .gpus.cores import physical_cores
from .gpus.fit import fit, spread
from .gpus.placement import placement, proof
from .options import check_pooling, pooling_of
from .server.completion import as_result, check_start, request_body
from .server.loading import settle
from .server.manager import ServerManager
from .server.probabilities import check_sound, drawn, every_token, watched

if TYPE_CHECKING:
    import pandas as pd


class InferenceEngine:
    """One model: generated text, embeddings, tokens, and captures of what happens inside.

    server_path: llama-server, else found by llamatelemetry.files.programs.find_server(). Also a
    context manager. Attributes: model (the GGUFFile, None before load_model), server (the
    ServerManager), plan (who gets which GPU)."""

    def __init__(self, server_path=None):
        self.server = ServerManager(server_path)
        self.model = self.plan = self._session = self._pooling = None
        self._says = False  # verbose and not silent
        self._lock = threading.RLock()  # one start or restart of the server at a time
        self._session_lock = threading.RLock()  # one capture at a time
        self._in_flight = 0

    # ---- loading

    def load_model(
        self,
        model,
        gpu_layers=None,
        ctx_size=None,
        auto_start=True,
        n_parallel=1,
        verbose=True,
        silent=False,
        tensor_split=None,
        **server_kwargs,
    ):
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
        with cache_type_k="f32" and cache_type_v="f32", as captures of it have). Raises
        ModelNotFoundError, ModelLoadError, GpuError, OptionError, ServerError."""
        from .files.gguf import GGUFFile
        from .files.models import resolve_model

        gpu_layers, n_parallel = (
            whole("gpu_layers", gpu_layers, -1, none=True),
            whole("n_parallel", n_parallel, 1),
        )
        plan, opened = devices.plan(tensor_split), GGUFFile(resolve_model(model))
        setup = settle(opened, ctx_size, server_kwargs)
        self.close()  # only now: a misspelt name leaves the loaded model as it was
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
        self._server_args = (
            dict(
                gpu_layers=gpu_layers,
                ctx_size=setup.ctx_size,
                n_parallel=n_parallel,
                tensor_split=self.plan.split,
                verbose=verbose,
                silent=silent,
                warmup=None if self.plan.inference else False,
            )
            | setup.server
        )
        self._session_args = (
            dict(
                n_ctx=setup.ctx_size,
                gpu_layers=gpu_layers,
                env=self.plan.inference_env(),
                threads=setup.server.get("threads") or physical_cores(),
                tensor_split=self.plan.shares if self.plan.split else None,
            )
            | setup.session
        )
        self.model = opened
        if not silent and not (found := self.fit(server=auto_start)).fits:
            print(
                found
            )  # not an error: llama.cpp may leave layers in the machine's memory, and captures come later
        if auto_start:
            try:
                self._start_server()
            except BaseException:
                self.model = None  # nothing half loaded: the next load_model begins afresh
                raise
            self._prove()
        return self

    def _start_server(self, **changes):
        self._server_args |= changes
        env, args = self.plan.inference_env(), self._server_args
        try:
            self.server.start_server(self.model.path, env=env, **args)
        except TemplateError as error:
            if args.get("chat_template") or args.get("chat_template_file"):
                raise
            # llama-server does not start without a template that it can parse. infer uses none;
            # chat refuses this one.
            self.server.start_server(self.model.path, env=env, **args, chat_template="chatml")
            self._server_args["chat_template"], self._template_error = "chatml", error
            warnings.warn(f"{error} Until then chat() is refused.", stacklevel=3)

    def close(self):
        """Stop the server and the capture worker. The engine can load again."""
        with self._lock, self._session_lock:
            self.server.stop_server()
            session, self._session = self._session, None
            self.model = None
            if session is not None:
                session.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _loaded(self):
        if self.model is None:
            raise LlamaTelemetryError(
                'No model is loaded. Call load_model("smollm2-135m-Q4_1") first.'
            )
        return self.model

    @contextmanager
    def _serving(self, **needs):
        """Hold a running server during one request, started or restarted with `needs` where it has
        not got them."""
        with self._lock:
            self._loaded()
            missing = {
                key: value for key, value in needs.items() if self._server_args.get(key) != value
            }
            if missing and self._in_flight:
                raise ServerError(
                    "llama-server is answering another request and must be restarted for embeddings. "
                    "Wait for it, or call load_model(..., embeddings=True) to have both at once."
                )
            if missing or not self.server.is_running():
                self._start_server(**missing)
            self._in_flight += 1
        try:
            yield self.server
        finally:
            with self._lock:
                self._in_flight -= 1

    # ---- text

    def infer(
        self,
        prompt,
        max_tokens=128,
        temperature=0.7,
        top_p=0.9,
        top_k=40,
        seed=0,
        stop_sequences=None,
        n_probs=0,
        **options,
    ):
        """Continue `prompt` (a text, or token ids) by up to max_tokens tokens; returns an
        InferResult.

        temperature=0 always takes the most probable token. seed: the same seed gives the same text,
        None a new one each time. stop_sequences: texts that end the generation and are left out.
        n_probs=k: probabilities has, for each generated token, its k most probable alternatives
        before temperature, top_k and top_p: position, rank (0 is the most probable), id, piece,
        prob, logprob (nats), chosen; the chosen token is always among them. options: llama-server's
        further sampling parameters (completion.OPTIONS); those that are not named are off.
        max_tokens=-1: until the text ends or the context is full.

        Raises ServerError: empty prompt, prompt longer than the context, server gone (the next call
        starts it again); CaptureError for a model that predicts no next token (an encoder),
        NotFiniteError where logits are no numbers."""
        body = self._body(
            prompt, max_tokens, temperature, top_p, top_k, seed, stop_sequences, n_probs, options
        )
        with self._serving() as server:
            check_sound(server, body)
            check_start(body["prompt"], server.post, self.model)
            started = time.perf_counter()
            answer = server.post("/completion", watched(body))
            latency_ms = 1000 * (time.perf_counter() - started)
            return as_result(
                every_token(answer, body, server.post, self.model), latency_ms, self.model.pieces
            )

    def infer_stream(
        self,
        prompt,
        max_tokens=128,
        temperature=0.7,
        top_p=0.9,
        top_k=40,
        seed=0,
        stop_sequences=None,
        **options,
    ):
        """Like infer, but a generator of pieces of text as they are generated; joined they are the
        text of infer.

        A piece is never half a character. Leaving the loop (or closing the generator) ends the
        generation."""
        body = self._body(
            prompt, max_tokens, temperature, top_p, top_k, seed, stop_sequences, 0, options
        )
        return self._pieces(
            body | {"stream": True}
        )  # what is wrong is said at the call, not at the first piece

    def _body(self, *args):
        from .capture.prediction import check_file

        check_file(self._loaded())
        return request_body(*args)

    def _pieces(self, body):
        import requests

        with self._serving() as server:
            check_sound(server, body)
            check_start(body["prompt"], server.post, self.model)
            response = server.post("/completion", watched(body), stream=True)
            try:
                for line in response.iter_lines(chunk_size=None):
                    if not line.startswith(b"data: "):
                        continue  # blank lines, and pings while a long prompt is processed
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise ServerError(f"llama-server: {event['error'].get('message')}")
                    if drawn(event)["content"]:
                        yield event["content"]
                    if event["stop"]:
                        return
                raise requests.ConnectionError("the stream ended early")
            except requests.RequestException as error:
                raise server.lost(error) from error
            finally:
                response.close()  # llama-server sees the closed connection and stops generating

    def chat(
        self,
        messages,
        max_tokens=128,
        temperature=0.7,
        top_p=0.9,
        top_k=40,
        seed=0,
        stop_sequences=None,
        n_probs=0,
        **options,
    ):
        """Answer a conversation in the model's own chat template; parameters and result are those
        of infer.

        messages: list of {"role": "system" | "user" | "assistant", "content": text}, or one text of
        the user's. ServerError if the file has no chat template (a base model): use infer."""
        prompt = self.apply_template(messages)
        return self.infer(
            prompt, max_tokens, temperature, top_p, top_k, seed, stop_sequences, n_probs, **options
        )

    def apply_template(self, messages):
        """The text that the model's chat template makes of `messages` (see chat): what the model
        really reads."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        given = self._loaded().metadata.keys() | self._server_args.keys()
        if not given & {"tokenizer.chat_template", "chat_template", "chat_template_file"}:
            raise ServerError(
                f"{self.model.name} has no chat template in its file: it is not a chat model. Use infer."
            )
        with self._serving() as server:
            if self._template_error:  # the server runs with another one than the file's
                raise TemplateError(str(self._template_error))
            return server.post("/apply-template", {"messages": list(messages)})["prompt"]

    def embed(self, texts, pooling=None, normalize=True):
        """Embeddings of texts: (n, n_embd) float32 array, one row per text; a single text gives one
        row.

        pooling: of the last layer's normalized states: "mean", "last" or "cls" (the first token's);
        None: as load_model or else the file says, "mean" where neither does. normalize: to
        Euclidean length 1, so that products of rows are cosine similarities. One llama-server does
        both: the first call restarts it with embeddings on, unless load_model had embeddings=True.
        A text may be as long as a batch, 512 tokens (load_model(..., ubatch_size=2048) for more).
        """
        import numpy as np

        from .capture.finite import check_finite

        texts = (
            [texts] if isinstance(texts, (str, bytes)) or not np.iterable(texts) else list(texts)
        )
        if not texts:
            return np.empty((0, self._loaded().n_embd), np.float32)
        if not all(writable(text, ServerError) for text in texts):
            raise ServerError("embed takes texts that are not empty.")
        pooling = check_pooling(pooling) if pooling else self._pooling or pooling_of(self._loaded())
        with self._serving(embeddings=True, pooling=pooling) as server:
            for text in texts:
                check_start(text, server.post, self.model)
            rows = server.post(
                "/embeddings", {"content": texts, "embd_normalize": 2 if normalize else -1}
            )
        rows = sorted(rows, key=lambda row: row["index"])
        vectors = np.array(
            [row["embedding"][0] for row in rows], np.float32
        )  # (n, n_embd); null is NaN
        if normalize and not vectors.any(axis=1).all():
            text = texts[int(np.argmin(vectors.any(axis=1)))]
            raise NotFiniteError(
                f"The embedding of {text!r:.60} in {self.model.path.name} is all zeros: it has no "
                "direction, and a cosine with it would be made up. normalize=False gives it as it is."
            )
        return check_finite(vectors, "embeddings", file=self.model.path.name)

    def tokenize(self, text, add_special=True):
        """DataFrame of a text's tokens: position, id, piece (bytes where a token is not whole
        characters).

        add_special: with the tokens that the model puts first (and last). Needs no server.
        """
        import pandas as pd

        ids = self._call("tokenize", text, add_special=add_special)
        return pd.DataFrame(
            {"position": range(len(ids)), "id": ids, "piece": [self.model.pieces[i] for i in ids]}
        )

    # ---- inside the model

    def _call(self, name, *args, **kwargs):
        with self._session_lock:
            model = self._loaded()
            if (
                self._session is not None and not self._session.alive
            ):  # interrupted, or killed between two calls
                self._session.close()
                self._session = None
            if self._session is None:
                from .capture.session import CaptureSession

                self._session = CaptureSession(model, **self._session_args)
                self._prove()
            try:
                return getattr(self._session, name)(*args, **kwargs)
            except WorkerCrashedError:
                session, self._session = self._session, None  # the next call starts a new worker
                session.close()
                raise

    def capture(self, text, **kwargs):
        """Run the model over a text (or token ids) and return its tensors, a Capture: see
        CaptureSession.capture.

        stages=("attention", "hidden"), layers=None, queries=None, edits=(), generate=0, seed=0,
        temperature=0.0."""
        return self._call("capture", text, **kwargs)

    def stages(self) -> "pd.DataFrame":
        """What this model's captures can hold, a DataFrame by stage: dims; there: whether the model
        has it; layers: those that have it, () for a stage without layers; why it is not there, or
        not in every layer. Decided from the model's graph, without a capture."""
        return self._call("stages")

    def head_statistics(self, text, **kwargs):
        """Statistics of every head in bounded memory, a Dataset of (layer, head):
        CaptureSession.head_statistics."""
        return self._call("head_statistics", text, **kwargs)

    def score(self, text, **kwargs):
        """How well each token is predicted from those before it, a DataFrame:
        CaptureSession.score."""
        return self._call("score", text, **kwargs)

    def sweep(self, text, variants, **kwargs):
        """What each of several edits does to the predictions, a DataFrame: CaptureSession.sweep."""
        return self._call("sweep", text, variants, **kwargs)

    # ---- where things are

    def _processes(self):
        processes = {"notebook": os.getpid()}
        if self.server.is_running():
            processes["llama-server"] = self.server.pid
        if self._session is not None:
            processes["capture worker"] = self._session.pid
        return processes

    def placement(self):
        """Which process sits on which GPU with how much memory, as the driver reports it: see
        gpus.placement."""
        return placement(self._processes())

    def _prove(self):
        """Say where a process that was just started sits, by the driver; nothing on a machine
        without GPUs."""
        if self._says and self.plan.inference:
            print(proof(self._processes()))

    def fit(self, ctx_size=None, **kwargs):
        """Does the loaded model fit, as server and capture worker together: see
        llamatelemetry.gpus.fit.fit.

        What our own processes hold on the GPU already counts as there. Of several GPUs, the answer
        is that for the one where the most is missing, or the least is left."""
        model, table = self._loaded(), self.placement()
        sizes = ctx_size or self._server_args["ctx_size"], self._server_args["n_parallel"]
        if not self.plan.inference or kwargs.get("memory_bytes") is not None:
            return fit(model, *sizes, **kwargs)
        ours, now, found = (
            table[table["process"] != "notebook"],
            {gpu.uuid: gpu for gpu in devices.list_gpus()},
            [],
        )
        for gpu, (share, output) in zip(
            self.plan.inference, spread(model.n_layer, self.plan.shares)
        ):
            held = ours.loc[ours["gpu"] == gpu.index, "memory_mib"].fillna(0).sum()
            there = int(held * 2**20) + now[gpu.uuid].free_bytes
            found.append(
                fit(model, *sizes, memory_bytes=there, share=share, output=output, **kwargs)
            )
        return max(found, key=lambda fit: fit.need_bytes - fit.memory_bytes)
