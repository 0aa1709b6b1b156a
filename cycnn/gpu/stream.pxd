from cuda.bindings cimport cyruntime


cdef class Stream:
    cdef cyruntime.cudaStream_t handle
    cdef readonly int device_index
    # the object a borrowed handle belongs to; None where this object owns the handle
    cdef object _owner
    cdef int close_handle(self) except -1


cdef class Event:
    cdef cyruntime.cudaEvent_t handle
    cdef readonly int device_index
