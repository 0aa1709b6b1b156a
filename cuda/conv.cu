// The two rearrangements that make a convolution a matrix product (gemm.cu).
//
//   y[n,k,p,q] = sum over c, r, s of
//                weight[k,c,r,s] * x[n, c, p*stride_h - pad_h + r*dilation_h,
//                                          q*stride_w - pad_w + s*dilation_w]
//
// With column[(c,r,s), (n,p,q)] = that element of x, or 0 outside the image, this is
// Y = Weight Column. The backward follows from the product, summed over n, p, q where a
// number is used many times:
//   dWeight = dY Column^T,   dColumn = Weight^T dY,
//   dx[n,c,h,w] = sum of dColumn over the entries that were read from (h, w)
//
// Column has C*R*S rows, each `pitch` floats apart, and one column for each output
// pixel of each image: image after image, so that a product runs over the whole batch
// at once. Groups of channels are groups of rows.
//
// The plain convolution, a loop over c, r, s for each output, is ops/reference.py.
//
// Launch: one-dimensional blocks; grid as stated at each kernel.
#include "common.cuh"

// Grid (blocks over the N*P*Q columns, channels or fewer).
extern "C" __global__ void im2col(float* __restrict__ column,    // (C, R, S, pitch)
                                  const float* __restrict__ x,   // (N, C, H, W)
                                  int N, int C, int H, int W, int R, int S, int P,
                                  int Q, int stride_h, int stride_w, int pad_h,
                                  int pad_w, int dilation_h, int dilation_w,
                                  int64 pitch) {
  const int j = blockIdx.x * blockDim.x + threadIdx.x;
  if (j >= N * P * Q) return;
  const int q = j % Q, p = j / Q % P, n = j / Q / P;
  const int h0 = p * stride_h - pad_h, w0 = q * stride_w - pad_w;
  for (int c = blockIdx.y; c < C; c += gridDim.y) {
    const float* plane = x + ((int64)n * C + c) * H * W;
    float* target = column + (int64)c * R * S * pitch + j;
    for (int r = 0; r < R; ++r) {
      const int h = h0 + r * dilation_h;
      const bool row_inside = 0 <= h && h < H;
      for (int s = 0; s < S; ++s) {
        const int w = w0 + s * dilation_w;
        const bool inside = row_inside && 0 <= w && w < W;
        *target = inside ? plane[h * W + w] : 0.0f;
        target += pitch;
      }
    }
  }
}

// Output coordinate whose filter tap at `offset` reads input coordinate `at` (counted
// from the padded edge), or -1.
DEVICE int tap_origin(int at, int offset, int stride, int outputs) {
  const int from = at - offset;
  if (from < 0) return -1;
  // the division is slow and most strides are 1
  const int p = stride == 1 ? from : from / stride;
  return p * stride == from && p < outputs ? p : -1;
}

// Grid (blocks over the C*H*W elements of one image, images or fewer). Each element
// gathers what was made from it, in the order of r, s: no two threads add to one number.
extern "C" __global__ void col2im(float* __restrict__ dx,              // (N, C, H, W)
                                  const float* __restrict__ dcolumn,   // (C, R, S, pitch)
                                  int N, int C, int H, int W, int R, int S, int P,
                                  int Q, int stride_h, int stride_w, int pad_h,
                                  int pad_w, int dilation_h, int dilation_w,
                                  int64 pitch) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= C * H * W) return;
  const int w = i % W, h = i / W % H, c = i / W / H;
  for (int n = blockIdx.y; n < N; n += gridDim.y) {
    const float* source = dcolumn + (int64)c * R * S * pitch + (int64)n * P * Q;
    float sum = 0.0f;
    for (int r = 0; r < R; ++r) {
      const int p = tap_origin(h + pad_h, r * dilation_h, stride_h, P);
      if (p < 0) continue;
      for (int s = 0; s < S; ++s) {
        const int q = tap_origin(w + pad_w, s * dilation_w, stride_w, Q);
        if (q >= 0) sum += source[(int64)(r * S + s) * pitch + p * Q + q];
      }
    }
    dx[(int64)n * C * H * W + i] = sum;
  }
}
