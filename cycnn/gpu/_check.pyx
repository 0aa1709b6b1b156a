# cython: language_level=3
"""One road from a CUDA status to a Python exception."""

from cuda.bindings cimport cydriver, cyruntime

from cycnn.errors import CudaError

# What a person can do about the failures that people meet, by the names that the runtime
# and the driver have for them. Launches and memsets are calls of the driver.
_ADVICE = {
    ("cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY"): (
        "free tensors or use a smaller batch"
    ),
    ("cudaErrorInsufficientDriver",): (
        "update the NVIDIA driver (CUDA 13 needs 580 or newer)"
    ),
    ("cudaErrorNoDevice", "CUDA_ERROR_NO_DEVICE"): (
        "check nvidia-smi and CUDA_VISIBLE_DEVICES"
    ),
    ("cudaErrorIllegalAddress", "CUDA_ERROR_ILLEGAL_ADDRESS"): (
        "a kernel read or wrote outside its memory; this process can no longer use the "
        "GPU: restart it, and run it under compute-sanitizer to find the kernel"
    ),
    (
        "cudaErrorLaunchFailure", "CUDA_ERROR_LAUNCH_FAILED",
        "cudaErrorLaunchTimeout", "CUDA_ERROR_LAUNCH_TIMEOUT",
        "cudaErrorAssert", "CUDA_ERROR_ASSERT",
        "cudaErrorHardwareStackError", "CUDA_ERROR_HARDWARE_STACK_ERROR",
        "cudaErrorIllegalInstruction", "CUDA_ERROR_ILLEGAL_INSTRUCTION",
        "cudaErrorMisalignedAddress", "CUDA_ERROR_MISALIGNED_ADDRESS",
        "cudaErrorInvalidAddressSpace", "CUDA_ERROR_INVALID_ADDRESS_SPACE",
        "cudaErrorInvalidPc", "CUDA_ERROR_INVALID_PC",
    ): "a kernel crashed; this process can no longer use the GPU: restart it",
    ("cudaErrorStreamCaptureUnsupported", "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"): (
        "while a step is recorded as a graph, no result can be read on the host: take "
        "that out of the layer or callback, or train with Trainer(capture=False)"
    ),
    ("cudaErrorNoKernelImageForDevice", "CUDA_ERROR_NO_BINARY_FOR_GPU"): (
        "no kernels for this GPU are shipped: pip install 'cycnn[jit]' compiles them"
    ),
}
_ADVICE = {name: advice for names, advice in _ADVICE.items() for name in names}


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
