"""Activation functions: the specification, as of :mod:`cycnn.ops.reference`."""

from __future__ import annotations

import math

import numpy as np

from .. import shapes
from .reference_common import _f64

_ERFC = np.vectorize(math.erfc, otypes=[np.float64])


def tanh_forward(x):
    """y = tanh(x)."""
    return np.tanh(_f64(x))


def tanh_backward(dy, y):
    """dx = dy (1 - y^2).

    tanh = sinh / cosh, so dy/dx = (cosh^2 - sinh^2) / cosh^2 = 1 - y^2.
    """
    shapes.check_same(y=y.shape, dy=dy.shape)
    return _f64(dy) * (1.0 - _f64(y) ** 2)


def leaky_relu_forward(x, negative_slope):
    """y = x where x > 0, else negative_slope x."""
    x = _f64(x)
    return np.where(x > 0, x, negative_slope * x)


def leaky_relu_backward(dy, x, negative_slope):
    """dx = dy where x > 0, else negative_slope dy: the two slopes of the line.

    At x = 0, where there is no derivative, negative_slope is taken.
    """
    shapes.check_same(x=x.shape, dy=dy.shape)
    dy = _f64(dy)
    return np.where(_f64(x) > 0, dy, negative_slope * dy)


def hardtanh_forward(x, min_val, max_val):
    """y = x, but min_val where x is below it and max_val where x is above. NaN stays.

    Parameters
    ----------
    x : any shape
    min_val, max_val : float
        min_val < max_val. Either may be infinite.
    """
    x = _f64(x)
    return np.where(x < min_val, min_val, np.where(x > max_val, max_val, x))


def hardtanh_backward(dy, x, min_val, max_val):
    """dx = 0 where x <= min_val or x >= max_val, else dy: the slopes of the lines.

    At the ends, where there is no derivative, 0 is taken.
    """
    shapes.check_same(x=x.shape, dy=dy.shape)
    x = _f64(x)
    return np.where((x <= min_val) | (x >= max_val), 0.0, _f64(dy))


def _sigmoid(x):
    """s = 1 / (1 + exp(-x)) and ds/dx = s (1 - s), of e = exp(-|x|), which is small.

    1 - s(x) = s(-x), so ds/dx = e / (1 + e)^2 for either sign of x.
    """
    e = np.exp(-np.abs(x))
    return np.where(x < 0, e, 1.0) / (1.0 + e), e / (1.0 + e) ** 2


# Beyond it the tanh form of GELU is x or 0 to any precision.
_FLAT = 16.0


def _gelu_argument(x):
    """u and du/dx of tanh(u / 2), with u / 2 = sqrt(2 / pi) (x + 0.044715 x^3)."""
    x = np.clip(x, -_FLAT, _FLAT)
    factor = math.sqrt(8 / math.pi)
    return (
        factor * x * (1 + 0.044715 * x * x),
        factor * (1 + 3 * 0.044715 * x * x),
    )


def gelu_forward(x, approximate):
    """y = x Phi(x), with Phi the distribution function of the normal distribution.

    approximate "none": Phi(x) = erfc(-x / sqrt 2) / 2. "tanh": Phi(x) = (1 + tanh(u /
    2)) / 2 = 1 / (1 + exp(-u)), u = 2 sqrt(2 / pi) (x + 0.044715 x^3).

    Parameters
    ----------
    x : any shape
    approximate : {"none", "tanh"}
    """
    x = _f64(x)
    if approximate == "tanh":
        return x * _sigmoid(_gelu_argument(x)[0])[0]
    return x * 0.5 * _ERFC(-x / math.sqrt(2))


def gelu_backward(dy, x, approximate):
    """dx = dy (Phi(x) + x Phi'(x)), by the product rule.

    "none": Phi' is the normal density exp(-x^2 / 2) / sqrt(2 pi). "tanh": with s = 1 /
    (1 + exp(-u)), Phi' = s (1 - s) du/dx, du/dx = 2 sqrt(2 / pi) (1 + 3 0.044715 x^2).
    """
    shapes.check_same(x=x.shape, dy=dy.shape)
    x = _f64(x)
    if approximate == "tanh":
        u, du = _gelu_argument(x)
        s, ds = _sigmoid(u)
        return _f64(dy) * (s + x * ds * du)
    density = np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return _f64(dy) * (0.5 * _ERFC(-x / math.sqrt(2)) + x * density)


def silu_forward(x):
    """y = x s(x), s(x) = 1 / (1 + exp(-x))."""
    x = _f64(x)
    return x * _sigmoid(x)[0]


def silu_backward(dy, x):
    """dx = dy (s + x s (1 - s)), by the product rule."""
    shapes.check_same(x=x.shape, dy=dy.shape)
    x = _f64(x)
    s, ds = _sigmoid(x)
    return _f64(dy) * (s + x * ds)


def softmax_forward(x):
    """y[n, f] = exp(x[n, f]) / sum_j exp(x[n, j]).

    The maximum of a row is taken out first: it cancels, and nothing overflows.

    Parameters
    ----------
    x : (N, F)

    Returns
    -------
    y : (N, F)
    """
    shapes.check_scores("x", x.shape)
    x = _f64(x)
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def softmax_backward(dy, y):
    """dx[n, f] = y[n, f] (dy[n, f] - sum_j dy[n, j] y[n, j]).

    With s = sum_i exp(x_i): dy_j/dx_f = [j = f] exp(x_f) / s - exp(x_j) exp(x_f) / s^2
    = y_f ([j = f] - y_j); multiplied with dy_j and summed over j.
    """
    shapes.check_scores("y", y.shape)
    shapes.check_same(y=y.shape, dy=dy.shape)
    dy, y = _f64(dy), _f64(y)
    return y * (dy - (dy * y).sum(axis=1, keepdims=True))
