"""llama-server: find it, start it, watch it, stop it. It listens on this machine only, with a key
of its own."""

import atexit
import os
import re
import secrets
import shutil
import signal
import socket
import tempfile
import time
import weakref
from pathlib import Path

from .. import logs
from ..errors import ModelLoadError, ModelNotFoundError, ServerError, TemplateError, shown
from ..files.outputs import path_of
from ..files.programs import find_program, is_program
from ..gpus.cores import physical_cores
from ..options import environment, flags, pooling_of
from . import guard

_MEND = (
    "`llamatelemetry engine build` makes an engine wheel with llama-server in it; "
    "or set LLAMA_SERVER_PATH to a llama-server of your own."
)


def find_server(path=None):
    """Path of llama-server: the argument, LLAMA_SERVER_PATH, beside the installed engine, PATH;
    ServerError if none.

    A path that was given but is not an executable file is an error, never passed over.
    """
    for given, whose in (
        (path, "server_path"),
        (os.environ.get("LLAMA_SERVER_PATH"), "LLAMA_SERVER_PATH"),
    ):
        if given:
            file = path_of(given, ServerError)
            file = file / "llama-server" if file.is_dir() else file
            if not is_program(file):
                raise ServerError(
                    f"{whose} says {given}, but there is no executable llama-server. {_MEND}"
                )
            return file.resolve()
    if found := find_program("llama-server"):
        return found
    raise ServerError(
        "No llama-server: not in LLAMA_SERVER_PATH, not beside the installed engine, not on PATH. "
        + _MEND
    )


class ServerManager:
    """One llama-server, owned by this process and dead with it.

    server_path: llama-server, else where find_server() finds one, at the first start. Attributes
    once started: url, host, port, pid, model_path, log (its log file), offload (what its log says
    about layers on the GPU, "" where it says nothing)."""

    def __init__(self, server_path=None):
        self.server_path = find_server(server_path) if server_path else None
        self._api_key = secrets.token_urlsafe(24)
        self._guard = self._session = None
        self._reset()

    def _reset(self):
        self.url = self.port = self.pid = self.model_path = self.host = None
        self.offload = ""
        self.sound = False  # whether its log-probabilities were seen to be numbers

    # ---- life

    def start_server(
        self,
        model_path,
        host="127.0.0.1",
        port=None,
        gpu_layers=None,
        ctx_size=None,
        n_parallel=1,
        tensor_split=None,
        threads=None,
        embeddings=False,
        timeout=600.0,
        verbose=True,
        silent=False,
        env=None,
        **server_kwargs,
    ):
        """Start llama-server and wait until it answers; a server that this object already runs is
        stopped first.

        port: None takes a free one. gpu_layers: None lets llama.cpp fit as many as the GPU holds,
        -1 is all. ctx_size: tokens each of the n_parallel requests may use; None is what the model
        was trained for. tensor_split: "1.0,0.0" makes only GPU 0 visible, "0.5,0.5" spreads the
        weights (llamatelemetry.gpus.devices). threads: None is physical_cores(). embeddings: also
        answer POST /embeddings, pooled as the file says (by the mean where it says nothing) unless
        server_kwargs has `pooling`. timeout: seconds to wait for the model. verbose: one line when
        it is ready; silent: no line and no progress. env: extra environment. server_kwargs:
        llama-server's other flags; LLAMA_ARG_* of the environment and llama.cpp's config.ini are
        not read.

        Raises ServerError (no llama-server, port in use, it ended or did not answer in time),
        ModelNotFoundError and ModelLoadError (llama.cpp cannot load that file)."""
        from ..files.gguf import GGUFFile

        model_path = path_of(model_path, ModelNotFoundError)
        if not model_path.is_file():
            kind = "is a folder, not" if model_path.is_dir() else "is not"
            raise (ModelLoadError if model_path.is_dir() else ModelNotFoundError)(
                f"{model_path} {kind} a GGUF file."
            )
        self.stop_server()
        binary = self.server_path = self.server_path or find_server()
        if port:
            _refuse_port_in_use(host, port)
        pooling = server_kwargs.pop("pooling", None) or (
            embeddings and pooling_of(GGUFFile(model_path))
        )
        variables, split = self._environment(env, tensor_split)
        folder = Path(tempfile.mkdtemp(prefix="llamatelemetry-server-"))
        self.log = folder / "llama-server.log"
        command = [
            binary,
            "--model",
            model_path,
            "--host",
            host,
            "--port",
            port or 0,
            "--parallel",
            n_parallel,
            "--threads",
            threads or physical_cores(),
        ]
        options = {
            "ctx_size": ctx_size and ctx_size * n_parallel,
            "tensor_split": split,
            "n_gpu_layers": "all" if gpu_layers is not None and gpu_layers < 0 else gpu_layers,
        }
        if embeddings:
            options |= {"embeddings": True, "pooling": pooling}
        # It answers with its model's name, in JSON, which is UTF-8
        if shown(model_path) != str(model_path):
            options["alias"] = shown(model_path.stem)
        started = time.monotonic()
        try:
            with open(self.log, "wb") as log:
                self._guard, self.pid = guard.popen(
                    [*command, *flags(options | server_kwargs)], log, env=variables, folder=folder
                )
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise ServerError(f"{binary} cannot be executed: {error.strerror}. {_MEND}") from error
        self._owner = os.getpid()
        _running.add(self)
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
        from ..gpus import devices

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

        size = self.model_path.stat().st_size / 1e9
        # Nothing is drawn in the first second: small models are there by then.
        bar = tqdm(
            desc=f"llama-server loads {shown(self.model_path.name)} ({size:.2g} GB)",
            delay=1,
            disable=silent,
            bar_format="{desc}: {elapsed}",
            leave=False,
        )
        deadline, pause = time.monotonic() + timeout, 0.01
        with bar:
            while True:
                if self._guard.poll() is not None:
                    raise self._death("ended while it loaded the model")
                self.port = port or self._port_from_log()
                if self.port:
                    host = f"[{self.host}]" if ":" in self.host else self.host
                    host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
                    self.url = f"http://{host}:{self.port}"
                    if self._answers():
                        return
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
            return (
                status(self._api_key) == 200 and status(None) == 401 and self._guard.poll() is None
            )
        except requests.RequestException:
            return False

    def stop_server(self):
        """Stop the server, wait for its end and remove its log; nothing to do is no error. True if
        one was running."""
        # A forked child does not stop its parent's server
        if self._guard is None or self._owner != os.getpid():
            return False
        was_running = self._guard.poll() is None
        guard.stop(self._guard)
        self._guard = None
        _running.discard(self)
        if self._session is not None:
            self._session.close()
            self._session = None
        self._last_log = self.log_tail()
        shutil.rmtree(self.log.parent, ignore_errors=True)
        self._reset()
        return was_running

    def check_server_health(self):
        """True if our own process lives and answers to our key."""
        return self.is_running() and self._answers()

    def is_running(self):
        return self._guard is not None and self._guard.poll() is None

    def log_tail(self, characters=3000):
        """The end of the server's log, also after it was stopped; "" if there is none."""
        try:
            return self.log.read_bytes()[-characters:].decode(errors="replace").strip()
        except (OSError, AttributeError):
            return getattr(self, "_last_log", "")

    def _death(self, when):
        code = self._guard.poll()
        log = self.log_tail(20000)
        how = (
            f"signal {signal.Signals(code - 128).name}"
            if code and 128 < code < 160
            else f"exit code {code}"
        )
        why = logs.reason(log, killed=bool(code and code > 128))
        tail = f"{why and f'It says: {why}. '}Its log ends:\n{logs.last_words(log, 40)[-3000:]}"
        if "couldn't bind HTTP server socket" in log:
            return ServerError(
                f"llama-server cannot listen there: the port is in use or the host is not this "
                f"machine's. Leave port=None for a free one. {tail}"
            )
        if (
            "chat template parsing error" in log
            or "the supplied chat template is not supported" in log
        ):
            return _template_error(log, self.model_path)
        unknown = re.search(r"unknown model architecture: '([^']*)'", log)
        if unknown:
            return ModelLoadError(
                f"This llama.cpp does not know the architecture {unknown[1]!r} of {self.model_path}. "
                "A newer engine may; else choose another model."
            )
        if re.search(r"out of memory|failed to allocate|unable to allocate|cudaMalloc failed", log):
            return ModelLoadError(
                f"{self.model_path.name} does not fit in memory. Choose a smaller quantization, a "
                f"smaller ctx_size, fewer gpu_layers, or auto_start=False. {tail}"
            )
        if "failed to load model" in log or "error loading model" in log:
            return ModelLoadError(f"llama.cpp cannot load {self.model_path} ({how}). {tail}")
        return ServerError(f"llama-server {when} ({how}). {tail}")

    # ---- requests

    def post(self, path, body, stream=False):
        """POST `body` as JSON; returns the answer's JSON, or with stream=True the
        requests.Response.

        Raises ServerError if no server runs, if it dies meanwhile (with the end of its log), or if
        it refuses (with its own message)."""
        import requests

        if self._guard is None:
            raise ServerError(
                "No llama-server is running. Call load_model(...) or start_server(...) first."
            )
        if self._session is None:
            self._session = requests.Session()
            self._session.trust_env = False
            self._session.headers["Authorization"] = f"Bearer {self._api_key}"
        try:
            response = self._session.post(
                self.url + path, json=body, stream=stream, timeout=(10, None)
            )
            if response.status_code >= 400:
                raise self._refusal(response)
            return response if stream else response.json()
        except requests.RequestException as error:
            raise self.lost(error) from error

    def lost(self, error):
        """The ServerError for a connection that broke: dead, with its log, or alive and silent."""
        deadline = time.monotonic() + 2
        while self.is_running() and time.monotonic() < deadline:
            time.sleep(0.02)  # the connection breaks a moment before the process is gone
        if self._guard is not None and self._guard.poll() is not None:
            death = self._death("died during the request")
            return ServerError(f"{death}\nload_model(...) starts it again.")
        return ServerError(f"llama-server (process {self.pid}) did not answer: {error}")

    @staticmethod
    def _refusal(response):
        try:
            error = response.json()["error"]
        except (ValueError, KeyError, TypeError):
            error = {"message": response.text[:500]}
        if error.get("type") == "exceed_context_size_error":
            counts = ""
            if "n_prompt_tokens" in error:
                counts = (
                    f" ({error['n_prompt_tokens']} tokens, the context holds {error.get('n_ctx')})"
                )
            return ServerError(
                f"The prompt is longer than the context{counts}. Shorten it, or load the model with a "
                "larger ctx_size."
            )
        mend = ""
        if "physical batch size" in str(error.get("message")):
            mend = " Shorten the text, or load the model with larger ubatch_size and batch_size."
        return ServerError(
            f"llama-server refused the request ({response.status_code}): {error.get('message')}.{mend}"
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop_server()


def _template_error(log, model_path):
    given = "the supplied chat template" in log
    whose = "chat template that was given" if given else f"chat template of {shown(model_path)}"
    forms = (
        r"_init: error: (.*)",
        r"chat template parsing error: (.*)",
        r"failed to apply template: (.*)",
    )
    found = filter(None, (re.search(form, log) for form in forms))
    why = next((f" ({said[1].strip().rstrip(':')})" for said in found), "")
    return TemplateError(
        f"llama-server cannot parse the {whose}{why}. Give one with load_model(..., "
        'chat_template="chatml"), the name of another that llama.cpp knows or a text in Jinja; infer '
        "uses none."
    )


def _refuse_port_in_use(host, port):
    # llama-server listens with SO_REUSEPORT, so a second one of the same user would silently share
    # the port.
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            # Closed connections do not count
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except (OSError, OverflowError) as error:
        raise ServerError(
            f"Port {port} on {host} is in use or not to be had ({error}). Leave port=None for a free "
            "one."
        ) from error


_running = weakref.WeakSet()


@atexit.register
def _stop_all():
    for manager in list(_running):
        manager.stop_server()
