"""What joins and pads, on a GPU: launches of ``cuda/blocks.cu``."""

from __future__ import annotations

import math

from .. import shapes
from ..gpu.launch import Kernel
from ..tensor import empty_on_gpu
from .cuda_common import _BLOCK, _FLOAT32, _MAX_GRID, _get, _images, _vectors

_add_relu = Kernel("elementwise", "add_relu", "PPPq")
_copy_rows = Kernel("blocks", "copy_rows", "PPqqqqqq")
_place = Kernel("blocks", "place", "PPqiiiiii")


def add_relu(x, y, out):
    shapes.check_same(x=x.shape, y=y.shape, out=out.shape)
    n = x.size
    if n:
        _add_relu(_get(x.device.index).compute, _vectors(n), _BLOCK, out, x, y, n)


def _rows(tensor):
    """Numbers of one image."""
    return math.prod(tensor.shape[1:])


def _move(target, at, source, start, count):
    """target[n, at : at + count] = source[n, start : start + count] of rows."""
    n = target.shape[0]
    if not n or not count:
        return
    blocks = _vectors(count)
    _copy_rows(
        _get(target.device.index).compute, (blocks, min(n, _MAX_GRID)), _BLOCK,
        target, source, n, count, _rows(target), at, _rows(source), start,
    )  # fmt: skip


def concat_forward(parts):
    shape = shapes.concat_output_shape(*[part.shape for part in parts])
    y = empty_on_gpu(shape, _FLOAT32, parts[0].device)
    at = 0
    for part in parts:
        count = _rows(part)
        _move(y, at, part, 0, count)
        at += count
    return y


def concat_backward(dy, channels):
    shapes.check_concat_backward(dy.shape, channels)
    parts, start = [], 0
    for count in channels:
        shape = dy.shape[0], count, *dy.shape[2:]
        part = empty_on_gpu(shape, _FLOAT32, dy.device)
        size = _rows(part)
        _move(part, 0, dy, start, size)
        parts.append(part)
        start += size
    return parts


def _placed(source, shape, top, left):
    """A tensor of ``shape`` that holds ``source`` at (top, left), zeros elsewhere."""
    target = empty_on_gpu(shape, _FLOAT32, source.device)
    n, c, h, w = shape
    if target.size:
        # the grid's second axis counts planes, which the kernel strides over
        _place(
            _get(source.device.index).compute, _images(n * c, h * w), _BLOCK, target,
            source, n * c, h, w, *source.shape[2:], top, left,
        )  # fmt: skip
    return target


def zero_pad2d_forward(x, padding):
    shape = shapes.zero_pad2d_output_shape(x.shape, padding)
    left, _, top, _ = padding
    return _placed(x, shape, top, left)


def zero_pad2d_backward(dy, padding):
    shape = shapes.zero_pad2d_input_shape(dy.shape, padding)
    left, _, top, _ = padding
    return _placed(dy, shape, -top, -left)
