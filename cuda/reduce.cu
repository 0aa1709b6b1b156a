// Sums for the gradients of biases. A bias is added to many outputs, so its gradient
// is the sum of theirs: of a linear layer over the batch, of a convolution over batch
// and pixels. Long sums go in two stages, partial sums and then their sum, both in
// fixed order.
#include "common.cuh"

constexpr int SUM_COLUMNS = 32;  // columns of a block of sum_rows
constexpr int SUM_LANES = 8;     // threads that share a column

// out[b, col] = sum of x[row, col] over the rows of block row b, or += for accumulate.
// Launch: grid (ceil(columns / 32), ceil(rows / rows_a_block)), block (32, 8).
extern "C" __global__ void sum_rows(
    float* __restrict__ out,      // (gridDim.y, columns)
    const float* __restrict__ x,  // (rows, columns)
    int rows, int columns, int rows_a_block, int accumulate) {
  __shared__ float partial[SUM_LANES][SUM_COLUMNS];
  const int column = blockIdx.x * SUM_COLUMNS + threadIdx.x;
  const int64 first = (int64)blockIdx.y * rows_a_block;
  const int64 end = min((int64)rows, first + rows_a_block);
  float sum = 0.0f;
  if (column < columns)
    for (int64 row = first + threadIdx.y; row < end; row += SUM_LANES)
      sum += x[row * columns + column];
  partial[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && column < columns) {
    for (int lane = 1; lane < SUM_LANES; ++lane) sum += partial[lane][threadIdx.x];
    float* target = out + (int64)blockIdx.y * columns + column;
    *target = accumulate ? *target + sum : sum;
  }
}

// out[b, k] = sum of dy[n, k, pq] over the images n of block row b and all pixels, or
// += for accumulate. Launch: grid (K, ceil(N / images_a_block)), blocks of full warps.
extern "C" __global__ void sum_channels(
    float* __restrict__ out,        // (gridDim.y, K)
    const float* __restrict__ dy,   // (N, K, PQ)
    int N, int K, int PQ, int images_a_block, int accumulate) {
  const int k = blockIdx.x;
  const int first = blockIdx.y * images_a_block;
  const int count = min(images_a_block, N - first) * PQ;
  dy += ((int64)first * K + k) * PQ;
  float sum = 0.0f;
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int n = i / PQ;
    sum += dy[(int64)n * K * PQ + (i - n * PQ)];
  }
  sum = block_reduce<Sum>(sum);
  if (threadIdx.x == 0) {
    float* target = out + (int64)blockIdx.y * K + k;
    *target = accumulate ? *target + sum : sum;
  }
}
