"""Operations: one contract, three implementations.

:mod:`cycnn.ops.reference` is the specification, in NumPy and float64.
:mod:`cycnn.ops.cpu` and :mod:`cycnn.ops.cuda` compute the same functions on tensors
of their device. All three have the same functions with the same parameters.
"""

from __future__ import annotations

import importlib

_loaded = {}


def for_device(device):
    """The module of operations for tensors on ``device``."""
    module = _loaded.get(device.type)
    if module is None:
        module = importlib.import_module(f".{device.type}", __name__)
        _loaded[device.type] = module
    return module
