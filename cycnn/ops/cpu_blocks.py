"""What joins and pads, in host memory: see :mod:`cycnn.ops.cpu`.

Each of these moves every number once, which NumPy does as fast as the memory does.
"""

from __future__ import annotations

import numpy as np

from .. import shapes
from ..tensor import from_array
from .cpu import add
from .cpu_common import _FLOAT32, _array, _cpu


def add_relu(x, y, out):
    """out = max(x + y, 0); ``out`` may be ``x`` or ``y``."""
    add(x, y, out)
    out = out.array
    np.copyto(out, 0, where=out <= 0)


def concat_forward(parts):
    """y (N, sum of C_i, ...) of parts (N, C_i, ...)."""
    arrays = [_array(f"part {i}", part) for i, part in enumerate(parts)]
    shape = shapes.concat_output_shape(*[array.shape for array in arrays])
    y = _cpu.empty(shape, _FLOAT32)
    start = 0
    for array in arrays:
        stop = start + array.shape[1]
        y[:, start:stop] = array
        start = stop
    return from_array(y)


def concat_backward(dy, channels):
    """The parts (N, C_i, ...) of dy (N, sum of C_i, ...)."""
    dy = _array("dy", dy)
    shapes.check_concat_backward(dy.shape, channels)
    parts, start = [], 0
    for count in channels:
        part = _cpu.empty((dy.shape[0], count, *dy.shape[2:]), _FLOAT32)
        part[...] = dy[:, start : start + count]
        parts.append(from_array(part))
        start += count
    return parts


def zero_pad2d_forward(x, padding):
    """y (N, C, top + H + bottom, left + W + right) of x (N, C, H, W)."""
    x = _array("x", x)
    y = _cpu.empty(shapes.zero_pad2d_output_shape(x.shape, padding), _FLOAT32)
    left, _, top, _ = padding
    y.fill(0)
    y[:, :, top : top + x.shape[2], left : left + x.shape[3]] = x
    return from_array(y)


def zero_pad2d_backward(dy, padding):
    """dx (N, C, H, W) of dy (N, C, top + H + bottom, left + W + right)."""
    dy = _array("dy", dy)
    shape = shapes.zero_pad2d_input_shape(dy.shape, padding)
    left, _, top, _ = padding
    dx = _cpu.empty(shape, _FLOAT32)
    dx[...] = dy[:, :, top : top + shape[2], left : left + shape[3]]
    return from_array(dx)
