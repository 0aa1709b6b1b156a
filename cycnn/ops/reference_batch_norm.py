"""Batch normalisation: the specification, as of :mod:`cycnn.ops.reference`."""

from __future__ import annotations

import numpy as np

from .. import shapes
from .reference_common import _f64, _write

_PIXELS = (0, 2, 3)  # the axes of one channel


def _of_channels(a):
    """(C,) as (C, 1, 1), beside (N, C, H, W)."""
    return _f64(a)[:, None, None]


def _normalised(x, weight, bias, mean, variance, eps, relu=False):
    y = (_f64(x) - _of_channels(mean)) / np.sqrt(_of_channels(variance) + eps)
    if weight is not None:
        y = y * _of_channels(weight)
    y = y if bias is None else y + _of_channels(bias)
    return np.where(y <= 0, 0.0, y) if relu else y


def batch_norm2d_forward(
    x, weight, bias, running_mean, running_var, batches, momentum, eps, relu=False
):
    """Each channel shifted and scaled to mean 0 and variance 1, then as it is learned.

    y = (x - mean) / sqrt(variance + eps) weight + bias, with mean and variance of the
    M = N H W numbers of the channel: variance = sum (x - mean)^2 / M.

    The running statistics move towards those of the batch: running += f (batch -
    running), with the variance of a sample, sum (x - mean)^2 / (M - 1). f is the
    momentum; without one it is 1 / batches, which makes them means over all batches.

    Parameters
    ----------
    x : (N, C, H, W)
        With M >= 2, or empty: then the statistics stay as they are.
    weight, bias : (C,) or None
    running_mean, running_var : (C,), updated, or None
    batches : () int32 or None
        1 is added. None with the running statistics.
    momentum : float or None
    eps : float
    relu : bool
        Whether y is max(that, 0).

    Returns
    -------
    y : (N, C, H, W)
    mean, variance : (C,)
        What the backward needs.
    """
    count = shapes.check_batch_norm2d(
        x.shape,
        weight=np.shape(weight),
        bias=np.shape(bias),
        running_mean=np.shape(running_mean),
        running_var=np.shape(running_var),
    )
    shapes.check_batch_statistics(x.shape)
    if not count:
        none = np.zeros(x.shape[1])
        return np.zeros(x.shape), none, none
    mean = _f64(x).mean(axis=_PIXELS)
    squares = ((_f64(x) - _of_channels(mean)) ** 2).sum(axis=_PIXELS)
    if running_mean is not None:
        batches += 1
        f = 1 / batches if momentum is None else momentum
        running_mean[...] = (1 - f) * _f64(running_mean) + f * mean
        running_var[...] = (1 - f) * _f64(running_var) + f * squares / (count - 1)
    variance = squares / count
    y = _normalised(x, weight, bias, mean, variance, eps, relu)
    return y, mean, variance


def batch_norm2d_inference(x, weight, bias, mean, variance, eps, relu=False):
    """y = (x - mean) / sqrt(variance + eps) weight + bias, of given statistics.

    Parameters
    ----------
    x : (N, C, H, W)
    weight, bias : (C,) or None
    mean, variance : (C,)
    eps : float
    relu : bool
        Whether y is max(that, 0).

    Returns
    -------
    y : (N, C, H, W)
    """
    shapes.check_batch_norm2d(
        x.shape,
        weight=np.shape(weight),
        bias=np.shape(bias),
        mean=mean.shape,
        variance=variance.shape,
    )
    return _normalised(x, weight, bias, mean, variance, eps, relu)


def batch_norm2d_backward(
    dy,
    x,
    weight,
    mean,
    variance,
    dweight,
    dbias,
    eps,
    of_batch=True,
    need_dx=True,
    accumulate=False,
    relu=False,
    bias=None,
):
    """Gradients of :func:`batch_norm2d_forward`, or of :func:`batch_norm2d_inference`.

    Of one channel, with r = 1 / sqrt(variance + eps) and u = (x - mean) r, so that y =
    weight u + bias:

        dbias = sum dy,    dweight = sum dy u,    du = dy weight.

    Where mean and variance are given numbers, dx = du r. Where they are the batch's,
    each x_i also moves them: dmean/dx_i = 1 / M, and, as sum (x - mean) = 0,
    dvariance/dx_i = 2 (x_i - mean) / M, so dr/dx_i = -r^3 (x_i - mean) / M = -r^2 u_i /
    M. Hence du_j/dx_i = r ([i = j] - 1 / M) + (x_j - mean) dr/dx_i
    = r ([i = j] - 1 / M - u_j u_i / M), and, summed over j with du_j,

        dx_i = weight r (dy_i - (sum dy) / M - u_i (sum dy u) / M).

    With ``relu``, dy counts where weight u + bias > 0, and is 0 elsewhere.

    Parameters
    ----------
    dy, x : (N, C, H, W)
    weight : (C,) or None
    mean, variance : (C,)
        As the forward returned them, or as they were given.
    dweight, dbias : (C,), written, or added to if ``accumulate``; or None
    eps : float
    of_batch : bool
        Whether mean and variance are those of x.
    need_dx : bool
    relu : bool
        As given to the forward.
    bias : (C,) or None
        As given to the forward; used with ``relu`` only.

    Returns
    -------
    dx : (N, C, H, W) or None
    """
    count = shapes.check_batch_norm2d(
        x.shape,
        weight=np.shape(weight),
        mean=mean.shape,
        variance=variance.shape,
        dweight=np.shape(dweight),
        dbias=np.shape(dbias),
        bias=np.shape(bias),
    )
    shapes.check_same(x=x.shape, dy=dy.shape)
    dy = _f64(dy)
    if relu:
        dy = np.where(_normalised(x, weight, bias, mean, variance, eps) > 0, dy, 0.0)
    r = 1 / np.sqrt(_of_channels(variance) + eps)
    u = (_f64(x) - _of_channels(mean)) * r
    sums = dy.sum(axis=_PIXELS), (dy * u).sum(axis=_PIXELS)
    if dbias is not None:
        _write(dbias, sums[0], accumulate)
    if dweight is not None:
        _write(dweight, sums[1], accumulate)
    if not need_dx:
        return None
    if of_batch and count:
        dy = dy - (_of_channels(sums[0]) + u * _of_channels(sums[1])) / count
    return dy * r if weight is None else dy * r * _of_channels(weight)
