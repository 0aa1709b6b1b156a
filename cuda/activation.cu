// Activation functions, one output element for one input element.
//
// Launch: any one-dimensional grid and block; the loops stride over the grid. n >= 0
// elements.
#include "map.cuh"

// dy/dx = 1 - tanh^2 = 1 - y^2
extern "C" __global__ void tanh_forward(float* y, const float* x, int64 n) {
  map(y, x, n, [](float v) { return tanhf(v); });
}

extern "C" __global__ void tanh_backward(float* dx, const float* dy, const float* y,
                                         int64 n) {
  map(dx, dy, y, n, [](float d, float v) { return d * (1.0f - v * v); });
}

// y = x where x > 0, else slope * x; at 0 the derivative is taken to be slope.
extern "C" __global__ void leaky_relu_forward(float* y, const float* x, float slope,
                                              int64 n) {
  map(y, x, n, [slope](float v) { return v > 0.0f ? v : slope * v; });
}

extern "C" __global__ void leaky_relu_backward(float* dx, const float* dy,
                                               const float* x, float slope, int64 n) {
  map(dx, dy, x, n, [slope](float d, float v) { return v > 0.0f ? d : slope * d; });
}

// y = x between low and high, and the nearer of them elsewhere; NaN stays NaN. At both
// ends the derivative is taken to be 0.
extern "C" __global__ void hardtanh_forward(float* y, const float* x, float low,
                                            float high, int64 n) {
  map(y, x, n, [low, high](float v) { return v < low ? low : v > high ? high : v; });
}

extern "C" __global__ void hardtanh_backward(float* dx, const float* dy, const float* x,
                                             float low, float high, int64 n) {
  map(dx, dy, x, n, [low, high](float d, float v) {
    return v <= low || v >= high ? 0.0f : d;
  });
}

// s = 1 / (1 + e^-x), of e^-|x|, which cannot overflow.
DEVICE float sigmoid(float x) {
  const float e = expf(-fabsf(x));
  return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

// ds/dx = s (1 - s) = s(x) s(-x), the same for both signs of x.
DEVICE float sigmoid_slope(float x) {
  const float e = expf(-fabsf(x));
  return e / ((1.0f + e) * (1.0f + e));
}

// y = x s(x); dy/dx = s + x s (1 - s) by the product rule.
extern "C" __global__ void silu_forward(float* y, const float* x, int64 n) {
  map(y, x, n, [](float v) { return v * sigmoid(v); });
}

extern "C" __global__ void silu_backward(float* dx, const float* dy, const float* x,
                                         int64 n) {
  map(dx, dy, x, n,
      [](float d, float v) { return d * (sigmoid(v) + v * sigmoid_slope(v)); });
}

// GELU: y = x Phi(x), dy/dx = Phi + x Phi'. Phi(x) = erfc(-x / sqrt 2) / 2, which keeps
// its relative precision where it is small, and Phi' = e^(-x^2 / 2) / sqrt(2 pi).
DEVICE float normal_distribution(float x) {
  return 0.5f * erfcf(-0.70710678118654752f * x);
}

extern "C" __global__ void gelu_forward(float* y, const float* x, int64 n) {
  map(y, x, n, [](float v) { return v * normal_distribution(v); });
}

extern "C" __global__ void gelu_backward(float* dx, const float* dy, const float* x,
                                         int64 n) {
  map(dx, dy, x, n, [](float d, float v) {
    const float density = 0.39894228040143268f * expf(-0.5f * v * v);
    return d * (normal_distribution(v) + v * density);
  });
}

// Its approximation: Phi = (1 + tanh(u / 2)) / 2 = s(u), u = 2 sqrt(2 / pi) (x +
// 0.044715 x^3). Where |x| > 16 it is 0 or 1 to any precision, and u' could overflow.
DEVICE float flat_beyond(float x) {  // NaN stays NaN
  return x > 16.0f ? 16.0f : x < -16.0f ? -16.0f : x;
}

DEVICE float gelu_argument(float x) {
  return 1.5957691216057308f * x * (1.0f + 0.044715f * x * x);
}

extern "C" __global__ void gelu_tanh_forward(float* y, const float* x, int64 n) {
  map(y, x, n,
      [](float v) { return v * sigmoid(gelu_argument(flat_beyond(v))); });
}

extern "C" __global__ void gelu_tanh_backward(float* dx, const float* dy,
                                              const float* x, int64 n) {
  map(dx, dy, x, n, [](float d, float v) {
    const float c = flat_beyond(v), u = gelu_argument(c);
    const float slope = 1.5957691216057308f * (1.0f + 0.134145f * c * c);
    return d * (sigmoid(u) + v * sigmoid_slope(u) * slope);
  });
}
