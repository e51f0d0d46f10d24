"""The child process that owns libllama: what a CaptureSession asks of it. Arrays cross as
memory-mapped files."""

import errno
import mmap
import os
import time

import numpy as np

from ..child import serve
from ..errors import CaptureError, NotFiniteError
from .device import open_device
from .edits import unpack
from .measures import HeadStatistics, predict, score, sweep
from .names import STAGES
from .runs import Runs


class Sampler:
    """The next token of a logits row: the best one, or drawn at a temperature from a seeded
    generator."""

    def __init__(self, limit, temperature, seed, is_end):
        self.limit, self._is_end, self._temperature, self._seed = limit, is_end, temperature, seed
        self.restart()

    def restart(self):
        self._left, self._ended, self._random = self.limit, False, np.random.default_rng(self._seed)

    def next(self, logits):
        if self._left == 0 or self._ended:
            return None
        self._left -= 1
        if self._temperature > 0:
            # The largest of logits / T + Gumbel noise is a sample of the softmax.
            logits = logits / self._temperature + self._random.gumbel(size=logits.shape)
        token = int(np.argmax(logits))
        self._ended = self._is_end(token)
        return token


class Worker:
    def __init__(self, tell):
        self.tell = tell
        self._arenas = {}  # path -> mapped memory, kept while its file is used again

    def load(self, path, architecture, **options):
        from .runtime import Runtime

        self.runtime = Runtime(path, **options)
        self.runs = Runs(self.runtime, architecture)
        gpu = self.runtime.api.llama_supports_gpu_offload() and options.get("gpu_layers") != 0
        if gpu:
            self.runtime.ggml.device = open_device()
        return {
            "n_vocab": self.runtime.n_vocab,
            "n_layer": self.runtime.n_layer,
            "n_ctx": self.runtime.n_ctx_limit,
            "bos": self.runtime.api.llama_vocab_bos(self.runtime.vocab),
            "gpu": gpu,
            "cupy": self.runtime.ggml.device is not None,
        }

    def tokenize(self, text, add_special=True):
        return {"tokens": self.runtime.tokenize(text, add_special)}

    def stages(self):
        return self.runs.stages()

    def tokens(self, prompt):
        tokens = self.runtime.tokenize(prompt) if isinstance(prompt, str) else prompt
        bad = [token for token in tokens if not 0 <= token < self.runtime.n_vocab]
        if bad:
            raise CaptureError(
                f"token id {bad[0]} is not in this model's vocabulary of {self.runtime.n_vocab}."
            )
        self.runtime.check_length(len(tokens))
        return tokens

    def capture(self, prompt, path, stages, layers, positions, edits, generate, temperature, seed):
        tokens = self.tokens(prompt)
        n_prompt = len(tokens)
        for stage, position in [(name, one) for name in positions for one in positions[name]]:
            if not 0 <= position < n_prompt + generate:
                raise CaptureError(
                    f"{STAGES[stage].place} position {position} is out of range: the text has "
                    f"{n_prompt} tokens."
                )
        sampler = Sampler(generate, temperature, seed, self.runtime.is_end) if generate else None

        tokens, layout, facts = self.runs.capture(
            tokens,
            stages,
            lambda n_bytes: self._arena(path, max(n_bytes, 1)),
            positions,
            layers=layers,
            edits=unpack(edits),
            sampler=sampler,
        )
        return {"tokens": tokens, "n_prompt": n_prompt, "layout": layout, "layers": facts}

    def _arena(self, path, n_bytes):
        """The file's memory, at least n_bytes. Pages that were used before are not cleared: they
        are cheap."""
        device = self.runtime.ggml.device
        for known in [known for known in self._arenas if not os.path.exists(known)]:
            self._drop(known)
        memory = self._arenas.get(path)
        if memory is None or len(memory) < n_bytes:
            self._drop(path)
            try:
                with open(path, "r+b") as file:
                    # no space is an error now, not a crash later
                    os.posix_fallocate(file.fileno(), 0, n_bytes)
                    memory = mmap.mmap(file.fileno(), n_bytes)
            except OSError as error:
                full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)
                what = "no room for the captured tensors: " if full else ""
                raise CaptureError(f"{what}{error}") from error
            self._arenas[path] = memory
            if device:
                device.pin(np.frombuffer(memory, np.uint8).ctypes.data, n_bytes)
        return memory

    def _drop(self, path):
        memory = self._arenas.pop(path, None)
        if memory is not None and self.runtime.ggml.device:
            self.runtime.ggml.device.unpin(np.frombuffer(memory, np.uint8).ctypes.data)

    def score(self, prompt, edits):
        tokens = self.tokens(prompt)
        return {"tokens": tokens, "table": score(self.runs, tokens, unpack(edits)).table()}

    def sweep(self, prompt, variants):
        tokens = self.tokens(prompt)
        variants = {name: unpack(rows) for name, rows in variants.items()}
        base, rows = sweep(self.runs, tokens, variants, lambda done: self.tell(done=done))
        return {"tokens": tokens, "base": base, "rows": rows}

    def predict(self, prompt, variants, ids):
        tokens = self.tokens(prompt)
        self.tokens(ids)
        variants = {name: unpack(rows) for name, rows in variants.items()}
        rows = predict(self.runs, tokens, variants, ids, lambda done: self.tell(done=done))
        return {"tokens": tokens, "rows": [rows[name] for name in variants]}

    def head_statistics(self, prompt, layers, patterns):
        tokens = self.tokens(prompt)
        if self.runtime.predicts.ahead:
            raise CaptureError(
                f"{self.runtime.name} attends to later tokens, too: these statistics are of attention "
                'that looks back. capture(stages="attention") gives its weights.'
            )
        for name, pairs in patterns.items():
            if any(not 0 <= key <= query < len(tokens) for query, key in pairs):
                raise CaptureError(
                    f"pattern {name!r} has a pair outside of the text's {len(tokens)} tokens."
                )
        device = self.runtime.ggml.device
        reducer = HeadStatistics(tokens, patterns, device, self.runtime.threads)

        def setup(recorder, plan):
            for layer in self.runs.layers_of(plan, "attention", layers):
                for tap in self.runs.taps(plan, "attention", layer):
                    recorder.on(tap, reducer.action(layer))

        self.runs.run(tokens, setup, all_logits=False, restart=reducer.restart)
        try:
            table, kept = reducer.table()
        except NotFiniteError:
            self.runs.locate(tokens)
            raise
        table = {name: values.tolist() for name, values in table.items()}
        return {"tokens": tokens, "layers": kept, "table": table}

    def time_decode(self, prompt, repeat, all_logits):
        """Seconds of plain decodes without any callback action: what benchmarks compare with."""
        tokens, seconds = self.tokens(prompt), []
        for _ in range(repeat):
            started = time.perf_counter()
            self.runtime.open(len(tokens))
            for past, piece in self.runtime.pieces(tokens, len(tokens)):
                self.runtime.decode(piece, past, 0 if all_logits else past + len(piece) - 1)
            seconds.append(time.perf_counter() - started)
        return {"tokens": tokens, "seconds": seconds}


if __name__ == "__main__":
    serve(Worker)
