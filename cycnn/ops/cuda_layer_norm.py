"""Layer normalisation on a GPU, as of :mod:`cycnn.ops.cuda`."""

from __future__ import annotations

from .. import shapes
from ..gpu.launch import Kernel
from ..shapes import ceil_div
from ..tensor import empty_on_gpu
from .cuda_common import _BLOCK, _FLOAT32, _WIDE, _get, _of_rows

_layer_norm_forward = (
    Kernel("layer_norm", "layer_norm_forward_rows", "PPPPPPfii"),
    Kernel("layer_norm", "layer_norm_forward_wide", "PPPPPPfii"),
)
_layer_norm_gradient = (
    Kernel("layer_norm", "layer_norm_gradient_rows", "PPPPPPfii"),
    Kernel("layer_norm", "layer_norm_gradient_wide", "PPPPPPfii"),
)
_columns = Kernel("layer_norm", "layer_norm_columns", "PPPPPPPfiiii")
_join_columns = Kernel("layer_norm", "layer_norm_join_columns", "PPPiii")

_PART = 256  # rows that a block of columns sums
_MOST_PARTS = 256


def _shape(tensor):
    return None if tensor is None else tensor.shape


def layer_norm_forward(x, weight, bias, eps):
    n, f = shapes.check_layer_norm(x.shape, weight=_shape(weight), bias=_shape(bias))
    device = x.device
    y = empty_on_gpu((n, f), _FLOAT32, device)
    mean = empty_on_gpu((n,), _FLOAT32, device)
    variance = empty_on_gpu((n,), _FLOAT32, device)
    if n:
        wide = f >= _WIDE
        _layer_norm_forward[wide](
            _get(device.index).compute, n if wide else _of_rows(n), _BLOCK, y, mean,
            variance, x, weight, bias, eps, n, f,
        )  # fmt: skip
    return y, mean, variance


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
    n, f = shapes.check_layer_norm(
        x.shape, weight=_shape(weight), dweight=_shape(dweight), dbias=_shape(dbias)
    )
    if dy.shape != x.shape:
        shapes.check_same(x=x.shape, dy=dy.shape)
    device = x.device
    dx = empty_on_gpu((n, f), _FLOAT32, device) if need_dx else None
    if not n:
        for gradient in (dweight, dbias):
            if gradient is not None and not accumulate:
                gradient.fill_(0)
        return dx
    stream = _get(device.index).compute
    if dweight is not None or dbias is not None:
        rows = max(_PART, ceil_div(n, _MOST_PARTS))
        count = ceil_div(n, rows)
        parts = None
        if count > 1:
            parts = empty_on_gpu((2, count, f), _FLOAT32, device)
        _columns(
            stream, (ceil_div(f, 32), count), (32, 8), parts, dweight, dbias, dy, x,
            mean, variance, eps, n, f, rows, int(accumulate),
        )  # fmt: skip
        if parts is not None:
            _join_columns(
                stream, ceil_div(f, _BLOCK), _BLOCK, dweight, dbias, parts, count, f,
                int(accumulate),
            )  # fmt: skip
    if need_dx:
        wide = f >= _WIDE
        _layer_norm_gradient[wide](
            stream, n if wide else _of_rows(n), _BLOCK, dx, dy, x, weight, mean,
            variance, eps, n, f,
        )  # fmt: skip
    return dx
