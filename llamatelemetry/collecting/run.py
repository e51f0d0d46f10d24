"""States of many texts, into a store: what is there already is kept, what is missing is computed
here or by the workers of a cluster."""

import atexit
import os
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..backend.cluster import answer
from ..capture.session import chosen, named_stages
from ..errors import CaptureError, CollectError, shown
from ..files.gguf import GGUFFile
from ..files.scratch import scratch
from ..files.vocabulary import named
from ..gpus.cores import physical_cores
from ..gpus.devices import inference_environment
from .many import check
from .session import CollectSession
from .store import Store, fingerprint, make, open_states
from .texts import blocks, count, rows

if TYPE_CHECKING:
    import xarray as xr
    from distributed import Client

# A block: what is lost when a run is interrupted, and what is in memory.
TEXTS, TEXT_BYTES, STATE_BYTES = 512, 1 << 16, 1 << 26
BYTES_PER_TOKEN = 4  # of a text, about; where a token is one byte, four times STATE_BYTES are held
AHEAD = 2  # blocks per worker of a cluster that are on their way


def collect(
    call: Callable[..., Any],
    model: GGUFFile,
    session: dict[str, Any],
    texts: Any,
    stages: Any,
    layers: Any,
    pool: str | None,
    where: str | os.PathLike | None,
    *,
    labels: Iterable | None,
    too_long: str,
    client: "Client | None",
    progress: bool,
) -> "xr.Dataset":
    """As InferenceEngine.collect. call(method, ...): of the engine's capture session; session: what
    a worker of a cluster makes one of its own with."""
    from tqdm.auto import tqdm

    if too_long not in ("error", "cut"):
        raise CollectError(f"too_long={too_long!r}: it is 'error' or 'cut'.")
    stages = named_stages(stages)
    check(stages, pool)
    request = {"stages": list(stages), "layers": chosen("layers", layers), "pool": pool}
    computed = Local(call) if client is None else Cluster(client, model, session)
    some = rows(texts, labels)
    with make(_place(where)) as store:
        facts = _facts(store, model, session, request | {"too_long": too_long}, computed)
        bar = tqdm(
            desc="texts", unit="text", total=count(texts), disable=not progress, mininterval=0.5
        )
        with computed, bar:
            number = _collect(store, model, some, facts, computed, bar)
        if number < len(store.paths):
            raise CollectError(_other(store, "holds more texts than were given"))
        if not number:
            raise CollectError("No texts were given.")
        return open_states(store.folder)


def _collect(store, model, texts, facts, computed, bar):
    """Blocks of texts into the store; returns how many there are."""
    pending: deque[tuple] = deque()
    request = dict(facts["request"])
    request["cut"] = request.pop("too_long") == "cut"
    number = -1
    for number, (some, last) in enumerate(blocks(texts, *_sizes(facts))):
        if _there(store, number, some):
            bar.update(len(some))
            continue
        pending.append((number, some, last, computed.ask(some, request, bar)))
        while len(pending) >= computed.ahead:
            _keep(store, model, facts, bar, *pending.popleft())
    while pending:
        _keep(store, model, facts, bar, *pending.popleft())
    return number + 1


def _place(where):
    if where is not None:
        if not str(where):
            raise CollectError("where='' is no folder: None is one in scratch, '.' this one.")
        return where
    number = sum(1 for _ in scratch().glob("states-*"))
    return scratch() / f"states-{number}"


def _facts(store, model, session, request, computed):
    """What every block of this run says; CollectError where the store was made otherwise."""
    ours = {
        "request": request,
        "digest": fingerprint(model.path),
        "variant": repr([session.get("variant") or {}, session.get("cache_type")]),
    }
    if not store.facts:
        described = computed.describe(request["stages"], request["layers"])
        names = "name architecture n_layer n_head n_kv_head n_embd n_vocab".split()
        facts = {name: getattr(model, name) for name in names} | {"file": model.path.name}
        layout = described["layout"]
        return ours | {"pool": request["pool"], "model": facts, "layout": layout}
    for name, what in (("digest", "another file"), ("variant", "other adapters or options")):
        if store.facts[name] != ours[name]:
            raise CollectError(
                _other(store, f"was made of {store.facts['model']['file']} with {what}")
            )
    for name, value in request.items():
        if (was := store.facts["request"][name]) != value:
            raise CollectError(_other(store, f"was made with {name}={was!r}, not {value!r}"))
    return {name: store.facts[name] for name in (*ours, "pool", "model", "layout")}


def _other(store, why):
    return f"The store {shown(store.folder)} {why}: give another folder as `where`, or remove it."


def _sizes(facts):
    """(texts, bytes of text) of a block."""
    row = sum(
        4 * len(part["layers"] or [None]) * int(np.prod(part["shape"]))
        for part in facts["layout"].values()
    )
    if facts["pool"]:
        return int(np.clip(STATE_BYTES // row, 1, TEXTS)), TEXT_BYTES
    return TEXTS, int(np.clip(BYTES_PER_TOKEN * STATE_BYTES // row, 1, TEXT_BYTES))


def _there(store: Store, number, given):
    """Whether a block is stored; CollectError where its texts are others. Texts that were added
    after the last one belong to a block that is made again."""
    if number >= len(store.paths):
        store.check(given)
        return False
    stored = store.rows(number)
    if not store.same(number, stored, given):
        wrong = lambda at: not store.same(number, stored, given[: at + 1])  # noqa: E731
        at = bisect_left(range(len(given)), True, key=wrong)
        raise CollectError(
            _other(store, f"has another text, or label, at {at} of its block {number}")
        )
    if len(stored) > len(given):
        raise CollectError(_other(store, "holds more texts than were given"))
    if len(stored) < len(given):
        if number + 1 < len(store.paths):
            raise CollectError(_other(store, f"has fewer texts in its block {number}"))
        store.check(given)
    return len(stored) == len(given)


def _keep(store, model, facts, bar, number, some, last, answer):
    tokens, cut, arrays = answer()
    done = sum(len(ids) for ids in tokens)
    pieces = [named(model.pieces, ids) for ids in tokens]
    store.write(number, some, tokens, pieces, cut, arrays, facts, last)
    bar.set_postfix_str(f"{done:,} tokens in the last block", refresh=False)


class Local:
    """The engine's own session: one block at a time."""

    ahead = 1

    def __init__(self, call):
        self._call = call

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def describe(self, stages, layers):
        return self._call("describe", stages, layers)

    def ask(self, some, request, bar):
        before = bar.n

        def answer():
            texts = [row["text"] for row in some]
            return self._call(
                "collect", texts, hear=lambda done: _move(bar, before + done), **request
            )

        return answer


def _move(bar, to):
    bar.update(to - bar.n)


class Cluster:
    """The workers of a cluster: blocks are shared out, each worker has a session of its own."""

    def __init__(self, client, model, session):
        if not hasattr(client, "nthreads"):
            raise CollectError(f"client is a dask.distributed Client, not {client!r:.80}.")
        hosts = [address.rpartition(":")[0] for address in client.nthreads()] or ["none yet"]
        here = max(map(hosts.count, hosts))
        keep = {name: v for name, v in session.items() if name not in ("env", "tensor_split")}
        keep["threads"] = max(1, physical_cores() // here)
        self._client, self._job = client, (os.urandom(4).hex(), str(model.path), keep)
        self.ahead = AHEAD * len(hosts)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._client.run(release, self._job[0])

    def _submit(self, method, *args, **kwargs):
        return self._client.submit(
            on_worker, self._job, method, *args, **kwargs, pure=False, retries=2
        )

    def describe(self, stages, layers):
        return answer(self._client, self._submit("describe", stages, layers), CollectError)

    def ask(self, some, request, bar):
        future = self._submit("collect", [row["text"] for row in some], **request)

        def given():
            found = answer(self._client, future, CollectError)
            bar.update(len(some))
            return found

        return given


_sessions: dict[str, CollectSession] = {}  # of a cluster's worker


def on_worker(job, method, *args, **kwargs):
    """What a session of this process answers; its arrays are copies that can travel."""
    key, path, settings = job
    if key not in _sessions:
        _sessions[key] = CollectSession(path, env=inference_environment(), **settings)
        atexit.register(release, key)
    try:
        found = getattr(_sessions[key], method)(*args, **kwargs)
    except CaptureError:
        raise
    except Exception:
        release(key)  # the next task starts a new one
        raise
    if method == "describe":
        return found
    tokens, cut, arrays = found
    return tokens, cut, {stage: np.array(values) for stage, values in arrays.items()}


def release(key):
    """End the session of a run that is over."""
    if session := _sessions.pop(key, None):
        session.close()
