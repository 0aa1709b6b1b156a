"""Augmented batches in host memory: see :mod:`cycnn.ops.cpu`."""

from __future__ import annotations

import importlib

from ..tensor import Tensor, from_array
from . import reference_augment as reference
from .cpu_common import _FLOAT32, _INT32, _UINT8, _array, _cpu, _flat
from .reference import check_index_range

_cpu_augment = importlib.import_module("._cpu_augment", __package__)


def augment_key(seed, epoch, device):
    """int32 (2,): what the random numbers of an epoch depend on."""
    return from_array(reference.augment_key(seed, epoch, device))


def samples_of_step(order, position, size, count):
    """int32 (count,): the images of a recorded step, in the numbers of ``order``."""
    order, position = (
        _array("order", order, _INT32),
        _array("position", position, _INT32),
    )
    return from_array(reference.samples_of_step(order, position, size, count))


def augment_images(images, index, samples, key, scale, shift, ways):
    """images[index], each changed in a random way, then scaled and shifted."""
    as_bytes = isinstance(images, Tensor) and images.dtype == _UINT8
    images = _array("images", images, _UINT8 if as_bytes else _FLOAT32)
    index = _array("index", index, _INT32)
    samples = None if samples is None else _array("samples", samples, _INT32)
    scale, shift = _array("scale", scale), _array("shift", shift)
    shape = reference.check_augment(
        images.shape,
        index.shape,
        None if samples is None else samples.shape,
        scale.shape,
        shift.shape,
    )
    reference.check_drawn(samples, key, ways)
    check_index_range(index, len(images))
    out = _cpu.empty(shape, _FLOAT32)
    if out.size:
        drawn, turned, cut = None, False, 0
        if ways is not None:
            key = _array("key", key, _INT32)
            drawn = reference._draw_ways(samples, key, ways, *shape[2:])
            turned, cut = bool(ways.rotation or ways.zoom), ways.cutout
        _cpu_augment.augment(
            _flat(images), index, _flat(out), shape, scale, shift, drawn, turned, cut
        )
    return from_array(out)
