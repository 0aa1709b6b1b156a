# cython: language_level=3
"""DLPack: sharing memory with NumPy, PyTorch, CuPy, JAX without a copy.

The structures are those of the DLPack specification (dmlc/dlpack, version 1.1), of
which the part before version 1.0 is what "dltensor" capsules hold.
"""

cimport cython
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.pycapsule cimport (
    PyCapsule_GetPointer,
    PyCapsule_IsValid,
    PyCapsule_New,
    PyCapsule_SetName,
)
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t

import numpy as np

from . import tensor as _tensor
from .devices import CPU, Device

cdef enum:
    DEVICE_CPU = 1
    DEVICE_CUDA = 2
    DEVICE_CUDA_HOST = 3
    FLAG_READ_ONLY = 1

cdef struct DLDevice:
    int32_t device_type
    int32_t device_id

cdef struct DLDataType:
    uint8_t code
    uint8_t bits
    uint16_t lanes

cdef struct DLTensor:
    void* data
    DLDevice device
    int32_t ndim
    DLDataType dtype
    int64_t* shape
    int64_t* strides
    uint64_t byte_offset

cdef struct DLManagedTensor:
    DLTensor dl_tensor
    void* manager_ctx
    void (*deleter)(DLManagedTensor*) noexcept

cdef struct DLPackVersion:
    uint32_t major
    uint32_t minor

cdef struct DLManagedTensorVersioned:
    DLPackVersion version
    void* manager_ctx
    void (*deleter)(DLManagedTensorVersioned*) noexcept
    uint64_t flags
    DLTensor dl_tensor

# (code, bits) of kDLFloat 32, kDLInt 32, kDLUInt 8
_CODES = {"float32": (2, 32), "int32": (0, 32), "uint8": (1, 8)}
_DTYPES = {code: np.dtype(name) for name, code in _CODES.items()}


def device_of(tensor):
    """The tensor's (device type, index) in DLPack's numbers."""
    if tensor.device.is_cuda:
        return DEVICE_CUDA, tensor.device.index
    return DEVICE_CPU, 0


def to_capsule(tensor, stream, max_version, dl_device, copy):
    """What ``Tensor.__dlpack__`` returns; see the array API standard."""
    if dl_device is not None and tuple(dl_device) != device_of(tensor):
        raise BufferError(
            f"a tensor on {tensor.device} cannot be exported to DLPack device "
            f"{tuple(dl_device)}: move it with .to() first"
        )
    if not tensor.device.is_cuda:
        if stream is not None:
            raise BufferError("a tensor on the CPU has no stream: stream must be None")
        return tensor.array.__dlpack__(**_given(max_version, copy))
    if copy:
        tensor = _tensor.Tensor(tensor)
    _hand_over(tensor.device.index, stream)
    if max_version is not None and max_version[0] >= 1:
        return _versioned_capsule(tensor, stream)
    return _legacy_capsule(tensor, stream)


def _given(max_version, copy):
    # NumPy before 2.1 knows neither argument, so pass on only what was asked for
    given = {}
    if max_version is not None and np.lib.NumpyVersion(np.__version__) >= "2.1.0":
        given["max_version"] = max_version
    if copy is not None and np.lib.NumpyVersion(np.__version__) >= "2.1.0":
        given["copy"] = copy
    return given


def _hand_over(index, stream):
    """Let the consumer's stream wait for what this tensor's stream has queued."""
    from .gpu import device as gpu_device
    from .gpu.stream import Stream

    if stream == -1:
        return
    if stream == 0:
        raise BufferError(
            "stream 0 is ambiguous in DLPack: pass 1 for the legacy default stream, "
            "2 for the per-thread one, or a stream's address"
        )
    compute = gpu_device.get(index).compute
    handle = 1 if stream is None else stream
    if handle != compute.address:
        Stream.borrow(handle, index, None).wait_stream(compute)


cdef int _describe(DLTensor* target, tensor) except -1:
    cdef int axis
    shape = tensor.shape
    target.data = <void*><uintptr_t>tensor.ptr
    target.device.device_type = DEVICE_CUDA
    target.device.device_id = tensor.device.index
    target.ndim = len(shape)
    target.dtype.code, target.dtype.bits = _CODES[tensor.dtype.name]
    target.dtype.lanes = 1
    target.byte_offset = 0
    # strides are never null from version 1.2 on, so give them always
    target.shape = <int64_t*>PyMem_Malloc(max(1, 2 * len(shape)) * sizeof(int64_t))
    if target.shape == NULL:
        raise MemoryError("no host memory for a DLPack shape")
    target.strides = target.shape + target.ndim
    step = 1
    for axis in range(target.ndim - 1, -1, -1):
        target.shape[axis] = shape[axis]
        target.strides[axis] = step
        step *= shape[axis]
    return 0


class _Export:
    """What a capsule keeps alive: the tensor, and the stream that reads it."""

    def __init__(self, tensor, stream):
        self.tensor = tensor
        self.stream = stream

    def release(self):
        """Let the tensor's stream wait for the reader, whose work may still be queued.

        The memory is freed in the order of the tensor's own stream.
        """
        from .gpu import device as gpu_device
        from .gpu.stream import Stream

        index = self.tensor.device.index
        if self.stream in (None, 1, 2):
            reader = Stream.borrow(self.stream or 1, index, None)
            gpu_device.get(index).compute.wait_stream(reader)
        else:
            # the reader may have destroyed its stream by now, so do not touch that
            gpu_device.synchronize_context(index)


cdef void _release(void* context) noexcept:
    export = <object>context
    try:
        export.release()
    except Exception:
        pass  # a destructor cannot raise; a dead context has no work queued
    Py_DECREF(export)


cdef void _delete_legacy(DLManagedTensor* managed) noexcept with gil:
    _release(managed.manager_ctx)
    PyMem_Free(managed.dl_tensor.shape)
    PyMem_Free(managed)


cdef void _delete_versioned(DLManagedTensorVersioned* managed) noexcept with gil:
    _release(managed.manager_ctx)
    PyMem_Free(managed.dl_tensor.shape)
    PyMem_Free(managed)


# A capsule that nobody consumed still has its first name when it dies.

cdef void _drop_legacy(object capsule) noexcept:
    cdef DLManagedTensor* managed
    if PyCapsule_IsValid(capsule, "dltensor"):
        managed = <DLManagedTensor*>PyCapsule_GetPointer(capsule, "dltensor")
        managed.deleter(managed)


cdef void _drop_versioned(object capsule) noexcept:
    cdef DLManagedTensorVersioned* managed
    if PyCapsule_IsValid(capsule, "dltensor_versioned"):
        managed = <DLManagedTensorVersioned*>PyCapsule_GetPointer(
            capsule, "dltensor_versioned"
        )
        managed.deleter(managed)


cdef _legacy_capsule(tensor, stream):
    cdef DLManagedTensor* managed = <DLManagedTensor*>PyMem_Malloc(sizeof(DLManagedTensor))
    if managed == NULL:
        raise MemoryError("no host memory for a DLPack tensor")
    try:
        _describe(&managed.dl_tensor, tensor)
    except BaseException:
        PyMem_Free(managed)
        raise
    export = _Export(tensor, stream)
    Py_INCREF(export)
    managed.manager_ctx = <void*>export
    managed.deleter = _delete_legacy
    return PyCapsule_New(managed, "dltensor", _drop_legacy)


cdef _versioned_capsule(tensor, stream):
    cdef DLManagedTensorVersioned* managed = <DLManagedTensorVersioned*>PyMem_Malloc(
        sizeof(DLManagedTensorVersioned)
    )
    if managed == NULL:
        raise MemoryError("no host memory for a DLPack tensor")
    try:
        _describe(&managed.dl_tensor, tensor)
    except BaseException:
        PyMem_Free(managed)
        raise
    export = _Export(tensor, stream)
    Py_INCREF(export)
    managed.version.major = 1
    managed.version.minor = 0
    managed.manager_ctx = <void*>export
    managed.deleter = _delete_versioned
    managed.flags = 0
    return PyCapsule_New(managed, "dltensor_versioned", _drop_versioned)


@cython.no_gc_clear
cdef class _Producer:
    """Keeps another library's tensor alive, and tells it when we are done."""

    cdef DLManagedTensor* legacy
    cdef DLManagedTensorVersioned* versioned
    # our stream, whose queued work may still read the memory
    cdef object reader

    def __dealloc__(self):
        if self.reader is not None:
            try:
                self.reader.synchronize()
            except Exception:
                pass  # a destructor cannot raise; a dead context has no work queued
        if self.legacy != NULL and self.legacy.deleter != NULL:
            self.legacy.deleter(self.legacy)
        if self.versioned != NULL and self.versioned.deleter != NULL:
            self.versioned.deleter(self.versioned)


def from_producer(source):
    """The tensor that :func:`cycnn.from_dlpack` returns."""
    try:
        device_type, index = source.__dlpack_device__()
    except AttributeError:
        raise TypeError(
            f"{type(source).__name__} does not support DLPack (no __dlpack_device__)"
        ) from None
    if device_type == DEVICE_CPU:
        array = np.from_dlpack(source)
        if not array.flags.c_contiguous:
            raise TypeError(
                f"only C-contiguous memory can be shared, got strides {array.strides} "
                f"for shape {array.shape}: copy it first"
            )
        return _tensor.from_array(array)
    if device_type != DEVICE_CUDA:
        raise TypeError(
            f"DLPack device type {int(device_type)} is not reachable: expected CPU (1) "
            f"or CUDA (2)"
        )
    return _from_cuda(source, int(index))


cdef _from_cuda(source, int index):
    from .devices import device as as_device
    from .gpu import device as gpu_device

    cdef _Producer producer = _Producer.__new__(_Producer)
    cdef DLTensor* found
    cdef int axis
    device = as_device(f"cuda:{index}")
    producer.reader = gpu_device.get(index).compute
    stream = producer.reader.address
    try:
        capsule = source.__dlpack__(stream=stream, max_version=(1, 0))
    except TypeError:
        # producers from before version 1.0 know only the stream
        capsule = source.__dlpack__(stream=stream)
    if PyCapsule_IsValid(capsule, "dltensor_versioned"):
        producer.versioned = <DLManagedTensorVersioned*>PyCapsule_GetPointer(
            capsule, "dltensor_versioned"
        )
        PyCapsule_SetName(capsule, "used_dltensor_versioned")
        if producer.versioned.version.major > 1:
            raise TypeError(
                f"DLPack version {producer.versioned.version.major} is not understood"
            )
        if producer.versioned.flags & FLAG_READ_ONLY:
            raise TypeError("the memory is read-only; a tensor is always writable: copy it")
        found = &producer.versioned.dl_tensor
    else:
        producer.legacy = <DLManagedTensor*>PyCapsule_GetPointer(capsule, "dltensor")
        PyCapsule_SetName(capsule, "used_dltensor")
        found = &producer.legacy.dl_tensor
    dtype = _DTYPES.get((found.dtype.code, found.dtype.bits))
    if dtype is None or found.dtype.lanes != 1:
        raise TypeError(
            f"DLPack dtype (code {found.dtype.code}, {found.dtype.bits} bits, "
            f"{found.dtype.lanes} lanes) is not supported: expected float32, int32 or "
            f"uint8"
        )
    shape = tuple([found.shape[axis] for axis in range(found.ndim)])
    if found.strides != NULL and 0 not in shape:
        step = 1
        for axis in range(found.ndim - 1, -1, -1):
            if shape[axis] != 1 and found.strides[axis] != step:
                raise TypeError(
                    f"only C-contiguous memory can be shared, got strides "
                    f"{tuple([found.strides[i] for i in range(found.ndim)])} for shape "
                    f"{shape}: copy it first"
                )
            step *= shape[axis]
    address = <uintptr_t>found.data + found.byte_offset
    return _tensor.on_gpu(shape, dtype, device, address, producer)
