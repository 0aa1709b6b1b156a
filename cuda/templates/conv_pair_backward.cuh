// Backward of the first two convolution blocks of a network in one kernel:
//   y1 = maxpool(relu(conv(x, weight1) + bias1))    x (N, 1, 28, 28), y1 (N, C, 12, 12)
//   y2 = maxpool(relu(conv(y1, weight2) + bias2))   y2 (N, K, 4, 4)
// with filters of 5 x 5 and windows of 2 x 2. It makes the gradients of both weights
// and biases. The gradient by y1 stays on chip, and x has none.
//
// A block has 8 images and 8 channels c of y1, and there are two of them for these. It
// has two roles, for the gradients of the first and of the second layer, which share
// the packed gradient and meet nowhere else. There are two kernels, which share this
// file:
//   conv_pair_backward.cu        fp32: all 16 warps have first the one role, then the
//                                other, since a thread needs many registers
//   conv_pair_backward_wgmma.cu  tf32: 8 warps each; while one role waits for memory
//                                the other multiplies
//
// The packed gradient. Of the 4 places of a window one at most has a gradient, so dz2,
// the gradient at the second convolution's output, is a word a window: its value,
// rounded to tf32, and in the 13 bits that tensor cores ignore
//   bits 1, 2, 3, 5   one is set: place (0,0) (0,1) (1,0) (1,1); none where no gradient
//                     passes, and the value is 0
//   bits 0, 4, 8, 12  in fp32: the column of the place in each of the 4 windows of the
//                     row
// An operand is `word & place ? word : 0`, two instructions. In fp32 a second word has
// the rest of the value (fused.cuh).
//
// A block has every splits-th group of 8 images, and adds to the partial gradients that
// it wrote. dweight2 (splits, K, C, 5, 5), dbias2 (splits, K), dweight1 (2 splits, C,
// 1, 5, 5), dbias1 (2 splits, C), of half of the rows each. update.cu adds the partials
// in order.
//
// weight2 was complete before the kernel ahead of this one started, and is fetched
// while that one still runs. SETTLED: so was all but dy2.
//
// Launch: 2 splits C / 8 blocks of 512 threads, SHARED bytes
// (fused_cuda_pair_backward.py). C a multiple of 8, K one up to 64. Compute capability
// 9.0.
#pragma once
#include "backward.cuh"

constexpr int R = 5, S = 5, RS = R * S;
constexpr int X_SIZE = 28, X_PLANE = X_SIZE * X_SIZE;
constexpr int Y_SIZE = 12, Y_PLANE = Y_SIZE * Y_SIZE;
constexpr int Z_SIZE = 8, WINDOWS = Z_SIZE * Z_SIZE / 4;
constexpr int PARTS = MODE == MODE_FP32 ? 2 : 1;
// What a block has: images, channels of y1, and one half of the rows of dy1 and of
// dweight2 (fp32: of the k, tf32: of the channels).
constexpr int IMAGES = 8, CT = 8, C_TILES = C / CT, HALVES = 2;
static_assert(MODE != MODE_BF16 && C % CT == 0 && K % 8 == 0, "see the launch");
// In tf32 the rows of 8 images start at different banks.
constexpr int DZ_IMAGE = K * WINDOWS + (PARTS == 1 ? 4 : 0);
constexpr int DZ_PART = IMAGES * DZ_IMAGE, DZ_WORDS = PARTS * DZ_PART;

// whether the roles run side by side
constexpr bool TOGETHER = MODE != MODE_FP32;
constexpr int ROLE_WARPS = TOGETHER ? 8 : 16, ROLE_THREADS = 32 * ROLE_WARPS;
enum { DATA_ROLE = 1, WEIGHT_ROLE = 2 };
__device__ __forceinline__ void sync_role(int role) {
  sync_threads(role, ROLE_THREADS);
}

// threadIdx.x, of which the compiler knows nothing: else it computes the addresses of
// all copies before the loop over groups, and has no registers left in it.
__device__ __forceinline__ int thread_index() {
  int thread = threadIdx.x;
  asm volatile("" : "+r"(thread));
  return thread;
}

__device__ __forceinline__ float value(u32 word) {
  return __uint_as_float(word & 0xffffe000u);
}
__device__ __forceinline__ u32 pick(u32 word, u32 place) {
  return word & place ? word : 0u;
}

// ---- copies of a role

// 4 words of an image into shared memory, in the background; 0 beyond the batch, since
// what is there is multiplied by a gradient of 0.
__device__ __forceinline__ void copy4(u32* to, const void* from, bool inside) {
  if (inside) copy_async16(shared_address(to), from);
  else *(uint4*)to = make_uint4(0, 0, 0, 0);
}

// body(part, i) for i below COUNT of each of PARTS, by all threads of a role. A thread
// has numbers of one part, so that it has one address.
template <int PARTS, int COUNT, class Body>
__device__ __forceinline__ void for_copies(const Body& body) {
  constexpr int LANES = ROLE_THREADS / PARTS;
  const u32 thread = thread_index() % ROLE_THREADS;
  const int part = thread / LANES, lane = thread % LANES;
#pragma unroll
  for (int j = 0; j < ceil_div(COUNT, LANES); ++j)
    if (COUNT % LANES == 0 || lane < COUNT - j * LANES) body(part, j * LANES + lane);
}

// ---- the packed gradient

// Where the word of window (pp, qq) of k of an image is. tf32 reads four pp at a time,
// fp32 one word; neighbouring k are swizzled so that lanes, 4 of them along k or along
// qq, meet all banks.
__device__ __forceinline__ int window_at(int image, int k, int pp, int qq) {
  const int swizzle = k / 2 % 4;
  return image * DZ_IMAGE + k * WINDOWS +
         (PARTS == 2 ? (pp ^ swizzle) * 4 + qq : (qq ^ swizzle) * 4 + pp);
}

// What becomes the words of 8 images, from n0 on, on its way through registers. A
// thread has rows of windows, its neighbours what is beside them in memory.
struct WindowRows {
  static constexpr u32 IMAGE_ROWS = K * 4, ROWS = IMAGES * IMAGE_ROWS;
  static constexpr int MINE = ceil_div(ROWS, 2 * THREADS);
  float4 values[MINE];
  u32 codes[MINE];

  __device__ __forceinline__ void load_codes(const u8* code, int n0, int N) {
    const u32 thread = thread_index(), present = least(IMAGES, N - n0) * IMAGE_ROWS;
    const u32* const from = (const u32*)code + (size_t)n0 * IMAGE_ROWS + thread;
#pragma unroll
    for (int i = 0; i < MINE; ++i)
      codes[i] =
          i * 2 * THREADS + thread < present ? load_fresh(from + i * 2 * THREADS) : 0u;
  }
  __device__ __forceinline__ void load_values(const float* dy, int n0, int N) {
    const u32 thread = thread_index(), present = least(IMAGES, N - n0) * IMAGE_ROWS;
    const float4* const from = (const float4*)dy + (size_t)n0 * IMAGE_ROWS + thread;
#pragma unroll
    for (int i = 0; i < MINE; ++i) {
      values[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (i * 2 * THREADS + thread < present)
        values[i] = load_fresh(from + i * 2 * THREADS);
    }
  }
  __device__ __forceinline__ void store(u32* tile) const {
    const u32 thread = thread_index();
#pragma unroll
    for (int i = 0; i < MINE; ++i) {
      const u32 row = i * 2 * THREADS + thread;
      if (ROWS % (2 * THREADS) && row >= ROWS) break;
      const int image = row / IMAGE_ROWS, k = row / 4 % K, pp = thread % 4;
      // a nibble a window: the code, and whether the column is 1
      u32 nibbles = (codes[i] | codes[i] >> 4) & 0x00ff00ffu;
      nibbles |= nibbles >> 8;
      u32 columns = ~codes[i] & 0x01010101u;
      columns = (columns | columns >> 4) & 0x00110011u;
      columns = (columns | columns >> 8) & 0x1111u;
      // places of codes 0 to 4 from a table
      const u32 places = __byte_perm(0x08040200u, 0x20u, nibbles);
      const float v[4] = {values[i].x, values[i].y, values[i].z, values[i].w};
      u32 words[PARTS][4];
#pragma unroll
      for (int qq = 0; qq < 4; ++qq) {
        const u32 place = places >> (8 * qq) & 255u;
        const u32 big = add_half(__float_as_uint(v[qq])) & 0xffffe000u;
        words[0][qq] = (place ? big : 0u) | place | (PARTS == 2 ? columns : 0u);
        if (PARTS == 2) {
          const u32 small = __float_as_uint(v[qq] - __uint_as_float(big));
          words[PARTS - 1][qq] = place ? (add_half(small) & 0xffffe000u) | place : 0u;
        } else {
          tile[window_at(image, k, pp, qq)] = words[0][qq];
        }
      }
      if (PARTS == 2) {
#pragma unroll
        for (int part = 0; part < PARTS; ++part)
          *(uint4*)(tile + part * DZ_PART + window_at(image, k, pp, 0)) = make_uint4(
              words[part][0], words[part][1], words[part][2], words[part][3]);
      }
    }
  }
};

// The words of 8 images, by all threads of the block. meanwhile(): what else is to be
// done while the loads are on their way.
template <class Meanwhile>
__device__ __forceinline__ void load_windows(u32* tile, const float* dy, const u8* code,
                                             int n0, int N,
                                             const Meanwhile& meanwhile) {
  WindowRows rows;
  rows.load_values(dy, n0, N);
  rows.load_codes(code, n0, N);
  meanwhile();
  rows.store(tile);
}

// ---- data role: what both kernels do
namespace data_role {

constexpr int ROWS = Y_SIZE / HALVES;  // of dy1
// The rows of x that rows of dy1 meet; beyond them taps that nobody needs.
constexpr int X_WANTED = (2 * ROWS + R - 1) * X_SIZE, X_IMAGE = X_WANTED + 64;
constexpr int ONES = 544;  // as long as the rows that a product reads
constexpr int X_WORDS = IMAGES * X_IMAGE;
constexpr int DY_WORDS = IMAGES * ROWS * Y_SIZE * CT;
constexpr int CODE_WORDS = IMAGES * CT * Y_PLANE / 4;
constexpr int TILE_WORDS = DY_WORDS + CODE_WORDS + X_WORDS + ONES;
static_assert(ROLE_WARPS * 3 * 128 <= DY_WORDS + CODE_WORDS + X_WORDS,
              "room for what each warp has of dweight1");
constexpr int STEPS = K / 8;  // of the contraction that makes dy1

// Where the role has what in shared memory, but for weights.
struct Tiles {
  u32 *dy, *x, *ones;
  u8* code;
  float* of_warp;  // in the end, over all but ones

  __device__ __forceinline__ explicit Tiles(u32* shared) {
    dy = shared;
    code = (u8*)(dy + DY_WORDS);
    x = dy + DY_WORDS + CODE_WORDS;
    ones = x + X_WORDS;
    of_warp = (float*)dy;
  }
};

// Asks for what dweight1 is made of, for a group of images from n0 on.
__device__ __forceinline__ void copy_first(const Tiles& tiles, int half, int c0, int n0,
                                           const u8* __restrict__ code1,
                                           const float* __restrict__ x, int N) {
  for_copies<IMAGES, X_WANTED / 4>([&](int image, int i) {
    copy4(tiles.x + image * X_IMAGE + i * 4,
          x + (size_t)(n0 + image) * X_PLANE + 2 * half * ROWS * X_SIZE + i * 4,
          n0 + image < N);
  });
  for_copies<IMAGES, CT * Y_PLANE / 16>([&](int image, int i) {
    copy4((u32*)tiles.code + image * CT * Y_PLANE / 4 + i * 4,
          code1 + ((size_t)(n0 + image) * C + c0) * Y_PLANE + i * 16, n0 + image < N);
  });
  copy_commit();
}

// A row of dy1 of 2 images, from its sums; to: of the first image, column g, channel 2
// t. Column w < 8 has the sums of q = w - s >= 0; what is moved out of lane 7 comes in
// again at the other end, as columns 8 to 11.
__device__ __forceinline__ void store_row(u32* to, const float (&sums)[S * 4]) {
  const int lane = threadIdx.x % 32, g = lane / 4;
#pragma unroll
  for (int image = 0; image < 2; ++image, to += ROWS * Y_SIZE * CT) {
    float low[2], high[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      low[e] = sums[image * 2 + e];
      high[e] = 0.0f;
#pragma unroll
      for (int s = 1; s < S; ++s) {
        const float v =
            __shfl_sync(~0u, sums[s * 4 + image * 2 + e], (lane - 4 * s) & 31);
        if (g >= s) low[e] += v;
        else high[e] += v;
      }
    }
    const auto word = [](float v) {
      return MODE == MODE_TF32 ? add_half(__float_as_uint(v)) : __float_as_uint(v);
    };
    *(uint2*)to = make_uint2(word(low[0]), word(low[1]));
    if (g < S - 1) *(uint2*)(to + 8 * CT) = make_uint2(word(high[0]), word(high[1]));
  }
}

// The gradients of the first layer, from dy1 in shared memory and what `copy_first`
// asked for; called by the warps of the role.
//    dweight1[c,r,s] = sum over n, p, q of dz1[n,c,p,q] x[n,p+r,q+s]
// with dz1 made from dy1 and code1 on the way to the product of (2 r, 8 s) x (8 c),
// contraction over 8 pixels of a row: the even columns of 4 windows, then the odd ones.
// Of the 8 s only 5 are needed; in place of the last one x is 1, which gives dbias1.
// partial: where it goes. first: it is the block's first group.
__device__ __forceinline__ void first_gradients(const Tiles& tiles, int half, int c0,
                                                int partial, bool first,
                                                float* __restrict__ dweight1,
                                                float* __restrict__ dbias1) {
  const int thread = thread_index() % ROLE_THREADS, lane = thread % 32, g = lane / 4,
            t = lane % 4, warp = warp_index() % ROLE_WARPS, first_row = half * ROWS;
  copy_wait<0>();
  sync_role(DATA_ROLE);

  // A unit of work: an image, 4 windows wide, HIGH windows high.
  constexpr int HIGH = ROWS * WARPS / ROLE_WARPS, PARTS_HIGH = ROWS / HIGH;
  float sums[2][3][4] = {};
#pragma unroll 1
  for (int unit = warp; unit < IMAGES * 3 * PARTS_HIGH; unit += ROLE_WARPS) {
    const int image = unit / (3 * PARTS_HIGH), quad = unit / PARTS_HIGH % 3,
              part = unit % PARTS_HIGH;
    const int window = part * HIGH * Y_SIZE + quad * 4 + t;
    const int corner = image * X_IMAGE + part * 2 * HIGH * X_SIZE + quad * 8;
    u32 dy[HIGH], place[HIGH];
#pragma unroll
    for (int i = 0; i < HIGH; ++i) {
      dy[i] = tiles.dy[(image * ROWS * Y_SIZE + window + i * Y_SIZE) * CT + g];
      place[i] =
          tiles.code[(image * CT + g) * Y_PLANE + (first_row + i) * Y_SIZE + window];
    }
    // the ones lie in banks that the other lanes do not read
    const u32* const from =
        g == 7 ? tiles.ones + corner % 32 + 16 + 2 * t : tiles.x + corner + 2 * t + g;
    // taps r and r + 1 at row p + r of x
    constexpr int LAST = 2 * HIGH + 4, AHEAD = 2;
    Rows taps[LAST];
    u32 words[LAST + 1][2];
    const auto load_row = [&](int row) {
      words[row][0] = copied_operand(from[row * X_SIZE]);
      words[row][1] = copied_operand(from[row * X_SIZE + 1]);
    };
    const auto load_taps = [&](int row) {
      load_row(row + 1);
      taps[row].set(words[row][0], words[row + 1][0], words[row][1], words[row + 1][1]);
    };
    load_row(0);
#pragma unroll
    for (int row = 0; row < 4 + AHEAD; ++row) load_taps(row);
#pragma unroll
    for (int p = 0; p < 2 * HIGH; ++p) {
      if (p + 4 + AHEAD < LAST) load_taps(p + 4 + AHEAD);
      const u32 b0 = place[p / 2] == 1u + p % 2 * 2 ? dy[p / 2] : 0u;
      const u32 b1 = place[p / 2] == 2u + p % 2 * 2 ? dy[p / 2] : 0u;
#pragma unroll
      for (int m = 0; m < 3; ++m) multiply(sums[p % 2][m], taps[p + 2 * m], b0, b1);
    }
  }
  sync_role(DATA_ROLE);
#pragma unroll
  for (int m = 0; m < 3; ++m)
    *(float4*)&tiles.of_warp[(warp * 3 + m) * 128 + lane * 4] =
        make_float4(sums[0][m][0] + sums[1][m][0], sums[0][m][1] + sums[1][m][1],
                    sums[0][m][2] + sums[1][m][2], sums[0][m][3] + sums[1][m][3]);
  sync_role(DATA_ROLE);
  if (thread < CT * RS + CT) {
    const bool bias = thread >= CT * RS;
    const int c = bias ? thread - CT * RS : thread / RS;
    const int r = bias ? 0 : thread % RS / S, s = bias ? 7 : thread % S;
    const float* const from =
        tiles.of_warp + r / 2 * 128 + (s * 4 + c / 2) * 4 + r % 2 * 2 + c % 2;
    float sum = from[0];
#pragma unroll
    for (int i = 1; i < ROLE_WARPS; ++i) sum += from[i * 384];
    float* const to = bias ? dbias1 + (size_t)partial * C + c0 + c
                           : dweight1 + ((size_t)partial * C + c0) * RS + thread;
    *to = first ? sum : *to + sum;
  }
}

}  // namespace data_role

// ---- weight role: what both kernels do
namespace weight_role {

// The gradients of the biases of COUNT channels from k0 on, a warp each. to: of k0.
template <int COUNT>
__device__ __forceinline__ void bias_gradients(const u32* dz_tile, int k0, bool first,
                                               float* __restrict__ to) {
  const int lane = thread_index() % 32, row = lane % 4;
#pragma unroll 1
  for (int k = warp_index() % ROLE_WARPS; k < least(COUNT, K - k0); k += ROLE_WARPS) {
    float sum = 0.0f;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      const uint4 v = *(const uint4*)(dz_tile + part * DZ_PART +
                                      window_at(lane / 4, k0 + k, PARTS == 2 ? row : 0,
                                                PARTS == 2 ? 0 : row));
      sum += (value(v.x) + value(v.y)) + (value(v.z) + value(v.w));
    }
#pragma unroll
    for (int other = 16; other; other /= 2) sum += __shfl_xor_sync(~0u, sum, other);
    if (lane == 0) to[k] = first ? sum : to[k] + sum;
  }
}

}  // namespace weight_role
