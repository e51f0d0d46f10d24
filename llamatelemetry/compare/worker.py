"""The child process of compare_quantizations: a reference and candidates side by side, window by
window, each a capture's Runtime. Logits never leave it: they are read where llama.cpp put them."""

import copy
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np

from ..capture.prediction import Prediction
from ..capture.runtime import ERROR, WARNING, Runtime, log_levels
from ..child import serve
from ..errors import CompareError, ModelLoadError, NotFiniteError
from ..files.scratch import ScratchFile
from .quality import ROWS, Reference
from .vocabulary import Vocabulary, differs, identity, opening

# Tokens that are decoded at once, llama.cpp's default physical batch: bounds the memory for logits.
STEP = 512


def open_model(path, n_ctx, parallel, threads, gpu_layers, tensor_split=None, **changes):
    """A Runtime with a context (`ready`). A model whose logits are no predictions gets none: an
    encoder-decoder could not have one."""
    model = Runtime(path, threads=threads, gpu_layers=gpu_layers, tensor_split=tensor_split)
    model.key, model.windows = path, np.inf
    return model if why_not(model) else ready(model, n_ctx, parallel, **changes)


def ready(model, n_ctx, parallel, **changes):
    """A Runtime with a context for `parallel` windows of n_ctx tokens, set up as llama-perplexity
    does: attention is fused where llama.cpp can (its default, automatic), which captures cannot
    have. changes: other settings of the context (flash_attn_type=0)."""
    batch = min(STEP, n_ctx) * parallel
    settings = {"n_ctx": n_ctx * parallel, "n_seq_max": parallel, "swa_full": False}
    settings |= {"n_batch": batch, "n_ubatch": batch}
    if n_ctx <= STEP:  # of the second halves only: half of what a large vocabulary needs most
        settings["n_outputs_max"] = parallel * (n_ctx - n_ctx // 2)
    model.make_context(**settings | changes)
    return model


def again(model, key, windows):
    """The same weights once more, for a context of their own that reads so many windows."""
    other = copy.copy(model)
    other.key, other.windows, other.context, other.n_ctx = key, windows, None, 0
    return other


def why_not(model):
    """Why a Runtime's logits are no predictions; None where they are."""
    return model.predicts.why_not(model.name)


def token_ids(model, text, special=False):
    """(n,) ids of a text. special: special tokens that are written out in it are those tokens."""
    return np.array(model.tokenize(text, parse_special=special), dtype=np.int32)


def window_logits(model, tokens, start, first):
    """Decode tokens (window, step) at positions start...; logits of positions >= first, (row,
    vocab), by window: a view of llama.cpp's own buffer, valid until this model decodes again."""
    model.decode(tokens, start, first)
    rows = len(tokens) * max(0, start + tokens.shape[1] - max(start, first))
    return model.logits(rows) if rows else np.empty((0, model.n_vocab), np.float32)


def windows(tokens, n_ctx, limit=None):
    """tokens (n,) as whole windows (window, n_ctx); what does not fill one is left out."""
    n = len(tokens) // n_ctx
    return tokens[: n * n_ctx].reshape(n, n_ctx)[:limit]


class Kept:
    """A reference's logits over all windows, in a file, made unless it is there: the model can go
    before a candidate comes. Read in the order in which they were made, as a Runtime makes them.
    file: the one at `path`, open, where it is there."""

    def __init__(self, model, texts, path, tell, file=None):
        self.n_vocab = model.n_vocab
        if file is None:
            with open(f"{path}.part", "wb") as made:
                for _, some, start in _steps(texts):
                    if start == 0:
                        model.clear()
                    given, first = _given(some, start, opening(model)), texts.shape[1] // 2
                    window_logits(model, given, start, first).tofile(made)
                    tell(len(some) if start + STEP >= texts.shape[1] else 0)
            os.replace(f"{path}.part", path)
            file = open(path, "rb")
        self._file = file  # it is read to its end, also where its name goes meanwhile
        self.rewind()

    def rewind(self):
        self.at = 0

    def clear(self):
        """A Runtime forgets its tokens here."""

    def decode(self, tokens, past, first):
        """A Runtime computes here."""

    def logits(self, count):
        # What is mapped counts as memory: a step's rows at a time.
        shape, offset = (count, self.n_vocab), self.at
        self.at += 4 * count * self.n_vocab
        return np.memmap(self._file, np.float32, "r", offset, shape)


def _steps(texts):
    """(first window, windows, first position) of what is decoded at once."""
    n_ctx = texts.shape[1]
    parallel = max(1, STEP // n_ctx)
    for begin in range(0, len(texts), parallel):
        for start in range(0, n_ctx, STEP):
            yield begin, texts[begin : begin + parallel], start


def _given(some, start, bos):
    """The tokens of one step (window, token), each window opened by `bos` where there is one."""
    given = some[:, start : start + STEP].copy()
    if bos is not None and start == 0:
        given[:, 0] = bos
    return given


def compare(reference, candidates, texts, bos, tell, threads):
    """Per-token columns of every candidate over windows (window, n_ctx) of ids: {key: columns},
    {key: error}. tell(n): n more windows are done."""
    parts, failed = {model.key: [] for model in candidates}, {}
    with ThreadPoolExecutor(threads) as pool:
        for begin, some, start in _steps(texts):
            for model in (reference, *candidates) if start == 0 else ():
                model.clear()
            going = [m for m in candidates if m.key not in failed and begin < m.windows]
            for key, columns in _step(reference, going, some, begin, start, bos, failed, pool):
                columns["window"] += begin
                parts[key].append(columns)
            tell(len(some) if start + STEP >= texts.shape[1] else 0)
    columns = {
        key: {name: np.concatenate([part[name] for part in some]) for name in some[0]}
        for key, some in parts.items()
        if key not in failed
    }
    return columns, failed


def _step(reference, candidates, texts, begin, start, bos, failed, pool):
    """Yields (key, columns) of the candidates over positions start... of all windows, `begin` the
    first of them, or as many as one is to read; why one cannot go on is put into `failed`."""
    n_windows, n_ctx = texts.shape
    given, first = _given(texts, start, bos), n_ctx // 2
    at = np.arange(max(start, first), start + given.shape[1])  # rows of logits: by window, then at
    at_scored = at[at < n_ctx - 1] + 1  # the last position has nothing to be scored against
    shape = (n_windows, len(at), reference.n_vocab)
    base = window_logits(reference, given, start, first).reshape(shape)
    blocks = [
        (window, slice(row, min(row + ROWS, len(at_scored))))
        for window in range(n_windows)
        for row in range(0, len(at_scored), ROWS)
    ]
    references = list(pool.map(lambda b: Reference(base[b], texts[b[0], at_scored[b[1]]]), blocks))
    for model in candidates:
        n = int(min(n_windows, model.windows - begin))
        try:
            own = window_logits(model, given[:n], start, first).reshape(n, *shape[1:])
        except ValueError as error:  # CaptureError is one
            failed[model.key] = str(error)
            continue
        mine = blocks[: n * (len(blocks) // n_windows)]
        found = list(pool.map(lambda r, b, own=own: r.compare(own[b]), references, mine))
        if found:
            yield (
                model.key,
                {
                    "window": np.repeat(np.arange(n), len(at_scored)),
                    "position": np.tile(at_scored, n),
                    "id": texts[:n, at_scored].ravel().astype(int),
                    **{k: np.concatenate([f[k] for f in found]) for k in found[0]},
                },
            )


class Worker:
    """What a comparison asks of its child process."""

    def __init__(self, tell):
        import llama_cpp

        self.tell = tell
        # The log's last lines are what a user gets to read.
        log_levels(llama_cpp, lambda level: level in (WARNING, ERROR))

    def compare(
        self,
        reference,
        candidates,
        ways,
        text,
        n_ctx,
        max_windows,
        folder,
        split,
        own_split,
        apart,
        kept=None,
        special=False,
        **settings,
    ):
        """{"files": {candidate: its columns' .npz}, "pieces": {id: hexadecimal}}; tells `windows`
        as they are done and each candidate that `failed`. candidates: keys; ways: {key: (path,
        settings)} of those that are no plain paths (ways.py). split, own_split: the reference's
        layers and the candidates' by GPU; apart: one model at a time; kept: the file that the
        reference's logits are read from, or are to be kept in. Raises ModelLoadError and
        CompareError for the reference and the text, OutputError where its logits find no room."""
        size = (n_ctx, max(1, STEP // n_ctx))
        threads, layers = settings["threads"], settings["gpu_layers"]
        groups, made = _by_file(candidates, ways), _there(kept)
        if made and reference not in groups:
            base = Vocabulary(reference)
        else:
            base = open_model(reference, *size, threads, layers, split)
            if why := why_not(base):
                raise CompareError(f"Nothing can be compared with this reference: {why}")
        ids, what, bos = token_ids(base, text, special), identity(base), opening(base)
        texts = windows(ids, n_ctx, max_windows)
        if not len(texts):
            raise CompareError(
                f"the text has {len(ids)} tokens and a window needs {n_ctx}: pass a longer text, or a "
                "smaller n_ctx."
            )
        pieces = {int(token): base.piece(int(token)).hex() for token in np.unique(texts)}
        passes = (len(groups) if apart else 1) + (not made if kept else apart)
        done, of = 0, len(texts) * passes

        def tell(count):
            nonlocal done
            done += count
            self.tell(windows=done, of=of)

        files = {}
        groups = list(groups.values()) if apart else [sum(groups.values(), [])]
        rows = len(texts) * (n_ctx - n_ctx // 2) if apart else 0
        runtime, room = base, ScratchFile("reference.logits", 4 * rows * base.n_vocab)
        with nullcontext(kept) if kept else room as file:
            try:
                if apart or kept:
                    base = Kept(runtime, texts, file, tell, made)
                    runtime.close() if apart else runtime.close_context()
                for group in groups:
                    loaded = {} if apart else {(reference, layers): runtime}
                    opened = Opened(loaded, what, size, threads, layers, own_split, self.tell)
                    models = [model for each in group if (model := opened(*each))]
                    if models:
                        columns, failed = compare(base, models, texts, bos, tell, threads)
                        for key, why in failed.items():
                            self.tell(failed=key, why=why, kind="load")
                        for key in columns:
                            files[key] = os.path.join(folder, f"{candidates.index(key)}.npz")
                            np.savez(files[key], **columns[key])
                    if apart:
                        base.rewind()
                        for model in models:
                            model.close_context()
                        opened.close()
            except NotFiniteError as error:  # of the reference: a candidate's are kept by compare
                why = f"Nothing can be compared with this reference: {error}"
                raise CompareError(why) from None
        return {"files": files, "pieces": pieces}


def _there(path):
    """A file, open, or None where there is none."""
    try:
        return open(path, "rb") if path else None
    except FileNotFoundError:
        return None


def _by_file(candidates, ways):
    """{path: [(key, path, settings)]}: what shares one file's weights."""
    found = {}
    for key in candidates:
        path, settings = ways.get(key, (key, {}))
        found.setdefault(path, []).append((key, path, settings))
    return found


class Opened:
    """Opens candidates, each file once: what it is computed with makes contexts of their own.
    loaded: {(path, layers on the GPU): Runtime}; wanted: the reference's identity; size: of ready;
    tell: hears of a candidate that cannot be compared."""

    def __init__(self, loaded, wanted, size, threads, layers, split, tell):
        self.loaded, self.wanted, self.size = loaded, wanted, size
        self.threads, self.layers, self.split, self.tell = threads, layers, split, tell

    def __call__(self, key, path, changes):
        """A candidate, or None where it cannot be compared."""
        changes = dict(changes)
        where, some = (path, changes.pop("gpu_layers", self.layers)), changes.pop("windows", np.inf)
        try:
            if where not in self.loaded:
                options = dict(threads=self.threads, tensor_split=self.split)
                self.loaded[where] = Runtime(path, gpu_layers=where[1], **options)
            model, mine = self.loaded[where], identity(self.loaded[where])
            if mine == self.wanted:  # the reference predicts, and this one has its graph
                model.predicts = Prediction(logits=True, ahead=False)
            if not (why := differs(mine, self.wanted) or why_not(model)):
                return ready(again(model, key, some), *self.size, **changes)
        except ModelLoadError as error:
            return self.tell(failed=key, why=str(error), kind="load")
        return self.tell(failed=key, why=why, kind="other")

    def close(self):
        """Free the weights; contexts are closed before."""
        for model in self.loaded.values():
            model.close()


if __name__ == "__main__":
    serve(Worker)
