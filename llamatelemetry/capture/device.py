"""Tensors where they lie on a CUDA device, through CuPy in the worker: looked at in place, cropped
there, copied once.

llama.cpp and CuPy share each device's primary context, so CuPy can address llama.cpp's tensors. The
scheduler has synchronized before a callback; whoever reads or writes a tensor must be done before
the callback returns (`synchronize`). Copies to the host go on while the next layers are computed:
the tensor is put in order into memory of our own, which is quick, and leaves the device from there
on a stream of its own, until `drain`. A model may lie on several devices: whichever holds the
tensor that was asked for last is the current one, with streams of its own."""

import numpy as np

# One block per (query, head): everything about a row of attention in one pass over it. out: (head,
# query, 6).
_ROWS = r"""
extern "C" __global__ void rows(const float* p, float* out, int n_query, int n_key, long row_stride,
                                long head_stride, int past) {
  const int q = blockIdx.x, h = blockIdx.y, position = past + q;
  const float* row = p + h * head_stride + q * row_stride;
  float s[4] = {0, 0, 0, 0};
  for (int k = threadIdx.x; k <= position && k < n_key; k += blockDim.x) {
    const float w = row[k];
    s[0] += w;
    if (w > 0) s[1] -= w * logf(w);
    s[2] += w * (position - k);
    s[3] = fmaxf(s[3], w);
  }
  __shared__ float part[32][4];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  for (int m = 0; m < 4; m++) {
    float v = s[m];
    for (int o = 16; o; o >>= 1) {
      const float other = __shfl_down_sync(0xffffffffu, v, o);
      v = m == 3 ? fmaxf(v, other) : v + other;
    }
    if (lane == 0) part[warp][m] = v;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    float* target = out + (h * (long)n_query + q) * 6;
    for (int m = 0; m < 4; m++) {
      float v = part[0][m];
      for (int w = 1; w < blockDim.x / 32; w++) v = m == 3 ? fmaxf(v, part[w][m]) : v + part[w][m];
      target[m] = v;
    }
    target[4] = target[1] / logf(fmaxf(position, 1.f) + 1.f);
    target[5] = row[0];
  }
}
"""
MEASURES = ("mass", "entropy", "distance", "top", "normalized_entropy", "sink")


def open_device():
    """A Device, or None where CuPy or a CUDA device is missing."""
    try:
        import cupy

        if cupy.cuda.runtime.getDeviceCount() < 1:
            return None
    except Exception:  # CuPy raises its own errors where the driver is missing or too old
        return None
    return Device(cupy)


IN_FLIGHT = 2**28  # bytes of device memory that copies on their way to the host may hold


class Device:
    def __init__(self, cupy):
        self.cupy = cupy
        self._streams = {}  # CUDA device number -> (where we compute, where copies leave)
        self._leaving, self._leaving_bytes = [], 0
        self._kernel = None
        self._pinned = {}  # address -> bytes
        self._number = {}  # llama.cpp buffer -> CUDA device number
        self._enter(cupy.cuda.runtime.getDevice())

    def _enter(self, number):
        """Make a CUDA device the current one. Streams belong to a device: each has its own two."""
        runtime = self.cupy.cuda.runtime
        if runtime.getDevice() != number:  # asked every time: llama.cpp changes it, too
            runtime.setDevice(number)
        if number not in self._streams:
            self._streams[number] = tuple(
                self.cupy.cuda.Stream(non_blocking=True) for _ in range(2)
            )
            self._streams[number][0].use()  # on this device, from now on
        self._work, self._leave = self._streams[number]

    def forget(self):
        """The buffers that were seen are gone: another one may be made at the same address, on
        another device."""
        self._number.clear()

    def array(self, tensor, offset, dtype, ne, nb):
        """A tensor's memory as a cupy.ndarray, slowest dimension first; in place, valid inside the
        callback."""
        cupy = self.cupy
        span = sum((n - 1) * b for n, b in zip(ne, nb)) + dtype.itemsize
        if tensor.buffer not in self._number:
            self._number[tensor.buffer] = cupy.cuda.runtime.pointerGetAttributes(tensor.data).device
        number = self._number[tensor.buffer]
        self._enter(number)
        memory = cupy.cuda.UnownedMemory(tensor.data + offset, span, self, number)
        return cupy.ndarray(ne[::-1], dtype, cupy.cuda.MemoryPointer(memory, 0), strides=nb[::-1])

    def synchronize(self):
        """Wait for what was asked of the tensors; copies under way to the host are not waited
        for."""
        self._work.synchronize()

    def drain(self):
        """Wait for the copies to the host."""
        for _, leave in self._streams.values():
            leave.synchronize()
        self._leaving, self._leaving_bytes = [], 0

    def pin(self, address, n_bytes):
        """Page-lock host memory once, so that copies into it run at the bus's speed."""
        if self._pinned.get(address, 0) < n_bytes:
            try:
                self.cupy.cuda.runtime.hostRegister(address, n_bytes, 1)  # for every device
                self._pinned[address] = n_bytes
            except self.cupy.cuda.runtime.CUDARuntimeError:
                pass  # a limit on locked memory: copies are slower, not wrong

    def unpin(self, address):
        if self._pinned.pop(address, 0):
            self.drain()
            self.cupy.cuda.runtime.hostUnregister(address)

    def to_host(self, target, values):
        """Begin to copy a device array into a NumPy array of its shape, there once `drain` has
        returned."""
        order = sorted(range(target.ndim), key=lambda axis: -target.strides[axis])
        ordered = values.transpose(order).astype(target.dtype, copy=False)
        ours = self.cupy.ascontiguousarray(ordered)
        if ours.data.ptr == values.data.ptr:
            # llama.cpp writes its tensor's memory again before the copy has left.
            ours = ours.copy()
        if self._leaving_bytes + ours.nbytes > IN_FLIGHT:
            self.drain()
        self._leaving.append(ours)
        self._leaving_bytes += ours.nbytes
        self._leave.wait_event(self._work.record())
        self._copy(target.transpose(order), ours)

    def _copy(self, target, values):
        runtime = self.cupy.cuda.runtime
        if target.flags.c_contiguous:
            runtime.memcpyAsync(
                target.ctypes.data,
                values.data.ptr,
                values.nbytes,
                runtime.memcpyDeviceToHost,
                self._leave.ptr,
            )
        elif target.ndim == 2 and target.strides[1] == target.itemsize:
            width = target.shape[1] * target.itemsize
            runtime.memcpy2DAsync(
                target.ctypes.data,
                target.strides[0],
                values.data.ptr,
                width,
                width,
                target.shape[0],
                runtime.memcpyDeviceToHost,
                self._leave.ptr,
            )
        else:
            for part, rows in zip(target, values):
                self._copy(part, rows)

    def row_sums(self, values, past):
        """{measure: (head,) float64} sums over the query rows of attention (head, query, key) on
        the device."""
        cupy = self.cupy
        if self._kernel is None:
            self._kernel = cupy.RawKernel(_ROWS, "rows")
        n_head, n_query, n_key = values.shape
        out = cupy.empty((n_head, n_query, len(MEASURES)), np.float32)
        strides = [np.int64(stride // 4) for stride in values.strides]
        self._kernel(
            (n_query, n_head),
            (256,),
            (
                values,
                out,
                np.int32(n_query),
                np.int32(n_key),
                strides[1],
                strides[0],
                np.int32(past),
            ),
        )
        return out.sum(1, dtype=np.float64)

    def pair_sums(self, values, row, key, number, count):
        """(head, number) float64 sums of attention (head, query, key) at (row, key), each counted
        for its number."""
        import cupyx

        cupy = self.cupy
        out = cupy.zeros((len(values), count))
        if len(row):
            row, key, number = map(cupy.asarray, (row, key, number))
            cupyx.scatter_add(out, (slice(None), number), values[:, row, key].astype(np.float64))
        return out
