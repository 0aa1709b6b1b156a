# cython: language_level=3
"""Kernels: loaded at their first launch, launched with checked arguments."""

import threading

from operator import index as index_of

from cpython.long cimport PyLong_Check
from cuda.bindings cimport cydriver, cyruntime
from libc.stdint cimport int64_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memset

from ._check cimport check, check_driver
from .device cimport Device, get
from .stream cimport Stream

from . import compile as kernel_compile

cdef enum:
    MAX_ARGUMENTS = 32
    MAX_DEVICES = 32

cdef dict _libraries = {}
cdef object _lock = threading.Lock()
cdef unsigned long long _generation = 1


cdef union Argument:
    uintptr_t pointer
    int i
    uint32_t u
    int64_t q
    uint64_t Q
    float f


cdef class Library:
    """The kernels of one ``cuda/<name>.cu``, loaded for one device."""

    cdef cydriver.CUlibrary handle
    cdef readonly str name

    def __cinit__(self):
        self.handle = NULL

    def __init__(self, str name, bytes image):
        self.name = name
        check_driver(
            cydriver.cuLibraryLoadData(
                &self.handle, <const char*>image, NULL, NULL, 0, NULL, NULL, 0
            ),
            f"cuLibraryLoadData ({name})",
        )

    def close(self):
        """Unload the kernels; nothing may be running them."""
        cdef cydriver.CUlibrary handle = self.handle
        self.handle = NULL
        if handle != NULL:
            check_driver(cydriver.cuLibraryUnload(handle), "cuLibraryUnload")


cdef Library _library(Kernel kernel, Device device):
    key = (kernel.library, kernel.options, kernel.specific, device.index)
    cdef Library library = _libraries.get(key)
    if library is None:
        with _lock:
            library = _libraries.get(key)
            if library is None:
                image = kernel_compile.load(*kernel.request(device.arch))
                library = Library(kernel.library, image)
                _libraries[key] = library
    return library


cdef class Kernel:
    """A ``__global__`` function of ``cuda/<library>.cu``.

    Declaring one loads nothing; the first launch on a device does.

    Parameters
    ----------
    library : str
        Stem of the file.
    name : str
        The function's name, declared ``extern "C"``.
    signature : str
        A letter for each parameter: ``P`` pointer (a Tensor or DeviceBuffer on the
        device, or None for a null pointer), ``i`` int, ``u`` unsigned int, ``q`` long
        long, ``Q`` unsigned long long, ``f`` float.
    options : tuple of str
        Options for the compiler, such as ``"-DC=32"``: the kernel is specialised for
        them.
    specific : bool
        Compile for exactly this architecture (``sm_90a``), whose instructions no later
        one has.

    Notes
    -----
    A launch is queued, not awaited. An error inside the kernel shows in a later call.
    """

    cdef readonly str library
    cdef readonly str name
    cdef readonly str signature
    cdef readonly tuple options
    cdef readonly bint specific
    cdef bytes letters
    cdef cydriver.CUkernel handles[MAX_DEVICES]
    cdef unsigned int shared_limit[MAX_DEVICES]
    cdef unsigned long long generation

    def __cinit__(self):
        memset(self.handles, 0, sizeof(self.handles))

    def __init__(
        self, str library, str name, str signature, tuple options=(), bint specific=False
    ):
        self.library = library
        self.options = options
        self.specific = specific
        self.name = name
        self.signature = signature
        self.letters = signature.encode()
        self.generation = 0
        unknown = set(signature) - set("PiuqQf")
        if unknown or len(signature) > MAX_ARGUMENTS:
            raise ValueError(
                f"kernel signature {signature!r}: expected at most {MAX_ARGUMENTS} of "
                f"the letters P i u q Q f"
            )

    def request(self, str arch):
        """What :func:`cycnn.gpu.compile.load` is asked for on an ``arch`` ("sm_90").

        Returns
        -------
        (str, str, tuple of str)
            Library, architecture and options.
        """
        return self.library, arch + "a" if self.specific else arch, self.options

    cdef cydriver.CUkernel load(self, int index) except NULL:
        cdef cydriver.CUkernel handle = NULL
        cdef bytes name = self.name.encode()
        if self.generation != _generation:
            memset(self.handles, 0, sizeof(self.handles))
            self.generation = _generation
        if index >= MAX_DEVICES:
            raise ValueError(f"cycnn uses devices 0 to {MAX_DEVICES - 1}, got {index}")
        library = _library(self, get(index))
        check_driver(
            cydriver.cuLibraryGetKernel(
                &handle, (<Library>library).handle, <const char*>name
            ),
            f"cuLibraryGetKernel ({self.library}.{self.name})",
        )
        self.handles[index] = handle
        # without the attribute a block gets at most 48 KiB
        self.shared_limit[index] = 48 * 1024
        return handle

    def __call__(
        self,
        Stream stream not None,
        grid,
        block,
        *arguments,
        unsigned int shared=0,
        unsigned int cluster=1,
        bint dependent=False,
    ):
        """Queue the kernel on ``stream``.

        Parameters
        ----------
        stream : Stream
        grid, block : int or tuple of int
            Blocks, and threads a block; up to three sizes.
        *arguments
            As many as the signature has letters.
        shared : int
            Bytes of dynamic shared memory.
        cluster : int
            Blocks of a thread-block cluster, along x.
        dependent : bool
            Programmatic dependent launch: the kernel may start before the one ahead of
            it in the stream has finished. It must execute griddepcontrol.wait before
            it touches what that one writes.

        Raises
        ------
        TypeError
            If an argument is not what the signature says.
        CudaError
            If the launch is refused.
        """
        cdef Argument storage[MAX_ARGUMENTS]
        cdef void* pointers[MAX_ARGUMENTS]
        cdef unsigned int g[3]
        cdef unsigned int b[3]
        cdef int index = stream.device_index
        cdef cydriver.CUkernel handle = NULL
        cdef Py_ssize_t position, count = len(self.letters)
        cdef const char* letters = <const char*>self.letters
        cdef char letter
        if len(arguments) != count:
            raise TypeError(
                f"kernel {self.name} takes {count} arguments ({self.signature}), got "
                f"{len(arguments)}"
            )
        for position in range(count):
            letter = letters[position]
            argument = arguments[position]
            pointers[position] = &storage[position]
            try:
                if letter == b"P":
                    if argument is None:
                        storage[position].pointer = 0
                    else:
                        # None for a tensor in host memory, which raises here
                        storage[position].pointer = argument._ptr
                    continue
                if letter == b"f":
                    storage[position].f = argument
                    continue
                # Cython would cut a float down to an int
                if not PyLong_Check(argument):
                    argument = index_of(argument)
                if letter == b"i":
                    storage[position].i = argument
                elif letter == b"q":
                    storage[position].q = argument
                elif letter == b"u":
                    storage[position].u = argument
                else:
                    storage[position].Q = argument
            except (TypeError, AttributeError, OverflowError) as error:
                raise TypeError(
                    f"kernel {self.name}, argument {position} of ({self.signature}): "
                    f"{argument!r} does not fit {chr(letter)!r}: {error}"
                ) from None
        _dimensions(grid, g)
        _dimensions(block, b)
        if index < MAX_DEVICES and self.generation == _generation:
            handle = self.handles[index]
        if handle == NULL:
            handle = self.load(index)
        if shared > self.shared_limit[index]:
            check_driver(
                cydriver.cuKernelSetAttribute(
                    cydriver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                    <int>shared,
                    handle,
                    index,
                ),
                f"cuKernelSetAttribute ({self.name}, {shared} bytes of shared memory)",
            )
            self.shared_limit[index] = shared
        # the driver launches in the calling thread's current context
        check(cyruntime.cudaSetDevice(index), "cudaSetDevice")
        cdef cydriver.CUlaunchAttribute attributes[2]
        cdef cydriver.CUlaunchConfig config
        config.gridDimX, config.gridDimY, config.gridDimZ = g[0], g[1], g[2]
        config.blockDimX, config.blockDimY, config.blockDimZ = b[0], b[1], b[2]
        config.sharedMemBytes = shared
        config.hStream = <cydriver.CUstream>stream.handle
        config.attrs = attributes
        config.numAttrs = 0
        if cluster > 1:
            attributes[0].id = (
                cydriver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            )
            attributes[0].value.clusterDim.x = cluster
            attributes[0].value.clusterDim.y = 1
            attributes[0].value.clusterDim.z = 1
            config.numAttrs = 1
        if dependent:
            attributes[config.numAttrs].id = (
                cydriver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            )
            attributes[config.numAttrs].value.programmaticStreamSerializationAllowed = 1
            config.numAttrs += 1
        cdef cydriver.CUresult status = cydriver.cuLaunchKernelEx(
            &config, <cydriver.CUfunction>handle, pointers, NULL
        )
        if status != cydriver.CUresult.CUDA_SUCCESS:
            check_driver(
                status,
                f"launch of {self.name} (grid {grid}, block {block}, {shared} bytes "
                f"shared)",
            )

    def __repr__(self):
        return f"<Kernel {self.library}.{self.name} ({self.signature})>"


cdef int _dimensions(sizes, unsigned int* out) except -1:
    cdef Py_ssize_t axis
    out[0] = out[1] = out[2] = 1
    if isinstance(sizes, tuple):
        for axis in range(len(<tuple>sizes)):
            if axis > 2:
                raise ValueError(f"a grid or block has at most 3 sizes, got {sizes}")
            out[axis] = (<tuple>sizes)[axis]
    else:
        out[0] = sizes
    return 0


def unload_all():
    """Unload every library; kernels load again at their next launch."""
    global _generation
    with _lock:
        libraries = list(_libraries.values())
        _libraries.clear()
        _generation += 1
    for library in libraries:
        library.close()
