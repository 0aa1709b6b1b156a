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
