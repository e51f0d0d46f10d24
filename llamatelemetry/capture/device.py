"""Tensors where they lie on a CUDA device, through CuPy in the worker: looked at in place, cropped
there, copied once.

llama.cpp and CuPy share each device's primary context, so CuPy can address llama.cpp's tensors. The
scheduler has synchronized before a callback; whoever reads or writes a tensor must be done before
the callback returns (`synchronize`). Copies to the host go on while the next layers are computed:
the tensor is put in order into memory of our own, which is quick, and leaves the device from there
on a stream of its own, until `drain`. A model may lie on several devices: whichever holds the
tensor that was asked for last is the current one, with streams of its own."""

from pathlib import Path

import numpy as np

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
        to, start, how = target.ctypes.data, values.data.ptr, runtime.memcpyDeviceToHost
        if target.flags.c_contiguous:
            runtime.memcpyAsync(to, start, values.nbytes, how, self._leave.ptr)
        elif target.ndim == 2 and target.strides[1] == target.itemsize:
            rows, width = len(target), target.shape[1] * target.itemsize
            pitch, stream = target.strides[0], self._leave.ptr
            runtime.memcpy2DAsync(to, pitch, start, width, width, rows, how, stream)
        else:
            for part, rows in zip(target, values):
                self._copy(part, rows)

    def row_sums(self, values, past):
        """{measure: (head,) float64} sums over the query rows of attention (head, query, key) on
        the device."""
        cupy = self.cupy
        if self._kernel is None:
            source = Path(__file__).with_name("rows.cu").read_text()
            self._kernel = cupy.RawKernel(source, "rows")
        n_head, n_query, n_key = values.shape
        out = cupy.empty((n_head, n_query, len(MEASURES)), np.float32)
        of_head, of_row = (np.int64(stride // 4) for stride in values.strides[:2])
        sizes = np.int32(n_query), np.int32(n_key), of_row, of_head, np.int32(past)
        self._kernel((n_query, n_head), (256,), (values, out, *sizes))
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
