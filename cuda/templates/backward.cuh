// What the backward kernels share. MODE, the precision, is a macro: see fused.cuh.
#pragma once
#include "fused.cuh"

constexpr int THREADS = 256, WARPS = 8;
// numbers a word holds
constexpr int E = MODE == MODE_BF16 ? 2 : 1;

__host__ __device__ constexpr int least(int a, int b) { return a < b ? a : b; }
__host__ __device__ constexpr int most(int a, int b) { return a > b ? a : b; }
// the smallest number >= size that is residue modulo modulus
__host__ __device__ constexpr int stride(int size, int residue, int modulus = 32) {
  return size + ((residue - size) % modulus + modulus) % modulus;
}
// the widest run of floats (4, 2, 1) whose rows of length n all start aligned
__host__ __device__ constexpr int run(int n) {
  return n % 4 == 0 ? 4 : n % 2 == 0 ? 2 : 1;
}

// The same in all lanes, and the compiler can see it: branches on it need no
// convergence.
__device__ __forceinline__ int warp_index() {
  return __shfl_sync(~0u, threadIdx.x / 32, 0);
}

// A number on its way through registers into shared memory.
__device__ __forceinline__ u32 operand(float x) {
  return MODE == MODE_TF32 ? round_tf32(x) : __float_as_uint(x);
}
// Half a unit of tf32, added to a number of which the tensor core cuts the rest off.
// The NaN that the GPU itself makes, 0x7fffffff, stays one.
__device__ __forceinline__ u32 add_half(u32 word) {
  return (u32)min((int)word, 0x7fffefff) + 0x1000u;
}
// A float that was copied into shared memory as it is, on its way to a product. Only of
// x, y and weight, for which 0x7fffffff may pass for 0: where they have it the gradient
// that they meet has long become NaN.
__device__ __forceinline__ u32 copied_operand(u32 word) {
  return MODE == MODE_TF32 ? word + 0x1000u : word;
}

// The same where pairs of bf16 have come through registers.
__device__ __forceinline__ u32 copied_word(u32 word) {
  return E == 1 ? copied_operand(word) : word;
}

// An operand word of the fp32 mode: big + small, each a tf32 (an infinite one gives
// NaN).
struct Split {
  u32 big, small;
  __device__ __forceinline__ Split(u32 word) {
    big = (word + 0x1000u) & 0xffffe000u;
    small = __float_as_uint(__uint_as_float(word) - __uint_as_float(big));
  }
};

// The rows of a product, A (16 x 8 words), ready for many columns.
struct Rows {
  u32 word[4], small[4];  // small: in fp32 only

  __device__ __forceinline__ void set(u32 a0, u32 a1, u32 a2, u32 a3) {
    const u32 a[4] = {a0, a1, a2, a3};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      word[i] = a[i];
      if (MODE == MODE_FP32) {
        const Split split(a[i]);
        word[i] = split.big, small[i] = split.small;
        // the compiler would rather split again for every product
        asm volatile("" : "+r"(word[i]), "+r"(small[i]));
      }
    }
  }
};

// acc (16 x 8) += a b. The fp32 product leaves out small * small. Tensor cores do not
// round sums to nearest, so a sum of 8 products is added to acc outside of them.
__device__ __forceinline__ void multiply(float (&acc)[4], const Rows& a, u32 b0,
                                         u32 b1) {
  if (MODE != MODE_FP32) {
    mma<MODE>(acc, a.word, b0, b1);
    return;
  }
  const Split low(b0), high(b1);
  float sum[4] = {};
  mma_tf32(sum, a.small, low.big, high.big);
  mma_tf32(sum, a.word, low.small, high.small);
  mma_tf32(sum, a.word, low.big, high.big);
#pragma unroll
  for (int i = 0; i < 4; ++i) acc[i] += sum[i];
}

// the sum of the numbers in a word
__device__ __forceinline__ float sum_of(u32 word) {
  if (E == 1) return __uint_as_float(word);
  return __uint_as_float(word << 16) + __uint_as_float(word & 0xffff0000u);
}

// ---- moving runs of numbers

// FRESH: see load_fresh in fused.cuh.
template <bool FRESH, class T>
__device__ __forceinline__ T load(const T* from) {
  return FRESH ? load_fresh(from) : __ldg(from);
}
template <bool FRESH = false, int COUNT>
__device__ __forceinline__ void load_run(float (&v)[COUNT], const float* from) {
  if (COUNT == 4) {
    const float4 f = load<FRESH>((const float4*)from);
    v[0] = f.x, v[1 % COUNT] = f.y, v[2 % COUNT] = f.z, v[3 % COUNT] = f.w;
  } else if (COUNT == 2) {
    const float2 f = load<FRESH>((const float2*)from);
    v[0] = f.x, v[1 % COUNT] = f.y;
  } else {
    v[0] = load<FRESH>(from);
  }
}

// COUNT neighbouring floats from global into shared memory, in the background.
template <int ALIGN, int COUNT>
__device__ __forceinline__ void copy_run(u32* to, const float* __restrict__ from) {
  if (ALIGN % 4 == 0 && COUNT == 4) {
    copy_async16(shared_address(to), from);
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) copy_async4(shared_address(to + i), from + i);
  }
}

// body(plane, item) for ITEMS items of each of PLANES planes, by all warps of the
// block. A lane has the same items of every plane, so what depends on the item is
// computed once; BATCH bodies run together, their loads one behind the other.
template <int PLANES, int ITEMS, int BATCH, class Body>
__device__ __forceinline__ void for_all(const Body& body) {
  constexpr int LANES = ITEMS > 16  ? 32
                        : ITEMS > 8 ? 16
                        : ITEMS > 4 ? 8
                        : ITEMS > 2 ? 4
                                    : ITEMS;
  constexpr int TOGETHER = 32 / LANES, ROUNDS = ceil_div(ITEMS, 32);
  constexpr int UNROLL = most(1, BATCH / ROUNDS);
  const int lane = threadIdx.x % 32;
#pragma unroll UNROLL
  for (int plane = warp_index() * TOGETHER + lane / LANES; plane < PLANES;
       plane += WARPS * TOGETHER)
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
      const int item = lane % LANES + round * 32;
      if (item < ITEMS) body(plane, item);
    }
}
