// Backward of the fused block  y = relu(x weight^T + bias), or without relu.
//
// I and O are compile-time constants, the batch N is not:
//   x, dx (N, I)   weight, dweight (O, I)   y, dy, dz (N, O)   bias, dbias (O)
//   z[n,o] = bias[o] + sum_i x[n,i] weight[o,i]
//   dz = dy where relu let y through (y > 0), else 0
//   dx[n,i] = sum_o dz[n,o] weight[o,i]
//   dweight[o,i] = sum_n dz[n,o] x[n,i]      dbias[o] = sum_n dz[n,o]
// Both products are D (rows x columns i) = sum over a contraction of A and B, with B's rows
// as they lie in memory (weight[o], x[n]). The rows of D are images in the first and
// outputs o in the second. Operands are words along the contraction (fused.cuh).
//
// dweight may be split over the batch: each split writes a partial gradient, and reduce or
// update (update.cu) adds them in order.
//
// Launch: 256 threads, SHARED bytes; blocks 0 .. dw_blocks-1 work on dweight (i tile
// fastest, then o tile, then split), the others on dx (i tile fastest, then images).
// Compute capability 8.0 and up.
#include "backward.cuh"

constexpr int DEPTH = WORDS;                       // words of the contraction a stage holds

__host__ __device__ constexpr int stride(int size, int residue) {
  return size + ((residue - size) % 32 + 32) % 32;
}
// A matrix in global memory of rows of length LENGTH; where a second one is given, numbers
// count only where it is positive (dz = dy masked by y).
template <int LENGTH> struct Matrix {
  static constexpr int RUN = run(LENGTH);
  const float* __restrict__ data;
  const float* __restrict__ mask;
  int rows;

  __device__ __forceinline__ bool inside(int row, int column) const {
    return row < rows && column < LENGTH;
  }
  __device__ __forceinline__ void load(float (&v)[RUN], int row, int column) const {
#pragma unroll
    for (int j = 0; j < RUN; ++j) v[j] = 0.0f;
    if (!inside(row, column)) return;
    const size_t at = (size_t)row * LENGTH + column;
    load_run(v, data + at);
    if (mask) {
      float y[RUN];
      load_run(y, mask + at);
#pragma unroll
      for (int j = 0; j < RUN; ++j)
        if (!(y[j] > 0.0f)) v[j] = 0.0f;
    }
  }
};

// Floats that are multiplied as they are can be copied without passing through registers.
constexpr bool COPIED = E == 1;

// tile[word][column]: words along the rows of the matrix
template <bool COPY, int COLUMNS, int STRIDE, int LENGTH>
__device__ __forceinline__ void load_down(u32* tile, const Matrix<LENGTH>& from, int row0,
                                          int column0) {
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

// tile[row][word]: words along the columns of the matrix
template <int ROWS, int STRIDE, int LENGTH>
__device__ __forceinline__ void load_along(u32* tile, const Matrix<LENGTH>& from, int row0,
                                           int column0) {
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

// A block's tile of D: WM x WN warps, each MT x 16 rows and NT x 8 columns. A lies in shared
// memory as [row][word] (ALONG) or [word][row]; strides keep the lanes in different banks.
template <int WM_, int MT_, int NT_, bool ALONG> struct Tile {
  static constexpr int WM = WM_, MT = MT_, NT = NT_, WN = WARPS / WM;
  static constexpr int ROWS = 16 * MT * WM, COLUMNS = 8 * NT * WN;
  static constexpr int A_STRIDE = ALONG ? stride(DEPTH, 4) : stride(ROWS, 8);
  static constexpr int A_WORDS = ALONG ? ROWS * A_STRIDE : DEPTH * A_STRIDE;
  static constexpr int B_STRIDE = stride(COLUMNS, 8);
  static constexpr int SHARED_WORDS = A_WORDS + DEPTH * B_STRIDE;

  float acc[MT][NT][4] = {};
  float row_sum[MT][2] = {};  // of A, over the contraction
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int row0 = threadIdx.x / 32 % WM * MT * 16, column0 = threadIdx.x / 32 / WM * NT * 8;

  __device__ __forceinline__ void add(const u32* a_tile, const u32* b_tile, int words) {
    constexpr int ROW = ALONG ? A_STRIDE : 1, WORD = ALONG ? 1 : A_STRIDE;
    const u32* const a_lane = a_tile + (row0 + g) * ROW + t * WORD;
    const u32* const b_lane = b_tile + t * B_STRIDE + column0 + g;
#pragma unroll 4
    for (int k = 0; k < words; k += 8) {
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
        for (int m = 0; m < MT; ++m) multiply(acc[m][n], a[m], b0, b1);
      }
    }
  }

  // rows, columns: of the whole D, which starts at `to` with rows of length I
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
          float* const at = to + (size_t)row * I + column;
          const float v0 = acc[m][n][2 * half], v1 = acc[m][n][2 * half + 1];
          if (I % 2 == 0) {
            if (column < I) *(float2*)at = make_float2(v0, v1);
          } else {
            if (column < I) at[0] = v0;
            if (column + 1 < I) at[1] = v1;
          }
        }
      }
  }
};

using WeightTile = Tile<DW_WM, DW_MT, DW_NT, false>;
using DataTile = Tile<DX_WM, DX_MT, DX_NT, true>;
constexpr int O_TILES = ceil_div(O, WeightTile::ROWS);
constexpr int WEIGHT_I_TILES = ceil_div(I, WeightTile::COLUMNS);
constexpr int DATA_I_TILES = ceil_div(I, DataTile::COLUMNS);
static_assert(4 * WeightTile::SHARED_WORDS <= SHARED && 4 * DataTile::SHARED_WORDS <= SHARED,
              "the host counts the same bytes");

// images: of a split. dweight (splits, O, I), dbias (splits, O) or null.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    linear_block_backward(const float* __restrict__ dy, const float* __restrict__ y,
                          const float* __restrict__ x, const float* __restrict__ weight,
                          float* __restrict__ dx, float* __restrict__ dweight,
                          float* __restrict__ dbias, int N, int dw_blocks, int images) {
  extern __shared__ uint4 shared[];
  wait_for_earlier_kernels();
  let_next_kernel_start();
  u32* const a = (u32*)shared;
  if (blockIdx.x < dw_blocks) {
    const int i_tile = blockIdx.x % WEIGHT_I_TILES, o_tile = blockIdx.x / WEIGHT_I_TILES % O_TILES;
    const int split = blockIdx.x / (WEIGHT_I_TILES * O_TILES);
    const int o0 = o_tile * WeightTile::ROWS, i0 = i_tile * WeightTile::COLUMNS;
    const int end = (split + 1) * images < N ? (split + 1) * images : N;
    const Matrix<O> dz = {dy, RELU ? y : nullptr, end};
    const Matrix<I> input = {x, nullptr, end};
    u32* const b = a + WeightTile::A_WORDS;
    WeightTile tile;
    for (int n = split * images; n < end; n += DEPTH * E) {
      __syncthreads();
      load_down<COPIED, WeightTile::COLUMNS, WeightTile::B_STRIDE>(b, input, n, i0);
      copy_commit();
      load_down<false, WeightTile::ROWS, WeightTile::A_STRIDE>(a, dz, n, o0);
      copy_wait<0>();
      __syncthreads();
      tile.add(a, b, DEPTH);
    }
    tile.store(dweight + (size_t)split * O * I, o0, O, i0);
    if (dbias && i_tile == 0 && tile.column0 == 0) {
#pragma unroll
      for (int m = 0; m < WeightTile::MT; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float v = tile.row_sum[m][half];
          v += __shfl_xor_sync(~0u, v, 1);
          v += __shfl_xor_sync(~0u, v, 2);
          const int o = o0 + tile.row0 + m * 16 + half * 8 + tile.g;
          if (tile.t == 0 && o < O) dbias[split * O + o] = v;
        }
    }
  } else {
    const int block = blockIdx.x - dw_blocks, i0 = block % DATA_I_TILES * DataTile::COLUMNS;
    const int n0 = block / DATA_I_TILES * DataTile::ROWS;
    const Matrix<O> dz = {dy, RELU ? y : nullptr, N};
    const Matrix<I> weights = {weight, nullptr, O};
    u32* const b = a + DataTile::A_WORDS;
    DataTile tile;
    for (int o = 0; o < O; o += DEPTH * E) {
      __syncthreads();
      load_down<COPIED, DataTile::COLUMNS, DataTile::B_STRIDE>(b, weights, o, i0);
      copy_commit();
      load_along<DataTile::ROWS, DataTile::A_STRIDE>(a, dz, n0, o);
      copy_wait<0>();
      __syncthreads();
      tile.add(a, b, DEPTH);
    }
    tile.store(dx, n0, N, i0);
  }
}
