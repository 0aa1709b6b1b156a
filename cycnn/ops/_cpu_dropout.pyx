# cython: language_level=3, boundscheck=False, wraparound=False
# cython: initializedcheck=False, cdivision=True
"""Loops of :mod:`cycnn.ops.cpu_dropout`; rules as of ``_cpu.pyx``."""

from cython.parallel cimport prange
from libc.stdint cimport uint32_t, uint64_t

ctypedef Py_ssize_t idx

# elements of a piece, a multiple of four, and the least number for several threads
cdef enum:
    PIECE = 1 << 12
    FORK = 1 << 14


cdef inline void philox(uint32_t *c, uint32_t k0, uint32_t k1) noexcept nogil:
    """Philox4x32-10 of the counter c, in its place; see reference_dropout.py."""
    cdef uint64_t left, right
    cdef int i
    for i in range(10):
        left = <uint64_t>0xD2511F53u * c[0]
        right = <uint64_t>0xCD9E8D57u * c[2]
        c[0] = <uint32_t>(right >> 32) ^ c[1] ^ k0
        c[2] = <uint32_t>(left >> 32) ^ c[3] ^ k1
        c[1] = <uint32_t>right
        c[3] = <uint32_t>left
        k0 += 0x9E3779B9u
        k1 += 0xBB67AE85u


cdef void drop(
    const float *x, float *y, idx first, idx end, uint32_t k0, uint32_t k1,
    uint32_t step, uint32_t threshold, float scale,
) noexcept nogil:
    cdef uint32_t c[4]
    cdef idx i, j
    for i in range(first, end, 4):
        c[0] = <uint32_t>(i >> 2)
        c[1] = <uint32_t>(<uint64_t>i >> 34)
        c[2] = step
        c[3] = 0
        philox(c, k0, k1)
        for j in range(min(<idx>4, end - i)):
            y[i + j] = x[i + j] * scale if c[j] >= threshold else <float>0.0


def dropout(
    const float[::1] x, float[::1] y, uint32_t k0, uint32_t k1, uint32_t step,
    uint32_t threshold, float scale,
):
    cdef idx i, n = x.shape[0]
    for i in prange(
        (n + PIECE - 1) // PIECE, nogil=True, schedule="static",
        use_threads_if=n >= FORK,
    ):
        drop(
            &x[0], &y[0], i * PIECE, min(n, (i + 1) * PIECE), k0, k1, step, threshold,
            scale,
        )
