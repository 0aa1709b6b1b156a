"""Layers that change only the shape."""

from __future__ import annotations

import math

from ..errors import ShapeError
from .layer import Layer, as_gradient, as_input


class Flatten(Layer):
    """(N, ...) -> (N, F): one row for each image, in the same memory."""

    def forward(self, x):
        x = as_input(self, x)
        shape = x.shape
        if not shape:
            raise ShapeError(f"{self!r}: expected a batch (N, ...), got a scalar")
        # the sizes agree by construction, so reshape's checks (microseconds) are spared
        y = x.reshape(shape[0], math.prod(shape[1:]))
        self._saved = (shape, y.shape, x.device)
        return y

    def backward(self, dy, input_grad=True, accumulate=False):
        """dx = dy in the shape of x: every element kept its place in memory."""
        x_shape, y_shape, device = self._remembered()
        dx = None
        if input_grad:
            dx = as_gradient(self, dy, y_shape, device).reshape(x_shape)
        self._saved = None
        return dx
