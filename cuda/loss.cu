// Losses of numbers against numbers, and of classes with weights, smoothed labels and
// labels that do not count. (The plain losses of classes are in softmax.cu.)
//
// Elementwise, with x the prediction, t the target and d = x - t:
//   squared error  l = d^2                                      dl/dx = 2 d
//   smooth L1      l = d^2 / (2 beta) where |d| < beta          dl/dx = d / beta
//                  l = |d| - beta / 2 elsewhere                 dl/dx = sign(d)
//                  beta = 0 leaves |d|, the L1 loss
//   binary cross-entropy of p = 1 / (1 + e^-x), w the weight of positive targets:
//                  l = -(w t log p + (1 - t) log(1 - p))
//     with log(1 - p) = log p - x and c = 1 + (w - 1) t that is
//                  l = (1 - t) x - c log p,
//                  -log p = log(1 + e^-x) = max(-x, 0) + log(1 + e^-|x|)
//                  dl/dx = (1 - t) - c (1 - p)
//
// Of classes: row n has the target distribution q_f = (1 - s) w_y [f = y] + s w_f / F
// (not normalised: w are the weights of the classes, s is the smoothing) and
//   loss = -1/D sum_n sum_f q_f log_probs[n, f]     over the rows that count,
//   D = sum_n w_y over them for the mean, 1 for the sum.
//   gradient by log_probs: -q_f / D; by the logits, with Q = sum_f q_f and
//   d log_probs_f / d logits_g = [f = g] - p_g:  (p_f Q - q_f) / D.
//
// Sums go in two stages, partial sums and then their sum, both in fixed order.
#include "common.cuh"

struct SquaredError {
  METHOD float value(float x, float t, int64) const { return (x - t) * (x - t); }
  METHOD float slope(float x, float t, int64) const { return 2.0f * (x - t); }
};

struct SmoothL1 {
  float beta;

  METHOD float value(float x, float t, int64) const {
    const float d = x - t, size = fabsf(d);
    return size < beta ? 0.5f * d * d / beta : size - 0.5f * beta;
  }
  METHOD float slope(float x, float t, int64) const {
    const float d = x - t;
    if (fabsf(d) < beta) return d / beta;
    return d > 0.0f ? 1.0f : d < 0.0f ? -1.0f : d;  // d: zero or NaN
  }
};

struct BinaryCrossEntropy {
  const float* pos_weight;  // (period,), of element i % period, or null: 1
  int period;

  METHOD float factor(float t, int64 i) const {
    return pos_weight ? 1.0f + (pos_weight[i % period] - 1.0f) * t : 1.0f;
  }
  METHOD float value(float x, float t, int64 i) const {
    const float cost = fmaxf(-x, 0.0f) + log1pf(expf(-fabsf(x)));
    return (1.0f - t) * x + factor(t, i) * cost;
  }
  METHOD float slope(float x, float t, int64 i) const {
    // 1 - p = 1 / (1 + e^x), of which no branch overflows
    const float e = expf(-fabsf(x));
    const float rest = (x >= 0.0f ? e : 1.0f) / (1.0f + e);
    return (1.0f - t) - factor(t, i) * rest;
  }
};

// Launch: any one-dimensional grid of full warps.
template <class Loss>
DEVICE void sum_values(float* __restrict__ partial,       // (gridDim.x,)
                       const float* __restrict__ x,       // (n,)
                       const float* __restrict__ target,  // (n,)
                       int64 n, const Loss& loss) {
  float sum = 0.0f;
#pragma unroll 1
  for (int64 i = grid_thread(); i < n; i += grid_threads())
    sum += loss.value(x[i], target[i], i);
  sum = block_reduce<Sum>(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// dx = slope / divisor. Launch: any one-dimensional grid and block.
template <class Loss>
DEVICE void slopes(float* __restrict__ dx,            // (n,)
                   const float* __restrict__ x,       // (n,)
                   const float* __restrict__ target,  // (n,)
                   int64 n, float divisor, const Loss& loss) {
#pragma unroll 1
  for (int64 i = grid_thread(); i < n; i += grid_threads())
    dx[i] = loss.slope(x[i], target[i], i) / divisor;
}

extern "C" __global__ void mse_sum(float* partial, const float* x, const float* target,
                                   int64 n) {
  sum_values(partial, x, target, n, SquaredError{});
}

extern "C" __global__ void mse_backward(float* dx, const float* x, const float* target,
                                        int64 n, float divisor) {
  slopes(dx, x, target, n, divisor, SquaredError{});
}

extern "C" __global__ void smooth_l1_sum(float* partial, const float* x,
                                         const float* target, int64 n, float beta) {
  sum_values(partial, x, target, n, SmoothL1{beta});
}

extern "C" __global__ void smooth_l1_backward(float* dx, const float* x,
                                              const float* target, int64 n,
                                              float divisor, float beta) {
  slopes(dx, x, target, n, divisor, SmoothL1{beta});
}

extern "C" __global__ void bce_sum(float* partial, const float* x, const float* target,
                                   int64 n, const float* pos_weight, int period) {
  sum_values(partial, x, target, n, BinaryCrossEntropy{pos_weight, period});
}

extern "C" __global__ void bce_backward(float* dx, const float* x, const float* target,
                                        int64 n, float divisor, const float* pos_weight,
                                        int period) {
  slopes(dx, x, target, n, divisor, BinaryCrossEntropy{pos_weight, period});
}

// loss = sum of the partial sums / divisor. Launch: one block of full warps.
extern "C" __global__ void finish_loss(float* __restrict__ loss,           // ()
                                       const float* __restrict__ partial,  // (parts,)
                                       int parts, float divisor) {
  float sum = 0.0f;
#pragma unroll 1
  for (int i = threadIdx.x; i < parts; i += blockDim.x) sum += partial[i];
  sum = block_reduce<Sum>(sum);
  if (threadIdx.x == 0) *loss = sum / divisor;
}

// ------------------------------------------------------------------ classes
// weight may be null: all 1. Labels equal to ignore_index do not count where `ignores`
// is not 0; any other label out of range makes the loss NaN.
// Launch of the row kernels: one warp a row, as many warps as rows or more.

DEVICE float weight_of(const float* weight, int f) { return weight ? weight[f] : 1.0f; }

// terms[0] = -sum_f q_f log_probs[n, f], terms[1] = w_y of each row
extern "C" __global__ void weighted_nll_terms(
    float* __restrict__ terms,             // (2, N)
    const float* __restrict__ log_probs,   // (N, F)
    const int* __restrict__ labels,        // (N,)
    const float* __restrict__ weight,      // (F,) or null
    float smoothing, int ignores, int ignore_index, int N, int F) {
  const int64 n = WarpGroup::row();
  if (n >= N) return;
  const int label = labels[n], lane = WarpGroup::rank();
  const float* row = log_probs + n * F;
  float value = 0.0f, counts = 0.0f;
  if (!ignores || label != ignore_index) {
    if (0 <= label && label < F) {
      counts = weight_of(weight, label);
      value = (1.0f - smoothing) * counts * -row[label];
    } else {
      value = counts = not_a_number();
    }
    if (smoothing != 0.0f) {  // the same for the whole warp
      float sum = 0.0f;
#pragma unroll 1
      for (int f = lane; f < F; f += WARP) sum += weight_of(weight, f) * -row[f];
      value += smoothing / (float)F * warp_reduce<Sum>(sum);
    }
  }
  if (lane == 0) terms[n] = value, terms[N + n] = counts;
}

// Launch: one block of full warps.
extern "C" __global__ void finish_weighted_nll(
    float* __restrict__ loss,         // ()
    float* __restrict__ total,        // (), D
    const float* __restrict__ terms,  // (2, N)
    int N, int mean) {
  float value = 0.0f, counts = 0.0f;
#pragma unroll 1
  for (int n = threadIdx.x; n < N; n += blockDim.x)
    value += terms[n], counts += terms[N + n];
  value = block_reduce<Sum>(value);
  counts = block_reduce<Sum>(counts);
  if (threadIdx.x != 0) return;
  const float divisor = mean ? counts : 1.0f;
  *total = divisor;
  *loss = value / divisor;
}

extern "C" __global__ void weighted_nll_backward(
    float* __restrict__ dlog_probs,     // (N, F)
    const int* __restrict__ labels,     // (N,)
    const float* __restrict__ weight,   // (F,) or null
    const float* __restrict__ total,    // ()
    float smoothing, int ignores, int ignore_index, int N, int F) {
  const int64 n = WarpGroup::row();
  if (n >= N) return;
  const int label = labels[n];
  const bool counts = !ignores || label != ignore_index;
  const float divisor = *total, share = smoothing / (float)F;
#pragma unroll 1
  for (int f = WarpGroup::rank(); f < F; f += WARP) {
    const float q =
        ((f == label ? 1.0f - smoothing : 0.0f) + share) * weight_of(weight, f);
    dlog_probs[n * F + f] = counts ? -q / divisor : 0.0f;
  }
}

extern "C" __global__ void weighted_cross_entropy_backward(
    float* __restrict__ dlogits,           // (N, F)
    const float* __restrict__ log_probs,   // (N, F)
    const int* __restrict__ labels,        // (N,)
    const float* __restrict__ weight,      // (F,) or null
    const float* __restrict__ total,       // ()
    float smoothing, int ignores, int ignore_index, int N, int F) {
  const int64 n = WarpGroup::row();
  if (n >= N) return;
  const int label = labels[n], lane = WarpGroup::rank();
  const bool counts = !ignores || label != ignore_index;
  const float divisor = *total, share = smoothing / (float)F;
  float sum = 0.0f;  // of q
#pragma unroll 1
  for (int f = lane; f < F; f += WARP)
    sum += ((f == label ? 1.0f - smoothing : 0.0f) + share) * weight_of(weight, f);
  sum = warp_reduce<Sum>(sum);
#pragma unroll 1
  for (int f = lane; f < F; f += WARP) {
    const float q =
        ((f == label ? 1.0f - smoothing : 0.0f) + share) * weight_of(weight, f);
    const float gradient = (expf(log_probs[n * F + f]) * sum - q) / divisor;
    dlogits[n * F + f] = counts ? gradient : 0.0f;
  }
}
