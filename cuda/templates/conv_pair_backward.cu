// Backward of the first two convolution blocks of a network in one kernel:
//   y1 = maxpool(relu(conv(x, weight1) + bias1))    x (N, 1, 28, 28), y1 (N, C, 12, 12)
//   y2 = maxpool(relu(conv(y1, weight2) + bias2))   y2 (N, K, 4, 4)
// with filters of 5 x 5 and windows of 2 x 2. It makes the gradients of both weights
// and biases. The gradient by y1 stays on chip, and x has none.
//
// A block has two roles of 8 warps each, which meet only at the launch: while one waits
// for memory the other multiplies. In fp32 a thread needs more registers, and all 16
// warps have first the one role, then the other.
//
// The packed gradient. Of the 4 places of a window one at most has a gradient, so dz2,
// the gradient at the second convolution's output, is a word a window: its value,
// rounded to tf32, and in the 13 bits that tensor cores ignore
//   bits 1, 2, 3, 5   one is set: place (0,0) (0,1) (1,0) (1,1); none where no gradient
//                     passes, and the value is 0
//   bits 0, 4, 8, 12  the column of the place in each of the 4 windows of the row
// An operand is `word & place ? word : 0`, two instructions. In fp32 a second word has
// the rest of the value (fused.cuh).
//
// 1. Data role: 4 images and 8 channels c of y1.
//    dy1[n,c,p+r,q+s] = sum over k and all p, r, q, s of dz2[n,k,p,q] weight2[k,c,r,s]
//    As a product: (8 q of 2 images) x (8 c), contraction over k, for each p, r, s. It
//    is added to the accumulators of row p + r and tap s, so that the border costs
//    nothing. At the end the sums of tap s move by s lanes, from q to w = q + s. A warp
//    has 2 images and some of the 12 rows. Row h meets as many p as r = h - p allows;
//    each of the sets {0,3,4} {1,2,5} {6,9,10} {7,8,11} meets 10, and in fp32 each of
//    {0,3} {1,2} {4} {5} {6} {7} {11,8} {10,9} meets 5.
//    Then, from shared memory,
//    dweight1[c,r,s] = sum over n, p, q of dz1[n,c,p,q] x[n,p+r,q+s]
//    with dz1 made from dy1 and code1 on the way to the product of (2 r, 8 s) x (8 c),
//    contraction over 8 pixels of a row: the even columns of 4 windows, then the odd
//    ones. Of the 8 s only 5 are needed; in place of the last one x is 1, which gives
//    dbias1.
// 2. Weight role: 8 images, 32 k, 8 c and all taps.
//    dweight2[k,c,r,s] = sum over n, p, q of dz2[n,k,p,q] y1[n,c,p+r,q+s]
//    As a product: (16 k) x (8 c) for each r, s, contraction over the 16 pixels of 4
//    windows side by side. Of two pixels side by side in a window one at least is 0:
//    the form of sparse products, which take 0.65 of the time. Their operand A has a
//    number for each pair, and 4 bits that say which of the two it is: 0x4 or 0xe.
//    The 40 items (r, image), r outermost, go to 8 warps in runs of 5 (in fp32 two
//    warps have 16 k each of an item). A warp that comes to its next r puts the sums so
//    far into shared memory.
//
// Every block writes partial gradients, (splits, ...), which update.cu adds in order.
// Where a split has several groups of images its block adds to what it wrote.
//
// Launch: 512 threads, SHARED bytes (fused_cuda_pair_backward.py). MODE 0 (fp32) or 1
// (tf32), C and K multiples of 8. Compute capability 8.0 and up, but no multiprocessor
// before 9.0 has so much shared memory.
#include "backward.cuh"

constexpr int R = 5, S = 5, RS = R * S;
constexpr int X_SIZE = 28, X_PLANE = X_SIZE * X_SIZE;
constexpr int Y_SIZE = 12, Y_PLANE = Y_SIZE * Y_SIZE;
constexpr int Z_SIZE = 8, WINDOWS = Z_SIZE * Z_SIZE / 4;
constexpr int PARTS = MODE == MODE_FP32 ? 2 : 1;
// channels of y1 that a block has in both roles
constexpr int CT = 8, C_TILES = C / CT;
static_assert(MODE != MODE_BF16 && C % CT == 0 && K % 8 == 0, "see the launch");

// whether the roles run side by side
constexpr bool TOGETHER = MODE != MODE_FP32;
constexpr int ROLE_WARPS = TOGETHER ? 8 : 16, ROLE_THREADS = 32 * ROLE_WARPS;
enum { DATA_ROLE = 1, WEIGHT_ROLE = 2 };
__device__ __forceinline__ void sync_role(int role) {
  sync_threads(role, ROLE_THREADS);
}

__device__ __forceinline__ float value(u32 word) {
  return __uint_as_float(word & 0xffffe000u);
}
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

// ---- copies of a role

// 4 words of an image into shared memory, in the background; 0 beyond the batch, since
// what is there is multiplied by a gradient of 0.
__device__ __forceinline__ void copy4(u32* to, const void* from, bool inside) {
  if (inside) copy_async16(shared_address(to), from);
  else *(uint4*)to = make_uint4(0, 0, 0, 0);
}

// body(i) for i below COUNT, by all threads of a role.
template <int COUNT, class Body>
__device__ __forceinline__ void for_copies(const Body& body) {
#pragma unroll
  for (int j = 0; j < ceil_div(COUNT, ROLE_THREADS); ++j) {
    const int i = j * ROLE_THREADS + threadIdx.x % ROLE_THREADS;
    if (COUNT % ROLE_THREADS == 0 || i < COUNT) body(i);
  }
}

// ---- the packed gradient

// Where the word of window (pp, qq) of a plane (image, k) is. tf32 reads four pp at a
// time, fp32 one word; neighbouring k are swizzled so that lanes, 4 of them along k or
// along qq, meet all banks.
__device__ __forceinline__ int window_at(int plane, int pp, int qq) {
  const int swizzle = plane / 2 % 4;
  return plane * WINDOWS +
         (PARTS == 2 ? (pp ^ swizzle) * 4 + qq : (qq ^ swizzle) * 4 + pp);
}

// The words of a tile, from dy and code. meanwhile(): what else is to be asked of
// memory, behind the first loads.
template <int IMAGES, int CHANNELS, class Meanwhile>
__device__ __forceinline__ void load_windows(u32* tile, const float* __restrict__ dy,
                                             const u8* __restrict__ code, int n0,
                                             int k0, int N,
                                             const Meanwhile& meanwhile) {
  for (int first = 0; first < IMAGES * CHANNELS; first += ROLE_THREADS) {
    const int plane = first + threadIdx.x % ROLE_THREADS;
    const int n = n0 + plane / CHANNELS, k = k0 + plane % CHANNELS;
    float4 values[4] = {};
    uint4 all_codes = make_uint4(0, 0, 0, 0);
    const bool mine =
        IMAGES * CHANNELS % ROLE_THREADS == 0 || plane < IMAGES * CHANNELS;
    if (mine && n < N && (K % CHANNELS == 0 || k < K)) {
      const size_t at = (size_t)n * K + k;
#pragma unroll
      for (int pp = 0; pp < 4; ++pp)
        values[pp] = __ldg((const float4*)dy + at * 4 + pp);
      all_codes = __ldg((const uint4*)code + at);
    }
    if (first == 0) meanwhile();
    if (!mine) break;
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

__device__ __forceinline__ uint4 load_shared4(u32 address) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address));
  return v;
}

// The words of a lane's windows pp = 0 .. 3 of one plane: in registers where there are
// enough of them.
template <int PART_WORDS>
struct Windows {
  u32 at;  // address of pp = 0
  int swizzle;
  uint4 held;

  __device__ __forceinline__ void load(u32 address, int plane) {
    at = address, swizzle = plane / 2 % 4;
    if (PARTS == 1) held = load_shared4(at);
  }
  __device__ __forceinline__ u32 word(int part, int pp) const {
    if (PARTS == 2)
      return load_shared(at + part * PART_WORDS * 4 + ((pp ^ swizzle) - swizzle) * 16);
    return pp == 0 ? held.x : pp == 1 ? held.y : pp == 2 ? held.z : held.w;
  }
};

// ================================================================ data role
namespace data_role {

constexpr int IMAGES = 4;
// 8 mod 32, and 25 g are all residues mod 8: lanes (t, g) of a weight meet all banks
constexpr int W_ROW = CT * RS;
constexpr int X_IMAGE = X_PLANE + 64;  // beyond the image: taps that nobody needs
constexpr int ONES = 544;              // as long as the rows that a product reads
constexpr int W_WORDS = K * W_ROW, DZ_PART = IMAGES * K * WINDOWS;
constexpr int DZ_WORDS = PARTS * DZ_PART, X_WORDS = IMAGES * X_IMAGE;
constexpr int DY_WORDS = IMAGES * Y_PLANE * CT;
constexpr int CODE_WORDS = IMAGES * CT * Y_PLANE / 4;
constexpr int SHARED_WORDS =
    W_WORDS + DZ_WORDS + DY_WORDS + CODE_WORDS + X_WORDS + ONES;
static_assert(ROLE_WARPS * 3 * 128 <= DZ_WORDS + DY_WORDS + CODE_WORDS + X_WORDS,
              "room for what each warp has of dweight1");
// 8 k are a step of the contraction; their weights are asked for some steps ahead.
constexpr int STEPS = K / 8, COPIED_AHEAD = 2;

// Rows of dy1 of a warp, at most.
constexpr int ROWS = TOGETHER ? 3 : 2;
typedef float Sums[ROWS][S][4];

// A warp's rows of dy1 in tf32. low, high: addresses of the windows (0, qq) of a lane's
// k = t and t + 4; w: of its weights. Weights are loaded AHEAD taps before their
// product, windows of the next 8 k at the end of these.
template <int H0, int H1, int H2, class Copy>
__device__ __forceinline__ void multiply_rows(Sums& acc, u32 low, u32 high, u32 w,
                                              u32 even_place, u32 odd_place,
                                              u32 arrived, const Copy& copy) {
  constexpr int AHEAD = S - 1, rows[3] = {H0, H1, H2};
  uint4 windows[4];
  const auto load_step = [&](int step) {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      windows[e] = load_shared4((e / 2 ? high : low) +
                                (step * 8 + e % 2 * K) * WINDOWS * 4);
  };
  u32 b[S][2];
  const auto load_tap = [&](int tap, u32 from) {
    b[tap % S][0] = load_shared(from + tap * 4);
    b[tap % S][1] = load_shared(from + (4 * W_ROW + tap) * 4);
  };
  load_step(0);
  barrier_wait(arrived, 0);
#pragma unroll
  for (int tap = 0; tap < AHEAD; ++tap) load_tap(tap, w);
#pragma unroll 1
  for (int step = 0; step < STEPS; ++step) {
    copy(step);
    const u32 next_w = step + 1 < STEPS ? w + 8 * W_ROW * 4 : w;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      u32 a[ROWS][4];
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
        const int p = rows[i] - r;
        if (p < 0 || p >= Z_SIZE) continue;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const uint4 v = windows[e];
          a[i][e] = pick(p / 2 == 0   ? v.x
                         : p / 2 == 1 ? v.y
                         : p / 2 == 2 ? v.z
                                      : v.w,
                         p % 2 ? odd_place : even_place);
        }
      }
      if (r == R - 1) {
        const int next = least(step + 1, STEPS - 1);
        load_step(next);
        barrier_wait(arrived + 8 * next, 0);
      }
#pragma unroll
      for (int s = 0; s < S; ++s) {
        const int ahead = r * S + s + AHEAD;
        load_tap(ahead % RS, ahead < RS ? w : next_w);
        const u32 b0 = copied_operand(b[s][0]), b1 = copied_operand(b[s][1]);
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
          const int p = rows[i] - r;
          if (p >= 0 && p < Z_SIZE) mma_tf32(acc[i][s], a[i], b0, b1);
        }
      }
    }
    w = next_w;
  }
}

// The same in fp32: rows h0, which meets `split` p, and h1, which meets the rest of
// five. All warps run the same short loop.
template <class Copy>
__device__ __forceinline__ void multiply_rows(Sums& acc, int h0, int h1, int split,
                                              u32 low, u32 high, u32 w, int t,
                                              u32 even_place, u32 odd_place,
                                              u32 arrived, const Copy& copy) {
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
        const u32 at = (e / 2 ? high : low) + (step * 8 + e % 2 * K) * WINDOWS * 4 +
                       ((p / 2 ^ swizzle) - swizzle) * 16;
        a.word[e] = pick(load_shared(at), place);
        a.small[e] = pick(load_shared(at + (PARTS - 1) * DZ_PART * 4), place);
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
        for (int i = 0; i < S * 4; ++i) acc[0][i / 4][i % 4] += sum[i / 4][i % 4];
      } else {
#pragma unroll
        for (int i = 0; i < S * 4; ++i) acc[1][i / 4][i % 4] += sum[i / 4][i % 4];
      }
    }
    w += 8 * W_ROW * 4;
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
  const int thread = threadIdx.x % ROLE_THREADS, lane = thread % 32, g = lane / 4,
            t = lane % 4;
  const int warp = warp_index() % ROLE_WARPS, pair = warp % 2, row_set = warp / 2;
  const int c0 = block % C_TILES * CT, split = block / C_TILES;
  u32* const w_tile = shared;
  u32* const dz_tile = w_tile + W_WORDS;
  u32* const dy_tile = dz_tile + DZ_WORDS;
  u8* const code_tile = (u8*)(dy_tile + DY_WORDS);
  u32* const x_tile = dy_tile + DY_WORDS + CODE_WORDS;
  u32* const ones = x_tile + X_WORDS;
  float* const of_warp = (float*)dz_tile;  // in the end, over all but weights and ones

  // a warp's rows, four bits each; f: none
  const u64 row_numbers =
      TOGETHER ? 0xb87'a96'521'430ull : 0x9a'8b'f7'f6'f5'f4'21'30ull;
  __shared__ u64 barriers[STEPS];  // weights of 8 k each
  const u32 arrived = shared_address(barriers);
  if (thread < STEPS) barrier_init(arrived + 8 * thread, ROLE_THREADS);
  for (int i = thread; i < ONES; i += ROLE_THREADS) ones[i] = __float_as_uint(1.0f);
  sync_role(DATA_ROLE);
  const auto copy_weights = [&](int step) {
    for_copies<8 * W_ROW / 4>([&](int i) {
      const int k = step * 8 + i / (W_ROW / 4), at = i % (W_ROW / 4) * 4;
      copy_async16(shared_address(w_tile + k * W_ROW + at),
                   weight2 + ((size_t)k * C + c0) * RS + at);
    });
    barrier_arrive_copies(arrived + 8 * step);
  };
  // weights are older than the kernel before this one
#pragma unroll 1
  for (int step = 0; step < least(COPIED_AHEAD, STEPS); ++step) copy_weights(step);
  wait_for_earlier_kernels();
  let_next_kernel_start();

#pragma unroll 1
  for (int group = split; group * IMAGES < N; group += splits) {
    const int n0 = group * IMAGES;
    const bool first = group == split;
    if (!first) sync_role(DATA_ROLE);
    load_windows<IMAGES, K>(dz_tile, dy2, code2, n0, 0, N, [] {});
    // All blocks together ask for more than L2 can bring at once: what is needed later
    // is asked for later.
    const auto copy_later = [&](int step) {
      if (first && step + COPIED_AHEAD < STEPS) copy_weights(step + COPIED_AHEAD);
    };
    sync_role(DATA_ROLE);

    Sums acc = {};
    {
      const u32 even_place = g % 2 ? 4u : 2u, odd_place = g % 2 ? 32u : 8u;
      const int plane = pair * 2 * K + t;
      const u32 low = shared_address(dz_tile + window_at(plane, 0, g / 2));
      const u32 high = shared_address(dz_tile + window_at(plane + 4, 0, g / 2));
      const u32 w = shared_address(w_tile + t * W_ROW + g * RS);
      if (!TOGETHER) {
        const int h0 = row_numbers >> (8 * row_set) & 15;
        const int h1 = row_numbers >> (8 * row_set + 4) & 15;
        const int meets = h1 >= Y_SIZE ? R : least(h0 + 1, Y_SIZE - h0);
        multiply_rows(acc, h0, h1, meets, low, high, w, t, even_place, odd_place,
                      arrived, copy_later);
      } else if (row_set == 0) {
        multiply_rows<0, 3, 4>(acc, low, high, w, even_place, odd_place, arrived,
                               copy_later);
      } else if (row_set == 1) {
        multiply_rows<1, 2, 5>(acc, low, high, w, even_place, odd_place, arrived,
                               copy_later);
      } else if (row_set == 2) {
        multiply_rows<6, 9, 10>(acc, low, high, w, even_place, odd_place, arrived,
                                copy_later);
      } else {
        multiply_rows<7, 8, 11>(acc, low, high, w, even_place, odd_place, arrived,
                                copy_later);
      }
    }

    for_copies<IMAGES * X_PLANE / 4>([&](int i) {
      const int image = i / (X_PLANE / 4), at = i % (X_PLANE / 4) * 4;
      copy4(x_tile + image * X_IMAGE + at, x + (size_t)n0 * X_PLANE + i * 4,
            n0 + image < N);
    });
    for_copies<IMAGES * CT * Y_PLANE / 16>([&](int i) {
      const int n = n0 + i / (CT * Y_PLANE / 16), at = i % (CT * Y_PLANE / 16) * 16;
      copy4((u32*)code_tile + i * 4, code1 + ((size_t)n * C + c0) * Y_PLANE + at,
            n < N);
    });
    copy_commit();

    // dy1 (image, h, w, c): column w < 8 has the sums of q = w - s >= 0; what is moved
    // out of lane 7 comes in again at the other end, as columns 8 to 11.
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int h = row_numbers >> (4 * (ROWS * row_set + i)) & 15;
      if (h >= Y_SIZE) break;
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
    copy_wait<0>();
    sync_role(DATA_ROLE);

    // dweight1. A unit of work: an image, 4 windows wide, HIGH windows high.
    constexpr int HIGH = Y_SIZE * WARPS / (2 * ROLE_WARPS), PARTS_HIGH = Y_SIZE / HIGH;
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
        dy[i] = dy_tile[(image * Y_PLANE + window + i * Y_SIZE) * CT + g];
        place[i] = code_tile[(image * CT + g) * Y_PLANE + window + i * Y_SIZE];
      }
      // the ones lie in banks that the other lanes do not read
      const u32* const from =
          g == 7 ? ones + corner % 32 + 16 + 2 * t : x_tile + corner + 2 * t + g;
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
        taps[row].set(words[row][0], words[row + 1][0], words[row][1],
                      words[row + 1][1]);
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
      for (int i = 1; i < ROLE_WARPS; ++i) sum += from[i * 384];
      float* const to = bias ? dbias1 + (size_t)split * C + c0 + c
                             : dweight1 + ((size_t)split * C + c0) * RS + thread;
      *to = first ? sum : *to + sum;
    }
  }
}

}  // namespace data_role

// ================================================================ weight role
namespace weight_role {

constexpr int IMAGES = 8, KT = 32;
constexpr int K_TILES = ceil_div(K, KT), TILES = K_TILES * C_TILES;
constexpr int Y_ROW = Y_PLANE + 4;  // 20 mod 32: 8 channels meet all banks
constexpr int Y_WORDS = IMAGES * CT * Y_ROW;
constexpr int DZ_PART = IMAGES * KT * WINDOWS, DZ_WORDS = PARTS * DZ_PART;
// sums of one r: [k][c][s]; slots of different r start at different banks
constexpr int SLOT = KT * CT * S + 6;
constexpr int EARLY_WORDS = round_up(4 * SLOT, 4);
constexpr int SHARED_WORDS = Y_WORDS + DZ_WORDS + EARLY_WORDS;
static_assert(WARPS * SLOT <= Y_WORDS + DZ_WORDS, "last sums lie over the operands");

// A warp has M tiles of 16 k.
constexpr int M = TOGETHER ? 2 : 1;

__device__ __forceinline__ void store_sums(float* slot, float (&acc)[M][S][4]) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  float* const to = slot + g * CT * S + 2 * t * S;
#pragma unroll
  for (int m = 0; m < M; ++m)
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
  const int thread = threadIdx.x % ROLE_THREADS, lane = thread % 32, g = lane / 4,
            t = lane % 4;
  // with one tile of 16 k, warps 8 to 15 have the second one
  const int warp = warp_index() % WARPS, m0 = TOGETHER ? 0 : warp_index() / WARPS * 16;
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
    constexpr int COPIES = IMAGES * CT * Y_PLANE / 4;
    float4 copied[ceil_div(COPIES, ROLE_THREADS)];
    load_windows<IMAGES, KT>(dz_tile, dy2, code2, n0, k0, N, [&] {
      for_copies<COPIES>([&](int i) {
        const int n = n0 + i / (CT * Y_PLANE / 4), at = i % (CT * Y_PLANE / 4) * 4;
        copied[i / ROLE_THREADS] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (n < N)
          copied[i / ROLE_THREADS] =
              __ldg((const float4*)(y1 + ((size_t)n * C + c0) * Y_PLANE + at));
      });
    });
    for_copies<COPIES>([&](int i) {
      const float4 v = copied[i / ROLE_THREADS];
      *(uint4*)(y_tile + i / (Y_PLANE / 4) * Y_ROW + i % (Y_PLANE / 4) * 4) =
          make_uint4(copied_operand(__float_as_uint(v.x)),
                     copied_operand(__float_as_uint(v.y)),
                     copied_operand(__float_as_uint(v.z)),
                     copied_operand(__float_as_uint(v.w)));
    });
    sync_role(WEIGHT_ROLE);

    // Operands are loaded AHEAD products before they are needed, windows of the next
    // item at the end of this one.
    constexpr int AHEAD = 3, PRODUCTS = 4 * S;
    static_assert(PRODUCTS % (AHEAD + 1) == 0, "items begin at one place of b");
    float acc[M][S][4] = {};
    Windows<DZ_PART> windows[M][2];
    u32 b[AHEAD + 1][4];
    const u32 y_lane = shared_address(y_tile + g * Y_ROW + t);
    const u32 dz_lane = shared_address(dz_tile + window_at(m0 + g, 0, t));
    const auto load_item = [&](int item) {
#pragma unroll
      for (int i = 0; i < 2 * M; ++i)
        windows[i / 2][i % 2].load(
            dz_lane + (item % IMAGES * KT + i * 8) * WINDOWS * 4, g);
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
        Rows a[M];
        u32 columns[M];
#pragma unroll
        for (int m = 0; m < M; ++m) {
          u32 word[PARTS][2];
#pragma unroll
          for (int i = 0; i < 2 * PARTS; ++i)
            word[i / 2][i % 2] = windows[m][i % 2].word(i / 2, pp);
#pragma unroll
          for (int i = 0; i < 2 * PARTS; ++i) {
            u32(&to)[4] = i / 2 ? a[m].small : a[m].word;
            // a word without a place has the value 0
            const bool upper = word[0][i % 2] & 6u;
            to[i % 2] = upper ? word[i / 2][i % 2] : 0u;
            to[2 + i % 2] = upper ? 0u : word[i / 2][i % 2];
          }
          const u32 bits = __byte_perm(word[0][0], word[0][1], 0x5410) & 0x11111111u;
          columns[m] = bits * 10u + 0x44444444u;
        }
        if (pp == 3) load_item(item + 1);
#pragma unroll
        for (int s = 0; s < S; ++s) {
          const int product = pp * S + s, ahead = product + AHEAD;
          load_product(ahead % PRODUCTS, ahead < PRODUCTS ? y : next_y);
#pragma unroll
          for (int m = 0; m < M; ++m)
            multiply_sparse(acc[m][s], a[m], b[product % (AHEAD + 1)], columns[m]);
        }
      }
      y = next_y;
    }

    if (c_tile == 0) {
#pragma unroll
      for (int k = warp_index() % ROLE_WARPS; k < KT; k += ROLE_WARPS) {
        float sum = 0.0f;
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
          const uint4 v = *(const uint4*)(dz_tile + part * DZ_PART +
                                          (lane / 4 * KT + k) * WINDOWS + lane % 4 * 4);
          sum += (value(v.x) + value(v.y)) + (value(v.z) + value(v.w));
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
}

}  // namespace weight_role

static_assert((data_role::SHARED_WORDS + weight_role::SHARED_WORDS) * 4 == SHARED,
              "the host counts the same bytes");

// dweight2 (splits2, K, C, 5, 5), dbias2 (splits2, K): a split has every splits2-th
// group of 8 images. dweight1 (splits1, C, 1, 5, 5), dbias1 (splits1, C): of 4 images.
extern "C" __global__ void __launch_bounds__(2 * THREADS, 1)
    conv_pair_backward(const float* __restrict__ dy2, const u8* __restrict__ code2,
                       const float* __restrict__ y1, const u8* __restrict__ code1,
                       const float* __restrict__ x, const float* __restrict__ weight2,
                       float* __restrict__ dweight2, float* __restrict__ dbias2,
                       float* __restrict__ dweight1, float* __restrict__ dbias1, int N,
                       int splits2, int splits1) {
  extern __shared__ uint4 shared[];
  const int block = blockIdx.x;
  if ((!TOGETHER || warp_index() < WARPS) && block < splits1 * C_TILES)
    data_role::run(block, splits1, (u32*)shared, dy2, code2, code1, x, weight2,
                   dweight1, dbias1, N);
  if ((!TOGETHER || warp_index() >= WARPS) && block < splits2 * weight_role::TILES)
    weight_role::run(block, splits2, (u32*)shared + data_role::SHARED_WORDS, dy2, code2,
                     y1, dweight2, dbias2, N);
}
