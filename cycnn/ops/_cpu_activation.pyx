# cython: language_level=3, boundscheck=False, wraparound=False
# cython: initializedcheck=False, cdivision=True
"""Loops of :mod:`cycnn.ops.cpu_activation`; rules as of ``_cpu.pyx``."""

from cython.parallel cimport prange
from libc.math cimport INFINITY, erfcf, expf, fabsf, tanhf

ctypedef Py_ssize_t idx

# elements of a piece, and the least number for which it pays to wake the other threads
cdef enum:
    PIECE = 1 << 12
    FORK = 1 << 14

cdef float SQRT_HALF = 0.70710678118654752
cdef float DENSITY = 0.39894228040143268  # 1 / sqrt(2 pi)
cdef float FACTOR = 1.5957691216057308  # 2 sqrt(2 / pi)
cdef float CUBIC = 0.044715
cdef float FLAT = 16.0


cdef inline idx pieces(idx n) noexcept nogil:
    return (n + PIECE - 1) // PIECE


cdef inline idx end_of(idx n, idx i) noexcept nogil:
    return min(n, (i + 1) * PIECE)


ctypedef float (*map_t)(float x, float setting) noexcept nogil
ctypedef float (*slope_t)(float seen, float setting) noexcept nogil


cdef void map_piece(
    const float *x, float *y, idx first, idx end, map_t f, float setting
) noexcept nogil:
    cdef idx j
    for j in range(first, end):
        y[j] = f(x[j], setting)


cdef void slope_piece(
    const float *dy, const float *seen, float *dx, idx first, idx end, slope_t f,
    float setting,
) noexcept nogil:
    cdef idx j
    for j in range(first, end):
        dx[j] = dy[j] * f(seen[j], setting)


cdef _map(const float[::1] x, float[::1] y, map_t f, float setting):
    cdef idx i, n = x.shape[0]
    for i in prange(
        pieces(n), nogil=True, schedule="static", use_threads_if=n >= FORK
    ):
        map_piece(&x[0], &y[0], i * PIECE, end_of(n, i), f, setting)


cdef _map_slope(
    const float[::1] dy, const float[::1] seen, float[::1] dx, slope_t f, float setting
):
    cdef idx i, n = seen.shape[0]
    for i in prange(
        pieces(n), nogil=True, schedule="static", use_threads_if=n >= FORK
    ):
        slope_piece(&dy[0], &seen[0], &dx[0], i * PIECE, end_of(n, i), f, setting)


# The functions and their derivatives; ``setting`` is not used by all.


cdef float tanh_of(float x, float setting) noexcept nogil:
    return tanhf(x)


cdef float tanh_slope(float y, float setting) noexcept nogil:
    return 1.0 - y * y


cdef float leaky_relu_of(float x, float slope) noexcept nogil:
    return x if x > 0 else slope * x


cdef float leaky_relu_slope(float x, float slope) noexcept nogil:
    return <float>1.0 if x > 0 else slope


cdef inline float sigmoid(float x) noexcept nogil:
    cdef float e = expf(-fabsf(x))
    return (e if x < 0 else <float>1.0) / (1 + e)


cdef inline float sigmoid_slope(float x) noexcept nogil:
    cdef float e = expf(-fabsf(x))
    return e / ((1 + e) * (1 + e))


cdef float silu_of(float x, float setting) noexcept nogil:
    return x * sigmoid(x)


cdef float silu_slope(float x, float setting) noexcept nogil:
    return sigmoid(x) + x * sigmoid_slope(x)


cdef float gelu_of(float x, float setting) noexcept nogil:
    return x * (<float>0.5 * erfcf(-x * SQRT_HALF))


cdef float gelu_slope(float x, float setting) noexcept nogil:
    cdef float density = DENSITY * expf(<float>-0.5 * x * x)
    return <float>0.5 * erfcf(-x * SQRT_HALF) + x * density


cdef inline float clipped(float x) noexcept nogil:
    # written so that NaN stays NaN
    return FLAT if x > FLAT else (-FLAT if x < -FLAT else x)


cdef float gelu_tanh_of(float x, float setting) noexcept nogil:
    cdef float c = clipped(x)
    return x * sigmoid(FACTOR * c * (1 + CUBIC * c * c))


cdef float gelu_tanh_slope(float x, float setting) noexcept nogil:
    cdef float c = clipped(x)
    cdef float u = FACTOR * c * (1 + CUBIC * c * c)
    return sigmoid(u) + x * sigmoid_slope(u) * (FACTOR * (1 + 3 * CUBIC * c * c))


def tanh(const float[::1] x, float[::1] y):
    _map(x, y, tanh_of, 0)


def tanh_gradient(const float[::1] dy, const float[::1] y, float[::1] dx):
    _map_slope(dy, y, dx, tanh_slope, 0)


def leaky_relu(const float[::1] x, float[::1] y, float negative_slope):
    _map(x, y, leaky_relu_of, negative_slope)


def leaky_relu_gradient(
    const float[::1] dy, const float[::1] x, float[::1] dx, float negative_slope
):
    _map_slope(dy, x, dx, leaky_relu_slope, negative_slope)


def silu(const float[::1] x, float[::1] y):
    _map(x, y, silu_of, 0)


def silu_gradient(const float[::1] dy, const float[::1] x, float[::1] dx):
    _map_slope(dy, x, dx, silu_slope, 0)


def gelu(const float[::1] x, float[::1] y, bint by_tanh):
    _map(x, y, gelu_tanh_of if by_tanh else gelu_of, 0)


def gelu_gradient(const float[::1] dy, const float[::1] x, float[::1] dx, bint by_tanh):
    _map_slope(dy, x, dx, gelu_tanh_slope if by_tanh else gelu_slope, 0)


# Of two settings. The gradient is chosen: infinity times a slope of 0 would be NaN.


cdef void hardtanh_piece(
    const float *x, float *y, idx first, idx end, float low, float high
) noexcept nogil:
    cdef idx j
    for j in range(first, end):
        # written so that NaN stays NaN
        y[j] = low if x[j] < low else (high if x[j] > high else x[j])


cdef void hardtanh_gradient_piece(
    const float *dy, const float *x, float *dx, idx first, idx end, float low,
    float high,
) noexcept nogil:
    cdef idx j
    for j in range(first, end):
        dx[j] = <float>0 if x[j] <= low or x[j] >= high else dy[j]


def hardtanh(const float[::1] x, float[::1] y, float low, float high):
    cdef idx i, n = x.shape[0]
    for i in prange(
        pieces(n), nogil=True, schedule="static", use_threads_if=n >= FORK
    ):
        hardtanh_piece(&x[0], &y[0], i * PIECE, end_of(n, i), low, high)


def hardtanh_gradient(
    const float[::1] dy, const float[::1] x, float[::1] dx, float low, float high
):
    cdef idx i, n = x.shape[0]
    for i in prange(
        pieces(n), nogil=True, schedule="static", use_threads_if=n >= FORK
    ):
        hardtanh_gradient_piece(
            &dy[0], &x[0], &dx[0], i * PIECE, end_of(n, i), low, high
        )


# softmax


cdef void softmax_row(const float *x, float *y, idx f) noexcept nogil:
    cdef float top = -INFINITY
    cdef double total = 0
    cdef idx j
    for j in range(f):
        # a NaN is met again by the sum
        top = x[j] if x[j] > top else top
    for j in range(f):
        y[j] = expf(x[j] - top)
        total += y[j]
    for j in range(f):
        y[j] = <float>(y[j] / total)


cdef void softmax_gradient_row(
    const float *dy, const float *y, float *dx, idx f
) noexcept nogil:
    cdef double total = 0
    cdef idx j
    for j in range(f):
        total += <double>dy[j] * y[j]
    for j in range(f):
        dx[j] = y[j] * (dy[j] - <float>total)


def softmax(const float[::1] x, float[::1] y, idx n, idx f):
    cdef idx i
    for i in prange(
        n, nogil=True, schedule="static", use_threads_if=n * f >= FORK
    ):
        softmax_row(&x[i * f], &y[i * f], f)


def softmax_gradient(
    const float[::1] dy, const float[::1] y, float[::1] dx, idx n, idx f
):
    cdef idx i
    for i in prange(
        n, nogil=True, schedule="static", use_threads_if=n * f >= FORK
    ):
        softmax_gradient_row(&dy[i * f], &y[i * f], &dx[i * f], f)
