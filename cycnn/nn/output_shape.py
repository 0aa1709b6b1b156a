"""Shapes of what layers give, known before they run."""

from __future__ import annotations

import math

from .. import shapes
from .activation import (
    GELU,
    Hardtanh,
    LeakyReLU,
    LogSoftmax,
    ReLU,
    Sigmoid,
    SiLU,
    Softmax,
    Tanh,
)
from .blocks import Concat, Residual
from .conv import Conv2d
from .conv_transpose import ConvTranspose2d
from .dropout import Dropout
from .linear import Linear
from .normalisation import BatchNorm2d, LayerNorm
from .padding import ZeroPad2d
from .pooling import AdaptiveAvgPool2d, AvgPool2d, MaxPool2d
from .reshape import Flatten
from .sequential import Sequential


def output_shape(layer, shape: tuple):
    """The shape of what a layer gives for an input of this shape.

    Returns
    -------
    tuple or None
        None where the layer, or one of its parts, is not one of the library's own, or
        has a forward of its own: only the layer itself knows.

    Raises
    ------
    ShapeError
        If the input does not fit.
    """
    for kind in type(layer).__mro__:
        if kind in _SHAPES:
            known = type(layer).forward is kind.forward
            return _SHAPES[kind](layer, shape) if known else None
    return None


def _conv2d(layer, shape):
    settings = layer.stride, layer.padding, layer.dilation, layer.groups
    return shapes.conv2d_output_shape(shape, layer.weight.shape, *settings)


def _pool2d(layer, shape):
    settings = layer.kernel_size, layer.stride, layer.padding, layer.ceil_mode
    return shapes.pool2d_output_shape(shape, *settings)


def _batch_norm2d(layer, shape):
    shapes.check_batch_norm2d(shape, weight=(layer.num_features,))
    return shape


def _layer_norm(layer, shape):
    shapes.check_normalized_shape(shape, layer.normalized_shape)
    return shape


def _sequential(layers, shape):
    for layer in layers:
        shape = None if shape is None else output_shape(layer, shape)
    return shape


def _residual(layer, shape):
    made = output_shape(layer.body, shape)
    other = shape if layer.shortcut is None else output_shape(layer.shortcut, shape)
    if made is None or other is None:
        return None
    shapes.check_same(body=made, shortcut=other)
    return made


def _concat(layer, shape):
    made = [output_shape(branch, shape) for branch in layer]
    return None if None in made else shapes.concat_output_shape(*made)


def _same(layer, shape):
    return shape


_SHAPES = {
    Conv2d: _conv2d,
    ConvTranspose2d: lambda layer, shape: layer.output_shape(shape),
    MaxPool2d: _pool2d,
    AvgPool2d: _pool2d,
    AdaptiveAvgPool2d: lambda layer, shape: shapes.global_pool2d_output_shape(shape),
    ZeroPad2d: lambda layer, shape: shapes.zero_pad2d_output_shape(
        shape, layer.padding
    ),
    Linear: lambda layer, shape: shapes.linear_output_shape(shape, layer.weight.shape),
    Flatten: lambda layer, shape: (shape[0], math.prod(shape[1:])),
    Softmax: lambda layer, shape: shapes.check_scores("x", shape),
    LogSoftmax: lambda layer, shape: shapes.check_scores("x", shape),
    BatchNorm2d: _batch_norm2d,
    LayerNorm: _layer_norm,
    **dict.fromkeys(
        (Dropout, GELU, Hardtanh, LeakyReLU, ReLU, Sigmoid, SiLU, Tanh), _same
    ),
    Sequential: _sequential,
    Residual: _residual,
    Concat: _concat,
}
