"""Names of devices: ``"cpu"``, ``"cuda"``, ``"cuda:1"``.

This module only names devices. What touches CUDA is in :mod:`cycnn.gpu`, which is
imported when somebody first asks for a GPU.
"""

from __future__ import annotations

import functools
import logging
import re

from .errors import CudaError

_log = logging.getLogger("cycnn")
_SPEC = re.compile(r"(cpu|cuda)(?::(\d+))?\Z")
_default = None


class Device:
    """A device: its ``type`` (``"cpu"`` or ``"cuda"``) and ``index``.

    Two devices are equal when both agree. Make one with :func:`device`.
    """

    __slots__ = ("type", "index")

    def __init__(self, type: str, index: int = 0):
        self.type = type
        self.index = index

    @property
    def is_cuda(self) -> bool:
        return self.type == "cuda"

    def __eq__(self, other):
        if isinstance(other, str):
            try:
                other = _parse(other)
            except ValueError:
                return False
        if not isinstance(other, Device):
            return NotImplemented
        return self.type == other.type and self.index == other.index

    def __hash__(self):
        return hash((self.type, self.index))

    def __str__(self):
        return f"cuda:{self.index}" if self.type == "cuda" else "cpu"

    def __repr__(self):
        return f"device('{self}')"


CPU = Device("cpu")


def _parse(spec: str) -> Device:
    match = _SPEC.match(spec)
    if match is None or (match[1] == "cpu" and match[2] not in (None, "0")):
        raise ValueError(
            f"unknown device {spec!r}: expected 'cpu', 'cuda' or 'cuda:<index>'"
        )
    return CPU if match[1] == "cpu" else _gpu(int(match[2] or 0))


@functools.lru_cache(maxsize=None)
def _gpu(index: int) -> Device:
    # one object a device: comparing identical objects is quick, and is done all the time
    return Device("cuda", index)


def device(spec=None) -> Device:
    """The device that ``spec`` names, checked to be usable.

    Parameters
    ----------
    spec : None, str or Device
        ``"cpu"``, ``"cuda"`` (the first GPU), ``"cuda:1"``. None gives the default:
        the first usable GPU, else the CPU.

    Returns
    -------
    Device

    Raises
    ------
    ValueError
        If the name is not understood.
    CudaError
        If a GPU is asked for and cannot be used; the message says why.
    """
    if spec is None:
        return default_device()
    found = spec if isinstance(spec, Device) else None
    if found is None:
        if not isinstance(spec, str):
            raise TypeError(
                f"a device is named by a string such as 'cuda:0', got {spec!r}"
            )
        found = _parse(spec)
    if found.is_cuda:
        reason = cuda_unavailable_reason()
        if reason is not None:
            raise CudaError(f"{found} cannot be used: {reason}. Use device 'cpu'.")
        from .gpu import device as gpu_device

        count = gpu_device.count()
        if found.index >= count:
            raise CudaError(
                f"{found} does not exist: this machine has {count} usable GPU(s), "
                f"numbered from 0"
            )
    return found


def default_device() -> Device:
    """The first usable GPU, else the CPU. The choice is logged once at INFO."""
    global _default
    if _default is None:
        reason = cuda_unavailable_reason()
        if reason is None:
            _default = _gpu(0)
            _log.info("cycnn uses the GPU cuda:0")
        else:
            _default = CPU
            _log.info("cycnn uses the CPU: %s", reason)
    return _default


def cuda_available() -> bool:
    """Whether a GPU can be used from this process."""
    return cuda_unavailable_reason() is None


def cuda_unavailable_reason() -> str | None:
    """Why no GPU can be used, in a sentence, or None where one can."""
    from .gpu import unavailable_reason

    return unavailable_reason()
