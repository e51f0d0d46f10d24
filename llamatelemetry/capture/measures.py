"""What is reduced where it is computed: losses of a text under edits, and statistics of every head's attention."""

import numpy as np

from ..errors import CaptureError

ROWS = 64  # logits rows worked on at a time: bounded memory for vocabularies of 262 thousand
KEEP_LIMIT = 4 * 2**30  # bytes of log-probabilities kept for KL divergences


def log_softmax(logits):
    """(row, vocab) natural log-probabilities, float32."""
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
        """Loss (mean nats per token), and against a baseline Score: its change, mean KL, same best token."""
        loss = -float(self.columns["logprob"][:-1].mean())
        row = {"loss": loss}
        if base is not None:
            row["loss_change"] = loss - base.summary()["loss"]
            row["kl"] = float(self.columns["kl"][:-1].mean())
            row["top1_agreement"] = float((self.columns["top_id"] == base.columns["top_id"])[:-1].mean())
        return row


def score(runs, tokens, edits, **options):
    """Run a text with edits and Score it."""
    if len(tokens) < 2:
        raise CaptureError("scoring predicts each token from those before it: give at least two tokens.")
    means = options.pop("means", None) or runs.means_for(tokens, edits)
    result = Score(tokens, **options)
    runs.run(tokens, lambda recorder, plan: runs.apply(recorder, plan, edits, means), on_logits=result)
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

    patterns: {name: (n_token, n_token) weights}; a pattern's score is the sum of attention times weight over the sum
    of attention, which is what TransformerLens's head detector computes with error_measure="mul".
    """

    BLOCK = 2**22  # attention weights worked on at a time

    def __init__(self, tokens, patterns, xp=np):
        self.n, self.xp = len(tokens), xp
        self.patterns = {name: xp.asarray(weights, xp.float32) for name, weights in patterns.items()}
        self.sums = {}  # layer -> {measure: (head,)}
        self.rows = np.zeros(0)

    def action(self, layer):
        def reduce(values, past):
            sums = self.sums.setdefault(layer, {})
            n_head, n_query, _ = values.shape
            block = max(1, self.BLOCK // (n_head * min(self.n, past + n_query)))
            for start in range(0, n_query, block):
                stop = min(start + block, n_query)
                rows = values[:, start:stop, : min(past + stop, self.n)]
                for name, total in self._reduce(rows, past + start).items():
                    sums[name] = sums.get(name, 0) + total

        return reduce

    def _reduce(self, p, first):
        """Sums over the rows of p (head, query, key); the first query is at position `first`."""
        xp = self.xp
        n_query, n_key = p.shape[1:]
        query = xp.arange(first, first + n_query, dtype=xp.float32)
        key = xp.arange(n_key, dtype=xp.float32)
        mass = p.sum(-1)  # (head, query): 1, or less with an attention sink
        log = xp.log(xp.maximum(p, 1e-30))
        entropy = -xp.einsum("hqk,hqk->hq", p, log)
        distance = query * mass - p @ key
        available = xp.log(xp.maximum(query, 1) + 1)
        sums = {
            "mass": mass.sum(-1),
            "entropy": entropy.sum(-1),
            "normalized_entropy": (entropy / available).sum(-1),
            "distance": distance.sum(-1),
            "sink": p[:, :, 0].sum(-1),
            "top": p.max(-1).sum(-1),
        }
        flat = p.reshape(len(p), -1)
        for name, weights in self.patterns.items():
            sums[name] = flat @ weights[first : first + n_query, :n_key].reshape(-1)
        return {name: value.get() if hasattr(value, "get") else value for name, value in sums.items()}

    def table(self):
        """{measure: (layer, head)} and the layers; patterns over the attention's sum, the rest over the rows."""
        layers = sorted(self.sums)
        names = list(self.sums[layers[0]])
        heads = max(len(self.sums[layer]["mass"]) for layer in layers)
        out = {name: np.full((len(layers), heads), np.nan) for name in names}
        for row, layer in enumerate(layers):
            for name in names:
                sums = self.sums[layer]
                total = sums["mass"] if name in self.patterns else self.n
                out[name][row, : len(sums[name])] = sums[name] / total
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
