"""Transposed convolution in host memory, by the loops of the convolution."""

from __future__ import annotations

import numpy as np

from .. import shapes
from ..tensor import from_array
from .cpu import _convolution, conv2d_backward, conv2d_forward
from .cpu_common import _FLOAT32, _array, _cpu, _flat, _optional, _shape
from .reference_common import _write


def conv_transpose2d_forward(
    x,
    weight,
    bias,
    stride=(1, 1),
    padding=(0, 0),
    output_padding=(0, 0),
    dilation=(1, 1),
    groups=1,
):
    """y (N, K, H, W) of x (N, C, P, Q) and weight (C, K / groups, R, S)."""
    x, weight, bias = _array("x", x), _array("weight", weight), _optional("bias", bias)
    shape = shapes.conv_transpose2d_output_shape(
        x.shape,
        weight.shape,
        stride,
        padding,
        output_padding,
        dilation,
        groups,
        _shape(bias),
    )
    y = _cpu.empty(shape, _FLOAT32)
    if y.size:
        conv = _convolution(
            shape, weight.shape, x.shape, stride, padding, dilation, groups
        )
        conv.gradient_x(_flat(x), _flat(weight), _flat(y))
        if bias is not None:
            y += bias[:, None, None]
    return from_array(y)


def conv_transpose2d_backward(
    dy,
    x,
    weight,
    dweight,
    dbias,
    stride=(1, 1),
    padding=(0, 0),
    output_padding=(0, 0),
    dilation=(1, 1),
    groups=1,
    need_dx=True,
    accumulate=False,
):
    """dx (N, C, P, Q) or None; dweight and dbias are written or added to."""
    shapes.check_conv_transpose2d_backward(
        dy.shape,
        x.shape,
        weight.shape,
        dweight.shape,
        None if dbias is None else dbias.shape,
        stride,
        padding,
        output_padding,
        dilation,
        groups,
    )
    how = stride, padding, dilation, groups
    conv2d_backward(x, dy, weight, dweight, None, *how, False, accumulate)
    if dbias is not None:
        dbias = _array("dbias", dbias)
        total = _array("dy", dy).sum(axis=(0, 2, 3), dtype=np.float64)
        _write(dbias, total, accumulate)
    return conv2d_forward(dy, weight, None, *how) if need_dx else None
