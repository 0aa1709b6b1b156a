// Helpers shared by the fused kernels: every instruction that C++ has no word for.
//
// Tensor cores multiply 16-bit or 19-bit operands and add in float32. The kernels speak
// of WORDS of 32 bits along the contraction: one tf32 number, or two bf16 numbers (the
// lower index in the lower half). mma.m16n8k8.tf32 and mma.m16n8k16.bf16 then have the
// same shape, 16 x 8 x 8 words, and the same fragments (g = lane / 4, t = lane % 4):
//   A 16 x 8:  a[0] = A[g][t]  a[1] = A[g+8][t]  a[2] = A[g][t+4]  a[3] = A[g+8][t+4]
//   B 8 x 8:   b[0] = B[t][g]  b[1] = B[t+4][g]
//   D 16 x 8:  d[0] = D[g][2t] d[1] = D[g][2t+1] d[2] = D[g+8][2t] d[3] = D[g+8][2t+1]
// Precision of the operands, MODE:
//   0 "fp32"  x = big + small, both tf32 (22 bits): big*big + big*small + small*big
//   1 "tf32"  rounded to nearest tf32 (11 bits)
//   2 "bf16"  rounded to nearest bf16 (8 bits)
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

enum { MODE_FP32 = 0, MODE_TF32 = 1, MODE_BF16 = 2 };

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }

// ---- rounding

// Nearest tf32, ties away from zero; NaN and infinities stay what they are.
__device__ __forceinline__ u32 round_tf32(float x) {
  u32 word;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(x));
  return word;
}
// x - round_tf32(x), itself rounded: what "fp32" adds to tf32. Beside an infinite big
// part it is 0, not inf - inf.
__device__ __forceinline__ u32 rest_tf32(float x, u32 big) {
  const float rest = x - __uint_as_float(big);
  return (big & 0x7f800000u) == 0x7f800000u ? 0u : round_tf32(rest);
}
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
  u32 word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// the larger one, or NaN if one of them is
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float v;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
  return v;
}

// ---- warp matrix product, d += a b

__device__ __forceinline__ void mma_tf32(float (&d)[4], const u32 (&a)[4], u32 b0,
                                         u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0,
                                         u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <int mode>
__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  if (mode == MODE_BF16) mma_bf16(d, a, b0, b1);
  else mma_tf32(d, a, b0, b1);
}

// ---- shared memory by 32-bit address

__device__ __forceinline__ u32 shared_address(const void* p) {
  return (u32)__cvta_generic_to_shared(p);
}
__device__ __forceinline__ u32 load_shared(u32 address) {
  u32 v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}
__device__ __forceinline__ uint4 load_shared4(u32 address) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
__device__ __forceinline__ void store_shared4(u32 address, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(v.x),
               "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
// Four matrices of 8 rows x 16 bytes; lane i gives the address of row i % 8 of matrix i
// / 8 and receives word t of row g of each matrix: what mma fragments are made of.
__device__ __forceinline__ void load_matrices(u32 (&v)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(address)
               : "memory");
}

// ---- asynchronous copies, global to shared memory

__device__ __forceinline__ void copy_async16(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from)
               : "memory");
}
__device__ __forceinline__ void copy_async4(u32 to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from)
               : "memory");
}
__device__ __forceinline__ void copy_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int pending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// ---- barriers in shared memory (8 bytes each): a phase ends when all arrivals and all
// expected bytes have come

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals)
               : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
  asm volatile(
      "{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(barrier)
      : "memory");
}
// arrives when this thread's copies so far are complete
__device__ __forceinline__ void barrier_arrive_copies(u32 barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier)
               : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
  u32 done;
  do {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2;"
        " selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
#else
    asm volatile(
        "{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2;"
        " selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
#endif
  } while (!done);
}
#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier),
               "r"(bytes)
               : "memory");
}
// one thread copies many bytes (addresses and size: multiples of 16)
__device__ __forceinline__ void copy_bulk(u32 to, const void* from, u32 bytes,
                                          u32 barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], "
      "%2, [%3];" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}
// makes ordinary stores to shared memory visible to wgmma and bulk copies
__device__ __forceinline__ void fence_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
#endif
// makes initialised barriers visible to bulk copies
__device__ __forceinline__ void barrier_init_fence() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
__device__ __forceinline__ void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// ---- thread-block clusters: before Hopper a block is alone, and its own cluster

// Every block runs, and what it initialised before arriving is visible. Relaxed: the
// default also waits for all stores to memory, which takes a microsecond.
__device__ __forceinline__ void arrive_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
#if __CUDA_ARCH__ >= 900
// *p = v in the shared memory of block `rank`; counts 4 bytes on its barrier
__device__ __forceinline__ void send_to_block(u32 p, u32 barrier, u32 rank, float v) {
  asm volatile(
      "{ .reg .b32 a, b; mapa.shared::cluster.u32 a, %0, %2; mapa.shared::cluster.u32 "
      "b, %1, %2;"
      " st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [a], %3, [b]; "
      "}" ::"r"(p),
      "r"(barrier), "r"(rank), "r"(__float_as_uint(v))
      : "memory");
}
// the same of two numbers, p a multiple of 8
__device__ __forceinline__ void send_pair_to_block(u32 p, u32 barrier, u32 rank,
                                                   float v, float w) {
  asm volatile(
      "{ .reg .b32 a, b; mapa.shared::cluster.u32 a, %0, %2; mapa.shared::cluster.u32 "
      "b, %1, %2;"
      " st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [a], "
      "{%3, %4}, [b]; }" ::"r"(p),
      "r"(barrier), "r"(rank), "r"(__float_as_uint(v)), "r"(__float_as_uint(w))
      : "memory");
}
// as copy_bulk, to the same place in all blocks of a mask, each with its own barrier
__device__ __forceinline__ void copy_bulk_to_cluster(u32 to, const void* from,
                                                     u32 bytes, u32 barrier,
                                                     u16 blocks) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "h"(blocks)
      : "memory");
}
// as barrier_wait, for what other blocks sent
__device__ __forceinline__ void barrier_wait_cluster(u32 barrier, u32 parity) {
  u32 done;
  do {
    asm volatile(
        "{ .reg .pred p;"
        " mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;"
        " selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}
#endif

// ---- programmatic dependent launch; without the launch attribute these do nothing

// what earlier kernels wrote may be read, and what they read may be written, after this
__device__ __forceinline__ void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// A number that the kernel ahead wrote, where this one has loads before its wait too.
// What __ldg reads, or a const __restrict__ pointer, nobody writes while the kernel
// runs: that is what they say, and the assembler moves such loads ahead of the wait.
template <class T>
__device__ __forceinline__ T load_fresh(const T* from) {
  return __ldcg(from);
}
// the next kernel may start, up to its own wait
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
