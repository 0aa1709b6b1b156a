"""The specification of transposed convolution: see :mod:`cycnn.ops.reference`."""

from __future__ import annotations

import numpy as np

from .. import shapes
from . import reference
from .reference_common import _f64, _write


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
    """What a convolution's backward does to dy, done to x.

    y[n, k, h, w] = bias[k] + the sum of weight[c, k, r, s] x[n, c, p, q] over all c, r,
                    s, p, q with p stride - padding + r dilation = h and likewise for w

    which is dx of :func:`conv2d_backward` with x for dy, the roles of C and K exchanged.

    Parameters
    ----------
    x : (N, C, P, Q)
    weight : (C, K / groups, R, S)
    bias : (K,) or None
    stride, padding, output_padding, dilation : (height, width)
        output_padding, smaller than the stride, makes y that much larger.

    Returns
    -------
    y : (N, K, H, W)
    """
    y_shape = shapes.conv_transpose2d_output_shape(
        x.shape,
        weight.shape,
        stride,
        padding,
        output_padding,
        dilation,
        groups,
        None if bias is None else bias.shape,
    )
    unused = np.empty(weight.shape)
    y = reference.conv2d_backward(
        x, np.zeros(y_shape), weight, unused, None, stride, padding, dilation, groups
    )
    return y if bias is None else y + _f64(bias)[:, None, None]


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
    """Gradients of :func:`conv_transpose2d_forward`.

    Let f(u) = A u be the convolution with these filters, so y = A^T x + bias. Then
    dx = A dy: the convolution of dy. And dL/dweight is that of <dy, A^T x> = <A dy, x>,
    a convolution of dy whose output has the gradient x: the weight gradient of f with
    dy as its input and x as the gradient by its output. dbias[k] = sum over n, h, w of
    dy[n, k, h, w].

    Parameters
    ----------
    dy : (N, K, H, W)
    x, weight, stride, padding, output_padding, dilation, groups
        As given to the forward.
    dweight : (C, K / groups, R, S), written, or added to if ``accumulate``
    dbias : (K,) likewise, or None
    need_dx : bool
        False leaves dx out, for the first layer of a model.

    Returns
    -------
    dx : (N, C, P, Q) or None
    """
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
    reference.conv2d_backward(x, dy, weight, dweight, None, *how, False, accumulate)
    if dbias is not None:
        _write(dbias, _f64(dy).sum(axis=(0, 2, 3)), accumulate)
    return reference.conv2d_forward(dy, weight, None, *how) if need_dx else None
