"""What is reduced where it is computed: losses of a text under edits, and statistics of every head's attention."""

import numpy as np

from ..errors import CaptureError
from .recorder import on_host

ROWS = 64  # logits rows worked on at a time: bounded memory for vocabularies of 262 thousand
NAMES = ("entropy", "normalized_entropy", "distance", "sink", "top", "previous_token", "duplicate_token", "induction")
KEEP_LIMIT = 4 * 2**30  # bytes of log-probabilities kept for KL divergences


def log_softmax(logits):
    """(row, vocab) natural log-probabilities, float32."""
    logits = np.asarray(logits, dtype=np.float32)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32)


class Score:
    """Per predicted token: logprob of what follows, entropy, rank, best token. on_logits of a run."""

    def __init__(self, tokens, reference=None, keep=False):
        """reference: (token, vocab) log-probabilities to compare with, keep: keep this run's."""
        n = len(tokens)
        self.tokens, self.reference = np.asarray(tokens), reference
        self.columns = {name: np.zeros(n, np.float64) for name in ("logprob", "entropy", "top_logprob", "kl")}
        self.columns |= {name: np.zeros(n, np.int64) for name in ("rank", "top_id")}
        self.kept, self._keep = None, keep

    def __call__(self, logits, past):
        if self._keep and self.kept is None:
            if len(self.tokens) * logits.shape[1] * 4 > KEEP_LIMIT:
                raise CaptureError("this text is too long for KL divergences over this vocabulary: shorten it.")
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
        """Loss (mean nats per token), and against a baseline Score: its change with its standard error over tokens
        (which are not independent), mean KL, same best token."""
        loss = -float(self.columns["logprob"][:-1].mean())
        row = {"loss": loss}
        if base is not None:
            row["loss_change"] = loss - base.summary()["loss"]
            paired = (base.columns["logprob"] - self.columns["logprob"])[:-1]
            row["loss_change_err"] = float(paired.std(ddof=1) / len(paired) ** 0.5) if len(paired) > 1 else float("nan")
            row["kl"] = float(self.columns["kl"][:-1].mean())
            row["top1_agreement"] = float((self.columns["top_id"] == base.columns["top_id"])[:-1].mean())
        return row


def score(runs, tokens, edits, **options):
    """Run a text with edits and Score it."""
    if len(tokens) < 2:
        raise CaptureError("scoring predicts each token from those before it: give at least two tokens.")
    means = options.pop("means", None) or runs.means_for(tokens, edits)
    result = Score(tokens, **options)
    runs.run(tokens, lambda recorder, plan: runs.apply(recorder, plan, edits, len(tokens), means), on_logits=result)
    return result


def sweep(runs, tokens, variants, progress):
    """{name: summary} of every variant (a list of edits) against the run without edits."""
    base = score(runs, tokens, (), keep=True)
    layers = sorted({edit.layer for edits in variants.values() for edit in edits if edit.mean})
    means = runs.means(tokens, layers) if layers else None
    rows = {}
    for number, (name, edits) in enumerate(variants.items()):
        rows[name] = score(runs, tokens, edits, reference=base.kept, means=means).summary(base)
        progress(number + 1, len(variants))
    return base.summary(), rows


class HeadStatistics:
    """Sums over query rows of every head's attention, taken from the tensor where it lies.

    patterns: {name: [(query, key), ...]}; a pattern's score is the attention on those pairs over all attention, which
    is what TransformerLens's head detector computes with error_measure="mul".
    """

    BLOCK = 2**22  # attention weights worked on at a time on the CPU

    def __init__(self, tokens, pairs, device=None):
        if taken := set(pairs) & ({"mass", *NAMES}):
            raise CaptureError(f"pattern {sorted(taken)[0]!r} has the name of a measure: give it another one.")
        self.n, self.tokens, self.device = len(tokens), tokens, device
        self.pairs = {name: np.asarray(value, int).reshape(-1, 2) for name, value in pairs.items()}
        self.sums = {}  # layer -> {measure: (head,)}
        self._detect = None if device else token_patterns(tokens)
        self._on_device = {}  # layer -> (head, measure), fetched once at the end
        self._ids = {}  # CUDA device number -> the tokens there

    def restart(self):
        self.sums.clear()
        self._on_device.clear()

    def action(self, layer):
        def reduce(values, past):
            sums = self.sums.setdefault(layer, {})
            for name, pairs in self.pairs.items():
                here = pairs[(pairs[:, 0] >= past) & (pairs[:, 0] < past + values.shape[1])]
                on_pairs = values[:, here[:, 0] - past, here[:, 1]].sum(-1) if len(here) else np.zeros(len(values))
                sums[name] = sums.get(name, 0) + on_host(on_pairs)
            if isinstance(values, np.ndarray):
                self._on_host(sums, values, past)
            else:
                if values.device.id not in self._ids:
                    self._ids[values.device.id] = self.device.cupy.asarray(self.tokens, np.int32)
                total = self.device.row_sums(values, past, self._ids[values.device.id])
                self._on_device[layer] = self._on_device.get(layer, 0) + total

        return reduce

    def _on_host(self, sums, values, past):
        n_head, n_query, _ = values.shape
        block = max(1, self.BLOCK // (n_head * min(self.n, past + n_query)))
        for start in range(0, n_query, block):
            stop = min(start + block, n_query)
            rows = values[:, start:stop, : min(past + stop, self.n)]
            for name, total in self._rows(rows, past + start).items():
                sums[name] = sums.get(name, 0) + total

    def _rows(self, p, first):
        """Sums over the rows of p (head, query, key); the first query is at position `first`."""
        n_query, n_key = p.shape[1:]
        query = np.arange(first, first + n_query, dtype=np.float32)
        mass = p.sum(-1)  # (head, query): 1, or less with an attention sink
        entropy = -np.einsum("hqk,hqk->hq", p, np.log(np.maximum(p, 1e-30)))
        flat = p.reshape(len(p), -1)
        sums = {
            "mass": mass.sum(-1),
            "entropy": entropy.sum(-1),
            "normalized_entropy": (entropy / np.log(np.maximum(query, 1) + 1)).sum(-1),
            "distance": (query * mass - p @ np.arange(n_key, dtype=np.float32)).sum(-1),
            "sink": p[:, :, 0].sum(-1),
            "top": p.max(-1).sum(-1),
        }
        for name, weights in (self._detect or token_patterns(self.tokens)).items():
            sums[name] = flat @ weights[first : first + n_query, :n_key].reshape(-1)
        return sums

    def table(self):
        """{measure: (layer, head)} and the layers; patterns over the attention's sum, the rest over the rows."""
        from .device import MEASURES

        for layer, totals in self._on_device.items():
            self.sums[layer] |= dict(zip(MEASURES, on_host(totals).T))
        layers = sorted(self.sums)
        heads = max(len(self.sums[layer]["mass"]) for layer in layers)
        patterns = set(self.pairs) | {"previous_token", "duplicate_token", "induction"}
        out = {name: np.full((len(layers), heads), np.nan) for name in self.sums[layers[0]]}
        for row, layer in enumerate(layers):
            for name, values in self.sums[layer].items():
                out[name][row, : len(values)] = values / (self.sums[layer]["mass"] if name in patterns else self.n)
        return out, layers


def token_patterns(tokens):
    """The detection patterns of TransformerLens's head detector (Olsson et al. 2022): {name: (query, key) 0/1}.

    previous_token: the key just before the query. duplicate_token: earlier occurrences of the query's token.
    induction: what followed those occurrences.
    """
    tokens = np.asarray(tokens)
    n = len(tokens)
    duplicate = np.tril(tokens[:, None] == tokens[None, :], -1).astype(np.float32)
    induction = np.zeros_like(duplicate)
    induction[:, 1:] = duplicate[:, :-1]
    return {"previous_token": np.eye(n, k=-1, dtype=np.float32), "duplicate_token": duplicate,
            "induction": np.tril(induction)}  # fmt: skip
