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
// Layout. A matrix lies in memory as rows of contiguous elements, `pitch` apart. As
// written above, rows of A hold k and rows of B hold n; transposed, rows of A hold m
// and rows of B hold k.
// The contiguous index j may run over a stack of images instead: element j of a row is
//   row * pitch + (j / segment) * stack + j % segment
// so that (N, K, P*Q) with segment = P*Q, pitch = P*Q, stack = K*P*Q is the matrix of K
// rows and N*P*Q columns, without moving anything. All three matrices share `segment`;
// one that is not stacked has stack == segment, which makes j plain.
//
// Tiling. A block computes a tile of C in registers, a warp a part of it, while strips
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

// Bits of `flags`.
constexpr int ACCUMULATE = 1, BIAS_ON_ROWS = 2, A_TRANSPOSED = 4, B_TRANSPOSED = 8;

// Tile of a block: WARPS_M x WARPS_N warps of 32 x WARP_N elements, SLICES of them
// deep. Strips are WORDS words of k deep. Deep strips hide the latency of memory where
// a block is alone on its SM; what is on its way takes registers, of which 128 a thread
// let two blocks share an SM.
template <int WARPS_M_, int WARPS_N_, int WARP_N_, int SLICES_, int WORDS_>
struct Tile {
  static constexpr int WARPS_M = WARPS_M_, WARPS_N = WARPS_N_, WARP_N = WARP_N_;
  static constexpr int SLICES = SLICES_, WORDS = WORDS_;
  static constexpr int THREADS = WARPS_M * WARPS_N * SLICES * WARP;
  static constexpr int M = WARPS_M * 32, N = WARPS_N * WARP_N;
};

template <Precision PRECISION>
struct Tile64 : Tile<2, 2, 32, 2, 32> {};  // 64 x 64
template <>
struct Tile64<FP32> : Tile<2, 1, 64, 4, 32> {};
template <Precision PRECISION>
struct Tile128 : Tile<4, 2, 64, 1, PRECISION == BF16 ? 8 : 16> {};  // 128 x 128

// Shared memory keeps element e of word row w at w * (E + 8) + (e ^ swizzle(w)). So
// neither reading fragments (4 rows x 8 elements, or 4 elements at once) nor writing
// (8 rows x 4 elements, or elements of one row) makes two lanes of a warp wait for one
// bank.
constexpr int PADDING = 8;
DEVICE int swizzle(int word_row) { return word_row / 4 % 2 * 4; }

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
};

template <Precision PRECISION>
constexpr int k_per_word = PRECISION == BF16 ? 2 : 1;

template <Precision PRECISION>
DEVICE uint32 make_word(const float* of_k) {
#if __CUDA_ARCH__ >= 800
  if constexpr (PRECISION == TF32) return tf32_word(of_k[0]);
  if constexpr (PRECISION == BF16) return bf16_word(of_k[0], of_k[1]);
#endif
  return __float_as_uint(of_k[0]);
}

// One thread's share of a strip of E elements (m or n) by T::WORDS words of k: loaded
// from global memory to registers, later stored to shared memory. Single elements, so
// that any pitch will do; the lanes of a warp read neighbours: of one word row, or of 8
// word rows times 4 elements where rows of the matrix hold k. Either way a thread's
// passes go down the rows of the matrix.
template <Precision PRECISION, class T, int E>
struct Strip {
  static constexpr int K_PER_WORD = k_per_word<PRECISION>;
  static constexpr int PASSES = T::WORDS * E / T::THREADS;
  static constexpr int WARPS_DEEP = T::WORDS / 8;  // if rows hold k
  static constexpr int E_A_PASS = T::THREADS / WARP / WARPS_DEEP * 4;
  static constexpr int WORDS_A_PASS = T::THREADS / E;  // if they do not

  bool rows_hold_k;
  int e, word_row;  // of the first pass
  float loaded[PASSES][K_PER_WORD];

  METHOD Strip(bool rows_hold_k_) : rows_hold_k(rows_hold_k_) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    e = rows_hold_k ? warp / WARPS_DEEP * 4 + lane / 8 : threadIdx.x % E;
    word_row = rows_hold_k ? warp % WARPS_DEEP * 8 + lane % 8 : threadIdx.x / E;
  }

  METHOD void load(const Matrix& matrix, const Segment& segment, int e_first,
                   int k_first) {
    const int step = rows_hold_k ? E_A_PASS : WORDS_A_PASS * K_PER_WORD;
    const int64 stride = (int64)step * matrix.pitch;
#pragma unroll
    for (int i = 0; i < K_PER_WORD; ++i) {
      const int k = k_first + word_row * K_PER_WORD + i;
      const int j = rows_hold_k ? k : e_first + e;
      const int row = rows_hold_k ? e_first + e : k;
      const float* source = matrix.data + segment.offset(j, matrix.stack) +
                            (int64)row * matrix.pitch;
      const int left = j < matrix.columns ? matrix.rows - row : 0;
#pragma unroll
      for (int pass = 0; pass < PASSES; ++pass) {
        loaded[pass][i] = pass * step < left ? *source : 0.0f;
        source += stride;
      }
    }
  }

  METHOD void store(uint32* strip) const {
    // down the rows of k the swizzle alternates, along e it stays
    uint32* even = strip + word_row * (E + PADDING) + (e ^ swizzle(word_row));
    uint32* odd = rows_hold_k ? even : strip + word_row * (E + PADDING) + (e ^ 4);
    const int step = rows_hold_k ? E_A_PASS : WORDS_A_PASS * (E + PADDING);
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
      uint32* target = pass * WORDS_A_PASS / 4 % 2 ? odd : even;
      target[pass * step] = make_word<PRECISION>(loaded[pass]);
    }
  }
};

// ------------------------------------------------------------------ multiplication
// A warp's 32 x WARP_N elements as WARP_N sums a lane: ROWS x COLUMNS pieces of PIECE
// neighbours along n. row() and column() are places in the tile of the block.

struct WarpPlace {
  int slice, m, n, lane;
  template <class T>
  DEVICE WarpPlace of() {
    const int warp = threadIdx.x / WARP;
    return {warp / (T::WARPS_M * T::WARPS_N), warp % T::WARPS_M * 32,
            warp / T::WARPS_M % T::WARPS_N * T::WARP_N, (int)threadIdx.x % WARP};
  }
};

// Ordinary arithmetic: lanes are 4 x 8, each with twice 4 rows and twice 4 columns.
template <class T>
struct FmaFragment {
  static_assert(T::WARP_N == 64);
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

  METHOD void multiply(float* sums, const uint32* strip_a,
                       const uint32* strip_b) const {
    constexpr int DEPTH = T::WORDS / T::SLICES;
#pragma unroll 2
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

// Tensor cores: products of 16 x 8, two along m; common.cuh says which lane holds what.
template <Precision PRECISION, class T>
struct MmaFragment {
  static constexpr int ROWS = 4, COLUMNS = T::WARP_N / 8, PIECE = 2;
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
  DEVICE int index(int r, int c) { return (r / 2 * COLUMNS + c) * 4 + r % 2 * 2; }

  METHOD void multiply(float* sums, const uint32* strip_a,
                       const uint32* strip_b) const {
    constexpr int DEPTH = T::WORDS / T::SLICES;
#pragma unroll
    for (int i = 0; i < DEPTH; i += 8) {
      // word rows of k and k + 4; multiples of 8 and of 4, hence the constant swizzles
      const int low = slice * DEPTH + i, high = low + 4;
      const uint32* a_low = strip_a + (low + thread) * (T::M + PADDING);
      const uint32* a_high = strip_a + (high + thread) * (T::M + PADDING);
      const uint32* b_low = strip_b + (low + thread) * (T::N + PADDING);
      const uint32* b_high = strip_b + (high + thread) * (T::N + PADDING);
      uint32 a[2][4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        a[r / 2][r % 2] = a_low[row(r) ^ swizzle(0)];
        a[r / 2][r % 2 + 2] = a_high[row(r) ^ swizzle(4)];
      }
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) {
        const int of_b = n + c * 8 + group;
        const uint32 b[2] = {b_low[of_b ^ swizzle(0)], b_high[of_b ^ swizzle(4)]};
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          if constexpr (PRECISION == TF32)
            mma_tf32(sums + index(r * 2, c), a[r], b);
          else
            mma_bf16(sums + index(r * 2, c), a[r], b);
        }
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

// What becomes of a sum: element (m, n) of C, at `target`.
DEVICE void finish(float* target, float sum, const float* bias, int m, int n,
                   int flags) {
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

template <Precision PRECISION, class T>
DEVICE void gemm(float* __restrict__ c, const float* __restrict__ a,
                 const float* __restrict__ b, const float* __restrict__ bias, int M,
                 int N, int K, int segment_length, uint32 segment_magic, int a_pitch,
                 int a_stack, int64 a_batch, int b_pitch, int b_stack, int64 b_batch,
                 int c_pitch, int c_stack, int64 c_batch, int k_a_split, int flags) {
  typedef typename ChooseFragment<PRECISION, T>::type Fragment;
  constexpr int DEPTH = T::WORDS * k_per_word<PRECISION>;
  constexpr int STRIP_A = T::WORDS * (T::M + PADDING);
  constexpr int STRIP_B = T::WORDS * (T::N + PADDING);
  constexpr int ROWS = 64, PITCH = T::N + PADDING;  // of the result, in the end
  constexpr int COPIES = T::SLICES > 1 ? 2 : 1;
  constexpr int STRIPS = STRIP_A + STRIP_B, RESULT = COPIES * ROWS * PITCH;
  __shared__ __align__(16) uint32 shared[2 * STRIPS > RESULT ? 2 * STRIPS : RESULT];

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

  const bool a_rows_hold_k = !(flags & A_TRANSPOSED);
  const bool b_rows_hold_k = flags & B_TRANSPOSED;
  const Matrix matrix_a = {a, a_pitch, a_stack, a_rows_hold_k ? M : k_end,
                           a_rows_hold_k ? k_end : M};
  const Matrix matrix_b = {b, b_pitch, b_stack, b_rows_hold_k ? N : k_end,
                           b_rows_hold_k ? k_end : N};
  Strip<PRECISION, T, T::M> strip_a(a_rows_hold_k);
  Strip<PRECISION, T, T::N> strip_b(b_rows_hold_k);
  const Fragment fragment;
  float sums[T::WARP_N] = {};

  // Each turn loads strip k and multiplies the strip before it. One barrier a turn: who
  // stores to a buffer has passed the barrier that all reached after reading it.
  int at = 0;  // of the strips being stored; the others are being read
  for (int k = k_first;; k += DEPTH) {
    if (k < k_end) {
      strip_a.load(matrix_a, segment, m_first, k);
      strip_b.load(matrix_b, segment, n_first, k);
    }
    const uint32* strips = shared + STRIPS - at;
    if (k > k_first) fragment.multiply(sums, strips, strips + STRIP_A);
    if (k >= k_end) break;
    strip_a.store(shared + at);
    strip_b.store(shared + at + STRIP_A);
    __syncthreads();
    at = STRIPS - at;
  }

  // Through shared memory, 64 rows at a time, so that warps write whole lines.
  float* result = (float*)shared;
  const int column = threadIdx.x % T::N, n = n_first + column;
  c += segment.offset(n, c_stack);
#pragma unroll 1
  for (int m = 0; m < T::M; m += ROWS) {
    __syncthreads();
    if constexpr (T::SLICES == 1) {
      if (fragment.row(0) / ROWS * ROWS == m)
        share<false>(result - m * PITCH, PITCH, fragment, sums);
    } else {  // (slice 2 + slice 0) + (slice 3 + slice 1)
      float* copy = result + fragment.slice % 2 * ROWS * PITCH;
      if constexpr (T::SLICES == 4) {
        if (fragment.slice >= 2) share<false>(copy, PITCH, fragment, sums);
        __syncthreads();
      }
      if (fragment.slice < 2) share<T::SLICES == 4>(copy, PITCH, fragment, sums);
    }
    __syncthreads();
    if (n >= N) continue;
    const int rows = min(ROWS, M - m_first - m);
    const float* copy = result + column;
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
// results (splits, batch, M, N), bias is null, flags say only what is transposed, and
// gemm_finish follows.
#define GEMM(PRECISION, NAME, TILE)                                                   \
  extern "C" __global__ __launch_bounds__(256, 2) void gemm_##NAME##_##TILE(          \
      float* c, const float* a, const float* b, const float* bias, int M, int N,      \
      int K, int segment, uint32 segment_magic, int a_pitch, int a_stack,             \
      int64 a_batch, int b_pitch, int b_stack, int64 b_batch, int c_pitch,            \
      int c_stack, int64 c_batch, int k_a_split, int flags) {                         \
    gemm<PRECISION, Tile##TILE<PRECISION>>(                                           \
        c, a, b, bias, M, N, K, segment, segment_magic, a_pitch, a_stack, a_batch,    \
        b_pitch, b_stack, b_batch, c_pitch, c_stack, c_batch, k_a_split, flags);      \
  }

GEMM(FP32, fp32, 64)
GEMM(FP32, fp32, 128)
#if __CUDA_ARCH__ >= 800
GEMM(TF32, tf32, 64)
GEMM(TF32, tf32, 128)
GEMM(BF16, bf16, 64)
GEMM(BF16, bf16, 128)
#else
GEMM(FP32, tf32, 64)
GEMM(FP32, tf32, 128)
GEMM(FP32, bf16, 64)
GEMM(FP32, bf16, 128)
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
