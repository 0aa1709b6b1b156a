"""Batch normalisation on a GPU, as of :mod:`cycnn.ops.cuda`."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from .. import shapes
from ..gpu.launch import Kernel
from ..shapes import ceil_div
from ..tensor import empty_on_gpu, zeros
from .cuda_common import _BLOCK, _FLOAT32, _get, _images, _int32, _of_rows

_moments = Kernel("batch_norm", "batch_norm_moments", "PPPPPPPfiiii")
_join_moments = Kernel("batch_norm", "batch_norm_join_moments", "PPPPPPfiiqq")
_normalise = Kernel("batch_norm", "batch_norm_normalise", "PPPPPPPfiiii")
_sums = Kernel("batch_norm", "batch_norm_sums", "PPPPPPPPPPfiiiiii")
_join_sums = Kernel("batch_norm", "batch_norm_join_sums", "PPPPPfiii")
_gradient = Kernel("batch_norm", "batch_norm_gradient", "PPPPPPPPfiiii")

_PART = 4096  # numbers of a channel that one block takes
_MOST_PARTS = 1024
_BLOCKS = 4096  # that an elementwise kernel is cut into, where an image is not larger


class _Plan(NamedTuple):
    """Launches for a shape."""

    sizes: tuple  # N, C, pixels
    parts: int
    units_a_part: int
    numbers: int  # of a part
    total: int  # numbers of a channel
    grid: tuple  # of elementwise kernels


@lru_cache(256)
def _plan(x_shape):
    n, c, h, w = x_shape
    pixels = h * w
    vector = 1 if pixels % 4 else 4
    units = n * pixels // vector
    units_a_part = max(_PART // vector, ceil_div(units, _MOST_PARTS))
    blocks, images = _images(n, c * pixels // vector)
    return _Plan(
        (n, c, pixels),
        ceil_div(units, units_a_part),
        units_a_part,
        units_a_part * vector,
        n * pixels,
        (blocks, min(images, ceil_div(_BLOCKS, blocks))),
    )


def _shape(tensor):
    return None if tensor is None else tensor.shape


def _partial(plan, device):
    """Where parts are kept that another launch joins."""
    if plan.parts == 1:
        return None
    return empty_on_gpu((2, plan.sizes[1], plan.parts), _FLOAT32, device)


def _normalised(stream, x, weight, bias, mean, variance, eps, relu, batches=None):
    y = empty_on_gpu(x.shape, _FLOAT32, x.device)
    plan = _plan(x.shape)
    _normalise(
        stream, plan.grid, _BLOCK, y, batches, x, weight, bias, mean, variance, eps,
        *plan.sizes, int(relu),
    )  # fmt: skip
    return y


def batch_norm2d_forward(
    x, weight, bias, running_mean, running_var, batches, momentum, eps, relu=False
):
    count = shapes.check_batch_norm2d(
        x.shape,
        weight=_shape(weight),
        bias=_shape(bias),
        running_mean=_shape(running_mean),
        running_var=_shape(running_var),
    )
    shapes.check_batch_statistics(x.shape)
    device, c = x.device, x.shape[1]
    if not count or not c:
        statistics = (zeros((c,), device=device) for _ in range(2))
        return empty_on_gpu(x.shape, _FLOAT32, device), *statistics
    if running_mean is None:
        batches = None
    else:
        _int32("batches", batches)
    stream, plan = _get(device.index).compute, _plan(x.shape)
    mean = empty_on_gpu((c,), _FLOAT32, device)
    variance = empty_on_gpu((c,), _FLOAT32, device)
    parts = _partial(plan, device)
    written = mean, variance, running_mean, running_var, batches
    factor = -1.0 if momentum is None else momentum
    _moments(
        stream, (c, plan.parts), _BLOCK, parts, *written, x, factor, *plan.sizes,
        plan.units_a_part,
    )  # fmt: skip
    if parts is not None:
        _join_moments(
            stream, _of_rows(c), _BLOCK, *written, parts, factor, c, plan.parts,
            plan.numbers, plan.total,
        )  # fmt: skip
    y = _normalised(stream, x, weight, bias, mean, variance, eps, relu, batches)
    return y, mean, variance


def batch_norm2d_inference(x, weight, bias, mean, variance, eps, relu=False):
    shapes.check_batch_norm2d(
        x.shape,
        weight=_shape(weight),
        bias=_shape(bias),
        mean=mean.shape,
        variance=variance.shape,
    )
    if not x.size:
        return empty_on_gpu(x.shape, _FLOAT32, x.device)
    stream = _get(x.device.index).compute
    return _normalised(stream, x, weight, bias, mean, variance, eps, relu)


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
    shapes.check_batch_norm2d(
        x.shape,
        weight=_shape(weight),
        mean=mean.shape,
        variance=variance.shape,
        dweight=_shape(dweight),
        dbias=_shape(dbias),
        bias=_shape(bias),
    )
    if dy.shape != x.shape:
        shapes.check_same(x=x.shape, dy=dy.shape)
    device = x.device
    dx = empty_on_gpu(x.shape, _FLOAT32, device) if need_dx else None
    if not x.size:
        for gradient in (dweight, dbias):
            if gradient is not None and not accumulate:
                gradient.fill_(0)
        return dx
    stream, plan = _get(device.index).compute, _plan(x.shape)
    c = x.shape[1]
    sums = None
    if dweight is not None or dbias is not None or (need_dx and of_batch):
        sums = empty_on_gpu((2, c), _FLOAT32, device)
        parts = _partial(plan, device)
        written = sums, dweight, dbias
        _sums(
            stream, (c, plan.parts), _BLOCK, parts, *written, dy, x, weight, bias, mean,
            variance, eps, *plan.sizes, plan.units_a_part, int(accumulate), int(relu),
        )  # fmt: skip
        if parts is not None:
            _join_sums(
                stream, _of_rows(c), _BLOCK, *written, parts, variance, eps, c,
                plan.parts, int(accumulate),
            )  # fmt: skip
    if need_dx:
        _gradient(
            stream, plan.grid, _BLOCK, dx, dy, x, weight, bias, mean, variance,
            sums if of_batch else None, eps, *plan.sizes, int(relu),
        )  # fmt: skip
    return dx
