"""What the modules of GPU operations share: launch shapes, and plain launches."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from .. import shapes
from ..errors import ShapeError
from ..gpu import device as gpu_device
from ..shapes import ceil_div
from ..tensor import empty_on_gpu

_FLOAT32, _INT32, _UINT8 = map(np.dtype, ("float32", "int32", "uint8"))

_BLOCK = 256
_MAX_GRID = 65535  # of the second and third axis; more work is looped over
_INT32_MAX = 2**31 - 1
_WIDE = 2048  # features from which on a row is a block's work, not a warp's

_get = gpu_device.get


def _int32(name, tensor):
    if tensor.dtype != _INT32:
        raise TypeError(f"{name} has dtype {tensor.dtype}: expected int32")


def _strided(count):
    """Grid of a kernel that strides over ``count`` elements."""
    return min(ceil_div(count, _BLOCK), _MAX_GRID)


def _vectors(count):
    """The same where a thread takes four elements at a time."""
    return min(ceil_div(count, 4 * _BLOCK), _MAX_GRID)


def _of_rows(n):
    """Grid of a kernel with a warp a row."""
    return ceil_div(n, _BLOCK // 32)


@lru_cache(256)
def _images(n, elements):
    """Grid over the elements of an image and over images."""
    if elements > _INT32_MAX:
        raise ShapeError(
            f"an image of {elements} elements is too large: the GPU's kernels number "
            f"at most {_INT32_MAX}"
        )
    return ceil_div(elements, _BLOCK), min(n, _MAX_GRID)


def _map(kernel, x, *options):
    device, n = x.device, x.size
    y = empty_on_gpu(x.shape, _FLOAT32, device)
    if n:
        kernel(_get(device.index).compute, _vectors(n), _BLOCK, y, x, *options, n)
    return y


def _map_backward(kernel, dy, y, *options):
    if dy.shape != y.shape:
        shapes.check_same(y=y.shape, dy=dy.shape)
    device, n = dy.device, dy.size
    dx = empty_on_gpu(dy.shape, _FLOAT32, device)
    if n:
        kernel(_get(device.index).compute, _vectors(n), _BLOCK, dx, dy, y, *options, n)
    return dx
