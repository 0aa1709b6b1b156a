// Sums of partial gradients, alone or with the optimizer's update of all parameters.
//
// A gradient of n numbers comes in `splits` partials, one after the other:
//   grad[i] = partials[0][i] + partials[1][i] + ...
// in an order that depends on nothing but `splits`, so equal input gives equal bits.
//
// A block of 256 threads is 1, 2, 4 or 8 groups, more for more splits. A thread of a
// group has 4 neighbouring numbers. Its group adds every groups-th partial; then the
// sums of the groups are added in order. TOGETHER partials are fetched at a time, so
// that a thread waits for memory once where there are up to 32.
//
// The update takes a table of all parameters of a slab (see Entry). The arithmetic of a
// step is that of cuda/optim.cu:
//   g = grad + weight_decay * param
//   RMSprop  v = alpha * v + (1 - alpha) * g * g;  u = g / (sqrt(v) + eps)
//            momentum: b = momentum * b + u;  u = b          param -= lr * u
//   SGD      momentum: b = momentum * b + g;  g = nesterov ? g + momentum * b : b
//            param -= lr * g
//   Adam, Adagrad: as adam_step and adagrad_step there, which also say what steps is
#include "fused.cuh"

constexpr int THREADS = 256, TOGETHER = 4;

// A filter (K, C, taps) packed as conv_pack_filter of conv_block_forward.cu does it.
struct Packed {
  void* to;  // null: there is none
  u32 mode, channels, taps, slot_taps, quads, outputs, chunks;

  __device__ __forceinline__ u32 quad_c() const { return mode == MODE_BF16 ? 8 : 4; }
  // numbers of a slot's part: the big or the small halves
  __device__ __forceinline__ u32 part() const {
    return slot_taps * quads * outputs * quad_c();
  }
  // where number i of the filter goes
  __device__ __forceinline__ u32 place(u32 i) const {
    const u32 tap = i % taps, c = i / taps % channels, k = i / taps / channels,
              quad = c / quad_c();
    const u32 slot = (k / outputs * chunks + quad / quads) * (taps / slot_taps) +
                     tap / slot_taps;
    const u32 unit = (tap % slot_taps * quads + quad % quads) * outputs + k % outputs;
    const u32 parts = mode == MODE_FP32 ? 2 : 1;
    return slot * parts * part() + unit * quad_c() + c % quad_c();
  }
  __device__ __forceinline__ void store(u32 at, float v) const {
    if (mode == MODE_BF16) {
      ((u16*)to)[at] = pack_bf16(v, 0.0f);
      return;
    }
    const u32 big = round_tf32(v);
    ((u32*)to)[at] = big;
    if (mode == MODE_FP32) ((u32*)to)[at + part()] = rest_tf32(v, big);
  }
};

// A parameter: where it lies in the slabs, and where its partials are. Written by the
// host (_ENTRY in fused_cuda_backward.py).
struct Entry {
  long long offset;       // of its first number in the slabs, a multiple of 4
  long long count;        // numbers
  const float* partials;  // (splits, count)
  long long splits;
  long long first_block;  // blocks of a parameter are neighbours
  Packed packed;
};

__host__ __device__ constexpr int groups_of(long long splits) {
  return splits > 4 * TOGETHER   ? 8
         : splits > 2 * TOGETHER ? 4
         : splits > TOGETHER     ? 2
                                 : 1;
}

// Numbers at .. at+3 of a row of `count`; the slow way at its end, or where rows of
// `count` numbers do not all start at 16 bytes.
__device__ __forceinline__ float4 load4(const float* from, long long at,
                                        long long count, bool aligned) {
  if (aligned && at + 4 <= count) return *(const float4*)(from + at);
  float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (at < count) v.x = from[at];
  if (at + 1 < count) v.y = from[at + 1];
  if (at + 2 < count) v.z = from[at + 2];
  if (at + 3 < count) v.w = from[at + 3];
  return v;
}
__device__ __forceinline__ void store4(float* to, long long at, long long count,
                                       float4 v) {
  if (at + 4 <= count) {
    *(float4*)(to + at) = v;
    return;
  }
  if (at < count) to[at] = v.x;
  if (at + 1 < count) to[at + 1] = v.y;
  if (at + 2 < count) to[at + 2] = v.z;
}
__device__ __forceinline__ float4 plus(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// The gradient of this thread's numbers at .. at+3, in the threads of the first group.
__device__ __forceinline__ float4 sum_partials(const float* __restrict__ partials,
                                               int splits, long long count,
                                               long long at, int groups) {
  __shared__ float4 of_group[THREADS];
  const int members = THREADS / groups, group = threadIdx.x / members;
  const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  float4 sum = zero;
  const float* from = partials + group * count;
  const long long step = groups * count;
  if (count % 4 == 0 && at < count) {
#pragma unroll 1
    for (int split = group; split < splits; split += TOGETHER * groups) {
      float4 part[TOGETHER];
#pragma unroll
      for (int i = 0; i < TOGETHER; ++i, from += step)
        part[i] = split + i * groups < splits ? *(const float4*)(from + at) : zero;
#pragma unroll
      for (int i = 0; i < TOGETHER; ++i) sum = plus(sum, part[i]);
    }
  } else {
    for (int split = group; split < splits; split += groups, from += step)
      sum = plus(sum, load4(from, at, count, false));
  }
  if (groups == 1) return sum;
  of_group[threadIdx.x] = sum;
  __syncthreads();
  if (group == 0)
    for (int other = 1; other < groups; ++other)
      sum = plus(sum, of_group[threadIdx.x + other * members]);
  return sum;
}

// The gradients of a layer, weight (n) and bias (m, may be 0), from their partials
// (splits, n) and (splits, m). Grid: ceil(n / (1024 / groups)) + ceil(m / (1024 /
// groups)).
extern "C" __global__ void __launch_bounds__(THREADS)
    reduce_partials(const float* __restrict__ weight_partials,
                    float* __restrict__ dweight, int n,
                    const float* __restrict__ bias_partials, float* __restrict__ dbias,
                    int m, int splits) {
  wait_for_earlier_kernels();
  let_next_kernel_start();
  const int groups = groups_of(splits), members = THREADS / groups;
  const int weight_blocks = ceil_div(n, 4 * members);
  const bool bias = blockIdx.x >= weight_blocks;
  const int block = bias ? blockIdx.x - weight_blocks : blockIdx.x,
            count = bias ? m : n;
  const long long at = ((long long)block * members + threadIdx.x % members) * 4;
  const float4 sum =
      sum_partials(bias ? bias_partials : weight_partials, splits, count, at, groups);
  if (threadIdx.x < members) store4(bias ? dbias : dweight, at, count, sum);
}

struct RMSprop {
  float alpha, eps, weight_decay, momentum;

  __device__ __forceinline__ void step(float& param, float grad, float& square,
                                       float& buffer, float lr) const {
    const float g = grad + weight_decay * param;
    square = alpha * square + (1.0f - alpha) * g * g;
    float u = g / (sqrtf(square) + eps);
    if (momentum != 0.0f) u = buffer = momentum * buffer + u;
    param -= lr * u;
  }
};

struct SGD {
  float weight_decay, momentum;
  bool nesterov;

  __device__ __forceinline__ void step(float& param, float grad, float&, float& buffer,
                                       float lr) const {
    float g = grad + weight_decay * param;
    if (momentum != 0.0f) {
      buffer = momentum * buffer + g;
      g = nesterov ? g + momentum * buffer : buffer;
    }
    param -= lr * g;
  }
};

// Slabs that a rule has no use for are null; grads too if nobody wants to see
// gradients.
template <class Rule>
__device__ __forceinline__ void update(const Entry* __restrict__ table, int entries,
                                       float* __restrict__ params,
                                       float* __restrict__ grads,
                                       float* __restrict__ squares,
                                       float* __restrict__ buffers,
                                       const float* __restrict__ lr, const Rule& rule) {
  // all threads look for the entry of this block at once
  int before = 0;
  for (int first = 0; first < entries; first += THREADS) {
    const int i = first + threadIdx.x;
    before += __syncthreads_count(i < entries && table[i].first_block <= blockIdx.x);
  }
  const Entry& entry = table[before - 1];
  const int groups = groups_of(entry.splits), members = THREADS / groups;
  const long long at =
      ((blockIdx.x - entry.first_block) * members + threadIdx.x % members) * 4;
  const bool owner = threadIdx.x < members && at < entry.count;
  // what earlier kernels of the step do not write is fetched before waiting for them
  float4 param, square, buffer;
  param = square = buffer = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (owner) {
    param = load4(params + entry.offset, at, entry.count, true);
    if (squares) square = load4(squares + entry.offset, at, entry.count, true);
    if (buffers) buffer = load4(buffers + entry.offset, at, entry.count, true);
  }
  const bool packs = owner && entry.packed.to;
  u32 place[4];
#pragma unroll
  for (int e = 0; packs && e < 4; ++e) place[e] = entry.packed.place(at + e);
  wait_for_earlier_kernels();
  let_next_kernel_start();
  const float rate = *lr;
  const float4 grad =
      sum_partials(entry.partials, (int)entry.splits, entry.count, at, groups);
  if (!owner) return;
  rule.step(param.x, grad.x, square.x, buffer.x, rate);
  rule.step(param.y, grad.y, square.y, buffer.y, rate);
  rule.step(param.z, grad.z, square.z, buffer.z, rate);
  rule.step(param.w, grad.w, square.w, buffer.w, rate);
  store4(params + entry.offset, at, entry.count, param);
  if (grads) store4(grads + entry.offset, at, entry.count, grad);
  if (squares) store4(squares + entry.offset, at, entry.count, square);
  if (buffers) store4(buffers + entry.offset, at, entry.count, buffer);
  if (!packs) return;
  const float numbers[4] = {param.x, param.y, param.z, param.w};
#pragma unroll
  for (int e = 0; e < 4; ++e)
    if (at + e < entry.count) entry.packed.store(place[e], numbers[e]);
}

// Grid: the sum over the table of ceil(count / (1024 / groups)). lr: one number on the
// device.
extern "C" __global__ void __launch_bounds__(THREADS)
    update_rmsprop(const Entry* table, int entries, float* params, float* grads,
                   float* squares, float* buffers, const float* lr, float alpha,
                   float eps, float weight_decay, float momentum) {
  update(table, entries, params, grads, squares, buffers, lr,
         RMSprop{alpha, eps, weight_decay, momentum});
}

extern "C" __global__ void __launch_bounds__(THREADS)
    update_sgd(const Entry* table, int entries, float* params, float* grads,
               float* buffers, const float* lr, float weight_decay, float momentum,
               int nesterov) {
  update(table, entries, params, grads, nullptr, buffers, lr,
         SGD{weight_decay, momentum, nesterov != 0});
}

// 1 - beta^t without the cancellation where beta^t is close to 1; log_beta <= 0 may be
// -infinity.
__device__ __forceinline__ float correction(float log_beta, float t) {
  return -expm1f(t * log_beta);
}

// Of Adam and AdamW: square is the mean square, buffer the mean. What depends on the
// step alone the compiler computes once for all the numbers of a thread.
struct Adam {
  const int* steps;
  float beta1, rest1, log1, beta2, rest2, log2, eps, weight_decay;
  bool decoupled;

  __device__ __forceinline__ void step(float& param, float grad, float& square,
                                       float& buffer, float lr) const {
    const float t = (float)(steps[0] + 1);
    const float rate = lr / correction(log1, t), root2 = sqrtf(correction(log2, t));
    const float p = decoupled ? (1.0f - lr * weight_decay) * param : param;
    const float g = decoupled ? grad : grad + weight_decay * p;
    buffer = beta1 * buffer + rest1 * g;
    square = beta2 * square + rest2 * g * g;
    param = p - rate * buffer / (sqrtf(square) / root2 + eps);
  }
};

// Square is the sum of squares.
struct Adagrad {
  const int* steps;
  float lr_decay, eps, weight_decay;

  __device__ __forceinline__ void step(float& param, float grad, float& square, float&,
                                       float lr) const {
    const float g = grad + weight_decay * param;
    square += g * g;
    param -= lr / (1.0f + (float)steps[0] * lr_decay) * g / (sqrtf(square) + eps);
  }
};

// As count_step of optim.cu: the last block that has read the step counts it.
__device__ __forceinline__ void count_step(int* steps) {
  __syncthreads();
  if (threadIdx.x != 0 || atomicAdd(steps + 1, 1) != (int)gridDim.x - 1) return;
  steps[0] += 1;
  steps[1] = 0;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    update_adam(const Entry* table, int entries, float* params, float* grads,
                float* squares, float* buffers, int* steps, int advance,
                const float* lr, float beta1, float rest1, float log1, float beta2,
                float rest2, float log2, float eps, float weight_decay,
                int decoupled) {
  update(table, entries, params, grads, squares, buffers, lr,
         Adam{steps, beta1, rest1, log1, beta2, rest2, log2, eps, weight_decay,
              decoupled != 0});
  if (advance) count_step(steps);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    update_adagrad(const Entry* table, int entries, float* params, float* grads,
                   float* squares, int* steps, int advance, const float* lr,
                   float lr_decay, float eps, float weight_decay) {
  update(table, entries, params, grads, squares, nullptr, lr,
         Adagrad{steps, lr_decay, eps, weight_decay});
  if (advance) count_step(steps);
}
