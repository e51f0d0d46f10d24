"""llama-server as a process: start it, wait for it, stop it. It listens on this machine only, with
a key of its own."""

import errno
import os
import re
import secrets
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Self

from .. import guard, logs, ports
from ..errors import ModelLoadError, ModelNotFoundError, ServerError, shown
from ..files.outputs import path_of, split_parts
from ..files.places import free_bytes
from ..files.programs import ENGINE_MEND, find_server
from ..files.scratch import Folder
from ..gpus import devices
from ..gpus.cores import physical_cores
from ..liveness import Watch, kill, patience, size_of
from ..options import environment, flags, pooling_of
from ..secrecy import keep
from .failures import death

BATCH = 2048  # tokens that llama-server decodes in one batch, unless it is told otherwise


class ServerProcess:
    """The life of a llama-server: what ServerManager asks is no part of it."""

    def __init__(self, server_path: str | os.PathLike | None = None) -> None:
        self.server_path = find_server(server_path) if server_path else None
        self._api_key = keep(secrets.token_urlsafe(24))
        self._guard = None
        self._lock = threading.RLock()  # one start or stop at a time
        self._end = lambda: None
        self._reset()

    def _reset(self):
        self.url = self.port = self.pid = self.model_path = self.host = None
        self.offload = self._stalled = ""
        self.sound = False  # whether its log-probabilities were seen to be numbers

    def start_server(
        self,
        model_path: str | os.PathLike,
        host: str = "127.0.0.1",
        port: int | None = None,
        gpu_layers: int | None = None,
        ctx_size: int | None = None,
        n_parallel: int = 1,
        tensor_split: str | Sequence[float] | None = None,
        threads: int | None = None,
        embeddings: bool = False,
        timeout: float = 600.0,
        verbose: bool = True,
        silent: bool = False,
        env: Mapping[str, str] | None = None,
        **server_kwargs: Any,
    ) -> Self:
        """Start llama-server and wait until it answers; a server that this object already runs is
        stopped first.

        port: None takes a free one. gpu_layers: None lets llama.cpp fit as many as the GPU holds,
        -1 is all. ctx_size: tokens each of the n_parallel requests may use; None is what the model
        was trained for. tensor_split: "1.0,0.0" makes only GPU 0 visible, "0.5,0.5" spreads the
        weights (llamatelemetry.gpus.devices). threads: None is physical_cores(). embeddings: also
        answer POST /embeddings, pooled as the file says (by the mean where it says nothing) unless
        server_kwargs has `pooling`. timeout: seconds to wait for the model. verbose: one line when
        it is ready; silent: no line and no progress. env: extra environment. server_kwargs:
        llama-server's other flags (load_mode: a model that goes to a GPU whole is else read, not
        mapped); LLAMA_ARG_* of the environment and llama.cpp's config.ini are not read.

        Raises ServerError (no llama-server, port in use, it ended or did not answer in time),
        ModelNotFoundError and ModelLoadError (llama.cpp cannot load that file)."""
        model_path = path_of(model_path, ModelNotFoundError)
        if model_path.is_dir():
            raise ModelLoadError(f"{model_path} is a folder, not a GGUF file.")
        if not model_path.is_file():
            raise ModelNotFoundError(f"{model_path} is not a GGUF file.")
        with self._lock:
            self.stop_server()
            binary = self.server_path = self.server_path or find_server()
            if port:
                ports.refuse_in_use(host, port)
            variables, split = self._environment(env, tensor_split)
            pooling = server_kwargs.pop("pooling", None)
            options = {
                "model": model_path,
                "host": host,
                "port": port or 0,
                "parallel": n_parallel,
                "threads": threads or physical_cores(),
                "ctx_size": ctx_size and ctx_size * n_parallel,
                "tensor_split": split,
                "n_gpu_layers": "all" if gpu_layers is not None and gpu_layers < 0 else gpu_layers,
            } | server_kwargs
            if embeddings:
                # Not above: setup() may only install the gguf package after this module's import
                from ..files.gguf import GGUFFile

                pooling = pooling or pooling_of(GGUFFile(model_path))
                options |= {"embeddings": True, "pooling": pooling}
            # It answers with its model's name, in JSON, which is UTF-8
            if shown(model_path) != str(model_path):
                options.setdefault("alias", shown(model_path.stem))
            started = time.monotonic()
            batch = max(BATCH, int(server_kwargs.get("batch_size") or 0))
            gpu = gpu_layers != 0 and bool(devices.list_gpus())
            if gpu and gpu_layers in (None, -1):  # as capture/runtime.py loads it
                variables |= {"LLAMA_ARG_LOAD_MODE": "none"}
            self._limit = patience(split_parts(model_path), batch, ctx_size or batch, gpu)
            folder = Folder()
            self.log = folder.path / "llama-server.log"
            try:
                with open(self.log, "wb") as log:
                    logs.check_room(log)
                    command = [binary, *flags(options)]
                    self._guard, self.pid = guard.popen(command, log, env=variables)
            except BaseException as error:
                folder.remove()
                if not isinstance(error, OSError):
                    raise
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise logs.no_room(folder.path.parent) from error
                raise ServerError(
                    f"{binary} cannot be executed: {error.strerror}. {ENGINE_MEND}"
                ) from error
            self._owner = os.getpid()
            # Not a method of this object, which would keep it: a dropped one ends its server
            self._end = weakref.finalize(self, guard.end, self._guard, folder)
            self.host, self.model_path = host, model_path
            try:
                self._wait_until_ready(port, timeout, silent)
            except BaseException:  # an interrupt too must leave nothing behind
                self.stop_server()
                raise
            found = re.search(r"offloaded (\d+/\d+) layers to GPU", self.log_tail(1_000_000))
            self.offload = f"{found[1]} layers on the GPU" if found else ""
            if verbose and not silent:
                layers = f", {self.offload}" if self.offload else ""
                print(
                    f"llama-server: {shown(model_path.name)} on {self.url} (process {self.pid}{layers}), "
                    f"ready after {time.monotonic() - started:.1f} s"
                )
            return self

    def _environment(self, env, tensor_split):
        split = None
        if tensor_split is not None:
            plan = devices.plan(tensor_split)
            env, split = plan.inference_env() | dict(env or {}), plan.split
        # The key goes by the environment: a command line can be read by every user of the machine.
        # The other settings do because an older llama-server ignores those it does not know: log
        # what was put where, no web page, prompts not kept in the machine's memory after their
        # request.
        ours = {
            "LLAMA_API_KEY": self._api_key,
            "LLAMA_ARG_LOG_VERBOSITY": "4",
            "LLAMA_ARG_UI": "0",
            "LLAMA_ARG_CACHE_RAM": "0",
        }
        return environment() | dict(env or {}) | ours, split

    def _wait_until_ready(self, port, timeout, silent):
        from tqdm.auto import tqdm

        size = size_of(split_parts(self.model_path)) / 1e9
        what = f"llama-server loads {shown(self.model_path.name)} ({size:.2g} GB)"
        # Nothing is drawn in the first second: small models are there by then.
        bar = tqdm(desc=what, delay=1, disable=silent, bar_format="{desc}: {elapsed}", leave=False)
        deadline, pause = time.monotonic() + timeout, 0.01
        with bar, self._watched():
            while True:
                if self._guard.poll() is not None:
                    raise self._death("ended while it loaded the model")
                self.port = port or self._port_from_log()
                if self.port:
                    self.url = f"http://{ports.reached(self.host)}:{self.port}"
                    if self._answers():
                        return
                if not self.port and not free_bytes(self.log.parent):
                    raise logs.no_room(self.log.parent.parent)
                if time.monotonic() > deadline:
                    raise ServerError(
                        f"llama-server did not answer within {timeout:g} s. Give a longer timeout to "
                        f"load_model. Its log ends:\n{self.log_tail()}"
                    )
                time.sleep(pause)
                pause = min(pause * 1.5, 0.25)
                bar.update()

    def _port_from_log(self):
        found = re.search(rb"listening on \S+?:(\d+)\b", self.log.read_bytes())
        return int(found[1]) if found else None

    def _answers(self):
        """Ours, and ready: our key is taken and no key is refused. A server of somebody else's
        fails one of the two."""
        import requests

        def status(key):
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            # One connection each: llama-server shares its port (SO_REUSEPORT)
            with requests.Session() as session:
                session.trust_env = False  # 127.0.0.1 is not behind the proxy of the environment
                return session.get(f"{self.url}/v1/models", headers=headers, timeout=5).status_code

        try:
            return status(self._api_key) == 200 and status(None) == 401 and self.is_running()
        except requests.RequestException:
            return False

    def stop_server(self) -> bool:
        """Stop the server, wait for its end and remove its log; nothing to do is no error. True if
        one was running."""
        with self._lock:
            # A forked child does not stop its parent's server.
            if self._guard is None or self._owner != os.getpid():
                return False
            was_running = self._guard.poll() is None
            guard.stop(self._guard)
            self._last_log = self.log_tail()
            self._end()
            self._guard = None
            self._reset()
            return was_running

    def is_running(self) -> bool:
        process = self._guard  # another thread may stop it meanwhile
        return process is not None and process.poll() is None

    def log_tail(self, characters: int = 3000) -> str:
        """The end of the server's log, also after it was stopped; "" if there is none."""
        try:
            return self.log.read_bytes()[-characters:].decode(errors="replace").strip()
        except (OSError, AttributeError):
            return getattr(self, "_last_log", "")

    def _watched(self, ask=None):
        """A Watch over the server, for as long as something waits for it: `post`, and who reads a
        stream."""
        return Watch(self.pid, self._end_stalled, self._limit, ask)

    def _end_stalled(self, why):
        self._stalled = f"{why}; it was ended, and the next call starts it again"
        kill(self.pid)

    def _death(self, when):
        if self._stalled:
            return ServerError(f"llama-server {self._stalled}. Its log ends:\n{self.log_tail()}")
        return death(when, self._guard.poll(), self.log_tail(20000), self.model_path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop_server()
