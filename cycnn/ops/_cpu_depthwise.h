/* The rows of a depth-wise convolution, for _cpu_depthwise.pyx.

   Planes are padded, so no row asks where an image ends. The usual filters, of three
   or five columns and without stride or dilation, have loops of their own, which a
   compiler turns into vectors. */

#ifndef CYCNN_CPU_DEPTHWISE_H
#define CYCNN_CPU_DEPTHWISE_H

#include <stddef.h>

#if defined(__GNUC__)
#define RESTRICT __restrict__
#elif defined(_MSC_VER)
#define RESTRICT __restrict
#else
#define RESTRICT
#endif

typedef ptrdiff_t idx;

/* y[q] += sum over s of w[s] x[q * stride + s * dilation], for q < n */
static void taps_row(
    float *RESTRICT y, const float *RESTRICT x, const float *RESTRICT w, idx taps,
    idx stride, idx dilation, idx n)
{
    idx q, s;
    if (stride == 1 && dilation == 1 && taps == 3) {
        const float w0 = w[0], w1 = w[1], w2 = w[2];
        for (q = 0; q < n; q++)
            y[q] += w0 * x[q] + w1 * x[q + 1] + w2 * x[q + 2];
        return;
    }
    if (stride == 1 && dilation == 1 && taps == 5) {
        const float w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3], w4 = w[4];
        for (q = 0; q < n; q++)
            y[q] += w0 * x[q] + w1 * x[q + 1] + w2 * x[q + 2] + w3 * x[q + 3] +
                    w4 * x[q + 4];
        return;
    }
    for (s = 0; s < taps; s++) {
        const float ws = w[s];
        const float *RESTRICT xs = x + s * dilation;
        if (stride == 1)
            for (q = 0; q < n; q++) y[q] += ws * xs[q];
        else
            for (q = 0; q < n; q++) y[q] += ws * xs[q * stride];
    }
}

/* dx[q * stride + s * dilation] += w[s] dy[q], for q < n */
static void spread_row(
    float *RESTRICT dx, const float *RESTRICT dy, const float *RESTRICT w, idx taps,
    idx stride, idx dilation, idx n)
{
    idx q, s;
    for (s = 0; s < taps; s++) {
        const float ws = w[s];
        float *RESTRICT to = dx + s * dilation;
        if (stride == 1)
            for (q = 0; q < n; q++) to[q] += ws * dy[q];
        else
            for (q = 0; q < n; q++) to[q * stride] += ws * dy[q];
    }
}

/* sum over q of dy[q] x[q * stride]: eight sums, so that they need not wait for each
   other, joined in a fixed order */
static float dot_row(
    const float *RESTRICT dy, const float *RESTRICT x, idx stride, idx n)
{
    float part[8] = {0};
    idx q, i;
    if (stride == 1)
        for (q = 0; q + 8 <= n; q += 8)
            for (i = 0; i < 8; i++) part[i] += dy[q + i] * x[q + i];
    else
        for (q = 0; q + 8 <= n; q += 8)
            for (i = 0; i < 8; i++) part[i] += dy[q + i] * x[(q + i) * stride];
    for (i = 0; q < n; q++, i++) part[i] += dy[q] * x[q * stride];
    return ((part[0] + part[4]) + (part[2] + part[6])) +
           ((part[1] + part[5]) + (part[3] + part[7]));
}

#endif
