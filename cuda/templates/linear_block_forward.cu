// linear_block_forward: y = relu(x weight^T + bias); head_forward: the last linear
// layer with log-softmax, mean negative log-likelihood and the gradient of the logits;
// tail_forward: a linear layer and the head behind it (Hopper's clusters). KERNEL: 0,
// 1, 2.
//
//   y[n][o] = sum_i x[n][i] weight[o][i] + bias[o]                          (then ReLU)
//   log_probs = y - log sum_o exp y,   loss = -1/N sum_n log_probs[n][labels[n]]
//   dlogits = d loss / d y = (exp(log_probs) - onehot(labels)) / N
//
// Small products live on latency, not on arithmetic. Operands go straight from memory
// to mma.sync fragments (fused.cuh), with no shared memory in between: both matrices
// are contiguous along the contraction i, and its order is free as long as both use the
// same one. In a block of 16 numbers lane t of a row takes 4 t to 4 t + 3, one 16-byte
// load: for tf32 two products (0 and 1, then 2 and 3, as words t and t + 4), for bf16
// one (pairs as words). The WARPS of a block take blocks of i in turn and their sums
// are added in warp order.
#include "fused.cuh"

constexpr int K_BLOCKS = ceil_div(I, 16);
static_assert(!VECTORS || I % 4 == 0, "whole vectors");
constexpr int ROUNDS = ceil_div(K_BLOCKS, WARPS);  // blocks of a warp
constexpr int AHEAD = ROUNDS < 4 ? ROUNDS : 4;

// 4 numbers from row[i] on; zeros past I. VECTORS: rows start at multiples of 16 bytes.
// FRESH: see load_fresh in fused.cuh.
template <bool FRESH = false>
__device__ __forceinline__ void load_four(float (&v)[4], const float* row, int i) {
  constexpr bool WHOLE = I % (16 * WARPS) == 0;
  if (VECTORS) {
    float4 q = make_float4(0, 0, 0, 0);
    if (WHOLE || i < I)
      q = FRESH ? load_fresh((const float4*)(row + i)) : *(const float4*)(row + i);
    v[0] = q.x, v[1] = q.y, v[2] = q.z, v[3] = q.w;
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      v[e] = 0.f;
      if (i + e < I) v[e] = FRESH ? load_fresh(row + i + e) : row[i + e];
    }
  }
}

// Rows 8 j + g of a matrix, of this warp's block of a round; zeros past the last block.
// from: first row of the tile. There are `rows` from there on; past them the last one
// is read again, for sums that nobody looks at.
template <bool FRESH, int count>
__device__ __forceinline__ void load_rows(float (&v)[count][4], const float* from,
                                          int rows, int round) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < count; ++j)
    load_four<FRESH>(v[j], from + (long long)min(8 * j + g, rows - 1) * I,
                     (round * WARPS + warp) * 16 + 4 * t);
}

// d[m][n] += rows 16 m + g (+ 8) of x times rows 8 n + g of weight, of one block.
template <int m_tiles, int n_tiles>
__device__ __forceinline__ void multiply_block(float (&d)[m_tiles][n_tiles][4],
                                               const float (&a)[2 * m_tiles][4],
                                               const float (&b)[n_tiles][4]) {
  if (MODE == MODE_BF16) {
#pragma unroll
    for (int m = 0; m < m_tiles; ++m) {
      const float(&top)[4] = a[2 * m], (&low)[4] = a[2 * m + 1];
      const u32 aw[4] = {pack_bf16(top[0], top[1]), pack_bf16(low[0], low[1]),
                         pack_bf16(top[2], top[3]), pack_bf16(low[2], low[3])};
#pragma unroll
      for (int n = 0; n < n_tiles; ++n)
        mma_bf16(d[m][n], aw, pack_bf16(b[n][0], b[n][1]), pack_bf16(b[n][2], b[n][3]));
    }
    return;
  }
#pragma unroll
  for (int e = 0; e < 4; e += 2)
#pragma unroll
    for (int m = 0; m < m_tiles; ++m) {
      const float av[4] = {a[2 * m][e], a[2 * m + 1][e], a[2 * m][e + 1],
                           a[2 * m + 1][e + 1]};
      u32 big[4], small[4];
#pragma unroll
      for (int f = 0; f < 4; ++f) {
        big[f] = round_tf32(av[f]);
        small[f] = rest_tf32(av[f], big[f]);
      }
#pragma unroll
      for (int n = 0; n < n_tiles; ++n) {
        const u32 b0 = round_tf32(b[n][e]), b1 = round_tf32(b[n][e + 1]);
        if (MODE == MODE_FP32) {
          mma_tf32(d[m][n], small, b0, b1);
          mma_tf32(d[m][n], big, rest_tf32(b[n][e], b0), rest_tf32(b[n][e + 1], b1));
        }
        mma_tf32(d[m][n], big, b0, b1);
      }
    }
}

// The same of all this warp's blocks. x, weight: first rows of the tile; rows, outputs:
// how many exist from there on.
template <bool FRESH = false, int m_tiles, int n_tiles>
__device__ __forceinline__ void multiply(float (&d)[m_tiles][n_tiles][4],
                                         const float* x, int rows, const float* weight,
                                         int outputs) {
#pragma unroll AHEAD
  for (int round = 0; round < ROUNDS; ++round) {
    float a[2 * m_tiles][4], b[n_tiles][4];
    load_rows<FRESH>(a, x, rows, round);
    load_rows<false>(b, weight, outputs, round);
    multiply_block(d, a, b);
  }
}

// This warp's sums to shared[warp][row][pitch].
template <int m_tiles, int n_tiles, int pitch>
__device__ __forceinline__ void store_sums(const float (&d)[m_tiles][n_tiles][4],
                                           float* shared) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int m = 0; m < 2 * m_tiles; ++m)
#pragma unroll
    for (int n = 0; n < n_tiles; ++n)
      *(float2*)(shared + (warp * 16 * m_tiles + 8 * m + g) * pitch + 8 * n + 2 * t) =
          make_float2(d[m / 2][n][m % 2 * 2], d[m / 2][n][m % 2 * 2 + 1]);
}

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int step = 16; step; step /= 2) v = fmaxf(v, __shfl_xor_sync(~0u, v, step));
  return v;
}
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int step = 16; step; step /= 2) v += __shfl_xor_sync(~0u, v, step);
  return v;
}

#if KERNEL == 0
// Launch: grid (ceil(N / (16 M_TILES)), ceil(O / (8 N_TILES))), block 32 WARPS, no
// dynamic shared memory.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    linear_block_forward(const float* x,       // [N][I]
                         const float* weight,  // [O][I]
                         const float* bias,    // [O]
                         float* y,             // [N][O]
                         int N) {
  constexpr int ROWS = 16 * M_TILES, COLUMNS = 8 * N_TILES, PITCH = COLUMNS + 8;
  __shared__ float sums[WARPS * ROWS * PITCH];
  const int n0 = blockIdx.x * ROWS, o0 = blockIdx.y * COLUMNS;
  wait_for_earlier_kernels();
  let_next_kernel_start();
  // early, beside the operands: the column of this thread's sums is always the same
  static_assert(32 * WARPS % COLUMNS == 0, "whole rows");
  const int column = threadIdx.x % COLUMNS;
  const float b = HAS_BIAS && o0 + column < O ? bias[o0 + column] : 0.f;
  float d[M_TILES][N_TILES][4] = {};
  multiply(d, x + (long long)n0 * I, N - n0, weight + (long long)o0 * I, O - o0);
  store_sums<M_TILES, N_TILES, PITCH>(d, sums);
  __syncthreads();
#pragma unroll
  for (int i = threadIdx.x; i < ROWS * COLUMNS; i += 32 * WARPS) {
    const int row = i / COLUMNS;
    if (n0 + row >= N || o0 + column >= O) continue;
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += sums[(w * ROWS + row) * PITCH + column];
    sum += b;
    y[(long long)(n0 + row) * O + o0 + column] = RELU && sum <= 0.f ? 0.f : sum;
  }
}

#elif KERNEL == 1
// Launch: grid CLUSTER = one cluster of as many blocks (1 before Hopper), block 32
// WARPS, dynamic shared memory SHARED_BYTES. Block r takes rows 16 r to 16 r + 15 and
// every CLUSTER-th such run after it. The loss: sums of a warp's rows, of a block's
// warps, of the blocks, each in fixed order.
constexpr int PITCH = 8 * N_TILES + 8;             // of the partial sums
constexpr int L_PITCH = round_up(O, 8 * N_TILES);  // of the logits
static_assert(4 * 16 * (WARPS * PITCH + L_PITCH) <= SHARED_BYTES, "shared memory");

extern "C" __global__ void __launch_bounds__(32 * WARPS)
#if CLUSTER > 1
    __cluster_dims__(CLUSTER)
#endif
        head_forward(const float* x,       // [N][I]
                     const float* weight,  // [O][I]
                     const float* bias,    // [O]
                     const int* labels,    // [N]
                     float* log_probs,     // [N][O]
                     float* loss,          // []
                     float* dlogits,       // [N][O]
                     int N) {
  extern __shared__ __align__(16) float shared[];
  __shared__ float losses[WARPS];
  float* sums = shared;                       // [WARPS][16][PITCH]
  float* logits = sums + WARPS * 16 * PITCH;  // [16][L_PITCH]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#if CLUSTER > 1
  __shared__ float block_losses[CLUSTER];
  __shared__ u64 come;
  const u32 barrier = shared_address(&come);
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    barrier_init_fence();
  }
  __syncwarp();
  arrive_cluster();  // a block's shared memory may be written once the block runs
#endif
  wait_for_earlier_kernels();
  let_next_kernel_start();

  float warp_loss = 0.f;
#pragma unroll 1
  for (int n0 = blockIdx.x * 16; n0 < N; n0 += CLUSTER * 16) {
    // early, beside the operands
    int label[ceil_div(16, WARPS)];
#pragma unroll
    for (int r = 0; r < ceil_div(16, WARPS); ++r) {
      const int row = r * WARPS + warp;
      label[r] = row < 16 && n0 + row < N ? labels[n0 + row] : 0;
    }
#pragma unroll 1
    for (int o0 = 0; o0 < O; o0 += 8 * N_TILES) {
      constexpr int COLUMNS = 8 * N_TILES;
      constexpr int MINE = ceil_div(16 * COLUMNS, 32 * WARPS);
      float b[MINE];
#pragma unroll
      for (int j = 0; j < MINE; ++j) {
        const int o = o0 + (j * 32 * WARPS + threadIdx.x) % COLUMNS;
        b[j] = HAS_BIAS && o < O ? bias[o] : 0.f;
      }
      float d[1][N_TILES][4] = {};
      multiply(d, x + (long long)n0 * I, N - n0, weight + (long long)o0 * I, O - o0);
      store_sums<1, N_TILES, PITCH>(d, sums);
      __syncthreads();
#pragma unroll
      for (int j = 0; j < MINE; ++j) {
        const int i = j * 32 * WARPS + threadIdx.x, row = i / COLUMNS,
                  column = i % COLUMNS;
        if (row >= 16) break;
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) sum += sums[(w * 16 + row) * PITCH + column];
        logits[row * L_PITCH + o0 + column] = sum + b[j];
      }
      __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < ceil_div(16, WARPS); ++r) {
      const int row = r * WARPS + warp;
      if (row >= 16 || n0 + row >= N) break;
      const float* z = logits + row * L_PITCH;
      float high = -__int_as_float(0x7f800000), sum = 0.f;
      for (int o = lane; o < O; o += 32) high = fmaxf(high, z[o]);
      high = warp_max(high);
      for (int o = lane; o < O; o += 32) sum += expf(z[o] - high);
      sum = warp_sum(sum);
      const float log_sum = logf(sum), scale = 1.f / (float)N;
      for (int o = lane; o < O; o += 32) {
        const long long out = (long long)(n0 + row) * O + o;
        const float log_prob = z[o] - high - log_sum;
        log_probs[out] = log_prob;
        dlogits[out] = (expf(log_prob) - (o == label[r] ? 1.f : 0.f)) * scale;
      }
      // a label that is no class: never read there, and say so through the loss
      warp_loss += label[r] >= 0 && label[r] < O ? high + log_sum - z[label[r]]
                                                 : __int_as_float(0x7fffffff);
    }
    __syncthreads();
  }

  if (lane == 0) losses[warp] = warp_loss;
  __syncthreads();
#if CLUSTER > 1
  wait_cluster();
#endif
  if (threadIdx.x == 0) {
    float sum = 0.f;
    for (int w = 0; w < WARPS; ++w) sum += losses[w];
#if CLUSTER > 1
    send_to_block(shared_address(block_losses + blockIdx.x), barrier, 0, sum);
    if (blockIdx.x == 0) {
      barrier_expect(barrier, 4 * CLUSTER);
      barrier_wait_cluster(barrier, 0);
      sum = 0.f;
      for (int r = 0; r < CLUSTER; ++r) sum += block_losses[r];
    }
#endif
    if (blockIdx.x == 0) loss[0] = sum / (float)N;
  }
}

#else
// hidden = relu(x weight^T + bias), then the head on it. A cluster of 8 blocks has 16
// images: each block computes 8 N_TILES of the hidden outputs for all 16, reads its
// weights once, and sends every image's part to the block that finishes it (two images
// a block). The loss is left as a term for each image, losses[n] =
// -log_probs[n][label], to be added where it is wanted: adding them here would cost a
// wait for all blocks.
//
// The second product is float32 in every mode: a warp takes an image and every fourth
// class, a lane every 32nd input.
//
// settled: weights and biases were complete before the kernel ahead of this one
// started, so that under programmatic dependent launch they may be fetched before that
// one has finished.
//
// Launch: grid 8 ceil(N / 16) in clusters of 8, block 256, no dynamic shared memory.
constexpr int CLUSTER = 8, SLICE = 8 * N_TILES, PITCH = SLICE + 8, HIDDEN = 8 * SLICE;
constexpr int CLASSES = ceil_div(O, 4), PARTS_OF_LANE = ceil_div(HID, 32);
static_assert(WARPS == 8 && O <= 32 && HID <= HIDDEN, "what a cluster can hold");
// Whether a lane's operands fit into registers: then all are fetched in one wait for
// memory.
constexpr bool EARLY = ROUNDS <= 4 && ROUNDS * N_TILES <= 8;

extern "C" __global__ void __launch_bounds__(256) __cluster_dims__(CLUSTER)
    tail_forward(const float* x,           // [N][I]
                 const float* weight,      // [HID][I]
                 const float* bias,        // [HID]
                 const float* weight_out,  // [O][HID]
                 const float* bias_out,    // [O]
                 const int* labels,        // [N]
                 float* hidden,            // [N][HID]
                 float* log_probs,         // [N][O]
                 float* losses,            // [N]
                 float* dlogits,           // [N][O]
                 int N, int settled) {
  __shared__ float sums[WARPS * 16 * PITCH];
  __shared__ float mine[2][HIDDEN], logits[2][32];
  __shared__ u64 come;
  const u32 barrier = shared_address(&come);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32,
            rank = blockIdx.x % CLUSTER;
  const int n0 = blockIdx.x / CLUSTER * 16, o0 = rank * SLICE;
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    barrier_init_fence();
    barrier_expect(barrier, 4 * 2 * HIDDEN);
  }
  __syncwarp();
  arrive_cluster();
  if (!settled) wait_for_earlier_kernels();

  x += (long long)n0 * I, weight += (long long)o0 * I;
  constexpr int KEPT = EARLY ? ROUNDS : 0;
  float xs[KEPT + 1][2][4], weights[KEPT + 1][N_TILES][4];
#pragma unroll
  for (int round = 0; round < KEPT; ++round)
    load_rows<false>(weights[round], weight, HID - o0, round);
  const int image = warp % 2, n = n0 + 2 * rank + image;
  float w[CLASSES][PARTS_OF_LANE];
#pragma unroll
  for (int c = 0; c < CLASSES; ++c)
#pragma unroll
    for (int j = 0; j < PARTS_OF_LANE; ++j) {
      const int o = warp / 2 + 4 * c, i = lane + 32 * j;
      w[c][j] = o < O && i < HID ? weight_out[o * HID + i] : 0.f;
    }
  const float b_out = HAS_BIAS_OUT && lane < O ? bias_out[lane] : 0.f;
  constexpr int MINE = ceil_div(16 * SLICE, 256);
  float b[MINE];
#pragma unroll
  for (int j = 0; j < MINE; ++j) {
    const int o = o0 + (j * 256 + threadIdx.x) % SLICE;
    b[j] = HAS_BIAS && o < HID ? bias[o] : 0.f;
  }
  if (settled) wait_for_earlier_kernels();
  let_next_kernel_start();

  const int label = n < N ? load_fresh(labels + n) : 0;
  float d[1][N_TILES][4] = {};
#pragma unroll
  for (int round = 0; round < KEPT; ++round)
    load_rows<true>(xs[round], x, N - n0, round);
#pragma unroll
  for (int round = 0; round < KEPT; ++round)
    multiply_block(d, xs[round], weights[round]);
  if (!EARLY) multiply<true>(d, x, N - n0, weight, HID - o0);
  store_sums<1, N_TILES, PITCH>(d, sums);
  __syncthreads();
  wait_cluster();  // the others run, their barriers are ready
#pragma unroll
  for (int j = 0; j < MINE; ++j) {
    const int i = j * 256 + threadIdx.x, row = i / SLICE, column = i % SLICE;
    if (row >= 16) break;
    float sum = b[j];
#pragma unroll
    for (int v = 0; v < WARPS; ++v) sum += sums[(v * 16 + row) * PITCH + column];
    if (RELU && sum <= 0.f) sum = 0.f;
    send_to_block(shared_address(&mine[row % 2][o0 + column]), barrier, row / 2, sum);
    if (n0 + row < N && o0 + column < HID)
      hidden[(long long)(n0 + row) * HID + o0 + column] = sum;
  }

  barrier_wait_cluster(barrier, 0);
#pragma unroll
  for (int c = 0; c < CLASSES; ++c) {
    float z = 0.f;
#pragma unroll
    for (int j = 0; j < PARTS_OF_LANE; ++j)
      if (lane + 32 * j < HID) z += w[c][j] * mine[image][lane + 32 * j];
    z = warp_sum(z);
    if (lane == 0 && warp / 2 + 4 * c < O) logits[image][warp / 2 + 4 * c] = z;
  }
  __syncthreads();
  if (warp < 2 && n < N) {
    const float z =
        lane < O ? logits[image][lane] + b_out : -__int_as_float(0x7f800000);
    const float high = warp_max(z);
    const float log_prob = z - high - logf(warp_sum(lane < O ? expf(z - high) : 0.f));
    if (lane < O) {
      log_probs[n * O + lane] = log_prob;
      dlogits[n * O + lane] = (expf(log_prob) - (lane == label ? 1.f : 0.f)) / (float)N;
    }
    // a label that is no class gives NaN
    if (label < 0 || label >= O) losses[n] = __int_as_float(0x7fffffff);
    else if (lane == label) losses[n] = -log_prob;
  }
}
#endif
