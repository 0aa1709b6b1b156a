# cython: language_level=3
"""GPUs, initialised when first used."""

import os
import threading

from cuda.bindings cimport cydriver, cyruntime

from cycnn.errors import CudaError

from ._check cimport check, check_driver
from .stream cimport Stream

from .stream import contexts_were_reset

_MINIMUM_CAPABILITY = (7, 5)
_FORKED = (
    "this process was forked after its parent had used the GPU, which CUDA "
    "does not support: start workers with multiprocessing's 'spawn' method, "
    "or fork before the first use of the GPU"
)

cdef list _devices = []
cdef object _lock = threading.Lock()
# Whether CUDA was, in this process or before a fork. To ask for a GPU initialises it.
cdef bint _initialised = False
cdef bint _forked = False


def _after_fork_in_child():
    # CUDA does not survive a fork: a child that went on would hang or crash later
    global _forked
    if _initialised:
        _forked = True
        contexts_were_reset()  # what the parent made is not the child's to free


os.register_at_fork(after_in_child=_after_fork_in_child)


cdef int _refuse_if_forked() except -1:
    if _forked:
        raise CudaError(_FORKED)
    return 0


cdef class Device:
    """One GPU: its properties, its compute stream and its copy stream.

    Attributes
    ----------
    index : int
    name : str
        As the driver gives it, for instance ``"NVIDIA H100 80GB HBM3"``.
    capability : tuple of int
        Compute capability, (major, minor).
    arch : str
        ``"sm_90"`` for capability (9, 0).
    sm_count : int
        Number of streaming multiprocessors.
    max_shared_bytes : int
        Most dynamic shared memory that one block can ask for.
    compute, copy : Stream
    """

    def __init__(self, int index):
        cdef char name[256]
        cdef cydriver.CUdevice handle
        cdef cyruntime.cudaMemPool_t pool
        cdef unsigned long long threshold = 0xFFFFFFFFFFFFFFFFULL
        self.index = index
        check(cyruntime.cudaSetDevice(index), "cudaSetDevice")
        check_driver(cydriver.cuDeviceGet(&handle, index), "cuDeviceGet")
        check_driver(cydriver.cuDeviceGetName(name, 256, handle), "cuDeviceGetName")
        self.name = (<bytes>name).decode()
        self.capability = (
            attribute(index, cyruntime.cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor),
            attribute(index, cyruntime.cudaDeviceAttr.cudaDevAttrComputeCapabilityMinor),
        )
        self.arch = f"sm_{self.capability[0]}{self.capability[1]}"
        self.sm_count = attribute(
            index, cyruntime.cudaDeviceAttr.cudaDevAttrMultiProcessorCount
        )
        self.max_shared_bytes = attribute(
            index, cyruntime.cudaDeviceAttr.cudaDevAttrMaxSharedMemoryPerBlockOptin
        )
        # The pool keeps what is freed: giving memory back to the driver at every
        # synchronisation would cost more than all the allocations of a step.
        check(
            cyruntime.cudaDeviceGetDefaultMemPool(&pool, index),
            "cudaDeviceGetDefaultMemPool",
        )
        check(
            cyruntime.cudaMemPoolSetAttribute(
                pool,
                cyruntime.cudaMemPoolAttr.cudaMemPoolAttrReleaseThreshold,
                &threshold,
            ),
            "cudaMemPoolSetAttribute",
        )
        self.compute = Stream(index)
        self.copy = Stream(index)

    def synchronize(self):
        """Wait until both streams are idle."""
        self.compute.synchronize()
        self.copy.synchronize()

    def __repr__(self):
        return f"<GPU {self.index}: {self.name}, {self.arch}, {self.sm_count} SMs>"


cdef int attribute(int index, cyruntime.cudaDeviceAttr which) except? -1:
    cdef int value = 0
    check(
        cyruntime.cudaDeviceGetAttribute(&value, which, index), "cudaDeviceGetAttribute"
    )
    return value


def probe():
    """Why this process cannot use a GPU, in a sentence, or None where it can."""
    global _initialised
    cdef int found = 0
    cdef cyruntime.cudaError_t status
    if _forked:
        return _FORKED
    try:
        status = cyruntime.cudaGetDeviceCount(&found)
        if status == cyruntime.cudaError_t.cudaSuccess and found:
            _initialised = True
            check_driver(cydriver.cuInit(0), "cuInit")
    except RuntimeError as error:
        # cuda-bindings raises when it cannot load libcuda
        return f"the NVIDIA driver cannot be loaded ({error})"
    if status == cyruntime.cudaError_t.cudaErrorInsufficientDriver:
        return "there is no NVIDIA driver, or it is older than CUDA 13 needs (580)"
    if status == cyruntime.cudaError_t.cudaErrorNoDevice or (
        status == cyruntime.cudaError_t.cudaSuccess and found == 0
    ):
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        if hidden is not None:
            return f"the driver shows no GPU (CUDA_VISIBLE_DEVICES is {hidden!r})"
        return "the driver finds no GPU"
    if status != cyruntime.cudaError_t.cudaSuccess:
        name = (<bytes>cyruntime.cudaGetErrorName(status)).decode()
        return f"the driver cannot be used: {name}"
    capability = (
        attribute(0, cyruntime.cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor),
        attribute(0, cyruntime.cudaDeviceAttr.cudaDevAttrComputeCapabilityMinor),
    )
    if capability < _MINIMUM_CAPABILITY:
        return (
            f"the GPU has compute capability {capability[0]}.{capability[1]}; cycnn "
            f"needs {_MINIMUM_CAPABILITY[0]}.{_MINIMUM_CAPABILITY[1]} or newer"
        )
    return None


def count():
    """Number of GPUs that the driver shows to this process."""
    global _initialised
    cdef int found = 0
    _refuse_if_forked()
    check(cyruntime.cudaGetDeviceCount(&found), "cudaGetDeviceCount")
    _initialised = True
    return found


def driver_version():
    """The newest CUDA version that the driver supports, for instance ``(13, 0)``."""
    cdef int version = 0
    check(cyruntime.cudaDriverGetVersion(&version), "cudaDriverGetVersion")
    return version // 1000, version % 1000 // 10


cpdef Device get(int index):
    """The device, initialised at the first call."""
    global _initialised
    _refuse_if_forked()
    if index < len(_devices) and _devices[index] is not None:
        return <Device>_devices[index]
    with _lock:
        while len(_devices) <= index:
            _devices.append(None)
        if _devices[index] is None:
            _initialised = True
            _devices[index] = Device(index)
        return <Device>_devices[index]


def used():
    """The devices that were initialised."""
    return [device for device in _devices if device is not None]


def forget():
    """Close the streams of all devices; the next :func:`get` starts afresh."""
    cdef Device device
    with _lock:
        for device in used():
            device.synchronize()
            device.compute.close()
            device.copy.close()
        _devices.clear()


def synchronize_context(int index):
    """Wait for everything queued on the device by anyone in this process."""
    cdef cyruntime.cudaError_t status
    check(cyruntime.cudaSetDevice(index), "cudaSetDevice")
    with nogil:
        status = cyruntime.cudaDeviceSynchronize()
    check(status, "cudaDeviceSynchronize")


def reset(int index):
    """Destroy the device's primary context, with everything in it.

    Other libraries in this process lose it too.
    """
    check(cyruntime.cudaSetDevice(index), "cudaSetDevice")
    contexts_were_reset()
    check(cyruntime.cudaDeviceReset(), "cudaDeviceReset")
