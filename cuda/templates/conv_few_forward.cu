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
// [c][XROWS][XPITCH] and the filter as [TK][F_PITCH]. A lane reads column word
//   x[base of its window + position + offset of tap 8 step + t (+ 4)],
// 32 bits at a time; neighbouring taps and windows overlap, so conflicts are rare.
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
constexpr int X_WORDS = C * XROWS * XPITCH;
constexpr int F_PITCH = STEPS * 8 + 4;  // 4 mod 8: fragments are read without conflicts
static_assert(4 * (round_up(X_WORDS, 4) + TK * F_PITCH) <= SHARED_BYTES, "shared memory");
static_assert(TK % 16 == 0, "whole fragments");

constexpr int M_TILES = TK / 16;
constexpr int N_TILES = GROUPS * POSITIONS;       // 8 windows x POSITIONS, GROUPS times
constexpr int PASSES = ceil_div(WINDOWS, 8 * GROUPS);
// whether all of the filter's fragments fit into registers
constexpr bool RESIDENT = STEPS * M_TILES * 4 <= 64 && MODE != MODE_FP32;

// Round an operand; "fp32" keeps it whole until it is in registers.
__device__ __forceinline__ u32 word(float v) {
  return MODE == MODE_FP32 ? __float_as_uint(v) : round_tf32(v);
}
__device__ __forceinline__ void load_filter(u32 (&a)[M_TILES][4], u32 filter, int step) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int m = 0; m < M_TILES; ++m)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int k = 16 * m + g + e % 2 * 8, tap = 8 * step + t + e / 2 * 4;
      a[m][e] = load_shared(filter + 4 * (k * F_PITCH + tap));
    }
}
__device__ __forceinline__ void multiply(float (&d)[M_TILES][N_TILES][4],
                                         const u32 (&a)[M_TILES][4], int n, u32 b0, u32 b1) {
#pragma unroll
  for (int m = 0; m < M_TILES; ++m) {
    if (MODE == MODE_FP32) {
      u32 big[4], small[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float v = __uint_as_float(a[m][e]);
        big[e] = round_tf32(v);
        small[e] = rest_tf32(v, big[e]);
      }
      const float v0 = __uint_as_float(b0), v1 = __uint_as_float(b1);
      const u32 big0 = round_tf32(v0), big1 = round_tf32(v1);
      mma_tf32(d[m][n], small, big0, big1);
      mma_tf32(d[m][n], big, rest_tf32(v0, big0), rest_tf32(v1, big1));
      mma_tf32(d[m][n], big, big0, big1);
    } else {
      mma_tf32(d[m][n], a[m], b0, b1);
    }
  }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS_PER_SM)
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
  u32* xs = shared;
  u32* fs = shared + round_up(X_WORDS, 4);
  const int n = blockIdx.x / ROW_TILES, tile = blockIdx.x % ROW_TILES, k0 = blockIdx.y * TK;
  const int row0 = tile * TPP * POOL_H * STRIDE_H - PAD_H;
  wait_for_earlier_kernels();
  let_next_kernel_start();

#if GATHER
  const u8* image = images + (long long)index[n] * (C * H * W);
#else
  const float* image = x + (long long)n * (C * H * W);
#endif
#pragma unroll 4
  for (int i = threadIdx.x; i < X_WORDS; i += 32 * WARPS) {
    const int column = i % XPITCH, row = i / XPITCH % XROWS, c = i / (XPITCH * XROWS);
    const int h = row0 + row, w = column - PAD_W;
    float v = 0.f;
    if (h >= 0 && h < H && w >= 0 && w < W) {
      v = image[(c * H + h) * W + w];
#if GATHER
      v = v * scale + shift;
#endif
    }
    xs[i] = word(v);
  }
#pragma unroll 4
  for (int i = threadIdx.x; i < TK * STEPS * 8; i += 32 * WARPS) {
    const int tap = i % (STEPS * 8), k = i / (STEPS * 8);
    fs[k * F_PITCH + tap] =
        tap < TAPS && k0 + k < K ? word(filter[(k0 + k) * TAPS + tap]) : 0u;
  }
#if GATHER
  if (x_out != nullptr && blockIdx.y == 0)
    for (int i = tile * (32 * WARPS) + threadIdx.x; i < C * H * W; i += ROW_TILES * 32 * WARPS)
      x_out[(long long)n * (C * H * W) + i] = image[i] * scale + shift;
#endif
  __syncthreads();

  const u32 x_base = shared_address(xs), f_base = shared_address(fs);
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  u32 offset[STEPS][2];  // bytes from a window's pixel to this lane's taps
#pragma unroll
  for (int i = 0; i < 2 * STEPS; ++i) {
    const int tap = i / 2 * 8 + t + i % 2 * 4;
    const int at = (tap / (R * S) * XROWS + tap / S % R) * XPITCH + tap % S;
    offset[i / 2][i % 2] = tap < TAPS ? 4 * at : 0;  // the filter is 0 there
  }
  float b[M_TILES][2];
#pragma unroll
  for (int i = 0; i < 2 * M_TILES; ++i) {
    const int k = k0 + i * 8 + g;
    b[i / 2][i % 2] = HAS_BIAS && k < K ? bias[k] : 0.f;
  }
  u32 resident[RESIDENT ? STEPS : 1][M_TILES][4];
#pragma unroll
  for (int step = 0; RESIDENT && step < STEPS; ++step)
    load_filter(resident[step], f_base, step);

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
    for (int i = 0; i < M_TILES * N_TILES * 4; ++i) d[i / (4 * N_TILES)][i / 4 % N_TILES][i % 4] = 0.f;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      u32 fetched[M_TILES][4];
      if (!RESIDENT) load_filter(fetched, f_base, step);
#pragma unroll
      for (int n_tile = 0; n_tile < N_TILES; ++n_tile) {
        const int position = n_tile % POSITIONS;
        const u32 at = base[n_tile / POSITIONS] + 4 * (position / POOL_W * STRIDE_H * XPITCH +
                                                       position % POOL_W * STRIDE_W);
        multiply(d, RESIDENT ? resident[RESIDENT ? step : 0] : fetched, n_tile,
                 load_shared(at + offset[step][0]), load_shared(at + offset[step][1]));
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
