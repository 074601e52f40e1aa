// SPDX-License-Identifier: Apache-2.0
#include "floor_kernels.hpp"

#include "cohort/cuda/cuda_check.hpp"

namespace cohort::bench {

namespace {

constexpr int kThreads = 128;
constexpr std::int64_t kFirstWord = 4096;  // behind the number of the round
constexpr std::int64_t kSlotBytes = std::int64_t{1} << 20;

__global__ void round_kernel(std::uint32_t* round) { ++*round; }

template <Floor kFloor>
__global__ void floor_kernel(const __grid_constant__ FloorRank rank, std::uint32_t words,
                             std::uint32_t call) {
  cudaGridDependencySynchronize();
  const std::uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (kFloor == Floor::empty || i >= words) {
    return;
  }
  const auto* share = reinterpret_cast<const uint2*>(rank.in);
  auto* out = reinterpret_cast<uint2*>(rank.out);
  std::uint32_t round;
  asm volatile("ld.volatile.global.u32 %0,[%1];" : "=r"(round) : "l"(rank.own) : "memory");
  const uint2 mine = kFloor == Floor::gather ? share[i] : make_uint2(i, i);
  const std::uint32_t flag = round * 64 + call;
  const std::int64_t place = kFirstWord + (call & 1U) * kSlotBytes + std::int64_t{16} * i;
  asm volatile("st.volatile.global.v4.u32 [%0],{%1,%2,%3,%2};" ::"l"(rank.peer + place),
               "r"(mine.x), "r"(flag), "r"(mine.y)
               : "memory");
  if (kFloor == Floor::send) {
    return;
  }
  if (kFloor == Floor::gather) {
    out[rank.rank * words + i] = mine;
  }
  uint4 theirs;
  for (int polls = 0; polls < 1 << 24; ++polls) {
    asm volatile("ld.volatile.global.v4.u32 {%0,%1,%2,%3},[%4];"
                 : "=r"(theirs.x), "=r"(theirs.y), "=r"(theirs.z), "=r"(theirs.w)
                 : "l"(rank.own + place)
                 : "memory");
    if (theirs.y == flag && theirs.w == flag) {
      break;
    }
  }
  if (kFloor == Floor::gather) {
    out[(rank.rank ^ 1) * words + i] = make_uint2(theirs.x, theirs.z);
  }
}

template <Floor kFloor>
void launch(const FloorRank& rank, std::uint32_t words, std::uint32_t call, cudaStream_t stream) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3((words + kThreads - 1) / kThreads);
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  cuda_check(cudaLaunchKernelEx(&config, floor_kernel<kFloor>, rank, words, call),
             "cudaLaunchKernelEx");
}

}  // namespace

void launch_floor_round(const FloorRank& rank, cudaStream_t stream) {
  round_kernel<<<1, 1, 0, stream>>>(reinterpret_cast<std::uint32_t*>(rank.own));
  cuda_check(cudaGetLastError(), "round_kernel");
}

void launch_floor(Floor floor, const FloorRank& rank, std::int64_t share_bytes, std::uint32_t call,
                  cudaStream_t stream) {
  const auto words = static_cast<std::uint32_t>(share_bytes / 8);
  switch (floor) {
    case Floor::empty:
      return launch<Floor::empty>(rank, words, call, stream);
    case Floor::send:
      return launch<Floor::send>(rank, words, call, stream);
    case Floor::exchange:
      return launch<Floor::exchange>(rank, words, call, stream);
    case Floor::gather:
      return launch<Floor::gather>(rank, words, call, stream);
  }
}

}  // namespace cohort::bench
