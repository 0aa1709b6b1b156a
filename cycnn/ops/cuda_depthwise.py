"""Depth-wise convolution on a GPU: launches of ``cuda/depthwise.cu``.

:func:`cycnn.ops.cuda.conv2d_forward` and its backward come here where each channel has
filters of its own.
"""

from __future__ import annotations

from functools import lru_cache

from .. import shapes
from ..gpu.launch import Kernel
from ..tensor import empty_on_gpu
from .cuda import (
    _BLOCK,
    _FLOAT32,
    _INT32_MAX,
    _MAX_GRID,
    _clear,
    _get,
    _images,
    _sum_over_pixels,
    _sum_over_rows,
    ceil_div,
)

_ROWS = 4  # outputs of a thread, as in depthwise.cu
_FEWEST = 1024  # pixels that a block sums for a weight gradient
_NAMES = ("3_1", "3_2", "5_1", "5_2", "any")

_forward, _backward_data = (
    {
        name: Kernel("depthwise", f"depthwise_{what}_{name}", "PPPP" + "i" * 15)
        for name in _NAMES
    }
    for what in ("forward", "backward_data")
)
_backward_weight = {
    name: Kernel("depthwise", f"depthwise_backward_weight_{name}", "PPP" + "i" * 16)
    for name in _NAMES
}


def is_depthwise(w_shape, groups) -> bool:
    """Whether these kernels compute a convolution with such a weight."""
    if groups < 2 or len(w_shape) != 4 or w_shape[1] != 1:
        return False
    # a grid has the taps of a filter on its last axis
    return w_shape[2] * w_shape[3] <= _MAX_GRID


class _Plan:
    """The launches for one geometry: names, grids and numbers."""

    def __init__(self, x_shape, w_shape, y_shape, stride, padding, dilation, sms):
        n, c, h, w = x_shape
        k, p, q = y_shape[1:]
        r, s = w_shape[2:]
        self.name = f"{r}_{stride[0]}"
        if r != s or stride[0] != stride[1] or dilation != (1, 1):
            self.name = "any"
        if self.name not in _NAMES:
            self.name = "any"
        fixed = self.name != "any"
        self.numbers = (
            n, c, k // c, h, w, r, s, p, q, *stride, *padding, *dilation,
        )  # fmt: skip
        # the kernels number whole images, whatever a thread makes of them
        largest = max(c * h * w, k * p * q)
        _images(n, largest)
        tall = ceil_div(p, _ROWS) if fixed else p
        self.forward = _images(n, k * tall * q)
        tall = ceil_div(h, _ROWS) if fixed and stride == (1, 1) else h
        self.backward_data = _images(n, c * tall * w)
        # enough blocks for the GPU, but each with something to do
        parts = min(ceil_div(4 * sms, k), ceil_div(n * p * q, _FEWEST), n, _MAX_GRID)
        self.images = min(ceil_div(n, max(parts, 1)), _INT32_MAX // (p * q))
        self.images = max(self.images, ceil_div(n, _MAX_GRID), 1)
        self.parts = ceil_div(n, self.images)
        self.backward_weight = k, self.parts, 1 if fixed else r * s


_plan = lru_cache(256)(_Plan)
_output_shape = lru_cache(256)(shapes.conv2d_output_shape)
_check_backward = lru_cache(256)(shapes.check_conv2d_backward)


def forward(x, weight, bias, stride, padding, dilation, groups):
    device = x.device
    gpu = _get(device.index)
    y_shape = _output_shape(
        x.shape, weight.shape, stride, padding, dilation, groups,
        None if bias is None else bias.shape,
    )  # fmt: skip
    y = empty_on_gpu(y_shape, _FLOAT32, device)
    if y_shape[0]:
        plan = _plan(
            x.shape, weight.shape, y_shape, stride, padding, dilation, gpu.sm_count
        )
        _forward[plan.name](
            gpu.compute, plan.forward, _BLOCK, y, x, weight, bias, *plan.numbers
        )
    return y


def data_gradient(dy, weight, dx, bias, stride, padding, dilation):
    """dx = what the convolution's backward makes of dy, plus a bias (C,) if given.

    The shapes are those of a convolution from dx to dy; the caller has checked them.
    """
    gpu = _get(dy.device.index)
    if dy.shape[0]:
        plan = _plan(
            dx.shape, weight.shape, dy.shape, stride, padding, dilation, gpu.sm_count
        )
        _backward_data[plan.name](
            gpu.compute, plan.backward_data, _BLOCK, dx, dy, weight, bias,
            *plan.numbers,
        )  # fmt: skip


def backward(
    dy,
    x,
    weight,
    dweight,
    dbias,
    stride,
    padding,
    dilation,
    groups,
    need_dx,
    accumulate,
):
    device = x.device
    gpu = _get(device.index)
    _check_backward(
        dy.shape, x.shape, weight.shape, dweight.shape,
        None if dbias is None else dbias.shape, stride, padding, dilation, groups,
    )  # fmt: skip
    n, k, p, q = dy.shape
    dx = empty_on_gpu(x.shape, _FLOAT32, device) if need_dx else None
    if not n:
        _clear(dweight, dbias, dx, accumulate)
        return dx
    if dbias is not None:
        _sum_over_pixels(gpu, dbias, dy, n, k, p * q, accumulate)
    plan = _plan(
        x.shape, weight.shape, dy.shape, stride, padding, dilation, gpu.sm_count
    )
    partial = empty_on_gpu((plan.parts, weight.size), _FLOAT32, device)
    _backward_weight[plan.name](
        gpu.compute, plan.backward_weight, _BLOCK, partial, dy, x, plan.images,
        *plan.numbers,
    )  # fmt: skip
    _sum_over_rows(gpu, dweight, partial, plan.parts, weight.size, accumulate)
    if need_dx:
        data_gradient(dy, weight, dx, None, stride, padding, dilation)
    return dx
