"""What files must have alike to be compared: their vocabulary, which llama.cpp reads without the
weights."""

import ctypes
import os

from ..capture.runtime import Runtime
from ..errors import ModelLoadError


class Vocabulary(Runtime):
    """A file's tokens and its name, without the weights: what is asked of a reference whose logits
    are kept."""

    def __init__(self, path):
        import llama_cpp

        self.path, self.api, self.context, self.steps = path, llama_cpp, None, 0
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        self.model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
        if not self.model:
            raise ModelLoadError(f"llama.cpp cannot load {path}.")
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(self.vocab)


def opening(model):
    """The token that opens every window, or None where the model has none."""
    has = model.api.llama_vocab_get_add_bos(model.vocab)
    return model.api.llama_vocab_bos(model.vocab) if has else None


def identity(model):
    """Architecture and vocabulary: two files can be compared where these are equal. And whether its
    attention is causal, as far as the file says: where that is equal, too, they predict alike."""
    text, said = model.api.llama_vocab_get_text, ctypes.create_string_buffer(16)
    causal = f"{model.architecture}.attention.causal".encode()
    model.api.llama_model_meta_val_str(model.model, causal, said, len(said))
    return model.architecture, [text(model.vocab, i) for i in range(model.n_vocab)], said.value


def differs(ours, reference):
    """Why a model of one identity is no quantization of the other; None where it is."""
    if ours[0] != reference[0]:
        return f"its architecture is {ours[0]}, the reference's {reference[0]}"
    if ours[1] != reference[1]:
        differ = sum(a != b for a, b in zip(ours[1], reference[1]))
        n = differ + abs(len(ours[1]) - len(reference[1]))
        return f"its vocabulary differs from the reference's in {n} tokens"
    return None
