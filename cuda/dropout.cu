// Dropout: y = 0 where a random word is below the threshold p 2^32, else x scale, with
// scale = 1 / (1 - p). Backward is the same with dy for x.
//
// Random words come from Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011): four of each
// counter, for four elements in a row. The counter is the number of the four and the
// step, the key the seed. Nothing depends on the launch, and the mask need not be kept.
//
// The step is counted on the device, since a replayed graph cannot be told it.
#include "common.cuh"

// (a, b, c, d) of the counter becomes the random words.
DEVICE void philox(uint32* word, uint32 key0, uint32 key1) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32 high0 = __umulhi(0xd2511f53u, word[0]), low0 = 0xd2511f53u * word[0];
    const uint32 high1 = __umulhi(0xcd9e8d57u, word[2]), low1 = 0xcd9e8d57u * word[2];
    word[0] = high1 ^ word[1] ^ key0;
    word[1] = low1;
    word[2] = high0 ^ word[3] ^ key1;
    word[3] = low0;
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
}

DEVICE void drop(float* __restrict__ y, const float* __restrict__ x, uint32 key0,
                 uint32 key1, uint32 step, uint32 threshold, float scale, int64 n) {
  const bool aligned = aligned16(x) && aligned16(y);
#pragma unroll 1
  for (int64 i = grid_thread(); 4 * i < n; i += grid_threads()) {
    uint32 word[4] = {(uint32)i, (uint32)(i >> 32), step, 0u};
    philox(word, key0, key1);
    if (aligned && 4 * i + 4 <= n) {
      const float4 v = ((const float4*)x)[i];
      ((float4*)y)[i] = make_float4(word[0] >= threshold ? v.x * scale : 0.0f,
                                    word[1] >= threshold ? v.y * scale : 0.0f,
                                    word[2] >= threshold ? v.z * scale : 0.0f,
                                    word[3] >= threshold ? v.w * scale : 0.0f);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (4 * i + j < n)
          y[4 * i + j] = word[j] >= threshold ? x[4 * i + j] * scale : 0.0f;
    }
  }
}

// Launch: any one-dimensional grid and block. state: the seed's low and high half, the
// step, and 0. The block that is the last to have read the step raises it: each counts
// itself in state[3], which is 0 again at the end.
extern "C" __global__ void dropout_forward(
    float* __restrict__ y,         // (n,)
    uint32* __restrict__ used,     // (4,): the state as it was
    uint32* state,                 // (4,)
    const float* __restrict__ x,   // (n,)
    uint32 threshold, float scale, int64 n) {
  __shared__ uint32 shared[3];
  if (threadIdx.x == 0) {
    volatile uint32* const now = state;
#pragma unroll
    for (int i = 0; i < 3; ++i) shared[i] = now[i];
    if (blockIdx.x == 0) {
#pragma unroll
      for (int i = 0; i < 3; ++i) used[i] = shared[i];
      used[3] = 0;
    }
    __threadfence();  // what was read is read before the block is counted
    if (atomicAdd(state + 3, 1u) == gridDim.x - 1) {
      now[2] = shared[2] + 1;
      now[3] = 0;
    }
  }
  __syncthreads();
  drop(y, x, shared[0], shared[1], shared[2], threshold, scale, n);
}

// Launch: any one-dimensional grid and block.
extern "C" __global__ void dropout_backward(
    float* __restrict__ dx,             // (n,)
    const float* __restrict__ dy,       // (n,)
    const uint32* __restrict__ used,    // (4,), as forward wrote it
    uint32 threshold, float scale, int64 n) {
  drop(dx, dy, used[0], used[1], used[2], threshold, scale, n);
}
