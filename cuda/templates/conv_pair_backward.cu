// The backward of two convolution blocks in fp32: see conv_pair_backward.cuh.
//
// 1. Data role.
//    dy1[n,c,p+r,q+s] = sum over k and all p, r, q, s of dz2[n,k,p,q] weight2[k,c,r,s]
//    As a product: (8 q of 2 images) x (8 c), contraction over k, for each p, r, s. It
//    is added to the accumulators of row p + r and tap s, so that the border costs
//    nothing. At the end the sums of tap s move by s lanes, from q to w = q + s. A warp
//    has 2 images and some of the rows. Row h meets as many p as r = h - p allows; each
//    of the sets {0,3} {1,2} {4} {5} | {6} {7} {11,8} {10,9} meets 5.
// 2. Weight role: 32 k and all taps.
//    dweight2[k,c,r,s] = sum over n, p, q of dz2[n,k,p,q] y1[n,c,p+r,q+s]
//    As a product: (16 k) x (8 c) for each r, s, contraction over the 16 pixels of 4
//    windows side by side. Of two pixels side by side in a window one at least is 0:
//    the form of sparse products, which take 0.65 of the time. Their operand A has a
//    number for each pair, and 4 bits that say which of the two it is: 0x4 or 0xe.
//    The 40 items (r, image), r outermost, go to 8 pairs of warps, which have 16 k
//    each, in runs of 5. A warp that comes to its next r puts the sums so far into
//    shared memory.
#include "conv_pair_backward.cuh"

static_assert(MODE == MODE_FP32, "for tf32 see conv_pair_backward_wgmma.cu");

// d (16 x 8) += a b with 16 pixels of contraction, of which A has 8: see 2. above.
__device__ __forceinline__ void multiply_sparse(float (&d)[4], const u32 (&a)[4],
                                                u32 b0, u32 b1, u32 b2, u32 b3,
                                                u32 columns) {
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k16.row.col.f32.tf32.tf32.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, 0x0;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(b2), "r"(b3),
        "r"(columns));
}
// The same, with the precision and the sums of `multiply` (backward.cuh).
__device__ __forceinline__ void multiply_sparse(float (&acc)[4], const Rows& a,
                                                const u32 (&b)[4], u32 columns) {
  const Split b0(b[0]), b1(b[1]), b2(b[2]), b3(b[3]);
  float sum[4] = {};
  multiply_sparse(sum, a.small, b0.big, b1.big, b2.big, b3.big, columns);
  multiply_sparse(sum, a.word, b0.small, b1.small, b2.small, b3.small, columns);
  multiply_sparse(sum, a.word, b0.big, b1.big, b2.big, b3.big, columns);
#pragma unroll
  for (int i = 0; i < 4; ++i) acc[i] += sum[i];
}

// The words of a lane's windows pp = 0 .. 3 of one k of an image.
struct Windows {
  u32 at;  // address of pp = 0
  int swizzle;

  __device__ __forceinline__ void load(u32 address, int k) {
    at = address, swizzle = k / 2 % 4;
  }
  __device__ __forceinline__ u32 word(int part, int pp) const {
    return load_shared(at + part * DZ_PART * 4 + ((pp ^ swizzle) - swizzle) * 16);
  }
};

// ================================================================ data role
namespace data_role {

// Rows of k. 8 mod 32, and 25 g are all residues mod 8: lanes (t, g) of a weight meet
// all banks.
constexpr int W_ROW = CT * RS, W_WORDS = K * W_ROW;
constexpr int COPIED_AHEAD = 2;  // steps of which weights are asked for ahead

// Asks for the weights of a step.
__device__ __forceinline__ void copy_weights(u32* w_tile, u32 arrived, int step,
                                             const float* __restrict__ weight2,
                                             int c0) {
  for_copies<8, W_ROW / 4>([&](int of_step, int i) {
    const int k = step * 8 + of_step;
    copy_async16(shared_address(w_tile + k * W_ROW + i * 4),
                 weight2 + ((size_t)k * C + c0) * RS + i * 4);
  });
  barrier_arrive_copies(arrived + 8 * step);
}

// Rows h0 of dy1, which meets `split` p, and h1, which meets the rest of five, or does
// not exist. low, high: addresses of the windows (0, qq) of a lane's k = t and t + 4;
// w: of its weights; to: of its numbers in row first_row. All warps run the same short
// loop.
template <class Copy>
__device__ __forceinline__ void make_rows(u32* to, int first_row, int h0, int h1,
                                          int split, u32 low, u32 high, u32 w, int t,
                                          u32 even_place, u32 odd_place, u32 arrived,
                                          const Copy& copy) {
  float acc[2][S * 4] = {};
  const int r0 = most(0, h0 - Z_SIZE + 1), r1 = most(0, h1 - Z_SIZE + 1) - split;
#pragma unroll 1
  for (int step = 0; step < STEPS; ++step) {
    copy(step);
    barrier_wait(arrived + 8 * step, 0);
#pragma unroll 1
    for (int j = 0; j < R; ++j) {
      const int r = j + (j < split ? r0 : r1), p = (j < split ? h0 : h1) - r;
      const u32 place = p % 2 ? odd_place : even_place;
      Rows a;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int swizzle = t / 2 + e / 2 * 2;  // of k = t or t + 4: see window_at
        const u32 at = (e / 2 ? high : low) +
                       (step * 8 * WINDOWS + e % 2 * DZ_IMAGE) * 4 +
                       ((p / 2 ^ swizzle) - swizzle) * 16;
        a.word[e] = pick(load_shared(at), place);
        a.small[e] = pick(load_shared(at + DZ_PART * 4), place);
      }
      u32 big[S][2], small[S][2];
#pragma unroll
      for (int i = 0; i < 2 * S; ++i) {
        const Split b(load_shared(w + (i % 2 * 4 * W_ROW + r * S + i / 2) * 4));
        big[i / 2][i % 2] = b.big, small[i / 2][i % 2] = b.small;
      }
      float sum[S][4] = {};
#pragma unroll
      for (int s = 0; s < S; ++s) mma_tf32(sum[s], a.small, big[s][0], big[s][1]);
#pragma unroll
      for (int s = 0; s < S; ++s) mma_tf32(sum[s], a.word, small[s][0], small[s][1]);
#pragma unroll
      for (int s = 0; s < S; ++s) mma_tf32(sum[s], a.word, big[s][0], big[s][1]);
      if (j < split) {
#pragma unroll
        for (int i = 0; i < S * 4; ++i) acc[0][i] += sum[i / 4][i % 4];
      } else {
#pragma unroll
        for (int i = 0; i < S * 4; ++i) acc[1][i] += sum[i / 4][i % 4];
      }
    }
    w += 8 * W_ROW * 4;
  }
  store_row(to + (h0 - first_row) * Y_SIZE * CT, acc[0]);
  if (h1 < Y_SIZE) store_row(to + (h1 - first_row) * Y_SIZE * CT, acc[1]);
}

// A group of images from n0 on. arrived: barriers of the weights of each step, of which
// only the first group asks for weights.
__device__ __forceinline__ void run(const Tiles& tiles, u32* w_tile, const u32* dz_tile,
                                    u32 arrived, int half, int c0, int n0, bool first,
                                    const u8* __restrict__ code1,
                                    const float* __restrict__ x,
                                    const float* __restrict__ weight2, int N) {
  const int lane = thread_index() % 32, g = lane / 4, t = lane % 4;
  const int warp = warp_index(), pair = warp % 4;
  copy_first(tiles, half, c0, n0, code1, x, N);
  const u32 even_place = g % 2 ? 4u : 2u, odd_place = g % 2 ? 32u : 8u;
  const u32 low = shared_address(dz_tile + window_at(pair * 2, t, 0, g / 2));
  const u32 high = shared_address(dz_tile + window_at(pair * 2, t + 4, 0, g / 2));
  // two rows of each set, four bits each; f: none
  const int rows = 0x9a'8b'f7'f6'f5'f4'21'30ull >> (32 * half + warp / 4 * 8) & 255;
  const int h0 = rows & 15, h1 = rows >> 4;
  const int meets = h1 >= Y_SIZE ? R : least(h0 + 1, Y_SIZE - h0);
  make_rows(tiles.dy + (pair * 2 * ROWS * Y_SIZE + g) * CT + 2 * t, half * ROWS, h0, h1,
            meets, low, high, shared_address(w_tile + t * W_ROW + g * RS), t,
            even_place, odd_place, arrived, [&](int step) {
              if (first && step + COPIED_AHEAD < STEPS)
                copy_weights(w_tile, arrived, step + COPIED_AHEAD, weight2, c0);
            });
}

}  // namespace data_role

// ================================================================ weight role
namespace weight_role {

constexpr int KT = 32, K_TILES = ceil_div(K, KT);
static_assert(K_TILES <= HALVES, "a block has one tile at most");
constexpr int Y_ROW = Y_PLANE + 4;  // 20 mod 32: 8 channels meet all banks
// sums of one r: [k][c][s]; slots of different r start at different banks
constexpr int SLOT = KT * CT * S + 6;
constexpr int EARLY_WORDS = round_up(4 * SLOT, 4);
// the last sums lie over y1
constexpr int Y_WORDS = round_up(most(IMAGES * CT * Y_ROW, WARPS* SLOT), 4);
constexpr int SHARED_WORDS = Y_WORDS + EARLY_WORDS;

__device__ __forceinline__ void store_sums(float* slot, float (&acc)[S][4]) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  float* const to = slot + g * CT * S + 2 * t * S;
#pragma unroll
  for (int s = 0; s < S; ++s)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      to[e / 2 * 8 * CT * S + e % 2 * S + s] = acc[s][e];
      acc[s][e] = 0.0f;
    }
}

// y1 of a group comes into shared memory in the background.
__device__ __forceinline__ void copy_input(u32* y_tile, const float* __restrict__ y1,
                                           int c0, int n0, int N) {
  for_copies<IMAGES * CT, Y_PLANE / 4>([&](int plane, int i) {
    const int n = n0 + plane / CT, c = c0 + plane % CT;
    copy4(y_tile + plane * Y_ROW + i * 4, y1 + ((size_t)n * C + c) * Y_PLANE + i * 4,
          n < N);
  });
  copy_commit();
}

// A group of images; y1 is in shared memory. first: it is the block's first one.
__device__ __forceinline__ void run(u32* shared, const u32* dz_tile, int k0, int c0,
                                    int split, bool first, float* __restrict__ dweight2,
                                    float* __restrict__ dbias2) {
  const int thread = thread_index() % ROLE_THREADS, lane = thread % 32, g = lane / 4,
            t = lane % 4;
  // warps 8 to 15 have the second 16 k
  const int warp = warp_index() % WARPS, m0 = warp_index() / WARPS * 16;
  u32* const y_tile = shared;
  float* const early = (float*)(shared + Y_WORDS);
  float* const late = (float*)shared;

  // Operands are loaded AHEAD products before they are needed, windows of the next
  // item at the end of this one.
  constexpr int AHEAD = 3, PRODUCTS = 4 * S;
  static_assert(PRODUCTS % (AHEAD + 1) == 0, "items begin at one place of b");
  float acc[S][4] = {};
  Windows windows[2];
  u32 b[AHEAD + 1][4];
  const u32 y_lane = shared_address(y_tile + g * Y_ROW + t);
  u32 dz_lane[2];  // of each 8 k; those beyond K get a place, too
#pragma unroll
  for (int i = 0; i < 2; ++i)
    dz_lane[i] =
        shared_address(dz_tile + window_at(0, least(k0 + m0 + i * 8, K - 8) + g, 0, t));
  const auto load_item = [&](int item) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      windows[i].load(dz_lane[i] + item % IMAGES * DZ_IMAGE * 4, g);
  };
  const auto y_of = [&](int item) {
    return y_lane + (item % IMAGES * CT * Y_ROW + item / IMAGES * Y_SIZE) * 4;
  };
  const auto load_product = [&](int product, u32 y) {
    const int pp = product / S, s = product % S;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      b[product % (AHEAD + 1)][j] =
          load_shared(y + ((2 * pp + j / 2) * Y_SIZE + s + j % 2 * 4) * 4);
  };
  const int begin = warp * 5;
  u32 y = y_of(begin);
  load_item(begin);
#pragma unroll
  for (int i = 0; i < AHEAD; ++i) load_product(i, y);
#pragma unroll 1
  for (int item = begin; item < begin + 5; ++item) {
    if (item > begin && item % IMAGES == 0)
      store_sums(early + warp / 2 * SLOT + m0 * CT * S, acc);
    const u32 next_y = y_of(item + 1);
#pragma unroll
    for (int pp = 0; pp < 4; ++pp) {
      u32 word[PARTS][2];
#pragma unroll
      for (int i = 0; i < 2 * PARTS; ++i)
        word[i / 2][i % 2] = windows[i % 2].word(i / 2, pp);
      Rows a;
#pragma unroll
      for (int i = 0; i < 2 * PARTS; ++i) {
        u32(&to)[4] = i / 2 ? a.small : a.word;
        // a word without a place has the value 0
        const bool upper = word[0][i % 2] & 6u;
        to[i % 2] = upper ? word[i / 2][i % 2] : 0u;
        to[2 + i % 2] = upper ? 0u : word[i / 2][i % 2];
      }
      const u32 columns =
          (__byte_perm(word[0][0], word[0][1], 0x5410) & 0x11111111u) * 10u +
          0x44444444u;
      if (pp == 3) load_item(item + 1);
#pragma unroll
      for (int s = 0; s < S; ++s) {
        const int product = pp * S + s, ahead = product + AHEAD;
        load_product(ahead % PRODUCTS, ahead < PRODUCTS ? y : next_y);
        multiply_sparse(acc[s], a, b[product % (AHEAD + 1)], columns);
      }
    }
    y = next_y;
  }

  if (c0 == 0) bias_gradients<KT>(dz_tile, k0, first, dbias2 + (size_t)split * K + k0);
  sync_role(WEIGHT_ROLE);
  store_sums(late + warp * SLOT + m0 * CT * S, acc);
  sync_role(WEIGHT_ROLE);
  // r was worked on by warps 0 1 | 1 2 3 | 3 4 | 4 5 6 | 6 7: in their order, and
  // what a warp had early lies in slot warp / 2
  const int tap = thread % THREADS;  // of 8 channels
  if (tap < CT * RS) {
    const int r = tap % RS / S, at = tap / RS * S + tap % S;
    const bool three = r % 2;
    const int before = r * 8 / 5;  // first warp whose last r this is, 0 1 3 4 6
    const float* const a = late + before * SLOT + at;
    const float* const b = (r == 0   ? early
                            : r == 2 ? early + 2 * SLOT
                                     : late + (before + 1) * SLOT) +
                           at;
    const float* const c = early + (r == 1 ? 1 : 3) * SLOT + at;
    float* const to = dweight2 + (((size_t)split * K + k0) * C + c0) * RS + tap;
#pragma unroll 8
    for (int k = thread / THREADS; k < KT; k += ROLE_THREADS / THREADS) {
      if (K % KT && k0 + k >= K) break;
      float sum = a[k * CT * S] + b[k * CT * S];
      if (three) sum += c[k * CT * S];
      float* const out = to + (size_t)k * C * RS;
      *out = first ? sum : *out + sum;
    }
  }
}

}  // namespace weight_role

static_assert((DZ_WORDS + data_role::W_WORDS + data_role::TILE_WORDS +
               weight_role::SHARED_WORDS) *
                      4 ==
                  SHARED,
              "the host counts the same bytes");

extern "C" __global__ void __launch_bounds__(2 * THREADS, 1)
    conv_pair_backward(const float* dy2, const u8* code2, const float* __restrict__ y1,
                       const u8* __restrict__ code1, const float* __restrict__ x,
                       const float* __restrict__ weight2, float* __restrict__ dweight2,
                       float* __restrict__ dbias2, float* __restrict__ dweight1,
                       float* __restrict__ dbias1, int N, int splits) {
  extern __shared__ uint4 shared[];
  __shared__ u64 barriers[data_role::STEPS];
  const u32 arrived = shared_address(barriers);
  const int half = blockIdx.x % HALVES, c0 = blockIdx.x / HALVES % C_TILES * CT,
            split = blockIdx.x / (HALVES * C_TILES), k0 = half * weight_role::KT;
  u32* const dz_tile = (u32*)shared;
  u32* const w_tile = dz_tile + DZ_WORDS;
  const data_role::Tiles tiles(w_tile + data_role::W_WORDS);
  u32* const of_weights = w_tile + data_role::W_WORDS + data_role::TILE_WORDS;
  if (threadIdx.x == 0)
    for (int i = 0; i < data_role::STEPS; ++i)
      barrier_init(arrived + 8 * i, ROLE_THREADS);
  for (int i = threadIdx.x; i < data_role::ONES; i += 2 * THREADS)
    tiles.ones[i] = __float_as_uint(1.0f);
  __syncthreads();
  // weights are older than the kernel before this one
#pragma unroll 1
  for (int step = 0; step < least(data_role::COPIED_AHEAD, data_role::STEPS); ++step)
    data_role::copy_weights(w_tile, arrived, step, weight2, c0);
  const auto copy_input = [&](int n0) {
    if (k0 < K) weight_role::copy_input(of_weights, y1, c0, n0, N);
  };
  if (SETTLED) copy_input(split * IMAGES);
  wait_for_earlier_kernels();
  let_next_kernel_start();

#pragma unroll 1
  for (int group = split; group * IMAGES < N; group += splits) {
    const int n0 = group * IMAGES;
    const bool first = group == split;
    if (!first) __syncthreads();
    load_windows(dz_tile, dy2, code2, n0, N, [&] {
      if (!SETTLED || !first) copy_input(n0);
    });
    copy_wait<0>();
    __syncthreads();
    data_role::run(tiles, w_tile, dz_tile, arrived, half, c0, n0, first, code1, x,
                   weight2, N);
    data_role::first_gradients(tiles, half, c0, split * HALVES + half, first, dweight1,
                               dbias1);
    if (k0 < K)
      weight_role::run(of_weights, dz_tile, k0, c0, split, first, dweight2, dbias2);
  }
}
