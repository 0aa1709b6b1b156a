"""Batch normalisation folded into the convolution ahead of it."""

from __future__ import annotations

import copy

import numpy as np

from .conv import Conv2d
from .layer import Layer
from .normalisation import BatchNorm2d
from .parameter import Parameter
from .sequential import Sequential


def fold_batch_norm(model) -> Layer:
    """A model for predictions, in which convolutions do what BatchNorm2d did.

    Parameters
    ----------
    model : Layer
        Stays as it is.

    Returns
    -------
    Layer
        A copy, in evaluation mode, that computes what ``model`` does in evaluation
        mode, up to rounding. Wherever a Conv2d is followed by a BatchNorm2d in a
        Sequential, at any depth, the convolution has another weight and bias, and the
        layer behind it is gone; those that follow move up, and with them their names in
        the state_dict. What has no running statistics stays.

    Notes
    -----
    In evaluation mode a BatchNorm2d with weight g, bias b and r = g / sqrt(variance +
    eps) makes (y - mean) r + b of y = W x + c, channel by channel: that is W' x + c'
    with W' = r W and c' = (c - mean) r + b. Both are computed in float64 and rounded
    once. The convolution can then be fused with the ReLU that follows (:func:`fuse`).
    """
    model = copy.deepcopy(model)
    for layer in [model, *(inner for _, inner in model._descendants())]:
        if isinstance(layer, Sequential) and type(layer).forward is Sequential.forward:
            layer._replace(_folded(layer))
    model.pack()
    return model.eval()


def _folded(layers) -> list:
    result = []
    for layer in layers:
        if (
            type(layer) is BatchNorm2d
            and layer.running_mean is not None
            and result
            and type(result[-1]) is Conv2d
            and result[-1].out_channels == layer.num_features
        ):
            _fold(result[-1], layer)
        else:
            result.append(layer)
    return result


def _fold(conv, norm) -> None:
    """Let ``conv`` compute what ``norm`` makes of its output."""
    mean, variance = _f64(norm.running_mean), _f64(norm.running_var)
    r = 1 / np.sqrt(variance + norm.eps)
    bias = np.zeros_like(mean) if conv.bias is None else _f64(conv.bias)
    if norm.affine:
        r = r * _f64(norm.weight)
    bias = (bias - mean) * r
    if norm.affine:
        bias = bias + _f64(norm.bias)
    conv.weight.data.copy_(_f64(conv.weight) * r[:, None, None, None])
    if conv.bias is None:
        conv.bias = Parameter(bias, "bias", conv.weight.device)
    else:
        conv.bias.data.copy_(bias)


def _f64(value):
    return value.data.numpy().astype(np.float64)
