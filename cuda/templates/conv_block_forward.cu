// Convolution + bias + ReLU + max pool in one kernel, for the shapes in the -D options.
//
//   z[n][k][p][q] = bias[k] + sum_{c,r,s} filter[k][c][r][s]
//                     * x[n][c][p STRIDE_H + r - PAD_H][q STRIDE_W + s - PAD_W]
//   y[n][k][i][j] = max over the POOL_H x POOL_W window (i, j) of relu(z)
//   code          = 0 where RELU and y <= 0, else 1 + index of the first maximum in
//                   the window, row by row
//
// An implicit matrix product: rows are output pixels, columns output channels, the
// contraction runs over (c, r, s). Nothing is unrolled into columns in memory. A block
// keeps the input under its TP x TQ outputs of IM images in shared memory, CQ quads of
// channels at a time, and a filter tap (r, s) only moves the address at which it is
// read.
//
// Shared memory, in units of 16 bytes = one pixel x one QUAD of words (4 channels, or 8
// in bf16; see fused.cuh for words):
//   input    [part][quad CQ][row XROWS][column % STRIDE_W][column / STRIDE_W][image IM]
//   filter   [part][tap][quad CQ][channel TK]
//            in a ring of SLOTS slots, each W_ROWS filter rows of one chunk of CQ
//            quads, copied as conv_pack_filter laid them out in memory
//   z        [warp of K][TK][pixel]  float32, in the same bytes when the products are
//            done
// Images are innermost and columns split by the stride, so 8 neighbouring units of a
// row are the same tap of 8 output pixels (TQ x IM is a multiple of 8): 128 consecutive
// bytes, at once a conflict-free ldmatrix and a core matrix of wgmma. Narrow layers
// take IM > 1, so that planes of 4 x 4 or 2 x 2 fill these groups too. "part": big and
// small halves in "fp32".
//
// Two kinds of warps. STAGERS bring operands: they fetch the input of the next chunk
// into registers, round it and store it to one of two buffers, and refill the ring.
// Multipliers do nothing but products. Barriers: filled[slot] and staged[buffer] when
// operands have come, done[buffer] when the products of a chunk have read them.
//
// WGMMA = 1 (sm_90a): WARPS_M / 4 x WARPS_K warpgroups; tiles of 64 pixels x TK
// channels, made of 64 units of one row or of 8 units of 8 rows. Otherwise mma.sync
// with WARPS_M x WARPS_N x WARPS_K warps. WARPS_K splits the quads of a chunk; its sums
// are added in warp order.
// In "fp32" the tensor cores' sums, which are truncated at every step, are moved to
// ordinary float32 sums after W_ROWS filter rows of a chunk.
//
// FIRST = 1: the input is not read but made here, by a first convolution block
// (conv_few.cuh, its constants FIRST_...) of the image; all warps compute it into the
// staged input, which one tile and one chunk must hold, and write it out for the
// backward. Two layers, one launch. Its output channels are C, its pooled output H x W.
//
// settled: the filter was complete before the kernel ahead of this one started, so that
// under programmatic dependent launch it may be fetched before that one has finished.
//
// Launch: grid (image groups x row tiles x column tiles, channel tiles), block 32
// (WARPS_M WARPS_N WARPS_K + STAGERS), dynamic shared memory SHARED_BYTES, any N >= 1.
#if FIRST
#include "conv_few.cuh"
#else
#include "fused.cuh"
#endif
#if WGMMA
#include "wgmma.cuh"
#endif

constexpr int P = (H + 2 * PAD_H - R) / STRIDE_H + 1,
              Q = (W + 2 * PAD_W - S) / STRIDE_W + 1;
constexpr int PP = P / POOL_H, QQ = Q / POOL_W;
constexpr int TPP = TP / POOL_H, TQQ = TQ / POOL_W;  // the tile after pooling
constexpr int ROW_TILES = ceil_div(PP, TPP), COLUMN_TILES = ceil_div(QQ, TQQ);

constexpr int MULTIPLIERS = 32 * WARPS_M * WARPS_N * WARPS_K;  // threads
constexpr int STAGING = 32 * STAGERS, THREADS = MULTIPLIERS + STAGING;
constexpr int PARTS = MODE == MODE_FP32 ? 2 : 1;
constexpr int QUAD_C = MODE == MODE_BF16 ? 8 : 4;  // channels of a unit
constexpr int CHUNK_C = CQ * QUAD_C, CHUNKS = ceil_div(C, CHUNK_C);

constexpr int XROWS = (TP - 1) * STRIDE_H + R, XCOLUMNS = (TQ - 1) * STRIDE_W + S;
constexpr int PHASE_UNITS = ceil_div(XCOLUMNS, STRIDE_W) * IM;  // columns of one phase
constexpr int ROW_UNITS = STRIDE_W * PHASE_UNITS, PLANE_UNITS = XROWS * ROW_UNITS;
constexpr int X_PART = CQ * PLANE_UNITS * 16, X_BYTES = PARTS * X_PART;
constexpr int X_BUFFERS = CHUNKS > 1 ? 2 : 1;
// Where one tile spans an axis, its border is padding for every block and stays zero:
// only the live rows and columns are brought.
constexpr int ROW0 = ROW_TILES == 1 ? PAD_H : 0,
              COLUMN0 = COLUMN_TILES == 1 ? PAD_W : 0;
__host__ __device__ constexpr int live(int extent, int all, int first) {
  return first + extent < all ? extent : all - first;
}
constexpr int LIVE_ROWS = ROW_TILES == 1 ? live(H, XROWS, ROW0) : XROWS;
constexpr int LIVE_COLUMNS = COLUMN_TILES == 1 ? live(W, XCOLUMNS, COLUMN0) : XCOLUMNS;
constexpr bool BORDER = LIVE_ROWS < XROWS || LIVE_COLUMNS < XCOLUMNS;

constexpr int ROW_GROUPS = R / W_ROWS, SLOTS_USED = CHUNKS * ROW_GROUPS;
constexpr int W_PART = W_ROWS * S * CQ * TK * 16, SLOT_BYTES = PARTS * W_PART;

constexpr int PIXELS = TP * TQ * IM, ROW_PIXELS = TQ * IM, Z_PITCH = PIXELS + 4;
constexpr int STAGING_BYTES = SLOTS * SLOT_BYTES + X_BUFFERS * X_BYTES;
constexpr int Z_BYTES = WARPS_K * TK * Z_PITCH * 4;
constexpr int BIAS = round_up(STAGING_BYTES > Z_BYTES ? STAGING_BYTES : Z_BYTES, 16);
#if FIRST
struct FirstLayer {
  static constexpr int channels = FIRST_C, height = FIRST_H, width = FIRST_W,
                       outputs = C;
  static constexpr int filter_h = FIRST_R, filter_w = FIRST_S;
  static constexpr int stride_h = FIRST_STRIDE_H, stride_w = FIRST_STRIDE_W;
  static constexpr int pad_h = FIRST_PAD_H, pad_w = FIRST_PAD_W;
  static constexpr int pool_h = FIRST_POOL_H, pool_w = FIRST_POOL_W;
  static constexpr int relu = FIRST_RELU, bias = FIRST_HAS_BIAS, mode = MODE;
  static constexpr int rows = H, m_tiles = ceil_div(C, 16), groups = FIRST_GROUPS;
  static constexpr int threads = THREADS;
};
typedef Few<FirstLayer> First;
static_assert(First::pooled_p == H && First::pooled_q == W, "layers that fit");
static_assert(IM == 1 && CHUNKS == 1 && PARTS == 1, "one image, one chunk");
static_assert(CHUNK_C <= 16 * FirstLayer::m_tiles,
              "channels past C are made too: zeros");
static_assert(ROW_TILES == 1 && COLUMN_TILES == 1, "one tile");
constexpr int FIRST_BYTES = round_up(First::bytes, 16);
#else
constexpr int FIRST_BYTES = 0;
#endif
constexpr int FIRST_AT = BIAS + 4 * TK, FILLED = FIRST_AT + FIRST_BYTES;
constexpr int STAGED = FILLED + 8 * SLOTS, DONE = STAGED + 16;
static_assert(DONE + 16 <= SHARED_BYTES, "shared memory");
// a slot is refilled when its chunk is done, which is known only in the middle of the
// next
static_assert(R % W_ROWS == 0 && SLOTS >= (CHUNKS > 1 ? 2 : 1) * ROW_GROUPS,
              "two chunks");
static_assert(TP % POOL_H == 0 && TQ % POOL_W == 0, "no window is cut");
static_assert(ROW_PIXELS % 8 == 0 && TK % 8 == 0, "multiples of 8 words");
static_assert(CQ % (2 * WARPS_K) == 0, "whole pairs of quads");

// ---- filter

// filter [K][C][R][S] -> packed [channel tile][chunk][row group][part][tap][quad][TK]
// units, rounded for MODE; channels past C and K are zero. One thread a unit of part 0.
extern "C" __global__ void __launch_bounds__(256)
    conv_pack_filter(const float* filter, uint4* packed) {
  constexpr int QUADS = CHUNKS * CQ;
  const int i = blockIdx.x * 256 + threadIdx.x;
  const int tap = i % (R * S), quad = i / (R * S) % QUADS, k = i / (R * S * QUADS);
  if (k >= round_up(K, TK)) return;
  wait_for_earlier_kernels();
  let_next_kernel_start();
  u32 big[4], small[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int c = quad * QUAD_C + e * (QUAD_C / 4);
    const float* from = filter + ((long long)k * C + c) * (R * S) + tap;
    const float v = k < K && c < C ? from[0] : 0.f;
    if (MODE == MODE_BF16) {
      big[e] = pack_bf16(v, k < K && c + 1 < C ? from[R * S] : 0.f);
    } else {
      big[e] = round_tf32(v);
      small[e] = rest_tf32(v, big[e]);
    }
  }
  const int slot = (k / TK * CHUNKS + quad / CQ) * ROW_GROUPS + tap / (W_ROWS * S);
  const int unit = (tap % (W_ROWS * S) * CQ + quad % CQ) * TK + k % TK;
  uint4* to = packed + (long long)slot * (SLOT_BYTES / 16) + unit;
  to[0] = make_uint4(big[0], big[1], big[2], big[3]);
  if (PARTS == 2) to[W_PART / 16] = make_uint4(small[0], small[1], small[2], small[3]);
}

// The ring: slot i % SLOTS holds row group i % ROW_GROUPS of chunk i / ROW_GROUPS.
// Called by all stagers; `thread` counts them.
__device__ __forceinline__ void fetch_filter(int i, const u8* filter, u32 shared,
                                             int thread) {
  const u32 to = shared + i % SLOTS * SLOT_BYTES,
            filled = shared + FILLED + 8 * (i % SLOTS);
  const u8* from = filter + (long long)i * SLOT_BYTES;
#if __CUDA_ARCH__ >= 900
  if (thread == 0) {
    barrier_expect(filled, SLOT_BYTES);
    copy_bulk(to, from, SLOT_BYTES, filled);
  }
#else
  for (int b = thread * 16; b < SLOT_BYTES; b += STAGING * 16)
    copy_async16(to + b, from + b);
  barrier_arrive_copies(filled);
#endif
}

// ---- input

// The units of a chunk that a stager brings: unit u * STAGING + thread, columns
// fastest.
constexpr int X_QUAD = LIVE_ROWS * LIVE_COLUMNS * IM, X_ALL = CQ * X_QUAD;
constexpr int X_UNITS = ceil_div(X_ALL, STAGING);
constexpr int X_BATCH =
    X_UNITS < 48 / QUAD_C ? X_UNITS : 48 / QUAD_C;  // in registers at a time
struct InputUnits {
  int from[X_UNITS];  // offset of the unit's first channel in chunk 0, or -1: zeros
  int to[X_UNITS];    // byte in the buffer, or -1: no unit
};

__device__ __forceinline__ InputUnits input_units(int present, int row0, int column0,
                                                  int thread) {
  InputUnits units;
#pragma unroll
  for (int u = 0; u < X_UNITS; ++u) {
    const int i = u * STAGING + thread;
    const int column = COLUMN0 + i % LIVE_COLUMNS, image = i / LIVE_COLUMNS % IM;
    const int row = ROW0 + i / (LIVE_COLUMNS * IM) % LIVE_ROWS, quad = i / X_QUAD;
    const int h = row0 + row, w = column0 + column;
    const bool inside =
        h >= 0 && h < H && w >= 0 && w < W && image < present && i < X_ALL;
    units.from[u] = inside ? ((image * C + quad * QUAD_C) * H + h) * W + w : -1;
    units.to[u] = i < X_ALL ? 16 * (quad * PLANE_UNITS + row * ROW_UNITS +
                                    column % STRIDE_W * PHASE_UNITS +
                                    column / STRIDE_W * IM + image)
                            : -1;
  }
  return units;
}

// x: the block's first image
__device__ __forceinline__ void load_input(float (&v)[X_BATCH][QUAD_C], const float* x,
                                           const InputUnits& units, int chunk,
                                           int first, int thread) {
#pragma unroll
  for (int b = 0; b < X_BATCH; ++b) {
    const int u = first + b;
    if (u >= X_UNITS) break;
    // the last chunk may reach past C
    const int quad = (u * STAGING + thread) / X_QUAD;
    const int left = C - chunk * CHUNK_C - quad * QUAD_C;
#pragma unroll
    for (int e = 0; e < QUAD_C; ++e)
      v[b][e] = units.from[u] >= 0 && (C % CHUNK_C == 0 || e < left)
                    ? x[units.from[u] + (chunk * CHUNK_C + e) * (H * W)]
                    : 0.f;
  }
}
__device__ __forceinline__ void store_input(const float (&v)[X_BATCH][QUAD_C],
                                            u32 buffer, const InputUnits& units,
                                            int first) {
#pragma unroll
  for (int b = 0; b < X_BATCH; ++b) {
    const int u = first + b;
    if (u >= X_UNITS || units.to[u] < 0) break;
    u32 big[4], small[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (MODE == MODE_BF16) {
        big[e] = pack_bf16(v[b][2 * e % QUAD_C], v[b][(2 * e + 1) % QUAD_C]);
      } else {
        big[e] = round_tf32(v[b][e]);
        small[e] = rest_tf32(v[b][e], big[e]);
      }
    }
    store_shared4(buffer + units.to[u], make_uint4(big[0], big[1], big[2], big[3]));
    if (PARTS == 2)
      store_shared4(buffer + X_PART + units.to[u],
                    make_uint4(small[0], small[1], small[2], small[3]));
  }
}

// units from tap (0, 0) to tap (r, s)
__device__ __forceinline__ constexpr int tap_units(int r, int s) {
  return r * ROW_UNITS + s % STRIDE_W * PHASE_UNITS + s / STRIDE_W * IM;
}

// The products of a pair of operands: small terms first. Part of x, part of the filter.
constexpr int PRODUCTS = PARTS == 2 ? 3 : 1;
__device__ __forceinline__ constexpr int x_part(int product) {
  return PARTS == 2 && product == 0;
}
__device__ __forceinline__ constexpr int w_part(int product) {
  return PARTS == 2 && product == 1;
}

// ---- the two engines: Sums holds a thread's part of the tile

#if WGMMA
constexpr int TILES = PIXELS / 64, GROUP_TILES = TILES / (WARPS_M / 4);
// 64 units of one row, or 8 units of each of 8 rows
constexpr bool WIDE = ROW_PIXELS % 64 == 0;
static_assert(WARPS_N == 1 && WARPS_M % 4 == 0, "whole warpgroups");
static_assert(PIXELS % 64 == 0 && TILES % (WARPS_M / 4) == 0, "whole tiles");
static_assert(WIDE || TP % 8 == 0, "tiles of 64 pixels");

struct Sums {
  float d[GROUP_TILES][TK / 2];
};

// row and first unit of a tile
__device__ __forceinline__ int tile_row(int tile) {
  return WIDE ? tile / (ROW_PIXELS / 64) : tile / (ROW_PIXELS / 8) * 8;
}
__device__ __forceinline__ int tile_unit(int tile) {
  return WIDE ? tile % (ROW_PIXELS / 64) * 64 : tile % (ROW_PIXELS / 8) * 8;
}

// until the products of all chunks but the last `pending` are complete
template <int pending>
__device__ __forceinline__ void complete(Sums& sums) {
  wgmma_wait<pending>();
  if (pending == 0) {
#pragma unroll
    for (int m = 0; m < GROUP_TILES; ++m) wgmma_own(sums.d[m]);
  }
}

__device__ __forceinline__ void add(Sums& sums, const Sums& more) {
#pragma unroll
  for (int i = 0; i < GROUP_TILES * (TK / 2); ++i)
    sums.d[i / (TK / 2)][i % (TK / 2)] += more.d[i / (TK / 2)][i % (TK / 2)];
}

// Adds the products of one chunk to sums; i counts slots. Except in "fp32" wgmma may
// still be running when it returns.
__device__ __forceinline__ void multiply(Sums& sums, int chunk, u32 x, u32 shared) {
  Sums parts;  // "fp32" only
  Sums& now = PARTS == 2 ? parts : sums;
  const int group = threadIdx.x / 128 % (WARPS_M / 4);
  const int quad0 = WARPS_K == 1 ? 0 : 2 * (threadIdx.x / (32 * WARPS_M));
  u64 a[GROUP_TILES];
#pragma unroll
  for (int m = 0; m < GROUP_TILES; ++m) {
    const int tile = group * GROUP_TILES + m;
    const int unit =
        quad0 * PLANE_UNITS + tile_row(tile) * STRIDE_H * ROW_UNITS + tile_unit(tile);
    a[m] = wgmma_operand(x + 16 * unit, 16 * PLANE_UNITS,
                         WIDE ? 128 : 16 * STRIDE_H * ROW_UNITS);
  }
  const u64 b = wgmma_operand(shared + 16 * quad0 * TK, 16 * TK, 128);
  // not unrolled: code that runs once is late, since it comes from memory
#pragma unroll 1
  for (int rows = 0; rows < ROW_GROUPS; ++rows) {
    const int i = chunk * ROW_GROUPS + rows;
    barrier_wait(shared + FILLED + 8 * (i % SLOTS), i / SLOTS & 1);
    const u64 b_slot = b + i % SLOTS * (SLOT_BYTES / 16);
    wgmma_fence();
#pragma unroll
    for (int tap = 0; tap < W_ROWS * S; ++tap)
#pragma unroll
      for (int j = 0; j < CQ; j += 2 * WARPS_K)
#pragma unroll
        for (int product = 0; product < PRODUCTS; ++product)
#pragma unroll
          for (int m = 0; m < GROUP_TILES; ++m)
            wgmma<MODE, TK>(
                now.d[m],
                a[m] + x_part(product) * (X_PART / 16) + j * PLANE_UNITS +
                    tap_units(rows * W_ROWS + tap / S, tap % S),
                b_slot + w_part(product) * (W_PART / 16) + (tap * CQ + j) * TK,
                PARTS == 1 ? chunk > 0 || rows + tap + j > 0 : tap + j + product > 0);
    wgmma_commit();
    if (PARTS == 2) {
      complete<0>(now);
      add(sums, now);
    } else {
      wgmma_wait<1>();
    }
  }
}
__device__ __forceinline__ void store_sums(const Sums& sums, float* z) {
  const int warp = threadIdx.x / 32 % 4, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  z += threadIdx.x / (32 * WARPS_M) * (TK * Z_PITCH);
#pragma unroll
  for (int m = 0; m < GROUP_TILES; ++m) {
    const int tile = threadIdx.x / 128 % (WARPS_M / 4) * GROUP_TILES + m;
#pragma unroll
    for (int e = 0; e < TK / 2; ++e) {
      const int eight = 2 * warp + e / 2 % 2, k = e / 4 * 8 + 2 * t + e % 2;
      const int pixel = WIDE ? tile * 64 + eight * 8
                             : (tile_row(tile) + eight) * ROW_PIXELS + tile_unit(tile);
      z[k * Z_PITCH + pixel + g] = sums.d[m][e];
    }
  }
}

#else
constexpr int M_TILES = PIXELS / 16 / WARPS_M, N_TILES = TK / 8 / WARPS_N;
constexpr int N_PAIRS = ceil_div(N_TILES, 2);
static_assert(PIXELS % (16 * WARPS_M) == 0 && TK % (8 * WARPS_N) == 0, "whole tiles");
struct Sums {
  float d[M_TILES][4 * N_TILES];
};

__device__ __forceinline__ void clear(Sums& sums) {
#pragma unroll
  for (int i = 0; i < M_TILES * 4 * N_TILES; ++i)
    sums.d[i / (4 * N_TILES)][i % (4 * N_TILES)] = 0.f;
}
__device__ __forceinline__ void add(Sums& sums, const Sums& more) {
#pragma unroll
  for (int i = 0; i < M_TILES * 4 * N_TILES; ++i)
    sums.d[i / (4 * N_TILES)][i % (4 * N_TILES)] +=
        more.d[i / (4 * N_TILES)][i % (4 * N_TILES)];
}

__device__ __forceinline__ void multiply(Sums& sums, int chunk, u32 x, u32 shared) {
  Sums parts;  // "fp32" only
  Sums& now = PARTS == 2 ? parts : sums;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, matrix = lane / 8;
  const int warp_m = warp % WARPS_M, warp_n = warp / WARPS_M % WARPS_N;
  const int quad0 = 2 * (warp / (WARPS_M * WARPS_N));
  // ldmatrix: this lane points at row lane % 8 of matrix lane / 8. Input: eights of
  // pixels 2m and 2m+1 of quad j, then of quad j + 1. Filter: channel eight n of quads
  // j and j + 1, then eight n + 1.
  u32 a[M_TILES], b[N_PAIRS];
#pragma unroll
  for (int m = 0; m < M_TILES; ++m) {
    const int eight = (warp_m * M_TILES + m) * 2 + matrix % 2;
    const int row = eight / (ROW_PIXELS / 8),
              unit = eight % (ROW_PIXELS / 8) * 8 + lane % 8;
    a[m] = x + 16 * ((quad0 + matrix / 2) * PLANE_UNITS + row * STRIDE_H * ROW_UNITS +
                     unit);
  }
#pragma unroll
  for (int n = 0; n < N_PAIRS; ++n) {
    const int tile = 2 * n + matrix / 2 < N_TILES ? 2 * n + matrix / 2 : 2 * n;
    const int k = (warp_n * N_TILES + tile) * 8 + lane % 8;
    b[n] = shared + 16 * ((quad0 + matrix % 2) * TK + k);
  }
#pragma unroll 1
  for (int rows = 0; rows < ROW_GROUPS; ++rows) {
    const int i = chunk * ROW_GROUPS + rows;
    barrier_wait(shared + FILLED + 8 * (i % SLOTS), i / SLOTS & 1);
    const u32 slot = i % SLOTS * SLOT_BYTES, row = 16 * rows * W_ROWS * ROW_UNITS;
    if (PARTS == 2) clear(now);
#pragma unroll
    for (int tap = 0; tap < W_ROWS * S; ++tap)
#pragma unroll
      for (int j = 0; j < CQ; j += 2 * WARPS_K) {
        u32 af[PARTS][M_TILES][4], bf[PARTS][N_PAIRS][4];
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
#pragma unroll
          for (int m = 0; m < M_TILES; ++m)
            load_matrices(af[part][m],
                          a[m] + row + part * X_PART +
                              16 * (j * PLANE_UNITS + tap_units(tap / S, tap % S)));
#pragma unroll
          for (int n = 0; n < N_PAIRS; ++n)
            load_matrices(bf[part][n],
                          b[n] + slot + part * W_PART + 16 * (tap * CQ + j) * TK);
        }
#pragma unroll
        for (int product = 0; product < PRODUCTS; ++product)
#pragma unroll
          for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int n = 0; n < N_TILES; ++n) {
              float (&d)[4] = *(float (*)[4])(now.d[m] + 4 * n);
              const u32* bp = bf[w_part(product)][n / 2] + n % 2 * 2;
              mma<MODE>(d, af[x_part(product)][m], bp[0], bp[1]);
            }
      }
    if (PARTS == 2) add(sums, now);
  }
}
template <int pending>
__device__ __forceinline__ void complete(Sums&) {}

__device__ __forceinline__ void store_sums(const Sums& sums, float* z) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int warp_m = warp % WARPS_M, warp_n = warp / WARPS_M % WARPS_N;
  z += warp / (WARPS_M * WARPS_N) * (TK * Z_PITCH);
#pragma unroll
  for (int m = 0; m < M_TILES; ++m)
#pragma unroll
    for (int e = 0; e < 4 * N_TILES; ++e) {
      const int k = (warp_n * N_TILES + e / 4) * 8 + 2 * t + e % 2;
      const int pixel = ((warp_m * M_TILES + m) * 2 + e / 2 % 2) * 8 + g;
      z[k * Z_PITCH + pixel] = sums.d[m][e];
    }
}
#endif

constexpr int SUM_TILES = sizeof(Sums) / sizeof(((Sums*)0)->d[0]);
constexpr int TILE_SUMS = sizeof(((Sums*)0)->d[0]) / 4;

// ---- the two kinds of warps. done[b] completes for chunk c when c / 2 + 1 times all
// multipliers (with wgmma all their warps) have arrived, b = c % 2; staged[b] likewise
// with the stagers.

// The input of the first chunk must not queue behind the whole ring: some slots first,
// the others when it has come.
constexpr int EAGER_BYTES = 80 << 10;
constexpr int EAGER = SLOTS_USED * SLOT_BYTES <= EAGER_BYTES ? SLOTS_USED
                      : SLOT_BYTES >= EAGER_BYTES            ? 1
                                                             : EAGER_BYTES / SLOT_BYTES;

// Clears the border, waits for earlier kernels and fetches the first slots; returns how
// many.
__device__ __forceinline__ int begin(const u8* filter, bool settled, u32 shared,
                                     int thread) {
  if (BORDER) {
    for (int b = thread * 16; b < X_BUFFERS * X_BYTES; b += STAGING * 16)
      store_shared4(shared + SLOTS * SLOT_BYTES + b, make_uint4(0, 0, 0, 0));
    sync_threads(1, STAGING);
  }
  if (!settled) wait_for_earlier_kernels();
  int fetched = 0;
#pragma unroll 1
  for (; fetched < EAGER && fetched < SLOTS; ++fetched)
    fetch_filter(fetched, filter, shared, thread);
  if (settled) wait_for_earlier_kernels();
  let_next_kernel_start();
  return fetched;
}

__device__ __forceinline__ void stage(const float* x, const u8* filter, bool settled,
                                      u32 shared, const InputUnits& units, int thread) {
  const u32 input = shared + SLOTS * SLOT_BYTES;
  int fetched = begin(filter, settled, shared, thread);
#pragma unroll 1
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
    const int b = chunk % 2;
    const u32 buffer = input + b * X_BYTES;
    float v[X_BATCH][QUAD_C];
    load_input(v, x, units, chunk, 0, thread);
    if (chunk >= 2) barrier_wait(shared + DONE + 8 * b, chunk / 2 - 1 & 1);
    store_input(v, buffer, units, 0);
#pragma unroll
    for (int u = X_BATCH; u < X_UNITS; u += X_BATCH) {
      load_input(v, x, units, chunk, u, thread);
      store_input(v, buffer, units, u);
    }
#if WGMMA
    fence_async();
#endif
    barrier_arrive(shared + STAGED + 8 * b);
    // the slots of chunk - 2 are free
    const int room = SLOTS + (chunk >= 2 ? (chunk - 1) * ROW_GROUPS : 0);
#pragma unroll 1
    for (; fetched < room && fetched < SLOTS_USED; ++fetched)
      fetch_filter(fetched, filter, shared, thread);
  }
}

__device__ __forceinline__ void multiply_all(Sums& sums, u32 shared) {
#pragma unroll
  for (int i = 0; i < SUM_TILES * TILE_SUMS; ++i)
    sums.d[i / TILE_SUMS][i % TILE_SUMS] = 0.f;
#pragma unroll 1
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
    const int b = chunk % 2;
    if (!FIRST) barrier_wait(shared + STAGED + 8 * b, chunk / 2 & 1);
    multiply(sums, chunk, shared + SLOTS * SLOT_BYTES + b * X_BYTES, shared);
    // where wgmma runs on, the chunk before is complete once only this one is pending
    constexpr int BEHIND = WGMMA && PARTS == 1;
    if (BEHIND) complete<1>(sums);
#if __CUDA_ARCH__ >= 900
    // ldmatrix has read what bulk copies overwrite
    if (!WGMMA && SLOTS < SLOTS_USED) fence_async();
#endif
    // each lane for what it has read by ldmatrix, one for the warp's wgmma
    if ((!WGMMA || threadIdx.x % 32 == 0) && chunk >= BEHIND)
      barrier_arrive(shared + DONE + 8 * (BEHIND ? b ^ 1 : b));
  }
  complete<0>(sums);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) conv_block_forward(
#if FIRST
#if GATHER
    const u8* images,  // [M][FIRST_C][FIRST_H][FIRST_W]
    const int* index,  // [N]
    float scale, float shift,
    float* x_out,  // [N][FIRST_C][FIRST_H][FIRST_W] or null
#else
    const float* image,  // [N][FIRST_C][FIRST_H][FIRST_W]
#endif
    const float* first_filter,  // [C][FIRST_C][FIRST_R][FIRST_S]
    const float* first_bias,    // [C]
    float* first_y,             // [N][C][H][W]
    u8* first_code,             // the same, or null
#else
    const float* x,  // [N][C][H][W]
#endif
    const u8* filter,   // packed by conv_pack_filter
    const float* bias,  // [K]
    float* y,           // [N][K][PP][QQ]
    u8* code,           // the same, if HAS_CODE
    int N, int settled) {
  extern __shared__ __align__(128) u8 memory[];
  const u32 shared = shared_address(memory);
  const int tile = blockIdx.x, k0 = blockIdx.y * TK;
  const int tile_column = tile % COLUMN_TILES,
            tile_row = tile / COLUMN_TILES % ROW_TILES;
  const int n0 = tile / (COLUMN_TILES * ROW_TILES) * IM;
  const int present = min(IM, N - n0);  // images

  if (threadIdx.x == 0) {
#if __CUDA_ARCH__ >= 900
    constexpr int arrivals = 1;
#else
    constexpr int arrivals = STAGING;
#endif
    for (int s = 0; s < SLOTS; ++s) barrier_init(shared + FILLED + 8 * s, arrivals);
    for (int b = 0; b < 2; ++b) {
      barrier_init(shared + STAGED + 8 * b, STAGING);
      barrier_init(shared + DONE + 8 * b, WGMMA ? MULTIPLIERS / 32 : MULTIPLIERS);
    }
    barrier_init_fence();
  }
  __syncthreads();

  filter += (long long)blockIdx.y * SLOTS_USED * SLOT_BYTES;
  const int thread = threadIdx.x - MULTIPLIERS;  // of the stagers
  if (threadIdx.x < MULTIPLIERS) {
    wait_for_earlier_kernels();
    let_next_kernel_start();
    for (int k = threadIdx.x; k < TK; k += MULTIPLIERS)
      ((float*)(memory + BIAS))[k] = HAS_BIAS && k0 + k < K ? bias[k0 + k] : 0.f;
  }
  Sums sums;
#if FIRST
  int fetched = thread >= 0 ? begin(filter, settled, shared, thread) : 0;
  u32* first = (u32*)(memory + FIRST_AT);
  float b[First::m_tiles][2];
  First::load_bias(b, first_bias, 0);
#if GATHER
  const PixelOfBytes pixel{
      images + (long long)index[n0] * (FIRST_C * FIRST_H * FIRST_W), scale, shift};
#else
  const PixelOfBatch pixel{image + (long long)n0 * (FIRST_C * FIRST_H * FIRST_W)};
#endif
  First::load(first, pixel, first_filter, -FIRST_PAD_H, 0);
#if GATHER
  if (x_out != nullptr && blockIdx.y == 0)
    for (int i = threadIdx.x; i < FIRST_C * FIRST_H * FIRST_W; i += THREADS)
      x_out[(long long)n0 * (FIRST_C * FIRST_H * FIRST_W) + i] = pixel(i);
#endif
  __syncthreads();
  if (thread >= 0)
    for (; fetched < SLOTS_USED; ++fetched)
      fetch_filter(fetched, filter, shared, thread);
  First::multiply(
      first, b, threadIdx.x / 32, THREADS / 32,
      [&](int k, int window, const float (&v)[2], const u32(&at)[2]) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int row = PAD_H + (window + e) / W, column = PAD_W + (window + e) % W;
          const int unit = k / QUAD_C * PLANE_UNITS + row * ROW_UNITS +
                           column % STRIDE_W * PHASE_UNITS + column / STRIDE_W;
          u8* to = memory + SLOTS * SLOT_BYTES + 16 * unit;
          const bool staged = (CHUNK_C == 16 * FirstLayer::m_tiles || k < CHUNK_C) &&
                              (H * W % (8 * FIRST_GROUPS) == 0 || window + e < H * W) &&
                              (PAD_H + H <= XROWS || row < XROWS) &&
                              (PAD_W + W <= XCOLUMNS || column < XCOLUMNS);
          if (!staged) continue;
          if (MODE == MODE_BF16) ((u16*)to)[k % 8] = pack_bf16(v[e], 0.f);
          else ((u32*)to)[k % 4] = round_tf32(v[e]);
        }
        if (blockIdx.y == 0) First::write(first_y, first_code, n0, k, 0, window, v, at);
      });
#if WGMMA
  fence_async();
#endif
  __syncthreads();
  if (thread < 0) multiply_all(sums, shared);
#else
  if (thread >= 0) {
    const InputUnits units = input_units(present, tile_row * TP * STRIDE_H - PAD_H,
                                         tile_column * TQ * STRIDE_W - PAD_W, thread);
    stage(x + (long long)n0 * (C * H * W), filter, settled, shared, units, thread);
  } else {
    multiply_all(sums, shared);
  }
#endif

  float* z = (float*)memory;
  __syncthreads();
  if (threadIdx.x < MULTIPLIERS) store_sums(sums, z);
  __syncthreads();
  constexpr int OUTPUTS = IM * TK * TPP * TQQ;
#pragma unroll 4
  for (int o = threadIdx.x; o < OUTPUTS; o += THREADS) {
    const int j = o % TQQ, i = o / TQQ % TPP, k = o / (TQQ * TPP) % TK;
    const int image = o / (TQQ * TPP * TK);
    const int jj = tile_column * TQQ + j, ii = tile_row * TPP + i;
    const float b = ((const float*)(memory + BIAS))[k];
    float best = 0.f;
    u32 at = 0;
#pragma unroll
    for (int w = 0; w < POOL_H * POOL_W; ++w) {
      const int pixel =
          ((i * POOL_H + w / POOL_W) * TQ + j * POOL_W + w % POOL_W) * IM + image;
      float sum = z[k * Z_PITCH + pixel];
#pragma unroll
      for (int s = 1; s < WARPS_K; ++s) sum += z[(s * TK + k) * Z_PITCH + pixel];
      sum += b;
      if (w == 0 || sum > best || sum != sum) {
        best = sum;
        at = w + 1;
      }
    }
    if (RELU && best <= 0.f) {
      best = 0.f;
      at = 0;
    }
    if (image < present && k0 + k < K && ii < PP && jj < QQ) {
      const long long out =
          (((long long)(n0 + image) * K + k0 + k) * PP + ii) * QQ + jj;
      y[out] = best;
      if (HAS_CODE) code[out] = at;
    }
  }
}
