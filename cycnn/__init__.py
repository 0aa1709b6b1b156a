"""cycnn: small convolutional networks on NVIDIA GPUs, in Cython and CUDA.

Names are imported when first used (PEP 562), so that ``import cycnn`` costs next to
nothing and works with no GPU, no driver and no cuda-python.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_HOME = {
    "Tensor": "tensor",
    "empty": "tensor",
    "zeros": "tensor",
    "from_dlpack": "tensor",
    "device": "devices",
    "cuda_available": "devices",
    "cuda_unavailable_reason": "devices",
    "manual_seed": "random",
    "set_precision": "precision",
    "get_precision": "precision",
    "synchronize": "tensor",
    "shutdown": "tensor",
    "Trainer": "train",
    "CudaError": "errors",
    "OutOfMemoryError": "errors",
    "CompileError": "errors",
    "ShapeError": "errors",
    "DataError": "errors",
}
_MODULES = ("data", "nn", "onnx", "optim", "ops")
# Not in __all__: they need packages that cycnn does not bring.
_EXTRAS = ("sklearn",)

__all__ = ["__version__", *_HOME, *_MODULES]


def __getattr__(name):
    if name in _HOME:
        value = getattr(importlib.import_module("." + _HOME[name], __name__), name)
    elif name in _MODULES or name in _EXTRAS:
        value = importlib.import_module("." + name, __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__():
    return sorted(set(globals()) | set(__all__))
