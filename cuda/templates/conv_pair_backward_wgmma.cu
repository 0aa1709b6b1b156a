// The backward of two convolution blocks in tf32: see conv_pair_backward.cuh. All
// products but those of dweight1 are of four warps together (wgmma), with the packed
// gradient in registers and the other operand in shared memory.
//
// 1. Data role, warps 0 to 7.
//    dy1[n,c,p+r,q+s] = sum over k and all p, r, q, s of dz2[n,k,p,q] weight2[k,c,r,s]
//    As a product: (8 q of 8 images) x (5 s, 8 c), contraction over k, for each p and
//    r. It is added to the accumulators of row p + r, so that the border costs nothing.
//    At the end the sums of tap s move by s lanes, from q to w = q + s. Four warps have
//    rows 0 to 2, which meet 6 pairs (p, r), four have rows 3 to 5, which meet 14: the
//    tensor cores are shared, so that this need not be even. The second half is the
//    mirror image of the first: 11 - h, 7 - p, 4 - r.
// 2. Weight role, warps 8 to 15: all k, and 4 of the 8 channels.
//    dweight2[k,c,r,s] = sum over n, p, q of dz2[n,k,p,q] y1[n,c,p+r,q+s]
//    As a product: (64 k) x (6 s, 4 c), of which 5 s are needed, for each r, row of
//    places p and column of windows qq, contraction over 8 images and the two columns
//    of a window. Of these two one at least is 0: the form of sparse products, whose
//    operand A has a number for each pair, and 4 bits that say which of the two it is:
//    0x4 or 0xe. Four warps have the windows of two qq, and their sums meet in shared
//    memory.
#include "conv_pair_backward.cuh"
#include "wgmma.cuh"

static_assert(MODE == MODE_TF32, "for fp32 see conv_pair_backward.cu");

// ================================================================ data role
namespace data_role {

// (quad of k, tap, c, k). Lanes that store neighbouring taps meet all banks.
constexpr int W_TAP = CT * 4 + 4, W_QUAD = RS * W_TAP, W_WORDS = K / 4 * W_QUAD;

// weight2 of 8 c on its way through registers. A thread has one c and tap, of every
// other quad of k. Mirrored taps lie in the opposite order.
struct Weights {
  static constexpr int HAVE = 2 * CT * RS;  // threads
  u32 v[K / 8][4];

  __device__ __forceinline__ void load(const float* __restrict__ weight2, int c0) {
    if (threadIdx.x >= HAVE) return;
    const int odd = threadIdx.x / (CT * RS), at = threadIdx.x % (CT * RS);
    const float* const from = weight2 + (odd * 4 * C + c0) * RS + at;
#pragma unroll
    for (int i = 0; i < K / 8 * 4; ++i)
      v[i / 4][i % 4] = __float_as_uint(__ldg(from + (i / 4 * 8 + i % 4) * C * RS));
  }
  __device__ __forceinline__ void store(u32* w_tile, bool mirrored) const {
    if (threadIdx.x < HAVE) {
      const int odd = threadIdx.x / (CT * RS), at = threadIdx.x % (CT * RS);
      const int r = at % RS / S, s = at % S;
      const int tap = (mirrored ? R - 1 - r : r) * S + s;
      u32* const to = w_tile + odd * W_QUAD + tap * W_TAP + at / RS * 4;
#pragma unroll
      for (int j = 0; j < K / 8; ++j)
        *(uint4*)(to + j * 2 * W_QUAD) =
            make_uint4(copied_operand(v[j][0]), copied_operand(v[j][1]),
                       copied_operand(v[j][2]), copied_operand(v[j][3]));
    }
    fence_async();
  }
};

constexpr int TAP_ROW = S * W_TAP * 4 / 16, STEP = 2 * W_QUAD * 4 / 16;

// products(a, j, tap 0 of 8 k) for rows p = first + j of dz2, j = 0 to 2, which lie in
// two rows of windows. low, high: addresses of the windows (0, qq) of a lane's k = t
// and t + 4; next_window: bytes to the next row of windows; ..._place: of even and odd
// p. Windows are loaded most of a step ahead: products read shared memory too, and
// loads wait for those that are queued. An operand is made while the products of two
// operands before it run, which are in other registers. Products read registers long
// after they are queued, of which the compiler knows nothing: it must not choose before
// the wait.
template <class Products>
__device__ __forceinline__ void for_steps(u32 low, u32 high, int next_window,
                                          u32 even_place, u32 odd_place, int first,
                                          u64 taps, const Products& products) {
  u32 windows[2][4];
  const auto load = [&](int row, int step) {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      windows[row][e] =
          load_shared((e / 2 ? high : low) + (first / 2 + row) * next_window +
                      (step * 8 * WINDOWS + e % 2 * DZ_IMAGE) * 4);
  };
  load(0, 0);
  load(1, 0);
#pragma unroll 1
  for (int step = 0; step < STEPS; ++step) {
    const int next = least(step + 1, STEPS - 1);
    u32 a[3][4];
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      wgmma_wait<2>();
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        u32 word = windows[j / 2][e];
        if (j == 1) word = first % 2 ? windows[1][e] : word;
        asm volatile("" : "+r"(word));
        a[j][e] = pick(word, (first + j) % 2 ? odd_place : even_place);
      }
      if (j > 0) load(j - 1, next);
      wgmma_fence();
      products(a[j], j, taps + step * STEP);
      wgmma_commit();
    }
  }
  wgmma_wait<0>();
}

// Three rows of dy1 below each other, or their mirror images. upper: rows 0 to 2, which
// meet p = 0 to 2, else 3 to 5, which meet 0 to 5. low, high: see above; to: of a
// lane's numbers in the first row of the half.
__device__ __forceinline__ void make_rows(u32* to, bool upper, bool mirrored, u32 low,
                                          u32 high, u32 w_tile, u32 even_place,
                                          u32 odd_place) {
  const int next_window = mirrored ? -4 : 4;
  if (mirrored) low += 12, high += 12;
  const u32 even = mirrored ? odd_place : even_place,
            odd = mirrored ? even_place : odd_place;
  const u64 taps = wgmma_operand(w_tile, W_QUAD * 4, W_TAP * 4);
  float acc[3][S * 4] = {};
  // p meets row h by tap h - p
  if (!upper)
    for_steps(low, high, next_window, even, odd, 0, taps,
              [&](u32(&a)[4], int p, u64 tap) {
#pragma unroll
                for (int i = 0; i < 3; ++i)
                  if (i + 3 - p < R)
                    wgmma_of_registers(acc[i], a, tap + (i + 3 - p) * TAP_ROW);
              });
  const int first = upper ? 0 : 3;
  for_steps(low, high, next_window, even, odd, first, taps,
            [&](u32(&a)[4], int j, u64 tap) {
#pragma unroll
              for (int i = j; i < 3; ++i)
                wgmma_of_registers(acc[i], a, tap + (i - j) * TAP_ROW);
            });
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    const int row = first + i;
    wgmma_own(acc[i]);
    store_row(to + (mirrored ? ROWS - 1 - row : row) * Y_SIZE * CT, acc[i]);
  }
}

// dy1 of a group of images.
__device__ __forceinline__ void run(const Tiles& tiles, u32* w_tile, const u32* dz_tile,
                                    int half) {
  const int lane = thread_index() % 32, g = lane / 4, t = lane % 4;
  const int warp = warp_index() % ROLE_WARPS, pair = warp % 4;
  const u32 low = shared_address(dz_tile + window_at(pair * 2, t, 0, g / 2));
  const u32 high = shared_address(dz_tile + window_at(pair * 2, t + 4, 0, g / 2));
  make_rows(tiles.dy + (pair * 2 * ROWS * Y_SIZE + g) * CT + 2 * t, warp >= 4, half,
            low, high, shared_address(w_tile), g % 2 ? 4u : 2u, g % 2 ? 32u : 8u);
}

}  // namespace data_role

// ================================================================ weight role
namespace weight_role {

constexpr int CHANNELS = CT / HALVES;
// y1 in units of 16 bytes, two columns of two images: (h, images, columns, whether the
// first column is odd, c). Lanes that store neighbouring h meet all banks.
constexpr int COLUMNS = 2 * CHANNELS, PAIR = Y_SIZE / 2 * COLUMNS;
constexpr int Y_ROW = IMAGES / 2 * PAIR + 1, Y_WORDS = Y_SIZE * Y_ROW * 4;
constexpr int SUMS = 64 * CHANNELS * RS;  // of four warps: (k, c, tap)
constexpr int SHARED_WORDS = Y_WORDS + 2 * SUMS;

// Asks for y1 of 4 channels and a group of images: into the place of the sums.
__device__ __forceinline__ void copy_input(u32* shared, const float* y1, int c0, int n0,
                                           int N) {
  for_copies<IMAGES, CHANNELS * Y_PLANE / 4>([&](int image, int i) {
    const int n = n0 + image;
    copy4(shared + Y_WORDS + (image * CHANNELS * Y_PLANE + 4 * i),
          y1 + ((size_t)n * C + c0) * Y_PLANE + 4 * i, n < N);
  });
  copy_commit();
}
// Puts it where products read it. A thread has a row of two images.
__device__ __forceinline__ void arrange_input(u32* shared) {
  copy_wait<0>();
  sync_role(WEIGHT_ROLE);
  const int thread = thread_index() % ROLE_THREADS, h = thread % Y_SIZE,
            c = thread / Y_SIZE % CHANNELS, pair = thread / (Y_SIZE * CHANNELS);
  if (pair < IMAGES / 2) {
    u32 word[2][Y_SIZE + 1];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      word[e][Y_SIZE] = 0u;  // of a tap that nobody needs
#pragma unroll
      for (int j = 0; j < Y_SIZE / 4; ++j) {
        const uint4 v = *(const uint4*)(shared + Y_WORDS +
                                        ((2 * pair + e) * CHANNELS + c) * Y_PLANE +
                                        h * Y_SIZE + 4 * j);
        word[e][4 * j] = copied_operand(v.x), word[e][4 * j + 1] = copied_operand(v.y);
        word[e][4 * j + 2] = copied_operand(v.z);
        word[e][4 * j + 3] = copied_operand(v.w);
      }
    }
    uint4* const to = (uint4*)shared + h * Y_ROW + pair * PAIR + c;
#pragma unroll
    for (int w = 0; w < Y_SIZE; ++w)
      to[w / 2 * COLUMNS + w % 2 * CHANNELS] =
          make_uint4(word[0][w], word[0][w + 1], word[1][w], word[1][w + 1]);
  }
  fence_async();
}

// A group of images; y1 is in shared memory. first: it is the block's first one.
__device__ __forceinline__ void run(u32* shared, const u32* dz_tile, int half, int c0,
                                    int split, bool first, float* __restrict__ dweight2,
                                    float* __restrict__ dbias2) {
  const int thread = thread_index() % ROLE_THREADS, lane = thread % 32, g = lane / 4,
            t = lane % 4;
  const int warp = warp_index() % ROLE_WARPS, group = warp / 4;
  float* const sums = (float*)(shared + Y_WORDS);
  float acc[R][12] = {};
#pragma unroll 1
  for (int qq = 2 * group; qq < 2 * group + 2; ++qq) {
    const u64 y =
        wgmma_operand(shared_address(shared), PAIR * 16, COLUMNS * 16) + qq * COLUMNS;
    wgmma_wait<0>();  // the operands are in the same registers for every qq
    uint4 windows[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      // rows beyond K get a place, too
      const int k = least(warp % 4 * 16 + e % 2 * 8, K - 8) + g;
      windows[e] =
          load_shared4(shared_address(dz_tile + window_at(t + e / 2 * 4, k, 0, qq)));
    }
#pragma unroll
    for (int pp = 0; pp < 4; ++pp) {
      u32 word[4], odd[4];  // odd: lanes whose place is in the second column
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const uint4 v = windows[e];
        word[e] = pp == 0 ? v.x : pp == 1 ? v.y : pp == 2 ? v.z : v.w;
        odd[e] = __ballot_sync(~0u, word[e] & 0x24u);
      }
      // lanes with an even t say it of images 0 to 3, the others of 4 to 7; the lower
      // half of the word is for row g, the upper one for g + 8
      u32 columns = ((t % 2 ? odd[2] : odd[0]) >> (4 * g) & 15u) |
                    ((t % 2 ? odd[3] : odd[1]) >> (4 * g) & 15u) << 16;
      columns = (columns | columns << 6) & 0x03030303u;
      columns = (columns | columns << 3) & 0x11111111u;
      columns = columns * 10u + 0x44444444u;
#pragma unroll
      for (int p = 2 * pp; p < 2 * pp + 2; ++p) {
        u32 a[4];
        wgmma_wait<2>();
#pragma unroll
        for (int e = 0; e < 4; ++e) a[e] = pick(word[e], p % 2 ? 0x28u : 6u);
        wgmma_fence();
#pragma unroll
        for (int r = 0; r < R; ++r)
          wgmma_sparse_of_registers(acc[r], a, y + (p + r) * Y_ROW, columns);
        wgmma_commit();
      }
    }
  }
  wgmma_wait<0>();
#pragma unroll
  for (int r = 0; r < R; ++r) {
    wgmma_own(acc[r]);
    // column 8 j + 2 t of a product: s = 2 j + t / 2
    float* const to = sums + group * SUMS + (warp % 4 * 16 + g) * CHANNELS * RS +
                      t % 2 * 2 * RS + r * S + t / 2;
#pragma unroll
    for (int i = 0; i < 12; ++i)
      if (i / 4 < 2 || t / 2 == 0)
        to[i % 4 / 2 * 8 * CHANNELS * RS + i % 2 * RS + i / 4 * 2] = acc[r][i];
  }

  if (c0 == 0 && half == 0)
    bias_gradients<K>(dz_tile, 0, first, dbias2 + (size_t)split * K);
  sync_role(WEIGHT_ROLE);
  constexpr int QUADS = CHANNELS * RS / 4;  // of a row of k
  float* const to = dweight2 + ((size_t)split * K * C + c0 + half * CHANNELS) * RS;
#pragma unroll 4
  for (int i = thread; i < K * QUADS; i += ROLE_THREADS) {
    const float4 a = *(const float4*)(sums + 4 * i);
    const float4 b = *(const float4*)(sums + SUMS + 4 * i);
    float4 sum = make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
    float4* const at = (float4*)(to + i / QUADS * C * RS + i % QUADS * 4);
    if (!first) {
      const float4 had = *at;
      sum.x += had.x, sum.y += had.y, sum.z += had.z, sum.w += had.w;
    }
    *at = sum;
  }
}

}  // namespace weight_role

static_assert((DZ_WORDS + data_role::W_WORDS + data_role::TILE_WORDS +
               weight_role::SHARED_WORDS) *
                      4 ==
                  SHARED,
              "the host counts the same bytes");

extern "C" __global__ void __launch_bounds__(2 * THREADS, 1)
    conv_pair_backward_wgmma(const float* dy2, const u8* code2,
                             const float* __restrict__ y1, const u8* __restrict__ code1,
                             const float* __restrict__ x,
                             const float* __restrict__ weight2,
                             float* __restrict__ dweight2, float* __restrict__ dbias2,
                             float* __restrict__ dweight1, float* __restrict__ dbias1,
                             int N, int splits) {
  extern __shared__ uint4 shared[];
  const int half = blockIdx.x % HALVES, c0 = blockIdx.x / HALVES % C_TILES * CT,
            split = blockIdx.x / (HALVES * C_TILES);
  u32* const dz_tile = (u32*)shared;
  u32* const w_tile = dz_tile + DZ_WORDS;
  const data_role::Tiles tiles(w_tile + data_role::W_WORDS);
  u32* const of_weights = w_tile + data_role::W_WORDS + data_role::TILE_WORDS;
  const bool data = warp_index() < ROLE_WARPS;

  // weights are older than the kernel before this one, and are on their way first
  data_role::Weights weights;
  weights.load(weight2, c0);
  for (int i = threadIdx.x; i < data_role::ONES; i += 2 * THREADS)
    tiles.ones[i] = __float_as_uint(1.0f);
  const auto copy_inputs = [&](int n0) {
    if (data) data_role::copy_first(tiles, half, c0, n0, code1, x, N);
    else
      weight_role::copy_input(of_weights, y1, c0 + half * weight_role::CHANNELS, n0, N);
  };
  WindowRows rows;
  const int begin = split * IMAGES;
  if (SETTLED) {
    rows.load_codes(code2, begin, N);
    copy_inputs(begin);
  }
  wait_for_earlier_kernels();
  let_next_kernel_start();
  rows.load_values(dy2, begin, N);
  if (!SETTLED) rows.load_codes(code2, begin, N);
  weights.store(w_tile, half);
  if (!SETTLED) copy_inputs(begin);
  rows.store(dz_tile);
#pragma unroll 1
  for (int group = split; group * IMAGES < N; group += splits) {
    const int n0 = group * IMAGES;
    const bool first = group == split;
    if (!first) {
      __syncthreads();
      load_windows(dz_tile, dy2, code2, n0, N, [&] { copy_inputs(n0); });
    }
    __syncthreads();
    if (data) {
      data_role::run(tiles, w_tile, dz_tile, half);
      data_role::first_gradients(tiles, half, c0, split * HALVES + half, first,
                                 dweight1, dbias1);
    } else {
      weight_role::arrange_input(of_weights);
      sync_role(WEIGHT_ROLE);
      weight_role::run(of_weights, dz_tile, half, c0, split, first, dweight2, dbias2);
    }
  }
}
