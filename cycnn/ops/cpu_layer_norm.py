"""Layer normalisation on the CPU, as of :mod:`cycnn.ops.cpu`."""

from __future__ import annotations

import numpy as np

from .. import shapes
from ..tensor import from_array
from .cpu_common import _FLOAT32, _array, _cpu, _flat, _optional, _shape
from .reference_common import _write

# after _cpu, which sets how the threads wait
from . import _cpu_layer_norm as _loops  # isort: skip


def layer_norm_forward(x, weight, bias, eps):
    """(y, mean, variance) of x (N, F)."""
    x, weight, bias = (
        _array("x", x),
        _optional("weight", weight),
        _optional("bias", bias),
    )
    n, f = shapes.check_layer_norm(x.shape, weight=_shape(weight), bias=_shape(bias))
    y = _cpu.empty(x.shape, _FLOAT32)
    mean, variance = np.empty((2, n), _FLOAT32)
    if n:
        _loops.layer_norm(_flat(x), weight, bias, eps, _flat(y), mean, variance, n, f)
    return from_array(y), from_array(mean), from_array(variance)


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
    """dx (N, F) or None; dweight and dbias (F,) are written or added to."""
    dy, x, weight = _array("dy", dy), _array("x", x), _optional("weight", weight)
    mean, variance = _array("mean", mean), _array("variance", variance)
    dweight, dbias = _optional("dweight", dweight), _optional("dbias", dbias)
    n, f = shapes.check_layer_norm(
        x.shape, weight=_shape(weight), dweight=_shape(dweight), dbias=_shape(dbias)
    )
    shapes.check_same(x=x.shape, dy=dy.shape)
    r = 1 / np.sqrt(variance + np.float32(eps))
    dx = _cpu.empty(x.shape, _FLOAT32) if need_dx else None
    sums = np.zeros((2, f), _FLOAT32)
    if n:
        given = _flat(dy), _flat(x)
        if dweight is not None or dbias is not None:
            _loops.gradient_sums(*given, mean, r, *sums, n, f)
        if need_dx:
            _loops.gradient_x(*given, weight, mean, r, _flat(dx), n, f)
    for target, value in zip((dbias, dweight), sums):
        if target is not None:
            _write(target, value, accumulate)
    return from_array(dx) if need_dx else None
