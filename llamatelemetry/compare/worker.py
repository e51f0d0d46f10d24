"""The child process of compare_quantizations: a reference and candidates side by side, window by
window.

Started as `python -m llamatelemetry.compare.worker job.json`. It answers on its standard output
with one JSON object a line and leaves one .npz file per candidate. Logits never leave it: they are
read where llama.cpp put them."""

import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ..capture import prediction
from ..capture.finite import check_finite
from ..capture.ggml import Ggml
from ..capture.tokenizer import token_ids, token_piece
from ..errors import NotFiniteError

STEP = 512  # tokens that are decoded at once, llama.cpp's default physical batch; bounds the memory for logits
ROWS = 8  # rows of logits that are reduced at once: the temporaries stay in the cache


class Model:
    """One GGUF file with a context for `parallel` windows of n_ctx tokens, set up as
    llama-perplexity does: attention is fused where llama.cpp can (its default, automatic), which
    captures cannot have. changes: other settings of the context (flash_attn_type=0)."""

    def __init__(self, path, n_ctx, parallel, threads, gpu_layers, **changes):
        import llama_cpp

        self.path, self.lib = path, llama_cpp
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        self.model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
        if not self.model:
            raise ValueError(f"llama.cpp cannot load {path}")
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(self.vocab)
        self.architecture = prediction.architecture(llama_cpp, self.model)
        what = f"{os.path.basename(path)} (architecture {self.architecture!r})"
        self.why_not = prediction.look(llama_cpp, Ggml(), self.model).why_not(what)
        if self.why_not:  # its logits are no predictions: no context, which an encoder-decoder could not have either
            return
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = n_ctx * parallel, parallel
        params.n_batch = params.n_ubatch = min(STEP, n_ctx) * parallel
        if (
            n_ctx <= STEP
        ):  # logits of the second halves only: half the memory, which is what a large vocabulary needs most
            params.n_outputs_max = parallel * (n_ctx - n_ctx // 2)
        params.n_threads = params.n_threads_batch = threads
        params.swa_full = False
        for name, value in changes.items():
            setattr(params, name, value)
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise ValueError(
                f"llama.cpp cannot make a context of {n_ctx * parallel} tokens for {path}: out of memory?"
            )
        self.batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)

    def tokenize(self, text):
        return np.array(token_ids(self.lib, self.vocab, text, parse_special=False), dtype=np.int32)

    def piece(self, token):
        return token_piece(self.lib, self.vocab, token)

    def bos(self):
        """The token that opens every window, or None where the model has none."""
        return (
            self.lib.llama_vocab_bos(self.vocab)
            if self.lib.llama_vocab_get_add_bos(self.vocab)
            else None
        )

    def identity(self):
        """Architecture and vocabulary: two files can be compared where these are equal."""
        return self.architecture, [
            self.lib.llama_vocab_get_text(self.vocab, i) for i in range(self.n_vocab)
        ]

    def clear(self):
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def logits(self, tokens, start, first):
        """Decode tokens (window, step) at positions start...; logits of positions >= first, (row,
        vocab), by window.

        A view of llama.cpp's own buffer: valid until this model decodes again.
        """
        batch, n = self.batch, 0
        for sequence, row in enumerate(tokens):
            for position, token in enumerate(row, start):
                batch.token[n], batch.pos[n], batch.n_seq_id[n] = int(token), position, 1
                batch.seq_id[n][0], batch.logits[n] = sequence, position >= first
                n += 1
        batch.n_tokens = n
        if code := self.lib.llama_decode(self.context, batch):
            raise ValueError(f"llama_decode returned {code} for {self.path}")
        rows = len(tokens) * max(0, start + tokens.shape[1] - max(start, first))
        if not rows:
            return np.empty((0, self.n_vocab), np.float32)
        found = np.ctypeslib.as_array(
            self.lib.llama_get_logits(self.context), shape=(rows, self.n_vocab)
        )
        return check_finite(found, "logits", file=os.path.basename(self.path))


def windows(tokens, n_ctx, limit=None):
    """tokens (n,) as whole windows (window, n_ctx); what does not fill one is left out."""
    n = len(tokens) // n_ctx
    return tokens[: n * n_ctx].reshape(n, n_ctx)[:limit]


def compare(reference, candidates, texts, tell, threads):
    """Per-token columns of every candidate over windows (window, n_ctx) of ids: {path: columns},
    {path: error}."""
    from .quality import Reference

    n_ctx = texts.shape[1]
    first, bos = n_ctx // 2, reference.bos()
    parallel, step = max(1, STEP // n_ctx), min(STEP, n_ctx)
    parts, failed = {model.path: [] for model in candidates}, {}
    with ThreadPoolExecutor(threads) as pool:
        for begin in range(0, len(texts), parallel):
            some = texts[begin : begin + parallel].copy()  # (window, n_ctx)
            given = some.copy()
            if bos is not None:
                given[:, 0] = bos
            for model in (reference, *candidates):
                model.clear()
            for start in range(0, n_ctx, step):
                # Rows of logits are by window, then by position; the last position has nothing to
                # be scored against.
                at = np.arange(max(start, first), min(start + step, n_ctx))
                base = reference.logits(given[:, start : start + step], start, first).reshape(
                    len(some), len(at), reference.n_vocab
                )
                keep = at < n_ctx - 1
                rows = [(w, i) for w in range(len(some)) for i in range(0, keep.sum(), ROWS)]
                piece = [(w, slice(i, min(i + ROWS, int(keep.sum())))) for w, i in rows]
                bases = list(
                    pool.map(lambda p: Reference(base[p[0], p[1]], some[p[0], at[p[1]] + 1]), piece)
                )
                where = {
                    "window": np.concatenate(
                        [[begin + w] * len(at[s]) for w, s in piece] or [[]]
                    ).astype(int),
                    "position": np.concatenate([at[s] + 1 for _, s in piece] or [[]]).astype(int),
                    "id": np.concatenate([some[w, at[s] + 1] for w, s in piece] or [[]]).astype(
                        int
                    ),
                }
                for model in candidates:
                    if model.path in failed:
                        continue
                    try:
                        own = model.logits(given[:, start : start + step], start, first).reshape(
                            base.shape
                        )
                    except ValueError as error:  # NotFiniteError is one, too
                        failed[model.path] = str(error)
                        continue
                    found = list(pool.map(lambda r, p: r.compare(own[p[0], p[1]]), bases, piece))
                    if found:
                        parts[model.path].append(
                            where | {k: np.concatenate([f[k] for f in found]) for k in found[0]}
                        )
            tell(windows=begin + len(some), of=len(texts))
    columns = {
        path: {k: np.concatenate([part[k] for part in some]) for k in some[0]}
        for path, some in parts.items()
        if path not in failed
    }
    return columns, failed


def quiet():
    """Leave only llama.cpp's warnings and errors in the log: its last lines are what a user gets to
    read."""
    import llama_cpp

    @llama_cpp.llama_log_callback
    def write(level, text, _):
        if level in (3, 4):  # warning, error
            sys.stderr.write(text.decode("utf-8", "replace"))
            sys.stderr.flush()

    quiet.callback = write  # llama.cpp holds no reference
    llama_cpp.llama_log_set(write, None)


def main(job, tell):
    threads = job["threads"]
    parallel = max(1, STEP // job["n_ctx"])
    settings = (job["n_ctx"], parallel, threads, job["gpu_layers"])
    try:
        reference = Model(job["reference"], *settings)
    except ValueError as error:
        return tell(fatal="reference", why=str(error))
    if reference.why_not:
        return tell(fatal="prediction", why=reference.why_not)
    texts = windows(reference.tokenize(job["text"]), job["n_ctx"], job["max_windows"])
    n_tokens = len(reference.tokenize(job["text"])) if not len(texts) else None
    if not len(texts):
        return tell(
            fatal="text", why=f"the text has {n_tokens} tokens and a window needs {job['n_ctx']}"
        )
    candidates, identity = [], reference.identity()
    for path in job["candidates"]:
        tell(loading=path)
        try:
            model = Model(path, *settings)
        except ValueError as error:
            tell(failed=path, why=str(error), kind="load")
            continue
        architecture, vocabulary = model.identity()
        if architecture != identity[0]:
            tell(
                failed=path,
                why=f"its architecture is {architecture}, the reference's {identity[0]}",
                kind="other",
            )
        elif vocabulary != identity[1]:
            n = sum(a != b for a, b in zip(vocabulary, identity[1])) + abs(
                len(vocabulary) - len(identity[1])
            )
            tell(
                failed=path,
                why=f"its vocabulary differs from the reference's in {n} tokens",
                kind="other",
            )
        elif model.why_not:
            tell(failed=path, why=model.why_not, kind="other")
        else:
            candidates.append(model)
    tell(loading=None)
    if not candidates:
        return None
    try:
        columns, failed = compare(reference, candidates, texts, tell, threads)
    except NotFiniteError as error:  # of the reference: a candidate's are kept by compare
        return tell(fatal="prediction", why=str(error))
    for path, why in failed.items():
        tell(failed=path, why=why, kind="load")
    ids = np.unique(texts)
    pieces = {int(token): reference.piece(int(token)).hex() for token in ids}
    for path, values in columns.items():
        tops = np.unique(np.concatenate([values["top"], values["top_base"]]))
        pieces |= {
            int(token): reference.piece(int(token)).hex()
            for token in tops
            if int(token) not in pieces
        }
        name = os.path.join(job["folder"], f"{job['candidates'].index(path)}.npz")
        np.savez(name, **values)
        tell(done=path, file=name)
    return tell(pieces=pieces)


if __name__ == "__main__":
    # Answers go to the standard output as it was; whatever llama.cpp prints goes to the log.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(**fields):
        print(json.dumps(fields), file=answers, flush=True)

    def end_with_parent():
        os.read(0, 1)  # nothing is ever sent: this returns when the parent is gone
        os._exit(1)

    quiet()
    threading.Thread(target=end_with_parent, daemon=True).start()
    with open(sys.argv[1], encoding="utf-8") as file:
        main(json.load(file), tell)
    answers.flush()
    os._exit(0)  # the models are the system's to take back
