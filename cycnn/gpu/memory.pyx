# cython: language_level=3
"""Device memory, in the order of the compute stream, and copies to and from it.

Memory comes from CUDA's own stream-ordered pool: an allocation made after a free on
the same stream may get the same bytes, with no synchronisation. With
``CYCNN_PLAIN_ALLOC=1`` every buffer is a cudaMalloc of its own, so that a memory
checker sees where each one ends.
"""

import gc
import os

from cuda.bindings cimport cydriver, cyruntime
from libc.stdint cimport uintptr_t
cimport cython

cdef extern from "pythread.h":
    unsigned long PyThread_get_thread_ident() noexcept nogil


from cycnn.errors import CudaError, OutOfMemoryError

from ._check cimport check, check_driver
from .device cimport Device, get
from .stream cimport Stream, context_epoch

cdef bint _plain = os.environ.get("CYCNN_PLAIN_ALLOC", "0") not in ("", "0")

# Counters over all devices. The GIL guards them.
cdef size_t _live_bytes = 0
cdef size_t _peak_bytes = 0
cdef size_t _live_buffers = 0


# Where buffers come from while a graph is recorded; the pool's calls would be recorded.
# Only for the thread that records.
cdef Arena _arena = None
cdef unsigned long _arena_thread = 0
cdef list _deferred = []


cdef class Arena:
    """Memory of a graph: freed blocks are used again, and none leaves before its end.

    Everything that a graph does is in one order, so a block freed while recording may
    be handed out at once. A block is handed out for its own size only: then a function
    that was rehearsed finds all its memory here when it is recorded.
    """

    def __init__(self, int device_index):
        self.device_index = device_index
        self.free = {}
        self.nbytes = 0
        self.sealed = False

    cdef DeviceBuffer take(self, size_t nbytes):
        blocks = self.free.get(nbytes)
        if blocks:
            return blocks.pop()
        if self.sealed:
            raise CudaError(
                f"the recorded function asks for {nbytes} bytes that its rehearsal did "
                f"not ask for: it must do the same each time"
            )
        outside = activate(None)
        try:
            block = DeviceBuffer(nbytes, self.device_index)
        finally:
            activate(outside)
        self.nbytes += nbytes
        return block

    cdef int give(self, DeviceBuffer block) except -1:
        self.free.setdefault(block.nbytes, []).append(block)
        return 0


cdef Arena activate(Arena arena):
    """Let buffers come from ``arena``, or from the pool if None; returns the previous.

    While one is active, other buffers that die are kept, and freed afterwards: the
    calls would be recorded.
    """
    global _arena, _arena_thread
    before = _arena
    _arena = arena
    _arena_thread = PyThread_get_thread_ident()
    if arena is None:
        while _deferred:
            address, stream, plain = _deferred.pop()
            _free(address, stream, plain)
    return before


cdef _free(uintptr_t address, Stream stream, bint plain):
    # a closed stream means that shutdown() ran
    if plain or stream.handle == NULL:
        cyruntime.cudaFree(<void*>address)
    else:
        cyruntime.cudaFreeAsync(<void*>address, stream.handle)


@cython.no_gc_clear
cdef class DeviceBuffer:
    """Bytes on a GPU, freed with the object.

    Parameters
    ----------
    nbytes : int
        0 is legal and makes no CUDA call.
    device_index : int

    Raises
    ------
    OutOfMemoryError
        After a second try with unused memory given back; says how much was asked for,
        held and free.
    """

    def __cinit__(self, size_t nbytes, int device_index):
        self.address = 0
        self._ptr = 0

    def __init__(self, size_t nbytes, int device_index):
        global _live_bytes, _peak_bytes, _live_buffers
        self.nbytes = nbytes
        self.stream = get(device_index).compute
        self.plain = _plain
        self.epoch = context_epoch()
        if nbytes == 0:
            return
        if (
            _arena is not None
            and _arena.device_index == device_index
            and _arena_thread == PyThread_get_thread_ident()
        ):
            self.arena = _arena
            self.block = self.arena.take(nbytes)
            self.address = self.block.address
            self._ptr = self.address
            return
        cdef cyruntime.cudaError_t status = self._allocate()
        if status == cyruntime.cudaError_t.cudaErrorMemoryAllocation:
            cyruntime.cudaGetLastError()
            gc.collect()
            release_unused(device_index)
            status = self._allocate()
            if status == cyruntime.cudaError_t.cudaErrorMemoryAllocation:
                cyruntime.cudaGetLastError()
                raise _out_of_memory(nbytes, device_index)
        check(status, "cudaMalloc" if self.plain else "cudaMallocAsync")
        self._ptr = self.address
        _live_bytes += nbytes
        _live_buffers += 1
        if _live_bytes > _peak_bytes:
            _peak_bytes = _live_bytes

    cdef cyruntime.cudaError_t _allocate(self):
        cdef void* pointer = NULL
        cdef cyruntime.cudaError_t status
        if self.plain:
            cyruntime.cudaSetDevice(self.stream.device_index)
            status = cyruntime.cudaMalloc(&pointer, self.nbytes)
        else:
            status = cyruntime.cudaMallocAsync(
                &pointer, self.nbytes, self.stream.handle
            )
        self.address = <uintptr_t>pointer
        return status

    @property
    def ptr(self):
        """Device address; 0 for a buffer of no bytes."""
        return self._ptr

    def __dealloc__(self):
        global _live_bytes, _live_buffers
        if self.block is not None:
            self.arena.give(self.block)
            return
        if self.address == 0:
            return
        _live_bytes -= self.nbytes
        _live_buffers -= 1
        if self.epoch != context_epoch():
            return
        # at interpreter exit the driver may be gone: no status is looked at
        if _arena is not None:
            _deferred.append((self.address, self.stream, self.plain))
        else:
            _free(self.address, self.stream, self.plain)


def _out_of_memory(nbytes, device_index):
    free, total = info(device_index)
    return OutOfMemoryError(
        f"out of memory on cuda:{device_index}: {_mib(nbytes)} asked for, cycnn holds "
        f"{_mib(_live_bytes)} in {_live_buffers} buffers, {_mib(free)} of "
        f"{_mib(total)} are free. Use a smaller batch or free tensors.",
        <int>cyruntime.cudaError_t.cudaErrorMemoryAllocation,
        "cudaErrorMemoryAllocation",
        "cudaMalloc" if _plain else "cudaMallocAsync",
    )


def _mib(nbytes):
    return f"{nbytes / 2**20:,.1f} MiB"


def info(int device_index):
    """Free and total bytes of the device, as the driver sees them.

    Memory that the pool keeps for reuse counts as used.
    """
    cdef size_t free = 0
    cdef size_t total = 0
    get(device_index)
    check(cyruntime.cudaSetDevice(device_index), "cudaSetDevice")
    check(cyruntime.cudaMemGetInfo(&free, &total), "cudaMemGetInfo")
    return free, total


def stats():
    """Live bytes, live buffers and the peak of live bytes, over all devices."""
    return {
        "live_bytes": _live_bytes,
        "live_buffers": _live_buffers,
        "peak_bytes": _peak_bytes,
    }


def release_unused(int device_index):
    """Give the pool's unused memory back to the driver. Waits for the device."""
    cdef cyruntime.cudaMemPool_t pool
    get(device_index).synchronize()
    check(
        cyruntime.cudaDeviceGetDefaultMemPool(&pool, device_index),
        "cudaDeviceGetDefaultMemPool",
    )
    check(cyruntime.cudaMemPoolTrimTo(pool, 0), "cudaMemPoolTrimTo")


def compute_stream_handle(int device_index):
    """Address of the device's compute stream."""
    return get(device_index).compute.address


def synchronize(int device_index):
    """Wait until the device's compute and copy streams are idle."""
    get(device_index).synchronize()


def fill_pattern(
    uintptr_t address, unsigned int pattern, int itemsize, size_t count, int device_index
):
    """Set ``count`` elements of 1 or 4 bytes, in the order of the compute stream."""
    cdef Device device = get(device_index)
    cdef cydriver.CUstream stream = <cydriver.CUstream>device.compute.handle
    check(cyruntime.cudaSetDevice(device_index), "cudaSetDevice")
    if itemsize == 4:
        check_driver(
            cydriver.cuMemsetD32Async(
                <cydriver.CUdeviceptr>address, pattern, count, stream
            ),
            "cuMemsetD32Async",
        )
    else:
        check_driver(
            cydriver.cuMemsetD8Async(
                <cydriver.CUdeviceptr>address, <unsigned char>pattern, count, stream
            ),
            "cuMemsetD8Async",
        )


def copy_from_host(
    uintptr_t address, array, int device_index, Stream stream=None
):
    """Copy a C-contiguous array to the device, after what the stream holds.

    The array may be changed as soon as this returns. The stream is the compute stream
    unless another one is given.
    """
    cdef Stream queue = get(device_index).compute if stream is None else stream
    cdef const unsigned char[::1] source = _bytes_of(array)
    cdef size_t nbytes = source.shape[0]
    cdef cyruntime.cudaError_t status
    if nbytes == 0:
        return
    with nogil:
        status = cyruntime.cudaMemcpyAsync(
            <void*>address,
            &source[0],
            nbytes,
            cyruntime.cudaMemcpyKind.cudaMemcpyHostToDevice,
            queue.handle,
        )
        # From pageable memory the driver may still be reading when the call returns
        if status == cyruntime.cudaError_t.cudaSuccess:
            status = cyruntime.cudaStreamSynchronize(queue.handle)
    check(status, "cudaMemcpyAsync (host to device)")


def copy_to_host(array, uintptr_t address, int device_index):
    """Fill a writable C-contiguous array from the device; waits for the result."""
    cdef Device device = get(device_index)
    cdef unsigned char[::1] target = _bytes_of(array)
    cdef size_t nbytes = target.shape[0]
    cdef cyruntime.cudaError_t status
    if nbytes == 0:
        return
    with nogil:
        status = cyruntime.cudaMemcpyAsync(
            &target[0],
            <void*>address,
            nbytes,
            cyruntime.cudaMemcpyKind.cudaMemcpyDeviceToHost,
            device.compute.handle,
        )
        if status == cyruntime.cudaError_t.cudaSuccess:
            status = cyruntime.cudaStreamSynchronize(device.compute.handle)
    check(status, "cudaMemcpyAsync (device to host)")


def copy_device(
    uintptr_t target, int target_index, uintptr_t source, int source_index, size_t nbytes
):
    """Copy between buffers of one device or of two."""
    cdef Device device = get(target_index)
    if target_index != source_index:
        # the target's stream does the copy once the source's stream has made the data
        device.compute.wait_stream(get(source_index).compute)
    check(
        cyruntime.cudaMemcpyAsync(
            <void*>target,
            <void*>source,
            nbytes,
            cyruntime.cudaMemcpyKind.cudaMemcpyDefault,
            device.compute.handle,
        ),
        "cudaMemcpyAsync (device to device)",
    )
    if target_index != source_index:
        # and the source must not be freed or overwritten before the copy is done
        get(source_index).compute.wait_stream(device.compute)


cdef _bytes_of(array):
    # reshape of a C-contiguous array is a view; a scalar array gets one axis by it
    return array.reshape(-1).view("uint8")
