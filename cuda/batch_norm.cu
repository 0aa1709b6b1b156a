// Batch normalisation of images (N, C, H, W), a channel at a time: M = N H W numbers.
//
//   forward   y = (x - mean) r weight + bias,  r = 1 / sqrt(variance + eps)
//             mean = sum x / M,  variance = sum (x - mean)^2 / M
//   backward  with u = (x - mean) r:  dbias = sum dy,  dweight = sum dy u,
//             dx = weight r (dy - sum dy / M - u sum (dy u) / M), see
//             ops/reference_batch_norm.py; of given statistics, dx = weight r dy
//   with relu y is max(that, 0), and dy counts where y > 0, which backward finds out
//             from x again: ReLU costs no pass over memory of its own
//
// The numbers of a channel are cut into parts, one block each, so that few channels
// keep a GPU busy as well. A second launch joins the parts in a fixed order; where
// there is one part, the first does it all.
//
// A variance must not be a difference of large sums. A block takes its part twice, the
// second time out of a cache: the mean m, then the sum of (x - m)^2. Parts (n, m, S)
// are joined by (Chan, Golub, LeVeque 1979), with d = m_b - m_a:
//   n = n_a + n_b,   m = m_a + d n_b / n,   S = S_a + S_b + d^2 n_a n_b / n
//
// Threads take four pixels at a time where planes have a multiple of four. Whether they
// lie at a multiple of 16 bytes changes the loads, not the order of the sums.
#include "common.cuh"

// Four pixels, or one.
template <int V>
struct Pixels {
  float v[V];

  METHOD Pixels(const float* p, bool aligned) {
    if (V == 4 && aligned) {
      const float4 four = *(const float4*)p;
      v[0] = four.x, v[V > 1 ? 1 : 0] = four.y;
      v[V > 2 ? 2 : 0] = four.z, v[V > 3 ? 3 : 0] = four.w;
    } else {
#pragma unroll
      for (int j = 0; j < V; ++j) v[j] = p[j];
    }
  }

  METHOD void store(float* p, bool aligned) const {
    if (V == 4 && aligned) {
      *(float4*)p = make_float4(v[0], v[V > 1 ? 1 : 0], v[V > 2 ? 2 : 0],
                                v[V > 3 ? 3 : 0]);
    } else {
#pragma unroll
      for (int j = 0; j < V; ++j) p[j] = v[j];
    }
  }
};

// Walks through the units (of V pixels) of a channel, image after image, from unit
// `first` on in strides. It divides once, at the start.
struct Cursor {
  int n, at, units, step_n, step_at;

  METHOD Cursor(int64 first, int stride, int units)
      : n((int)(first / units)),
        at((int)(first % units)),
        units(units),
        step_n(stride / units),
        step_at(stride % units) {}

  METHOD void advance() {
    n += step_n, at += step_at;
    if (at >= units) at -= units, ++n;
  }

  // where it is in (N, C, units)
  METHOD int64 offset(int C, int c) const { return ((int64)n * C + c) * units + at; }
};

// The units of part blockIdx.y.
struct Part {
  int64 first, end;
  METHOD Part(int64 units, int units_a_part)
      : first((int64)blockIdx.y * units_a_part),
        end(min(units, first + units_a_part)) {}
};

struct Moments {
  float count, mean, squares;  // squares: sum of (x - mean)^2

  DEVICE Moments join(Moments a, Moments b) {
    const float count = a.count + b.count;
    if (count == 0.0f) return a;
    const float d = b.mean - a.mean, share = b.count / count;
    return {count, a.mean + d * share, a.squares + b.squares + d * d * a.count * share};
  }
};

// What the first of the moments' threads does when a channel is done.
DEVICE void finish_moments(Moments of, int c, float* mean, float* variance,
                           float* running_mean, float* running_var, const int* batches,
                           float momentum) {
  mean[c] = of.mean;
  variance[c] = of.squares / of.count;
  if (running_mean == nullptr) return;
  // the count of batches is raised by the kernel that follows, when all have read it
  const float f = momentum < 0.0f ? 1.0f / (float)(*batches + 1) : momentum;
  running_mean[c] = (1.0f - f) * running_mean[c] + f * of.mean;
  running_var[c] = (1.0f - f) * running_var[c] + f * (of.squares / (of.count - 1.0f));
}

template <int V>
DEVICE Moments moments_of_part(const float* __restrict__ x, int N, int C, int pixels,
                               int units_a_part) {
  const int units = pixels / V, c = blockIdx.x;
  const Part part((int64)N * units, units_a_part);
  const int own = (int)(part.end - part.first);
  const float count = (float)own * (float)V;
  const bool aligned = aligned16(x);
  float sum = 0.0f;
  Cursor at(part.first + threadIdx.x, blockDim.x, units);
#pragma unroll 2
  for (int i = threadIdx.x; i < own; i += blockDim.x, at.advance()) {
    const Pixels<V> p(x + at.offset(C, c) * V, aligned);
#pragma unroll
    for (int j = 0; j < V; ++j) sum += p.v[j];
  }
  const float near = block_reduce<Sum>(sum) / count;
  // the rounding of that mean is found with the squares, and taken out
  float rest = 0.0f, squares = 0.0f;
  at = Cursor(part.first + threadIdx.x, blockDim.x, units);
#pragma unroll 2
  for (int i = threadIdx.x; i < own; i += blockDim.x, at.advance()) {
    const Pixels<V> p(x + at.offset(C, c) * V, aligned);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float d = p.v[j] - near;
      rest += d;
      squares += d * d;
    }
  }
  rest = block_reduce<Sum>(rest);
  squares = block_reduce<Sum>(squares);
  const float off = rest / count;
  squares -= rest * off;
  // never below 0 but by rounding; NaN stays NaN
  return {count, near + off, squares < 0.0f ? 0.0f : squares};
}

// Launch: grid (C, parts), blocks of full warps. units_a_part counts units of four
// pixels if 4 divides `pixels`, else pixels. With one part mean, variance and the
// running statistics are written, with several the parts.
extern "C" __global__ void batch_norm_moments(
    float* __restrict__ parts,          // (2, C, parts): means, squares; or null
    float* __restrict__ mean,           // (C,)
    float* __restrict__ variance,       // (C,)
    float* __restrict__ running_mean,   // (C,) or null
    float* __restrict__ running_var,    // (C,)
    const int* __restrict__ batches,    // ()
    const float* __restrict__ x,        // (N, C, pixels)
    float momentum, int N, int C, int pixels, int units_a_part) {
  const Moments of = pixels % 4 == 0
                         ? moments_of_part<4>(x, N, C, pixels, units_a_part)
                         : moments_of_part<1>(x, N, C, pixels, units_a_part);
  if (threadIdx.x > 0) return;
  const int c = blockIdx.x;
  if (gridDim.y == 1) {
    finish_moments(of, c, mean, variance, running_mean, running_var, batches, momentum);
  } else {
    const int64 at = (int64)c * gridDim.y + blockIdx.y;
    parts[at] = of.mean;
    parts[(int64)C * gridDim.y + at] = of.squares;
  }
}

// Launch: one warp a channel, as many warps as channels or more. numbers: of a part,
// but the last, which has what is left of `total`.
extern "C" __global__ void batch_norm_join_moments(
    float* __restrict__ mean,           // (C,)
    float* __restrict__ variance,       // (C,)
    float* __restrict__ running_mean,   // (C,) or null
    float* __restrict__ running_var,    // (C,)
    const int* __restrict__ batches,    // ()
    const float* __restrict__ parts,    // (2, C, count)
    float momentum, int C, int count, int64 numbers, int64 total) {
  const int64 c = WarpGroup::row();
  if (c >= C) return;
  Moments of = {0.0f, 0.0f, 0.0f};
#pragma unroll 1
  for (int i = WarpGroup::rank(); i < count; i += WARP) {
    const int64 at = c * count + i;
    const int64 own = min(numbers, total - i * numbers);
    of = Moments::join(of, {(float)own, parts[at], parts[(int64)C * count + at]});
  }
#pragma unroll
  for (int lanes = WARP / 2; lanes > 0; lanes /= 2) {
    const Moments other = {__shfl_xor_sync(ALL_LANES, of.count, lanes),
                           __shfl_xor_sync(ALL_LANES, of.mean, lanes),
                           __shfl_xor_sync(ALL_LANES, of.squares, lanes)};
    of = Moments::join(of, other);
  }
  if (WarpGroup::rank() == 0)
    finish_moments(of, (int)c, mean, variance, running_mean, running_var, batches,
                   momentum);
}

// y before ReLU; forward and backward must agree on its sign, hence to the bit
struct Line {
  float mean, r, scale, shift;

  METHOD Line(int c, const float* mean_, const float* variance, const float* weight,
              const float* bias, float eps)
      : mean(mean_[c]),
        r(1.0f / sqrtf(variance[c] + eps)),
        scale(weight == nullptr ? r : r * weight[c]),
        shift(bias == nullptr ? 0.0f : bias[c]) {}

  METHOD float operator()(float x) const { return __fmaf_rn(x - mean, scale, shift); }
};

template <int V>
DEVICE void normalise(float* __restrict__ y, const float* __restrict__ x, Line line,
                      bool relu, int64 i, int64 image, int N) {
  const bool aligned = aligned16(x) && aligned16(y);
#pragma unroll 1
  for (int n = blockIdx.y; n < N; n += gridDim.y) {
    const int64 at = ((int64)n * image + i) * V;
    Pixels<V> p(x + at, aligned);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float value = line(p.v[j]);
      p.v[j] = relu && value <= 0.0f ? 0.0f : value;  // NaN stays NaN
    }
    p.store(y + at, aligned);
  }
}

// Launch: grid (blocks over the units of an image, images or fewer), one-dimensional
// blocks. A unit is four pixels if 4 divides `pixels`, else one.
extern "C" __global__ void batch_norm_normalise(
    float* __restrict__ y,                // (N, C, pixels)
    int* __restrict__ batches,            // (), raised by 1; or null
    const float* __restrict__ x,          // (N, C, pixels)
    const float* __restrict__ weight,     // (C,) or null
    const float* __restrict__ bias,       // (C,) or null
    const float* __restrict__ mean,       // (C,)
    const float* __restrict__ variance,   // (C,)
    float eps, int N, int C, int pixels, int relu) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i == 0 && blockIdx.y == 0 && batches != nullptr) ++*batches;
  const int units = pixels % 4 == 0 ? pixels / 4 : pixels;
  if (i >= C * units) return;
  const Line line(i / units, mean, variance, weight, bias, eps);
  if (pixels % 4 == 0)
    normalise<4>(y, x, line, relu, i, (int64)C * units, N);
  else
    normalise<1>(y, x, line, relu, i, (int64)C * units, N);
}

// What one thread does when the sums of a channel are there; r = 1 / sqrt(variance +
// eps).
DEVICE void finish_sums(float plain, float moment, int C, int c, float* sums,
                        float* dweight, float* dbias, float r, int accumulate) {
  sums[c] = plain;
  sums[C + c] = moment;
  if (dbias != nullptr) dbias[c] = accumulate ? dbias[c] + plain : plain;
  if (dweight != nullptr) {
    const float d = moment * r;
    dweight[c] = accumulate ? dweight[c] + d : d;
  }
}

template <int V>
DEVICE void sums_of_part(const float* __restrict__ dy, const float* __restrict__ x,
                         Line line, bool relu, int N, int C, int pixels,
                         int units_a_part, float& plain, float& moment) {
  const int units = pixels / V, c = blockIdx.x;
  const Part part((int64)N * units, units_a_part);
  const int own = (int)(part.end - part.first);
  const bool aligned = aligned16(x) && aligned16(dy);
  Cursor at(part.first + threadIdx.x, blockDim.x, units);
#pragma unroll 2
  for (int i = threadIdx.x; i < own; i += blockDim.x, at.advance()) {
    const int64 offset = at.offset(C, c) * V;
    const Pixels<V> d(dy + offset, aligned), p(x + offset, aligned);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float passed = !relu || line(p.v[j]) > 0.0f ? d.v[j] : 0.0f;
      plain += passed;
      moment += passed * (p.v[j] - line.mean);
    }
  }
}

// Launch as of batch_norm_moments. With one part sums, dweight and dbias are written
// (or added to), with several the parts.
extern "C" __global__ void batch_norm_sums(
    float* __restrict__ parts,            // (2, C, parts), or null
    float* __restrict__ sums,             // (2, C): of dy, and of dy (x - mean)
    float* __restrict__ dweight,          // (C,) or null
    float* __restrict__ dbias,            // (C,) or null
    const float* __restrict__ dy,         // (N, C, pixels)
    const float* __restrict__ x,          // (N, C, pixels)
    const float* __restrict__ weight,     // (C,) or null
    const float* __restrict__ bias,       // (C,) or null
    const float* __restrict__ mean,       // (C,)
    const float* __restrict__ variance,   // (C,)
    float eps, int N, int C, int pixels, int units_a_part, int accumulate, int relu) {
  const int c = blockIdx.x;
  const Line line(c, mean, variance, weight, bias, eps);
  float plain = 0.0f, moment = 0.0f;
  if (pixels % 4 == 0)
    sums_of_part<4>(dy, x, line, relu, N, C, pixels, units_a_part, plain, moment);
  else
    sums_of_part<1>(dy, x, line, relu, N, C, pixels, units_a_part, plain, moment);
  plain = block_reduce<Sum>(plain);
  moment = block_reduce<Sum>(moment);
  if (threadIdx.x > 0) return;
  if (gridDim.y == 1) {
    finish_sums(plain, moment, C, c, sums, dweight, dbias, line.r, accumulate);
  } else {
    const int64 at = (int64)c * gridDim.y + blockIdx.y;
    parts[at] = plain;
    parts[(int64)C * gridDim.y + at] = moment;
  }
}

// Launch: one warp a channel, as many warps as channels or more.
extern "C" __global__ void batch_norm_join_sums(
    float* __restrict__ sums,             // (2, C)
    float* __restrict__ dweight,          // (C,) or null
    float* __restrict__ dbias,            // (C,) or null
    const float* __restrict__ parts,      // (2, C, count)
    const float* __restrict__ variance,   // (C,)
    float eps, int C, int count, int accumulate) {
  const int64 c = WarpGroup::row();
  if (c >= C) return;
  float plain = 0.0f, moment = 0.0f;
#pragma unroll 1
  for (int i = WarpGroup::rank(); i < count; i += WARP) {
    plain += parts[c * count + i];
    moment += parts[((int64)C + c) * count + i];
  }
  plain = warp_reduce<Sum>(plain);
  moment = warp_reduce<Sum>(moment);
  if (WarpGroup::rank() == 0)
    finish_sums(plain, moment, C, (int)c, sums, dweight, dbias,
                1.0f / sqrtf(variance[c] + eps), accumulate);
}

template <int V>
DEVICE void gradient_x(float* __restrict__ dx, const float* __restrict__ dy,
                       const float* __restrict__ x, Line line, float plain,
                       float moment, bool of_batch, bool relu, int64 i, int64 image,
                       int N) {
  const bool aligned = aligned16(x) && aligned16(dy) && aligned16(dx);
#pragma unroll 1
  for (int n = blockIdx.y; n < N; n += gridDim.y) {
    const int64 at = ((int64)n * image + i) * V;
    Pixels<V> d(dy + at, aligned);
    if (of_batch || relu) {
      const Pixels<V> p(x + at, aligned);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        if (relu && !(line(p.v[j]) > 0.0f)) d.v[j] = 0.0f;
        if (of_batch) d.v[j] -= plain + (p.v[j] - line.mean) * moment;
      }
    }
#pragma unroll
    for (int j = 0; j < V; ++j) d.v[j] *= line.scale;
    d.store(dx + at, aligned);
  }
}

// Launch as of batch_norm_normalise. sums is null for given statistics.
extern "C" __global__ void batch_norm_gradient(
    float* __restrict__ dx,               // (N, C, pixels)
    const float* __restrict__ dy,         // (N, C, pixels)
    const float* __restrict__ x,          // (N, C, pixels)
    const float* __restrict__ weight,     // (C,) or null
    const float* __restrict__ bias,       // (C,) or null
    const float* __restrict__ mean,       // (C,)
    const float* __restrict__ variance,   // (C,)
    const float* __restrict__ sums,       // (2, C) or null
    float eps, int N, int C, int pixels, int relu) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const int units = pixels % 4 == 0 ? pixels / 4 : pixels;
  if (i >= C * units) return;
  const int c = i / units;
  const Line line(c, mean, variance, weight, bias, eps);
  const float count = (float)N * (float)pixels;
  const bool of_batch = sums != nullptr;
  const float plain = of_batch ? sums[c] / count : 0.0f;
  const float moment = of_batch ? sums[C + c] / count * (line.r * line.r) : 0.0f;
  if (pixels % 4 == 0)
    gradient_x<4>(dx, dy, x, line, plain, moment, of_batch, relu, i,
                  (int64)C * units, N);
  else
    gradient_x<1>(dx, dy, x, line, plain, moment, of_batch, relu, i,
                  (int64)C * units, N);
}
