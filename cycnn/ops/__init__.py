"""Operations: one contract, three implementations.

:mod:`cycnn.ops.reference` is the specification, in NumPy and float64.
:mod:`cycnn.ops.cpu` and :mod:`cycnn.ops.cuda` compute the same functions on tensors
of their device. All three have the same functions with the same parameters.
"""

from __future__ import annotations

import importlib
from typing import NamedTuple

_loaded = {}


class Feed(NamedTuple):
    """Where a recorded step finds its batch, which the step before it laid there.

    The host cannot tell a recorded step which one it is, so it counts on the device.
    """

    order: object  # int32 (M,): the images of the epoch, in order
    position: object  # int32 (2,): images taken and steps begun
    classes: object  # int32 (M,): labels of the data set
    index: object  # int32 (N,): images of the step, -1 beyond the end of the order
    labels: object  # int32 (N,): their labels, -1 there
    rates: object  # float32 (steps, *lr), learning rates of each step; None: lr stays
    lr: object  # float32 (), or (groups,) for groups of parameters


class Augmentation(NamedTuple):
    """What may happen to images at random; see ``augment_images``."""

    shift: tuple = (0, 0)  # most rows and columns that an image moves
    flip: bool = False  # whether one of two is mirrored
    rotation: float = 0.0  # most that it turns, in radians
    zoom: float = 0.0  # most that its size changes, as a fraction
    cutout: int = 0  # side of the square that is cut out


def for_device(device):
    """The module of operations for tensors on ``device``."""
    module = _loaded.get(device.type)
    if module is None:
        module = importlib.import_module(f".{device.type}", __name__)
        _loaded[device.type] = module
    return module
