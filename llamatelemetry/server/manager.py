"""llama-server as something to ask: requests that end when it dies or stalls."""

import time
from collections.abc import Mapping
from typing import Any

from ..errors import LlamaTelemetryError, ServerError
from ..liveness import Watch, stopped
from .failures import refusal
from .process import ServerProcess

STOPPED = (
    "llama-server was stopped during the request, by close() or load_model() elsewhere. Ask again "
    "once a model is loaded."
)


class ServerManager(ServerProcess):
    """One llama-server, owned by this process and dead with it, or once nobody holds this object.

    server_path: llama-server, else where find_server() finds one, at the first start. Attributes
    once started: url, host, port, pid, model_path, log (its log file), offload (what its log says
    about layers on the GPU, "" where it says nothing)."""

    _session = None

    def _reset(self):
        super()._reset()
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def check_server_health(self) -> bool:
        """True if our own process lives and answers to our key."""
        return self.is_running() and self._answers()

    def watched(self) -> Watch:
        """Ends the server where it stalls while the `with` block waits for it: then what waits gets
        a connection that breaks, and `lost` says why. See liveness.Watch; asked is /slots, which
        llama-server answers between two batches."""
        return self._watched(self._turn)

    def _turn(self, timeout=None):
        url, session = self._connection()
        session.get(f"{url}/slots", timeout=(10, timeout))

    def after_interrupt(self) -> None:
        """What an interrupted request leaves: a server that goes on, or, where it says nothing for
        three seconds, none."""
        import requests

        try:
            if not stopped(self.pid):
                return self._turn(3)
        except (requests.RequestException, ServerError):
            pass
        except BaseException:
            self.stop_server()
            raise
        self.stop_server()

    def post(self, path: str, body: Mapping[str, Any], stream: bool = False) -> Any:
        """POST `body` as JSON; returns the answer's JSON, or with stream=True the
        requests.Response.

        Raises ServerError if no server runs, if it dies meanwhile (with the end of its log), or if
        it refuses (with its own message)."""
        import requests

        url, session = self._connection()
        try:
            with self.watched():
                response = session.post(url + path, json=body, stream=stream, timeout=(10, None))
            if response.status_code >= 400:
                raise refusal(response)
            return response if stream else response.json()
        except requests.RequestException as error:
            raise self.lost(error) from error
        except LlamaTelemetryError:
            raise
        except BaseException:  # Ctrl-C: one that stalls is not kept
            self.after_interrupt()
            raise

    def _connection(self):
        """Address and requests.Session of the running server, as they are at one moment."""
        import requests

        with self._lock:
            if self._guard is None:
                raise ServerError(
                    "No llama-server is running. Call load_model(...) or start_server(...) first."
                )
            if self._session is None:
                self._session = requests.Session()
                self._session.trust_env = False
                self._session.headers["Authorization"] = f"Bearer {self._api_key}"
            return self.url, self._session

    def lost(self, error: Exception) -> ServerError:
        """The ServerError for a connection that broke: stopped by another thread, dead, with its
        log, or alive and silent."""
        deadline = time.monotonic() + 2
        while self.is_running() and time.monotonic() < deadline:
            time.sleep(0.02)  # the connection breaks a moment before the process is gone
        with self._lock:
            if self._guard is None:
                return ServerError(STOPPED)
            if self._guard.poll() is not None:
                death = self._death("died during the request")
                return ServerError(f"{death}\nload_model(...) starts it again.")
        return ServerError(f"llama-server (process {self.pid}) did not answer: {error}")
