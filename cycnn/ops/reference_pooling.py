"""Average pooling: the specification, as of :mod:`cycnn.ops.reference`."""

from __future__ import annotations

import numpy as np

from .. import shapes
from .reference_common import _f64


def _span(size, count, window, stride, before, after, include_pad):
    """For each of ``count`` windows along an axis: first element, end, and length.

    The length is that of what counts: with or without the padding, but never what
    reaches over its end.
    """
    start = np.arange(count) * stride - before
    first, end = start.clip(0), (start + window).clip(max=size)
    if include_pad:
        return first, end, (start + window).clip(max=size + after) - start
    return first, end, end - first


def _windows(x_shape, y_shape, kernel_size, stride, padding, count_include_pad):
    """For each window (p, q): its slices of rows and columns, and its divisor."""
    sizes = x_shape[2:], y_shape[2:], kernel_size, stride, padding[:2], padding[-2:]
    (top, bottom, height), (left, right, width) = (
        _span(*each, count_include_pad) for each in zip(*sizes)
    )
    for p in range(y_shape[2]):
        for q in range(y_shape[3]):
            rows, columns = slice(top[p], bottom[p]), slice(left[q], right[q])
            yield p, q, rows, columns, height[p] * width[q]


def avgpool2d_forward(
    x,
    kernel_size,
    stride,
    padding=(0, 0),
    count_include_pad=True,
    ceil_mode=False,
):
    """The mean of each window.

    y[n, c, p, q] = 1 / count * sum_{r, s} x[n, c, p stride - padding + r, q ...], zeros
    outside of x. count is R S, less what ceil_mode lets reach over the end of the
    padding, or, if not count_include_pad, the number of elements of x in the window.

    Parameters
    ----------
    x : (N, C, H, W)
    kernel_size, stride : (height, width)
    padding : (height, width) or (top, left, bottom, right)
        At most half the window, or on each side less than the window.
    count_include_pad : bool
    ceil_mode : bool
        Whether a last window may reach over the end of the padding.

    Returns
    -------
    y : (N, C, P, Q)
    """
    shape = shapes.pool2d_output_shape(
        x.shape, kernel_size, stride, padding, ceil_mode
    )
    x = _f64(x)
    y = np.empty(shape)
    how = kernel_size, stride, padding, count_include_pad
    for p, q, rows, columns, count in _windows(x.shape, shape, *how):
        y[:, :, p, q] = x[:, :, rows, columns].sum(axis=(2, 3)) / count
    return y


def avgpool2d_backward(
    dy,
    x_shape,
    kernel_size,
    stride,
    padding=(0, 0),
    count_include_pad=True,
    ceil_mode=False,
):
    """dx[n, c, h, w] = sum of dy[n, c, p, q] / count(p, q) over windows with (h, w).

    y is linear in x: an element enters each window that holds it with 1 / count.

    Parameters
    ----------
    dy : (N, C, P, Q)
    x_shape : tuple
        (N, C, H, W).
    kernel_size, stride, padding, count_include_pad, ceil_mode
        As given to the forward.

    Returns
    -------
    dx : (N, C, H, W)
    """
    shapes.check_avgpool2d_backward(
        dy.shape, x_shape, kernel_size, stride, padding, ceil_mode
    )
    dy = _f64(dy)
    dx = np.zeros(x_shape)
    how = kernel_size, stride, padding, count_include_pad
    for p, q, rows, columns, count in _windows(x_shape, dy.shape, *how):
        dx[:, :, rows, columns] += dy[:, :, p : p + 1, q : q + 1] / count
    return dx


def global_avgpool2d_forward(x):
    """y[n, c] = 1 / (H W) sum_{h, w} x[n, c, h, w].

    Parameters
    ----------
    x : (N, C, H, W)

    Returns
    -------
    y : (N, C, 1, 1)
    """
    shapes.global_pool2d_output_shape(x.shape)
    return _f64(x).mean(axis=(2, 3), keepdims=True)


def global_avgpool2d_backward(dy, x_shape):
    """dx[n, c, h, w] = dy[n, c] / (H W): each element enters with that factor.

    Parameters
    ----------
    dy : (N, C, 1, 1)
    x_shape : tuple
        (N, C, H, W).

    Returns
    -------
    dx : (N, C, H, W)
    """
    shapes.check_global_pool2d_backward(dy.shape, x_shape)
    return np.broadcast_to(_f64(dy) / (x_shape[2] * x_shape[3]), x_shape).copy()
