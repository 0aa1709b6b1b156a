"""Two-dimensional convolution."""

from __future__ import annotations

import math

from ..errors import ShapeError
from ..ops import for_device
from . import init
from .arguments import count, flag, pair_from
from .layer import Layer, as_gradient, as_input
from .parameter import Parameter


class Conv2d(Layer):
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
        what = type(self).__name__
        self.in_channels = count(in_channels, what, "in_channels")
        self.out_channels = count(out_channels, what, "out_channels")
        self.kernel_size = pair_from(1, kernel_size, what, "kernel_size")
        self.stride = pair_from(1, stride, what, "stride")
        self.padding = pair_from(0, padding, what, "padding")
        self.dilation = pair_from(1, dilation, what, "dilation")
        self.groups = count(groups, what, "groups")
        for name, channels in (
            ("in_channels", self.in_channels),
            ("out_channels", self.out_channels),
        ):
            if channels % self.groups:
                raise ValueError(
                    f"{what}: groups={self.groups} does not divide {name}={channels}"
                )
        shape = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        bound = 1 / math.sqrt(math.prod(shape[1:]))
        self.weight = Parameter(init.uniform(shape, -bound, bound))
        self.bias = None
        if flag(bias, what, "bias"):
            self.bias = Parameter(init.uniform(shape[:1], -bound, bound))
        self.pack()

    def forward(self, x):
        weight, bias = self.weight.data, self.bias
        x = as_input(self, x, weight.device)
        try:
            y = for_device(weight.device).conv2d_forward(
                x,
                weight,
                None if bias is None else bias.data,
                self.stride,
                self.padding,
                self.dilation,
                self.groups,
            )
        except ShapeError as error:
            raise ShapeError(f"{self!r}: {error}") from None
        self._saved = (x, y.shape)
        return y

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
        x, shape = self._remembered()
        weight, bias = self.weight, self.bias
        device = x.device
        dx = for_device(device).conv2d_backward(
            as_gradient(self, dy, shape, device),
            x,
            weight.data,
            weight.grad,
            None if bias is None else bias.grad,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            input_grad,
            accumulate,
        )
        self._saved = None
        return dx

    def _settings(self):
        text = f"{self.in_channels}, {self.out_channels}"
        text += f", kernel_size={self.kernel_size}"
        for name, default in (
            ("stride", (1, 1)),
            ("padding", (0, 0)),
            ("dilation", (1, 1)),
            ("groups", 1),
        ):
            value = getattr(self, name)
            if value != default:
                text += f", {name}={value}"
        return text if self.bias is not None else text + ", bias=False"
