"""What the bindings do not give: ggml's tensor struct, and reading and writing a tensor's data.

Operations and sources of a graph node are not behind functions, so they are read from `struct
ggml_tensor` as the pinned llama.cpp lays it out. `check_layout` refuses another layout instead of
misreading it."""

import ctypes

import numpy as np

from ..errors import CaptureError

MAX_SRC = 10


class Tensor(ctypes.Structure):
    """`struct ggml_tensor` of llama-cpp-python 0.3.36. ne: elements, nb: strides in bytes, fastest
    dimension first."""

    _fields_ = [
        ("type", ctypes.c_int32),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int32),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * MAX_SRC),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
        ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    ]


FLAG_INPUT = 1
# enum ggml_type: those of activations, masks and ids.
DTYPES = {
    0: np.dtype("f4"),
    1: np.dtype("f2"),
    24: np.dtype("i1"),
    26: np.dtype("i4"),
    27: np.dtype("i8"),
}
TYPE_BY_NAME = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8}
TYPE_BY_NAME["iq4_nl"] = 20


def _function(library, name, restype, *argtypes):
    function = getattr(library, name)
    function.restype, function.argtypes = restype, list(argtypes)
    return function


class Ggml:
    """The few functions of libggml-base that capture needs."""

    def __init__(self):
        import pathlib

        import llama_cpp

        folder = pathlib.Path(llama_cpp.__file__).parent / "lib"
        library = ctypes.CDLL(str(folder / "libggml-base.so"))
        pointer, text, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t
        self.get = _function(library, "ggml_backend_tensor_get", None, pointer, pointer, size, size)
        self.set = _function(library, "ggml_backend_tensor_set", None, pointer, pointer, size, size)
        self.op_desc = _function(library, "ggml_op_desc", text, pointer)
        self.get_name = _function(library, "ggml_get_name", pointer, pointer)
        self.nbytes = _function(library, "ggml_nbytes", size, pointer)
        self.buffer_name = _function(library, "ggml_backend_buffer_name", text, pointer)
        self.is_host = _function(library, "ggml_backend_buffer_is_host", ctypes.c_bool, pointer)
        self.version = _function(library, "ggml_version", text)
        self._host = {}  # buffer address -> whether its memory can be read in place
        self._on_cuda = {}
        self.device = None  # a Device where CuPy can look at CUDA tensors in place

    def forget(self):
        """A context was freed, and its buffers with it: others may be made at the same
        addresses."""
        self._host.clear()
        self._on_cuda.clear()
        if self.device:
            self.device.forget()

    def check_layout(self, address):
        """Raise CaptureError unless a live tensor's name and size are where `Tensor` says they
        are."""
        tensor = Tensor.from_address(address)
        size = self.nbytes(address)
        ours = max((tensor.ne[d] - 1) * tensor.nb[d] for d in range(4))
        ours = ours if tensor.type in DTYPES else 0
        if self.get_name(address) != address + Tensor.name.offset or not ours <= size:
            raise CaptureError(
                "this llama.cpp lays out its tensors differently from llama-cpp-python 0.3.36, so captures would be "
                "misread. Install the pinned engine: `llamatelemetry engine build`."
            )

    def on_host(self, buffer):
        """Whether a buffer's memory can be read in place."""
        if buffer not in self._host:
            self._host[buffer] = bool(buffer) and bool(self.is_host(buffer))
        return self._host[buffer]

    def on_device(self, buffer):
        """Whether a buffer's memory is CUDA's and CuPy is there to address it."""
        if self.device is None:
            return False
        if buffer not in self._on_cuda:
            on_cuda = self.buffer_name(buffer).startswith(b"CUDA")
            self._on_cuda[buffer] = on_cuda and not self.on_host(buffer)
        return self._on_cuda[buffer]

    def array(self, address, layout=None, scratch=None):
        """A tensor's data, slowest dimension first. layout: (offset, ne, nb), another view of the
        same bytes.

        In place, valid and writable only inside the callback: a NumPy array where the memory is the
        host's, a CuPy array where it is CUDA's and CuPy is there. Otherwise a copy in `scratch`,
        valid until that is used again."""
        tensor = Tensor.from_address(address)
        dtype = DTYPES[tensor.type]
        offset, ne, nb = layout or (0, tuple(tensor.ne), tuple(tensor.nb))
        if self.on_device(tensor.buffer):
            return self.device.array(tensor, offset, dtype, ne, nb)
        span = sum((n - 1) * b for n, b in zip(ne, nb)) + dtype.itemsize
        if self.on_host(tensor.buffer):
            raw = (ctypes.c_char * span).from_address(tensor.data + offset)
        else:
            raw = scratch.buffer(span)
            self.get(address, raw.ctypes.data, offset, span)
        return np.ndarray(ne[::-1], dtype, raw, strides=nb[::-1])

    def write(self, address, array, offset=0):
        """Write a contiguous array back over a tensor's bytes: every later node sees it."""
        self.set(address, array.ctypes.data, offset, array.nbytes)


class Scratch:
    """One host buffer, reused: fresh pages for every tensor would cost several times the copy
    itself."""

    def __init__(self):
        self._bytes = self.last = np.empty(0, np.uint8)

    def buffer(self, n_bytes):
        if self._bytes.nbytes < n_bytes:
            self._bytes = np.empty(n_bytes, np.uint8)
        self.last = self._bytes[:n_bytes]
        return self.last
