"""The specification of augmented batches: see :mod:`cycnn.ops.reference`."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from .. import shapes
from ..errors import ShapeError
from . import reference

_MOST = 2**32 - 1


class Drawn(NamedTuple):
    """What happens to each of N images; arrays (N,)."""

    down: np.ndarray  # int32, rows and columns that the image moves
    right: np.ndarray
    mirrored: np.ndarray  # bool
    a: np.ndarray  # float32, cos and sin of the rotation over the zoom
    b: np.ndarray
    top: np.ndarray  # int32, corner of the square that is cut out
    left: np.ndarray


def augment_key(seed, epoch, device):
    """int32 (2,): what the random numbers of an epoch depend on.

    For mix32, the finaliser of murmur3, and the low and high half of the seed::

        key[0] = mix32(low + 0x3c6ef372) ^ mix32(high + 0x7f4a7c15 (epoch + 1))
        key[1] = mix32(key[0] + 0x9e3779b9) ^ mix32(high + 0x85ebca6b)

    ``device`` is the one that the tensor of the other modules is made on.
    """
    seed, epoch = int(seed), int(epoch)
    low, high = seed & _MOST, seed >> 32 & _MOST
    first = _mix(low + 0x3C6EF372) ^ _mix(high + 0x7F4A7C15 * (epoch + 1))
    second = _mix(first + 0x9E3779B9) ^ _mix(high + 0x85EBCA6B)
    return np.array([first, second], np.uint32).view(np.int32)


def _mix(value) -> int:
    return int(reference._mix32(np.array([value & _MOST], np.uint32))[0])


def samples_of_step(order, position, size, count):
    """The images of a recorded step, of which ``position`` counts the next one's first.

    Parameters
    ----------
    order : (M,) int32
    position : (2,) int32
        As of :class:`cycnn.ops.Feed`, behind ``begin_step``: images taken, steps begun.
    size, count : int
        Images that begin_step took, and those of them that are asked for.

    Returns
    -------
    (count,) int32
        order[position[0] - size ...], -1 beyond its ends.
    """
    at = int(position[0]) - size + np.arange(count)
    inside = (at >= 0) & (at < len(order))
    return np.where(inside, order[np.where(inside, at, 0)], -1).astype(np.int32)


def check_augment(images_shape, index_shape, samples_shape, scale_shape, shift_shape):
    """The shapes of ``augment_images`` fit; returns (N, C, H, W)."""
    n, *rest = shapes.gather_output_shape(images_shape, index_shape)
    if len(rest) != 3:
        raise ShapeError(
            f"images have shape {tuple(images_shape)}: expected 4 axes (M, C, H, W)"
        )
    for name, shape in ("scale", scale_shape), ("shift", shift_shape):
        if tuple(shape) != (rest[0],):
            raise ShapeError(
                f"{name} has shape {tuple(shape)}: expected {(rest[0],)}, one for each "
                f"channel"
            )
    if samples_shape is not None and tuple(samples_shape) != (n,):
        raise ShapeError(
            f"samples have shape {tuple(samples_shape)}: expected {(n,)}, one for each "
            f"of index"
        )
    return n, *rest


def check_drawn(samples, key, ways):
    """What to do with images comes with what the random numbers depend on."""
    if ways is not None and (samples is None or key is None):
        raise ValueError("ways are given, but not samples and key to draw them from")


def _draw_ways(samples, key, ways, h, w) -> Drawn:
    """What happens to each image, in arithmetic that is the same on every device.

    With mix32 as above, all in uint32, draw j of a sample is::

        draw(j) = mix32(mix32(mix32(sample 0x9e3779b9 + key[0]) + key[1])
                        + 0x9e3779b9 (j + 1))

    One of n integers is draw n >> 32, a uniform number draw >> 8 times 2^-24. Sine and
    cosine are Taylor's polynomials, each step rounded to float32: a library's own would
    differ in the last bit from the GPU's.
    """
    samples = np.asarray(samples, np.int32).view(np.uint32)
    first, second = np.asarray(key, np.int32).view(np.uint32)
    mix = reference._mix32
    golden = np.uint32(0x9E3779B9)
    start = mix(mix(samples * golden + first) + second)

    def draw(j):
        return mix(start + _wrapped(0x9E3779B9 * (j + 1)))

    def integer(j, count):
        return (draw(j).astype(np.uint64) * count >> np.uint64(32)).astype(np.int32)

    def symmetric(j):
        """Uniform in -1 .. 1."""
        uniform = (draw(j) >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)
        return uniform * np.float32(2) - np.float32(1)

    one = np.float32(1)
    angle = symmetric(3) * np.float32(ways.rotation)
    zoom = one + symmetric(4) * np.float32(ways.zoom)
    square = angle * angle
    sine, cosine = np.float32(_SINE[0]), np.float32(_COSINE[0])
    for more in _SINE[1:]:
        sine = sine * square + np.float32(more)
    for more in _COSINE[1:]:
        cosine = cosine * square + np.float32(more)
    far_down, far_right = ways.shift
    half = ways.cutout // 2
    return Drawn(
        integer(0, 2 * far_down + 1) - far_down,
        integer(1, 2 * far_right + 1) - far_right,
        (draw(2) & np.uint32(1) == 1) & ways.flip,
        cosine / zoom,
        sine * angle / zoom,
        integer(5, h) - half,
        integer(6, w) - half,
    )


# Of angle^2, the highest power first: sin(angle) / angle and cos(angle).
_SINE = [(-1) ** i / math.factorial(2 * i + 1) for i in range(5, -1, -1)]
_COSINE = [(-1) ** i / math.factorial(2 * i) for i in range(5, -1, -1)]


def _wrapped(value):
    return np.uint32(value & _MOST)


def augment_images(images, index, samples, key, scale, shift, ways):
    """images[index], each changed in a random way, then scaled and shifted.

    y[n, c, h, w] = v scale[c] + shift[c], where v is read from image index[n] at the
    place that (h, w) comes from: mirrored back, moved back, and turned and zoomed back
    about the middle of the image. Where that falls between pixels, v is interpolated
    between the four around it; pixels outside of the image are 0. What is cut out is 0
    in y, whatever scale and shift are.

    Parameters
    ----------
    images : (M, C, H, W) uint8 or float
    index : (N,) int32 row numbers
    samples : (N,) int32 or None
        The number that an image's random numbers depend on, together with ``key``.
    key : (2,) int32 or None
        From :func:`augment_key`.
    scale, shift : (C,)
    ways : cycnn.ops.Augmentation or None
        None: the images as they are.

    Returns
    -------
    (N, C, H, W)
    """
    n, _, h, w = check_augment(
        images.shape,
        index.shape,
        None if samples is None else samples.shape,
        scale.shape,
        shift.shape,
    )
    check_drawn(samples, key, ways)
    reference.check_index_range(index, len(images))
    out = np.asarray(images[index], np.float64)
    scale, shift = (np.asarray(v, np.float64)[:, None, None] for v in (scale, shift))
    if ways is None or not out.size:
        return out * scale + shift
    drawn = _draw_ways(samples, key, ways, h, w)
    for i in range(n):
        way = Drawn(*(value[i] for value in drawn))
        out[i] = _changed(out[i], way, ways) * scale + shift
        if ways.cutout:
            rows = slice(max(way.top, 0), max(way.top + ways.cutout, 0))
            columns = slice(max(way.left, 0), max(way.left + ways.cutout, 0))
            out[i, :, rows, columns] = 0
    return out


def _changed(image, way, ways):
    h, w = image.shape[1:]
    y, x = np.mgrid[:h, :w].astype(np.float64)
    if way.mirrored:
        x = w - 1 - x
    y, x = y - way.down, x - way.right
    if ways.rotation or ways.zoom:
        middle_y, middle_x = (h - 1) / 2, (w - 1) / 2
        y, x = y - middle_y, x - middle_x
        a, b = float(way.a), float(way.b)
        y, x = a * y - b * x + middle_y, a * x + b * y + middle_x
    top, left = np.floor(y).astype(int), np.floor(x).astype(int)
    down, right = y - top, x - left

    def pixel(i, j):
        inside = (0 <= i) & (i < h) & (0 <= j) & (j < w)
        return np.where(inside, image[:, i.clip(0, h - 1), j.clip(0, w - 1)], 0.0)

    upper = (1 - right) * pixel(top, left) + right * pixel(top, left + 1)
    lower = (1 - right) * pixel(top + 1, left) + right * pixel(top + 1, left + 1)
    return (1 - down) * upper + down * lower
