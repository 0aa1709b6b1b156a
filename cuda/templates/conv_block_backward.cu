// Backward of the fused block  y = maxpool(relu(conv(x, weight) + bias)).
//
// Shapes are compile-time constants but for the batch N:
//   x, dx (N, C, H, W)   weight (K, C, R, S)   z (N, K, P, Q)   y, dy, code (N, K, PP, QQ)
//   z[n,k,p,q] = bias[k] + sum_{c,r,s} x[n, c, p*SH + r - PAD_H, q*SW + s - PAD_W] weight[k,c,r,s]
//
// 1. dz, the gradient at the convolution's output. A pooled value is the z of one place of
//    its window, so dz is dy there and 0 elsewhere; code says where (0: nowhere, since
//    relu cut it off). Without a pool dz = dy where relu let y through. dz is rebuilt while
//    it is loaded into shared memory and never exists in global memory. Rows and columns
//    of z that no window covers have dz = 0: P and Q below count only covered ones.
// 2. dx[n,c,h,w] = sum over k and all (p, r), (q, s) with p*SH + r - PAD_H = h and
//    q*SW + s - PAD_W = w of dz[n,k,p,q] weight[k,c,r,s].
//    As a product: channels c (rows) x groups of 8 pixels (columns), contraction over k.
//    A group lies in one row h, and its columns are w, w + SW, w + 2 SW ... so that for a
//    tap s either all or none have a q, and the q are neighbours. A warp holds groups of
//    several rows h: a fragment of dz row p is read once for all taps r and added to rows
//    h = p*SH + r - PAD_H. Taps that meet only the border are skipped, not multiplied.
// 3. dweight[k,c,r,s] = sum_{n,p,q} dz[n,k,p,q] x[n, c, p*SH + r - PAD_H, q*SW + s - PAD_W].
//    As a product for each tap: k (rows) x c (columns), contraction over pixels. A warp
//    walks down the rows p; a fragment of dz is read once for all taps, a row of x once for
//    all taps s (shifted in registers) and kept for the taps r of the next rows.
//    The pixels are split over blocks; each writes a partial gradient, and update.cu
//    adds the partials in order: no atomics, equal bits in every run.
//    With few input channels (DW_FLAT) the columns are (c, r, s) together.
// 4. dbias[k] = sum_{n,p,q} dz: added up from the fragments of dz on their way.
//
// The operands are WORDS along the contraction (fused.cuh): one float, or a pair of bf16
// (neighbouring k in 2., neighbouring q in 3.). A pixel's or channel's place is only a
// constant offset from an address of the lane: strides between channels, images and rows
// are chosen so that the 32 lanes meet 32 banks.
//
// Launch: 256 threads, shared memory SHARED (host: fused_cuda_backward.py), blocks
// 0 .. dw_blocks-1 work on dweight (k tile fastest, then c tile, then split), the others on
// dx (c tile fastest, then row tile, then image tile). Compute capability 8.0 and up.
#include "fused.cuh"

constexpr int THREADS = 256, WARPS = 8;
constexpr bool POOLED = POOL_H > 0;
constexpr int WIN_H = POOLED ? POOL_H : 1, WIN_W = POOLED ? POOL_W : 1;
constexpr int PP = ((H + 2 * PAD_H - R) / STRIDE_H + 1) / WIN_H;
constexpr int QQ = ((W + 2 * PAD_W - S) / STRIDE_W + 1) / WIN_W;
constexpr int P = PP * WIN_H, Q = QQ * WIN_W;
constexpr int RS = R * S;
// numbers a word holds
constexpr int E = MODE == MODE_BF16 ? 2 : 1;

__host__ __device__ constexpr int floor_div(int a, int b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
__host__ __device__ constexpr int least(int a, int b) { return a < b ? a : b; }
__host__ __device__ constexpr int most(int a, int b) { return a > b ? a : b; }
// the smallest number >= size that is residue modulo modulus
__host__ __device__ constexpr int stride(int size, int residue, int modulus) {
  return size + ((residue - size) % modulus + modulus) % modulus;
}
// the widest run of floats (4, 2, 1) whose rows of length n all start aligned
__host__ __device__ constexpr int run(int n) { return n % 4 == 0 ? 4 : n % 2 == 0 ? 2 : 1; }

// A number on its way through registers into shared memory.
__device__ __forceinline__ u32 operand(float x) {
  return MODE == MODE_TF32 ? round_tf32(x) : __float_as_uint(x);
}
// A float that was copied into shared memory as it is, on its way to a product: half a unit
// is added here and the tensor core cuts the rest off. (A NaN of all ones would pass for 0;
// NaNs in x and weight have met the loss long before.)
__device__ __forceinline__ u32 copied_operand(u32 word) {
  return MODE == MODE_TF32 ? word + 0x1000u : word;
}

// acc (16 x 8) += a b. In fp32 an operand is big + small, each a tf32, and the product all
// but small * small. Tensor cores do not round sums to nearest, so a sum of 8 products is
// added to acc outside of them.
struct Split {
  u32 big, small;
  __device__ __forceinline__ Split(u32 word) {
    big = (word + 0x1000u) & 0xffffe000u;
    small = __float_as_uint(__uint_as_float(word) - __uint_as_float(big));
  }
};
__device__ __forceinline__ void multiply(float (&acc)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  if (MODE != MODE_FP32) {
    mma<MODE>(acc, a, b0, b1);
    return;
  }
  const Split a0(a[0]), a1(a[1]), a2(a[2]), a3(a[3]), b_low(b0), b_high(b1);
  const u32 big[4] = {a0.big, a1.big, a2.big, a3.big};
  const u32 small[4] = {a0.small, a1.small, a2.small, a3.small};
  float sum[4] = {};
  mma_tf32(sum, small, b_low.big, b_high.big);
  mma_tf32(sum, big, b_low.small, b_high.small);
  mma_tf32(sum, big, b_low.big, b_high.big);
#pragma unroll
  for (int i = 0; i < 4; ++i) acc[i] += sum[i];
}

// ---- moving runs of numbers

template <int COUNT>
__device__ __forceinline__ void load_run(float (&v)[COUNT], const float* __restrict__ from) {
  if (COUNT == 4) {
    const float4 f = __ldg((const float4*)from);
    v[0] = f.x, v[1 % COUNT] = f.y, v[2 % COUNT] = f.z, v[3 % COUNT] = f.w;
  } else if (COUNT == 2) {
    const float2 f = __ldg((const float2*)from);
    v[0] = f.x, v[1 % COUNT] = f.y;
  } else {
    v[0] = __ldg(from);
  }
}

// ALIGN: words that the target is a multiple of
template <int ALIGN, int COUNT>
__device__ __forceinline__ void store_words(u32* to, const u32 (&v)[COUNT]) {
  if (ALIGN % 4 == 0 && COUNT % 4 == 0) {
#pragma unroll
    for (int i = 0; i < COUNT; i += 4)
      *(uint4*)(to + i) = make_uint4(v[i], v[i + 1 < COUNT ? i + 1 : 0],
                                     v[i + 2 < COUNT ? i + 2 : 0], v[i + 3 < COUNT ? i + 3 : 0]);
  } else if (ALIGN % 2 == 0 && COUNT % 2 == 0) {
#pragma unroll
    for (int i = 0; i < COUNT; i += 2)
      *(uint2*)(to + i) = make_uint2(v[i], v[i + 1 < COUNT ? i + 1 : 0]);
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) to[i] = v[i];
  }
}

// Neighbouring pixels into a tile that is made of words along the pixels.
template <int PER_WORD, int ALIGN, int COUNT>
__device__ __forceinline__ void store_pixels(u32* tile, int element, const float (&v)[COUNT]) {
  if (PER_WORD == 1) {
    u32 words[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) words[i] = operand(v[i]);
    store_words<ALIGN>(tile + element, words);
  } else if (COUNT % 2 == 0) {
    constexpr int PAIRS = COUNT / 2 > 0 ? COUNT / 2 : 1;
    u32 words[PAIRS];
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) words[i] = pack_bf16(v[2 * i], v[2 * i + 1 < COUNT ? 2 * i + 1 : 0]);
    store_words<ALIGN>(tile + element / 2, words);
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) ((u16*)tile)[element + i] = (u16)pack_bf16(v[i], 0.0f);
  }
}

// ---- dz

struct Gradient {
  const float* __restrict__ dy;
  const float* __restrict__ y;
  const u8* __restrict__ code;
};

// Windows of a row of y that are loaded together, and the row's number of such runs.
constexpr int WINDOWS = run(QQ), WINDOW_RUNS = QQ / WINDOWS, RUN_Q = WINDOWS * WIN_W;

// dz of WINDOWS neighbouring windows, the first one at index `at` of y.
__device__ __forceinline__ void load_dz(float (&dz)[WIN_H][RUN_Q], const Gradient& from, size_t at) {
  float dy[WINDOWS];
  load_run(dy, from.dy + at);
  if (POOLED) {
    u32 codes;
    if (WINDOWS == 4) codes = __ldg((const u32*)(from.code + at));
    else if (WINDOWS == 2) codes = __ldg((const u16*)(from.code + at));
    else codes = __ldg(from.code + at);
#pragma unroll
    for (int i = 0; i < WIN_H; ++i)
#pragma unroll
      for (int j = 0; j < RUN_Q; ++j) {
        const u32 code = codes >> (8 * (j / WIN_W)) & 255u;
        dz[i][j] = code == 1u + i * WIN_W + j % WIN_W ? dy[j / WIN_W] : 0.0f;
      }
  } else {
    float y[WINDOWS];
    if (RELU) load_run(y, from.y + at);
#pragma unroll
    for (int j = 0; j < WINDOWS; ++j) dz[0][j] = !RELU || y[j] > 0.0f ? dy[j] : 0.0f;
  }
}

// COUNT neighbouring floats from global into shared memory, in the background.
template <int ALIGN, int COUNT>
__device__ __forceinline__ void copy_run(u32* to, const float* __restrict__ from) {
  if (ALIGN % 4 == 0 && COUNT == 4) {
    copy_async16(shared_address(to), from);
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) copy_async4(shared_address(to + i), from + i);
  }
}

// Borders, which loads leave alone, are set to zero once.
__device__ __forceinline__ void clear(u32* shared, int words) {
  for (int i = threadIdx.x * 4; i < words; i += THREADS * 4)
    *(uint4*)(shared + i) = make_uint4(0, 0, 0, 0);
}

// ================================================================ dx
#if NEED_DX
namespace data_gradient {

// A warp: MT x 16 channels, NG column groups, NR rows, NI groups of images.
// A block: WC x WG x WR x WI x WK warps over these; WK share the contraction.
constexpr int GC = DX_COLUMNS, GI = 8 / GC;
static_assert(GC >= 2, "a lane's two pixels are neighbours");
constexpr int MT = DX_MT, NG = DX_NG, NR = DX_NR, NI = DX_NI;
constexpr int WC = DX_WC, WG = DX_WG, WR = DX_WR, WI = DX_WI, WK = DX_WK;
static_assert(WC * WG * WR * WI * WK == WARPS, "a block has 8 warps");
// words along k that are in shared memory at a time
constexpr int KC = DX_KC;
static_assert(KC % (8 * WK) == 0, "each warp takes steps of 8 words");

constexpr int CT = 16 * MT * WC, TH = NR * WR, TI = GI * NI * WI;
constexpr int C_TILES = ceil_div(C, CT), ROW_TILES = ceil_div(H, TH);
static_assert(TH >= H || NR % STRIDE_H == 0, "strips start at the same phase");

// Column groups: phase b in [0, SW), then blocks of GC columns b + SW * j.
constexpr int COLUMN_BLOCKS = ceil_div(ceil_div(W, STRIDE_W), GC);
constexpr int GROUPS = COLUMN_BLOCKS * least(STRIDE_W, W);
static_assert(NG * WG >= GROUPS, "a block covers whole rows");

// Rows of dz that reach the rows h0 .. h0+rows-1 of dx, from h0 / SH on.
constexpr int FIRST_P = -floor_div(R - 1 - PAD_H, STRIDE_H);
__host__ __device__ constexpr int rows_of_dz(int rows) {
  return floor_div(rows - 1 + PAD_H, STRIDE_H) - FIRST_P + 1;
}
constexpr int YN = rows_of_dz(NR);
// Rows of dz in shared memory, from row TILE_P + h0 / SH on; a tile of whole images needs no
// border.
constexpr int TILE_P = ROW_TILES == 1 ? most(FIRST_P, 0) : FIRST_P;
constexpr int YT = ROW_TILES == 1 ? least(FIRST_P + rows_of_dz(TH), P) - TILE_P : rows_of_dz(TH);

// Columns of dz that are read, with the border.
__host__ __device__ constexpr int column_bound(bool high) {
  int low = 0, up = Q;
  for (int b = 0; b < STRIDE_W; ++b)
    for (int s = 0; s < S; ++s)
      for (int block = 0; block < COLUMN_BLOCKS; ++block) {
        if ((b + PAD_W - s) % STRIDE_W) continue;
        const int q = (b + PAD_W - s) / STRIDE_W + block * GC;
        if (q + GC <= 0 || q >= Q) continue;
        low = least(low, q);
        up = most(up, q + GC);
      }
  return high ? up : low;
}
constexpr int LEFT = round_up(-column_bound(false), 4);
constexpr int PITCH = round_up(LEFT + column_bound(true), 4);
constexpr int IMAGE = stride(YT * PITCH, GI > 1 ? GC : 0, GI > 1 ? 8 : 4);
constexpr int PLANE = stride(TI * IMAGE, 8, 32);
constexpr int ALIGN = GC >= 4 ? 4 : GC == 2 ? 2 : 1;
// weights [k word][c][r][s]
constexpr int W_ROW = stride(CT * RS, 8 * RS % 32, 32);
constexpr int W_RUN = run(C * RS) < run(CT * RS) ? run(C * RS) : run(CT * RS);
constexpr int TILE_WORDS = KC * (PLANE + W_ROW);
// Otherwise every word of dz that is used is loaded: pixels of images beyond the batch are
// columns that nobody stores.
constexpr bool BORDER = column_bound(false) < 0 || column_bound(true) > Q || K % (KC * E) != 0;
constexpr int ACCUMULATORS = NI * NG * NR * MT * 4;
constexpr int SUM_WORDS = WK > 1 ? WARPS / WK * ACCUMULATORS * 32 : 0;
constexpr int SHARED_WORDS = most(TILE_WORDS, SUM_WORDS);

__device__ __forceinline__ void load_gradient(u32* tile, const Gradient& from, int n0, int p0,
                                              int k0, int N) {
  constexpr int ROWS = (YT + WIN_H - 2) / WIN_H + 1;  // of windows that can touch YT rows
  constexpr int ITEMS = KC * TI * ROWS * WINDOW_RUNS;
  const int first = floor_div(p0, WIN_H);
#pragma unroll 4
  for (int i = threadIdx.x; i < ITEMS; i += THREADS) {
    const int column = i % WINDOW_RUNS, row = i / WINDOW_RUNS % ROWS;
    const int image = i / (WINDOW_RUNS * ROWS) % TI, word = i / (WINDOW_RUNS * ROWS * TI);
    const int pp = first + row, n = n0 + image, k = k0 + word * E;
    const int y = pp * WIN_H - p0;
    if (pp < 0 || pp >= PP || y >= YT || n >= N || k >= K) continue;
    const size_t at = (((size_t)n * K + k) * PP + pp) * QQ + column * WINDOWS;
    float low[WIN_H][RUN_Q];
    load_dz(low, from, at);
    u32* to = tile + word * PLANE + image * IMAGE + y * PITCH + LEFT + column * RUN_Q;
    float high[WIN_H][RUN_Q] = {};
    if (E == 2 && k + 1 < K) load_dz(high, from, at + PP * QQ);
#pragma unroll
    for (int j = 0; j < WIN_H; ++j) {
      u32 words[RUN_Q];
#pragma unroll
      for (int q = 0; q < RUN_Q; ++q)
        words[q] = E == 2 ? pack_bf16(low[j][q], high[j][q]) : operand(low[j][q]);
      if (y + j >= 0 && y + j < YT) store_words<ALIGN>(to + j * PITCH, words);
    }
  }
}

__device__ __forceinline__ void load_weights(u32* tile, const float* __restrict__ weight, int k0,
                                             int c0) {
  constexpr int RUNS = CT * RS / W_RUN;
#pragma unroll 8
  for (int i = threadIdx.x; i < KC * RUNS; i += THREADS) {
    const int word = i / RUNS, at = i % RUNS * W_RUN, k = k0 + word * E;
    const bool inside = c0 * RS + at < C * RS;
    const float* from = weight + ((size_t)k * C + c0) * RS + at;
    if (E == 1 && inside && k < K) {
      copy_run<4, W_RUN>(tile + word * W_ROW + at, from);
      continue;
    }
    float low[W_RUN] = {}, high[W_RUN] = {};
    if (inside && k < K) load_run(low, from);
    if (E == 2 && inside && k + 1 < K) load_run(high, from + C * RS);
    u32 words[W_RUN];
#pragma unroll
    for (int j = 0; j < W_RUN; ++j) words[j] = E == 2 ? pack_bf16(low[j], high[j]) : 0u;
    store_words<4>(tile + word * W_ROW + at, words);
  }
}

__device__ void run_block(int block, u32* shared, const Gradient& from,
                          const float* __restrict__ weight, float* __restrict__ dx, int N) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int c0 = block % C_TILES * CT, h0 = block / C_TILES % ROW_TILES * TH;
  const int n0 = block / (C_TILES * ROW_TILES) * TI;
  const int wk = warp / (WC * WG * WR * WI), wc = warp % WC;
  const int wg = WG == 1 ? 0 : warp / WC % WG, wr = WR == 1 ? 0 : warp / (WC * WG) % WR;
  const int wi = WI == 1 ? 0 : warp / (WC * WG * WR) % WI;
  // first row of dz of the block's tile and of this warp's strip
  const int p_block = h0 / STRIDE_H + TILE_P;
  const int p_warp = (ROW_TILES == 1 ? 0 : h0 / STRIDE_H) + wr * (NR / STRIDE_H) + FIRST_P;
  u32* const dz_tile = shared;
  u32* const w_tile = shared + KC * PLANE;
  const u32* const dz_lane = dz_tile + t * PLANE + (wi * NI * GI + g / GC) * IMAGE +
                             (p_warp - p_block) * PITCH + LEFT + g % GC;
  const u32* const w_lane = w_tile + t * W_ROW + (wc * MT * 16 + g) * RS;

  float acc[NI][NG][NR][MT][4] = {};
  if (BORDER) clear(shared, KC * PLANE);
  for (int k0 = 0; k0 < K; k0 += KC * E) {
    __syncthreads();
    load_weights(w_tile, weight, k0, c0);
    copy_commit();
    load_gradient(dz_tile, from, n0, p_block, k0, N);
    copy_wait<0>();
    __syncthreads();
#pragma unroll 1
    for (int step = wk; step < KC / 8 && k0 + step * 8 * E < K; step += WK) {
      const u32* const dz = dz_lane + step * 8 * PLANE;
      const u32* const w = w_lane + step * 8 * W_ROW;
#pragma unroll
      for (int s = 0; s < S; ++s) {
        int first_q[NG];
        bool reaches[NG], any = false;
#pragma unroll
        for (int i = 0; i < NG; ++i) {
          const int group = wg * NG + i, shift = group / COLUMN_BLOCKS + PAD_W - s;
          first_q[i] = shift / STRIDE_W + group % COLUMN_BLOCKS * GC;
          reaches[i] = group < GROUPS && shift % STRIDE_W == 0 && first_q[i] + GC > 0 &&
                       first_q[i] < Q;
          any |= reaches[i];
        }
        if (!any) continue;
        u32 a[R][MT][4];
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int m = 0; m < MT; ++m) {
            const u32* const from_w = w + m * 16 * RS + r * S + s;
            a[r][m][0] = copied_operand(from_w[0]);
            a[r][m][1] = copied_operand(from_w[8 * RS]);
            a[r][m][2] = copied_operand(from_w[4 * W_ROW]);
            a[r][m][3] = copied_operand(from_w[4 * W_ROW + 8 * RS]);
          }
#pragma unroll
        for (int i = 0; i < NG; ++i) {
          if (!reaches[i]) continue;
#pragma unroll
          for (int image = 0; image < NI; ++image)
#pragma unroll
            for (int y = 0; y < YN; ++y) {
              if (p_warp + y < 0 || p_warp + y >= P) continue;
              const u32* const from_dz = dz + image * GI * IMAGE + y * PITCH + first_q[i];
              const u32 b0 = from_dz[0], b1 = from_dz[4 * PLANE];
#pragma unroll
              for (int r = 0; r < R; ++r) {
                const int h = (y + FIRST_P) * STRIDE_H + r - PAD_H;
                if (h < 0 || h >= NR) continue;
#pragma unroll
                for (int m = 0; m < MT; ++m) multiply(acc[image][i][h][m], a[r][m], b0, b1);
              }
            }
        }
      }
    }
  }

  // warps that shared the contraction hand their sums to the first one, in order
  if (WK > 1) {
    float* const sum = (float*)shared + (warp % (WARPS / WK)) * ACCUMULATORS * 32 + lane;
    float* const mine = &acc[0][0][0][0][0];
#pragma unroll 1
    for (int giver = 1; giver < WK; ++giver) {
      __syncthreads();
      if (wk == giver)
#pragma unroll
        for (int i = 0; i < ACCUMULATORS; ++i) sum[i * 32] = mine[i];
      __syncthreads();
      if (wk == 0)
#pragma unroll
        for (int i = 0; i < ACCUMULATORS; ++i) mine[i] += sum[i * 32];
    }
    if (wk > 0) return;
  }

  // a lane has pixels 2t and 2t+1 of a group
#pragma unroll
  for (int image = 0; image < NI; ++image)
#pragma unroll
    for (int i = 0; i < NG; ++i) {
      const int group = wg * NG + i, phase = group / COLUMN_BLOCKS;
      const int w0 = phase + (group % COLUMN_BLOCKS * GC + 2 * t % GC) * STRIDE_W;
      const int n = n0 + (wi * NI + image) * GI + 2 * t / GC;
      if (group >= GROUPS || n >= N) continue;
#pragma unroll
      for (int row = 0; row < NR; ++row) {
        const int h = h0 + wr * NR + row;
        if (h >= H) continue;
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int c = c0 + (wc * MT + m) * 16 + half * 8 + g;
            const float* const v = acc[image][i][row][m] + 2 * half;
            if (c >= C) continue;
            float* const to = dx + (((size_t)n * C + c) * H + h) * W + w0;
            if (STRIDE_W == 1 && W % 2 == 0) {
              if (w0 < W) *(float2*)to = make_float2(v[0], v[1]);
            } else {
              if (w0 < W) to[0] = v[0];
              if (w0 + STRIDE_W < W) to[STRIDE_W] = v[1];
            }
          }
      }
    }
}

}  // namespace data_gradient
#endif

// ================================================================ dweight, dbias
namespace weight_gradient {

// A lane contributes LANE_Q neighbouring pixels (two words) to a contraction step; the four
// lanes t cover GQ columns of GI images.
constexpr int LANE_Q = 2 * E, GQ = DW_COLUMNS, GI = 4 * LANE_Q / GQ, LANES = GQ / LANE_Q;
constexpr bool FLAT = DW_FLAT;
// A warp: MT x 16 output channels, NT x 8 columns, RT rows of taps (all S).
// A block: VK x VC x VR x VP warps over these; VP share the pixels.
constexpr int MT = DW_MT, NT = DW_NT, RT = FLAT ? 1 : DW_RT, ST = FLAT ? 1 : S;
constexpr int VK = DW_VK, VC = DW_VC, VR = DW_VR, VP = DW_VP;
static_assert(VK * VC * VR * VP == WARPS, "a block has 8 warps");
static_assert(FLAT ? VR == 1 : VR * RT >= R, "a block covers all taps");
constexpr int KT = 16 * MT * VK, K_TILES = ceil_div(K, KT);
constexpr int CT = FLAT ? C : 8 * NT * VC, C_TILES = FLAT ? 1 : ceil_div(C, CT);
static_assert(!FLAT || 8 * NT * VC >= C * RS, "a block covers all taps of all channels");

// In shared memory at a time: TP rows of TI images; a warp takes SEGMENT rows at a time.
constexpr int TI = DW_TI, TP = DW_TP, SEGMENT = DW_SEGMENT;
constexpr int QUADS = ceil_div(Q, GQ), ROW_STEPS = ceil_div(P, TP);
constexpr int UNITS = TI / GI * QUADS * (TP / SEGMENT);
static_assert(TI % GI == 0 && TP % WIN_H == 0 && TP % SEGMENT == 0, "whole windows and units");

__host__ __device__ constexpr int residue(int per_word) { return GI > 1 ? GQ / per_word % 8 : 0; }
// dz [k][image][p][q], words along q
constexpr int DZ_PITCH = round_up(QUADS * GQ / E, 4);
constexpr int DZ_IMAGE = stride(TP * DZ_PITCH, residue(E), GI > 1 ? 8 : 4);
constexpr int DZ_PLANE = stride(TI * DZ_IMAGE, 8, 32);
constexpr int DZ_ALIGN = GI > 1 && GQ / E % 4 ? 2 : 4;
// x [c][image][h][w], words along w; floats when flat, since taps start anywhere
constexpr int XE = FLAT ? 1 : E;
constexpr int LEFT = PAD_W ? round_up(PAD_W, 4 * XE) : 0;
constexpr int XR = (TP - 1) * STRIDE_H + R;
// the pixels that taps 0..S-1 of a lane meet: WINDOW words, the first pixel at number SKIP
constexpr int SKIP = FLAT ? 0 : (LEFT - PAD_W) % (2 * XE);
constexpr int WINDOW = round_up(ceil_div(SKIP + S + (LANE_Q - 1) * STRIDE_W, XE), 2);
constexpr int X_LAST = LEFT - PAD_W - SKIP + (QUADS * GQ - LANE_Q) * STRIDE_W + WINDOW * XE;
constexpr int X_PITCH = round_up(most(LEFT + W, X_LAST), 4 * XE) / XE;
constexpr int X_IMAGE = stride(XR * X_PITCH, residue(XE), GI > 1 ? 8 : 4);
constexpr int X_PLANE = stride(TI * X_IMAGE, 8, 32);
constexpr int X_ALIGN = GI > 1 && GQ / XE % 4 ? 2 : 4;
constexpr int X_RUN = run(W), X_RUNS = W / X_RUN;
// warps read a row of x for each of their RT taps, beyond the tile too if R is no multiple
constexpr int TILE_WORDS = KT * DZ_PLANE + CT * X_PLANE + most(0, VR * RT - R) * X_PITCH;
constexpr bool BORDER = PAD_W > 0 || Q % GQ != 0;
// The gradient on its way out: of all output channels, or of 8 of each warp's at a time, once
// for each of the warps that share the pixels.
constexpr int OUT_ROW = FLAT ? 8 * NT * VC : CT * RS;
constexpr int PARTS = VP * KT * OUT_ROW <= TILE_WORDS ? 1 : 2 * MT;
constexpr int PART_ROWS = KT / PARTS, PART_WORDS = PART_ROWS * OUT_ROW;
constexpr int SHARED_WORDS = most(TILE_WORDS, VP * PART_WORDS);

__device__ __forceinline__ void load_gradient(u32* tile, const Gradient& from, int n0, int N, int p0,
                                              int k0) {
  constexpr int ROWS = TP / WIN_H, ITEMS = KT * TI * ROWS * WINDOW_RUNS;
#pragma unroll 4
  for (int i = threadIdx.x; i < ITEMS; i += THREADS) {
    const int column = i % WINDOW_RUNS, row = i / WINDOW_RUNS % ROWS;
    const int image = i / (WINDOW_RUNS * ROWS) % TI, ki = i / (WINDOW_RUNS * ROWS * TI);
    const int pp = p0 / WIN_H + row, n = n0 + image, k = k0 + ki;
    if (pp >= PP || k >= K) continue;
    // beyond the batch x is 0 and dz too
    float dz[WIN_H][RUN_Q] = {};
    if (n < N)
      load_dz(dz, from, (((size_t)n * K + k) * PP + pp) * QQ + column * WINDOWS);
    u32* const to = tile + ki * DZ_PLANE + image * DZ_IMAGE + row * WIN_H * DZ_PITCH;
#pragma unroll
    for (int j = 0; j < WIN_H; ++j)
      store_pixels<E, DZ_ALIGN>(to + j * DZ_PITCH, column * RUN_Q, dz[j]);
  }
}

__device__ __forceinline__ void load_input(u32* tile, const float* __restrict__ x, int n0,
                                           int N, int p0, int c0) {
  constexpr int ITEMS = CT * TI * XR * X_RUNS;
#pragma unroll 4
  for (int i = threadIdx.x; i < ITEMS; i += THREADS) {
    const int column = i % X_RUNS, row = i / X_RUNS % XR;
    const int image = i / (X_RUNS * XR) % TI, ci = i / (X_RUNS * XR * TI);
    const int h = p0 * STRIDE_H - PAD_H + row, n = n0 + image, c = c0 + ci;
    if (c >= C) continue;
    u32* const to = tile + ci * X_PLANE + image * X_IMAGE + row * X_PITCH;
    const float* const from = x + (((size_t)n * C + c) * H + h) * W + column * X_RUN;
    const bool inside = n < N && h >= 0 && h < H;
    if (XE == 1 && inside) {
      copy_run<X_ALIGN, X_RUN>(to + LEFT + column * X_RUN, from);
      continue;
    }
    float v[X_RUN] = {};
    if (inside) load_run(v, from);
    store_pixels<XE, X_ALIGN>(to, LEFT + column * X_RUN, v);
  }
}

// pairs of bf16 came through registers
__device__ __forceinline__ u32 copied_pixel(u32 word) {
  return E == 1 ? copied_operand(word) : word;
}

// B fragment of tap s: pixels q of a lane are numbers SKIP + s + q * SW of its window.
__device__ __forceinline__ u32 pixels(const u32 (&window)[WINDOW], int s, int word) {
  const int first = SKIP + s + word * E * STRIDE_W, second = first + STRIDE_W;
  if (E == 1) return window[first];
  return __byte_perm(window[first / 2], window[second / 2],
                     (first % 2 ? 0x32 : 0x10) | (second % 2 ? 0x7600 : 0x5400));
}

__device__ __forceinline__ float sum_of(u32 word) {
  if (E == 1) return __uint_as_float(word);
  return __uint_as_float(word << 16) + __uint_as_float(word & 0xffff0000u);
}

__device__ void run_block(int block, u32* shared, const Gradient& from,
                          const float* __restrict__ x, float* __restrict__ dweight,
                          float* __restrict__ dbias, int N, int stages) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int k0 = block % K_TILES * KT, c_tile = block / K_TILES % C_TILES;
  const int split = block / (K_TILES * C_TILES), c0 = c_tile * CT;
  const int vk = warp % VK, vc = warp / VK % VC, vr = warp / (VK * VC) % VR;
  const int vp = warp / (VK * VC * VR), r0 = vr * RT;
  u32* const dz_tile = shared;
  u32* const x_tile = shared + KT * DZ_PLANE;

  float acc[MT][NT][RT][ST][4] = {};
  float bias[MT][2] = {};
  const bool with_bias = dbias && c_tile == 0 && vc == 0 && vr == 0;

  // lane's place in a step: image t / LANES, columns from (t % LANES) * LANE_Q on
  const u32* const dz_lane = dz_tile + (vk * MT * 16 + g) * DZ_PLANE + t / LANES * DZ_IMAGE +
                             t % LANES * 2;
  const u32* const x_lane =
      x_tile + (FLAT ? 0 : (vc * NT * 8 + g) * X_PLANE) + t / LANES * X_IMAGE +
      (LEFT - PAD_W - SKIP + t % LANES * LANE_Q * STRIDE_W) / XE + r0 * X_PITCH;
  int tap[NT];  // flat: where column (c, r, s) of this lane starts
#pragma unroll
  for (int n = 0; n < NT; ++n) {
    const int column = (vc * NT + n) * 8 + g;
    const int c = column / RS, r = column % RS / S, s = column % S;
    tap[n] = FLAT && column < C * RS ? c * X_PLANE + r * X_PITCH + s : 0;
  }

  if (BORDER) clear(shared, TILE_WORDS);
  const int end = least((split + 1) * stages, ceil_div(N, TI) * ROW_STEPS);
#pragma unroll 1
  for (int stage = split * stages; stage < end; ++stage) {
    const int n0 = stage / ROW_STEPS * TI, p0 = stage % ROW_STEPS * TP;
    __syncthreads();
    load_input(x_tile, x, n0, N, p0, c0);
    copy_commit();
    load_gradient(dz_tile, from, n0, N, p0, k0);
    copy_wait<0>();
    __syncthreads();
#pragma unroll 1
    for (int unit = vp; unit < UNITS; unit += VP) {
      const int quad = unit % QUADS, image = unit / QUADS % (TI / GI) * GI;
      const int p_begin = unit / (QUADS * (TI / GI)) * SEGMENT;
      const int p_end = least(p_begin + SEGMENT, P - p0);
      const u32* dz = dz_lane + image * DZ_IMAGE + p_begin * DZ_PITCH + quad * (GQ / E);
      const u32* xs = x_lane + image * X_IMAGE + p_begin * STRIDE_H * X_PITCH +
                      quad * GQ * STRIDE_W / XE;
      // rows of x that the taps of the next p share with this one
      constexpr int KEPT = FLAT || RT < STRIDE_H ? 0 : RT - STRIDE_H;
      u32 window[RT][NT][WINDOW];
#pragma unroll
      for (int r = 0; r < KEPT; ++r)
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int i = 0; i < WINDOW; i += 2) {
            const uint2 v = *(const uint2*)(xs + n * 8 * X_PLANE + r * X_PITCH + i);
            window[r + RT - KEPT][n][i] = copied_pixel(v.x);
            window[r + RT - KEPT][n][i + 1] = copied_pixel(v.y);
          }
#pragma unroll 1
      for (int p = p_begin; p < p_end; ++p, dz += DZ_PITCH, xs += STRIDE_H * X_PITCH) {
        u32 a[MT][4];
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          const uint2 low = *(const uint2*)(dz + m * 16 * DZ_PLANE);
          const uint2 high = *(const uint2*)(dz + (m * 16 + 8) * DZ_PLANE);
          a[m][0] = low.x, a[m][1] = high.x, a[m][2] = low.y, a[m][3] = high.y;
          if (with_bias) {
            bias[m][0] += sum_of(low.x) + sum_of(low.y);
            bias[m][1] += sum_of(high.x) + sum_of(high.y);
          }
        }
        if (FLAT) {
#pragma unroll
          for (int n = 0; n < NT; ++n) {
            u32 b[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const u32* const v = xs + tap[n] + i * E * STRIDE_W;
              b[i] = E == 1 ? copied_operand(v[0]) : pack_bf16(__uint_as_float(v[0]), __uint_as_float(v[STRIDE_W]));
            }
#pragma unroll
            for (int m = 0; m < MT; ++m) multiply(acc[m][n][0][0], a[m], b[0], b[1]);
          }
          continue;
        }
#pragma unroll
        for (int r = 0; r < RT; ++r) {
#pragma unroll
          for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int i = 0; i < WINDOW; i += 2) {
              if (r < KEPT) {
                window[r][n][i] = window[r + RT - KEPT][n][i];
                window[r][n][i + 1] = window[r + RT - KEPT][n][i + 1];
              } else {
                const uint2 v = *(const uint2*)(xs + n * 8 * X_PLANE + r * X_PITCH + i);
                window[r][n][i] = copied_pixel(v.x), window[r][n][i + 1] = copied_pixel(v.y);
              }
            }
          // the last of the VR warps may have fewer rows of taps
          if (VR * RT > R && r0 + r >= R) continue;
#pragma unroll
          for (int s = 0; s < ST; ++s)
#pragma unroll
            for (int n = 0; n < NT; ++n) {
              const u32 b0 = pixels(window[r][n], s, 0), b1 = pixels(window[r][n], s, 1);
#pragma unroll
              for (int m = 0; m < MT; ++m) multiply(acc[m][n][r][s], a[m], b0, b1);
            }
        }
      }
    }
  }

  // Out through shared memory, so that stores to global memory are whole rows, and so that
  // what warps made of different pixels is added in order.
  float* const out = (float*)shared;
#pragma unroll
  for (int part = 0; part < PARTS; ++part) {
    __syncthreads();
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (PARTS > 1 && part != m * 2 + half) continue;
        const int row = PARTS > 1 ? vk * 8 + g : (vk * MT + m) * 16 + half * 8 + g;
        float* const to = out + vp * PART_WORDS + row * OUT_ROW;
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int r = 0; r < RT; ++r)
#pragma unroll
            for (int s = 0; s < ST; ++s) {
              if (!FLAT && r0 + r >= R) continue;
              const int column = (vc * NT + n) * 8 + 2 * t;
              const int at = FLAT ? column : column * RS + (r0 + r) * S + s;
              to[at] = acc[m][n][r][s][2 * half];
              to[at + (FLAT ? 1 : RS)] = acc[m][n][r][s][2 * half + 1];
            }
      }
    __syncthreads();
#pragma unroll 2
    for (int i = threadIdx.x; i < PART_WORDS; i += THREADS) {
      const int row = i / OUT_ROW, at = i % OUT_ROW;
      const int k = k0 + (PARTS > 1 ? (row / 8 * MT + part / 2) * 16 + part % 2 * 8 + row % 8 : row);
      if (k >= K || c0 * RS + at >= C * RS) continue;
      float sum = out[i];
#pragma unroll
      for (int giver = 1; giver < VP; ++giver) sum += out[giver * PART_WORDS + i];
      dweight[((size_t)split * K + k) * (C * RS) + c0 * RS + at] = sum;
    }
  }

  // the four lanes t of a channel, then the warps that shared the pixels
  if (dbias && c_tile == 0) {
    __syncthreads();
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float v = bias[m][half];
        v += __shfl_xor_sync(~0u, v, 1);
        v += __shfl_xor_sync(~0u, v, 2);
        if (with_bias && t == 0) out[vp * KT + (vk * MT + m) * 16 + half * 8 + g] = v;
      }
    __syncthreads();
    for (int i = threadIdx.x; i < KT && k0 + i < K; i += THREADS) {
      float v = 0.0f;
      for (int giver = 0; giver < VP; ++giver) v += out[giver * KT + i];
      dbias[(size_t)split * K + k0 + i] = v;
    }
  }
}

}  // namespace weight_gradient

#if NEED_DX
constexpr int SHARED_WORDS =
    most(data_gradient::SHARED_WORDS, weight_gradient::SHARED_WORDS);
#else
constexpr int SHARED_WORDS = weight_gradient::SHARED_WORDS;
#endif
static_assert(SHARED_WORDS * 4 <= SHARED, "the host counts the same bytes");

// stages: of a split, of the ceil(N / DW_TI) * ceil(P / DW_TP) that there are.
// dweight (splits, K, C, R, S), dbias (splits, K) or null.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    conv_block_backward(const float* __restrict__ dy, const float* __restrict__ y,
                        const u8* __restrict__ code, const float* __restrict__ x,
                        const float* __restrict__ weight, float* __restrict__ dx,
                        float* __restrict__ dweight, float* __restrict__ dbias, int N,
                        int dw_blocks, int stages) {
  extern __shared__ uint4 shared[];
  const Gradient from = {dy, y, code};
  wait_for_earlier_kernels();
  let_next_kernel_start();
  const int block = blockIdx.x;
  if (block < dw_blocks)
    weight_gradient::run_block(block, (u32*)shared, from, x, dweight, dbias, N, stages);
#if NEED_DX
  else
    data_gradient::run_block(block - dw_blocks, (u32*)shared, from, weight, dx, N);
#endif
}
