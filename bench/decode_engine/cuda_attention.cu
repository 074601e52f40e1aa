// SPDX-License-Identifier: Apache-2.0
#include <cuda.h>
#include <fmt/format.h>

#include <array>

#include "attention_combine.cuh"
#include "attention_kernel.cuh"
#include "cohort/cuda/cuda_check.hpp"
#include "cohort/cuda/driver.hpp"
#include "cohort/error.hpp"
#include "cuda_kernels.hpp"

// Attention of one token of each sequence over the latent cache: scores, an online softmax and
// weighted values in one kernel, split over the tokens (T. Dao et al., "Flash-Decoding for
// long-context inference", 2023). Splits are combined by their cluster, or by a second kernel.
//
// A block takes 64 heads of a sequence and a range of its tokens, 64 at a time, which lie in shared
// memory once, as keys and as values, in one of three places. Its first warpgroup, which holds the
// queries in registers, works out the weights of tokens, and puts them where the rotated part of
// their keys was, which nobody reads any more. The two others add up half of the values each; a
// warp of theirs fetches. Two blocks with heads of one sequence are of a cluster, each of which
// fetches half of the tokens for both.
//
// What bounds this are the tensor cores, for which a tile is 2176 cycles of work, and shared
// memory, of which its products read 160 KiB at 128 bytes a cycle; queries from there would be 64
// KiB more. So that tensor cores have work while the first warpgroup is at its exponentials, values
// are added up behind the scores of the next tokens, and not beside them.

namespace decode_engine::kernels {

namespace {

/// With the kernel for these widths.
template <class Use>
void with_kernel(std::int64_t latent, std::int64_t rope, Use use) {
  if (latent == 512 && rope == 64) {
    use(attend_kernel<AttentionLayout<512, 64>>, AttentionLayout<512, 64>::kBytes);
  } else if (latent == 64 && rope == 16) {
    use(attend_kernel<AttentionLayout<64, 16>>, AttentionLayout<64, 16>::kBytes);
  } else {
    throw cohort::ConfigError(fmt::format(
        "a latent of {}+{}: attention on cards is there for 512+64 and 64+16", latent, rope));
  }
}

}  // namespace

void prepare_attention(std::int64_t latent, std::int64_t rope) {
  with_kernel(latent, rope, [](auto* kernel, unsigned shared) {
    cohort::cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            static_cast<int>(shared)),
                       "cudaFuncSetAttribute");
  });
}

namespace {

using Encode = decltype(&::cuTensorMapEncodeTiled);

/// Of bf16, the first extent lying without gaps, in boxes that lie in the order that products read.
CUtensorMap map_of(const BFloat16* data, const std::array<cuuint64_t, 3>& extents,
                   const std::array<cuuint64_t, 2>& strides, const std::array<cuuint32_t, 3>& box) {
  static const Encode encode = [] {
    Encode found = nullptr;
    cohort::detail::load_driver_function("cuTensorMapEncodeTiled", found);
    return found;
  }();
  const std::array<cuuint32_t, 3> steps = {1, 1, 1};
  CUtensorMap map{};
  const CUresult code =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, static_cast<cuuint32_t>(extents.size()),
             const_cast<BFloat16*>(data), extents.data(), strides.data(), box.data(), steps.data(),
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (code != CUDA_SUCCESS) {
    throw cohort::TransportError({.call = "cuTensorMapEncodeTiled", .native_code = code},
                                 "attention's rows or queries");
  }
  return map;
}

Maps maps_of(const Attention& a) {
  constexpr cuuint32_t kColumns = wgmma::kBlockColumns;
  const auto row = static_cast<cuuint64_t>(a.latent + a.rope);
  const auto batch = static_cast<cuuint64_t>(a.batch);
  const auto rows = batch * static_cast<cuuint64_t>(a.capacity);
  const bool whole = row % kColumns == 0;  // blocks are planes
  const auto copied = static_cast<cuuint32_t>(AttentionLayout<512, 64>::kCopyBlocks);
  return {.queries = map_of(a.q, {row, batch, static_cast<cuuint64_t>(a.heads)},
                            {2 * row, 2 * row * batch}, {kColumns, 1, kTile}),
          .rows = whole ? map_of(a.cache, {kColumns, rows, row / kColumns}, {2 * row, 2 * kColumns},
                                 {kColumns, kTile, copied})
                        : map_of(a.cache, {row, rows, 1}, {2 * row, 2 * row * rows},
                                 {kColumns, kTile, 1})};
}

}  // namespace

void attend(const Attention& a, const Splits& splits, cudaStream_t stream) {
  const std::int64_t groups = (a.heads + kTile - 1) / kTile;
  // Both kernels are launched early, and wait for the one before.
  std::array<cudaLaunchAttribute, 2> attributes{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x =
      static_cast<unsigned>(sharing_blocks(a.heads) * (splits.together ? splits.count : 1));
  attributes[1].val.clusterDim.y = 1;
  attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.stream = stream;
  config.attrs = attributes.data();
  config.numAttrs = 2;
  with_kernel(a.latent, a.rope, [&](auto* kernel, unsigned shared) {
    config.gridDim = static_cast<unsigned>(a.batch * groups * splits.count);
    config.blockDim = kThreads;
    config.dynamicSmemBytes = shared;
    cohort::cuda_check(cudaLaunchKernelEx(&config, kernel, a, splits, maps_of(a),
                                          static_cast<float>(a.scale * 1.4426950408889634)),
                       "kernel launch");
  });
  if (splits.count > 1 && !splits.together) {
    // Its blocks take the room that the first ones leave, and wait for the last.
    config.gridDim = static_cast<unsigned>(a.batch * a.heads);
    config.blockDim = static_cast<unsigned>(splits.sets * kCombining);
    config.dynamicSmemBytes = 0;
    config.numAttrs = 1;
    auto* const kernel = splits.sets == 1 ? combine_kernel<1, kCombinedAhead>
                         : splits.ahead   ? combine_kernel<4, kCombinedAhead>
                                          : combine_kernel<4, 0>;
    cohort::cuda_check(cudaLaunchKernelEx(&config, kernel, a, splits), "kernel launch");
  }
}

}  // namespace decode_engine::kernels
