// Numbers that only change their place: parts of rows, for joining channels and taking
// them apart, and images in a larger or smaller frame.
//
//   concat      y[n, C_0 + ... + C_(i-1) + c, ...] = x_i[n, c, ...], and dx_i is cut
//               out of dy at the same place. An image's channels lie one behind the
//               other, so a part of them is one run of numbers of the image's row.
//   zero pad    y[n,c,h,w] = x[n, c, h - top, w - left] or 0, and dx the same of dy
//               with -top, -left, where nothing falls outside.
#include "common.cuh"

// target[n, target_at + i] = source[n, source_at + i] for i < count.
// Launch: grid (blocks over a quarter of count or fewer, rows or fewer).
extern "C" __global__ void copy_rows(
    float* __restrict__ target,        // (N, target_row)
    const float* __restrict__ source,  // (N, source_row)
    int64 N, int64 count, int64 target_row, int64 target_at, int64 source_row,
    int64 source_at) {
  const int64 first = grid_thread(), step = grid_threads();
#pragma unroll 1
  for (int64 n = blockIdx.y; n < N; n += gridDim.y) {
    float* to = target + n * target_row + target_at;
    const float* from = source + n * source_row + source_at;
    int64 done = 0;
    if (aligned16(to) && aligned16(from)) {
      done = count & ~3ll;
#pragma unroll 1
      for (int64 i = first; i < count / 4; i += step)
        ((float4*)to)[i] = ((const float4*)from)[i];
    }
#pragma unroll 1
    for (int64 i = done + first; i < count; i += step) to[i] = from[i];
  }
}

// target[plane, h, w] = source[plane, h - top, w - left], 0 outside of the source.
// Launch: grid (blocks over a plane, planes or fewer), one-dimensional blocks.
extern "C" __global__ void place(float* __restrict__ target,        // (planes, H, W)
                                 const float* __restrict__ source,  // (planes, SH, SW)
                                 int64 planes, int H, int W, int SH, int SW, int top,
                                 int left) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= H * W) return;
  const int h = i / W - top, w = i % W - left;
  const bool inside = 0 <= h && h < SH && 0 <= w && w < SW;
#pragma unroll 1
  for (int64 plane = blockIdx.y; plane < planes; plane += gridDim.y)
    target[plane * H * W + i] =
        inside ? source[plane * SH * SW + (int64)h * SW + w] : 0.0f;
}
