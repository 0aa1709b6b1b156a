"""Max pooling and average pooling."""

from __future__ import annotations

from ..errors import ShapeError
from ..ops import for_device
from ..shapes import check_pool_padding
from .arguments import flag, pair_from
from .layer import Layer, as_gradient, as_input


class _Pool2d(Layer):
    """The windows of a pooling layer."""

    def __init__(self, kernel_size, stride=None, padding=0, *, ceil_mode=False):
        what = type(self).__name__
        self.kernel_size = pair_from(1, kernel_size, what, "kernel_size")
        stride = self.kernel_size if stride is None else stride
        self.stride = pair_from(1, stride, what, "stride")
        self.padding = _padding(padding, what, self.kernel_size)
        self.ceil_mode = flag(ceil_mode, what, "ceil_mode")

    def _settings(self):
        text = f"kernel_size={self.kernel_size}"
        if self.stride != self.kernel_size:
            text += f", stride={self.stride}"
        if self.padding != (0, 0):
            text += f", padding={self.padding}"
        return text + ", ceil_mode=True" * self.ceil_mode


def _padding(value, layer, kernel_size) -> tuple:
    """(height, width), or (top, left, bottom, right) where that says more."""
    try:
        numbers = len(value)
    except TypeError:  # one for all sides, or nothing of use
        numbers = None
    if numbers not in (None, 2, 4):
        raise ShapeError(
            f"{layer}: padding is {value!r}: expected an integer, two of them (height, "
            f"width) or four (top, left, bottom, right)"
        )
    if numbers == 4:
        ends = value[:2], value[2:]
        before, after = (pair_from(0, end, layer, "padding") for end in ends)
        halves = all(2 * pad <= k for pad, k in zip(before, kernel_size))
        padding = before if before == after and halves else before + after
    else:
        padding = pair_from(0, value, layer, "padding")
    try:
        check_pool_padding(kernel_size, padding)
    except ShapeError as error:
        raise ShapeError(f"{layer}: {error}") from None
    return padding


class MaxPool2d(_Pool2d):
    """The largest number of each window.

    Parameters
    ----------
    kernel_size : int or (int, int)
        R and S.
    stride : None, int or (int, int)
        Step between windows; None is the size of the window.
    padding : int, (int, int) or (int, int, int, int)
        Rows and columns that count as minus infinity on each side; at most half the
        window, so that every window sees a number. Four numbers are top, left, bottom
        and right, each less than the window.
    ceil_mode : bool
        Whether there is one more window, which reaches over the end of the padding,
        where windows do not end there.

    Notes
    -----
    Shapes: (N, C, H, W) -> (N, C, P, Q) with
    P = floor((H + 2 padding - R) / stride) + 1, Q likewise. With ceil_mode it is
    rounded up, but no window begins behind the image.

    Formula: y[n,c,p,q] = max over r < R, t < S of x[n, c, s p + r, s q + t]. Of equal
    numbers the first in reading order is the maximum, and a NaN is larger than any
    number, so that it is not swallowed.
    """

    def forward(self, x):
        x = as_input(self, x)
        try:
            y, positions = for_device(x.device).maxpool2d_forward(
                x, self.kernel_size, self.stride, self.padding, self.ceil_mode
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
                self.ceil_mode,
            )
        self._saved = None
        return dx


class AvgPool2d(_Pool2d):
    """The mean of each window.

    Parameters
    ----------
    kernel_size : int or (int, int)
        R and S.
    stride : None, int or (int, int)
        Step between windows; None is the size of the window.
    padding : int, (int, int) or (int, int, int, int)
        Rows and columns of zeros on each side; at most half the window. Four numbers
        are top, left, bottom and right, each less than the window.
    ceil_mode : bool
        Whether there is one more window, which reaches over the end of the padding,
        where windows do not end there.
    count_include_pad : bool
        Whether the zeros of the padding count in the mean. If not, a window at the edge
        is the mean of the numbers of the image that it sees.

    Notes
    -----
    Shapes: (N, C, H, W) -> (N, C, P, Q) with
    P = floor((H + 2 padding - R) / stride) + 1, Q likewise. With ceil_mode it is
    rounded up, but no window begins behind the image.

    Formula: y[n,c,p,q] = (sum over r < R, t < S of x[n, c, s p + r, s q + t]) / count,
    where count = R S, less what reaches over the end of the padding, or the number of
    terms that are not padding.
    """

    def __init__(
        self,
        kernel_size,
        stride=None,
        padding=0,
        *,
        ceil_mode=False,
        count_include_pad=True,
    ):
        super().__init__(kernel_size, stride, padding, ceil_mode=ceil_mode)
        what = type(self).__name__
        self.count_include_pad = flag(count_include_pad, what, "count_include_pad")

    def forward(self, x):
        x = as_input(self, x)
        try:
            y = for_device(x.device).avgpool2d_forward(
                x,
                self.kernel_size,
                self.stride,
                self.padding,
                self.count_include_pad,
                self.ceil_mode,
            )
        except ShapeError as error:
            raise ShapeError(f"{self!r}: {error}") from None
        self._saved = (x.shape, y.shape, x.device)
        return y

    def backward(self, dy, input_grad=True, accumulate=False):
        """A number enters each window that holds it with the factor 1 / count::

        dx[n,c,h,v] = sum of dy[n,c,p,q] / count[p,q] over the windows with (h,v)
        """
        x_shape, y_shape, device = self._remembered()
        dx = None
        if input_grad:
            dx = for_device(device).avgpool2d_backward(
                as_gradient(self, dy, y_shape, device),
                x_shape,
                self.kernel_size,
                self.stride,
                self.padding,
                self.count_include_pad,
                self.ceil_mode,
            )
        self._saved = None
        return dx

    def _settings(self):
        text = super()._settings()
        return text if self.count_include_pad else text + ", count_include_pad=False"


class AdaptiveAvgPool2d(Layer):
    """The mean of each plane: global average pooling.

    Parameters
    ----------
    output_size : int or (int, int)
        Only 1: one number of each channel, whatever the size of the image.

    Notes
    -----
    Shapes: (N, C, H, W) -> (N, C, 1, 1); :class:`Flatten` makes (N, C) of it.

    Formula: y[n,c] = (sum over h, v of x[n,c,h,v]) / (H W).
    """

    def __init__(self, output_size=1):
        if pair_from(1, output_size, "AdaptiveAvgPool2d", "output_size") != (1, 1):
            raise ShapeError(
                f"AdaptiveAvgPool2d: output_size={output_size!r}, but only 1 is there, "
                f"the mean of the whole plane; for other sizes use AvgPool2d"
            )
        self.output_size = (1, 1)

    def forward(self, x):
        x = as_input(self, x)
        try:
            y = for_device(x.device).global_avgpool2d_forward(x)
        except ShapeError as error:
            raise ShapeError(f"{self!r}: {error}") from None
        self._saved = (x.shape, y.shape, x.device)
        return y

    def backward(self, dy, input_grad=True, accumulate=False):
        """dx[n,c,h,v] = dy[n,c] / (H W), the factor of each number in the mean."""
        x_shape, y_shape, device = self._remembered()
        dx = None
        if input_grad:
            dx = for_device(device).global_avgpool2d_backward(
                as_gradient(self, dy, y_shape, device), x_shape
            )
        self._saved = None
        return dx

    def _settings(self):
        return "output_size=1"
