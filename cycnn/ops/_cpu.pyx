# cython: language_level=3, boundscheck=False, wraparound=False
# cython: initializedcheck=False, cdivision=True
"""Loops of :mod:`cycnn.ops.cpu` over the workers of ``_cpu_kernels.h``.

Arguments are flat views of C-contiguous arrays, checked by the caller, never empty.
Work is split into pieces that do not depend on the number of threads, and each piece
is computed by one thread in one order: results are the same bits for any
OMP_NUM_THREADS, and without OpenMP, where ``prange`` is a plain loop.
"""

import numpy as np

from cython.parallel cimport prange
from libc.stdint cimport int32_t, uint8_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memmove, memset

cdef extern from "_cpu_kernels.h" nogil:
    ctypedef Py_ssize_t idx

    ctypedef struct conv_t:
        idx n, c, k, groups, pixels, taps, x_plane, x_image
        const idx *pixel_at
        const idx *tap_at
        idx unit, block

    ctypedef struct kernels_t:
        idx nr
        void (*gemm_panel)(
            idx m, idx n, idx depth, const float *a, const float *b, idx b_row,
            idx b_column, float *c, const float *column_bias, int add, idx panel,
        ) noexcept nogil
        void (*conv_forward)(
            const conv_t *g, const float *x, const float *w, const float *bias,
            float *y, idx group, idx panel0, idx panel1,
        ) noexcept nogil
        void (*conv_backward_data)(
            const conv_t *g, const float *dy, const float *w, float *dx, idx group,
            idx unit,
        ) noexcept nogil
        void (*conv_transpose)(
            const conv_t *g, const float *dy, float *dyt, double *sums, idx unit,
        ) noexcept nogil
        void (*conv_backward_weight)(
            const conv_t *g, const float *x, const float *dyt, float *dwt, idx panel,
            idx tap0, idx tap1,
        ) noexcept nogil

    ctypedef struct step_t:
        float lr, alpha, one_minus_alpha, eps, weight_decay, momentum
        int nesterov

    ctypedef struct pool_t:
        idx h, w, p, q, window_h, window_w, stride_h, stride_w, pad_h, pad_w

    const int MR
    const kernels_t *find_kernels(const char *name) noexcept
    idx row_panels(idx rows) noexcept
    void pack_rows(
        const float *a, idx row_stride, idx depth_stride, idx rows, idx depth,
        float *packed, idx panel,
    ) noexcept
    void pad_plane(
        const float *x, idx h, idx w, idx top, idx left, float *padded
    ) noexcept
    void crop_plane(
        const float *padded, idx h, idx w, idx top, idx left, float *x
    ) noexcept
    void untranspose_row(
        const float *dwt, idx k_group, idx taps, idx nr, float *dw, int add, idx k
    ) noexcept
    void column_sums(
        const float *x, idx n, idx columns, float *out, int add, idx j0, idx j1
    ) noexcept
    void c_relu "relu"(const float *x, float *y, idx n) noexcept
    void c_relu_gradient "relu_gradient"(
        const float *dy, const float *y, float *dx, idx n
    ) noexcept
    void c_sigmoid "sigmoid"(const float *x, float *y, idx n) noexcept
    void c_sigmoid_gradient "sigmoid_gradient"(
        const float *dy, const float *y, float *dx, idx n
    ) noexcept
    void c_sum "sum"(const float *x, const float *y, float *out, idx n) noexcept
    void c_rmsprop "rmsprop"(
        const step_t *s, float *param, const float *grad, float *v, float *b, idx n
    ) noexcept
    void c_sgd "sgd"(
        const step_t *s, float *param, const float *grad, float *b, idx n
    ) noexcept
    void pool_plane(
        const pool_t *g, const float *x, float *y, int32_t *positions
    ) noexcept
    void pool_plane_gradient(
        const pool_t *g, const float *dy, const int32_t *positions, float *dx
    ) noexcept
    idx argmax_row(const float *x, idx f) noexcept
    void log_softmax_row(const float *x, float *y, idx f) noexcept
    void log_softmax_gradient_row(
        const float *dy, const float *y, float *dx, idx f
    ) noexcept
    void scale_bytes(
        const uint8_t *x, float scale, float shift, float *out, idx n
    ) noexcept
    void scale_floats(
        const float *x, float scale, float shift, float *out, idx n
    ) noexcept


cdef const kernels_t *kernels = find_kernels(NULL)

# elements of a piece of elementwise work, and the least number of elements, or of
# products in a sum, for which it pays to wake the other threads
cdef enum:
    PIECE = 1 << 13
    FORK = 1 << 15
    FORK_PRODUCTS = 1 << 19


def use_instructions(name):
    """Choose the workers: "base", "avx2" or "avx512"; None is the best there is.

    Returns False, and changes nothing, where this machine has no such workers.
    """
    global kernels
    cdef const kernels_t *found
    cdef bytes text
    if name is None:
        found = find_kernels(NULL)
    else:
        text = name.encode()
        found = find_kernels(text)
    if found == NULL:
        return False
    kernels = found
    return True


cdef inline idx ceil_div(idx a, idx b) noexcept nogil:
    return (a + b - 1) // b


cdef inline idx piece(idx n, idx i) noexcept nogil:
    return PIECE if (i + 1) * PIECE <= n else n - i * PIECE


# memory

# Fresh memory costs a page fault for every 4 KiB, a quarter of a training step's time.
# A step asks for the same sizes as the one before, so large blocks are kept when their
# array dies: at most KEPT of them and KEPT_BYTES, the longest unused given up first.

cdef enum:
    KEPT = 64
    KEPT_BYTES = 1 << 28
    LARGE = 1 << 17
    ALIGNED = 64

cdef struct block_t:
    void *memory
    size_t size

cdef block_t kept[KEPT]
cdef int kept_count = 0
cdef size_t kept_bytes = 0


cdef block_t _forget(int at) noexcept:
    global kept_count, kept_bytes
    cdef block_t block = kept[at]
    kept_count -= 1
    kept_bytes -= block.size
    memmove(&kept[at], &kept[at + 1], (kept_count - at) * sizeof(block_t))
    return block


cdef class Block:
    """Memory of one array, which refers to it by the buffer protocol."""

    cdef block_t block
    cdef Py_ssize_t shape[1]
    cdef Py_ssize_t strides[1]

    def __cinit__(self, size_t size):
        cdef int at
        # the newest first: more of it is still in a cache
        for at in range(kept_count - 1, -1, -1):
            if kept[at].size == size:
                self.block = _forget(at)
                return
        self.block.size = size
        self.block.memory = malloc(size + ALIGNED)
        if self.block.memory == NULL:
            raise MemoryError(f"{size} bytes of host memory cannot be had")

    def __dealloc__(self):
        global kept_count, kept_bytes
        if self.block.memory == NULL or self.block.size > KEPT_BYTES:
            free(self.block.memory)
            return
        while kept_count == KEPT or kept_bytes + self.block.size > KEPT_BYTES:
            free(_forget(0).memory)
        kept[kept_count] = self.block
        kept_count += 1
        kept_bytes += self.block.size

    def __getbuffer__(self, Py_buffer *view, int flags):
        cdef uintptr_t start = <uintptr_t>self.block.memory
        self.shape[0], self.strides[0] = self.block.size, 1
        view.buf = <void *>(start + ALIGNED - start % ALIGNED)
        view.obj = self
        view.len, view.itemsize, view.readonly = self.block.size, 1, 0
        view.format, view.ndim = b"B", 1
        view.shape, view.strides, view.suboffsets = self.shape, self.strides, NULL
        view.internal = NULL


def empty(shape, dtype):
    """An array like that of ``np.empty``, its memory often used before."""
    cdef size_t size = dtype.itemsize
    for length in shape:
        size *= length
    if size < LARGE:
        return np.empty(shape, dtype)
    return np.ndarray(shape, dtype, Block(size))


def kept_memory():
    """(blocks, bytes) that wait to be used again."""
    return kept_count, kept_bytes


cdef object _FLOAT32 = np.dtype("float32")


cdef float[::1] _floats(idx n):
    return empty((n,), _FLOAT32)


# elementwise


def add(const float[::1] x, const float[::1] y, float[::1] out):
    cdef idx i, n = x.shape[0]
    for i in prange(
        ceil_div(n, PIECE), nogil=True, schedule="static", use_threads_if=n >= FORK
    ):
        c_sum(&x[i * PIECE], &y[i * PIECE], &out[i * PIECE], piece(n, i))


def relu(const float[::1] x, float[::1] y):
    cdef idx i, n = x.shape[0]
    for i in prange(
        ceil_div(n, PIECE), nogil=True, schedule="static", use_threads_if=n >= FORK
    ):
        c_relu(&x[i * PIECE], &y[i * PIECE], piece(n, i))


def relu_gradient(const float[::1] dy, const float[::1] y, float[::1] dx):
    cdef idx i, n = y.shape[0]
    for i in prange(
        ceil_div(n, PIECE), nogil=True, schedule="static", use_threads_if=n >= FORK
    ):
        c_relu_gradient(&dy[i * PIECE], &y[i * PIECE], &dx[i * PIECE], piece(n, i))


def sigmoid(const float[::1] x, float[::1] y):
    cdef idx i, n = x.shape[0]
    for i in prange(
        ceil_div(n, PIECE), nogil=True, schedule="static", use_threads_if=n >= FORK
    ):
        c_sigmoid(&x[i * PIECE], &y[i * PIECE], piece(n, i))


def sigmoid_gradient(const float[::1] dy, const float[::1] y, float[::1] dx):
    cdef idx i, n = y.shape[0]
    for i in prange(
        ceil_div(n, PIECE), nogil=True, schedule="static", use_threads_if=n >= FORK
    ):
        c_sigmoid_gradient(&dy[i * PIECE], &y[i * PIECE], &dx[i * PIECE], piece(n, i))


def rmsprop(
    float[::1] param,
    const float[::1] grad,
    float[::1] v,
    float[::1] b,
    float lr,
    double alpha,
    float eps,
    float weight_decay,
    float momentum,
):
    cdef idx i, n = param.shape[0]
    cdef float *buffer = NULL if b is None else &b[0]
    cdef step_t s
    s.lr, s.alpha, s.one_minus_alpha, s.eps = lr, alpha, 1 - alpha, eps
    s.weight_decay, s.momentum, s.nesterov = weight_decay, momentum, 0
    for i in prange(
        ceil_div(n, PIECE), nogil=True, schedule="static", use_threads_if=n >= FORK
    ):
        c_rmsprop(
            &s, &param[i * PIECE], &grad[i * PIECE], &v[i * PIECE],
            buffer + i * PIECE if buffer else NULL, piece(n, i),
        )


def sgd(
    float[::1] param,
    const float[::1] grad,
    float[::1] b,
    float lr,
    float momentum,
    float weight_decay,
    bint nesterov,
):
    cdef idx i, n = param.shape[0]
    cdef float *buffer = NULL if b is None else &b[0]
    cdef step_t s
    s.lr, s.alpha, s.one_minus_alpha, s.eps = lr, 0, 0, 0
    s.weight_decay, s.momentum, s.nesterov = weight_decay, momentum, nesterov
    for i in prange(
        ceil_div(n, PIECE), nogil=True, schedule="static", use_threads_if=n >= FORK
    ):
        c_sgd(
            &s, &param[i * PIECE], &grad[i * PIECE],
            buffer + i * PIECE if buffer else NULL, piece(n, i),
        )


# linear


cdef void _gemm(
    idx m, idx n, idx depth,
    const float *a, idx a_row, idx a_column,
    const float *b, idx b_row, idx b_column,
    float *c, const float *column_bias, bint add,
):
    """C (m, n) = A (m, depth) B (depth, n), with the strides of A and B given."""
    cdef float[::1] store = _floats(m * depth)
    cdef float *packed = &store[0]
    cdef idx i
    cdef bint fork = m * n * depth >= FORK_PRODUCTS
    with nogil:
        for i in prange(row_panels(m), schedule="static", use_threads_if=fork):
            pack_rows(a, a_row, a_column, m, depth, packed, i)
        for i in prange(
            ceil_div(n, kernels.nr), schedule="dynamic", use_threads_if=fork
        ):
            kernels.gemm_panel(
                m, n, depth, packed, b, b_row, b_column, c, column_bias, add, i
            )


def linear(
    const float[::1] x, const float[::1] weight, const float[::1] bias, float[::1] y,
    idx n, idx inputs, idx outputs,
):
    cdef const float *b = NULL
    if bias is not None:
        b = &bias[0]
    _gemm(
        n, outputs, inputs, &x[0], inputs, 1, &weight[0], 1, inputs, &y[0], b, False
    )


def linear_gradient_x(
    const float[::1] dy, const float[::1] weight, float[::1] dx,
    idx n, idx inputs, idx outputs,
):
    _gemm(
        n, inputs, outputs, &dy[0], outputs, 1, &weight[0], inputs, 1, &dx[0], NULL,
        False,
    )


def linear_gradient_weight(
    const float[::1] dy, const float[::1] x, float[::1] dweight, float[::1] dbias,
    idx n, idx inputs, idx outputs, bint accumulate,
):
    cdef idx i
    _gemm(
        outputs, inputs, n, &dy[0], 1, outputs, &x[0], inputs, 1, &dweight[0], NULL,
        accumulate,
    )
    if dbias is not None:
        for i in prange(
            ceil_div(outputs, 16), nogil=True, schedule="static",
            use_threads_if=n * outputs >= FORK,
        ):
            column_sums(
                &dy[0], n, outputs, &dbias[0], accumulate, i * 16,
                min(outputs, (i + 1) * 16),
            )


# convolution


cdef class Convolution:
    """One geometry: what the workers read of it, kept for as long as they run.

    x is (n, c, h, w) before padding; the filter is (k, c // groups, r, s).
    """

    cdef conv_t g
    cdef idx h, w, pad_h, pad_w, filter_size
    cdef idx[::1] pixel_at, tap_at
    cdef bint fork

    def __init__(self, x_shape, w_shape, y_shape, stride, padding, dilation, groups):
        cdef idx wide
        n, c, h, w = x_shape
        k, c_group, r, s = w_shape
        p, q = y_shape[2:]
        self.h, self.w = h, w
        self.pad_h, self.pad_w = padding
        self.filter_size = r * s
        wide = w + 2 * padding[1]
        plane = (h + 2 * padding[0]) * wide
        self.pixel_at = np.add.outer(
            np.arange(p, dtype=np.intp) * (stride[0] * wide),
            np.arange(q, dtype=np.intp) * stride[1],
        ).ravel()
        self.tap_at = np.add.outer(
            np.arange(c_group, dtype=np.intp) * plane,
            np.add.outer(
                np.arange(r, dtype=np.intp) * (dilation[0] * wide),
                np.arange(s, dtype=np.intp) * dilation[1],
            ),
        ).ravel()
        self.g.n, self.g.c, self.g.k, self.g.groups = n, c, k, groups
        self.g.pixels, self.g.taps = p * q, c_group * r * s
        self.g.x_plane, self.g.x_image = plane, c * plane
        self.g.pixel_at, self.g.tap_at = &self.pixel_at[0], &self.tap_at[0]
        self.fork = n * p * q * k * self.g.taps >= FORK_PRODUCTS
        # enough positions to fill the panels of small planes
        self.g.unit = ceil_div(64, p * q)
        # about a thousand positions: some 100 KiB, and the length of a float32 sum
        self.g.block = max(1, 1024 // (p * q))

    cdef const float[::1] padded(self, const float[::1] x):
        cdef float[::1] to
        cdef idx i, planes = self.g.n * self.g.c, plane = self.g.x_plane
        if not self.pad_h and not self.pad_w:
            return x
        to = _floats(planes * plane)
        for i in prange(
            planes, nogil=True, schedule="static", use_threads_if=self.fork
        ):
            pad_plane(
                &x[i * self.h * self.w], self.h, self.w, self.pad_h, self.pad_w,
                &to[i * plane],
            )
        return to

    def forward(
        self, const float[::1] x, const float[::1] weight, const float[::1] bias,
        float[::1] y,
    ):
        cdef conv_t *g = &self.g
        cdef idx k_group = g.k // g.groups, panels = row_panels(k_group)
        cdef idx pieces = ceil_div(ceil_div(g.n * g.pixels, kernels.nr), 4)
        cdef const float[::1] seen = self.padded(x)
        cdef float[::1] packed = _floats(g.k * g.taps)
        cdef const float *b = NULL
        cdef idx i, group
        if bias is not None:
            b = &bias[0]
        with nogil:
            for i in prange(
                g.groups * panels, schedule="static", use_threads_if=self.fork
            ):
                group = i // panels
                pack_rows(
                    &weight[group * k_group * g.taps], g.taps, 1, k_group, g.taps,
                    &packed[group * k_group * g.taps], i % panels,
                )
            for i in prange(
                g.groups * pieces, schedule="dynamic", use_threads_if=self.fork
            ):
                kernels.conv_forward(
                    g, &seen[0], &packed[0], b, &y[0], i // pieces,
                    i % pieces * 4, (i % pieces + 1) * 4,
                )

    def gradient_x(self, const float[::1] dy, const float[::1] weight, float[::1] dx):
        cdef conv_t *g = &self.g
        cdef idx k_group = g.k // g.groups, c_group = g.c // g.groups
        cdef idx panels = row_panels(c_group), units = ceil_div(g.n, g.unit)
        cdef bint pads = self.pad_h or self.pad_w
        cdef float[::1] packed = _floats(g.k * g.taps)
        cdef float[::1] to = _floats(g.n * g.x_image) if pads else dx
        cdef idx i, group, rs, image
        with nogil:
            for i in prange(
                g.groups * self.filter_size, schedule="static", use_threads_if=self.fork
            ):
                group = i // self.filter_size
                rs = i % self.filter_size
                for image in range(panels):
                    pack_rows(
                        &weight[group * k_group * g.taps + rs],
                        self.filter_size, g.taps, c_group, k_group,
                        &packed[i * k_group * c_group], image,
                    )
            for i in prange(
                units * g.groups, schedule="dynamic", use_threads_if=self.fork
            ):
                _gradient_x_of_unit(
                    g, &dy[0], &packed[0], &to[0], i % g.groups, i // g.groups
                )
            if pads:
                for i in prange(
                    g.n * g.c, schedule="static", use_threads_if=self.fork
                ):
                    crop_plane(
                        &to[i * g.x_plane], self.h, self.w, self.pad_h, self.pad_w,
                        &dx[i * self.h * self.w],
                    )

    def gradient_weight(
        self, const float[::1] dy, const float[::1] x, float[::1] dweight,
        float[::1] dbias, bint accumulate,
    ):
        cdef conv_t *g = &self.g
        cdef idx nr = kernels.nr, k_group = g.k // g.groups
        cdef idx panels = g.groups * ceil_div(k_group, nr)
        cdef idx units = ceil_div(g.n, g.unit)
        # taps that one piece of work takes: several tiles, so that a block of images
        # is read from the cache, but no fewer than some 32 pieces
        cdef idx some = MR * max(1, min(8, panels * ceil_div(g.taps, MR) // 32))
        cdef idx pieces = ceil_div(g.taps, some)
        cdef const float[::1] seen = self.padded(x)
        cdef float[::1] dyt = _floats(panels * g.n * g.pixels * nr)
        cdef float[::1] dwt = np.zeros(panels * g.taps * nr, np.float32)
        cdef double[:, ::1] sums = np.empty((units, g.k))
        cdef idx i
        with nogil:
            for i in prange(units, schedule="static", use_threads_if=self.fork):
                kernels.conv_transpose(g, &dy[0], &dyt[0], &sums[0, 0], i)
            for i in prange(
                panels * pieces, schedule="dynamic", use_threads_if=self.fork
            ):
                kernels.conv_backward_weight(
                    g, &seen[0], &dyt[0], &dwt[0], i // pieces, i % pieces * some,
                    min(g.taps, (i % pieces + 1) * some),
                )
            for i in prange(g.k, schedule="static", use_threads_if=self.fork):
                untranspose_row(
                    &dwt[0], k_group, g.taps, nr, &dweight[0], accumulate, i
                )
        if dbias is not None:
            total = np.asarray(sums).sum(axis=0)
            out = np.asarray(dbias)
            out[...] = out + total if accumulate else total


cdef void _gradient_x_of_unit(
    conv_t *g, const float *dy, const float *w, float *dx, idx group, idx unit
) noexcept nogil:
    # zeroed here and not beforehand, so that the sums find it in the cache
    cdef idx n, plane = g.c // g.groups * g.x_plane
    cdef float *to
    for n in range(unit * g.unit, min(g.n, (unit + 1) * g.unit)):
        to = dx + n * g.x_image + group * plane
        memset(to, 0, plane * sizeof(float))
    kernels.conv_backward_data(g, dy, w, dx, group, unit)


# pooling


cdef pool_t _pool(x_shape, y_shape, kernel_size, stride, padding):
    cdef pool_t g
    g.h, g.w = x_shape[2:]
    g.p, g.q = y_shape[2:]
    g.window_h, g.window_w = kernel_size
    g.stride_h, g.stride_w = stride
    g.pad_h, g.pad_w = padding[:2]
    return g


def maxpool2d(
    const float[::1] x, float[::1] y, int32_t[::1] positions,
    x_shape, y_shape, kernel_size, stride, padding,
):
    cdef pool_t g = _pool(x_shape, y_shape, kernel_size, stride, padding)
    cdef idx i, planes = x_shape[0] * x_shape[1]
    cdef idx x_plane = g.h * g.w, y_plane = g.p * g.q
    for i in prange(
        planes, nogil=True, schedule="static", use_threads_if=planes * x_plane >= FORK
    ):
        pool_plane(&g, &x[i * x_plane], &y[i * y_plane], &positions[i * y_plane])


def maxpool2d_gradient(
    const float[::1] dy, const int32_t[::1] positions, float[::1] dx,
    x_shape, y_shape, kernel_size, stride, padding,
):
    cdef pool_t g = _pool(x_shape, y_shape, kernel_size, stride, padding)
    cdef idx i, planes = x_shape[0] * x_shape[1]
    cdef idx x_plane = g.h * g.w, y_plane = g.p * g.q
    for i in prange(
        planes, nogil=True, schedule="static", use_threads_if=planes * x_plane >= FORK
    ):
        pool_plane_gradient(
            &g, &dy[i * y_plane], &positions[i * y_plane], &dx[i * x_plane]
        )


# rows of scores


def log_softmax(const float[::1] x, float[::1] y, idx n, idx f):
    cdef idx i
    for i in prange(n, nogil=True, schedule="static", use_threads_if=n * f >= FORK):
        log_softmax_row(&x[i * f], &y[i * f], f)


def log_softmax_gradient(
    const float[::1] dy, const float[::1] y, float[::1] dx, idx n, idx f
):
    cdef idx i
    for i in prange(n, nogil=True, schedule="static", use_threads_if=n * f >= FORK):
        log_softmax_gradient_row(&dy[i * f], &y[i * f], &dx[i * f], f)


def argmax(const float[::1] x, int32_t[::1] out, idx n, idx f):
    cdef idx i
    for i in prange(n, nogil=True, schedule="static", use_threads_if=n * f >= FORK):
        out[i] = <int32_t>argmax_row(&x[i * f], f)


# gathering


def gather_bytes(
    const uint8_t[::1] images, const int32_t[::1] index, float[::1] out, float scale,
    float shift,
):
    cdef idx i, n = index.shape[0], size = out.shape[0] // n
    for i in prange(
        n, nogil=True, schedule="static", use_threads_if=n * size >= FORK
    ):
        scale_bytes(&images[index[i] * size], scale, shift, &out[i * size], size)


def gather_floats(
    const float[::1] images, const int32_t[::1] index, float[::1] out, float scale,
    float shift,
):
    cdef idx i, n = index.shape[0], size = out.shape[0] // n
    for i in prange(
        n, nogil=True, schedule="static", use_threads_if=n * size >= FORK
    ):
        scale_floats(&images[index[i] * size], scale, shift, &out[i * size], size)
