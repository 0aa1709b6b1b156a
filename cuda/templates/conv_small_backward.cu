// Backward of the fused block  y = relu(conv(x, weight) + bias)  on images of at most
// 4 x 4 pixels, stride 1.
//
// Shapes are compile-time constants but for the batch N:
//   x, dx (N, C, H, W)   weight (K, C, R, S)   y, dy (N, K, P, Q)
// With h = p + r - PAD_H and w = q + s - PAD_W:
//   dz = dy where relu let y through (y > 0), else 0
//   dx[n,c,h,w] = sum over k and all (p, r), (q, s) that lead to h, w, of
//                 dz[n,k,p,q] weight[k,c,r,s]
//   dweight[k,c,r,s] = sum over n, p, q of dz[n,k,p,q] x[n,c,h,w]
//   dbias[k] = sum over n, p, q of dz[n,k,p,q]
//
// conv_block_backward.cu has the general case. Here an image of a channel fits into the
// registers of a lane, so that dz and x go from global memory into products without
// shared memory between, and all loads of a block are in flight at once: layers as
// small as this take little longer than a block waits for memory, and should wait once.
//
// dx: a product for each pair of columns (q, q+1) of dz and each tap: rows are 8 images
// x these two columns, columns 8 channels c, contraction over k. A lane has all dz of
// its image and its k. Sums are kept apart for each tap column s, since what pixel q
// gives to it belongs to w = q + s - PAD_W; a lane adds them at the end, as it has all
// q of its image. So nothing is multiplied by a border. WI warps have different images,
// WK share the contraction and add their sums in shared memory, in order.
//
// dweight: a product for each pixel (p, q) and tap: rows are 16 k, columns 8 c,
// contraction over images. A lane has all dz of its k and image and all x of its c and
// image. VK warps have different k, VN share the images and add their sums in shared
// memory, in order; splits of the batch write partial gradients, and update.cu adds
// them in order.
//
// SETTLED: weight and x were complete before the kernel ahead of this one started, so
// they are fetched while that one still runs.
//
// Launch: 256 threads, SHARED bytes; blocks 0 .. dx_blocks-1 work on dx (c tile
// fastest, then images), the others on dweight (k tile fastest, then c tile, then
// split). Compute capability 8.0 and up.
#include "backward.cuh"

constexpr int P = H + 2 * PAD_H - R + 1, Q = W + 2 * PAD_W - S + 1;
constexpr int PQ = P * Q, HW = H * W, RS = R * S;

// All numbers of an image of a channel.
template <bool FRESH, int COUNT>
__device__ __forceinline__ void load_image(float (&v)[COUNT],
                                           const float* from, bool inside) {
  constexpr int RUN = run(COUNT);
#pragma unroll
  for (int i = 0; i < COUNT; i += RUN) {
    float part[RUN] = {};
    if (inside) load_run<FRESH>(part, from + i);
#pragma unroll
    for (int j = 0; j < RUN; ++j) v[i + j] = part[j];
  }
}

struct Gradient {
  const float* dy;
  const float* y;

  // dz of image n and channel k
  __device__ __forceinline__ void load(float (&dz)[PQ], int n, int k, int N) const {
    const bool inside = n < N && k < K;
    const size_t at = ((size_t)n * K + k) * PQ;
    load_image<true>(dz, dy + at, inside);
    if (RELU) {
      float passed[PQ];
      load_image<true>(passed, y + at, inside);
#pragma unroll
      for (int i = 0; i < PQ; ++i)
        if (!(passed[i] > 0.0f)) dz[i] = 0.0f;
    }
  }
};

// Words of one number, or of a pair of bf16.
template <int COUNT>
__device__ __forceinline__ void make_words(u32 (&to)[COUNT], const float (&low)[COUNT],
                                           const float (&high)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i)
    to[i] = E == 2 ? pack_bf16(low[i], high[i]) : operand(low[i]);
}

// Runs of 1, 2 or 4 numbers.
template <int COUNT>
__device__ __forceinline__ void load_vector(float (&v)[COUNT], const float* from) {
  if (COUNT == 4) {
    const float4 f = *(const float4*)from;
    v[0] = f.x, v[1 % COUNT] = f.y, v[2 % COUNT] = f.z, v[3 % COUNT] = f.w;
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) v[i] = from[i];
  }
}
template <int COUNT>
__device__ __forceinline__ void store_vector(float* to, const float (&v)[COUNT]) {
  if (COUNT == 4) {
    *(float4*)to = make_float4(v[0], v[1 % COUNT], v[2 % COUNT], v[3 % COUNT]);
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) to[i] = v[i];
  }
}

// ================================================================ dx
#if NEED_DX
namespace data_gradient {

// A block: WI x 8 images, 8 channels.
constexpr int WI = DX_WI, WK = WARPS / WI, TI = 8 * WI, CT = 8;
constexpr int C_TILES = ceil_div(C, CT), PAIRS = ceil_div(Q, 2);
// A step of a warp takes 8 words along k; lane t has numbers 2t and 2t+1 of each 8 k.
constexpr int STEPS = ceil_div(K, 8 * E * WK), K_ROWS = STEPS * WK * 8 * E;
constexpr int W_ROW = stride(CT * RS, 4, 16);
constexpr int W_RUN = run(C * RS) < run(CT * RS) ? run(C * RS) : run(CT * RS);
constexpr int ROWS = 2 * H;  // of 4 columns: what a lane has of dx
constexpr int SHARED_WORDS = most(K_ROWS * W_ROW, WARPS * ROWS * 128);

__device__ __forceinline__ void run_block(int block, u32* shared, const Gradient& from,
                                          const float* __restrict__ weight,
                                          float* __restrict__ dx, int N) {
  const int lane = threadIdx.x % 32, warp = warp_index(), g = lane / 4, t = lane % 4;
  const int wi = warp % WI, wk = warp / WI;
  const int c0 = block % C_TILES * CT, n0 = block / C_TILES * TI;

  // [k][c][r][s]
  for_all<K_ROWS, CT * RS / W_RUN, 8>([&](int k, int item) {
    const int at = item * W_RUN;
    u32* const to = shared + k * W_ROW + at;
    if (k < K && c0 * RS + at < C * RS) {
      copy_run<4, W_RUN>(to, weight + ((size_t)k * C + c0) * RS + at);
    } else {
#pragma unroll
      for (int j = 0; j < W_RUN; ++j) to[j] = 0;
    }
  });
  copy_commit();
  if (SETTLED) wait_for_earlier_kernels();
  let_next_kernel_start();

  u32 dz[STEPS][2][PQ];
#pragma unroll
  for (int step = 0; step < STEPS; ++step)
#pragma unroll
    for (int word = 0; word < 2; ++word) {
      const int n = n0 + wi * 8 + g;
      const int k = (step * WK + wk) * 8 * E + (E == 2 ? word * 8 : word) + 2 * t;
      float low[PQ], high[PQ];
      from.load(low, n, k, N);
      if (E == 2) from.load(high, n, k + 1, N);
      make_words(dz[step][word], low, E == 2 ? high : low);
    }
  copy_wait<0>();
  __syncthreads();

  float acc[S][H][PAIRS][4] = {};
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    const u32* const w = shared + ((step * WK + wk) * 8 * E + 2 * t) * W_ROW + g * RS;
    u32 b[RS][2];
#pragma unroll
    for (int tap = 0; tap < RS; ++tap)
#pragma unroll
      for (int word = 0; word < 2; ++word) {
        const u32* const v = w + (E == 2 ? word * 8 : word) * W_ROW + tap;
        b[tap][word] = E == 2
                           ? pack_bf16(__uint_as_float(v[0]), __uint_as_float(v[W_ROW]))
                           : copied_operand(v[0]);
      }
#pragma unroll
    for (int p = 0; p < P; ++p)
#pragma unroll
      for (int pair = 0; pair < PAIRS; ++pair) {
        const int q = p * Q + 2 * pair;
        const bool whole = 2 * pair + 1 < Q;
        Rows a;
        a.set(dz[step][0][q], whole ? dz[step][0][whole ? q + 1 : q] : 0u,
              dz[step][1][q], whole ? dz[step][1][whole ? q + 1 : q] : 0u);
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int s = 0; s < S; ++s) {
            const int h = p + r - PAD_H;
            if (h < 0 || h >= H) continue;
            multiply(acc[s][h][pair], a, b[r * S + s][0], b[r * S + s][1]);
          }
      }
  }

  // a lane has image g, channels 2t and 2t+1
  __syncthreads();
  float4* const sums = (float4*)shared + lane;
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
    float v[4] = {};
#pragma unroll
    for (int s = 0; s < S; ++s)
#pragma unroll
      for (int q = 0; q < Q; ++q) {
        const int w = q + s - PAD_W;
        if (w >= 0 && w < W) v[w] += acc[s][row / 2][q / 2][q % 2 * 2 + row % 2];
      }
    sums[(warp * ROWS + row) * 32] = make_float4(v[0], v[1], v[2], v[3]);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < WI * ROWS; i += WARPS) {
    const int image = (i + warp) / ROWS, row = (i + warp) % ROWS;
    if (image >= WI) break;
    float v[4] = {};
#pragma unroll
    for (int giver = 0; giver < WK; ++giver) {
      const float4 part = sums[((giver * WI + image) * ROWS + row) * 32];
      v[0] += part.x, v[1] += part.y, v[2] += part.z, v[3] += part.w;
    }
    const int n = n0 + image * 8 + g, c = c0 + 2 * t + row % 2;
    if (n >= N || c >= C) continue;
    float* const to = dx + (((size_t)n * C + c) * H + row / 2) * W;
    if (W == 4) {
      *(float4*)to = make_float4(v[0], v[1], v[2], v[3]);
    } else {
#pragma unroll
      for (int w = 0; w < W; ++w) to[w] = v[w];
    }
  }
}

}  // namespace data_gradient
#endif

// ================================================================ dweight, dbias
namespace weight_gradient {

// A block: VK x 16 output channels, 8 input channels.
constexpr int VK = DW_VK, VN = WARPS / VK, KT = 16 * VK, CT = 8;
constexpr int K_TILES = ceil_div(K, KT), C_TILES = ceil_div(C, CT);
// images of a step of a warp, and of a stage of the block
constexpr int STEP = 8 * E, STAGE = STEP * VN;
constexpr int OUT_ROW = stride(CT * RS, 12, 32), RUN = run(C * RS);
constexpr int SHARED_WORDS = VN * KT * (OUT_ROW + 1);

__device__ __forceinline__ void run_block(
    int block, float* shared, const Gradient& from, const float* __restrict__ x,
    float* __restrict__ dweight, float* __restrict__ dbias, int N, int stages) {
  const int lane = threadIdx.x % 32, warp = warp_index(), g = lane / 4, t = lane % 4;
  const int vk = warp % VK, vn = warp / VK;
  const int k0 = block % K_TILES * KT, c_tile = block / K_TILES % C_TILES;
  const int split = block / (K_TILES * C_TILES), c0 = c_tile * CT;
  const int begin = split * stages * STAGE, end = least(begin + stages * STAGE, N);
  const bool with_bias = dbias && c_tile == 0;

  // Word t + 4 i of a step: one image, or two. The next stage's numbers are asked for
  // while this one's are multiplied.
  float x_next[2][E][HW], dz_next[2][2][E][PQ];
  const auto fetch_x = [&](int first) {
#pragma unroll
    for (int i = 0; i < 2 * E; ++i) {
      const int n = first + vn * STEP + (i / E * 4 + t) * E + i % E, c = c0 + g;
      load_image<false>(x_next[i / E][i % E], x + ((size_t)n * C + c) * HW,
                        n < end && c < C);
    }
  };
  const auto fetch_dz = [&](int first) {
#pragma unroll
    for (int i = 0; i < 4 * E; ++i) {
      const int half = i / (2 * E), word = i / E % 2;
      const int n = first + vn * STEP + (word * 4 + t) * E + i % E;
      from.load(dz_next[half][word][i % E], n, k0 + (vk * 2 + half) * 8 + g, end);
    }
  };
  fetch_x(begin);
  if (SETTLED) wait_for_earlier_kernels();
  let_next_kernel_start();
  fetch_dz(begin);

  float acc[RS][4] = {};
  float bias[2] = {};
#pragma unroll 1
  for (int first = begin; first < end; first += STAGE) {
    u32 xs[2][HW], dz[2][2][PQ];
#pragma unroll
    for (int word = 0; word < 2; ++word) {
      make_words(xs[word], x_next[word][0], x_next[word][E - 1]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        make_words(dz[half][word], dz_next[half][word][0], dz_next[half][word][E - 1]);
        if (with_bias) {
#pragma unroll
          for (int i = 0; i < PQ; ++i) bias[half] += sum_of(dz[half][word][i]);
        }
      }
    }
    if (first + STAGE < end) {
      fetch_x(first + STAGE);
      fetch_dz(first + STAGE);
    }
#pragma unroll
    for (int i = 0; i < PQ; ++i) {
      Rows a;
      a.set(dz[0][0][i], dz[1][0][i], dz[0][1][i], dz[1][1][i]);
#pragma unroll
      for (int tap = 0; tap < RS; ++tap) {
        const int h = i / Q + tap / S - PAD_H, w = i % Q + tap % S - PAD_W;
        if (h < 0 || h >= H || w < 0 || w >= W) continue;
        multiply(acc[tap], a, xs[0][h * W + w], xs[1][h * W + w]);
      }
    }
  }

  // [vn][k][c][r][s], and the bias behind
  float* const out = shared + (vn * KT + vk * 16) * OUT_ROW;
  float* const bias_out = shared + VN * KT * OUT_ROW;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int k = half * 8 + g;
#pragma unroll
    for (int tap = 0; tap < RS; ++tap) {
      float* const to = out + k * OUT_ROW + 2 * t * RS + tap;
      to[0] = acc[tap][2 * half];
      to[RS] = acc[tap][2 * half + 1];
    }
    if (with_bias) {
      float v = bias[half];
      v += __shfl_xor_sync(~0u, v, 1);
      v += __shfl_xor_sync(~0u, v, 2);
      if (t == 0) bias_out[(vn * VK + vk) * 16 + k] = v;
    }
  }
  __syncthreads();
  for_all<KT, CT * RS / RUN, 4>([&](int k, int item) {
    const int at = item * RUN;
    float sum[RUN] = {};
#pragma unroll
    for (int giver = 0; giver < VN; ++giver) {
      float part[RUN];
      load_vector(part, shared + (giver * KT + k) * OUT_ROW + at);
#pragma unroll
      for (int j = 0; j < RUN; ++j) sum[j] += part[j];
    }
    if (k0 + k < K && c0 * RS + at < C * RS)
      store_vector(dweight + ((size_t)split * K + k0 + k) * (C * RS) + c0 * RS + at,
                   sum);
  });
  if (with_bias && threadIdx.x < KT && k0 + threadIdx.x < K) {
    float sum = 0.0f;
#pragma unroll
    for (int giver = 0; giver < VN; ++giver) sum += bias_out[giver * KT + threadIdx.x];
    dbias[(size_t)split * K + k0 + threadIdx.x] = sum;
  }
}

}  // namespace weight_gradient

#if NEED_DX
constexpr int SHARED_WORDS =
    most(data_gradient::SHARED_WORDS, weight_gradient::SHARED_WORDS);
#else
constexpr int SHARED_WORDS = weight_gradient::SHARED_WORDS;
#endif
static_assert(SHARED_WORDS * 4 == SHARED, "the host counts the same bytes");

// stages: of a split, of weight_gradient::STAGE images. dweight (splits, K, C, R, S),
// dbias (splits, K) or null.
extern "C" __global__ void __launch_bounds__(THREADS)
    conv_small_backward(const float* __restrict__ dy, const float* __restrict__ y,
                        const u8* __restrict__, const float* __restrict__ x,
                        const float* __restrict__ weight, float* __restrict__ dx,
                        float* __restrict__ dweight, float* __restrict__ dbias, int N,
                        int dx_blocks, int stages) {
  extern __shared__ uint4 shared[];
  if (!SETTLED) wait_for_earlier_kernels();
  const Gradient from = {dy, y};
  const int block = blockIdx.x;
#if NEED_DX
  if (block < dx_blocks) {
    data_gradient::run_block(block, (u32*)shared, from, weight, dx, N);
    return;
  }
#endif
  weight_gradient::run_block(block - dx_blocks, (float*)shared, from, x, dweight, dbias,
                             N, stages);
}
