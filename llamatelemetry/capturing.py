"""What an engine asks of the capture worker: tokens, tensors, statistics, losses. And where its
processes are."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

from .errors import WorkerCrashedError
from .gpus.placement import placement, proof
from .imports import uninterrupted
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

    Prompt = str | Sequence[int]
    Edits = Edit | Sequence[Edit | Sequence[Edit]]


class Capturing(Serving):
    """The half of an InferenceEngine that the capture worker answers, on top of what llama-server
    does."""

    def __init__(self, server_path: str | Path | None = None):
        super().__init__(server_path)
        self._session: CaptureSession | None = None
        self._session_args: dict[str, Any] = {}
        self._says = False  # verbose and not silent
        self._session_lock = threading.RLock()  # one capture at a time

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
        positions: Mapping[str, int | Sequence[int]] | None = None,
    ) -> Capture:
        """Run the model over a text (or token ids) and return its tensors, a Capture of the named
        stages.

        text: tokenized with the model's special tokens. stages: see `stages()`. layers: only these
        layers of stages that have layers. queries: only these query positions of attention, scores
        and mask (attention_mean, the mean over heads, has all). positions: {stage: only these token
        or query positions}, for any stage: the logits of a long text's last token are as many times
        smaller than all as it has tokens. edits: changes made while it runs (ablate_head,
        ablate_layer, scale, add, patch, knock_out). generate: decode this many more tokens one by
        one (fewer when the model ends its text), greedily at temperature 0, else drawn with the
        seed; every stage then covers prompt and generated tokens, the former up to the Capture's
        n_prompt. Raises CaptureError for what cannot be done, WorkerCrashedError when llama.cpp
        ended."""
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
            positions=positions,
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
