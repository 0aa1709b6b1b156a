from cuda.bindings cimport cydriver, cyruntime


cdef int raise_runtime(cyruntime.cudaError_t status, str call) except -1
cdef int raise_driver(cydriver.CUresult status, str call) except -1


cdef inline int check(cyruntime.cudaError_t status, str call) except -1:
    """Raise CudaError if a runtime call did not succeed."""
    if status != cyruntime.cudaError_t.cudaSuccess:
        return raise_runtime(status, call)
    return 0


cdef inline int check_driver(cydriver.CUresult status, str call) except -1:
    """Raise CudaError if a driver call did not succeed."""
    if status != cydriver.CUresult.CUDA_SUCCESS:
        return raise_driver(status, call)
    return 0
