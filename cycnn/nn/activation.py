"""Activation functions. Each remembers its output: its derivative follows from that."""

from __future__ import annotations

from ..errors import ShapeError
from ..ops import for_device
from .layer import Layer, as_gradient, as_input


class ReLU(Layer):
    """y = max(x, 0), of any shape. NaN stays NaN."""

    def forward(self, x):
        x = as_input(self, x)
        self._saved = y = for_device(x.device).relu_forward(x)
        return y

    def backward(self, dy, input_grad=True, accumulate=False):
        """dx = dy where y > 0, else 0: the slope of y = x and of y = 0.

        At x = 0, where there is no derivative, 0 is taken, as everybody does.
        """
        y = self._remembered()
        dx = None
        if input_grad:
            dx = for_device(y.device).relu_backward(
                as_gradient(self, dy, y.shape, y.device), y
            )
        self._saved = None
        return dx


class Sigmoid(Layer):
    """y = 1 / (1 + exp(-x)), of any shape, exact for large x of either sign."""

    def forward(self, x):
        x = as_input(self, x)
        self._saved = y = for_device(x.device).sigmoid_forward(x)
        return y

    def backward(self, dy, input_grad=True, accumulate=False):
        """dx = dy y (1 - y).

        With e = exp(-x): dy/dx = e / (1 + e)^2 = y (e / (1 + e)) = y (1 - y).
        """
        y = self._remembered()
        dx = None
        if input_grad:
            dx = for_device(y.device).sigmoid_backward(
                as_gradient(self, dy, y.shape, y.device), y
            )
        self._saved = None
        return dx


class LogSoftmax(Layer):
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
        if isinstance(dim, bool) or dim not in (1, -1):
            raise ValueError(
                f"LogSoftmax: dim={dim!r}, but only dim=1 is there, over rows of (N, F)"
            )
        self.dim = 1

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
        y = self._remembered()
        dx = None
        if input_grad:
            dx = for_device(y.device).log_softmax_backward(
                as_gradient(self, dy, y.shape, y.device), y
            )
        self._saved = None
        return dx

    def _settings(self):
        return f"dim={self.dim}"
