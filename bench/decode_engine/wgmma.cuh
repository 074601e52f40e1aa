// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda.h>

#include <cstdint>

/// \file
/// The matrix products of a warpgroup of compute capability 9.0, whose operands lie in shared
/// memory, and copies into it (NVIDIA, "PTX ISA", 9.0, sections 9.7.15 and 9.7.9.25).
///
/// Operands lie in blocks of 64 columns: a row of a block has 128 bytes, whose 16-byte parts change
/// places with those that differ in the row's last three bits, so that eight rows, read in a column
/// of parts, meet all banks. A block begins at a multiple of 1024 bytes.

namespace decode_engine::kernels::wgmma {

inline constexpr int kBlockColumns = 64;
inline constexpr int kBlockRowBytes = 128;

/// Where a 16-byte part of a row lies in its block.
__device__ __forceinline__ constexpr unsigned place_of(unsigned row, unsigned part) {
  return row * kBlockRowBytes + (part ^ row % 8) * 16;
}

/// An operand whose rows are read along their elements: eight rows lie 1024 bytes behind the last.
__device__ __forceinline__ std::uint64_t along_rows(unsigned address) {
  return (std::uint64_t{1} << 62) | (std::uint64_t{1024 / 16} << 32) | (std::uint64_t{1} << 16) |
         (address >> 4);
}
/// One whose columns are: the next block of columns lies `block_bytes` behind.
__device__ __forceinline__ std::uint64_t along_columns(unsigned address, unsigned block_bytes) {
  return (std::uint64_t{1} << 62) | (std::uint64_t{1024 / 16} << 32) |
         (static_cast<std::uint64_t>(block_bytes / 16) << 16) | (address >> 4);
}

/// In front of products whose accumulators were written by other instructions.
__device__ __forceinline__ void begin() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}
/// Behind the products that are waited for together.
__device__ __forceinline__ void commit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}
/// Waits for all of them.
__device__ __forceinline__ void finish() {
  asm volatile("wgmma.wait_group.sync.aligned 0;\n" ::: "memory");
}
/// Keeps the compiler from reading or writing accumulators elsewhere than here.
template <int kCount>
__device__ __forceinline__ void pin(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    asm volatile("" : "+f"(d[i])::"memory");
  }
}

/// d [64, 64] = a [64, 16] times b [16, 64], or that added to it; b's columns lie along its rows,
/// or its rows do where it is transposed. A thread's elements are, for each 8 columns, two
/// neighbours of row (thread % 32) / 4 of its warp's 16 and two of the row 8 below.
template <int kTransposed>
__device__ __forceinline__ void multiply_async(float (&d)[32], std::uint64_t a, std::uint64_t b,
                                               int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
      "}, %32, %33, p, 1, 1, 0, %35;\n}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "l"(a), "l"(b), "r"(add), "n"(kTransposed));
}

/// The same of 128 columns.
template <int kTransposed>
__device__ __forceinline__ void multiply_async(float (&d)[64], std::uint64_t a, std::uint64_t b,
                                               int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
      "}, %64, %65, p, 1, 1, 0, %67;\n}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]),
        "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]),
        "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
        "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
        "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]),
        "+f"(d[63])
      : "l"(a), "l"(b), "r"(add), "n"(kTransposed));
}

/// Lets products see what this thread wrote, once a barrier is behind.
__device__ __forceinline__ void publish() { asm volatile("fence.proxy.async;\n" ::: "memory"); }

/// A barrier in shared memory that ends when one thread has said how many bytes are to come and
/// these have come. Set up by one thread, in front of a barrier of all.
__device__ __forceinline__ void set_up_arrival(unsigned arrival) {
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;\n"
      "fence.proxy.async;\n" ::"r"(arrival)
      : "memory");
}
__device__ __forceinline__ void expect(unsigned arrival, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(arrival), "r"(bytes)
               : "memory");
}
/// Waits for the end of its first use, whose phase is 0, its second with 1, its third with 0 ...
__device__ __forceinline__ void wait_for(unsigned arrival, unsigned phase) {
  unsigned ended = 0;
  do {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(ended)
        : "r"(arrival), "r"(phase)
        : "memory");
  } while (ended == 0);
  __syncwarp();
}
/// One thread copies a map's box into shared memory. What lies outside of the map is zeros.
__device__ __forceinline__ void copy_box(unsigned to, const CUtensorMap& map, int column, int row,
                                         unsigned arrival) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
      "%3}], [%4];\n" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(arrival)
      : "memory");
}
__device__ __forceinline__ void copy_box(unsigned to, const CUtensorMap& map, int column, int row,
                                         int plane, unsigned arrival) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
      "%3, %4}], [%5];\n" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(plane), "r"(arrival)
      : "memory");
}

/// Barriers between some of a block's warps, besides the first one, which is __syncthreads'.
template <int kBarrier, int kThreads>
__device__ __forceinline__ void wait_at() {
  asm volatile("bar.sync %0, %1;\n" ::"n"(kBarrier), "n"(kThreads) : "memory");
}
/// Is counted, and goes on.
template <int kBarrier, int kThreads>
__device__ __forceinline__ void arrive_at() {
  asm volatile("bar.arrive %0, %1;\n" ::"n"(kBarrier), "n"(kThreads) : "memory");
}

}  // namespace decode_engine::kernels::wgmma
