"""What is reduced where it is computed: losses of a text under edits, and statistics of every
head's attention."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ..errors import CaptureError
from ..maths import log_softmax
from .finite import check_finite
from .recorder import on_host

ROWS = 64  # logits rows worked on at a time: bounded memory for vocabularies of 262 thousand
NAMES = ("entropy", "normalized_entropy", "distance", "sink", "top")
KEEP_LIMIT = 4 * 2**30  # bytes of log-probabilities kept for KL divergences


class Score:
    """Per predicted token: logprob of what follows, entropy, rank, best token. on_logits of a
    run."""

    def __init__(self, tokens, reference=None, keep=False):
        """reference: (token, vocab) log-probabilities to compare with, keep: keep this run's."""
        n = len(tokens)
        self.tokens, self.reference = np.asarray(tokens), reference
        self.columns = {
            name: np.zeros(n, np.float64) for name in ("logprob", "entropy", "top_logprob", "kl")
        }
        self.columns |= {name: np.zeros(n, np.int64) for name in ("rank", "top_id")}
        self.kept, self._keep = None, keep

    def __call__(self, logits, past):
        if self._keep and self.kept is None:
            if len(self.tokens) * logits.shape[1] * 4 > KEEP_LIMIT:
                raise CaptureError(
                    "this text is too long for KL divergences over this vocabulary: shorten it."
                )
            self.kept = np.empty((len(self.tokens), logits.shape[1]), np.float32)
        for start in range(0, len(logits), ROWS):
            self._rows(logits[start : start + ROWS], past + start)

    def _rows(self, logits, first):
        logp = log_softmax(logits)
        p = np.exp(logp)
        place = slice(first, first + len(logp))
        column = self.columns
        column["entropy"][place] = -np.einsum("rv,rv->r", p, logp, dtype=np.float64)
        best = logp.argmax(-1)
        column["top_id"][place] = best
        column["top_logprob"][place] = np.take_along_axis(logp, best[:, None], 1)[:, 0]
        following = self.tokens[first + 1 : first + 1 + len(logp)]
        target = np.take_along_axis(logp[: len(following)], following[:, None], 1)
        column["logprob"][first : first + len(following)] = target[:, 0]
        column["rank"][first : first + len(following)] = (logp[: len(following)] > target).sum(-1)
        if self._keep:
            self.kept[place] = logp
        if self.reference is not None:
            base = self.reference[place]
            column["kl"][place] = np.einsum("rv,rv->r", np.exp(base), base - logp, dtype=np.float64)

    def table(self):
        """Columns over positions 1..n-1: what was predicted for each from everything before it."""
        return {name: values[:-1].tolist() for name, values in self.columns.items()}

    def summary(self, base=None):
        """Loss (mean nats per token), and against a baseline Score: its change with its standard
        error over tokens (which are not independent), mean KL, same best token."""
        loss = -float(self.columns["logprob"][:-1].mean())
        row = {"loss": loss}
        if base is not None:
            row["loss_change"] = loss - base.summary()["loss"]
            paired = (base.columns["logprob"] - self.columns["logprob"])[:-1]
            error = paired.std(ddof=1) / len(paired) ** 0.5 if len(paired) > 1 else np.nan
            row["loss_change_err"] = float(error)
            row["kl"] = float(self.columns["kl"][:-1].mean())
            same = self.columns["top_id"] == base.columns["top_id"]
            row["top1_agreement"] = float(same[:-1].mean())
        return row


def score(runs, tokens, edits, means=None, **options):
    """Run a text with edits and Score it."""
    if len(tokens) < 2:
        raise CaptureError(
            "scoring predicts each token from those before it: give at least two tokens."
        )
    means = runs.means(tokens, edits) if means is None else means
    result = Score(tokens, **options)

    def setup(recorder, plan):
        runs.apply(recorder, plan, edits, len(tokens), means)

    runs.run(tokens, setup, on_logits=result)
    return result


def sweep(runs, tokens, variants, progress):
    """{name: summary} of every variant (a list of edits) against the run without edits."""
    base = score(runs, tokens, (), keep=True)
    means = runs.means(tokens, [edit for edits in variants.values() for edit in edits])
    rows = {}
    for number, (name, edits) in enumerate(variants.items()):
        rows[name] = score(runs, tokens, edits, reference=base.kept, means=means).summary(base)
        progress(number + 1)
    return base.summary(), rows


def predict(runs, tokens, variants, ids, progress):
    """{name: row} of what every variant (a list of edits) says comes after the text:
    log-probabilities of ids, and `before` without the edits.

    What comes before the first position that the edits name is read once, and kept, for the next
    call on these tokens too, if nothing else has run. `before` is read from the same position on,
    because one token's kernels round otherwise than a batch's."""
    last, befores, rows = len(tokens) - 1, {}, {}
    runs.plan(tokens), runs.plan(tokens[:1])  # now: planning empties the context
    means = runs.means(tokens, [edit for edits in variants.values() for edit in edits])
    there, count, steps = runs.kept
    kept = count if (there, steps) == (tokens, runs.runtime.steps) else 0

    def said(edits, past):
        rows = []

        def setup(recorder, plan):
            runs.apply(recorder, plan, edits, len(tokens), means)

        def after(logits, past):
            rows.append(log_softmax(logits[-1:])[0])

        late = runs.late(edits)
        runs.run(tokens, setup, all_logits=late, on_logits=after, past=past, restart=rows.clear)
        return rows[-1]

    first = {name: min([last, *(edit.first for edit in edits)]) for name, edits in variants.items()}
    for number, name in enumerate(sorted(first, key=first.get, reverse=True)):
        past = first[name]
        if past not in befores:
            if past > kept:
                said((), kept)
            befores[past], kept = said((), past), len(tokens)
        before, logp = befores[past], said(variants[name], min(past, kept))
        kept = past
        p = np.exp(before, dtype=np.float64)
        rows[name] = {
            "logprob": logp[ids].tolist(),
            "before": before[ids].tolist(),
            "kl": float((p * (before - logp)).sum()),
            "top_id": int(logp.argmax()),
            "top_logprob": float(logp.max()),
        }
        progress(number + 1)
    runs.kept = list(tokens), kept, runs.runtime.steps
    return rows


class HeadStatistics:
    """Sums over query rows of every head's attention, taken from the tensor where it lies.

    patterns: {name: [(query, key), ...]}; a pattern's score is the attention on those pairs over
    all attention, which is what TransformerLens's head detector computes with error_measure="mul".
    threads: that share the rows of a tensor in the machine's memory."""

    # A thread works on threads * BLOCK weights at a time: few fit its cache, but the more threads
    # there are, the longer NumPy's calls must be, because between two calls a thread waits for
    # Python's lock.
    BLOCK, THREADS = 2**18, 8

    def __init__(self, tokens, pairs, device=None, threads=1):
        if taken := set(pairs) & ({"mass", *NAMES}):
            raise CaptureError(
                f"pattern {sorted(taken)[0]!r} has the name of a measure: give it another one."
            )
        self.n, self.device = len(tokens), device
        self.threads = min(threads, self.THREADS)
        self._pool = ThreadPoolExecutor(self.threads)
        rows = [np.asarray(value, int).reshape(-1, 2) for value in pairs.values()]
        found = np.vstack([np.empty((0, 2), int), *rows])
        # of the pattern that a pair belongs to
        number = np.repeat(np.arange(len(rows)), [len(some) for some in rows])
        order = found[:, 0].argsort(kind="stable")
        self.patterns = list(pairs)
        self._pairs = (*found[order].T, number[order])  # query, key, pattern
        # What this text has no pair of positions for: attention to nothing is no 0.
        self._absent = {name for name, some in zip(self.patterns, rows) if not len(some)}
        self._absent |= {"normalized_entropy"} if self.n < 2 else set()
        self.sums = {}  # layer -> {measure: (head,)}, "patterns": (head, pattern)
        # layer -> [(head, measure), (head, pattern) if there are any], fetched once at the end
        self._on_device = {}

    def restart(self):
        self.sums.clear()
        self._on_device.clear()

    def action(self, layer):
        def reduce(values, past):
            if isinstance(values, np.ndarray):
                self._add(self.sums.setdefault(layer, {}), self._on_host(values, past))
                return
            found = [self.device.row_sums(values, past)]
            if self.patterns:
                here = self._here(past, values.shape[1])
                found.append(self.device.pair_sums(values, *here, len(self.patterns)))
            before = self._on_device.get(layer)
            self._on_device[layer] = [a + b for a, b in zip(before, found)] if before else found

        return reduce

    @staticmethod
    def _add(sums, parts):
        for part in parts:
            for name, total in part.items():
                sums[name] = sums.get(name, 0) + total.astype(np.float64)

    def _here(self, first, count):
        """(row, key, pattern) of the pairs whose queries are the `count` rows from position
        `first`."""
        some = slice(*np.searchsorted(self._pairs[0], (first, first + count)))
        query, key, pattern = (part[some] for part in self._pairs)
        return query - first, key, pattern

    def _on_host(self, values, past):
        """Sums of a tensor's rows, one dict per thread."""
        n_head, n_query, _ = values.shape
        rows = max(1, self.threads * self.BLOCK // (n_head * min(self.n, past + n_query)))
        starts = range(0, n_query, rows)
        count = min(self.threads, len(starts))

        # Its own rows to each: handing them out block by block costs more than the arithmetic.
        def share(number):
            sums, logs = {}, np.empty(n_head * rows * min(self.n, past + n_query), np.float32)
            for start in starts[number::count]:
                stop = min(start + rows, n_query)
                block = values[:, start:stop, : min(past + stop, self.n)]
                self._add(sums, [self._rows(block, past + start, logs)])
            return sums

        return list(self._pool.map(share, range(count)))

    def _rows(self, p, first, logs):
        """Sums over the rows of p (head, query, key); the first query is at position `first`. logs:
        room for a copy."""
        n_query, n_key = p.shape[1:]
        query, key = np.arange(first, first + n_query), np.arange(n_key)
        row, column, pattern = self._here(first, n_query)
        logs = np.maximum(p, np.float32(1e-30), out=logs[: p.size].reshape(p.shape))
        np.log(logs, out=logs)
        mass = p.sum(-1)  # (head, query): 1, or less with an attention sink
        entropy = -np.einsum("hqk,hqk->hq", p, logs)
        return {
            "mass": mass.sum(-1),
            "entropy": entropy.sum(-1),
            "normalized_entropy": (entropy / np.log(np.maximum(query, 1) + 1)).sum(-1),
            "distance": (query * mass - np.einsum("hqk,k->hq", p, key.astype(np.float32))).sum(-1),
            "sink": p[:, :, 0].sum(-1),
            "top": p.max(-1).sum(-1),
            "patterns": np.stack(
                [np.bincount(pattern, weights, len(self.patterns)) for weights in p[:, row, column]]
            ),
        }

    def table(self):
        """{measure: (layer, head)} and the layers; patterns over the attention's sum, the rest over
        the rows. NotFiniteError where attention is no number."""
        from .device import MEASURES

        sums = dict(self.sums)
        for layer, (rows, *pairs) in self._on_device.items():
            pairs = on_host(pairs[0]) if pairs else np.empty((len(rows), 0))
            sums[layer] = dict(zip(MEASURES, on_host(rows).T)) | {"patterns": pairs}
        layers = sorted(sums)
        heads = max(len(sums[layer]["mass"]) for layer in layers)
        names = ("mass", *NAMES, *self.patterns)
        out = {name: np.full((len(layers), heads), np.nan) for name in names}
        for place, layer in enumerate(layers):
            check_finite(sums[layer]["mass"], "attention", layer)
            found = sums[layer] | dict(zip(self.patterns, sums[layer]["patterns"].T))
            for name in out.keys() - self._absent:
                whole = found["mass"] if name in self.patterns else self.n
                out[name][place, : len(found[name])] = found[name] / whole
        return out, layers
