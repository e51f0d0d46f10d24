"""A model's tokenizer alone: a process of its own reads the vocabulary of a GGUF file, no weights,
and on no GPU."""

import os
from typing import TYPE_CHECKING, Self

from .. import logs
from ..arguments import say_two_starts, writable
from ..child import Child, serve
from ..errors import ModelLoadError, WorkerCrashedError
from ..files.gguf import GGUFFile
from ..imports import uninterrupted

if TYPE_CHECKING:
    import pandas as pd


class Vocabulary:
    """The tokenizer of a GGUFFile, as llama.cpp has it. Also a context manager.

    Raises ModelLoadError where llama.cpp cannot read it, with llama.cpp's reason."""

    def __init__(self, model: GGUFFile) -> None:
        model.check_place()
        self.model = model
        # Where GPUs are in sight, llama.cpp opens each of them to look at its memory
        env = logs.ENVIRONMENT | os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        self._child = Child(__name__, "the tokenizer", env)
        try:
            self._start = self._child.call("load", path=str(model.path))
        except (ModelLoadError, WorkerCrashedError) as error:
            why = logs.reason(self._child.log())
            self._child.close()
            says = f" It says: {why}" if why and why not in str(error) else ""
            raise ModelLoadError(f"{error}{says}") from None

    def tokenize(self, text: str) -> "pd.DataFrame":
        """As InferenceEngine.tokenize, with the tokens that the model puts first and last."""
        with uninterrupted():
            import pandas as pd

        ids = self._child.call("tokenize", text=writable(text))
        pieces = [self.model.pieces[i] for i in ids]
        say_two_starts(ids, self._start, pieces[0] if ids else "")
        return pd.DataFrame({"position": range(len(ids)), "id": ids, "piece": pieces})

    def close(self) -> None:
        """End the process. Safe to call twice."""
        self._child.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Worker:
    """The child process."""

    def __init__(self, tell):
        pass

    def load(self, path):
        """The id of the token that begins a text."""
        import llama_cpp

        from ..capture.runtime import log_levels
        from ..compare.vocabulary import Vocabulary

        log_levels(llama_cpp, lambda level: level != 1)
        self.model = Vocabulary(path)
        return llama_cpp.llama_vocab_bos(self.model.vocab)

    def tokenize(self, text):
        return self.model.tokenize(text)


if __name__ == "__main__":
    serve(Worker)
