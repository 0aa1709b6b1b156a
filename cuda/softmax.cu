// Softmax, log-softmax, negative log-likelihood, cross-entropy. Rows are samples, F
// classes.
//
//   softmax      y_i = exp(x_i - m) / sum_j exp(x_j - m),  m = max_j x_j
//   backward     dy_i/dx_j = y_j ([i = j] - y_i), hence
//                dx_j = y_j (dy_j - sum_i dy_i y_i)
//   log-softmax  y_i = x_i - m - log sum_j exp(x_j - m),  m = max_j x_j
//                (m cancels; it keeps exp from overflowing and the log's argument >= 1)
//   backward     dy_i/dx_j = [i = j] - exp(y_j), hence
//                dx_j = dy_j - exp(y_j) sum_i dy_i
//   NLL          loss = -1/N sum_n y[n, label_n];  gradient -1/N at the label, else 0
//   cross-entropy = both: with dy from NLL, sum_i dy_i = -1/N and
//                dx_j = (exp(y_j) - [j = label]) / N
#include "common.cuh"

// Launch of the row kernels: blocks of full warps. _rows: one warp a row, as many warps
// as rows or more. _wide: one block a row, for F in the thousands.

template <class Group>
DEVICE void softmax_forward(float* __restrict__ y,         // (N, F)
                            const float* __restrict__ x,   // (N, F)
                            int N, int F) {
  const int64 n = Group::row();
  if (n >= N) return;  // the whole group leaves together
  x += n * F, y += n * F;
  float largest = Max::empty();
#pragma unroll 1
  for (int f = Group::rank(); f < F; f += Group::size()) largest = fmaxf(largest, x[f]);
  largest = Group::template reduce<Max>(largest);
  float sum = 0.0f;
#pragma unroll 1
  for (int f = Group::rank(); f < F; f += Group::size()) sum += expf(x[f] - largest);
  sum = Group::template reduce<Sum>(sum);
#pragma unroll 1
  for (int f = Group::rank(); f < F; f += Group::size())
    y[f] = expf(x[f] - largest) / sum;
}

template <class Group>
DEVICE void softmax_backward(float* __restrict__ dx,         // (N, F)
                             const float* __restrict__ dy,   // (N, F)
                             const float* __restrict__ y,    // (N, F)
                             int N, int F) {
  const int64 n = Group::row();
  if (n >= N) return;
  dx += n * F, dy += n * F, y += n * F;
  float sum = 0.0f;
#pragma unroll 1
  for (int f = Group::rank(); f < F; f += Group::size()) sum += dy[f] * y[f];
  sum = Group::template reduce<Sum>(sum);
#pragma unroll 1
  for (int f = Group::rank(); f < F; f += Group::size()) dx[f] = y[f] * (dy[f] - sum);
}

extern "C" __global__ void softmax_forward_rows(float* y, const float* x, int N,
                                                int F) {
  softmax_forward<WarpGroup>(y, x, N, F);
}

extern "C" __global__ void softmax_forward_wide(float* y, const float* x, int N,
                                                int F) {
  softmax_forward<BlockGroup>(y, x, N, F);
}

extern "C" __global__ void softmax_backward_rows(float* dx, const float* dy,
                                                 const float* y, int N, int F) {
  softmax_backward<WarpGroup>(dx, dy, y, N, F);
}

extern "C" __global__ void softmax_backward_wide(float* dx, const float* dy,
                                                 const float* y, int N, int F) {
  softmax_backward<BlockGroup>(dx, dy, y, N, F);
}

template <class Group>
DEVICE void log_softmax_forward(float* __restrict__ y,         // (N, F)
                                const float* __restrict__ x,   // (N, F)
                                int N, int F) {
  const int64 n = Group::row();
  if (n >= N) return;  // the whole group leaves together
  x += n * F, y += n * F;
  float largest = Max::empty();
#pragma unroll 1
  for (int f = Group::rank(); f < F; f += Group::size()) largest = fmaxf(largest, x[f]);
  largest = Group::template reduce<Max>(largest);
  float sum = 0.0f;
#pragma unroll 1
  for (int f = Group::rank(); f < F; f += Group::size()) sum += expf(x[f] - largest);
  const float log_sum = logf(Group::template reduce<Sum>(sum));
#pragma unroll 1
  for (int f = Group::rank(); f < F; f += Group::size())
    y[f] = x[f] - largest - log_sum;
}

template <class Group>
DEVICE void log_softmax_backward(float* __restrict__ dx,         // (N, F)
                                 const float* __restrict__ dy,   // (N, F)
                                 const float* __restrict__ y,    // (N, F)
                                 int N, int F) {
  const int64 n = Group::row();
  if (n >= N) return;
  dx += n * F, dy += n * F, y += n * F;
  float sum = 0.0f;
#pragma unroll 1
  for (int f = Group::rank(); f < F; f += Group::size()) sum += dy[f];
  sum = Group::template reduce<Sum>(sum);
#pragma unroll 1
  for (int f = Group::rank(); f < F; f += Group::size())
    dx[f] = dy[f] - expf(y[f]) * sum;
}

extern "C" __global__ void log_softmax_forward_rows(float* y, const float* x, int N,
                                                    int F) {
  log_softmax_forward<WarpGroup>(y, x, N, F);
}

extern "C" __global__ void log_softmax_forward_wide(float* y, const float* x, int N,
                                                    int F) {
  log_softmax_forward<BlockGroup>(y, x, N, F);
}

extern "C" __global__ void log_softmax_backward_rows(float* dx, const float* dy,
                                                     const float* y, int N, int F) {
  log_softmax_backward<WarpGroup>(dx, dy, y, N, F);
}

extern "C" __global__ void log_softmax_backward_wide(float* dx, const float* dy,
                                                     const float* y, int N, int F) {
  log_softmax_backward<BlockGroup>(dx, dy, y, N, F);
}

// Launch: one block of full warps. A label out of range makes the loss NaN.
extern "C" __global__ void nll_loss_forward(
    float* __restrict__ loss,              // ()
    const float* __restrict__ log_probs,   // (N, F)
    const int* __restrict__ labels,        // (N,)
    int N, int F) {
  float sum = 0.0f;
#pragma unroll 1
  for (int n = threadIdx.x; n < N; n += blockDim.x) {
    const int label = labels[n];
    const bool inside = 0 <= label && label < F;
    sum += inside ? log_probs[(int64)n * F + label] : not_a_number();
  }
  sum = block_reduce<Sum>(sum);
  if (threadIdx.x == 0) *loss = -sum / (float)N;
}

// Launch of both: one warp a row, as many warps as rows or more.
extern "C" __global__ void nll_loss_backward(
    float* __restrict__ dlog_probs,   // (N, F)
    const int* __restrict__ labels,   // (N,)
    int N, int F) {
  const int64 n = WarpGroup::row();
  if (n >= N) return;
  const int label = labels[n];
  const float at_label = -1.0f / (float)N;
#pragma unroll 1
  for (int f = WarpGroup::rank(); f < F; f += WARP)
    dlog_probs[n * F + f] = f == label ? at_label : 0.0f;
}

extern "C" __global__ void cross_entropy_backward(
    float* __restrict__ dlogits,           // (N, F)
    const float* __restrict__ log_probs,   // (N, F)
    const int* __restrict__ labels,        // (N,)
    int N, int F) {
  const int64 n = WarpGroup::row();
  if (n >= N) return;
  const int label = labels[n];
#pragma unroll 1
  for (int f = WarpGroup::rank(); f < F; f += WARP) {
    const float hit = f == label ? 1.0f : 0.0f;
    dlogits[n * F + f] = (expf(log_probs[n * F + f]) - hit) / (float)N;
  }
}
