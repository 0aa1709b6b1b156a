"""The fully connected layer."""

from __future__ import annotations

import math

from ..errors import ShapeError
from ..ops import for_device
from . import init
from .arguments import count, flag
from .layer import Layer, as_gradient, as_input
from .parameter import Parameter


class Linear(Layer):
    """Every output is a weighted sum of all inputs.

    Parameters
    ----------
    in_features, out_features : int
        I and O.
    bias : bool
        Whether a learned number is added to each output.

    Attributes
    ----------
    weight : Parameter
        (O, I), drawn uniformly from +-1 / sqrt(I).
    bias : Parameter or None
        (O,), drawn from the same interval.

    Notes
    -----
    Shapes: (N, I) -> (N, O). Formula: y = x w^T + b, that is
    y[n,o] = b[o] + sum over i of x[n,i] w[o,i].
    """

    def __init__(self, in_features, out_features, bias=True):
        what = type(self).__name__
        self.in_features = count(in_features, what, "in_features")
        self.out_features = count(out_features, what, "out_features")
        bound = 1 / math.sqrt(self.in_features)
        shape = (self.out_features, self.in_features)
        self.weight = Parameter(init.uniform(shape, -bound, bound))
        self.bias = None
        if flag(bias, what, "bias"):
            self.bias = Parameter(init.uniform(shape[:1], -bound, bound))
        self.pack()

    def forward(self, x):
        weight, bias = self.weight.data, self.bias
        x = as_input(self, x, weight.device)
        try:
            y = for_device(weight.device).linear_forward(
                x, weight, None if bias is None else bias.data
            )
        except ShapeError as error:
            hint = "; put a Flatten() in front" if x.ndim > 2 else ""
            raise ShapeError(f"{self!r}: {error}{hint}") from None
        self._saved = (x, y.shape)
        return y

    def backward(self, dy, input_grad=True, accumulate=False):
        """Gradients of a sum of products: each factor's is the other, times dy.

        With y[n,o] = b[o] + sum over i of x[n,i] w[o,i], collecting the terms in which
        each occurs::

            dw[o,i] = sum over n of dy[n,o] x[n,i]      dw = dy^T x
            db[o]   = sum over n of dy[n,o]
            dx[n,i] = sum over o of dy[n,o] w[o,i]      dx = dy w
        """
        x, shape = self._remembered()
        weight, bias = self.weight, self.bias
        device = x.device
        dx = for_device(device).linear_backward(
            as_gradient(self, dy, shape, device),
            x,
            weight.data,
            weight.grad,
            None if bias is None else bias.grad,
            input_grad,
            accumulate,
        )
        self._saved = None
        return dx

    def _settings(self):
        text = f"{self.in_features}, {self.out_features}"
        return text if self.bias is not None else text + ", bias=False"
