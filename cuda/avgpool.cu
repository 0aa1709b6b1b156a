// Average pooling over windows of R x S pixels, and over whole planes.
//
//   forward   y[n,c,p,q] = 1 / count * sum over r < R, s < S of
//                          x[n, c, p*stride_h - pad_top + r, q*stride_w - pad_left + s]
//   backward  y is linear in x: dx[n,c,h,w] = sum of dy[n,c,p,q] / count(p, q) over the
//             windows that hold (h, w)
//
// Pixels outside the image count as 0. count is R S, less what reaches over the end of
// the padding, or, if not include_pad, the number of pixels of the image in the window.
// As in maxpool.cu the backward gathers, so no two threads add to one number.
//
// Launch: grid (blocks over one image, images or fewer), one-dimensional blocks.
#include "common.cuh"

// Pixels first .. end - 1 of a window along one axis of `size` pixels, and how many of
// its pixels count.
struct Span {
  int first, end, counted;
  METHOD Span(int at, int window, int stride, int before, int after, int size,
              int include_pad) {
    const int start = at * stride - before;
    first = max(start, 0);
    end = min(start + window, size);
    counted = include_pad ? min(start + window, size + after) - start : end - first;
  }
};

DEVICE float divisor(const Span& rows, const Span& columns) {
  return (float)rows.counted * (float)columns.counted;
}

extern "C" __global__ void avgpool2d_forward(
    float* __restrict__ y,         // (N, C, P, Q)
    const float* __restrict__ x,   // (N, C, H, W)
    int N, int C, int H, int W, int P, int Q, int R, int S, int stride_h, int stride_w,
    int pad_top, int pad_left, int pad_bottom, int pad_right, int include_pad) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= C * P * Q) return;
  const int q = i % Q, p = i / Q % P, c = i / Q / P;
  const Span rows(p, R, stride_h, pad_top, pad_bottom, H, include_pad);
  const Span columns(q, S, stride_w, pad_left, pad_right, W, include_pad);
  const float count = divisor(rows, columns);
#pragma unroll 1
  for (int n = blockIdx.y; n < N; n += gridDim.y) {
    const float* plane = x + ((int64)n * C + c) * H * W;
    float sum = 0.0f;
    for (int h = rows.first; h < rows.end; ++h)
      for (int w = columns.first; w < columns.end; ++w) sum += plane[h * W + w];
    y[(int64)n * C * P * Q + i] = sum / count;
  }
}

extern "C" __global__ void avgpool2d_backward(
    float* __restrict__ dx,         // (N, C, H, W)
    const float* __restrict__ dy,   // (N, C, P, Q)
    int N, int C, int H, int W, int P, int Q, int R, int S, int stride_h, int stride_w,
    int pad_top, int pad_left, int pad_bottom, int pad_right, int include_pad) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= C * H * W) return;
  const int w = i % W, h = i / W % H, c = i / W / H;
  // window p holds h where p*stride <= h + pad < p*stride + R
  const int above = h + pad_top, left = w + pad_left;
  const int p_first = above < R ? 0 : (above - R) / stride_h + 1;
  const int q_first = left < S ? 0 : (left - S) / stride_w + 1;
  const int p_last = min(above / stride_h, P - 1);
  const int q_last = min(left / stride_w, Q - 1);
#pragma unroll 1
  for (int n = blockIdx.y; n < N; n += gridDim.y) {
    const float* plane = dy + ((int64)n * C + c) * P * Q;
    float sum = 0.0f;
    for (int p = p_first; p <= p_last; ++p) {
      const Span rows(p, R, stride_h, pad_top, pad_bottom, H, include_pad);
      for (int q = q_first; q <= q_last; ++q) {
        const Span columns(q, S, stride_w, pad_left, pad_right, W, include_pad);
        sum += plane[p * Q + q] / divisor(rows, columns);
      }
    }
    dx[(int64)n * C * H * W + i] = sum;
  }
}

// y = the mean of each plane. Launch, blocks of full warps. _rows: one warp a plane, as
// many warps as planes or more. _wide: one block a plane.
template <class Group>
DEVICE void global_avgpool2d_forward(float* __restrict__ y,         // (planes,)
                                     const float* __restrict__ x,   // (planes, pixels)
                                     int64 planes, int pixels) {
  const int64 plane = Group::row();
  if (plane >= planes) return;  // the whole group leaves together
  x += plane * pixels;
  float sum = 0.0f;
#pragma unroll 4
  for (int i = Group::rank(); i < pixels; i += Group::size()) sum += x[i];
  sum = Group::template reduce<Sum>(sum);
  if (Group::rank() == 0) y[plane] = sum / (float)pixels;
}

extern "C" __global__ void global_avgpool2d_forward_rows(float* y, const float* x,
                                                         int64 planes, int pixels) {
  global_avgpool2d_forward<WarpGroup>(y, x, planes, pixels);
}

extern "C" __global__ void global_avgpool2d_forward_wide(float* y, const float* x,
                                                         int64 planes, int pixels) {
  global_avgpool2d_forward<BlockGroup>(y, x, planes, pixels);
}

// dx[n, c, i] = dy[n, c] / pixels
extern "C" __global__ void global_avgpool2d_backward(
    float* __restrict__ dx,         // (N, C, pixels)
    const float* __restrict__ dy,   // (N, C)
    int N, int C, int pixels) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= C * pixels) return;
  const int c = i / pixels;
#pragma unroll 1
  for (int n = blockIdx.y; n < N; n += gridDim.y)
    dx[(int64)n * C * pixels + i] = dy[(int64)n * C + c] / (float)pixels;
}
