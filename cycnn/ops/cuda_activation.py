"""Activation functions on a GPU, as of :mod:`cycnn.ops.cuda`."""

from __future__ import annotations

from .. import shapes
from ..gpu.launch import Kernel
from ..tensor import empty_on_gpu
from .cuda_common import (
    _BLOCK,
    _FLOAT32,
    _WIDE,
    _get,
    _map,
    _map_backward,
    _of_rows,
)

_tanh_forward = Kernel("activation", "tanh_forward", "PPq")
_tanh_backward = Kernel("activation", "tanh_backward", "PPPq")
_leaky_relu_forward = Kernel("activation", "leaky_relu_forward", "PPfq")
_leaky_relu_backward = Kernel("activation", "leaky_relu_backward", "PPPfq")
_hardtanh_forward = Kernel("activation", "hardtanh_forward", "PPffq")
_hardtanh_backward = Kernel("activation", "hardtanh_backward", "PPPffq")
_gelu_forward = {
    "none": Kernel("activation", "gelu_forward", "PPq"),
    "tanh": Kernel("activation", "gelu_tanh_forward", "PPq"),
}
_gelu_backward = {
    "none": Kernel("activation", "gelu_backward", "PPPq"),
    "tanh": Kernel("activation", "gelu_tanh_backward", "PPPq"),
}
_silu_forward = Kernel("activation", "silu_forward", "PPq")
_silu_backward = Kernel("activation", "silu_backward", "PPPq")
_softmax_forward = (
    Kernel("softmax", "softmax_forward_rows", "PPii"),
    Kernel("softmax", "softmax_forward_wide", "PPii"),
)
_softmax_backward = (
    Kernel("softmax", "softmax_backward_rows", "PPPii"),
    Kernel("softmax", "softmax_backward_wide", "PPPii"),
)


def tanh_forward(x):
    return _map(_tanh_forward, x)


def tanh_backward(dy, y):
    return _map_backward(_tanh_backward, dy, y)


def leaky_relu_forward(x, negative_slope):
    return _map(_leaky_relu_forward, x, negative_slope)


def leaky_relu_backward(dy, x, negative_slope):
    if dy.shape != x.shape:
        shapes.check_same(x=x.shape, dy=dy.shape)
    return _map_backward(_leaky_relu_backward, dy, x, negative_slope)


def hardtanh_forward(x, min_val, max_val):
    return _map(_hardtanh_forward, x, min_val, max_val)


def hardtanh_backward(dy, x, min_val, max_val):
    if dy.shape != x.shape:
        shapes.check_same(x=x.shape, dy=dy.shape)
    return _map_backward(_hardtanh_backward, dy, x, min_val, max_val)


def gelu_forward(x, approximate):
    return _map(_gelu_forward[approximate], x)


def gelu_backward(dy, x, approximate):
    if dy.shape != x.shape:
        shapes.check_same(x=x.shape, dy=dy.shape)
    return _map_backward(_gelu_backward[approximate], dy, x)


def silu_forward(x):
    return _map(_silu_forward, x)


def silu_backward(dy, x):
    if dy.shape != x.shape:
        shapes.check_same(x=x.shape, dy=dy.shape)
    return _map_backward(_silu_backward, dy, x)


def softmax_forward(x):
    n, f = shapes.check_scores("x", x.shape)
    device = x.device
    y = empty_on_gpu((n, f), _FLOAT32, device)
    if n:
        wide = f >= _WIDE
        _softmax_forward[wide](
            _get(device.index).compute, n if wide else _of_rows(n), _BLOCK, y, x, n, f
        )
    return y


def softmax_backward(dy, y):
    n, f = shapes.check_scores("y", y.shape)
    if dy.shape != y.shape:
        shapes.check_same(y=y.shape, dy=dy.shape)
    device = y.device
    dx = empty_on_gpu((n, f), _FLOAT32, device)
    if n:
        wide = f >= _WIDE
        _softmax_backward[wide](
            _get(device.index).compute, n if wide else _of_rows(n), _BLOCK, dx, dy, y,
            n, f,
        )  # fmt: skip
    return dx
