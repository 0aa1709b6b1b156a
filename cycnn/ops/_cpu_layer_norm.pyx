# cython: language_level=3, boundscheck=False, wraparound=False
# cython: initializedcheck=False, cdivision=True
"""Loops of :mod:`cycnn.ops.cpu_layer_norm`; rules as of ``_cpu.pyx``.

A row, or some columns, are one thread's work; sums are taken in double precision.
"""

from cython.parallel cimport prange
from libc.math cimport sqrtf

ctypedef Py_ssize_t idx

cdef enum:
    FORK = 1 << 15
    COLUMNS = 32


cdef void layer_norm_row(
    const float *x, const float *weight, const float *bias, float eps, float *y,
    float *mean, float *variance, idx f,
) noexcept nogil:
    cdef idx j
    cdef double total = 0, squares = 0, middle, d
    cdef float m, r, u
    for j in range(f):
        total += x[j]
    middle = total / f
    for j in range(f):
        d = x[j] - middle
        squares += d * d
    m = <float>middle
    mean[0] = m
    variance[0] = <float>(squares / f)
    r = 1 / sqrtf(variance[0] + eps)
    for j in range(f):
        u = (x[j] - m) * r
        if weight != NULL:
            u = u * weight[j]
        y[j] = u + bias[j] if bias != NULL else u


cdef void gradient_row(
    const float *dy, const float *x, const float *weight, float mean, float r,
    float *dx, idx f,
) noexcept nogil:
    cdef idx j
    cdef double plain = 0, moment = 0
    cdef float g
    for j in range(f):
        g = dy[j] * weight[j] if weight != NULL else dy[j]
        plain += g
        moment += g * (<double>(x[j] - mean) * r)
    plain /= f
    moment /= f
    for j in range(f):
        g = dy[j] * weight[j] if weight != NULL else dy[j]
        dx[j] = r * (g - <float>plain - (x[j] - mean) * r * <float>moment)


cdef void gradient_columns(
    const float *dy, const float *x, const float *mean, const float *r, float *plain,
    float *moment, idx n, idx f, idx first, idx end,
) noexcept nogil:
    cdef double totals[COLUMNS]
    cdef double products[COLUMNS]
    cdef idx i, j, at
    for j in range(end - first):
        totals[j] = 0
        products[j] = 0
    for i in range(n):
        for j in range(end - first):
            at = i * f + first + j
            totals[j] += dy[at]
            products[j] += dy[at] * (<double>(x[at] - mean[i]) * r[i])
    for j in range(end - first):
        plain[first + j] = <float>totals[j]
        moment[first + j] = <float>products[j]


cdef const float *start(const float[::1] x) noexcept:
    if x is None:
        return NULL
    return &x[0]


def layer_norm(
    const float[::1] x, const float[::1] weight, const float[::1] bias, float eps,
    float[::1] y, float[::1] mean, float[::1] variance, idx n, idx f,
):
    cdef const float *w = start(weight)
    cdef const float *b = start(bias)
    cdef idx i
    for i in prange(n, nogil=True, schedule="static", use_threads_if=n * f >= FORK):
        layer_norm_row(&x[i * f], w, b, eps, &y[i * f], &mean[i], &variance[i], f)


def gradient_x(
    const float[::1] dy, const float[::1] x, const float[::1] weight,
    const float[::1] mean, const float[::1] r, float[::1] dx, idx n, idx f,
):
    cdef const float *w = start(weight)
    cdef idx i
    for i in prange(n, nogil=True, schedule="static", use_threads_if=n * f >= FORK):
        gradient_row(&dy[i * f], &x[i * f], w, mean[i], r[i], &dx[i * f], f)


def gradient_sums(
    const float[::1] dy, const float[::1] x, const float[::1] mean,
    const float[::1] r, float[::1] plain, float[::1] moment, idx n, idx f,
):
    """plain = sum over rows of dy, moment = sum of dy (x - mean) r, of each column."""
    cdef idx i
    for i in prange(
        (f + COLUMNS - 1) // COLUMNS, nogil=True, schedule="static",
        use_threads_if=n * f >= FORK,
    ):
        gradient_columns(
            &dy[0], &x[0], &mean[0], &r[0], &plain[0], &moment[0], n, f, i * COLUMNS,
            min(f, (i + 1) * COLUMNS),
        )
