"""Batch normalisation on the CPU, as of :mod:`cycnn.ops.cpu`."""

from __future__ import annotations

import numpy as np

from .. import shapes
from ..tensor import from_array
from .cpu_common import _FLOAT32, _INT32, _array, _cpu, _flat, _optional, _shape
from .reference_common import _write

# after _cpu, which sets how the threads wait
from . import _cpu_batch_norm as _loops  # isort: skip


def _normalised(x, weight, bias, mean, variance, eps, relu):
    y = _cpu.empty(x.shape, _FLOAT32)
    if x.size:
        scale = _scale(weight, variance, eps)
        shift = np.zeros_like(mean) if bias is None else bias
        n, c, h, w = x.shape
        _loops.normalise(_flat(x), mean, scale, shift, _flat(y), n, c, h * w, relu)
    return y


def _scale(weight, variance, eps):
    scale = 1 / np.sqrt(variance + np.float32(eps))
    return scale if weight is None else scale * weight


def batch_norm2d_forward(
    x, weight, bias, running_mean, running_var, batches, momentum, eps, relu=False
):
    """(y, mean, variance) of x (N, C, H, W); running statistics are updated."""
    x, weight, bias = (
        _array("x", x),
        _optional("weight", weight),
        _optional("bias", bias),
    )
    running = _optional("running_mean", running_mean)
    running_squares = _optional("running_var", running_var)
    count = shapes.check_batch_norm2d(
        x.shape,
        weight=_shape(weight),
        bias=_shape(bias),
        running_mean=_shape(running),
        running_var=_shape(running_squares),
    )
    shapes.check_batch_statistics(x.shape)
    n, c, h, w = x.shape
    mean, variance = np.zeros((2, c), _FLOAT32)
    if count:
        _loops.moments(_flat(x), mean, variance, n, c, h * w)
    if count and running is not None:
        tracked = _array("batches", batches, _INT32)
        tracked += 1
        f = np.float32(1 / int(tracked) if momentum is None else momentum)
        running[...] = (1 - f) * running + f * mean
        sample = variance * np.float32(count / (count - 1))
        running_squares[...] = (1 - f) * running_squares + f * sample
    y = _normalised(x, weight, bias, mean, variance, eps, relu)
    return tuple(map(from_array, (y, mean, variance)))


def batch_norm2d_inference(x, weight, bias, mean, variance, eps, relu=False):
    """y (N, C, H, W), of given statistics."""
    x, weight, bias = (
        _array("x", x),
        _optional("weight", weight),
        _optional("bias", bias),
    )
    mean, variance = _array("mean", mean), _array("variance", variance)
    shapes.check_batch_norm2d(
        x.shape,
        weight=_shape(weight),
        bias=_shape(bias),
        mean=mean.shape,
        variance=variance.shape,
    )
    return from_array(_normalised(x, weight, bias, mean, variance, eps, relu))


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
    """dx (N, C, H, W) or None; dweight and dbias (C,) are written or added to."""
    dy, x, weight = _array("dy", dy), _array("x", x), _optional("weight", weight)
    mean, variance = _array("mean", mean), _array("variance", variance)
    dweight, dbias = _optional("dweight", dweight), _optional("dbias", dbias)
    bias = _optional("bias", bias)
    count = shapes.check_batch_norm2d(
        x.shape,
        weight=_shape(weight),
        mean=mean.shape,
        variance=variance.shape,
        dweight=_shape(dweight),
        dbias=_shape(dbias),
        bias=_shape(bias),
    )
    shapes.check_same(x=x.shape, dy=dy.shape)
    n, c, h, w = x.shape
    if relu and x.size:
        y = _normalised(x, weight, bias, mean, variance, eps, relu)
        passed = _cpu.empty(x.shape, _FLOAT32)
        _cpu.relu_gradient(_flat(dy), _flat(y), _flat(passed))
        dy = passed
    sums = np.zeros((2, c), _FLOAT32)
    if count:
        _loops.gradient_sums(_flat(dy), _flat(x), mean, *sums, n, c, h * w)
    r = _scale(None, variance, eps)
    for target, value in ((dbias, sums[0]), (dweight, sums[1] * r)):
        if target is not None:
            _write(target, value, accumulate)
    if not need_dx:
        return None
    dx = _cpu.empty(x.shape, _FLOAT32)
    if x.size:
        means = sums * np.float32(1 / count if of_batch else 0)
        means[1] *= r * r
        scale = _scale(weight, variance, eps)
        _loops.gradient_x(
            _flat(dy), _flat(x), mean, scale, *means, _flat(dx), n, c, h * w
        )
    return from_array(dx)
