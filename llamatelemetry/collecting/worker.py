"""The capture worker that also takes many texts at once."""

import time
from itertools import chain

from ..capture.worker import Worker
from ..child import serve
from ..errors import CaptureError
from .many import batches, collect, layout, longest, several


class Collector(Worker):
    """What a CollectSession asks of it."""

    def describe(self, stages, layers):
        return {"layout": layout(self.runs, stages, layers), "longest": longest(self.runtime)}

    def collect(self, prompts, path, stages, layers, pool, cut):
        most, found = longest(self.runtime), []
        for number, prompt in enumerate(prompts):
            try:
                found.append(self._ids(prompt, most, cut))
            except CaptureError as error:
                raise CaptureError(f"text {number}: {error}") from None
        texts = [ids[:most] for ids in found]
        done = collect(
            self.runs,
            texts,
            stages,
            layers,
            pool,
            lambda n_bytes: self._arena(path, max(n_bytes, 1)),
            lambda done: self.tell(done=done),
        )
        return {"tokens": texts, "cut": [len(ids) > most for ids in found], "layout": done}

    def _ids(self, prompt, most, cut):
        ids = self.runtime.tokenize(prompt) if isinstance(prompt, str) else prompt
        if len(self.tokens(ids[:most] if cut else ids)) > most:
            raise CaptureError(
                f"it has {len(ids)} tokens, and this model reads a text as a whole, at most {most} at once."
            )
        return ids

    def time_batches(self, prompts, all_logits):
        """Seconds of plain decodes of the batches that `collect` makes of these texts."""
        texts = [self.tokens(prompt) for prompt in prompts]
        lengths, started = list(map(len, texts)), time.perf_counter()
        for batch in batches(self.runtime, lengths):
            ids, sizes = list(chain(*texts[batch])), several(lengths[batch])
            self.runtime.open(len(ids), bool(sizes))
            for past, piece in self.runtime.pieces(ids, len(ids)):
                first = 0 if all_logits else past + len(piece) - 1
                self.runtime.decode(piece, past, first, lengths=sizes)
        return time.perf_counter() - started


if __name__ == "__main__":
    serve(Collector)
