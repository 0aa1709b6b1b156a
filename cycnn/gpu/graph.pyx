# cython: language_level=3
"""Work recorded once as a CUDA graph and replayed with one call.

A graph stores addresses, so everything that a replay reads or writes must stay where
it was. :class:`Graph` sees to that for the memory that is allocated while it records:
such buffers come from an arena that belongs to the graph. What the recorded function
was given (parameters, data) must be kept by the caller, in ``keep``.
"""

cimport cython

from cuda.bindings cimport cyruntime

from cycnn.errors import CudaError

from ._check cimport check
from .device cimport Device, get
from .memory cimport Arena, activate
from .stream cimport context_epoch


@cython.no_gc_clear
cdef class Graph:
    """A recorded sequence of kernels and copies.

    Parameters
    ----------
    device_index : int
    keep : object
        Kept alive as long as the graph: whatever owns the memory that it uses.

    Examples
    --------
    >>> graph = Graph(0)
    >>> graph.rehearse(step)     # runs step once, and loads what it needs
    >>> graph.record(step)       # records it, without running it
    >>> graph.launch()           # runs it
    """

    cdef cyruntime.cudaGraphExec_t handle
    cdef unsigned int epoch
    cdef Device device
    cdef Arena arena
    cdef public object keep
    cdef readonly size_t nodes

    def __cinit__(self):
        self.handle = NULL

    def __init__(self, int device_index, keep=None):
        self.device = get(device_index)
        self.arena = Arena(device_index)
        self.epoch = context_epoch()
        self.keep = keep
        self.nodes = 0

    @property
    def recorded(self):
        """Whether there is something to launch."""
        return self.handle != NULL

    def rehearse(self, function):
        """Run ``function()`` once, allocating from the graph's memory.

        Loading a kernel and taking memory from the driver are not allowed while a
        stream is captured; a run beforehand does both. Returns what it returns.
        """
        before = activate(self.arena)
        try:
            return function()
        finally:
            activate(before)

    def record(self, function):
        """Record what ``function()`` queues on the device's compute stream.

        Nothing runs. Returns what the function returns: tensors among it are written by
        each replay.

        Raises
        ------
        CudaError
            If the function does what cannot be recorded, for instance reads a result
            on the host. The stream stays usable.
        """
        cdef cyruntime.cudaGraph_t graph = NULL
        cdef cyruntime.cudaStream_t stream = self.device.compute.handle
        cdef cyruntime.cudaError_t status
        if self.handle != NULL:
            raise RuntimeError("this graph is recorded already: make another")
        # thread-local: other threads may go on allocating and copying meanwhile
        check(
            cyruntime.cudaStreamBeginCapture(
                stream,
                cyruntime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal,
            ),
            "cudaStreamBeginCapture",
        )
        before = activate(self.arena)
        self.arena.sealed = True
        try:
            result = function()
        except BaseException:
            # the capture must end, or the stream stays unusable
            cyruntime.cudaStreamEndCapture(stream, &graph)
            if graph != NULL:
                cyruntime.cudaGraphDestroy(graph)
            cyruntime.cudaGetLastError()
            raise
        else:
            check(cyruntime.cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture")
        finally:
            # last, since what died meanwhile is freed now, on the same stream
            activate(before)
        try:
            check(
                cyruntime.cudaGraphGetNodes(graph, NULL, &self.nodes),
                "cudaGraphGetNodes",
            )
            check(
                cyruntime.cudaGraphInstantiate(&self.handle, graph, 0),
                "cudaGraphInstantiate",
            )
        finally:
            cyruntime.cudaGraphDestroy(graph)
        check(cyruntime.cudaGraphUpload(self.handle, stream), "cudaGraphUpload")
        return result

    def launch(self):
        """Queue a replay on the device's compute stream."""
        if self.handle == NULL:
            raise RuntimeError("nothing is recorded in this graph: call record() first")
        check(
            cyruntime.cudaGraphLaunch(self.handle, self.device.compute.handle),
            "cudaGraphLaunch",
        )

    def __dealloc__(self):
        if self.handle != NULL and self.epoch == context_epoch():
            cyruntime.cudaGraphExecDestroy(self.handle)
