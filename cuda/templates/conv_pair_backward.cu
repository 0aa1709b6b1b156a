// Backward of the first two convolution blocks of a network in one kernel:
//   y1 = maxpool(relu(conv(x, weight1) + bias1))     x (N, 1, 28, 28)  y1 (N, C, 12, 12)
//   y2 = maxpool(relu(conv(y1, weight2) + bias2))    y2 (N, K, 4, 4)
// with filters of 5 x 5 and windows of 2 x 2. It makes the gradients of both weights
// and biases. The gradient by y1 stays on chip, and x has none.
//
// A block has two roles of 8 warps each, which meet only at the launch. While one waits
// for memory the other multiplies, and every scheduler has two warps of each.
//
// The packed gradient. Of the 4 places of a window one at most has a gradient, so dz2,
// the gradient at the second convolution's output, is a word a window: its value,
// rounded to tf32, and in the 13 bits that tensor cores ignore
//   bits 1, 2, 3, 5   one is set: place (0,0) (0,1) (1,0) (1,1), none where no gradient
//                     passes (the value is then 0)
//   bits 0, 4, 8, 12  the column of the place in each of the 4 windows of the row
// An operand is `word & place ? word : 0`: two instructions. In fp32 a second word has
// the rest of the value (fused.cuh).
//
// 1. Data role: 4 images and 8 channels c of y1.
//    dy1[n,c,p+r,q+s] += dz2[n,k,p,q] weight2[k,c,r,s]
//    As a product: (8 q of 2 images) x (8 c), contraction over k, for each p, r, s. The
//    sum over r is made by adding to the accumulators of row p + r, so the border costs
//    nothing; each s has accumulators of its own. At the end w = q + s: sums move by s
//    lanes. A warp has 2 images and 3 of the 12 rows, chosen so that each of the 4 sets
//    meets 10 pairs (p, r): {0,3,4} {1,2,5} {6,9,10} {7,8,11}.
//    Then, from shared memory,
//    dweight1[c,r,s] = sum over n, p, q of dz1[n,c,p,q] x[n,p+r,q+s]
//    with dz1 made from dy1 and code1 on the way to the product of (2 r, 8 s) x (8 c),
//    contraction over 8 pixels of a row: 4 windows' even columns, then the odd ones.
//    Of the 8 s only 5 are needed; in place of the last one x is 1, which gives dbias1.
// 2. Weight role: 32 k, 8 c and all taps, 8 images.
//    dweight2[k,c,r,s] = sum over n, p, q of dz2[n,k,p,q] y1[n,c,p+r,q+s]
//    As a product: (16 k) x (8 c) for each r, s, contraction over the two rows of 4
//    windows, 16 pixels. Of two pixels side by side in a window one at least is 0: the
//    form of sparse products, which take half the time. Their operand A has a number for
//    each pair, and 4 bits say which of the two it is: 0x4 or 0xe.
//    The 40 pairs of r and image, r outermost, go to the warps in runs of 5. A warp that
//    comes to its next r puts the sums so far into shared memory.
//
// Every block writes partial gradients, (splits, ...), which update.cu adds in order.
// A block whose split has several groups of images adds to its own partial.
//
// Launch: 512 threads, SHARED bytes (fused_cuda_backward.py). MODE 0 (fp32) or 1 (tf32),
// C and K multiples of 8. Compute capability 8.0 and up.
#include "backward.cuh"

constexpr int R = 5, S = 5, RS = R * S;
constexpr int X_SIZE = 28, X_PLANE = X_SIZE * X_SIZE;
constexpr int Y_SIZE = 12, Y_PLANE = Y_SIZE * Y_SIZE;
constexpr int Z_SIZE = 8, WINDOWS = Z_SIZE * Z_SIZE / 4;
constexpr int PARTS = MODE == MODE_FP32 ? 2 : 1;
// channels of y1 that a block has in both roles
constexpr int CT = 8, C_TILES = C / CT;
static_assert(MODE != MODE_BF16 && C % CT == 0 && K % 8 == 0, "see the launch");

enum { DATA_ROLE = 1, WEIGHT_ROLE = 2 };
__device__ __forceinline__ void sync_role(int role) { sync_threads(role, THREADS); }

__device__ __forceinline__ u32 pick(u32 word, u32 place) {
  return word & place ? word : 0u;
}

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
  if (MODE != MODE_FP32) {
    multiply_sparse(acc, a.word, b[0], b[1], b[2], b[3], columns);
    return;
  }
  const Split b0(b[0]), b1(b[1]), b2(b[2]), b3(b[3]);
  float sum[4] = {};
  multiply_sparse(sum, a.small, b0.big, b1.big, b2.big, b3.big, columns);
  multiply_sparse(sum, a.word, b0.small, b1.small, b2.small, b3.small, columns);
  multiply_sparse(sum, a.word, b0.big, b1.big, b2.big, b3.big, columns);
#pragma unroll
  for (int i = 0; i < 4; ++i) acc[i] += sum[i];
}

// A load that is not merged with an equal one: operands of a product are neighbouring
// registers, so a word that is in two of them would have to be moved.
__device__ __forceinline__ u32 load_again(const u32* p) {
  u32 v;
  asm volatile("ld.volatile.shared.b32 %0, [%1];" : "=r"(v) : "r"(shared_address(p)));
  return v;
}

// ---- copies of a role

// body(i) for i below COUNT, each by the same thread whenever it is asked for.
template <int COUNT, class Body>
__device__ __forceinline__ void for_copies(const Body& body) {
#pragma unroll
  for (int j = 0; j < ceil_div(COUNT, THREADS); ++j) {
    const int i = j * THREADS + threadIdx.x % THREADS;
    if (COUNT % THREADS == 0 || i < COUNT) body(i);
  }
}
// 4 numbers of an image n into shared memory, in the background; 0 beyond the batch,
// since what is there is multiplied by a gradient of 0.
__device__ __forceinline__ void copy4(u32* to, const void* from, bool inside) {
  if (inside) copy_async16(shared_address(to), from);
  else *(uint4*)to = make_uint4(0, 0, 0, 0);
}
// What this thread copied becomes an operand.
__device__ __forceinline__ void round4(u32* at) {
  if (MODE == MODE_FP32) return;
  const uint4 v = *(const uint4*)at;
  *(uint4*)at = make_uint4(copied_operand(v.x), copied_operand(v.y),
                           copied_operand(v.z), copied_operand(v.w));
}

// ---- the packed gradient

// Word of window (pp, qq) of a (image, k). tf32 reads four pp at a time, fp32 one word;
// neighbouring k are swizzled so that a warp's lanes, 4 of them along k or along qq, meet
// all banks.
__device__ __forceinline__ int window_at(int plane, int pp, int qq) {
  const int swizzle = plane / 2 % 4;
  return plane * WINDOWS +
         (PARTS == 2 ? (pp ^ swizzle) * 4 + qq : (qq ^ swizzle) * 4 + pp);
}

template <int IMAGES, int CHANNELS>
__device__ __forceinline__ void load_windows(u32* tile, const float* __restrict__ dy,
                                             const u8* __restrict__ code, int n0,
                                             int k0, int N) {
  for (int plane = threadIdx.x % THREADS; plane < IMAGES * CHANNELS; plane += THREADS) {
    const int n = n0 + plane / CHANNELS, k = k0 + plane % CHANNELS;
    float4 values[4] = {};
    uint4 all_codes = make_uint4(0, 0, 0, 0);
    if (n < N && (K % CHANNELS == 0 || k < K)) {
      const size_t at = (size_t)n * K + k;
#pragma unroll
      for (int pp = 0; pp < 4; ++pp) values[pp] = __ldg((const float4*)dy + at * 4 + pp);
      all_codes = __ldg((const uint4*)code + at);
    }
    const u32 codes[4] = {all_codes.x, all_codes.y, all_codes.z, all_codes.w};
    u32 words[PARTS][4][4];
#pragma unroll
    for (int pp = 0; pp < 4; ++pp) {
      // a nibble a window: the code, and whether the column is 1
      u32 nibbles = (codes[pp] | codes[pp] >> 4) & 0x00ff00ffu;
      nibbles |= nibbles >> 8;
      u32 columns = ~codes[pp] & 0x01010101u;
      columns = (columns | columns >> 4) & 0x00110011u;
      columns = (columns | columns >> 8) & 0x1111u;
      // places of codes 0 to 4 from a table
      const u32 places = __byte_perm(0x08040200u, 0x20u, nibbles);
      const float v[4] = {values[pp].x, values[pp].y, values[pp].z, values[pp].w};
#pragma unroll
      for (int qq = 0; qq < 4; ++qq) {
        const u32 place = places >> (8 * qq) & 255u;
        const Split split(__float_as_uint(v[qq]));
        words[0][pp][qq] = (place ? split.big : 0u) | place | columns;
        if (PARTS == 2)
          words[PARTS - 1][pp][qq] =
              place ? ((split.small + 0x1000u) & 0xffffe000u) | place : 0u;
      }
    }
#pragma unroll
    for (int i = 0; i < PARTS * 4; ++i) {
      const u32(&w)[4][4] = words[i / 4];
      const int j = i % 4;
      *(uint4*)(tile + i / 4 * IMAGES * CHANNELS * WINDOWS +
                (PARTS == 2 ? window_at(plane, j, 0) : window_at(plane, 0, j))) =
          PARTS == 2 ? make_uint4(w[j][0], w[j][1], w[j][2], w[j][3])
                     : make_uint4(w[0][j], w[1][j], w[2][j], w[3][j]);
    }
  }
}

// The words of a lane's windows pp = 0 .. 3 of one plane: in registers where there are
// enough of them. `at` is the word of pp = 0.
template <int PART_WORDS>
struct Windows {
  const u32* at;
  int swizzle;
  uint4 held;

  __device__ __forceinline__ Windows(const u32* at, int plane)
      : at(at), swizzle(plane / 2 % 4) {
    if (PARTS == 1) held = *(const uint4*)at;
  }
  __device__ __forceinline__ u32 word(int part, int pp) const {
    if (PARTS == 2) return at[part * PART_WORDS + ((pp ^ swizzle) - swizzle) * 4];
    return pp == 0 ? held.x : pp == 1 ? held.y : pp == 2 ? held.z : held.w;
  }
};

// ================================================================ data role
namespace data_role {

constexpr int IMAGES = 4;
constexpr int W_ROW = CT * RS;  // 8 mod 32, and 25 g are all residues mod 8: no conflicts
constexpr int X_IMAGE = X_PLANE + 64;  // beyond the image: taps that nobody needs
constexpr int ONES = 544;              // as long as the rows that a product reads
constexpr int W_WORDS = K * W_ROW, DZ_PART = IMAGES * K * WINDOWS;
constexpr int DZ_WORDS = PARTS * DZ_PART, X_WORDS = IMAGES * X_IMAGE;
constexpr int DY_WORDS = IMAGES * Y_PLANE * CT;
constexpr int CODE_WORDS = IMAGES * CT * Y_PLANE / 4;
constexpr int SHARED_WORDS =
    W_WORDS + DZ_WORDS + X_WORDS + ONES + DY_WORDS + CODE_WORDS;
constexpr int STEPS = K / 8, FIRST_STEPS = ceil_div(STEPS, 2);
constexpr int FIRST_COPIES = FIRST_STEPS * 8 * W_ROW / 4, W_COPIES = W_WORDS / 4;

// A warp's three rows of dy1, steps begin .. end-1 of 8 k. low, high: words of windows
// (0, qq) of a lane's k = t and t + 4; w: its weights.
template <int H0, int H1, int H2>
__device__ __forceinline__ void multiply_rows(float (&acc)[3][S][4], const u32* low,
                                              const u32* high, const u32* w,
                                              u32 even_place, u32 odd_place, int begin,
                                              int end) {
  constexpr int rows[3] = {H0, H1, H2};
  const int t = threadIdx.x % 4;
#pragma unroll 1
  for (int step = begin; step < end; ++step) {
    const int at = step * 8 * WINDOWS, next = at + K * WINDOWS;
    const Windows<DZ_PART> windows[4] = {
        {low + at, t}, {low + next, t}, {high + at, t + 4}, {high + next, t + 4}};
    const u32* const from_w = w + step * 8 * W_ROW;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      Rows a[3];
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        const int p = rows[i] - r;
        if (p < 0 || p >= Z_SIZE) continue;
        const u32 place = p % 2 ? odd_place : even_place;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          a[i].word[e] = pick(windows[e].word(0, p / 2), place);
          if (PARTS == 2)
            a[i].small[e] = pick(windows[e].word(PARTS - 1, p / 2), place);
        }
      }
#pragma unroll
      for (int s = 0; s < S; ++s) {
        const u32 b0 = from_w[r * S + s], b1 = from_w[4 * W_ROW + r * S + s];
#pragma unroll
        for (int i = 0; i < 3; ++i) {
          const int p = rows[i] - r;
          if (p >= 0 && p < Z_SIZE) multiply(acc[i][s], a[i], b0, b1);
        }
      }
    }
  }
}

__device__ __forceinline__ void run(int block, int splits, u32* shared,
                                    const float* __restrict__ dy2,
                                    const u8* __restrict__ code2,
                                    const u8* __restrict__ code1,
                                    const float* __restrict__ x,
                                    const float* __restrict__ weight2,
                                    float* __restrict__ dweight1,
                                    float* __restrict__ dbias1, int N) {
  const int thread = threadIdx.x % THREADS, lane = thread % 32, g = lane / 4,
            t = lane % 4;
  const int warp = warp_index() % WARPS, pair = warp % 2, row_set = warp / 2;
  const int c0 = block % C_TILES * CT, split = block / C_TILES;
  u32* const w_tile = shared;
  u32* const dz_tile = w_tile + W_WORDS;
  u32* const x_tile = dz_tile + DZ_WORDS;
  u32* const ones = x_tile + X_WORDS;
  u32* const dy_tile = ones + ONES;
  u8* const code_tile = (u8*)(dy_tile + DY_WORDS);

#pragma unroll 1
  for (int group = split; group * IMAGES < N; group += splits) {
    const int n0 = group * IMAGES;
    const bool first = group == split;
    if (!first) sync_role(DATA_ROLE);
    // weights and x are older than the kernel before this one
    const auto copy_weights = [&](int i) {
      copy_async16(shared_address(w_tile + i * 4),
                   weight2 + ((size_t)(i / (W_ROW / 4)) * C + c0) * RS +
                       i % (W_ROW / 4) * 4);
    };
    if (first) {
      for_copies<FIRST_COPIES>(copy_weights);
      copy_commit();
      for_copies<W_COPIES - FIRST_COPIES>(
          [&](int i) { copy_weights(FIRST_COPIES + i); });
      copy_commit();
      for (int i = thread; i < ONES; i += THREADS) ones[i] = __float_as_uint(1.0f);
    }
    for_copies<IMAGES * X_PLANE / 4>([&](int i) {
      const int image = i / (X_PLANE / 4), at = i % (X_PLANE / 4) * 4;
      copy4(x_tile + image * X_IMAGE + at, x + (size_t)n0 * X_PLANE + i * 4,
            n0 + image < N);
    });
    if (first) {
      wait_for_earlier_kernels();
      let_next_kernel_start();
    }
    for_copies<IMAGES * CT * Y_PLANE / 16>([&](int i) {
      const int n = n0 + i / (CT * Y_PLANE / 16), at = i % (CT * Y_PLANE / 16) * 16;
      copy4((u32*)code_tile + i * 4, code1 + ((size_t)n * C + c0) * Y_PLANE + at,
            n < N);
    });
    copy_commit();
    load_windows<IMAGES, K>(dz_tile, dy2, code2, n0, 0, N);

    float acc[3][S][4] = {};
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      if (half == 0) {
        copy_wait<2>();
        if (first) for_copies<FIRST_COPIES>([&](int i) { round4(w_tile + i * 4); });
      } else {
        copy_wait<0>();
        if (first)
          for_copies<W_COPIES - FIRST_COPIES>(
              [&](int i) { round4(w_tile + (FIRST_COPIES + i) * 4); });
        for_copies<IMAGES * X_PLANE / 4>([&](int i) {
          round4(x_tile + i / (X_PLANE / 4) * X_IMAGE + i % (X_PLANE / 4) * 4);
        });
      }
      sync_role(DATA_ROLE);
      const int begin = half * FIRST_STEPS, end = half ? STEPS : FIRST_STEPS;
      const u32 even_place = g % 2 ? 4u : 2u, odd_place = g % 2 ? 32u : 8u;
      const u32* const low = dz_tile + window_at(pair * 2 * K + t, 0, g / 2);
      const u32* const high = dz_tile + window_at(pair * 2 * K + t + 4, 0, g / 2);
      const u32* const w = w_tile + t * W_ROW + g * RS;
      if (row_set == 0)
        multiply_rows<0, 3, 4>(acc, low, high, w, even_place, odd_place, begin, end);
      else if (row_set == 1)
        multiply_rows<1, 2, 5>(acc, low, high, w, even_place, odd_place, begin, end);
      else if (row_set == 2)
        multiply_rows<6, 9, 10>(acc, low, high, w, even_place, odd_place, begin, end);
      else
        multiply_rows<7, 8, 11>(acc, low, high, w, even_place, odd_place, begin, end);
    }

    // dy1 (image, h, w, c): column w < 8 has the sums of q = w - s >= 0; what is moved
    // out of lane 7 comes in again at the other end, as columns 8 to 11.
    const u32 row_numbers = row_set == 0   ? 0x430u
                            : row_set == 1 ? 0x521u
                            : row_set == 2 ? 0xa96u
                                           : 0xb87u;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const int h = row_numbers >> (4 * i) & 15;
#pragma unroll
      for (int image = 0; image < 2; ++image) {
        float low[2], high[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          low[e] = acc[i][0][image * 2 + e];
          high[e] = 0.0f;
#pragma unroll
          for (int s = 1; s < S; ++s) {
            const float v =
                __shfl_sync(~0u, acc[i][s][image * 2 + e], (lane - 4 * s) & 31);
            if (g >= s) low[e] += v;
            else high[e] += v;
          }
        }
        u32* const to =
            dy_tile + (((pair * 2 + image) * Y_SIZE + h) * Y_SIZE + g) * CT + 2 * t;
        *(uint2*)to = make_uint2(copied_operand(__float_as_uint(low[0])),
                                 copied_operand(__float_as_uint(low[1])));
        if (g < S - 1)
          *(uint2*)(to + 8 * CT) = make_uint2(copied_operand(__float_as_uint(high[0])),
                                              copied_operand(__float_as_uint(high[1])));
      }
    }
    sync_role(DATA_ROLE);

    // dweight1. A unit of work: an image, 4 windows wide, 6 windows high.
    float sums[2][3][4] = {};
#pragma unroll 1
    for (int unit = warp; unit < IMAGES * 6; unit += WARPS) {
      const int image = unit / 6, quad = unit % 6 / 2, half = unit % 2;
      const int window = half * 6 * Y_SIZE + quad * 4 + t;
      u32 dy[6], place[6];
#pragma unroll
      for (int i = 0; i < 6; ++i) {
        dy[i] = dy_tile[(image * Y_PLANE + window + i * Y_SIZE) * CT + g];
        place[i] = code_tile[(image * CT + g) * Y_PLANE + window + i * Y_SIZE];
      }
      // the ones lie in banks that the other lanes do not read
      const u32* const from =
          g == 7 ? ones + (image * X_IMAGE + half * 12 * X_SIZE + quad * 8) % 32 + 16 +
                       2 * t
                 : x_tile + image * X_IMAGE + half * 12 * X_SIZE + quad * 8 + 2 * t + g;
      Rows taps[16];  // taps r and r + 1 at row p + r of x
      const auto load_taps = [&](int row) {
        const u32* const v = from + row * X_SIZE;
        taps[row].set(load_again(v), load_again(v + X_SIZE), load_again(v + 1),
                      load_again(v + X_SIZE + 1));
      };
#pragma unroll
      for (int row = 0; row < 4; ++row) load_taps(row);
#pragma unroll
      for (int p = 0; p < 12; ++p) {
        load_taps(p + 4);
        const u32 b0 = place[p / 2] == 1u + p % 2 * 2 ? dy[p / 2] : 0u;
        const u32 b1 = place[p / 2] == 2u + p % 2 * 2 ? dy[p / 2] : 0u;
#pragma unroll
        for (int m = 0; m < 3; ++m) multiply(sums[p % 2][m], taps[p + 2 * m], b0, b1);
      }
    }
    sync_role(DATA_ROLE);
    float* const of_warp = (float*)dy_tile;
#pragma unroll
    for (int m = 0; m < 3; ++m)
      *(float4*)&of_warp[(warp * 3 + m) * 128 + lane * 4] =
          make_float4(sums[0][m][0] + sums[1][m][0], sums[0][m][1] + sums[1][m][1],
                      sums[0][m][2] + sums[1][m][2], sums[0][m][3] + sums[1][m][3]);
    sync_role(DATA_ROLE);
    if (thread < CT * RS + CT) {
      const bool bias = thread >= CT * RS;
      const int c = bias ? thread - CT * RS : thread / RS;
      const int r = bias ? 0 : thread % RS / S, s = bias ? 7 : thread % S;
      const float* const from =
          of_warp + r / 2 * 128 + (s * 4 + c / 2) * 4 + r % 2 * 2 + c % 2;
      float sum = from[0];
#pragma unroll
      for (int i = 1; i < WARPS; ++i) sum += from[i * 384];
      float* const to = bias ? dbias1 + (size_t)split * C + c0 + c
                             : dweight1 + ((size_t)split * C + c0) * RS + thread;
      *to = first ? sum : *to + sum;
    }
  }
}

}  // namespace data_role

// ================================================================ weight role
namespace weight_role {

constexpr int IMAGES = 8, KT = 32, K_TILES = ceil_div(K, KT), TILES = K_TILES * C_TILES;
constexpr int Y_ROW = Y_PLANE + 4;  // 20 mod 32: 8 channels meet all banks
constexpr int Y_WORDS = IMAGES * CT * Y_ROW;
constexpr int DZ_PART = IMAGES * KT * WINDOWS, DZ_WORDS = PARTS * DZ_PART;
// sums of one r: [k][c][s]; slots of different r start at different banks
constexpr int SLOT = KT * CT * S + 6;
constexpr int EARLY_WORDS = round_up(4 * SLOT, 4);
constexpr int SHARED_WORDS = Y_WORDS + DZ_WORDS + EARLY_WORDS;
static_assert(WARPS * SLOT <= Y_WORDS + DZ_WORDS, "the last sums lie over the operands");

__device__ __forceinline__ void store_sums(float* slot, float (&acc)[2][S][4]) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  float* const to = slot + g * CT * S + 2 * t * S;
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int s = 0; s < S; ++s)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        to[(m * 16 + e / 2 * 8) * CT * S + e % 2 * S + s] = acc[m][s][e];
        acc[m][s][e] = 0.0f;
      }
}

__device__ __forceinline__ void run(int block, int splits, u32* shared,
                                    const float* __restrict__ dy2,
                                    const u8* __restrict__ code2,
                                    const float* __restrict__ y1,
                                    float* __restrict__ dweight2,
                                    float* __restrict__ dbias2, int N) {
  const int thread = threadIdx.x % THREADS, lane = thread % 32, g = lane / 4,
            t = lane % 4, warp = warp_index() % WARPS;
  const int k0 = block % K_TILES * KT, c_tile = block / K_TILES % C_TILES,
            c0 = c_tile * CT, split = block / TILES;
  u32* const y_tile = shared;
  u32* const dz_tile = y_tile + Y_WORDS;
  float* const early = (float*)(dz_tile + DZ_WORDS);
  float* const late = (float*)shared;
  wait_for_earlier_kernels();
  let_next_kernel_start();

#pragma unroll 1
  for (int group = split; group * IMAGES < N; group += splits) {
    const int n0 = group * IMAGES;
    const bool first = group == split;
    if (!first) sync_role(WEIGHT_ROLE);
    for_copies<IMAGES * CT * Y_PLANE / 4>([&](int i) {
      const int plane = i / (Y_PLANE / 4), at = i % (Y_PLANE / 4) * 4;
      const int n = n0 + plane / CT, c = c0 + plane % CT;
      copy4(y_tile + plane * Y_ROW + at, y1 + ((size_t)n * C + c) * Y_PLANE + at, n < N);
    });
    copy_commit();
    load_windows<IMAGES, KT>(dz_tile, dy2, code2, n0, k0, N);
    copy_wait<0>();
    for_copies<IMAGES * CT * Y_PLANE / 4>([&](int i) {
      round4(y_tile + i / (Y_PLANE / 4) * Y_ROW + i % (Y_PLANE / 4) * 4);
    });
    sync_role(WEIGHT_ROLE);

    float acc[2][S][4] = {};
    int r_before = warp * 5 / IMAGES;
#pragma unroll 1
    for (int item = warp * 5; item < warp * 5 + 5; ++item) {
      const int r = item / IMAGES, image = item % IMAGES;
      if (r != r_before) {
        store_sums(early + warp / 2 * SLOT, acc);
        r_before = r;
      }
      const u32* const dz = dz_tile + window_at(image * KT + g, 0, t);
      const Windows<DZ_PART> windows[2][2] = {
          {{dz, g}, {dz + 8 * WINDOWS, g}},
          {{dz + 16 * WINDOWS, g}, {dz + 24 * WINDOWS, g}}};
      const u32* const y = y_tile + (image * CT + g) * Y_ROW + r * Y_SIZE + t;
#pragma unroll
      for (int pp = 0; pp < 4; ++pp) {
        Rows a[2];
        u32 columns[2];
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
          for (int part = 0; part < PARTS; ++part) {
            u32(&to)[4] = part ? a[m].small : a[m].word;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const u32 word = windows[m][half].word(part, pp);
              // a word without a place has the value 0
              const bool upper = word & 6u;
              to[half] = upper ? word : 0u;
              to[2 + half] = upper ? 0u : word;
            }
          }
          columns[m] = (__byte_perm(windows[m][0].word(0, pp),
                                    windows[m][1].word(0, pp), 0x5410) &
                        0x11111111u) *
                           10u +
                       0x44444444u;
        }
#pragma unroll
        for (int s = 0; s < S; ++s) {
          u32 b[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const u32* const from = y + (2 * pp + j / 2) * Y_SIZE + s + j % 2 * 4;
            b[j] = s == 4 && j % 2 == 0 ? load_again(from) : *from;
          }
#pragma unroll
          for (int m = 0; m < 2; ++m) multiply_sparse(acc[m][s], a[m], b, columns[m]);
        }
      }
    }

    if (c_tile == 0) {
#pragma unroll
      for (int k = warp; k < KT; k += WARPS) {
        float sum = 0.0f;
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
          const uint4 v = *(const uint4*)(dz_tile + part * DZ_PART +
                                          (lane / 4 * KT + k) * WINDOWS + lane % 4 * 4);
          sum += (__uint_as_float(v.x & 0xffffe000u) + __uint_as_float(v.y & 0xffffe000u)) +
                 (__uint_as_float(v.z & 0xffffe000u) + __uint_as_float(v.w & 0xffffe000u));
        }
#pragma unroll
        for (int other = 16; other; other /= 2) sum += __shfl_xor_sync(~0u, sum, other);
        if (lane == 0 && (K % KT == 0 || k0 + k < K)) {
          float* const to = dbias2 + (size_t)split * K + k0 + k;
          *to = first ? sum : *to + sum;
        }
      }
    }
    sync_role(WEIGHT_ROLE);
    store_sums(late + warp * SLOT, acc);
    sync_role(WEIGHT_ROLE);
    // r was worked on by warps 0 1 | 1 2 3 | 3 4 | 4 5 6 | 6 7: in their order, and
    // what a warp had early lies in slot warp / 2
    if (thread < CT * RS) {
      const int r = thread % RS / S, at = thread / RS * S + thread % S;
      const bool three = r % 2;
      const int before = r * 8 / 5;  // first warp whose last r this is, 0 1 3 4 6
      const float* const a = late + before * SLOT + at;
      const float* const b = (r == 0   ? early
                              : r == 2 ? early + 2 * SLOT
                                       : late + (before + 1) * SLOT) +
                             at;
      const float* const c = early + (r == 1 ? 1 : 3) * SLOT + at;
      float* const to =
          dweight2 + (((size_t)split * K + k0) * C + c0) * RS + thread;
#pragma unroll 8
      for (int k = 0; k < KT && (K % KT == 0 || k0 + k < K); ++k) {
        float sum = a[k * CT * S] + b[k * CT * S];
        if (three) sum += c[k * CT * S];
        float* const out = to + (size_t)k * C * RS;
        *out = first ? sum : *out + sum;
      }
    }
  }
}

}  // namespace weight_role

static_assert((data_role::SHARED_WORDS + weight_role::SHARED_WORDS) * 4 == SHARED,
              "the host counts the same bytes");

// dweight2 (splits2, K, C, 5, 5), dbias2 (splits2, K): each split takes every splits2-th
// group of 8 images; dweight1 (splits1, C, 1, 5, 5), dbias1 (splits1, C): of 4 images.
extern "C" __global__ void __launch_bounds__(2 * THREADS, 1)
    conv_pair_backward(const float* __restrict__ dy2, const u8* __restrict__ code2,
                       const float* __restrict__ y1, const u8* __restrict__ code1,
                       const float* __restrict__ x, const float* __restrict__ weight2,
                       float* __restrict__ dweight2, float* __restrict__ dbias2,
                       float* __restrict__ dweight1, float* __restrict__ dbias1, int N,
                       int splits2, int splits1) {
  extern __shared__ uint4 shared[];
  const int block = blockIdx.x;
  if (warp_index() < WARPS) {
    if (block < splits1 * C_TILES)
      data_role::run(block, splits1, (u32*)shared, dy2, code2, code1, x, weight2,
                     dweight1, dbias1, N);
  } else if (block < splits2 * weight_role::TILES) {
    weight_role::run(block, splits2, (u32*)shared + data_role::SHARED_WORDS, dy2, code2,
                     y1, dweight2, dbias2, N);
  }
}
