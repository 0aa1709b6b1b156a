// Backward of the fused block  y = relu(x weight^T + bias), or without relu.
//
// I and O are compile-time constants, the batch N is not:
//   x, dx (N, I)   weight, dweight (O, I)   y, dy, dz (N, O)   bias, dbias (O)
//   z[n,o] = bias[o] + sum_i x[n,i] weight[o,i]
//   dz = dy where relu let y through (y > 0), else 0
//   dx[n,i] = sum_o dz[n,o] weight[o,i]
//   dweight[o,i] = sum_n dz[n,o] x[n,i]      dbias[o] = sum_n dz[n,o]
// Both products are D (rows x columns i) = sum over a contraction of A and B, with B's
// rows as they lie in memory (weight[o], x[n]). The rows of D are images in the first
// and outputs o in the second. Operands are words along the contraction (fused.cuh).
//
// dweight may be split over the batch: each split writes a partial gradient, and
// update.cu adds them in order.
//
// Launch: 256 threads, SHARED bytes; blocks 0 .. dw_blocks-1 work on dweight (i tile
// fastest, then o tile, then split), the others on dx (i tile fastest, then images).
// Compute capability 8.0 and up.
#include "linear_backward.cuh"

constexpr int DEPTH = WORDS;  // words of the contraction a stage holds

using WeightTile = Tile<DW_WM, DW_MT, DW_NT, DEPTH, false>;
using DataTile = Tile<DX_WM, DX_MT, DX_NT, DEPTH, true>;
constexpr int O_TILES = ceil_div(O, WeightTile::ROWS);
constexpr int WEIGHT_I_TILES = ceil_div(I, WeightTile::COLUMNS);
constexpr int DATA_I_TILES = ceil_div(I, DataTile::COLUMNS);
static_assert(4 * WeightTile::SHARED_WORDS <= SHARED &&
                  4 * DataTile::SHARED_WORDS <= SHARED,
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
    const int i_tile = blockIdx.x % WEIGHT_I_TILES,
              o_tile = blockIdx.x / WEIGHT_I_TILES % O_TILES;
    const int split = blockIdx.x / (WEIGHT_I_TILES * O_TILES);
    const int o0 = o_tile * WeightTile::ROWS, i0 = i_tile * WeightTile::COLUMNS;
    const int end = (split + 1) * images < N ? (split + 1) * images : N;
    const Matrix<O> dz = {dy, RELU ? y : nullptr, end};
    const Matrix<I> input = {x, nullptr, end};
    u32* const b = a + WeightTile::A_WORDS;
    WeightTile tile;
    for (int n = split * images; n < end; n += DEPTH * E) {
      __syncthreads();
      load_down<COPIED, DEPTH, WeightTile::COLUMNS, WeightTile::B_STRIDE>(b, input, n,
                                                                          i0);
      copy_commit();
      load_down<false, DEPTH, WeightTile::ROWS, WeightTile::A_STRIDE>(a, dz, n, o0);
      copy_wait<0>();
      __syncthreads();
      tile.add(a, b);
    }
    tile.store<I>(dweight + (size_t)split * O * I, o0, O, i0);
    if (dbias && i_tile == 0) tile.store_row_sums(dbias + (size_t)split * O, o0, O);
  } else {
    const int block = blockIdx.x - dw_blocks,
              i0 = block % DATA_I_TILES * DataTile::COLUMNS;
    const int n0 = block / DATA_I_TILES * DataTile::ROWS;
    const Matrix<O> dz = {dy, RELU ? y : nullptr, N};
    const Matrix<I> weights = {weight, nullptr, O};
    u32* const b = a + DataTile::A_WORDS;
    DataTile tile;
    for (int o = 0; o < O; o += DEPTH * E) {
      __syncthreads();
      load_down<COPIED, DEPTH, DataTile::COLUMNS, DataTile::B_STRIDE>(b, weights, o,
                                                                      i0);
      copy_commit();
      load_along<DataTile::ROWS, DEPTH, DataTile::A_STRIDE>(a, dz, n0, o);
      copy_wait<0>();
      __syncthreads();
      tile.add(a, b);
    }
    tile.store<I>(dx, n0, N, i0);
  }
}
