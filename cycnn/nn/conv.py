"""Two-dimensional convolution."""

from __future__ import annotations

import math

from .affine import Convolution


class Conv2d(Convolution):
    """Convolution of images with learned filters (as everywhere in deep learning,
    precisely a cross-correlation: the filters are not flipped).

    Parameters
    ----------
    in_channels, out_channels : int
        C and K.
    kernel_size : int or (int, int)
        R and S.
    stride, dilation : int or (int, int)
        Steps between windows, and between the taps of one window.
    padding : int or (int, int)
        Rows and columns of zeros on each side.
    groups : int
        The channels are cut into so many groups, each convolved on its own. Divides C
        and K; groups = C is a depthwise convolution, which has kernels of its own.
    bias : bool
        Whether a learned number is added to each output channel.

    Attributes
    ----------
    weight : Parameter
        (K, C / groups, R, S), drawn uniformly from +-1 / sqrt(C / groups * R * S).
    bias : Parameter or None
        (K,), drawn from the same interval.

    Notes
    -----
    Shapes: (N, C, H, W) -> (N, K, P, Q) with
    P = floor((H + 2 padding - dilation (R - 1) - 1) / stride) + 1, Q likewise.

    Formula, for one group, stride s, dilation d and zero-padded x::

        y[n,k,p,q] = b[k] + sum over c,r,t of w[k,c,r,t] x[n, c, s p + d r, s q + d t]
    """

    _operation = "conv2d"
    _defaults = (
        ("stride", (1, 1)),
        ("padding", (0, 0)),
        ("dilation", (1, 1)),
        ("groups", 1),
    )

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        bias=True,
    ):
        self._set(
            in_channels,
            out_channels,
            kernel_size,
            groups,
            stride=(1, stride),
            padding=(0, padding),
            dilation=(1, dilation),
        )
        shape = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        self._draw(shape, math.prod(shape[1:]), self.out_channels, bias)

    def _geometry(self):
        return self.stride, self.padding, self.dilation, self.groups

    def backward(self, dy, input_grad=True, accumulate=False):
        """Gradients of a sum of products: each factor's is the other, times dy.

        In the formula of the class, w[k,c,r,t] multiplies x[n, c, s p + d r, s q + d t]
        to give part of y[n,k,p,q]. So, collecting the terms in which each occurs::

            dw[k,c,r,t] = sum over n,p,q of dy[n,k,p,q] x[n, c, s p + d r, s q + d t]
            db[k]       = sum over n,p,q of dy[n,k,p,q]
            dx[n,c,h,v] = sum over k,r,t and those p,q with s p + d r = h, s q + d t = v
                          of dy[n,k,p,q] w[k,c,r,t]

        dw is a correlation of the input with dy, dx one of dy with the flipped filters.
        """
        return self._gradients(dy, input_grad, accumulate)
