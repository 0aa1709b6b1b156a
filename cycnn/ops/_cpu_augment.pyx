# cython: language_level=3, boundscheck=False, wraparound=False
# cython: initializedcheck=False, cdivision=True
"""Augmented batches for :mod:`cycnn.ops.cpu`.

Every number is computed as the kernel in ``augment.cu`` does, each step rounded to
float32 (setup.py forbids the compiler to fuse a product and a sum), so that the batches
of CPU and GPU have the same bits.
"""

import numpy as np

from cython.parallel cimport prange
from libc.math cimport floorf
from libc.stdint cimport int32_t, uint8_t

ctypedef Py_ssize_t idx

ctypedef fused pixel_t:
    uint8_t
    float

cdef enum:
    FORK = 1 << 13

cdef struct way_t:
    idx down, right, top, left
    bint mirrored
    float a, b


# the same as NumPy sees it
_WAY = np.dtype(
    [(name, np.intp) for name in ("down", "right", "top", "left")]
    + [("mirrored", np.intc), ("a", np.float32), ("b", np.float32)],
    align=True,
)


cdef inline float _pixel(
    const pixel_t *plane, idx h, idx w, idx y, idx x
) noexcept nogil:
    if y < 0 or y >= h or x < 0 or x >= w:
        return 0
    return <float>plane[y * w + x]


cdef void _turned_plane(
    const pixel_t *plane, float *out, idx h, idx w, const way_t *way, float scale,
    float shift,
) noexcept nogil:
    cdef float middle_y = <float>(h - 1) * <float>0.5
    cdef float middle_x = <float>(w - 1) * <float>0.5
    cdef float y, x, from_y, from_x, down, right, upper, lower, v
    cdef float one = 1
    cdef idx i, j, row, column
    for i in range(h):
        for j in range(w):
            y = <float>(i - way.down) - middle_y
            column = (w - 1 - j if way.mirrored else j) - way.right
            x = <float>column - middle_x
            from_y = (way.a * y - way.b * x) + middle_y
            from_x = (way.a * x + way.b * y) + middle_x
            row = <idx>floorf(from_y)
            column = <idx>floorf(from_x)
            down = from_y - <float>row
            right = from_x - <float>column
            upper = (
                (one - right) * _pixel(plane, h, w, row, column)
                + right * _pixel(plane, h, w, row, column + 1)
            )
            lower = (
                (one - right) * _pixel(plane, h, w, row + 1, column)
                + right * _pixel(plane, h, w, row + 1, column + 1)
            )
            v = (one - down) * upper + down * lower
            out[i * w + j] = v * scale + shift


cdef void _moved_plane(
    const pixel_t *plane, float *out, idx h, idx w, const way_t *way, float scale,
    float shift,
) noexcept nogil:
    # without turning, a row comes from one row, and only its ends from outside
    cdef float zero = 0
    cdef float outside = zero * scale + shift
    cdef idx first = -way.right if way.mirrored else way.right
    cdef idx end = min(w, w + first)
    cdef idx i, j, row
    cdef const pixel_t *source
    cdef float *target
    first = max(first, 0)
    for i in range(h):
        row = i - way.down
        target = out + i * w
        if row < 0 or row >= h or first >= end:
            for j in range(w):
                target[j] = outside
            continue
        for j in range(first):
            target[j] = outside
        if way.mirrored:
            source = plane + row * w + (w - 1 - way.right)
            for j in range(first, end):
                target[j] = <float>source[-j] * scale + shift
        else:
            source = plane + row * w - way.right
            for j in range(first, end):
                target[j] = <float>source[j] * scale + shift
        for j in range(end, w):
            target[j] = outside


cdef void _plane(
    const pixel_t *plane, float *out, idx h, idx w, const way_t *way, bint turned,
    idx cut, float scale, float shift,
) noexcept nogil:
    cdef idx i, j
    if turned:
        _turned_plane(plane, out, h, w, way, scale, shift)
    else:
        _moved_plane(plane, out, h, w, way, scale, shift)
    for i in range(max(way.top, 0), min(way.top + cut, h)):
        for j in range(max(way.left, 0), min(way.left + cut, w)):
            out[i * w + j] = 0


def augment(
    const pixel_t[::1] images, const int32_t[::1] index, float[::1] out, shape,
    const float[::1] scale, const float[::1] shift, drawn, bint turned, idx cut,
):
    """``drawn``: what draw_ways gives; or None, and images are only scaled."""
    cdef idx c, h, w, n, i, image
    cdef way_t[::1] ways
    n, c, h, w = shape
    cdef idx plane = h * w
    made = np.zeros(n, _WAY)
    if drawn is not None:
        for name in made.dtype.names:
            made[name] = getattr(drawn, name)
    ways = made
    for i in prange(
        n * c, nogil=True, schedule="static", use_threads_if=n * c * plane >= FORK
    ):
        _plane(
            &images[(index[i // c] * c + i % c) * plane], &out[i * plane], h, w,
            &ways[i // c], turned, cut, scale[i % c], shift[i % c],
        )
