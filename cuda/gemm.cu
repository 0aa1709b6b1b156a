// Matrix products: linear layers, and convolutions after im2col (conv.cu).
//
//   C[b] = op(A[b]) op(B[b]) + bias      for each b < batch (groups of channels)
//   C[m,n] = sum over k < K of A[m,k] B[k,n]
//
// Derivatives are products again: dA = dC B^T and dB = A^T dC.
//
// The plain version, which the tiled ones below must equal:
//   for m < M: for n < N: { sum = 0; for k < K: sum += A[m,k] * B[k,n]; C[m,n] = sum; }
//
// Layout. A matrix lies in memory as rows of contiguous elements, `pitch` apart. Which
// index runs along the rows is part of the kernel's name, one letter for A and one for
// B: n as written above (rows of A hold k, rows of B hold n), t transposed (rows of A
// hold m, rows of B hold k).
// The contiguous index j may run over a stack of images instead: element j of a row is
//   row * pitch + (j / segment) * stack + j % segment
// so that (N, K, P*Q) with segment = P*Q, pitch = P*Q, stack = K*P*Q is the matrix of K
// rows and N*P*Q columns, without moving anything. All three matrices share `segment`;
// one that is not stacked has stack == segment, which makes j plain.
//
// Tiling. A block computes a tile of C in registers, a warp 32 x 64 of it, while strips
// of A and B pass through shared memory: the next strip is on its way to registers
// while the current one is multiplied. Strips are stored k-major, [k][m] and [k][n],
// in words of 32 bits: a float, a tf32 number, or two bf16 numbers of consecutive k.
// Small tiles have too few warps to keep an SM busy, so several warps (slices) share
// one part of the tile, each taking some of the k; their sums are joined in the end.
// Products with few tiles and a long K are split over gridDim.z blocks the same way;
// each writes its own partial C, and gemm_finish adds them. No sum depends on timing.
//
// Precision. fp32 multiplies in IEEE single precision; tf32 and bf16 round A and B to
// nearest on the way to shared memory and use the tensor cores. Sums are float32.
// Before compute capability 8.0 all three are fp32.
#include "common.cuh"

enum Precision { FP32, TF32, BF16 };

// Tile of a block: WARPS_M x WARPS_N warps of 32 x 64 elements, SLICES of them deep.
template <int WARPS_M_, int WARPS_N_, int SLICES_, int WORDS_>
struct Tile {
  static constexpr int WARPS_M = WARPS_M_, WARPS_N = WARPS_N_, SLICES = SLICES_;
  static constexpr int THREADS = WARPS_M * WARPS_N * SLICES * WARP;
  static constexpr int M = WARPS_M * 32, N = WARPS_N * 64;
  static constexpr int WORDS = WORDS_;  // depth of a strip
};

typedef Tile<2, 1, 4, 32> Tile64;   // 64 x 64
typedef Tile<4, 2, 1, 16> Tile128;  // 128 x 128

// Shared memory keeps element e of word row w at w * (E + 8) + (e ^ swizzle(w)). The 8
// words of padding let the lanes of a warp read a fragment (4 rows, 8 elements) without
// bank conflicts, the swizzle lets them write one (8 elements of 4 times 4 rows).
constexpr int PADDING = 8;
DEVICE int swizzle(int word_row) { return (word_row / 4 % 4) * 8; }

// ------------------------------------------------------------------ global memory

// Where element j of a row of stacked images lies; see Layout.
// j / length is done by multiplication: with s = ceil(log2 length) and
// magic = ceil(2^(31+s) / length) it is exactly (j * magic) >> (31 + s) for j < 2^31.
struct Segment {
  int length;
  uint32 magic;
  int shift;

  METHOD Segment(int length_, uint32 magic_)
      : length(length_), magic(magic_), shift(32 - __clz(length_ - 1)) {}
  METHOD uint32 offset(int j, int stack) const {
    const int image = __umulhi(2u * j, magic) >> shift;
    return image * stack + (j - image * length);
  }
};

// One operand: rows of contiguous elements, of which the first so many exist.
struct Matrix {
  const float* data;
  int pitch, stack;
  int rows, columns;
  bool vectors;  // 4 elements from a multiple of 4 on are 16 aligned bytes
};

DEVICE bool has_vectors(const float* data, int pitch, int stack, int segment) {
  return aligned16(data) && pitch % 4 == 0 &&
         (stack == segment || (stack % 4 == 0 && segment % 4 == 0));
}

// Elements j .. j + 3 of a row, zeros after the first `count` of them.
DEVICE void load4(float* v, const Matrix& m, const Segment& segment, int row, int j,
                  int count) {
  const uint32 first = (uint32)row * m.pitch;
  if (m.vectors && count >= 4) {
    const float4 four = *(const float4*)(m.data + (first + segment.offset(j, m.stack)));
    v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      v[i] = i < count ? m.data[first + segment.offset(j + i, m.stack)] : 0.0f;
  }
}

// One thread's share of a strip of E elements (m or n) by T::WORDS words of k: loaded
// from global memory to registers, later stored to shared memory.
template <Precision PRECISION, class T, int E, bool TRANSPOSED>
struct Strip;

template <Precision PRECISION>
constexpr int k_per_word = PRECISION == BF16 ? 2 : 1;

template <Precision PRECISION>
DEVICE uint32 make_word(float low, float high) {
#if __CUDA_ARCH__ >= 800
  if constexpr (PRECISION == TF32) return tf32_word(low);
  if constexpr (PRECISION == BF16) return bf16_word(low, high);
#endif
  return __float_as_uint(low);
}

// Rows hold e: a thread loads 4 neighbouring e of one word row and stores 4 words.
template <Precision PRECISION, class T, int E>
struct Strip<PRECISION, T, E, false> {
  static constexpr int K_PER_WORD = k_per_word<PRECISION>;
  static constexpr int ROWS_A_PASS = T::THREADS / (E / 4);
  static constexpr int PASSES = T::WORDS / ROWS_A_PASS;

  int e, word_row;
  float loaded[PASSES][K_PER_WORD][4];

  METHOD Strip() {
    e = threadIdx.x % (E / 4) * 4;
    word_row = threadIdx.x / (E / 4);
  }

  METHOD void load(const Matrix& matrix, const Segment& segment, int e_first,
                   int k_first) {
    const int j = e_first + e, count = matrix.columns - j;
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
#pragma unroll
      for (int i = 0; i < K_PER_WORD; ++i) {
        const int k = k_first + (word_row + pass * ROWS_A_PASS) * K_PER_WORD + i;
        load4(loaded[pass][i], matrix, segment, k, j, k < matrix.rows ? count : 0);
      }
    }
  }

  METHOD void store(uint32* strip) const {
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
      const int row = word_row + pass * ROWS_A_PASS;
      const float* low = loaded[pass][0];
      const float* high = loaded[pass][K_PER_WORD - 1];
      *(uint4*)(strip + row * (E + PADDING) + (e ^ swizzle(row))) = make_uint4(
          make_word<PRECISION>(low[0], high[0]), make_word<PRECISION>(low[1], high[1]),
          make_word<PRECISION>(low[2], high[2]), make_word<PRECISION>(low[3], high[3]));
    }
  }
};

// Rows hold k: a thread loads 4 neighbouring k of one e and stores 4 or 2 words of
// different word rows. The lanes of a warp are 8 e times 4 groups of k.
template <Precision PRECISION, class T, int E>
struct Strip<PRECISION, T, E, true> {
  static constexpr int K_PER_WORD = k_per_word<PRECISION>;
  static constexpr int WARPS_DEEP = T::WORDS * K_PER_WORD / 16;
  static constexpr int E_A_PASS = T::THREADS / WARP / WARPS_DEEP * 8;
  static constexpr int PASSES = E / E_A_PASS;

  int e, k_group;
  float loaded[PASSES][4];

  METHOD Strip() {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    e = warp / WARPS_DEEP * 8 + lane % 8;
    k_group = warp % WARPS_DEEP * 4 + lane / 8;
  }

  METHOD void load(const Matrix& matrix, const Segment& segment, int e_first,
                   int k_first) {
    const int j = k_first + k_group * 4, count = matrix.columns - j;
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
      const int row = e_first + e + pass * E_A_PASS;
      load4(loaded[pass], matrix, segment, row, j, row < matrix.rows ? count : 0);
    }
  }

  METHOD void store(uint32* strip) const {
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
#pragma unroll
      for (int i = 0; i < 4 / K_PER_WORD; ++i) {
        const int row = k_group * (4 / K_PER_WORD) + i;
        const float* pair = loaded[pass] + i * K_PER_WORD;
        strip[row * (E + PADDING) + ((e + pass * E_A_PASS) ^ swizzle(row))] =
            make_word<PRECISION>(pair[0], pair[K_PER_WORD - 1]);
      }
    }
  }
};

// ------------------------------------------------------------------ multiplication
// A warp's 32 x 64 elements as 64 accumulators a lane: ROWS x COLUMNS pieces of PIECE
// neighbours along n. row() and column() are places in the tile of the block.

struct WarpPlace {
  int slice, m, n, lane;
  template <class T>
  DEVICE WarpPlace of() {
    const int warp = threadIdx.x / WARP;
    return {warp / (T::WARPS_M * T::WARPS_N), warp % T::WARPS_M * 32,
            warp / T::WARPS_M % T::WARPS_N * 64, (int)threadIdx.x % WARP};
  }
};

// Ordinary arithmetic: lanes are 4 x 8, each with two groups of 4 rows and of 4 columns.
template <class T>
struct FmaFragment {
  static constexpr int ROWS = 8, COLUMNS = 2, PIECE = 4;
  int slice, m, n;

  METHOD FmaFragment() {
    const WarpPlace warp = WarpPlace::of<T>();
    slice = warp.slice;
    m = warp.m + warp.lane / 8 * 4;
    n = warp.n + warp.lane % 8 * 4;
  }
  METHOD int row(int r) const { return m + r / 4 * 16 + r % 4; }
  METHOD int column(int c) const { return n + c * 32; }
  DEVICE int index(int r, int c) { return r * 8 + c * 4; }

  METHOD void multiply(float* sums, const uint32* strip_a, const uint32* strip_b) const {
    constexpr int DEPTH = T::WORDS / T::SLICES;
#pragma unroll 4
    for (int i = 0; i < DEPTH; ++i) {
      const int word_row = slice * DEPTH + i, moved = swizzle(word_row);
      const float* a = (const float*)strip_a + word_row * (T::M + PADDING);
      const float* b = (const float*)strip_b + word_row * (T::N + PADDING);
      const float4 a0 = *(const float4*)(a + (m ^ moved));
      const float4 a1 = *(const float4*)(a + ((m + 16) ^ moved));
      const float4 b0 = *(const float4*)(b + (n ^ moved));
      const float4 b1 = *(const float4*)(b + ((n + 32) ^ moved));
      const float of_a[8] = {a0.x, a0.y, a0.z, a0.w, a1.x, a1.y, a1.z, a1.w};
      const float of_b[8] = {b0.x, b0.y, b0.z, b0.w, b1.x, b1.y, b1.z, b1.w};
#pragma unroll
      for (int r = 0; r < 8; ++r)
#pragma unroll
        for (int c = 0; c < 8; ++c)
          sums[r * 8 + c] = fmaf(of_a[r], of_b[c], sums[r * 8 + c]);
    }
  }
};

#if __CUDA_ARCH__ >= 800

// Tensor cores: 2 x 8 products of 16 x 8; common.cuh says which lane holds what.
template <Precision PRECISION, class T>
struct MmaFragment {
  static constexpr int ROWS = 4, COLUMNS = 8, PIECE = 2;
  int slice, m, n, group, thread;

  METHOD MmaFragment() {
    const WarpPlace warp = WarpPlace::of<T>();
    slice = warp.slice;
    m = warp.m;
    n = warp.n;
    group = warp.lane / 4;
    thread = warp.lane % 4;
  }
  METHOD int row(int r) const { return m + r * 8 + group; }
  METHOD int column(int c) const { return n + c * 8 + thread * 2; }
  DEVICE int index(int r, int c) { return (r / 2 * 8 + c) * 4 + r % 2 * 2; }

  METHOD void multiply(float* sums, const uint32* strip_a, const uint32* strip_b) const {
    constexpr int DEPTH = T::WORDS / T::SLICES;
#pragma unroll
    for (int i = 0; i < DEPTH; i += 8) {
      const int low = slice * DEPTH + i, high = low + 4;  // word rows of k, k + 4
      const uint32* a_low = strip_a + (low + thread) * (T::M + PADDING);
      const uint32* a_high = strip_a + (high + thread) * (T::M + PADDING);
      const uint32* b_low = strip_b + (low + thread) * (T::N + PADDING);
      const uint32* b_high = strip_b + (high + thread) * (T::N + PADDING);
      uint32 a[2][4], b[8][2];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        a[r / 2][r % 2] = a_low[row(r) ^ swizzle(low)];
        a[r / 2][r % 2 + 2] = a_high[row(r) ^ swizzle(high)];
      }
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        b[c][0] = b_low[(n + c * 8 + group) ^ swizzle(low)];
        b[c][1] = b_high[(n + c * 8 + group) ^ swizzle(high)];
      }
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          if constexpr (PRECISION == TF32)
            mma_tf32(sums + (r * 8 + c) * 4, a[r], b[c]);
          else
            mma_bf16(sums + (r * 8 + c) * 4, a[r], b[c]);
        }
    }
  }
};

template <Precision PRECISION, class T>
struct ChooseFragment {
  typedef MmaFragment<PRECISION, T> type;
};

#else

template <Precision PRECISION, class T>
struct ChooseFragment;

#endif

template <class T>
struct ChooseFragment<FP32, T> {
  typedef FmaFragment<T> type;
};

// ------------------------------------------------------------------ result

constexpr int ACCUMULATE = 1, BIAS_ON_ROWS = 2;  // bits of `flags`

// What becomes of a sum: element (m, n) of C, at `target`.
DEVICE void finish(float* target, float sum, const float* bias, int m, int n, int flags) {
  if (bias) sum += bias[flags & BIAS_ON_ROWS ? m : n];
  *target = flags & ACCUMULATE ? sum + *target : sum;
}

// A warp's sums into shared memory, at `tile`, whose rows are pitch floats apart.
template <bool ADD, class Fragment>
DEVICE void share(float* tile, int pitch, const Fragment& fragment, const float* sums) {
#pragma unroll
  for (int r = 0; r < Fragment::ROWS; ++r)
#pragma unroll
    for (int c = 0; c < Fragment::COLUMNS; ++c) {
      float* target = tile + fragment.row(r) * pitch + fragment.column(c);
      const float* piece = sums + Fragment::index(r, c);
#pragma unroll
      for (int i = 0; i < Fragment::PIECE; ++i)
        target[i] = ADD ? piece[i] + target[i] : piece[i];
    }
}

// ------------------------------------------------------------------ the product

template <Precision PRECISION, class T, bool A_TRANSPOSED, bool B_TRANSPOSED>
DEVICE void gemm(float* __restrict__ c, const float* __restrict__ a,
                 const float* __restrict__ b, const float* __restrict__ bias, int M,
                 int N, int K, int segment_length, uint32 segment_magic, int a_pitch,
                 int a_stack, int64 a_batch, int b_pitch, int b_stack, int64 b_batch,
                 int c_pitch, int c_stack, int64 c_batch, int k_a_split, int flags) {
  typedef typename ChooseFragment<PRECISION, T>::type Fragment;
  constexpr int DEPTH = T::WORDS * k_per_word<PRECISION>;
  constexpr int STRIP_A = T::WORDS * (T::M + PADDING);
  constexpr int STRIP_B = T::WORDS * (T::N + PADDING);
  __shared__ __align__(16) uint32 strips[2][STRIP_A + STRIP_B];

  const int tiles_m = (M + T::M - 1) / T::M;
  const int m_first = blockIdx.x % tiles_m * T::M;
  const int n_first = blockIdx.x / tiles_m * T::N;
  const int k_first = blockIdx.z * k_a_split;
  const int k_end = min(K, k_first + k_a_split);
  const Segment segment(segment_length, segment_magic);

  a += blockIdx.y * a_batch;
  b += blockIdx.y * b_batch;
  c += ((int64)blockIdx.z * gridDim.y + blockIdx.y) * c_batch;
  if (bias) bias += (int64)blockIdx.y * (flags & BIAS_ON_ROWS ? M : N);

  // rows of A hold k unless transposed, rows of B hold n unless transposed
  const Matrix matrix_a = {a, a_pitch, a_stack, A_TRANSPOSED ? k_end : M,
                           A_TRANSPOSED ? M : k_end,
                           has_vectors(a, a_pitch, a_stack, segment_length)};
  const Matrix matrix_b = {b, b_pitch, b_stack, B_TRANSPOSED ? N : k_end,
                           B_TRANSPOSED ? k_end : N,
                           has_vectors(b, b_pitch, b_stack, segment_length)};
  Strip<PRECISION, T, T::M, !A_TRANSPOSED> strip_a;
  Strip<PRECISION, T, T::N, B_TRANSPOSED> strip_b;
  const Fragment fragment;
  float sums[64] = {};

  // Each turn loads strip k and multiplies the strip before it. One barrier a turn: who
  // stores to a buffer has passed the barrier that all reached after reading it.
  int buffer = 0;
  for (int k = k_first;; k += DEPTH) {
    if (k < k_end) {
      strip_a.load(matrix_a, segment, m_first, k);
      strip_b.load(matrix_b, segment, n_first, k);
    }
    if (k > k_first)
      fragment.multiply(sums, strips[buffer ^ 1], strips[buffer ^ 1] + STRIP_A);
    if (k >= k_end) break;
    strip_a.store(strips[buffer]);
    strip_b.store(strips[buffer] + STRIP_A);
    __syncthreads();
    buffer ^= 1;
  }

  // Through shared memory, 64 rows at a time, so that warps write whole lines.
  constexpr int ROWS = 64, PITCH = T::N + PADDING;
  constexpr int COPIES = T::SLICES > 1 ? 2 : 1;
  static_assert(T::SLICES == 1 || T::SLICES == 4);
  static_assert(COPIES * ROWS * PITCH <= 2 * (STRIP_A + STRIP_B));
  float* shared = (float*)strips;
  const int column = threadIdx.x % T::N, n = n_first + column;
  c += segment.offset(n, c_stack);
#pragma unroll 1
  for (int m = 0; m < T::M; m += ROWS) {
    __syncthreads();
    if constexpr (T::SLICES == 1) {
      if (fragment.row(0) / ROWS * ROWS == m)
        share<false>(shared - m * PITCH, PITCH, fragment, sums);
    } else {  // (slice 0 + slice 2) + (slice 1 + slice 3)
      float* copy = shared + fragment.slice % 2 * ROWS * PITCH;
      if (fragment.slice / 2 == 1) share<false>(copy, PITCH, fragment, sums);
      __syncthreads();
      if (fragment.slice / 2 == 0) share<true>(copy, PITCH, fragment, sums);
    }
    __syncthreads();
    if (n >= N) continue;
    const int rows = min(ROWS, M - m_first - m);
    const float* copy = shared + column;
#pragma unroll 1
    for (int row = threadIdx.x / T::N; row < rows; row += T::THREADS / T::N) {
      float sum = copy[row * PITCH];
      if (COPIES == 2) sum += copy[(ROWS + row) * PITCH];
      const int to = m_first + m + row;
      finish(c + (int64)to * c_pitch, sum, bias, to, n, flags);
    }
  }
}

// Launch: grid (tiles along m * tiles along n, batch, splits), 256 threads.
// Pitches, stacks and batch strides count elements. k_a_split: a multiple of 64 that
// covers K in gridDim.z parts. With more than one part C is the workspace of partial
// results (splits, batch, M, N), bias is null and flags 0; gemm_finish follows.
#define GEMM(PRECISION, NAME, TILE, LAYOUT, A_TRANSPOSED, B_TRANSPOSED)                 \
  extern "C" __global__ __launch_bounds__(256, 2) void gemm_##NAME##_##LAYOUT##_##TILE( \
      float* c, const float* a, const float* b, const float* bias, int M, int N, int K, \
      int segment, uint32 segment_magic, int a_pitch, int a_stack, int64 a_batch,       \
      int b_pitch, int b_stack, int64 b_batch, int c_pitch, int c_stack, int64 c_batch, \
      int k_a_split, int flags) {                                                       \
    gemm<PRECISION, Tile##TILE, A_TRANSPOSED, B_TRANSPOSED>(                            \
        c, a, b, bias, M, N, K, segment, segment_magic, a_pitch, a_stack, a_batch,      \
        b_pitch, b_stack, b_batch, c_pitch, c_stack, c_batch, k_a_split, flags);        \
  }

#define GEMM_LAYOUTS(PRECISION, NAME, TILE)      \
  GEMM(PRECISION, NAME, TILE, nn, false, false)  \
  GEMM(PRECISION, NAME, TILE, nt, false, true)   \
  GEMM(PRECISION, NAME, TILE, tn, true, false)

GEMM_LAYOUTS(FP32, fp32, 64)
GEMM_LAYOUTS(FP32, fp32, 128)
#if __CUDA_ARCH__ >= 800
GEMM_LAYOUTS(TF32, tf32, 64)
GEMM_LAYOUTS(TF32, tf32, 128)
GEMM_LAYOUTS(BF16, bf16, 64)
GEMM_LAYOUTS(BF16, bf16, 128)
#else
GEMM_LAYOUTS(FP32, tf32, 64)
GEMM_LAYOUTS(FP32, tf32, 128)
GEMM_LAYOUTS(FP32, bf16, 64)
GEMM_LAYOUTS(FP32, bf16, 128)
#endif

// C = sum of the partial results over the splits, in a fixed order, + bias.
// Launch: grid (ceil(batch * M * N / 32)), block (32, 8).
extern "C" __global__ void gemm_finish(
    float* __restrict__ c, const float* __restrict__ partial,  // (splits, batch, M, N)
    const float* __restrict__ bias, int batch, int M, int N, int splits, int segment,
    uint32 segment_magic, int c_pitch, int c_stack, int64 c_batch, int flags) {
  __shared__ float of_lane[8][WARP];
  const int elements = batch * M * N;
  const int i = blockIdx.x * WARP + threadIdx.x;
  float sum = 0.0f;
  if (i < elements) {
#pragma unroll 4
    for (int split = threadIdx.y; split < splits; split += 8)
      sum += partial[(int64)split * elements + i];
  }
  of_lane[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || i >= elements) return;
  for (int lane = 1; lane < 8; ++lane) sum += of_lane[lane][threadIdx.x];
  const int n = i % N, m = i / N % M, z = i / N / M;
  if (bias) bias += (int64)z * (flags & BIAS_ON_ROWS ? M : N);
  float* target = c + z * c_batch + (int64)m * c_pitch +
                  Segment(segment, segment_magic).offset(n, c_stack);
  finish(target, sum, bias, m, n, flags);
}
