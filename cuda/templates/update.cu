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
// of a multiprocessor: those of a small network all run at once
constexpr int BLOCKS = 4;

// A filter (K, C, taps) packed as conv_pack_filter of conv_block_forward.cu does it: in
// units of 16 bytes, each some channels ("quad") of one output and one tap.
struct Packed {
  void* to;  // null: there is none
  u32 mode, channels, taps, slot_taps, quads, outputs, chunks;

  // channels of a unit
  __device__ __forceinline__ u32 quad_c() const { return mode == MODE_BF16 ? 8 : 4; }
  __device__ __forceinline__ u32 row_quads() const {
    return (channels - 1) / quad_c() + 1;
  }
  // units of a slot's part: the big or the small halves
  __device__ __forceinline__ u32 slot_units() const {
    return slot_taps * quads * outputs;
  }
  // v[e]: the unit's number of channel e
  __device__ __forceinline__ void store(u32 unit, const float (&v)[8]) const {
    uint4* const at = (uint4*)to + unit;
    if (mode == MODE_BF16) {
      *at = make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]),
                       pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
      return;
    }
    const uint4 big = make_uint4(round_tf32(v[0]), round_tf32(v[1]), round_tf32(v[2]),
                                 round_tf32(v[3]));
    *at = big;
    if (mode == MODE_FP32)
      at[slot_units()] = make_uint4(rest_tf32(v[0], big.x), rest_tf32(v[1], big.y),
                                    rest_tf32(v[2], big.z), rest_tf32(v[3], big.w));
  }
  __device__ __forceinline__ void store(u32 unit, u32 e, float v) const {
    if (mode == MODE_BF16) {
      ((u16*)to)[unit * 8 + e] = pack_bf16(v, 0.0f);
      return;
    }
    u32* const at = (u32*)to + unit * 4 + e;
    const u32 big = round_tf32(v);
    *at = big;
    if (mode == MODE_FP32) at[slot_units() * 4] = rest_tf32(v, big);
  }
};

// Quotient and rest by multiplication: all threads divide by the same few numbers.
struct Divider {
  u32 by, inverse;

  __device__ __forceinline__ void set(u32 divisor) {
    by = divisor;
    inverse = 0xffffffffu / divisor;
  }
  // n < 2^31: the product is at most 1 too small
  __device__ __forceinline__ u32 operator()(u32 n, u32& rest) const {
    u32 quotient = __umulhi(n, inverse);
    rest = n - quotient * by;
    if (rest >= by) ++quotient, rest -= by;
    return quotient;
  }
};

// The units that have some of the numbers begin .. end-1 of a filter, those of a block.
// In shared memory.
struct Units {
  Divider by_taps, by_row_quads, by_outputs, by_quads, by_slot_taps;
  u32 first_quad, count;  // quads counted over all rows k

  // By a warp; then the block synchronises.
  __device__ __forceinline__ void find(const Packed& packed, u32 begin, u32 end) {
    const int lane = threadIdx.x % 32;
    const u32 divisors[] = {packed.taps, packed.row_quads(), packed.outputs,
                            packed.quads, packed.slot_taps};
#pragma unroll
    for (int i = 0; i < 5; ++i)
      if (lane == i) (&by_taps)[i].set(divisors[i]);
    if (lane != 5) return;
    const u32 row = packed.channels * packed.taps,
              piece = packed.quad_c() * packed.taps;  // of a quad, all taps
    const auto quad_of = [&](u32 number) {
      return number / row * packed.row_quads() + number % row / piece;
    };
    first_quad = quad_of(begin);
    count = (quad_of(end - 1) - first_quad + 1) * packed.taps;
  }

  // Stores the numbers begin .. end-1, by all threads of the block. Blocks should share
  // no unit: then all stores are whole ones.
  __device__ __forceinline__ void store(const Packed& packed, const float* numbers,
                                        u32 begin, u32 end) const {
    const u32 taps = packed.taps;
#pragma unroll 1
    for (u32 i = threadIdx.x; i < count; i += THREADS) {
      u32 tap, quad, k_of_tile, quad_of_chunk;
      const u32 k = by_row_quads(first_quad + by_taps(i, tap), quad);
      const u32 tile = by_outputs(k, k_of_tile) * packed.chunks +
                       by_quads(quad, quad_of_chunk);
      u32 unit = ((tile * taps + tap) * packed.quads + quad_of_chunk) * packed.outputs +
                 k_of_tile;
      if (packed.mode == MODE_FP32) {  // small halves lie between slots
        u32 rest;
        const u32 slot = by_slot_taps(tile * taps + tap, rest);
        unit += slot * packed.slot_units();
      }
      const u32 c = quad * packed.quad_c();
      const u32 first = (k * packed.channels + c) * taps + tap;
      const u32 present = min(packed.quad_c(), packed.channels - c);
      if (first >= begin && first + (present - 1) * taps < end) {
        float v[8];
#pragma unroll
        for (u32 e = 0; e < 8; ++e)
          v[e] = e < present ? numbers[first - begin + e * taps] : 0.0f;
        packed.store(unit, v);
      } else {
#pragma unroll 1
        for (u32 e = 0; e < present; ++e) {
          const u32 number = first + e * taps;
          if (number >= begin && number < end)
            packed.store(unit, e, numbers[number - begin]);
        }
      }
    }
  }
};

// A parameter: where it lies in the slabs, and where its partials are. Written by the
// host (_ENTRY in fused_cuda_backward.py).
struct Entry {
  long long offset;       // of its first number in the slabs, a multiple of 4
  const float* partials;  // (splits, count)
  u32 count, splits;
  u32 first_block;  // blocks of a parameter are neighbours
  u32 span;         // numbers of a block, a multiple of 4
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
__device__ __forceinline__ float4 load4(const float* from, u32 at, u32 count,
                                        bool aligned) {
  if (aligned && at + 4 <= count) return *(const float4*)(from + at);
  float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (at < count) v.x = from[at];
  if (at + 1 < count) v.y = from[at + 1];
  if (at + 2 < count) v.z = from[at + 2];
  if (at + 3 < count) v.w = from[at + 3];
  return v;
}
__device__ __forceinline__ void store4(float* to, u32 at, u32 count, float4 v) {
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

// The gradient of this thread's numbers at .. at+3, if they are below `end`, in the
// threads of the first group.
__device__ __forceinline__ float4 sum_partials(const float* __restrict__ partials,
                                               int splits, u32 count, u32 at, u32 end,
                                               int groups,
                                               float4 (&of_group)[THREADS]) {
  const int members = THREADS / groups, group = threadIdx.x / members;
  const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  float4 sum = zero;
  const float* from = partials + (size_t)group * count;
  const size_t step = (size_t)groups * count;
  if (at < end && count % 4 == 0) {
    from += at;
#pragma unroll 1
    for (int split = group; split < splits; split += TOGETHER * groups) {
      float4 part[TOGETHER];
#pragma unroll
      for (int i = 0; i < TOGETHER; ++i, from += step)
        part[i] = split + i * groups < splits ? *(const float4*)from : zero;
#pragma unroll
      for (int i = 0; i < TOGETHER; ++i) sum = plus(sum, part[i]);
    }
  } else if (at < end) {
#pragma unroll 1
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
  const u32 at = (block * members + threadIdx.x % members) * 4;
  __shared__ float4 of_group[THREADS];
  const float4 sum = sum_partials(bias ? bias_partials : weight_partials, splits, count,
                                  at, count, groups, of_group);
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
#pragma unroll 1
  for (int first = 0; first < entries; first += THREADS) {
    const int i = first + threadIdx.x;
    before += __syncthreads_count(i < entries && table[i].first_block <= blockIdx.x);
  }
  __shared__ Entry entry;  // it would take a third of the registers
  __shared__ Units units;
  if (threadIdx.x < sizeof(Entry) / 4)
    ((u32*)&entry)[threadIdx.x] = ((const u32*)(table + before - 1))[threadIdx.x];
  __syncthreads();
  const int groups = groups_of(entry.splits), members = THREADS / groups;
  const u32 begin = (blockIdx.x - entry.first_block) * entry.span,
            end = min(begin + entry.span, entry.count);
  const u32 at = begin + threadIdx.x % members * 4;
  const bool owner = threadIdx.x < members && at < end, packs = entry.packed.to;
  if (packs && threadIdx.x / 32 == 1) units.find(entry.packed, begin, end);
  // what earlier kernels of the step do not write is fetched before waiting for them
  float4 param, square, buffer;
  param = square = buffer = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (owner) {
    param = load4(params + entry.offset, at, entry.count, true);
    if (squares) square = load4(squares + entry.offset, at, entry.count, true);
    if (buffers) buffer = load4(buffers + entry.offset, at, entry.count, true);
  }
  wait_for_earlier_kernels();
  let_next_kernel_start();
  const float rate = *lr;
  __shared__ float4 shared[THREADS];
  const float4 grad = sum_partials(entry.partials, entry.splits, entry.count, at, end,
                                   groups, shared);
  if (owner) {
    rule.step(param.x, grad.x, square.x, buffer.x, rate);
    rule.step(param.y, grad.y, square.y, buffer.y, rate);
    rule.step(param.z, grad.z, square.z, buffer.z, rate);
    rule.step(param.w, grad.w, square.w, buffer.w, rate);
    store4(params + entry.offset, at, entry.count, param);
    if (grads) store4(grads + entry.offset, at, entry.count, grad);
    if (squares) store4(squares + entry.offset, at, entry.count, square);
    if (buffers) store4(buffers + entry.offset, at, entry.count, buffer);
  }
  if (!packs) return;
  // nobody but this thread reads this place in sum_partials
  if (owner) shared[threadIdx.x] = param;
  __syncthreads();
  units.store(entry.packed, (const float*)shared, begin, end);
}

// Grid: the sum over the table of ceil(count / span). lr: one number on the device.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    update_rmsprop(const Entry* table, int entries, float* params, float* grads,
                   float* squares, float* buffers, const float* lr, float alpha,
                   float eps, float weight_decay, float momentum) {
  update(table, entries, params, grads, squares, buffers, lr,
         RMSprop{alpha, eps, weight_decay, momentum});
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
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

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
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

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    update_adagrad(const Entry* table, int entries, float* params, float* grads,
                   float* squares, int* steps, int advance, const float* lr,
                   float lr_decay, float eps, float weight_decay) {
  update(table, entries, params, grads, squares, nullptr, lr,
         Adagrad{steps, lr_decay, eps, weight_decay});
  if (advance) count_step(steps);
}
