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

// ------------------------------------------------------------------ steps
// What a step adds to the figures of its epoch, and what a recorded step counts for
// itself, since no host tells it which one it is.

// By warps, of which this is one: hits += rows whose first maximum stands at their
// label, loss_sum += mean of the losses. The order of the latter sum depends on their
// number only; integers may be added in any order, so an atomic keeps the result
// reproducible.
DEVICE void add_batch(float* loss_sum, int* hits, const float* losses,
                      const float* scores, const int* labels, int count, int N, int F,
                      int64 warp, int64 warps) {
  const int lane = WarpGroup::rank();
  int found = 0;
#pragma unroll 4
  for (int64 n = warp; n < N; n += warps)
    found += warp_argmax(scores + n * F, F) == labels[n];
  if (lane == 0 && found) atomicAdd(hits, found);
  if (warp != warps - 1) return;
  float sum = 0.0f;
#pragma unroll 4
  for (int i = lane; i < count; i += WARP) sum += losses[i];
  sum = warp_reduce<Sum>(sum);
  if (lane == 0) *loss_sum += sum / (float)count;
}

// Launch: any one-dimensional grid of full warps.
extern "C" __global__ void tally(float* loss_sum,      // ()
                                 int* hits,            // ()
                                 const float* losses,  // (count,), the loss or terms
                                 const float* scores,  // (N, F)
                                 const int* labels,    // (N,)
                                 int count, int N, int F) {
  add_batch(loss_sum, hits, losses, scores, labels, count, N, F, WarpGroup::row(),
            grid_threads() / WARP);
}

// The tally of a step, unless losses is null, and what the next one reads: index = the
// next entries of the order, labels = those of these images. lr = the rate of the step
// that was begun last (rate_of = -1), or of the next one (0).
//
// Half of the warps do the one, half the other: each is a chain of loads, and takes as
// long as both together. It is made to run beside the last kernel of the backward pass,
// behind which it may be launched as dependent if that one reads nothing of what is
// written here. It waits only so that the kernel behind it need not; that is the
// update, which may start at once. (Behind rate_of = 0 it is the first of a step, which
// may not: it may read the index before its own wait.)
// Launch: one block of END_STEP threads.
constexpr int END_STEP = 1024, HALF = END_STEP / 2;

extern "C" __global__ __launch_bounds__(END_STEP) void
    end_step(float* loss_sum, int* hits, const float* losses, const float* scores,
             const int* labels, int count, int N, int F,  // as of tally
             const int* order,    // (images,)
             int* position,       // images taken, steps begun
             const int* classes,  // (images,), labels of the data set
             int* index,          // (size,)
             int* next_labels,    // (size,); labels may lie there
             const float* rates,  // (steps, groups) or null
             float* lr,           // (groups,)
             int size, int images, int steps, int rate_of, int groups) {
  if (rate_of < 0) let_next_kernel_start();
  const int taken = position[0], step = position[1];
  const bool tallies = threadIdx.x >= HALF;
  int at = -1, label = -1;  // of next image n
  const auto look_up = [&](int n) {
    at = n < size && taken + n < images ? order[taken + n] : -1;
    label = at >= 0 ? classes[at] : -1;
  };
  if (!tallies)
    look_up(threadIdx.x);
  else if (losses != nullptr)
    add_batch(loss_sum, hits, losses, scores, labels, count, N, F,
              (threadIdx.x - HALF) / WARP, HALF / WARP);
  const int rated = step + rate_of;
  const bool has_rate = rates != nullptr && rated >= 0 && rated < steps;
  const float rate = has_rate ? rates[(int64)rated * groups] : 0.0f;
  __syncthreads();  // every thread has read the position and the labels
  for (int n = threadIdx.x; !tallies && n < size; n += HALF) {
    if (n >= HALF) look_up(n);
    index[n] = at;
    next_labels[n] = label;
  }
  if (threadIdx.x == 0) {
    position[0] = taken + size;
    position[1] = step + 1;
    if (has_rate) *lr = rate;
#pragma unroll 1
    for (int group = 1; has_rate && group < groups; ++group)
      lr[group] = rates[(int64)(step + rate_of) * groups + group];
  }
  wait_for_earlier_kernels();
}
