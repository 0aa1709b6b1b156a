// Optimizer steps over a slab of parameters, in place.
//
// The learning rate is read from memory, so that a captured step sees a new one.
// Launch: any one-dimensional grid and block.
#include "common.cuh"

// g = grad + weight_decay * param
// v = alpha v + (1 - alpha) g^2       running mean of the squared gradient
// u = g / (sqrt(v) + eps)             the gradient in units of its own size
// param -= lr * u, or with a momentum buffer: b = momentum b + u, param -= lr * b
extern "C" __global__ void rmsprop_step(
    float* __restrict__ param,             // (n,)
    const float* __restrict__ grad,        // (n,)
    float* __restrict__ square_avg,        // (n,)
    float* __restrict__ momentum_buffer,   // (n,) or null
    const float* __restrict__ lr,          // ()
    float alpha, float eps, float weight_decay, float momentum, int64 n) {
  const float rate = *lr;
#pragma unroll 1
  for (int64 i = grid_thread(); i < n; i += grid_threads()) {
    const float p = param[i];
    const float g = grad[i] + weight_decay * p;
    const float v = alpha * square_avg[i] + (1.0f - alpha) * g * g;
    square_avg[i] = v;
    float update = g / (sqrtf(v) + eps);
    if (momentum_buffer) {
      update += momentum * momentum_buffer[i];
      momentum_buffer[i] = update;
    }
    param[i] = p - rate * update;
  }
}

// g = grad + weight_decay * param
// with a momentum buffer: b = momentum b + g, and g becomes b, or g + momentum b for
// Nesterov's form, which looks one step ahead.   param -= lr * g
extern "C" __global__ void sgd_step(
    float* __restrict__ param,             // (n,)
    const float* __restrict__ grad,        // (n,)
    float* __restrict__ momentum_buffer,   // (n,) or null
    const float* __restrict__ lr,          // ()
    float momentum, float weight_decay, int nesterov, int64 n) {
  const float rate = *lr;
#pragma unroll 1
  for (int64 i = grid_thread(); i < n; i += grid_threads()) {
    const float p = param[i];
    float g = grad[i] + weight_decay * p;
    if (momentum_buffer) {
      const float b = momentum * momentum_buffer[i] + g;
      momentum_buffer[i] = b;
      g = nesterov ? g + momentum * b : b;
    }
    param[i] = p - rate * g;
  }
}

// ------------------------------------------------------------------ with a step count
// step: the steps done so far, and 0. Every block reads the former before it adds 1 to
// the latter; the last one to do so counts the step. Launch: one-dimensional, any.

DEVICE void count_step(int* step) {
  __syncthreads();  // all threads of the block have read it
  if (threadIdx.x != 0 || atomicAdd(step + 1, 1) != (int)gridDim.x - 1) return;
  step[0] += 1;
  step[1] = 0;
}

// 1 - beta^t without the cancellation where beta^t is close to 1; log_beta <= 0 may be
// -infinity.
DEVICE float correction(float log_beta, float t) { return -expm1f(t * log_beta); }

// With t the number of this step, from 1:
//   decoupled: p = (1 - lr weight_decay) p;  else g = grad + weight_decay p
//   m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2;  V = max(V, v) or v
//   p -= lr (m / c1) / (sqrt(V / c2) + eps),  c = 1 - beta^t
// rest is 1 - beta, log is log(beta), both rounded from double.
extern "C" __global__ void adam_step(
    float* __restrict__ param,        // (n,)
    const float* __restrict__ grad,   // (n,)
    float* __restrict__ mean,         // (n,) m
    float* __restrict__ square,       // (n,) v
    float* __restrict__ largest,      // (n,) V, or null
    int* step,                        // (2,)
    int advance,
    const float* __restrict__ lr,     // ()
    float beta1, float rest1, float log1, float beta2, float rest2, float log2,
    float eps, float weight_decay, int decoupled, int64 n) {
  const float t = (float)(step[0] + 1);
  const float rate = *lr / correction(log1, t), root2 = sqrtf(correction(log2, t));
  const float keep = decoupled ? 1.0f - *lr * weight_decay : 1.0f;
  const float decay = decoupled ? 0.0f : weight_decay;
#pragma unroll 1
  for (int64 i = grid_thread(); i < n; i += grid_threads()) {
    const float p = keep * param[i];
    const float g = grad[i] + decay * p;
    const float m = beta1 * mean[i] + rest1 * g;
    float v = beta2 * square[i] + rest2 * g * g;
    mean[i] = m;
    square[i] = v;
    if (largest) {
      const float before = largest[i];
      if (v <= before) v = before;  // not where v is NaN
      largest[i] = v;
    }
    param[i] = p - rate * m / (sqrtf(v) / root2 + eps);
  }
  if (advance) count_step(step);
}

// g = grad + weight_decay p;  s += g^2
// p -= lr / (1 + (t - 1) lr_decay) g / (sqrt(s) + eps)
extern "C" __global__ void adagrad_step(
    float* __restrict__ param,        // (n,)
    const float* __restrict__ grad,   // (n,)
    float* __restrict__ square_sum,   // (n,) s
    int* step,                        // (2,)
    int advance,
    const float* __restrict__ lr,     // ()
    float lr_decay, float eps, float weight_decay, int64 n) {
  const float rate = *lr / (1.0f + (float)step[0] * lr_decay);
#pragma unroll 1
  for (int64 i = grid_thread(); i < n; i += grid_threads()) {
    const float p = param[i];
    const float g = grad[i] + weight_decay * p;
    const float s = square_sum[i] + g * g;
    square_sum[i] = s;
    param[i] = p - rate * g / (sqrtf(s) + eps);
  }
  if (advance) count_step(step);
}

// As sgd_step with momentum, but b = momentum b + share g, where share is all of the
// gradient at the first step.
extern "C" __global__ void damped_sgd_step(
    float* __restrict__ param,             // (n,)
    const float* __restrict__ grad,        // (n,)
    float* __restrict__ momentum_buffer,   // (n,)
    int* step,                             // (2,)
    int advance,
    const float* __restrict__ lr,          // ()
    float momentum, float later_share, float weight_decay, int nesterov, int64 n) {
  const float rate = *lr, share = step[0] ? later_share : 1.0f;
#pragma unroll 1
  for (int64 i = grid_thread(); i < n; i += grid_threads()) {
    const float p = param[i];
    const float g = grad[i] + weight_decay * p;
    const float b = momentum * momentum_buffer[i] + share * g;
    momentum_buffer[i] = b;
    param[i] = p - rate * (nesterov ? g + momentum * b : b);
  }
  if (advance) count_step(step);
}

// As rmsprop_step, but with a = alpha a + (1 - alpha) g the divisor is
// sqrt(max(v - a^2, 0)) + eps.
extern "C" __global__ void centered_rmsprop_step(
    float* __restrict__ param,             // (n,)
    const float* __restrict__ grad,        // (n,)
    float* __restrict__ square_avg,        // (n,) v
    float* __restrict__ grad_avg,          // (n,) a
    float* __restrict__ momentum_buffer,   // (n,) or null
    const float* __restrict__ lr,          // ()
    float alpha, float rest, float eps, float weight_decay, float momentum, int64 n) {
  const float rate = *lr;
#pragma unroll 1
  for (int64 i = grid_thread(); i < n; i += grid_threads()) {
    const float p = param[i];
    const float g = grad[i] + weight_decay * p;
    const float v = alpha * square_avg[i] + rest * g * g;
    const float a = alpha * grad_avg[i] + rest * g;
    square_avg[i] = v;
    grad_avg[i] = a;
    const float difference = v - a * a;
    const float variance = difference < 0.0f ? 0.0f : difference;  // NaN stays NaN
    float update = g / (sqrtf(variance) + eps);
    if (momentum_buffer) {
      update += momentum * momentum_buffer[i];
      momentum_buffer[i] = update;
    }
    param[i] = p - rate * update;
  }
}

// ------------------------------------------------------------------ clipping
// The length of all gradients together is known when every slab has been summed; each
// part of a slab by a block, and the parts by every block that needs them.

// out[b] = sum of squares of x[b * size] .. x[(b + 1) * size - 1].
// Launch: a block of full warps for each part.
extern "C" __global__ void square_sums(float* __restrict__ out,      // (gridDim.x,)
                                       const float* __restrict__ x,  // (n,)
                                       int64 size, int64 n) {
  const int64 first = blockIdx.x * size, end = min(n, first + size);
  float sum = 0.0f;
#pragma unroll 4
  for (int64 i = first + threadIdx.x; i < end; i += blockDim.x) sum += x[i] * x[i];
  sum = block_reduce<Sum>(sum);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

// norm = sqrt(sum of sums);  x *= max_norm / (norm + 1e-6) where that is not 1 or more.
// Launch: any one-dimensional grid, blocks of full warps.
extern "C" __global__ void clip_by_norm(float* __restrict__ x,           // (n,)
                                        float* __restrict__ norm,        // ()
                                        const float* __restrict__ sums,  // (parts,)
                                        int parts, float max_norm, int64 n) {
  float sum = 0.0f;
#pragma unroll 4
  for (int i = threadIdx.x; i < parts; i += blockDim.x) sum += sums[i];
  const float length = sqrtf(block_reduce<Sum>(sum));
  if (grid_thread() == 0) *norm = length;
  const float scale = max_norm / (length + 1e-6f);
  if (scale >= 1.0f) return;
#pragma unroll 1
  for (int64 i = grid_thread(); i < n; i += grid_threads()) x[i] *= scale;
}

// ------------------------------------------------------------------ averages

// average += rest (param - average), rest = 1 - decay
extern "C" __global__ void ema_step(float* __restrict__ average,      // (n,)
                                    const float* __restrict__ param,  // (n,)
                                    float rest, int64 n) {
#pragma unroll 1
  for (int64 i = grid_thread(); i < n; i += grid_threads())
    average[i] += rest * (param[i] - average[i]);
}

extern "C" __global__ void swap(float* __restrict__ x,  // (n,)
                                float* __restrict__ y,  // (n,)
                                int64 n) {
#pragma unroll 1
  for (int64 i = grid_thread(); i < n; i += grid_threads()) {
    const float held = x[i];
    x[i] = y[i];
    y[i] = held;
  }
}
