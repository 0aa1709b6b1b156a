"""Exceptions of cycnn. This module imports nothing, so every room may use it."""


class CudaError(RuntimeError):
    """A CUDA call failed.

    Parameters
    ----------
    message : str
        What happened and what to do about it.
    status : int
        Numeric status of the call (``cudaError_t``, ``CUresult`` or
        ``nvrtcResult``); -1 where no call was made.
    name : str
        Symbolic name of the status, for instance ``"cudaErrorMemoryAllocation"``.
    call : str
        The API function that returned it.
    """

    def __init__(self, message, status=-1, name="", call=""):
        super().__init__(message)
        self.status = status
        self.name = name
        self.call = call

    def __reduce__(self):
        # Exception's default pickles only the message and would lose the status.
        return type(self), (self.args[0], self.status, self.name, self.call)


class OutOfMemoryError(CudaError, MemoryError):
    """Device memory is exhausted; the message gives requested, held and free bytes."""


class CompileError(RuntimeError):
    """NVRTC refused a kernel.

    Attributes
    ----------
    log : str
        The compiler's whole log.
    source : str
        The source with line numbers, headed by the file's name.
    """

    def __init__(self, message, log="", source=""):
        super().__init__(message)
        self.log = log
        self.source = source

    def __reduce__(self):
        return type(self), (self.args[0], self.log, self.source)


class ShapeError(ValueError):
    """Shapes do not fit the operation, or each other."""


class DataError(ValueError):
    """A data file or an array of labels is damaged, truncated or out of range."""
