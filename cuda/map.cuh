// One output element for one or two input elements, four in one 16-byte access where
// all addresses allow it. Launch: any one-dimensional grid and block.
#pragma once

#include "common.cuh"

// y[i] = f(a[i]) for i < n
template <class F>
DEVICE void map(float* y, const float* a, int64 n, F f) {
  const int64 first = grid_thread(), step = grid_threads();
  int64 done = 0;
  if (aligned16(y) && aligned16(a)) {
    done = n & ~3ll;
#pragma unroll 1
    for (int64 i = first; i < n / 4; i += step) {
      const float4 v = ((const float4*)a)[i];
      ((float4*)y)[i] = make_float4(f(v.x), f(v.y), f(v.z), f(v.w));
    }
  }
#pragma unroll 1
  for (int64 i = done + first; i < n; i += step) y[i] = f(a[i]);
}

// y[i] = f(a[i], b[i]) for i < n
template <class F>
DEVICE void map(float* y, const float* a, const float* b, int64 n, F f) {
  const int64 first = grid_thread(), step = grid_threads();
  int64 done = 0;
  if (aligned16(y) && aligned16(a) && aligned16(b)) {
    done = n & ~3ll;
#pragma unroll 1
    for (int64 i = first; i < n / 4; i += step) {
      const float4 v = ((const float4*)a)[i], w = ((const float4*)b)[i];
      ((float4*)y)[i] =
          make_float4(f(v.x, w.x), f(v.y, w.y), f(v.z, w.z), f(v.w, w.w));
    }
  }
#pragma unroll 1
  for (int64 i = done + first; i < n; i += step) y[i] = f(a[i], b[i]);
}
