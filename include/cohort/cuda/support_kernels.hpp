// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>

#include "cohort/dcp/kv_placement.hpp"
#include "cohort/dcp/lse_merge.hpp"
#include "cohort/dtype.hpp"

/// \file
/// Small kernels beside those of kernels.hpp: one launch each, can be captured, allocate nothing.
/// Pointers are device memory of the current device; strides count elements.

namespace cohort::cuda {

/// Finds out whether the library has code for the current device, before anything is enqueued.
/// @throw ConfigError naming the card and what the library was built for; TransportError if CUDA
/// refuses.
void require_code();

/// Enqueues an empty kernel, launched without programmatic stream serialization: it starts when
/// the work before it has ended and its writes are visible (see nccl/visibility_guard.hpp).
/// @throw TransportError if CUDA refuses the launch.
void launch_visibility_guard(cudaStream_t stream);

/// out[i] = in[i] for every index, from f32 to f16 or bf16, to nearest even. All spans have one
/// length of at most `kMaxConvertDims`.
/// @throw UsageError for other types or more dimensions.
inline constexpr int kMaxConvertDims = 5;
void convert_copy(const void* in, std::span<const std::int64_t> in_strides, void* out,
                  std::span<const std::int64_t> out_strides, std::span<const std::int64_t> shape,
                  DType out_dtype, cudaStream_t stream);

/// Most ranks, or splits of one, whose LSEs `merge_lse` takes.
inline constexpr int kMaxLseRanks = 256;

/// LSEs of n ranks, or splits of one, [n,B,h], and the merged ones, [B,h].
struct LseMerge {
  const float* lses = nullptr;
  std::int64_t rank_stride = 0;
  std::int64_t batch_stride = 0;
  std::int64_t head_stride = 0;
  float* merged = nullptr;
  std::int64_t merged_batch_stride = 0;
  std::int64_t merged_head_stride = 0;
  int ranks = 0;
  std::int64_t batch = 0;
  std::int64_t heads = 0;
  LseBase base = LseBase::e;
  const float* sink = nullptr;  ///< [h], or null.
  std::int64_t sink_stride = 1;
  const std::int32_t* local_tokens = nullptr;  ///< [B], or null; rows with 0 or less are empty.
  std::int64_t local_tokens_stride = 1;
};

/// merged[b,h] = log sum over the ranks of exp(lses[r,b,h]), by the rules of dcp/lse_merge.hpp.
/// @throw UsageError for more than `kMaxLseRanks` ranks.
void merge_lse(const LseMerge& arguments, cudaStream_t stream);

/// Calls `rows.place(b, j)` for every row: what a rank has of a decode step, from lengths on the
/// device. Nothing is launched for no rows.
void place_step(const dcp::KvRows& rows, cudaStream_t stream);

}  // namespace cohort::cuda
