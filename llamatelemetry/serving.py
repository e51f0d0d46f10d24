"""What an engine asks of llama-server: text, chats and embeddings."""

from __future__ import annotations

import json
import threading
import time
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from . import templates
from .arguments import writable
from .capture.finite import check_finite
from .capture.prediction import check_file
from .errors import LlamaTelemetryError, NotFiniteError, ServerError, TemplateError
from .options import check_pooling, pooling_of
from .server.completion import InferResult, as_result, check_start, request_body
from .server.manager import STOPPED, ServerManager
from .server.probabilities import check_sound, drawn, every_token, watched

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from .files.gguf import GGUFFile
    from .gpus.devices import Plan


class Running:
    """The one llama-server that a request began with: what it asks never reaches another one, which
    load_model may have started meanwhile, in another thread."""

    def __init__(self, server: ServerManager, model: GGUFFile):
        self._server, self._pid, self.model = server, server.pid, model

    def post(self, *args: Any, **kwargs: Any) -> Any:
        if self._server.pid != self._pid:
            raise ServerError(STOPPED)
        answer = self._server.post(*args, **kwargs)
        self.model.check_place(running=True)
        return answer

    def lost(self, error: Exception) -> ServerError:
        same = self._server.pid == self._pid
        return self._server.lost(error) if same else ServerError(STOPPED)

    @property
    def sound(self) -> bool:
        return self._server.sound

    @sound.setter
    def sound(self, value: bool) -> None:
        if self._server.pid == self._pid:
            self._server.sound = value


class Serving:
    """The half of an InferenceEngine that llama-server answers."""

    model: GGUFFile | None
    plan: Plan | None

    def __init__(self, server_path: str | Path | None = None):
        self.server = ServerManager(server_path)
        self.model = self.plan = self._pooling = self._template_error = None
        self._server_args: dict[str, Any] = {}
        # One change of what is loaded and started at a time. Held after _session_lock, never before
        self._lock = threading.RLock()
        self._embeds = threading.Lock()
        self._in_flight = 0

    def _start_server(self, **changes):
        self._server_args |= changes
        env, args = self.plan.inference_env(), self._server_args
        self.model.check_place()
        try:
            if not (args.get("chat_template") or args.get("chat_template_file")):
                templates.check(self.model.metadata.get("tokenizer.chat_template"), self.model.path)
            self.server.start_server(self.model.path, env=env, **args)
        except TemplateError as error:
            if args.get("chat_template") or args.get("chat_template_file"):
                raise
            # llama-server does not start without a template that it can parse. infer uses none;
            # chat refuses this one.
            self.server.start_server(self.model.path, env=env, **args, chat_template="chatml")
            self._server_args["chat_template"], self._template_error = "chatml", error
            warnings.warn(f"{error} Until then chat() is refused.", stacklevel=3)

    def _loaded(self) -> GGUFFile:
        with self._lock:  # not in the middle of a load
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
            model = self._loaded()
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
            running = Running(self.server, model)
        try:
            yield running
        finally:
            with self._lock:
                self._in_flight -= 1

    def infer(
        self,
        prompt: str | Sequence[int],
        max_tokens: int = 128,
        temperature: float = 0.7,
        top_p: float = 0.9,
        top_k: int = 40,
        seed: int | None = 0,
        stop_sequences: str | Sequence[str] | None = None,
        n_probs: int = 0,
        **options: Any,
    ) -> InferResult:
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
            check_start(body["prompt"], server.post, server.model)
            started = time.perf_counter()
            answer = server.post("/completion", watched(body))
            latency_ms = 1000 * (time.perf_counter() - started)
            answer = every_token(answer, body, server.post, server.model)
            return as_result(answer, latency_ms, server.model.pieces)

    def infer_stream(
        self,
        prompt: str | Sequence[int],
        max_tokens: int = 128,
        temperature: float = 0.7,
        top_p: float = 0.9,
        top_k: int = 40,
        seed: int | None = 0,
        stop_sequences: str | Sequence[str] | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """Like infer, but a generator of pieces of text as they are generated; joined they are the
        text of infer.

        A piece is never half a character. Leaving the loop (or closing the generator) ends the
        generation."""
        body = self._body(
            prompt, max_tokens, temperature, top_p, top_k, seed, stop_sequences, 0, options
        )
        # what is wrong is said at the call, not at the first piece
        return self._pieces(body | {"stream": True})

    def _body(self, *args):
        check_file(self._loaded())
        return request_body(*args)

    def _pieces(self, body):
        import requests

        with self._serving() as server:
            check_sound(server, body)
            check_start(body["prompt"], server.post, server.model)
            response = server.post("/completion", watched(body), stream=True)
            try:
                with self.server.watched() as watch:
                    for line in response.iter_lines(chunk_size=None):
                        if not line.startswith(b"data: "):
                            continue  # blank lines, and pings while a long prompt is processed
                        watch.beat()
                        event = json.loads(line[6:])
                        if "error" in event:
                            raise ServerError(f"llama-server: {event['error'].get('message')}")
                        server.model.check_place(running=True)
                        if drawn(event)["content"]:
                            yield event["content"]
                        if event["stop"]:
                            return
                    raise requests.ConnectionError("the stream ended early")
            except requests.RequestException as error:
                raise server.lost(error) from error
            except KeyboardInterrupt:
                response.close()
                self.server.after_interrupt()
                raise
            finally:
                response.close()  # llama-server sees the closed connection and stops generating

    def chat(
        self,
        messages: str | Sequence[dict[str, str]],
        max_tokens: int = 128,
        temperature: float = 0.7,
        top_p: float = 0.9,
        top_k: int = 40,
        seed: int | None = 0,
        stop_sequences: str | Sequence[str] | None = None,
        n_probs: int = 0,
        **options: Any,
    ) -> InferResult:
        """Answer a conversation in the model's own chat template; parameters and result are those
        of infer.

        messages: list of {"role": "system" | "user" | "assistant", "content": text}, or one text of
        the user's. ServerError if the file has no chat template (a base model): use infer."""
        prompt = self.apply_template(messages)
        return self.infer(
            prompt, max_tokens, temperature, top_p, top_k, seed, stop_sequences, n_probs, **options
        )

    def apply_template(self, messages: str | Sequence[dict[str, str]], answer: bool = True) -> str:
        """The text that the model's chat template makes of `messages` (see chat): what the model
        really reads. answer: with the beginning of its answer."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        model = self._loaded()
        own = {"chat_template", "chat_template_file"} & self._server_args.keys()
        if not own and "tokenizer.chat_template" not in model.metadata:
            raise ServerError(
                f"{model.name} has no chat template in its file: it is not a chat model. Use infer."
            )
        asked = {"messages": list(messages), "add_generation_prompt": answer}
        with self._serving() as server:
            if self._template_error:  # the server runs with another one than the file's
                raise TemplateError(str(self._template_error))
            if not own:  # what it does may depend on what is said: llama-server has no limits
                template = model.metadata["tokenizer.chat_template"]
                templates.check(template, model.path, list(messages))
            return server.post("/apply-template", asked)["prompt"]

    def embed(
        self, texts: str | Sequence[str], pooling: str | None = None, normalize: bool = True
    ) -> np.ndarray:
        """Embeddings of texts: (n, n_embd) float32 array, one row per text; a single text gives one
        row.

        pooling: of the last layer's normalized states: "mean", "last" or "cls" (the first token's);
        None: as load_model or else the file says, "mean" where neither does. normalize: to
        Euclidean length 1, so that products of rows are cosine similarities. One llama-server does
        both: the first call restarts it with embeddings on, unless load_model had embeddings=True.
        A text may be as long as a batch, 512 tokens (load_model(..., ubatch_size=2048) for more).
        They are computed one after the other, whatever n_parallel.
        """
        model = self._loaded()
        one = isinstance(texts, (str, bytes)) or not np.iterable(texts)
        given: list = [texts] if one else list(texts)
        if not given:
            return np.empty((0, model.n_embd), np.float32)
        if not all(writable(text, ServerError) for text in given):
            raise ServerError("embed takes texts that are not empty.")
        pooling = check_pooling(pooling) if pooling else self._pooling or pooling_of(model)
        with self._serving(embeddings=True, pooling=pooling) as server:
            for text in given:
                check_start(text, server.post, server.model)
            # llama.cpp computes texts of several slots in parts of one length and pools each part:
            # the last part's vector would come. So with several slots there is one text at a time.
            alone, rows = self._server_args["n_parallel"] > 1, []
            for part in [[text] for text in given] if alone else [given]:
                asked = {"content": part, "embd_normalize": 2 if normalize else -1}
                with self._embeds:
                    answer = server.post("/embeddings", asked)
                rows += sorted(answer, key=lambda row: row["index"])
        # (n, n_embd); null is NaN
        vectors = np.array([row["embedding"][0] for row in rows], np.float32)
        if normalize and not vectors.any(axis=1).all():
            text = given[int(np.argmin(vectors.any(axis=1)))]
            raise NotFiniteError(
                f"The embedding of {text!r:.60} in {model.path.name} is all zeros: it has no "
                "direction, and a cosine with it would be made up. normalize=False gives it as it is."
            )
        return check_finite(vectors, "embeddings", file=model.path.name)
