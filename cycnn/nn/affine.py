"""What layers of a weight and a bias share: convolutions and the linear layer."""

from __future__ import annotations

import math

from ..errors import ShapeError
from ..ops import for_device
from . import init
from .arguments import count, flag, pair_from
from .layer import Layer, as_gradient, as_input
from .parameter import Parameter


class Affine(Layer):
    """y = W x + b, where ``weight`` says what W is.

    A subclass names its operation, ``<_operation>_forward`` and ``..._backward``, and
    says in :meth:`_geometry` which arguments these have besides.
    """

    _operation = None

    def _draw(self, shape, inputs, outputs, bias):
        """Make the parameters, uniform in +-1 / sqrt(inputs): of PyTorch's layers."""
        bound = 1 / math.sqrt(inputs)
        self.weight = Parameter(init.uniform(shape, -bound, bound))
        self.bias = None
        if flag(bias, type(self).__name__, "bias"):
            self.bias = Parameter(init.uniform((outputs,), -bound, bound))
        self.pack()

    def _geometry(self) -> tuple:
        return ()

    def _hint(self, x) -> str:
        """What to do about an ``x`` that does not fit."""
        return ""

    def forward(self, x):
        weight, bias = self.weight.data, self.bias
        x = as_input(self, x, weight.device)
        compute = getattr(for_device(weight.device), f"{self._operation}_forward")
        try:
            y = compute(
                x, weight, None if bias is None else bias.data, *self._geometry()
            )
        except ShapeError as error:
            raise ShapeError(f"{self!r}: {error}{self._hint(x)}") from None
        self._saved = (x, y.shape)
        return y

    def _gradients(self, dy, input_grad, accumulate):
        """Fill those of the parameters; returns dx, or None."""
        x, shape = self._remembered()
        weight, bias = self.weight, self.bias
        device = x.device
        compute = getattr(for_device(device), f"{self._operation}_backward")
        dx = compute(
            as_gradient(self, dy, shape, device),
            x,
            weight.data,
            weight.grad,
            None if bias is None else bias.grad,
            *self._geometry(),
            input_grad,
            accumulate,
        )
        self._saved = None
        return dx

    def _with_bias(self, settings) -> str:
        return settings if self.bias is not None else settings + ", bias=False"


class Convolution(Affine):
    """The arguments that convolutions have, transposed or not."""

    # those besides the first three, in the order in which repr shows them, and their
    # defaults
    _defaults = ()

    def _set(self, in_channels, out_channels, kernel_size, groups, **pairs):
        """Check the arguments, and keep them; ``pairs``: (least, value) of the others."""
        what = type(self).__name__
        self.in_channels = count(in_channels, what, "in_channels")
        self.out_channels = count(out_channels, what, "out_channels")
        self.kernel_size = pair_from(1, kernel_size, what, "kernel_size")
        for name, (least, value) in pairs.items():
            setattr(self, name, pair_from(least, value, what, name))
        self.groups = count(groups, what, "groups")
        for name in ("in_channels", "out_channels"):
            channels = getattr(self, name)
            if channels % self.groups:
                raise ValueError(
                    f"{what}: groups={self.groups} does not divide {name}={channels}"
                )

    def _settings(self):
        text = f"{self.in_channels}, {self.out_channels}"
        text += f", kernel_size={self.kernel_size}"
        for name, default in self._defaults:
            value = getattr(self, name)
            if value != default:
                text += f", {name}={value}"
        return self._with_bias(text)
