# cython: language_level=3
"""Device memory, in the order of the compute stream, and copies to and from it.

Memory comes from CUDA's own stream-ordered pool: an allocation made after a free on
the same stream may get the same bytes, with no synchronisation. With
``CYCNN_PLAIN_ALLOC=1`` every buffer is a cudaMalloc of its own, so that a memory
checker sees where each one ends.
"""

import gc
import os

from cuda.bindings cimport cyruntime
from libc.stdint cimport uintptr_t
cimport cython

from cycnn.errors import OutOfMemoryError

from ._check cimport check
from .device cimport Device, get
from .stream cimport Stream, context_epoch

cdef bint _plain = os.environ.get("CYCNN_PLAIN_ALLOC", "0") not in ("", "0")

# Counters over all devices. The GIL guards them.
cdef size_t _live_bytes = 0
cdef size_t _peak_bytes = 0
cdef size_t _live_buffers = 0


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
        if self.address == 0:
            return
        _live_bytes -= self.nbytes
        _live_buffers -= 1
        if self.epoch != context_epoch():
            return
        # A closed stream means that shutdown() ran; at interpreter exit the driver may
        # be gone. Neither status can be raised here.
        if self.plain or self.stream.handle == NULL:
            cyruntime.cudaFree(<void*>self.address)
        else:
            cyruntime.cudaFreeAsync(<void*>self.address, self.stream.handle)


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


def fill_bytes(uintptr_t address, int value, size_t nbytes, int device_index):
    """Set ``nbytes`` bytes to ``value``, in the order of the compute stream."""
    cdef Device device = get(device_index)
    check(
        cyruntime.cudaMemsetAsync(<void*>address, value, nbytes, device.compute.handle),
        "cudaMemsetAsync",
    )


def copy_from_host(uintptr_t address, array, int device_index):
    """Copy a C-contiguous array to the device, after what the compute stream holds.

    The array may be changed as soon as this returns.
    """
    cdef Device device = get(device_index)
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
            device.compute.handle,
        )
        # From pageable memory the driver may still be reading when the call returns
        if status == cyruntime.cudaError_t.cudaSuccess:
            status = cyruntime.cudaStreamSynchronize(device.compute.handle)
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
