"""What export and import share."""

from __future__ import annotations

import importlib
import math

from .. import nn, shapes


def onnx_package():
    """The package onnx, with the parts of it that are used here.

    Raises
    ------
    ImportError
        If it is not installed, with the command that installs it.
    """
    try:
        for part in ("checker", "helper", "numpy_helper"):
            importlib.import_module(f"onnx.{part}")
        return importlib.import_module("onnx")
    except ImportError as error:
        raise ImportError(
            f"ONNX files need the package onnx ({error}): pip install 'cycnn[onnx]'"
        ) from error


def output_shape(layer, shape: tuple) -> tuple:
    """The shape of what a layer gives for an input of this shape.

    Raises
    ------
    ShapeError
        If the input does not fit.
    """
    if isinstance(layer, nn.Conv2d):
        settings = layer.stride, layer.padding, layer.dilation, layer.groups
        return shapes.conv2d_output_shape(shape, layer.weight.shape, *settings)
    if isinstance(layer, nn.ConvTranspose2d):
        return layer.output_shape(shape)
    if isinstance(layer, nn.MaxPool2d):
        settings = layer.kernel_size, layer.stride, layer.padding
        return shapes.pool2d_output_shape(shape, *settings)
    if isinstance(layer, nn.Linear):
        return shapes.linear_output_shape(shape, layer.weight.shape)
    if isinstance(layer, nn.ZeroPad2d):
        return shapes.zero_pad2d_output_shape(shape, layer.padding)
    if isinstance(layer, nn.Sequential):
        for part in layer:
            shape = output_shape(part, shape)
        return shape
    if isinstance(layer, nn.Residual):
        ways = [layer.body, layer.shortcut or nn.Sequential()]
        made = [output_shape(way, shape) for way in ways]
        shapes.check_same(body=made[0], shortcut=made[1])
        return made[0]
    if isinstance(layer, nn.Concat):
        return shapes.concat_output_shape(
            *[output_shape(branch, shape) for branch in layer]
        )
    if isinstance(layer, nn.Flatten):
        return shape[0], math.prod(shape[1:])
    if isinstance(layer, nn.LogSoftmax):
        return shapes.check_scores("x", shape)
    return shape
