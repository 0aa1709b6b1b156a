"""The fully connected layer."""

from __future__ import annotations

from .affine import Affine
from .arguments import count


class Linear(Affine):
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

    _operation = "linear"

    def __init__(self, in_features, out_features, bias=True):
        what = type(self).__name__
        self.in_features = count(in_features, what, "in_features")
        self.out_features = count(out_features, what, "out_features")
        shape = (self.out_features, self.in_features)
        self._draw(shape, self.in_features, self.out_features, bias)

    def _hint(self, x):
        return "; put a Flatten() in front" if x.ndim > 2 else ""

    def backward(self, dy, input_grad=True, accumulate=False):
        """Gradients of a sum of products: each factor's is the other, times dy.

        With y[n,o] = b[o] + sum over i of x[n,i] w[o,i], collecting the terms in which
        each occurs::

            dw[o,i] = sum over n of dy[n,o] x[n,i]      dw = dy^T x
            db[o]   = sum over n of dy[n,o]
            dx[n,i] = sum over o of dy[n,o] w[o,i]      dx = dy w
        """
        return self._gradients(dy, input_grad, accumulate)

    def _settings(self):
        return self._with_bias(f"{self.in_features}, {self.out_features}")
