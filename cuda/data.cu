// Batches out of a data set that stays on the GPU, and what is counted on the way out:
// the order of an epoch, gathered images and labels, predictions, correct ones.
#include "common.cuh"

// ------------------------------------------------------------------ permutation
// A Feistel network is a bijection whatever its round function is: each round maps
// (L, R) to (R, L ^ f(R)), which can be undone. It permutes 0 .. 4^b - 1, which holds
// 0 .. count-1; where the result falls outside, the network is applied again until it
// falls inside (cycle walking), and that is a bijection of 0 .. count-1. Every index is
// thus found alone, with no memory and no sorting.

constexpr int FEISTEL_ROUNDS = 6;

DEVICE uint32 mix32(uint32 x) {  // the finaliser of MurmurHash3
  x ^= x >> 16;
  x *= 0x85ebca6bu;
  x ^= x >> 13;
  x *= 0xc2b2ae35u;
  x ^= x >> 16;
  return x;
}

// Launch: any one-dimensional grid and block. half_bits: the b above, 4^b >= count.
extern "C" __global__ void permutation(int* order,  // (count,)
                                       int count, uint64 seed, uint32 epoch,
                                       int half_bits) {
  uint32 key[FEISTEL_ROUNDS];
#pragma unroll
  for (int i = 0; i < FEISTEL_ROUNDS; ++i)
    key[i] = mix32((uint32)seed + 0x9e3779b9u * (i + 1)) ^
             mix32((uint32)(seed >> 32) + 0x7f4a7c15u * (epoch + 1u) + i);
  const uint32 mask = (1u << half_bits) - 1;
#pragma unroll 1
  for (int64 i = grid_thread(); i < count; i += grid_threads()) {
    uint32 x = (uint32)i;
    do {
      uint32 left = x >> half_bits, right = x & mask;
#pragma unroll
      for (int round = 0; round < FEISTEL_ROUNDS; ++round) {
        const uint32 mixed = left ^ (mix32(right + key[round]) & mask);
        left = right;
        right = mixed;
      }
      x = (left << half_bits) | right;
    } while (x >= (uint32)count);
    order[i] = (int)x;
  }
}

// ------------------------------------------------------------------ gather
// out[n, e] = images[index[n], e] * scale + shift; a row of NaN where the index is
// outside the set. Launch: grid (blocks over one image, images or fewer).

// Rounded twice, as on the CPU: a fused multiply-add would differ in the last bit.
DEVICE float affine(float x, float scale, float shift) {
  return __fadd_rn(__fmul_rn(x, scale), shift);
}

template <class T>
DEVICE void gather(float* __restrict__ out,        // (N, elements)
                   const T* __restrict__ images,   // (count, elements)
                   const int* __restrict__ index,  // (N,)
                   int N, int elements, int count, float scale, float shift) {
  const int e = blockIdx.x * blockDim.x + threadIdx.x;
  if (e >= elements) return;
#pragma unroll 1
  for (int n = blockIdx.y; n < N; n += gridDim.y) {
    const int at = index[n];
    const bool inside = 0 <= at && at < count;
    out[(int64)n * elements + e] =
        inside ? affine((float)images[(int64)at * elements + e], scale, shift)
               : not_a_number();
  }
}

extern "C" __global__ void gather_images_uint8(float* out, const uint8* images,
                                               const int* index, int N, int elements,
                                               int count, float scale, float shift) {
  gather(out, images, index, N, elements, count, scale, shift);
}

extern "C" __global__ void gather_images_float32(float* out, const float* images,
                                                 const int* index, int N, int elements,
                                                 int count, float scale, float shift) {
  gather(out, images, index, N, elements, count, scale, shift);
}

// out[n] = labels[index[n]], -1 (no class) where the index is outside the set.
// Launch: any one-dimensional grid and block.
extern "C" __global__ void gather_labels(int* __restrict__ out,           // (N,)
                                         const int* __restrict__ labels,  // (count,)
                                         const int* __restrict__ index,   // (N,)
                                         int N, int count) {
#pragma unroll 1
  for (int64 n = grid_thread(); n < N; n += grid_threads()) {
    const int at = index[n];
    out[n] = 0 <= at && at < count ? labels[at] : -1;
  }
}

// ------------------------------------------------------------------ predictions
// Launch of both: one warp a row, one-dimensional blocks of full warps.

// True where (value, at) comes before (best, best_at): greater, or equal and earlier.
// NaN is greater than every number.
DEVICE bool beats(float value, int at, float best, int best_at) {
  if (is_nan(value) != is_nan(best)) return is_nan(value);
  if (value == best || is_nan(value)) return at < best_at;
  return value > best;
}

// Position of the first maximum of a row of F >= 1 numbers, in every lane.
DEVICE int warp_argmax(const float* row, int F) {
  const int lane = threadIdx.x % WARP;
  int best_at = min(lane, F - 1);
  float best = row[best_at];
#pragma unroll 1
  for (int f = lane + WARP; f < F; f += WARP) {
    const float value = row[f];
    if (beats(value, f, best, best_at)) best = value, best_at = f;
  }
#pragma unroll
  for (int lanes = WARP / 2; lanes > 0; lanes /= 2) {
    const float value = __shfl_xor_sync(ALL_LANES, best, lanes);
    const int at = __shfl_xor_sync(ALL_LANES, best_at, lanes);
    if (beats(value, at, best, best_at)) best = value, best_at = at;
  }
  return best_at;
}

extern "C" __global__ void argmax(int* __restrict__ out,        // (N,)
                                  const float* __restrict__ x,  // (N, F)
                                  int N, int F) {
  const int64 n = WarpGroup::row();
  if (n >= N) return;
  const int best = warp_argmax(x + n * F, F);
  if (WarpGroup::rank() == 0) out[n] = best;
}

// total += rows whose first maximum stands at their label. Integer sums do not depend
// on their order, so an atomic keeps the result reproducible.
extern "C" __global__ void count_correct(int* __restrict__ total,          // ()
                                         const float* __restrict__ scores, // (N, F)
                                         const int* __restrict__ labels,   // (N,)
                                         int N, int F) {
  const int64 n = WarpGroup::row();
  if (n >= N) return;
  const int best = warp_argmax(scores + n * F, F);
  if (WarpGroup::rank() == 0 && best == labels[n]) atomicAdd(total, 1);
}

// ------------------------------------------------------------------ step
// The beginning of a recorded training step, which counts for itself what no host tells
// it: index = the next entries of the order, lr = the next of the rates.
// Launch: one block.

extern "C" __global__ void begin_step(int* index,          // (N,)
                                      const int* order,    // (count,)
                                      int* position,       // images taken, steps done
                                      const float* rates,  // (steps,) or null
                                      float* lr,           // ()
                                      int N, int count, int steps) {
  const int taken = position[0], step = position[1];
  for (int n = threadIdx.x; n < N; n += blockDim.x)
    index[n] = taken + n < count ? order[taken + n] : -1;
  __syncthreads();  // every thread has read the position
  if (threadIdx.x == 0) {
    position[0] = taken + N;
    position[1] = step + 1;
    if (rates != nullptr) *lr = step < steps ? rates[step] : not_a_number();
  }
}
