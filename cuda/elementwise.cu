// One output element for one input element: fill, copy, add, ReLU, sigmoid.
//
// Launch: any one-dimensional grid and block; the loops stride over the grid. n >= 0
// elements. Four elements go in one 16-byte access where all addresses allow it.
#include "map.cuh"

extern "C" __global__ void fill_float32(float* x, float value, int64 n) {
#pragma unroll 1
  for (int64 i = grid_thread(); i < n; i += grid_threads()) x[i] = value;
}

extern "C" __global__ void fill_int32(int* x, int value, int64 n) {
#pragma unroll 1
  for (int64 i = grid_thread(); i < n; i += grid_threads()) x[i] = value;
}

extern "C" __global__ void fill_uint8(uint8* x, int value, int64 n) {
#pragma unroll 1
  for (int64 i = grid_thread(); i < n; i += grid_threads()) x[i] = (uint8)value;
}

// out = x, bit for bit; out may be pinned memory of the host
extern "C" __global__ void copy(float* out, const float* x, int64 n) {
  map(out, x, n, [](float a) { return a; });
}

// out = x + y; out may be x or y
extern "C" __global__ void add(float* out, const float* x, const float* y, int64 n) {
  map(out, x, y, n, [](float a, float b) { return a + b; });
}

// out = max(x + y, 0), of a residual block; out may be x or y
extern "C" __global__ void add_relu(float* out, const float* x, const float* y,
                                    int64 n) {
  map(out, x, y, n, [](float a, float b) {
    const float sum = a + b;
    return sum <= 0.0f ? 0.0f : sum;
  });
}

// y = max(x, 0). Written so that NaN stays NaN and -0 becomes 0.
extern "C" __global__ void relu_forward(float* y, const float* x, int64 n) {
  map(y, x, n, [](float v) { return v <= 0.0f ? 0.0f : v; });
}

// dx = dy where x > 0, which is where y > 0; the subgradient at 0 is 0.
extern "C" __global__ void relu_backward(float* dx, const float* dy, const float* y,
                                         int64 n) {
  map(dx, dy, y, n, [](float d, float v) { return v > 0.0f ? d : 0.0f; });
}

// y = 1 / (1 + e^-x). Of e^-x and e^x only the one that cannot overflow is used:
// y = 1 / (1 + e^-|x|) for x >= 0, and 1 - that = e^-|x| / (1 + e^-|x|) below.
extern "C" __global__ void sigmoid_forward(float* y, const float* x, int64 n) {
  map(y, x, n, [](float v) {
    const float e = expf(-fabsf(v));
    return (v >= 0.0f ? 1.0f : e) / (1.0f + e);
  });
}

// dy/dx = e^-x / (1 + e^-x)^2 = y (1 - y)
extern "C" __global__ void sigmoid_backward(float* dx, const float* dy, const float* y,
                                            int64 n) {
  map(dx, dy, y, n, [](float d, float v) { return d * v * (1.0f - v); });
}
