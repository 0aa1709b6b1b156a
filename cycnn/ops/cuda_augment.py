"""Augmented batches on a GPU: launches of ``cuda/augment.cu``."""

from __future__ import annotations

from ..devices import device as as_device
from ..gpu.launch import Kernel
from ..tensor import Tensor, empty_on_gpu
from . import reference
from .cuda_common import (
    _BLOCK,
    _FLOAT32,
    _INT32,
    _UINT8,
    _get,
    _images,
    _int32,
    _strided,
)

_augment = {
    kind: Kernel("augment", f"augment_images_{kind}", "PPPPPPPiiiiiiiiffi")
    for kind in ("uint8", "float32")
}
_samples_of_step = Kernel("augment", "samples_of_step", "PPPiii")


def augment_key(seed, epoch, device):
    return Tensor(reference.augment_key(seed, epoch, device), as_device(device))


def samples_of_step(order, position, size, count):
    _int32("order", order)
    _int32("position", position)
    samples = empty_on_gpu((count,), _INT32, order.device)
    if count:
        _samples_of_step(
            _get(order.device.index).compute, _strided(count), _BLOCK, samples, order,
            position, size, count, order.size,
        )  # fmt: skip
    return samples


def augment_images(images, index, samples, key, scale, shift, ways):
    shape = reference.check_augment(
        images.shape,
        index.shape,
        None if samples is None else samples.shape,
        scale.shape,
        shift.shape,
    )
    reference.check_drawn(samples, key, ways)
    _int32("index", index)
    device = images.device
    out = empty_on_gpu(shape, _FLOAT32, device)
    if not out.size:
        return out
    changes = 0, 0, 0, 0.0, 0.0, 0
    if ways is None:
        samples = key = None
    else:
        _int32("samples", samples)
        _int32("key", key)
        changes = (
            *ways.shift, int(ways.flip), ways.rotation, ways.zoom, ways.cutout,
        )  # fmt: skip
    n, c, h, w = shape
    kernel = _augment["uint8" if images.dtype == _UINT8 else "float32"]
    kernel(
        _get(device.index).compute, _images(n, c * h * w), _BLOCK, out, images, index,
        samples, key, scale, shift, n, c, h, w, images.shape[0], *changes,
    )  # fmt: skip
    return out
