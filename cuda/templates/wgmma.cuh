// Warpgroup matrix product of Hopper (sm_90a): d += a b with both operands in shared
// memory.
//
// Four warps multiply a 64 x 8 words by b 8 words x n. Without swizzling an operand is
// made of core matrices, 8 rows x 16 bytes lying in 128 consecutive bytes, where a row
// is a row of a or a column of b. Warp w of the four holds rows 16 w to 16 w + 15 of d;
// in it, d[4 j + e] is element e of the fragment of columns 8 j to 8 j + 7 (see
// fused.cuh).
#pragma once
#include "fused.cuh"

// k_step: bytes from the core matrix of words 0-3 to that of words 4-7; row_step: bytes
// from 8 rows to the next 8. Adding n to a descriptor moves it by 16 n bytes.
__device__ __forceinline__ u64 wgmma_operand(u32 address, u32 k_step, u32 row_step) {
  return (u64)((address & 0x3ffffu) >> 4) | ((u64)(k_step >> 4) << 16) |
         ((u64)(row_step >> 4) << 32);
}
// before the first product, and whenever registers of d were written otherwise
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// keeps reads of d behind the wait
template <int count>
__device__ __forceinline__ void wgmma_own(float (&d)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D8(i) D4(i), D4(i + 4)
#define D16(i) D8(i), D8(i + 8)
#define D32(i) D16(i), D16(i + 16)
#define D64(i) D32(i), D32(i + 32)
#define REGISTERS_4 "%0,%1,%2,%3"
#define REGISTERS_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define REGISTERS_16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define REGISTERS_32                                       \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define REGISTERS_64                                                 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"           \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31," \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
  "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
// operands after the registers: descriptors of a and b, and whether d is added to
#define WGMMA_(n, registers, a, b, p, d_list)                                     \
  if constexpr (mode == MODE_BF16)                                                \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #p                            \
                 ", 0;"                                                           \
                 " wgmma.mma_async.sync.aligned.m64n" #n                          \
                 "k16.f32.bf16.bf16 {" registers "}, %" #a ", %" #b               \
                 ", p, 1, 1, 0, 0; }"                                             \
                 : d_list                                                         \
                 : "l"(a_desc), "l"(b_desc), "r"(add));                           \
  else                                                                            \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #p                            \
                 ", 0;"                                                           \
                 " wgmma.mma_async.sync.aligned.m64n" #n                          \
                 "k8.f32.tf32.tf32 {" registers "}, %" #a ", %" #b ", p, 1, 1; }" \
                 : d_list                                                         \
                 : "l"(a_desc), "l"(b_desc), "r"(add));

// d = a b + (add ? d : 0), queued: 64 rows, n columns
template <int mode, int n>
__device__ __forceinline__ void wgmma(float (&d)[n / 2], u64 a_desc, u64 b_desc,
                                      int add) {
  static_assert(n == 8 || n == 16 || n == 32 || n == 64 || n == 128, "columns");
  if constexpr (n == 8) {
    WGMMA_(8, REGISTERS_4, 4, 5, 6, D4(0))
  } else if constexpr (n == 16) {
    WGMMA_(16, REGISTERS_8, 8, 9, 10, D8(0))
  } else if constexpr (n == 32) {
    WGMMA_(32, REGISTERS_16, 16, 17, 18, D16(0))
  } else if constexpr (n == 64) {
    WGMMA_(64, REGISTERS_32, 32, 33, 34, D32(0))
  } else if constexpr (n == 128) {
    WGMMA_(128, REGISTERS_64, 64, 65, 66, D64(0))
  }
}

// d += a b in tf32, queued: 64 rows, 40 columns; a is a fragment of mma.sync in each
// warp (fused.cuh), which stays as it is until the product is done
__device__ __forceinline__ void wgmma_of_registers(float (&d)[20], const u32 (&a)[4],
                                                   u64 b_desc) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n40k8.f32.tf32.tf32 {" REGISTERS_16
      ",%16,%17,%18,%19}, {%20,%21,%22,%23}, %24, 1, 1, 1;"
      : D16(0), D4(16)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_desc));
}
// The same with 16 words of contraction and 24 columns, where a has one number of each
// two. places: of the 8 numbers of a row 4 bits each, 0x4 for the first and 0xe for the
// second of two. The lanes t = 0 and 2 of a quad have those of words 0 to 7, t = 1 and 3
// those of 8 to 15, of row g in the lower half, of g + 8 in the upper one.
__device__ __forceinline__ void wgmma_sparse_of_registers(float (&d)[12],
                                                          const u32 (&a)[4], u64 b_desc,
                                                          u32 places) {
  asm volatile(
      "wgmma.mma_async.sp.sync.aligned.m64n24k16.f32.tf32.tf32 {" REGISTERS_8
      ",%8,%9,%10,%11}, {%12,%13,%14,%15}, %16, %17, 0, 1, 1, 1;"
      : D8(0), D4(8)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_desc), "r"(places));
}

#undef D4
#undef D8
#undef D16
#undef D32
#undef D64
#undef WGMMA_
#undef REGISTERS_4
#undef REGISTERS_8
#undef REGISTERS_16
#undef REGISTERS_32
#undef REGISTERS_64
