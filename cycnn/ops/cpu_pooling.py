"""Average pooling on the CPU, as of :mod:`cycnn.ops.cpu`."""

from __future__ import annotations

from .. import shapes
from ..tensor import from_array
from .cpu_common import _FLOAT32, _array, _cpu, _flat

# after _cpu, which sets how the threads wait
from . import _cpu_pooling as _loops  # isort: skip


def avgpool2d_forward(
    x,
    kernel_size,
    stride,
    padding=(0, 0),
    count_include_pad=True,
    ceil_mode=False,
):
    """y (N, C, P, Q): the mean of each window of x."""
    x = _array("x", x)
    shape = shapes.pool2d_output_shape(
        x.shape, kernel_size, stride, padding, ceil_mode
    )
    y = _cpu.empty(shape, _FLOAT32)
    if y.size:
        how = x.shape, shape, kernel_size, stride, padding, count_include_pad
        _loops.avgpool2d(_flat(x), _flat(y), *how)
    return from_array(y)


def avgpool2d_backward(
    dy,
    x_shape,
    kernel_size,
    stride,
    padding=(0, 0),
    count_include_pad=True,
    ceil_mode=False,
):
    """dx of shape ``x_shape``: each dy is shared by the elements of its window."""
    dy = _array("dy", dy)
    shapes.check_avgpool2d_backward(
        dy.shape, x_shape, kernel_size, stride, padding, ceil_mode
    )
    dx = _cpu.empty(x_shape, _FLOAT32)
    if dx.size:
        how = x_shape, dy.shape, kernel_size, stride, padding, count_include_pad
        _loops.avgpool2d_gradient(_flat(dy), _flat(dx), *how)
    return from_array(dx)


def global_avgpool2d_forward(x):
    """y (N, C, 1, 1): the mean of each plane of x."""
    x = _array("x", x)
    y = _cpu.empty(shapes.global_pool2d_output_shape(x.shape), _FLOAT32)
    if y.size:
        _loops.mean_of_planes(_flat(x), _flat(y), y.size, x.shape[2] * x.shape[3])
    return from_array(y)


def global_avgpool2d_backward(dy, x_shape):
    """dx of shape ``x_shape``: dy / (H W) everywhere in its plane."""
    dy = _array("dy", dy)
    shapes.check_global_pool2d_backward(dy.shape, x_shape)
    dx = _cpu.empty(x_shape, _FLOAT32)
    dx[...] = dy / _FLOAT32.type(x_shape[2] * x_shape[3])
    return from_array(dx)
