// conv_block_forward for few input channels (C R S up to some 200, as in a first layer).
//
// With 1 or 3 channels there is no quad of channels to multiply; here the filter taps are the
// contraction: d[k][window] += filter[k][tap] x[window's pixel + tap], where tap = (c, r, s)
// in the order of memory, filled up with zeros to a multiple of 8 (25 -> 32, 27 -> 32).
//
// mma.sync with channels as rows and pixels as columns (fragments in fused.cuh). The 8 pixels
// of a fragment are the same position of 8 consecutive pooling windows, so a thread ends up
// with every position of its windows 2t and 2t + 1: bias, ReLU and max pool happen in
// registers and a warp writes whole runs of 8 pooled values of a channel.
//
// A block holds the input rows under TPP rows of windows in shared memory as plain planes
// [part][c][XROWS][XPITCH]. A lane reads column word
//   x[base of its window + position + offset of tap 8 step + t (+ 4)],
// 32 bits at a time; neighbouring taps and windows overlap, so conflicts are rare. The filter
// lies beside them as [part][TK][F_PITCH] and moves to registers where it fits. "part": big
// and small halves in "fp32".
// In "bf16" the operands stay tf32: with so few channels it costs nothing and errs less.
//
// GATHER: x is made here from the data set, x[n] = images[index[n]] * scale + shift, and
// written to x_out where that is not null (the backward needs it).
//
// Launch: grid (N x row tiles, channel tiles), block 32 WARPS, dynamic shared memory
// SHARED_BYTES, N >= 1.
#include "fused.cuh"

constexpr int P = (H + 2 * PAD_H - R) / STRIDE_H + 1, Q = (W + 2 * PAD_W - S) / STRIDE_W + 1;
constexpr int PP = P / POOL_H, QQ = Q / POOL_W, PLANE = PP * QQ;
constexpr int POSITIONS = POOL_H * POOL_W;
constexpr int ROW_TILES = ceil_div(PP, TPP), WINDOWS = TPP * QQ;

constexpr int TAPS = C * R * S, STEPS = ceil_div(TAPS, 8);
constexpr int XROWS = (TPP * POOL_H - 1) * STRIDE_H + R, XPITCH = W + 2 * PAD_W;
constexpr int PARTS = MODE == MODE_FP32 ? 2 : 1, THREADS = 32 * WARPS;
constexpr int M_TILES = TK / 16;
constexpr int N_TILES = GROUPS * POSITIONS;  // 8 windows x POSITIONS, GROUPS times
constexpr int PASSES = ceil_div(WINDOWS, 8 * GROUPS);

constexpr int X_PART = C * XROWS * XPITCH;
constexpr int F_PITCH = STEPS * 8 + 4;  // 4 mod 8: fragments are read without conflicts
constexpr int F_PART = TK * F_PITCH;
constexpr bool RESIDENT = STEPS * M_TILES * 4 * PARTS <= 64;
static_assert(4 * PARTS * (X_PART + F_PART) <= SHARED_BYTES, "shared memory");
static_assert(TK % 16 == 0, "whole fragments");

// elements that a thread brings at a time
constexpr int X_BATCH = ceil_div(X_PART, THREADS) < 8 ? ceil_div(X_PART, THREADS) : 8;
constexpr int F_ALL = TK * STEPS * 8;
constexpr int F_BATCH = ceil_div(F_ALL, THREADS) < 8 ? ceil_div(F_ALL, THREADS) : 8;

__device__ __forceinline__ void store_word(u32* to, int part_words, float v) {
  to[0] = round_tf32(v);
  if (PARTS == 2) to[part_words] = rest_tf32(v, to[0]);
}
// channel and tap of element e of fragment m of a step, in the tile
__device__ __forceinline__ int fragment_k(int m, int e) {
  return 16 * m + threadIdx.x % 32 / 4 + e % 2 * 8;
}
__device__ __forceinline__ int fragment_tap(int step, int e) {
  return 8 * step + threadIdx.x % 4 + e / 2 * 4;
}

__device__ __forceinline__ void load_fragments(u32 (&a)[PARTS][M_TILES][4], const u32* fs,
                                               int step) {
#pragma unroll
  for (int i = 0; i < PARTS * M_TILES * 4; ++i) {
    const int part = i / (4 * M_TILES), m = i / 4 % M_TILES, e = i % 4;
    a[part][m][e] = fs[part * F_PART + fragment_k(m, e) * F_PITCH + fragment_tap(step, e)];
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
conv_few_forward(
#if GATHER
                 const u8* images,     // [M][C][H][W]
                 const int* index,     // [N]
                 float scale, float shift,
                 float* x_out,         // [N][C][H][W] or null
#else
                 const float* x,       // [N][C][H][W]
#endif
                 const float* filter,  // [K][C][R][S]
                 const float* bias,    // [K]
                 float* y,             // [N][K][PP][QQ]
                 u8* code) {           // the same, if HAS_CODE
  extern __shared__ __align__(16) u32 shared[];
  u32* fs = shared + PARTS * X_PART;
  const int n = blockIdx.x / ROW_TILES, tile = blockIdx.x % ROW_TILES, k0 = blockIdx.y * TK;
  const int row0 = tile * TPP * POOL_H * STRIDE_H - PAD_H;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  wait_for_earlier_kernels();
  let_next_kernel_start();

  float b[M_TILES][2];
#pragma unroll
  for (int i = 0; i < 2 * M_TILES; ++i) {
    const int k = k0 + i * 8 + g;
    b[i / 2][i % 2] = HAS_BIAS && k < K ? bias[k] : 0.f;
  }
#if GATHER
  const u8* image = images + (long long)index[n] * (C * H * W);
#else
  const float* image = x + (long long)n * (C * H * W);
#endif
  // the first batches of both are loaded before either is stored: one round trip
#pragma unroll 1
  for (int first = 0; first * X_BATCH < X_PART || first * F_BATCH < F_ALL; first += THREADS) {
    const int x_first = first * X_BATCH + threadIdx.x, f_first = first * F_BATCH + threadIdx.x;
    float v[X_BATCH], f[F_BATCH];
#pragma unroll
    for (int j = 0; j < X_BATCH; ++j) {
      const int i = x_first + j * THREADS;
      const int column = i % XPITCH, row = i / XPITCH % XROWS, c = i / (XPITCH * XROWS);
      const int h = row0 + row, w = column - PAD_W;
      const bool inside = i < X_PART && h >= 0 && h < H && w >= 0 && w < W;
#if GATHER
      v[j] = inside ? image[(c * H + h) * W + w] * scale + shift : 0.f;
#else
      v[j] = inside ? image[(c * H + h) * W + w] : 0.f;
#endif
    }
#pragma unroll
    for (int j = 0; j < F_BATCH; ++j) {
      const int i = f_first + j * THREADS, tap = i % (STEPS * 8), k = k0 + i / (STEPS * 8);
      f[j] = i < F_ALL && tap < TAPS && k < K ? filter[k * TAPS + tap] : 0.f;
    }
#pragma unroll
    for (int j = 0; j < X_BATCH; ++j) {
      const int i = x_first + j * THREADS;
      if (i < X_PART) store_word(shared + i, X_PART, v[j]);
    }
#pragma unroll
    for (int j = 0; j < F_BATCH; ++j) {
      const int i = f_first + j * THREADS;
      if (i < F_ALL) store_word(fs + i / (STEPS * 8) * F_PITCH + i % (STEPS * 8), F_PART, f[j]);
    }
  }
#if GATHER
  if (x_out != nullptr && blockIdx.y == 0)
    for (int i = tile * THREADS + threadIdx.x; i < C * H * W; i += ROW_TILES * THREADS)
      x_out[(long long)n * (C * H * W) + i] = image[i] * scale + shift;
#endif
  u32 offset[STEPS][2];  // bytes from a window's pixel to this lane's taps
#pragma unroll
  for (int i = 0; i < 2 * STEPS; ++i) {
    const int tap = fragment_tap(i / 2, i % 2 * 2);
    const int at = (tap / (R * S) * XROWS + tap / S % R) * XPITCH + tap % S;
    offset[i / 2][i % 2] = tap < TAPS ? 4 * at : 0;  // the filter is 0 there
  }
  const u32 x_base = shared_address(shared);
  __syncthreads();
  u32 resident[RESIDENT ? STEPS : 1][PARTS][M_TILES][4];
#pragma unroll
  for (int step = 0; RESIDENT && step < STEPS; ++step) load_fragments(resident[step], fs, step);

#pragma unroll 1
  for (int pass = threadIdx.x / 32; pass < PASSES; pass += WARPS) {
    u32 base[GROUPS];
#pragma unroll
    for (int j = 0; j < GROUPS; ++j) {
      const int window = min((pass * GROUPS + j) * 8 + g, WINDOWS - 1);
      base[j] = x_base + 4 * (window / QQ * POOL_H * STRIDE_H * XPITCH +
                              window % QQ * POOL_W * STRIDE_W);
    }
    float d[M_TILES][N_TILES][4];
#pragma unroll
    for (int i = 0; i < M_TILES * N_TILES * 4; ++i)
      d[i / (4 * N_TILES)][i / 4 % N_TILES][i % 4] = 0.f;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      u32 fetched[PARTS][M_TILES][4];
      if (!RESIDENT) load_fragments(fetched, fs, step);
      const auto& a = RESIDENT ? resident[RESIDENT ? step : 0] : fetched;
#pragma unroll
      for (int j = 0; j < N_TILES; ++j) {
        const int position = j % POSITIONS;
        const u32 at = base[j / POSITIONS] + 4 * (position / POOL_W * STRIDE_H * XPITCH +
                                                  position % POOL_W * STRIDE_W);
        u32 w[PARTS][2];
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
          w[part][0] = load_shared(at + offset[step][0] + 4 * part * X_PART);
          w[part][1] = load_shared(at + offset[step][1] + 4 * part * X_PART);
        }
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
          if (PARTS == 2) {
            mma_tf32(d[m][j], a[PARTS - 1][m], w[0][0], w[0][1]);
            mma_tf32(d[m][j], a[0][m], w[PARTS - 1][0], w[PARTS - 1][1]);
          }
          mma_tf32(d[m][j], a[0][m], w[0][0], w[0][1]);
        }
      }
    }
    // channel 16 m + 8 half + g, windows 2t and 2t + 1 of group j
#pragma unroll
    for (int j = 0; j < GROUPS; ++j) {
      const int in_tile = (pass * GROUPS + j) * 8 + 2 * t;
      const int window = tile * WINDOWS + in_tile;
#pragma unroll
      for (int i = 0; i < 2 * M_TILES; ++i) {
        const int k = k0 + i * 8 + g;
        float best[2];
        u32 at[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          best[e] = d[i / 2][j * POSITIONS][i % 2 * 2 + e] + b[i / 2][i % 2];
          at[e] = 1;
#pragma unroll
          for (int position = 1; position < POSITIONS; ++position) {
            const float z = d[i / 2][j * POSITIONS + position][i % 2 * 2 + e] + b[i / 2][i % 2];
            if (z > best[e] || z != z) {
              best[e] = z;
              at[e] = position + 1;
            }
          }
          if (RELU && best[e] <= 0.f) {
            best[e] = 0.f;
            at[e] = 0;
          }
        }
        const long long out = ((long long)n * K + k) * PLANE + window;
        if (k >= K) continue;
        if (PLANE % 2 == 0 && WINDOWS % 2 == 0) {
          if (in_tile < WINDOWS && window < PLANE) {
            *(float2*)(y + out) = make_float2(best[0], best[1]);
            if (HAS_CODE) *(u16*)(code + out) = at[0] | at[1] << 8;
          }
        } else {
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (in_tile + e < WINDOWS && window + e < PLANE) {
              y[out + e] = best[e];
              if (HAS_CODE) code[out + e] = at[e];
            }
        }
      }
    }
  }
}
