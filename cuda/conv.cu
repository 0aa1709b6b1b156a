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
extern "C" __global__ void im2col(
    float* __restrict__ column,   // (C, R, S, pitch)
    const float* __restrict__ x,  // (N, C, H, W)
    int N, int C, int H, int W, int R, int S, int P, int Q, int stride_h, int stride_w,
    int pad_h, int pad_w, int dilation_h, int dilation_w, int64 pitch) {
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

// Walks over the output coordinates whose filter taps 0, 1, 2 ... read one input
// coordinate `at`, counted from the padded edge: tap r is read by p where
// p * stride + r * dilation == at. Kept as quotient and rest of (at - r * dilation) by
// stride, so that a step needs no division.
struct Taps {
  int quotient, rest;
  int stride, outputs;
  int down_quotient, down_rest;

  METHOD Taps(int at, int stride_, int dilation, int outputs_)
      : stride(stride_), outputs(outputs_) {
    quotient = at / stride;
    rest = at - quotient * stride;
    down_quotient = dilation / stride;
    down_rest = dilation - down_quotient * stride;
  }
  METHOD bool hits() const { return rest == 0 && (uint32)quotient < (uint32)outputs; }
  METHOD void next() {
    quotient -= down_quotient;
    rest -= down_rest;
    if (rest < 0) rest += stride, --quotient;
  }
};

// Grid (blocks over the C*H*W elements of one image, images or fewer). Each element
// gathers what was made from it, in the order of r, s: no two threads add to one
// number. A bias is for the transposed convolution, whose forward this is.
extern "C" __global__ void col2im(
    float* __restrict__ dx,             // (N, C, H, W)
    const float* __restrict__ dcolumn,  // (C, R, S, pitch)
    const float* __restrict__ bias,     // (C,) or null: added to dx
    int N, int C, int H, int W, int R, int S, int P, int Q, int stride_h, int stride_w,
    int pad_h, int pad_w, int dilation_h, int dilation_w, int64 pitch) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= C * H * W) return;
  const int w = i % W, h = i / W % H, c = i / W / H;
  const Taps first_row(h + pad_h, stride_h, dilation_h, P);
  const Taps first_column(w + pad_w, stride_w, dilation_w, Q);
  const float start = bias ? bias[c] : 0.0f;
#pragma unroll 1
  for (int n = blockIdx.y; n < N; n += gridDim.y) {
    const float* source = dcolumn + (int64)c * R * S * pitch + (int64)n * P * Q;
    float sum = start;
    Taps row = first_row;
#pragma unroll 1
    for (int r = 0; r < R; ++r, row.next()) {
      if (!row.hits()) continue;
      const float* of_row = source + (int64)r * S * pitch + row.quotient * Q;
      Taps column = first_column;
#pragma unroll 4
      for (int s = 0; s < S; ++s, column.next())
        if (column.hits()) sum += of_row[s * pitch + column.quotient];
    }
    dx[(int64)n * C * H * W + i] = sum;
  }
}
