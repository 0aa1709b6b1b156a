// Backward of the fused block  y = maxpool(relu(conv(x, weight) + bias)).
//
// Shapes are compile-time constants but for the batch N:
//   x, dx (N, C, H, W)   weight (K, C, R, S)   z (N, K, P, Q)
//   y, dy, code (N, K, PP, QQ)
// With SH, SW the strides and h = p*SH + r - PAD_H, w = q*SW + s - PAD_W:
//   z[n,k,p,q] = bias[k] + sum over c, r, s of x[n,c,h,w] weight[k,c,r,s]
//
// 1. dz, the gradient at the convolution's output. A pooled value is the z of one place
//    of its window, so dz is dy there and 0 elsewhere; code says where (0: nowhere,
//    since relu cut it off). Without a pool dz = dy where relu let y through. dz is
//    rebuilt while it is loaded into shared memory and never exists in global memory.
//    Rows and columns of z that no window covers have dz = 0: P and Q below count only
//    covered ones.
// 2. dx[n,c,h,w] = sum over k and all (p, r), (q, s) that lead to h, w, of
//    dz[n,k,p,q] weight[k,c,r,s].
//    As a product: channels c (rows) x groups of 8 pixels (columns), contraction over
//    k. A group lies in one row h, and its columns are w, w + SW, w + 2 SW ... so that
//    for a tap s either all or none have a q, and the q are neighbours. A warp holds
//    groups of several rows h: a fragment of dz row p is read once for all taps r and
//    added to rows h = p*SH + r - PAD_H. Taps that meet only the border are skipped,
//    not multiplied.
// 3. dweight[k,c,r,s] = sum over n, p, q of dz[n,k,p,q] x[n,c,h,w].
//    As a product for each tap: k (rows) x c (columns), contraction over pixels. A warp
//    walks down the rows p; a fragment of dz is read once for all taps, a row of x once
//    for all taps s and kept in registers for the taps r of the next rows.
//    The pixels are split over blocks; each writes a partial gradient, and update.cu
//    adds the partials in order: no atomics, equal bits in every run.
//    With few input channels (DW_FLAT) the columns are (c, r, s) together.
// 4. dbias[k] = sum over n, p, q of dz[n,k,p,q], from the fragments of dz on their way.
//
// The operands are WORDS along the contraction (fused.cuh): one float, or a pair of
// bf16 (neighbouring k in 2., neighbouring q in 3.). A pixel's or channel's place is
// only a constant offset from an address of the lane: strides between channels, images
// and rows are chosen so that the 32 lanes meet 32 banks.
//
// Launch: 256 threads, SHARED bytes (both: conv_backward_plan.py). Blocks 0 ..
// dx_blocks-1 work on dx (c tile fastest, then row tile, then image tile), the others
// on dweight (k tile fastest, then c tile, then split). Compute capability 8.0 and up.
#include "backward.cuh"

constexpr bool POOLED = POOL_H > 0;
constexpr int WIN_H = POOLED ? POOL_H : 1, WIN_W = POOLED ? POOL_W : 1;
constexpr int PP = ((H + 2 * PAD_H - R) / STRIDE_H + 1) / WIN_H;
constexpr int QQ = ((W + 2 * PAD_W - S) / STRIDE_W + 1) / WIN_W;
constexpr int P = PP * WIN_H, Q = QQ * WIN_W;
constexpr int RS = R * S;

__host__ __device__ constexpr int floor_div(int a, int b) {
  return a >= 0 ? a / b : -((b - 1 - a) / b);
}

// ALIGN: words that the target is a multiple of
template <int ALIGN, int COUNT>
__device__ __forceinline__ void store_words(u32* to, const u32 (&v)[COUNT]) {
  if (ALIGN % 4 == 0 && COUNT % 4 == 0) {
#pragma unroll
    for (int i = 0; i < COUNT; i += 4)
      *(uint4*)(to + i) =
          make_uint4(v[i], v[i + 1 < COUNT ? i + 1 : 0], v[i + 2 < COUNT ? i + 2 : 0],
                     v[i + 3 < COUNT ? i + 3 : 0]);
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
__device__ __forceinline__ void store_pixels(u32* tile, int element,
                                             const float (&v)[COUNT]) {
  if (PER_WORD == 1) {
    u32 words[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) words[i] = operand(v[i]);
    store_words<ALIGN>(tile + element, words);
  } else if (COUNT % 2 == 0) {
    constexpr int PAIRS = COUNT / 2 > 0 ? COUNT / 2 : 1;
    u32 words[PAIRS];
#pragma unroll
    for (int i = 0; i < PAIRS; ++i)
      words[i] = pack_bf16(v[2 * i], v[2 * i + 1 < COUNT ? 2 * i + 1 : 0]);
    store_words<ALIGN>(tile + element / 2, words);
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
      ((u16*)tile)[element + i] = (u16)pack_bf16(v[i], 0.0f);
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
__device__ __forceinline__ void load_dz(float (&dz)[WIN_H][RUN_Q], const Gradient& from,
                                        size_t at) {
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
// Rows of dz in shared memory, from row TILE_P + h0 / SH on; a tile of whole images
// needs no border.
constexpr int TILE_P = ROW_TILES == 1 ? most(FIRST_P, 0) : FIRST_P;
constexpr int YT =
    ROW_TILES == 1 ? least(FIRST_P + rows_of_dz(TH), P) - TILE_P : rows_of_dz(TH);

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
constexpr int ALIGN = GC >= 4 ? 4 : 2;
// weights [k word][c][r][s]
constexpr int W_ROW = stride(CT * RS, 8 * RS % 32, 32);
constexpr int W_RUN = run(C * RS) < run(CT * RS) ? run(C * RS) : run(CT * RS);
constexpr int TILE_WORDS = KC * (PLANE + W_ROW);
// Otherwise every word of dz that is used is loaded: pixels of images beyond the batch
// are columns that nobody stores.
constexpr bool BORDER =
    column_bound(false) < 0 || column_bound(true) > Q || K % (KC * E) != 0;
constexpr int ACCUMULATORS = NI * NG * NR * MT * 4;
constexpr int SUM_WORDS = WK > 1 ? WARPS * ACCUMULATORS * 32 : 0;
constexpr int SHARED_WORDS = most(TILE_WORDS, SUM_WORDS);

__device__ __forceinline__ void load_gradient(u32* tile, const Gradient& from, int n0,
                                              int p0, int k0, int N) {
  // rows of windows that can touch YT rows
  constexpr int ROWS = (YT + WIN_H - 2) / WIN_H + 1;
  const int first = floor_div(p0, WIN_H);
  for_all<KC * TI, ROWS * WINDOW_RUNS, 4>([&](int plane, int item) {
    const int column = item % WINDOW_RUNS, pp = first + item / WINDOW_RUNS;
    const int image = plane % TI, word = plane / TI, n = n0 + image, k = k0 + word * E;
    const int y = pp * WIN_H - p0;
    if (pp < 0 || pp >= PP || y >= YT || n >= N || k >= K) return;
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
  });
}

__device__ __forceinline__ void load_weights(u32* tile,
                                             const float* __restrict__ weight, int k0,
                                             int c0) {
  for_all<KC, CT * RS / W_RUN, 8>([&](int word, int item) {
    const int at = item * W_RUN, k = k0 + word * E;
    const bool inside = c0 * RS + at < C * RS;
    const float* from = weight + ((size_t)k * C + c0) * RS + at;
    if (E == 1 && inside && k < K) {
      copy_run<4, W_RUN>(tile + word * W_ROW + at, from);
      return;
    }
    float low[W_RUN] = {}, high[W_RUN] = {};
    if (inside && k < K) load_run(low, from);
    if (E == 2 && inside && k + 1 < K) load_run(high, from + C * RS);
    u32 words[W_RUN];
#pragma unroll
    for (int j = 0; j < W_RUN; ++j) words[j] = E == 2 ? pack_bf16(low[j], high[j]) : 0u;
    store_words<4>(tile + word * W_ROW + at, words);
  });
}

__device__ void run_block(int block, u32* shared, const Gradient& from,
                          const float* __restrict__ weight, float* __restrict__ dx,
                          int N) {
  const int lane = threadIdx.x % 32, warp = warp_index(), g = lane / 4, t = lane % 4;
  const int c0 = block % C_TILES * CT, h0 = block / C_TILES % ROW_TILES * TH;
  const int n0 = block / (C_TILES * ROW_TILES) * TI;
  const int wk = warp / (WC * WG * WR * WI), wc = warp % WC;
  const int wg = WG == 1 ? 0 : warp / WC % WG, wr = WR == 1 ? 0 : warp / (WC * WG) % WR;
  const int wi = WI == 1 ? 0 : warp / (WC * WG * WR) % WI;
  // first row of dz of the block's tile and of this warp's strip
  const int p_block = h0 / STRIDE_H + TILE_P;
  const int p_warp =
      (ROW_TILES == 1 ? 0 : h0 / STRIDE_H) + wr * (NR / STRIDE_H) + FIRST_P;
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
        Rows a[R][MT];
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int m = 0; m < MT; ++m) {
            const u32* const from_w = w + m * 16 * RS + r * S + s;
            a[r][m].set(copied_word(from_w[0]), copied_word(from_w[8 * RS]),
                        copied_word(from_w[4 * W_ROW]),
                        copied_word(from_w[4 * W_ROW + 8 * RS]));
          }
#pragma unroll
        for (int y = 0; y < YN; ++y) {
          if (p_warp + y < 0 || p_warp + y >= P) continue;
#pragma unroll
          for (int i = 0; i < NG; ++i) {
            if (!reaches[i]) continue;
#pragma unroll
            for (int image = 0; image < NI; ++image) {
              const u32* const from_dz =
                  dz + image * GI * IMAGE + y * PITCH + first_q[i];
              const u32 b0 = from_dz[0], b1 = from_dz[4 * PLANE];
#pragma unroll
              for (int r = 0; r < R; ++r) {
                const int h = (y + FIRST_P) * STRIDE_H + r - PAD_H;
                if (h < 0 || h >= NR) continue;
#pragma unroll
                for (int m = 0; m < MT; ++m)
                  multiply(acc[image][i][h][m], a[r][m], b0, b1);
              }
            }
          }
        }
      }
    }
  }

  // warps that shared the contraction exchange their sums: each adds, in the same
  // order, those of its share of the rows
  float* const sums = (float*)shared + (warp % (WARPS / WK)) * ACCUMULATORS * 32 + lane;
  constexpr int GIVEN = WARPS / WK * ACCUMULATORS * 32;
  if (WK > 1) {
    const float* const mine = &acc[0][0][0][0][0];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < ACCUMULATORS; ++i) sums[wk * GIVEN + i * 32] = mine[i];
    __syncthreads();
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
        if (h >= H || WK > 1 && (i * NR + row) % WK != wk) continue;
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int c = c0 + (wc * MT + m) * 16 + half * 8 + g;
            float v[2] = {acc[image][i][row][m][2 * half],
                          acc[image][i][row][m][2 * half + 1]};
            if (WK > 1) {
              const int at =
                  ((((image * NG + i) * NR + row) * MT + m) * 4 + 2 * half) * 32;
              v[0] = sums[at], v[1] = sums[at + 32];
#pragma unroll
              for (int giver = 1; giver < WK; ++giver)
                v[0] += sums[giver * GIVEN + at], v[1] += sums[giver * GIVEN + at + 32];
            }
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

// A contraction step takes 8 words of pixels: GQ columns, GW words, of GI images. Lane
// t has words t and t + 4. With GW = 8 the second is 4 words further in the row,
// otherwise it is in another image. (Tap s needs the pixels from s on: neighbouring
// words would be the low word of one tap and the high word of another, and registers
// would have to be moved for each product; words that are 4 apart are not shared up to
// s = 3.)
constexpr int GQ = DW_COLUMNS, GW = GQ / E, GI = 8 / GW;
constexpr bool FLAT = DW_FLAT;
// A warp: MT x 16 output channels, NT x 8 columns, RT rows of taps (all S).
// A block: VK x VC x VR x VP warps over these; VP share the pixels.
constexpr int MT = DW_MT, NT = DW_NT, RT = FLAT ? 1 : DW_RT, ST = FLAT ? 1 : S;
constexpr int VK = DW_VK, VC = DW_VC, VR = DW_VR, VP = DW_VP;
static_assert(VK * VC * VR * VP == WARPS, "a block has 8 warps");
static_assert(FLAT ? VR == 1 : VR * RT >= R, "a block covers all taps");
constexpr int KT = 16 * MT * VK, K_TILES = ceil_div(K, KT);
constexpr int CT = FLAT ? C : 8 * NT * VC, C_TILES = FLAT ? 1 : ceil_div(C, CT);
static_assert(!FLAT || 8 * NT * VC >= C * RS,
              "a block covers all taps of all channels");

// A stage, what is in shared memory at a time: TP rows of TI images. A warp takes
// SEGMENT rows at a time.
constexpr int TI = DW_TI, TP = DW_TP, SEGMENT = DW_SEGMENT;
constexpr int QUADS = ceil_div(Q, GQ), ROW_STEPS = ceil_div(P, TP);
// rows whose code is laid out one behind the other: the window then needs no moves
constexpr int ROWS_TOGETHER = FLAT ? 2 : STRIDE_H == 1 && RT * S <= 15 ? RT : 1;
constexpr int UNITS = TI / GI * QUADS * (TP / SEGMENT);
static_assert(TI % GI == 0 && TP % WIN_H == 0 && TP % SEGMENT == 0,
              "whole windows and units");

// dz [k][image][p][q], words along q
constexpr int DZ_PITCH = round_up(QUADS * GQ / E, 4);
constexpr int ALIGN = GW == 2 ? 2 : 4;
constexpr int DZ_IMAGE = stride(TP * DZ_PITCH, ALIGN % 4, 4);
constexpr int DZ_PLANE = stride(TI * DZ_IMAGE, 4, 32);
constexpr int DZ_SECOND = GW == 8 ? 4 : 4 / GW * DZ_IMAGE;
// x [c][image][h][w], words along w; floats when flat, since taps start anywhere
constexpr int XE = FLAT ? 1 : E;
constexpr int LEFT = PAD_W ? round_up(PAD_W, 4 * XE) : 0;
constexpr int XR = (TP - 1) * STRIDE_H + R;
// pixels that taps 0..S-1 of a word meet: WINDOW words, the first at number SKIP
constexpr int SKIP = FLAT ? 0 : (LEFT - PAD_W) % XE;
constexpr int WINDOW = ceil_div(SKIP + S + (E - 1) * STRIDE_W, XE);
constexpr int X_LAST = LEFT - PAD_W - SKIP + (QUADS * GQ - E) * STRIDE_W + WINDOW * XE;
constexpr int X_PITCH = round_up(most(LEFT + W, X_LAST), 4 * XE) / XE;
constexpr int X_IMAGE = stride(XR * X_PITCH, ALIGN % 4, 4);
constexpr int X_PLANE = stride(TI * X_IMAGE, 4 * STRIDE_W, 32);
constexpr int X_SECOND = GW == 8 ? 4 * E * STRIDE_W / XE : 4 / GW * X_IMAGE;
constexpr int X_RUN = run(W), X_RUNS = W / X_RUN;
// warps read a row of x for each of their RT taps, some beyond the last row of taps
constexpr int BEYOND = most(0, VR * RT - R) * X_PITCH;
constexpr int TILE_WORDS = KT * DZ_PLANE + CT * X_PLANE + BEYOND;
constexpr bool BORDER = PAD_W > 0 || Q % GQ != 0;
// The gradient on its way out: of all output channels, or of 8 of each warp's at a
// time, once for each of the warps that share the pixels.
constexpr int OUT_ROW = FLAT ? 8 * NT * VC : CT * RS;
constexpr int PARTS = VP * KT * OUT_ROW <= TILE_WORDS ? 1 : 2 * MT;
constexpr int PART_ROWS = KT / PARTS, PART_WORDS = PART_ROWS * OUT_ROW;
constexpr int SHARED_WORDS = most(TILE_WORDS, VP * PART_WORDS);

__device__ __forceinline__ void load_gradient(u32* tile, const Gradient& from, int n0,
                                              int N, int p0, int k0) {
  for_all<KT * TI, TP / WIN_H * WINDOW_RUNS, 4>([&](int plane, int item) {
    const int column = item % WINDOW_RUNS, row = item / WINDOW_RUNS;
    const int image = plane % TI, ki = plane / TI;
    const int n = n0 + image, k = k0 + ki, pp = p0 / WIN_H + row;
    if (pp >= PP || k >= K) return;
    // beyond the batch x is 0 and dz too
    float dz[WIN_H][RUN_Q] = {};
    if (n < N)
      load_dz(dz, from, (((size_t)n * K + k) * PP + pp) * QQ + column * WINDOWS);
    u32* const to = tile + ki * DZ_PLANE + image * DZ_IMAGE + row * WIN_H * DZ_PITCH;
#pragma unroll
    for (int j = 0; j < WIN_H; ++j)
      store_pixels<E, ALIGN>(to + j * DZ_PITCH, column * RUN_Q, dz[j]);
  });
}

__device__ __forceinline__ void load_input(u32* tile, const float* __restrict__ x,
                                           int n0, int N, int p0, int c0) {
  for_all<CT * TI, XR * X_RUNS, 8>([&](int plane, int item) {
    const int column = item % X_RUNS, row = item / X_RUNS;
    const int image = plane % TI, ci = plane / TI;
    const int n = n0 + image, c = c0 + ci, h = p0 * STRIDE_H - PAD_H + row;
    if (c >= C) return;
    u32* const to = tile + ci * X_PLANE + image * X_IMAGE + row * X_PITCH;
    const float* const from = x + (((size_t)n * C + c) * H + h) * W + column * X_RUN;
    const bool inside = n < N && h >= 0 && h < H;
    if (XE == 1 && inside) {
      copy_run<ALIGN, X_RUN>(to + LEFT + column * X_RUN, from);
      return;
    }
    float v[X_RUN] = {};
    if (inside) load_run(v, from);
    store_pixels<XE, ALIGN>(to, LEFT + column * X_RUN, v);
  });
}

// The word of tap s: pixels SKIP + s of the window and, in bf16, one stride further.
__device__ __forceinline__ u32 pixels(const u32 (&window)[WINDOW], int s) {
  const int first = SKIP + s, second = first + STRIDE_W;
  if (E == 1) return window[first];
  if (STRIDE_W == 1 && first % 2 == 0) return window[first / 2];
  return __byte_perm(window[first / 2], window[second / 2],
                     (first % 2 ? 0x32 : 0x10) | (second % 2 ? 0x7600 : 0x5400));
}

// The windows of both words of a lane.
__device__ __forceinline__ void load_windows(u32 (&windows)[2][WINDOW], const u32* x) {
#pragma unroll
  for (int word = 0; word < 2; ++word)
#pragma unroll
    for (int i = 0; i < WINDOW; ++i)
      windows[word][i] = copied_word(x[word * X_SECOND + i]);
}

__device__ void run_block(int block, u32* shared, const Gradient& from,
                          const float* __restrict__ x, float* __restrict__ dweight,
                          float* __restrict__ dbias, int N, int stages) {
  const int lane = threadIdx.x % 32, warp = warp_index(), g = lane / 4, t = lane % 4;
  const int k0 = block % K_TILES * KT, c_tile = block / K_TILES % C_TILES;
  const int split = block / (K_TILES * C_TILES), c0 = c_tile * CT;
  const int vk = warp % VK, vc = warp / VK % VC, vr = warp / (VK * VC) % VR;
  const int vp = warp / (VK * VC * VR), r0 = vr * RT;
  u32* const dz_tile = shared;
  u32* const x_tile = shared + KT * DZ_PLANE;

  float acc[MT][NT][RT][ST][4] = {};
  float bias[MT][2] = {};
  const bool with_bias = dbias && c_tile == 0 && vc == 0 && vr == 0;

  // a lane's first word of a step: of image t / GW, word t % GW of the row
  const u32* const dz_lane =
      dz_tile + (vk * MT * 16 + g) * DZ_PLANE + t / GW * DZ_IMAGE + t % GW;
  const u32* const x_lane =
      x_tile + (FLAT ? 0 : (vc * NT * 8 + g) * X_PLANE) + t / GW * X_IMAGE +
      (LEFT - PAD_W - SKIP + t % GW * E * STRIDE_W) / XE + r0 * X_PITCH;
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
      const u32* dz = dz_lane + image * DZ_IMAGE + p_begin * DZ_PITCH + quad * GW;
      const u32* xs = x_lane + image * X_IMAGE + p_begin * STRIDE_H * X_PITCH +
                      quad * GQ * STRIDE_W / XE;
      // rows of x that the taps of the next p share with this one
      constexpr int KEPT = FLAT || RT < STRIDE_H ? 0 : RT - STRIDE_H;
      u32 windows[RT][NT][2][WINDOW];
#pragma unroll
      for (int r = 0; r < KEPT; ++r)
#pragma unroll
        for (int n = 0; n < NT; ++n)
          load_windows(windows[r + RT - KEPT][n], xs + n * 8 * X_PLANE + r * X_PITCH);
#pragma unroll ROWS_TOGETHER
      for (int p = p_begin; p < p_end; ++p, dz += DZ_PITCH, xs += STRIDE_H * X_PITCH) {
        Rows a[MT];
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          const u32* const from_dz = dz + m * 16 * DZ_PLANE;
          const u32 low[2] = {from_dz[0], from_dz[DZ_SECOND]};
          const u32 high[2] = {from_dz[8 * DZ_PLANE],
                               from_dz[8 * DZ_PLANE + DZ_SECOND]};
          a[m].set(low[0], high[0], low[1], high[1]);
          if (with_bias) {
            bias[m][0] += sum_of(low[0]) + sum_of(low[1]);
            bias[m][1] += sum_of(high[0]) + sum_of(high[1]);
          }
        }
        if (FLAT) {
#pragma unroll
          for (int n = 0; n < NT; ++n) {
            u32 b[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const u32* const v = xs + tap[n] + i * X_SECOND;
              b[i] = E == 1 ? copied_operand(v[0])
                            : pack_bf16(__uint_as_float(v[0]),
                                        __uint_as_float(v[STRIDE_W]));
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
            if (r >= KEPT) {
              load_windows(windows[r][n], xs + n * 8 * X_PLANE + r * X_PITCH);
            } else {
#pragma unroll
              for (int i = 0; i < 2 * WINDOW; ++i)
                windows[r][n][i / WINDOW][i % WINDOW] =
                    windows[r + RT - KEPT][n][i / WINDOW][i % WINDOW];
            }
          // the last of the VR warps may have fewer rows of taps
          if (VR * RT > R && r0 + r >= R) continue;
#pragma unroll
          for (int s = 0; s < ST; ++s)
#pragma unroll
            for (int n = 0; n < NT; ++n) {
              const u32 b0 = pixels(windows[r][n][0], s);
              const u32 b1 = pixels(windows[r][n][1], s);
#pragma unroll
              for (int m = 0; m < MT; ++m) multiply(acc[m][n][r][s], a[m], b0, b1);
            }
        }
      }
    }
  }

  // Out through shared memory, so that stores to global memory are whole rows, and so
  // that what warps made of different pixels is added in order.
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
      const int of_part = (row / 8 * MT + part / 2) * 16 + part % 2 * 8 + row % 8;
      const int k = k0 + (PARTS > 1 ? of_part : row);
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
static_assert(SHARED_WORDS * 4 == SHARED, "the host counts the same bytes");

// stages: of a split, of the ceil(N / DW_TI) * ceil(P / DW_TP) that there are.
// dweight (splits, K, C, R, S), dbias (splits, K) or null.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    conv_block_backward(const float* __restrict__ dy, const float* __restrict__ y,
                        const u8* __restrict__ code, const float* __restrict__ x,
                        const float* __restrict__ weight, float* __restrict__ dx,
                        float* __restrict__ dweight, float* __restrict__ dbias, int N,
                        int dx_blocks, int stages) {
  extern __shared__ uint4 shared[];
  const Gradient from = {dy, y, code};
  wait_for_earlier_kernels();
  let_next_kernel_start();
  const int block = blockIdx.x;
#if NEED_DX
  if (block < dx_blocks) {
    data_gradient::run_block(block, (u32*)shared, from, weight, dx, N);
    return;
  }
#endif
  weight_gradient::run_block(block - dx_blocks, (u32*)shared, from, x, dweight, dbias,
                             N, stages);
}
