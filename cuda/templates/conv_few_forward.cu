// conv_block_forward for few input channels (as in a first layer); how: conv_few.cuh.
//
// GATHER: x is made here from the data set, x[n] = images[index[n]] * scale + shift,
// and written to x_out where that is not null (the backward needs it).
//
// Launch: grid (N x row tiles, channel tiles), block 32 WARPS, dynamic shared memory
// SHARED_BYTES, N >= 1.
#include "conv_few.cuh"

struct Layer {
  static constexpr int channels = C, height = H, width = W, outputs = K;
  static constexpr int filter_h = R, filter_w = S, stride_h = STRIDE_H,
                       stride_w = STRIDE_W;
  static constexpr int pad_h = PAD_H, pad_w = PAD_W, pool_h = POOL_H, pool_w = POOL_W;
  static constexpr int relu = RELU, bias = HAS_BIAS, mode = MODE;
  static constexpr int rows = TPP, m_tiles = TK / 16, groups = GROUPS,
                       threads = 32 * WARPS;
};
typedef Few<Layer> Conv;
static_assert(Conv::bytes <= SHARED_BYTES && TK % 16 == 0,
              "shared memory, whole fragments");

extern "C" __global__ void __launch_bounds__(32 * WARPS) conv_few_forward(
#if GATHER
    const u8* images,  // [M][C][H][W]
    const int* index,  // [N]
    float scale, float shift,
    float* x_out,  // [N][C][H][W] or null
#else
    const float* x,  // [N][C][H][W]
#endif
    const float* filter,  // [K][C][R][S]
    const float* bias,    // [K]
    float* y,             // [N][K][PP][QQ]
    u8* code) {           // the same, or null
  extern __shared__ __align__(16) u32 shared[];
  const int n = blockIdx.x / Conv::row_tiles, tile = blockIdx.x % Conv::row_tiles;
  const int k0 = blockIdx.y * TK;
  wait_for_earlier_kernels();
  let_next_kernel_start();

  float b[Conv::m_tiles][2];
  Conv::load_bias(b, bias, k0);
#if GATHER
  const PixelOfBytes pixel{images + (long long)index[n] * (C * H * W), scale, shift};
#else
  const PixelOfBatch pixel{x + (long long)n * (C * H * W)};
#endif
  Conv::load(shared, pixel, filter, tile * TPP * POOL_H * STRIDE_H - PAD_H, k0);
#if GATHER
  if (x_out != nullptr && blockIdx.y == 0)
    for (int i = tile * 32 * WARPS + threadIdx.x; i < C * H * W;
         i += Conv::row_tiles * 32 * WARPS)
      x_out[(long long)n * (C * H * W) + i] = pixel(i);
#endif
  __syncthreads();
  Conv::multiply(shared, b, threadIdx.x / 32, WARPS,
                 [&](int k, int window, const float (&v)[2], const u32(&at)[2]) {
                   Conv::write(y, code, n, k0 + k, tile * Conv::windows, window, v, at);
                 });
}
