"""Everything that touches CUDA: devices, streams, memory, kernels.

Importing this package imports nothing of CUDA. :func:`unavailable_reason` looks for a
usable GPU once and remembers what it found.
"""

from __future__ import annotations

import importlib

_UNKNOWN = object()
_reason = _UNKNOWN


def unavailable_reason() -> str | None:
    """Why no GPU can be used, in a sentence, or None where one can."""
    global _reason
    if _reason is _UNKNOWN:
        _reason = _probe()
    return _reason


def _probe() -> str | None:
    try:
        # `from . import device` would not say that the module is missing
        device = importlib.import_module(".device", __name__)
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] == "cuda":
            return "cuda-bindings is not installed (pip install 'cuda-bindings>=13,<14')"
        return "this build of cycnn has no GPU modules (it was built without CUDA headers)"
    except ImportError as error:
        return f"the GPU modules cannot be loaded: {error}"
    return device.probe()


def shutdown(reset: bool = False) -> None:
    """Unload kernels and close streams of the devices that were used.

    Parameters
    ----------
    reset : bool
        Also destroy each device's primary context, as a leak checker needs to count
        what is left. Other CUDA libraries of this process lose it too.
    """
    import sys

    device = sys.modules.get(__name__ + ".device")
    if device is None:
        return
    used = [found.index for found in device.used()]
    launch = sys.modules.get(__name__ + ".launch")
    for index in used:
        device.get(index).synchronize()
    if launch is not None:
        launch.unload_all()
    if used:
        from . import memory

        for index in used:
            memory.release_unused(index)
    device.forget()
    if reset:
        for index in used:
            device.reset(index)
