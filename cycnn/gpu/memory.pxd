from cuda.bindings cimport cyruntime
from libc.stdint cimport uintptr_t

from .stream cimport Stream


cdef class Arena:
    cdef int device_index
    cdef dict free
    cdef readonly size_t nbytes
    cdef public bint sealed
    cdef DeviceBuffer take(self, size_t nbytes)
    cdef int give(self, DeviceBuffer block) except -1


cdef Arena activate(Arena arena)


cdef class DeviceBuffer:
    cdef uintptr_t address
    cdef readonly size_t nbytes
    # kept until the memory is freed, since the free is queued on this stream
    cdef readonly Stream stream
    cdef readonly object _ptr
    cdef bint plain
    # the graph's memory that this buffer came from and returns to, or None
    cdef Arena arena
    cdef DeviceBuffer block
    cdef unsigned int epoch
    cdef cyruntime.cudaError_t _allocate(self)
