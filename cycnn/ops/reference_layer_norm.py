"""Layer normalisation: the specification, as of :mod:`cycnn.ops.reference`."""

from __future__ import annotations

import numpy as np

from .. import shapes
from .reference_common import _f64, _write


def layer_norm_forward(x, weight, bias, eps):
    """Each row shifted and scaled to mean 0 and variance 1, then as it is learned.

    y = (x - mean) / sqrt(variance + eps) weight + bias, with mean and variance of the F
    numbers of the row: variance = sum (x - mean)^2 / F.

    Parameters
    ----------
    x : (N, F)
    weight, bias : (F,) or None
    eps : float

    Returns
    -------
    y : (N, F)
    mean, variance : (N,)
        What the backward needs.
    """
    shapes.check_layer_norm(x.shape, weight=np.shape(weight), bias=np.shape(bias))
    x = _f64(x)
    mean = x.mean(axis=1)
    variance = ((x - mean[:, None]) ** 2).mean(axis=1)
    y = (x - mean[:, None]) / np.sqrt(variance + eps)[:, None]
    if weight is not None:
        y = y * _f64(weight)
    return y if bias is None else y + _f64(bias), mean, variance


def layer_norm_backward(
    dy,
    x,
    weight,
    mean,
    variance,
    dweight,
    dbias,
    eps,
    need_dx=True,
    accumulate=False,
):
    """Gradients of :func:`layer_norm_forward`.

    With r = 1 / sqrt(variance + eps), u = (x - mean) r of a row, y = weight u + bias:

        dbias = sum_n dy,    dweight = sum_n dy u,    du = dy weight.

    As of batch normalisation (with the F numbers of the row for the M of the channel),
    du_j/dx_i = r ([i = j] - 1 / F - u_j u_i / F), so, summed over j with du_j,

        dx_i = r (du_i - (sum du) / F - u_i (sum du u) / F).

    Parameters
    ----------
    dy, x : (N, F)
    weight : (F,) or None
    mean, variance : (N,)
        As the forward returned them.
    dweight, dbias : (F,), written, or added to if ``accumulate``; or None
    eps : float
    need_dx : bool

    Returns
    -------
    dx : (N, F) or None
    """
    shapes.check_layer_norm(
        x.shape,
        weight=np.shape(weight),
        dweight=np.shape(dweight),
        dbias=np.shape(dbias),
    )
    shapes.check_same(x=x.shape, dy=dy.shape)
    dy = _f64(dy)
    r = 1 / np.sqrt(_f64(variance) + eps)[:, None]
    u = (_f64(x) - _f64(mean)[:, None]) * r
    if dbias is not None:
        _write(dbias, dy.sum(axis=0), accumulate)
    if dweight is not None:
        _write(dweight, (dy * u).sum(axis=0), accumulate)
    if not need_dx:
        return None
    du = dy if weight is None else dy * _f64(weight)
    means = du.mean(axis=1, keepdims=True), (du * u).mean(axis=1, keepdims=True)
    return r * (du - means[0] - u * means[1])
