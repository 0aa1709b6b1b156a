"""Padding of images."""

from __future__ import annotations

import operator

from ..errors import ShapeError
from ..ops import for_device
from .layer import Layer, as_gradient, as_input


class ZeroPad2d(Layer):
    """Zeros around images.

    Parameters
    ----------
    padding : int or (int, int, int, int)
        Columns left and right, rows at the top and at the bottom; one number is all
        four. A convolution pads by itself where both sides are the same.

    Notes
    -----
    Shapes: (N, C, H, W) -> (N, C, top + H + bottom, left + W + right).

    Formula: y[n,c,h,w] = x[n, c, h - top, w - left], zero where that is outside of x.
    """

    def __init__(self, padding):
        self.padding = _four(padding)

    def forward(self, x):
        x = as_input(self, x)
        try:
            y = for_device(x.device).zero_pad2d_forward(x, self.padding)
        except ShapeError as error:
            raise ShapeError(f"{self!r}: {error}") from None
        self._saved = (y.shape, y.device)
        return y

    def backward(self, dy, input_grad=True, accumulate=False):
        """Each element of x is one of y, the others of y are constant: dx is cut out.

        dx[n,c,h,w] = dy[n, c, h + top, w + left]
        """
        shape, device = self._remembered()
        dx = None
        if input_grad:
            dy = as_gradient(self, dy, shape, device)
            dx = for_device(device).zero_pad2d_backward(dy, self.padding)
        self._saved = None
        return dx

    def _settings(self):
        left, right, top, bottom = self.padding
        if left == right == top == bottom:
            return f"{left}"
        return f"{self.padding}"


def _four(padding) -> tuple:
    try:
        given = padding if hasattr(padding, "__len__") else (padding,) * 4
        left, right, top, bottom = map(operator.index, given)
    except (TypeError, ValueError):
        raise ShapeError(
            f"ZeroPad2d: padding is {padding!r}: expected an integer, or four of them "
            f"(left, right, top, bottom)"
        ) from None
    if min(left, right, top, bottom) < 0:
        raise ShapeError(
            f"ZeroPad2d: padding is {padding!r}: expected 0 or more on each side"
        )
    return left, right, top, bottom
