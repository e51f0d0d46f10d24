"""Many texts in one decode: sequences of a batch, each with its own mask, reduced to rows where
they are computed."""

from dataclasses import dataclass
from itertools import chain

import numpy as np

from ..capture.finite import MISSING
from ..capture.ggml import DTYPES
from ..capture.names import STAGES
from ..capture.runs import PLAN_TOKENS
from ..capture.runtime import SEQUENCES
from ..errors import CaptureError

POOLS = ("last", "mean", "max", None)


def check(stages, pool):
    """CaptureError for a stage without a value per token, or that `pool` makes no sense of."""
    if pool not in POOLS:
        raise CaptureError(f"pool={pool!r}: it is 'last', 'mean', 'max' or None.")
    for stage in stages:
        if STAGES[stage].grid:
            raise CaptureError(
                f"stage {stage!r} has a value per pair of positions, not per token: capture() gives it "
                "of one text, head_statistics() its statistics."
            )
        if pool in ("mean", "max") and STAGES[stage].dtype != "float32":
            raise CaptureError(
                f"stage {stage!r} holds numbers of experts, which have no {pool}: pool='last' or None."
            )


def layout(runs, stages, layers):
    """{stage: {layers (None for one without), shape of a row, dtype, uneven}}; from the graph of a
    prompt, the same for all texts."""
    plan, found = runs.plan(list(range(min(PLAN_TOKENS, runs.runtime.n_vocab)))), {}
    for stage in stages:
        kept = runs.layers_of(plan, stage, layers)
        shapes = [runs.taps(plan, stage, layer)[0].shape for layer in kept]
        found[stage] = {
            "layers": kept if STAGES[stage].per_layer else None,
            "shape": [max(sizes) for sizes in zip(*shapes)],
            "dtype": STAGES[stage].dtype,
            "uneven": len(set(shapes)) > 1,
        }
    return found


def longest(runtime):
    """Most tokens that a text may have."""
    return min(runtime.n_ctx_limit, _room(runtime)) if runtime.reads_whole else runtime.n_ctx_limit


def batches(runtime, lengths):
    """Slices of texts of so many tokens, as many in a row as one batch holds; a longer one, and any
    of a model with a recurrent state, is alone."""
    room, start, used = _room(runtime), 0, 0
    alone = [runtime.api.llama_model_is_recurrent, runtime.api.llama_model_is_hybrid]
    most = 1 if any(kind(runtime.model) for kind in alone) else SEQUENCES
    for number, length in enumerate(lengths):
        if number > start and (used + length > room or number - start == most):
            yield slice(start, number)
            start, used = number, 0
        used += length
    if lengths:
        yield slice(start, len(lengths))


def several(lengths):
    """Runs.run's lengths: a text alone may be longer than a batch."""
    return lengths if len(lengths) > 1 else ()


def _room(runtime):
    return min(runtime.n_ubatch, runtime._context_size(runtime.n_ubatch))


def collect(runs, texts, stages, layers, pool, arena, tell):
    """Rows of stages, one per text, or one per token where pool is None, into an arena.

    texts: lists of token ids. arena(n_bytes) gives a buffer. tell(n) after each batch: texts done.
    Returns {stage: layout's facts, offset and shape of (layer, row, ...)}."""
    lengths = list(map(len, texts))
    starts = np.cumsum([0, *(lengths if pool is None else [1] * len(texts))]).tolist()
    parts, n_bytes = layout(runs, stages, layers), 0
    for part in parts.values():
        sizes = (len(part["layers"] or [None]), starts[-1], *part["shape"])
        part |= {"offset": n_bytes, "all": sizes}
        n_bytes += -(-int(np.prod(sizes)) * 4 // 64) * 64
    memory, device = arena(n_bytes), runs.runtime.ggml.device
    cache = {stage: DTYPES.get(kind) for stage, kind in runs.runtime.cache_types.items()}
    arrays = {}
    for stage, part in parts.items():
        array = np.ndarray(part["all"], part["dtype"], memory, part["offset"])
        if part["uneven"]:  # what a layer does not have is not a number
            array.fill(MISSING if array.dtype.kind == "f" else -1)
        arrays[stage] = array
    last = {None, runs.n_layer - 1}  # what only tokens with outputs pass
    last |= {runs.n_layer} if "hidden" in stages else set()
    late = any(STAGES[s].late and last & {*(p["layers"] or [None])} for s, p in parts.items())

    for batch in batches(runs.runtime, lengths):
        some, sizes = texts[batch], lengths[batch]

        def setup(recorder, plan):
            recorder.ends = True  # what comes after the last stage is not computed
            recorder.some = pool == "last"
            for stage, array in arrays.items():
                rounded = cache[stage] if STAGES[stage].cached else None
                for target, layer in zip(array, parts[stage]["layers"] or [None]):
                    rows = target[starts[batch.start] : starts[batch.stop]]  # noqa: B023
                    taps = runs.taps(plan, stage, layer)
                    action = Rows(rows, pool, sizes, len(taps), rounded, device)  # noqa: B023
                    for tap in taps:
                        recorder.on(tap, action)

        every = late and pool != "last"  # else of the last token of each text
        runs.run(list(chain(*some)), setup, all_logits=every, lengths=several(sizes))
        tell(batch.stop)
    return parts


@dataclass
class Rows:
    """Keeps one stage of one layer of a batch: a row per text, or per token where pool is None.

    target: (row, ...) of the batch. lengths: tokens of its texts. taps: how many add up to the
    stage. rounded: the cache's number format; device: for CuPy's values."""

    target: np.ndarray
    pool: str | None
    lengths: list
    taps: int = 1
    rounded: np.dtype | None = None
    device: object = None

    def __post_init__(self):
        self._sum, self._seen = 0, 0

    def __call__(self, values, past):
        if self.pool == "last":
            values = self._ends(values)
        if self.taps > 1:
            self._sum, self._seen = self._sum + values, self._seen + 1
            if self._seen < self.taps:
                return
            values, self._sum, self._seen = self._sum, 0, 0
        if self.rounded:
            values = values.astype(self.rounded)
        rows, values = self._reduced(values, past)
        if not rows.size:
            return
        place = rows[(slice(None), *(slice(size) for size in values.shape[1:]))]
        if past and self.pool in ("mean", "max"):
            if self.device:
                self.device.drain()
                values = values.get() if hasattr(values, "get") else values
            combine = np.add if self.pool == "mean" else np.maximum
            combine(place, values, out=place)
        elif isinstance(values, np.ndarray):
            place[...] = values
        else:
            self.device.to_host(place, values)

    def _ends(self, values):
        """Of each text's last token; of a text that is read in parts, of each part's, the last of
        which stays. The last layer may have gone on with no others."""
        if len(self.lengths) == 1:
            return values[-1:]
        if len(values) == len(self.lengths):
            return values
        return values[np.cumsum(self.lengths) - 1]

    def _reduced(self, values, past):
        """The rows that these tokens, after `past` others of one text, give, and their values."""
        count = len(values)
        if self.pool is None:
            return self.target[past : past + count], values
        if self.pool == "last":
            return self.target, values
        many = len(self.lengths) > 1
        starts = np.cumsum([0, *self.lengths[:-1]]) if many else np.zeros(1, int)
        if self.pool == "max":
            values = values if isinstance(values, np.ndarray) else values.get()
            return self.target, np.maximum.reduceat(values, starts)
        if isinstance(values, np.ndarray):
            sums = np.add.reduceat(values, starts, dtype=np.float64)
            return self.target, sums / np.reshape(self.lengths, (-1, *[1] * (values.ndim - 1)))
        text = np.repeat(np.arange(len(starts)), self.lengths if many else [count])
        weights = (text == np.arange(len(starts))[:, None]) / np.reshape(self.lengths, (-1, 1))
        weights = self.device.cupy.asarray(weights)  # float64: sums lose nothing
        sums = weights @ values.reshape(count, -1).astype(np.float64)
        return self.target, sums.reshape(-1, *values.shape[1:])
