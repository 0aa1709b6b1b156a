"""Dropout on the CPU, as of :mod:`cycnn.ops.cpu`."""

from __future__ import annotations

import numpy as np

from .. import shapes
from ..tensor import from_array
from .cpu_common import _FLOAT32, _INT32, _array, _cpu, _flat
from .reference_dropout import _scale, _threshold

# after _cpu, which sets how the threads wait
from . import _cpu_dropout as _loops  # isort: skip


def _masked(x, used, p):
    y = _cpu.empty(x.shape, _FLOAT32)
    if x.size:
        words = used.view(np.uint32)[:3].tolist()
        _loops.dropout(_flat(x), _flat(y), *words, _threshold(p), _scale(p))
    return from_array(y)


def dropout_forward(x, state, p):
    """(y, used): x with elements dropped; the step of ``state`` is raised."""
    x, state = _array("x", x), _array("state", state, _INT32)
    shapes.check_dropout_state(state.shape)
    used = state.copy()
    if x.size:
        # wraps around in arrays: scalars of NumPy warn
        state[2:3] += np.ones(1, np.int32)
    return _masked(x, used, p), from_array(used)


def dropout_backward(dy, used, p):
    """dx: dy with the same elements dropped."""
    dy, used = _array("dy", dy), _array("used", used, _INT32)
    shapes.check_dropout_state(used.shape)
    return _masked(dy, used, p)
