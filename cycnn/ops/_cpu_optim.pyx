# cython: language_level=3, boundscheck=False, wraparound=False
# cython: initializedcheck=False, cdivision=True
"""Loops of :mod:`cycnn.ops.cpu_optim`: see :mod:`cycnn.ops._cpu` for their rules."""

from cython.parallel cimport prange
from libc.math cimport sqrtf

ctypedef Py_ssize_t idx

# elements from which on it pays to wake the other threads
cdef enum:
    FORK = 1 << 15


def adam(
    float[::1] param, const float[::1] grad, float[::1] mean, float[::1] square,
    float[::1] largest, float lr, float correction1, float root2, float beta1,
    float rest1, float beta2, float rest2, float eps, float weight_decay,
    bint decoupled,
):
    """``root2`` is the root of the correction of ``square``."""
    cdef idx i, n = param.shape[0]
    cdef float p, g, v, rate = lr / correction1
    cdef float keep = 1 - lr * weight_decay if decoupled else 1
    cdef float decay = 0 if decoupled else weight_decay
    cdef bint remembers = largest is not None
    for i in prange(n, nogil=True, schedule="static", use_threads_if=n >= FORK):
        p = keep * param[i]
        g = grad[i] + decay * p
        mean[i] = beta1 * mean[i] + rest1 * g
        v = beta2 * square[i] + rest2 * g * g
        square[i] = v
        if remembers:
            if not v <= largest[i]:  # also where it is NaN
                largest[i] = v
            v = largest[i]
        param[i] = p - rate * mean[i] / (sqrtf(v) / root2 + eps)


def adagrad(
    float[::1] param, const float[::1] grad, float[::1] square_sum, float lr, float eps,
    float weight_decay,
):
    cdef idx i, n = param.shape[0]
    cdef float g
    for i in prange(n, nogil=True, schedule="static", use_threads_if=n >= FORK):
        g = grad[i] + weight_decay * param[i]
        square_sum[i] += g * g
        param[i] -= lr * g / (sqrtf(square_sum[i]) + eps)


def centered_rmsprop(
    float[::1] param, const float[::1] grad, float[::1] square, float[::1] mean,
    float[::1] buffer, float lr, float alpha, float rest, float eps,
    float weight_decay, float momentum,
):
    cdef idx i, n = param.shape[0]
    cdef float g, u, variance
    cdef bint remembers = buffer is not None
    for i in prange(n, nogil=True, schedule="static", use_threads_if=n >= FORK):
        g = grad[i] + weight_decay * param[i]
        square[i] = alpha * square[i] + rest * g * g
        mean[i] = alpha * mean[i] + rest * g
        variance = square[i] - mean[i] * mean[i]
        if variance < 0:
            variance = 0
        u = g / (sqrtf(variance) + eps)
        if remembers:
            u = momentum * buffer[i] + u
            buffer[i] = u
        param[i] -= lr * u


def damped_sgd(
    float[::1] param, const float[::1] grad, float[::1] buffer, float lr,
    float momentum, float share, float weight_decay, bint nesterov,
):
    """``share`` of the gradient goes into the buffer."""
    cdef idx i, n = param.shape[0]
    cdef float g, b
    for i in prange(n, nogil=True, schedule="static", use_threads_if=n >= FORK):
        g = grad[i] + weight_decay * param[i]
        b = momentum * buffer[i] + share * g
        buffer[i] = b
        param[i] -= lr * (g + momentum * b if nesterov else b)


def square_sums(const float[::1] x, float[::1] out, idx size):
    """Of parts of ``size`` elements; a part is summed by one thread, in order."""
    cdef idx part, i, n = x.shape[0]
    cdef double total
    for part in prange(
        out.shape[0], nogil=True, schedule="static", use_threads_if=n >= FORK
    ):
        total = 0
        for i in range(part * size, min(n, (part + 1) * size)):
            total = total + <double>x[i] * x[i]
        out[part] = <float>total


def scale(float[::1] x, float factor):
    cdef idx i, n = x.shape[0]
    for i in prange(n, nogil=True, schedule="static", use_threads_if=n >= FORK):
        x[i] *= factor


def ema(float[::1] average, const float[::1] param, float rest):
    cdef idx i, n = average.shape[0]
    for i in prange(n, nogil=True, schedule="static", use_threads_if=n >= FORK):
        average[i] += rest * (param[i] - average[i])
