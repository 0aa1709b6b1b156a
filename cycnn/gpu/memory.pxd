from cuda.bindings cimport cyruntime
from libc.stdint cimport uintptr_t

from .stream cimport Stream


cdef class DeviceBuffer:
    cdef uintptr_t address
    cdef readonly size_t nbytes
    # kept until the memory is freed, since the free is queued on this stream
    cdef readonly Stream stream
    cdef readonly object _ptr
    cdef bint plain
    cdef unsigned int epoch
    cdef cyruntime.cudaError_t _allocate(self)
