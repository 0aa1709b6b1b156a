# cython: language_level=3
"""Streams and events: the order in which a device works."""

from cuda.bindings cimport cyruntime
from libc.stdint cimport uintptr_t

from ._check cimport check


cdef unsigned int _epoch = 0


cdef unsigned int context_epoch() noexcept:
    return _epoch


def contexts_were_reset():
    """Make destructors leave alone what was made before now.

    After a reset, and in a forked child.
    """
    global _epoch
    _epoch += 1


cdef class Stream:
    """A queue of work on one device, independent of the default stream.

    Parameters
    ----------
    device_index : int
        The device; it must exist.
    """

    def __cinit__(self, int device_index):
        self.handle = NULL
        self.epoch = _epoch
        self.device_index = device_index
        self._owner = None

    def __init__(self, int device_index):
        check(cyruntime.cudaSetDevice(device_index), "cudaSetDevice")
        # non-blocking: a stream that waits for the default stream cannot be captured
        # while another library uses that one
        check(
            cyruntime.cudaStreamCreateWithFlags(
                &self.handle, cyruntime.cudaStreamNonBlocking
            ),
            "cudaStreamCreateWithFlags",
        )

    @staticmethod
    def borrow(handle, int device_index, owner):
        """A stream of another library, which ``owner`` keeps alive."""
        cdef Stream stream = Stream.__new__(Stream, device_index)
        stream.handle = <cyruntime.cudaStream_t><uintptr_t>handle
        stream._owner = handle if owner is None else owner
        return stream

    @property
    def address(self):
        """The handle as an int, for other libraries."""
        return <uintptr_t>self.handle

    def __cuda_stream__(self):
        return 0, <uintptr_t>self.handle

    def synchronize(self):
        """Wait until everything queued so far is done."""
        cdef cyruntime.cudaError_t status
        with nogil:
            status = cyruntime.cudaStreamSynchronize(self.handle)
        check(status, "cudaStreamSynchronize")

    def wait(self, Event event not None):
        """Let later work here wait for ``event``; the host does not wait."""
        check(
            cyruntime.cudaStreamWaitEvent(self.handle, event.handle, 0),
            "cudaStreamWaitEvent",
        )

    def wait_stream(self, Stream other not None):
        """Let later work here wait for what ``other`` has queued so far."""
        event = Event(other.device_index)
        event.record(other)
        self.wait(event)

    cdef int close_handle(self) except -1:
        cdef cyruntime.cudaStream_t handle = self.handle
        self.handle = NULL
        if handle != NULL and self._owner is None:
            check(cyruntime.cudaStreamDestroy(handle), "cudaStreamDestroy")
        return 0

    def close(self):
        """Destroy the stream once its work is done."""
        self.close_handle()

    def __dealloc__(self):
        # no exception can leave a destructor, and at interpreter exit the driver may
        # be gone already, so the status is not looked at
        if self.handle != NULL and self._owner is None and self.epoch == _epoch:
            cyruntime.cudaStreamDestroy(self.handle)


cdef class Event:
    """A mark in a stream that can be waited for, and timed.

    Parameters
    ----------
    device_index : int
    timing : bool
        Whether :meth:`elapsed` will be asked; events without timing are cheaper.
    """

    def __cinit__(self, int device_index, bint timing=False):
        self.handle = NULL
        self.epoch = _epoch
        self.device_index = device_index

    def __init__(self, int device_index, bint timing=False):
        cdef unsigned int flags = cyruntime.cudaEventDefault
        if not timing:
            flags = cyruntime.cudaEventDisableTiming
        check(cyruntime.cudaSetDevice(device_index), "cudaSetDevice")
        check(
            cyruntime.cudaEventCreateWithFlags(&self.handle, flags),
            "cudaEventCreateWithFlags",
        )

    def record(self, Stream stream not None):
        """Mark this point of ``stream``."""
        check(cyruntime.cudaEventRecord(self.handle, stream.handle), "cudaEventRecord")

    def synchronize(self):
        """Wait until the mark is reached; at once if it was never recorded."""
        cdef cyruntime.cudaError_t status
        with nogil:
            status = cyruntime.cudaEventSynchronize(self.handle)
        check(status, "cudaEventSynchronize")

    def query(self):
        """Whether the mark is reached (True if it was never recorded)."""
        cdef cyruntime.cudaError_t status = cyruntime.cudaEventQuery(self.handle)
        if status == cyruntime.cudaError_t.cudaErrorNotReady:
            cyruntime.cudaGetLastError()
            return False
        check(status, "cudaEventQuery")
        return True

    def elapsed(self, Event start not None):
        """Seconds from ``start`` to this event; both timed, recorded and reached."""
        cdef float milliseconds = 0
        check(
            cyruntime.cudaEventElapsedTime(&milliseconds, start.handle, self.handle),
            "cudaEventElapsedTime",
        )
        return milliseconds * 1e-3

    def __dealloc__(self):
        if self.handle != NULL and self.epoch == _epoch:
            cyruntime.cudaEventDestroy(self.handle)
