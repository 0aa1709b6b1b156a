"""Normalisation."""

from __future__ import annotations

import math

import numpy as np

from .. import shapes
from ..errors import ShapeError
from ..ops import for_device
from .arguments import count, flag, number
from .buffer import Buffer
from .layer import Layer, as_gradient, as_input
from .parameter import Parameter


class BatchNorm2d(Layer):
    """Shifts and scales each channel to mean 0 and variance 1, then as it learns to.

    In training mode mean and variance are those of the batch, over images and pixels,
    and the running statistics move towards them. In evaluation mode they are the
    running statistics.

    Parameters
    ----------
    num_features : int
        C.
    eps : float
        Added to the variance, so that a channel of equal numbers can be divided by it.
    momentum : float or None
        How far the running statistics move in each batch, from 0 to 1. None: they are
        the means over all batches.
    affine : bool
        Whether there are ``weight`` and ``bias``.
    track_running_stats : bool
        Whether there are running statistics. Without them, those of the batch are used
        in evaluation mode as well.

    Attributes
    ----------
    weight, bias : Parameter (C,) or None
        1 and 0 at first.
    running_mean, running_var : Buffer (C,) or None
        0 and 1 at first. The variance is that of a sample, divided by M - 1.
    num_batches_tracked : Buffer () int32, or None

    Notes
    -----
    Shapes: (N, C, H, W) -> (N, C, H, W); M = N H W is 2 or more in training.

    Formula: y = (x - mean) / sqrt(variance + eps) weight + bias, with mean = (sum x) /
    M and variance = (sum (x - mean)^2) / M of each channel.

    running = (1 - momentum) running + momentum (the batch's).
    """

    def __init__(
        self,
        num_features,
        eps=1e-5,
        momentum=0.1,
        affine=True,
        track_running_stats=True,
    ):
        what = type(self).__name__
        self.num_features = count(num_features, what, "num_features")
        self.eps = number(eps, what, "eps")
        self.momentum = momentum
        if momentum is not None:
            self.momentum = number(momentum, what, "momentum", 1)
        self.affine = flag(affine, what, "affine")
        tracks = flag(track_running_stats, what, "track_running_stats")
        self.track_running_stats = tracks
        c = self.num_features
        self.weight = Parameter(np.ones(c, "f")) if affine else None
        self.bias = Parameter(np.zeros(c, "f")) if affine else None
        self.running_mean = Buffer(np.zeros(c, "f")) if tracks else None
        self.running_var = Buffer(np.ones(c, "f")) if tracks else None
        self.num_batches_tracked = Buffer(np.array(0)) if tracks else None
        self.pack()

    def forward(self, x):
        return self._normalised(x, False)

    def _normalised(self, x, relu):
        """The output, of a ReLU behind the layer if ``relu``."""
        of_batch = self.training or self.running_mean is None
        weight, bias = _data(self.weight), _data(self.bias)
        mean, variance = _data(self.running_mean), _data(self.running_var)
        known = mean if weight is None else weight
        x = as_input(self, x, None if known is None else known.device)
        ops = for_device(x.device)
        try:
            self._check_channels(x)
            if of_batch:
                batches = _data(self.num_batches_tracked)
                statistics = mean, variance, batches, self.momentum, self.eps
                y, mean, variance = ops.batch_norm2d_forward(
                    x, weight, bias, *statistics, relu
                )
            else:
                y = ops.batch_norm2d_inference(
                    x, weight, bias, mean, variance, self.eps, relu
                )
        except ShapeError as error:
            raise ShapeError(f"{self!r}: {error}") from None
        self._saved = (x, mean, variance, of_batch, relu)
        return y

    def _check_channels(self, x):
        if len(x.shape) == 4 and x.shape[1] != self.num_features:
            raise ShapeError(
                f"x has {x.shape[1]} channels (shape {x.shape}), expected "
                f"{self.num_features}"
            )

    def backward(self, dy, input_grad=True, accumulate=False):
        """Of one channel, with r = 1 / sqrt(variance + eps) and u = (x - mean) r::

            db = sum of dy        dw = sum of dy u        as y = w u + b

        In evaluation mode mean and variance are constants, and dx = dy w r. In training
        each x[i] moves them, too: dmean/dx[i] = 1 / M and, because the x - mean add up
        to 0, dvariance/dx[i] = 2 (x[i] - mean) / M, hence dr/dx[i] = -r^2 u[i] / M.
        So du[j]/dx[i] = r ([i = j] - 1 / M - u[j] u[i] / M); summed over j with dy[j]::

            dx = w r (dy - (sum of dy) / M - u (sum of dy u) / M)
        """
        x, mean, variance, of_batch, relu = self._remembered()
        weight, bias = self.weight, self.bias
        dx = for_device(x.device).batch_norm2d_backward(
            as_gradient(self, dy, x.shape, x.device),
            x,
            _data(weight),
            mean,
            variance,
            None if weight is None else weight.grad,
            None if bias is None else bias.grad,
            self.eps,
            of_batch,
            input_grad,
            accumulate,
            relu,
            _data(bias),
        )
        self._saved = None
        return dx

    def _settings(self):
        text = f"{self.num_features}"
        for name, default in (
            ("eps", 1e-5),
            ("momentum", 0.1),
            ("affine", True),
            ("track_running_stats", True),
        ):
            value = getattr(self, name)
            if value != default:
                text += f", {name}={value}"
        return text


class LayerNorm(Layer):
    """Shifts and scales each sample to mean 0 and variance 1, then as it learns to.

    Mean and variance are those of the last axes: of each sample alone, in training as
    in evaluation.

    Parameters
    ----------
    normalized_shape : int or tuple of int
        Sizes of the last axes, those that are normalised together.
    eps : float
        Added to the variance, so that equal numbers can be divided by it.
    elementwise_affine : bool
        Whether there are ``weight`` and ``bias``.
    bias : bool
        Whether there is a ``bias`` beside the weight.

    Attributes
    ----------
    weight, bias : Parameter of the normalised shape, or None
        1 and 0 at first.

    Notes
    -----
    Shapes: (N, ..., then those of normalized_shape) -> the same.

    Formula: y = (x - mean) / sqrt(variance + eps) weight + bias, with mean = (sum x) /
    F and variance = (sum (x - mean)^2) / F of the F numbers that are normalised
    together.
    """

    def __init__(self, normalized_shape, eps=1e-5, elementwise_affine=True, bias=True):
        what = type(self).__name__
        sizes = normalized_shape
        if not isinstance(sizes, (tuple, list)):
            sizes = (sizes,)
        if not sizes:
            raise ShapeError(f"{what}: normalized_shape is empty, expected a size")
        sizes = tuple(count(size, what, "normalized_shape") for size in sizes)
        self.normalized_shape = sizes
        self.eps = number(eps, what, "eps")
        affine = flag(elementwise_affine, what, "elementwise_affine")
        self.elementwise_affine = affine
        self.weight = Parameter(np.ones(sizes, "f")) if affine else None
        with_bias = flag(bias, what, "bias") and affine
        self.bias = Parameter(np.zeros(sizes, "f")) if with_bias else None
        self.pack()

    def forward(self, x):
        weight, bias = self.weight, self.bias
        x = as_input(self, x, None if weight is None else weight.device)
        sizes = self.normalized_shape
        try:
            shapes.check_normalized_shape(x.shape, sizes)
        except ShapeError as error:
            raise ShapeError(f"{self!r}: {error}") from None
        rows = x.reshape(math.prod(x.shape[: -len(sizes)]), math.prod(sizes))
        y, mean, variance = for_device(x.device).layer_norm_forward(
            rows, _flat(weight), _flat(bias), self.eps
        )
        self._saved = (rows, mean, variance, x.shape)
        return y.reshape(x.shape)

    def backward(self, dy, input_grad=True, accumulate=False):
        """Of one sample, with r = 1 / sqrt(variance + eps) and u = (x - mean) r::

            db = sum of dy over samples       dw = sum of dy u over samples

        and with g = dy w, by the derivation of :meth:`BatchNorm2d.backward`, where the
        F numbers of the sample take the place of those of the channel::

            dx = r (g - (sum of g) / F - u (sum of g u) / F)
        """
        rows, mean, variance, shape = self._remembered()
        weight, bias = self.weight, self.bias
        dy = as_gradient(self, dy, shape, rows.device)
        dx = for_device(rows.device).layer_norm_backward(
            dy.reshape(rows.shape),
            rows,
            _flat(weight),
            mean,
            variance,
            None if weight is None else weight.grad.reshape(-1),
            None if bias is None else bias.grad.reshape(-1),
            self.eps,
            input_grad,
            accumulate,
        )
        self._saved = None
        return None if dx is None else dx.reshape(shape)

    def _settings(self):
        sizes = self.normalized_shape
        text = f"{sizes[0] if len(sizes) == 1 else sizes}"
        if self.eps != 1e-5:
            text += f", eps={self.eps}"
        if not self.elementwise_affine:
            return text + ", elementwise_affine=False"
        return text if self.bias is not None else text + ", bias=False"


def _flat(parameter):
    return None if parameter is None else parameter.data.reshape(-1)


def _data(value):
    return None if value is None else value.data
