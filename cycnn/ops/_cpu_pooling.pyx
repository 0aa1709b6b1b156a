# cython: language_level=3, boundscheck=False, wraparound=False
# cython: initializedcheck=False, cdivision=True
"""Loops of :mod:`cycnn.ops.cpu_pooling`; rules as of ``_cpu.pyx``.

A plane is one thread's work. Sums are taken in double precision.
"""

from cython.parallel cimport prange

ctypedef Py_ssize_t idx

cdef enum:
    FORK = 1 << 15

ctypedef struct pool_t:
    idx h, w, p, q, window_h, window_w, stride_h, stride_w, pad_h, pad_w
    idx end_h, end_w  # of the padding
    bint include_pad


cdef pool_t geometry(x_shape, y_shape, kernel_size, stride, padding, bint include_pad):
    cdef pool_t g
    g.h, g.w = x_shape[2:]
    g.p, g.q = y_shape[2:]
    g.window_h, g.window_w = kernel_size
    g.stride_h, g.stride_w = stride
    g.pad_h, g.pad_w = padding[:2]
    *_, below, right = padding
    g.end_h, g.end_w = g.h + below, g.w + right
    g.include_pad = include_pad
    return g


cdef inline idx divisor(
    const pool_t *g, idx p, idx q, idx rows, idx columns
) noexcept nogil:
    """Of window (p, q), which sees so many rows and columns of the plane."""
    if g.include_pad:
        rows = min(g.window_h, g.end_h - (p * g.stride_h - g.pad_h))
        columns = min(g.window_w, g.end_w - (q * g.stride_w - g.pad_w))
    return rows * columns


cdef void avgpool_plane(const pool_t *g, const float *x, float *y) noexcept nogil:
    cdef idx p, q, h, w, top, bottom, left, right, count
    cdef double total
    for p in range(g.p):
        top = max(p * g.stride_h - g.pad_h, 0)
        bottom = min(p * g.stride_h - g.pad_h + g.window_h, g.h)
        for q in range(g.q):
            left = max(q * g.stride_w - g.pad_w, 0)
            right = min(q * g.stride_w - g.pad_w + g.window_w, g.w)
            total = 0
            for h in range(top, bottom):
                for w in range(left, right):
                    total += x[h * g.w + w]
            count = divisor(g, p, q, bottom - top, right - left)
            y[p * g.q + q] = <float>(total / count)


cdef void avgpool_plane_gradient(
    const pool_t *g, const float *dy, float *dx
) noexcept nogil:
    cdef idx p, q, h, w, top, bottom, left, right, count
    cdef float share
    for h in range(g.h * g.w):
        dx[h] = 0
    for p in range(g.p):
        top = max(p * g.stride_h - g.pad_h, 0)
        bottom = min(p * g.stride_h - g.pad_h + g.window_h, g.h)
        for q in range(g.q):
            left = max(q * g.stride_w - g.pad_w, 0)
            right = min(q * g.stride_w - g.pad_w + g.window_w, g.w)
            count = divisor(g, p, q, bottom - top, right - left)
            share = dy[p * g.q + q] / <float>count
            for h in range(top, bottom):
                for w in range(left, right):
                    dx[h * g.w + w] += share


cdef void mean_of_plane(const float *x, float *y, idx pixels) noexcept nogil:
    cdef idx i
    cdef double total = 0
    for i in range(pixels):
        total += x[i]
    y[0] = <float>(total / pixels)


def avgpool2d(
    const float[::1] x, float[::1] y, x_shape, y_shape, kernel_size, stride, padding,
    bint include_pad,
):
    cdef pool_t g = geometry(
        x_shape, y_shape, kernel_size, stride, padding, include_pad
    )
    cdef idx i, planes = x_shape[0] * x_shape[1]
    for i in prange(
        planes, nogil=True, schedule="static", use_threads_if=x.shape[0] >= FORK
    ):
        avgpool_plane(&g, &x[i * g.h * g.w], &y[i * g.p * g.q])


def avgpool2d_gradient(
    const float[::1] dy, float[::1] dx, x_shape, y_shape, kernel_size, stride, padding,
    bint include_pad,
):
    cdef pool_t g = geometry(
        x_shape, y_shape, kernel_size, stride, padding, include_pad
    )
    cdef idx i, planes = x_shape[0] * x_shape[1]
    for i in prange(
        planes, nogil=True, schedule="static", use_threads_if=dx.shape[0] >= FORK
    ):
        avgpool_plane_gradient(&g, &dy[i * g.p * g.q], &dx[i * g.h * g.w])


def mean_of_planes(const float[::1] x, float[::1] y, idx planes, idx pixels):
    cdef idx i
    for i in prange(
        planes, nogil=True, schedule="static", use_threads_if=planes * pixels >= FORK
    ):
        mean_of_plane(&x[i * pixels], &y[i], pixels)
