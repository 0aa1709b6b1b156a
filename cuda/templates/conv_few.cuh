// The first convolution of a network, which has few input channels: filter taps as the
// contraction. Used by conv_few_forward.cu, and by conv_block_forward.cu in front of
// the second convolution.
//
// With 1 or 3 channels there is no quad of channels to multiply. Instead
//   d[k][window] += filter[k][tap] x[window's pixel + tap],  tap = (c, r, s) in order,
// filled up with zeros to a multiple of 8 (25 -> 32, 27 -> 32).
//
// mma.sync with channels as rows and pixels as columns (fragments in fused.cuh). The 8
// pixels of a fragment are the same position of 8 consecutive pooling windows, so a
// thread ends up with every position of its windows 2t and 2t + 1: bias, ReLU and max
// pool happen in registers.
//
// A block holds the input rows under `rows` rows of windows in shared memory as plain
// planes [part][c][x_rows][x_pitch]. A lane reads column word
//   x[base of its window + position + offset of tap 8 step + t (+ 4)],
// 32 bits at a time; neighbouring taps and windows overlap, so conflicts are rare. The
// filter lies behind them as [part][16 m_tiles][f_pitch] and moves to registers where
// it fits. "part": big and small halves in "fp32". In "bf16" the operands stay tf32:
// with so few channels it costs nothing and errs less.
#pragma once
#include "fused.cuh"

// L has the layer's constants:
//   channels height width outputs, filter_h filter_w, stride_h .. pad_h .. pool_h ..,
//   relu bias mode; and of a block: rows (of windows), m_tiles (16 channels each),
//   groups (8 windows each, a warp's at a time), threads
template <class L>
struct Few : L {
  static constexpr int p = (L::height + 2 * L::pad_h - L::filter_h) / L::stride_h + 1;
  static constexpr int q = (L::width + 2 * L::pad_w - L::filter_w) / L::stride_w + 1;
  static constexpr int pooled_p = p / L::pool_h, pooled_q = q / L::pool_w;
  static constexpr int positions = L::pool_h * L::pool_w;
  static constexpr int windows = L::rows * pooled_q;
  static constexpr int row_tiles = ceil_div(pooled_p, L::rows);

  static constexpr int taps = L::channels * L::filter_h * L::filter_w;
  static constexpr int steps = ceil_div(taps, 8);
  static constexpr int parts = L::mode == MODE_FP32 ? 2 : 1;
  static constexpr int x_rows = (L::rows * L::pool_h - 1) * L::stride_h + L::filter_h;
  static constexpr int x_pitch = L::width + 2 * L::pad_w;
  static constexpr int x_part = L::channels * x_rows * x_pitch;
  static constexpr int f_pitch =
      steps * 8 + 4;  // 4 mod 8: no conflicts between fragments
  static constexpr int f_part = 16 * L::m_tiles * f_pitch;
  static constexpr int bytes = 4 * (parts * (x_part + f_part) + 8 * steps);

  static constexpr int n_tiles = L::groups * positions;
  static constexpr int passes = ceil_div(windows, 8 * L::groups);
  static constexpr bool resident = steps * L::m_tiles * 4 * parts <= 64;

  // elements that a thread brings at a time
  static __host__ __device__ constexpr int batch(int all) {
    return ceil_div(all, L::threads) < 8 ? ceil_div(all, L::threads) : 8;
  }
  static constexpr int f_all = 16 * L::m_tiles * steps * 8;
  static constexpr int x_batch = batch(x_part), f_batch = batch(f_all);

  static __device__ __forceinline__ void store(u32* to, int part_words, float v) {
    to[0] = round_tf32(v);
    if (parts == 2) to[part_words] = rest_tf32(v, to[0]);
  }

  // Bytes from a window's pixel to a tap; beyond the taps the filter is 0.
  static __device__ __forceinline__ u32 tap_offset(int tap) {
    const int in_plane = tap % (L::filter_h * L::filter_w);
    const int row =
        tap / (L::filter_h * L::filter_w) * x_rows + in_plane / L::filter_w;
    return tap < taps ? 4 * (row * x_pitch + in_plane % L::filter_w) : 0;
  }

  // Brings the input rows from row0 on (which may lie in the padding) and the filters
  // from channel k0 on; pixel(i) is element i of the image. All threads call it, then
  // synchronise.
  template <class Pixel>
  static __device__ __forceinline__ void load(u32* shared, Pixel pixel,
                                              const float* filter, int row0, int k0) {
    u32* fs = shared + parts * x_part;
    u32* offsets = fs + parts * f_part;
    for (int tap = threadIdx.x; tap < 8 * steps; tap += L::threads)
      offsets[tap] = tap_offset(tap);
    // the first batches of both are loaded before either is stored: one round trip
#pragma unroll 1
    for (int first = 0; first * x_batch < x_part || first * f_batch < f_all;
         first += L::threads) {
      const int x_first = first * x_batch + threadIdx.x;
      const int f_first = first * f_batch + threadIdx.x;
      float v[x_batch], f[f_batch];
#pragma unroll
      for (int j = 0; j < x_batch; ++j) {
        const int i = x_first + j * L::threads;
        const int row = row0 + i / x_pitch % x_rows, column = i % x_pitch - L::pad_w;
        const int c = i / (x_pitch * x_rows);
        const bool inside = i < x_part && row >= 0 && row < L::height && column >= 0 &&
                            column < L::width;
        v[j] = inside ? pixel((c * L::height + row) * L::width + column) : 0.f;
      }
#pragma unroll
      for (int j = 0; j < f_batch; ++j) {
        const int i = f_first + j * L::threads;
        const int tap = i % (steps * 8), k = k0 + i / (steps * 8);
        f[j] = i < f_all && tap < taps && k < L::outputs ? filter[k * taps + tap] : 0.f;
      }
#pragma unroll
      for (int j = 0; j < x_batch; ++j) {
        const int i = x_first + j * L::threads;
        if (i < x_part) store(shared + i, x_part, v[j]);
      }
#pragma unroll
      for (int j = 0; j < f_batch; ++j) {
        const int i = f_first + j * L::threads;
        if (i < f_all)
          store(fs + i / (steps * 8) * f_pitch + i % (steps * 8), f_part, f[j]);
      }
    }
  }

  // bias[m][half] of channels k0 + 16 m + 8 half + g
  static __device__ __forceinline__ void load_bias(float (&b)[L::m_tiles][2],
                                                   const float* bias, int k0) {
#pragma unroll
    for (int i = 0; i < 2 * L::m_tiles; ++i) {
      const int k = k0 + i * 8 + threadIdx.x % 32 / 4;
      b[i / 2][i % 2] = L::bias && k < L::outputs ? bias[k] : 0.f;
    }
  }

  typedef u32 Fragments[parts][L::m_tiles][4];
  static __device__ __forceinline__ void load_fragments(Fragments& a, const u32* fs,
                                                        int step) {
#pragma unroll
    for (int i = 0; i < parts * L::m_tiles * 4; ++i) {
      const int part = i / (4 * L::m_tiles), m = i / 4 % L::m_tiles, e = i % 4;
      const int k = 16 * m + threadIdx.x % 32 / 4 + e % 2 * 8;
      const int tap = 8 * step + threadIdx.x % 4 + e / 2 * 4;
      a[part][m][e] = fs[part * f_part + k * f_pitch + tap];
    }
  }

  // The products, by `warps` warps of which this is number `warp`. For each channel k
  // (from 0, in the tile) and pair of windows of the tile emit(k, window, value, code)
  // is called once, with values and codes of windows `window` (even) and window + 1; k
  // and windows may lie beyond what exists.
  template <class Emit>
  static __device__ __forceinline__ void multiply(const u32* shared,
                                                  const float (&b)[L::m_tiles][2],
                                                  int warp, int warps, Emit emit) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const u32 x_base = shared_address(shared);
    const u32* fs = shared + parts * x_part;
    u32 offset[steps][2];  // of this lane's taps
#pragma unroll
    for (int i = 0; i < 2 * steps; ++i)
      offset[i / 2][i % 2] = fs[parts * f_part + i * 4 + t];
    Fragments kept[resident ? steps : 1];
#pragma unroll
    for (int step = 0; resident && step < steps; ++step)
      load_fragments(kept[step], fs, step);

#pragma unroll 1
    for (int pass = warp; pass < passes; pass += warps) {
      u32 base[L::groups];
#pragma unroll
      for (int j = 0; j < L::groups; ++j) {
        const int window = min((pass * L::groups + j) * 8 + g, windows - 1);
        base[j] = x_base + 4 * (window / pooled_q * L::pool_h * L::stride_h * x_pitch +
                                window % pooled_q * L::pool_w * L::stride_w);
      }
      float d[L::m_tiles][n_tiles][4];
#pragma unroll
      for (int i = 0; i < L::m_tiles * n_tiles * 4; ++i)
        d[i / (4 * n_tiles)][i / 4 % n_tiles][i % 4] =
            b[i / (4 * n_tiles)][i % 4 / 2];
#pragma unroll
      for (int step = 0; step < steps; ++step) {
        Fragments fetched;
        if (!resident) load_fragments(fetched, fs, step);
        const Fragments& a = resident ? kept[resident ? step : 0] : fetched;
#pragma unroll
        for (int j = 0; j < n_tiles; ++j) {
          const int position = j % positions;
          const u32 at =
              base[j / positions] + 4 * (position / L::pool_w * L::stride_h * x_pitch +
                                         position % L::pool_w * L::stride_w);
          u32 w[parts][2];
#pragma unroll
          for (int part = 0; part < parts; ++part) {
            w[part][0] = load_shared(at + offset[step][0] + 4 * part * x_part);
            w[part][1] = load_shared(at + offset[step][1] + 4 * part * x_part);
          }
#pragma unroll
          for (int m = 0; m < L::m_tiles; ++m) {
            if (parts == 2) {
              mma_tf32(d[m][j], a[parts - 1][m], w[0][0], w[0][1]);
              mma_tf32(d[m][j], a[0][m], w[parts - 1][0], w[parts - 1][1]);
            }
            mma_tf32(d[m][j], a[0][m], w[0][0], w[0][1]);
          }
        }
      }
#pragma unroll
      for (int j = 0; j < L::groups; ++j)
#pragma unroll
        for (int i = 0; i < 2 * L::m_tiles; ++i) {
          float best[2];
          u32 at[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const auto z = [&](int position) {
              return d[i / 2][j * positions + position][i % 2 * 2 + e];
            };
            best[e] = z(0);
#pragma unroll
            for (int position = 1; position < positions; ++position)
              best[e] = max_or_nan(best[e], z(position));
            // the first that is not less
            at[e] = positions;
#pragma unroll
            for (int position = positions - 1; position > 0; --position)
              at[e] = z(position - 1) < best[e] ? at[e] : position;
            if (L::relu && best[e] <= 0.f) {
              best[e] = 0.f;
              at[e] = 0;
            }
          }
          emit(i * 8 + g, (pass * L::groups + j) * 8 + 2 * t, best, at);
        }
    }
  }

  // Writes what emit is given: y and code at (n, k, window of the plane), which starts
  // at window0 for the tile.
  static __device__ __forceinline__ void write(float* y, u8* code, int n, int k,
                                               int window0, int window,
                                               const float (&v)[2],
                                               const u32 (&at)[2]) {
    constexpr int plane = pooled_p * pooled_q;
    // what can be seen now costs no branch: there are many stores
    constexpr bool whole = windows % (8 * L::groups) == 0 && plane % windows == 0;
    if (L::outputs % 16 && k >= L::outputs) return;
    const long long out = ((long long)n * L::outputs + k) * plane + window0 + window;
    if (plane % 2 == 0 && windows % 2 == 0) {
      if (whole || (window < windows && window0 + window < plane)) {
        *(float2*)(y + out) = make_float2(v[0], v[1]);
        if (code) *(u16*)(code + out) = at[0] | at[1] << 8;
      }
    } else {
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (window + e < windows && window0 + window + e < plane) {
          y[out + e] = v[e];
          if (code) code[out + e] = at[e];
        }
    }
  }
};

// Element i of an image: of a batch, or of a data set of bytes.
struct PixelOfBatch {
  const float* image;
  __device__ __forceinline__ float operator()(int i) const { return image[i]; }
};
struct PixelOfBytes {
  const u8* image;
  float scale, shift;
  __device__ __forceinline__ float operator()(int i) const {
    // rounded twice, as gather_images does: a fused multiply-add would differ
    return __fadd_rn(__fmul_rn(image[i], scale), shift);
  }
};
