"""Transposed convolution."""

from __future__ import annotations

import math

from .. import shapes
from ..errors import ShapeError
from .affine import Convolution


class ConvTranspose2d(Convolution):
    """The transpose of a convolution, from small images to large ones: each number of
    the input adds a filter, scaled by it, to the output.

    Parameters
    ----------
    in_channels, out_channels : int
        C and K.
    kernel_size : int or (int, int)
        R and S.
    stride, dilation : int or (int, int)
        Of the convolution that it is the transpose of: steps between the places where
        filters are added, and between the taps of one filter.
    padding : int or (int, int)
        Rows and columns that are cut off on each side.
    output_padding : int or (int, int)
        Rows at the bottom and columns at the right that the output has more; smaller
        than the stride. A convolution of stride s takes s sizes to one, and this says
        which of them is meant.
    groups : int
        The channels are cut into so many groups, each on its own. Divides C and K.
    bias : bool
        Whether a learned number is added to each output channel.

    Attributes
    ----------
    weight : Parameter
        (C, K / groups, R, S), drawn uniformly from +-1 / sqrt(K / groups * R * S).
    bias : Parameter or None
        (K,), drawn from the same interval.

    Notes
    -----
    Shapes: (N, C, P, Q) -> (N, K, H, W) with
    H = (P - 1) stride - 2 padding + dilation (R - 1) + output_padding + 1, W likewise.

    Formula, for one group, stride s and dilation d::

        y[n,k,h,v] = b[k] + sum over c,r,t and those p,q with s p + d r - padding = h,
                            s q + d t - padding = v of w[c,k,r,t] x[n,c,p,q]
    """

    _operation = "conv_transpose2d"
    _defaults = (
        ("stride", (1, 1)),
        ("padding", (0, 0)),
        ("output_padding", (0, 0)),
        ("groups", 1),
        ("dilation", (1, 1)),
    )

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        output_padding=0,
        groups=1,
        bias=True,
        dilation=1,
    ):
        self._set(
            in_channels,
            out_channels,
            kernel_size,
            groups,
            stride=(1, stride),
            padding=(0, padding),
            output_padding=(0, output_padding),
            dilation=(1, dilation),
        )
        if any(more >= step for more, step in zip(self.output_padding, self.stride)):
            raise ShapeError(
                f"{type(self).__name__}: output_padding={self.output_padding} must be "
                f"smaller than stride={self.stride}"
            )
        shape = (self.in_channels, self.out_channels // self.groups, *self.kernel_size)
        self._draw(shape, math.prod(shape[1:]), self.out_channels, bias)

    def _geometry(self):
        return (
            self.stride,
            self.padding,
            self.output_padding,
            self.dilation,
            self.groups,
        )

    def output_shape(self, x_shape) -> tuple:
        """The shape of the output for an input of this shape."""
        return shapes.conv_transpose2d_output_shape(
            x_shape, self.weight.shape, *self._geometry()
        )

    def backward(self, dy, input_grad=True, accumulate=False):
        """With A for the convolution of these filters, y = A^T x + b; so dx = A dy.

        Collecting the terms in which each number occurs in the formula of the class::

            dx[n,c,p,q] = sum over k,r,t of w[c,k,r,t] dy[n, k, s p + d r, s q + d t]
            dw[c,k,r,t] = sum over n,p,q of x[n,c,p,q] dy[n, k, s p + d r, s q + d t]
            db[k]       = sum over n,h,v of dy[n,k,h,v]

        with dy zero-padded: the forward of :class:`Conv2d`, and its weight gradient
        with the roles of x and dy exchanged.
        """
        return self._gradients(dy, input_grad, accumulate)
