"""Dropout on a GPU, as of :mod:`cycnn.ops.cuda`."""

from __future__ import annotations

from .. import shapes
from ..gpu.launch import Kernel
from ..tensor import empty_on_gpu
from .cuda_common import _BLOCK, _FLOAT32, _INT32, _get, _int32, _vectors
from .reference_dropout import _scale, _threshold

_dropout_forward = Kernel("dropout", "dropout_forward", "PPPPufq")
_dropout_backward = Kernel("dropout", "dropout_backward", "PPPufq")

_MOST_BLOCKS = 2048  # each of a forward counts itself, one after the other


def dropout_forward(x, state, p):
    shapes.check_dropout_state(state.shape)
    _int32("state", state)
    device, n = x.device, x.size
    y = empty_on_gpu(x.shape, _FLOAT32, device)
    used = empty_on_gpu((4,), _INT32, device)
    if n:
        _dropout_forward(
            _get(device.index).compute, min(_vectors(n), _MOST_BLOCKS), _BLOCK, y, used,
            state, x, _threshold(p), _scale(p), n,
        )  # fmt: skip
    return y, used


def dropout_backward(dy, used, p):
    shapes.check_dropout_state(used.shape)
    _int32("used", used)
    device, n = dy.device, dy.size
    dx = empty_on_gpu(dy.shape, _FLOAT32, device)
    if n:
        _dropout_backward(
            _get(device.index).compute, _vectors(n), _BLOCK, dx, dy, used,
            _threshold(p), _scale(p), n,
        )  # fmt: skip
    return dx
