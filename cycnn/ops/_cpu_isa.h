/* The matrix and convolution workers, for one instruction set.

   _cpu_kernels.h includes this file once for each instruction set, with
     SUFFIX(name)  the name with the instruction set appended
     TARGET        the function attribute that selects it
     VW            floats in a vector
   and chooses among the copies at run time. Nothing here allocates, and nothing here
   knows of threads: the caller splits the work, always in the same way, so the number
   of threads does not change a bit of any result.

   All rests on one tile: MR rows (broadcast) times NR columns (two vectors), which
   keeps 12 accumulators, 2 vectors and a broadcast in registers. */

#define NR (2 * VW)

#if VW > 1
typedef float SUFFIX(vec) __attribute__((vector_size(VW * 4)));
#else
typedef float SUFFIX(vec);
#endif
#define VEC SUFFIX(vec)

/* memcpy of a constant size is one unaligned load or store */
TARGET static ALWAYS_INLINE VEC SUFFIX(load)(const float *p)
{
    VEC v;
    memcpy(&v, p, sizeof v);
    return v;
}

TARGET static ALWAYS_INLINE void SUFFIX(store)(float *p, VEC v)
{
    memcpy(p, &v, sizeof v);
}

TARGET static ALWAYS_INLINE void SUFFIX(add_to)(float *p, VEC v)
{
    SUFFIX(store)(p, SUFFIX(load)(p) + v);
}

/* Lengths differ between calls of one kernel only at edges, so `rows` is a constant in
   each instance and every loop over it disappears. */

/* c[i, j] = row_bias[i] + sum_k a[k, i] b[k, j], or added to c where add is set.
   a: (depth, rows), b: (depth, NR), c: (rows, NR) with ldc between its rows. */
TARGET static ALWAYS_INLINE void SUFFIX(tile_rows)(
    const int rows, idx depth, const float *a, const float *b, float *c, idx ldc,
    const float *row_bias, int add)
{
    VEC lo[MR], hi[MR];
    for (int i = 0; i < rows; ++i) {
        lo[i] = (VEC){0} + (row_bias ? row_bias[i] : 0.0f);
        hi[i] = lo[i];
    }
    for (idx k = 0; k < depth; ++k, a += rows, b += NR) {
        VEC b0 = SUFFIX(load)(b), b1 = SUFFIX(load)(b + VW);
        for (int i = 0; i < rows; ++i) {
            lo[i] += a[i] * b0;
            hi[i] += a[i] * b1;
        }
    }
    for (int i = 0; i < rows; ++i, c += ldc) {
        if (add) {
            SUFFIX(add_to)(c, lo[i]);
            SUFFIX(add_to)(c + VW, hi[i]);
        } else {
            SUFFIX(store)(c, lo[i]);
            SUFFIX(store)(c + VW, hi[i]);
        }
    }
}

TARGET static void SUFFIX(tile)(
    int rows, idx depth, const float *a, const float *b, float *c, idx ldc,
    const float *row_bias, int add)
{
#define CASE(n) \
    case n: SUFFIX(tile_rows)(n, depth, a, b, c, ldc, row_bias, add); break;
    switch (rows) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) }
#undef CASE
}

/* Columns of one panel of NR: where each is read, and which halves lie side by side. */

TARGET static ALWAYS_INLINE int SUFFIX(adjacent)(const idx *at)
{
    /* offsets rise strictly, so the ends tell all */
    return at[VW - 1] - at[0] == VW - 1;
}

/* C (m, n) = A B (+ C where add, else + the bias of its column), for the columns of
   panel `panel`. a: as pack_rows made it. b[k, j] = b[k * b_row + j * b_column]. */
TARGET static void SUFFIX(gemm_panel)(
    idx m, idx n, idx depth, const float *a, const float *b, idx b_row,
    idx b_column, float *c, const float *column_bias, int add, idx panel)
{
    const idx first = panel * NR;
    const idx width = n - first < NR ? n - first : NR;
    const idx panels = row_panels(m);
    float packed[KC * NR], part[MR * NR];

    for (idx k0 = 0; k0 < depth; k0 += KC) {
        const idx kc = depth - k0 < KC ? depth - k0 : KC;
        for (idx k = 0; k < kc; ++k) {
            const float *source = b + (k0 + k) * b_row + first * b_column;
            for (idx j = 0; j < NR; ++j)
                packed[k * NR + j] = j < width ? source[j * b_column] : 0.0f;
        }
        for (idx i = 0; i < panels; ++i) {
            const idx row = panel_start(m, i), rows = panel_start(m, i + 1) - row;
            SUFFIX(tile)(rows, kc, a + m * k0 + row * kc, packed, part, NR, 0, 0);
            for (idx r = 0; r < rows; ++r) {
                float *to = c + (row + r) * n + first;
                const float *from = part + r * NR;
                if (add || k0)
                    for (idx j = 0; j < width; ++j) to[j] += from[j];
                else if (column_bias)
                    for (idx j = 0; j < width; ++j)
                        to[j] = column_bias[first + j] + from[j];
                else
                    for (idx j = 0; j < width; ++j) to[j] = from[j];
            }
        }
    }
}

/* Where the columns of one panel lie: column j is output position j % PQ of image
   j / PQ. in[] are offsets into x, out[] offsets into y. Columns past `count` get those
   of the first: what is read there is dropped. Returns the number of real columns. */
TARGET static ALWAYS_INLINE idx SUFFIX(columns)(
    const conv_t *g, idx first, idx count, idx *in, idx *out)
{
    const idx width = count - first < NR ? count - first : NR;
    idx image = first / g->pixels, pixel = first % g->pixels;
    for (idx j = 0; j < width; ++j) {
        in[j] = image * g->x_image + g->pixel_at[pixel];
        out[j] = image * g->k * g->pixels + pixel;
        if (++pixel == g->pixels) {
            pixel = 0;
            ++image;
        }
    }
    for (idx j = width; j < NR; ++j) {
        in[j] = in[0];
        out[j] = out[0];
    }
    return width;
}

/* y of one group at the columns of panels panel0 .. panel1 - 1. w: (CRS, K / groups) as
   pack_rows made it. A column of the product is an output position; panels run across
   images, because small planes would leave most of a panel empty. */
TARGET static void SUFFIX(conv_forward)(
    const conv_t *g, const float *x, const float *w, const float *bias, float *y,
    idx group, idx panel0, idx panel1)
{
    const idx k_group = g->k / g->groups, c_group = g->c / g->groups;
    const idx panels = row_panels(k_group), count = g->n * g->pixels;
    float packed[KC * NR], part[MR * NR];
    idx in[NR], out[NR];

    x += group * c_group * g->x_plane;
    y += group * k_group * g->pixels;
    w += group * k_group * g->taps;
    if (bias) bias += group * k_group;

    for (idx first = panel0 * NR; first < panel1 * NR && first < count; first += NR) {
        const idx width = SUFFIX(columns)(g, first, count, in, out);
        const int side0 = SUFFIX(adjacent)(in), side1 = SUFFIX(adjacent)(in + VW);
        const int whole = width == NR && out[NR - 1] - out[0] == NR - 1;
        for (idx k0 = 0; k0 < g->taps; k0 += KC) {
            const idx kc = g->taps - k0 < KC ? g->taps - k0 : KC;
            for (idx k = 0; k < kc; ++k) {
                const float *tap = x + g->tap_at[k0 + k];
                float *to = packed + k * NR;
                if (side0)
                    SUFFIX(store)(to, SUFFIX(load)(tap + in[0]));
                else
                    for (idx j = 0; j < VW; ++j) to[j] = tap[in[j]];
                if (side1)
                    SUFFIX(store)(to + VW, SUFFIX(load)(tap + in[VW]));
                else
                    for (idx j = VW; j < NR; ++j) to[j] = tap[in[j]];
            }
            for (idx i = 0; i < panels; ++i) {
                const idx row = panel_start(k_group, i);
                const idx rows = panel_start(k_group, i + 1) - row;
                const float *a = w + k_group * k0 + row * kc;
                const float *row_bias = bias && !k0 ? bias + row : 0;
                float *to = y + row * g->pixels;
                if (whole) {
                    SUFFIX(tile)(rows, kc, a, packed, to + out[0], g->pixels, row_bias,
                                 k0 > 0);
                    continue;
                }
                SUFFIX(tile)(rows, kc, a, packed, part, NR, row_bias, 0);
                for (idx r = 0; r < rows; ++r, to += g->pixels)
                    for (idx j = 0; j < width; ++j)
                        to[out[j]] = part[r * NR + j] + (k0 ? to[out[j]] : 0.0f);
            }
        }
    }
}

/* dx of the images of one unit and one group, added to zeros. w: for each (r, s) the
   matrix (K / groups, C / groups) as pack_rows made it, so neighbouring rows of a tile
   belong to different planes of dx and their sums do not wait for each other. */
TARGET static void SUFFIX(conv_backward_data)(
    const conv_t *g, const float *dy, const float *w, float *dx, idx group, idx unit)
{
    const idx n0 = unit * g->unit, n1 = n0 + g->unit < g->n ? n0 + g->unit : g->n;
    const idx k_group = g->k / g->groups, c_group = g->c / g->groups;
    const idx panels = row_panels(c_group), filter = g->taps / c_group;
    const idx count = (n1 - n0) * g->pixels;
    float packed[KC * NR], part[MR * NR];
    idx in[NR], out[NR];

    dx += n0 * g->x_image + group * c_group * g->x_plane;
    dy += (n0 * g->k + group * k_group) * g->pixels;
    w += group * k_group * g->taps;

    for (idx first = 0; first < count; first += NR) {
        const idx width = SUFFIX(columns)(g, first, count, in, out);
        const int side0 = width >= VW && SUFFIX(adjacent)(in);
        const int side1 = width == NR && SUFFIX(adjacent)(in + VW);
        const int whole = width == NR && out[NR - 1] - out[0] == NR - 1;
        for (idx k0 = 0; k0 < k_group; k0 += KC) {
            const idx kc = k_group - k0 < KC ? k_group - k0 : KC;
            for (idx k = 0; k < kc; ++k) {
                const float *from = dy + (k0 + k) * g->pixels;
                if (whole)
                    memcpy(packed + k * NR, from + out[0], NR * sizeof(float));
                else
                    for (idx j = 0; j < NR; ++j) packed[k * NR + j] = from[out[j]];
            }
            for (idx rs = 0; rs < filter; ++rs) {
                const float *a = w + rs * k_group * c_group + k0 * c_group;
                float *tap = dx + g->tap_at[rs];
                for (idx i = 0; i < panels; ++i) {
                    const idx row = panel_start(c_group, i);
                    const idx rows = panel_start(c_group, i + 1) - row;
                    SUFFIX(tile)(rows, kc, a + row * kc, packed, part, NR, 0, 0);
                    for (idx r = 0; r < rows; ++r) {
                        float *plane = tap + (row + r) * g->x_plane;
                        const float *sum = part + r * NR;
                        if (side0)
                            SUFFIX(add_to)(plane + in[0], SUFFIX(load)(sum));
                        else
                            for (idx j = 0; j < VW && j < width; ++j)
                                plane[in[j]] += sum[j];
                        if (side1)
                            SUFFIX(add_to)(plane + in[VW], SUFFIX(load)(sum + VW));
                        else
                            for (idx j = VW; j < width; ++j) plane[in[j]] += sum[j];
                    }
                }
            }
        }
    }
}

/* dy of the images of one unit, transposed: (panels of NR output channels, N PQ, NR),
   zero where a panel has more columns than there are channels; and the sum of each
   channel over the unit. */
TARGET static void SUFFIX(conv_transpose)(
    const conv_t *g, const float *dy, float *dyt, double *sums, idx unit)
{
    const idx n0 = unit * g->unit, n1 = n0 + g->unit < g->n ? n0 + g->unit : g->n;
    const idx pixels = g->pixels, k_group = g->k / g->groups;
    const idx panels = (k_group + NR - 1) / NR;

    for (idx k = 0; k < g->k; ++k) sums[unit * g->k + k] = 0;
    for (idx n = n0; n < n1; ++n)
        for (idx panel = 0; panel < g->groups * panels; ++panel) {
            const idx k0 = panel % panels * NR;
            const idx width = k_group - k0 < NR ? k_group - k0 : NR;
            const idx channel = panel / panels * k_group + k0;
            const float *from = dy + (n * g->k + channel) * pixels;
            float *to = dyt + (panel * g->n + n) * pixels * NR;
            if (width == NR) {
                for (idx j = 0; j < pixels; ++j)
                    for (idx k = 0; k < NR; ++k) to[j * NR + k] = from[k * pixels + j];
            } else {
                for (idx j = 0; j < pixels; ++j)
                    for (idx k = 0; k < NR; ++k)
                        to[j * NR + k] = k < width ? from[k * pixels + j] : 0.0f;
            }
            VEC lo = (VEC){0}, hi = (VEC){0};
            for (idx j = 0; j < pixels; ++j) {
                lo += SUFFIX(load)(to + j * NR);
                hi += SUFFIX(load)(to + j * NR + VW);
            }
            float sum[NR];
            SUFFIX(store)(sum, lo);
            SUFFIX(store)(sum + VW, hi);
            for (idx k = 0; k < width; ++k)
                sums[unit * g->k + channel + k] += sum[k];
        }
}

/* part[i, j] += sum over the positions of `images` images of
   x[n, position + at[i]] dyt[n, position, j]. The rows are read where they lie. */
TARGET static ALWAYS_INLINE void SUFFIX(weight_rows)(
    const int rows, const conv_t *g, idx images, const float *x, const idx *at,
    const float *dyt, float *part)
{
    VEC lo[MR], hi[MR];
    const float *row[MR];
    for (int i = 0; i < rows; ++i) {
        lo[i] = hi[i] = (VEC){0};
        row[i] = x + at[i];
    }
    for (idx n = 0; n < images; ++n) {
        for (idx j = 0; j < g->pixels; ++j, dyt += NR) {
            const idx here = g->pixel_at[j];
            VEC d0 = SUFFIX(load)(dyt), d1 = SUFFIX(load)(dyt + VW);
            for (int i = 0; i < rows; ++i) {
                lo[i] += row[i][here] * d0;
                hi[i] += row[i][here] * d1;
            }
        }
        for (int i = 0; i < rows; ++i) row[i] += g->x_image;
    }
    for (int i = 0; i < rows; ++i) {
        SUFFIX(add_to)(part + i * NR, lo[i]);
        SUFFIX(add_to)(part + i * NR + VW, hi[i]);
    }
}

/* dweight of NR output channels (panel) and taps tap0 .. tap1 - 1, transposed: added to
   dwt (panels, CRS, NR). The images are taken a block at a time, which the cache holds
   while every tap reads it; it is also the length of one float32 sum. */
TARGET static void SUFFIX(conv_backward_weight)(
    const conv_t *g, const float *x, const float *dyt, float *dwt, idx panel,
    idx tap0, idx tap1)
{
    const idx k_group = g->k / g->groups, c_group = g->c / g->groups;
    const idx group = panel / ((k_group + NR - 1) / NR);

    x += group * c_group * g->x_plane;
    for (idx n0 = 0; n0 < g->n; n0 += g->block) {
        const idx images = g->n - n0 < g->block ? g->n - n0 : g->block;
        const float *from = x + n0 * g->x_image;
        const float *d = dyt + (panel * g->n + n0) * g->pixels * NR;
        for (idx tap = tap0; tap < tap1;) {
            const idx rows = tap1 - tap < MR ? tap1 - tap : MR;
            const idx *at = g->tap_at + tap;
            float *part = dwt + (panel * g->taps + tap) * NR;
#define CASE(r) \
    case r: SUFFIX(weight_rows)(r, g, images, from, at, d, part); break;
            switch (rows) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) }
#undef CASE
            tap += rows;
        }
    }
}

static const kernels_t SUFFIX(kernels) = {
    NR,
    SUFFIX(gemm_panel),
    SUFFIX(conv_forward),
    SUFFIX(conv_backward_data),
    SUFFIX(conv_transpose),
    SUFFIX(conv_backward_weight),
};

#undef VEC
#undef NR
