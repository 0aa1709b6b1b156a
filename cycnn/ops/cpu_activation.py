"""Activation functions on the CPU, as of :mod:`cycnn.ops.cpu`."""

from __future__ import annotations

from .cpu_common import _map, _map_backward, _map_rows, _map_rows_backward

# after _cpu, which sets how the threads wait
from . import _cpu_activation as _loops  # isort: skip


def tanh_forward(x):
    """y = tanh(x)."""
    return _map(_loops.tanh, x)


def tanh_backward(dy, y):
    """dx = dy (1 - y^2)."""
    return _map_backward(_loops.tanh_gradient, dy, "y", y)


def leaky_relu_forward(x, negative_slope):
    """y = x where x > 0, else negative_slope x."""
    return _map(_loops.leaky_relu, x, negative_slope)


def leaky_relu_backward(dy, x, negative_slope):
    """dx = dy where x > 0, else negative_slope dy."""
    return _map_backward(_loops.leaky_relu_gradient, dy, "x", x, negative_slope)


def hardtanh_forward(x, min_val, max_val):
    """y = x between min_val and max_val, and the nearer of them elsewhere."""
    return _map(_loops.hardtanh, x, min_val, max_val)


def hardtanh_backward(dy, x, min_val, max_val):
    """dx = 0 where x <= min_val or x >= max_val, else dy."""
    return _map_backward(_loops.hardtanh_gradient, dy, "x", x, min_val, max_val)


def gelu_forward(x, approximate):
    """y = x Phi(x); approximate is "none" or "tanh"."""
    return _map(_loops.gelu, x, approximate == "tanh")


def gelu_backward(dy, x, approximate):
    """dx = dy (Phi(x) + x Phi'(x))."""
    return _map_backward(_loops.gelu_gradient, dy, "x", x, approximate == "tanh")


def silu_forward(x):
    """y = x / (1 + exp(-x))."""
    return _map(_loops.silu, x)


def silu_backward(dy, x):
    """dx = dy (s + x s (1 - s)), s = 1 / (1 + exp(-x))."""
    return _map_backward(_loops.silu_gradient, dy, "x", x)


def softmax_forward(x):
    """y (N, F) = exp(x) / sum_f exp(x)."""
    return _map_rows(_loops.softmax, x)


def softmax_backward(dy, y):
    """dx (N, F) = y (dy - sum_f dy y)."""
    return _map_rows_backward(_loops.softmax_gradient, dy, y)
