from cuda.bindings cimport cyruntime


# Rises when a device is reset: handles made before are gone with its context, and a
# destructor must not give them to CUDA, which may have used their values again. Rises in
# a forked child too, where CUDA must not be called at all.
cdef unsigned int context_epoch() noexcept


cdef class Stream:
    cdef cyruntime.cudaStream_t handle
    cdef unsigned int epoch
    cdef readonly int device_index
    # the object a borrowed handle belongs to; None where this object owns the handle
    cdef object _owner
    cdef int close_handle(self) except -1


cdef class Event:
    cdef cyruntime.cudaEvent_t handle
    cdef unsigned int epoch
    cdef readonly int device_index
