/* What cycnn/ops/_cpu.pyx computes with. Plain C99; GNU vector extensions where the
   compiler has them.

   The package is built for any machine of its architecture. On x86-64 the workers of
   _cpu_isa.h exist three times (baseline, AVX2 + FMA, AVX-512) and the best that the
   machine can run is chosen once; elsewhere the baseline is what the compiler makes of
   16-byte vectors (NEON on aarch64), or of plain floats where it has no vectors. */

#ifndef CYCNN_CPU_KERNELS_H
#define CYCNN_CPU_KERNELS_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef ptrdiff_t idx;

#if defined(__GNUC__)
#define ALWAYS_INLINE inline __attribute__((always_inline))
#define RESTRICT __restrict__
#define BASE_VW 4
#elif defined(_MSC_VER)
#define ALWAYS_INLINE __forceinline
#define RESTRICT __restrict
#define BASE_VW 1
#else
#define ALWAYS_INLINE inline
#define RESTRICT
#define BASE_VW 1
#endif

/* rows of a tile; columns are two vectors */
#define MR 6
/* depth of a block: KC columns of a panel stay in the first-level cache */
#define KC 256

/* Rows are cut into panels of at most MR whose sizes differ by at most one: a last
   panel of one or two rows would wait for the latency of its few sums. */

static ALWAYS_INLINE idx row_panels(idx rows) { return (rows + MR - 1) / MR; }

static ALWAYS_INLINE idx panel_start(idx rows, idx panel)
{
    return rows * panel / row_panels(rows);
}

/* The rows of panel `panel` of a matrix (rows, depth), element (i, k) at
   a[i * row_stride + k * depth_stride], in the order in which the tile reads them:
   blocks of KC, within them panels, within them (depth, rows of the panel). */
static void pack_rows(const float *a, idx row_stride, idx depth_stride, idx rows,
                      idx depth, float *packed, idx panel)
{
    const idx start = panel_start(rows, panel);
    const idx width = panel_start(rows, panel + 1) - start;
    for (idx k0 = 0; k0 < depth; k0 += KC) {
        const idx kc = depth - k0 < KC ? depth - k0 : KC;
        float *to = packed + rows * k0 + start * kc;
        for (idx k = 0; k < kc; ++k)
            for (idx i = 0; i < width; ++i)
                *to++ = a[(start + i) * row_stride + (k0 + k) * depth_stride];
    }
}

/* A convolution. x is padded already: x_plane and x_image are the sizes of its padded
   planes and images. */
typedef struct {
    idx n, c, k, groups;
    idx pixels;          /* P Q */
    idx taps;            /* C / groups R S */
    idx x_plane, x_image;
    const idx *pixel_at; /* (P Q) offset in a plane where a window starts */
    const idx *tap_at;   /* (C / groups R S) offset of an element in a window */
    idx unit;            /* images that the backward takes together */
    idx block;           /* images whose weight gradient is summed in registers */
} conv_t;

typedef struct {
    idx nr; /* columns of a tile */
    void (*gemm_panel)(idx m, idx n, idx depth, const float *a, const float *b,
                       idx b_row, idx b_column, float *c, const float *column_bias,
                       int add, idx panel);
    void (*conv_forward)(const conv_t *g, const float *x, const float *w,
                         const float *bias, float *y, idx group, idx panel0,
                         idx panel1);
    void (*conv_backward_data)(const conv_t *g, const float *dy, const float *w,
                               float *dx, idx group, idx unit);
    void (*conv_transpose)(const conv_t *g, const float *dy, float *dyt, double *sums,
                           idx unit);
    void (*conv_backward_weight)(const conv_t *g, const float *x, const float *dyt,
                                 float *dwt, idx panel, idx tap0, idx tap1);
} kernels_t;

#define SUFFIX(name) name##_base
#define TARGET
#define VW BASE_VW
#include "_cpu_isa.h"
#undef SUFFIX
#undef TARGET
#undef VW

#if defined(__GNUC__) && defined(__x86_64__)

#define SUFFIX(name) name##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#define VW 8
#include "_cpu_isa.h"
#undef SUFFIX
#undef TARGET
#undef VW

#define SUFFIX(name) name##_avx512
#define TARGET __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,fma")))
#define VW 16
#include "_cpu_isa.h"
#undef SUFFIX
#undef TARGET
#undef VW

#endif

/* The workers for `name`, or the best that this machine can run where it is NULL; NULL
   where this machine or this build has no such workers. */
static const kernels_t *find_kernels(const char *name)
{
#if defined(__GNUC__) && defined(__x86_64__)
    __builtin_cpu_init();
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const int avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                       __builtin_cpu_supports("avx512vl") &&
                       __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512dq");
    if (avx512 && (!name || !strcmp(name, "avx512"))) return &kernels_avx512;
    if (avx2 && (!name || !strcmp(name, "avx2"))) return &kernels_avx2;
#endif
    return !name || !strcmp(name, "base") ? &kernels_base : NULL;
}

/* Planes of x with `top` rows and `left` columns of zeros around them, or the inside of
   such planes again. */

static void pad_plane(const float *x, idx h, idx w, idx top, idx left, float *padded)
{
    const idx wide = w + 2 * left;
    memset(padded, 0, (h + 2 * top) * wide * sizeof(float));
    for (idx i = 0; i < h; ++i)
        memcpy(padded + (top + i) * wide + left, x + i * w, w * sizeof(float));
}

static void crop_plane(const float *padded, idx h, idx w, idx top, idx left, float *x)
{
    const idx wide = w + 2 * left;
    for (idx i = 0; i < h; ++i)
        memcpy(x + i * w, padded + (top + i) * wide + left, w * sizeof(float));
}

/* dweight (K, CRS) from its transpose (panels of nr channels, CRS, nr), row k. */
static void untranspose_row(const float *dwt, idx k_group, idx taps, idx nr, float *dw,
                            int add, idx k)
{
    const idx panels = (k_group + nr - 1) / nr, in_group = k % k_group;
    const idx panel = k / k_group * panels + in_group / nr;
    const float *from = dwt + panel * taps * nr + in_group % nr;
    float *to = dw + k * taps;
    for (idx t = 0; t < taps; ++t) to[t] = from[t * nr] + (add ? to[t] : 0.0f);
}

/* out[j] = sum over n of x[n, j], for columns j0 .. j1 - 1, at most 16 of them. */
static void column_sums(const float *x, idx n, idx columns, float *out, int add, idx j0,
                        idx j1)
{
    double sum[16] = {0};
    for (idx i = 0; i < n; ++i)
        for (idx j = j0; j < j1; ++j) sum[j - j0] += x[i * columns + j];
    for (idx j = j0; j < j1; ++j)
        out[j] = (float)(sum[j - j0] + (add ? out[j] : 0.0f));
}

/* elementwise, n elements */

static void relu(const float *RESTRICT x, float *RESTRICT y, idx n)
{
    /* written so that NaN passes and -0 becomes +0 */
    for (idx i = 0; i < n; ++i) y[i] = x[i] <= 0.0f ? 0.0f : x[i];
}

static void relu_gradient(const float *RESTRICT dy, const float *RESTRICT y,
                          float *RESTRICT dx, idx n)
{
    for (idx i = 0; i < n; ++i) {
        /* loaded in any case, or the compiler must branch around the load */
        const float d = dy[i];
        dx[i] = y[i] > 0.0f ? d : 0.0f;
    }
}

static void sigmoid(const float *RESTRICT x, float *RESTRICT y, idx n)
{
    for (idx i = 0; i < n; ++i) {
        const float e = expf(-fabsf(x[i]));
        y[i] = (x[i] < 0.0f ? e : 1.0f) / (1.0f + e);
    }
}

static void sigmoid_gradient(const float *RESTRICT dy, const float *RESTRICT y,
                             float *RESTRICT dx, idx n)
{
    for (idx i = 0; i < n; ++i) dx[i] = dy[i] * y[i] * (1.0f - y[i]);
}

/* out may be x or y, so no restrict */
static void sum(const float *x, const float *y, float *out, idx n)
{
    for (idx i = 0; i < n; ++i) out[i] = x[i] + y[i];
}

typedef struct {
    float lr, alpha, one_minus_alpha, eps, weight_decay, momentum;
    int nesterov;
} step_t;

/* b is NULL where there is no momentum */
static void rmsprop(const step_t *s, float *RESTRICT param, const float *RESTRICT grad,
                    float *RESTRICT v, float *RESTRICT b, idx n)
{
    const float lr = s->lr, alpha = s->alpha, rest = s->one_minus_alpha, eps = s->eps;
    const float decay = s->weight_decay, momentum = s->momentum;
    if (b)
        for (idx i = 0; i < n; ++i) {
            const float g = grad[i] + decay * param[i];
            v[i] = alpha * v[i] + rest * g * g;
            b[i] = momentum * b[i] + g / (sqrtf(v[i]) + eps);
            param[i] -= lr * b[i];
        }
    else
        for (idx i = 0; i < n; ++i) {
            const float g = grad[i] + decay * param[i];
            v[i] = alpha * v[i] + rest * g * g;
            param[i] -= lr * (g / (sqrtf(v[i]) + eps));
        }
}

static void sgd(const step_t *s, float *RESTRICT param, const float *RESTRICT grad,
                float *RESTRICT b, idx n)
{
    const float lr = s->lr, decay = s->weight_decay, momentum = s->momentum;
    const float from_grad = s->nesterov ? 1.0f : 0.0f;
    const float from_b = s->nesterov ? momentum : 1.0f;
    if (b)
        for (idx i = 0; i < n; ++i) {
            const float g = grad[i] + decay * param[i];
            b[i] = momentum * b[i] + g;
            param[i] -= lr * (from_grad * g + from_b * b[i]);
        }
    else
        for (idx i = 0; i < n; ++i) param[i] -= lr * (grad[i] + decay * param[i]);
}

/* pooling, one plane */

typedef struct {
    idx h, w, p, q, window_h, window_w, stride_h, stride_w, pad_h, pad_w;
} pool_t;

static ALWAYS_INLINE int beats(float value, float best)
{
    return value > best || (value != value && best == best);
}

static void pool_2x2(const pool_t *g, const float *RESTRICT x, float *RESTRICT y,
                     int32_t *RESTRICT positions)
{
    for (idx p = 0; p < g->p; ++p) {
        const float *RESTRICT upper = x + 2 * p * g->w, *RESTRICT lower = upper + g->w;
        const int32_t w = (int32_t)g->w, start = (int32_t)(2 * p) * w;
        for (idx q = 0; q < g->q; ++q) {
            float best = upper[2 * q];
            int32_t at = 0;
            int better = beats(upper[2 * q + 1], best);
            best = better ? upper[2 * q + 1] : best;
            at = better ? 1 : at;
            better = beats(lower[2 * q], best);
            best = better ? lower[2 * q] : best;
            at = better ? w : at;
            better = beats(lower[2 * q + 1], best);
            best = better ? lower[2 * q + 1] : best;
            at = better ? w + 1 : at;
            y[p * g->q + q] = best;
            positions[p * g->q + q] = start + 2 * (int32_t)q + at;
        }
    }
}

static void pool_plane(const pool_t *g, const float *x, float *y, int32_t *positions)
{
    if (g->window_h == 2 && g->window_w == 2 && g->stride_h == 2 && g->stride_w == 2 &&
        !g->pad_h && !g->pad_w && 2 * g->p <= g->h && 2 * g->q <= g->w) {
        pool_2x2(g, x, y, positions);
        return;
    }
    for (idx p = 0; p < g->p; ++p)
        for (idx q = 0; q < g->q; ++q) {
            /* padding is less than a window, so some of it lies on the plane */
            const idx top = p * g->stride_h - g->pad_h;
            const idx left = q * g->stride_w - g->pad_w;
            const idx h0 = top < 0 ? 0 : top, w0 = left < 0 ? 0 : left;
            const idx h1 = top + g->window_h < g->h ? top + g->window_h : g->h;
            const idx w1 = left + g->window_w < g->w ? left + g->window_w : g->w;
            idx at = h0 * g->w + w0;
            for (idx h = h0; h < h1; ++h)
                for (idx w = w0; w < w1; ++w)
                    if (beats(x[h * g->w + w], x[at])) at = h * g->w + w;
            *y++ = x[at];
            *positions++ = (int32_t)at;
        }
}

/* One thread has the whole plane, so adding in the order of the windows gives the same
   sums in every run. Positions outside the plane are not ours, and are skipped. */
static void pool_plane_gradient(const pool_t *g, const float *RESTRICT dy,
                                const int32_t *RESTRICT positions, float *RESTRICT dx)
{
    const idx size = g->h * g->w, windows = g->p * g->q;
    memset(dx, 0, size * sizeof(float));
    for (idx j = 0; j < windows; ++j)
        if (positions[j] >= 0 && positions[j] < size) dx[positions[j]] += dy[j];
}

/* rows of f scores */

static idx argmax_row(const float *x, idx f)
{
    idx at = 0;
    for (idx j = 1; j < f; ++j)
        if (beats(x[j], x[at])) at = j;
    return at;
}

static void log_softmax_row(const float *x, float *y, idx f)
{
    const float top = x[argmax_row(x, f)];
    double total = 0;
    for (idx j = 0; j < f; ++j) total += expf(x[j] - top);
    const float log_total = (float)log(total);
    for (idx j = 0; j < f; ++j) y[j] = x[j] - top - log_total;
}

static void log_softmax_gradient_row(const float *dy, const float *y, float *dx, idx f)
{
    double total = 0;
    for (idx j = 0; j < f; ++j) total += dy[j];
    for (idx j = 0; j < f; ++j) dx[j] = dy[j] - expf(y[j]) * (float)total;
}

/* out[j] = x[j] * scale + shift */
static void scale_bytes(const uint8_t *x, float scale, float shift, float *out, idx n)
{
    for (idx j = 0; j < n; ++j) out[j] = x[j] * scale + shift;
}

static void scale_floats(const float *x, float scale, float shift, float *out, idx n)
{
    for (idx j = 0; j < n; ++j) out[j] = x[j] * scale + shift;
}

#endif
