"""Activation functions. Each remembers what its derivative follows from: its output,
or its input where several inputs have the same output.
"""

from __future__ import annotations

import math

from ..errors import ShapeError
from ..ops import for_device
from .arguments import check_real
from .layer import Layer, as_gradient, as_input


class _Activation(Layer):
    """A layer without weights, whose forward saves what its derivative follows from."""

    def _gradient(self, operation, dy, input_grad, *settings):
        """dx, by the backward operation of this name; None if not ``input_grad``."""
        seen = self._remembered()
        dx = None
        if input_grad:
            dy = as_gradient(self, dy, seen.shape, seen.device)
            dx = getattr(for_device(seen.device), operation)(dy, seen, *settings)
        self._saved = None
        return dx


class ReLU(_Activation):
    """y = max(x, 0), of any shape. NaN stays NaN."""

    def forward(self, x):
        x = as_input(self, x)
        self._saved = y = for_device(x.device).relu_forward(x)
        return y

    def backward(self, dy, input_grad=True, accumulate=False):
        """dx = dy where y > 0, else 0: the slope of y = x and of y = 0.

        At x = 0, where there is no derivative, 0 is taken, as everybody does.
        """
        return self._gradient("relu_backward", dy, input_grad)


class Sigmoid(_Activation):
    """y = 1 / (1 + exp(-x)), of any shape, exact for large x of either sign."""

    def forward(self, x):
        x = as_input(self, x)
        self._saved = y = for_device(x.device).sigmoid_forward(x)
        return y

    def backward(self, dy, input_grad=True, accumulate=False):
        """dx = dy y (1 - y).

        With e = exp(-x): dy/dx = e / (1 + e)^2 = y (e / (1 + e)) = y (1 - y).
        """
        return self._gradient("sigmoid_backward", dy, input_grad)


class Tanh(_Activation):
    """y = tanh(x), of any shape."""

    def forward(self, x):
        x = as_input(self, x)
        self._saved = y = for_device(x.device).tanh_forward(x)
        return y

    def backward(self, dy, input_grad=True, accumulate=False):
        """dx = dy (1 - y^2).

        tanh = sinh / cosh, so dy/dx = (cosh^2 - sinh^2) / cosh^2 = 1 - y^2.
        """
        return self._gradient("tanh_backward", dy, input_grad)


class LeakyReLU(_Activation):
    """y = x where x > 0, else negative_slope x; of any shape.

    Parameters
    ----------
    negative_slope : float
        A finite number.
    """

    def __init__(self, negative_slope=0.01):
        check_real(negative_slope, "LeakyReLU", "negative_slope")
        if not math.isfinite(negative_slope):
            raise ValueError(
                f"LeakyReLU: negative_slope must be finite, got {negative_slope}"
            )
        self.negative_slope = float(negative_slope)

    def forward(self, x):
        self._saved = x = as_input(self, x)
        return for_device(x.device).leaky_relu_forward(x, self.negative_slope)

    def backward(self, dy, input_grad=True, accumulate=False):
        """dx = dy where x > 0, else negative_slope dy: the slopes of the two lines.

        At x = 0, where there is no derivative, negative_slope is taken.
        """
        return self._gradient(
            "leaky_relu_backward", dy, input_grad, self.negative_slope
        )

    def _settings(self):
        return f"negative_slope={self.negative_slope}"


class Hardtanh(_Activation):
    """y = x from min_val to max_val, min_val below, max_val above; of any shape.

    NaN stays NaN.

    Parameters
    ----------
    min_val, max_val : float
        min_val < max_val. Infinity leaves its side open.
    """

    def __init__(self, min_val=-1.0, max_val=1.0):
        kind = type(self).__name__
        check_real(min_val, kind, "min_val")
        check_real(max_val, kind, "max_val")
        if not min_val < max_val:
            raise ValueError(
                f"{kind}: min_val must be less than max_val, got {min_val} and "
                f"{max_val}"
            )
        self.min_val, self.max_val = float(min_val), float(max_val)

    def forward(self, x):
        self._saved = x = as_input(self, x)
        return for_device(x.device).hardtanh_forward(x, self.min_val, self.max_val)

    def backward(self, dy, input_grad=True, accumulate=False):
        """dx = dy where min_val < x < max_val, else 0: the slopes of the three lines.

        At the two ends, where there is no derivative, 0 is taken, and dy at NaN.
        """
        return self._gradient(
            "hardtanh_backward", dy, input_grad, self.min_val, self.max_val
        )

    def _settings(self):
        return f"min_val={self.min_val}, max_val={self.max_val}"


class ReLU6(Hardtanh):
    """y = min(max(x, 0), 6), of any shape: ReLU that is cut off at 6."""

    def __init__(self):
        super().__init__(0.0, 6.0)

    def _settings(self):
        return ""


class GELU(_Activation):
    """y = x Phi(x), with Phi the distribution function of the normal distribution.

    Parameters
    ----------
    approximate : {"none", "tanh"}
        "tanh": Phi(x) is taken to be (1 + tanh(v)) / 2 with
        v = sqrt(2 / pi) (x + 0.044715 x^3), off by at most 0.0003.
    """

    def __init__(self, approximate="none"):
        if approximate not in ("none", "tanh"):
            raise ValueError(
                f"GELU: approximate must be 'none' or 'tanh', got {approximate!r}"
            )
        self.approximate = approximate

    def forward(self, x):
        self._saved = x = as_input(self, x)
        return for_device(x.device).gelu_forward(x, self.approximate)

    def backward(self, dy, input_grad=True, accumulate=False):
        """dx = dy (Phi(x) + x Phi'(x)), by the product rule.

        Phi'(x) is the normal density exp(-x^2 / 2) / sqrt(2 pi). Of the approximation,
        which is s(2v) with s(z) = 1 / (1 + exp(-z)), it is s(2v) (1 - s(2v)) 2 v', with
        v' = sqrt(2 / pi) (1 + 3 0.044715 x^2).
        """
        return self._gradient("gelu_backward", dy, input_grad, self.approximate)

    def _settings(self):
        return f"approximate={self.approximate!r}"


class SiLU(_Activation):
    """y = x s(x) with s(x) = 1 / (1 + exp(-x)), of any shape; also called swish."""

    def forward(self, x):
        self._saved = x = as_input(self, x)
        return for_device(x.device).silu_forward(x)

    def backward(self, dy, input_grad=True, accumulate=False):
        """dx = dy (s + x s (1 - s)), by the product rule; ds/dx = s (1 - s)."""
        return self._gradient("silu_backward", dy, input_grad)


class Softmax(_Activation):
    """Probabilities: the exponentials of each row of scores, over their sum.

    To train a classifier, end it in :class:`LogSoftmax`, whose logarithms stay exact
    where probabilities come near 0.

    Parameters
    ----------
    dim : int
        The axis of the classes. Only 1 (or -1, the same), with input of shape (N, F).

    Notes
    -----
    Formula: y[n,f] = exp(x[n,f]) / (sum over g of exp(x[n,g])). The maximum of the row
    is subtracted first, which changes nothing but keeps exp from overflowing.
    """

    def __init__(self, dim=1):
        self.dim = _rows("Softmax", dim)

    def forward(self, x):
        x = as_input(self, x)
        try:
            self._saved = y = for_device(x.device).softmax_forward(x)
        except ShapeError as error:
            raise ShapeError(f"{self!r}: {error}") from None
        return y

    def backward(self, dy, input_grad=True, accumulate=False):
        """dx = y (dy - (sum of dy y over the row)).

        y[g] depends on x[f] directly if g = f, and through the sum s = sum exp(x):
        dy[g]/dx[f] = [g = f] exp(x[f]) / s - exp(x[g]) exp(x[f]) / s^2
        = y[f] ([g = f] - y[g]). Times dy[g], summed over g, that is the formula.
        """
        return self._gradient("softmax_backward", dy, input_grad)

    def _settings(self):
        return f"dim={self.dim}"


class LogSoftmax(_Activation):
    """Logarithms of probabilities: each row of scores, normalised.

    Parameters
    ----------
    dim : int
        The axis of the classes. Only 1 (or -1, the same), with input of shape (N, F).

    Notes
    -----
    Formula: y[n,f] = x[n,f] - log(sum over g of exp(x[n,g])). The maximum of the row is
    subtracted first, which changes nothing but keeps exp from overflowing.
    """

    def __init__(self, dim=1):
        self.dim = _rows("LogSoftmax", dim)

    def forward(self, x):
        x = as_input(self, x)
        try:
            self._saved = y = for_device(x.device).log_softmax_forward(x)
        except ShapeError as error:
            raise ShapeError(f"{self!r}: {error}") from None
        return y

    def backward(self, dy, input_grad=True, accumulate=False):
        """dx = dy - softmax(x) * (sum of dy over the row).

        y[g] depends on x[f] directly if g = f, and through the sum s = sum exp(x):
        d log(s) / dx[f] = exp(x[f]) / s = softmax[f] = exp(y[f]). Hence
        dx[f] = sum over g of dy[g] ([g = f] - exp(y[f])) = dy[f] - exp(y[f]) sum dy.
        """
        return self._gradient("log_softmax_backward", dy, input_grad)

    def _settings(self):
        return f"dim={self.dim}"


def _rows(layer, dim) -> int:
    """1, the only axis there is, given as 1 or -1."""
    if isinstance(dim, bool) or dim not in (1, -1):
        raise ValueError(
            f"{layer}: dim={dim!r}, but only dim=1 is there, over rows of (N, F)"
        )
    return 1
