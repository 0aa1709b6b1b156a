# cython: language_level=3
"""Tensors: a shape and a dtype over memory of one device.

A tensor is always C-contiguous. On the CPU it wraps a NumPy array, on a GPU a
:class:`cycnn.gpu.memory.DeviceBuffer`; nothing here imports CUDA until a tensor on a
GPU is asked for.
"""

import math

import numpy as np

from .devices import CPU
from .devices import device as as_device
from .errors import ShapeError

DTYPES = tuple(np.dtype(name) for name in ("float32", "int32", "uint8"))
_FLOAT32, _INT32, _UINT8 = DTYPES
_INT32_RANGE = np.iinfo(np.int32)


# cycnn.gpu.memory, once a tensor on a GPU was asked for.
cdef object _memory = None


cdef _gpu():
    global _memory
    if _memory is None:
        from .gpu import memory

        _memory = memory
    return _memory


def _as_dtype(dtype) -> np.dtype:
    found = np.dtype(dtype)
    if found not in DTYPES:
        raise TypeError(
            f"dtype {found} is not supported: cycnn tensors are float32, int32 "
            f"or uint8"
        )
    return found


def _as_shape(shape) -> tuple:
    if isinstance(shape, (int, np.integer)):
        shape = (shape,)
    shape = tuple(int(n) for n in shape)
    if any(n < 0 for n in shape):
        raise ShapeError(f"a shape has no negative sizes, got {shape}")
    return shape


def _convert(data) -> np.ndarray:
    """A C-contiguous array of a supported dtype, converted at most once."""
    array = np.asarray(data)
    kind = array.dtype.kind
    if kind == "f":
        dtype = _FLOAT32
    elif array.dtype == _UINT8:
        dtype = _UINT8
    elif kind in "iub":
        if kind in "iu" and array.dtype != _INT32 and array.size:
            low, high = array.min(), array.max()
            if low < _INT32_RANGE.min or high > _INT32_RANGE.max:
                raise TypeError(
                    f"integers from {low} to {high} do not fit int32, which is what "
                    f"cycnn computes with"
                )
        dtype = _INT32
    else:
        raise TypeError(
            f"cannot make a tensor of dtype {array.dtype}: expected real numbers "
            f"(floats become float32, integers int32, uint8 stays uint8)"
        )
    # ascontiguousarray would turn a scalar into shape (1,)
    return np.asarray(array, dtype=dtype, order="C")


cdef class Tensor:
    """Numbers on a device.

    Parameters
    ----------
    data : array_like or Tensor
        Copied. Floating-point input becomes float32, integers int32, uint8 stays.
    device : None, str or Device
        Where to put it; None is the default device (the first GPU, else the CPU), or
        for a Tensor the device that it is on.

    Raises
    ------
    TypeError
        If the numbers are complex, objects, or integers that do not fit int32.
    """

    cdef tuple _shape
    cdef object _dtype
    cdef object _device
    # the address on a GPU, which kernels are given; None in host memory
    cdef readonly object _ptr
    # the array or DeviceBuffer, which may hold more than this tensor
    cdef object _storage
    cdef object __weakref__

    def __init__(self, data, device=None):
        if isinstance(data, Tensor):
            target = data.device if device is None else as_device(device)
            made = empty(data.shape, data.dtype, target)
            made.copy_(data)
        else:
            target = as_device(device)
            array = _convert(data)
            if target.is_cuda:
                made = empty(array.shape, array.dtype, target)
                made.copy_(array)
            else:
                if np.may_share_memory(array, data) or array is data:
                    array = array.copy()
                made = _of_array(array)
        cdef Tensor source = made
        self._shape, self._dtype = source._shape, source._dtype
        self._device, self._ptr = source._device, source._ptr
        self._storage = source._storage

    # what it is

    @property
    def shape(self) -> tuple:
        return self._shape

    @property
    def dtype(self) -> np.dtype:
        return self._dtype

    @property
    def device(self):
        return self._device

    @property
    def ndim(self) -> int:
        return len(self._shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return _count(self._shape)

    @property
    def nbytes(self) -> int:
        return _count(self._shape) * self._dtype.itemsize

    @property
    def ptr(self) -> int:
        """Address of the first element, on the tensor's device."""
        return self._ptr if self._ptr is not None else self._storage.ctypes.data

    @property
    def array(self) -> np.ndarray:
        """The array behind a CPU tensor: shared memory, no copy."""
        if self._device.is_cuda:
            raise TypeError(
                f"a tensor on {self._device} has no array in host memory; "
                f".numpy() copies it"
            )
        return self._storage

    def __len__(self):
        if not self._shape:
            raise TypeError("a tensor of shape () has no length")
        return self._shape[0]

    def __repr__(self):
        head = f"Tensor(shape={self._shape}, dtype={self._dtype}, device='{self._device}'"
        if self.size <= 8:
            return f"{head}, values={self.numpy().tolist()})"
        return head + ")"

    # to the host

    def numpy(self) -> np.ndarray:
        """A copy in host memory. On a GPU this waits for the work that makes it."""
        if not self._device.is_cuda:
            return self._storage.copy()
        out = np.empty(self._shape, self._dtype)
        if out.nbytes:
            _gpu().copy_to_host(out, self._ptr, self._device.index)
        return out

    def __array__(self, dtype=None, copy=None):
        if self._device.is_cuda or copy:
            if copy is False:
                raise ValueError(f"a tensor on {self._device} cannot be had uncopied")
            array = self.numpy()
        else:
            array = self._storage
        return array if dtype is None else array.astype(dtype, copy=False)

    def item(self):
        """The only element, as a Python number. On a GPU this waits for it."""
        if self.size != 1:
            raise TypeError(
                f"only a tensor of one element is a number, this has shape "
                f"{self._shape}"
            )
        return self.numpy().item()

    def __float__(self):
        return float(self.item())

    def __int__(self):
        return int(self.item())

    # elsewhere, or in another shape

    def to(self, device) -> Tensor:
        """This tensor if it is on ``device`` already, else a copy there."""
        target = as_device(device)
        if target == self._device:
            return self
        return Tensor(self, target)

    def reshape(self, *shape) -> Tensor:
        """The same memory in another shape; one size may be -1.

        Raises
        ------
        ShapeError
            If the number of elements differs.
        """
        if len(shape) == 1 and not isinstance(shape[0], (int, np.integer)):
            shape = shape[0]
        wanted = [int(n) for n in shape]
        size = self.size
        if wanted.count(-1) == 1:
            known = math.prod(n for n in wanted if n != -1)
            if known > 0 and size % known == 0:
                wanted[wanted.index(-1)] = size // known
        if any(n < 0 for n in wanted) or math.prod(wanted) != size:
            raise ShapeError(
                f"cannot reshape {self._shape} ({size} elements) to {tuple(shape)}"
            )
        return self._view(tuple(wanted), 0)

    def __getitem__(self, key) -> Tensor:
        """Rows ``key`` of the first axis, sharing memory: ``t[i]`` or ``t[a:b]``."""
        length = len(self)
        row = math.prod(self._shape[1:])
        if isinstance(key, (int, np.integer)):
            start = int(key) + (length if key < 0 else 0)
            if not 0 <= start < length:
                raise IndexError(f"index {key} is outside the first axis of {length}")
            return self._view(self._shape[1:], start * row)
        if isinstance(key, slice):
            start, stop, step = key.indices(length)
            if step != 1:
                raise IndexError(
                    f"only slices of step 1 keep a tensor contiguous, got step {step}"
                )
            return self._view((max(stop - start, 0), *self._shape[1:]), start * row)
        raise TypeError(
            f"tensors are indexed by one integer or one slice of the first axis, "
            f"got {key!r}"
        )

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    cdef Tensor _view(self, tuple shape, offset):
        """``shape`` elements from element ``offset`` on, sharing this memory."""
        if not self._device.is_cuda:
            count = math.prod(shape)
            flat = self._storage.reshape(-1)
            return _of_array(flat[offset : offset + count].reshape(shape))
        address = self._ptr + offset * self._dtype.itemsize
        return _new(shape, self._dtype, self._device, address, self._storage)

    # writing

    def copy_(self, source) -> Tensor:
        """Overwrite with ``source`` (a Tensor on any device, or an array); returns self.

        Raises
        ------
        ShapeError, TypeError
            If shape or dtype differ. Nothing is written then.
        """
        if not isinstance(source, Tensor):
            source = _of_array(_convert(source))
        return self._copy(source)

    cdef Tensor _copy(self, Tensor source):
        if source._shape != self._shape:
            raise ShapeError(f"cannot copy shape {source._shape} into {self._shape}")
        if source._dtype != self._dtype:
            raise TypeError(f"cannot copy {source._dtype} into {self._dtype}")
        nbytes = self.nbytes
        if not nbytes:
            return self
        here, there = self._device, source._device
        if not here.is_cuda and not there.is_cuda:
            self._storage[...] = source._storage
        elif not there.is_cuda:
            _gpu().copy_from_host(self._ptr, source._storage, here.index)
        elif not here.is_cuda:
            _gpu().copy_to_host(self._storage, source._ptr, there.index)
        else:
            _gpu().copy_device(
                self._ptr, here.index, source._ptr, there.index, nbytes
            )
        return self

    def fill_(self, value) -> Tensor:
        """Set every element to ``value``; returns self."""
        if not self._device.is_cuda:
            self._storage.fill(value)
        elif self.nbytes:
            pattern = np.full(1, value, self._dtype).view(f"u{self._dtype.itemsize}")
            _gpu().fill_pattern(
                self._ptr,
                int(pattern[0]),
                self._dtype.itemsize,
                self.size,
                self._device.index,
            )
        return self

    # exchange with other libraries

    @property
    def __cuda_array_interface__(self):
        if not self._device.is_cuda:
            raise AttributeError(
                f"a tensor on {self._device} has no CUDA array interface"
            )
        return {
            "shape": self._shape,
            "typestr": self._dtype.str,
            "data": (self._ptr, False),
            "strides": None,
            "version": 3,
            "stream": _gpu().compute_stream_handle(self._device.index),
        }

    def __dlpack_device__(self):
        from . import _dlpack

        return _dlpack.device_of(self)

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        from . import _dlpack

        return _dlpack.to_capsule(self, stream, max_version, dl_device, copy)


cpdef Tensor on_gpu(tuple shape, dtype, device, ptr, storage):
    """A tensor over memory that ``storage`` keeps alive."""
    return _new(shape, dtype, device, ptr, storage)


cdef Tensor _new(tuple shape, dtype, device, ptr, storage):
    cdef Tensor made = Tensor.__new__(Tensor)
    made._shape, made._dtype, made._device = shape, dtype, device
    made._ptr, made._storage = ptr, storage
    return made


cdef Tensor _of_array(array):
    """A CPU tensor that shares ``array``, which must be C-contiguous already."""
    # the address is looked up when asked for: ndarray.ctypes costs a microsecond
    return _new(array.shape, array.dtype, CPU, None, array)


def from_array(array: np.ndarray) -> Tensor:
    """A CPU tensor that shares the memory of ``array``.

    Raises
    ------
    TypeError
        If the array is not C-contiguous or of a dtype that tensors do not have.
    """
    _as_dtype(array.dtype)
    if not array.flags.c_contiguous:
        raise TypeError("only a C-contiguous array can be shared; Tensor(array) copies")
    return _of_array(array)


def empty(shape, dtype="float32", device=None) -> Tensor:
    """A tensor whose elements are not set.

    Parameters
    ----------
    shape : int or tuple of int
    dtype : {"float32", "int32", "uint8"}
    device : None, str or Device
        None is the default device.
    """
    shape, dtype, device = _as_shape(shape), _as_dtype(dtype), as_device(device)
    if not device.is_cuda:
        return _of_array(np.empty(shape, dtype))
    return empty_on_gpu(shape, dtype, device)


cpdef Tensor empty_on_gpu(tuple shape, dtype, device):
    """:func:`empty` without its checks, for operations that made them already."""
    buffer = _gpu().DeviceBuffer(_count(shape) * dtype.itemsize, device.index)
    return _new(shape, dtype, device, buffer._ptr, buffer)


cdef _count(tuple shape):
    count = 1
    for size in shape:
        count = count * size
    return count


def zeros(shape, dtype="float32", device=None) -> Tensor:
    """A tensor of zeros; see :func:`empty`."""
    made = empty(shape, dtype, device)
    return made.fill_(0)


def from_dlpack(source) -> Tensor:
    """A tensor that shares the memory of another library's array.

    Parameters
    ----------
    source : object with ``__dlpack__`` and ``__dlpack_device__``
        On the CPU or a GPU; float32, int32 or uint8; C-contiguous. It is kept alive as
        long as the tensor lives.

    Raises
    ------
    TypeError
        If the dtype is another one, or the memory is not contiguous or not reachable.
    """
    from . import _dlpack

    return _dlpack.from_producer(source)


def synchronize(device=None) -> None:
    """Wait until the device has done everything asked of it. A no-op on the CPU."""
    device = as_device(device)
    if device.is_cuda:
        _gpu().synchronize(device.index)


def shutdown(reset: bool = False) -> None:
    """Free what cycnn holds on the GPUs: kernels, unused memory, streams.

    For processes that go on without CUDA, and for leak checkers. A no-op where no GPU
    was used.

    Parameters
    ----------
    reset : bool
        Also reset the devices. Other CUDA libraries of this process lose their data,
        and tensors on a GPU must not be used afterwards.
    """
    from . import gpu

    gpu.shutdown(reset)
