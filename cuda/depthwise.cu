// Depth-wise convolution: each channel c by filters of its own, k = c * each and the
// `each` - 1 behind it.
//
//   y[n,k,p,q] = bias[k] + sum over r, s of weight[k,r,s] *
//                x[n, k / each, p*stride_h - pad_h + r*dilation_h,
//                               q*stride_w - pad_w + s*dilation_w]
//
// with zeros outside of the image. Collecting the terms in which each number occurs:
//
//   dx[n,c,h,w]   = sum over k of channel c and r, s of weight[k,r,s] * dy[n,k,p,q]
//                   where p*stride_h + r*dilation_h = h + pad_h, and likewise for q
//   dweight[k,r,s] = sum over n, p, q of dy[n,k,p,q] * x[n, k / each, ...as above]
//
// As a matrix product (gemm.cu) it would have one row for each channel, so that 63 of
// the 64 rows of a tile were idle. It moves more than it computes: each number of x is
// loaded R S times, out of the cache, and that takes as long as memory takes to deliver
// it once. So one thread makes four outputs, one above the other, and loads a row of
// taps once for all that need it.
//
// The names end in the side of the filter and the stride that a kernel is for, 3 or 5
// and 1 or 2, without dilation; "any" takes the rest, one output a thread. All compute
// in float32 in every precision: tensor cores have nothing to do here.
//
// Launch: one-dimensional blocks; grid as stated at each kernel.
#include "common.cuh"

constexpr int ROWS = 4;  // outputs of a thread, also in ops/cuda_depthwise.py

// y, a thread for ROWS of its rows; SIZE 0: for any filter, one row.
template <int SIZE, int STEP>
DEVICE void forward(float* __restrict__ y,             // (N, C * each, P, Q)
                    const float* __restrict__ x,       // (N, C, H, W)
                    const float* __restrict__ weight,  // (C * each, 1, R, S)
                    const float* __restrict__ bias,    // (C * each,) or null
                    int N, int C, int each, int H, int W, int R, int S, int P, int Q,
                    int stride_h, int stride_w, int pad_h, int pad_w, int dilation_h,
                    int dilation_w) {
  constexpr int rows = SIZE ? ROWS : 1;
  const int K = C * each, tiles = (P + rows - 1) / rows;
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= K * tiles * Q) return;
  const int q = i % Q, p0 = i / Q % tiles * rows, k = i / Q / tiles;
  const float start = bias ? bias[k] : 0.0f;
  if constexpr (SIZE == 0) {
    const float* filter = weight + (int64)k * R * S;
    const int h0 = p0 * stride_h - pad_h, w0 = q * stride_w - pad_w;
#pragma unroll 1
    for (int n = blockIdx.y; n < N; n += gridDim.y) {
      const float* plane = x + ((int64)n * C + k / each) * H * W;
      float sum = start;
#pragma unroll 1
      for (int r = 0; r < R; ++r) {
        const int h = h0 + r * dilation_h;
#pragma unroll 1
        for (int s = 0; s < S; ++s) {
          const int w = w0 + s * dilation_w;
          const bool inside = 0 <= h && h < H && 0 <= w && w < W;
          sum += filter[r * S + s] * (inside ? plane[h * W + w] : 0.0f);
        }
      }
      y[((int64)n * K + k) * P * Q + p0 * Q + q] = sum;
    }
  } else {
    float filter[SIZE * SIZE];
#pragma unroll
    for (int j = 0; j < SIZE * SIZE; ++j)
      filter[j] = weight[(int64)k * SIZE * SIZE + j];
    const int h0 = p0 * STEP - pad_h, w0 = q * STEP - pad_w;
#pragma unroll 1
    for (int n = blockIdx.y; n < N; n += gridDim.y) {
      const float* plane = x + ((int64)n * C + k / each) * H * W;
      float sum[ROWS];
#pragma unroll
      for (int t = 0; t < ROWS; ++t) sum[t] = start;
#pragma unroll
      for (int j = 0; j < (ROWS - 1) * STEP + SIZE; ++j) {
        const int h = h0 + j;
        const bool row_inside = 0 <= h && h < H;
#pragma unroll
        for (int s = 0; s < SIZE; ++s) {
          const int w = w0 + s;
          const bool inside = row_inside && 0 <= w && w < W;
          const float v = inside ? plane[h * W + w] : 0.0f;
#pragma unroll
          for (int t = 0; t < ROWS; ++t) {
            const int r = j - t * STEP;
            if (0 <= r && r < SIZE) sum[t] += filter[r * SIZE + s] * v;
          }
        }
      }
      float* out = y + ((int64)n * K + k) * P * Q + p0 * Q + q;
#pragma unroll
      for (int t = 0; t < ROWS; ++t)
        if (p0 + t < P) out[t * Q] = sum[t];
    }
  }
}

// dx, each gathered by one thread: no two add to one number. With stride 1 it is the
// forward of dy with flipped filters, and a thread makes ROWS rows.
template <int SIZE, int STEP>
DEVICE void backward_data(float* __restrict__ dx,            // (N, C, H, W)
                          const float* __restrict__ dy,      // (N, C * each, P, Q)
                          const float* __restrict__ weight,  // (C * each, 1, R, S)
                          const float* __restrict__ bias,    // (C,) or null: added
                          int N, int C, int each, int H, int W, int R, int S, int P,
                          int Q, int stride_h, int stride_w, int pad_h, int pad_w,
                          int dilation_h, int dilation_w) {
  constexpr bool flipped = SIZE && STEP == 1;
  constexpr int rows = flipped ? ROWS : 1;
  const int tiles = (H + rows - 1) / rows;
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= C * tiles * W) return;
  const int w = i % W, h = i / W % tiles * rows, c = i / W / tiles;
  const float start = bias ? bias[c] : 0.0f;
#pragma unroll 1
  for (int n = blockIdx.y; n < N; n += gridDim.y) {
    float sum[rows];
#pragma unroll
    for (int t = 0; t < rows; ++t) sum[t] = start;
#pragma unroll 1
    for (int k = c * each; k < (c + 1) * each; ++k) {
      const float* plane = dy + ((int64)n * C * each + k) * P * Q;
      if constexpr (flipped) {
        const float* filter = weight + (int64)k * SIZE * SIZE;
        float tap[SIZE * SIZE];
#pragma unroll
        for (int j = 0; j < SIZE * SIZE; ++j) tap[j] = filter[SIZE * SIZE - 1 - j];
        const int p0 = h + pad_h - (SIZE - 1), q0 = w + pad_w - (SIZE - 1);
#pragma unroll
        for (int j = 0; j < ROWS - 1 + SIZE; ++j) {
          const int p = p0 + j;
          const bool row_inside = 0 <= p && p < P;
#pragma unroll
          for (int s = 0; s < SIZE; ++s) {
            const int q = q0 + s;
            const bool inside = row_inside && 0 <= q && q < Q;
            const float v = inside ? plane[p * Q + q] : 0.0f;
#pragma unroll
            for (int t = 0; t < ROWS; ++t)
              if (0 <= j - t && j - t < SIZE) sum[t] += tap[(j - t) * SIZE + s] * v;
          }
        }
      } else {
        // constants where SIZE is one, so that dividing is a shift and loops unroll
        const int high = SIZE ? SIZE : R, wide = SIZE ? SIZE : S;
        const int step_h = SIZE ? STEP : stride_h, step_w = SIZE ? STEP : stride_w;
        const float* filter = weight + (int64)k * high * wide;
#pragma unroll(SIZE ? SIZE : 1)
        for (int r = 0; r < high; ++r) {
          const int above = h + pad_h - (SIZE ? r : r * dilation_h);
          const int p = above / step_h;
          if (above < 0 || p * step_h != above || p >= P) continue;
#pragma unroll(SIZE ? SIZE : 1)
          for (int s = 0; s < wide; ++s) {
            const int left = w + pad_w - (SIZE ? s : s * dilation_w);
            const int q = left / step_w;
            if (left < 0 || q * step_w != left || q >= Q) continue;
            sum[0] += filter[r * wide + s] * plane[p * Q + q];
          }
        }
      }
    }
    float* out = dx + ((int64)n * C + c) * H * W + (int64)h * W + w;
#pragma unroll
    for (int t = 0; t < rows; ++t)
      if (h + t < H) out[(int64)t * W] = sum[t];
  }
}

// Parts of dweight: partial[part, k, r, s] sums over the part's `images` images. Every
// thread takes each 256th of their pixels, for all taps at once; SIZE 0: for the one
// tap of the block. The sums of the threads are joined in a fixed order.
constexpr int WEIGHT_BLOCK = 256;

template <int SIZE, int STEP>
DEVICE void backward_weight(float* __restrict__ partial,   // (parts, C * each, R, S)
                            const float* __restrict__ dy,  // (N, C * each, P, Q)
                            const float* __restrict__ x,   // (N, C, H, W)
                            int images, int N, int C, int each, int H, int W, int R,
                            int S, int P, int Q, int stride_h, int stride_w, int pad_h,
                            int pad_w, int dilation_h, int dilation_w) {
  constexpr int taps = SIZE ? SIZE * SIZE : 1;
  const int K = C * each, k = blockIdx.x;
  const int first = blockIdx.y * images, pixels = P * Q;
  const int count = min(images, N - first) * pixels;
  float sum[taps];
#pragma unroll
  for (int j = 0; j < taps; ++j) sum[j] = 0.0f;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += WEIGHT_BLOCK) {
    const int n = first + i / pixels, pixel = i % pixels;
    const int p = pixel / Q, q = pixel % Q;
    const float d = dy[((int64)n * K + k) * pixels + pixel];
    const float* plane = x + ((int64)n * C + k / each) * H * W;
    if constexpr (SIZE == 0) {
      const int r = blockIdx.z / S, s = blockIdx.z % S;
      const int h = p * stride_h - pad_h + r * dilation_h;
      const int w = q * stride_w - pad_w + s * dilation_w;
      const bool inside = 0 <= h && h < H && 0 <= w && w < W;
      sum[0] += d * (inside ? plane[h * W + w] : 0.0f);
    } else {
      const int h0 = p * STEP - pad_h, w0 = q * STEP - pad_w;
#pragma unroll
      for (int r = 0; r < SIZE; ++r) {
        const int h = h0 + r;
        const bool row_inside = 0 <= h && h < H;
#pragma unroll
        for (int s = 0; s < SIZE; ++s) {
          const int w = w0 + s;
          const bool inside = row_inside && 0 <= w && w < W;
          sum[r * SIZE + s] += d * (inside ? plane[h * W + w] : 0.0f);
        }
      }
    }
  }
  constexpr int warps = WEIGHT_BLOCK / WARP;
  __shared__ float of_warp[taps][warps];
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
  for (int j = 0; j < taps; ++j) {
    const float of_lanes = warp_reduce<Sum>(sum[j]);
    if (lane == 0) of_warp[j][warp] = of_lanes;
  }
  __syncthreads();
  if (threadIdx.x >= taps) return;
  float total = 0.0f;
#pragma unroll
  for (int j = 0; j < warps; ++j) total += of_warp[threadIdx.x][j];
  const int tap = SIZE ? threadIdx.x : blockIdx.z;
  partial[((int64)blockIdx.y * K + k) * (SIZE ? taps : R * S) + tap] = total;
}

// forward: grid (blocks over C * each * ceil(P / rows) * Q, images or fewer), where
// rows is 1 for "any", else ROWS.
// backward_data: grid (blocks over C * ceil(H / rows) * W, images or fewer), where rows
// is 1 for "any" and for stride 2, else ROWS.
// backward_weight: grid (C * each, parts, R S for "any", else 1), WEIGHT_BLOCK threads.
#define DEPTHWISE(NAME, SIZE, STEP)                                                    \
  extern "C" __global__ void depthwise_forward_##NAME(                                 \
      float* y, const float* x, const float* weight, const float* bias, int N, int C,  \
      int each, int H, int W, int R, int S, int P, int Q, int stride_h, int stride_w,  \
      int pad_h, int pad_w, int dilation_h, int dilation_w) {                          \
    forward<SIZE, STEP>(y, x, weight, bias, N, C, each, H, W, R, S, P, Q, stride_h,    \
                        stride_w, pad_h, pad_w, dilation_h, dilation_w);               \
  }                                                                                    \
  extern "C" __global__ void depthwise_backward_data_##NAME(                           \
      float* dx, const float* dy, const float* weight, const float* bias, int N, int C,\
      int each, int H, int W, int R, int S, int P, int Q, int stride_h, int stride_w,  \
      int pad_h, int pad_w, int dilation_h, int dilation_w) {                          \
    backward_data<SIZE, STEP>(dx, dy, weight, bias, N, C, each, H, W, R, S, P, Q,      \
                              stride_h, stride_w, pad_h, pad_w, dilation_h,            \
                              dilation_w);                                             \
  }                                                                                    \
  extern "C" __global__ __launch_bounds__(WEIGHT_BLOCK) void                           \
      depthwise_backward_weight_##NAME(                                                \
          float* partial, const float* dy, const float* x, int images, int N, int C,   \
          int each, int H, int W, int R, int S, int P, int Q, int stride_h,            \
          int stride_w, int pad_h, int pad_w, int dilation_h, int dilation_w) {        \
    backward_weight<SIZE, STEP>(partial, dy, x, images, N, C, each, H, W, R, S, P, Q,  \
                                stride_h, stride_w, pad_h, pad_w, dilation_h,          \
                                dilation_w);                                           \
  }

DEPTHWISE(3_1, 3, 1)
DEPTHWISE(3_2, 3, 2)
DEPTHWISE(5_1, 5, 1)
DEPTHWISE(5_2, 5, 2)
DEPTHWISE(any, 0, 0)
