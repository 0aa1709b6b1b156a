"""Max pooling."""

from __future__ import annotations

from ..errors import ShapeError
from ..ops import for_device
from .arguments import pair_from
from .layer import Layer, as_gradient, as_input


class MaxPool2d(Layer):
    """The largest number of each window.

    Parameters
    ----------
    kernel_size : int or (int, int)
        R and S.
    stride : None, int or (int, int)
        Step between windows; None is the size of the window.
    padding : int or (int, int)
        Rows and columns that count as minus infinity on each side; at most half the
        window, so that every window sees a number.

    Notes
    -----
    Shapes: (N, C, H, W) -> (N, C, P, Q) with
    P = floor((H + 2 padding - R) / stride) + 1, Q likewise.

    Formula: y[n,c,p,q] = max over r < R, t < S of x[n, c, s p + r, s q + t]. Of equal
    numbers the first in reading order is the maximum, and a NaN is larger than any
    number, so that it is not swallowed.
    """

    def __init__(self, kernel_size, stride=None, padding=0):
        what = type(self).__name__
        self.kernel_size = pair_from(1, kernel_size, what, "kernel_size")
        stride = self.kernel_size if stride is None else stride
        self.stride = pair_from(1, stride, what, "stride")
        self.padding = pair_from(0, padding, what, "padding")
        if any(2 * p > k for p, k in zip(self.padding, self.kernel_size)):
            raise ShapeError(
                f"{what}: padding={self.padding} is more than half of "
                f"kernel_size={self.kernel_size}: some windows would see no number"
            )

    def forward(self, x):
        x = as_input(self, x)
        try:
            y, positions = for_device(x.device).maxpool2d_forward(
                x, self.kernel_size, self.stride, self.padding
            )
        except ShapeError as error:
            raise ShapeError(f"{self!r}: {error}") from None
        self._saved = (positions, x.shape)
        return y

    def backward(self, dy, input_grad=True, accumulate=False):
        """The maximum is one of the inputs, so dy/dx is 1 there and 0 elsewhere.

        Forward keeps the position of each maximum, and::

            dx[n,c,h,v] = sum of dy[n,c,p,q] over the windows whose maximum is at (h,v)

        The sum has more than one term where windows overlap.
        """
        positions, x_shape = self._remembered()
        dx = None
        if input_grad:
            device = positions.device
            dx = for_device(device).maxpool2d_backward(
                as_gradient(self, dy, positions.shape, device),
                positions,
                x_shape,
                self.kernel_size,
                self.stride,
                self.padding,
            )
        self._saved = None
        return dx

    def _settings(self):
        text = f"kernel_size={self.kernel_size}"
        if self.stride != self.kernel_size:
            text += f", stride={self.stride}"
        if self.padding != (0, 0):
            text += f", padding={self.padding}"
        return text
