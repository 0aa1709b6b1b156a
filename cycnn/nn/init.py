"""Random starting weights.

They are drawn on the host from the library's generator (:func:`cycnn.manual_seed`), so
a model starts with the same weights on every device. All functions return a float32
ndarray, to be written into a parameter: ``layer.weight.data.copy_(he_normal(shape))``.

The idea behind all of them: a layer sums ``fan_in`` products, so the variance of its
output is fan_in * var(w) * var(x). Weights of variance about 1 / fan_in keep the signal
from growing or fading from layer to layer, and of 1 / fan_out the gradient on its way
back.
"""

from __future__ import annotations

import math

import numpy as np

from ..random import generator


def fans(shape) -> tuple:
    """``(fan_in, fan_out)`` of a weight, counted as PyTorch does.

    Parameters
    ----------
    shape : tuple of int
        (O, I) of a Linear: (I, O). (K, C / groups, R, S) of a Conv2d:
        (C / groups * R * S, K * R * S).

    Raises
    ------
    ValueError
        With fewer than two axes, as a bias has: it has no fans of its own.
    """
    shape = tuple(shape)
    if len(shape) < 2:
        raise ValueError(
            f"a shape of {len(shape)} axes, {shape}, has no fan-in and fan-out: give "
            f"fan_in and fan_out, or use uniform or constant"
        )
    field = math.prod(shape[2:])
    return shape[1] * field, shape[0] * field


def uniform(shape, low=0.0, high=1.0) -> np.ndarray:
    """Numbers from [low, high)."""
    return _drawn(generator().uniform(low, high, shape))


def constant(shape, value) -> np.ndarray:
    """The same number everywhere."""
    return np.full(shape, value, dtype=np.float32)


def xavier_uniform(shape, gain=1.0, fan_in=None, fan_out=None) -> np.ndarray:
    """Uniform in +-gain sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio, 2010).

    Parameters
    ----------
    shape : tuple of int
    gain : float
    fan_in, fan_out : None or int
        None takes them from the shape; see :func:`fans`.
    """
    bound = math.sqrt(3) * _xavier_deviation(shape, gain, fan_in, fan_out)
    return uniform(shape, -bound, bound)


def xavier_normal(shape, gain=1.0, fan_in=None, fan_out=None) -> np.ndarray:
    """Normal of standard deviation gain sqrt(2 / (fan_in + fan_out)).

    Parameters as of :func:`xavier_uniform`.
    """
    deviation = _xavier_deviation(shape, gain, fan_in, fan_out)
    return _drawn(deviation * generator().standard_normal(shape))


def he_uniform(shape, a=0.0, fan_in=None) -> np.ndarray:
    """Uniform in +-sqrt(6 / ((1 + a^2) fan_in)), for ReLU (He et al., 2015).

    Parameters
    ----------
    shape : tuple of int
    a : float
        Slope of the activation below zero; 0 for ReLU. sqrt(5) gives the interval
        +-1 / sqrt(fan_in) that Conv2d and Linear start with.
    fan_in : None or int
        None takes it from the shape.
    """
    bound = math.sqrt(3) * _he_deviation(shape, a, fan_in)
    return uniform(shape, -bound, bound)


def he_normal(shape, a=0.0, fan_in=None) -> np.ndarray:
    """Normal of standard deviation sqrt(2 / ((1 + a^2) fan_in)).

    Parameters as of :func:`he_uniform`.
    """
    deviation = _he_deviation(shape, a, fan_in)
    return _drawn(deviation * generator().standard_normal(shape))


def _drawn(numbers) -> np.ndarray:
    return np.asarray(numbers, dtype=np.float32)


def _xavier_deviation(shape, gain, fan_in, fan_out):
    if fan_in is None or fan_out is None:
        found = fans(shape)
        fan_in = found[0] if fan_in is None else fan_in
        fan_out = found[1] if fan_out is None else fan_out
    return gain * math.sqrt(2 / (fan_in + fan_out))


def _he_deviation(shape, a, fan_in):
    if fan_in is None:
        fan_in, _ = fans(shape)
    return math.sqrt(2 / ((1 + a * a) * fan_in))
