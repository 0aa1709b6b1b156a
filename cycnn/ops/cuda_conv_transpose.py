"""Transposed convolution on a GPU, by the launches of the convolution."""

from __future__ import annotations

from functools import lru_cache

from .. import shapes
from ..precision import get_precision
from ..tensor import empty_on_gpu
from . import cuda_depthwise
from .cuda import (
    _A_TRANSPOSED,
    _BIAS_ON_ROWS,
    _BLOCK,
    _FLOAT32,
    _col2im,
    _get,
    _part,
    _Product,
    _sum_over_pixels,
    _Unrolled,
    conv2d_backward,
    conv2d_forward,
    fill,
)

_output_shape = lru_cache(256)(shapes.conv_transpose2d_output_shape)


@lru_cache(256)
def _forward_plan(
    x_shape,
    w_shape,
    bias_shape,
    stride,
    padding,
    output_padding,
    dilation,
    groups,
    precision,
    sms,
):
    """(shape of y, shape of the workspace, [(part, product, col2im)])"""
    y_shape = shapes.conv_transpose2d_output_shape(
        x_shape, w_shape, stride, padding, output_padding, dilation, groups, bias_shape
    )
    if not x_shape[0]:
        return y_shape, None, ()
    how = _Unrolled(y_shape, w_shape, x_shape, stride, padding, dilation, groups)
    flags = _A_TRANSPOSED
    if how.column_shape is None:
        # the product is the output; otherwise col2im adds the bias
        flags |= _BIAS_ON_ROWS
    steps = []
    for part, size in how.parts:
        # column[n] = weight^T x[n], a product for each group
        product = _Product(
            precision, sms, flags,
            (how.group_rows, size * how.pixels, how.group_k, groups), how.pixels,
            how.of_weight, how.of_y, how.of_column,
        )  # fmt: skip
        steps.append((part, product, how.fold(size)))
    return y_shape, how.column_shape, steps


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
    device = x.device
    if cuda_depthwise.is_depthwise(weight.shape, groups):
        y_shape = _output_shape(
            x.shape, weight.shape, stride, padding, output_padding, dilation, groups,
            None if bias is None else bias.shape,
        )  # fmt: skip
        y = empty_on_gpu(y_shape, _FLOAT32, device)
        cuda_depthwise.data_gradient(x, weight, y, bias, stride, padding, dilation)
        return y
    gpu = _get(device.index)
    y_shape, column_shape, steps = _forward_plan(
        x.shape,
        weight.shape,
        None if bias is None else bias.shape,
        stride,
        padding,
        output_padding,
        dilation,
        groups,
        get_precision(),
        gpu.sm_count,
    )
    y = empty_on_gpu(y_shape, _FLOAT32, device)
    if column_shape is not None:
        column = empty_on_gpu(column_shape, _FLOAT32, device)
    for part, product, fold in steps:
        source, target = _part(x, part), _part(y, part)
        if fold is None:
            product.run(gpu, target, weight, source, bias)
            continue
        product.run(gpu, column, weight, source)
        grid, numbers = fold
        _col2im(gpu.compute, grid, _BLOCK, target, column, bias, *numbers)
    return y


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
    n, k, h, w = dy.shape
    if dbias is not None and n:
        gpu = _get(dy.device.index)
        _sum_over_pixels(gpu, dbias, dy, n, k, h * w, accumulate)
    elif dbias is not None and not accumulate:
        fill(dbias, 0.0)
    return conv2d_forward(dy, weight, None, *how) if need_dx else None
