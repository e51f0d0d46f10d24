"""A capture session that also takes many texts at once."""

import numpy as np

from ..capture.session import CaptureSession


class CollectSession(CaptureSession):
    """What an InferenceEngine holds."""

    WORKER = "llamatelemetry.collecting.worker"

    def collect(self, texts, stages, layers=None, pool="last", cut=False, hear=None):
        """Many texts in batches: (token ids of each, whether each was cut, {stage: array (layer,
        row, ...)}), a row per text, or per token where pool is None. cut: a text that is too long
        for the context, instead of CaptureError. hear(done=n): texts so far."""
        request = {"stages": stages, "layers": layers, "pool": pool, "cut": cut}
        texts = list(texts)
        answer, memory = self.into_arena("collect", hear, prompts=texts, **request)
        for text, ids in zip(texts, answer["tokens"]):
            self._say_two_starts(text, ids)
        parts = {
            stage: np.ndarray(part["all"], part["dtype"], memory, part["offset"])
            for stage, part in answer["layout"].items()
        }
        return answer["tokens"], answer["cut"], parts

    def describe(self, stages, layers=None):
        """Of `collect`: {"layout": {stage: its layers, a row's shape}, "longest": most tokens of a
        text}."""
        return self._call("describe", stages=stages, layers=layers)

    def time_batches(self, texts, all_logits=True):
        """Seconds of plain decodes of the batches that `collect` makes of these texts."""
        return self._call("time_batches", prompts=list(texts), all_logits=all_logits)
