# cython: language_level=3
"""Pinned host memory, and a ring of it that feeds a device.

Only from pinned memory does a copy run beside the host and the kernels. A slot of the
ring is handed out again when the copy out of it is done, which an event tells: the
usual mistake is to refill batch i+2 while batch i is still in flight.
"""

cimport cython
import numpy as np

from cuda.bindings cimport cyruntime
from cpython.buffer cimport PyBuffer_FillInfo
from libc.stdint cimport uintptr_t

from ._check cimport check
from .device cimport Device, get
from .memory cimport DeviceBuffer
from .stream cimport Event, Stream, context_epoch


@cython.no_gc_clear
cdef class PinnedBuffer:
    """Page-locked host memory; supports the buffer protocol.

    Kernels of every GPU can read and write it, over the bus.

    Parameters
    ----------
    nbytes : int
    device_index : int
        The device whose context owns the pages.
    """

    cdef void* address
    cdef readonly size_t nbytes
    # the context that locked the pages lives as long as its device's streams
    cdef Stream stream
    cdef unsigned int epoch

    def __cinit__(self, size_t nbytes, int device_index):
        self.address = NULL

    def __init__(self, size_t nbytes, int device_index):
        self.nbytes = nbytes
        self.epoch = context_epoch()
        self.stream = get(device_index).compute
        check(cyruntime.cudaSetDevice(device_index), "cudaSetDevice")
        if nbytes:
            check(
                cyruntime.cudaHostAlloc(
                    &self.address, nbytes, cyruntime.cudaHostAllocPortable
                ),
                "cudaHostAlloc",
            )

    @property
    def ptr(self):
        """Address of the first byte, for the host and for kernels."""
        return <uintptr_t>self.address

    def __getbuffer__(self, Py_buffer* view, int flags):
        PyBuffer_FillInfo(view, self, self.address, self.nbytes, 0, flags)

    def __dealloc__(self):
        if self.address != NULL and self.epoch == context_epoch():
            cyruntime.cudaFreeHost(self.address)


cdef class Slot:
    """One pinned buffer of a ring.

    Attributes
    ----------
    array : ndarray of uint8, shape (nbytes,)
        The slot's memory.
    copied : Event
        When the last copy out of the slot is done.
    """

    cdef PinnedBuffer buffer
    cdef readonly Event copied
    cdef readonly object array

    def __init__(self, size_t nbytes, int device_index):
        self.buffer = PinnedBuffer(nbytes, device_index)
        self.copied = Event(device_index)
        self.array = np.frombuffer(self.buffer, np.uint8)


cdef class PinnedRing:
    """Pinned slots used in turn to copy batches to a device.

    Parameters
    ----------
    slots : int
        At least 2, so that one is filled while another is copied.
    nbytes : int
        Size of a slot.
    device_index : int

    Notes
    -----
    ``acquire`` may be called from another thread than ``upload``; each of them from
    one thread at a time.
    """

    cdef list _slots
    cdef Device device
    cdef readonly size_t nbytes
    cdef size_t _next

    def __init__(self, int slots, size_t nbytes, int device_index):
        if slots < 2:
            raise ValueError(f"a ring needs at least 2 slots, got {slots}")
        self.device = get(device_index)
        self.nbytes = nbytes
        self._slots = [Slot(nbytes, device_index) for _ in range(slots)]
        self._next = 0

    def __len__(self):
        return len(self._slots)

    def acquire(self):
        """The next slot, once the copy out of it is done."""
        cdef Slot slot = self._slots[self._next]
        self._next = (self._next + 1) % len(self._slots)
        slot.copied.synchronize()
        return slot

    def upload(self, Slot slot not None, size_t nbytes):
        """Copy the slot's first ``nbytes`` to new device memory.

        The copy runs on the copy stream; later work of the compute stream waits for
        it, the host does not.

        Returns
        -------
        DeviceBuffer
        """
        cdef DeviceBuffer target = DeviceBuffer(nbytes, self.device.index)
        # The memory was allocated in the order of the compute stream, so the copy must
        # follow that point of it.
        self.device.copy.wait_stream(self.device.compute)
        self.send(slot, ((0, nbytes, target.ptr),))
        self.device.compute.wait(slot.copied)
        return target

    def send(self, Slot slot not None, pieces):
        """Queue copies of parts of the slot on the copy stream, and ``slot.copied``.

        Parameters
        ----------
        slot : Slot
        pieces : sequence of (int, int, int)
            Offset in the slot, number of bytes, and device address of each.
        """
        cdef size_t offset, nbytes
        cdef uintptr_t target
        for offset, nbytes, target in pieces:
            if offset + nbytes > self.nbytes:
                raise ValueError(
                    f"the slots hold {self.nbytes} bytes, got {offset + nbytes}"
                )
            if nbytes == 0:
                continue
            check(
                cyruntime.cudaMemcpyAsync(
                    <void*>target,
                    <char*>slot.buffer.address + offset,
                    nbytes,
                    cyruntime.cudaMemcpyKind.cudaMemcpyHostToDevice,
                    self.device.copy.handle,
                ),
                "cudaMemcpyAsync (pinned host to device)",
            )
        slot.copied.record(self.device.copy)
