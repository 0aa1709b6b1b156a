# cython: language_level=3, boundscheck=False, wraparound=False
# cython: initializedcheck=False, cdivision=True
"""Loops of :mod:`cycnn.ops.cpu_batch_norm`; rules as of ``_cpu.pyx``.

Sums over a channel are one thread's work, in double precision; what is left is a plane
at a time. x is (n, c, pixels).
"""

from cython.parallel cimport prange

ctypedef Py_ssize_t idx

cdef enum:
    FORK = 1 << 15


cdef void moments_of(
    const float *x, float *mean, float *variance, idx n, idx image, idx pixels
) noexcept nogil:
    cdef idx i, j
    cdef double total = 0, squares = 0, middle, d
    for i in range(n):
        for j in range(pixels):
            total += x[i * image + j]
    middle = total / (n * pixels)
    for i in range(n):
        for j in range(pixels):
            d = x[i * image + j] - middle
            squares += d * d
    mean[0] = <float>middle
    variance[0] = <float>(squares / (n * pixels))


cdef void gradient_sums_of(
    const float *dy, const float *x, float mean, float *plain, float *moment, idx n,
    idx image, idx pixels,
) noexcept nogil:
    cdef idx i, j
    cdef double total = 0, product = 0
    for i in range(n):
        for j in range(pixels):
            total += dy[i * image + j]
            product += dy[i * image + j] * (<double>x[i * image + j] - mean)
    plain[0] = <float>total
    moment[0] = <float>product


cdef void normalise_plane(
    const float *x, float mean, float scale, float shift, float *y, idx pixels,
    bint relu,
) noexcept nogil:
    cdef idx j
    for j in range(pixels):
        y[j] = (x[j] - mean) * scale + shift
    if relu:
        for j in range(pixels):
            # NaN stays NaN
            y[j] = 0 if y[j] <= 0 else y[j]


cdef void gradient_plane(
    const float *dy, const float *x, float mean, float scale, float plain, float moment,
    float *dx, idx pixels,
) noexcept nogil:
    cdef idx j
    for j in range(pixels):
        dx[j] = scale * (dy[j] - plain - (x[j] - mean) * moment)


def moments(
    const float[::1] x, float[::1] mean, float[::1] variance, idx n, idx c, idx pixels
):
    """Mean and variance of each channel."""
    cdef idx k
    for k in prange(
        c, nogil=True, schedule="static", use_threads_if=x.shape[0] >= FORK
    ):
        moments_of(&x[k * pixels], &mean[k], &variance[k], n, c * pixels, pixels)


def gradient_sums(
    const float[::1] dy, const float[::1] x, const float[::1] mean, float[::1] plain,
    float[::1] moment, idx n, idx c, idx pixels,
):
    """plain = sum dy, moment = sum dy (x - mean), of each channel."""
    cdef idx k
    for k in prange(
        c, nogil=True, schedule="static", use_threads_if=x.shape[0] >= FORK
    ):
        gradient_sums_of(
            &dy[k * pixels], &x[k * pixels], mean[k], &plain[k], &moment[k], n,
            c * pixels, pixels,
        )


def normalise(
    const float[::1] x, const float[::1] mean, const float[::1] scale,
    const float[::1] shift, float[::1] y, idx n, idx c, idx pixels, bint relu,
):
    """y = (x - mean) scale + shift, or if ``relu`` 0 where that is negative."""
    cdef idx i
    for i in prange(
        n * c, nogil=True, schedule="static", use_threads_if=x.shape[0] >= FORK
    ):
        normalise_plane(
            &x[i * pixels], mean[i % c], scale[i % c], shift[i % c], &y[i * pixels],
            pixels, relu,
        )


def gradient_x(
    const float[::1] dy, const float[::1] x, const float[::1] mean,
    const float[::1] scale, const float[::1] plain, const float[::1] moment,
    float[::1] dx, idx n, idx c, idx pixels,
):
    """dx = scale (dy - plain - (x - mean) moment)"""
    cdef idx i
    for i in prange(
        n * c, nogil=True, schedule="static", use_threads_if=x.shape[0] >= FORK
    ):
        gradient_plane(
            &dy[i * pixels], &x[i * pixels], mean[i % c], scale[i % c], plain[i % c],
            moment[i % c], &dx[i * pixels], pixels,
        )
