// Layer normalisation of rows of F numbers.
//
//   forward   y = (x - mean) r weight + bias,  r = 1 / sqrt(variance + eps)
//             mean = sum x / F,  variance = sum (x - mean)^2 / F, of each row
//   backward  with u = (x - mean) r and g = dy weight:
//             dx = r (g - sum g / F - u sum (g u) / F), sums over the row
//             dbias = sum dy,  dweight = sum dy u, over the rows
//             see ops/reference_layer_norm.py
//
// Launch of the row kernels: blocks of full warps. _rows: one warp a row, as many warps
// as rows or more. _wide: one block a row, for F in the thousands.
#include "common.cuh"

template <class Group>
DEVICE void layer_norm_forward(float* __restrict__ y,              // (N, F)
                               float* __restrict__ mean,           // (N,)
                               float* __restrict__ variance,       // (N,)
                               const float* __restrict__ x,        // (N, F)
                               const float* __restrict__ weight,   // (F,) or null
                               const float* __restrict__ bias,     // (F,) or null
                               float eps, int N, int F) {
  const int64 n = Group::row();
  if (n >= N) return;  // the whole group leaves together
  x += n * F, y += n * F;
  float sum = 0.0f;
#pragma unroll 2
  for (int f = Group::rank(); f < F; f += Group::size()) sum += x[f];
  const float near = Group::template reduce<Sum>(sum) / (float)F;
  // the rounding of that mean is found with the squares, and taken out
  float rest = 0.0f, squares = 0.0f;
#pragma unroll 2
  for (int f = Group::rank(); f < F; f += Group::size()) {
    const float d = x[f] - near;
    rest += d;
    squares += d * d;
  }
  const float off = Group::template reduce<Sum>(rest) / (float)F;
  float spread = Group::template reduce<Sum>(squares) / (float)F - off * off;
  // never below 0 but by rounding; NaN stays NaN
  spread = spread < 0.0f ? 0.0f : spread;
  const float middle = near + off, r = 1.0f / sqrtf(spread + eps);
  if (Group::rank() == 0) {
    mean[n] = middle;
    variance[n] = spread;
  }
#pragma unroll 2
  for (int f = Group::rank(); f < F; f += Group::size()) {
    const float u = (x[f] - middle) * r;
    const float scaled = weight == nullptr ? u : u * weight[f];
    y[f] = bias == nullptr ? scaled : scaled + bias[f];
  }
}

template <class Group>
DEVICE void layer_norm_gradient(float* __restrict__ dx,               // (N, F)
                                const float* __restrict__ dy,         // (N, F)
                                const float* __restrict__ x,          // (N, F)
                                const float* __restrict__ weight,     // (F,) or null
                                const float* __restrict__ mean,       // (N,)
                                const float* __restrict__ variance,   // (N,)
                                float eps, int N, int F) {
  const int64 n = Group::row();
  if (n >= N) return;
  dx += n * F, dy += n * F, x += n * F;
  const float middle = mean[n], r = 1.0f / sqrtf(variance[n] + eps);
  float plain = 0.0f, moment = 0.0f;
#pragma unroll 2
  for (int f = Group::rank(); f < F; f += Group::size()) {
    const float g = weight == nullptr ? dy[f] : dy[f] * weight[f];
    plain += g;
    moment += g * ((x[f] - middle) * r);
  }
  plain = Group::template reduce<Sum>(plain) / (float)F;
  moment = Group::template reduce<Sum>(moment) / (float)F;
#pragma unroll 2
  for (int f = Group::rank(); f < F; f += Group::size()) {
    const float g = weight == nullptr ? dy[f] : dy[f] * weight[f];
    dx[f] = r * (g - plain - (x[f] - middle) * r * moment);
  }
}

extern "C" __global__ void layer_norm_forward_rows(float* y, float* mean,
                                                   float* variance, const float* x,
                                                   const float* weight,
                                                   const float* bias, float eps, int N,
                                                   int F) {
  layer_norm_forward<WarpGroup>(y, mean, variance, x, weight, bias, eps, N, F);
}

extern "C" __global__ void layer_norm_forward_wide(float* y, float* mean,
                                                   float* variance, const float* x,
                                                   const float* weight,
                                                   const float* bias, float eps, int N,
                                                   int F) {
  layer_norm_forward<BlockGroup>(y, mean, variance, x, weight, bias, eps, N, F);
}

extern "C" __global__ void layer_norm_gradient_rows(float* dx, const float* dy,
                                                    const float* x, const float* weight,
                                                    const float* mean,
                                                    const float* variance, float eps,
                                                    int N, int F) {
  layer_norm_gradient<WarpGroup>(dx, dy, x, weight, mean, variance, eps, N, F);
}

extern "C" __global__ void layer_norm_gradient_wide(float* dx, const float* dy,
                                                    const float* x, const float* weight,
                                                    const float* mean,
                                                    const float* variance, float eps,
                                                    int N, int F) {
  layer_norm_gradient<BlockGroup>(dx, dy, x, weight, mean, variance, eps, N, F);
}

constexpr int COLUMNS = 32;  // of a block of layer_norm_columns
constexpr int LANES = 8;     // threads that share a column

DEVICE void write(float* target, int f, float value, int accumulate) {
  if (target != nullptr) target[f] = accumulate ? target[f] + value : value;
}

// dbias and dweight, or, of several parts of the rows, the parts.
// Launch: grid (ceil(F / 32), parts), block (32, 8).
extern "C" __global__ void layer_norm_columns(
    float* __restrict__ parts,            // (2, gridDim.y, F), or null if there is one
    float* __restrict__ dweight,          // (F,) or null
    float* __restrict__ dbias,            // (F,) or null
    const float* __restrict__ dy,         // (N, F)
    const float* __restrict__ x,          // (N, F)
    const float* __restrict__ mean,       // (N,)
    const float* __restrict__ variance,   // (N,)
    float eps, int N, int F, int rows_a_part, int accumulate) {
  __shared__ float plains[LANES][COLUMNS], moments[LANES][COLUMNS];
  const int f = blockIdx.x * COLUMNS + threadIdx.x;
  const int64 first = (int64)blockIdx.y * rows_a_part;
  const int64 end = min((int64)N, first + rows_a_part);
  float plain = 0.0f, moment = 0.0f;
  if (f < F) {
#pragma unroll 1
    for (int64 n = first + threadIdx.y; n < end; n += LANES) {
      const float d = dy[n * F + f], r = 1.0f / sqrtf(variance[n] + eps);
      plain += d;
      moment += d * ((x[n * F + f] - mean[n]) * r);
    }
  }
  plains[threadIdx.y][threadIdx.x] = plain;
  moments[threadIdx.y][threadIdx.x] = moment;
  __syncthreads();
  if (threadIdx.y > 0 || f >= F) return;
#pragma unroll
  for (int lane = 1; lane < LANES; ++lane) {
    plain += plains[lane][threadIdx.x];
    moment += moments[lane][threadIdx.x];
  }
  if (parts == nullptr) {
    write(dbias, f, plain, accumulate);
    write(dweight, f, moment, accumulate);
  } else {
    parts[(int64)blockIdx.y * F + f] = plain;
    parts[((int64)gridDim.y + blockIdx.y) * F + f] = moment;
  }
}

// Launch: one thread a column, as many as columns or more.
extern "C" __global__ void layer_norm_join_columns(
    float* __restrict__ dweight,       // (F,) or null
    float* __restrict__ dbias,         // (F,) or null
    const float* __restrict__ parts,   // (2, count, F)
    int count, int F, int accumulate) {
  const int f = blockIdx.x * blockDim.x + threadIdx.x;
  if (f >= F) return;
  float plain = 0.0f, moment = 0.0f;
#pragma unroll 4
  for (int i = 0; i < count; ++i) {
    plain += parts[(int64)i * F + f];
    moment += parts[((int64)count + i) * F + f];
  }
  write(dbias, f, plain, accumulate);
  write(dweight, f, moment, accumulate);
}
