from .stream cimport Stream


cdef class Device:
    cdef readonly int index
    cdef readonly str name
    cdef readonly tuple capability
    cdef readonly str arch
    cdef readonly int sm_count
    cdef readonly int max_shared_bytes
    cdef readonly Stream compute
    cdef readonly Stream copy


cpdef Device get(int index)
