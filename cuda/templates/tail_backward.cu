// Backward of the last two layers of a network, in one launch:
//   hidden = relu(x weight^T + bias)      logits = hidden weight_out^T + bias_out
//
// I, H and O are compile-time constants, the batch N is not:
//   x, dx (N, I)   weight, dweight (H, I)   dbias (H)   hidden, dz (N, H)
//   dlogits (N, O)   weight_out, dweight_out (O, H)   dbias_out (O)
// With dz the gradient at the input of the relu,
//   dz[n,h] = sum_o dlogits[n,o] weight_out[o,h] where hidden[n,h] > 0, else 0
//   dx[n,i] = sum_h dz[n,h] weight[h,i]
//   dweight[h,i] = sum_n dz[n,h] x[n,i]               dbias[h] = sum_n dz[n,h]
//   dweight_out[o,h] = sum_n dlogits[n,o] hidden[n,h]
//   dbias_out[o] = sum_n dlogits[n,o]
// With INPUT_RELU, x itself is what a relu let through, and dx is 0 where x is not
// positive: the layer before need not look at x again.
//
// Layer by layer, the second launch would wait for dz. But O is small: a number of dz
// is O multiplications away from dlogits, so each block makes the dz that it needs, and
// all blocks run at once, three kinds of them:
//   data    ROWS images, COLUMNS inputs of dx; contraction over all H at once
//   weight  a tile of dweight; contraction over the images of a split
//   out     all o, a tile of h of dweight_out; contraction over the images of a split
// The contractions, that of dz too, run on tensor cores (linear_backward.cuh). Splits
// of the batch write partial gradients, and update.cu adds them in order.
//
// SETTLED: weight and weight_out were complete before the kernel ahead of this one
// started, so they are fetched while that one still runs. X_SETTLED: so was x, if they
// were.
//
// Launch: 256 threads, SHARED bytes; data_blocks blocks on dx (i tile fastest, then
// images), weight_blocks on dweight (i tile fastest, then h tile, then split), the
// others on dweight_out (h tile fastest, then split). Compute capability 8.0 and up.
#include "linear_backward.cuh"

constexpr int DEPTH = WORDS;  // words of images in a stage of the weight gradients
constexpr bool X_AHEAD = SETTLED && X_SETTLED, X_BEHIND = SETTLED && !X_SETTLED;
constexpr int H_WORDS = round_up(ceil_div(H, E), 8);

using DataTile = Tile<DX_WM, DX_MT, DX_NT, H_WORDS, true>;
using WeightTile = Tile<DW_WM, DW_MT, DW_NT, DEPTH, false>;
using OutTile = Tile<1, ceil_div(O, 16), 1, DEPTH, false>;
constexpr int DATA_I_TILES = ceil_div(I, DataTile::COLUMNS);
constexpr int WEIGHT_I_TILES = ceil_div(I, WeightTile::COLUMNS);
constexpr int H_TILES = ceil_div(H, WeightTile::ROWS);
constexpr int OUT_H_TILES = ceil_div(H, OutTile::COLUMNS);
static_assert(4 * DataTile::SHARED_WORDS <= SHARED &&
                  4 * WeightTile::SHARED_WORDS <= SHARED &&
                  4 * OutTile::SHARED_WORDS <= SHARED,
              "the host counts the same bytes");

// dz of ROWS images and COLUMNS hidden units: a product of dlogits and weight_out with
// images as rows, whose operands go from global memory into registers. With PAIRED
// images 2g and 2g+1 are a lane's two rows, otherwise g and g+8.
template <int ROWS, int COLUMNS, bool PAIRED>
struct HiddenGradient {
  static constexpr int WM = ROWS / 16, WN = WARPS / WM;
  static constexpr int NT = ceil_div(COLUMNS, 8 * WN), STEPS = ceil_div(O, 8 * E);
  static_assert(ROWS % 16 == 0 && WARPS % WM == 0, "a row of tiles for each warp");
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int row0 = threadIdx.x / 32 % WM * 16 + (PAIRED ? 2 * g : g);
  const int row1 = row0 + (PAIRED ? 1 : 8);
  const int column0 = threadIdx.x / 32 / WM * NT * 8;
  u32 b[STEPS][NT][2];

  // a word of numbers o, o + stride
  template <bool FRESH>
  static __device__ __forceinline__ u32 word(const float* from, int o, int stride,
                                             bool inside) {
    const float low = inside && o < O ? load<FRESH>(from + o * stride) : 0.0f;
    if (E == 1) return operand(low);
    const bool both = inside && o + 1 < O;
    return pack_bf16(low, both ? load<FRESH>(from + (o + 1) * stride) : 0.0f);
  }

  __device__ __forceinline__ void load_weights(const float* __restrict__ weight_out,
                                               int h0) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int h = h0 + column0 + n * 8 + g;
          b[step][n][i] =
              word<false>(weight_out + h, (step * 8 + t + 4 * i) * E, H, h < H);
        }
  }

  // put(row0, row1, column, dz of row0 at column and column + 1, the same of row1), for
  // images n0 .. end-1 and zeros beyond
  template <class Put>
  __device__ __forceinline__ void make(const float* __restrict__ dlogits,
                                       const float* __restrict__ hidden, int n0,
                                       int end, int h0, const Put& put) const {
    const int n[2] = {n0 + row0, n0 + row1};
    Rows a[STEPS];
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      u32 words[2][2];
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          words[i][half] = word<true>(dlogits + (size_t)n[half] * O,
                                      (step * 8 + t + 4 * i) * E, 1, n[half] < end);
      a[step].set(words[0][0], words[0][1], words[1][0], words[1][1]);
    }
    float y[NT][4];
#pragma unroll
    for (int tile = 0; tile < NT; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int h = h0 + column0 + tile * 8 + 2 * t;
        const float* const from = hidden + (size_t)n[half] * H + h;
        float pair[2] = {};
        if (H % 2 == 0) {
          if (n[half] < end && h < H) load_run<true>(pair, from);
        } else {
          if (n[half] < end && h < H) pair[0] = load_fresh(from);
          if (n[half] < end && h + 1 < H) pair[1] = load_fresh(from + 1);
        }
        y[tile][2 * half] = pair[0], y[tile][2 * half + 1] = pair[1];
      }
#pragma unroll
    for (int tile = 0; tile < NT; ++tile) {
      float dz[4] = {};
#pragma unroll
      for (int step = 0; step < STEPS; ++step)
        multiply(dz, a[step], b[step][tile][0], b[step][tile][1]);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (!(y[tile][i] > 0.0f)) dz[i] = 0.0f;
      put(row0, row1, column0 + tile * 8 + 2 * t, dz);
    }
  }
};

__device__ __forceinline__ void data_block(int block, float* shared,
                                           const float* __restrict__ dlogits,
                                           const float* __restrict__ hidden,
                                           const float* __restrict__ x,
                                           const float* __restrict__ weight,
                                           const float* __restrict__ weight_out,
                                           float* __restrict__ dx, int N) {
  const int i0 = block % DATA_I_TILES * DataTile::COLUMNS;
  const int n0 = block / DATA_I_TILES * DataTile::ROWS;
  u32* const a = (u32*)shared;
  u32* const b = a + DataTile::A_WORDS;
  DataTile tile;
  load_down<COPIED, H_WORDS, DataTile::COLUMNS, DataTile::B_STRIDE>(
      b, Matrix<I>{weight, nullptr, H}, 0, i0);
  copy_commit();
  HiddenGradient<DataTile::ROWS, H_WORDS * E, false> dz;
  dz.load_weights(weight_out, 0);
  if (X_BEHIND) wait_for_earlier_kernels();
  float gate[DataTile::MT][DataTile::NT][4];
  if (INPUT_RELU) {
#pragma unroll
    for (int m = 0; m < DataTile::MT; ++m)
#pragma unroll
      for (int n = 0; n < DataTile::NT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = n0 + tile.row0 + m * 16 + i / 2 * 8 + tile.g;
          const int column = i0 + tile.column0 + n * 8 + 2 * tile.t + i % 2;
          const bool inside = row < N && column < I;
          const float* const from = x + (size_t)row * I + column;
          gate[m][n][i] = inside ? load<!X_AHEAD>(from) : 0.0f;
        }
  }
  if (X_AHEAD) wait_for_earlier_kernels();
  let_next_kernel_start();
  dz.make(dlogits, hidden, n0, N, 0,
          [&](int row0, int row1, int h, const float (&v)[4]) {
            if (h >= H_WORDS * E) return;
            u32* const to0 = a + row0 * DataTile::A_STRIDE + h / E;
            u32* const to1 = a + row1 * DataTile::A_STRIDE + h / E;
            if (E == 2) {
              *to0 = pack_bf16(v[0], v[1]), *to1 = pack_bf16(v[2], v[3]);
            } else {
              *(uint2*)to0 = make_uint2(operand(v[0]), operand(v[1]));
              *(uint2*)to1 = make_uint2(operand(v[2]), operand(v[3]));
            }
          });
  copy_wait<0>();
  __syncthreads();
  tile.add(a, b);
  if (INPUT_RELU) {
#pragma unroll
    for (int m = 0; m < DataTile::MT; ++m)
#pragma unroll
      for (int n = 0; n < DataTile::NT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (!(gate[m][n][i] > 0.0f)) tile.acc[m][n][i] = 0.0f;
  }
  tile.store<I>(dx, n0, N, i0);
}

__device__ __forceinline__ void weight_block(
    int block, float* shared, const float* __restrict__ dlogits,
    const float* __restrict__ hidden, const float* __restrict__ x,
    const float* __restrict__ weight_out, float* __restrict__ dweight,
    float* __restrict__ dbias, int N, int images) {
  const int i_tile = block % WEIGHT_I_TILES, h_tile = block / WEIGHT_I_TILES % H_TILES;
  const int split = block / (WEIGHT_I_TILES * H_TILES);
  const int h0 = h_tile * WeightTile::ROWS, i0 = i_tile * WeightTile::COLUMNS;
  const int begin = split * images, end = least(begin + images, N);
  u32* const a = (u32*)shared;
  u32* const b = a + WeightTile::A_WORDS;
  WeightTile tile;
  HiddenGradient<DEPTH * E, WeightTile::ROWS, E == 2> dz;
  dz.load_weights(weight_out, h0);
  for (int n0 = begin; n0 < end; n0 += DEPTH * E) {
    __syncthreads();
    if (X_BEHIND && n0 == begin) wait_for_earlier_kernels();
    load_down<COPIED, DEPTH, WeightTile::COLUMNS, WeightTile::B_STRIDE>(
        b, Matrix<I>{x, nullptr, end}, n0, i0);
    copy_commit();
    if (n0 == begin) {
      if (X_AHEAD) wait_for_earlier_kernels();
      let_next_kernel_start();
    }
    dz.make(dlogits, hidden, n0, end, h0,
            [&](int row0, int row1, int h, const float (&v)[4]) {
              if (h >= WeightTile::ROWS) return;
              u32* const to0 = a + row0 / E * WeightTile::A_STRIDE + h;
              u32* const to1 = a + row1 * WeightTile::A_STRIDE + h;
              if (E == 2) {
                *(uint2*)to0 = make_uint2(pack_bf16(v[0], v[2]), pack_bf16(v[1], v[3]));
              } else {
                *(uint2*)to0 = make_uint2(operand(v[0]), operand(v[1]));
                *(uint2*)to1 = make_uint2(operand(v[2]), operand(v[3]));
              }
            });
    copy_wait<0>();
    __syncthreads();
    tile.add(a, b);
  }
  tile.store<I>(dweight + (size_t)split * H * I, h0, H, i0);
  if (dbias && i_tile == 0) tile.store_row_sums(dbias + (size_t)split * H, h0, H);
}

__device__ __forceinline__ void out_block(int block, float* shared,
                                          const float* __restrict__ dlogits,
                                          const float* __restrict__ hidden,
                                          float* __restrict__ dweight_out,
                                          float* __restrict__ dbias_out, int N,
                                          int images) {
  const int h0 = block % OUT_H_TILES * OutTile::COLUMNS, split = block / OUT_H_TILES;
  const int begin = split * images, end = least(begin + images, N);
  u32* const a = (u32*)shared;
  u32* const b = a + OutTile::A_WORDS;
  if (SETTLED) wait_for_earlier_kernels();
  let_next_kernel_start();
  OutTile tile;
  for (int n0 = begin; n0 < end; n0 += DEPTH * E) {
    __syncthreads();
    load_down<COPIED, DEPTH, OutTile::COLUMNS, OutTile::B_STRIDE>(
        b, Matrix<H>{hidden, nullptr, end}, n0, h0);
    copy_commit();
    load_down<false, DEPTH, OutTile::ROWS, OutTile::A_STRIDE>(
        a, Matrix<O>{dlogits, nullptr, end}, n0, 0);
    copy_wait<0>();
    __syncthreads();
    tile.add(a, b);
  }
  tile.store<H>(dweight_out + (size_t)split * O * H, 0, O, h0);
  if (dbias_out && h0 == 0) tile.store_row_sums(dbias_out + (size_t)split * O, 0, O);
}

// images: of a split. dweight (splits, H, I), dbias (splits, H) or null, dweight_out
// (splits, O, H), dbias_out (splits, O) or null.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    tail_backward(const float* __restrict__ dlogits, const float* __restrict__ hidden,
                  const float* __restrict__ x, const float* __restrict__ weight,
                  const float* __restrict__ weight_out, float* __restrict__ dx,
                  float* __restrict__ dweight, float* __restrict__ dbias,
                  float* __restrict__ dweight_out, float* __restrict__ dbias_out, int N,
                  int data_blocks, int weight_blocks, int images) {
  extern __shared__ uint4 memory[];
  float* const shared = (float*)memory;
  if (!SETTLED) wait_for_earlier_kernels();
  int block = blockIdx.x;
  if (block < data_blocks) {
    data_block(block, shared, dlogits, hidden, x, weight, weight_out, dx, N);
    return;
  }
  block -= data_blocks;
  if (block < weight_blocks) {
    weight_block(block, shared, dlogits, hidden, x, weight_out, dweight, dbias, N,
                 images);
    return;
  }
  out_block(block - weight_blocks, shared, dlogits, hidden, dweight_out, dbias_out, N,
            images);
}
