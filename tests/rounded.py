"""Numbers with a bound of what rounding to float32 may have done to them.

A kernel's formula on such numbers gives what it computes, in float64, and how far from
that it may come out where every operation rounds to float32 and sums have any order: L
terms are off by at most L units of roundoff of the sum of their absolute values. Fused
operations round less often than is counted here.
"""

import numpy as np

F32 = 2.0**-24
# what underflow takes from a result: of products, and of exponentials, which may be
# flushed to zero below the normal numbers
_LEAST, _NORMAL = 2.0**-149, 2.0**-126
# units of roundoff by which a function of the CUDA library, or of another, may be off
_FUNCTION = 4


class Rounded:
    """``value``, and the ``error`` that it may carry.

    An int or a float32 array is exact; a Python float is rounded once, as an argument
    of a kernel is.
    """

    __array_ufunc__ = None  # an array on the left leaves the operation to this class

    def __init__(self, value, error=0.0):
        self.value = np.asarray(value, np.float64)
        self.error = np.broadcast_to(error, self.value.shape)

    def __getitem__(self, at):
        return Rounded(self.value[at], self.error[at])

    def __neg__(self):
        return Rounded(-self.value, self.error)

    def __add__(self, other):
        other = of(other)
        return _made(self.value + other.value, self.error + other.error)

    def __sub__(self, other):
        return self + -of(other)

    def __rsub__(self, other):
        return of(other) + -self

    def __mul__(self, other):
        other = of(other)
        error = np.abs(self.value) * other.error + self.error * np.abs(other.value)
        return _made(self.value * other.value, error + self.error * other.error)

    def __truediv__(self, other):
        other = of(other)
        value = self.value / other.value
        least = np.abs(other.value) - other.error
        with np.errstate(divide="ignore", invalid="ignore"):
            error = (self.error + np.abs(value) * other.error) / least
        return _made(value, np.where(least > 0, error, np.inf))

    def __rtruediv__(self, other):
        return of(other) / self

    __radd__, __rmul__ = __add__, __mul__

    def sum(self, axis=None, keepdims=False):
        """In any order."""
        value = self.value.sum(axis=axis, keepdims=keepdims)
        length = self.value.size // max(value.size, 1)
        unit = length * F32
        sizes = np.abs(self.value) + self.error
        error = self.error.sum(axis=axis, keepdims=keepdims)
        sizes = sizes.sum(axis=axis, keepdims=keepdims)
        return Rounded(value, error + unit / (1 - unit) * sizes)


def of(x):
    if isinstance(x, Rounded):
        return x
    return Rounded(x, F32 * abs(x) if isinstance(x, float) else 0.0)


def _made(value, error, units=1, least=_LEAST):
    """The result of an operation: rounded once more."""
    return Rounded(value, error + units * F32 * (np.abs(value) + error) + least)


def where(condition, x, y):
    x, y = of(x), of(y)
    return Rounded(
        np.where(condition, x.value, y.value), np.where(condition, x.error, y.error)
    )


def absolute(x):
    x = of(x)
    return Rounded(np.abs(x.value), x.error)


def maximum(x, y):
    x, y = of(x), of(y)
    return Rounded(np.maximum(x.value, y.value), np.maximum(x.error, y.error))


def sqrt(x):
    value = np.sqrt(x.value)
    below = np.sqrt(np.maximum(x.value - x.error, 0))
    return _made(value, np.maximum(value - below, np.sqrt(x.value + x.error) - value))


def _function(value, slope, error):
    """``slope``: the steepest of the function within the error."""
    return _made(value, slope * error, _FUNCTION, _NORMAL)


def exp(x):
    return _function(np.exp(x.value), np.exp(x.value + x.error), x.error)


def expm1(x):
    return _function(np.expm1(x.value), np.exp(x.value + x.error), x.error)


def log(x):
    least = np.maximum(x.value - x.error, 1e-300)
    return _function(np.log(x.value), 1 / least, x.error)


def log1p(x):
    least = np.maximum(1 + x.value - x.error, 1e-300)
    return _function(np.log1p(x.value), 1 / least, x.error)
