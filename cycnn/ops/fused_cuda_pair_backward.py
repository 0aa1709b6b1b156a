"""The backward of the first two convolution blocks of a network in one launch.

Launches of ``cuda/templates/conv_pair_backward*.cu``; the header that they share says
how it works and for which shapes. It replaces two calls of
:func:`cycnn.ops.fused_cuda_backward.conv_block_backward`, the second without dx.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from .. import shapes
from ..gpu import device as gpu_device
from ..gpu.launch import Kernel
from ..precision import get_precision
from ..shapes import ceil_div
from ..tensor import empty_on_gpu
from .forward_plan import Machine
from .fused_cuda_backward import Partials, _reduce, _unsupported, reduce_partials

_FLOAT32 = np.dtype("float32")
_THREADS = 512
# bf16 operands would need other tiles; those of tf32 err less and cost what they cost
_MODES = {"fp32": 0, "tf32": 1, "bf16": 1}
_X, _TAPS, _Y = (1, 28, 28), (5, 5), (12, 12)
_BLOCK = (2, 2), (1, 1), (0, 0)  # pool, stride, padding
# Images and channels of y1 of a block; there are two for these. Filters of each.
_IMAGES, _CHANNELS, _HALVES, _FILTERS = 8, 8, 2, 32
_get = gpu_device.get


def _shared(filters, mode) -> int:
    """Bytes of shared memory, as the kernels count them."""
    windows, plane, taps = 16, _Y[0] * _Y[1], _TAPS[0] * _TAPS[1]
    words = _IMAGES * plane * _CHANNELS // _HALVES  # dy1
    words += _IMAGES * plane * _CHANNELS // 4  # code1
    words += _IMAGES * (16 * 28 + 64) + 544  # x, ones
    if mode:
        words += _IMAGES * (filters * windows + 4)
        words += filters // 4 * taps * (4 * _CHANNELS + 4)
        words += _Y[0] * (plane // 6 * _CHANNELS + 1) * 4  # y1
        words += 2 * 64 * _CHANNELS // _HALVES * taps  # sums
        return 4 * words
    sums = _FILTERS * _CHANNELS * _TAPS[1] + 6
    words += 2 * _IMAGES * filters * windows + taps * _CHANNELS * filters
    words += ceil_div(max(_IMAGES * _CHANNELS * (plane + 4), 8 * sums), 4) * 4
    return 4 * (words + ceil_div(4 * sums, 4) * 4)


@lru_cache(None)
def _kernel(channels, filters, mode, settled=False):
    name = "conv_pair_backward_wgmma" if mode else "conv_pair_backward"
    macros = {
        "C": channels,
        "K": filters,
        "MODE": mode,
        "SHARED": _shared(filters, mode),
        "SETTLED": int(settled),
    }
    return Kernel(
        name,
        name,
        "PPPPPPPPPPii",
        tuple(f"-D{name}={value}" for name, value in macros.items()),
        specific=True,
    )


@lru_cache(512)
def _fits(x_shape, w1_shape, w2_shape, machine) -> bool:
    """Whether the template has a kernel for these shapes, in every precision."""
    channels, filters = w1_shape[0], w2_shape[0]
    return (
        tuple(x_shape[1:]) == _X
        and tuple(w1_shape[1:]) == (1, *_TAPS)
        and tuple(w2_shape[1:]) == (channels, *_TAPS)
        and channels % _CHANNELS == 0
        and filters % 8 == 0
        and filters <= _HALVES * _FILTERS
        and machine.capability == (9, 0)
    )


@lru_cache(None)
def _machine(index) -> Machine:
    gpu = _get(index)
    return Machine(gpu.arch, gpu.sm_count)


def _splits(n, channels, processors) -> tuple:
    """(blocks, splits of the gradients); one block a multiprocessor."""
    tiles = _HALVES * channels // _CHANNELS
    splits = min(ceil_div(n, _IMAGES), max(1, processors // tiles))
    return tiles * splits, splits


def conv_pair_backward_supported(x_shape, first, second, index) -> bool:
    """Whether :func:`conv_pair_backward` can do it on GPU ``index``, in any precision.

    It asks for images of 1 x 28 x 28, filters of 5 x 5, windows of 2 x 2, channels in
    multiples of 8, at most 64 of the second block, and compute capability 9.0.

    Parameters
    ----------
    x_shape : tuple of int
    first, second : tuple
        (shape of weight, pool, stride, padding) of each block.
    index : int
    """
    return first[1:] == second[1:] == _BLOCK and _fits(
        x_shape, first[0], second[0], _machine(index)
    )


def conv_pair_backward_kernels(machine, precision, x_shape, first, second) -> list:
    """The kernels of :func:`conv_pair_backward`, none where it is not supported.

    Parameters
    ----------
    machine : forward_plan.Machine
    precision : {"fp32", "tf32", "bf16"}
    x_shape, first, second
        As in :func:`conv_pair_backward_supported`.

    Returns
    -------
    list of Kernel
        Those of a training step, and one from the library of the sums of partials.
    """
    if not first[1:] == second[1:] == _BLOCK:
        return []
    if not _fits(x_shape, first[0], second[0], machine):
        return []
    return [_kernel(first[0][0], second[0][0], _MODES[precision], True), _reduce]


def conv_pair_backward_partials(dy, code2, y1, code1, x, weight2, settled=False):
    """The gradients of both blocks' weights and biases, in parts.

    Parameters
    ----------
    dy : Tensor (N, K, 4, 4)
        Gradient by the output of the second block.
    code2 : uint8 Tensor (N, K, 4, 4)
        The second forward's.
    y1 : Tensor (N, C, 12, 12)
        Output of the first block, input of the second.
    code1 : uint8 Tensor (N, C, 12, 12)
        The first forward's.
    x : Tensor (N, 1, 28, 28)
    weight2 : Tensor (K, C, 5, 5)
        Complete before the kernel ahead of this one started.
    settled : bool
        Whether everything but dy was, as in a training step, where the backward of the
        layers behind lies in between; it may then be fetched while that one still runs.

    Returns
    -------
    second, first : Partials, or None for an empty batch

    Raises
    ------
    ShapeError
        If the shapes do not fit each other.
    NotImplementedError
        If :func:`conv_pair_backward_supported` says no.
    """
    device = x.device
    filters, channels = weight2.shape[:2]
    w1_shape = (channels, 1, *_TAPS)
    if not _fits(x.shape, w1_shape, weight2.shape, _machine(device.index)):
        raise _unsupported("two convolutions of", x.shape, w1_shape, weight2.shape)
    n = x.shape[0]
    y1_shape, y2_shape = (n, channels, *_Y), (n, filters, 4, 4)
    shapes.check_same(**{"pooled x * weight1": y1_shape, "y1": y1.shape})
    shapes.check_same(y1=y1.shape, code1=code1.shape)
    shapes.check_same(y2=y2_shape, dy=dy.shape)
    shapes.check_same(y2=y2_shape, code2=code2.shape)
    if not n:
        return None, None
    gpu = _get(device.index)
    blocks, splits = _splits(n, channels, gpu.sm_count)
    second, first = (
        Partials(
            empty_on_gpu((parts, *w_shape), _FLOAT32, device),
            empty_on_gpu((parts, w_shape[0]), _FLOAT32, device),
        )
        for parts, w_shape in (
            (splits, weight2.shape),
            (_HALVES * splits, w1_shape),
        )
    )
    mode = _MODES[get_precision()]
    _kernel(channels, filters, mode, settled)(
        gpu.compute, blocks, _THREADS, dy, code2, y1, code1, x, weight2, *second,
        *first, n, splits, shared=_shared(filters, mode), dependent=True,
    )  # fmt: skip
    return second, first


def conv_pair_backward(
    dy, code2, y1, code1, x, weight2, dweight2, dbias2, dweight1, dbias1, settled=False
):
    """:func:`conv_pair_backward_partials`, with the parts added up.

    Parameters
    ----------
    dy, code2, y1, code1, x, weight2 : Tensor
        As there.
    dweight2 : Tensor (K, C, 5, 5)
    dweight1 : Tensor (C, 1, 5, 5)
        Written.
    dbias2 : Tensor (K,) or None
    dbias1 : Tensor (C,) or None
        Written.
    settled : bool
        As there.
    """
    filters, channels = weight2.shape[:2]
    shapes.check_same(weight2=weight2.shape, dweight2=dweight2.shape)
    shapes.check_same(weight1=(channels, 1, *_TAPS), dweight1=dweight1.shape)
    for outputs, dbias in ((filters, dbias2), (channels, dbias1)):
        if dbias is not None:
            shapes.check_same(
                **{"weight[:, 0, 0, 0]": (outputs,), "dbias": dbias.shape}
            )
    made = conv_pair_backward_partials(dy, code2, y1, code1, x, weight2, settled)
    for partials, *targets in zip(made, (dweight2, dweight1), (dbias2, dbias1)):
        if partials is not None:
            reduce_partials(partials, *targets)
            continue
        for target in targets:
            if target is not None:
                target.fill_(0.0)
