// What the backward kernels of linear layers share: a tile of a matrix product
//   D (rows x columns) = sum over a contraction of A and B
// by a block of 8 warps, and how its operands come into shared memory. B's rows are
// those of a matrix in global memory (weight[o] or x[n]). Operands are words along the
// contraction (fused.cuh).
#pragma once
#include "backward.cuh"

// A matrix in global memory of rows of length LENGTH; where a second one is given,
// numbers count only where it is positive (dz = dy masked by y).
template <int LENGTH>
struct Matrix {
  static constexpr int RUN = run(LENGTH);
  const float* data;
  const float* mask;
  int rows;

  __device__ __forceinline__ bool inside(int row, int column) const {
    return row < rows && column < LENGTH;
  }
  __device__ __forceinline__ void load(float (&v)[RUN], int row, int column) const {
#pragma unroll
    for (int j = 0; j < RUN; ++j) v[j] = 0.0f;
    if (!inside(row, column)) return;
    const size_t at = (size_t)row * LENGTH + column;
    load_run<true>(v, data + at);
    if (mask) {
      float y[RUN];
      load_run<true>(y, mask + at);
#pragma unroll
      for (int j = 0; j < RUN; ++j)
        if (!(y[j] > 0.0f)) v[j] = 0.0f;
    }
  }
};

// Floats that are multiplied as they are can be copied without passing through
// registers.
constexpr bool COPIED = E == 1;

// tile[word][column], DEPTH x COLUMNS: words along the rows of the matrix
template <bool COPY, int DEPTH, int COLUMNS, int STRIDE, int LENGTH>
__device__ __forceinline__ void load_down(u32* tile, const Matrix<LENGTH>& from,
                                          int row0, int column0) {
  constexpr int RUN = Matrix<LENGTH>::RUN;
  for_all<DEPTH, COLUMNS / RUN, 8>([&](int word, int item) {
    const int column = item * RUN, row = row0 + word * E;
    u32* const to = tile + word * STRIDE + column;
    if (COPY && from.inside(row, column0 + column)) {
      copy_run<4, RUN>(to, from.data + (size_t)row * LENGTH + column0 + column);
      return;
    }
    float low[RUN], high[RUN] = {};
    from.load(low, row, column0 + column);
    if (E == 2) from.load(high, row + 1, column0 + column);
#pragma unroll
    for (int j = 0; j < RUN; ++j)
      to[j] = E == 2 ? pack_bf16(low[j], high[j]) : operand(low[j]);
  });
}

// tile[row][word], ROWS x DEPTH: words along the columns of the matrix
template <int ROWS, int DEPTH, int STRIDE, int LENGTH>
__device__ __forceinline__ void load_along(u32* tile, const Matrix<LENGTH>& from,
                                           int row0, int column0) {
  constexpr int RUN = Matrix<LENGTH>::RUN;
  for_all<ROWS, DEPTH * E / RUN, 4>([&](int row, int item) {
    const int column = item * RUN;
    float v[RUN];
    from.load(v, row0 + row, column0 + column);
    u32* const to = tile + row * STRIDE;
#pragma unroll
    for (int j = 0; j < RUN; ++j) {
      if (E == 1) to[column + j] = operand(v[j]);
      else ((u16*)to)[column + j] = (u16)pack_bf16(v[j], 0.0f);
    }
  });
}

// A block's tile of D: WM x WN warps, each MT x 16 rows and NT x 8 columns; a stage of
// the contraction is DEPTH words. A lies in shared memory as [row][word] (ALONG) or
// [word][row]; strides keep the lanes in different banks.
template <int WM_, int MT_, int NT_, int DEPTH_, bool ALONG>
struct Tile {
  static constexpr int WM = WM_, MT = MT_, NT = NT_, WN = WARPS / WM, DEPTH = DEPTH_;
  static constexpr int ROWS = 16 * MT * WM, COLUMNS = 8 * NT * WN;
  static constexpr int A_STRIDE = ALONG ? stride(DEPTH, 4) : stride(ROWS, 8);
  static constexpr int A_WORDS = ALONG ? ROWS * A_STRIDE : DEPTH * A_STRIDE;
  static constexpr int B_STRIDE = stride(COLUMNS, 8);
  static constexpr int SHARED_WORDS = A_WORDS + DEPTH * B_STRIDE;

  // A product that adds to the one before waits for it; so few products a step take
  // turns with several sums.
  static constexpr int CHAINS = MODE == MODE_FP32 ? 1 : most(1, 4 / (MT * NT));

  float acc[MT][NT][4] = {};
  float row_sum[MT][2] = {};  // of A, over the contraction
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int row0 = threadIdx.x / 32 % WM * MT * 16,
            column0 = threadIdx.x / 32 / WM * NT * 8;

  __device__ __forceinline__ void add(const u32* a_tile, const u32* b_tile) {
    constexpr int ROW = ALONG ? A_STRIDE : 1, WORD = ALONG ? 1 : A_STRIDE;
    const u32* const a_lane = a_tile + (row0 + g) * ROW + t * WORD;
    const u32* const b_lane = b_tile + t * B_STRIDE + column0 + g;
    float chain[CHAINS][MT][NT][4] = {};
#pragma unroll most(4, CHAINS)
    for (int k = 0; k < DEPTH; k += 8) {
      Rows a[MT];
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        const u32* const from = a_lane + m * 16 * ROW + k * WORD;
        const u32 low[2] = {from[0], from[4 * WORD]};
        const u32 high[2] = {from[8 * ROW], from[8 * ROW + 4 * WORD]};
        a[m].set(low[0], high[0], low[1], high[1]);
        row_sum[m][0] += sum_of(low[0]) + sum_of(low[1]);
        row_sum[m][1] += sum_of(high[0]) + sum_of(high[1]);
      }
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const u32* const from = b_lane + k * B_STRIDE + n * 8;
        const u32 b0 = copied_word(from[0]), b1 = copied_word(from[4 * B_STRIDE]);
#pragma unroll
        for (int m = 0; m < MT; ++m)
          multiply(chain[k / 8 % CHAINS][m][n], a[m], b0, b1);
      }
    }
#pragma unroll
    for (int i = 0; i < CHAINS * MT * NT * 4; ++i)
      (&acc[0][0][0])[i % (MT * NT * 4)] += (&chain[0][0][0][0])[i];
  }

  // D, whose first row and column those of the tile are, has `rows` rows of LENGTH.
  template <int LENGTH>
  __device__ __forceinline__ void store(float* __restrict__ to, int first_row, int rows,
                                        int first_column) const {
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + row0 + m * 16 + half * 8 + g;
        if (row >= rows) continue;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          const int column = first_column + column0 + n * 8 + 2 * t;
          float* const at = to + (size_t)row * LENGTH + column;
          const float v0 = acc[m][n][2 * half], v1 = acc[m][n][2 * half + 1];
          if (LENGTH % 2 == 0) {
            if (column < LENGTH) *(float2*)at = make_float2(v0, v1);
          } else {
            if (column < LENGTH) at[0] = v0;
            if (column + 1 < LENGTH) at[1] = v1;
          }
        }
      }
  }

  // The sums of A's rows, by the warps that have column 0.
  __device__ __forceinline__ void store_row_sums(float* __restrict__ to, int first_row,
                                                 int rows) const {
    if (column0) return;
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float v = row_sum[m][half];
        v += __shfl_xor_sync(~0u, v, 1);
        v += __shfl_xor_sync(~0u, v, 2);
        const int row = first_row + row0 + m * 16 + half * 8 + g;
        if (t == 0 && row < rows) to[row] = v;
      }
  }
};
