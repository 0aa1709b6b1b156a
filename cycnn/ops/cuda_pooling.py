"""Average pooling on a GPU, as of :mod:`cycnn.ops.cuda`."""

from __future__ import annotations

from functools import lru_cache

from .. import shapes
from ..gpu.launch import Kernel
from ..tensor import empty_on_gpu
from .cuda_common import _BLOCK, _FLOAT32, _WIDE, _get, _images, _of_rows

_avgpool2d_forward = Kernel("avgpool", "avgpool2d_forward", "PPiiiiiiiiiiiiiii")
_avgpool2d_backward = Kernel("avgpool", "avgpool2d_backward", "PPiiiiiiiiiiiiiii")
_global_avgpool2d_forward = (
    Kernel("avgpool", "global_avgpool2d_forward_rows", "PPqi"),
    Kernel("avgpool", "global_avgpool2d_forward_wide", "PPqi"),
)
_global_avgpool2d_backward = Kernel("avgpool", "global_avgpool2d_backward", "PPiii")

_pool_shape = lru_cache(256)(shapes.pool2d_output_shape)
_check_pool = lru_cache(256)(shapes.check_avgpool2d_backward)


def avgpool2d_forward(
    x,
    kernel_size,
    stride,
    padding=(0, 0),
    count_include_pad=True,
    ceil_mode=False,
):
    x_shape = x.shape
    y_shape = _pool_shape(x_shape, kernel_size, stride, padding, ceil_mode)
    device = x.device
    y = empty_on_gpu(y_shape, _FLOAT32, device)
    n, c, p, q = y_shape
    if n and c:
        _avgpool2d_forward(
            _get(device.index).compute, _images(n, c * p * q), _BLOCK, y, x, n, c,
            x_shape[2], x_shape[3], p, q, *kernel_size, *stride, *padding[:2],
            *padding[-2:], int(count_include_pad),
        )  # fmt: skip
    return y


def avgpool2d_backward(
    dy,
    x_shape,
    kernel_size,
    stride,
    padding=(0, 0),
    count_include_pad=True,
    ceil_mode=False,
):
    y_shape = dy.shape
    _check_pool(y_shape, x_shape, kernel_size, stride, padding, ceil_mode)
    device = dy.device
    dx = empty_on_gpu(x_shape, _FLOAT32, device)
    n, c, h, w = x_shape
    if n and c:
        _avgpool2d_backward(
            _get(device.index).compute, _images(n, c * h * w), _BLOCK, dx, dy, n, c, h,
            w, y_shape[2], y_shape[3], *kernel_size, *stride, *padding[:2],
            *padding[-2:], int(count_include_pad),
        )  # fmt: skip
    return dx


def global_avgpool2d_forward(x):
    x_shape = x.shape
    device = x.device
    y = empty_on_gpu(shapes.global_pool2d_output_shape(x_shape), _FLOAT32, device)
    planes, pixels = y.size, x_shape[2] * x_shape[3]
    if planes:
        wide = pixels >= _WIDE
        _global_avgpool2d_forward[wide](
            _get(device.index).compute, planes if wide else _of_rows(planes), _BLOCK, y,
            x, planes, pixels,
        )  # fmt: skip
    return y


def global_avgpool2d_backward(dy, x_shape):
    shapes.check_global_pool2d_backward(dy.shape, x_shape)
    device = dy.device
    dx = empty_on_gpu(x_shape, _FLOAT32, device)
    n, c, h, w = x_shape
    if n and c:
        _global_avgpool2d_backward(
            _get(device.index).compute, _images(n, c * h * w), _BLOCK, dx, dy, n, c,
            h * w,
        )  # fmt: skip
    return dx
