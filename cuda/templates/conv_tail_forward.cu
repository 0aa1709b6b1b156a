// The end of a network in one launch: a convolution block on small images, the linear
// layer behind it and the head, for the shapes in the -D options.
//
//   y[n][k][p][q] = relu(bias[k] + sum_{c,r,s} filter[k][c][r][s]
//                   x[n][c][p STRIDE_H + r - PAD_H][q STRIDE_W + s - PAD_W])
//   hidden[n][j]  = relu(bias_hidden[j] + sum_i weight[j][i] y[n][i])
//   log_probs     = log_softmax(hidden weight_out^T + bias_out)
//   losses[n]     = -log_probs[n][labels[n]]
//   dlogits       = (exp(log_probs) - onehot(labels)) / N
//
// A cluster of 8 blocks has 8 images. Block r computes SLICE of the K channels for all
// of them. These are SLICE P Q of the inputs of the linear layer, so the block can make
// a part of every hidden unit's sum: it sends that of image i to block i, which adds
// the parts in the order of the blocks and finishes the image. So no weight is read
// twice in a cluster, and blocks meet once.
//
// In a block eight warps multiply; the ninth starts the copies, then waits for the
// parts and finishes its image. Products have weights as rows, 16 channels or hidden
// units, and the 8 images as columns.
//   convolution: a warp has 8 of every 64 input channels, and its filters in registers.
//     Lane (g, t) reads a row of pixels of image g and channels t and t + 4 at once; a
//     pixel serves all pairs of outputs and taps that meet it. The warps' sums are
//     added in order of the warps.
//   linear: a warp has 16 hidden units; rows g and g + 8 of a product are units 2 g and
//     2 g + 1, so that a lane sends two neighbours at a time. The order of the inputs
//     is free: of 16, lane t takes 4 t to 4 t + 3, as words t and t + 4 of two
//     products.
// Operands are tf32, but for the head, which is float32.
//
// filter: packed for "tf32" by conv_pack_filter of conv_block_forward.cu. Its layout is
// given by SLOT_TAPS, QUADS, TILE_K and CHUNKS (FilterLayout in forward_plan.py).
//
// settled: weights and biases were complete before the kernel ahead of this one
// started, so that under programmatic dependent launch they may be fetched before that
// one has finished.
//
// Launch: grid 8 ceil(N / 8) in clusters of 8, block 288, dynamic shared memory
// SHARED_BYTES. Multiprocessors must take two blocks: with one each, 15 clusters fit an
// H100, and a batch of 128 is 16.
#include "fused.cuh"

constexpr int IMAGES = 8, WARPS = 8, MULTIPLIERS = 32 * WARPS;
constexpr int P = (H + 2 * PAD_H - R) / STRIDE_H + 1,
              Q = (W + 2 * PAD_W - S) / STRIDE_W + 1;
constexpr int PQ = P * Q, HW = H * W, IMAGE = C * HW, I = K * PQ;
constexpr int SLICE = K / 8, INPUTS = SLICE * PQ, BLOCKS = INPUTS / 16;
constexpr int OCTETS = C / 8, ROUNDS = ceil_div(OCTETS, WARPS);
constexpr int UNITS = 128;  // hidden, with those that do not exist
static_assert(C % 8 == 0 && K % 8 == 0 && SLICE <= 16, "whole octets of channels");
static_assert(INPUTS % 16 == 0 && HID <= UNITS && O <= 16, "what a cluster can hold");

// Shared memory, in floats. Pitches: reads of 16 bytes by 8 images x 4 lanes meet no
// bank twice in ys, each bank twice in xs.
constexpr int X_PITCH = IMAGE + (36 - IMAGE % 32) % 32;
constexpr int Y_PITCH = round_up(INPUTS, 32) + 16;
constexpr int SUMS = 4 * PQ * 32;  // of a warp
constexpr int SUMS_AT = IMAGES * X_PITCH, YS_AT = SUMS_AT + WARPS * SUMS,
              PARTS_AT = YS_AT + IMAGES * Y_PITCH;
static_assert(4 * (PARTS_AT + IMAGES * UNITS) <= SHARED_BYTES, "shared memory");

// This lane's words of the filter: rows g and g + 8 of the slice, channels t and t + 4
// of an octet.
__device__ __forceinline__ void load_filter(u32 (&a)[R * S][4], const u32* filter,
                                            int rank, int octet) {
  constexpr int SLOT = SLOT_TAPS * QUADS * TILE_K * 4;  // words
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    // past the slice any channel will do: its sums are left out
    const int k = rank * SLICE + min(g + e % 2 * 8, SLICE - 1);
    const int quad = 2 * octet + e / 2;
    const int slot = (k / TILE_K * CHUNKS + quad / QUADS) * (R * S / SLOT_TAPS);
    const u32* from =
        filter + (long long)slot * SLOT + (quad % QUADS * TILE_K + k % TILE_K) * 4 + t;
#pragma unroll
    for (int tap = 0; tap < R * S; ++tap)
      a[tap][e] = from[tap / SLOT_TAPS * SLOT + tap % SLOT_TAPS * (QUADS * TILE_K * 4)];
  }
}

// A row of pixels from shared memory.
__device__ __forceinline__ void load_row(float (&v)[W], const float* from) {
#pragma unroll
  for (int w = 0; w < W; w += W % 4 == 0 ? 4 : 1) {
    if (W % 4 == 0) {
      const float4 q = *(const float4*)(from + w);
      v[w] = q.x, v[w + 1 % W] = q.y, v[w + 2 % W] = q.z, v[w + 3 % W] = q.w;
    } else {
      v[w] = from[w];
    }
  }
}

// The products of an octet of channels; x: channel t of image g.
__device__ __forceinline__ void convolve(float (&sum)[PQ][4], const u32 (&a)[R * S][4],
                                         const float* x) {
#pragma unroll
  for (int h = 0; h < H; ++h) {
    float low[W], high[W];
    load_row(low, x + h * W);
    load_row(high, x + 4 * HW + h * W);
#pragma unroll
    for (int w = 0; w < W; ++w) {
      const u32 b0 = round_tf32(low[w]), b1 = round_tf32(high[w]);
#pragma unroll
      for (int i = 0; i < PQ; ++i) {
        const int r = h + PAD_H - i / Q * STRIDE_H, s = w + PAD_W - i % Q * STRIDE_W;
        if (r >= 0 && r < R && s >= 0 && s < S) mma_tf32(sum[i], a[r * S + s], b0, b1);
      }
    }
  }
}

// 4 numbers of a row, of those that exist; VECTORS: rows start at multiples of 16
// bytes.
__device__ __forceinline__ float4 load_four(const float* row, int at, int count) {
  if (VECTORS && count % 4 == 0)
    return at < count ? *(const float4*)(row + at) : make_float4(0, 0, 0, 0);
  return make_float4(at < count ? row[at] : 0.f, at + 1 < count ? row[at + 1] : 0.f,
                     at + 2 < count ? row[at + 2] : 0.f,
                     at + 3 < count ? row[at + 3] : 0.f);
}

// What the kernel is given; all float32 but for the labels.
struct Arguments {
  const float* x;            // [N][C][H][W]
  const u32* filter;         // packed
  const float* bias;         // [K]
  const float* weight;       // [HID][I]
  const float* bias_hidden;  // [HID]
  const float* weight_out;   // [O][HID]
  const float* bias_out;     // [O]
  const int* labels;         // [N]
  float* y;                  // [N][I]
  float* hidden;             // [N][HID]
  float* log_probs;          // [N][O]
  float* losses;             // [N]
  float* dlogits;            // [N][O]
  int N, settled;
};

// The warps that multiply: the parts of all images.
__device__ __forceinline__ void make_parts(const Arguments& p, float* memory,
                                           u32 x_come, u32 parts_come, int rank,
                                           int n0) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4,
            t = lane % 4;
  float* const sums = memory + SUMS_AT;
  float* const ys = memory + YS_AT;

  if (!p.settled) wait_for_earlier_kernels();
  u32 a[ROUNDS][R * S][4];
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round)
    load_filter(a[round], p.filter, rank, min(round * WARPS + warp, OCTETS - 1));
  float4 rows[BLOCKS][2];
#pragma unroll
  for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int unit = min(16 * warp + 2 * g + half, HID - 1);
      rows[b][half] = load_four(p.weight + (long long)unit * I + rank * INPUTS,
                                16 * b + 4 * t, INPUTS);
    }
  // of the sums that this thread adds
  const int column = g + warp / 2 % 2 * 8;
  const float bias = HAS_BIAS && column < SLICE ? p.bias[rank * SLICE + column] : 0.f;
  wait_cluster();
  if (p.settled) wait_for_earlier_kernels();
  let_next_kernel_start();

  float sum[PQ][4] = {};
  barrier_wait(x_come, 0);
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) {
    const int octet = round * WARPS + warp;
    if (octet < OCTETS)
      convolve(sum, a[round], memory + g * X_PITCH + (8 * octet + t) * HW);
  }
#pragma unroll
  for (int i = 0; i < 4 * PQ; ++i)
    sums[warp * SUMS + i * 32 + lane] = sum[i / 4][i % 4];
  sync_threads(1, MULTIPLIERS);
#pragma unroll
  for (int i = warp; i < 4 * PQ; i += WARPS) {
    float v = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) v += sums[w * SUMS + i * 32 + lane];
    v += bias;
    if (RELU && v <= 0.f) v = 0.f;
    // number i of a fragment is of image 2 t + i % 2, and so of pixel i / 4
    if (column < SLICE) ys[(2 * t + i % 2) * Y_PITCH + column * PQ + i / 4] = v;
  }
  sync_threads(1, MULTIPLIERS);

  float d[2][4] = {};
#pragma unroll
  for (int b = 0; b < BLOCKS; ++b) {
    const float4 v = *(const float4*)(ys + g * Y_PITCH + 16 * b + 4 * t);
    const float4 &even = rows[b][0], &odd = rows[b][1];
    const u32 first[4] = {round_tf32(even.x), round_tf32(odd.x), round_tf32(even.y),
                          round_tf32(odd.y)};
    const u32 second[4] = {round_tf32(even.z), round_tf32(odd.z), round_tf32(even.w),
                           round_tf32(odd.w)};
    mma_tf32(d[0], first, round_tf32(v.x), round_tf32(v.y));
    mma_tf32(d[1], second, round_tf32(v.z), round_tf32(v.w));
  }
  const u32 to = shared_address(memory + PARTS_AT + rank * UNITS + 16 * warp + 2 * g);
#pragma unroll
  for (int e = 0; e < 2; ++e)
    send_pair_to_block(to, parts_come, 2 * t + e, d[0][e] + d[1][e],
                       d[0][2 + e] + d[1][2 + e]);

  // y last, as no other block waits for it
#pragma unroll
  for (int i = threadIdx.x; i < IMAGES * INPUTS / 4; i += MULTIPLIERS) {
    const int image = i / (INPUTS / 4), at = i % (INPUTS / 4) * 4;
    if (n0 + image < p.N)
      *(float4*)(p.y + (long long)(n0 + image) * I + rank * INPUTS + at) =
          *(const float4*)(ys + image * Y_PITCH + at);
  }
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int step = 16; step; step /= 2) v += __shfl_xor_sync(~0u, v, step);
  return v;
}

// The ninth warp: copies image n, then finishes it. A lane has 4 hidden units.
__device__ __forceinline__ void finish_image(const Arguments& p, float* memory,
                                             u32 x_come, u32 parts_come, int rank,
                                             int n) {
  const int lane = threadIdx.x % 32, unit = 4 * lane;
  const bool present = n < p.N;
  if (!p.settled) wait_for_earlier_kernels();
  float4 w[O];
  float b[O];
#pragma unroll
  for (int o = 0; o < O; ++o) {
    w[o] = load_four(p.weight_out + o * HID, unit, HID);
    b[o] = HAS_BIAS_OUT ? p.bias_out[o] : 0.f;
  }
  float4 bias = make_float4(0, 0, 0, 0);
  if (HAS_BIAS_HIDDEN) bias = load_four(p.bias_hidden, unit, HID);
  wait_cluster();  // the others' barriers are ready
  if (p.settled) wait_for_earlier_kernels();
  let_next_kernel_start();
  if (lane == 0 && present)
    copy_bulk_to_cluster(shared_address(memory + rank * X_PITCH),
                         p.x + (long long)n * IMAGE, 4 * IMAGE, x_come, 0xff);
  __syncwarp();
  const int label = present ? load_fresh(p.labels + n) : 0;

  barrier_wait_cluster(parts_come, 0);
  float v[4] = {bias.x, bias.y, bias.z, bias.w};
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    const float4 part = *(const float4*)(memory + PARTS_AT + r * UNITS + unit);
    v[0] += part.x, v[1] += part.y, v[2] += part.z, v[3] += part.w;
  }
#pragma unroll
  for (int e = 0; e < 4; ++e)
    if (unit + e >= HID || HIDDEN_RELU && v[e] <= 0.f) v[e] = 0.f;
  if (!present) return;
  float* const hidden = p.hidden + (long long)n * HID + unit;
  if (HID % 4 == 0) {
    if (unit < HID) *(float4*)hidden = make_float4(v[0], v[1], v[2], v[3]);
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (unit + e < HID) hidden[e] = v[e];
  }

  // every lane has all logits, and lane o looks after logit o
  float high = -__int_as_float(0x7f800000), z = 0.f;
#pragma unroll
  for (int o = 0; o < O; ++o) {
    const float logit =
        warp_sum(v[0] * w[o].x + v[1] * w[o].y + v[2] * w[o].z + v[3] * w[o].w) + b[o];
    high = fmaxf(high, logit);
    if (lane == o) z = logit;
  }
  const float log_prob = z - high - logf(warp_sum(lane < O ? expf(z - high) : 0.f));
  if (lane < O) {
    p.log_probs[n * O + lane] = log_prob;
    p.dlogits[n * O + lane] =
        (expf(log_prob) - (lane == label ? 1.f : 0.f)) / (float)p.N;
  }
  // a label that is no class gives NaN
  if (label < 0 || label >= O) p.losses[n] = __int_as_float(0x7fffffff);
  else if (lane == label) p.losses[n] = -log_prob;
}

extern "C" __global__ void __launch_bounds__(MULTIPLIERS + 32, 2)
    __cluster_dims__(IMAGES)
        conv_tail_forward(const float* x, const u32* filter, const float* bias,
                          const float* weight, const float* bias_hidden,
                          const float* weight_out, const float* bias_out,
                          const int* labels, float* y, float* hidden, float* log_probs,
                          float* losses, float* dlogits, int N, int settled) {
  extern __shared__ __align__(16) float memory[];
  __shared__ u64 barriers[2];
  const Arguments p{x,          filter,   bias,    weight, bias_hidden,
                    weight_out, bias_out, labels,  y,      hidden,
                    log_probs,  losses,   dlogits, N,      settled};
  const u32 x_come = shared_address(barriers), parts_come = x_come + 8;
  const int n = blockIdx.x, rank = n % IMAGES, n0 = n - rank;
  if (threadIdx.x == MULTIPLIERS) {
    barrier_init(x_come, 1);
    barrier_init(parts_come, 1);
    barrier_init_fence();
    barrier_expect(x_come, 4 * IMAGE * min(IMAGES, N - n0));
    barrier_expect(parts_come, 4 * IMAGES * UNITS);
  }
  __syncwarp();
  arrive_cluster();  // a block's shared memory may be written once the block runs
  if (threadIdx.x < MULTIPLIERS) make_parts(p, memory, x_come, parts_come, rank, n0);
  else finish_image(p, memory, x_come, parts_come, rank, n);
}
