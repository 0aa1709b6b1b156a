// Shared by all kernels: types, reductions, the tensor-core instructions.
//
// Nothing of the toolkit is included: NVRTC needs no headers then, and compiles a file
// in a fraction of the time. Axis letters (N C H W, K R S, P Q) are explained in
// README.md.
#pragma once

#define METHOD __device__ __forceinline__
#define DEVICE static METHOD

typedef unsigned char uint8;
typedef unsigned int uint32;
typedef long long int64;  // element counts of whole tensors may pass 2^31
typedef unsigned long long uint64;

constexpr int WARP = 32;
constexpr uint32 ALL_LANES = 0xffffffffu;

DEVICE float infinity() { return __int_as_float(0x7f800000); }
DEVICE float not_a_number() { return __int_as_float(0x7fffffff); }
DEVICE bool is_nan(float x) { return x != x; }

DEVICE bool aligned16(const void* p) { return ((uint64)p & 15) == 0; }

// Threads of a one-dimensional grid: first index and stride of a grid-stride loop.
DEVICE int64 grid_thread() { return (int64)blockIdx.x * blockDim.x + threadIdx.x; }
DEVICE int64 grid_threads() { return (int64)gridDim.x * blockDim.x; }

// A kernel launched as dependent may start before the one ahead of it has finished;
// what that one writes may be read, and what it reads be written, after this. Elsewhere
// it does nothing.
DEVICE void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next kernel may start, up to its own wait.
DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ------------------------------------------------------------------ reductions
// The order of every sum is fixed by the shape of the launch, so equal input gives
// equal bits.

struct Sum {
  DEVICE float empty() { return 0.0f; }
  DEVICE float join(float a, float b) { return a + b; }
};

// Maximum for a shift that keeps exp() from overflowing: NaN may be dropped here
// because the sum of exponentials meets it again.
struct Max {
  DEVICE float empty() { return -infinity(); }
  DEVICE float join(float a, float b) { return fmaxf(a, b); }
};

// Result in every lane. All 32 lanes must call it.
template <class Op>
DEVICE float warp_reduce(float value) {
#pragma unroll
  for (int lanes = WARP / 2; lanes > 0; lanes /= 2)
    value = Op::join(value, __shfl_xor_sync(ALL_LANES, value, lanes));
  return value;
}

// Result in every thread. All threads of a one-dimensional block of full warps must
// call it. The barrier before the write lets it be called again at once.
template <class Op>
DEVICE float block_reduce(float value) {
  __shared__ float of_warp[WARP];
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  value = warp_reduce<Op>(value);
  __syncthreads();
  if (lane == 0) of_warp[warp] = value;
  __syncthreads();
  return warp_reduce<Op>(lane < blockDim.x / WARP ? of_warp[lane] : Op::empty());
}

// A row of numbers is worked on by one warp or by one block; kernels are written once
// for both. rank counts the threads of the group, size() is their number.
struct WarpGroup {
  DEVICE int rank() { return threadIdx.x % WARP; }
  DEVICE int size() { return WARP; }
  DEVICE int64 row() { return grid_thread() / WARP; }
  template <class Op>
  DEVICE float reduce(float value) { return warp_reduce<Op>(value); }
};

struct BlockGroup {
  DEVICE int rank() { return threadIdx.x; }
  DEVICE int size() { return blockDim.x; }
  DEVICE int64 row() { return blockIdx.x; }
  template <class Op>
  DEVICE float reduce(float value) { return block_reduce<Op>(value); }
};

// ------------------------------------------------------------------ tensor cores
// D (16 x 8) += A (16 x k) B (k x 8), float32 sums, by one whole warp. With
// g = lane / 4 and t = lane % 4 a lane holds, in words of 32 bits along k,
//   a: (g, t) (g + 8, t) (g, t + 4) (g + 8, t + 4)      b: (t, g) (t + 4, g)
//   d: (g, 2t) (g, 2t + 1) (g + 8, 2t) (g + 8, 2t + 1)
// A word is one tf32 number (k = 8) or a pair of bf16 numbers, the lower k in the lower
// half (k = 16). Compute capability 8.0 and up.
#if __CUDA_ARCH__ >= 800

// Rounds to nearest, ties away from zero; keeps NaN and infinities, which adding half a
// unit to the bits by hand would not.
DEVICE uint32 tf32_word(float x) {
  uint32 word;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(x));
  return word;
}

// Rounds to nearest, ties to even.
DEVICE uint32 bf16_word(float low, float high) {
  uint32 word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

DEVICE void mma_tf32(float* d, const uint32* a, const uint32* b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

DEVICE void mma_bf16(float* d, const uint32* a, const uint32* b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif
