"""libllama in process: a model, a context that grows with the prompt, and decoding with a callback
on every node."""

import ctypes
import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np

from ..child import NODES
from ..errors import CaptureError, ModelLoadError
from ..gpus.cores import physical_cores
from . import prediction
from .finite import check_finite
from .ggml import TYPE_BY_NAME, Ggml
from .graph import Graph
from .tokenizer import token_ids, token_piece
from .variants import Variant

MIN_CTX, SEQUENCES = 512, 64
WARNING, ERROR = 3, 4  # enum ggml_log_level; 1 is debug
# llama.cpp calls it until the process ends: it must outlive every Runtime.
_KEPT: list[Callable] = []


def log_levels(api, wanted):
    """Which lines of llama.cpp's log go to stderr: wanted(level). The first call counts."""
    if not _KEPT:
        _KEPT.append(
            api.llama_log_callback(lambda level, text, _: wanted(level) and os.write(2, text))
        )
        api.llama_log_set(_KEPT[0], None)


class Runtime:
    """One loaded model. Only the worker process makes one: llama.cpp may abort the process it runs
    in."""

    def __init__(
        self,
        path,
        *,
        n_ctx=None,
        n_ubatch=512,
        threads=None,
        gpu_layers=-1,
        cache_type="f16",
        tensor_split=None,
        longest=None,
        at_least=0,
        variant=None,
    ):
        import llama_cpp

        self.path, self.api, self.ggml = path, llama_cpp, Ggml()
        # With a callback in place CUDA writes debug lines at every node.
        log_levels(llama_cpp, lambda level: level != 1)
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        if gpu_layers < 0 and llama_cpp.llama_supports_gpu_offload():
            # Read, not mapped: all pages of a map are this process's until they are on the GPU.
            params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
        if tensor_split:
            self._split = (ctypes.c_float * 128)(*tensor_split)
            params.tensor_split = self._split
        self.variant = Variant(llama_cpp, **(variant or {}))
        self.variant.set_model(params)
        self.model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
        if not self.model:
            raise ModelLoadError(f"llama.cpp cannot load {path}.")
        self.variant.load(self.model)
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(self.vocab)
        self.n_layer = llama_cpp.llama_model_n_layer(self.model)
        self.n_ctx_full = n_ctx or llama_cpp.llama_model_n_ctx_train(self.model)
        self.n_ctx_limit = min(longest or self.n_ctx_full, self.n_ctx_full)
        self.n_ctx_least = max(at_least, MIN_CTX)
        self.n_ubatch, self.threads = n_ubatch, threads or physical_cores()
        # Quantized values need fused attention: they stay in 16 bits.
        kinds = {"k": cache_type, "v": cache_type if cache_type in ("f16", "f32") else "f16"}
        self.cache_types = {stage: TYPE_BY_NAME[kind] for stage, kind in kinds.items()}
        # Of an encoder-decoder the encoder runs: its decoder would read what no encoder has
        # written.
        self.has_encoder = llama_cpp.llama_model_has_encoder(self.model)
        self.context, self.n_ctx, self._several = None, 0, False
        self.steps = 0  # of what changes the context
        self._observe, self._failure, self._checked = None, None, False
        self._callback = llama_cpp.ggml_backend_sched_eval_callback(self._on_node)

    def tokenize(self, text, add_special=True, parse_special=True):
        """Token ids of a text; parse_special: special tokens written out in it are those tokens, as
        llama-server has it."""
        return token_ids(self.api, self.vocab, text, add_special, parse_special)

    def piece(self, token):
        return token_piece(self.api, self.vocab, token)

    def is_end(self, token):
        return self.api.llama_vocab_is_eog(self.vocab, token)

    @cached_property
    def predicts(self):
        """What the model's graph says of its predictions: a prediction.Prediction."""
        return prediction.look(self)

    @property
    def name(self):
        """The model in an error: its file and architecture."""
        return f"{Path(self.path).name} (architecture {self.architecture!r})"

    @cached_property
    def architecture(self):
        """The file's general.architecture."""
        room = ctypes.create_string_buffer(128)
        self.api.llama_model_meta_val_str(self.model, b"general.architecture", room, len(room))
        return room.value.decode(errors="replace")

    def check_predicts(self):
        """CaptureError, by name, where the model does not say what comes next."""
        if why := self.predicts.why_not(self.name):
            raise CaptureError(why)

    def check_length(self, n_tokens, generated=0):
        if n_tokens == 0:
            raise CaptureError("the prompt is empty: give at least one token.")
        if n_tokens > self.n_ctx_limit:
            mend = f" or load the model with ctx_size={n_tokens} or more"
            if self.n_ctx_limit < self.n_ctx_full:
                mend = f": this model was trained for {self.n_ctx_limit} and takes no more"
            more = f" and {generated} are to be generated" if generated else ""
            raise CaptureError(
                f"the prompt has {n_tokens - generated} tokens{more}, and the context holds "
                f"{self.n_ctx_limit}: shorten it{mend}."
            )

    def _context_size(self, n_tokens):
        """As large as the text needs: what a token costs depends on the cells in use, but memory on
        all there are. Only n_ctx_least, which chooses the rotary factors of a LongRoPE model, also
        decides what is computed."""
        return min(max(self.n_ctx_least, -(-n_tokens // 256) * 256), max(self.n_ctx_full, 256))

    def open(self, n_tokens, several=False):
        """An empty context that holds n_tokens, of SEQUENCES or of one, made anew when the present
        one is too small."""
        self.check_length(n_tokens)
        if self.context and n_tokens <= self.n_ctx and self._several >= several:
            return self.clear()
        n_ctx = self._context_size(n_tokens)
        self.make_context(
            n_ctx=n_ctx,
            n_batch=min(self.n_ubatch, n_ctx),
            n_ubatch=min(self.n_ubatch, n_ctx),
            n_seq_max=min(SEQUENCES, self.n_ubatch, n_ctx) if several else 1,
            kv_unified=True,  # sequences share the cells
            # The fused kernel never makes the probabilities that we are here for.
            flash_attn_type=0,
            type_k=self.cache_types["k"],
            type_v=self.cache_types["v"],
            # One cell per position, also in sliding-window layers. llama-server has a window's
            # cells there, used in turn: the same terms, but summed in another order, which rounding
            # to 8 bits then magnifies (bench_attention.py).
            swa_full=True,
            no_perf=True,
            cb_eval=self._callback,
        )
        self._several = several

    def make_context(self, **settings):
        """An empty context in place of the present one. settings: fields of llama_context_params;
        the others are llama.cpp's defaults, automatic flash attention among them."""
        self.close_context()
        self.context = self._new_context(**settings)
        self.n_ctx, self.n_batch = settings["n_ctx"], settings["n_batch"]

    def _new_context(self, **settings):
        params = self.api.llama_context_default_params()
        params.n_threads = params.n_threads_batch = self.threads
        for name, value in settings.items():
            setattr(params, name, value)
        self.variant.set_context(params)
        context = self.api.llama_init_from_model(self.model, params)
        if not context:
            raise ModelLoadError(
                f"llama.cpp cannot make a context of {params.n_ctx} tokens for {self.path}: out of "
                "memory?"
            )
        self.variant.apply(context)
        return context

    def decode_apart(self, tokens, observe):
        """Decode a few tokens in a small context of their own, seen by observe(address, ask)."""
        kept, sizes = self.context, {"n_batch": 32, "n_ubatch": 32, "n_seq_max": 1}
        self.context = self._new_context(
            n_ctx=256, **sizes, flash_attn_type=0, no_perf=True, cb_eval=self._callback
        )
        try:
            self.decode(tokens, observe=observe)
        finally:
            self.api.llama_free(self.context)
            self.context = kept
            self.ggml.forget()

    def clear(self):
        """Forget every token in the context."""
        self.steps += 1
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def rewind(self, past):
        """Forget the tokens from position `past` on; False where the memory cannot: a recurrent
        state holds them all."""
        self.steps += 1
        memory = self.api.llama_get_memory(self.context)
        return bool(memory) and self.api.llama_memory_seq_rm(memory, 0, past, -1)

    def _on_node(self, address, ask, _):
        """ctypes swallows exceptions in callbacks: keep it, stop the computation, raise in
        `_run`."""
        observe = self._observe
        if observe is None:
            return not ask
        if self._failure is not None:  # while the node before was asked for
            return ask
        NODES[0] += 1
        try:
            if not self._checked:
                self.ggml.check_layout(address)
                self._checked = True
            return observe(address, ask)
        except BaseException as failure:
            self._failure = failure
            return ask  # asked: take the node so that the next call can stop the run

    def decode(self, tokens, past=0, first=0, observe=None, lengths=()):
        """Decode tokens, (n,) or (sequence, n), at most one batch, after `past` others of each
        sequence; positions from `first` on give logits, and each sequence's last one. lengths: of
        sequences that follow one another in (n,). observe(address, ask) sees every graph node."""
        self.steps += 1
        rows = np.atleast_2d(tokens)
        lengths = lengths or [rows.shape[1]] * len(rows)
        places = [(number, at) for number, size in enumerate(lengths) for at in range(size)]
        batch = self.api.llama_batch_init(rows.size, 0, 1)
        try:
            batch.n_tokens = rows.size
            for i, ((sequence, place), token) in enumerate(zip(places, rows.ravel().tolist())):
                batch.token[i], batch.pos[i] = token, past + place
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
                batch.logits[i] = past + place >= first or place + 1 == lengths[sequence]
            self._observe, self._failure = observe, None
            run = self.api.llama_encode if self.has_encoder else self.api.llama_decode
            status = run(self.context, batch)
        finally:
            self._observe = None
            self.api.llama_batch_free(batch)
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        if status != 0:
            raise CaptureError(
                f"llama.cpp stopped while decoding {self.path} (status {status}); its log says why."
            )

    def logits(self, count):
        """The last decode's `count` rows of logits, (count, n_vocab) float32: llama.cpp's own
        memory, valid until the next decode. CaptureError where the graph has none, NotFiniteError
        where a value is no number."""
        if not self.predicts.logits:  # llama.cpp has a buffer all the same, and nothing in it
            raise CaptureError(self.predicts.why_not(self.name))
        rows = np.ctypeslib.as_array(self.api.llama_get_logits(self.context), (count, self.n_vocab))
        return check_finite(rows, "logits", file=Path(self.path).name)

    @property
    def reads_whole(self):
        """Whether a text must fit one batch: nothing of the batch before is kept, or it had to see
        the next one."""
        if not self.context:
            self.open(1)
        return (
            self.has_encoder or not self.api.llama_get_memory(self.context) or self.predicts.ahead
        )

    def pieces(self, tokens, total):
        """[(past, tokens)]: pieces of at most one ubatch. total: tokens that the context will hold
        in the end."""
        self.check_length(total, total - len(tokens))
        size = min(self.n_ubatch, self._context_size(total))
        return [(start, tokens[start : start + size]) for start in range(0, len(tokens), size)]

    def graph(self, tokens):
        """The compute graph for these tokens, recorded by decoding them once without stopping
        anywhere."""
        self.open(len(tokens))
        graph = Graph(self.ggml)

        def record(address, ask):
            if ask:
                graph.add(address)
            return False

        self.decode(tokens, observe=record)
        return graph

    def close_context(self):
        self.steps += 1
        if self.context:
            self.api.llama_free(self.context)
            self.context = None
            self.ggml.forget()

    def close(self):
        self.close_context()
        if self.model:
            self.api.llama_model_free(self.model)
            self.model = None
