// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>

#include <cstdint>

#include "operand_block.hpp"

/// \file
/// The matrix products of a warpgroup of compute capability 9.0, whose operands lie in shared
/// memory, and copies into it (NVIDIA, "PTX ISA", 9.0, sections 9.7.15 and 9.7.9.25).
///
/// Operands lie in blocks of 64 columns: a row of a block has 128 bytes, whose 16-byte parts change
/// places with those that differ in the row's last three bits, so that eight rows, read in a column
/// of parts, meet all banks. A block begins at a multiple of 1024 bytes.

namespace decode_engine::kernels::wgmma {

/// Where a 16-byte part of a row lies in its block.
__device__ __forceinline__ constexpr unsigned place_of(unsigned row, unsigned part) {
  return row * kBlockRowBytes + (part ^ row % 8) * 16;
}

/// The same of rows of 32 bytes, of which four meet all banks.
__device__ __forceinline__ constexpr unsigned place_of_32(unsigned row, unsigned part) {
  return row * 32 + (part ^ row / 4 % 2) * 16;
}

/// An operand whose rows are read along their elements: eight rows lie 1024 bytes behind the last.
__device__ __forceinline__ std::uint64_t along_rows(unsigned address) {
  return (std::uint64_t{1} << 62) | (std::uint64_t{1024 / 16} << 32) | (std::uint64_t{1} << 16) |
         (address % (1 << 18) >> 4);
}
/// One of 16 columns, whose rows lie without gaps, as `place_of_32` says.
__device__ __forceinline__ std::uint64_t along_rows_of_32(unsigned address) {
  return (std::uint64_t{3} << 62) | (std::uint64_t{256 / 16} << 32) | (std::uint64_t{1} << 16) |
         (address % (1 << 18) >> 4);
}
/// One whose columns are: the next block of columns lies `block_bytes` behind.
__device__ __forceinline__ std::uint64_t along_columns(unsigned address, unsigned block_bytes) {
  return (std::uint64_t{1} << 62) | (std::uint64_t{1024 / 16} << 32) |
         (static_cast<std::uint64_t>(block_bytes / 16) << 16) | (address % (1 << 18) >> 4);
}

/// So many bytes behind another. Whole operands would take longer to form than to multiply.
__device__ __forceinline__ std::uint64_t behind(std::uint64_t operand, unsigned bytes) {
  std::uint64_t result = 0;
  asm("{\n.reg .b32 low, high;\nmov.b64 {low, high}, %1;\nadd.u32 low, low, %2;\n"
      "mov.b64 %0, {low, high};\n}\n"
      : "=l"(result)
      : "l"(operand), "r"(bytes / 16));
  return result;
}

/// In front of products whose accumulators were written by other instructions.
__device__ __forceinline__ void begin() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}
/// Behind the products that are waited for together.
__device__ __forceinline__ void commit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}
/// Waits for all of them but those behind the last `kLeft` commits.
template <int kLeft = 0>
__device__ __forceinline__ void finish() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kLeft) : "memory");
}
/// Keeps the compiler from reading or writing accumulators elsewhere than here.
template <int kCount>
__device__ __forceinline__ void pin(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    asm volatile("" : "+f"(d[i])::"memory");
  }
}

/// d [64, 64] = a [64, 16] times b [16, 64], or that added to it; a lies in registers, b's columns
/// lie along its rows. A thread's elements of d are, for each 8 columns, two neighbours of row
/// (thread % 32) / 4 of its warp's 16 and two of the row 8 below; of a they are as of d for its
/// first 8 columns, then for its last.
__device__ __forceinline__ void multiply_async(float (&d)[32], const unsigned (&a)[4],
                                               std::uint64_t b, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
      "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

/// The same added to it, with a in shared memory, whose rows are read along their elements.
__device__ __forceinline__ void multiply_async(float (&d)[32], std::uint64_t a, std::uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
      "}, %32, %33, 1, 1, 1, 0, 0;\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "l"(a), "l"(b));
}
/// With b's rows along its columns.
__device__ __forceinline__ void multiply_by_columns_async(float (&d)[32], std::uint64_t a,
                                                          std::uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
      "}, %32, %33, 1, 1, 1, 0, 1;\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "l"(a), "l"(b));
}
/// The same of 256 columns.
__device__ __forceinline__ void multiply_by_columns_async(float (&d)[128], std::uint64_t a,
                                                          std::uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, "
      "%127"
      "}, %128, %129, 1, 1, 1, 0, 1;\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]),
        "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]),
        "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
        "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
        "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]),
        "+f"(d[63]), "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]),
        "+f"(d[70]), "+f"(d[71]), "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]),
        "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]),
        "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), "+f"(d[88]), "+f"(d[89]), "+f"(d[90]),
        "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]), "+f"(d[96]), "+f"(d[97]),
        "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]),
        "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]),
        "+f"(d[110]), "+f"(d[111]), "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]),
        "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), "+f"(d[120]), "+f"(d[121]),
        "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
      : "l"(a), "l"(b));
}

/// Four 8 x 8 parts of an operand, each row's address from a lane: the registers of 16 x 16
/// elements.
__device__ __forceinline__ void load_parts(unsigned (&a)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(address)
               : "memory");
}
/// The other way round.
__device__ __forceinline__ void store_parts(unsigned address, const unsigned (&a)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(address),
               "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
               : "memory");
}

__device__ __forceinline__ void store(unsigned address, float value) {
  asm volatile("st.shared.f32 [%0], %1;\n" ::"r"(address), "f"(value) : "memory");
}
__device__ __forceinline__ void store(unsigned address, float first, float second) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};\n" ::"r"(address), "f"(first), "f"(second)
               : "memory");
}
__device__ __forceinline__ void store(unsigned address, __nv_bfloat162 pair) {
  asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(address),
               "r"(reinterpret_cast<const unsigned&>(pair))
               : "memory");
}
__device__ __forceinline__ float load(unsigned address) {
  float value = 0;
  asm volatile("ld.shared.f32 %0, [%1];\n" : "=f"(value) : "r"(address) : "memory");
  return value;
}

/// Lets products see what this thread wrote, once a barrier is behind.
__device__ __forceinline__ void publish() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

/// A barrier in shared memory that ends when so many arrivals were counted and all bytes have come
/// that were said to come. Set up by one thread, in front of a barrier of all.
__device__ __forceinline__ void set_up_arrival(unsigned arrival, unsigned count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(arrival), "r"(count) : "memory");
}
/// Behind the last of them.
__device__ __forceinline__ void publish_arrivals() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}
/// Is counted, and says how many bytes are to come.
__device__ __forceinline__ void expect(unsigned arrival, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(arrival), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void arrive(unsigned arrival) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(arrival) : "memory");
}
/// Is counted so often by the same barrier of a block of the cluster.
__device__ __forceinline__ void arrive_in(unsigned block, unsigned arrival, unsigned count) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there], %2;\n}\n" ::"r"(arrival),
      "r"(block), "r"(count)
      : "memory");
}
/// Whether its first use has ended, whose phase is 0, its second with 1, its third with 0 ...
__device__ __forceinline__ bool ended(unsigned arrival, unsigned phase) {
  unsigned result = 0;
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}\n"
      : "=r"(result)
      : "r"(arrival), "r"(phase)
      : "memory");
  return result != 0;
}
/// Waits for that.
__device__ __forceinline__ void wait_for(unsigned arrival, unsigned phase) {
  unsigned result = 0;
  do {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(result)
        : "r"(arrival), "r"(phase)
        : "memory");
  } while (result == 0);
  __syncwarp();
}

/// Of the launch. Read anew, so that nothing that follows from it takes registers between.
__device__ __forceinline__ unsigned block() {
  unsigned result = 0;
  asm volatile("mov.u32 %0, %%ctaid.x;\n" : "=r"(result));
  return result;
}
/// Of the block, likewise.
__device__ __forceinline__ unsigned thread() {
  unsigned result = 0;
  asm volatile("mov.u32 %0, %%tid.x;\n" : "=r"(result));
  return result;
}
/// Which block of its cluster this is, and of how many.
__device__ __forceinline__ unsigned block_in_cluster() {
  unsigned result = 0;
  asm("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(result));
  return result;
}
__device__ __forceinline__ unsigned blocks_of_cluster() {
  unsigned result = 0;
  asm("mov.u32 %0, %%cluster_nctarank;\n" : "=r"(result));
  return result;
}
/// Waits for all threads of the cluster; orders nothing but barriers that were set up.
__device__ __forceinline__ void wait_for_cluster() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;\n" ::
                   : "memory");
}

/// The same, and that what was written in shared memory before is seen there after.
__device__ __forceinline__ void meet_cluster() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;\n" ::: "memory");
}
/// Where an address of shared memory lies in another block of the cluster.
__device__ __forceinline__ unsigned address_in(unsigned block, unsigned address) {
  unsigned result = 0;
  asm("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(result) : "r"(address), "r"(block));
  return result;
}
__device__ __forceinline__ float load_there(unsigned address) {
  float result = 0;
  asm volatile("ld.shared::cluster.f32 %0, [%1];\n" : "=f"(result) : "r"(address) : "memory");
  return result;
}
__device__ __forceinline__ float4 load4_there(unsigned address) {
  float4 result;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];\n"
               : "=f"(result.x), "=f"(result.y), "=f"(result.z), "=f"(result.w)
               : "r"(address)
               : "memory");
  return result;
}

/// Fetches what a map says, of which the first copy would otherwise have to wait.
__device__ __forceinline__ void fetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(&map) : "memory");
}

/// Has the second-level cache fetch a line, and looks up its address.
__device__ __forceinline__ void prefetch(const void* line) {
  asm volatile("prefetch.global.L2 [%0];\n" ::"l"(line));
}

/// Waits until the kernel before, behind which this one was launched early, is over.
__device__ __forceinline__ void wait_for_kernel_before() {
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
}
/// Once all blocks were here, the next kernel may begin that waits so.
__device__ __forceinline__ void launch_next_kernel() {
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
}

/// One thread copies a map's box into shared memory. What lies outside of the map is zeros.
__device__ __forceinline__ void copy_box(unsigned to, const CUtensorMap& map, int column, int row,
                                         int plane, unsigned arrival) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
      "%3, %4}], [%5];\n" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(plane), "r"(arrival)
      : "memory");
}

/// The same into all blocks of a cluster that the mask names, where it is counted as well.
__device__ __forceinline__ void copy_box_to(std::uint16_t blocks, unsigned to,
                                            const CUtensorMap& map, int column, int row, int plane,
                                            unsigned arrival) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::"
      "cluster [%0], [%1, {%2, %3, %4}], [%5], %6;\n" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(plane), "r"(arrival), "h"(blocks)
      : "memory");
}

/// One thread copies shared memory that was published to global memory, both at multiples of 16
/// bytes.
__device__ __forceinline__ void copy_out(void* to, unsigned from, unsigned bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n" ::"l"(to), "r"(from),
               "r"(bytes)
               : "memory");
}
/// Until everything is there that this thread copied so.
__device__ __forceinline__ void finish_copies() {
  asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;\n" ::: "memory");
}

/// Takes registers from the block's, or gives some back: so many for each thread from now on.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

/// Barriers between some of a block's warps, besides the first one, which is __syncthreads'.
template <int kBarrier, int kThreads>
__device__ __forceinline__ void wait_at() {
  asm volatile("bar.sync %0, %1;\n" ::"n"(kBarrier), "n"(kThreads) : "memory");
}

}  // namespace decode_engine::kernels::wgmma
