# cython: language_level=3
"""One road from a CUDA status to a Python exception."""

from cuda.bindings cimport cydriver, cyruntime

from cycnn.errors import CudaError

# What a person can do about the failures that people meet.
_ADVICE = {
    "cudaErrorMemoryAllocation": "free tensors or use a smaller batch",
    "cudaErrorInsufficientDriver": "update the NVIDIA driver (CUDA 13 needs 580 or newer)",
    "cudaErrorNoDevice": "check nvidia-smi and CUDA_VISIBLE_DEVICES",
    "cudaErrorIllegalAddress": (
        "a kernel read or wrote outside its memory; this process can no longer use the "
        "GPU: restart it, and run it under compute-sanitizer to find the kernel"
    ),
    "cudaErrorLaunchFailure": (
        "a kernel crashed; this process can no longer use the GPU: restart it"
    ),
    "cudaErrorStreamCaptureUnsupported": (
        "while a step is recorded as a graph, no result can be read on the host: take "
        "that out of the layer or callback, or train with Trainer(capture=False)"
    ),
    "cudaErrorNoKernelImageForDevice": (
        "no kernels for this GPU are shipped: pip install 'cycnn[jit]' compiles them"
    ),
}


def _message(call, name, text):
    advice = _ADVICE.get(name)
    return f"{call} failed: {name} ({text})" + (f". {advice}" if advice else "")


cdef int raise_runtime(cyruntime.cudaError_t status, str call) except -1:
    name = (<bytes>cyruntime.cudaGetErrorName(status)).decode()
    text = (<bytes>cyruntime.cudaGetErrorString(status)).decode()
    # forget an error that is not sticky, or the next launch would report it again
    cyruntime.cudaGetLastError()
    raise CudaError(_message(call, name, text), <int>status, name, call)


cdef int raise_driver(cydriver.CUresult status, str call) except -1:
    cdef const char* name = NULL
    cdef const char* text = NULL
    cydriver.cuGetErrorName(status, &name)
    cydriver.cuGetErrorString(status, &text)
    shown = (<bytes>name).decode() if name != NULL else f"CUresult {<int>status}"
    told = (<bytes>text).decode() if text != NULL else "unknown"
    raise CudaError(_message(call, shown, told), <int>status, shown, call)
