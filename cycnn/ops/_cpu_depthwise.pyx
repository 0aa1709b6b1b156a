# cython: language_level=3, boundscheck=False, wraparound=False
# cython: initializedcheck=False, cdivision=True
"""Depth-wise convolution for :mod:`cycnn.ops.cpu`: each channel by filters of its own.

As a matrix product it would have one row for each channel and read everything R S
times. Here each plane is one piece of work, which one thread does in one order, so the
number of threads does not change a bit of the result. Arguments are flat views of C-contiguous
arrays, checked by the caller, never empty.
"""

import numpy as np

from cython.parallel cimport prange
from libc.string cimport memcpy, memset

cdef extern from "_cpu_depthwise.h" nogil:
    ctypedef Py_ssize_t idx
    void taps_row(
        float *y, const float *x, const float *w, idx taps, idx stride, idx dilation,
        idx n,
    ) noexcept
    void spread_row(
        float *dx, const float *dy, const float *w, idx taps, idx stride, idx dilation,
        idx n,
    ) noexcept
    float dot_row(const float *dy, const float *x, idx stride, idx n) noexcept

cdef enum:
    FORK_PRODUCTS = 1 << 19  # as in _cpu.pyx


cdef class Depthwise:
    """One geometry, with the methods of ``_cpu.Convolution``.

    x is (n, c, h, w) before padding; the filter is (k, 1, r, s), k a multiple of c.
    """

    cdef idx n, c, h, w, k, r, s, p, q, each
    cdef idx stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w
    cdef idx high, wide
    cdef bint fork

    def __init__(self, x_shape, w_shape, y_shape, stride, padding, dilation, groups):
        self.n, self.c, self.h, self.w = x_shape
        self.k, _, self.r, self.s = w_shape
        self.p, self.q = y_shape[2:]
        self.each = self.k // self.c
        self.stride_h, self.stride_w = stride
        self.pad_h, self.pad_w = padding
        self.dilation_h, self.dilation_w = dilation
        self.high, self.wide = self.h + 2 * self.pad_h, self.w + 2 * self.pad_w
        self.fork = (
            self.n * self.k * self.p * self.q * self.r * self.s >= FORK_PRODUCTS
        )

    cdef const float[::1] padded(self, const float[::1] x):
        cdef float[::1] to
        cdef idx i, j, planes = self.n * self.c
        cdef float *plane
        if not self.pad_h and not self.pad_w:
            return x
        to = np.empty(planes * self.high * self.wide, np.float32)
        for i in prange(
            planes, nogil=True, schedule="static", use_threads_if=self.fork
        ):
            plane = &to[i * self.high * self.wide]
            memset(plane, 0, self.high * self.wide * sizeof(float))
            for j in range(self.h):
                memcpy(
                    plane + (self.pad_h + j) * self.wide + self.pad_w,
                    &x[(i * self.h + j) * self.w],
                    self.w * sizeof(float),
                )
        return to

    def forward(
        self, const float[::1] x, const float[::1] weight, const float[::1] bias,
        float[::1] y,
    ):
        cdef const float[::1] seen = self.padded(x)
        cdef const float *b = NULL
        cdef idx i
        if bias is not None:
            b = &bias[0]
        for i in prange(
            self.n * self.k, nogil=True, schedule="static", use_threads_if=self.fork
        ):
            self.forward_plane(
                &seen[0], &weight[0], b, &y[0], i // self.k, i % self.k
            )

    cdef void forward_plane(
        self, const float *x, const float *weight, const float *bias, float *y, idx n,
        idx k,
    ) noexcept nogil:
        cdef const float *plane = (
            x + (n * self.c + k // self.each) * self.high * self.wide
        )
        cdef const float *w = weight + k * self.r * self.s
        cdef float *row = y + (n * self.k + k) * self.p * self.q
        cdef float start = bias[k] if bias else 0
        cdef idx p, q, r
        for p in range(self.p):
            for q in range(self.q):
                row[q] = start
            for r in range(self.r):
                taps_row(
                    row,
                    plane + (p * self.stride_h + r * self.dilation_h) * self.wide,
                    w + r * self.s, self.s, self.stride_w, self.dilation_w, self.q,
                )
            row += self.q

    def gradient_x(self, const float[::1] dy, const float[::1] weight, float[::1] dx):
        cdef bint pads = self.pad_h or self.pad_w
        cdef float[::1] to = dx
        cdef idx i
        if pads:
            to = np.empty(self.n * self.c * self.high * self.wide, np.float32)
        for i in prange(
            self.n * self.c, nogil=True, schedule="static", use_threads_if=self.fork
        ):
            self.gradient_plane(&dy[0], &weight[0], &to[0], i)
            if pads:
                self.crop(&to[0], &dx[0], i)

    cdef void gradient_plane(
        self, const float *dy, const float *weight, float *dx, idx plane
    ) noexcept nogil:
        cdef idx n = plane // self.c, first = plane % self.c * self.each
        cdef float *to = dx + plane * self.high * self.wide
        cdef const float *rows
        cdef const float *w
        cdef idx k, p, r
        memset(to, 0, self.high * self.wide * sizeof(float))
        for k in range(first, first + self.each):
            rows = dy + (n * self.k + k) * self.p * self.q
            w = weight + k * self.r * self.s
            for p in range(self.p):
                for r in range(self.r):
                    spread_row(
                        to + (p * self.stride_h + r * self.dilation_h) * self.wide,
                        rows + p * self.q, w + r * self.s, self.s, self.stride_w,
                        self.dilation_w, self.q,
                    )

    cdef void crop(self, const float *padded, float *x, idx plane) noexcept nogil:
        cdef idx j
        for j in range(self.h):
            memcpy(
                x + (plane * self.h + j) * self.w,
                padded + (plane * self.high + self.pad_h + j) * self.wide + self.pad_w,
                self.w * sizeof(float),
            )

    def gradient_weight(
        self, const float[::1] dy, const float[::1] x, float[::1] dweight,
        float[::1] dbias, bint accumulate,
    ):
        cdef const float[::1] seen = self.padded(x)
        cdef double[:, ::1] sums = np.zeros((self.k, self.r * self.s + 1))
        cdef idx k
        for k in prange(
            self.k, nogil=True, schedule="dynamic", use_threads_if=self.fork
        ):
            self.sum_filter(&dy[0], &seen[0], &sums[k, 0], k)
        total = np.asarray(sums)
        for out, found in (dweight, total[:, :-1].ravel()), (dbias, total[:, -1]):
            if out is not None:
                out = np.asarray(out)
                out[...] = out + found if accumulate else found

    cdef void sum_filter(
        self, const float *dy, const float *x, double *sums, idx k
    ) noexcept nogil:
        """The gradient of one filter, and behind it that of its bias."""
        cdef const float *plane
        cdef const float *row
        cdef const float *from_x
        cdef float of_row
        cdef idx n, p, q, r, s
        for n in range(self.n):
            plane = x + (n * self.c + k // self.each) * self.high * self.wide
            row = dy + (n * self.k + k) * self.p * self.q
            for p in range(self.p):
                of_row = 0
                for q in range(self.q):
                    of_row += row[q]
                sums[self.r * self.s] += of_row
                for r in range(self.r):
                    from_x = plane + (
                        p * self.stride_h + r * self.dilation_h
                    ) * self.wide
                    for s in range(self.s):
                        sums[r * self.s + s] += dot_row(
                            row, from_x + s * self.dilation_w, self.stride_w, self.q
                        )
                row += self.q
