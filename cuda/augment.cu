// Batches of images that are changed in random ways while they are read out of the data
// set: moved, mirrored, turned and zoomed about their middle, a square cut out.
//
//   out[n,c,h,w] = v * scale[c] + shift[c]
//
// v is the image's value at the place that (h, w) comes from, found backwards: mirror,
// move, then turn and zoom. Between pixels it is interpolated between four; outside of
// the image it is 0. What is cut out is 0 in `out`.
//
// What happens to an image depends on the key, made from seed and epoch, and on the
// number of the sample: nothing is kept between launches, and any thread can work it
// out. Every product and sum is rounded on its own (__fmul_rn, __fadd_rn are never
// fused), so the bits are those of the CPU; draw_ways in ops/reference_augment.py is
// the same in NumPy, and says where sine and cosine come from.
#include "common.cuh"

DEVICE uint32 mix32(uint32 x) {  // the finaliser of MurmurHash3
  x ^= x >> 16;
  x *= 0x85ebca6bu;
  x ^= x >> 13;
  x *= 0xc2b2ae35u;
  x ^= x >> 16;
  return x;
}

struct Draws {
  uint32 start;

  METHOD Draws(int sample, const int* key)
      : start(mix32(mix32((uint32)sample * 0x9e3779b9u + (uint32)key[0]) +
                    (uint32)key[1])) {}
  METHOD uint32 draw(uint32 j) const { return mix32(start + 0x9e3779b9u * (j + 1)); }
  METHOD int integer(uint32 j, int count) const {
    return (int)((uint64)draw(j) * (uint32)count >> 32);
  }
  // uniform in -1 .. 1
  METHOD float symmetric(uint32 j) const {
    const float uniform = __fmul_rn((float)(draw(j) >> 8), 5.9604644775390625e-8f);
    return __fadd_rn(__fmul_rn(uniform, 2.0f), -1.0f);
  }
};

DEVICE float affine(float x, float scale, float shift) {
  return __fadd_rn(__fmul_rn(x, scale), shift);
}

template <class T>
DEVICE float pixel(const T* plane, int H, int W, int h, int w) {
  return 0 <= h && h < H && 0 <= w && w < W ? (float)plane[h * W + w] : 0.0f;
}

// (1 - t) a + t b
DEVICE float between(float a, float b, float t) {
  return __fadd_rn(__fmul_rn(__fadd_rn(1.0f, -t), a), __fmul_rn(t, b));
}

template <class T>
DEVICE void augment(float* __restrict__ out,          // (N, C, H, W)
                    const T* __restrict__ images,     // (count, C, H, W)
                    const int* __restrict__ index,    // (N,)
                    const int* __restrict__ samples,  // (N,); null: nothing is changed
                    const int* __restrict__ key,      // (2,)
                    const float* __restrict__ scale,  // (C,)
                    const float* __restrict__ shift,  // (C,)
                    int N, int C, int H, int W, int count, int far_down, int far_right,
                    int flip, float rotation, float zoom, int cutout) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= C * H * W) return;
  const int w = i % W, h = i / W % H, c = i / W / H;
  const float of_scale = scale[c], of_shift = shift[c];
#pragma unroll 1
  for (int n = blockIdx.y; n < N; n += gridDim.y) {
    float* target = out + (int64)n * C * H * W + i;
    const int at = index[n];
    if (at < 0 || at >= count) {
      *target = not_a_number();
      continue;
    }
    const T* plane = images + ((int64)at * C + c) * H * W;
    if (samples == nullptr) {
      *target = affine((float)plane[h * W + w], of_scale, of_shift);
      continue;
    }
    const Draws draws(samples[n], key);
    if (cutout) {
      const int top = draws.integer(5, H) - cutout / 2;
      const int left = draws.integer(6, W) - cutout / 2;
      if (top <= h && h - top < cutout && left <= w && w - left < cutout) {
        *target = 0.0f;
        continue;
      }
    }
    const bool mirrored = flip && (draws.draw(2) & 1);
    const int row = h - (draws.integer(0, 2 * far_down + 1) - far_down);
    const int column = (mirrored ? W - 1 - w : w) -
                       (draws.integer(1, 2 * far_right + 1) - far_right);
    float v;
    if (rotation != 0.0f || zoom != 0.0f) {
      const float angle = __fmul_rn(draws.symmetric(3), rotation);
      const float size = __fadd_rn(1.0f, __fmul_rn(draws.symmetric(4), zoom));
      const float square = __fmul_rn(angle, angle);
      float sine = -1.0f / 39916800.0f, cosine = -1.0f / 3628800.0f;
      sine = affine(sine, square, 1.0f / 362880.0f);
      sine = affine(sine, square, -1.0f / 5040.0f);
      sine = affine(sine, square, 1.0f / 120.0f);
      sine = affine(sine, square, -1.0f / 6.0f);
      sine = affine(sine, square, 1.0f);
      cosine = affine(cosine, square, 1.0f / 40320.0f);
      cosine = affine(cosine, square, -1.0f / 720.0f);
      cosine = affine(cosine, square, 1.0f / 24.0f);
      cosine = affine(cosine, square, -1.0f / 2.0f);
      cosine = affine(cosine, square, 1.0f);
      const float a = __fdiv_rn(cosine, size);
      const float b = __fdiv_rn(__fmul_rn(sine, angle), size);
      const float middle_h = __fmul_rn((float)(H - 1), 0.5f);
      const float middle_w = __fmul_rn((float)(W - 1), 0.5f);
      const float y = __fadd_rn((float)row, -middle_h);
      const float x = __fadd_rn((float)column, -middle_w);
      const float from_h =
          __fadd_rn(__fadd_rn(__fmul_rn(a, y), -__fmul_rn(b, x)), middle_h);
      const float from_w =
          __fadd_rn(__fadd_rn(__fmul_rn(a, x), __fmul_rn(b, y)), middle_w);
      const int top = (int)floorf(from_h), left = (int)floorf(from_w);
      const float down = __fadd_rn(from_h, -(float)top);
      const float right = __fadd_rn(from_w, -(float)left);
      const float upper = between(pixel(plane, H, W, top, left),
                                  pixel(plane, H, W, top, left + 1), right);
      const float lower = between(pixel(plane, H, W, top + 1, left),
                                  pixel(plane, H, W, top + 1, left + 1), right);
      v = between(upper, lower, down);
    } else {
      v = pixel(plane, H, W, row, column);
    }
    *target = affine(v, of_scale, of_shift);
  }
}

// Launch: grid (blocks over one image, images or fewer), one-dimensional blocks.
extern "C" __global__ void augment_images_uint8(
    float* out, const uint8* images, const int* index, const int* samples,
    const int* key, const float* scale, const float* shift, int N, int C, int H, int W,
    int count, int far_down, int far_right, int flip, float rotation, float zoom,
    int cutout) {
  augment(out, images, index, samples, key, scale, shift, N, C, H, W, count, far_down,
          far_right, flip, rotation, zoom, cutout);
}

extern "C" __global__ void augment_images_float32(
    float* out, const float* images, const int* index, const int* samples,
    const int* key, const float* scale, const float* shift, int N, int C, int H, int W,
    int count, int far_down, int far_right, int flip, float rotation, float zoom,
    int cutout) {
  augment(out, images, index, samples, key, scale, shift, N, C, H, W, count, far_down,
          far_right, flip, rotation, zoom, cutout);
}

// samples[n] = order[position[0] - size + n], -1 beyond the ends of the order.
// Launch: any one-dimensional grid and block.
extern "C" __global__ void samples_of_step(int* samples,         // (count,)
                                           const int* order,     // (images,)
                                           const int* position,  // (2,)
                                           int size, int count, int images) {
  const int64 first = (int64)position[0] - size;
#pragma unroll 1
  for (int64 n = grid_thread(); n < count; n += grid_threads()) {
    const int64 at = first + n;
    samples[n] = 0 <= at && at < images ? order[at] : -1;
  }
}
