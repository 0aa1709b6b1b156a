// Max pooling over windows of R x S pixels.
//
//   forward   y[n,c,p,q] = max over r < R, s < S of x[n, c, p*stride_h - pad_h + r,
//                                                       q*stride_w - pad_w + s]
//   backward  y is one of its inputs, so dy goes to that input whole:
//             dx[n,c,h,w] = sum of dy[n,c,p,q] over the windows whose maximum is (h,w)
//
// Pixels outside the image count as -infinity. pad_h and pad_w are those above it and
// on its left; how many there are behind it only P and Q tell. Each window sees a pixel
// of the image. Windows may overlap; the backward gathers for each input from the few
// windows that hold it, so no two threads add to one number and the order of the sum is
// fixed.
//
// Launch: grid (blocks over one image, images or fewer), one-dimensional blocks.
#include "common.cuh"

extern "C" __global__ void maxpool2d_forward(
    float* __restrict__ y,          // (N, C, P, Q)
    int* __restrict__ positions,    // (N, C, P, Q): h * W + w of the maximum
    const float* __restrict__ x,    // (N, C, H, W)
    int N, int C, int H, int W, int P, int Q, int R, int S, int stride_h, int stride_w,
    int pad_h, int pad_w) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= C * P * Q) return;
  const int q = i % Q, p = i / Q % P, c = i / Q / P;
  const int h0 = p * stride_h - pad_h, w0 = q * stride_w - pad_w;
  const int h_first = max(h0, 0), h_end = min(h0 + R, H);
  const int w_first = max(w0, 0), w_end = min(w0 + S, W);
#pragma unroll 1
  for (int n = blockIdx.y; n < N; n += gridDim.y) {
    const float* plane = x + ((int64)n * C + c) * H * W;
    int best_at = h_first * W + w_first;
    float best = plane[best_at];
    for (int h = h_first; h < h_end; ++h) {
      for (int w = w_first; w < w_end; ++w) {
        const float v = plane[h * W + w];
        // strictly greater: the first maximum wins; NaN beats every number
        if (v > best || (is_nan(v) && !is_nan(best))) {
          best = v;
          best_at = h * W + w;
        }
      }
    }
    const int64 at = (int64)n * C * P * Q + i;
    y[at] = best;
    positions[at] = best_at;
  }
}

extern "C" __global__ void maxpool2d_backward(
    float* __restrict__ dx,               // (N, C, H, W)
    const float* __restrict__ dy,         // (N, C, P, Q)
    const int* __restrict__ positions,    // (N, C, P, Q)
    int N, int C, int H, int W, int P, int Q, int R, int S, int stride_h, int stride_w,
    int pad_h, int pad_w) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= C * H * W) return;
  const int w = i % W, h = i / W % H, c = i / W / H;
  // window p holds h where p*stride <= h + pad < p*stride + R
  const int above = h + pad_h, left = w + pad_w;
  const int p_first = above < R ? 0 : (above - R) / stride_h + 1;
  const int q_first = left < S ? 0 : (left - S) / stride_w + 1;
  const int p_last = min(above / stride_h, P - 1);
  const int q_last = min(left / stride_w, Q - 1);
#pragma unroll 1
  for (int n = blockIdx.y; n < N; n += gridDim.y) {
    const int64 plane = ((int64)n * C + c) * P * Q;
    float sum = 0.0f;
    for (int p = p_first; p <= p_last; ++p)
      for (int q = q_first; q <= q_last; ++q)
        if (positions[plane + p * Q + q] == h * W + w) sum += dy[plane + p * Q + q];
    dx[(int64)n * C * H * W + i] = sum;
  }
}
